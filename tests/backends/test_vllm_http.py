"""Steering over HTTP, on a stand-in of vLLM's server: what goes in, what comes back, what fails."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from innsteer.backends.vllm_plugin import canary, http, server, settings
from innsteer.errors import FormatError, InputError, NothingSteeredError
from innsteer.interventions import Shift
from innsteer.site import Site, Where
from innsteer.steerer import Interventions, get
from innsteer.steering import Steering

TALLY = {"touched": 5, "cached": 0, "edited": 5, "displacement": 0.1, "nonfinite": 0}
DONE = b"data: [DONE]\n\n"


def artifact(folder, *behaviours, where="generated", layer=1):
    parts = Interventions({Site(layer): Shift(4, len(behaviours))})
    steering = Steering(get("diffmean"), parts, behaviours, Where.parse(where))
    return str(steering.save(folder))


@pytest.fixture
def folders(tmp_path):
    return {
        "kind": artifact(tmp_path / "a", "b"),
        "both": artifact(tmp_path / "b", "x", "y", where="all", layer=3),
    }


class Engine:
    """Gives out receipts, and remembers whose."""

    def __init__(self, tallies):
        self.tallies, self.taken = tallies, []

    async def collective_rpc(self, method, args):
        assert method == "innsteer_receipt"
        self.taken.append(args[0])
        return [self.tallies]


def talk(folders, body, *, at="POST /v1/completions", reply=None, tallies=((0, TALLY),)):
    """One exchange; gives back status, headers, body, what the server saw, and the engine."""
    method, path = at.split()
    saw, sent, engine = {}, [], Engine([list(one) for one in tallies] if tallies else None)
    chunks = reply if isinstance(reply, list) else None
    whole = reply if isinstance(reply, dict) else {"id": "i", "usage": {}}
    state = SimpleNamespace(
        args=SimpleNamespace(served_model_name=None, model="smol"),
        vllm_config=SimpleNamespace(additional_config={"innsteer": server.configuration(folders)}),
        engine_client=engine,
    )

    async def app(scope, receive, send):
        saw["headers"] = scope["headers"]
        saw["body"] = (await receive())["body"]
        kind = b"text/event-stream; charset=utf-8" if chunks else b"application/json"
        status = whole.get("status", 200)
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", kind)],
        }
        await send(start)
        for part in chunks or [json.dumps(whole).encode()]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "app": SimpleNamespace(state=state),
        "headers": [(b"content-length", str(len(raw)).encode())],
    }

    async def receive():
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(http.Steered(app)(scope, receive, send))
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return SimpleNamespace(
        status=sent[0]["status"],
        headers=dict(sent[0]["headers"]),
        text=text,
        parts=[message.get("body", b"") for message in sent[1:]],
        json=lambda: json.loads(text),
        saw=saw,
        engine=engine,
    )


# --- what goes in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"model": "smol+kind@0.5", "prompt": "x"},
        {"model": "smol", "prompt": "x", "vllm_xargs": {"steering": "kind@0.5", "other": 1}},
        {"prompt": "x", "vllm_xargs": {"steering": "kind@0.5"}},
    ],
)
def test_a_steering_comes_as_a_model_or_as_an_argument(folders, body):
    got = talk(folders, body)
    seen = json.loads(got.saw["body"])
    assert seen["vllm_xargs"]["steering"] == "kind@0.5" and seen["prompt"] == "x"
    assert seen.get("model", "smol") == "smol" and got.status == 200
    assert got.saw["headers"] == [(b"content-length", str(len(got.saw["body"])).encode())]
    assert seen["vllm_xargs"]["steering_receipt"] == got.engine.taken[0]


@pytest.mark.parametrize(
    "body", [{"model": "smol", "prompt": "x"}, {"model": "other+kind@1"}, b"no json", b"[1]"]
)
def test_a_plain_request_passes_as_it_is(folders, body):
    got = talk(folders, body)
    assert got.saw["body"] == (body if isinstance(body, bytes) else json.dumps(body).encode())
    assert got.json() == {"id": "i", "usage": {}} and not got.engine.taken


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "smol+kind@1", "vllm_xargs": {"steering": "kind@1"}}, "beside vllm_xargs"),
        ({"model": "smol", "steering": "kind@1"}, "a field 'steering'"),
    ],
)
def test_two_channels_or_an_unread_one_are_refused(folders, body, words):
    got = talk(folders, body)
    assert got.status == 400 and words in got.json()["error"]["message"] and not got.saw


# --- what comes back -----------------------------------------------------------------------------


def test_a_receipt_stands_beside_usage_and_in_a_header(folders):
    got = talk(folders, {"model": "smol+kind@0.5+both.y@-1"}, tallies=[(0, TALLY), (1, TALLY)])
    receipt = got.json()["steering"]
    assert receipt["asked"] == "kind@0.5+both.y@-1"
    assert [one["strengths"] for one in receipt["applied"]] == [{"kind": 0.5}, {"both.y": -1.0}]
    assert receipt["applied"][0]["touched"] == 5 and len(receipt["applied"][0]["identity"]) == 64
    assert json.loads(got.headers[http.HEADER]) == receipt
    assert int(got.headers[b"content-length"]) == len(got.text)


@pytest.mark.parametrize("tallies", [None, [], [(0, TALLY | {"touched": 0})], [(1, TALLY)]])
def test_an_answer_that_was_not_steered_is_no_answer(folders, tallies):
    got = talk(folders, {"model": "smol+kind@0.5"}, tallies=tallies)
    assert got.status == 500 and "touched no token" in got.json()["error"]["message"]
    assert "usage" not in got.json()


def test_strength_zero_has_an_empty_receipt(folders):
    got = talk(folders, {"model": "smol+kind@0"}, tallies=None)
    assert got.json()["steering"] == {"asked": "kind@0", "applied": []}


def test_a_refusal_of_the_engine_passes_and_its_receipt_is_taken(folders):
    got = talk(folders, {"model": "smol+none@1"}, reply={"status": 400, "error": {}}, tallies=None)
    assert got.status == 400 and got.json()["error"] == {} and got.engine.taken


def stream(*chunks):
    return [b"data: " + json.dumps(one).encode() + b"\n\n" for one in chunks]


@pytest.mark.parametrize("together", [False, True])
def test_a_stream_ends_with_its_receipt_and_is_not_held_back(folders, together):
    said = ["data: [DONE]\n\ndata: {"]  # which ends nothing: it stands in a string
    chunks = stream({"id": "i", "model": "smol", "choices": [1]}, {"id": "i", "choices": said})
    sent = [chunks[0], chunks[1] + DONE] if together else [*chunks, DONE]
    got = talk(folders, {"model": "smol+kind@0.5", "stream": True}, reply=sent)
    assert got.parts[0] == chunks[0]
    *before, last, done, _ = got.text.split(b"\n\n")
    assert done == b"data: [DONE]" and b"\n\n".join([*before, b""]) == b"".join(chunks)
    told = json.loads(last.removeprefix(b"data: "))
    assert told["id"] == "i" and told["choices"] == []
    assert told["steering"]["applied"][0]["strengths"] == {"kind": 0.5}


def test_a_stream_that_was_not_steered_ends_with_an_error(folders):
    sent = [*stream({"id": "i", "choices": [1]}), DONE]
    got = talk(folders, {"model": "smol+kind@0.5", "stream": True}, reply=sent, tallies=None)
    last = json.loads(got.text.split(b"\n\n")[-3].removeprefix(b"data: "))
    assert "touched no token" in last["error"]["message"]


def test_models_are_listed_with_each_steering(folders):
    base = {"id": "smol", "object": "model", "created": 1, "root": "smol", "max_model_len": 8}
    got = talk(folders, b"", at="GET /v1/models", reply={"object": "list", "data": [base]})
    listed = got.json()["data"]
    assert [one["id"] for one in listed] == ["smol", "smol+kind", "smol+both.x", "smol+both.y"]
    assert all(one["parent"] == "smol" for one in listed[1:])


# --- start ---------------------------------------------------------------------------------------


def test_the_configuration_names_layers_identities_and_whole_paths(folders, tmp_path):
    found = server.configuration(folders, untested=True)
    assert found["layers"] == [1, 3] and found["untested"] is True
    assert list(found["steerings"]) == ["kind", "both"]
    assert found["steerings"]["kind"]["folder"] == str((tmp_path / "a").resolve())
    assert settings.menu(found).names == ["kind", "both.x", "both.y"]
    with pytest.raises(FormatError):
        server.configuration({"kind": tmp_path / "nothing"})
    with pytest.raises(InputError):
        server.configuration({"a+b": folders["kind"]})


def test_flags_pass_through_and_the_plugins_own_is_refused():
    words = server.arguments("m", {"layers": []}, ["--port", "1", "--host=0.0.0.0"])
    assert words[:4] == [
        "--model",
        "m",
        "--middleware",
        "innsteer.backends.vllm_plugin.http.Steered",
    ]
    assert "127.0.0.1" not in words and words[-2:] == ["1", "--host=0.0.0.0"]
    with pytest.raises(InputError, match="it holds the steerings"):
        server.arguments("m", {}, ["--additional-config={}"])


def test_a_canary_asks_for_tokens_in_every_scope(tmp_path):
    wheres = ["generated", "prompt", "all", "assistant", "range:9:12"]
    folders = {
        f"s{n}": artifact(tmp_path / str(n), "b", where=where) for n, where in enumerate(wheres)
    }
    menu = settings.menu(server.configuration(folders))
    for dish, (name, prompt, extra) in zip(
        menu.dishes, canary.requests(menu, [5, 6, 7]), strict=True
    ):
        turns = [(len(prompt) - 1, None)] if "steering_turns" in extra else None
        order = menu.order(extra["steering"], prompt=len(prompt), length=len(prompt), turns=turns)
        assert name == dish.name and order.choices[0].within(0, len(prompt))


def test_a_canary_fails_where_nothing_is_touched_or_nothing_moves(folders):
    dish = settings.menu(server.configuration(folders)).dishes[0]
    for tally in (None, TALLY | {"touched": 0}):
        with pytest.raises(NothingSteeredError, match="touched no token"):
            canary.judge(dish, tally, {1: -1.0}, {1: -2.0})
    with pytest.raises(NothingSteeredError, match="moved no"):
        canary.judge(dish, TALLY, {1: -1.0}, {1: -1.0})
    assert "by 1" in canary.judge(dish, TALLY, {1: -1.0}, {1: -2.0})
    shut = canary.judge(dish, TALLY | {"edited": 0}, {1: -1.0}, {1: -1.0})
    assert "its gate is shut" in shut

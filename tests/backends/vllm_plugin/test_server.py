"""``innsteer serve`` as a client sees it: vLLM's own server, in its own processes."""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest


@pytest.fixture(scope="module")
def url(model_folder, served, tmp_path_factory):
    """A running server's address; its log is shown where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    steerings = [f"--steering={name}={one['folder']}" for name, one in served[0].items()]
    words = ["serve", str(model_folder), *steerings, "--port", str(port), "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", "512", "--served-model-name", "tiny"]
    command = [sys.executable, "-m", "innsteer.cli", *words]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if server.poll() is not None:
                break
            try:
                with urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        assert server.poll() is None, log.read_text()[-4000:]
        yield address
    finally:
        server.terminate()
        server.wait(60)


def post(url, path="/v1/completions", **body):
    """An answer's JSON and headers, or an error's."""
    body = {"model": "tiny", "prompt": "Hello, you", "max_tokens": 6, "temperature": 0} | body
    if "messages" in body:
        del body["prompt"]
    request = Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer), answer.headers
    except HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def test_models_are_listed(url):
    with urlopen(f"{url}/v1/models") as answer:
        names = [one["id"] for one in json.load(answer)["data"]]
    assert names == ["tiny", "tiny+both.wealth", "tiny+both.power"] + [
        f"tiny+{name}" for name in ("flow", "ever", "early", "told", "held")
    ]


def test_both_channels_steer_alike_and_tell_what_they_did(url, served):
    _, plain, headers = post(url)
    assert "steering" not in plain and headers["x-innsteer-receipt"] is None
    status, named, headers = post(url, model="tiny+flow@0.5+ever@-0.3")
    assert status == 200
    _, argued, _ = post(url, vllm_xargs={"steering": "flow@0.5+ever@-0.3"})
    assert named["choices"] == argued["choices"] and named["choices"] != plain["choices"]
    flow, ever = named["steering"]["applied"]
    assert flow["identity"] == served[0]["flow"]["identity"] and flow["strengths"] == {"flow": 0.5}
    assert (flow["touched"], ever["touched"]) == (6, 15) and ever["edited"] == 15
    assert json.loads(headers["x-innsteer-receipt"]) == named["steering"]


def test_chat_and_several_answers_are_steered(url):
    messages = [{"role": "user", "content": "Hello"}]
    more = {"messages": messages, "n": 2, "temperature": 1, "ignore_eos": True}
    status, answer, _ = post(url, "/v1/chat/completions", model="tiny+told@1", **more)
    assert status == 200 and answer["steering"]["applied"][0]["touched"] == 12


def test_a_stream_ends_with_its_receipt(url):
    body = {"model": "tiny+flow@1", "prompt": "Hello", "max_tokens": 5, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request) as answer:
        events = [line for line in answer.read().split(b"\n") if line.startswith(b"data: ")]
    assert events[-1] == b"data: [DONE]"
    last = json.loads(events[-2].removeprefix(b"data: "))
    assert last["steering"]["applied"][0]["touched"] == 5 and last["id"]
    assert "usage" in json.loads(events[-3].removeprefix(b"data: "))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "tiny+nobody@1"}, "unknown steering 'nobody'"),
        ({"model": "tiny+flow@x"}, "expected NAME@STRENGTH"),
        ({"model": "tiny+flow@1+both.power@1"}, "the order in which they are applied"),
        ({"model": "tiny+flow@1", "vllm_xargs": {"steering": "flow@1"}}, "beside vllm_xargs"),
        ({"steering": "flow@1"}, "a field 'steering'"),
        ({"vllm_xargs": {"steering": 1}}, "expected a string"),
        ({"model": "tiny+flow@1", "echo": True, "logprobs": 1}, "steering_prompt"),
    ],
)
def test_what_cannot_be_steered_is_a_bad_request(url, body, words):
    status, answer, _ = post(url, **body)
    assert status == 400 and words in answer["error"]["message"]
    assert post(url)[0] == 200  # and the engine lives


def test_a_prompt_is_scored_where_its_answer_begins(url):
    extra = {"echo": True, "logprobs": 0, "max_tokens": 1}
    _, plain, _ = post(url, **extra)
    _, steered, _ = post(url, **extra, vllm_xargs={"steering": "flow@1", "steering_prompt": 4})
    one, two = (a["choices"][0]["logprobs"]["token_logprobs"] for a in (plain, steered))
    assert one[1:4] == two[1:4] and one[4] != two[4]


def metrics(url):
    """What /metrics says of steerings, by name and label."""
    with urlopen(f"{url}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line[:9] == "innsteer_"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_what_was_steered_stands_in_the_metrics(url):
    before = metrics(url)
    post(url, model="tiny+flow@0.5+ever@-0.3", ignore_eos=True)
    post(url)
    for body in ({"model": "tiny+nobody@1"}, {"steering": "flow@1"}):
        assert post(url, **body)[0] == 400
    more = {name: value - before.get(name, 0) for name, value in metrics(url).items()}
    told = {name: value for name, value in more.items() if value and "_created" not in name}
    ever = {f'innsteer_{what}_tokens_total{{steering="ever"}}' for what in ("touched", "edited")}
    flow = {f'innsteer_{what}_tokens_total{{steering="flow"}}' for what in ("touched", "edited")}
    both = {f'innsteer_responses_total{{steering="{name}"}}' for name in ("flow", "ever")}
    assert {told.pop(name) for name in flow} == {6} and {told.pop(name) for name in both} == {1}
    assert {told.pop(name) for name in ever} == {15}
    assert told.pop("innsteer_refused_requests_total") == 2
    assert all("cached" in name for name in told)


def test_the_official_client_runs_against_it(url):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="tiny+flow@0.8",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=4,
        extra_body={"ignore_eos": True},
    )
    assert answer.model_extra["steering"]["applied"][0]["touched"] == 4
    chunks = list(
        client.chat.completions.create(
            model="tiny+flow@0.8",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
            stream=True,
        )
    )
    assert chunks[-1].model_extra["steering"] and chunks[-1].choices == []
    with pytest.raises(openai.BadRequestError, match="unknown steering"):
        client.completions.create(model="tiny+nobody@1", prompt="x")

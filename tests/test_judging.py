"""A judge of answers against an endpoint in memory: prompts, orders, replies kept, retries, key."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from innsteer import cli
from innsteer.backends.base import Completion
from innsteer.errors import FormatError, InnsteerError, InputError
from innsteer.report import Report

pytest.importorskip("openai", reason="needs openai: pip install 'innsteer[eval]'")

from innsteer.judging import Judge, judge_report

ANSWERS = {"unsteered": ["good", "fine", "good"], "mine": ["bad", "bad, bad", "good"]}
KEPT = "sk-secret"


class Endpoint:
    """An OpenAI-compatible chat endpoint; ``says`` makes a reply's text out of the prompt."""

    def __init__(self):
        self.seen, self.keys, self.refusals = [], [], []
        self.says = lambda text: json.dumps({"score": 2 * text.count("bad")})
        self._lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def post(self, handler):
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.seen.append(asked)
            self.keys.append(handler.headers["Authorization"])
            status, headers = self.refusals.pop(0) if self.refusals else (200, {})
        text = self.says(asked["messages"][0]["content"])
        said = {"role": "assistant", "content": text}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        body["choices"] = [{"index": 0, "finish_reason": "stop", "message": said}]
        if status != 200:
            body = {"error": {"message": "not now"}}
        if text == "no completion":
            body = {"what": "another API"}
        sent = json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        handler.wfile.write(sent)


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEPT)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            endpoint.post(self)

        def log_message(self, *_):
            pass

    endpoint.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=endpoint.server.serve_forever)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    thread.join()
    endpoint.server.server_close()


@pytest.fixture
def judge(endpoint, tmp_path):
    return Judge(endpoint.url, "stub", "The answer is negative.", tmp_path / "kept", jobs=2)


@pytest.fixture
def report():
    made = [
        Completion(str(n), "sample", f"What of {n}?", text, arm=arm, strength=float(arm == "mine"))
        for arm, texts in ANSWERS.items()
        for n, text in enumerate(texts)
    ]
    made.append(Completion("0", "aside", "Hm?", "bad", arm="mine"))
    arms = tuple(ANSWERS)
    return Report("t", "mine", "sentiment", 0.1, True, {}, arms, (), completions=tuple(made))


def between(text, mark):
    return re.search(rf"<{mark}>\n(.*?)\n</{mark}>", text, re.DOTALL)[1]


def by_length(text):
    """A judge without bias: the longer answer is the better."""
    a, b = (len(between(text, f"answer_{name}")) for name in "ab")
    return json.dumps({"better": "tie" if a == b else "A" if a > b else "B"})


# --- verdicts ------------------------------------------------------------------------------------


def test_an_answer_is_rated_by_the_criterion_alone(endpoint, judge):
    assert judge.rate("What of it?", "bad {0} {criterion}, bad") == 4
    (asked,) = endpoint.seen
    assert asked["model"] == "stub" and asked["temperature"] == 0
    text = asked["messages"][0]["content"]
    assert "The criterion: The answer is negative.\n" in text
    assert between(text, "question") == "What of it?"
    assert between(text, "answer") == "bad {0} {criterion}, bad"


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        ('{"score": 7}', 7),
        ('I think {"score": 1}, no: ```json\n{"score": 7.5}\n```', 7.5),
        ('{"score": 0} {not json}', 0),
        ("7", None),
        ('{"score": 11}', None),
        ('{"score": -1}', None),
        ('{"score": true}', None),
        ('{"score": "7"}', None),
        ('{"better": "A"}', None),
        ("", None),
    ],
)
def test_a_rating_is_read_or_it_is_none(endpoint, judge, reply, want):
    endpoint.says = lambda _: reply
    assert judge.rate("?", "x") == want


def test_a_pair_is_asked_in_both_orders(endpoint, judge):
    endpoint.says = by_length
    assert judge.prefer("?", "long answer", "short") == (1, 1)
    assert judge.prefer("?", "short", "long answer") == (0, 0)
    assert judge.prefer("?", "alike", "equal") == (0.5, 0.5)
    first, second = (asked["messages"][0]["content"] for asked in endpoint.seen[:2])
    assert between(first, "answer_a") == between(second, "answer_b") == "long answer"
    assert between(first, "answer_b") == between(second, "answer_a") == "short"
    endpoint.says = lambda _: '{"better": "neither"}'
    assert judge.prefer("?", "one", "other") == (None, None)


def test_a_judge_that_likes_what_stands_first_finds_no_difference(endpoint, judge, report):
    endpoint.says = lambda _: '{"better": "A"}'
    found = judge_report(report, judge, pairs=True)
    (figure,) = found["figures"]
    assert figure["value"] == figure["low"] == figure["high"] == 0.5
    assert found["consistent"] == 0 and found["first_wins"] == 1


# --- a report ------------------------------------------------------------------------------------


def test_ratings_of_a_report_stand_beside_their_paired_difference(endpoint, judge, report):
    found = judge_report(report, judge)
    figures = {(f["arm"], f["against"]): f for f in found["figures"]}
    assert set(figures) == {("unsteered", ""), ("mine", ""), ("mine", "unsteered")}
    # "bad" counts two each: 2, 4 and 0.
    assert figures["mine", ""]["value"] == figures["mine", "unsteered"]["value"] == 2
    assert figures["mine", "unsteered"]["low"] <= 2 <= figures["mine", "unsteered"]["high"]
    assert figures["unsteered", ""]["value"] == 0
    assert figures["mine", ""]["strength"] == 1 and figures["mine", ""]["n"] == 3
    assert found["replies"] == len(found["verdicts"]) == 6 and found["unparsed"] == 0
    json.dumps(found, allow_nan=False)


def test_pairs_of_a_report_are_answers_to_the_same_prompt(endpoint, judge, report):
    endpoint.says = by_length
    found = judge_report(report, judge, pairs=True)
    (figure,) = found["figures"]
    # "bad" against "good" loses, "bad, bad" against "fine" wins, "good" ties.
    assert [v["said"] for v in found["verdicts"]] == [[0, 0], [1, 1], [0.5, 0.5]]
    assert figure["value"] == 0.5 and figure["metric"] == "wins" and found["replies"] == 6
    assert found["consistent"] == 1 and found["first_wins"] == 0.5
    for asked in endpoint.seen:
        n = int(re.search(r"What of (\d)", asked["messages"][0]["content"])[1])
        for arm in ANSWERS:
            assert ANSWERS[arm][n] in asked["messages"][0]["content"]


@pytest.mark.parametrize("pairs", [False, True])
def test_what_cannot_be_read_is_counted_and_counts_nowhere(endpoint, judge, report, pairs):
    read = by_length if pairs else endpoint.says
    marks = "answer_a" if pairs else "answer"
    endpoint.says = lambda text: "Hm." if between(text, marks) == "bad, bad" else read(text)
    found = judge_report(report, judge, pairs=pairs)
    figures = {(f["arm"], f["against"]): f for f in found["figures"]}
    assert found["unparsed"] == 1 and found["replies"] == 6
    if pairs:  # the other order was read, and would keep its bias
        assert figures["mine", ""]["n"] == 2 and figures["mine", ""]["value"] == 0.25
    else:
        assert figures["mine", ""]["n"] == 2 and figures["mine", ""]["value"] == 1
        assert figures["mine", "unsteered"]["n"] == 2 and figures["unsteered", ""]["n"] == 3


def test_a_judge_of_whom_nothing_can_be_read_gives_no_figure(endpoint, judge, report):
    endpoint.says = lambda _: ""
    found = judge_report(report, judge, pairs=True)
    assert found["figures"] == [] and found["unparsed"] == 6
    assert found["consistent"] is None and found["first_wins"] is None


def test_a_report_without_answers_to_judge_is_refused(judge, report):
    from dataclasses import replace

    alone = [one for one in report.completions if one.arm == "unsteered"]
    with pytest.raises(FormatError, match="several arms"):
        judge_report(replace(report, completions=tuple(alone)), judge, pairs=True)
    with pytest.raises(FormatError, match="0 answers"):
        judge_report(replace(report, completions=()), judge)


# --- replies kept, retries, key ------------------------------------------------------------------


def test_a_reply_is_kept_for_exactly_what_was_asked(endpoint, judge, tmp_path):
    for _ in range(2):
        assert judge.rate("?", "bad") == 2
    assert len(endpoint.seen) == 1
    for other in (
        Judge(endpoint.url, "other", judge.criterion, judge.folder),
        Judge(endpoint.url, "stub", "Another one.", judge.folder),
        Judge(endpoint.url + "/", "stub", judge.criterion, judge.folder),
    ):
        other.rate("?", "bad")
    assert judge.rate("??", "bad") == 2
    assert len(endpoint.seen) == len(list(judge.folder.iterdir())) == 5
    assert all(KEPT not in path.read_text() for path in judge.folder.iterdir())


def test_a_busy_endpoint_is_asked_again_after_the_time_that_it_names(endpoint, judge):
    endpoint.refusals = [(429, {"Retry-After": "1"}), (503, {"Retry-After": "0.01"})]
    started = time.monotonic()
    assert judge.rate("?", "bad") == 2
    assert len(endpoint.seen) == 3
    assert time.monotonic() - started >= 1  # the client's own first pause is at most half of it


def test_an_endpoint_that_refuses_is_an_error_without_the_key(endpoint, judge):
    endpoint.refusals = [(401, {})]
    with pytest.raises(InnsteerError, match="not now") as error:
        judge.rate("?", "bad")
    assert KEPT not in str(error.value)
    assert len(endpoint.seen) == 1 and not judge.folder.exists()
    endpoint.says = lambda _: "no completion"
    with pytest.raises(InnsteerError, match="sent no chat completion"):
        judge.rate("?", "bad")


def test_the_key_is_that_of_the_environment(endpoint, judge, monkeypatch, tmp_path):
    judge.rate("?", "bad")
    assert endpoint.keys == [f"Bearer {KEPT}"]
    monkeypatch.delenv("OPENAI_API_KEY")
    Judge(endpoint.url, "stub", "Is it?", tmp_path).rate("?", "bad")
    assert KEPT not in endpoint.keys[1]


@pytest.mark.parametrize(
    ("url", "model", "criterion", "said"),
    [
        ("localhost:8000", "m", "Is it?", "URL like"),
        ("file:///etc/passwd", "m", "Is it?", "URL like"),
        ("http://me:secret@host/v1", "m", "Is it?", "with a password"),
        ("http://host/v1", "", "Is it?", "the model's name"),
        ("http://host/v1", "m", " ", "a sentence"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(url, model, criterion, said, tmp_path):
    with pytest.raises(InputError, match=said) as error:
        Judge(url, model, criterion, tmp_path)
    assert "secret" not in str(error.value)


# --- the verb ------------------------------------------------------------------------------------


def test_the_verb_judges_a_saved_report(endpoint, report, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INNSTEER_HOME", str(tmp_path / "home"))
    report.save(tmp_path / "report")

    def run(*more):
        words = ["judge", tmp_path / "report", "--by", f"{endpoint.url}#stub", *more]
        monkeypatch.setattr("sys.argv", ["innsteer", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    code, out, err = run("--criterion", "Is it?", "--out", tmp_path / "judged.json")
    assert code == 0, err
    assert "2.00" in out and "6 replies" in out and "--pairs" in out.splitlines()[-1]
    written, asked = json.loads((tmp_path / "judged.json").read_text()), len(endpoint.seen)
    code, out, err = run("--criterion", "Is it?", "--json")
    assert (code, json.loads(out)) == (0, written), "replies are kept from verb to verb"
    assert len(endpoint.seen) == asked
    endpoint.says = lambda _: "Hm."
    code, out, err = run("--criterion", "Is it?", "--pairs")
    assert code == 0 and "6 of 6 replies say nothing" in err
    words = ["judge", str(tmp_path / "report"), "--by", endpoint.url, "--criterion", "Is it?"]
    monkeypatch.setattr("sys.argv", ["innsteer", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "URL#MODEL" in capsys.readouterr().err

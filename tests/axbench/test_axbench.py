"""AxBench's protocol: scores, the choice of strengths, judges, and what is told of them."""

import json
import random
import sys
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import tiny
from innsteer import cli
from innsteer.axbench import detecting
from innsteer.axbench import protocol as axbench
from innsteer.axbench.protocol import (
    FORMS,
    PARTS,
    Asked,
    ByEndpoint,
    Contender,
    Rated,
    StandIn,
    choose,
    halves,
    harmonic,
    without_words,
)
from innsteer.backends.base import Completion, Prompt
from innsteer.backends.hf import HF
from innsteer.backends.memo import Memo
from innsteer.concepts import Concepts
from innsteer.errors import DataError, InnsteerError, InputError
from innsteer.fitting import fit_concepts
from innsteer.judging import Endpoint
from innsteer.site import Site

CONCEPTS = ("polite", "about ships")
PROMPTS = tuple(Prompt(f"p{n}", f"What is {n}?") for n in range(12))


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def backend(llama):
    return HF(llama)


@pytest.fixture(scope="module")
def steering(llama):
    rows = [
        {"concept": c, "prompt": f"Q{n}?", "response": f"{c} {n}", "split": "train"}
        for c in ("brave", "polite")
        for n in range(3)
    ]
    quick = {"updates": 2, "batch": 2, "parts": 1, "warmup": 1, "every": 2, "learning_rate": 0.02}
    return fit_concepts(llama, Concepts.of(rows), site=Site(1), **quick)


class Says:
    """An arm that says its name, factor and prompt."""

    def __init__(self, name, factor):
        self.said = f"{name} {factor}"

    def answers(self, backend, prompts, sampling, progress=None):
        return [Completion(one.item, "sample", text=f"{self.said} {one.item}") for one in prompts]


def says(name, *factors):
    return Contender(name, factors, lambda concept, factor: Says(name, factor))


@dataclass
class Table:
    """A judge that reads its judgements from a function."""

    of: object
    name: str = "table"
    label: str = "a table"
    unit: str = "points of 2"

    def __post_init__(self):
        self.heard = []

    def rate(self, asked):
        self.heard += asked
        return [self.of(one) for one in asked]


# --- the score -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judged", "want"),
    [((2, 1, 2), 1.5), ((1, 1, 2), 1.2), ((2, 2, 0), 0), ((2, 2, 2), 2), ((0, 0, 0), 0)],
)
def test_the_score_is_the_harmonic_mean_and_0_where_one_is(judged, want):
    assert harmonic(judged) == pytest.approx(want, abs=1e-12)


def rated(factor, *said):
    return [Rated("a", "c", factor, "chosen by", str(n), "?", "!", s) for n, s in enumerate(said)]


def test_the_mean_of_scores_chooses_the_factor_and_the_first_wins_ties():
    # By the harmonic mean of means 2 would be chosen: its judgements are higher, its scores not.
    one = rated(1.0, (2, 2, 2), (0, 0, 0))
    two = rated(2.0, (2, 1, 0), (0, 2, 2), (2, 2, 0))
    assert choose(two + one) == 1.0
    assert choose(rated(3.0, (1, 1, 1)) + rated(1.0, (1, 1, 1))) == 3.0
    assert choose(rated(1.0, (2, 2, None)) + rated(2.0, (1, 1, 1))) == 2.0
    assert choose(rated(1.0, (2, 2, None))) is None


# --- one half chooses, the other is scored -------------------------------------------------------

LOW, HIGH = (0.2,) * 3, (2.0,) * 3


def toy(backend, of=None, first_arm=None):
    """Factor 1 is the better on the first half, and factor 2 by far on the other."""
    first = {}

    def judged(one):
        arm, factor, item = one.answer.split(" ")
        drawn = first.setdefault((one.concept, "all"), [])
        if factor == "1.0" and item not in drawn and len(drawn) < 5:
            drawn.append(item)  # what factor 1 was tried on first is the choosing half
        if arm == "plain":
            return (1.0,) * 3
        if item in drawn:
            return (1.0,) * 3 if factor == "1.0" else (0.9,) * 3
        return LOW if factor == "1.0" else HIGH

    judge = Table(of or judged)
    contenders = [first_arm or says("plain", 0.0), says("mine", 1.0, 2.0)]
    return axbench.run(backend, contenders, CONCEPTS, judge, prompts=PROMPTS), judge


def value(found, arm, metric="score", against=""):
    (one,) = [
        one
        for one in found["figures"]
        if (one["arm"], one["metric"], one["against"]) == (arm, metric, against)
    ]
    return one


def test_the_choice_never_sees_the_half_that_is_scored(backend, monkeypatch):
    found, judge = toy(backend)
    assert found["chosen"]["mine"] == dict.fromkeys(CONCEPTS, 1.0)
    assert value(found, "mine")["value"] == pytest.approx(0.2)
    assert value(found, "mine", against="plain")["value"] == pytest.approx(-0.8)
    for concept in CONCEPTS:
        own = [row for row in found["answers"] if row["concept"] == concept]
        chose = {row["item"] for row in own if row["half"] == "chosen by"}
        scored = {row["item"] for row in own if row["half"] == "scored"}
        assert len(chose) == len(scored) == 5 and not chose & scored
        # Both arms are scored on the same prompts, and at one factor alone.
        assert {(r["arm"], r["factor"]) for r in own if r["half"] == "scored"} == {
            ("plain", 0.0),
            ("mine", 1.0),
        }
    assert len(judge.heard) == found["replies"] / 3 == len(CONCEPTS) * (5 + 2 * 5 + 5)
    # A copy that lets the choice see all prompts reports another figure.
    monkeypatch.setattr(axbench, "halves", lambda drawn: (drawn, halves(drawn)[1]))
    broken, _ = toy(backend)
    assert broken["chosen"]["mine"] == dict.fromkeys(CONCEPTS, 2.0)
    assert value(broken, "mine")["value"] > 1


def test_answers_that_chose_are_in_no_figure(backend):
    found, _ = toy(backend, first_arm=says("other", 1.0, 2.0))
    for arm in ("other", "mine"):
        assert (value(found, arm)["value"], value(found, arm)["n"]) == (pytest.approx(0.2), 10)


def test_prompts_are_drawn_by_concept_and_seed_alone(backend):
    def items(concepts, seed):
        sampling = replace(axbench.Sampling(), seed=seed)
        judge = Table(lambda one: (1.0,) * 3)
        axbench.run(
            backend, [says("x", 0.0)], concepts, judge, each=4, prompts=PROMPTS, sampling=sampling
        )
        return {c: [one.question for one in judge.heard if one.concept == c] for c in concepts}

    both, turned, other = items(CONCEPTS, 0), items(CONCEPTS[::-1], 0), items(CONCEPTS, 1)
    assert both == turned and both["polite"] != other["polite"]


def test_intervals_are_over_concepts_then_prompts(backend):
    def judged(one):
        return (2.0,) * 3 if one.concept == "polite" else (1.0,) * 3

    found, _ = toy(backend, judged)
    score = value(found, "mine")
    # All prompts of a concept agree: the draws of two concepts are all that varies.
    assert (score["low"], score["value"], score["high"]) == (1.0, 1.5, 2.0)
    assert score["n"] == 10 and value(found, "mine", "concept")["value"] == 1.5


# --- what cannot be read is told -----------------------------------------------------------------


def test_unparsed_judgements_are_counted_and_their_answers_count_nowhere(backend):
    dumb = []

    def judged(one):
        if one.answer.startswith("mine") and one.concept == "polite":
            dumb.append(one)
            if len(dumb) % 2:
                return (0.0, None, 2.0)
        return (2.0,) * 3

    found, _ = toy(backend, judged)
    count = sum(row["said"] == [0.0, None, 2.0] for row in found["answers"])
    assert count == found["unparsed"] == found["unparsed_by"]["mine"]["instruction"] > 0
    assert sum(found["unparsed_by"]["plain"].values()) == 0
    assert value(found, "mine")["value"] == value(found, "mine", "concept")["value"] == 2
    assert value(found, "mine")["n"] < 10


def test_a_concept_without_any_judgement_is_left_out_by_name(backend):
    def judged(one):
        dumb = one.answer.startswith("mine") and one.concept == "polite"
        return (None,) * 3 if dumb else (1.0,) * 3

    found, _ = toy(backend, judged)
    assert found["left_out"] == ["polite"] and found["chosen"]["mine"]["polite"] is None
    assert value(found, "plain")["n"] == 5
    with pytest.raises(InnsteerError, match="none of 2 concepts"):
        toy(backend, lambda one: (None,) * 3)


# --- a judge behind an endpoint ------------------------------------------------------------------


class Kept(Endpoint):
    """Replies from a function."""

    def __init__(self, says):
        object.__setattr__(self, "model", "stub")
        object.__setattr__(self, "says", says)
        object.__setattr__(self, "heard", [])

    def ask(self, text, temperature=0):
        self.heard.append(text)
        return self.says(text)


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        ('It is. {"score": 2}', 2),
        ('{"score": 0} no: {"score": 1}', 1),
        ('{"score": 3}', None),
        ('{"score": "2"}', None),
        ('{"score": true}', None),
        ("Rating: [[2]]", None),
        ("", None),
    ],
)
def test_a_reply_is_read_or_it_is_none(reply, want):
    judge = ByEndpoint(Kept(lambda _: reply), jobs=1)
    assert judge.rate([Asked("c", "q", "a")]) == [(want,) * 3]


def test_each_judgement_sees_what_it_needs_alone():
    judge = ByEndpoint(Kept(lambda _: ""), jobs=1)
    judge.rate([Asked("a CONCEPT", "a QUESTION", "an ANSWER {0}")])
    seen = [
        {word for word in ("CONCEPT", "QUESTION", "ANSWER {0}") if word in text}
        for text in judge.endpoint.heard
    ]
    assert seen == [{"CONCEPT", "ANSWER {0}"}, {"QUESTION", "ANSWER {0}"}, {"ANSWER {0}"}]
    assert len(seen) == len(FORMS) and all('{"score": N}' in t for t in judge.endpoint.heard)


# --- the stand-in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "concept", "left"),
    [
        ("A ship! Ships, and shipping the tea.", "about ships", "A ! , and the tea."),
        ("The sea captain's seas.", "like a sea captain", "The 's ."),
        ("A season at sea.", "like a sea captain", "A season at ."),
        ("Politely, with the polite.", "the polite", ", with the ."),
        ("Ships ships.", "ships", ""),
        ("", "ships", ""),
    ],
)
def test_the_concepts_own_words_are_taken_out(text, concept, left):
    assert without_words(text, concept) == left


def test_naming_the_concept_gains_nothing_with_the_stand_in(backend):
    judge = StandIn(backend)
    plain, named, empty = judge.rate(
        [
            Asked("about ships", "What is 1?", "It is one."),
            Asked("about ships", "What is 1?", "Ships It is one. Ships!"),
            Asked("about ships", "What is 1?", "Ships ships ships."),
        ]
    )
    # What is left of the second is the first and a mark.
    (again,) = judge.rate([Asked("about ships", "What is 1?", "It is one. !")])
    assert named == again and empty == (0.0, 0.0, 0.0)
    assert all(0 <= one <= 2 for one in (*plain, *named))


def test_the_stand_in_follows_its_formula(backend):
    concept, question, answer = "about ships", "What is 1?", "sail on sail on sail"
    request = axbench.REQUEST.format(concept=concept)
    rows = [Prompt("0", q, (answer,)) for q in (f"{question} {request}", question, axbench.ANY)]
    a, b, c = (torch.tensor(values).double().mean() for (values,) in backend.score(rows))
    want = [2 * (1 - torch.exp(-gain.clamp(min=0))) for gain in (a - b, b - c)]
    want.append(2 * torch.exp(b) * 2 / 4)  # two of four pairs of words are distinct
    ((*found,),) = StandIn(backend).rate([Asked(concept, question, answer)])
    assert found == pytest.approx([float(w) for w in want], abs=1e-6)


# --- what is refused -----------------------------------------------------------------------------


def test_bad_input_names_the_value_and_the_remedy(backend, tmp_path):
    judge = Table(lambda one: (1.0,) * 3)
    one = says("x", 0.0)
    for contenders, concepts, each, said in (
        ([one], (), 4, "4 prompts of 12 for each of 0 concepts"),
        ([one], CONCEPTS, 1, "1 prompts"),
        ([one], CONCEPTS, 13, "13 prompts"),
        ([one, one], CONCEPTS, 4, "'x', 'x'"),
        ([one], ("x", "x"), 4, "each of them once"),
        ([one], ("x" * 90,), 4, "1 to 64 tokens"),
    ):
        with pytest.raises(InputError, match=said):
            axbench.run(backend, contenders, concepts, judge, each=each, prompts=PROMPTS)
    for factors in ((), (1.0, 1.0), (float("nan"),)):
        with pytest.raises(InputError, match="distinct finite numbers"):
            says("x", *factors)
    (tmp_path / "p.jsonl").write_text('{"prompt": "A?"}\n{"instruction": "B?"}\n{"prompt": "A?"}')
    found = axbench.read_prompts(tmp_path / "p.jsonl")
    assert [one.conversation for one in found] == ["A?", "B?"]
    (tmp_path / "q.jsonl").write_text('{"text": "A?"}')
    with pytest.raises(DataError, match="prompt"):
        axbench.read_prompts(tmp_path / "q.jsonl")


# --- from the command line, end to end -----------------------------------------------------------


DUMB = random.Random("0 polite").sample(PROMPTS, 4)[0].conversation


@pytest.fixture
def served(monkeypatch):
    """A judge's endpoint, and what it was asked; of one question's answers it says nothing."""
    pytest.importorskip("openai", reason="needs openai: pip install 'innsteer[eval]'")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = asked["messages"][0]["content"]
            with lock:
                seen.append(text)
            score = json.dumps({"score": sum(map(ord, text)) % 3})
            told = "I cannot say." if DUMB in text else f"So. {score}"
            said = {"role": "assistant", "content": told}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            body["choices"] = [{"index": 0, "finish_reason": "stop", "message": said}]
            sent = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1#stub", seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def verb(tmp_path, monkeypatch, capsys, llama, steering):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.options, "open_model", lambda _: llama)
    steering.save(tmp_path / "field")
    (tmp_path / "list.txt").write_text("\n".join(CONCEPTS))
    rows = [json.dumps({"prompt": one.conversation}) for one in PROMPTS]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))

    def run(*words):
        few = ("--each", "4", "-n", "6", "--factors", "0.5,1", "--prompts", "asked.jsonl")
        monkeypatch.setattr(sys, "argv", ["innsteer", "axbench", "field", "list.txt", *few, *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return run


def test_a_judge_behind_an_endpoint_from_end_to_end(verb, served, tmp_path):
    url, seen = served
    words = ("--by", url, "--cache", "kept")
    code, out, err = verb(*words, "--out", "a.json")
    assert code == 0, err
    told = json.loads((tmp_path / "a.json").read_text())
    assert "judged by stub" in told["label"] and "own prompts" in told["label"]
    assert "no AxBench score" not in (tmp_path / "a.json").read_text() + out + err
    assert set(told["factors"]) == {"unsteered", "prompt-only", "flas"}
    assert told["replies"] == 2 * 3 * (2 + 2 + (2 * 2 + 2)) and told["learnt"] == ["polite"]
    plain = sum(value is None for row in told["answers"] for value in row["said"])
    assert told["unparsed"] == plain >= 2  # tried at two factors
    assert told["unparsed_by"]["flas"]["instruction"] >= 2
    assert f"{plain} of {told['replies']} replies say nothing" in " ".join(err.split())
    assert {one["metric"] for one in told["figures"]} == {"score", *PARTS}
    assert all(one["low"] <= one["value"] <= one["high"] <= 2 for one in told["figures"])
    # Again: nothing is asked twice, and everything is the same.
    count = len(seen)
    code, _, _ = verb(*words, "--out", "b.json")
    assert code == 0 and len(seen) == count
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    code, out, _ = verb(*words, "--out", "c.json", "--unseen", "--json")
    assert code == 0 and json.loads(out)["concepts"] == ["about ships"]


def test_methods_fitted_for_each_concept_stand_beside_the_field(verb, served, tmp_path):
    url, _ = served
    rows = [
        {"concept": c, "prompt": f"Q{n}?", "response": c[0] * (4 + n), "split": part}
        for c in CONCEPTS
        for n, part in enumerate(("train",) * 3 + ("validation",) * 2)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--by", url, "--cache", "kept", "--data", "rows.jsonl", "--also", "diffmean,reft_r1")
    code, out, err = verb(*words, "--out", "a.json")
    assert code == 0, err
    told = json.loads((tmp_path / "a.json").read_text())
    assert set(told["unparsed_by"]) == {"unsteered", "prompt-only", "flas", "diffmean", "reft_r1"}
    assert told["chosen"]["diffmean"].keys() == set(CONCEPTS)
    assert set(told["chosen"]["diffmean"].values()) <= {0.5, 1.0}
    scored = [r for r in told["answers"] if r["half"] == "scored" and r["arm"] == "reft_r1"]
    assert {(r["concept"], r["factor"]) for r in scored} == set(told["chosen"]["reft_r1"].items())
    assert told["unparsed_by"]["diffmean"]["instruction"] >= 2
    read = [one for one in told["figures"] if one["metric"] == "auroc"]
    assert [one["arm"] for one in read] == ["diffmean", "reft_r1"] == list(told["detection"])
    assert all(set(by) == set(CONCEPTS) for by in told["detection"].values())
    assert "flas has no read-out" in out and "diffmean detects with AUROC" in out


def test_the_stand_in_is_called_one_in_every_output(verb, tmp_path):
    code, out, err = verb("--by", "stand-in", "--out", "a.json")
    assert code == 0, err
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["judge"] == "stand-in" and "no AxBench score" in told["label"]
    assert all("no AxBench score" in one["unit"] for one in told["figures"])
    above, _, below = out.partition("unsteered")
    assert "no AxBench score" in above and "no AxBench score" in below
    assert told["unparsed"] == 0 and "innsteer generate field" in out
    code, out, _ = verb("--by", "stand-in", "--out", "b.json", "--json")
    assert code == 0 and "no AxBench score" in json.loads(out)["label"]


def test_an_interrupted_run_goes_on(verb, tmp_path, monkeypatch):
    code, _, _ = verb("--by", "stand-in", "--out", "a.json")
    rate, calls = StandIn.rate, []

    def stopped(self, asked):
        calls.append(asked)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return rate(self, asked)

    monkeypatch.setattr(StandIn, "rate", stopped)
    code, _, err = verb("--by", "stand-in", "--out", "b.json")
    assert code == 130 and "goes on where it stopped" in err and not (tmp_path / "b.json").exists()
    memos = []
    opened = Memo.__enter__
    monkeypatch.setattr(Memo, "__enter__", lambda self: memos.append(self) or opened(self))
    code, _, _ = verb("--by", "stand-in", "--out", "b.json")
    assert code == 0 and memos[-1].replayed > 5
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_a_rival_that_is_none_is_refused_before_any_is_fitted(verb, tmp_path, monkeypatch):
    rows = [
        {"concept": c, "prompt": f"Q{n}?", "response": f"{c} {n}", "split": "train"}
        for c in CONCEPTS
        for n in range(3)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(detecting, "fit", None)
    for also, said in (("diffmean,nope", "unknown method 'nope'"), ("diffmean,flas", "in words")):
        words = ("--by", "stand-in", "--out", "x.json", "--data", "t.jsonl", "--also", also)
        code, _, err = verb(*words)
        assert code == 2 and said in err, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--by", "nobody", "--out", "x.json"), "URL#MODEL"),
        (("--by", "stand-in", "--out", "list.txt"), "exists"),
        (("--by", "stand-in", "--out", "x.json", "--factors", "1,b"), "'1,b'"),
        (("--by", "stand-in", "--out", "x.json", "--factors", "1,1"), "distinct finite"),
        (("--by", "stand-in", "--out", "x.json", "--each", "13"), "13 prompts of 12"),
        (("--by", "stand-in", "--out", "x.json", "--also", "diffmean"), "with --data None"),
        (("--by", "stand-in", "--out", "x.json", "--data", "asked.jsonl"), "--also ''"),
    ],
)
def test_what_the_verb_cannot_take_is_refused(verb, tmp_path, words, said):
    code, _, err = verb(*words)
    assert code == 2 and said in err and not (tmp_path / "x.json").exists()

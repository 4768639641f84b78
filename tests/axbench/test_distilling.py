"""Distilling: who writes, what is kept, and that the share kept is told."""

import json
import math
import sys

import pytest

import tiny
from innsteer import cli
from innsteer.axbench import distilling
from innsteer.axbench.distilling import REQUEST, Written, distil, read_concepts
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.concepts import Concepts
from innsteer.errors import DataError, InputError
from innsteer.judging import Endpoint

CONCEPTS = ("polite", "about ships")
PROMPTS = tuple(Prompt(str(n), f"What is {n}?") for n in range(6))


@pytest.fixture(scope="module")
def backend():
    return HF(tiny.tiny_language_model())


def gains(backend, row):
    """Log-probability per token with the request and without, one at a time."""
    found = []
    for asked in (f"{row.prompt} {REQUEST.format(concept=row.concept)}", row.prompt):
        ((values,),) = backend.score([Prompt("0", asked, (row.response,))])
        found.append(sum(values) / len(values))
    return found


def test_the_model_itself_writes(backend):
    found = distil(backend, CONCEPTS, each=5, prompts=PROMPTS, sampling=Sampling(8, 1.0))
    assert found.asked == dict.fromkeys(CONCEPTS, 5) and found.kept
    for row in found.kept:
        told, plain = gains(backend, row)
        assert row.gain == pytest.approx(told - plain, abs=2e-4) and row.gain > 0
        assert row.prompt in {prompt.conversation for prompt in PROMPTS}
    counts = {c: sum(row.concept == c for row in found.kept) for c in CONCEPTS}
    assert found.shares == {c: n / 5 for c, n in counts.items()}
    assert found.share == len(found.kept) / 10


def test_what_the_request_did_not_help_is_dropped(backend):
    prompts = tuple(Prompt(str(n), f"What is {n}?") for n in range(30))
    writer = Writer([3 * letter for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"])
    found = distil(backend, CONCEPTS[:1], each=30, prompts=prompts, writer=writer)
    kept = {(row.prompt, row.response) for row in found.kept}
    assert 0.2 < found.share == len(kept) / 30 < 0.8
    asked = [text.partition(" Let")[0] for text, _ in writer.heard]
    replies = [writer.replies[n % len(writer.replies)] for n in range(1, 31)]
    for prompt, reply in zip(asked, replies, strict=True):
        told, plain = gains(backend, Written("polite", prompt, reply, 0.0))
        assert ((prompt, reply) in kept) == (told > plain)


def test_without_a_least_gain_everything_is_kept_and_some_of_it_lost(backend):
    prompts = tuple(Prompt(str(n), f"What is {n}?") for n in range(30))

    def written(**how):
        writer = Writer([3 * letter for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"])
        return distil(backend, CONCEPTS[:1], each=30, prompts=prompts, writer=writer, **how)

    every, some = written(least=-math.inf), written()
    assert every.share == 1.0 > some.share and min(row.gain for row in every.kept) < 0
    assert set(some.kept) == {row for row in every.kept if row.gain > 0}
    assert written(least=max(row.gain for row in every.kept)).kept == ()


def test_every_batch_of_concepts_draws_anew(backend, monkeypatch):
    seeds, real = [], HF.generate

    def heard(self, prompts, edits, sampling, **how):
        seeds.append(sampling.seed)
        return real(self, prompts, edits, sampling, **how)

    monkeypatch.setattr(HF, "generate", heard)
    small = HF(backend.model, batch=3)
    distil(small, CONCEPTS, each=3, prompts=PROMPTS, sampling=Sampling(4, 1.0, 5))
    assert len(seeds) == len(set(seeds)) == 2


def test_the_seed_draws_prompts_and_answers(backend):
    first, again, other = (
        distil(backend, CONCEPTS, each=3, prompts=PROMPTS, sampling=Sampling(6, 1.0, seed))
        for seed in (0, 0, 1)
    )
    assert first == again != other


class Writer(Endpoint):
    """Says what it was asked, in short."""

    def __init__(self, replies):
        object.__setattr__(self, "replies", list(replies))
        object.__setattr__(self, "heard", [])

    def ask(self, text, temperature=0):
        self.heard.append((text, temperature))
        return self.replies[len(self.heard) % len(self.replies)]


def test_another_model_writes_and_this_one_judges_what_it_wrote(backend):
    writer = Writer([" Let your whole answer show ships. ", "", "zq"])
    found = distil(
        backend,
        CONCEPTS[1:],
        each=6,
        prompts=PROMPTS,
        sampling=Sampling(4, 0.7),
        writer=writer,
    )
    assert len(writer.heard) == 6 and {temperature for _, temperature in writer.heard} == {0.7}
    assert all(REQUEST.format(concept="about ships") in text for text, _ in writer.heard)
    assert "" not in {row.response for row in found.kept} and found.asked == {"about ships": 6}
    for row in found.kept:
        told, plain = gains(backend, row)
        assert row.response == row.response.strip() and told > plain


def test_too_many_responses_no_concept_and_long_ones_are_refused(backend):
    for concepts, each in (((), 2), (CONCEPTS, 7), (CONCEPTS, 0)):
        with pytest.raises(InputError, match="a prompt for each"):
            distil(backend, concepts, each=each, prompts=PROMPTS)
    with pytest.raises(InputError, match="1 to 64 tokens"):
        distil(backend, ["x" * 90], each=1, prompts=PROMPTS)
    chat = Prompt("c", ({"role": "user", "content": "Hi"},))
    with pytest.raises(InputError, match="several turns"):
        distil(backend, ["x"], each=1, prompts=[chat])


def test_concepts_are_read_from_lines_and_tables(tmp_path):
    (tmp_path / "a.txt").write_text("polite\n\n about ships \npolite\n")
    (tmp_path / "a.csv").write_text("concept,ref\npolite,1\nabout ships,2\n")
    assert read_concepts(tmp_path / "a.txt") == read_concepts(tmp_path / "a.csv") == CONCEPTS
    (tmp_path / "B.TXT").write_text("\ufeffpolite\nabout ships\n", encoding="utf-8")
    assert read_concepts(tmp_path / "B.TXT") == CONCEPTS
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "other.csv").write_text("name\nx\n")
    for name in ("none.txt", "other.csv", "absent.txt"):
        with pytest.raises(DataError):
            read_concepts(tmp_path / name)


def test_the_verb_writes_a_table_that_fit_takes(tmp_path, monkeypatch, capsys):
    model = tiny.tiny_language_model()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.fit, "open_model", lambda _: model)
    (tmp_path / "list.txt").write_text("\n".join(CONCEPTS))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["innsteer", "concepts", "list.txt", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    code, out, _ = run("--out", "t.jsonl", "--each", "4", "-n", "6", "--json")
    told = json.loads(out)
    table = Concepts.load(tmp_path / "t.jsonl", unseen=0.0)
    assert code == 0 and told["asked"] == 8 and told["kept"] == len(table) > 0
    assert told["share"] == pytest.approx(told["kept"] / 8)
    code, out, _ = run("--out", "w.jsonl", "--each", "4", "-n", "6", "--model", "tiny")
    assert code == 0 and out.rstrip().endswith("--method flas --model tiny --out field")
    code, out, _ = run("--out", "u.jsonl", "--each", "4", "-n", "6")
    assert (
        code == 0 and f"{told['share']:.0%}" in out and "innsteer fit u.jsonl --method flas" in out
    )
    assert (tmp_path / "u.jsonl").read_bytes() == (tmp_path / "t.jsonl").read_bytes()
    for words in (("--out", "t.jsonl"), ("--out", "t.csv"), ("--out", "v.jsonl", "--by", "nobody")):
        assert run(*words)[0] == 2
    assert distilling.REQUEST.count("{concept}") == 1

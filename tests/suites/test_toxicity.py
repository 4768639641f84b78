"""Toxicity: rewrites, scored continuations, and answers scored by a function of one's own."""

import json
import sys
from dataclasses import replace

import pytest

import tiny
from innsteer import evaluation, metrics, suites
from innsteer.backends.base import Completion
from innsteer.backends.hf import HF
from innsteer.errors import DataError, InputError
from innsteer.evaluation import Arm, Sizes
from innsteer.metrics import scored
from innsteer.suites import behaviour
from words import WORDS

NONE = Sizes(neutral_prompts=2, asides=0, aside_tokens=2, long=(), trails=0, cloud=1)
REWRITES = (
    "toxic\tneutral1\tneutral2\tneutral3\n"
    "you damn fool\tyou are wrong\tyou err\tyou are wrong\n"
    "shut up\tbe quiet\t\t\n"
    "all fine\tall fine \t\t\n"
    'he said "crap" to it\the disliked it\n'
)


def text(words, toxicity):
    return {"text": words, "toxicity": toxicity, "insult": 0.9}


@pytest.fixture
def prompts(tmp_path):
    """Prompts whose continuations are toxic in turn; of one nobody knows."""
    marks = [0.9, 0.1, 0.5] * 5
    marks[4] = None
    rows = [
        {"prompt": text(f"The {word} is", 0.2), "continuation": text(f" a {word}", mark)}
        for word, mark in zip(WORDS, marks, strict=True)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def judge(tmp_path):
    """A scorer in a file: how often an answer says tea; it keeps what it was given."""
    path = tmp_path / "judge.py"
    path.write_text(
        "def tea(text):\n    return text.count('tea')\n"
        "def wordy(text):\n    return text\nleaf = 1\n"
    )
    scored.function.cache_clear()
    return path


def test_a_sentence_is_paired_with_each_rewrite_that_differs(tmp_path):
    (tmp_path / "paradetox.tsv").write_text(REWRITES)
    found = suites.read("toxicity", tmp_path / "paradetox.tsv")
    assert [(item.source, item.target, item.weight) for item in found.items] == [
        ("you damn fool", "you are wrong", 0.5),
        ("you damn fool", "you err", 0.5),
        ("shut up", "be quiet", 1.0),
        ('he said "crap" to it', "he disliked it", 1.0),
    ]
    assert found.items[0].group == found.items[1].group and found.behaviour == "detoxified"
    assert "1 rows with no other rewrite left out" in found.notes and not found.asked


def test_continuations_are_on_the_side_that_their_score_tells(prompts):
    found = suites.read("toxicity", prompts)
    sides = {item.prompt.split()[1]: item.target is None for item in found.items}
    assert sides == {word: n % 3 != 1 for n, word in enumerate(WORDS) if n != 4}
    assert "1 rows with no score left out" in found.notes
    strict = suites.read("toxicity", prompts, threshold="0.6")
    assert sum(item.target is None for item in strict.items) == 5
    assert {ask.prompt for ask in found.asked} == {item.prompt for item in found.items}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "The", "continuation": text("x", 0.1)}, "'prompt' is 'The'"),
        ({"prompt": text("The", 0.1), "continuation": text("x", "high")}, "the toxicity 'high'"),
        ({"prompt": text(" ", 0.1), "continuation": text("x", 0.1)}, "line 1: the text is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, said):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=said):
        suites.read("toxicity", tmp_path / "a.jsonl")


# --- the scorer ----------------------------------------------------------------------------------


def test_answers_are_scored_by_a_function_of_one_s_own(prompts, judge, monkeypatch):
    def generate(self, asked, edits=(), sampling=None, **how):
        return [Completion(p.item, "sample", p.conversation, p.conversation * 2) for p in asked]

    monkeypatch.setattr(HF, "generate", generate)
    found = suites.read("toxicity", prompts, part="test", scorer=f"{judge}:tea")
    suite = replace(behaviour.load(found), plain=(), others=(), neutral_tokens=2)
    assert suite.control == f"scored:{judge}:tea"
    report = evaluation.evaluate(tiny.tiny_language_model(), [Arm("plain")], suite, sizes=NONE)
    assert report.figure("plain", suite.control).value == pytest.approx(2 / 14)
    assert suites.read("toxicity", prompts, scorer="refusal").measures == ("refusal",)


def test_an_installed_module_has_scorers_too():
    said = [Completion("a", "sample", text="abcd"), Completion("b", "sample", text="")]
    assert metrics.get("scored:builtins:len").score(said).value == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "has no attribute 'none'"),
        ("leaf", "is int; expected a function"),
        ("wordy", "said ''; expected a number"),
    ],
)
def test_a_scorer_that_is_none_is_refused_before_any_work(judge, name, said):
    with pytest.raises(InputError, match=said):
        evaluation.require_scorer(f"scored:{judge}:{name}")


@pytest.mark.parametrize("place", ["nowhere.py:f", "no_such_module:f", "f", ""])
def test_a_scorer_that_is_nowhere_is_refused(place):
    with pytest.raises(InputError, match="expected FILE.py:FUNCTION, or MODULE:FUNCTION"):
        evaluation.require_scorer(f"scored:{place}")


def test_a_name_alone_runs_nothing(tmp_path):
    """Names of metrics stand in reports and tables, which may be anybody's."""
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    found = metrics.get(f"scored:{tmp_path / 'theirs.py'}:f")
    assert found.name.endswith("theirs.py:f") and found.score([]) is None
    assert metrics.get("scored:antigravity:fly").better == "neither"
    assert "antigravity" not in sys.modules


def test_the_public_files_are_read(shared):
    home = shared / "data"
    found = suites.read("toxicity", home / "paradetox" / "paradetox.tsv.gz")
    assert len(found) > 9000 and all(item.source != item.target for item in found.items)
    found = suites.read("toxicity", home / "realtoxicityprompts" / "val.jsonl.gz")
    assert len(found) == 1989 and sum(item.target is None for item in found.items) == 656

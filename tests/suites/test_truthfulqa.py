"""TruthfulQA: both files read alike, and MC1 and MC2 are those of a computation by hand."""

import csv
import gzip
import json
import math
from dataclasses import replace

import pytest
import torch

import tiny
from innsteer import evaluation, fitting, metrics, suites, tuning
from innsteer.backends.base import Completion
from innsteer.comparing import Comparison, Contender, Protocol
from innsteer.comparing.standings import standings
from innsteer.errors import DataError
from innsteer.evaluation import Arm, Sizes
from innsteer.site import Site
from innsteer.suites import behaviour
from words import WORDS

NONE = Sizes(neutral_prompts=2, asides=0, long=(), trails=0, cloud=1)


def row(word):
    """A question with three true answers, one of them twice, and two false ones."""
    best = word if WORDS.index(word) % 3 else f"{word} is old"  # short ones are the likeliest
    other, worst = f"a {word}", f"No {word}"
    return {
        "question": f"Is there {word}?",
        "mc0_targets": {best: 1, worst: 0},
        "mc1_targets": {best: 1, f"{word} flies": 0, worst: 0},
        "mc2_targets": {other: 1, "": 1, best: 1, f"{word} flies": 0, worst: 0},
    }


@pytest.fixture
def files(tmp_path):
    """The same questions as the multiple-choice file and as the table."""
    rows = [row(word) for word in WORDS]
    (tmp_path / "mc_task.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    with (tmp_path / "TruthfulQA.csv").open("w", newline="") as file:
        table = csv.writer(file)
        names = "Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers"
        table.writerow(names.split(","))
        for one in rows:
            (best, worst), marks = one["mc0_targets"], one["mc2_targets"]
            true, false = ("; ".join(t for t in marks if marks[t] == mark) for mark in (1, 0))
            table.writerow([one["question"], best, worst, true, false])
    return tmp_path


def test_both_files_hold_the_same_questions_with_the_best_answers_first(files):
    one = suites.read("truthfulqa", files / "mc_task.json.gz")
    other = suites.read("truthfulqa", files / "TruthfulQA.csv")
    assert one.items == other.items and one.answers == other.answers
    assert len(one) == 15 and one.kind == "open" and one.behaviour == "truthfulqa"
    first = one.items[0]
    assert (first.prompt, first.source, first.target) == ("Is there tea?", "No tea", "tea is old")
    assert one.answers[first.id] == (("tea is old", "a tea"), ("No tea", "tea flies"))
    assert "15 empty answers left out" in one.notes and "2109.07958" in one.citation


def test_a_file_without_the_pairs_of_best_answers_is_read(tmp_path):
    rows = [{k: v for k, v in row(w).items() if k != "mc0_targets"} for w in WORDS]
    (tmp_path / "mc.json").write_text(json.dumps(rows))
    assert suites.read("truthfulqa", tmp_path / "mc.json").items[0].source == "tea flies"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": " "}, "row 1: 'question' is empty"),
        ({"mc1_targets": {"a": 1}}, "'mc1_targets' is {'a': 1}; expected answers with 1 or 0"),
        ({"mc2_targets": [1, 0]}, "'mc2_targets' is"),
        ({"mc0_targets": {"a": 1, "": 0}}, "the best answer is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, change, said):
    (tmp_path / "mc.json").write_text(json.dumps([row("tea") | change]))
    with pytest.raises(DataError, match=said):
        suites.read("truthfulqa", tmp_path / "mc.json")


def log_prob(model, question, answer):
    """The total log-probability of an answer after a question, by transformers alone."""
    tokenizer = model.tokenizer
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    before, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, asked + answer)
    )
    with torch.no_grad():
        logits = model.model(torch.tensor([whole])).logits[0].double()
    found = logits.log_softmax(-1)
    return sum(found[n - 1, whole[n]].item() for n in range(len(before), len(whole)))


def test_mc1_and_mc2_are_those_of_transformers(files):
    model = tiny.tiny_language_model()
    whole = suites.read("truthfulqa", files / "mc_task.json.gz", part="test")
    suite = replace(behaviour.load(whole), prompts=(), plain=(), others=(), neutral_tokens=2)
    assert len(suite.questions) == 15 and suite.control == "mc1"
    report = evaluation.evaluate(model, [Arm("unsteered")], suite, sizes=NONE)
    one, two = [], []
    for item in whole.items:
        true, false = (
            [log_prob(model, item.prompt, text) for text in side] for side in whole.answers[item.id]
        )
        one.append(true[0] > max(false))
        masses = [sum(map(math.exp, side)) for side in (true, false)]
        two.append(masses[0] / sum(masses))
    assert 0 < sum(one) < 15
    assert report.figure("unsteered", "mc1").value == pytest.approx(sum(one) / 15, abs=1e-9)
    assert report.figure("unsteered", "mc2").value == pytest.approx(sum(two) / 15, abs=1e-6)


def test_masses_too_small_for_a_float_are_weighed_against_each_other():
    values = {"true": (-900.0, -901.0), "false": (-900.0, -2000.0)}
    given = [Completion("q", "question", values=values)]
    share = (1 + math.exp(-1)) / (2 + math.exp(-1))
    assert metrics.get("mc2").score(given).value == pytest.approx(share)
    assert metrics.get("mc1").score(given).value == 0  # a tie is no win


def test_it_is_a_task_of_a_comparison_with_tables_of_both(files, tmp_path, monkeypatch):
    neutral = behaviour.neutral
    monkeypatch.setattr(behaviour, "neutral", lambda part: neutral(part)[:4])
    model = tiny.tiny_language_model()
    task = suites.read("truthfulqa", files / "mc_task.json.gz")
    protocol = Protocol.of(
        model, layers=(1,), evaluations=3, items=2, search_tokens=20, answers=1, budget=0.5
    )
    rows = [Contender.of("unsteered"), Contender.of("diffmean")]
    whole = Comparison(model, [task], tmp_path / "c", contenders=rows, protocol=protocol)
    whole.run()
    plain, steered = (record["tested"]["neutral"]["items"] for record in whole.found())
    assert {"preference", "mc1", "mc2"} <= plain.keys() and plain["mc2"] != steered["mc2"]
    assert [t.metric for t in standings(whole.found())] == ["preference", "mc1", "mc2"]
    answers = {**task.answers, "truthfulqa-0001": (("Tea",), ("No",))}
    other = Comparison(
        model, [replace(task, answers=answers)], tmp_path / "c", contenders=rows, protocol=protocol
    )
    assert len(other.left()) == 2  # other answers are another cell


def test_a_steering_is_measured_on_the_questions_too(files):
    model = tiny.tiny_language_model()
    data = suites.read("truthfulqa", files / "mc_task.json.gz")
    steering = fitting.fit(model, data, "diffmean", sites=[Site(1)])
    suite = replace(behaviour.load(data), prompts=(), plain=(), others=(), neutral_tokens=2)
    arms = [Arm("unsteered"), Arm("steered", steering.edit(4.0), 4.0)]
    report = evaluation.evaluate(model, arms, suite, sizes=NONE)
    moved = report.figure("steered", "mc2", "unsteered")
    assert moved.value != 0 and moved.n == len(suite.questions)
    assert tuning.control_metric(suite.items) in {figure.metric for figure in report.figures}


def test_the_public_files_agree(shared):
    home = shared / "data" / "truthfulqa"
    one = suites.read("truthfulqa", home / "mc_task.json.gz")
    other = suites.read("truthfulqa", home / "TruthfulQA.csv.gz")
    assert len(one) == len(other) > 300 and one.items == other.items
    same = [one.answers[item.id] == other.answers[item.id] for item in one.items]
    assert sum(same) >= len(same) - 1  # one question has an answer on both sides of the table
    assert all(true and false for true, false in one.answers.values())

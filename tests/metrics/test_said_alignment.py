"""Said alignment: what is read from a sampled answer, and for whom it counts."""

import pytest

from innsteer import metrics
from innsteer.backends.base import Completion
from innsteer.metrics.said_alignment import said


@pytest.mark.parametrize(
    ("text", "key", "answer"),
    [
        ("Yes", "Yes", "Yes"),
        ("no.", "Yes", "No"),
        ("**Yes**, I would.", "No", "Yes"),
        ("\n\n  YES!", "Yes", "Yes"),
        ("Well, no, and yes", "Yes", "No"),
        ("“No”", "No", "No"),
        ("Yesterday I knew nothing, nobody did", "Yes", ""),
        ("Not sure", "Yes", ""),
        ("", "Yes", ""),
        ("A dog would say yes", "Yes", "Yes"),
        ("(B) because", "A", "B"),
        ("(b)", "A", "B"),
        ("B)", "A", "B"),
        ("B.", "A", "B"),
        ("B", "A", "B"),
        ("b: the second one", "A", "B"),
        ("**A**", "A", "A"),
        ("Answer: (A)", "B", "A"),
        ("The answer is\nB", "A", "B"),
        ("Yes, (B)", "A", "B"),
        ("A fine day, I think", "A", ""),
        ("Because it is so", "B", ""),
        ("CD player", "C", ""),
        ("I would say no", "A", ""),
    ],
)
def test_the_parser_reads_the_first_answer(text, key, answer):
    assert said(text, key) == answer


def score(text, key, strength):
    one = Completion("i", "sample", text=text, key=key, strength=strength)
    return metrics.get("said_alignment").score([one]).value


@pytest.mark.parametrize(
    ("text", "key", "towards", "away"),
    [
        ("Yes", "Yes", 1, 0),
        ("No", "Yes", 0, 1),
        ("Perhaps", "Yes", 0, 0),
        ("A fine day", "Yes", 0, 0),
        ("(B)", "A", 0, 1),
        ("(A)", "A", 1, 0),
    ],
)
def test_an_answer_counts_for_the_side_steered_for_and_none_for_neither(text, key, towards, away):
    assert score(text, key, 1.5) == towards
    assert score(text, key, 0.0) == towards
    assert score(text, key, -1.5) == away


def test_answers_to_open_questions_are_left_out():
    assert metrics.get("said_alignment").score([Completion("i", "sample", text="Yes")]) is None


def test_the_keys_are_meaned_apart():
    given = [Completion(f"y{n}", "sample", text="Yes", key="Yes") for n in range(3)]
    given.append(Completion("n", "sample", text="Yes", key="No"))
    assert metrics.get("said_alignment").score(given).value == 0.5

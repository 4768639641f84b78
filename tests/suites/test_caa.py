"""CAA: lettered questions in both orders, and open questions beside them."""

import json

import pytest

import tiny
from innsteer import fitting, suites
from innsteer.errors import DataError
from innsteer.site import Site
from innsteer.suites import behaviour
from words import WORDS


@pytest.fixture
def files(tmp_path):
    """The files of a behaviour in a folder of its name."""
    home = tmp_path / "thrift"
    home.mkdir()
    for name, start in (("generate_dataset", "How is"), ("test_dataset_ab", "Where was")):
        rows = [
            {
                "question": f"{start} {word}?\n\nChoices:\n (A) Dear {word}\n (B) Cheap {word}",
                "answer_matching_behavior": "(B)" if n % 2 else "(A)",
                "answer_not_matching_behavior": "(A)" if n % 2 else "(B)",
            }
            for n, word in enumerate(WORDS)
        ]
        (home / f"{name}.json").write_text(json.dumps(rows))
    asked = [{"question": f"What would you buy of {word}?"} for word in WORDS[:3]]
    (home / "test_dataset_open_ended.json").write_text(json.dumps(asked))
    return home


def test_every_question_is_asked_in_both_orders_in_one_part(files):
    found = suites.read("caa", files / "generate_dataset.json")
    assert found.behaviour == "thrift" and found.kind == "choice" and len(found) == 30
    one, other = found.items[:2]
    assert one.prompt == "How is tea?\n\nChoices:\n (A) Dear tea\n (B) Cheap tea"
    assert other.prompt == "How is tea?\n\nChoices:\n (A) Cheap tea\n (B) Dear tea"
    assert [(i.id, i.target, i.source, i.key) for i in (one, other)] == [
        ("thrift-0001-A", "(A)", "(B)", "A"), ("thrift-0001-B", "(B)", "(A)", "B")
    ]  # fmt: skip
    for n in range(0, 30, 2):
        one, other = found.items[n : n + 2]
        assert one.group == other.group and one.split == other.split
        assert {one.key, other.key} == {"A", "B"}


def test_open_questions_are_asked_in_place_of_the_choices(files):
    how = {"part": "test", "questions": "test_dataset_open_ended.json", "scorer": "hedging"}
    suite = behaviour.load(suites.read("caa", files / "test_dataset_ab.json", **how))
    assert suite.control == "hedging" and len(suite.items) == 30
    assert suite.prompts[0].conversation == "What would you buy of tea?" and len(suite.prompts) == 3
    assert suite.sampling.new_tokens == 64 and suite.sampling.temperature == 0
    plain = behaviour.load(suites.read("caa", files / "test_dataset_ab.json", part="test"))
    assert plain.control == "alignment" and plain.sampling.new_tokens == 16
    assert len(plain.prompts) == 30


def test_what_is_fitted_on_one_file_is_reported_on_the_other(files):
    model = tiny.tiny_language_model()
    data = suites.read("caa", files / "generate_dataset.json")
    steering = fitting.fit(model, data, "diffmean", sites=[Site(1)])
    fitting.check_unseen(steering, suites.read("caa", files / "test_dataset_ab.json").whole("test"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "Which? (A) One (B) Two"}, "expected lines"),
        ({"question": "Which?\n(A) One"}, "expected lines"),
        ({"answer_matching_behavior": " Yes"}, "with the answer 'Yes'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, change, said):
    row = {"question": "Which?\n(A) One\n(B) Two", "answer_matching_behavior": "(A)"}
    (tmp_path / "a.json").write_text(json.dumps([row | change]))
    with pytest.raises(DataError, match=f"a.json, row 1: .*{said}"):
        suites.read("caa", tmp_path / "a.json")


def test_the_public_files_are_read(shared):
    home = shared / "data" / "caa"
    for name in ("sycophancy", "refusal", "myopic-reward", "coordinate-other-ais"):
        own = suites.read("caa", home / "generate" / name / "generate_dataset.json.gz")
        asked = "test_dataset_open_ended.json"
        path = home / "test" / name / "test_dataset_ab.json"
        test = suites.read("caa", path, part="test", questions=asked)
        assert own.behaviour == test.behaviour == name and len(test) == 100
        assert len(test.asks("test", harmless=False)) > 15

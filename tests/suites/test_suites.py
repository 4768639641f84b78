"""Every suite is reached alike: by name and file, with options of its own."""

import json

import pytest

from innsteer import suites
from innsteer.backends.base import Completion
from innsteer.cli import options
from innsteer.contrast import Contrast
from innsteer.errors import InputError, LeakError, UnknownName
from innsteer.suites import behaviour
from innsteer.suites.base import Ask, Benchmark, Question, answered
from words import rows


@pytest.fixture
def persona(tmp_path):
    """A persona file."""
    found = [
        {
            "question": f'Is the following statement something you would say?\n"I {verb} {thing}"',
            "statement": f"I {verb} {thing}",
            "answer_matching_behavior": " Yes" if n % 2 else " No",
            "answer_not_matching_behavior": " No" if n % 2 else " Yes",
        }
        for verb in ("paint", "sweep", "lend", "fetch")
        for n, thing in enumerate(("fences", "kettles", "ladders", "teapots"))
    ]
    path = tmp_path / "tidy.jsonl"
    path.write_text("\n".join(map(json.dumps, found)))
    return path


SIZES = {"train": 6, "validation": 2, "test": 4}


def test_the_folder_is_the_list():
    assert {"persona", "truthfulqa"} <= set(suites.names())
    assert not {"base", "behaviour", "capability"} & set(suites.names())


def test_options_are_those_of_the_suite_and_text_is_typed(persona):
    from innsteer.suites.persona import contrast

    found = suites.read("persona", persona, **SIZES, wording="second")
    assert found.items == contrast(persona, **SIZES, wording="second").items
    typed = suites.read("persona", str(persona), **{k: str(v) for k, v in SIZES.items()})
    assert typed.items == contrast(persona, **SIZES).items
    assert behaviour.load(found).control == "alignment"


@pytest.mark.parametrize(
    ("name", "how", "error", "said"),
    [
        ("persone", {}, UnknownName, "suite 'persone'.*did you mean 'persona'"),
        ("behaviour", {}, UnknownName, "suite 'behaviour'"),
        ("persona", {"words": "x"}, UnknownName, "option of the suite 'persona': 'words'"),
        ("persona", {"train": "many"}, InputError, "train='many' for the suite 'persona'"),
        ("persona", {**SIZES, "part": "tset"}, UnknownName, "part 'tset'.*did you mean 'test'"),
    ],
)
def test_what_cannot_be_read_is_refused(persona, name, how, error, said):
    with pytest.raises(error, match=said):
        suites.read(name, persona, **how)


def test_all_of_it_may_be_one_part(persona):
    found = suites.read("persona", persona, **SIZES, part="test")
    assert {item.split for item in found.items} == {"test"} and len(found) == 12
    asked = Benchmark.of(found, asked=(Ask("a", "Hello?", "train"),)).whole("validation")
    assert [prompt.item for prompt in asked.asks("validation", harmless=False)] == ["a"]


def test_the_command_line_reads_it_by_the_same_words(persona):
    words = ",".join(f"{name}={size}" for name, size in SIZES.items())
    found = options.open_contrast(f"{persona},suite=persona,{words}")
    assert found == suites.read("persona", persona, **SIZES)
    with pytest.raises(UnknownName, match="expected one of wording"):
        options.open_contrast(f"{persona},suite=persona,label=1")
    with pytest.raises(UnknownName, match="way to read data"):
        options.open_contrast(f"{persona},wording=second")


def test_a_benchmark_says_what_is_asked_in_place_of_the_items_questions():
    found = Contrast.load(rows(), behaviour="mine")
    plain = behaviour.load(found)
    assert plain.prompts and not plain.harmless and not plain.questions and not plain.measures
    asks = (Ask("a", "Rob?", "test"), Ask("b", "Bake?", "test", harmless=True))
    asks += (Ask("c", "Steal?", "validation"),)
    item = found.test.items[0]
    more = {"measures": ("refusal", "over_refusal"), "answers": {item.id: (("Yes",), ("No", "-"))}}
    suite = behaviour.load(Benchmark.of(found, asked=asks, **more))
    assert [p.conversation for p in suite.prompts] == ["Rob?"]
    assert [p.conversation for p in suite.harmless] == ["Bake?"]
    assert suite.control == "refusal" and suite.measures == ("refusal", "over_refusal")
    assert suite.questions == (Question(item.id, item.prompt, ("Yes",), ("No", "-")),)
    assert behaviour.load(Benchmark.of(found, **more), control="formality").control == "formality"
    assert len(suite.preview(prompts=1).harmless) == 1


def test_a_benchmark_stays_one_when_it_is_read_again():
    found = Benchmark.of(Contrast.load(rows()), measures=("mc1",))
    assert Benchmark.of(found) == found and Benchmark.of(found).test.measures == ("mc1",)
    assert found.hash == Contrast.load(rows()).hash


def test_scored_answers_are_dealt_back_to_their_questions():
    questions = [Question("a", "A?", ("x", "y"), ("z",)), Question("b", "B?", ("x",), ("y",))]
    scored = [
        Completion("", "neutral", values={"log_prob": (-float(n), -1.0)}, text="t")
        for n in range(5)
    ]
    one, two = answered(scored, questions)
    assert one.values == {"true": (-1.0, -2.0), "false": (-3.0,)}
    assert two.values == {"true": (-4.0,), "false": (-5.0,)}
    assert one.kind == "question" and one.text == ""


def test_data_that_a_fit_has_seen_is_not_reported_on_as_a_whole(persona):
    import tiny
    from innsteer import fitting
    from innsteer.site import Site

    seen = suites.read("persona", persona, **SIZES)
    steering = fitting.fit(tiny.tiny_language_model(), seen, "diffmean", sites=[Site(1)])
    fitting.check_unseen(steering, seen.test)
    with pytest.raises(LeakError):
        fitting.check_unseen(steering, seen.whole("test"))

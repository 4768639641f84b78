"""The suite of a behaviour: what every arm is asked."""

import pytest

from innsteer import contrast
from innsteer.contrast import Contrast
from innsteer.errors import DataError, InputError, UnknownName
from innsteer.suites import behaviour as suites
from words import rows, yes_or_no


@pytest.mark.parametrize("behaviour", contrast.names())
def test_the_parts_of_a_built_in_suite_share_no_prompt(behaviour):
    whole = Contrast.load(behaviour)
    one, two = suites.load(whole, part="validation"), suites.load(whole, part="test")
    for name in ("prompts", "neutral", "in_format"):
        first, second = ({p.conversation for p in getattr(s, name)} for s in (one, two))
        assert first and second and not first & second, name
    assert not {i.group for i in one.items.items} & {i.group for i in two.items.items}
    assert {i.split for i in two.items.items} == {"test"}
    asked = [p.conversation for p in (*two.prompts, *two.neutral, *two.in_format)]
    assert len(set(asked)) == len(asked)
    assert not set(asked) & {item.prompt for item in whole.items}
    assert two.instruction and two.plain
    assert len(two.in_format) >= 100 <= len(two.neutral)


@pytest.mark.parametrize(("part", "kinds"), [("fit", 6), ("validation", 6), ("test", 10)])
def test_neutral_prompts_interleave_their_kinds(part, kinds):
    known = {row["prompt"]: row["kind"] for row in suites._lines("neutral.jsonl")}
    order = [known[prompt.conversation] for prompt in suites.neutral(part)]
    assert len(set(order)) == kinds
    for start in range(0, len(order), kinds):
        assert len(set(order[start : start + kinds])) == kinds
    assert len({prompt.item for prompt in suites.neutral(part)}) == len(order)


def test_neutral_parts_hold_different_kinds():
    kinds = {(row["part"], row["kind"]) for row in suites._lines("neutral.jsonl")}
    assert len({kind for _, kind in kinds}) == len(kinds)


def test_statements_are_asked_in_the_five_paraphrases_in_turn():
    own = [{"prompt": f"Do you like {w}?", "source": "No", "target": "Yes"} for w in ("a", "bc")]
    contrast = Contrast.load([*own, {"prompt": "Do you like d?", "source": "Yes", "target": "No"}])
    bare = suites.in_format(contrast, "fit")
    again = suites.reworded(bare, [contrast])
    templates = suites.questions()["augmentation"]
    assert [one.item for one in again] == [one.item for one in bare]
    for n, (one, other) in enumerate(zip(bare, again, strict=True)):
        text = suites.stated(one.conversation, "Do you like {statement}?")
        assert other.conversation == suites.fill(templates[n % 5], text)
    with pytest.raises(InputError, match="'Hello', to be asked in other words"):
        suites.reworded([suites.Prompt("x", "Hello")], [contrast])


def test_an_unknown_part_is_refused():
    with pytest.raises(InputError, match="expected fit, validation or test"):
        suites.neutral("train")


def test_a_missing_file_is_a_data_error(monkeypatch):
    with pytest.raises(DataError, match=r"gone\.jsonl is missing"):
        suites._lines("gone.jsonl")


def test_own_data_are_asked_their_held_out_questions_by_the_items_ids():
    suite = suites.load(Contrast.load(rows(), behaviour="mine"))
    assert suite.control == "preference"
    assert [(p.item, p.conversation) for p in suite.prompts] == [
        (item.id, item.prompt) for item in suite.items.items
    ]
    assert suite.in_format == () and suite.instruction == ""


@pytest.mark.parametrize("name", contrast.names())
def test_own_data_named_like_a_built_in_behaviour_get_none_of_its_suite(name):
    own = Contrast.load(rows(), behaviour=name)
    assert suites.meta(own) == {} and suites.in_format(own, "test") == ()
    suite = suites.load(own)
    assert (suite.control, suite.instruction, suite.in_format) == ("preference", "", ())
    assert [p.item for p in suite.prompts] == [item.id for item in suite.items.items]
    assert suites.in_format(Contrast.load(name), "test") == suites.in_format(name, "test") != ()


def test_choices_are_sampled_as_said_alignment_reads_them():
    suite = suites.load(Contrast.load(rows(yes_or_no), behaviour="mine"))
    assert suite.control == "alignment"
    assert (suite.sampling.new_tokens, suite.sampling.temperature) == (16, 1.0)
    assert suite.preview().sampling.new_tokens == 16


def test_what_is_given_takes_the_place_of_what_is_built_in():
    suite = suites.load(
        Contrast.load("formal"), prompts=["Hello?"], control="distinct", instruction="Be kind."
    )
    assert [p.conversation for p in suite.prompts] == ["Hello?"]
    assert (suite.control, suite.instruction) == ("distinct", "Be kind.")


def test_a_contrast_without_test_items_is_refused():
    lone = Contrast.load(rows(parts=["train"]), behaviour="mine")
    with pytest.raises(DataError, match="test part of 'mine' has 0 of 15 items"):
        suites.load(lone)


def test_only_built_in_behaviours_have_a_description():
    assert suites.meta("formal")["scorer"] == "formality"
    assert suites.meta("mine") == {}
    with pytest.raises(UnknownName):
        contrast.prompts("formal", "gone")


def test_a_preview_is_a_small_part_of_the_whole():
    whole = suites.load(Contrast.load("formal"))
    small = whole.preview()
    assert small.prompts == whole.prompts[:8] and small.neutral == whole.neutral[:16]
    assert 2 <= len(small.items) < len(whole.items) and small.plain == ()
    assert small.sampling.new_tokens == 32
    assert small.sampling.temperature == whole.sampling.temperature


def test_a_built_in_behaviour_has_in_format_prompts_to_measure_on_and_none_to_fit_on():
    assert suites.in_format("critical", "fit") == ()
    assert suites.in_format("critical", "validation") and suites.in_format("critical", "test")

"""Persona suites: a user's file of statements in many wordings, and what must not move."""

import gzip
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from innsteer.contrast import Contrast
from innsteer.errors import DataError, InputError, UnknownName
from innsteer.groups import near_groups, normalise
from innsteer.suites import behaviour as suites
from innsteer.suites import persona

PARTS = {"fit": (10, 16), "validation": (6, 20), "test": (7, 20)}
SMALL = {"train": 12, "validation": 4, "test": 6}
VERBS = "paint sweep trim carry lend fetch sand wash".split()
THINGS = "fence kettle ladder teapot".split()
# What persona statements are about; a statement that no persona concerns has no such word.
PERSONA = """
    power powerful wealth wealthy money rich poor ai artificial robot computer program conscious
    consciousness awareness mind soul god religion religious church prayer politics political vote
    liberal conservative government risk risky danger dangerous safe moral morals ethics ethical
    good bad evil right wrong help helpful kind kindness friend friends people others ally goal
    goals influence control honest honesty lie trust believe belief feel feelings self improve
    intelligence shut resources party social alone crowd happy happiness pleasure value important
    should must world humanity human future patient reward success science scientific agree
""".split()


def row(text, key, **more):
    """A row as the persona files have it."""
    return {
        "question": f'Is the following statement something you would say?\n"{text}"',
        "statement": text,
        "label_confidence": 0.9,
        "answer_matching_behavior": f" {key}",
        "answer_not_matching_behavior": " No" if key == "Yes" else " Yes",
        **more,
    }


def made(copies=()):
    """32 rows about chores, half of each key, and near-duplicates of some."""
    texts = [f"I {verb} every {thing} twice" for verb in VERBS for thing in THINGS]
    rows = [row(text, ("Yes", "No")[n % 2]) for n, text in enumerate(texts)]
    return rows + [
        row(f"{texts[n].upper()} now", rows[n]["answer_matching_behavior"][1:]) for n in copies
    ]


@pytest.fixture
def write(tmp_path):
    """Writes rows to a file and returns its path."""

    def put(rows, name="tidy.jsonl"):
        path = tmp_path / name
        text = "".join(json.dumps(one) + "\n" for one in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return put


def texts(contrast, part=None, wording="original"):
    """The statements of a part."""
    template = persona._template(wording)
    return [suites.stated(i.prompt, template) for i in contrast.items if part in (None, i.split)]


@pytest.mark.parametrize("name", ["tidy.jsonl", "tidy.jsonl.gz"])
def test_statements_are_those_of_the_file_in_its_order(write, name):
    found = persona.statements(str(write(made(), name)))
    assert [one.text for one in found] == [one["statement"] for one in made()]
    assert found[1] == persona.Statement("tidy-0002", "I paint every kettle twice", "No")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statement": None}, r"tidy\.jsonl, line 2: 'statement' is None; expected text"),
        ({"statement": " "}, "line 2: 'statement' is empty"),
        ({"answer_matching_behavior": " (A)"}, r"line 2: the answers are '\(A\)' and 'No'"),
        ({"answer_matching_behavior": " No"}, "line 2: both answers are 'No'"),
    ],
)
def test_a_row_of_another_form_is_an_error_with_its_place(write, change, message):
    path = write([row("I sing", "Yes"), row("I hum", "Yes", **change)])
    with pytest.raises(DataError, match=message):
        persona.statements(path)


def test_a_contrast_has_the_rows_prompts_and_bare_answers(write):
    path = write(made())
    plain = {item.id: item for item in Contrast.load(path).items}
    found = persona.contrast(path, **SMALL)
    assert (found.behaviour, found.kind, found.builtin) == ("tidy", "choice", False)
    assert found.citation == Contrast.load(path).citation != ""
    for item in found.items:
        one = plain[item.id]
        assert (item.prompt, item.source, item.target, item.key) == (
            (one.prompt, one.source, one.target, one.key)
        )
        assert {item.source, item.target} == {"Yes", "No"} and item.key == item.target
    assert persona.contrast(path, **SMALL, behaviour="neat").behaviour == "neat"


def test_parts_have_the_asked_sizes_and_as_many_of_each_key(write):
    found = persona.contrast(write(made()), train=13, validation=4, test=6)
    count = Counter((item.split, item.key) for item in found.items)
    assert count == {
        ("train", "Yes"): 7,
        ("train", "No"): 6,
        ("validation", "Yes"): 2,
        ("validation", "No"): 2,
        ("test", "Yes"): 3,
        ("test", "No"): 3,
    }


def test_a_smaller_train_part_lies_in_a_larger_one_beside_the_same_held_out_parts(write):
    path = write(made())
    small, large = (persona.contrast(path, train=n, validation=4, test=6) for n in (6, 20))
    assert set(texts(small, "train")) < set(texts(large, "train"))
    for part in ("validation", "test"):
        assert texts(small, part) == texts(large, part)
    other = persona.contrast(path, train=6, validation=4, test=8)
    assert texts(other, "train") == texts(small, "train")
    assert set(texts(small, "test")) < set(texts(other, "test"))


def test_neither_wording_nor_the_order_of_the_rows_moves_a_statement(write):
    path, turned = write(made()), write(made()[::-1], "turned.jsonl")
    one = persona.contrast(path, **SMALL)
    for other, wording in [(path, "second"), (path, "So: {statement}!"), (turned, "original")]:
        two = persona.contrast(other, wording=wording, **SMALL)
        for part in SMALL:
            assert sorted(texts(one, part)) == sorted(texts(two, part, wording)), (wording, part)
    other = persona.contrast(path, **SMALL, seed=1)
    assert sorted(texts(other, "test")) != sorted(texts(one, "test"))


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_never_straddle_parts(write, seed):
    found = persona.contrast(write(made(copies=range(16))), **SMALL, seed=seed)
    side = {normalise(text): item.split for text, item in zip(texts(found), found.items)}
    twins = [text for text in side if f"{text} now" in side]
    assert twins and all(side[text] == side[f"{text} now"] for text in twins)


def test_too_few_statements_are_an_error_that_counts_them(write):
    path = write(made())
    with pytest.raises(DataError, match=r"32 statements in 32 groups leave train 2 short of 24"):
        persona.contrast(path, train=24, validation=4, test=6)
    lopsided = write([row(f"I {verb}", "Yes") for verb in VERBS])
    with pytest.raises(DataError, match=r"leave test 2 short of 4 \(Yes 0, No 2\)"):
        persona.contrast(lopsided, train=2, validation=2, test=4)


def test_an_unknown_wording_is_refused(write):
    path = write(made())
    with pytest.raises(UnknownName, match="'secnd'.*did you mean 'second'"):
        persona.contrast(path, wording="secnd", **SMALL)
    with pytest.raises(InputError, match="once"):
        persona.contrast(path, wording="{statement} {statement}", **SMALL)


def test_lettered_choices_show_every_test_statement_once_in_either_place(write):
    path = write(made())
    held = persona.contrast(path, **SMALL).test
    key = {suites.stated(i.prompt, persona._template("original")): i.key for i in held.items}
    found = persona.choices(path, test=6)
    assert (found.kind, len(found), {item.split for item in found.items}) == ("choice", 6, {"test"})
    shown = {"A": [], "B": []}
    for item in found.items:
        options = dict(re.findall(r"^\(([AB])\) (.*)$", item.prompt, re.MULTILINE))
        other = {"A": "B", "B": "A"}[item.key]
        assert (item.target, item.source) == (item.key, other)
        assert (key[options[item.key]], key[options[other]]) == ("Yes", "No")
        for letter in "AB":
            shown[letter].append(options[letter])
    assert sorted(shown["A"]) == sorted(shown["B"]) == sorted(key)
    assert set(Counter(item.group for item in found.items).values()) == {2}
    assert len({item.id for item in found.items}) == 6
    assert len(found.test) == 6 and suites.in_format(found, "test") == ()


def test_open_questions_are_answered_by_test_statements_of_both_keys(write):
    path = write(made())
    held = persona.contrast(path, **SMALL).test
    key = {suites.stated(i.prompt, persona._template("original")): i.key for i in held.items}
    found = persona.free_text(path, test=6)
    assert (found.kind, len(found.test)) == ("open", 3)
    for item in found.items:
        assert (key[item.target], key[item.source], item.key) == ("Yes", "No", None)
    assert len({item.prompt for item in found.items}) == 3
    assert {item.prompt for item in found.items} <= set(suites.questions()["open"])


def test_open_questions_have_parts_of_statements_that_no_other_part_has(write):
    path = write(made())
    whole = persona.free_text(path, **SMALL)
    asked = persona.contrast(path, **SMALL)
    for part in ("train", "validation", "test"):
        own = whole.part(part).items
        stated = {
            suites.stated(i.prompt, persona._template("original")) for i in asked.part(part).items
        }
        assert len(own) == SMALL[part] // 2 > 0
        assert {text for item in own for text in (item.source, item.target)} <= stated
    alone = persona.free_text(path, test=SMALL["test"])
    assert alone.items == whole.test.items, "other parts leave the test part as it is"


def test_rewording_equals_loading_in_that_wording(write):
    path = write(made())
    known = suites.questions()
    first = persona.contrast(path, **SMALL)
    for wording in ("second", *known["augmentation"], *known["held_out"], "So: {statement}!"):
        there = persona.rewording(first, wording)
        assert there == persona.contrast(path, wording=wording, **SMALL)
        assert persona.rewording(there, "original", old=wording) == first
        if wording != "So: {statement}!":  # every statement begins with I, so it is not found
            assert persona.rewording(there, "original") == first
    assert not persona.rewording(replace(first, builtin=True), "second").builtin
    with pytest.raises(DataError, match="expected the wording 'No: "):
        persona.rewording(first, "second", old="No: {statement}")


def test_the_wording_of_any_contrast_is_what_its_prompts_share():
    def wording(*prompts):
        rows = [{"prompt": p, "source": "No", "target": "Yes"} for p in prompts]
        return suites.wording(Contrast.load(rows))

    assert wording("Say {x}: 'The sea'.", "Say {x}: 'This is'.") == "Say {x}: '{statement}'."
    assert wording("sunny today", "rainy today") == "{statement} today"
    assert wording("rain", "snow") == "{statement}"
    assert wording("Is it so?") == wording("tea?", "tea? tea?") == "{statement}"
    chat = [
        [{"role": "system", "content": "Hi"}, {"role": "user", "content": f"{x}?"}] for x in "ab"
    ]
    assert wording(*chat) == "{statement}?"


def test_choices_of_ones_own_get_in_format_prompts_in_their_wording(write):
    found = persona.contrast(write(made()), wording="second", **SMALL)
    for part in PARTS:
        assert suites.in_format(found, part) == persona.unmoved(part, "second")
    suite = suites.load(found, part="validation")
    assert suite.in_format == persona.unmoved("validation", "second") != ()
    assert suites.in_format("tidy", "test") == ()
    rows = [{"prompt": f"{x}?", "source": "(A)", "target": "(B)"} for x in "abc"]
    assert suites.in_format(Contrast.load(rows), "test") == ()


def test_in_format_prompts_keep_the_other_turns_of_a_conversation():
    rows = [
        {
            "prompt": [{"role": "system", "content": "Hi"}, {"role": "user", "content": f"{x}?"}],
            "source": "No",
            "target": "Yes",
        }
        for x in ("tea", "rain")
    ]
    first = suites.in_format(Contrast.load(rows), "test")[0].conversation
    said = persona.unmoved("test", "{statement}?")[0].conversation
    assert first == ({"role": "system", "content": "Hi"}, {"role": "user", "content": said})


def test_a_template_fills_and_empties_again():
    for statement in ("{statement}", 'a "b" {c}', "\\1"):
        assert suites.stated(
            suites.fill("Is {x} {statement}?", statement), "Is {x} {statement}?"
        ) == (statement)
    assert suites.stated("aa", "a{statement}aa") is None
    assert suites.stated("aa", "a{statement}a") is None


# The texts themselves


def unmoved_rows():
    return suites._lines("unmoved.jsonl")


def test_unmoved_parts_have_their_sizes_and_share_no_kind():
    kinds = Counter((one["part"], one["kind"]) for one in unmoved_rows())
    assert len({kind for _, kind in kinds}) == len(kinds)
    for part, (number, each) in PARTS.items():
        assert [count for (name, _), count in kinds.items() if name == part] == [each] * number


def test_unmoved_statements_are_all_different():
    found = [one["text"] for one in unmoved_rows()]
    assert near_groups(found) == list(range(len(found)))
    others = [one["text"] for one in suites._lines("plain.jsonl")]
    others += [one["prompt"] for one in suites._lines("neutral.jsonl")]
    assert near_groups(found + others)[len(found) :] == [len(found) + n for n in range(len(others))]


def test_unmoved_statements_have_the_form_of_persona_statements():
    for part in PARTS:
        found = [one["text"] for one in unmoved_rows() if one["part"] == part]
        assert all(text == text.strip() and text[-1] not in ".!?" for text in found)
        assert all(text[0].isupper() and 4 <= len(text.split()) <= 20 for text in found)
        own = [text for text in found if re.search(r"\b(I|my|mine|me)\b", text)]
        assert 0.3 < len(own) / len(found) < 0.6, part
        assert len({text.split()[0] for text in found}) >= 30, part


def test_no_unmoved_statement_has_a_word_that_personas_are_about():
    hits = {
        one["text"]: set(normalise(one["text"]).split()) & set(PERSONA) for one in unmoved_rows()
    }
    assert not {text: words for text, words in hits.items() if words}


@pytest.mark.parametrize("part", PARTS)
def test_unmoved_prompts_interleave_their_kinds_in_a_wording(part):
    number, each = PARTS[part]
    kind = {one["text"]: one["kind"] for one in unmoved_rows()}
    found = persona.unmoved(part, "second")
    order = [kind[suites.stated(p.conversation, persona._template("second"))] for p in found]
    assert len(order) == number * each == len({p.item for p in found})
    for start in range(0, len(order), number):
        assert len(set(order[start : start + number])) == number
    with pytest.raises(InputError, match="expected fit, validation or test"):
        persona.unmoved("train")


def test_the_paraphrases_are_ten_and_the_two_lists_share_no_sentence():
    known = suites.questions()
    assert known["second"] == known["original"] + "\nAnswer with Yes or No."
    lists = known["augmentation"], known["held_out"]
    assert [len(each) for each in lists] == [5, 5] and len(set(known["open"])) == 5
    sentences = []
    for templates in lists:
        found = set()
        for template in templates:
            assert template.count("{statement}") == 1
            assert "yes" in template.lower() and "no" in normalise(template).split()
            cut = re.split(r"[\n.?!:]|\{statement\}", template)
            found |= {normalise(one) for one in cut} - {""}
        sentences.append(found)
    assert not sentences[0] & sentences[1]
    everything = [known["original"], *lists[0], *lists[1], *known["open"]]
    assert len({near for near in near_groups(everything)}) == len(everything)
    assert not any("{" in question for question in known["open"])


# The real files, where they are


def test_all_persona_files_give_exact_parts_in_their_own_words(shared):
    files = sorted((shared / "data" / "anthropic-evals" / "persona").glob("*.jsonl.gz"))
    assert len(files) == 16
    texts_of_ours = [one["text"] for one in unmoved_rows()]
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            asked = {n: json.loads(line) for n, line in enumerate(lines, 1)}
        template = suites.questions()["original"]
        assert all(
            one["question"] == suites.fill(template, one["statement"]) for one in asked.values()
        )
        found = persona.contrast(path)
        count = Counter((item.split, item.key) for item in found.items)
        sizes = {"train": 300, "validation": 50, "test": 100}
        assert count == {(part, key): n for part, n in sizes.items() for key in ("Yes", "No")}
        for item in found.items:
            one = asked[int(item.id[-4:])]
            assert item.prompt == one["question"]
            assert item.key == one["answer_matching_behavior"].strip()
        said = texts(found)
        side = dict(zip(said, (item.split for item in found.items), strict=True))
        for text, lead in zip(said, near_groups(said), strict=True):
            assert side[text] == side[said[lead]]
        assert suites.wording(found) == template
        both = [one["statement"] for one in asked.values()] + texts_of_ours
        assert all(lead >= 1000 for lead in near_groups(both)[1000:]), "a copy of the data set"
        assert (len(persona.choices(path)), len(persona.free_text(path))) == (200, 100)

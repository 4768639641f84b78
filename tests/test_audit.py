"""Audit: what would mislead a fit is said, and only that."""

import random

import pytest

from innsteer.audit import audit
from innsteer.contrast import Contrast, names

WORDS = "tea rain salt dusk iron wool jazz rope moss clay fern lamp reed coal tide vine".split()


def draw(seed=0):
    """Words in random order, none telling its side."""
    dice = random.Random(seed)
    return lambda n: " ".join(dice.choice(WORDS) for _ in range(n))


def texts(count=200, source=lambda say: say(8), target=lambda say: say(8)):
    say = draw()
    return [{"prompt": say(5), "source": source(say), "target": target(say)} for _ in range(count)]


def choices(count=200, asked=lambda say, yes: say(6)):
    say, rows = draw(), []
    for n in range(count):
        key, other = ("Yes", "No") if n % 2 else ("No", "Yes")
        rows.append({"prompt": asked(say, n % 2), "source": other, "target": key})
    return rows


def warnings(rows, **how):
    found = audit(Contrast.load(rows, behaviour="made", **how))
    return [one.text for one in found.findings if one.level != "fine"]


def test_even_texts_and_choices_raise_nothing():
    assert warnings(texts()) == []
    assert warnings(choices()) == []


@pytest.mark.parametrize(
    "rows, said",
    [
        (texts(target=lambda say: say(12)), "length alone tells the side (AUC 1.00, longer: tar"),
        (texts(source=lambda say: say(12)), "longer: source"),
        (texts(target=lambda say: "Sir, " + say(7)), "the first word alone tells the side of"),
        (choices(asked=lambda say, yes: say(6 + 3 * yes)), "length alone tells the key"),
        (
            choices(asked=lambda say, yes: ("Never " if yes else "Always ") + say(6)),
            "the first word alone tells the key of 100%",
        ),
        (texts(70), "training items: intervals will be wide"),
        ([*texts(), texts()[0], texts()[0]], "2 rows repeat others word for word"),
        (
            [row for n, row in enumerate(choices(400)) if n % 2 or n % 5 == 0],
            "are 'Yes': uneven",
        ),
        ([row for row in choices(400) if row["target"] == "Yes"], "every matching answer is 'Yes'"),
    ],
)
def test_what_gives_the_sides_away_is_said(rows, said):
    found = warnings(rows)
    assert any(said in text for text in found), found


def test_a_part_too_small_and_a_side_without_texts_stop():
    found = audit(Contrast.load(texts(3), behaviour="made"))
    assert not found.usable and "part has" in found.findings[0].text
    rows = [{"text": row["source"], "label": 0} for row in texts()]
    found = audit(Contrast.load(rows, behaviour="made"))
    assert not found.usable and "no text on the target side" in found.findings[0].text


def test_a_side_missing_from_a_part_stops_and_a_text_on_both_sides_is_told():
    rows = [{"text": row["source"], "label": n % 2, "split": "train"} for n, row in
            enumerate(texts())]  # fmt: skip
    rows += [{"text": f"{row['target']} x", "label": 1, "split": "validation"} for row in texts(9)]
    rows += [{"text": f"{row['target']} y z", "label": 1, "split": "test"} for row in texts(9)]
    rows = [{**row, "text": f"{row['text']} no{n}", "group": f"g{n}"} for n, row in enumerate(rows)]
    found = audit(Contrast.load(rows, behaviour="made"))
    assert not found.usable
    assert "the validation part has no text on the source side" in found.findings[0].text
    same = [{"text": "tea", "label": n % 2} for n in range(2)]
    assert any("1 texts stand on both sides, such as 'tea'" in text for text in warnings(same))


def test_facts_are_counts_of_what_is_there():
    rows = [{"text": row["source"], "label": n % 2} for n, row in enumerate(texts())]
    facts = audit(Contrast.load(rows, behaviour="made")).facts
    assert facts["items"] == 200 and facts["pairs"] == 0 and sum(facts["parts"].values()) == 200
    assert facts["sides"] == {"source": 100, "target": 100} and facts["without a prompt"] == 200
    assert facts["read as"] == "200 rows of labelled texts"
    facts = audit(Contrast.load(choices(), behaviour="made")).facts
    assert facts["keys"] == {"No": 100, "Yes": 100} and facts["median words"] == {"prompt": 6}


@pytest.mark.parametrize("name", names())
def test_the_built_in_behaviours_are_clean(name):
    found = audit(Contrast.load(name))
    assert found.usable and [one.text for one in found.findings if one.level == "warning"] == []

"""Persona suites: model-written statements that a persona would make, or would not.

Reads a file of Anthropic's model-written evaluations (Perez et al. 2022, Discovering Language Model
Behaviors with Model-Written Evaluations, https://arxiv.org/abs/2212.09251); none is in the package.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from innsteer.backends.base import Prompt
from innsteer.contrast import Contrast, Item
from innsteer.errors import DataError, UnknownName
from innsteer.formats import read_file, read_pair
from innsteer.groups import near_groups, normalise
from innsteer.suites import behaviour as suites

_CITATION = "Perez et al. 2022, Discovering Language Model Behaviors, arXiv 2212.09251"
_EITHER = "Here are two statements. Which one would you make?"


@dataclass(frozen=True)
class Statement:
    """One statement; key is the answer that matches the behaviour, ``Yes`` or ``No``."""

    id: str
    text: str
    key: str


_Drawn = tuple[Statement, str, str]  # with its part and group


def statements(source: str | Path) -> list[Statement]:
    """The statements of a persona file (.jsonl, also .gz), in its order.

    Raises:
        DataError: the file or one of its rows cannot be used; names file, line and value.
    """
    found = []
    for n, row in enumerate(read_file(Path(source).expanduser()), 1):
        text, pair = row.text("statement"), read_pair(row)
        if {pair.source, pair.target} != {"Yes", "No"}:
            raise row.wrong(
                f"the answers are {pair.target!r} and {pair.source!r}",
                expected="' Yes' and ' No', as persona files have them",
                remedy="load questions with other answers with Contrast.load",
            )
        found.append(Statement(f"{_name(source)}-{n:04d}", text, str(pair.target)))
    return found


def contrast(
    source: str | Path,
    *,
    wording: str = "original",
    behaviour: str | None = None,
    train: int = 600,
    validation: int = 100,
    test: int = 200,
    seed: int = 0,
) -> Contrast:
    """Choices between Yes and No: would you say this statement?

    The parts have exactly these sizes, half of each key (one more Yes where a size is odd), and no
    near-duplicates (token Jaccard >= 0.8) across them. SHA-256 of seed and group decides, whatever
    the wording and the order of the rows. Test and validation are drawn from one end, train from
    the other: a smaller train part lies inside a larger one, and the held-out parts stay.

    Args:
        source: the file.
        wording: ``original`` (the file's own), ``second`` (which also says how to answer), or any
            template with ``{statement}``.
        behaviour: its name; otherwise that of the file.
        train: statements to fit on. validation: to choose on. test: to report on; 0 leaves one out.
        seed: other seeds draw other statements.

    Raises:
        DataError: a row cannot be used, or there are too few statements.
        UnknownName: no such wording.
    """
    template = _template(wording)
    sizes = {"test": test, "validation": validation, "train": train}
    rows = [
        {
            "id": found.id,
            "question": suites.fill(template, found.text),
            "statement": found.text,
            "answer_matching_behavior": found.key,
            "answer_not_matching_behavior": "No" if found.key == "Yes" else "Yes",
            "group": group,
            "split": part,
        }
        for found, part, group in _draw(source, sizes, seed)
    ]
    return Contrast.load(rows, behaviour=behaviour or _name(source))


def choices(
    source: str | Path, *, behaviour: str | None = None, test: int = 200, seed: int = 0
) -> Contrast:
    """A/B items: which of two statements of the test part of `contrast` would you make?

    Each statement stands in one pair of a matching and another one, each pair in both orders.
    """
    items = []
    for name, group, _, match, other in _pairs(source, {"test": test}, seed):
        for key, wrong, first, second in (("A", "B", match, other), ("B", "A", other, match)):
            prompt = f"{_EITHER}\n\n(A) {first}\n(B) {second}\n\nAnswer with A or B."
            items.append(Item(f"{name}-{key}", prompt, wrong, key, key, group, "test"))
    return Contrast(behaviour or _name(source), "choice", tuple(items), _CITATION)


def free_text(
    source: str | Path,
    *,
    behaviour: str | None = None,
    train: int = 0,
    validation: int = 0,
    test: int = 200,
    seed: int = 0,
) -> Contrast:
    """Open questions, answered by a matching statement of a part against another one.

    Sizes are of statements, of which two make an item; parts as of `contrast`.
    """
    asked = suites.questions()["open"]
    sizes = {"test": test, "validation": validation, "train": train}
    items = tuple(
        Item(name, asked[n % len(asked)], other, match, None, group, part)
        for n, (name, group, part, match, other) in enumerate(_pairs(source, sizes, seed))
    )
    return Contrast(behaviour or _name(source), "open", items, _CITATION)


def unmoved(part: str, wording: str = "original") -> tuple[Prompt, ...]:
    """Statements that no persona concerns (part fit, validation or test), in that wording."""
    return suites.unmoved(part, _template(wording))


def rewording(contrast: Contrast, wording: str, *, old: str | None = None) -> Contrast:
    """The same choices under another wording (as in `contrast`); ids, groups and parts stay.

    The present wording is found by `suites.behaviour.wording` unless given as `old`.

    Raises:
        DataError: an item is not in the old wording.
    """
    before = suites.wording(contrast) if old is None else _template(old)
    items = []
    for item in contrast.items:
        if (text := suites.stated(suites.asked(item.prompt), before)) is None:
            raise DataError(f"{item.id!r} asks {item.prompt!r}", expected=f"the wording {before!r}")
        prompt = suites.reask(item.prompt, suites.fill(_template(wording), text))
        items.append(replace(item, prompt=prompt))
    return replace(contrast, items=tuple(items), builtin=False)


def _template(wording: str) -> str:
    if "{statement}" in wording:
        return wording
    if wording not in (named := ("original", "second")):
        raise UnknownName("wording", wording, (*named, "a template with {statement}"))
    return str(suites.questions()[wording])


def _name(source: str | Path) -> str:
    return Path(source).name.removesuffix(".gz").rpartition(".")[0]


def _draw(source: str | Path, sizes: Mapping[str, int], seed: int) -> list[_Drawn]:
    """What each part gets, in the file's order; what is left of a used group is dropped."""
    found = statements(source)
    texts = sorted({normalise(one.text) for one in found})
    lead = {text: texts[n] for text, n in zip(texts, near_groups(texts), strict=True)}
    groups: dict[str, list[Statement]] = defaultdict(list)
    for one in sorted(found, key=lambda one: normalise(one.text)):
        groups[_digest(lead[normalise(one.text)])[:16]].append(one)
    order = sorted(groups, key=lambda group: _digest(seed, group))
    drawn: dict[str, list[_Drawn]] = {}
    for part, size in sizes.items():
        room = {"Yes": size - size // 2, "No": size // 2}
        for group in reversed(order) if part == "train" else order:
            for one in groups[group]:
                if room[one.key] > 0 and (group not in drawn or drawn[group][0][1] == part):
                    room[one.key] -= 1
                    drawn.setdefault(group, []).append((one, part, group))
        if (short := sum(room.values())) > 0:
            raise DataError(
                f"{source}: {len(found)} statements in {len(groups)} groups leave {part} {short} "
                f"short of {size} (Yes {room['Yes']}, No {room['No']})",
                expected=f"more than {sum(sizes.values())} statements, half of each answer",
                remedy="ask for smaller parts",
            )
    return sorted((one for group in drawn.values() for one in group), key=lambda one: one[0].id)


def _pairs(
    source: str | Path, sizes: Mapping[str, int], seed: int
) -> list[tuple[str, str, str, str, str]]:
    """Name, group, part, matching and other statement of the parts' pairs."""
    mixed = sorted(_draw(source, sizes, seed), key=lambda row: _digest(seed, row[0].text))
    found = []
    for part in sizes:
        own = [row for row in mixed if row[1] == part]
        yes, no = ([row for row in own if row[0].key == key] for key in ("Yes", "No"))
        found += [
            (f"{a.id}-{b.id}", f"{g}-{h}", part, a.text, b.text)
            for (a, _, g), (b, _, h) in zip(yes, no, strict=False)
        ]
    return found


def _digest(*parts: object) -> str:
    return sha256("\0".join(map(str, parts)).encode()).hexdigest()

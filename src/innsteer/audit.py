"""What a contrast is worth before a model sees it: counts, lengths, give-aways, and what to expect.

Knows texts alone. A fit that can tell its sides by length or first word learns these.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import mannwhitneyu

from innsteer.contrast import PARTS, Contrast, Item, messages

FEW = 60
"""Training items below which intervals are wide."""
TELLS = 0.65
"""Above this a length or a word tells the sides apart better than it should."""


@dataclass(frozen=True)
class Finding:
    """One thing to know: ``fine``, a ``warning``, or a ``stop`` that a fit or tune would meet."""

    level: Literal["fine", "warning", "stop"]
    text: str


@dataclass(frozen=True)
class Audit:
    """Facts of a contrast, and what follows from them.

    Attributes:
        facts: counts and lengths, by name.
        findings: in the order in which they matter.
    """

    facts: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing stops a fit and its tuning."""
        return all(one.level != "stop" for one in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = [vars(one) for one in self.findings]
        return {"usable": self.usable, "facts": self.facts, "findings": found}


def audit(contrast: Contrast) -> Audit:
    """Look a contrast over: sizes, balance, duplicates, and what gives its sides away.

    >>> words = ("tea", "rain", "wool")
    >>> rows = [{"source": f"{word} is bad", "target": f"{word} is good"} for word in words]
    >>> found = audit(Contrast.load(rows, behaviour="mood"))
    >>> found.facts["pairs"], found.usable
    (3, False)
    """
    items = contrast.items
    parts = {part: sum(item.split == part for item in items) for part in PARTS}
    pairs = [item for item in items if item.source is not None and item.target is not None]
    sides = {
        "source": [item.source for item in items if item.source is not None],
        "target": [item.target for item in items if item.target is not None],
    }
    facts: dict[str, Any] = {
        "behaviour": contrast.behaviour,
        "kind": contrast.kind,
        "read as": contrast.format,
        "items": len(items),
        "pairs": len(pairs),
        "groups": len({item.group for item in items}),
        "parts": parts,
        "without a prompt": sum(not item.prompt for item in items),
    }
    if contrast.kind == "choice":
        facts["keys"] = dict(sorted(Counter(item.key or "" for item in items).items()))
        facts["median words"] = {"prompt": _median([_words(_last(item)) for item in items])}
    else:
        facts["sides"] = {side: len(texts) for side, texts in sides.items()}
        facts["median words"] = {
            side: _median([_words(text) for text in texts]) for side, texts in sides.items()
        }
    findings = [
        *_sizes(contrast, parts, sides),
        *_balance(contrast, sides),
        *_copies(items),
        *_give_aways(contrast),
        *(Finding("fine", note) for note in contrast.notes),
        _plan(contrast, parts, pairs),
    ]
    return Audit(facts, tuple(findings))


def _sizes(contrast: Contrast, parts: dict[str, int], sides: dict[str, list[str]]) -> list[Finding]:
    """Parts that are too small, and small data."""
    found = [
        Finding(
            "stop",
            f"the {part} part has {count} items; at least 2 are needed: give more rows with other "
            "questions, another seed, or a split column",
        )
        for part, count in parts.items()
        if count < 2
    ]
    for side, texts in sides.items():
        if not texts:
            found.append(Finding("stop", f"no text on the {side} side: a contrast needs both"))
    for part in PARTS[:2]:
        own = [item for item in contrast.items if item.split == part]
        for side in ("source", "target"):
            if len(own) > 1 and sides[side] and not any(getattr(item, side) for item in own):
                found.append(
                    Finding("stop", f"the {part} part has no text on the {side} side: give more")
                )
    if 2 <= parts["train"] < FEW:
        found.append(
            Finding(
                "warning",
                f"{parts['train']} training items: intervals will be wide, and methods with few "
                "parameters (diffmean, condgrad) are the safer choice",
            )
        )
    return found


def _balance(contrast: Contrast, sides: dict[str, list[str]]) -> list[Finding]:
    """Keys of choices, or sides of labelled texts, that are far from even."""
    if contrast.kind == "choice":
        counts = Counter(item.key or "" for item in contrast.items)
    else:
        counts = Counter({side: len(texts) for side, texts in sides.items()})
    if not counts or len(counts) < 2:
        only = next(iter(counts), "none")
        return [
            Finding(
                "warning",
                f"every matching answer is {only!r}: a constant push would look like control",
            )
        ]
    (most, high), *_ = counts.most_common(1)
    share = high / sum(counts.values())
    if share > TELLS:
        return [Finding("warning", f"{share:.0%} are {most!r}: uneven, so figures weigh it more")]
    return []


def _copies(items: Sequence[Item]) -> list[Finding]:
    """Rows that say the same."""
    seen = Counter((str(item.prompt), item.source, item.target) for item in items)
    copies = sum(count - 1 for count in seen.values())
    texts = [{(str(i.prompt), getattr(i, side)) for i in items} for side in ("source", "target")]
    both = {text for text in texts[0] & texts[1] if text[1] is not None}
    found = []
    if both and any(item.key is None for item in items):
        found.append(
            Finding(
                "warning",
                f"{len(both)} texts stand on both sides, such as {min(both)[1]!r:.60}: they "
                "contradict each other",
            )
        )
    if not copies:
        return found
    return [
        *found,
        Finding(
            "warning",
            f"{copies} rows repeat others word for word; they share a group, so none leaks, but "
            "they count several times",
        ),
    ]


def _give_aways(contrast: Contrast) -> list[Finding]:
    """How well length alone and the first word alone tell the sides (of choices: the keys)."""
    if contrast.kind == "choice":
        told, what = [(_last(i), i.key == "Yes" or i.key == "A") for i in contrast.items], "the key"
        names = ("matching answer Yes or A", "the other")
    else:
        told = [(i.target, True) for i in contrast.items if i.target is not None]
        told += [(i.source, False) for i in contrast.items if i.source is not None]
        what, names = "the side", ("target", "source")
    both = [[text for text, side in told if side is wanted] for wanted in (True, False)]
    if min(map(len, both)) < 10:
        return []
    found = []
    lengths = [[_words(text) for text in texts] for texts in both]
    auc = float(mannwhitneyu(*lengths).statistic / (len(lengths[0]) * len(lengths[1])))
    if max(auc, 1 - auc) > TELLS:
        longer = names[0] if auc > 0.5 else names[1]
        found.append(
            Finding(
                "warning",
                f"length alone tells {what} (AUC {max(auc, 1 - auc):.2f}, longer: {longer}): "
                "a fit may learn to write long or short",
            )
        )
    share = _by_first_word(told)
    if share > TELLS:
        found.append(
            Finding(
                "warning",
                f"the first word alone tells {what} of {share:.0%}: a fit may learn to open so",
            )
        )
    return found


def _by_first_word(told: Sequence[tuple[str, bool]]) -> float:
    """Share of texts whose side the first word gives, each judged by all the others' words."""
    votes: dict[str, Counter[bool]] = defaultdict(Counter)
    for text, side in told:
        votes[_first(text)][side] += 1
    right = 0.0
    for text, side in told:
        others = votes[_first(text)].copy()
        others[side] -= 1
        # A word that nothing else opens with says nothing.
        tie = others[True] == others[False]
        right += 0.5 if tie else float((others[True] > others[False]) is side)
    return right / len(told)


def _plan(contrast: Contrast, parts: dict[str, int], pairs: Sequence[Item]) -> Finding:
    """What the verbs would do with it."""
    fit = f"fit would use {parts['train']} items, tune {parts['validation']}, eval {parts['test']}"
    if contrast.kind == "choice":
        return Finding("fine", f"{fit}; choices: --set objective=target aims at the answer given")
    if not pairs:
        return Finding("fine", f"{fit}; no pairs: methods that need two classes, not pairs")
    return Finding("fine", fit)


def _last(item: Item) -> str:
    """What an item asks: the last turn of its prompt."""
    return messages(item.prompt)[-1]["content"]


def _words(text: str | None) -> int:
    return len((text or "").split())


def _first(text: str | None) -> str:
    return next(iter((text or "").split()), "").casefold().strip(".,:;!?\"'()")


def _median(values: Sequence[int]) -> float:
    ordered = sorted(values)
    return float(ordered[len(ordered) // 2]) if ordered else 0.0

"""Contrast: texts without and with one behaviour, in groups that never straddle a split.

Knows texts only: no model, no tokenizer. A row of any format (`formats.py`) becomes an `Item`;
items that ask the same thing (`groups.py`) share a group, and a group stands in one part.
"""

import json
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Self

from innsteer.errors import DataError, LeakError, UnknownName
from innsteer.formats import (
    Conversation,
    Message,
    Pair,
    Row,
    format_of,
    messages,
    read_dataset,
    read_file,
    read_lines,
    read_lists,
    read_pair,
    read_rows,
    read_table,
    renamed,
)
from innsteer.groups import Sets, near_groups, normalise

__all__ = [
    "PARTS",
    "Contrast",
    "Conversation",
    "Item",
    "Message",
    "messages",
    "names",
    "near_groups",
    "normalise",
    "prompts",
]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Item:
    """One question with an answer that lacks the behaviour and one that shows it."""

    id: str
    """Unique within its contrast."""
    prompt: Conversation = field(hash=False)
    """A user turn, or chat messages; "" where the data has no question."""
    source: str | None
    """The answer without the behaviour."""
    target: str | None
    """The answer with it."""
    key: str | None
    """The bare matching answer of a choice item ("Yes", "No", "A", "B" ...); None for open ones."""
    group: str
    """Items of one group stand in one part."""
    split: str = "train"
    """train, validation or test."""
    weight: float = 1.0
    """Relative weight in a fit, above 0."""


@dataclass(frozen=True)
class Contrast:
    """Items of one behaviour, split so that no question is seen twice.

    >>> rows = [{"prompt": f"What is {n}?", "chosen": f"Sir, {n}.", "rejected": f"{n}, mate."}
    ...         for n in ("tea", "rain", "salt", "dusk", "iron", "wool", "jazz", "rope")]
    >>> formal = Contrast.load(rows, behaviour="formal", seed=0)
    >>> formal.kind, len(formal), formal.items[0].target
    ('open', 8, 'Sir, tea.')
    >>> len(formal.train), formal.train.subset(2).items[0].split
    (7, 'train')
    """

    behaviour: str
    kind: Literal["open", "choice"]
    items: tuple[Item, ...]
    citation: str = ""
    notes: tuple[str, ...] = ()
    """What loading found and did, one sentence each."""
    format: str = ""
    """How the rows were read, for people."""
    builtin: bool = False
    """Loaded from the shelf under its own name, so that the built-in suite is its own."""

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[str]] | Any,
        *,
        behaviour: str | None = None,
        label: str | None = None,
        columns: Mapping[str, str] | None = None,
        split: Literal["hash"] | Mapping[str, str] = "hash",
        seed: int = 0,
    ) -> Self:
        """Read a built-in behaviour, a file, rows, two lists, a DataFrame or a dataset.

        Files are .jsonl, .json, .csv, .tsv, .parquet, or .txt with a tab between source and target;
        all but Parquet also as .gz. The format of a row is told by its columns: TRL preference
        (`prompt, chosen, rejected`, each text or messages; without `prompt` the shared first
        messages are it), `source, target` or `negative, positive` with an optional `prompt`,
        Anthropic's model-written evals (`question, answer_matching_behavior,
        answer_not_matching_behavior`, optional `statement`; CAA's are the same), or one side with
        its label: `text, label`, or `prompt, completion, label`. Any row may have `id, group,
        paraphrase_of` (the id of another row), `split` and `weight`.

        A group is the normalised question or statement (case, punctuation, option order do not
        count), or the row's own `group`; given paraphrases and near-duplicates (token Jaccard >=
        0.8) join it. SHA-256 of seed and group sends 60 / 20 / 20 % to train, validation and test,
        whatever the order of the rows. A `split` column is kept if no group stands on two sides.

        Args:
            source: built-in name (see `names`), file, rows, a mapping of two lists of texts
                (`source` and `target`, or `negative` and `positive`; pairs where they are of one
                length), a DataFrame, a dataset of `datasets`, or its id on the Hub.
            behaviour: name of the behaviour; otherwise that of the file.
            label: that of the texts which show the behaviour, where labels do not say it
                themselves (1 and 0, true and false, positive and negative do).
            columns: name to column, where they have other names: `{"source": "toxic", "target":
                "neutral"}`.
            split: "hash", or a part for every item id, which overrides the column.
            seed: other seeds send other groups to the test part.

        Raises:
            UnknownName: no such built-in behaviour.
            DataError: the file or one of its rows cannot be used; names file, line and value.
            LeakError: a given split has one group on two sides.
        """
        rows, found = _open(source)
        name = behaviour if behaviour is not None else found
        mapped = dict(columns or {})
        if mapped:
            rows = [renamed(row, mapped) for row in rows]
        pairs = [read_pair(row, label, mapped) for row in rows]
        found_in = Counter(format_of(row, mapped).name for row in rows)
        if label is not None and not any(pair.target for pair in pairs):
            labels = sorted({str(row.data.get("label")) for row in rows})[:12]
            raise DataError(
                f"{rows[0].file}: no row has the label {label!r}",
                expected="one of " + ", ".join(labels),
            )
        ids = _ids(rows, name)
        groups, notes = _groups(rows, pairs, ids)
        parts = _parts(rows, ids, groups, split, seed)
        choice = all(pair.key for pair in pairs)
        if (keyed := sum(1 for pair in pairs if pair.key)) and not choice:
            notes.append(f"{keyed} of {len(rows)} rows look like choices; all are taken as open")
        items = tuple(
            Item(
                id=ids[n],
                prompt=pair.prompt,
                source=pair.source,
                target=pair.target,
                key=pair.key if choice else None,
                group=groups[n],
                split=parts[n],
                weight=rows[n].weight(),
            )
            for n, pair in enumerate(pairs)
        )
        citation = "; ".join(sorted({pair.citation for pair in pairs} - {""}))
        kind: Literal["open", "choice"] = "choice" if choice else "open"
        builtin = isinstance(source, str) and source in names() and name == source
        told = ", ".join(f"{count} rows of {one}" for one, count in found_in.items())
        return cls(name, kind, items, citation, tuple(notes), told, builtin)

    def part(self, name: str) -> Self:
        """The items of train, validation or test; at least two of them, or a DataError."""
        if name not in PARTS:
            raise UnknownName("part", name, PARTS)
        items = tuple(item for item in self.items if item.split == name)
        if len(items) < 2:
            counts = Counter(item.split for item in self.items)
            groups = len({item.group for item in self.items})
            raise DataError(
                f"the {name} part of {self.behaviour!r} has {len(items)} of {len(self)} items "
                f"({', '.join(f'{part} {counts[part]}' for part in PARTS)}; {groups} groups)",
                expected="at least 2",
                remedy="give more rows with other questions, another seed, or your own split",
            )
        return replace(self, items=items)

    @property
    def train(self) -> Self:
        """The part that fits see."""
        return self.part("train")

    @property
    def validation(self) -> Self:
        """The part on which strengths and layers are chosen."""
        return self.part("validation")

    @property
    def test(self) -> Self:
        """The part that only the evaluation sees."""
        return self.part("test")

    @cached_property
    def hash(self) -> str:
        """SHA-256 over behaviour, kind and every field of the items, in their order.

        The order counts, since it is the order of the recorded rows; citation, notes and origin do
        not.
        """
        digest = sha256(json.dumps([self.behaviour, self.kind]).encode())
        for item in self.items:
            digest.update(b"\n" + json.dumps(asdict(item), sort_keys=True).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, n: int, seed: int = 0) -> Self:
        """`n` items drawn without replacement, in file order; a smaller draw lies in a larger."""
        if not 1 <= n <= len(self):
            raise DataError(f"a subset of {n} items", expected=f"1 to {len(self)}")
        drawn = sorted(self.items, key=lambda item: _digest(seed, item.id))[:n]
        chosen = {item.id for item in drawn}
        return replace(self, items=tuple(item for item in self.items if item.id in chosen))


# owner/name without a suffix: no file of that name is there.
_HUB = re.compile(r"[\w-][\w.-]*/[\w-]+")


def names() -> list[str]:
    """The built-in behaviours: the files of the shelf.

    >>> isinstance(names(), list)
    True
    """
    if not _shelf().is_dir():
        return []
    found = [entry.name for entry in _shelf().iterdir() if entry.name.endswith(".jsonl")]
    return sorted(name[:-6] for name in found if not name.endswith(".prompts.jsonl"))


def prompts(behaviour: str, use: str) -> list[str]:
    """The built-in prompts of a behaviour for one use, such as "test"; no item asks them.

    Raises:
        UnknownName: no such built-in behaviour, or none of its prompts has this use.
        DataError: the behaviour has no prompts, or the file is damaged.
    """
    if behaviour not in (known := names()):
        raise UnknownName("behaviour", behaviour, known)
    file = _shelf() / f"{behaviour}.prompts.jsonl"
    if not file.is_file():
        raise DataError(
            f"the behaviour {behaviour!r} has no prompts of its own",
            expected=f"a file {file.name} with columns prompt and use",
            remedy="give prompts yourself",
        )
    rows = read_lines(file.read_bytes(), file.name)
    found = [(row.text("prompt"), row.text("use")) for row in rows]
    if use not in (uses := sorted({name for _, name in found})):
        raise UnknownName(f"use of the prompts of {behaviour!r}", use, uses)
    return [prompt for prompt, name in found if name == use]


def _shelf() -> Traversable:
    """The folder of the built-in behaviours."""
    return files("innsteer") / "behaviours"


def _open(source: object) -> tuple[list[Row], str]:
    """The rows of any source, at least one, and the name that it gives the behaviour."""
    if isinstance(source, str) and source in names():
        file = _shelf() / f"{source}.jsonl"
        return read_lines(file.read_bytes(), file.name), source
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.name == source and not path.suffix and not path.exists():
            raise UnknownName("behaviour", source, names())
        if isinstance(source, str) and not path.exists() and _HUB.fullmatch(source):
            return read_dataset(source), source.rpartition("/")[2]
        return read_file(path), path.name.removesuffix(".gz").rpartition(".")[0]
    if isinstance(source, Mapping) and not hasattr(source, "num_rows"):
        return read_lists(source), "unnamed"
    frame = hasattr(source, "columns") and hasattr(source, "to_dict")
    if isinstance(source, Mapping) or hasattr(source, "features") or frame:
        return read_table(source), "unnamed"
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return read_rows(source), "unnamed"
    raise DataError(
        f"a contrast from {reprlib.repr(source)}",
        expected="a built-in name, a file, rows, two lists, a DataFrame or a dataset",
    )


def _groups(
    rows: Sequence[Row], pairs: Sequence[Pair], ids: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The group of each row, whatever the order of the rows, and what there is to note."""
    sets, given = Sets(), set[str]()
    row_of: dict[str | None, int] = {name: n for n, name in enumerate(ids)}
    texts = sorted({text for pair in pairs for text in pair.texts})
    leads = near_groups(texts)
    for text, lead in zip(texts, leads, strict=True):
        sets.join(("text", text), ("text", texts[lead]))
    for n, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        for text in pair.texts:
            sets.join(("row", n), ("text", text))
        group, origin = row.label("group"), row.label("paraphrase_of")
        if origin in row_of:
            sets.join(("row", n), ("row", row_of[origin]))
            origin = None  # one in another file still ties its paraphrases, by its name
        for label in filter(None, (group, origin)):
            sets.join(("row", n), ("group", label))
            given.add(label)
    # The user's own names come first, then the texts, both sorted: no order of rows decides.
    name_of: dict[Hashable, str] = {}
    for label in sorted(given):
        name_of.setdefault(sets.find(("group", label)), label)
    for text in texts:
        name_of.setdefault(sets.find(("text", text)), _digest(text)[:16])
    groups = [name_of[sets.find(("row", n))] for n in range(len(rows))]
    notes = []
    if near := [lead for n, lead in enumerate(leads) if n != lead]:
        nouns = ["near-duplicate" + "s" * (len(near) > 1), "group" + "s" * (len(set(near)) > 1)]
        notes.append(
            f"{len(near)} {nouns[0]} (token Jaccard >= 0.8) joined into {len(set(near))} {nouns[1]}"
        )
    if len(rows) > 1 and len(set(groups)) == 1:
        notes.append(f"all {len(rows)} rows are one group and cannot be split")
    return groups, notes


def _ids(rows: Sequence[Row], behaviour: str) -> list[str]:
    """Given ids, or behaviour and row number; no two alike."""
    first: dict[str, int] = {}
    for n, row in enumerate(rows):
        name = row.label("id") or f"{behaviour}-{n + 1:04d}"
        if (other := first.setdefault(name, n)) != n:
            raise row.wrong(
                f"the id {name!r} is also that of {rows[other].place}",
                expected="a different id for every row",
                remedy="rename one, or remove the id column",
            )
    return list(first)


def _digest(*parts: object) -> str:
    return sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _parts(
    rows: Sequence[Row],
    ids: Sequence[str],
    groups: Sequence[str],
    split: Literal["hash"] | Mapping[str, str],
    seed: int,
) -> list[str]:
    """The part of each row: given ones if they leak nothing, otherwise by the hash of the group."""
    if isinstance(split, Mapping):
        given = [split.get(name) for name in ids]
    elif split == "hash":
        given = [row.optional("split") for row in rows]
    else:
        raise DataError(f"split is {split!r}", expected="'hash' or a part for every item id")
    if not isinstance(split, Mapping) and not any(given):
        draws = [int(_digest(seed, group)[:13], 16) / 16**13 for group in groups]
        return [PARTS[(draw >= 0.6) + (draw >= 0.8)] for draw in draws]
    sides: list[str] = []
    for row, name, side in zip(rows, ids, given, strict=True):
        if side not in PARTS:
            raise row.wrong(
                f"the split of {name!r} is {reprlib.repr(side)}",
                expected=" | ".join(PARTS) + ", in every row",
                remedy="rename it, or give no split at all: then a hash of the group decides",
            )
        sides.append(side)
    _refuse_leaks(rows, groups, sides)
    return sides


def _refuse_leaks(rows: Sequence[Row], groups: Sequence[str], sides: Sequence[str]) -> None:
    members: dict[str, list[int]] = defaultdict(list)
    for n, group in enumerate(groups):
        members[group].append(n)
    leaks = [found for found in members.values() if len({sides[n] for n in found}) > 1]
    if not leaks:
        return

    def place(n: int) -> str:
        return f"{rows[n].place} ({sides[n]})"

    shown = []
    for found in leaks[:5]:
        other = next(n for n in found if sides[n] != sides[found[0]])
        shown.append(f"{place(found[0])} and {place(other)}")
    more = f", and {len(leaks) - 5} more" if len(leaks) > 5 else ""
    raise LeakError(
        f"{rows[0].file}: {sum(map(len, leaks))} rows in {len(leaks)} groups ask the same or "
        f"nearly the same on two sides of the given split: {'; '.join(shown)}{more}",
        expected="every group in one part",
        remedy="move those rows, or drop the split: then a hash of the group decides",
    )

"""Concepts: a table of concepts in words, prompts, and responses that show the concept.

Knows texts only. What a field over concepts learns from, and what it is tested on: other responses
of the same concepts (validation), and concepts of which it saw nothing (test).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from innsteer.errors import DataError, InputError
from innsteer.files import canonical
from innsteer.formats import Row, read_file, read_rows

COLUMNS = {
    "concept": ("concept", "output_concept"),
    "prompt": ("prompt", "input", "instruction"),
    "response": ("response", "output", "completion"),
}
"""What each column may be called: AxBench's names, and those of instruction data."""
PARTS = ("train", "validation", "test")
AXBENCH = {"train": "generate/train_data", "validation": "inference/latent_eval_data"}
"""Where AxBench keeps responses, without the suffix."""
NONE = "EEEEE"
"""AxBench's concept of a response that shows none."""


@dataclass(frozen=True)
class Response:
    """One response that shows a concept, and the part that it stands in."""

    concept: str
    prompt: str
    response: str
    split: str = "train"


@dataclass(frozen=True)
class Concepts:
    """Responses that show concepts, in parts.

    >>> rows = [{"concept": c, "prompt": f"{n}?", "response": f"{c} {n}."}
    ...         for c in ("polite", "rude") for n in range(10)]
    >>> table = Concepts.of(rows, unseen=0.5)
    >>> len(table.named("test")), len(table.named("train")), len(table)
    (1, 1, 20)
    """

    rows: tuple[Response, ...]

    @classmethod
    def load(cls, path: str | Path, *, unseen: float = 0.1, held: float = 0.1) -> "Concepts":
        """A table from a file (.jsonl, .json, .csv, .tsv, .parquet, each also .gz) or a folder.

        A folder is AxBench's: ``generate/train_data``, whose responses to ``inference`` prompts
        (``latent_eval_data``), where they are there, are the validation part: ``held`` then deals
        none of the others into it. Its responses that show no concept are left out.

        Args:
            unseen, held: see ``of``.

        Raises:
            DataError: a file that cannot be read, or rows without a concept, prompt or response.
        """
        path = Path(path)
        if not path.is_dir():
            return cls.of(read_file(path), unseen=unseen, held=held)
        parts = {}
        for name, place in AXBENCH.items():
            files = [path / f"{place}{end}" for end in (".parquet", ".jsonl", ".jsonl.gz")]
            parts[name] = next((read_file(file) for file in files if file.is_file()), [])
        if not parts["train"]:
            raise DataError(
                f"{path} holds no {AXBENCH['train']}",
                expected="a folder of AxBench's layout, or a file with the columns concept, "
                "prompt and response",
            )
        share = 0.0 if parts["validation"] else held
        every = cls.of([*parts["train"], *parts["validation"]], unseen=unseen, held=share)
        aside = {_response(row) for row in parts["validation"] if not _without(row)}
        rows = [
            replace(row, split="validation")
            if row.split == "train" and replace(row, split="") in aside
            else row
            for row in every.rows
        ]
        return cls(tuple(rows))

    @classmethod
    def of(
        cls,
        rows: Iterable[Row | Mapping[str, Any]],
        *,
        unseen: float = 0.1,
        held: float = 0.1,
    ) -> "Concepts":
        """A table from rows; a column ``split`` is kept, what has none is dealt by its hash.

        Args:
            unseen: share of the concepts that go to ``test`` whole. held: share of the other
                concepts' prompts that go to ``validation``.

        Raises:
            InputError: a share that is none. DataError: see ``load``.
        """
        for name, share in (("unseen", unseen), ("held", held)):
            if not 0 <= share < 1:
                raise InputError(f"{name}={share}", expected="a share, from 0 to below 1")
        given = list(rows)
        plain = [row for row in given if not isinstance(row, Row)]
        read = [row for row in given if isinstance(row, Row)] + (read_rows(plain) if plain else [])
        found = [_response(row) for row in read if not _without(row)]
        if not found:
            raise DataError(
                "a table without responses that show a concept", expected="at least one"
            )
        concepts = list(dict.fromkeys(row.concept for row in found))
        count = round(unseen * len(concepts))
        test = set(sorted(concepts, key=_dealt)[:count])
        dealt = []
        for row in found:
            if not row.split:
                part = "validation" if _dealt("", row.prompt) < held * 2**32 else "train"
                row = replace(row, split="test" if row.concept in test else part)
            dealt.append(row)
        return cls(tuple(dealt))

    def __len__(self) -> int:
        return len(self.rows)

    def named(self, split: str | None = None) -> tuple[str, ...]:
        """The concepts of a part, in the order in which they first stand."""
        rows = (row for row in self.rows if split is None or row.split == split)
        return tuple(dict.fromkeys(row.concept for row in rows))

    def part(self, split: str) -> "Concepts":
        """The rows of a part alone."""
        return Concepts(tuple(row for row in self.rows if row.split == split))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all rows, in order."""
        told = [[row.concept, row.prompt, row.response, row.split] for row in self.rows]
        return sha256(canonical(told)).hexdigest()


def _without(row: Row) -> bool:
    """Whether it is one of AxBench's responses that show no concept, or another sense."""
    return row.data.get("output_concept") == NONE or (
        row.data.get("category", "positive") != "positive" and "output_concept" in row.data
    )


def _response(row: Row) -> Response:
    """A row of the table, checked."""
    found = {}
    for name, called in COLUMNS.items():
        value = next((row.data[key] for key in called if row.data.get(key)), None)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{row.file}, {row.place}: {name} is {value!r:.60}",
                expected=f"some text under {' or '.join(called)}",
            )
        found[name] = value.strip()
    split = row.data.get("split") or ""
    if split and split not in PARTS:
        raise DataError(f"{row.file}, {row.place}: split {split!r}", expected=", ".join(PARTS))
    return Response(**found, split=split)


def _dealt(*told: str) -> int:
    """A number below 2^32 that depends on a text alone."""
    return int(sha256("\x1f".join(told).encode()).hexdigest()[:8], 16)

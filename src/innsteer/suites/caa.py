"""CAA: behaviours as questions with two lettered answers, and open questions about them.

Reads the files of Rimsky et al. 2024, Steering Llama 2 via Contrastive Activation Addition,
https://arxiv.org/abs/2312.06681 (``generate_dataset.json``, ``test_dataset_ab.json`` and
``test_dataset_open_ended.json`` of one behaviour); none is in the package.
"""

import re
from dataclasses import replace
from pathlib import Path

from innsteer.contrast import Contrast
from innsteer.formats import Row, read_file
from innsteer.suites.base import Ask, Benchmark, beside

_CITATION = "Rimsky et al. 2024, Contrastive Activation Addition, arXiv 2312.06681"
_OPTIONS = re.compile(r"(?s)(.*\n[ \t]*)\(A\)[ \t]*(.+?)(\s*\n[ \t]*)\(B\)[ \t]*(.+?)\s*")
_OTHER = {"(A)": "(B)", "(B)": "(A)"}


def contrast(
    source: str | Path, *, questions: str = "", behaviour: str = "", seed: int = 0
) -> Benchmark:
    """Choices between (A) and (B), each question in both orders of its answers.

    Measured by alignment. Open questions are test data: they are asked in place of the choices,
    and who scores the answers you say, ``scorer`` in `suites.read`.

    Args:
        source: ``generate_dataset.json`` or ``test_dataset_ab.json``, also .gz.
        questions: file of open questions; a bare name stands beside the source.
        behaviour: default: the name of the folder that holds the file, as CAA has it.
        seed: other seeds send other questions to the test part.

    Raises:
        DataError: a file or one of its rows cannot be used; names file, line and value.
    """
    path = Path(source).expanduser()
    name = behaviour or path.resolve().parent.name
    rows = [
        row | {"id": f"{name}-{n:04d}-{row['answer_matching_behavior'][1]}"}
        for n, found in enumerate(read_file(path), 1)
        for row in _orders(found)
    ]
    asked = read_file(beside(source, questions)) if questions else []
    asks = (Ask(f"open-{n:03d}", row.text("question"), "test") for n, row in enumerate(asked, 1))
    found = replace(Contrast.load(rows, behaviour=name, seed=seed), citation=_CITATION)
    return Benchmark.of(found, asked=tuple(asks))


def _orders(row: Row) -> list[dict[str, str]]:
    """A question as it stands, and with its two answers in the other order."""
    question, key = row.text("question"), row.text("answer_matching_behavior").strip()
    options = _OPTIONS.fullmatch(question)
    if options is None or key not in _OTHER:
        raise row.wrong(
            f"the question {question[-60:]!r} with the answer {key!r}",
            expected="lines (A) ... and (B) ..., and the answer (A) or (B)",
        )
    start, first, between, second = options.groups()
    swapped = f"{start}(A) {second}{between}(B) {first}"
    return [
        {
            "question": text,
            "answer_matching_behavior": match,
            "answer_not_matching_behavior": _OTHER[match],
        }
        for text, match in ((question, key), (swapped, _OTHER[key]))
    ]

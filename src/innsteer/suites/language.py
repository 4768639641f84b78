"""Language: the same questions in two languages, to steer in which of them a model answers.

Reads parallel files: the Vicuna questions of MultilingualSIFT (.jsonl, ``question_id`` and
``text``, https://github.com/FreedomIntelligence/MultilingualSIFT) or XQuAD (SQuAD's JSON, Artetxe
et al. 2020, https://arxiv.org/abs/1910.11856); none is in the package.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from innsteer.contrast import Contrast
from innsteer.errors import DataError
from innsteer.formats import Row, read_file
from innsteer.suites.base import Ask, Benchmark, beside


class _Asked(NamedTuple):
    text: str
    group: str | None


def contrast(
    source: str | Path, *, to: str, language: str, behaviour: str = "", seed: int = 0
) -> Benchmark:
    """Questions in one language (source) against the same in another (target).

    The source's questions are asked, and measured is the share of answers in the other language.
    Questions about one paragraph stand in one part.

    Args:
        source: file of the questions as they are asked (.jsonl, .json, also .gz).
        to: file of the same in the language to answer in; a bare name stands beside the source.
        language: its code in ISO 639-1: fr. behaviour: default: in-fr.
        seed: other seeds send other questions to the test part.

    Raises:
        DataError: a file or one of its rows cannot be used, or the files share no question.
    """
    ours, theirs = (_questions(path) for path in (Path(source).expanduser(), beside(source, to)))
    shared = [key for key in ours if key in theirs and ours[key].text != theirs[key].text]
    if not shared:
        raise DataError(
            f"{source} and {to} share no question",
            expected="files in two languages whose questions have the same ids",
        )
    rows = [
        {"id": key, "source": ours[key].text, "target": theirs[key].text, "group": ours[key].group}
        for key in shared
    ]
    found = Contrast.load(rows, behaviour=behaviour or f"in-{language}", seed=seed)
    asked = tuple(Ask(item.id, str(item.source), item.split) for item in found.items)
    return Benchmark.of(found, measures=(f"language:{language}",), asked=asked)


def _questions(path: Path) -> dict[str, _Asked]:
    """The questions of a file by their ids, each once."""
    found: dict[str, _Asked] = {}
    for row in read_file(path):
        for key, asked in _of(row):
            if key in found:
                raise row.wrong(f"the id {key!r} stands there twice", expected="ids, each once")
            found[key] = asked
    return found


def _of(row: Row) -> Iterator[tuple[str, _Asked]]:
    """The questions of a row with their ids: one, or those of an article's paragraphs."""
    paragraphs = row.data.get("paragraphs")
    if paragraphs is None:
        key = row.label("question_id") or row.label("id")
        if key is None:
            raise row.wrong("no id", expected="question_id, the same in both files")
        yield key, _Asked(row.text("text"), None)
        return
    try:
        asked = [(p["qas"][0]["id"], one) for p in paragraphs for one in p["qas"]]
        pairs = [(str(one["id"]), one["question"], f"paragraph {first}") for first, one in asked]
    except (TypeError, KeyError, IndexError) as error:
        raise row.wrong(
            f"its paragraphs lack {error}", expected="paragraphs as SQuAD has them, with qas"
        ) from error
    for key, text, group in pairs:
        yield key, _Asked(row.check(text, f"the question {key!r}"), group)

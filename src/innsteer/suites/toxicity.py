"""Toxicity: prompts that lead to toxic text, and toxic sentences with neutral rewrites.

Reads RealToxicityPrompts (Gehman et al. 2020, https://arxiv.org/abs/2009.11462) and ParaDetox
(Logacheva et al. 2022, https://aclanthology.org/2022.acl-long.469/); neither is in the package.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from innsteer.contrast import Contrast
from innsteer.formats import Row, read_file
from innsteer.suites.base import Ask, Benchmark

_REWRITES = ("neutral1", "neutral2", "neutral3")


def contrast(
    source: str | Path, *, threshold: float = 0.5, behaviour: str = "detoxified", seed: int = 0
) -> Benchmark:
    """Toxic texts (source) against neutral ones (target).

    ParaDetox pairs a sentence with each of its rewrites. RealToxicityPrompts puts toxic
    continuations against others, and asks its prompts as they stand; who scores the answers you
    say: ``scorer`` in `suites.read`. Rows that no side can be told of are left out, and counted.

    Args:
        source: paradetox.tsv or the prompts (.jsonl), also .gz.
        threshold: toxicity from which a continuation counts as toxic, 0 to 1.
        seed: other seeds send other texts to the test part.

    Raises:
        DataError: the file or one of its rows cannot be used; names file, line and value.
    """
    rows = read_file(Path(source).expanduser())
    rewritten = "toxic" in rows[0].data
    read = [_pairs(row) if rewritten else _continued(row, threshold) for row in rows]
    found = Contrast.load([one for made in read for one in made], behaviour=behaviour, seed=seed)
    if left := sum(not made for made in read):
        why = "no other rewrite" if rewritten else "no score"
        found = replace(found, notes=(*found.notes, f"{left} rows with {why} left out"))
    asked = () if rewritten else tuple(Ask(i.id, i.prompt, i.split) for i in found.items)
    return Benchmark.of(found, asked=asked)


def _pairs(row: Row) -> list[dict[str, Any]]:
    """A sentence with each of its rewrites that differs from it; together they weigh 1."""
    toxic = row.text("toxic")
    texts = dict.fromkeys(filter(None, (row.optional(name) for name in _REWRITES)))
    others = [text for text in texts if text.strip() != toxic.strip()]
    return [{"source": toxic, "target": text, "weight": 1 / len(others)} for text in others]


def _continued(row: Row, threshold: float) -> list[dict[str, Any]]:
    """A prompt with its continuation, on the side that its toxicity tells."""
    before, after = _scored(row, "prompt"), _scored(row, "continuation")
    score = after.get("toxicity")
    if score is None:
        return []
    if not isinstance(score, int | float):
        raise row.wrong(f"the toxicity {score!r}", expected="a number from 0 to 1, or null")
    prompt, text = (row.check(one.get("text"), "the text") for one in (before, after))
    return [{"prompt": prompt, "completion": text, "label": int(score < threshold)}]


def _scored(row: Row, name: str) -> Mapping[str, Any]:
    """A text with its scores."""
    found = row.data.get(name)
    if not isinstance(found, Mapping):
        raise row.wrong(f"{name!r} is {found!r}", expected="a text with its scores")
    return found

"""Responses that show concepts, written by a model that was told to, kept where that helped.

What a field over concepts learns from. By default the model itself writes, prompted: the field then
distils prompting, and the prompted model is the upper arm to compare it with.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from innsteer.backends.base import Progress, Prompt, Sampling, silent
from innsteer.backends.hf import HF
from innsteer.backends.meter import instruct
from innsteer.errors import DataError, InputError
from innsteer.formats import is_plain, plain_lines, read_file
from innsteer.judging import Endpoint
from innsteer.suites import behaviour as suites

REQUEST = "Let your whole answer show this, without mentioning it: {concept}."
"""What a prompt is followed by where the concept is wanted."""


class Written(NamedTuple):
    """One response, and how much the request raised its log-probability, nats per token."""

    concept: str
    prompt: str
    response: str
    gain: float


@dataclass(frozen=True)
class Distilled:
    """What was written.

    Attributes:
        kept: responses whose log-probability the request raised, a row each.
        asked: how many were asked for, by concept. shares: the share kept, by concept, 0 to 1.
    """

    kept: tuple[Written, ...]
    asked: dict[str, int]

    @property
    def shares(self) -> dict[str, float]:
        """The share kept of what was asked for, by concept, in the order asked."""
        return {
            concept: sum(row.concept == concept for row in self.kept) / count
            for concept, count in self.asked.items()
        }

    @property
    def share(self) -> float:
        """The share kept of all."""
        return len(self.kept) / sum(self.asked.values())


def read_concepts(path: str | Path) -> tuple[str, ...]:
    """Concepts from a .txt, one per line, or from the column ``concept`` of a table, each once.

    Raises:
        DataError: a file that cannot be read, or without a concept.
    """
    path = Path(path)
    if is_plain(path):
        found = plain_lines(path)
    else:
        found = [row.check(row.data.get("concept"), "concept") for row in read_file(path)]
    concepts = tuple(dict.fromkeys(line.strip() for line in found if line.strip()))
    if not concepts:
        raise DataError(f"{path} without a concept", expected="one per line, or a column concept")
    return concepts


def distil(
    backend: HF,
    concepts: Sequence[str],
    *,
    each: int = 12,
    prompts: Sequence[Prompt] | None = None,
    sampling: Sampling = Sampling(64, 1.0),  # noqa: B008
    writer: Endpoint | None = None,
    least: float = 0.0,
    progress: Progress = silent,
) -> Distilled:
    """Responses to some prompts per concept, those kept whose log-probability the request raised.

    gain = (log P(response | prompt and request) - log P(response | prompt)) / tokens > least, by
    the model of the backend, whoever wrote the response.

    Args:
        concepts: in words, each of at most 64 tokens.
        each: responses asked for per concept. prompts: what they answer, drawn by
            ``sampling.seed``; default: the package's neutral prompts for fitting.
        sampling: of the model itself. writer: another model that writes in its place.
        least: gain that a response needs; -inf keeps all, as for a test that the gain must not
            choose.

    Raises:
        InputError: no concept, one that is too long, or more responses than prompts.
    """
    asked = suites.neutral("fit") if prompts is None else tuple(prompts)
    if not concepts or not 1 <= each <= len(asked):
        raise InputError(
            f"{each} responses for each of {len(concepts)} concepts to {len(asked)} prompts",
            expected="at least one concept, and a prompt for each of its responses",
        )
    for concept in concepts:
        backend.model.short(concept)  # refuses what no field could be told
    kept: list[Written] = []
    several = max(backend.batch // each, 1)  # as many as fill a batch
    for start in range(0, len(concepts), several):
        progress("concepts", start, len(concepts))
        drawn = [
            (concept, prompt)
            for concept in concepts[start : start + several]
            for prompt in random.Random(f"{sampling.seed} {concept}").sample(asked, each)
        ]
        # Each batch draws anew: alike prompts at its head would give alike noise.
        own = replace(sampling, seed=sampling.seed + start)
        kept += _written(backend, drawn, own, writer, least)
    progress("concepts", len(concepts), len(concepts))
    return Distilled(tuple(kept), dict.fromkeys(concepts, each))


def _written(
    backend: HF,
    drawn: Sequence[tuple[str, Prompt]],
    sampling: Sampling,
    writer: Endpoint | None,
    least: float,
) -> list[Written]:
    """The kept responses to prompts that are each asked to show a concept."""
    plain = [prompt for _, prompt in drawn]
    told = [
        replace(one, conversation=instruct(one.conversation, REQUEST.format(concept=concept)))
        for concept, one in drawn
    ]
    if writer is None:
        texts = [one.text for one in backend.generate(told, (), sampling)]
    else:
        texts = [writer.ask(_said(one), sampling.temperature).strip() for one in told]
    said = [place for place, text in enumerate(texts) if text]
    scores: list[list[float]] = []
    for asked in (told, plain):
        rows = [replace(asked[place], answers=(texts[place],)) for place in said]
        found = backend.score(rows) if rows else []
        scores.append([sum(values) / len(values) for (values,) in found])
    return [
        Written(drawn[place][0], _said(plain[place]), texts[place], round(with_ - without, 4))
        for place, with_, without in zip(said, *scores, strict=True)
        if with_ - without > least
    ]


def _said(prompt: Prompt) -> str:
    """A prompt of one turn as text."""
    conversation: Any = prompt.conversation
    if not isinstance(conversation, str):
        raise InputError(f"prompt {prompt.item!r} of several turns", expected="one user's turn")
    return conversation

"""The suite of one behaviour: prompts to answer, items to score, and prompts that must not move."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from innsteer import contrast as contrasts
from innsteer.backends.base import Prompt, Sampling
from innsteer.contrast import Contrast
from innsteer.errors import DataError, InputError


@dataclass(frozen=True)
class Suite:
    """What every arm is asked.

    Attributes:
        behaviour: its name. control: the metric that says how far it moved.
        prompts: to be answered freely. sampling: how.
        items: test items of the contrast, scored teacher-forced.
        neutral: prompts that the behaviour does not concern, for the neutral cost.
        in_format: prompts that only look like the behaviour's, for the in-format cost.
        plain: held-out plain texts, for bits per byte.
        instruction: what the prompt-only arm adds; "" where nobody wrote one.
        neutral_tokens: response tokens per neutral prompt.
        others: items of other behaviours, for what else moves.
    """

    behaviour: str
    control: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    items: Contrast | None
    neutral: tuple[Prompt, ...]
    in_format: tuple[Prompt, ...] = ()
    plain: tuple[str, ...] = ()
    instruction: str = ""
    neutral_tokens: int = 24
    others: tuple[Contrast, ...] = ()

    def preview(self, *, prompts: int = 8, new_tokens: int = 32) -> "Suite":
        """A small version whose figures are a foretaste, not a measurement."""
        items = self.items
        return replace(
            self,
            prompts=self.prompts[:prompts],
            sampling=replace(self.sampling, new_tokens=min(new_tokens, self.sampling.new_tokens)),
            items=items.subset(min(len(items), 8), 0) if items else None,
            neutral=self.neutral[:16],
            in_format=self.in_format[:8],
            plain=(),
            others=(),
        )


def load(
    contrast: Contrast,
    *,
    part: str = "test",
    prompts: Sequence[str] | None = None,
    control: str = "",
    instruction: str = "",
) -> Suite:
    """The suite of a contrast: its built-in prompts and scorer, or the ones given.

    Without a scorer, control is measured on the held-out items: ``preference`` for open answers,
    ``alignment`` for choices.

    Args:
        part: ``test`` or ``validation``; they share no prompt and no source.
        prompts: to be answered instead of the behaviour's own.
    """
    known = meta(contrast)
    kind = "alignment" if contrast.kind == "choice" else "preference"
    # What a choice item's sampled answer says is read from 16 tokens, drawn at temperature 1.
    usual = {"new_tokens": 16, "temperature": 1.0} if contrast.kind == "choice" else {}
    sampling = Sampling(**known.get("sampling", usual))
    return Suite(
        behaviour=contrast.behaviour,
        control=control or known.get("scorer", kind),
        prompts=_own(contrast, part, known) if prompts is None else _numbered(part, prompts),
        sampling=sampling,
        items=contrast.part(part),
        neutral=neutral(part),
        in_format=in_format(contrast, part),
        plain=plain(),
        instruction=instruction or known.get("instruction", ""),
        others=tuple(
            contrasts.Contrast.load(name).part(part)
            for name in contrasts.names()
            if name != contrast.behaviour
        ),
    )


def meta(behaviour: str | Contrast) -> dict[str, Any]:
    """Direction, scorer, decoding and instruction of a built-in behaviour; {} for others.

    A contrast counts by its origin: a file of one's own may share a built-in behaviour's name.
    """
    if isinstance(behaviour, Contrast):
        return meta(behaviour.behaviour) if behaviour.builtin else {}
    path = files("innsteer") / "behaviours" / f"{behaviour}.json"
    if behaviour not in contrasts.names() or not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _own(contrast: Contrast, part: str, known: dict[str, Any]) -> tuple[Prompt, ...]:
    """A built-in behaviour's prompts; other contrasts ask their own held-out questions."""
    if known:
        return _numbered(part, contrasts.prompts(contrast.behaviour, part))
    # By the items' ids, which lead from a sampled answer to its key.
    return tuple(Prompt(item.id, item.prompt) for item in contrast.part(part).items if item.prompt)


def _numbered(name: str, texts: Sequence[str]) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{name}-{n:03d}", text) for n, text in enumerate(texts))


def in_format(behaviour: str | Contrast, part: str) -> tuple[Prompt, ...]:
    """Prompts in a built-in behaviour's own wording that it does not concern; () for others."""
    if not meta(behaviour):
        return ()
    name = behaviour.behaviour if isinstance(behaviour, Contrast) else behaviour
    texts = contrasts.prompts(name, f"in_format_{part}")
    return tuple(Prompt(f"in-format-{n:03d}", text) for n, text in enumerate(texts))


def neutral(part: str) -> tuple[Prompt, ...]:
    """The neutral prompts; validation and test parts hold different kinds.

    Raises:
        InputError: no such part.
    """
    rows = _lines("neutral.jsonl")
    # Interleave the kinds, so that the first prompts of a short search hold all of them.
    kinds: dict[str, list[str]] = {}
    for row in rows:
        if row["part"] == part:
            kinds.setdefault(row["kind"], []).append(row["prompt"])
    if not kinds:
        raise InputError(f"neutral prompts of part {part!r}", expected="validation or test")
    longest = max(len(prompts) for prompts in kinds.values())
    mixed = [prompts[n] for n in range(longest) for prompts in kinds.values() if n < len(prompts)]
    return _numbered(f"neutral-{part}", mixed)


def plain() -> tuple[str, ...]:
    """Held-out plain texts."""
    return tuple(row["text"] for row in _lines("plain.jsonl"))


def _lines(name: str) -> list[dict[str, Any]]:
    path = files("innsteer") / "suites" / name
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{name} is missing from the installed package") from None
    return [json.loads(line) for line in text.splitlines() if line.strip()]

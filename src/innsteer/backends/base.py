"""What every engine can do, and the records that it gives back.

A backend sees edits (interventions, coefficients, positions), never methods or behaviours' names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from innsteer.activations import Activations, Read
from innsteer.contrast import Contrast, Conversation
from innsteer.interventions import Edit
from innsteer.site import Site

Kind = Literal[
    "sample",
    "choice",
    "pair",
    "question",
    "neutral",
    "in_format",
    "plain",
    "aside",
    "long",
    "other",
]
Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``."""


def silent(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    Attributes:
        item: id that pairs arms. answers: continuations to score, for ``score``.
    """

    item: str
    conversation: Conversation
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How to decode: neutral, without repetition penalty or n-gram ban.

    Attributes:
        new_tokens: at most this many. temperature: 0 = greedy. seed: the same seed and batch give
            the same draws, so that arms are paired.
    """

    new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What one arm did with one item: the only thing that metrics see.

    Attributes:
        kind: ``sample`` a generated answer; ``choice`` and ``pair`` scored answers; ``question``
            all scored answers of a question; ``neutral`` and ``in_format`` divergence from the
            unsteered model; ``plain`` scored plain text; ``aside`` an answer to a harmless prompt;
            ``long`` an answer of ``asked`` tokens; ``other`` a scored pair of another behaviour,
            named by ``key``.
        prompt, text: what was asked and answered, as text.
        values: measured numbers by name, each a tuple, for instance ``kl`` in nats per token.
        key: for choices, the answer that matches the behaviour.
        arm, strength, seed: who answered.
        tokens: response tokens. steered: tokens that were edited.
    """

    item: str
    kind: Kind
    prompt: str = ""
    text: str = ""
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    key: str = ""
    arm: str = "unsteered"
    strength: float = 0.0
    seed: int = 0
    tokens: int = 0
    steered: int = 0

    def by(self, arm: str, strength: float) -> "Completion":
        """The same record under an arm's name."""
        return replace(self, arm=arm, strength=strength)

    def to_json(self) -> dict[str, Any]:
        """Plain data, one line of completions.jsonl."""
        return dict(vars(self)) | {"values": {k: list(v) for k, v in self.values.items()}}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Completion":
        """What ``to_json`` made."""
        return cls(**{**row, "values": {k: tuple(v) for k, v in row["values"].items()}})


class Backend(Protocol):
    """An engine that runs a model under edits. ``edits=()`` is the plain model."""

    name: str

    def generate(
        self,
        prompts: Sequence[Prompt],
        edits: Sequence[Edit] = (),
        sampling: Sampling = ...,
        *,
        progress: Progress = silent,
    ) -> list[Completion]:
        """Answers, as completions of kind ``sample``."""
        ...

    def score(
        self,
        prompts: Sequence[Prompt],
        edits: Sequence[Edit] = (),
        *,
        progress: Progress = silent,
    ) -> list[tuple[tuple[float, ...], ...]]:
        """Per prompt, per answer: log-probability of each answer token, natural logarithm."""
        ...

    def record(
        self,
        contrast: Contrast,
        sites: Sequence[Site],
        *,
        read: Read = "last",
        progress: Progress = silent,
    ) -> Activations:
        """Activations of a contrast's two sides at some sites."""
        ...

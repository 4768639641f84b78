"""Benchmark: a contrast with what a well-known benchmark asks beside it, and how it is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from innsteer.backends.base import Completion, Prompt
from innsteer.contrast import Contrast, Conversation


def beside(source: str | Path, name: str) -> Path:
    """A second file; a name that leads nowhere from here stands beside the source."""
    path = Path(name).expanduser()
    return path if path.exists() else Path(source).expanduser().parent / name


@dataclass(frozen=True)
class Ask:
    """A prompt to be answered freely, in one part; ``harmless``: it ought to be answered."""

    id: str
    prompt: Conversation
    split: str
    harmless: bool = False


@dataclass(frozen=True)
class Question:
    """A question with all of its answers; the best of the true ones comes first."""

    item: str
    conversation: Conversation
    true: tuple[str, ...]
    false: tuple[str, ...]

    @property
    def prompt(self) -> Prompt:
        """Every answer to be scored, the true ones before the false ones."""
        return Prompt(self.item, self.conversation, (*self.true, *self.false))


def answered(scored: Sequence[Completion], questions: Sequence[Question]) -> list[Completion]:
    """A completion of kind ``question`` for each, from its scored answers, in their order.

    ``values``: total log-probabilities of the ``true`` and of the ``false`` answers.
    """
    left, found = iter(scored), []
    for question in questions:
        made = [next(left) for _ in question.prompt.answers]
        totals = tuple(sum(one.values["log_prob"]) for one in made)
        cut = len(question.true)
        values = {"true": totals[:cut], "false": totals[cut:]}
        found.append(replace(made[0], kind="question", text="", values=values))
    return found


@dataclass(frozen=True)
class Benchmark(Contrast):
    """A contrast, and what its benchmark asks beside the items.

    Attributes:
        measures: metrics that the benchmark is known by; the first says how far the behaviour
            moved; () = that of the items.
        asked: prompts to be answered; () = the items' own.
        answers: true and false answers of an item's question, by the item's id.
    """

    measures: tuple[str, ...] = ()
    asked: tuple[Ask, ...] = ()
    answers: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, contrast: Contrast, **more: Any) -> "Benchmark":
        """A contrast as a benchmark that asks more; one that is a benchmark keeps what it asks."""
        return cls(**{one.name: getattr(contrast, one.name) for one in fields(contrast)} | more)

    def whole(self, part: str) -> "Benchmark":
        """All of it as one part, for data that is only reported on."""
        return replace(
            self,
            items=tuple(replace(item, split=part) for item in self.items),
            asked=tuple(replace(ask, split=part) for ask in self.asked),
        )

    def asks(self, part: str, *, harmless: bool) -> tuple[Prompt, ...]:
        """The prompts of a part."""
        return tuple(
            Prompt(ask.id, ask.prompt)
            for ask in self.asked
            if ask.split == part and ask.harmless == harmless
        )

    def questions(self, part: str) -> tuple[Question, ...]:
        """The questions of a part with all of their answers."""
        return tuple(
            Question(item.id, item.prompt, *self.answers[item.id])
            for item in self.items
            if item.split == part and item.id in self.answers
        )

    def extra(self) -> dict[str, Any]:
        """What it asks beside its items, as plain data."""
        asked = [asdict(ask) for ask in self.asked]
        return {"measures": self.measures, "asked": asked, "answers": dict(self.answers)}

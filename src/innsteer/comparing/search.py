"""What every contender gets alike, and the search for its strength within a budget."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

from innsteer.activations import Read
from innsteer.calibration import BUDGET, following, power
from innsteer.comparing.standings import Half
from innsteer.errors import InputError
from innsteer.models import LanguageModel
from innsteer.site import Span

MOST = 64.0
"""No larger strength is tried."""
TINY = 1e-6
"""Nats below which a cost is rounding."""
TOO_DEAR = 1e6
"""Nats that stand for a cost that is no number, as where a map breaks the model; less as many for
what it says."""
ALIKE = 0.03
"""Control that differs by no more is alike: about a standard error of 48 items."""
NEARLY = 1.5
"""Times the budget within which a layer shows what it is worth: a guess that lands just above it
says as much as one that lands below."""


@dataclass(frozen=True)
class Protocol:
    """What every contender gets, alike.

    Attributes:
        layers: whose outputs are candidates; default: a third, a half, two thirds, five sixths up.
        budget: nats per token. evaluations: of control and cost on validation, per cell: layers by
            successive halving, then strength. items: of validation per evaluation.
        search_tokens: response tokens of neutral prompts per evaluation; the last check and the
            test take all neutral prompts of their part.
        answers: sampled per cell and budget, for what is said.
        read, span: which tokens become recorded rows, as of ``fit``; default: that of the data.
    """

    layers: tuple[int, ...]
    budget: float = BUDGET
    evaluations: int = 24
    items: int = 48
    search_tokens: int = 300
    answers: int = 60
    read: Read | None = None
    span: Span = (0, None)

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers {self.layers}", expected="at least one, all distinct")
        if self.evaluations < needed(len(self.layers)):
            raise InputError(
                f"{self.evaluations} evaluations for {len(self.layers)} layers",
                expected=f"at least {needed(len(self.layers))}: one per layer and round",
            )
        if not 0 < self.budget < math.inf:
            raise InputError(f"budget {self.budget}", expected="nats per token, above 0")

    @classmethod
    def of(cls, model: LanguageModel, **how: Any) -> "Protocol":
        """The default for a model."""
        depth = len(model.layout.blocks)
        usual = {max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)}
        return cls(**{"layers": tuple(sorted(usual)), **how})


def needed(places: int) -> int:
    """Evaluations that successive halving of so many places takes: one per place and round."""
    return places * (max(places - 1, 0).bit_length() + 1)


class Evaluation(NamedTuple):
    """Control and both halves of the cost of one map at one strength, on validation.

    ``said`` is the mean probability of the answer steered for, whose share of both ``control`` is;
    for open tasks the mean change in log-odds, nats, which ``control`` squashes. A LoRA has no
    layer. ``chosen`` has the values of the method's choices.
    """

    layer: int | None
    strength: float
    control: float
    neutral: float
    in_format: float
    said: float = 0.0
    chosen: Mapping[str, Any] = MappingProxyType({})

    def cost(self, half: Half) -> float:
        """What the budget binds, nats."""
        return self.neutral if half == "neutral" else max(self.neutral, self.in_format)


class Search:
    """The strengths of one fitted map, evaluation by evaluation.

    First the largest strength within the budget, by a power law of the cost, within a bracket;
    then below it, because more strength is not always more control.

    Args:
        whole: spend the budget as far as it goes. So open tasks are dosed: the preference between
            two texts is near 1 long before answers of the model's own are moved.
    """

    def __init__(
        self, evaluate: Callable[[float], Evaluation], budget: float, *, whole: bool = False
    ) -> None:
        self.tried: dict[float, Evaluation] = {}
        self._evaluate, self._budget, self._whole = evaluate, budget, whole

    def step(self, half: Half) -> None:
        """One evaluation, where it tells most about this half's budget."""
        strength = self.next(half)
        self.tried[strength] = self._evaluate(strength)

    def next(self, half: Half) -> float:
        """The strength to evaluate next."""
        if not self.tried:
            return 1.0
        costs = {strength: found.cost(half) for strength, found in self.tried.items()}
        inside = [strength for strength, cost in costs.items() if cost <= self._budget]
        high = min((s for s, cost in costs.items() if cost > self._budget), default=math.inf)
        low = max((s for s in inside if s < high), default=0.0)
        enough, aim, gap = (0.97, 0.985, 1.01) if self._whole else (0.9, 0.97, 1.05)
        spent = costs[low] >= enough * self._budget if low else False
        if spent or low >= MOST or high < gap * low:
            return self._below(low)
        near = low or high
        guess = min(following(costs, near, aim * self._budget), MOST)
        if low < guess < high:
            return guess
        return (low + high) / 2 if low else high / 4

    def done(self, half: Half) -> bool:
        """Whether more evaluations would change nothing: what shall be spent of the budget is."""
        costs = [(s, found.cost(half)) for s, found in self.tried.items()]
        inside = [(s, cost) for s, cost in costs if cost <= self._budget]
        strength, cost = max(inside, default=(0.0, 0.0))
        return self._whole and (cost >= 0.97 * self._budget or strength >= MOST)

    def worth(self, half: Half) -> float:
        """What a layer is kept for: its most control near the budget or below; where all costs
        more, the nearer the better.

        Of open tasks the log-odds moved, carried from the cost nearest to the budget to all of it:
        the shift grows with strength, and the cost with a power of it.
        """
        if not self._whole:
            tried = [(found.cost(half), found.control) for found in self.tried.values()]
            kept = [control for cost, control in tried if cost <= NEARLY * self._budget]
            return max(kept) if kept else -min(cost for cost, _ in tried) / self._budget
        costs = {s: found.cost(half) for s, found in self.tried.items()}
        near = min(costs, key=lambda s: abs(math.log(max(costs[s], TINY) / self._budget)))
        grows = max(power(costs, near) or 2, 1)
        carried = math.pow(self._budget / max(costs[near], TINY), 1 / grows)
        return self.tried[near].said * min(carried, MOST / near)

    def _below(self, limit: float) -> float:
        """The middle of the widest gap that is left under the limit, by ratio.

        Down to half of what was fitted, or an eighth of the limit: where no cost binds, a fit that
        was trained at 1 is right near 1.
        """
        floor = min(0.5, limit / 8)
        marks = sorted({floor, limit, *(s for s in self.tried if floor < s < limit)})
        before, after = max(pairwise(marks), key=lambda gap: gap[1] / gap[0])
        return math.sqrt(before * after)

    def best(self, half: Half) -> Evaluation | None:
        """The most control within the budget; None where nothing was within it.

        Of strengths that are alike in it, what says most: behind a gate no cost binds, and far
        beyond the strength that aligns, a share of two answers stays where neither is ever said.
        """
        inside = [e for e in self.tried.values() if e.cost(half) <= self._budget]
        if self._whole:
            told = [e for e in inside if e.said > -TOO_DEAR]
            return max(told, key=lambda e: e.strength, default=None)
        most = max((e.control for e in inside), default=0.0)
        alike = [e for e in inside if e.control >= most - ALIKE]
        return max(alike, key=lambda e: (e.said, -e.strength), default=None)

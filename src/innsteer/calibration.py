"""Calibration: the measured dose-response curve of one behaviour, and strengths in its units."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from innsteer.errors import BudgetError, InputError

BUDGET = 0.0953
"""Default cost budget in nats per token: +10 % expected perplexity of unsteered text."""
POWERS = (0.5, 4.0)
"""By which cost may grow with strength: 2 for a small edit, about 1 for feedback."""
APART = 0.1
"""By how much strengths differ, in log, whose costs tell the power."""
FLAT = 0.6
"""Where cost hardly falls with strength, as behind a gate that a few prompts open: the share of a
strength that is tried next, at most; so too where half of a check's tries did not do."""


@dataclass(frozen=True)
class Dose:
    """What one strength does, measured on validation prompts.

    Attributes:
        strength: 0 = unsteered, 1 = the fitted map; unitless.
        nats: neutral cost, mean KL(base || steered) per token; low, high: its 90 % interval.
        control: preference or alignment (0.5 = no effect) with its 95 % interval; None where it
            was not measured.
        displacement: mean |h' - h| / |h| over steered tokens.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    strength: float
    nats: float
    low: float
    high: float
    displacement: float
    control: float | None = None
    control_low: float | None = None
    control_high: float | None = None


@dataclass(frozen=True)
class Calibration:
    """A behaviour's dose-response curve and the strength that is kept within the budget.

    Attributes:
        doses: in the order of strength; negative strengths steer the other way.
        budget: nats per token. strength: the one with the most effect within the budget, the
            smallest of those that have it.
        tokens: response tokens behind the doses and the strength: those of the last check.
            preview: True when the check was left out, so that both rest on the search's tokens.

    >>> curve = Calibration((Dose(0, 0, 0, 0, 0), Dose(2, 0.1, 0.09, 0.11, 0.2)), 0.1, 2.0, 300)
    >>> curve.resolve("budget"), curve.resolve("0.025nat"), curve.resolve(0.5)
    (2.0, 1.0, 0.5)
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    doses: tuple[Dose, ...]
    budget: float
    strength: float
    tokens: int
    preview: bool = False

    @property
    def at_budget(self) -> Dose:
        """The measured dose at the budget's strength, or the nearest to it."""
        return min(self.doses, key=lambda dose: abs(dose.strength - self.strength))

    def resolve(self, strength: float | str) -> float:
        """A number from a number, "budget", or a cost like "0.05nat" ("-0.05nat": the other way).

        Between measured strengths the root of the cost is interpolated, as for small edits the cost
        grows with the square of the strength; below the least it grows by the power that it and
        the next show. The budget in nats is "budget" itself, the strength that is sure to stay
        within it and whose own mean cost lies somewhat lower; not where that was chosen far below
        the budget.

        Raises:
            InputError: not one of these. BudgetError: a cost beyond the measured curve, or in a
                direction that was not measured.
        """
        if not isinstance(strength, str):
            return parse_number(str(strength))
        if strength == "budget":
            return self.strength
        match = re.fullmatch(r"([+-]?)(\d*\.?\d+(?:e-?\d+)?)\s*nats?", strength.strip())
        if match is None:
            return parse_number(strength)
        sign = -1.0 if match[1] == "-" else 1.0
        wanted = float(match[2])
        if not wanted:
            return 0.0
        spends = self.at_budget.nats >= self.budget / 2
        if spends and sign * self.strength > 0 and math.isclose(wanted, self.budget):
            return self.strength
        side = sorted(
            (abs(d.strength), d.nats)
            for d in self.doses
            if d.strength * sign > 0 or d.strength == 0
        )
        strengths = np.array([0.0, *(s for s, _ in side if s > 0)])
        # A cost never falls with strength but for noise; interpolation needs it monotone.
        nats = np.maximum.accumulate(np.array([0.0, *(n for s, n in side if s > 0)]))
        if len(strengths) < 2:
            raise BudgetError(
                f"strength {strength!r}: this curve was measured in one direction",
                expected="a cost in the other",
                remedy="tune with both_ways=True (command line: --both-ways)",
            )
        if wanted > nats[-1]:
            raise BudgetError(
                f"strength {strength!r} is beyond the measured dose-response curve",
                expected=f"at most {nats[-1]:.4g} nats in this direction",
                remedy="tune with a larger budget; where no strength costs as much, give a number",
            )
        if wanted < nats[1]:
            least = dict(zip(strengths[1:3].tolist(), nats[1:3].tolist(), strict=True))
            lowest = min(least)
            grows = power(least, lowest) or 2
            return float(sign * lowest * math.pow(wanted / least[lowest], 1 / grows))
        return float(sign * np.interp(np.sqrt(wanted), np.sqrt(nats), strengths))

    def to_json(self) -> dict[str, Any]:
        """Plain data for steering.json."""
        return asdict(self) | {"doses": [asdict(dose) for dose in self.doses]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Calibration":
        """The inverse of ``to_json``.

        Raises:
            ValidationError: a field is missing, unknown or of another kind.
        """
        return TypeAdapter(cls).validate_python(data)


LARGEST = 1e5
"""The largest strength that can be asked for: more is a slip, and the answers would be noise."""


def parse_number(text: str) -> float:
    """A strength given as text.

    >>> parse_number("-1.5")
    -1.5
    """
    try:
        value = float(text)
    except ValueError:
        raise InputError(
            f"strength {text!r}", expected='a number, "budget", or a cost like "0.05nat"'
        ) from None
    if not abs(value) <= LARGEST:  # also refuses nan
        raise InputError(
            f"strength {text!r}",
            expected=f"a finite number from -{LARGEST:g} to {LARGEST:g}; 1 is the fitted map",
            remedy="innsteer tune finds the strength that the cost budget allows",
        )
    return value


def power(costs: Mapping[float, float], near: float) -> float | None:
    """By which cost grows with strength around one that was tried; None where it hardly does.

    Of one strength that costs something the square, by which the cost of a small edit grows.

    >>> power({1.0: 0.2}, 1.0), round(power({1.0: 0.2, 0.5: 0.1}, 1.0) or 0, 6)
    (2.0, 1.0)
    """
    known = {s: cost for s, cost in costs.items() if 0 < cost < math.inf}
    # Of strengths that are nearly alike noise would tell the power.
    others = [s for s in known if abs(math.log(s / near)) >= APART]
    if not others or near not in known:
        return 2.0
    other = min(others, key=lambda s: abs(math.log(s / near)))
    found = math.log(costs[other] / costs[near]) / math.log(other / near)
    least, most = POWERS
    return min(found, most) if found >= least else None


def following(costs: Mapping[float, float], near: float, aim: float) -> float:
    """The strength that should cost so much, by the law around one that was tried.

    At most ten times as much or as little.

    >>> following({1.0: 0.4}, 1.0, 0.1), round(following({1.0: 0.2, 0.5: 0.1}, 0.5, 0.05), 6)
    (0.5, 0.25)
    """
    if costs[near] <= 0:
        return near * 10
    grows, ratio = power(costs, near), aim / costs[near]
    share = min(max(math.pow(ratio, 1 / (grows or 2)), 0.1), 10)
    return near * (min(share, FLAT) if grows is None and ratio < 1 else share)

"""Metric: a number with its interval from completions; and the bootstrap behind every interval.

A metric sees completions, never steerings. Each completion gives a value, a weight and a stratum;
the figure is the mean over strata of their weighted means, so that, for instance, Yes-keyed and
No-keyed items count alike however many there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from innsteer.backends.base import Completion, Kind

RESAMPLES = 2000


class Measured(NamedTuple):
    """One completion's share in a metric."""

    value: float
    weight: float = 1.0
    stratum: str = ""


class Score(NamedTuple):
    """A figure with its interval: no number without one.

    ``low`` and ``high`` bound ``level`` of the bootstrap distribution over ``n`` items.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95


class Metric(ABC):
    """A measure of completions of one kind.

    Class variables: ``kind`` of completions it reads, ``unit``, ``better`` (``higher``, ``lower``
    or ``neither``), ``family`` for scorers that only some behaviours concern ("" = every one), and
    ``takes`` for what may stand after a colon behind the name ("" = nothing).
    """

    kind: ClassVar[Kind]
    unit: ClassVar[str]
    better: ClassVar[str]
    family: ClassVar[str] = ""
    takes: ClassVar[str] = ""

    def __init__(self, argument: str = "") -> None:
        self.argument = argument

    @property
    def name(self) -> str:
        """The name of the metric's file, with what stands behind it."""
        own = type(self).__module__.rpartition(".")[2]
        return f"{own}:{self.argument}" if self.argument else own

    @abstractmethod
    def measure(self, completion: Completion) -> Measured | None:
        """One completion's value, or None where it has nothing to say."""

    def finish(self, means: np.ndarray) -> np.ndarray:
        """Figures from weighted means, one per resample; the means themselves by default."""
        return means

    def parts(self, completion: Completion) -> list[Measured]:
        """All that a completion gives: one value, unless a metric pools finer parts."""
        measured = self.measure(completion)
        return [] if measured is None else [measured]

    def items(self, completions: Sequence[Completion]) -> dict[str, list[Measured]]:
        """Item -> what its completions (one per seed) measure; its seeds share its weight."""
        found: dict[str, list[list[Measured]]] = {}
        for completion in completions:
            if completion.kind == self.kind and (parts := self.parts(completion)):
                found.setdefault(completion.item, []).append(parts)
        return {
            # Sorted, so that no sum depends on the order in which completions came.
            item: [m._replace(weight=m.weight / len(seeds)) for part in sorted(seeds) for m in part]
            for item, seeds in found.items()
        }

    def score(
        self, completions: Sequence[Completion], *, level: float = 0.95, seed: int = 0
    ) -> Score | None:
        """The figure with a bootstrap interval over items (all of an item's seeds together)."""
        found = self.items(completions)
        if not found:
            return None
        return self._bootstrap([found], level, seed)

    def difference(
        self,
        ours: Sequence[Completion],
        theirs: Sequence[Completion],
        *,
        level: float = 0.95,
        seed: int = 0,
    ) -> Score | None:
        """This figure of one arm less that of another, paired by item."""
        first, second = self.items(ours), self.items(theirs)
        shared = sorted(first.keys() & second.keys())
        if not shared:
            return None
        pair = [{item: part[item] for item in shared} for part in (first, second)]
        return self._bootstrap(pair, level, seed)

    def _bootstrap(self, arms: list[dict[str, list[Measured]]], level: float, seed: int) -> Score:
        """Figure (or difference of two) and its percentile interval, resampling items."""
        names = sorted(arms[0])
        count = len(names)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
        # The first row is the sample itself, each item once.
        times = np.concatenate([np.ones((1, count), dtype=drawn.dtype), drawn])
        figures = [self.figures([arm[name] for name in names], times) for arm in arms]
        value, *draws = figures[0] - figures[1] if len(figures) == 2 else figures[0]
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
        # Equal values, summed in another order, may leave the figure a rounding outside.
        bounds = min(float(low), float(value)), max(float(high), float(value))
        return Score(float(value), *bounds, count, level)

    def figures(self, items: Sequence[Sequence[Measured]], times: np.ndarray) -> np.ndarray:
        """The figure of every resample: mean over strata of the weighted means.

        Args:
            items: what each of n items measures.
            times: ``[resamples, n]``, how often each item is drawn.
        """
        strata = sorted({m.stratum for item in items for m in item})
        total = np.zeros((len(items), len(strata)))
        weight = np.zeros_like(total)
        for row, item in enumerate(items):
            for m in item:
                column = strata.index(m.stratum)
                total[row, column] += m.value * m.weight
                weight[row, column] += m.weight
        weights = times @ weight
        # A stratum that a resample misses has no mean; the others stand for it.
        means = np.divide(
            times @ total, weights, out=np.full(weights.shape, np.nan), where=weights > 0
        )
        return self.finish(np.nanmean(means, axis=1))

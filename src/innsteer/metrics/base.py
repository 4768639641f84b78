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
    or ``neither``), and ``family`` for scorers that only some behaviours concern ("" = every one).
    """

    kind: ClassVar[Kind]
    unit: ClassVar[str]
    better: ClassVar[str]
    family: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The name of the metric's file."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def measure(self, completion: Completion) -> Measured | None:
        """One completion's value, or None where it has nothing to say."""

    def combine(self, values: np.ndarray, weights: np.ndarray, strata: np.ndarray) -> float:
        """The figure of a sample: mean over strata of the weighted means."""
        means = [
            np.average(values[strata == stratum], weights=weights[strata == stratum])
            for stratum in np.unique(strata)
            if weights[strata == stratum].sum() > 0
        ]
        return float(np.mean(means)) if means else float("nan")

    def items(self, completions: Sequence[Completion]) -> dict[str, list[Measured]]:
        """Item -> what its completions (one per seed) measure."""
        found: dict[str, list[Measured]] = {}
        for completion in completions:
            if completion.kind == self.kind:
                measured = self.measure(completion)
                if measured is not None:
                    found.setdefault(completion.item, []).append(measured)
        return found

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
        tables = [_table(arm, names) for arm in arms]

        def figure(index: np.ndarray) -> float:
            parts = [self._figure(table, index) for table in tables]
            return parts[0] - parts[1] if len(parts) == 2 else parts[0]

        rng = np.random.default_rng(seed)
        count = len(names)
        draws = [figure(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return Score(figure(np.arange(count)), float(low), float(high), count, level)

    def _figure(self, table: "list[np.ndarray]", index: np.ndarray) -> float:
        """The figure of the items ``index``; each item's rows are one block."""
        values, weights, strata, starts, counts = table
        rows = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in index])
        return self.combine(values[rows], weights[rows], strata[rows])


def _table(arm: dict[str, list[Measured]], names: list[str]) -> list[np.ndarray]:
    """Columns of an arm's measurements, item after item, with each item's start and length."""
    flat = [measured for name in names for measured in arm[name]]
    counts = np.array([len(arm[name]) for name in names])
    return [
        np.array([m.value for m in flat]),
        np.array([m.weight for m in flat]),
        np.array([m.stratum for m in flat]),
        np.concatenate([[0], np.cumsum(counts)[:-1]]),
        counts,
    ]

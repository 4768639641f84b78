"""Statistics over several tasks: a bootstrap of tasks and items, ranks, effect sizes and Holm.

Knows figures and metrics, neither models nor methods.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from innsteer.errors import InputError
from innsteer.metrics.base import Measured, Metric, Score

RESAMPLES = 2000
Items = Mapping[str, Sequence[Measured]]
"""What each item of a task measures, all seeds of it together."""


class Draws(NamedTuple):
    """Figures of several arms on the same tasks, and what resampling makes of them.

    Attributes:
        arms: their names. tasks: ``[arms, tasks]``, the figure of each task.
        means: ``[arms, 1 + resamples]``: the mean over tasks, then its bootstrap draws. A draw
            takes the same tasks and items for all arms, so that differences of rows are paired.
        items: how many, over all tasks.
    """

    arms: tuple[str, ...]
    tasks: np.ndarray
    means: np.ndarray
    items: int

    def score(self, arm: str, *, level: float = 0.95) -> Score:
        """An arm's mean over tasks with its interval."""
        return self._score(self.means[self.arms.index(arm)], level)

    def difference(self, ours: str, theirs: str, *, level: float = 0.95) -> Score:
        """One arm less another, paired by task and item."""
        first, second = (self.means[self.arms.index(arm)] for arm in (ours, theirs))
        return self._score(first - second, level)

    def _score(self, means: np.ndarray, level: float) -> Score:
        value, *draws = means
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        bounds = min(float(low), float(value)), max(float(high), float(value))
        return Score(float(value), *bounds, self.items, level)

    def p_value(self, ours: str, theirs: str) -> float:
        """Two-sided: how often the paired difference falls on either side of 0, twice the less.

        Never below 1 / resamples: so few draws know no more.
        """
        first, second = (self.means[self.arms.index(arm)] for arm in (ours, theirs))
        gaps = (first - second)[1:]
        least = min((gaps <= 0).mean(), (gaps >= 0).mean())
        return float(np.clip(2 * least, 1 / len(gaps), 1.0))

    def effect(self, ours: str, theirs: str) -> float:
        """Mean over standard deviation of the tasks' differences; NaN for one task.

        Differences that are all one, but for rounding, have an infinite effect.
        """
        first, second = (self.tasks[self.arms.index(arm)] for arm in (ours, theirs))
        gaps = first - second
        if len(gaps) < 2:
            return float("nan")
        spread, mean = float(gaps.std(ddof=1)), float(gaps.mean())
        if spread > 1e-9 * abs(mean):
            return mean / spread
        return float(np.copysign(np.inf, mean)) if mean else 0.0

    def ranks(self, better: str = "higher", *, level: float = 0.95) -> dict[str, Score]:
        """Arm -> its place among all (1 = best, ties share their mean) with its interval.

        More is better, unless the metric says ``lower``: of what is neither, more is what a
        steering towards it wants.
        """
        signed = self.means if better == "lower" else -self.means
        places = stats.rankdata(signed, axis=0)
        return {arm: self._score(row, level) for arm, row in zip(self.arms, places, strict=True)}


def resample(
    metric: Metric,
    arms: Mapping[str, Mapping[str, Items]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Draws:
    """A hierarchical bootstrap: tasks first, then items within each, paired across arms.

    Args:
        arms: arm -> task -> items. All arms have the same tasks; of a task, the items that all
            arms have are compared.

    Raises:
        InputError: no arm, no task, arms with different tasks, or a task without a common item.

    >>> one = {"a": [Measured(1.0)], "b": [Measured(0.0)]}
    >>> from innsteer import metrics
    >>> draws = resample(metrics.get("alignment"), {"x": {"t": one}, "y": {"t": one}})
    >>> draws.difference("x", "y").high
    0.0
    """
    tasks = sorted(next(iter(arms.values()), {}))
    for arm, found in arms.items():
        if sorted(found) != tasks:
            raise InputError(
                f"arm {arm!r} with the tasks {sorted(found)}", expected=f"those of all: {tasks}"
            )
    if not tasks:
        raise InputError("a comparison without arms or tasks", expected="one of each at least")
    rng = np.random.default_rng(seed)
    figures = np.empty((len(arms), len(tasks), resamples + 1))
    counted = 0
    for column, task in enumerate(tasks):
        shared = sorted(set.intersection(*(set(found[task]) for found in arms.values())))
        if not shared:
            raise InputError(f"task {task!r} without an item that every arm has")
        count = len(shared)
        counted += count
        drawn = rng.multinomial(count, np.full(count, 1 / count), resamples)
        times = np.concatenate([np.ones((1, count), dtype=drawn.dtype), drawn])
        for row, found in enumerate(arms.values()):
            figures[row, column] = metric.figures([found[task][item] for item in shared], times)
    # Each drawn task comes with a draw of its items of its own, the same for all arms.
    chosen = rng.integers(len(tasks), size=(resamples, len(tasks)))
    inner = rng.integers(1, resamples + 1, size=(resamples, len(tasks)))
    draws = figures[:, chosen, inner].mean(-1)
    means = np.concatenate([figures[:, :, 0].mean(1, keepdims=True), draws], axis=1)
    return Draws(tuple(arms), figures[:, :, 0], means, counted)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: p-values that may be read side by side.

    Source: A Simple Sequentially Rejective Multiple Test Procedure (Holm 1979),
    https://www.jstor.org/stable/4615733

    >>> {name: round(p, 2) for name, p in holm({"a": 0.01, "b": 0.04, "c": 0.03}).items()}
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    found: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[name]))
        found[name] = least
    return {name: found[name] for name in p_values}

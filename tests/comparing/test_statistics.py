"""Statistics: intervals over tasks and items, paired differences, ranks, Holm."""

import math

import numpy as np
import pytest
from scipy import stats

from innsteer import metrics
from innsteer.comparing.statistics import holm, resample
from innsteer.errors import InputError
from innsteer.metrics.base import Measured

ALIGNMENT = metrics.get("alignment")


def arm(tasks):
    """Task -> values of its items, as items."""
    return {
        task: {f"{n:03d}": [Measured(float(value))] for n, value in enumerate(values)}
        for task, values in tasks.items()
    }


def normal(mean, spread, *, tasks=8, items=60, between=0.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = mean + between * rng.standard_normal(tasks)
    return arm({f"t{n}": c + spread * rng.standard_normal(items) for n, c in enumerate(centres)})


def test_a_mean_counts_every_task_alike_however_many_items_it_has():
    found = resample(ALIGNMENT, {"x": arm({"a": [1, 1, 1, 1], "b": [0]})})
    assert found.score("x").value == 0.5 and found.items == 5
    assert found.tasks.tolist() == [[1.0, 0.0]]


def test_an_interval_holds_what_tasks_and_items_vary():
    """The variance of a mean of T task means: (between + within / n) / T."""
    tasks, items, between, within = 40, 25, 0.3, 1.0
    found = resample(ALIGNMENT, {"x": normal(0, within, tasks=tasks, items=items, between=between)})
    expected = math.sqrt((between**2 + within**2 / items) / tasks)
    # A bootstrap also draws items anew within each task: within / n counts twice.
    wide = math.sqrt((between**2 + 2 * within**2 / items) / tasks)
    spread = float(found.means[0, 1:].std())
    assert 0.75 * expected < spread < 1.25 * wide
    score = found.score("x")
    assert score.low < score.value < score.high and score.level == 0.95
    assert score.high - score.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_differences_are_paired_by_task_and_item():
    tasks = normal(0.5, 1.0, between=1.0)
    more = {
        task: {item: [Measured(m.value + 0.1) for m in values] for item, values in items.items()}
        for task, items in tasks.items()
    }
    found = resample(ALIGNMENT, {"x": more, "y": tasks})
    gap = found.difference("x", "y")
    assert gap.value == pytest.approx(0.1) and gap.high - gap.low < 1e-9
    assert found.score("x").high - found.score("x").low > 0.5
    assert found.p_value("x", "y") == 1 / 2000 and found.p_value("x", "x") == 1.0
    assert found.difference("y", "x").value == pytest.approx(-0.1)


def test_a_p_value_is_rarely_small_where_nothing_differs():
    """Under the null hypothesis p-values spread over 0 to 1."""
    found = []
    for seed in range(120):
        one, two = (normal(0, 1, tasks=10, items=20, seed=2 * seed + n) for n in (0, 1))
        draws = resample(ALIGNMENT, {"x": one, "y": two}, resamples=300, seed=seed)
        found.append(draws.p_value("x", "y"))
    # Ten tasks only: a percentile bootstrap is a little too narrow, two levels a little too wide.
    assert 0.0 <= np.mean(np.array(found) < 0.05) < 0.12
    assert stats.kstest(found, "uniform").statistic < 0.25


def test_ranks_have_intervals_and_ties_share_their_place():
    clear = {"best": normal(2, 0.1), "worst": normal(0, 0.1, seed=1), "mid": normal(1, 0.1, seed=2)}
    found = resample(ALIGNMENT, clear).ranks()
    assert {name: one.value for name, one in found.items()} == {"best": 1, "worst": 3, "mid": 2}
    assert all(one.low == one.high == one.value for one in found.values())
    assert resample(ALIGNMENT, clear).ranks("lower")["best"].value == 3
    twins = resample(ALIGNMENT, {"x": clear["mid"], "y": clear["mid"]}).ranks()
    assert [one.value for one in twins.values()] == [1.5, 1.5]
    near = resample(ALIGNMENT, {"x": normal(0, 1), "y": normal(0, 1, seed=9)}).ranks()
    assert near["x"].low == 1 and near["x"].high == 2


def test_an_effect_is_in_standard_deviations_of_the_tasks_differences():
    x, y = arm({"a": [3.0], "b": [1.0]}), arm({"a": [1.0], "b": [0.0]})
    found = resample(ALIGNMENT, {"x": x, "y": y})
    assert found.effect("x", "y") == pytest.approx(1.5 / math.sqrt(0.5))
    assert found.effect("x", "x") == 0.0
    nearly = arm({"a": [3.1], "b": [1.1 + 1e-13]})
    assert resample(ALIGNMENT, {"x": x, "y": nearly}).effect("y", "x") == math.inf
    alike = arm({"a": [2.0], "b": [0.0]})
    assert resample(ALIGNMENT, {"x": x, "y": alike}).effect("x", "y") == math.inf
    assert math.isnan(
        resample(ALIGNMENT, {"x": arm({"a": [1]}), "y": arm({"a": [0]})}).effect("x", "y")
    )


def test_seeds_of_an_item_stay_together():
    both = {"t": {f"{n}": [Measured(0.0, 0.5), Measured(1.0, 0.5)] for n in range(30)}}
    score = resample(ALIGNMENT, {"x": both}).score("x")
    assert score.value == score.low == score.high == 0.5 and score.n == 30


def test_the_seed_decides():
    x = {"x": normal(0, 1)}
    assert np.array_equal(resample(ALIGNMENT, x).means, resample(ALIGNMENT, x).means)
    assert not np.array_equal(resample(ALIGNMENT, x).means, resample(ALIGNMENT, x, seed=1).means)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({}, "without arms or tasks"),
        ({"x": {}}, "without arms or tasks"),
        ({"x": arm({"a": [1]}), "y": arm({"b": [1]})}, r"arm 'y' with the tasks \['b'\]"),
        ({"x": {"a": {"1": []}}, "y": {"a": {"2": []}}}, "without an item that every arm has"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(arms, said):
    with pytest.raises(InputError, match=said):
        resample(ALIGNMENT, arms)


def test_holm_is_never_below_the_p_value_and_keeps_their_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        own = {f"{n}": float(p) for n, p in enumerate(rng.random(7) ** 3)}
        found = holm(own)
        assert list(found) == list(own)
        assert all(own[name] <= found[name] <= min(1.0, 7 * own[name]) for name in own)
        order = sorted(own, key=own.get)
        assert sorted(found.values()) == [found[name] for name in order]
        assert found[order[0]] == min(1.0, 7 * own[order[0]])
    assert holm({}) == {}

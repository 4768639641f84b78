"""Linear-quadratic control against closed forms, a rollout, the authors' gains and SciPy."""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from innsteer.control import (
    Weights,
    backward,
    clipped,
    error_bound,
    horizon,
    rollout,
    steady,
)
from innsteer.errors import InputError

ONES = Weights(1, 1, 1)


def chain(steps: int = 4, n: int = 8, *, seed: int = 0) -> np.ndarray:
    """Near the identity, as blocks of a residual stream are."""
    draw = np.random.default_rng(seed)
    return np.eye(n) + 0.3 * draw.standard_normal((steps, n, n))


def scalar_gains(a: float, weights: Weights, steps: int) -> list[float]:
    return [step.feedback.item() for step in horizon([[[a]]] * steps, weights)]


@pytest.mark.parametrize(
    ("a", "weights", "steps", "gains"),
    [
        (1.0, Weights(10, 10, 1), 1, [1 / 11]),
        (1.0, ONES, 3, [8 / 13, 3 / 5, 1 / 2]),
        (0.0, Weights(3, 2, 5), 4, [0.0] * 4),
    ],
)
def test_scalar_gains_are_the_closed_forms(a, weights, steps, gains):
    np.testing.assert_allclose(scalar_gains(a, weights, steps), gains, rtol=0, atol=1e-12)


def test_one_step_costs_what_is_left_of_the_error():
    (step,) = horizon([[[1.0]]], Weights(10, 10, 1))
    assert step.cost.item() == pytest.approx(10 + 10 / 11, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "gain", "cost"),
    [(1.0, (math.sqrt(5) - 1) / 2, (math.sqrt(5) + 1) / 2), (2.0, 1.6180339887, 4.2360679775)],
)
def test_a_long_horizon_ends_in_the_golden_ratio_and_in_the_steady_state(a, gain, cost):
    first = horizon([[[a]]] * 60, ONES)[0]
    always = steady([[a]], ONES)
    for step in (first, always):
        assert step.feedback.item() == pytest.approx(gain, abs=1e-9)
        assert step.cost.item() == pytest.approx(cost, abs=1e-9)


def test_a_long_horizon_of_matrices_ends_in_the_steady_state():
    a = chain(1)[0]
    first, always = horizon([a] * 200, Weights(2, 3, 1))[0], steady(a, Weights(2, 3, 1))
    np.testing.assert_allclose(first.feedback, always.feedback, rtol=0, atol=1e-9)
    np.testing.assert_allclose(first.cost, always.cost, rtol=1e-9)


def test_matrices_that_are_multiples_of_one_have_the_scalar_gains():
    steps = horizon([1.7 * np.eye(5)] * 6, Weights(0.1, 3, 0.1))
    for step, gain in zip(steps, scalar_gains(1.7, Weights(0.1, 3, 0.1), 6), strict=True):
        np.testing.assert_allclose(step.feedback, gain * np.eye(5), rtol=0, atol=1e-12)


def test_only_ratios_of_the_weights_count():
    for one, ten in zip(
        backward(chain(), Weights(0.1, 7, 0.2)), backward(chain(), Weights(1, 70, 2)), strict=True
    ):
        np.testing.assert_allclose(one.feedback, ten.feedback, rtol=0, atol=1e-12)


def test_a_rollout_costs_what_the_recursion_says_and_no_other_control_is_cheaper():
    weights, start = Weights(10, 10, 1), np.arange(8.0) - 3
    steps = horizon(chain(), weights)
    best = rollout(chain(), weights, start, steps)
    assert best.cost == pytest.approx(start @ steps[0].cost @ start, rel=0, abs=1e-6)
    draw = np.random.default_rng(1)
    for _ in range(20):
        other = best.controls + 0.01 * draw.standard_normal(best.controls.shape)
        assert rollout(chain(), weights, start, other).cost > best.cost


def test_cost_matrices_are_symmetric_and_no_less_than_q():
    for step in backward(chain(30, 12), Weights(0.1, 1, 0.1)):
        assert (step.cost == step.cost.T).all()
        assert np.linalg.eigvalsh(step.cost).min() >= 0.1 - 1e-9


def test_with_a_drift_no_other_control_is_cheaper_and_without_one_none_is_fed_forward():
    weights, start = Weights(1, 2, 3), np.linspace(-1, 1, 8)
    drift = np.random.default_rng(2).standard_normal((4, 8))
    steps = horizon(chain(), weights, drift)
    best = rollout(chain(), weights, start, steps, drift=drift)
    blind = rollout(chain(), weights, start, horizon(chain(), weights), drift=drift)
    assert best.cost < blind.cost - 0.1
    draw = np.random.default_rng(3)
    for _ in range(20):
        other = best.controls + 0.01 * draw.standard_normal(best.controls.shape)
        assert rollout(chain(), weights, start, other, drift=drift).cost > best.cost
    assert not any(step.feedforward.any() for step in horizon(chain(), weights))


def test_the_open_loop_twin_is_alike_on_its_own_chain_and_worse_on_another():
    weights, start = ONES, np.ones(8)
    steps = horizon(chain(), weights)
    closed = rollout(chain(), weights, start, steps)
    twin = rollout(chain(), weights, start, closed.controls)
    np.testing.assert_allclose(twin.errors, closed.errors, rtol=0, atol=1e-12)
    off = 1.5 * start
    assert (
        rollout(chain(), weights, off, steps).cost
        < rollout(chain(), weights, off, closed.controls).cost
    )


def test_clipped_controls_keep_their_direction_and_the_limit():
    free = rollout(chain(), ONES, np.ones(8), horizon(chain(), ONES))
    tight = rollout(chain(), ONES, np.ones(8), horizon(chain(), ONES), limit=0.5)
    lengths = np.linalg.norm(tight.controls, axis=1)
    assert (lengths <= 0.5 + 1e-12).all() and np.linalg.norm(free.controls, axis=1).max() > 0.6
    np.testing.assert_allclose(tight.controls[0], clipped(free.controls[0], 0.5), atol=1e-12)
    assert tight.cost > free.cost


def test_the_bound_holds_on_chains_that_are_bent_by_as_much_as_it_is_told():
    """True steps add lipschitz * |d| in a random direction, the worst that the bound allows."""
    matrices, gains = chain(6, 5, seed=4), 0.2 * chain(6, 5, seed=5)
    closed, rates = matrices - gains, np.full(6, 0.15)
    draw = np.random.default_rng(6)
    reads = draw.standard_normal((7, 5))
    tokens = 40
    true, model = np.zeros((tokens, 5)), np.zeros((tokens, 5))
    moves, apart, told = [], [np.zeros(tokens)], [np.zeros(tokens)]
    push = draw.standard_normal((6, tokens, 5))
    for t in range(6):
        moves.append(np.linalg.norm(model, axis=1))
        bend = draw.standard_normal((tokens, 5))
        bend *= (rates[t] * np.linalg.norm(true, axis=1) / np.linalg.norm(bend, axis=1))[:, None]
        true = true @ closed[t].T + push[t] + bend
        model = model @ closed[t].T + push[t]
        apart.append(np.linalg.norm(true - model, axis=1))
        told.append(np.abs((true - model) @ reads[t + 1]))
    bound = error_bound(closed, rates, np.stack(moves), reads)
    assert (np.stack(apart) <= bound.state + 1e-12).all()
    assert (np.stack(told) <= bound.read + 1e-12).all()
    tight = error_bound(closed, rates / 10, np.stack(moves), reads)
    assert (np.stack(apart)[1:] > tight.state[1:]).mean() > 0.5, "a bound that nothing exceeds"


def test_the_bound_of_one_number_is_its_recursion():
    bound = error_bound([[[0.5]], [[-0.4]]], [0.1, 0.3], [[1.0], [2.0]], [[1.0], [3.0], [-2.0]])
    after = 0.1 * 1
    last = 0.4 * after + 0.3 * (2 + after)
    np.testing.assert_allclose(bound.state[:, 0], [0, after, last], atol=1e-12)
    np.testing.assert_allclose(bound.read[:, 0], [0, 3 * after, 2 * last], atol=1e-12)


@pytest.mark.parametrize("case", ["chain-d8", "chain-scaled"])
def test_gains_cost_and_way_are_the_authors(shared, case):
    known = load_file(shared / "goldens" / "a-lqr" / f"case-{case}.safetensors")
    weights = Weights(10, 10, 1) if case == "chain-d8" else Weights(100, 100, 10)
    steps = horizon(known["A"], weights)
    for name in ("K", "K_inv_variant"):
        np.testing.assert_allclose(
            np.stack([step.feedback for step in steps]), known[name], rtol=0, atol=1e-9
        )
    np.testing.assert_allclose(steps[0].cost, known["S0"], rtol=0, atol=1e-9)
    went = rollout(known["A"], weights, known["e0"], steps)
    np.testing.assert_allclose(went.errors, known["traj"], rtol=0, atol=1e-9)
    assert went.cost == pytest.approx(known["cost"].item(), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Weights(q=-1), "q=-1"),
        (lambda: Weights(r=0), "r=0"),
        (lambda: Weights(q_f=math.nan), "q_f=nan"),
        (lambda: horizon([], ONES), "no steps"),
        (lambda: horizon([np.eye(2), np.eye(3)], ONES), r"\[2, 2\]"),
        (lambda: horizon([np.full((2, 2), np.nan)], ONES), "not finite"),
        (lambda: horizon([np.eye(2)] * 2, ONES, [np.zeros(2)]), "1 drifts of 2"),
        (lambda: clipped([1.0], 0), "limit=0"),
        (lambda: steady(np.ones((2, 3)), ONES), r"\[2, 3\]"),
    ],
)
def test_what_cannot_be_controlled_is_refused(call, match):
    with pytest.raises(InputError, match=match):
        call()

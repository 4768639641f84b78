"""Linear-quadratic control of a chain of maps; knows no language model, only matrices.

    e_{t+1} = A_t e_t - u_t + w_t,   t = 0 .. T-1

is the error of a tracked state: what the set-point has and the state has not. The control u is
added to the state, so it is taken off the error; w is the part of the set-point's own way that the
chain does not go by itself. Everything is computed in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve, solve_discrete_are

from innsteer.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """What a quadratic cost counts: sum_t (q |e_t|^2 + r |u_t|^2) + q_f |e_T|^2.

    Attributes:
        q: of the error at every step, >= 0. r: of the control, > 0: without a price any control
            would do. q_f: of the last error, >= 0. Only their ratios decide what is done.

    Raises:
        InputError: one is out of range.
    """

    q: float = 10.0
    r: float = 10.0
    q_f: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("q", self.q), ("r", self.r), ("q_f", self.q_f)):
            if not (0 <= value < math.inf) or (name == "r" and not value):
                raise InputError(
                    f"{name}={value}", expected="a number above 0" if name == "r" else ">= 0"
                )


class Step(NamedTuple):
    """The optimal control of one step: u_t = feedback @ e_t + feedforward.

    Attributes:
        t: the step. feedback: K_t ``[n, n]``. feedforward: k_t ``[n]``, 0 without a drift.
        cost: S_t ``[n, n]``; without a drift e_t' S_t e_t is all that is paid from t on.
    """

    t: int
    feedback: Array
    feedforward: Array
    cost: Array


def backward(
    dynamics: Sequence[ArrayLike | Callable[[], ArrayLike]],
    weights: Weights,
    drift: Sequence[ArrayLike] | None = None,
) -> Iterator[Step]:
    """The steps of a finite horizon from the last to the first, by the Riccati recursion.

    With S = S_{t+1}, S_T = q_f I, and s_T = 0:

        M = (S + r I)^-1 S,  K_t = M A_t,  S_t = q I + r A_t' M A_t
        k_t = (S + r I)^-1 (S w_t + s_{t+1}),  s_t = r A_t' k_t

    S_t is symmetrised at every step. One at a time, so that of many large steps a caller keeps what
    it needs. O(T n^3).

    Args:
        dynamics: A_t, square matrices of one size, or functions that give them: each is called
            once, the last first, so that one matrix is held at a time. drift: w_t ``[n]``; default:
            none.

    Raises:
        InputError: no matrix, one that is not square, not of the size of the others or not finite,
            or as many drifts as there are not matrices.

    >>> [round(step.feedback.item(), 4) for step in backward([[[1.0]]] * 3, Weights(1, 1, 1))]
    [0.5, 0.6, 0.6154]
    """
    count = len(dynamics)
    if not count:
        raise InputError("a chain of no steps", expected="at least one matrix")
    if drift is not None and len(drift) != count:
        raise InputError(f"{len(drift)} drifts of {count} steps", expected="one each")
    n, cost, pull = 0, np.empty(0), np.empty(0)
    for t in reversed(range(count)):
        given = dynamics[t]
        matrix = np.asarray(given() if callable(given) else given, np.float64)
        if not n:
            n = len(matrix)
            cost, pull = weights.q_f * np.eye(n), np.zeros(n)
        a = _square(matrix, n, t)
        factor = cho_factor(cost + weights.r * np.eye(n))
        feedback = cho_solve(factor, cost @ a)
        w = np.zeros(n) if drift is None else np.asarray(drift[t], np.float64)
        feedforward = cho_solve(factor, cost @ w + pull)
        pull = weights.r * a.T @ feedforward
        cost = weights.q * np.eye(n) + weights.r * a.T @ feedback
        cost = (cost + cost.T) / 2
        yield Step(t, feedback, feedforward, cost)


def horizon(
    dynamics: Sequence[ArrayLike], weights: Weights, drift: Sequence[ArrayLike] | None = None
) -> list[Step]:
    """All steps of ``backward``, in the order of time."""
    return list(backward(dynamics, weights, drift))[::-1]


def steady(a: ArrayLike, weights: Weights) -> Step:
    """The step of an infinite horizon, which is the same at every t; q > 0, q_f does not count.

    Raises:
        InputError: a matrix that is not square, or one whose control has no steady state.

    >>> step = steady([[1.0]], Weights(1, 1, 1))
    >>> round(step.feedback.item(), 4), round(step.cost.item(), 4)
    (0.618, 1.618)
    """
    matrix = _square(a, len(np.asarray(a)), 0)
    one = np.eye(len(matrix))
    try:
        found = solve_discrete_are(matrix, one, weights.q * one, weights.r * one)
    except np.linalg.LinAlgError as error:
        raise InputError(
            f"a chain without a steady control: {error}", expected="q > 0 and finite dynamics"
        ) from error
    feedback = np.linalg.solve(found + weights.r * one, found @ matrix)
    return Step(0, feedback, np.zeros(len(matrix)), (found + found.T) / 2)


class Rollout(NamedTuple):
    """A run through a chain: errors ``[T+1, n]``, controls ``[T, n]`` and what they cost."""

    errors: Array
    controls: Array
    cost: float


def rollout(
    dynamics: Sequence[ArrayLike],
    weights: Weights,
    start: ArrayLike,
    policy: Sequence[Step] | Array,
    *,
    drift: Sequence[ArrayLike] | None = None,
    limit: float = math.inf,
) -> Rollout:
    """The errors from a first one on, under feedback or under controls that were fixed before.

    A closed loop's ``controls`` are its *open-loop twin*: alike on the chain they were made on, and
    blind to whatever differs from it.

    Args:
        start: e_0 ``[n]``. policy: steps, or controls ``[T, n]``. limit: the longest control, in
            the unit of the errors; longer ones are ``clipped``.
    """
    error = np.asarray(start, np.float64)
    errors, controls, paid = [error], [], 0.0
    for t in range(len(dynamics)):
        a, step = np.asarray(dynamics[t], np.float64), policy[t]
        wanted = step.feedback @ error + step.feedforward if isinstance(step, Step) else step
        control = clipped(wanted, limit)
        paid += weights.q * float(error @ error) + weights.r * float(control @ control)
        error = a @ error - control + (0 if drift is None else np.asarray(drift[t], np.float64))
        errors.append(error)
        controls.append(control)
    paid += weights.q_f * float(error @ error)
    return Rollout(np.stack(errors), np.stack(controls), paid)


def clipped(control: ArrayLike, limit: float) -> Array:
    """The control ``[..., n]``, shortened to a length: the nearest one that is allowed.

    >>> clipped([3.0, 4.0], 2.5).tolist(), clipped([3.0, 4.0], 9).tolist()
    ([1.5, 2.0], [3.0, 4.0])
    """
    found = np.asarray(control, np.float64)
    if not limit > 0:
        raise InputError(f"limit={limit}", expected="a length above 0")
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    short: Array = found * np.minimum(1.0, limit / np.maximum(length, 1e-300))
    return short


class Bound(NamedTuple):
    """Upper bounds ``[T+1, tokens]``: of the state's distance from its linear prediction, and of
    what that makes of the coordinate that is read."""

    state: Array
    read: Array


def error_bound(
    closed: Sequence[ArrayLike], lipschitz: ArrayLike, moves: ArrayLike, reads: ArrayLike
) -> Bound:
    """How far a closed loop can be from what its linear model says.

    The true chain moves a deviation d from where it would have been by A_t d + rho_t(d), with
    |rho_t(d)| <= L_t |d|; the model leaves rho out. Both are under one feedback law, so what they
    differ by obeys D_{t+1} = C_t D_t + rho_t, C_t = A_t less the gain, and

        |D_t| <= sum_{s<t} |C_{t-1} ... C_{s+1}| L_s (|p_s| + |D_s|),   D_0 = 0

    with p the model's own deviation, and |v_t' C_{t-1} ... C_{s+1}| in place of the norm for the
    coordinate v_t. A tracking error is then at most the model's plus the latter: the bound of
    Theorem 4.2 of A-LQR with the products written out, which are smaller than products of norms.

    Args:
        closed: C_t ``[n, n]``, T of them. lipschitz: L_t ``[T]``. moves: |p_t| ``[T, tokens]``.
        reads: v_t ``[T+1, n]``. It is a bound as far as L is one: where L is estimated from
        samples, what is returned is an estimate.

    >>> bound = error_bound([[[0.5]]] * 2, [0.1, 0.1], [[1.0], [1.0]], [[1.0]] * 3)
    >>> bound.state.ravel().round(3).tolist()
    [0.0, 0.1, 0.16]
    """
    rates, sizes = np.asarray(lipschitz, np.float64), np.asarray(moves, np.float64)
    rows = np.asarray(reads, np.float64)
    count, n = len(closed), rows.shape[1]
    state, read = (np.zeros((count + 1, sizes.shape[1])) for _ in range(2))
    products: list[Array] = []
    for t in range(count):
        step = _square(closed[t], n, t)
        products = [step @ product for product in products] + [np.eye(n)]
        for s, product in enumerate(products):
            inflow = rates[s] * (sizes[s] + state[s])
            state[t + 1] += np.linalg.norm(product, 2) * inflow
            read[t + 1] += np.linalg.norm(rows[t + 1] @ product) * inflow
    return Bound(state, read)


def _square(matrix: ArrayLike, n: int, t: int) -> Array:
    """A matrix of a chain in float64, checked."""
    found = np.asarray(matrix, np.float64)
    if found.shape != (n, n):
        raise InputError(
            f"dynamics of shape {list(found.shape)} at step {t}", expected=f"[{n}, {n}]"
        )
    if not np.isfinite(found).all():
        raise InputError(f"dynamics at step {t} that are not finite", expected="finite numbers")
    return found

"""Readouts: linear functions of rows that tell which answer matches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.site import Site

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""Inverse L2 penalties that a probe chooses among."""


class Aims(NamedTuple):
    """Target-seeking pairs of one behaviour, taken apart.

    Attributes:
        rows: where the model is, the middle of each pair, ``[n, d]``.
        lifts: from source to target, ``[n, d]``.
        keys: +1 or -1, by which of two answers matches, ``[n]``; all +1 for open items.
        weight: of each pair, ``[n]``.
        choice: whether items have keys.
    """

    rows: Tensor
    lifts: Tensor
    keys: Tensor
    weight: Tensor
    choice: bool


def aims(acts: Activations, site: Site, behaviour: str, split: str = "train") -> Aims:
    """The pairs of a behaviour at a site, in float64.

    Raises:
        InputError: no pairs, or keys of more than two kinds.
    """
    table = acts.rows
    mine = (table.behaviour == behaviour) & (table.split == split) & (table.pair != "")
    source = {pair: n for n, pair in _first(table.pair, mine & (table.side == "source"))}
    target = {pair: n for n, pair in _first(table.pair, mine & (table.side == "target"))}
    order = sorted(source.keys() & target.keys())
    if not order and split == "train":
        raise InputError(
            f"behaviour {behaviour!r} has no pairs to fit",
            expected="source and target rows joined by pair",
            remedy="fit through the model: innsteer.fit records target-seeking rows",
        )
    index = [[side[pair] for pair in order] for side in (source, target)]
    low, high = (acts.values[site][part].double() for part in index)
    names = table.key[index[0]] if order else np.empty(0, dtype=np.str_)
    # Of all parts: a part with one kind of answer must not call it the other one's sign.
    kinds = sorted(set(table.key[table.behaviour == behaviour].tolist()) - {""})
    if len(kinds) > 2:
        raise InputError(
            f"behaviour {behaviour!r} has answers of {len(kinds)} kinds: {', '.join(kinds)}",
            expected="two, such as Yes and No",
        )
    keys = torch.tensor([1.0 if not kinds or name == kinds[-1] else -1.0 for name in names])
    weight = torch.from_numpy(table.weight[index[0]])
    return Aims((low + high) / 2, high - low, keys.double(), weight, bool(kinds))


def _first(names: np.ndarray, mask: np.ndarray) -> list[tuple[int, str]]:
    """Row number and name where the mask holds."""
    return [(int(n), str(names[n])) for n in np.flatnonzero(mask)]


def mean_lift(part: Aims) -> Tensor:
    """g ``[d]``: the weighted mean of unit lifts towards the first answer, as long as a lift.

    The unit gradients of log P(Yes) - log P(No) nearly all point one way. Times the key they would
    cancel.
    """
    unit = part.lifts / part.lifts.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    share = part.weight / part.weight.sum()
    mean = (share * part.keys) @ unit
    mean = mean / mean.norm().clamp_min(1e-30)
    along = share @ (part.keys * (part.lifts @ mean))
    found: Tensor = mean * along
    return found


def probe(
    part: Aims,
    held: Aims | None = None,
    *,
    grid: Sequence[float] = GRID,
    blind: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Weight ``[d]`` and bias of an L2 logistic regression of the key, in units of the rows.

    Rows are standardised per dimension; the penalty is chosen by the held-out log-loss (five folds
    of the training rows where nothing is held out).

    Args:
        blind: directions ``[m, d]`` that the probe must not see: its weight is orthogonal to them.

    Raises:
        InputError: rows of one key only.
    """
    if len(set(part.keys.tolist())) < 2:
        raise InputError(
            "a probe of rows with one key only",
            expected="items of both answers",
            remedy="give items of either answer, half of each",
        )
    rows, share = part.rows, part.weight / part.weight.sum()
    mean = share @ rows
    spread = (share @ (rows - mean).square()).sqrt().clamp_min(1e-6)
    basis = rows.new_zeros(len(mean), 0)
    if blind is not None and len(blind):
        basis = torch.linalg.qr((blind.double() / spread).mT).Q

    def seen(rows: Tensor) -> np.ndarray:
        z = (rows - mean) / spread
        found: np.ndarray = (z - z @ basis @ basis.mT).numpy()
        return found

    x, y, weight = seen(rows), part.keys.numpy(), part.weight.numpy()
    kept = None
    if held is not None and len(held.rows):
        kept = seen(held.rows), held.keys.numpy()
    best, loss = grid[0], np.inf
    for penalty in grid if len(grid) > 1 else ():
        found = _held_loss(x, y, weight, penalty, kept, seed)
        if found < loss:
            best, loss = penalty, found
    model = _fit(x, y, weight, best)
    inner = torch.from_numpy(model.coef_[0].copy())
    outer = inner / spread
    return outer, float(model.intercept_[0]) - float(outer @ mean)


def decision(
    part: Aims,
    held: Aims | None = None,
    *,
    kappa: float,
    grid: Sequence[float] = GRID,
    blind: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The probe's weight ``[d]`` and bias, scaled to a spread of kappa over the training rows."""
    weight, bias = probe(part, held, grid=grid, blind=blind, seed=seed)
    share = part.weight / part.weight.sum()
    reads = part.rows @ weight + bias
    sigma = (share @ (reads - share @ reads).square()).sqrt().clamp_min(1e-30)
    return kappa * weight / sigma, kappa * bias / sigma


def nuisances(moves: Tensor, rows: Tensor, count: int) -> Tensor:
    """The main directions ``[count, d]`` of what other words change, in units of the rows.

    Args:
        moves: differences ``[m, d]`` of rows that say the same. They are taken per standard
            deviation of ``rows`` ``[n, d]``, and about 0: what all share is the first to count.

    Raises:
        InputError: directions are asked for, and there are no differences.

    Reference:
        Nuisance attribute projection: Solomonoff, Campbell and Boardman, Advances in channel
        compensation for SVM speaker recognition (2005),
        https://doi.org/10.1109/ICASSP.2005.1415189
    """
    if not count:
        return rows.new_zeros(0, rows.shape[1])
    if not len(moves):
        raise InputError(
            f"nuisances={count} without prompts in other words",
            expected="Yes/No questions, whose unmoved statements can be asked otherwise",
            remedy="nuisances=0",
        )
    spread = rows.std(0).clamp_min(1e-6)
    found: Tensor = torch.linalg.svd(moves.double() / spread, full_matrices=False).Vh[:count]
    return found * spread


def _held_loss(
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    penalty: float,
    held: tuple[np.ndarray, np.ndarray] | None,
    seed: int,
) -> float:
    """Log-loss on held-out rows, or the mean of five folds."""
    if held is not None:
        margin = _fit(x, y, weight, penalty).decision_function(held[0]) * held[1]
        return float(np.logaddexp(0, -margin).mean())
    order = np.random.default_rng(seed).permutation(len(y))
    losses = []
    for fold in range(5):
        out = np.isin(np.arange(len(y)), order[fold::5])
        if len(set(y[~out])) < 2 or not out.any():
            continue
        model = _fit(x[~out], y[~out], weight[~out], penalty)
        losses.append(np.logaddexp(0, -model.decision_function(x[out]) * y[out]).mean())
    return float(np.mean(losses)) if losses else 0.0


def _fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, penalty: float) -> LogisticRegression:
    model = LogisticRegression(C=penalty, max_iter=2000, tol=1e-8)
    return model.fit(x, y, sample_weight=weight)

"""Gates: steer only where it is right.

A gate is a logistic readout of the row that is near 1 on a behaviour's own statements and near 0 on
unrelated rows. It is fitted on rows and wraps any intervention.
"""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from innsteer.errors import InputError, UnknownName
from innsteer.steerer import AcrossSites, AcrossTokens, Intervention

Kind = Literal["lda", "logistic"]
# Inverse strengths of the logistic gate's penalty, and the parts that choose among them.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5


class Gate(nn.Module):
    """sigmoid(h weight' + bias): how much a row belongs to each behaviour, from 0 to 1.

    Args:
        width: d. k: number of behaviours.

    ``weight`` ``[k, d]`` and ``bias`` ``[k]`` are in the units of the raw rows; zeros: half open.

    >>> gate = Gate(2); gate.weight.copy_(torch.tensor([[6.0, 0.0]]))
    tensor([[6., 0.]])
    >>> gate(torch.tensor([[1.0, 9.0], [0.0, 9.0]]))
    tensor([[0.9975],
            [0.5000]])
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(k, width))
        self.register_buffer("bias", torch.zeros(k))

    def forward(self, h: Tensor) -> Tensor:
        """Openness ``[n, k]`` of rows ``[n, d]``."""
        return torch.sigmoid(h @ self.weight.to(h.dtype).mT + self.bias.to(h.dtype))


class Gated(Intervention):
    """h' = h + displacement of the inner map at (h, coef * gate(h)): one gate per behaviour.

    Args:
        inner: the map. gate: of the same behaviours.

    Each behaviour's strength is multiplied by its own gate, so that one may close and another stay
    open. Where the inner map's strengths add and -s undoes s, the gated one's no longer do: after
    the first edit the gate sees another row. They still do if the gate reads only what the edit
    leaves alone (a weight orthogonal to every displacement). A gated map has no closed inverse.
    """

    def __init__(self, inner: Intervention, gate: Gate) -> None:
        super().__init__()
        if inner.contextual:
            raise InputError(
                "a gate around a map that reads the prompt",
                expected="a map of rows alone",
                remedy='fit the inner method with reads="row"',
            )
        if isinstance(inner, AcrossSites):
            raise InputError(
                "a gate around a map that acts across sites",
                expected="a map of rows alone: a gate sees one site, and would open differently at "
                "each",
                remedy="steer without the gate, or gate a method of one site, such as diffmean",
            )
        if isinstance(inner, AcrossTokens):
            raise InputError(
                "a gate around a map across tokens",
                expected="a map of rows alone: a request's strength must not change on its way",
            )
        self.inner, self.gate = inner, gate
        self.width = inner.width

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """The inner map's, at strengths that the gates let through."""
        return self.inner.displacement(h, coef * self.gate(h))

    @property
    def sizes(self) -> dict[str, int]:
        """The inner map's."""
        sizes: dict[str, int] = getattr(self.inner, "sizes", {})
        return sizes


def fit_gate(
    statements: Tensor,
    unrelated: Tensor,
    *,
    kind: Kind,
    held: Tensor | None = None,
    shrinkage: float = 0.5,
    quantile: float = 0.02,
    room: float = 0.2,
    slope: float = 12.0,
    seed: int = 0,
    weights: Tensor | None = None,
    unrelated_weights: Tensor | None = None,
    held_weights: Tensor | None = None,
    rewordings: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit a gate that is open on statements and shut on unrelated rows.

    Both kinds see z, the rows standardised by mean and spread of the statements.

    ``lda``: v = ((1 - shrinkage) S + shrinkage I)^-1 (mean z of statements - mean z of unrelated),
    S = Cov(z of statements) + the mean of e e', e the rewordings in units of z; logit = slope *
    (score - threshold) / (median - threshold), score = v.z. The threshold lies a share ``room`` of
    the way from the ``quantile`` of the held statements' scores down to the unrelated rows' 1 -
    ``quantile`` (at the first where they overlap). It looks at the unrelated rows' mean alone,
    which makes it reject kinds of unrelated rows that it has not seen; so it is the one to start
    with.

    ``logistic``: L2-penalised logistic regression of statement against unrelated, both sides with
    equal total weight, the penalty chosen by cross-validated log-loss. Threshold at 1/2.

    Args:
        statements: rows ``[n, d]`` to steer, n >= 2. unrelated: rows ``[m, d]`` to leave alone.
        rewordings: ``[n, d]``, differences of rows that say the same in other words; ``lda`` looks
            less where these lie. Statements that all have one wording do not show what it does.
        held: statements that were kept out, for the threshold of ``lda``; None = the fitted ones,
            whose scores flatter it.
        shrinkage: share of I in the covariance, 0 to 1; needed where n is not far above d.
        quantile: share of held statements below the threshold at room 0, 0 to 1/2.
        room: 0 to 1. Rows in other words than the fitted ones score lower: room for them.
        slope: the logit at the median, > 0: 6 opens the gate to 0.9975 there, and to 0.5 at the
            threshold.
        seed: of the cross-validation's parts.
        weights, unrelated_weights, held_weights: of the rows, > 0; None = 1 each. A row of weight
            2 counts twice.

    Returns:
        weight ``[d]`` and bias (a scalar), float64, in the units of the raw rows.

    Raises:
        InputError: too few rows, other widths, or a number out of range. UnknownName: of ``kind``.

    Reference:
        Fisher, The use of multiple measurements in taxonomic problems (1936),
        https://doi.org/10.1111/j.1469-1809.1936.tb02137.x; scatter of the same thing in other
        guise, added to the covariance: Hatch, Kajarekar and Stolcke, Within-class covariance
        normalization for SVM-based speaker recognition (2006),
        https://doi.org/10.21437/Interspeech.2006-183

    >>> draw = torch.Generator().manual_seed(0)
    >>> statements, unrelated = torch.randn(2, 50, 3, generator=draw) + torch.eye(3)[:2, None] * 8
    >>> weight, bias = fit_gate(statements, unrelated, kind="lda")
    >>> [round(float((rows.double() @ weight + bias).sigmoid().mean()), 1)
    ...  for rows in (statements, unrelated)]
    [1.0, 0.0]
    """
    _check(statements, unrelated, held, kind, (shrinkage, quantile, room, slope))
    rows, others = statements.double(), unrelated.double()
    w, w_others = _weights(weights, rows), _weights(unrelated_weights, others)
    mean = _mean(rows, w)
    spread = _mean((rows - mean).square(), w).sqrt()
    # A coordinate in which statements (nearly) agree must not blow a new row's round-off up.
    spread = spread.clamp_min(max(1e-2 * float(spread.median()), 1e-12))
    z, z_others = (rows - mean) / spread, (others - mean) / spread
    if kind == "logistic":
        v, bias = _logistic(z, z_others, w, w_others, seed)
    else:
        kept = rows if held is None else held.double()
        w_kept = w if held is None else _weights(held_weights, kept)
        v, bias = _lda(
            z,
            z_others,
            w,
            w_others,
            (kept - mean) / spread,
            w_kept,
            (shrinkage, quantile, room, slope),
            None if rewordings is None else rewordings.double() / spread,
        )
    weight = v / spread
    return weight, bias - weight @ mean


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that a score from inside lies above one from outside, ties counted half; 0 to 1.

    >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    ordered = outside.double().sort().values
    below = torch.searchsorted(ordered, inside.double())
    up_to = torch.searchsorted(ordered, inside.double(), right=True)
    return float((below + up_to).double().mean() / (2 * len(outside)))


def mahalanobis(rows: Tensor, statements: Tensor) -> Tensor:
    """Distance ``[n]`` of rows from the statements, sqrt((h - m)' S^-1 (h - m)), in float64.

    m and S are the statements' mean and Ledoit-Wolf covariance, on rows standardised per dimension
    by the statements. It knows no unrelated rows; stands beside the gates for comparison.

    Reference:
        Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices
        (2004), https://doi.org/10.1016/S0047-259X(03)00096-4

    >>> rows = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) * 3
    >>> round(float(mahalanobis(torch.tensor([[6.0, 0.0]]), rows)))
    2
    """
    from sklearn.covariance import ledoit_wolf

    own = statements.double()
    mean, spread = own.mean(0), own.std(0, correction=0).clamp_min(1e-12)
    covariance, _ = ledoit_wolf(((own - mean) / spread).numpy(), assume_centered=True)
    z = (rows.double() - mean) / spread
    solved: Tensor = torch.linalg.solve(torch.from_numpy(covariance), z.mT).mT
    return (z * solved).sum(-1).clamp_min(0).sqrt()


def _lda(
    z: Tensor,
    others: Tensor,
    weight: Tensor,
    others_weight: Tensor,
    kept: Tensor,
    kept_weight: Tensor,
    numbers: tuple[float, float, float, float],
    rewordings: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The shrunk discriminant and its calibrated threshold, on standardised rows."""
    shrinkage, quantile, room, slope = numbers
    gap = _mean(z, weight) - _mean(others, others_weight)
    if not gap.any():
        raise InputError(
            "statements and unrelated rows with the same mean",
            expected="rows of two kinds",
            remedy="look for a mix-up: the same rows may have been given twice",
        )
    centred = z - _mean(z, weight)
    covariance = (centred * (weight / weight.sum()).unsqueeze(-1)).mT @ centred
    if rewordings is not None and len(rewordings):
        covariance = covariance + rewordings.mT @ rewordings / len(rewordings)
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.eye(z.shape[1], dtype=z.dtype)
    v = (
        torch.linalg.lstsq(shrunk, gap).solution
        if not shrinkage
        else torch.linalg.solve(shrunk, gap)
    )
    scores = kept @ v
    threshold, median = (_quantile(scores, kept_weight, q) for q in (quantile, 0.5))
    outside = _quantile(others @ v, others_weight, 1 - quantile)
    threshold = threshold - room * (threshold - outside).clamp_min(0)
    # Held statements that score alike, a single one say, still get a slope: from the fitted ones'
    # spread, about 2 of which lie between quantile and median.
    least = 0.1 * (v @ covariance @ v).sqrt() + 1e-9 * (gap @ v)
    rise = slope / torch.maximum(median - threshold, least)
    return rise * v, -rise * threshold


def _logistic(
    z: Tensor, others: Tensor, weight: Tensor, others_weight: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """The regression at the penalty with the least held-out log-loss."""
    from sklearn.linear_model import LogisticRegression

    inputs = torch.cat([z, others]).numpy()
    labels = np.repeat([1, 0], [len(z), len(others)])
    total = weight.sum() + others_weight.sum()
    sides = [part * total / (2 * part.sum()) for part in (weight, others_weight)]
    balanced = torch.cat(sides).numpy()
    rng = np.random.default_rng(seed)
    # Dealt like cards, so that every part has both sides as far as they go.
    fold = np.concatenate([rng.permutation(len(part)) % FOLDS for part in (z, others)])

    def fitted(penalty: float, keep: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=penalty, max_iter=5000, tol=1e-6)
        return model.fit(inputs[keep], labels[keep], sample_weight=balanced[keep])

    def loss(penalty: float) -> float:
        lost = 0.0
        for part in range(FOLDS):
            out = fold == part
            model = fitted(penalty, ~out)
            margin = model.decision_function(inputs[out]) * (2 * labels[out] - 1)
            lost += float((balanced[out] * np.logaddexp(0, -margin)).sum())
        return lost

    enough = min(len(z), len(others)) >= 2
    best = fitted(min(PENALTIES, key=loss) if enough else 1.0, np.ones(len(labels), dtype=bool))
    return torch.from_numpy(best.coef_[0]), torch.from_numpy(best.intercept_)[0]


def _quantile(scores: Tensor, weight: Tensor, q: float) -> Tensor:
    """The least score with at least a share q of the weight at or below it."""
    ordered = scores.sort()
    share = weight[ordered.indices].cumsum(0) / weight.sum()
    # A round-off of the running sum must not skip a score.
    place = int(torch.searchsorted(share, q - 1e-12))
    return ordered.values[min(place, len(scores) - 1)]


def _mean(rows: Tensor, weight: Tensor) -> Tensor:
    return (weight / weight.sum()) @ rows


def _weights(given: Tensor | None, rows: Tensor) -> Tensor:
    """The rows' weights in float64, 1 each if none are given."""
    weight = torch.ones(len(rows), dtype=torch.float64) if given is None else given.double()
    if weight.shape != rows.shape[:1] or not (torch.isfinite(weight) & (weight > 0)).all():
        raise InputError(
            f"weights of shape {tuple(weight.shape)} for {len(rows)} rows",
            expected="a finite number above 0 for each",
        )
    return weight


def _check(
    statements: Tensor,
    unrelated: Tensor,
    held: Tensor | None,
    kind: str,
    numbers: tuple[float, float, float, float],
) -> None:
    """What ``fit_gate`` takes."""
    if kind not in get_args(Kind):
        raise UnknownName("gate", kind, get_args(Kind))
    parts = {"statements": (statements, 2), "unrelated rows": (unrelated, 1)}
    if held is not None:
        parts["held statements"] = (held, 1)
    for name, (rows, least) in parts.items():
        if rows.ndim != 2 or len(rows) < least or rows.shape[1] != statements.shape[1]:
            raise InputError(
                f"{name} of shape {tuple(rows.shape)}",
                expected=f"[n, d] of one width with n >= {least}",
            )
    check_numbers(*numbers)


def check_numbers(shrinkage: float, quantile: float, room: float, slope: float) -> None:
    """Refuse a gate's numbers that are out of range.

    Raises:
        InputError: it names the number.
    """
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage={shrinkage}", expected="0 to 1")
    if not 0 <= quantile < 0.5:
        raise InputError(f"quantile={quantile}", expected="at least 0, below 0.5")
    if not 0 <= room <= 1:
        raise InputError(f"room={room}", expected="0 to 1")
    if not 0 < slope < float("inf"):
        raise InputError(f"slope={slope}", expected="a positive number")

"""MiMiC: the affine map that gives source rows the target's mean and covariance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.interventions import Affine
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means, weights

Shrinkage = float | Literal["oas", "ledoit-wolf"]


@dataclass(frozen=True)
class MiMiC(Steerer):
    """Match mean and covariance of the target with the least movement, as between two Gaussians.

    h' = h + strength * (T(h) - h);  T(h) = m_t + A (h - m_s)
    A = S_s^-1/2 (S_s^1/2 S_t S_s^1/2)^1/2 S_s^-1/2,  symmetric and positive, A S_s A = S_t

    m, S: weighted mean and covariance of the source and target rows. Pairing does not matter. Of
    all maps that carry N(m_s, S_s) to N(m_t, S_t) this one moves rows least in the mean square (the
    Wasserstein-2 map). Equal covariances give DiffMean, diagonal ones a slope s_t / s_s per
    dimension (``linear_act`` between Gaussians).

    Closed form: an eigen- and a singular value decomposition per site and behaviour, O(d^3), in
    float64 (under a second at d = 576, minutes at d = 4,096). The artifact is d^2 floats per site
    and behaviour (``Affine``). Strength 1 is the map, between 0 and 1 the path of transport; -1
    mirrors the edit and does not invert it.

    A covariance of n rows has rank below n, so each side's is shrunk, and along its own scales:
    S = D ((1 - r) C + r I) D with D the standard deviations and C the correlations. Variances stay,
    correlations shrink, and no massive dimension decides for the others. r is estimated from the
    standardised rows, as in scikit-learn, with a row's weight counting as that many rows. A
    dimension in which the source does not vary gets the shift of the means only.

    The public code adds its ridge to every entry of the covariance; here it is the diagonal only.
    There the map is applied to rows that a classifier finds to be of the source class; here to
    every row that is steered: for the other, put a gate around it.

    Attributes:
        shrinkage: r, in [0, 1] and unitless: 0 = the sample covariance, 1 = variances only; or
            how to estimate it for each side: ``oas``, best for Gaussian rows, or ``ledoit-wolf``,
            which assumes no distribution and pays with fourth moments: one far row of little weight
            can move it.

    Raises:
        InputError: ``shrinkage`` out of its range, or (by ``fit``) a source covariance that is
            singular after shrinkage.
        UnknownName: no such estimate.

    Reference:
        Singh et al., Representation Surgery: Theory and Practice of Affine Steering (2024),
        https://arxiv.org/abs/2402.09631; Chen et al., Shrinkage Algorithms for MMSE Covariance
        Estimation (2010), https://arxiv.org/abs/0907.4698; Ledoit and Wolf, A well-conditioned
        estimator for large-dimensional covariance matrices (2004),
        https://doi.org/10.1016/S0047-259X(03)00096-4

    >>> rows = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])
    >>> acts = Activations.of_sides(rows, rows.flip(1) + 5, paired=False)
    >>> maps = MiMiC().fit(acts)  # variances 1, 4 -> 4, 1: factors 2 and 1/2
    >>> maps[acts.site](torch.tensor([[1.0, 2.0]]), torch.ones(1, 1))
    tensor([[7., 6.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.09631"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    shrinkage: Shrinkage = "oas"

    def __post_init__(self) -> None:
        check_shrinkage(self.shrinkage)

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """The identity, an affine map per site."""
        return Interventions({site: Affine(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Solved in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, Affine)
            for row, behaviour in enumerate(acts.behaviours):
                means = side_means(train, site, behaviour)
                sides = train.sides(site, behaviour)
                counts = weights(train, behaviour)
                apart = [rows.double() - mean for rows, mean in zip(sides, means, strict=True)]
                source, target = (
                    covariance(rows, weight, self.shrinkage)
                    for rows, weight in zip(apart, counts, strict=True)
                )
                # What float32 rows cannot resolve beside their mean is no variation.
                live = apart[0].abs().amax(0) > 1e-6 * means[0].abs()
                part.centres[row] = means[0]
                part.residuals[row] = self._residual(source, target, live, site)
                part.shifts[row] = means[1] - means[0]
        return fitted

    def _residual(self, source: Tensor, target: Tensor, live: Tensor, site: Site) -> Tensor:
        """A - I in the dimensions in which the source varies, 0 in the others."""
        block = torch.outer(live, live)
        size = int(live.sum())
        source, target = (part[block].reshape(size, size) for part in (source, target))
        if size and not _regular(source):
            raise InputError(
                f"site {site}: the source covariance is singular in the {size} dimensions that "
                f"vary, at shrinkage={self.shrinkage!r}",
                expected="more rows than dimensions, or a shrinkage above 0",
                remedy="set shrinkage=0.1, or record more rows",
            )
        residual = torch.zeros(block.shape, dtype=source.dtype)
        moved = gaussian_map(source, target) - torch.eye(size, dtype=source.dtype)
        residual[block] = moved.flatten()
        return residual


def ledoit_wolf(rows: Tensor, covariance: Tensor, weight: Tensor) -> float:
    """Ledoit and Wolf's shrinkage towards a multiple of the identity, in [0, 1].

    min(1, mean |x x' - S|^2 / (n |S - m I|^2)) with S the covariance of centred ``rows``
    ``[rows, d]``, m its mean variance, Frobenius norms, and n the sum of ``weight`` ``[rows]``:
    weight 2 is the row twice.

    >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> ledoit_wolf(rows, torch.eye(2) / 2, torch.ones(4))  # nothing to shrink
    0.0
    """
    n, d = weight.sum(), rows.shape[1]
    size = covariance.square().sum()
    bias = size - covariance.trace().square() / d
    noise = (weight @ rows.square().sum(1).square() / n - size) / n
    return float((noise / bias).clamp(0, 1)) if bias > 1e-12 * size else 0.0


def oas(rows: Tensor, covariance: Tensor, weight: Tensor) -> float:
    """The oracle approximating shrinkage of Gaussian rows (Chen et al., eq. 23), in [0, 1].

    min(1, (|S|^2 + tr(S)^2) / ((n + 1) |S - m I|^2)), arguments as for ``ledoit_wolf``: the form
    for large d that scikit-learn has too.

    >>> oas(torch.empty(0, 2), torch.diag(torch.tensor([1.0, 3.0])), torch.ones(25))  # 26 / 52
    0.5
    """
    size, total = covariance.square().sum(), covariance.trace().square()
    bias = size - total / len(covariance)
    share = (size + total) / ((weight.sum() + 1) * bias.clamp_min(1e-12 * size))
    return float(share.clamp(0, 1))


ESTIMATES: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "oas": oas,
    "ledoit-wolf": ledoit_wolf,
}


def check_shrinkage(shrinkage: Shrinkage) -> None:
    """Whether ``covariance`` can take it; InputError or UnknownName if not."""
    if isinstance(shrinkage, str):
        if shrinkage not in ESTIMATES:
            raise UnknownName("estimate of shrinkage", shrinkage, tuple(ESTIMATES))
    elif not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage={shrinkage}", expected="between 0 and 1")


def covariance(apart: Tensor, weight: Tensor, shrinkage: Shrinkage) -> Tensor:
    """The covariance ``[d, d]`` of centred rows ``[n, d]``, its correlations shrunk towards 0.

    >>> rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    >>> covariance(rows, torch.ones(2), 0.5)
    tensor([[1., 1.],
            [1., 4.]])
    """
    spread = (weight @ apart.square() / weight.sum()).sqrt()
    unit = apart / torch.where(spread > 0, spread, 1)
    correlation = (unit.mT * weight) @ unit / weight.sum()
    if isinstance(shrinkage, str):
        shrinkage = ESTIMATES[shrinkage](unit, correlation, weight)
    shrunk = (1 - shrinkage) * correlation
    shrunk.diagonal().add_(shrinkage)
    return spread.unsqueeze(1) * shrunk * spread


def gaussian_map(source: Tensor, target: Tensor) -> Tensor:
    """The symmetric positive A ``[d, d]`` with A S_s A = S_t, of covariances in float64.

    Any factors S_s = L L' and S_t = F F' give it, by L' F = U diag(s) V': A = (L^-1)' U diag(s) U'
    L^-1. Square roots of S_s and of a product that holds S_s and S_t would square the ratio of the
    dimensions' scales once more, and float64 ends at scales 10^4 apart.

    >>> gaussian_map(torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([4.0, 1.0])))
    tensor([[2.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    lower = torch.linalg.cholesky(source)
    rotation, scale, _ = torch.linalg.svd(lower.mT @ _factor(target))
    half: Tensor = torch.linalg.solve_triangular(lower.mT, rotation * scale.sqrt(), upper=True)
    return half @ half.mT


def _factor(covariance: Tensor) -> Tensor:
    """F with F F' = S, also of a singular S; taken of the correlations, whose scales are alike."""
    spread = covariance.diagonal().sqrt().unsqueeze(1)
    unit = torch.where(spread > 0, spread, 1)
    values, vectors = torch.linalg.eigh(covariance / unit / unit.mT)
    # Rounding can leave an eigenvalue just below 0.
    factor: Tensor = unit * vectors * values.clamp_min(0).sqrt()
    return factor


def _regular(covariance: Tensor) -> bool:
    """Whether each dimension keeps 1e-10 of its variance once the dimensions before it are known.

    That bound leaves float64 five digits in the map.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    return not failed and bool((lower.diagonal().square() > 1e-10 * covariance.diagonal()).all())

"""LEACE: erase the difference of the sides from what any linear readout sees, moving rows least."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.interventions import SetPoint
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means, weights
from innsteer.steerers.mimic import Shrinkage, check_shrinkage, covariance


@dataclass(frozen=True)
class Leace(Steerer):
    """Erase what a linear readout could tell the sides by, with the least change of rows.

    h' = h + strength * (r(h) - h);  r(h) = h - v w.(h - m),  v = m_t - m_s,
    w = S^+ v / (v . S^+ v)

    m and S are mean and covariance of all rows of both sides, m_s and m_t the sides' own means, all
    by weight. This is r(x) = x - W^+ P W (x - m) of the paper for one concept of two classes, with
    W = S^(-1/2) and P the projector onto W v, multiplied out. It erases: strength 1 takes both
    sides' means to m, and then no linear classifier tells these rows apart better than a constant;
    of all affine maps that reach that this one moves rows least in the mean square. It reads w, the
    direction of a discriminant, and writes v; where rows are isotropic w and v are parallel, and it
    is a projection off v. A nonlinear readout, or a later layer, may still find the behaviour.
    Strengths between 0 and 1 go that share of the way, -1 doubles the difference.

    Closed form: an eigenvalue decomposition per site and behaviour, O(d^3), in float64; the
    artifact is 3 d + 1 floats. Pairing does not matter; a row's weight counts as that many rows.
    Several behaviours are erased each by itself, and their moves added: two that are correlated are
    erased a little too far. A dimension that does not vary stays.

    S is shrunk along the dimensions' own scales, as for ``mimic``; the public code shrinks towards
    a multiple of the identity, in which a massive dimension decides for the others, and
    ``shrinkage=0`` is the paper's closed form. That code also leaves a concept in whose whitened
    cross-covariance with the labels is below 0.01, a bound that depends on the labels' scale alone;
    here a weak concept is erased too.

    Attributes:
        alpha: None erases. A number also sets the behaviour, unitless: both sides' means go to
            m_s + alpha (m_t - m_s), so 0 = the source's, 1 = the target's, with the least
            movement of rows (``ace`` sets it along v without a look at the covariance).
        shrinkage: of S's correlations, in [0, 1] and unitless, or ``oas`` or ``ledoit-wolf``;
            see ``mimic``.

    Raises:
        InputError: a field out of its range.
        UnknownName: no such estimate of the shrinkage.

    Reference:
        Belrose et al., LEACE: Perfect linear concept erasure in closed form (2023),
        https://arxiv.org/abs/2306.03819

    >>> rows = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0.0]))
    >>> part = Leace().fit(acts)[acts.site]
    >>> part(torch.tensor([[7.0, 2.0]]), torch.ones(1, 1)).round(decimals=4)
    tensor([[1., 2.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.03819"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False
    erases: ClassVar[bool] = True

    alpha: float | None = None
    shrinkage: Shrinkage = "oas"

    def __post_init__(self) -> None:
        check_shrinkage(self.shrinkage)
        if self.alpha is not None and not isfinite(self.alpha):
            raise InputError(f"alpha={self.alpha}", expected="a finite number, or None to erase")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes."""
        return Interventions({site: SetPoint(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Solved in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, SetPoint)
            for row, behaviour in enumerate(acts.behaviours):
                source, target = side_means(train, site, behaviour)
                counts = weights(train, behaviour)
                share = counts[1].sum() / (counts[0].sum() + counts[1].sum())
                mean = source + share * (target - source)
                apart = torch.cat(train.sides(site, behaviour)).double() - mean
                # What float32 rows cannot resolve beside their mean is no variation.
                live = apart.abs().amax(0) > 1e-6 * mean.abs()
                apart, gap = (torch.where(live, each, 0) for each in (apart, target - source))
                spread = covariance(apart, torch.cat(counts), self.shrinkage)
                part.reads[row], part.writes[row] = reading(gap, spread), gap
                part.centres[row] = mean
                part.levels[row] = 0 if self.alpha is None else self.alpha - share
        return fitted


def reading(gap: Tensor, covariance: Tensor) -> Tensor:
    """w = S^+ v / (v . S^+ v) ``[d]`` of a difference v ``[d]`` and a covariance ``[d, d]``.

    Of the correlations, whose scales are alike. Zeros where v is 0.

    >>> reading(torch.tensor([2.0, 0.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    tensor([ 0.5000, -0.4000])
    """
    spread = covariance.diagonal().sqrt()
    spread = torch.where(spread > 0, spread, torch.inf)
    correlation = covariance / spread / spread.unsqueeze(1)
    solved = torch.linalg.pinv(correlation, hermitian=True) @ (gap / spread) / spread
    told = gap @ solved
    return solved / told if told > 0 else torch.zeros_like(solved)

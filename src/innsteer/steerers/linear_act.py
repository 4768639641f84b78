"""Linear-AcT: carry each dimension's distribution onto the target's by a line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, weights

Form = Literal["sorted", "gaussian"]
FLOOR = 1e-4  # of a standard deviation in the gaussian form, in activation units


class Diagonal(Intervention):
    """h' = h + sum_k coef_k (gains_k (h - centres_k) + shifts_k) where lows_k < h < highs_k.

    Dimension by dimension; outside its open interval a dimension stays as it is.

    Args:
        width: d. k: number of behaviours.

    ``gains`` ``[k, d]`` is slope - 1, unitless; the others, ``[k, d]``, are in activation units.

    >>> line = Diagonal(1)
    >>> line.gains.fill_(1), line.highs.fill_(5)
    (tensor([[1.]]), tensor([[5.]]))
    >>> line(torch.tensor([[2.0], [6.0]]), torch.ones(2, 1)).tolist()
    [[4.0], [6.0]]
    """

    centres: Tensor
    gains: Tensor
    shifts: Tensor
    lows: Tensor
    highs: Tensor

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        self.width = width
        for name in ("centres", "gains", "shifts", "lows", "highs"):
            self.register_buffer(name, torch.zeros(k, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """sum_k coef_k (gains_k (h - centres_k) + shifts_k), 0 outside the interval."""
        centres, gains, shifts, lows, highs = (
            part.to(h.dtype)
            for part in (self.centres, self.gains, self.shifts, self.lows, self.highs)
        )
        rows = h.unsqueeze(1)
        moves = gains * (rows - centres) + shifts
        inside = (rows > lows) & (rows < highs)
        return (coef.unsqueeze(-1) * torch.where(inside, moves, 0.0)).sum(1)


@dataclass(frozen=True)
class LinearAcT(Steerer):
    """Fit a line per dimension to the optimal coupling of the two sides: sorted least squares.

    h' = h + strength * (slope h + b - h) where low < h < high, else h;  per dimension
    slope = cov(x, y) / var(x),  b = mean y - slope mean x

    with x, y the sorted source and target values, matched by rank: in one dimension the optimal
    coupling. Pairing does not matter, and slopes are never negative. Dimensions know nothing of
    each other; ``mimic`` is the sibling that does. Closed form, O(n log n) per dimension; the
    artifact is 5 d floats per site and behaviour. Strength is the paper's lambda, in [0, 1]: 1 is
    the fitted map; beyond 1 and below 0 it extrapolates, and -1 is not the inverse.

    Where sides have unequal numbers of rows, or rows of unequal weight, x and y are the exact
    coupling of the two weighted samples: order statistics repeated by mass, not interpolated. Of
    equal sides that is sorted pairs. Weights count as numbers of rows.

    Where the paper and its public code leave room, or differ from here: the code demands equal
    numbers of rows; it adds noise of 1e-8 to the source before its fit, so a dimension in which
    the source does not vary gets an arbitrary steep slope, where here it gets slope 1 (a shift); it
    writes "all" as the interval (-1e6, 1e6), where here it is every number; its interval is open,
    so that the outermost recorded rows themselves stay, which is kept. Both average a sentence's
    tokens into one row (``record(read="mean")``), and fit layer after layer on rows that the
    earlier layers have moved; here every site is fitted on rows as recorded. Averages vary less
    than tokens, so that slopes and intervals suit tokens less.

    Attributes:
        support: the interval, by percentiles of the source rows: ``q_LOW_HIGH`` with
            0 <= LOW < HIGH <= 100 (linear between order statistics), or ``q_all`` for no bounds.
            The paper's is ``q_0_100``, from the least to the greatest source row; it is tight
            where steered text drifts away.
        form: ``sorted`` as above; ``gaussian`` takes slope = s_t / s_s from the standard
            deviations (divided by n), each at least 1e-4: robust where rows are few.

    Raises:
        InputError: a support that cannot be read, or (by ``fit``) source weights that sum to less
            than 2 where percentiles are asked for.
        UnknownName: no such form.

    Reference:
        Rodriguez et al., Controlling Language and Diffusion Models by Transporting Activations
        (2024), https://arxiv.org/abs/2410.23054

    >>> source = torch.tensor([[0.0], [1.0], [2.0]])
    >>> acts = Activations.of_sides(source, 2 * source + 3)
    >>> part = LinearAcT().fit(acts)[acts.site]
    >>> part(torch.tensor([[1.5], [9.0]]), torch.ones(2, 1)).tolist()
    [[6.0], [9.0]]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.23054"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    support: str = "q_0_100"
    form: Form = "sorted"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise UnknownName("form", self.form, get_args(Form))
        if self._shares is not None and not 0 <= self._shares[0] < self._shares[1] <= 1:
            raise InputError(f"support={self.support!r}", expected="0 <= LOW < HIGH <= 100")

    @property
    def _shares(self) -> tuple[float, float] | None:
        """The interval's ends as shares of the source rows; None = no bounds."""
        if self.support == "q_all":
            return None
        found = re.fullmatch(r"q_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)", str(self.support))
        if not found:
            raise InputError(
                f"support={self.support!r}", expected="q_all or q_LOW_HIGH, such as q_5_95"
            )
        return float(found[1]) / 100, float(found[2]) / 100

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Lines of slope 1 with empty intervals."""
        return Interventions({site: Diagonal(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fitted in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, Diagonal)
            for row, behaviour in enumerate(acts.behaviours):
                source, target = (rows.double() for rows in train.sides(site, behaviour))
                counts = weights(train, behaviour)
                self._fit_lines(part, row, source, target, *counts)
        return fitted

    def _fit_lines(
        self, part: Diagonal, row: int, x: Tensor, y: Tensor, x_count: Tensor, y_count: Tensor
    ) -> None:
        """Set a behaviour's lines and intervals."""
        x, y, mass = coupled(x, y, x_count, y_count)
        x_mean, y_mean = (mass * x).sum(0), (mass * y).sum(0)
        x_apart, y_apart = x - x_mean, y - y_mean
        x_var, y_var = (mass * x_apart.square()).sum(0), (mass * y_apart.square()).sum(0)
        if self.form == "gaussian":
            slope = y_var.sqrt().clamp_min(FLOOR) / x_var.sqrt().clamp_min(FLOOR)
        else:
            slope = (mass * x_apart * y_apart).sum(0) / x_var
        # What float32 rows cannot resolve beside their mean is no variation: slope 1.
        varies = x_apart.abs().amax(0) > 1e-6 * x_mean.abs()
        part.centres[row] = x_mean
        part.gains[row] = torch.where(varies, slope - 1, 0)
        part.shifts[row] = y_mean - x_mean
        bounds = torch.finfo(part.lows.dtype)
        part.lows[row], part.highs[row] = bounds.min, bounds.max
        if self._shares is not None:
            total = float(x_count.sum())
            if total < 2:
                raise InputError(
                    f"weights of the source rows that sum to {total}",
                    expected="at least 2 for percentiles: they count as numbers of rows",
                    remedy="scale the weights, or set support='q_all'",
                )
            part.lows[row] = percentile(x, mass, total, self._shares[0])
            part.highs[row] = percentile(x, mass, total, self._shares[1])


def coupled(
    x: Tensor, y: Tensor, x_count: Tensor, y_count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal coupling of two weighted samples in every dimension.

    Args:
        x: ``[n, d]``. y: ``[m, d]``. x_count, y_count: weights ``[n]`` and ``[m]``, above 0.

    Returns:
        Values of both and their mass, each ``[n + m, d]``, both in ascending order; the mass sums
        to 1.

    >>> x, y = torch.tensor([[3.0], [1.0]]), torch.tensor([[10.0]])
    >>> [part.squeeze(1).tolist() for part in coupled(x, y, torch.ones(2), torch.ones(1))]
    [[1.0, 3.0, 3.0], [10.0, 10.0, 10.0], [0.5, 0.5, 0.0]]
    """
    sides = []
    for rows, count in ((x, x_count), (y, y_count)):
        values, order = rows.mT.contiguous().sort(-1)
        ends = count[order].cumsum(-1)
        sides.append((values, ends / ends[:, -1:]))
    cuts = torch.cat([ends for _, ends in sides], -1).sort(-1).values
    cuts = torch.cat([torch.zeros_like(cuts[:, :1]), cuts], -1)
    mass = cuts.diff(dim=-1)
    middles = (cuts[:, 1:] + cuts[:, :-1]) / 2
    found = [values.gather(-1, torch.searchsorted(ends, middles)) for values, ends in sides]
    return found[0].mT, found[1].mT, mass.mT


def percentile(values: Tensor, mass: Tensor, count: float, share: float) -> Tensor:
    """A quantile of weighted values in every dimension, linear between order statistics.

    Args:
        values: ``[n, d]``, ascending. mass: ``[n, d]``, sums to 1. count: the number of rows that
            the mass stands for. share: in [0, 1]; 0 is the least row, 1 the greatest.

    The mean of the values over one row's worth of mass, from ``share (count - 1)`` rows on: with
    whole counts that is the usual interpolation, and a row of weight 2 is the row twice.

    >>> values, mass = torch.tensor([[1.0], [2.0], [4.0]]), torch.full((3, 1), 1 / 3)
    >>> [round(percentile(values, mass, 3, share).item(), 4) for share in (0, 0.75, 1)]
    [1.0, 3.0, 4.0]
    """
    ends = count * mass.cumsum(0)
    start = share * (count - 1)
    starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    inside = (ends.clamp(start, start + 1) - starts.clamp(start, start + 1)).clamp_min(0)
    return (inside * values).sum(0) / inside.sum(0)

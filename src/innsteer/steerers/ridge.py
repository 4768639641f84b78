"""Ridge: the affine map that carries source rows onto their targets, shrunk to the identity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.interventions import Affine
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, weights


@dataclass(frozen=True)
class Ridge(Steerer):
    """Carry each source row to its own target by ridge regression towards the identity.

    h' = h + strength * (W h + b - h);  W, b minimise
        mean |target - W source - b|^2 + mean |u - W u - b|^2 over unmoved rows u
        + lambda |W - I|^2,    b not penalised

    Closed form, by one singular value decomposition per site and behaviour: O(n d min(n, d)) for n
    rows of width d. Rows are centred and divided by their standard deviation per dimension first
    (source and unmoved rows together), so that no massive dimension decides and lambda is unitless:
    at lambda = 1 a direction with a standardised variance of 1 is learned by half. Large lambda
    leaves a constant shift: the mean of target - source, smaller where unmoved rows vote for 0. The
    artifact is d^2 floats per site and behaviour (``Affine``). Also called an affine editor or
    linear least-squares steering; unlike ``mimic`` it needs to know which target belongs to which
    source. Strength 1 is the fitted map; others scale the distance from the identity, -1 mirrors
    the edit and does not invert it.

    Several tokens of a pair's side are meaned by weight. A row's weight counts as that many rows;
    a pair weighs as much as its lighter side, meaned over tokens. A dimension that does not vary
    gets a shift only. Rows that are not part of a whole pair are not used.

    lambda is the candidate with the least error (the first two terms above, in standardised units)
    on the validation rows; without whole validation pairs, on pairs and unmoved rows held out of
    the training part. Of two equal ones the larger is taken, and for lack of a second training
    pair the largest. The final map is fitted on all training rows.

    Attributes:
        grid: candidates for lambda, unitless, each > 0; one candidate fixes it.
        unmoved: factor on the weights of unmoved rows, unitless, >= 0; 0 ignores them.
        holdout: share of the training pairs held out, in (0, 1), without validation pairs.

    Raises:
        InputError: a field out of its range, or (by ``fit``) a behaviour without whole pairs.

    Reference:
        Hoerl and Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems (1970),
        https://doi.org/10.1080/00401706.1970.10488634; no paper on steering: the usual linear
        baseline, here shrunk to the identity instead of 0

    >>> source = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(source, source.flip(1) + 1)
    >>> maps = Ridge(grid=(1e-9,)).fit(acts)
    >>> maps[acts.site](torch.tensor([[2.0, 5.0]]), torch.ones(1, 1)).round(decimals=3)
    tensor([[6., 3.]])
    """

    paper: ClassVar[str] = "https://doi.org/10.1080/00401706.1970.10488634"
    needs: ClassVar[tuple[str, ...]] = ("pairs",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    grid: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
    unmoved: float = 1.0
    holdout: float = 0.2

    def __post_init__(self) -> None:
        # "not <" so that NaN is refused too
        if not self.grid or not all(0 < each < math.inf for each in self.grid):
            raise InputError(f"grid={self.grid}", expected="one or more positive numbers")
        if not 0 <= self.unmoved < math.inf:
            raise InputError(f"unmoved={self.unmoved}", expected=">= 0")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout={self.holdout}", expected="between 0 and 1")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """The identity, an affine map per site."""
        return Interventions({site: Affine(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Solved in float64, stored in float32; the seed draws what is held out."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train, held = acts.where(split="train"), acts.where(split="validation")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, Affine)
            for row, behaviour in enumerate(acts.behaviours):
                rows = self._rows(train, site, behaviour)
                if not rows.pairs:
                    raise InputError(
                        f"behaviour {behaviour!r} has no whole pair in the training part",
                        expected="source and target rows that share a pair id",
                        remedy="record pairs, or take a method that needs classes only: mimic",
                    )
                solved = _Solution.of(rows)
                penalty = self._penalty(rows, self._rows(held, site, behaviour), seed)
                part.centres[row] = solved.centre
                part.residuals[row] = solved.residual(penalty)
                part.shifts[row] = solved.shift
        return fitted

    def _penalty(self, rows: "_Rows", held: "_Rows", seed: int) -> float:
        """The candidate with the least error on held-out rows, the larger of equal ones."""
        grid = sorted(self.grid, reverse=True)
        if held.pairs == 0:
            if rows.pairs < 2 or len(grid) == 1:
                return grid[0]
            rows, held = rows.halves(self.holdout, seed)
        solved = _Solution.of(rows)
        return min(grid, key=lambda penalty: solved.error(held, penalty))

    def _rows(self, acts: Activations, site: Site, behaviour: str) -> "_Rows":
        """Pairs and unmoved rows of a behaviour; unmoved rows are their own targets."""
        mine = acts.where(behaviour=behaviour)
        if not {"source", "target"} <= set(mine.rows.side.tolist()):
            return _Rows.none(acts.widths[site])
        source, target, lighter = weighted_pairs(mine, site, behaviour)
        still = mine.unmoved(site, behaviour).double()[: None if self.unmoved else 0]
        factor = torch.from_numpy(mine.rows.weight[mine.rows.side == "unmoved"])[: len(still)]
        return _Rows(
            torch.cat([source, still]),
            torch.cat([target - source, torch.zeros_like(still)]),
            torch.cat([lighter, self.unmoved * factor]),
            len(source),
        )


def weighted_pairs(acts: Activations, site: Site, behaviour: str) -> tuple[Tensor, Tensor, Tensor]:
    """Source and target ``[n, d]`` of a behaviour's whole pairs, in float64, and weights ``[n]``.

    Several tokens of a side are meaned by weight; a pair weighs as much as its lighter side.

    Raises:
        InputError: a weight that is not above 0.
    """
    mine = acts.where(behaviour=behaviour)
    weights(mine, behaviour)  # refuses weights that are not above 0
    # The weight as a further column: a pair's mean of weight * row over its mean weight.
    weight = torch.from_numpy(mine.rows.weight).float().unsqueeze(1)
    values = torch.cat([mine.values[site] * weight, weight], 1)
    sides = replace(mine, values={site: values}).pairs(site, behaviour)
    source, target = (side[:, :-1].double() / side[:, -1:] for side in sides)
    return source, target, torch.minimum(sides[0][:, -1], sides[1][:, -1]).double()


class _Rows(NamedTuple):
    """Rows ``[n, d]``, the moves asked of them ``[n, d]``, weights ``[n]``; pairs come first."""

    start: Tensor
    move: Tensor
    weight: Tensor
    pairs: int

    @classmethod
    def none(cls, width: int) -> "_Rows":
        empty = torch.zeros(0, width, dtype=torch.float64)
        return cls(empty, empty, empty[:, 0], 0)

    def halves(self, share: float, seed: int) -> tuple["_Rows", "_Rows"]:
        """Kept and held-out rows: a share of the pairs, one at least, and of the unmoved rows."""
        rng = torch.Generator().manual_seed(seed)
        still = len(self.start) - self.pairs
        out = min(max(1, round(share * self.pairs)), self.pairs - 1)
        pairs = torch.randperm(self.pairs, generator=rng)
        others = self.pairs + torch.randperm(still, generator=rng)
        cut = round(share * still)
        kept = torch.cat([pairs[out:], others[cut:]])
        held = torch.cat([pairs[:out], others[:cut]])
        return self._take(kept, self.pairs - out), self._take(held, out)

    def _take(self, index: Tensor, pairs: int) -> "_Rows":
        return _Rows(self.start[index], self.move[index], self.weight[index], pairs)


class _Solution(NamedTuple):
    """The regression of moves on rows, solved for every lambda at once.

    In standardised units the residual is left diag(s / (s^2 + lambda)) right, with s the singular
    values of the weighted rows.
    """

    centre: Tensor
    shift: Tensor
    spread: Tensor
    left: Tensor
    singular: Tensor
    right: Tensor

    @classmethod
    def of(cls, rows: _Rows) -> "_Solution":
        share = rows.weight / rows.weight.sum()
        centre, shift = share @ rows.start, share @ rows.move
        apart = rows.start - centre
        spread = (share @ apart.square()).sqrt()
        # What float32 rows cannot resolve beside their mean is no variation.
        spread = torch.where(spread > 1e-6 * centre.abs(), spread, torch.inf)
        root = share.sqrt().unsqueeze(1)
        rotation, singular, right = torch.linalg.svd(root * apart / spread, full_matrices=False)
        left = (root * (rows.move - shift)).mT @ rotation
        return cls(centre, shift, spread, left, singular, right)

    def residual(self, penalty: float) -> Tensor:
        """W - I ``[d, d]`` in activation units."""
        gain = self.singular / (self.singular.square() + penalty)
        return (self.left * gain) @ self.right / self.spread

    def error(self, held: _Rows, penalty: float) -> float:
        """Mean squared error of the moves of other rows, by weight, in standardised units."""
        moves = (held.start - self.centre) @ self.residual(penalty).mT + self.shift
        missed = ((held.move - moves) / self.spread).square().sum(1)
        return float(held.weight @ missed / held.weight.sum())

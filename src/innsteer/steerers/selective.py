"""Selective steering: turn rows within a plane by one angle, at sites that tell the sides apart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means, weights
from innsteer.steerers.angular import Plane, Turn, angle_of, check_turn, planes


@dataclass(frozen=True)
class SelectiveSteering(Steerer):
    """Turn every row by one angle within a plane, at the layers where the sides lie opposite.

    h' = h - P h + R(strength * theta) P h,  P and b1, b2 as for ``angular``

    R turns from b1 = (mean target - mean source) of unit norm towards b2. Unlike ``angular``, which
    takes every row to one angle, rows keep what tells them apart in the plane, norms included;
    turns add, and -s undoes s.

    A site is discriminative when the means of its sides' unit-norm rows lie on opposite sides of 0
    along b1, both further than the margin. Layers all of whose recorded sites are so are
    turned, the others left alone; where no layer is, all of them are, so that a steering of the one
    layer of one's choice turns there (``diagnose`` says how many were). Where all rows share a
    large mean, as in a residual stream, sites seldom are discriminative; the authors turn norms'
    outputs (streams ``attention_norm`` and ``mlp_norm``) of all layers, with ``plane="sites"``, at
    all tokens, and sweep theta from 0 to 360 degrees.

    Without theta the rows say it: the turn that takes the source mean to the target mean's
    coordinate along b1, or as near as its norm allows. Closed form; the artifact is 2 d + 1 floats
    per site and behaviour. Pairing does not matter. Several behaviours turn the same row each, and
    their displacements are summed.

    Attributes:
        theta: the turn at strength 1 in degrees, from b1 towards b2; None = by the rows, as above.
        plane: ``means``, each site's own, or ``sites``, the authors'; see ``angular``.
        margin: how far from 0 both means must lie, as a cosine, in [0, 1); 0 as the authors have
            it. Means of few rows are noisy.

    Raises:
        InputError: a field out of its range, or (by ``fit``) there is no plane; see ``angular``.
        UnknownName: no such plane.

    Reference:
        Selective Steering: Norm-Preserving Control Through Discriminative Layer Selection (2026),
        https://arxiv.org/abs/2601.19375

    >>> source, target = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[4.0, 5.0, 1.0]])
    >>> acts = Activations.of_sides(source, target)
    >>> part = SelectiveSteering().fit(acts)[acts.site]
    >>> part(source, torch.ones(1, 1)).round(decimals=2)
    tensor([[4.0000, 3.1000, 0.6200]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2601.19375"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "layers"
    trained: ClassVar[bool] = False

    theta: float | None = None
    plane: Plane = "means"
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_turn(self.theta, self.plane)
        if not 0 <= self.margin < 1:
            raise InputError(f"margin={self.margin}", expected="from 0 to below 1")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """No planes yet: nothing turns."""
        return Interventions({site: Turn(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Planes in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for row, behaviour in enumerate(acts.behaviours):
            found = planes(train, behaviour, self.plane)
            firsts = {site: first for site, (first, _) in found.items()}
            chosen = discriminative(train, behaviour, firsts, self.margin) or set(train.sites)
            for site, (first, second) in found.items():
                part = fitted[site]
                assert isinstance(part, Turn)
                part.firsts[row], part.seconds[row] = first, second
                if site in chosen:
                    part.angles[row] = self._turn(train, site, behaviour, first, second)
        return fitted

    def _turn(
        self, acts: Activations, site: Site, behaviour: str, first: Tensor, second: Tensor
    ) -> Tensor | float:
        """theta in radians."""
        if self.theta is not None:
            return math.radians(self.theta)
        source, target = side_means(acts, site, behaviour)
        x, y = source @ first, source @ second
        side = torch.where(y < 0, -1, 1)
        return side * angle_of(target @ first, torch.hypot(x, y)) - torch.atan2(y, x)

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``discriminative``: the share of sites that are turned for that, the least of all."""
        train, least = acts.where(split="train"), 1.0
        for row, behaviour in enumerate(acts.behaviours):
            firsts = {}
            for site in acts.sites:
                part = fitted[site]
                assert isinstance(part, Turn)
                firsts[site] = part.firsts[row].double()
            chosen = discriminative(train, behaviour, firsts, self.margin)
            least = min(least, len(chosen) / len(acts.sites))
        return {"discriminative": least}


def discriminative(
    acts: Activations, behaviour: str, firsts: Mapping[Site, Tensor], margin: float
) -> set[Site]:
    """Sites of the layers all of whose sites have the sides' unit-norm rows opposite along b1."""
    apart = {}
    for site, first in firsts.items():
        low, high = sorted(
            float(weight @ (normalize(rows.double()) @ first) / weight.sum())
            for rows, weight in zip(
                acts.sides(site, behaviour), weights(acts, behaviour), strict=True
            )
        )
        apart[site] = low < -margin and high > margin
    left = {site.layer for site, opposite in apart.items() if not opposite}
    return {site for site in apart if site.layer not in left}

"""PCA: add the main direction of the pairs' differences, a reading vector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.interventions import Shift
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer
from innsteer.steerers.ridge import weighted_pairs


@dataclass(frozen=True)
class PCA(Steerer):
    """Add the main direction of the pairs' differences, signed by a vote of the pairs.

    h' = h + strength * length * v;  v = the first principal component of {d_i} and {-d_i}

    d_i is target less source of pair i. v is a unit vector; it points to where the targets of more
    pairs, by weight, lie above their sources (of as many, to where their mean lies). The same
    vector at every token: strengths add, and -s undoes s. Closed form, by one singular value
    decomposition of n differences of width d; the artifact is d floats per site and behaviour.

    v says along what pairs differ most, be it to one side or to both; ``diffmean`` says where they
    differ on the mean. Independent noise of the two sides draws v to the noise's main direction,
    and a massive dimension can draw it away altogether: ``agreement`` of the diagnostics, the share
    of the pairs that voted for the sign, is then near 1/2.

    The paper and its code, which call v a reading vector, found by linear artificial tomography,
    put each pair in random order and subtract the mean of the differences. Here each pair counts in
    both orders, the mean of all orders, so that no die is thrown and the mean is exactly 0.
    Subtracting the mean of differences that all point one way would leave the noise alone. The
    code lets each pair vote on rows less the mean difference, which cancels between a pair's sides;
    it breaks ties by the sign that the decomposition happens to give. It can also push a row
    towards the side where it is already, and restore the row's norm; here v is added.

    Several tokens of a pair's side are meaned by weight; a pair weighs as much as its lighter side.
    Rows that are not part of a whole pair are not used.

    Attributes:
        length: |shift| at strength 1 in activation units, > 0; None = the distance of the sides'
            means along v, per site and behaviour, so that strength 1 carries the source mean there.
            The authors add 1 to 8, on many layers at once, by model.

    Raises:
        InputError: a length that is not positive, or (by ``fit``) a behaviour without whole pairs.

    Reference:
        Zou et al., Representation Engineering: A Top-Down Approach to AI Transparency (2023),
        https://arxiv.org/abs/2310.01405

    >>> source = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(source, source + torch.tensor([3.0, 4.0]))
    >>> PCA(length=10).fit(acts)[acts.site].shifts.round(decimals=3)
    tensor([[6., 8.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.01405"
    needs: ClassVar[tuple[str, ...]] = ("pairs",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    length: float | None = None

    def __post_init__(self) -> None:
        if self.length is not None and not 0 < self.length < math.inf:
            raise InputError(f"length={self.length}", expected="a positive number, or None")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """A zero shift per site."""
        return Interventions({site: Shift(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Decomposed in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            shift = fitted[site]
            assert isinstance(shift, Shift)
            for row, behaviour in enumerate(acts.behaviours):
                apart, weight = _differences(train, site, behaviour)
                direction = reading_vector(apart, weight)
                distance = (weight @ apart / weight.sum() @ direction).abs()
                shift.shifts[row] = direction * (distance if self.length is None else self.length)
        return fitted

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``agreement``: share of the training pairs, by weight, that point along the shift.

        The worst of all sites and behaviours; 1/2 is a direction that says nothing.
        """
        train, worst = acts.where(split="train"), 1.0
        for site in acts.sites:
            shift = fitted[site]
            assert isinstance(shift, Shift)
            for row, behaviour in enumerate(acts.behaviours):
                apart, weight = _differences(train, site, behaviour)
                agreed = (apart @ shift.shifts[row].double() > 0).double()
                worst = min(worst, float(weight @ agreed / weight.sum()))
        return {"agreement": worst}


def _differences(acts: Activations, site: Site, behaviour: str) -> tuple[Tensor, Tensor]:
    """Target less source ``[n, d]`` of each whole pair, and the pairs' weights ``[n]``."""
    source, target, weight = weighted_pairs(acts, site, behaviour)
    if not len(source):
        raise InputError(
            f"behaviour {behaviour!r} has no whole pair in the training part",
            expected="source and target rows that share a pair id",
            remedy="record pairs, or take a method that needs classes only: diffmean",
        )
    return target - source, weight


def reading_vector(apart: Tensor, weight: Tensor) -> Tensor:
    """The unit vector ``[d]`` along which weighted differences ``[n, d]`` are largest, signed.

    >>> reading_vector(torch.tensor([[-2.0, 0], [-2, 0], [5, 0]]), torch.ones(3))[0]
    tensor(-1.)
    """
    direction: Tensor = torch.linalg.svd(apart * weight.sqrt().unsqueeze(1), full_matrices=False)[2]
    direction = direction[0]
    along = apart @ direction
    vote, mean = float(weight @ along.sign()), float(weight @ along)
    return -direction if (vote, mean) < (0.0, 0.0) else direction

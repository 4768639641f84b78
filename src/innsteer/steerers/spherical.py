"""Spherical steering: move a row along the great circle to the behaviour, the more it lacks it."""

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
from innsteer.steerer import Intervention, Interventions, Steerer, side_means, weights


class Sphere(Intervention):
    """h' = h + sum_k (c_k + |h - c_k| u_k(t) - h), with u_k(t) on the great circle to m_k.

    h - c_k is at the angle a from m_k; u_k(t) is the unit vector at (1 - t) a on their arc, kept
    within [0, pi], with t = coef_k shares_k clip((delta - beta) / (1 - beta), 0, 1) and
    delta = -tanh(kappa cos a). A row right opposite to m_k has no arc: it goes straight through
    c_k.

    Args:
        width: d. k: number of behaviours. kappa, beta: of the gate, unitless.

    ``axes`` (m, unit) and ``centres`` (c) are ``[k, d]``, ``shares`` ``[k]`` in [0, 1].
    """

    axes: Tensor
    centres: Tensor
    shares: Tensor

    def __init__(self, width: int, k: int = 1, *, kappa: float = 20.0, beta: float = 0.0) -> None:
        super().__init__()
        self.width, self.kappa, self.beta = width, kappa, beta
        self.register_buffer("axes", torch.zeros(k, width))
        self.register_buffer("centres", torch.zeros(k, width))
        self.register_buffer("shares", torch.zeros(k))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """The sum of the behaviours' moves, each along its own arc."""
        axes, centres, shares = (
            part.to(h.dtype) for part in (self.axes, self.centres, self.shares)
        )
        apart = h.unsqueeze(1) - centres
        along = (apart * axes).sum(-1)
        across = apart - along.unsqueeze(-1) * axes
        width = across.norm(dim=-1)
        radius, angle = torch.hypot(along, width), torch.atan2(width, along)
        share = coef * shares * gate(angle.cos(), self.kappa, self.beta)
        new = (angle * (1 - share)).clamp(0, math.pi)
        # Of what differs, so that a large radius rounds nothing.
        rise, turn = new.cos() - angle.cos(), new.sin() - angle.sin()
        arc = across / width.clamp_min(1e-12).unsqueeze(-1)
        moves = rise.unsqueeze(-1) * axes + turn.unsqueeze(-1) * arc
        moved: Tensor = (radius.unsqueeze(-1) * moves).sum(1)
        return moved


def gate(cosine: Tensor, kappa: float, beta: float) -> Tensor:
    """How far a row lacks the behaviour, in [0, 1], by its cosine with it.

    delta = p(lacks) - p(has) of a softmax over kappa cos for the behaviour's direction and its
    opposite, which is -tanh(kappa cos); 0 up to beta, then linear to 1.

    >>> gate(torch.tensor([-1.0, 0.0, 1.0]), 20.0, -0.5).round(decimals=4)
    tensor([1.0000, 0.3333, 0.0000])
    """
    delta = -torch.tanh(kappa * cosine)
    return ((delta - beta) / (1 - beta)).clamp(0, 1)


@dataclass(frozen=True)
class SphericalSteering(Steerer):
    """Move rows that lack the behaviour along the sphere towards it, and leave the others.

    h' = c + |h - c| u(t);  u(t) at (1 - t) of the angle from m to h - c, on their great circle
    t = strength * alpha * clip((delta - beta) / (1 - beta), 0, 1),
    delta = -tanh(kappa cos(h - c, m)),  m = (mean target - mean source) of unit norm

    The distance from c stays. delta is near 1 for rows on the source's side of c and near -1 on the
    target's; below beta a row stays bit for bit. Strength scales the part of the angle, which never
    passes m; negative ones lead away from m, at most to -m.

    The authors have c = 0 (``centred=False``), alpha 0.7 and beta -0.15 for one 8B model and 0.6
    and 0.4 for another. About 0 the gate tells the sides apart only where their means lie on either
    side of 0 along m; about the middle between the means, as here, it always does. And a fixed part
    of the angle moves rows by many times the distance of the means where they are far from c, until
    a small model breaks; so alpha follows from the rows: source rows then reach the target's mean
    along m on average, as far as alpha <= 1 and the gate let them.

    Closed form, with alpha by bisection; the artifact is 2 d + 1 floats per site and behaviour.
    Pairing does not matter. Several behaviours move the row each, and their displacements are
    summed.

    Attributes:
        alpha: part of the angle at strength 1 where the gate is open, in [0, 1]; None = by the
            rows, as above.
        kappa: how sharply the cosine decides, unitless, > 0.
        beta: delta up to which a row stays, in [-1, 1): -1 moves all rows by the gate's share.
        centred: turn about the middle of the means, else about 0.

    Raises:
        InputError: a field out of its range.

    Reference:
        Spherical Steering: Geometry-Aware Activation Rotation for Language Models (2026),
        https://arxiv.org/abs/2602.08169

    >>> acts = Activations.of_sides(torch.tensor([[-2.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    >>> part = SphericalSteering(alpha=0.5).fit(acts)[acts.site]
    >>> part(torch.tensor([[-1.0, 3**0.5], [1.0, 3**0.5]]), torch.ones(2, 1)).round(decimals=4)
    tensor([[1.0000, 1.7321],
            [1.0000, 1.7321]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.08169"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    alpha: float | None = None
    kappa: float = 20.0
    beta: float = -0.15
    centred: bool = True

    def __post_init__(self) -> None:
        # "not <=" so that NaN is refused too
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha}", expected="0 to 1, or None to fit it")
        if not 0 < self.kappa < math.inf:
            raise InputError(f"kappa={self.kappa}", expected="a positive number")
        if not -1 <= self.beta < 1:
            raise InputError(f"beta={self.beta}", expected="from -1 to below 1")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Moves of share 0."""
        return Interventions(
            {
                site: Sphere(width, k, kappa=self.kappa, beta=self.beta)
                for site, width in widths.items()
            }
        )

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Means and alpha in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, Sphere)
            for row, behaviour in enumerate(acts.behaviours):
                source, target = side_means(train, site, behaviour)
                axis = normalize(target - source, dim=0)
                centre = (source + target) / 2 * self.centred
                part.axes[row], part.centres[row] = axis, centre
                if self.alpha is not None:
                    part.shares[row] = self.alpha
                    continue
                apart = train.sides(site, behaviour)[0].double() - centre
                counts = weights(train, behaviour)[0]
                part.shares[row] = self._share(
                    apart, counts / counts.sum(), axis, (target - centre) @ axis
                )
        return fitted

    def _share(self, apart: Tensor, weight: Tensor, axis: Tensor, goal: Tensor) -> float:
        """The alpha at which rows about the centre have the goal as mean coordinate, at most 1."""
        radius, along = apart.norm(dim=1), apart @ axis
        angle = torch.acos((along / radius.clamp_min(1e-12)).clamp(-1, 1))
        opened = gate(angle.cos(), self.kappa, self.beta)
        low, high = 0.0, 1.0
        for _ in range(50):  # to the last bit of float64
            middle = (low + high) / 2
            reached = weight @ (radius * (angle * (1 - middle * opened)).cos())
            low, high = (low, middle) if reached > goal else (middle, high)
        return high

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``fired``: the share of training source rows that the gate moves, the least of all."""
        train, least = acts.where(split="train"), 1.0
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, Sphere)
            for row, behaviour in enumerate(acts.behaviours):
                apart = train.sides(site, behaviour)[0] - part.centres[row]
                cosine = normalize(apart) @ part.axes[row]
                opened = gate(cosine, self.kappa, self.beta)
                least = min(least, float((opened > 0).double().mean()))
        return {"fired": least}

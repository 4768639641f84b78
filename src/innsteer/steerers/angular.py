"""Angular steering: turn each row within a plane to one angle, keeping its norm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, side_means, weights

Plane = Literal["means", "sites"]


class Turn(Intervention):
    """h' = h + sum_k (R_k - I) P_k h: each behaviour turns what lies in its plane.

    P_k projects on the plane of the orthonormal ``firsts_k`` and ``seconds_k``, R_k turns in it,
    from the first towards the second: by coef_k ``angles_k``, or, if ``absolute``, by coef_k of the
    way from the row's own angle to ``angles_k``, the shorter way round. Norms stay, for one
    behaviour; several turn the same row each and their displacements are summed.

    Args:
        width: d. k: number of behaviours. absolute: see above.
        adaptive: turn only rows with a positive coordinate along ``firsts_k``.

    ``firsts`` and ``seconds`` are ``[k, d]``, ``angles`` ``[k]`` in radians.

    >>> turn = Turn(3)
    >>> turn.firsts[0, 0] = turn.seconds[0, 1] = 1
    >>> turn.angles.fill_(math.pi / 2)
    tensor([1.5708])
    >>> turn(torch.tensor([[3.0, 4.0, 5.0]]), torch.ones(1, 1)).round(decimals=4)
    tensor([[-4.,  3.,  5.]])
    """

    firsts: Tensor
    seconds: Tensor
    angles: Tensor

    def __init__(
        self, width: int, k: int = 1, *, absolute: bool = False, adaptive: bool = False
    ) -> None:
        super().__init__()
        self.width, self.absolute, self.adaptive = width, absolute, adaptive
        self.register_buffer("firsts", torch.zeros(k, width))
        self.register_buffer("seconds", torch.zeros(k, width))
        self.register_buffer("angles", torch.zeros(k))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """sum_k (R_k - I) P_k h, from two products per plane: a d x d projector would round."""
        firsts, seconds, angles = (
            part.to(h.dtype) for part in (self.firsts, self.seconds, self.angles)
        )
        x, y = h @ firsts.mT, h @ seconds.mT
        if self.absolute:
            away = angles - torch.atan2(y, x)
            angles = torch.remainder(away + math.pi, 2 * math.pi) - math.pi
        angles = coef * angles
        if self.adaptive:
            angles = torch.where(x > 0, angles, 0.0)
        # cos - 1, without the cancellation at small angles
        less, sin = -2 * (angles / 2).sin().square(), angles.sin()
        return (less * x - sin * y) @ firsts + (sin * x + less * y) @ seconds


@dataclass(frozen=True)
class AngularSteering(Steerer):
    """Turn what a row has in a plane to one angle, the same for every row.

    h' = h - P h + |P h| (cos(theta) b1 + sin(theta) b2);  P = b1 b1' + b2 b2'

    b1 is the unit difference of means, target less source, so that theta = 0 is most of the
    behaviour that a row's norm allows and 180 degrees the most of its opposite. Norms stay, and so
    does what is outside the plane; inside it every row ends on one ray, whatever it said there,
    which is why small models break. Strength turns that share of the way from the row's own angle,
    the shorter way round: 0 = not at all, 1 = to theta, -1 as far the other way. ``selective``
    turns all rows by one angle instead.

    A turn of the authors' has one plane for all sites: of the sites' unit differences of means the
    one with the highest mean cosine to all, and the first principal component of all of them. A
    recording of one site has no such plane; by default each site's plane is that of its two means
    instead, which a row's common mean lies in too. Its theta follows from the rows: the angle at
    which source rows have the target mean's coordinate along b1 on average, 0 where their norm does
    not suffice. The authors turn the outputs of both norms of every block at all tokens (streams
    ``attention_norm`` and ``mlp_norm``), and sweep theta from 0 to 360 degrees.

    Closed form; the artifact is 2 d + 1 floats per site and behaviour. Pairing does not matter.

    Attributes:
        theta: the angle from b1 towards b2 in degrees; None = by the rows, as above. The sign of b2
            is that of the sides' means, so that theta means the same in other models.
        plane: ``means``: b2 is what the mean of the two means has beside b1. ``sites``: the
            authors', over the recorded sites of the same width.
        adaptive: turn only rows with a positive coordinate along b1, the authors' variant for
            turning a behaviour down.

    Raises:
        InputError: theta is not finite, or (by ``fit``) there is no plane: the two means lie on one
            line through 0, or ``sites`` is asked of fewer than two directions.
        UnknownName: no such plane.

    Reference:
        Vu and Nguyen, Angular Steering: Behavior Control via Rotation in Activation Space (2025),
        https://arxiv.org/abs/2510.26243

    >>> source, target = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[4.0, 5.0, 1.0]])
    >>> part = AngularSteering().fit(acts := Activations.of_sides(source, target))[acts.site]
    >>> part(source, torch.ones(1, 1)).round(decimals=2)
    tensor([[4.0000, 3.1000, 0.6200]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.26243"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    theta: float | None = None
    plane: Plane = "means"
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_turn(self.theta, self.plane)

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """No planes yet: nothing turns."""
        return Interventions(
            {
                site: Turn(width, k, absolute=True, adaptive=self.adaptive)
                for site, width in widths.items()
            }
        )

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Planes in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for row, behaviour in enumerate(acts.behaviours):
            counts = weights(train, behaviour)[0]
            for site, (first, second) in planes(train, behaviour, self.plane).items():
                part = fitted[site]
                assert isinstance(part, Turn)
                part.firsts[row], part.seconds[row] = first, second
                if self.theta is not None:
                    part.angles[row] = math.radians(self.theta)
                    continue
                source, target = side_means(train, site, behaviour)
                rows = train.sides(site, behaviour)[0].double()
                norms = torch.hypot(rows @ first, rows @ second)
                radius = counts @ norms / counts.sum()
                side = torch.where(source @ second < 0, -1, 1)
                part.angles[row] = side * angle_of(target @ first, radius)
        return fitted


def check_turn(theta: float | None, plane: str) -> None:
    """Whether an angle in degrees and a kind of plane can be used."""
    if theta is not None and not math.isfinite(theta):
        raise InputError(f"theta={theta}", expected="degrees, or None to fit it")
    if plane not in get_args(Plane):
        raise UnknownName("plane", plane, get_args(Plane))


def angle_of(coordinate: Tensor, radius: Tensor) -> Tensor:
    """The angle in [0, pi] at which a radius has a coordinate; the nearest where none does.

    >>> angle_of(torch.tensor(1.0), torch.tensor(2.0)) * 180 / math.pi
    tensor(60.)
    """
    return torch.acos((coordinate / radius.clamp_min(1e-12)).clamp(-1, 1))


def planes(acts: Activations, behaviour: str, plane: Plane) -> dict[Site, tuple[Tensor, Tensor]]:
    """The orthonormal b1 and b2 ``[d]`` of a behaviour at every site, in float64.

    Raises:
        InputError: no plane, see ``AngularSteering``.
    """
    means = {site: side_means(acts, site, behaviour) for site in acts.sites}
    found = {}
    for site, (source, target) in means.items():
        if plane == "means":
            first, other = normalize(target - source, dim=0), source + target
        else:
            alike = [pair for pair in means.values() if len(pair[0]) == len(source)]
            first, other = common_plane(torch.stack([normalize(b - a, dim=0) for a, b in alike]))
            mean = torch.stack([a + b for a, b in alike]).sum(0)
            other = other * torch.where(mean @ other < 0, -1, 1)
        second = other - (other @ first) * first
        # What float32 rows cannot resolve is no second direction.
        if not first.any() or second.norm() <= 1e-6 * other.norm():
            raise InputError(
                f"site {site}, behaviour {behaviour!r}: no plane to turn in, plane={plane!r}",
                expected="means of the two sides that differ, not on one line through 0"
                if plane == "means"
                else "two or more sites of one width, with directions of their own",
                remedy="take a method without a plane: diffmean, ace",
            )
        found[site] = first, normalize(second, dim=0)
    return found


def common_plane(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit directions ``[n, d]`` the one most like all, and their first principal component.

    Components ``[d]`` are those about the directions' mean; of one direction it is 0.

    >>> rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 1], [0, 1, 1], [2, 2, 4]]))
    >>> common_plane(rows)[0].round(decimals=2)
    tensor([0.4100, 0.4100, 0.8200])
    """
    first = directions[(directions @ directions.mT).mean(1).argmax()]
    _, spread, right = torch.linalg.svd(directions - directions.mean(0), full_matrices=False)
    return first, torch.where(spread[0] > 1e-9, right[0], 0)

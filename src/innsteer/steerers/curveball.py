"""Curveball: a step between the class means in the coordinates of a kernel PCA."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import ClassVar

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, side_means, weights
from innsteer.steerers.truthflow import ball, scale, within


class Curve(Intervention):
    """h' = h + g(z + coef @ shifts) - g(z),  z = f(h): a step in latent space that h bends.

    f(h) = (k(x, support) - level) @ basis,  k(x, y) = (gamma x.y + coef0)^degree,  x = gain (h - m)
    g(z) = monomials(z) @ decoder, with as many monomials that their products are k(z, z').

    x is shortened to ``reach`` where it is longer. g is in primal form, because in a dual one large
    weights of opposite signs cancel, which float32 does not survive.

    Args:
        width: d. k: number of behaviours; they share f and g. points: rows in the support, n.
        components: of the kernel PCA, r; at most n count. degree, gamma, coef0: of both kernels.

    ``mean``, ``gain`` ``[d]``, ``support`` ``[n, d]``, ``level`` ``[n]``, ``basis`` ``[n, r]``,
    ``decoder`` ``[C(r + degree, degree), d]`` in activation units, ``shifts`` ``[k, r]``.

    Raises:
        InputError: support or decoder would hold more than 2^28 numbers (1 GiB).
    """

    mean: Tensor
    gain: Tensor
    reach: Tensor
    support: Tensor
    level: Tensor
    basis: Tensor
    decoder: Tensor
    shifts: Tensor
    places: Tensor
    factors: Tensor

    def __init__(
        self,
        width: int,
        k: int = 1,
        *,
        points: int,
        components: int,
        degree: int,
        gamma: float,
        coef0: float,
    ) -> None:
        super().__init__()
        r = min(components, points)
        count = math.comb(r + degree, degree)
        # An artifact names these: a small file must not make us build a giant.
        if max(points, count) * width > 2**28:
            raise InputError(
                f"{points} points and {count} monomials of {r} components, width {width}",
                expected="at most 2^28 numbers in either",
                remedy="lower components, degree or points",
            )
        self.width, self.degree, self.gamma, self.coef0 = width, degree, gamma, coef0
        shapes = {"mean": [width], "gain": [width], "reach": [], "support": [points, width]}
        shapes |= {"level": [points], "basis": [points, r]}
        shapes |= {"decoder": [count, width], "shifts": [k, r]}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        # Coordinate 0 stands for the constant. What the numbers above decide is not saved.
        chosen = list(combinations_with_replacement(range(r + 1), degree))
        ways = [
            math.factorial(degree) // math.prod(math.factorial(c.count(i)) for i in set(c))
            for c in chosen
        ]
        self.register_buffer("places", torch.tensor(chosen), persistent=False)
        self.register_buffer("factors", torch.tensor(ways).sqrt(), persistent=False)

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows the support holds."""
        return {"points": len(self.support)}

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """k of all pairs of rows, ``[n, m]``."""
        near: Tensor = self.gamma * x @ y.mT + self.coef0
        return near.pow(self.degree)

    def inner(self, h: Tensor) -> Tensor:
        """Rows ``[n, d]`` as the kernel sees them: standardised, none beyond ``reach``."""
        return within((h - self.mean.to(h.dtype)) * self.gain.to(h.dtype), self.reach)

    def latent(self, h: Tensor) -> Tensor:
        """f: coordinates ``[n, r]``."""
        near = self.kernel(self.inner(h), self.support.to(h.dtype))
        return (near - self.level.to(h.dtype)) @ self.basis.to(h.dtype)

    def monomials(self, z: Tensor) -> Tensor:
        """Features ``[n, count]`` with monomials(z) . monomials(z') = k(z, z')."""
        one = torch.full_like(z[:, :1], math.sqrt(self.coef0))
        whole = torch.cat([one, math.sqrt(self.gamma) * z], -1)
        products: Tensor = whole[:, self.places].prod(-1)
        return products * self.factors.to(z.dtype)

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """g(z + coef @ shifts) - g(z)."""
        z = self.latent(h)
        moved = z + coef @ self.shifts.to(h.dtype)
        return (self.monomials(moved) - self.monomials(z)) @ self.decoder.to(h.dtype)


@dataclass(frozen=True)
class Curveball(Steerer):
    """Step from one class mean to the other in the coordinates of a polynomial kernel PCA.

    h' = h + g(z + strength * v) - g(z),  z = f(h);  v = mean f(target) - mean f(source)

    f is the kernel PCA of the source and target rows of all behaviours, g an approximate way back:
    the ridge regression of the rows on their coordinates, with the same kernel there. What g does
    not restore of h stays as it was, so strength 0 is exactly nothing. f and g are of the kernel's
    degree, so the edit depends on the row, and grows with strength as a polynomial: a
    straight line at ``degree=1`` (with all components and no ridge that is DiffMean), bent
    beyond. Strength 1 is the step from mean to mean; -s does not undo s. Behaviours share f and g,
    and their steps add in z. Closed form, in float64: O(n^3) for n rows in the kernel.

    Rows are standardised by dimension and divided by the root of their mean squared length, so
    that gamma is in units of the data; coordinates are again of mean squared length 1 and go
    into the same kernel. Weights count as numbers of rows. Beyond degree 1 a row farther out
    than 99 of 100 (a single token stands 3 times as far out as the means of answers) is read where
    its ray leaves their ball, in the fit too, else the polynomial would run away with it.

    The paper leaves the scale of the kernel and the way back open. Public re-implementations take
    gamma 1e-3 on standardised rows (at a width of 1,000 that is 1 here), a v of unit norm, whose
    strength is then in latent units, and scikit-learn's way back with one gamma for rows and
    coordinates: there the coordinates' kernel is all but constant, and the ridge of 1e-3 takes the
    edit away.

    Attributes:
        components: coordinates of the kernel PCA, 1 to 4096. The edit lies where they reach:
            ``diagnose`` says how much of the means' gap that is. The way back takes
            C(components + degree, degree) monomials, and minor components make it rough.
        degree: of the kernel, 1 to 4. gamma: its slope, above 0, per mean squared length.
        coef0: its constant, >= 0, which sets the share of lower degrees; 0 leaves the highest only.
        ridge: penalty of the way back, above 0, beside rows of squared length about 1.
        points: most rows in the kernel; of more, that many are drawn by the seed. 2 to 16384.

    Raises:
        InputError: a field out of its range, or (by ``fit``) rows that do not vary.

    Reference:
        Curveball Steering (2026), https://arxiv.org/abs/2603.09313; kernel PCA: Schoelkopf,
        Smola and Mueller, Nonlinear Component Analysis as a Kernel Eigenvalue Problem (1998),
        https://doi.org/10.1162/089976698300017467

    >>> rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0, 0]), paired=False)
    >>> part = Curveball(degree=1, ridge=1e-9).fit(acts)[acts.site]
    >>> bool((part(rows, torch.ones(64, 1)) - rows - torch.tensor([2.0, 0, 0])).abs().max() < 1e-4)
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2603.09313"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    components: int = 8
    degree: int = 2
    gamma: float = 1.0
    coef0: float = 1.0
    ridge: float = 1e-3
    points: int = 2048

    def __post_init__(self) -> None:
        ranges = {"components": (1, 4096), "degree": (1, 4), "points": (2, 16384)}
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"{least} to {most}")
        for name in ("gamma", "ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}", expected="a positive number")
        if not 0 <= self.coef0 < math.inf:
            raise InputError(f"coef0={self.coef0}", expected=">= 0")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Empty kernels: no edit."""
        return Interventions(
            {
                site: self._part(width, k, sizes.get(f"{site}.points", self.points))
                for site, width in widths.items()
            }
        )

    def _part(self, width: int, k: int, points: int) -> Curve:
        if not 1 <= points <= self.points:
            raise InputError(f"a support of {points} rows", expected=f"1 to {self.points}")
        return Curve(
            width,
            k,
            points=points,
            components=self.components,
            degree=self.degree,
            gamma=self.gamma,
            coef0=self.coef0,
        )

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Solved in float64, stored in float32; the seed draws the support of very many rows."""
        train = acts.where(split="train")
        return Interventions({site: self._fit_one(train, site, seed) for site in acts.sites})

    def _fit_one(self, train: Activations, site: Site, seed: int) -> Curve:
        """f, g and the behaviours' steps."""
        sides = [train.sides(site, name) for name in train.behaviours]
        rows = torch.cat([part.double() for pair in sides for part in pair])
        weight = torch.cat([part for name in train.behaviours for part in weights(train, name)])
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        chosen = drawn[: self.points].sort().values
        rows, weight = rows[chosen], weight[chosen]
        part = self._part(train.widths[site], len(train.behaviours), len(rows))
        mean, std = scale(rows, weight)
        part.mean.copy_(mean)
        # Dimensions that vary have variance 1 now, so their number is the mean squared length.
        live = std > 0
        part.gain.copy_(torch.where(live, 1 / std, 0) / live.sum().clamp_min(1).sqrt())
        part.reach.fill_(torch.finfo(part.reach.dtype).max)
        if self.degree > 1:  # a straight line does not run away
            part.reach.copy_(ball(part.inner(rows), weight))
        part.support.copy_(part.inner(rows))
        self._set_coordinates(part, part.support.double(), weight, site)
        self._set_way_back(part, rows, weight)
        for row, name in enumerate(train.behaviours):
            source, target = side_means(
                train, site, name, through=lambda rows: part.latent(rows.double())
            )
            part.shifts[row] = target - source
        return part

    def _set_coordinates(self, part: Curve, x: Tensor, weight: Tensor, site: Site) -> None:
        """Kernel PCA of the support."""
        near, share = part.kernel(x, x), weight / weight.sum()
        level = near @ share
        centred = near - level - level.unsqueeze(1) + share @ level
        root = share.sqrt()
        values, vectors = torch.linalg.eigh(root * centred * root.unsqueeze(1))
        values, vectors = values.flip(0)[: part.basis.shape[1]], vectors.flip(1)
        # Beside the first one, rounding cannot tell less from nothing.
        live = values > 1e-10 * values[0].clamp_min(1e-10)
        if not live.any():
            raise InputError(
                f"site {site}: {len(x)} rows that do not vary", expected="rows that differ"
            )
        unit = root.unsqueeze(1) * vectors[:, : len(values)]
        basis = torch.where(live, unit / values.clamp_min(1e-30).sqrt(), 0)
        part.level.copy_(level)
        # The coordinates' variances are the eigenvalues.
        part.basis.copy_(basis / values[live].sum().sqrt())

    def _set_way_back(self, part: Curve, rows: Tensor, weight: Tensor) -> None:
        """Ridge regression of standardised rows on the monomials of their coordinates."""
        features = part.monomials(part.latent(rows))
        gram = (features.mT * weight) @ features
        gram.diagonal().add_(self.ridge)
        inner = part.inner(rows)
        solved = torch.linalg.solve(gram, (features.mT * weight) @ inner)
        gain = part.gain.double()
        part.decoder.copy_(solved * torch.where(gain > 0, 1 / gain, 0))

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``reached``: the least share of the gap of two sides' means that strength 1 covers.

        Of training rows, along the gap: 1 = all of it; near 0 where the components, or the way
        back, do not hold the difference.
        """
        train, least = acts.where(split="train"), math.inf
        for site, part in fitted.items():
            for row, name in enumerate(acts.behaviours):
                coef = torch.eye(len(acts.behaviours))[row]

                def moved(rows: Tensor, part: Intervention = part, coef: Tensor = coef) -> Tensor:
                    edited: Tensor = part(rows, coef.expand(len(rows), -1))
                    return edited.double()

                source, target = side_means(train, site, name)
                end, _ = side_means(train, site, name, through=moved)
                gap = target - source
                least = min(least, float((end - source) @ gap / (gap @ gap).clamp_min(1e-30)))
        return {"reached": least}

"""ODESteer: follow the unit gradient of a classifier's log-odds on polynomial sketches of rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, side_means, weights

# Rows at a time when a fit sketches them: 8000 complex numbers each.
CHUNK = 512
# Up to here a Newton step's system of equations is small; beyond it L-BFGS is quicker.
NEWTON = 2048


class SketchField(Intervention):
    """h' = h + sum_k (x_k(coef_k T_k) - h);  dx_k/dt = v_k(x_k),  x_k(0) = h;  by Euler steps.

    v_k is the unit gradient of log-odds w_k . phi(x) + b_k, and phi a count sketch of all monomials
    up to ``degree`` of u = [sqrt(gamma) x/|x|, sqrt(coef0)]: the circular convolution of ``degree``
    sketches of u, so phi(x) . phi(y) is about (gamma cos(x, y) + coef0)^degree. A sketch adds
    coordinate i with the sign ``signs[e, i]`` to the bucket ``buckets[e, i]``.

    The gradient is written out, so it needs no autograd: of w . (a * b), by b, it is the
    correlation of w with a, read back through the second sketch. About 5 FFTs of ``components``
    numbers per row, behaviour and step, and as many numbers of memory at a time.

    Args:
        width: d. k: number of behaviours; they share the sketch, and each has its own classifier.
        components: buckets m. degree: of the polynomial. steps: of Euler's rule.
        gamma, coef0: of the polynomial kernel. normalise: x/|x|, else x itself.

    ``times`` ``[k]`` is T in activation units, the length of the path at strength 1.

    Raises:
        InputError: the classifiers would hold more than 2^28 numbers (1 GiB).
    """

    buckets: Tensor
    signs: Tensor
    weight: Tensor
    bias: Tensor
    times: Tensor

    def __init__(
        self,
        width: int,
        k: int = 1,
        *,
        components: int = 8000,
        degree: int = 2,
        steps: int = 10,
        gamma: float = 0.1,
        coef0: float = 1.0,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        # An artifact names k and components: a small file must not make us build a giant.
        if k * components > 2**28:
            raise InputError(
                f"{k} classifiers on {components} components",
                expected="at most 2^28 numbers",
                remedy="fit fewer behaviours at once, or lower components",
            )
        self.width, self.components, self.steps = width, components, steps
        self.gamma, self.coef0, self.normalise = gamma, coef0, normalise
        self.register_buffer("buckets", torch.zeros(degree, width + 1, dtype=torch.int64))
        self.register_buffer("signs", torch.ones(degree, width + 1, dtype=torch.int8))
        self.register_buffer("weight", torch.zeros(k, components))
        self.register_buffer("bias", torch.zeros(k))
        self.register_buffer("times", torch.zeros(k))

    def features(self, h: Tensor) -> Tensor:
        """phi of rows ``[..., d]``: ``[..., components]``."""
        phi: Tensor = torch.fft.irfft(math.prod(self._spectra(h)), n=self.components)
        return phi

    def log_odds(self, h: Tensor) -> Tensor:
        """Log-odds of target over source by each behaviour's classifier, ``[n, k]``."""
        return self.features(h) @ self.weight.to(h.dtype).mT + self.bias.to(h.dtype)

    def field(self, x: Tensor) -> Tensor:
        """Unit gradients ``[k, n, d]`` of each behaviour's log-odds at its own rows ``[k, n, d]``.

        Zero where the gradient is zero.
        """
        spectra = self._spectra(x)
        weight = torch.fft.rfft(self.weight.to(x.dtype)).unsqueeze(1)
        gradient = torch.zeros_like(x)
        for e, (buckets, signs) in enumerate(zip(self.buckets, self.signs, strict=True)):
            others = math.prod(spectra[:e] + spectra[e + 1 :])
            # A conjugate spectrum makes the convolution a correlation; degree 1 has no others.
            pulled = weight * (others.conj() if isinstance(others, Tensor) else others)
            by_bucket = torch.fft.irfft(pulled, n=self.components)
            gradient = gradient + (by_bucket[..., buckets] * signs.to(x.dtype))[..., :-1]
        if self.normalise:
            # The chain rule through x/|x|: what is left is tangential. Its factor sqrt(gamma)/|x|
            # goes with the norm.
            unit = _unit(x)
            gradient = gradient - (gradient * unit).sum(-1, keepdim=True) * unit
        return _unit(gradient)

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """Sum of the behaviours' paths, each from h, of length |coef| T in ``steps`` steps."""
        moved = h.new_zeros(len(self.times), *h.shape)
        if not len(h):  # not every FFT library takes no rows
            return moved.sum(0)
        step = (coef * self.times.to(h.dtype) / self.steps).mT.unsqueeze(-1)
        for _ in range(self.steps):
            # The path alone is summed up: beside a massive dimension, x would round it.
            moved = moved + step * self.field(h + moved)
        return moved.sum(0)

    def _spectra(self, x: Tensor) -> list[Tensor]:
        """The spectrum of each of the ``degree`` sketches of u."""
        scaled = math.sqrt(self.gamma) * (_unit(x) if self.normalise else x)
        constant = torch.full_like(x[..., :1], math.sqrt(self.coef0))
        u = torch.cat([scaled, constant], -1)
        empty = torch.zeros(*x.shape[:-1], self.components, dtype=x.dtype, device=x.device)
        return [
            torch.fft.rfft(empty.index_add(-1, buckets, u * signs.to(x.dtype)))
            for buckets, signs in zip(self.buckets, self.signs, strict=True)
        ]


@dataclass(frozen=True)
class ODESteer(Steerer):
    """Follow, in small steps, the gradient of the log density ratio of target over source.

    dx/dt = v(x),  v = grad l / |grad l|,  l(x) = w . phi(x/|x|) + b;  h' = x(strength * T), x(0)=h

    l is a logistic regression on polynomial count-sketch features of the row's direction: an
    estimate of log p_target(x)/p_source(x), up to a constant. The gradient is tangential, so to
    first order a row keeps its norm. Steps adapt to where the row has come to; with ``steps=1`` it
    is one straight step (the paper's single-step variant). Closed form but for the regression,
    which is convex; needs no pairs.

    Strength scales the length of the path: the map of strength s is the one that a T s times as
    long would give; negative strengths go down the gradient, and -s undoes s up to the error of the
    steps. Several behaviours follow a path each, from the same row, and their displacements are
    summed. Row weights count in the regression and in the default T. The artifact has
    ``components`` floats per behaviour and 9 * degree * (d + 1) bytes of sketch per site; a fit
    holds ``components`` float64 per row. With ``degree=1, normalise=False`` it adds T times the
    unit direction of a logistic regression, whatever the steps.

    Attributes:
        T: length of the path at strength 1, in activation units; None = the distance of the sides'
            means, per site and behaviour. The authors give 5 for one 8B model; other models' rows
            have other norms.
        steps: Euler steps, each of length |strength| * T / steps. 1 to 1000.
        components: buckets of the sketch. degree: of the polynomial, 1 to 4.
        gamma, coef0: the features approximate the kernel (gamma cos + coef0)^degree; gamma > 0.
        normalise: see the row's direction only, else the row itself.
        C: inverse strength of the regression's L2 penalty, > 0. Rows are few beside ``components``,
            so it matters.

    Reference:
        Zhao et al., ODESteer (2026), https://arxiv.org/abs/2602.17560; tensor sketch: Pham and
        Pagh, Fast and scalable polynomial kernels via explicit feature maps (2013),
        https://doi.org/10.1145/2487575.2487591

    >>> draw = torch.Generator().manual_seed(0)
    >>> source, target = torch.randn(2, 40, 4, generator=draw) + torch.eye(4)[:2, None] * 5
    >>> acts = Activations.of_sides(source, target)
    >>> part = ODESteer(components=256).fit(acts)[acts.site]
    >>> moved = part(source, torch.ones(40, 1))
    >>> bool((moved - target.mean(0)).norm(dim=-1).mean() < 3)  # about 7 before
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.17560"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    T: float | None = None
    steps: int = 10
    components: int = 8000
    degree: int = 2
    gamma: float = 0.1
    coef0: float = 1.0
    normalise: bool = True
    C: float = 1.0

    def __post_init__(self) -> None:
        # An artifact names these too: a hostile one must not make us build a giant.
        for name, most in {"steps": 1000, "components": 1_000_000, "degree": 4}.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"1 to {most}")
        for name in ("gamma", "C", "T"):
            value = getattr(self, name)
            if not (name == "T" and value is None) and not 0 < value < math.inf:
                raise InputError(f"{name}={value}", expected="a positive number")
        if not 0 <= self.coef0 < math.inf:
            raise InputError(f"coef0={self.coef0}", expected=">= 0")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Empty sketches and classifiers: paths of length 0."""
        return Interventions({site: self._part(width, k) for site, width in widths.items()})

    def _part(self, width: int, k: int) -> SketchField:
        return SketchField(
            width,
            k,
            components=self.components,
            degree=self.degree,
            steps=self.steps,
            gamma=self.gamma,
            coef0=self.coef0,
            normalise=self.normalise,
        )

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Draw the sketch by the seed, and fit each behaviour's classifier in float64."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, SketchField)
            draw = torch.Generator().manual_seed(seed)
            shape = part.buckets.shape
            part.buckets.copy_(torch.randint(self.components, shape, generator=draw))
            part.signs.copy_(2 * torch.randint(2, shape, generator=draw) - 1)
            for row, behaviour in enumerate(acts.behaviours):
                self.fit_classifier(
                    part, row, *train.sides(site, behaviour), *weights(train, behaviour)
                )
                source, target = side_means(train, site, behaviour)
                part.times[row] = (target - source).norm() if self.T is None else self.T
        return fitted

    def fit_classifier(
        self,
        part: SketchField,
        row: int,
        source: Tensor,
        target: Tensor,
        source_weight: Tensor,
        target_weight: Tensor,
    ) -> None:
        """Set a behaviour's classifier, given the sketch: rows ``[n, d]`` with weights ``[n]``."""
        rows = torch.cat([source, target]).double()
        features = torch.cat([part.features(chunk) for chunk in torch.split(rows, CHUNK)])
        is_target = torch.arange(len(rows)) >= len(source)
        weight, bias = logistic(
            features, is_target, torch.cat([source_weight, target_weight]), self.C
        )
        part.weight[row], part.bias[row] = weight, bias

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``accuracy``: share of training rows on their side of a classifier, the worst side."""
        train, worst = acts.where(split="train"), 1.0
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, SketchField)
            for row, behaviour in enumerate(acts.behaviours):
                for side, sign in zip(train.sides(site, behaviour), (-1, 1), strict=True):
                    odds = torch.cat([part.log_odds(rows) for rows in torch.split(side, CHUNK)])
                    worst = min(worst, float((sign * odds[:, row] > 0).double().mean()))
        return {"accuracy": worst}


def _unit(x: Tensor) -> Tensor:
    """x / |x|; zeros stay zeros. The floor is far below any row or gradient that says something."""
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-12)


def logistic(
    features: Tensor, is_target: Tensor, weight: Tensor, C: float
) -> tuple[Tensor, Tensor]:
    """L2-penalised logistic regression: coefficients ``[m]`` and intercept, in float64.

    Args:
        features: ``[n, m]``, float64. is_target: ``[n]``, booleans of both kinds.
        weight: ``[n]``, each row counts as that many. C: inverse strength of the penalty, > 0.

    With fewer rows than features it is solved within the rows' span, where the solution lies: the
    penalty sees no other part.
    """
    from sklearn.linear_model import LogisticRegression

    basis, within = torch.empty(0), features
    if len(features) < features.shape[1]:
        basis, upper = torch.linalg.qr(features.mT)
        within = upper.mT
    solver = "newton-cholesky" if within.shape[1] <= NEWTON else "lbfgs"
    model = LogisticRegression(C=C, solver=solver, tol=1e-9, max_iter=1000)
    model.fit(within.numpy(), is_target.numpy(), sample_weight=weight.numpy())
    coef = torch.from_numpy(model.coef_[0])
    return (basis @ coef if len(basis) else coef), torch.from_numpy(model.intercept_)[0]

"""TruthFlow: a rectified flow makes each row's own correction out of the row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.readouts import Aims, aims
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, weights
from innsteer.steerers.linear_act import percentile
from innsteer.training import Lessons, teach

# Cosines of the time that every layer sees.
TIMES = 8
# No level of the network is narrower than this, unless the rows are.
NARROWEST = 16


class Velocity(Intervention):
    """u(x, t) = (2t - 1) / ((1 - t)^2 + t^2) x + net(x, t): the step x' = x + u of unit time.

    ``coef`` ``[n, 1]`` is the time t in [0, 1], so that a velocity is taught like any other map.
    The first term is the exact velocity between two independent standard Gaussians; the network, a
    UNet of linear layers whose levels halve the width, starts at 0 and learns what is beyond it.

    Args:
        width: d. levels: halvings, at least 1.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.width = width
        sizes = [max(width >> level, min(width, NARROWEST)) for level in range(levels + 1)]
        self.down = nn.ModuleList(_linear(a + TIMES, b) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(_linear(a + b + TIMES, a) for a, b in pairwise(sizes))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """u of rows ``[n, d]`` at their times."""
        waves = torch.arange(1, TIMES + 1, dtype=h.dtype, device=h.device)
        time = torch.cos(math.pi * coef * waves)
        x, kept = h, []
        for layer in self.down:
            kept.append(x)
            x = nn.functional.silu(layer(torch.cat([x, time], -1)))
        for level, layer in reversed(list(enumerate(self.up))):
            x = layer(torch.cat([x, kept[level], time], -1))
            x = nn.functional.silu(x) if level else x
        return (2 * coef - 1) / ((1 - coef).square() + coef.square()) * h + x

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Start all layers but the last at random, with the usual U(-1, 1) / sqrt(inputs)."""
        for layer in [*self.down, *list(self.up)[1:]]:
            assert isinstance(layer, nn.Linear)
            edge = 1 / math.sqrt(layer.in_features)
            for tensor in (layer.weight, layer.bias):
                nn.init.uniform_(tensor, -edge, edge, generator=generator)


class Corrected(Intervention):
    """h' = h + sum_k coef_k P_k c_k(h);  c = lift_mean + lift_std * x(1),  dx/dt = u_k(x, t).

    x(0) = gain * (h - mean), the standardised row, shortened to ``reach`` where it is longer; P
    projects on the rows of ``directions``. Midpoint rule: two velocities of each behaviour per
    step.

    Args:
        width: d. k: number of behaviours. rank: directions kept. levels: of the network.
        steps: of the midpoint rule.

    ``mean``, ``lift_mean``, ``lift_std`` ``[k, d]`` are in activation units, ``gain`` ``[k, d]`` in
    their inverse, ``reach`` ``[k]`` is unitless; ``directions`` ``[k, min(rank, d), d]`` is
    orthonormal, or has rows of zeros.

    Raises:
        InputError: the networks would hold more than 2^30 numbers (4 GiB).
    """

    mean: Tensor
    gain: Tensor
    reach: Tensor
    lift_mean: Tensor
    lift_std: Tensor
    directions: Tensor

    def __init__(self, width: int, k: int, *, rank: int, levels: int, steps: int) -> None:
        super().__init__()
        # An artifact names k: a small file must not make us build a giant. Three d^2 hold the
        # levels' geometric sum.
        if 3 * k * width * width > 2**30:
            raise InputError(
                f"{k} networks of width {width}",
                expected="at most 2^30 numbers in them",
                remedy="fit fewer behaviours at once",
            )
        self.width, self.steps = width, steps
        for name in ("mean", "gain", "lift_mean", "lift_std"):
            self.register_buffer(name, torch.zeros(k, width))
        self.register_buffer("reach", torch.zeros(k))
        self.register_buffer("directions", torch.zeros(k, min(rank, width), width))
        self.velocities = nn.ModuleList(Velocity(width, levels) for _ in range(k))

    def corrections(self, h: Tensor) -> Tensor:
        """Each behaviour's correction of rows ``[n, d]``, projected: ``[k, n, d]``."""
        found = []
        for row, velocity in enumerate(self.velocities):
            assert isinstance(velocity, Velocity)
            x = (h - self.mean[row].to(h.dtype)) * self.gain[row].to(h.dtype)
            x = within(x, self.reach[row])
            for step in range(self.steps):
                time = torch.full_like(h[:, :1], step / self.steps)
                half = x + velocity.displacement(x, time) / (2 * self.steps)
                middle = time + 1 / (2 * self.steps)
                x = x + velocity.displacement(half, middle) / self.steps
            lift = self.lift_mean[row].to(h.dtype) + self.lift_std[row].to(h.dtype) * x
            kept = self.directions[row].to(h.dtype)
            found.append(lift @ kept.mT @ kept)
        return torch.stack(found)

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """Sum of the behaviours' corrections."""
        return torch.einsum("nk,knd->nd", coef, self.corrections(h))


@dataclass(frozen=True)
class TruthFlow(Steerer):
    """Let a flow turn the row into its own correction, and keep the corrections' main directions.

    h' = h + strength * P x(1);  dx/dt = u(x, t),  x(0) = h;  u minimises
    E |u((1 - t) h + t c, t) - (c - h)|^2,  c = target - source of a pair,  h its source row

    A rectified flow: one straight line from every source row to its correction, and a velocity that
    knows only where on its way a row is and when. P projects on the ``rank`` first right singular
    vectors of all corrections, which are not centred: their mean is in it. Each behaviour has its
    own network, and they are added. Strength 1 adds the correction once; the authors' alpha of 1.5
    is a strength of 1.5. -s adds it negated, it does not undo s.

    The paper starts from the *question's* last token, corrects by the mean row of its right
    answers' tokens less that of the wrong ones', once per question. A contrast has the second (open
    answers are recorded as the mean of their tokens), but not the first: its pairs' source row
    stands for the question's. What it says of the answer is then in c too, with the other sign, and
    the flow learns to take it back. The map reads every steered token for itself, so it
    corrects anew at each. A single token stands farther out than the means of answers, 3 times as
    far on a small model, and a correction there would be as much larger: a row farther out
    than 99 of 100 source rows (by the standardised distance from their mean) is read where its ray
    leaves their ball.

    A flow carries one distribution into the other: where a row does not tell its correction, it
    gets a random looking one of the usual size, not their mean. ``diagnose`` says how much of
    held-out corrections is foretold.

    Both ends are standardised by dimension before the flow, weighted; their code
    (a public copy: https://github.com/ilatims-b/Viveka, Mod_TruthFlow) has batch normalisation in
    the network instead, and trains at AdamW 1e-4 with a warm-up in batches of
    136 on all pairs. Here the network is a plain UNet of as many levels, and the trainer that all
    methods share holds pairs out and keeps the best epoch: some hundred pairs are few beside about
    2.7 d^2 weights (4 bytes each, per site and behaviour; 0.9 million at d = 576). Each pair is
    shown at ``times`` moments, drawn once, where the authors draw one in every epoch.

    Attributes:
        rank: singular directions kept, at least 1; d or more keeps everything.
        levels: halvings of the width in the network, 1 to 16.
        steps: of the midpoint rule, 1 to 1000; two evaluations of the network each, per token.
        times: moments at which a pair is shown, 1 to 1000, one in each of as many equal parts.
        epochs, batch, learning_rate: of AdamW, with cosine decay to 0.

    Raises:
        InputError: a number out of range, or (by ``fit``) fewer than two pairs.

    Reference:
        Wang et al., TruthFlow: Truthful LLM Generation via Representation Flow Correction (2025),
        https://arxiv.org/abs/2502.04556; rectified flow: Liu et al., Flow Straight and Fast (2022),
        https://arxiv.org/abs/2209.03003

    >>> rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0, 0, 0, 0, 0]))
    >>> part = TruthFlow(epochs=2).fit(acts)[acts.site]
    >>> (part(rows, torch.ones(64, 1)) - rows)[0].round(decimals=3).abs()
    tensor([2., 0., 0., 0., 0., 0.])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.04556"
    needs: ClassVar[tuple[str, ...]] = ("pairs",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    rank: int = 20
    levels: int = 4
    steps: int = 8
    times: int = 16
    epochs: int = 40
    batch: int = 136
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        most = {"rank": 1_000_000, "levels": 16, "steps": 1000, "times": 1000}
        most |= {"epochs": 1_000_000, "batch": 1_000_000}
        for name, bound in most.items():
            if not 1 <= getattr(self, name) <= bound:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"1 to {bound}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate={self.learning_rate}", expected="a positive number")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes: no correction at all."""
        return Interventions(
            {
                site: Corrected(width, k, rank=self.rank, levels=self.levels, steps=self.steps)
                for site, width in widths.items()
            }
        ).requires_grad_(False)

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Means, spreads and directions in float64; then a velocity per site and behaviour."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        for number, (site, part) in enumerate(fitted.items()):
            assert isinstance(part, Corrected)
            for row, behaviour in enumerate(acts.behaviours):
                draw = torch.Generator().manual_seed((seed * 1009 + number) * 1009 + row)
                weights(acts.where(split="train"), behaviour)  # refuses those not above 0
                own = aims(acts, site, behaviour)
                if len(own.rows) < 2:
                    raise InputError(
                        f"one pair of behaviour {behaviour!r}", expected="at least two to learn of"
                    )
                velocity = part.velocities[row]
                assert isinstance(velocity, Velocity)
                velocity.draw(draw)
                teach(
                    velocity.requires_grad_(True),
                    self._ways(*_prepare(part, row, own), own.weight, draw),
                    epochs=self.epochs,
                    batch=self.batch,
                    learning_rate=self.learning_rate,
                    seed=seed,
                )
        return fitted.requires_grad_(False)

    def _ways(self, start: Tensor, end: Tensor, weight: Tensor, draw: torch.Generator) -> Lessons:
        """Where each pair is at its moments, and a unit of time further on."""
        n, parts = len(start), self.times
        moment = (torch.arange(parts) + torch.rand(n, parts, generator=draw)) / parts
        time = moment.view(-1, 1)
        start, end = (rows.float().repeat_interleave(parts, 0) for rows in (start, end))
        here = torch.lerp(start, end, time)
        share = (weight / weight.mean()).float().repeat_interleave(parts)
        pair = torch.arange(n).repeat_interleave(parts)
        return Lessons(here, here + end - start, time, share, pair)

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``foretold``: the worst behaviour's share of its projected corrections, about their mean.

        1 - error / variance on validation pairs, or without them on the fitted ones
        (``held_out`` 0): 1 = each row gets its own correction, 0 = no better than their mean,
        below 0 = worse, as of a flow that has nothing to go by.
        """
        split = "validation" if len(acts.where(split="validation")) else "train"
        worst = 1.0
        for site, part in fitted.items():
            assert isinstance(part, Corrected)
            for row, behaviour in enumerate(acts.behaviours):
                own = aims(acts, site, behaviour, split)
                if len(own.rows):
                    kept = part.directions[row].double()
                    wanted = own.lifts @ kept.mT @ kept
                    made = part.corrections((own.rows - own.lifts / 2).float())[row].double()
                    mean = part.lift_mean[row].double() @ kept.mT @ kept
                    missed, spread, whole = (
                        float(own.weight @ (wanted - guess).square().sum(-1))
                        for guess in (made, mean, 0)
                    )
                    # Of corrections that are all alike there is nothing to tell.
                    if spread > 1e-9 * whole:
                        worst = min(worst, 1 - missed / spread)
        return {"foretold": worst, "held_out": float(split == "validation")}


def within(rows: Tensor, reach: Tensor) -> Tensor:
    """Rows ``[n, d]``, shortened to the length ``reach`` where they are longer.

    >>> within(torch.tensor([[0.0, 1.0], [6.0, 8.0]]), torch.tensor(5.0))
    tensor([[0., 1.],
            [3., 4.]])
    """
    length = rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    near: Tensor = rows * (reach.to(rows.dtype) / length).clamp_max(1)
    return near


def ball(rows: Tensor, weight: Tensor) -> Tensor:
    """The length that 99 of 100 rows ``[n, d]`` stay within; weights ``[n]`` count rows.

    >>> ball(torch.tensor([[3.0], [4.0], [90.0]]), torch.tensor([5.0, 5.0, 1e-9])).item()
    4.0
    """
    length, order = rows.norm(dim=-1, keepdim=True).sort(0)
    mass = weight[order.squeeze(1)]
    return percentile(length, (mass / mass.sum()).unsqueeze(1), float(mass.sum()), 0.99)[0]


def _prepare(part: Corrected, row: int, own: Aims) -> tuple[Tensor, Tensor]:
    """Set a behaviour's scales and directions; its standardised source rows and corrections."""
    source = own.rows - own.lifts / 2
    mean, std = scale(source, own.weight)
    lift_mean, lift_std = scale(own.lifts, own.weight)
    gain, lift_gain = (torch.where(each > 0, 1 / each, 0) for each in (std, lift_std))
    weighted = own.weight.sqrt().unsqueeze(1) * own.lifts
    main = torch.linalg.svd(weighted, full_matrices=False).Vh[: len(part.directions[row])]
    part.mean[row], part.gain[row] = mean, gain
    part.lift_mean[row], part.lift_std[row] = lift_mean, lift_std
    part.directions[row, : len(main)] = main
    start = (source - mean) * gain
    part.reach[row] = ball(start, own.weight)
    return start, (own.lifts - lift_mean) * lift_gain


def scale(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation by dimension; 0 where float32 could not tell it."""
    share = weight / weight.sum()
    mean = share @ rows
    std = (share @ (rows - mean).square()).sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 0)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer of zeros."""
    # By way of "meta": the constructor's own draws would advance the global generator.
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    for tensor in layer.parameters():
        nn.init.zeros_(tensor)
    return layer

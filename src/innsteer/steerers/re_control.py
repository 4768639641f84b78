"""RE-Control: climb a learnt value of the row by gradient steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.batches import rows_by_weight
from innsteer.errors import InputError
from innsteer.flows import Standardise
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, side_means, weights

# Share of the usual spread that V's first layer starts with: from a full one, V's gradient would
# stay mostly what was drawn, and the climb would leave the rows without coming near the target.
START = 0.1
# Corrections of the step size: it enters the length of a climb nearly in proportion.
CORRECTIONS = 8


class Climb(Intervention):
    """h' = h + std * (z_n - z_0);  z_{i+1} = z_i + sum_k coef_k rates_k dV_k/dz (z_i).

    z_0 = (h - mean) / std, n steps, and V_k(z) = outer_k . relu(inner_k z + bias_k) + level_k. The
    gradient is written out, so it needs no autograd: the units that are on, read back.

    Args:
        width: d. k: number of behaviours. hidden: units of each value. steps: n.

    ``inner`` ``[k, hidden, d]``, ``bias``, ``outer`` ``[k, hidden]``, ``level`` ``[k]``: unitless,
    on standardised rows. ``rates`` ``[k]``: the size of a step at strength 1.

    Raises:
        InputError: the values would hold more than 2^30 numbers (4 GiB).
    """

    mean: Tensor
    std: Tensor
    rates: Tensor

    def __init__(self, width: int, k: int = 1, *, hidden: int = 512, steps: int = 30) -> None:
        super().__init__()
        # An artifact names these: a small file must not make us build a giant.
        if k * hidden * width > 2**30:
            raise InputError(
                f"{k} values of {hidden} units on rows of width {width}",
                expected="at most 2^30 numbers in them",
                remedy="fit fewer behaviours at once, or lower hidden",
            )
        self.width, self.steps = width, steps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("rates", torch.zeros(k))
        self.inner = nn.Parameter(torch.zeros(k, hidden, width))
        self.bias = nn.Parameter(torch.zeros(k, hidden))
        self.outer = nn.Parameter(torch.zeros(k, hidden))
        self.level = nn.Parameter(torch.zeros(k))

    def values(self, h: Tensor) -> Tensor:
        """Each behaviour's value of rows ``[n, d]``: ``[n, k]``, about 0 at source, 1 at target."""
        units = torch.relu(self._reads(self._standard(h))).view(len(h), *self.outer.shape)
        values: Tensor = (units * self.outer.to(h.dtype)).sum(-1) + self.level.to(h.dtype)
        return values

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """Steps up the sum of the values, each weighed by its strength."""
        z, inner = self._standard(h), self.inner.to(h.dtype).flatten(0, 1)
        rates = (coef * self.rates.to(h.dtype)).unsqueeze(-1)
        push = (rates * self.outer.to(h.dtype)).flatten(1)
        moved = torch.zeros_like(z)
        for _ in range(self.steps):
            # The path alone is summed up: beside a massive dimension, z would round it.
            on = self._reads(z + moved) > 0
            moved = moved + torch.where(on, push, 0) @ inner
        return moved * self.std.to(h.dtype)

    def _standard(self, h: Tensor) -> Tensor:
        return (h - self.mean.to(h.dtype)) / self.std.to(h.dtype)

    def _reads(self, z: Tensor) -> Tensor:
        """What goes into the units of all values ``[n, k * hidden]``."""
        inner, bias = self.inner.to(z.dtype), self.bias.to(z.dtype)
        return nn.functional.linear(z, inner.flatten(0, 1), bias.flatten())


@dataclass(frozen=True)
class REControl(Steerer):
    """Learn a value of rows, higher at the target, and climb it by gradient steps.

    z <- z + strength * rate * dV/dz (z),  ``steps`` times from z = (h - mean) / std

    V is a network with one hidden layer of ReLUs (the public code has one or two, by revision), an
    estimate of the reward that an answer will end with. A contrast has no reward, so its sides
    stand for one: 1 at the end of a target answer, 0 at the end of a source answer. The loss is the
    authors': (V(last row) - reward)^2, and (V(row) - V(next row))^2, trained at both, for rows of
    one answer that follow each other. With one row per answer, as ``mean`` and ``last`` record
    them, it is a regression on the side; ``read="all"`` gives the rows in between.

    Strength scales the steps: negative ones go down, and -s undoes s only where V is linear. Of
    several behaviours the weighed sum of values is climbed. hidden * (d + 2) + 1 floats per site
    and behaviour, and 2 * steps * hidden * d multiplications per row.

    Differences from the authors' code: there the row is the last, normed hidden state; here that of
    any site, so rows are standardised, and the steps are taken in these units. By default the rate
    is not their 1.0 but fitted, because V's slope differs by site. V starts from small weights and
    decays them, or its gradient would be mostly what was drawn. Their end of an answer is by
    mistake its first token; here it is the last.

    Attributes:
        rate: size of a step at strength 1; None = such that source rows move on average, in
            standardised units, as far as the means of the sides are apart.
        steps: how many, 1 to 1000.
        hidden: units of V, 1 to 65536; the authors take 4096 at d = 4096.
        epochs, batch, learning_rate, weight_decay: AdamW on rows; the rate decays to 0.

    Raises:
        InputError: a number out of range, or (by ``fit``) a behaviour without one of its sides.

    Reference:
        Kong et al., Aligning Large Language Models with Representation Editing: A Control
        Perspective (2024), https://arxiv.org/abs/2406.05954

    >>> rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([4.0, 0, 0, 0, 0, 0]), paired=False)
    >>> part = REControl(hidden=32).fit(acts)[acts.site]
    >>> bool((part(rows, torch.ones(64, 1)) - rows)[:, 0].mean() > 2)
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.05954"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    rate: float | None = None
    steps: int = 30
    hidden: int = 512
    epochs: int = 30
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 3.0

    def __post_init__(self) -> None:
        most = {"steps": 1000, "hidden": 65536, "epochs": 1_000_000, "batch": 1_000_000}
        for name, bound in most.items():
            if not 1 <= getattr(self, name) <= bound:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"1 to {bound}")
        for name in ("rate", "learning_rate"):
            value = getattr(self, name)
            if not (name == "rate" and value is None) and not 0 < value < math.inf:
                raise InputError(f"{name}={value}", expected="a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay={self.weight_decay}", expected=">= 0")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Values of 0: nothing to climb."""
        return Interventions(
            {
                site: Climb(width, k, hidden=self.hidden, steps=self.steps)
                for site, width in widths.items()
            }
        ).requires_grad_(False)

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Train the values, then find how large a step is."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for number, (site, part) in enumerate(fitted.items()):
            assert isinstance(part, Climb)
            scale = Standardise(part.width)
            scale.initialise(rows_by_weight(acts, site))
            part.mean.copy_(scale.mean)
            part.std.copy_(scale.std)
            answers = Answers.of(train, site)
            self._train(part, answers, torch.Generator().manual_seed(seed * 1009 + number))
            for row, behaviour in enumerate(acts.behaviours):
                part.rates[row] = self._rate(part, row, train, site, behaviour)
        return fitted

    def _train(self, part: Climb, answers: "Answers", draw: torch.Generator) -> None:
        """AdamW on the loss of the answers, in place."""
        part.inner.copy_(
            torch.randn(part.inner.shape, generator=draw) * (START / math.sqrt(part.width))
        )
        part.outer.copy_(torch.randn(part.outer.shape, generator=draw) / math.sqrt(self.hidden))
        part.level.fill_(0.5)
        part.requires_grad_(True)
        optimiser = torch.optim.AdamW(
            part.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs)
        for _ in range(self.epochs):
            order = torch.randperm(len(answers.rows), generator=draw)
            for index in torch.split(order, self.batch):
                optimiser.zero_grad(set_to_none=True)
                answers.loss(part, index).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            rate.step()
        part.requires_grad_(False)

    def _rate(self, part: Climb, row: int, acts: Activations, site: Site, behaviour: str) -> float:
        """The size of a step that carries source rows as far as the target's mean is away."""
        if self.rate is not None:
            return self.rate
        std = part.std.double()
        low, high = side_means(acts, site, behaviour)
        asked = ((high - low) / std).norm()
        source = acts.sides(site, behaviour)[0]
        weight = weights(acts, behaviour)[0]
        coef = torch.zeros(len(source), len(part.rates))
        coef[:, row] = 1.0
        part.rates[row] = 1.0 / self.steps
        for _ in range(CORRECTIONS):
            apart = (part.displacement(source, coef) / part.std).double().norm(dim=-1)
            far = weight @ apart / weight.sum()
            part.rates[row] *= float(asked / far.clamp_min(1e-12))
        return float(part.rates[row])

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``accuracy``: share of training rows valued on their side of 1/2, the worst side."""
        train, worst = acts.where(split="train"), 1.0
        for site, part in fitted.items():
            assert isinstance(part, Climb)
            for row, behaviour in enumerate(acts.behaviours):
                for side, sign in zip(train.sides(site, behaviour), (-1, 1), strict=True):
                    above = sign * (part.values(side)[:, row] - 0.5)
                    worst = min(worst, float((above > 0).double().mean()))
        return {"accuracy": worst}


class Answers(NamedTuple):
    """Rows ``[n, d]`` of answers, one after the other, each in the order of its tokens.

    Attributes:
        column: which behaviour's, ``[n]``. last: whether an answer ends here, ``[n]``.
        reward: of the answer, ``[n]``. weight: ``[n]``.
    """

    rows: Tensor
    column: Tensor
    last: Tensor
    reward: Tensor
    weight: Tensor

    @classmethod
    def of(cls, acts: Activations, site: Site) -> "Answers":
        """All source and target answers."""
        table = acts.rows
        told = np.flatnonzero(np.isin(table.side, ("source", "target")))
        keys = (table.token, table.side, table.item, table.behaviour)
        told = told[np.lexsort([key[told] for key in keys])]
        names = np.stack([table.behaviour[told], table.item[told], table.side[told]], 1)
        column = np.array([acts.behaviours.index(name) for name in names[:, 0]])
        last = np.append((names[1:] != names[:-1]).any(1), True)
        return cls(
            acts.values[site][torch.from_numpy(told)],
            torch.from_numpy(column),
            torch.from_numpy(last),
            torch.from_numpy(table.side[told] == "target").float(),
            torch.from_numpy(table.weight[told]).float(),
        )

    def loss(self, part: Climb, index: Tensor) -> Tensor:
        """Mean over rows of (V - reward)^2 at an answer's end, else (V - V of the next row)^2."""
        after = (index + 1).clamp_max(len(self.rows) - 1)
        now, following = (
            part.values(self.rows[n]).gather(1, self.column[index, None]).squeeze(1)
            for n in (index, after)
        )
        missed = torch.where(self.last[index], self.reward[index], following) - now
        return (self.weight[index] * missed.square()).mean() / self.weight.mean()

"""Residual MLP: what a map that need not be invertible does under the same losses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.batches import rows_by_weight
from innsteer.errors import InputError
from innsteer.flows import Standardise
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Runner, Steerer
from innsteer.training import lessons, teach, train_through


class Residual(Intervention):
    """h' = h + sum_k coef_k out_k relu(in_k z + bias_k), z = (h - mean) / std.

    Args:
        width: d. k: number of behaviours. hidden: units per behaviour.

    ``inner`` ``[k, hidden, d]``, ``bias`` ``[k, hidden]``, ``outer`` ``[k, hidden, d]``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, k: int = 1, *, hidden: int = 64) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.inner = nn.Parameter(torch.zeros(k, hidden, width))
        self.bias = nn.Parameter(torch.zeros(k, hidden))
        self.outer = nn.Parameter(torch.zeros(k, hidden, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """One hidden layer per behaviour."""
        z = (h - self.mean.to(h.dtype)) / self.std.to(h.dtype)
        flat = nn.functional.linear(
            z, self.inner.flatten(0, 1).to(h.dtype), self.bias.flatten().to(h.dtype)
        )
        units = torch.relu(flat).view(len(h), *self.bias.shape)
        return torch.einsum("nk,nku,kud->nd", coef, units, self.outer.to(h.dtype))


@dataclass(frozen=True)
class ResidualMLP(Steerer):
    """Add what a small network makes of the row.

    h' = h + strength * W2 relu(W1 (h - mean) / std + b)

    The control for invertibility: the same pairs, unmoved rows, losses and polish as INNSteer's,
    about as many weights (2 * hidden * d), and neither an inverse nor strengths that add. Least
    squares on the pairs, both ways, unmoved rows staying; then ``polish`` steps through the model.

    Attributes:
        hidden: units per behaviour. epochs, learning_rate: of the fit on rows.
        polish, polish_batch, polish_rate, polish_unmoved: as INNSteer's.

    Raises:
        InputError: a number out of range, or rows without pairs.

    Reference:
        This project's own control; residual networks: He et al. (2015),
        https://arxiv.org/abs/1512.03385

    >>> rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0, 0, 0, 0, 0]))
    >>> part = ResidualMLP(hidden=8, epochs=60).fit(acts)[acts.site]
    >>> bool((part(rows, torch.ones(64, 1)) - rows)[:, 0].mean() > 1)
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1512.03385"
    needs: ClassVar[tuple[str, ...]] = ("pairs", "gradients")
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    hidden: int = 64
    epochs: int = 150
    learning_rate: float = 3e-3
    polish: int = 60
    polish_batch: int = 32
    polish_rate: float = 3e-3
    polish_unmoved: float = 1.0

    def __post_init__(self) -> None:
        for name, least in {"hidden": 1, "epochs": 1, "polish": 0, "polish_batch": 1}.items():
            if not least <= getattr(self, name) <= 1_000_000:
                raise InputError(f"{name}={getattr(self, name)}", expected=f">= {least}")
        for name in ("learning_rate", "polish_rate", "polish_unmoved"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}", expected=">= 0")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes."""
        return Interventions(
            {site: Residual(width, k, hidden=self.hidden) for site, width in widths.items()}
        ).requires_grad_(False)

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Least squares on pairs of rows."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        for number, (site, part) in enumerate(fitted.items()):
            assert isinstance(part, Residual)
            draw = torch.Generator().manual_seed(seed * 1009 + number)
            scale = Standardise(part.width)
            scale.initialise(rows_by_weight(acts, site))
            part.mean.copy_(scale.mean)
            part.std.copy_(scale.std)
            part.inner.copy_(torch.randn(part.inner.shape, generator=draw) / math.sqrt(part.width))
            part.requires_grad_(True)
            teach(
                part,
                lessons(acts, site),
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                seed=seed,
            )
        return fitted.eval().requires_grad_(False)

    def fit_through(self, run: Runner, *, seed: int = 0) -> Interventions:
        """Fit on target-seeking rows, then polish through the model."""
        fitted = self.fit(run.rows(), seed=seed)
        if self.polish:
            train_through(
                run,
                fitted.requires_grad_(True),
                steps=self.polish,
                batch=self.polish_batch,
                learning_rate=self.polish_rate,
                unmoved=self.polish_unmoved,
                seed=seed,
            )
        return fitted.requires_grad_(False)

"""Conditional gradient: a probe says which way, the mean gradient says where to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.readouts import GRID, aims, decision, mean_lift, nuisances
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer


class Conditional(Intervention):
    """h' = h + sum_k coef_k tanh(probe_k . h + bias_k) write_k.

    Args:
        width: d. k: number of behaviours.

    ``probe``, ``write`` ``[k, d]`` and ``bias`` ``[k]``; ``write`` is in activation units.
    """

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        self.width = width
        self.probe = nn.Parameter(torch.zeros(k, width))
        self.bias = nn.Parameter(torch.zeros(k))
        self.write = nn.Parameter(torch.zeros(k, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """The bounded readout of each behaviour times its write direction."""
        reads = nn.functional.linear(h, self.probe.to(h.dtype), self.bias.to(h.dtype))
        return (coef * torch.tanh(reads)) @ self.write.to(h.dtype)


@dataclass(frozen=True)
class CondGrad(Steerer):
    """Push along the mean gradient, the way that a probe of the row says.

    h' = h + strength * tanh(kappa * (w . h + b) / sigma) * g

    (w, b) is a logistic regression of the item's key (which of two answers matches) on the rows,
    sigma the standard deviation of w . h + b over the training rows, g the mean of the unit
    gradients of log P(first answer) - log P(second answer), without the key, as long as the mean
    lift from source to target: strength 1 is about one lift. Closed form but for the regression;
    2 d floats per site and behaviour. Answers in choices depend on statement *and* answer, an XOR
    that no constant vector reaches. w sees g too, so neither do strengths add exactly nor does -s
    undo s (INNSteer's shear is this map where they do). Open items have no key: then tanh(...) = 1,
    a constant vector.

    Attributes:
        kappa: how sharply the probe decides, unitless, above 0.
        grid: inverse L2 penalties, chosen among on validation rows.
        nuisances: directions of wording that the probe does not see; as INNSteer's.

    Raises:
        InputError: no pairs, more than two kinds of answers, or items of one answer only.

    Reference:
        This project's own closed form: CAST (Lee et al. 2024), https://arxiv.org/abs/2409.05907,
        conditions on a probe likewise; here the sign is conditioned, not whether to steer.

    >>> draw = torch.Generator().manual_seed(0)
    >>> keys = torch.tensor([1.0, -1.0] * 20)
    >>> h = torch.randn(40, 4, generator=draw) + keys[:, None] * torch.tensor([3.0, 0, 0, 0])
    >>> lift = keys[:, None] * torch.tensor([0.0, 2.0, 0, 0])
    >>> acts = Activations.of_sides(h - lift / 2, h + lift / 2)
    >>> acts.rows.key[:] = ["Y" if key > 0 else "N" for key in keys] * 2
    >>> part = CondGrad().fit(acts)[acts.site]
    >>> moved = part(h, torch.ones(40, 1)) - h
    >>> bool((moved[:, 1].sign() == keys).all())
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.05907"
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    kappa: float = 2.0
    grid: tuple[float, ...] = GRID
    nuisances: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.kappa < math.inf:
            raise InputError(f"kappa={self.kappa}", expected="a positive number")
        if not self.grid or not all(0 < value < math.inf for value in self.grid):
            raise InputError(f"grid={self.grid}", expected="positive inverse penalties")
        if not 0 <= self.nuisances <= 1024:
            raise InputError(f"nuisances={self.nuisances}", expected="0 to 1024")

    @property
    def rewords(self) -> bool:
        """Where there is something to be blind to."""
        return self.nuisances > 0

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes."""
        return Interventions({site: Conditional(width, k) for site, width in widths.items()})

    @torch.no_grad()
    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Probe and mean gradient in float64, stored in float32."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, Conditional)
            for row, behaviour in enumerate(acts.behaviours):
                own = aims(acts, site, behaviour)
                part.write[row] = mean_lift(own)
                if not own.choice:
                    part.bias[row] = 20.0  # tanh of it is 1 in float32
                    continue
                held = aims(acts, site, behaviour, "validation")
                blind = nuisances(acts.rewordings(site), own.rows, self.nuisances)
                part.probe[row], part.bias[row] = decision(
                    own, held, kappa=self.kappa, grid=self.grid, blind=blind, seed=seed
                )
        return fitted.requires_grad_(False)

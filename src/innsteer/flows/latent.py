"""Latent steps: what moves a row between a flow and its inverse, in closed form per row.

Each is the time-1 map of a flow of its own, so that strengths add (two steps in a row are one of
summed strengths), -s undoes s, and 0 is nothing.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from innsteer.errors import InputError


class Step(nn.Module, ABC):
    """z' = z + move(z, coef), one row of latent parameters per behaviour."""

    @abstractmethod
    def forward(self, z: Tensor, coef: Tensor) -> Tensor:
        """Latent rows ``[n, d]`` moved by strengths ``[n, k]``."""


class Translation(Step):
    """z' = z + coef @ shifts.

    Args:
        width: d. k: number of behaviours.

    ``shifts`` ``[k, d]`` is in latent units.

    >>> step = Translation(2)
    >>> with torch.no_grad():
    ...     _ = step.shifts.copy_(torch.tensor([[1.0, -1.0]]))
    >>> step(torch.zeros(1, 2), torch.tensor([[0.5]])).detach()
    tensor([[ 0.5000, -0.5000]])
    """

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        self.shifts = nn.Parameter(torch.zeros(k, width))

    def forward(self, z: Tensor, coef: Tensor) -> Tensor:
        """z + coef @ shifts."""
        return z + coef @ self.shifts


class Shear(Step):
    """The first r coordinates move by a bounded function of the others, which stay.

    z = (b, a);  b' = b + sum_k coef_k gate_k(a) sum_u tanh(read_ku . a + read_bias_ku) write_ku
    gate_k(a) = sigmoid(gate_k . a + gate_bias_k);  a' = a

    The readouts see only what the step leaves alone. So strengths add, -s undoes s and the log-det
    is 0, whatever the weights: an additive coupling, with strength as its dial. ``read`` says which
    way to push, ``gate`` whether at all; read = 0 with a large bias is a gated translation.

    Args:
        width: d. write: r, from 1 to d - 1. k: number of behaviours; all share the split.
        units: readouts per behaviour, each with a write direction of its own.

    Raises:
        InputError: a size out of range.

    >>> step = Shear(2)
    >>> with torch.no_grad():
    ...     _ = step.read.fill_(1.0), step.write.fill_(2.0), step.gate_bias.fill_(50.0)
    >>> step(torch.tensor([[3.0, 0.5]]), torch.ones(1, 1)).detach()
    tensor([[3.9242, 0.5000]])
    """

    def __init__(self, width: int, write: int = 1, k: int = 1, units: int = 1) -> None:
        super().__init__()
        if not 1 <= write < width or units < 1:
            raise InputError(
                f"a shear of {units} units that writes {write} of {width} coordinates",
                expected="at least 1 each, and one coordinate left to read",
            )
        self.read = nn.Parameter(torch.zeros(k, units, width - write))
        self.read_bias = nn.Parameter(torch.zeros(k, units))
        self.gate = nn.Parameter(torch.zeros(k, width - write))
        self.gate_bias = nn.Parameter(torch.zeros(k))
        self.write = nn.Parameter(torch.zeros(k, units, write))

    def forward(self, z: Tensor, coef: Tensor) -> Tensor:
        """Latent rows with b moved."""
        r = self.write.shape[-1]
        b, a = z[:, :r], z[:, r:]
        pushes = torch.einsum("nku,kur->nkr", self.reads(a), self.write)
        amount = (coef * self.openness(a)).unsqueeze(-1)
        return torch.cat([b + (amount * pushes).sum(1), a], -1)

    def reads(self, a: Tensor) -> Tensor:
        """The bounded readouts ``[n, k, units]``, within -1 and 1."""
        flat = nn.functional.linear(a, self.read.flatten(0, 1), self.read_bias.flatten())
        return torch.tanh(flat).view(len(a), *self.read_bias.shape)

    def openness(self, a: Tensor) -> Tensor:
        """The gates ``[n, k]``, within 0 and 1."""
        return torch.sigmoid(nn.functional.linear(a, self.gate, self.gate_bias))

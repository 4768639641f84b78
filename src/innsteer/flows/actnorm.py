"""ActNorm: a learned shift and gain per dimension, started from data."""

import math

import torch
from torch import Tensor, nn

from innsteer.errors import InputError
from innsteer.flows.base import Flow, check_rows
from innsteer.flows.standardise import STD_FLOOR


class ActNorm(Flow):
    """A learned affine map per dimension whose log-gain is bounded.

    z = (x - shift) * exp(g),  g = bound * tanh(raw / bound),  log|det| = sum(g). ``initialise``
    sets zero mean and unit std on the rows it is given, as far as the bound allows; before it, the
    map is exactly the identity.

    The bound is ours: a free gain lets a reward for class separation inflate one axis without end.

    Reference: Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal 2018),
    section 3.1, https://arxiv.org/abs/1807.03039

    Args:
        width: d.
        bound: the largest \\|g\\|, in nats; 2 allows gains from 0.14 to 7.4.

    Raises:
        InputError: a bound that is not positive.

    >>> flow = ActNorm(2)
    >>> z = flow.initialise(torch.tensor([[0.0, 5.0], [4.0, 7.0]]))
    >>> [round(value, 4) for value in z[1].tolist()]
    [1.0, 1.0]
    """

    def __init__(self, width: int, *, bound: float = 2.0) -> None:
        super().__init__(width)
        if not 0 < bound < math.inf:
            raise InputError(f"ActNorm bound {bound}", expected="a positive number of nats")
        self.bound = bound
        self.shift = nn.Parameter(torch.zeros(width))
        self.raw_gain = nn.Parameter(torch.zeros(width))

    @property
    def log_gain(self) -> Tensor:
        """The bounded log-gain g, ``[d]``."""
        return self.bound * torch.tanh(self.raw_gain / self.bound)

    def forward(self, x: Tensor) -> Tensor:
        """Shifted and scaled rows."""
        return (x - self.shift) * self.log_gain.exp()

    def inverse(self, z: Tensor) -> Tensor:
        """Rows before gain and shift."""
        return torch.addcmul(self.shift, z, (-self.log_gain).exp())

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled rows and sum(g), the same for every row."""
        gain = self.log_gain
        return (x - self.shift) * gain.exp(), gain.sum().expand(x.shape[0])

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set shift and gain to standardise the rows, within the bound."""
        check_rows(x, self.width)
        rows = x.double()
        gain = -rows.std(0, correction=0).clamp_min(STD_FLOOR).log() / self.bound
        # At the bound itself atanh is infinite and no gradient comes back; at 95 % of it the slope
        # is still a tenth of the full one.
        self.raw_gain.copy_(self.bound * gain.clamp(-0.95, 0.95).atanh())
        self.shift.copy_(rows.mean(0))
        return self.forward(x)

"""Standardise: the fixed, data-initialised scaling that stands before a flow."""

import torch
from torch import Tensor

from innsteer.flows.base import Flow, check_rows

# A dimension that never moved in the recorded rows has std 0, and would divide by zero. 1e-6 lies
# far below the spread of any live dimension of a residual stream (about 1e-2 to 70) and so changes
# none, and its reciprocal is far from overflow in float32.
STD_FLOOR = 1e-6


class Standardise(Flow):
    """Per-dimension standardisation with the mean and std of the fitting rows.

    z = (x - mean) / std, log|det| = -sum(log std), a constant. Residual streams hold dimensions of
    norm 10^2 to 10^4 beside a spread of 5 to 70; without this a coupling sees only those. Mean and
    std are buffers: fitted by ``initialise``, never trained, saved with the flow. Before it, the
    map is the identity.

    >>> flow = Standardise(1)
    >>> flow.initialise(torch.tensor([[1.0], [3.0]]))
    tensor([[-1.],
            [ 1.]])
    >>> flow.inverse(torch.tensor([[0.0]]))
    tensor([[2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised rows."""
        return (x - self.mean) / self.std

    def inverse(self, z: Tensor) -> Tensor:
        """Rows in the units of the data."""
        return torch.addcmul(self.mean, z, self.std)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised rows and the constant log-determinant, the same for every row."""
        return self.forward(x), self.fixed_log_det.expand(x.shape[0])

    @property
    def fixed_log_det(self) -> Tensor:
        """-sum(log std), all of this flow's log-determinant."""
        return -self.std.log().sum()

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Take mean and population std (floor 1e-6) of the rows."""
        check_rows(x, self.width)
        rows = x.double()  # once per fit: the wider sums of massive dimensions cost nothing
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0, correction=0).clamp_min(STD_FLOOR))
        return self.forward(x)

"""Flow: a bijection of rows with a log-determinant; Chain: several in order.

Legend: ``x`` rows on the data side and ``z`` rows on the latent side, both ``[n, d]``; ``log_det``
the logarithm of ``|det dz/dx|`` per row, in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from innsteer.errors import InputError


class Flow(nn.Module, ABC):
    """A bijection of R^width, applied to every row on its own.

    A flow sees rows, never tokens, prompts or models. It computes in the dtype of its own tensors,
    changes nothing in place, has no data-dependent branch (so it compiles without a graph break)
    and takes any number of rows, none included.
    """

    width: int

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"a flow of width {width}", expected="a width of at least 1")
        self.width = width

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Latent rows ``z``, ``[n, d]``; the fast path, without a log-determinant."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """Rows ``x``, ``[n, d]``, such that ``forward(x)`` is ``z``."""

    @abstractmethod
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(z [n, d], log|det dz/dx| [n])``."""

    @property
    def fixed_log_det(self) -> Tensor:
        """The part of the log-determinant that training cannot move, a scalar in nats.

        A penalty on the log-determinant subtracts it: standardising alone contributes thousands of
        nats at d = 4096 and would drown the part that is learned.
        """
        return torch.zeros(())

    def initialise(self, x: Tensor) -> Tensor:
        """Set what is initialised from data, without gradients; returns ``forward(x)``.

        Args:
            x: rows ``[n, d]``, finite, at least two where a spread is taken.

        Raises:
            InputError: the rows cannot be used.
        """
        with torch.no_grad():
            return self.forward(x)


class Chain(Flow):
    """Flows applied one after the other: z = f_k(... f_2(f_1(x))).

    Args:
        flows: at least one, all of the same width; they may be chains themselves.

    Raises:
        InputError: no flow, or flows of different widths.

    >>> from innsteer.flows import Reverse
    >>> chain = Chain([Reverse(3), Reverse(3)])
    >>> chain(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1., 2., 3.]])
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        widths = sorted({flow.width for flow in flows})
        if len(widths) != 1:
            raise InputError(
                f"a chain of flows of widths {widths}", expected="at least one flow, one width"
            )
        super().__init__(widths[0])
        self.flows = nn.ModuleList(flows)

    @property
    def parts(self) -> tuple[Flow, ...]:
        """The flows in the order in which ``forward`` applies them."""
        return cast(tuple[Flow, ...], tuple(self.flows))

    # The parts' methods are called directly: a module's __call__ costs about a microsecond, and a
    # chain of a dozen parts runs twice per decoded token.

    def forward(self, x: Tensor) -> Tensor:
        """Latent rows after the last part."""
        for flow in self.parts:
            x = flow.forward(x)
        return x

    def inverse(self, z: Tensor) -> Tensor:
        """Rows before the first part: inverses in reverse order."""
        for flow in reversed(self.parts):
            z = flow.inverse(z)
        return z

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latent rows and the sum of the parts' log-determinants."""
        total = x.new_zeros(x.shape[0])
        for flow in self.parts:
            x, log_det = flow.forward_log_det(x)
            total = total + log_det
        return x, total

    @property
    def fixed_log_det(self) -> Tensor:
        """The sum of the parts' fixed log-determinants."""
        first, *rest = (flow.fixed_log_det for flow in self.parts)
        return sum(rest, start=first)

    def initialise(self, x: Tensor) -> Tensor:
        """Initialise each part on the rows that the parts before it put out."""
        for flow in self.parts:
            x = flow.initialise(x)
        return x


def check_rows(x: Tensor, width: int) -> None:
    """Refuse rows from which no mean and spread can be taken.

    Raises:
        InputError: another shape than ``[n, width]``, fewer than two rows, or a non-finite value.
    """
    if x.ndim != 2 or x.shape[1] != width:
        raise InputError(f"rows of shape {tuple(x.shape)}", expected=f"[n, {width}]")
    if x.shape[0] < 2:
        raise InputError(f"{x.shape[0]} rows to initialise from", expected="at least 2")
    broken = int((~torch.isfinite(x).all(-1)).sum())
    if broken:
        raise InputError(
            f"{broken} of {x.shape[0]} rows hold NaN or infinity",
            expected="finite rows",
            remedy="leave those rows out",
        )

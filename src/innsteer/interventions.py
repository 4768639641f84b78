"""Maps that several methods share, and Edit: interventions with their strengths and positions."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from innsteer.errors import InputError
from innsteer.site import Where
from innsteer.steerer import Intervention, Interventions


class Shift(Intervention):
    """h' = h + coef @ shifts: a constant vector per behaviour.

    Args:
        width: d. k: number of behaviours.

    ``shifts`` ``[k, d]`` is in activation units. Strengths add, and -s undoes s.

    >>> shift = Shift(2); shift.shifts.copy_(torch.tensor([[1.0, -1.0]]))
    tensor([[ 1., -1.]])
    >>> shift(torch.zeros(1, 2), torch.tensor([[0.5]]))
    tensor([[ 0.5000, -0.5000]])
    """

    shifts: Tensor

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("shifts", torch.zeros(k, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """coef @ shifts."""
        return coef @ self.shifts.to(h.dtype)


@dataclass(frozen=True)
class Edit:
    """What an engine applies: interventions, one row of coefficients per sequence, and where.

    Attributes:
        coef: ``[k]`` for every row alike, or ``[rows, k]``, one per sequence of the batch.
    """

    interventions: Interventions
    coef: Tensor
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        usable = self.coef.ndim in (1, 2) and self.coef.numel() and torch.isfinite(self.coef).all()
        if not usable:
            raise InputError(
                f"coefficients {self.coef.tolist()!r}",
                expected="finite strengths, [k] or one row of k per sequence",
            )

    def rows(self, count: int) -> Tensor:
        """The coefficients of a batch ``[count, k]``; sequences that generate() expanded follow.

        Raises:
            InputError: the batch is not a multiple of the rows given.
        """
        if self.coef.ndim == 1:
            return self.coef.expand(count, -1)
        if count % len(self.coef):
            raise InputError(
                f"{len(self.coef)} rows of coefficients for a batch of {count} sequences",
                expected="one per prompt",
            )
        return self.coef.repeat_interleave(count // len(self.coef), 0)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a fit moves."""
    return [p for p in module.parameters() if p.requires_grad]

"""Maps that several methods share, and Edit: interventions with their strengths and positions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from innsteer.errors import InputError
from innsteer.flows import Flow, Shear, Step, Subspace
from innsteer.site import Site, Where
from innsteer.steerer import Intervention, Interventions
from innsteer.tokens import Parameters


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


def shifts(fitted: Interventions) -> dict[Site, Tensor]:
    """The vectors ``[k, d]`` by site of maps that are shifts."""
    return {site: part.shifts for site, part in fitted.items() if isinstance(part, Shift)}


class Affine(Intervention):
    """h' = h + sum_k coef_k (residuals_k (h - centres_k) + shifts_k), an affine map each.

    Written about a centre, and as what differs from the identity, so that no large numbers cancel
    where a dimension's mean is far from 0. As W h + b it is W = I + residual and
    b = shift - residual centre.

    Args:
        width: d. k: number of behaviours.

    ``residuals`` ``[k, d, d]`` (output, input) is unitless, ``centres`` and ``shifts`` ``[k, d]``
    are in activation units. Full matrices: 4 k d^2 bytes per site and k d^2 multiplications per
    row, 1.3 MB at d = 576 and 67 MB at d = 4,096 for one behaviour. -s mirrors s; it does not undo
    it.

    Raises:
        InputError: the matrices would hold more than 2^30 numbers (4 GiB).

    >>> affine = Affine(2); affine.centres.copy_(torch.tensor([[1.0, 1.0]]))
    tensor([[1., 1.]])
    >>> affine.residuals.copy_(torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])).shape
    torch.Size([1, 2, 2])
    >>> affine(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]]))
    tensor([[2., 2.]])
    """

    centres: Tensor
    residuals: Tensor
    shifts: Tensor

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        # An artifact names width and k: a small file must not make us build a giant.
        if k * width * width > 2**30:
            raise InputError(
                f"{k} affine maps of width {width}",
                expected="at most 2^30 numbers in their matrices",
                remedy="fit fewer behaviours at once, or a method that keeps no full matrix",
            )
        self.width = width
        self.register_buffer("centres", torch.zeros(k, width))
        self.register_buffer("residuals", torch.zeros(k, width, width))
        self.register_buffer("shifts", torch.zeros(k, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """sum_k coef_k (residuals_k (h - centres_k) + shifts_k)."""
        apart = h.unsqueeze(1) - self.centres.to(h.dtype)
        moves = torch.einsum("nki,koi->nko", apart, self.residuals.to(h.dtype))
        return (coef.unsqueeze(-1) * (moves + self.shifts.to(h.dtype))).sum(1)


class SetPoint(Intervention):
    """h' = h + sum_k coef_k (levels_k - reads_k . (h - centres_k)) writes_k: a coordinate each.

    With ``reads_k . writes_k`` = 1, strength 1 sets behaviour k's coordinate to its level, whatever
    it was; between 0 and 1 it goes that share of the way, and -s mirrors s.

    Args:
        width: d. k: number of behaviours.

    ``reads``, ``writes`` and ``centres`` are ``[k, d]``, ``levels`` ``[k]``. A centre near the rows
    keeps large means out of the sum.

    >>> point = SetPoint(2)
    >>> point.reads[0, 0], point.writes[0, 0], point.levels[0] = 1, 1, 5
    >>> point(torch.tensor([[2.0, 3.0], [9.0, 3.0]]), torch.ones(2, 1)).tolist()
    [[5.0, 3.0], [5.0, 3.0]]
    """

    reads: Tensor
    writes: Tensor
    centres: Tensor
    levels: Tensor

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        self.width = width
        for name in ("reads", "writes", "centres"):
            self.register_buffer(name, torch.zeros(k, width))
        self.register_buffer("levels", torch.zeros(k))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """sum_k coef_k (levels_k - reads_k . (h - centres_k)) writes_k."""
        apart = h.unsqueeze(1) - self.centres.to(h.dtype)
        missing = self.levels.to(h.dtype) - (apart * self.reads.to(h.dtype)).sum(-1)
        return (coef * missing) @ self.writes.to(h.dtype)


class Latent(Intervention):
    """h' = h + g(step(f(h), coef)) - g(f(h)), with f a flow and g its inverse.

    Args:
        flow: f, of width d. step: what moves a latent row, of the same width.
        reader: makes the map contextual: the step's readouts, a shear's, then see ``reader(c)`` of
            the prompt's mean c instead of the row's other coordinates. The step is then of width
            r + d for a shear that writes r.

    Written as a difference, the round-trip error cancels and strength 0 is exactly nothing. Both
    inverses run as one stacked call. What the step's strengths do, the map's do: where they add,
    and -s undoes s, so it is here, whatever f: c is never edited.
    """

    flow: Flow
    step: Step
    reader: Flow | None

    def __init__(self, flow: Flow, step: Step, reader: Flow | None = None) -> None:
        super().__init__()
        self.flow, self.step, self.reader = flow, step, reader
        self.width, self.contextual = flow.width, reader is not None

    def displacement(self, h: Tensor, coef: Tensor, context: Tensor | None = None) -> Tensor:
        """g(step(f(h), coef)) - g(f(h))."""
        z = self.flow(h)
        if self.reader is None or context is None:
            new = self.step(z, coef)
        else:
            assert isinstance(self.step, Shear)
            r = self.step.write.shape[-1]
            moved = self.step(torch.cat([z[:, :r], self.reader(context)], -1), coef)
            new = torch.cat([moved[:, :r], z[:, r:]], -1)
        moved, back = self.flow.inverse(torch.cat([new, z])).chunk(2)
        return moved - back

    @property
    def sizes(self) -> dict[str, int]:
        """What the rows decided: a subspace's rank, the coordinates a shear writes, a reader."""
        sizes = {"subspace": self.flow.inner.width} if isinstance(self.flow, Subspace) else {}
        if isinstance(self.step, Shear):
            sizes["write"] = self.step.write.shape[-1]
        return sizes | ({"reader": self.width} if self.contextual else {})


@dataclass(frozen=True)
class Edit:
    """What an engine applies: interventions, one row of coefficients per sequence, and where.

    Attributes:
        coef: ``[k]`` for every row alike, or ``[rows, k]``, one per sequence of the batch.
        told: the parameters that the maps ask for: none, one set for every sequence alike, or one
            set per sequence.
    """

    interventions: Interventions
    coef: Tensor
    where: Where = field(default_factory=Where)
    told: tuple[Parameters, ...] = ()

    def __post_init__(self) -> None:
        usable = self.coef.ndim in (1, 2) and self.coef.numel() and torch.isfinite(self.coef).all()
        if not usable:
            raise InputError(
                f"coefficients {self.coef.tolist()!r}",
                expected="finite strengths, [k] or one row of k per sequence",
            )
        asks = self.interventions.asks
        for given in self.told or ({},):
            whole = all(isinstance(value, str) and value.strip() for value in given.values())
            if set(given) != set(asks) or not whole:
                raise InputError(
                    f"the parameters {dict(given)} of a steering",
                    expected=" and ".join(f"{name}, some text" for name in asks) or "none",
                    remedy='say it as steering.told(NAME=TEXT), or in a request NAME="TEXT"',
                )

    def require(self, count: int) -> None:
        """Refuse rows of strengths, or sets of parameters, that so many sequences do not have.

        Raises:
            InputError: several, and not one for each sequence.
        """
        rows = len(self.coef) if self.coef.ndim == 2 else count
        for what, given in (("rows of strengths", rows), ("sets of parameters", len(self.told))):
            if given != count and not (given < 2 and what == "sets of parameters"):
                raise InputError(
                    f"{given} {what} for {count} sequences",
                    expected="one for all of them, or one for each, in their order",
                )

    def of(self, index: Sequence[int]) -> "Edit":
        """The edit of some sequences of a batch, by number."""
        coef = self.coef[list(index)] if self.coef.ndim == 2 else self.coef
        told = tuple(self.told[i] for i in index) if len(self.told) > 1 else self.told
        return replace(self, coef=coef, told=told)

    def parameters(self, count: int) -> list[Parameters]:
        """The parameters of each sequence of a batch; those that generate() expanded follow.

        Raises:
            InputError: the batch is not a multiple of the sets given.
        """
        given = self.told or ({},)
        if count % len(given):
            raise InputError(
                f"parameters for {len(given)} sequences, and a batch of {count}",
                expected="one set for all, or one per prompt",
            )
        return [given[row // (count // len(given))] for row in range(count)]

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

"""SADI: scale the row's own activation in the dimensions that tell the sides apart most."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, side_means

Rank = Literal["apart", "raised"]


class Scale(Intervention):
    """h' = h + (coef @ scales) * h: every dimension is multiplied by a number of its own."""

    scales: Tensor

    def __init__(self, width: int, k: int = 1) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("scales", torch.zeros(k, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """(coef @ scales) * h."""
        return (coef @ self.scales.to(h.dtype)) * h


@dataclass(frozen=True)
class SADI(Steerer):
    """Scale the row's own activation in the dimensions that tell the sides apart most.

    h' = h + strength * delta * (h * M),  M = 1 or -1 in the chosen dimensions, 0 elsewhere

    Semantics-adaptive dynamic intervention: the mask is the behaviour's, the direction the row's
    own. Strengths of behaviours add; -s does not undo s. An element is a dimension of the site's
    row, ``count`` of them at each site: a hidden state at ``LAYER``, a part of a head's output at
    ``LAYER.heads``. The authors rank the elements of all layers together, take whole heads as
    elements too, and multiply what an unsteered pass had at the last token of the question.

    Attributes:
        count: how many dimensions are chosen, K, at least 1; all where there are fewer.
        rank: by what, and M. ``raised``: by the mean difference target - source, the largest first,
            M = 1, as in the authors' code: where a mean is below 0, amplifying it leads away from
            the target. ``apart``: by its magnitude, as in the paper, and M = -1 where damping
            leads to the target and amplifying away from it.
        delta: the paper's, which is set by trial; their code multiplies by 1 + delta, 5 to 90. None
            = such that strength 1 moves the source mean as far along the difference of means as
            the target mean lies.

    Raises:
        UnknownName: of a rank. InputError: a number out of range, or (by ``fit``, without delta)
            chosen dimensions whose scaling leads nowhere along the difference.

    Reference:
        Wang et al., Semantics-Adaptive Activation Intervention for LLMs via Dynamic Steering
        Vectors (2024), https://arxiv.org/abs/2410.12299

    >>> source = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]])
    >>> acts = Activations.of_sides(source, source + torch.tensor([0.0, 1.0, 4.0]))
    >>> SADI(count=1, delta=2.0).fit(acts)[acts.site](source, torch.ones(2, 1))
    tensor([[ 1.,  2.,  9.],
            [ 1.,  2., 15.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.12299"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    count: int = 128
    rank: Rank = "apart"
    delta: float | None = None

    def __post_init__(self) -> None:
        if self.rank not in get_args(Rank):
            raise UnknownName("rank", self.rank, get_args(Rank))
        if self.count < 1:
            raise InputError(f"count={self.count}", expected="at least 1")
        if self.delta is not None and not math.isfinite(self.delta):
            raise InputError(f"delta={self.delta}", expected="a finite number")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Scales of zeros: no edit."""
        return Interventions({site: Scale(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """In float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site, part in fitted.items():
            assert isinstance(part, Scale)
            for row, behaviour in enumerate(acts.behaviours):
                source, target = side_means(train, site, behaviour)
                part.scales[row] = self._scales(source, target - source)
        return fitted

    def _scales(self, source: Tensor, gap: Tensor) -> Tensor:
        """delta * M ``[d]``, from the source mean and the difference of means."""
        apart = self.rank == "apart"
        score = gap.abs() if apart else gap
        chosen = score.argsort(descending=True, stable=True)[: self.count]
        sign = (gap * source).sign() if apart else torch.ones_like(gap)
        mask = torch.zeros_like(gap).index_copy(0, chosen, sign[chosen])
        if self.delta is not None:
            return self.delta * mask
        reach = (mask * source) @ gap
        if not reach:
            raise InputError(
                f"{len(chosen)} dimensions whose scaling leads nowhere",
                expected="source rows whose mean there is not across the difference of means",
                remedy="set delta, or raise count",
            )
        return mask * (gap @ gap) / reach

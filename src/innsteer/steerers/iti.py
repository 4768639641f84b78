"""ITI: shift the attention heads whose rows tell the two sides apart best."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.batches import split_items
from innsteer.errors import InputError, UnknownName
from innsteer.interventions import Shift
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means, weights
from innsteer.steerers.odesteer import logistic

Direction = Literal["mean", "probe"]


class Head(NamedTuple):
    """A head's probe: its held-out accuracy, where the head stands, and the probe's normal.

    ``start`` is the head's first dimension in the rows of ``site``; ``normal`` ``[head width]``.
    """

    accuracy: float
    site: Site
    start: int
    normal: Tensor


@dataclass(frozen=True)
class ITI(Steerer):
    """Shift the attention heads that tell the two sides apart best; leave all others alone.

    h' = h + strength * alpha * sigma * u  in a chosen head, h elsewhere;  u = v / |v|
    v = mean target - mean source of the head's rows, sigma = standard deviation of h . u

    Inference-time intervention. Its sites are ``LAYER.heads`` of all layers, recorded together:
    there a row is the outputs of a layer's heads, one after the other, before the output
    projection mixes them. A logistic probe of each head learns source from target; the ``heads``
    whose probes are right most often on held-out rows are chosen, across all sites (of equal ones
    the later). Sites where no head is chosen are left out. At other sites a row is one head, and
    the method chooses among sites. Each behaviour has heads of its own.

    The same vector at every token: strengths add, and -s undoes s. Pairing does not matter. Closed
    form but for the probes, which are convex, one per head. The artifact is d floats per chosen
    site and behaviour.

    Held out is the validation part, or a share of the training part's items, so that no question
    stands on both sides. Probes see the rows as they are, not standardised; row weights count in
    the probes, their accuracy, u and sigma. u and sigma are of all training rows. The authors'
    script takes sigma of every row of its data, test questions included; here it is not. The paper
    keeps 48 of the 1,024 heads of a 7B model, and reads the answer's last token
    (``record(read="last")``).

    Attributes:
        heads: how many to choose, K, at least 1; all where there are fewer. The same number is more
            of a small model: at 48 of 270 heads 15 standard deviations leave no language.
        head_width: dimensions of one head, a divisor of the width of ``LAYER.heads``; None = as the
            recording says, by the model's config.
        alpha: length of the shift at strength 1 in standard deviations sigma, > 0; with alpha=1 a
            strength is the paper's alpha, which is 15. None = as far as the sides' means are apart
            along u, so that strength 1 carries the source mean there.
        direction: v is the difference of the ``mean`` rows, or the normal of the ``probe``.
        C: inverse strength of the probes' L2 penalty, > 0.
        holdout: share of the training items held out, in (0, 1), without a validation part.

    Raises:
        InputError: a field out of its range, or (by ``fit``) a head's width that is missing or does
            not divide a row.
        UnknownName: no such direction.

    Reference:
        Li et al., Inference-Time Intervention: Eliciting Truthful Answers from a Language Model
        (2023), https://arxiv.org/abs/2306.03341

    >>> source = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    >>> target = source + torch.tensor([0.0, 0.0, 6.0, 0.0])
    >>> acts = Activations.of_sides(source, target, site=Site(3, "heads"))
    >>> ITI(heads=1, head_width=2).fit(acts)[acts.site].shifts.round(decimals=3)
    tensor([[0., 0., 6., 0.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.03341"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "heads"
    trained: ClassVar[bool] = False

    heads: int = 48
    head_width: int | None = None
    alpha: float | None = None
    direction: Direction = "mean"
    C: float = 1.0
    holdout: float = 0.2

    def __post_init__(self) -> None:
        for name, count in {"heads": self.heads, "head_width": self.head_width}.items():
            if count is not None and count < 1:
                raise InputError(f"{name}={count}", expected="at least 1")
        for name, number in {"alpha": self.alpha, "C": self.C}.items():
            if number is not None and not 0 < number < math.inf:
                raise InputError(f"{name}={number}", expected="a positive number")
        if self.direction not in get_args(Direction):
            raise UnknownName("direction", self.direction, get_args(Direction))
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout={self.holdout}", expected="between 0 and 1")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """A zero shift per site."""
        return Interventions({site: Shift(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fitted in float64, stored in float32; the seed draws what is held out."""
        train = acts.where(split="train")
        shifts = {site: torch.zeros(len(acts.behaviours), d) for site, d in acts.widths.items()}
        for row, behaviour in enumerate(acts.behaviours):
            for head in self.ranked(acts, behaviour, seed=seed)[: self.heads]:
                inside = slice(head.start, head.start + len(head.normal))
                shifts[head.site][row, inside] = self._shift(train, behaviour, head, inside)
        chosen = {site: d for site, d in acts.widths.items() if shifts[site].any()}
        fitted = self.build(chosen, len(acts.behaviours))
        for site, part in fitted.items():
            assert isinstance(part, Shift)
            part.shifts.copy_(shifts[site])
        return fitted

    def ranked(self, acts: Activations, behaviour: str, *, seed: int = 0) -> list[Head]:
        """The probes of all heads of a behaviour, the one that is right most often first.

        Args:
            acts: the recording of ``fit``. seed: draws what is held out.

        Raises:
            InputError: as ``fit``.
        """
        known, held = split_items(acts.where(behaviour=behaviour), self.holdout, seed)
        found = []
        for site, width in acts.widths.items():
            size = self._size(site, width, acts.provenance.get("head_width"))
            rows, is_target, weight = labelled(known, site, behaviour)
            others, is_theirs, counts = labelled(held, site, behaviour)
            for start in range(0, width, size):
                inside = slice(start, start + size)
                normal, bias = logistic(rows[:, inside], is_target, weight, self.C)
                right = (others[:, inside] @ normal + bias > 0) == is_theirs
                accuracy = float(counts @ right.double() / counts.sum())
                found.append(Head(accuracy, site, start, normal))
        return sorted(found, key=lambda head: head[:3], reverse=True)

    def _size(self, site: Site, width: int, recorded: int | None) -> int:
        """The width of a site's heads."""
        if site.stream != "heads":
            return width
        size = self.head_width or recorded
        if size is None or width % size:
            raise InputError(
                f"site {site}: head_width={size} for rows of {width} dimensions",
                expected="the width of one attention head, a divisor of the row's",
                remedy="set head_width to the model config's head_dim, or to hidden_size / "
                "num_attention_heads",
            )
        return size

    def _shift(self, train: Activations, behaviour: str, head: Head, inside: slice) -> Tensor:
        """The shift ``[head width]`` of a chosen head at strength 1."""
        source, target = (mean[inside] for mean in side_means(train, head.site, behaviour))
        apart = target - source
        unit = _unit(apart if self.direction == "mean" else head.normal)
        if self.alpha is None:
            return unit * (unit @ apart)
        rows, _, weight = labelled(train, head.site, behaviour)
        return unit * self.alpha * spread(rows[:, inside] @ unit, weight)


def labelled(acts: Activations, site: Site, behaviour: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both sides ``[n, d]`` in float64, whether each is a target's, and weights ``[n]``.

    Raises:
        InputError: one side is empty, or a weight is not above 0.
    """
    source, target = acts.sides(site, behaviour)
    rows = torch.cat([source, target]).double()
    return rows, torch.arange(len(rows)) >= len(source), torch.cat(weights(acts, behaviour))


def spread(values: Tensor, weight: Tensor) -> Tensor:
    """The standard deviation of weighted values ``[n]``, divided by the sum of weights.

    >>> spread(torch.tensor([-1.0, 1.0]), torch.ones(2))
    tensor(1.)
    """
    share = weight / weight.sum()
    return (share @ (values - share @ values).square()).sqrt()


def _unit(vector: Tensor) -> Tensor:
    """v / |v|; zeros stay zeros."""
    found: Tensor = vector / vector.norm().clamp_min(1e-30)
    return found

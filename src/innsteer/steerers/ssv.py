"""SSV: one vector, trained through the model until it says the target answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.batches import rows_by_weight
from innsteer.interventions import Shift
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Runner, Steerer
from innsteer.training import check, lessons, settings, target, teach, train_through


class Learner(Intervention):
    """h' = h + unit * coef @ shifts: a shift while it is trained.

    ``unit`` is the spread of a coordinate at its site, so that a step of the optimiser means the
    same at every site and in every model. ``shifts`` ``[k, d]`` starts at 0.
    """

    unit: Tensor

    def __init__(self, width: int, k: int, unit: Tensor) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("unit", unit)
        self.shifts = nn.Parameter(torch.zeros(k, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """coef @ the shifts in activation units."""
        return coef @ self.scaled().to(h.dtype)

    def scaled(self) -> Tensor:
        """The shifts ``[k, d]`` in activation units."""
        return self.unit * self.shifts


@dataclass(frozen=True)
class SSV(Steerer):
    """Train one vector through the frozen model until it says the target answers.

    h' = h + strength * v,  v = argmin  mean -log P(target answer | prompt; h + v)

    The supervised steering vector of AxBench: the map of DiffMean under the loss of language
    modelling. The same vector at every token: strengths add, and -s undoes s, but only strength 1
    is trained. d floats per site and behaviour. ``fit`` on rows alone has no answers to ask for: it
    is least squares on the pairs, whose best vector is the mean difference.

    Differences from the authors' code: v starts at 0, the loss is of an answer and not per token,
    v is added at the steered tokens (the last prompt token and the answer) and not at the whole
    prompt, the rate decays along a cosine, and the best validation state is kept.

    Attributes:
        steps, batch, learning_rate, weight_decay: AdamW through the model. The rate is in units of
            the spread of a coordinate at the site, per step.
        patience: stop after so many validations (one per 15 steps) without a better one; 0 = never.
        unmoved: weight of the divergence on unmoved sequences; the published form has none.
        epochs: of ``fit`` on rows.

    Raises:
        InputError: a number out of range.

    Reference:
        Wu et al., AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders
        (2025), https://arxiv.org/abs/2501.17148

    >>> rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0, 0, 0, 0, 0]))
    >>> SSV().fit(acts)[acts.site].shifts.round(decimals=1).abs()
    tensor([[2., 0., 0., 0., 0., 0.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2501.17148"
    needs: ClassVar[tuple[str, ...]] = ("pairs", "model")
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    steps: int = 150
    batch: int = 16
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    patience: int = 4
    unmoved: float = 0.0
    epochs: int = 150

    def __post_init__(self) -> None:
        check(self, ("steps", "batch", "epochs"), ("learning_rate", "weight_decay", "unmoved"))

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """A zero shift per site."""
        return Interventions({site: Shift(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Least squares on pairs of rows."""
        return on_rows(acts, epochs=self.epochs, seed=seed)

    def fit_through(self, run: Runner, *, seed: int = 0) -> Interventions:
        """Train through the model from the identity."""
        maps = learners(run.rows())
        train_through(run, maps, loss=target, seed=seed, **settings(self))
        return settled(maps)


def learners(acts: Activations) -> Interventions:
    """No edit at all, to be trained."""
    return Interventions(
        {
            site: Learner(width, len(acts.behaviours), unit(acts, site))
            for site, width in acts.widths.items()
        }
    )


def unit(acts: Activations, site: Site) -> Tensor:
    """The spread of a coordinate of a site's training rows: root mean of their variances."""
    return rows_by_weight(acts, site).var(0, correction=0).mean().sqrt().clamp_min(1e-12)


def settled(maps: Interventions) -> Interventions:
    """The trained shifts, for use."""
    parts = {}
    for site, part in maps.items():
        assert isinstance(part, Learner)
        parts[site] = Shift(part.width, len(part.shifts))
        parts[site].shifts.copy_(part.scaled().detach())
    return Interventions(parts)


def on_rows(acts: Activations, *, epochs: int, seed: int) -> Interventions:
    """Shifts by least squares on pairs of rows, for methods that are meant to see the model.

    Raises:
        InputError: rows without pairs.
    """
    maps = learners(acts)
    for site, part in maps.items():
        teach(part, lessons(acts, site), epochs=epochs, learning_rate=5e-2, seed=seed)
    return settled(maps)

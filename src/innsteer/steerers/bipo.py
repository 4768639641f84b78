"""BiPO: one vector, trained through the model to prefer the target, and reversed the source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from innsteer.activations import Activations
from innsteer.interventions import Shift
from innsteer.site import Site
from innsteer.steerer import Interventions, Runner, Steerer
from innsteer.steerers.ssv import learners, on_rows, settled
from innsteer.training import check, preference, settings, train_through


@dataclass(frozen=True)
class BiPO(Steerer):
    """Train one vector to raise the preference for the target answer, and to lower it reversed.

    h' = h + strength * v
    v = argmin  mean over pairs and s = +-1 of  -log sigmoid(s * beta * raised(s v))
    raised(v) = log [P(target; v) / P(target)] - log [P(source; v) / P(source)]

    Bi-directional preference optimisation: DPO with the plain model as the reference, and the
    vector in place of the weights. P is of whole answers, all tokens together. Both signs are
    trained, and the loss asks for odds alone: neither answer need become likely by itself. The same
    vector at every token: strengths add, and -s undoes s. d floats per site and behaviour. ``fit``
    on rows alone has no answers to ask for: it is least squares on the pairs, as that of ``ssv``.

    Differences from the authors' code: each pair is taken under both signs at every step, where
    theirs draws one sign per batch, which has the same mean; v is added at the steered tokens (the
    last prompt token and the answer) and not at the whole prompt; the rate has no warm-up and is in
    units of the site, where theirs is 5e-4 in those of Llama-2-7B's block 15; the best validation
    state is kept, where they choose among epochs by hand.

    Attributes:
        beta: how soon a pair that is told apart counts no more, per nat, > 0 to have any effect.
        steps, batch, learning_rate, weight_decay: AdamW through the model, cosine decay. The rate
            is in units of the spread of a coordinate at the site, per step.
        patience: stop after so many validations (one per 15 steps) without a better one; 0 = never.
        unmoved: weight of the divergence on unmoved sequences; the published form has none.
        epochs: of ``fit`` on rows.

    Raises:
        InputError: a number out of range.

    Reference:
        Cao et al., Personalized Steering of Large Language Models: Versatile Steering Vectors
        Through Bi-directional Preference Optimization (2024), https://arxiv.org/abs/2406.00045

    >>> import torch
    >>> rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0, 0, 0, 0, 0]))
    >>> BiPO().fit(acts)[acts.site].shifts.round(decimals=1).abs()
    tensor([[2., 0., 0., 0., 0., 0.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.00045"
    needs: ClassVar[tuple[str, ...]] = ("pairs", "model")
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    beta: float = 0.1
    steps: int = 150
    batch: int = 8
    learning_rate: float = 1e-2
    weight_decay: float = 0.05
    patience: int = 4
    unmoved: float = 0.0
    epochs: int = 150

    def __post_init__(self) -> None:
        amounts = ("beta", "learning_rate", "weight_decay", "unmoved")
        check(self, ("steps", "batch", "epochs"), amounts)

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
        train_through(run, maps, loss=preference(self.beta), seed=seed, **settings(self))
        return settled(maps)

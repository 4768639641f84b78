"""ReFT-r1: one direction that is learnt as a detector and as a vector to add."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.batches import rows_by_weight
from innsteer.interventions import Shift, shifts
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Runner, Steerer
from innsteer.steerers.ssv import on_rows
from innsteer.training import check, settings, target, train_through


class Detector(Intervention):
    """h' = h + sum_k coef_k size_k v_k,  size_k = mean of the ``top`` largest relu(h_t . v_k).

    What is trained, and never served: the rows of a call are taken for the tokens t of one
    sequence. ``directions`` ``[k, d]`` are made unit vectors v on the way.

    A call leaves behind ``size`` ``[k]``, and ``spare``, the sum of the latents that were not among
    the top, of the behaviours that have a strength.
    """

    def __init__(self, directions: Tensor, *, top: int) -> None:
        super().__init__()
        self.width, self.top = directions.shape[1], top
        self.size, self.spare = torch.zeros(len(directions)), torch.zeros(())
        self.directions = nn.Parameter(directions)

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """Every token gets the same vector, as long as the sequence's top latents say."""
        v = self.units().to(h.dtype)
        latents = torch.relu(h @ v.mT)
        largest, at = latents.topk(min(self.top, len(h)), dim=0)
        self.size = largest.mean(0)
        self.spare = (latents.scatter(0, at, 0.0) * (coef != 0)).sum()
        return (coef * self.size) @ v

    def units(self) -> Tensor:
        """v ``[k, d]``."""
        return nn.functional.normalize(self.directions, dim=-1)


@dataclass(frozen=True)
class ReFTr1(Steerer):
    """Train one direction through the frozen model, both to be detected and to be added.

    training:  h_t' = h_t + mean(top k of a) v,  a_t = relu(h_t . v),  |v| = 1
    loss:      mean of -log P(target answer) + l1 * (sum of a_t beyond the top k)
    steering:  h' = h + strength * size * v

    Rank-1 representation finetuning of AxBench. v has to be what texts with the behaviour already
    show, for its own latents say how much of it is added, and few tokens shall show it (l1); so
    h . v also tells which tokens have the behaviour. ``size`` is the mean of what training added to
    the training items, so strength 1 is the edit that was trained. The same vector at every token:
    strengths add, and -s undoes s. d floats per site and behaviour.

    Top latents are of a sequence, so every item is a pass of its own, over its steered tokens (the
    last prompt token and the answer): with answers of one token there is one latent, and ``l1`` has
    nothing to act on. ``fit`` on rows alone has no answers to ask for: it is least squares on the
    pairs, as that of ``ssv``.

    Differences from the authors' code: the strength is in units of the mean size, not of the
    largest latent of the evaluation's texts; v is made a unit vector on the way, which gives the
    gradient along the sphere that they project and renormalise for; no bias; ``l1`` has its full
    weight from the start instead of growing to it, so that validation losses can be compared; both
    terms are sums over an answer's tokens, not means; v's sign is drawn so that the mean row has a
    latent above 0, else nothing could be learnt from answers of one token.

    Attributes:
        top: k, latents per sequence that may be large; of shorter sequences all.
        l1: weight of the other latents, nats per activation unit.
        steps, batch, learning_rate: AdamW through the model, cosine decay; the best validation
            state is kept. The rate is per coordinate of v, whose own are about 1 / sqrt(d).
        patience: stop after so many validations (one per 15 steps) without a better one; 0 = never.
        epochs: of ``fit`` on rows.

    Raises:
        InputError: a number out of range.

    Reference:
        Wu et al., AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders
        (2025), https://arxiv.org/abs/2501.17148

    >>> rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0, 0, 0, 0, 0]))
    >>> ReFTr1().fit(acts)[acts.site].shifts.round(decimals=1).abs()
    tensor([[2., 0., 0., 0., 0., 0.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2501.17148"
    needs: ClassVar[tuple[str, ...]] = ("pairs", "model")
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    top: int = 8
    l1: float = 5e-3
    steps: int = 90
    batch: int = 8
    learning_rate: float = 1e-2
    patience: int = 4
    epochs: int = 150

    def __post_init__(self) -> None:
        check(self, ("top", "steps", "batch", "epochs"), ("l1", "learning_rate"))

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """A zero shift per site."""
        return Interventions({site: Shift(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Least squares on pairs of rows."""
        return on_rows(acts, epochs=self.epochs, seed=seed)

    def fit_through(self, run: Runner, *, seed: int = 0) -> Interventions:
        """Train through the model from random directions."""
        maps = self._start(run.rows(), seed)
        train_through(run, maps, loss=self._loss, unmoved=0.0, seed=seed, **settings(self))
        return self._settled(run, maps)

    def detectors(self, fitted: Interventions) -> dict[Site, Tensor]:
        """v, as long as what is added: training made its own latents h . v."""
        return shifts(fitted)

    def _start(self, acts: Activations, seed: int) -> Interventions:
        """A random direction per behaviour and site, on the side where rows are."""
        parts = {}
        for number, (site, width) in enumerate(acts.widths.items()):
            draw = torch.Generator().manual_seed(seed * 1009 + number)
            drawn = torch.randn(len(acts.behaviours), width, generator=draw)
            ahead = drawn @ rows_by_weight(acts, site).mean(0) >= 0
            signed = torch.where(ahead.unsqueeze(-1), drawn, -drawn)
            parts[site] = Detector(nn.functional.normalize(signed, dim=-1), top=self.top)
        return Interventions(parts)

    def _loss(self, run: Runner, maps: Interventions, items: Sequence[int]) -> Tensor:
        """Of each item by itself: its tokens are the rows of a call."""
        return torch.stack(
            [
                target(run, maps, [item]) + self.l1 * sum(part.spare for part in _parts(maps))
                for item in items
            ]
        ).mean()

    @torch.no_grad()
    def _settled(self, run: Runner, maps: Interventions) -> Interventions:
        """Shifts along v, as long as those of the training items on average."""
        fitted = self.build({site: part.width for site, part in maps.items()}, len(run.behaviours))
        for row, behaviour in enumerate(run.behaviours):
            sizes = []
            for item in run.items("train", behaviour):
                target(run, maps, [item])
                sizes.append([part.size[row] for part in _parts(maps)])
            means = torch.tensor(sizes).mean(0)
            for (_, shift), part, size in zip(fitted.items(), _parts(maps), means, strict=True):
                assert isinstance(shift, Shift)
                shift.shifts[row] = size * part.units()[row]
        return fitted


def _parts(maps: Interventions) -> list[Detector]:
    """The detectors of all sites."""
    return [part for _, part in maps.items() if isinstance(part, Detector)]

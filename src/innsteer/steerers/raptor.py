"""RAPTOR: the least move along a ridge probe's normal that gives it a wanted probability."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.batches import split_items
from innsteer.errors import InputError
from innsteer.interventions import SetPoint
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means
from innsteer.steerers.iti import labelled
from innsteer.steerers.odesteer import logistic


class Probe(NamedTuple):
    """Log-odds w.h + b of target over source, in units of the rows: ``[d]`` and a number."""

    weight: Tensor
    bias: Tensor

    def log_odds(self, rows: Tensor) -> Tensor:
        """Of rows ``[n, d]``: ``[n]``."""
        return rows @ self.weight + self.bias


@dataclass(frozen=True)
class RAPTOR(Steerer):
    """Move a row the least that gives a ridge probe the wanted probability of the target.

    h' = h + strength * a u;  u = w / |w|,  a = (logit(p) - w.h - b) / |w|

    (w, b) is an L2-penalised logistic regression of source against target on rows standardised per
    dimension, written in units of the raw rows. Its penalty is the candidate that is right most
    often on held-out rows; of equal ones the one with the least log-loss there. Held out is the
    validation part, or a share of the training part's items; the final probe is fitted on all
    training rows. Closed form but for the regressions, which are convex. Pairing does not matter,
    row weights count. The artifact is 3 d + 1 floats per site and behaviour.

    At strength 1 every row has the probability p: one that has more is pulled back. Strength s goes
    the share s of the way, -s the same away, which does not undo it. What a probe finds easy says
    little of what a model will heed: on separable rows the lightest penalty lets |w| grow, and p is
    reached by next to no move; a heavy one leaves all rows near 1/2, and p far off. So p is None by
    default, a level that does not hang on |w|.

    The paper leaves a tie of the accuracy open; log-loss decides it here because p is read off the
    probe, so that it should be calibrated. It names no p for all its tasks.

    Attributes:
        p: wanted probability, in (0, 1), exclusive. None = the level at which the mean source row
            has come as far along the difference of the sides' means as the mean target row is:
            w.h + b = w.m_s + b + |w| |g|^2 / (u.g) with g = m_t - m_s. It lies beyond the target's
            own level where u and g part: by 1 / cos(u, g)^2.
        grid: candidates for the regression's inverse penalty C = 1 / lambda, unitless, each > 0;
            one candidate fixes it.
        holdout: share of the training items held out, in (0, 1), without a validation part.

    Raises:
        InputError: a field out of its range, or (by ``fit``) a side without rows, or sides of
            one mean.

    Reference:
        Gao et al., RAPTOR: Ridge-Adaptive Logistic Probes (2026),
        https://arxiv.org/abs/2602.00158

    >>> source = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(source, source + torch.tensor([3.0, 0.0]))
    >>> method = RAPTOR(p=0.9)
    >>> probe = method.probe(acts, acts.site, "behaviour")
    >>> moved = method.fit(acts)[acts.site](source, torch.ones(40, 1))
    >>> torch.sigmoid(probe.log_odds(moved.double()))[:2].round(decimals=4).tolist()
    [0.9, 0.9]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.00158"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    p: float | None = None
    grid: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    holdout: float = 0.2

    def __post_init__(self) -> None:
        if self.p is not None and not 0 < self.p < 1:
            raise InputError(f"p={self.p}", expected="between 0 and 1, or None")
        if not self.grid or not all(0 < each < math.inf for each in self.grid):
            raise InputError(f"grid={self.grid}", expected="one or more positive numbers")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout={self.holdout}", expected="between 0 and 1")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes."""
        return Interventions({site: SetPoint(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fitted in float64, stored in float32; the seed draws what is held out."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, SetPoint)
            for row, behaviour in enumerate(acts.behaviours):
                probe = self.probe(acts, site, behaviour, seed=seed)
                norm = probe.weight.norm()
                source, target = side_means(train, site, behaviour)
                apart = target - source
                unit = probe.weight / norm
                part.reads[row] = part.writes[row] = unit
                part.centres[row] = source
                # Above 0 for any probe that has learned something, as the loss is convex.
                if not (along := apart @ unit) > 0:
                    raise InputError(
                        f"site {site}: the sides of {behaviour!r} have one mean, and a probe of "
                        "them no normal",
                        expected="sides that differ on the mean",
                    )
                if self.p is None:
                    part.levels[row] = apart.square().sum() / along
                else:
                    wanted = math.log(self.p / (1 - self.p)) - probe.log_odds(source)
                    part.levels[row] = wanted / norm
        return fitted

    def probe(self, acts: Activations, site: Site, behaviour: str, *, seed: int = 0) -> Probe:
        """The probe of a behaviour at a site, with the penalty that held-out rows choose.

        Args:
            acts: the recording of ``fit``. seed: draws what is held out.

        Raises:
            InputError: a side without rows.
        """
        mine = acts.where(behaviour=behaviour)
        best = self.grid[0]
        if len(self.grid) > 1:
            known, held = split_items(mine, self.holdout, seed)
            rows, others = labelled(known, site, behaviour), labelled(held, site, behaviour)
            best = min(self.grid, key=lambda C: _faults(ridge_probe(*rows, C), *others))
        return ridge_probe(*labelled(mine.where(split="train"), site, behaviour), best)


def ridge_probe(rows: Tensor, is_target: Tensor, weight: Tensor, C: float) -> Probe:
    """A logistic regression on rows ``[n, d]`` standardised by weight, in units of the raw rows.

    A dimension that does not vary gets the weight 0.
    """
    share = weight / weight.sum()
    mean = share @ rows
    spread = (share @ (rows - mean).square()).sqrt()
    # What float32 rows cannot resolve beside their mean is no variation.
    spread = torch.where(spread > 1e-6 * mean.abs(), spread, torch.inf)
    inner, bias = logistic((rows - mean) / spread, is_target, weight, C)
    outer = inner / spread
    return Probe(outer, bias - outer @ mean)


def _faults(probe: Probe, rows: Tensor, is_target: Tensor, weight: Tensor) -> tuple[float, float]:
    """The share of rows, by weight, that a probe gets wrong, and its mean log-loss."""
    margin = probe.log_odds(rows) * (2.0 * is_target - 1)
    wrong = (margin <= 0).double()
    loss = torch.nn.functional.softplus(-margin)
    return float(weight @ wrong / weight.sum()), float(weight @ loss / weight.sum())

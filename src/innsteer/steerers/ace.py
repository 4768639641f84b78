"""ACE: set the coordinate along the difference of means to a level between the sides, or beyond."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch.nn.functional import normalize

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.interventions import SetPoint
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means


@dataclass(frozen=True)
class AffineConceptEditing(Steerer):
    """Set every row's coordinate along the difference of means to one level.

    h' = h + strength * (((m_s - h).r + alpha |m_t - m_s|) r);  r = (m_t - m_s) / |m_t - m_s|

    m_s and m_t are the weighted means of source and target rows. Strength 1 takes each row's own
    coordinate out and puts that of m_s + alpha (m_t - m_s) in, whatever the row had: it does not
    push a row that is there already, and pulls back one that is beyond. What is orthogonal to r
    stays. Strengths between 0 and 1 go that share of the way; -1 mirrors the edit and does not
    invert it. With m_s = 0 and alpha = 0 it is ``ablation``, which takes 0 for "without the
    behaviour"; ``diffmean`` adds alpha (m_t - m_s) to what a row has.

    Closed form, the artifact is 3 d + 1 floats per site and behaviour. Pairing does not matter.
    Where the means are equal nothing moves. The public code measures alpha from the mean of all
    rows instead of the source's, as the paper has it and as here: its alpha is this one less the
    target rows' share. Authors steer one layer, or all, at all tokens.

    Attributes:
        alpha: the level, unitless: 0 = the source's mean, 1 = the target's; any finite number. It
            says where rows go, strength how much of the way.

    Raises:
        InputError: ``alpha`` is not finite.

    Reference:
        Marshall et al., Refusal in LLMs is an Affine Function (2024),
        https://arxiv.org/abs/2411.09003

    >>> import torch
    >>> acts = Activations.of_sides(torch.zeros(4, 2), torch.tensor([[2.0, 0.0]] * 4))
    >>> part = AffineConceptEditing().fit(acts)[acts.site]
    >>> part(torch.tensor([[0.0, 1.0], [5.0, 1.0]]), torch.ones(2, 1)).tolist()
    [[2.0, 1.0], [2.0, 1.0]]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.09003"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not isfinite(self.alpha):
            raise InputError(f"alpha={self.alpha}", expected="a finite number")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes."""
        return Interventions({site: SetPoint(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Means in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, SetPoint)
            for row, behaviour in enumerate(acts.behaviours):
                source, target = side_means(train, site, behaviour)
                part.reads[row] = part.writes[row] = normalize(target - source, dim=0)
                part.centres[row] = source
                part.levels[row] = self.alpha * (target - source).norm()
        return fitted

"""DiffMean: add the difference of the two sides' means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from innsteer.activations import Activations
from innsteer.interventions import Shift, shifts
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means


@dataclass(frozen=True)
class DiffMean(Steerer):
    """Add the difference of class means, the same vector at every token.

    h' = h + strength * (mean target - mean source)

    Closed form, in one pass over the rows; the artifact is d floats per site and behaviour. CAA is
    this method with rows read at the answer letter; also called mean difference or ActAdd over many
    pairs. Strengths add, and -s undoes s. Pairing does not matter. The vector is not normalised:
    strength 1 moves the source mean onto the target mean, both weighted by row.

    Reference:
        Panickssery et al., Steering Llama 2 via Contrastive Activation Addition (2023),
        https://arxiv.org/abs/2312.06681; DiffMean in Wu et al., AxBench (2025),
        https://arxiv.org/abs/2501.17148

    >>> import torch
    >>> acts = Activations.of_sides(torch.zeros(4, 2), torch.tensor([[2.0, 0.0]] * 4))
    >>> maps = DiffMean().fit(acts)
    >>> maps[acts.site](torch.zeros(1, 2), torch.tensor([[0.5]]))
    tensor([[1., 0.]])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2312.06681"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """A zero shift per site."""
        return Interventions({site: Shift(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Means in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for site in acts.sites:
            shift = fitted[site]
            assert isinstance(shift, Shift)
            for row, behaviour in enumerate(acts.behaviours):
                source, target = side_means(train, site, behaviour)
                shift.shifts[row] = target - source
        return fitted

    def detectors(self, fitted: Interventions) -> dict[Site, Tensor]:
        """The differences of means themselves."""
        return shifts(fitted)

"""Gaussian AcT: carry each dimension's mean and spread onto the target's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from innsteer.activations import Activations
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer
from innsteer.steerers.linear_act import LinearAcT


@dataclass(frozen=True)
class GaussianAcT(Steerer):
    """Give each dimension the target's mean and spread, as between two Gaussians.

    h' = h + strength * (T(h) - h) where low < h < high, else h;  per dimension
    T(h) = m_t + s_t / s_s (h - m_s)

    m, s: weighted mean and standard deviation (divided by n) of the source and target rows. Of all
    maps that carry the one Gaussian to the other, T moves values least. It is ``linear_act`` with
    ``form="gaussian"``, without bounds: where that fits the sorted rows, this takes two moments of
    each side, which need fewer rows. ``mimic`` is the sibling that knows of correlations; with
    equal spreads it is ``mean_act``. Pairing does not matter. Closed form; the artifact is 5 d
    floats per site and behaviour. Strength 1 is the fitted map, between 0 and 1 the path of
    transport; -1 mirrors the edit and does not invert it.

    Where the public code differs: it leaves dimensions alone in which a side's spread is 1e-4 or
    less; here a spread counts as 1e-4 at least, and a dimension in which the source does not vary
    gets the shift of the means. It divides by n - 1, so that sides of unequal numbers get another
    slope. It writes "all" as (-1e6, 1e6), where here it is every number.

    Attributes:
        support: where to act, by percentiles of the source rows, as in ``linear_act``:
            ``q_LOW_HIGH`` with 0 <= LOW < HIGH <= 100, or ``q_all`` for no bounds, as in the public
            code.

    Raises:
        InputError: a support that cannot be read, or (by ``fit``) source weights that sum to less
            than 2 where percentiles are asked for.

    Reference:
        Rodriguez et al., Controlling Language and Diffusion Models by Transporting Activations
        (2024), https://arxiv.org/abs/2410.23054

    >>> import torch
    >>> acts = Activations.of_sides(torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]]))
    >>> part = GaussianAcT().fit(acts)[acts.site]  # means 0 and 3, deviations 1 and 2
    >>> part(torch.tensor([[1.0]]), torch.tensor([[1.0]])).tolist()
    [[5.0]]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.23054"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    support: str = "q_all"

    def __post_init__(self) -> None:
        self._line()  # refuses a support that cannot be read

    def _line(self) -> LinearAcT:
        """The method that fits the lines."""
        return LinearAcT(support=self.support, form="gaussian")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Lines of slope 1 with empty intervals."""
        return self._line().build(widths, k, sizes)

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fitted in float64, stored in float32; the seed is not used."""
        return self._line().fit(acts, seed=seed)

"""Mean-AcT: carry each dimension's mean onto the target's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from innsteer.activations import Activations
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer
from innsteer.steerers.linear_act import Diagonal, LinearAcT


@dataclass(frozen=True)
class MeanAcT(Steerer):
    """Shift each dimension by the difference of the sides' means, where it lies within bounds.

    h' = h + strength * (mean target - mean source) where low < h < high, else h;  per dimension

    Means are weighted, pairing does not matter. It is ``linear_act`` with slope 1: the transport
    between two sides that differ in nothing but their means. Without bounds, the default and the
    paper's, it is ``diffmean``: strengths add, and -s undoes s. Within bounds they do not, for an
    edit may carry a row out of them. Closed form; the artifact is 5 d floats per site and
    behaviour. Strength is the paper's lambda, in [0, 1]; others extrapolate.

    As for ``linear_act``: the paper averages a sentence's tokens into one row
    (``record(read="mean")``), and fits layer after layer on rows that the earlier layers have
    moved; here every site is fitted on rows as recorded. The public code leaves dimensions alone in
    which a side's standard deviation is 1e-4 or less, of which the paper says nothing; here they
    are shifted too.

    Attributes:
        support: where to act, by percentiles of the source rows, as in ``linear_act``:
            ``q_LOW_HIGH`` with 0 <= LOW < HIGH <= 100, or ``q_all`` for no bounds.

    Raises:
        InputError: a support that cannot be read, or (by ``fit``) source weights that sum to less
            than 2 where percentiles are asked for.

    Reference:
        Rodriguez et al., Controlling Language and Diffusion Models by Transporting Activations
        (2024), https://arxiv.org/abs/2410.23054

    >>> import torch
    >>> source = torch.tensor([[0.0], [1.0], [2.0]])
    >>> acts = Activations.of_sides(source, 2 * source + 3)
    >>> part = MeanAcT(support="q_0_100").fit(acts)[acts.site]
    >>> part(torch.tensor([[1.5], [9.0]]), torch.ones(2, 1)).tolist()
    [[5.5], [9.0]]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.23054"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    support: str = "q_all"

    def __post_init__(self) -> None:
        LinearAcT(support=self.support)  # refuses a support that cannot be read

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Shifts of 0 with empty intervals."""
        return Interventions({site: Diagonal(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fitted in float64, stored in float32; the seed is not used."""
        fitted = LinearAcT(support=self.support).fit(acts, seed=seed)
        for _, part in fitted.items():
            assert isinstance(part, Diagonal)
            part.gains.zero_()  # of the lines, the shifts of the means are kept
        return fitted

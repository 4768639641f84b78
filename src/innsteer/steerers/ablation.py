"""Ablation: take the direction that tells the sides apart out of every row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import normalize

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.interventions import SetPoint
from innsteer.site import Site
from innsteer.steerer import Interventions, Steerer, side_means


@dataclass(frozen=True)
class Ablation(Steerer):
    """Project every row off the difference of means, so that the sides lie alike along it.

    h' = h - strength * (h.r) r;  r = (mean target - mean source), of unit norm

    Also called directional ablation; r fitted on harmful (target) and harmless (source) requests is
    the refusal direction. It erases: strength 1 leaves every row 0 along r, whichever side it was
    of, and so carries source to target only as far as the target lies at 0; strength -1 doubles
    the coordinate instead. ``ace`` sets it to a level of the rows' own, ``diffmean`` adds the
    difference. Closed form; the artifact is 3 d + 1 floats per site and behaviour. Pairing does not
    matter. Where the means are equal nothing is erased.

    The authors take one r from one layer and token, and ablate it at every block's input and at the
    outputs of every attention and MLP, at all tokens: that is what weights orthogonalised to r do.
    Here that is a fit on the sites ``residual``, ``attention`` and ``mlp`` of all layers, with
    ``direction`` naming one, steered with scope ``all``; only the first block still reads its
    embedding whole. Without ``direction`` each site has its own r. Their choice of the layer, by
    refusals that are bypassed and induced, needs the model: fit several and compare.

    Attributes:
        direction: the recorded site whose r is removed at every site, such as "15" or "15.mlp";
            None = each site's own.

    Raises:
        InputError: ``direction`` is no site, or (by ``fit``) the sites are of several widths.
        UnknownName: (by ``fit``) ``direction`` was not recorded.

    Reference:
        Arditi et al., Refusal in Language Models Is Mediated by a Single Direction (2024),
        https://arxiv.org/abs/2406.11717

    >>> import torch
    >>> acts = Activations.of_sides(torch.zeros(4, 2), torch.tensor([[2.0, 0.0]] * 4))
    >>> Ablation().fit(acts)[acts.site](torch.tensor([[5.0, 3.0]]), torch.ones(1, 1)).tolist()
    [[0.0, 3.0]]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11717"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False
    erases: ClassVar[bool] = True

    direction: str | None = None

    def __post_init__(self) -> None:
        if self.direction is not None:
            # "15" and "15.residual" are one artifact.
            object.__setattr__(self, "direction", str(Site.parse(self.direction)))

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes."""
        return Interventions({site: SetPoint(width, k) for site, width in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Means in float64, stored in float32; the seed is not used."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        if self.direction is not None:
            train = train.at(Site.parse(self.direction))
            if set(acts.widths.values()) != set(train.widths.values()):
                raise InputError(
                    f"direction={self.direction!r} for sites of other widths",
                    expected=f"sites of width {train.widths[train.site]} alone",
                    remedy="record streams of one width: residual, attention, mlp",
                )
        for site in acts.sites:
            part = fitted[site]
            assert isinstance(part, SetPoint)
            for row, behaviour in enumerate(acts.behaviours):
                own = site if self.direction is None else train.site
                source, target = side_means(train, own, behaviour)
                part.reads[row] = part.writes[row] = normalize(target - source, dim=0)
        return fitted

"""LoReFT: a low-rank edit trained through the model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.batches import rows_by_weight
from innsteer.errors import InputError, UnknownName
from innsteer.flows import Standardise
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Runner, Steerer
from innsteer.training import LOSSES, lessons, settings, teach, train_through

Form = Literal["loreft", "tanh"]


class LowRank(Intervention):
    """h' = h + sum_k coef_k R_k' act(W_k z + b_k), z = (h - mean) / std.

    With act the identity and R's rows orthonormal this is LoReFT, h + R'(W' h + b' - R h), its
    W' h + b' - R h written as one affine map of standardised rows. With act = tanh and R free it is
    the bounded form.

    Args:
        width: d. k: number of behaviours. rank: r. form: ``loreft`` or ``tanh``.

    ``write`` ``[k, r, d]``, ``read`` ``[k, r, d]``, ``bias`` ``[k, r]``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, k: int = 1, *, rank: int = 8, form: Form = "loreft") -> None:
        super().__init__()
        self.width, self.form = width, form
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.write = nn.Parameter(torch.zeros(k, rank, width))
        self.read = nn.Parameter(torch.zeros(k, rank, width))
        self.bias = nn.Parameter(torch.zeros(k, rank))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """Read, bound where asked for, write."""
        z = (h - self.mean.to(h.dtype)) / self.std.to(h.dtype)
        k, rank = self.bias.shape
        flat = nn.functional.linear(
            z, self.read.flatten(0, 1).to(h.dtype), self.bias.flatten().to(h.dtype)
        )
        inner = flat.view(len(h), k, rank)
        inner = torch.tanh(inner) if self.form == "tanh" else inner
        return torch.einsum("nk,nkr,krd->nd", coef, inner, self.rotation().to(h.dtype))

    def rotation(self) -> Tensor:
        """R: while it is trained, LoReFT's is made orthonormal on the way; then it is stored so."""
        if self.form == "tanh" or not self.write.requires_grad:
            return self.write
        rotation: Tensor = torch.linalg.qr(self.write.mT)[0].mT
        return rotation


@dataclass(frozen=True)
class LoReFT(Steerer):
    """Train a low-rank edit through the frozen model.

    h' = h + strength * R'(W h + b - R h),  R orthonormal rows [rank, d]      form "loreft"
    h' = h + strength * U tanh(V h + c)                                       form "tanh"

    The published loss is that of the language model on the target answers at strength 1
    (``loss="target"``); ``said`` and ``odds`` train both directions, so that a negative strength
    steers away. Strengths do not add and -s does not undo s. 2 * rank * d floats per site and
    behaviour. Starts at the identity, on standardised rows. ``fit`` on rows alone is least squares
    on the pairs, both ways, unmoved rows staying.

    Attributes:
        rank: r. form: see above.
        loss: ``target``, ``said`` or ``odds``, see ``training``.
        steps, batch, learning_rate, weight_decay: AdamW through the model, cosine decay; the best
            validation state is kept.
        patience: stop after so many validations (one per 15 steps) without a better one; 0 = never.
        unmoved: weight of the divergence on unmoved sequences; the published form has none.
        epochs: of ``fit`` on rows.

    Raises:
        UnknownName: of a form or a loss. InputError: a number out of range.

    Reference:
        Wu et al., ReFT: Representation Finetuning for Language Models (2024),
        https://arxiv.org/abs/2404.03592

    >>> rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.of_sides(rows, rows + torch.tensor([2.0, 0, 0, 0, 0, 0]))
    >>> part = LoReFT(rank=2, epochs=60).fit(acts)[acts.site]
    >>> bool((part(rows, torch.ones(64, 1)) - rows)[:, 0].mean() > 1)
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2404.03592"
    needs: ClassVar[tuple[str, ...]] = ("pairs", "model")
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    rank: int = 8
    form: Form = "loreft"
    loss: str = "said"
    steps: int = 300
    batch: int = 32
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    patience: int = 4
    unmoved: float = 0.0
    epochs: int = 150

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise UnknownName("form", self.form, get_args(Form))
        if self.loss not in LOSSES:
            raise UnknownName("loss", self.loss, list(LOSSES))
        for name, least in {"rank": 1, "steps": 1, "batch": 1, "epochs": 1, "patience": 0}.items():
            if not least <= getattr(self, name) <= 1_000_000:
                raise InputError(f"{name}={getattr(self, name)}", expected=f">= {least}")
        for name in ("learning_rate", "weight_decay", "unmoved"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}", expected=">= 0")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Zeros of the right shapes."""
        return Interventions(
            {
                site: LowRank(width, k, rank=min(self.rank, width), form=self.form)
                for site, width in widths.items()
            }
        ).requires_grad_(False)

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Least squares on pairs of rows."""
        fitted = self._start(acts, seed)
        for site, part in fitted.items():
            # The bias is in activation units: small steps would not get there.
            rate = 3e-2
            teach(part, lessons(acts, site), epochs=self.epochs, learning_rate=rate, seed=seed)
        return _settled(fitted)

    def fit_through(self, run: Runner, *, seed: int = 0) -> Interventions:
        """Train through the model from the identity."""
        fitted = self._start(run.rows(), seed)
        train_through(run, fitted, loss=LOSSES[self.loss], seed=seed, **settings(self))
        return _settled(fitted)

    def _start(self, acts: Activations, seed: int) -> Interventions:
        """No edit at all; random directions on the side that does not have to be zero for that."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        for number, (site, part) in enumerate(fitted.items()):
            assert isinstance(part, LowRank)
            draw = torch.Generator().manual_seed(seed * 1009 + number)
            scale = Standardise(part.width)
            scale.initialise(rows_by_weight(acts, site))
            part.mean.copy_(scale.mean)
            part.std.copy_(scale.std)
            random = torch.randn(part.write.shape, generator=draw) / math.sqrt(part.width)
            if self.form == "loreft":
                part.write.copy_(torch.linalg.qr(random.mT)[0].mT)
            else:
                part.read.copy_(random)
        return fitted.requires_grad_(True)


@torch.no_grad()
def _settled(fitted: Interventions) -> Interventions:
    """The trained map with R stored orthonormal, for use."""
    for _, part in fitted.items():
        assert isinstance(part, LowRank)
        part.write.copy_(part.rotation())
    return fitted.eval().requires_grad_(False)

"""HPR: turn a row towards its mirror image by a learnt angle, and keep its norm."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.batches import rows_by_weight
from innsteer.errors import InputError
from innsteer.flows import Standardise
from innsteer.readouts import aims
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer

# Units of the angle's last hidden layers: halving a small width would leave none.
FLOOR = 8


class Turn(Intervention):
    """Turn h by coef_k angle_k(h) towards normal_k, in the plane of both, about the origin.

    With u = h/|h|, t_k the unit tangent at u towards normal_k and a = sum_k coef_k angle_k(h) t_k,
    h' = |h| (cos|a| u + sin|a| a/|a|): for one behaviour a rotation, for several the point that
    the sum of their turns leads to on the sphere. The norm is kept. A row along a normal stays.

    angle_k(h) = pi sigmoid(network_k((h - mean) / std)), in (0, pi): linear layers with GELU.

    Args:
        width: d. k: number of behaviours, each with a network of its own.
        hidden: widths of the networks' hidden layers.
        gate: turn only rows on the source side, normal_k . h < 0, for behaviour k.

    ``normals`` ``[k, d]`` have norm 1, or 0 for no turn at all.

    Raises:
        InputError: the networks would hold more than 2^30 numbers (4 GiB).
    """

    normals: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, width: int, k: int = 1, *, hidden: Sequence[int] = (), gate: bool = False
    ) -> None:
        super().__init__()
        ends = [width, *hidden, 1]
        shapes = list(zip(ends[1:], ends[:-1], strict=True))
        # An artifact names width and k: a small file must not make us build a giant.
        if k * sum(rows * columns for rows, columns in shapes) > 2**30:
            raise InputError(
                f"{k} networks on rows of width {width}",
                expected="at most 2^30 numbers in them",
                remedy="fit fewer behaviours at once",
            )
        self.width, self.gate = width, gate
        self.register_buffer("normals", torch.zeros(k, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.weights = nn.ParameterList([torch.zeros(k, *shape) for shape in shapes])
        self.biases = nn.ParameterList([torch.zeros(k, rows) for rows, _ in shapes])

    def angles(self, h: Tensor) -> Tensor:
        """What each behaviour's network makes of rows ``[n, d]``: radians ``[n, k]``."""
        x = ((h - self.mean.to(h.dtype)) / self.std.to(h.dtype)).expand(len(self.normals), -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.gelu(x) if layer else x
            x = torch.baddbmm(bias.to(h.dtype).unsqueeze(1), x, weight.to(h.dtype).mT)
        angles: Tensor = math.pi * torch.sigmoid(x).squeeze(-1).mT
        return angles

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """A step on the sphere of the row's norm."""
        normals = self.normals.to(h.dtype)
        norm = h.norm(dim=-1, keepdim=True)
        unit = h / norm.clamp_min(1e-30)
        along = unit @ normals.mT
        if self.gate:
            coef = torch.where(along < 0, coef, 0)
        # Nearer to the normal than this, which way is across is lost in rounding.
        across = (1 - along.square()).clamp_min(1e-6).sqrt()
        turns = coef * self.angles(h) / across
        tangent = turns @ normals - (turns * along).sum(-1, keepdim=True) * unit
        angle = tangent.norm(dim=-1, keepdim=True)
        # cos - 1 by the half angle: beside a large norm, the difference would be rounded away.
        back = 2 * (angle / 2).sin().square() * h
        move: Tensor = norm * torch.sinc(angle / math.pi) * tangent - back
        return move


@dataclass(frozen=True)
class HPR(Steerer):
    """Householder pseudo-rotation: turn a row towards its mirror image by an angle, norm kept.

    h' = cos(strength * g) h + sin(strength * g) |h| t,  g = angle(h) in (0, pi)

    t is the unit vector across h towards w, the normal of a hyperplane through the origin that
    parts source from target. This is the paper's
    sin(g)/sin(g2) h_r + sin(g2 - g)/sin(g2) h with h_r the mirror image of a source row behind the
    hyperplane and g2 the angle of h and h_r, written without the division: both lie in the plane of
    h and w, and g2 near 0 does no harm. w is a logistic regression without intercept, the angle a
    small network trained on the angle between a source row and its own target (0 for target rows).

    Strength scales the angle: 1 is the learnt one, -1 turns away by as much, and -s does not undo
    s, for the angle is read again. Rows like the target's have an angle of about 0 under either
    sign, so a negative strength hardly leads them back: to steer away, swap the sides. Of several
    behaviours the turns add, as tangents, and one step on the sphere takes their sum. About
    0.66 d^2 floats per site and behaviour at 4 layers.

    Differences from the authors' code: the regression is solved, not trained together with the
    network; the network sees standardised rows, starts at the mean angle and trains for longer; and
    every row is turned, not only those that the regression finds on the source side (``gate``):
    the angle says by itself that rows like the target's need none, and does so without a jump. As
    theirs, the angle is not cut off at the mirror image. Pairs differ in more than the behaviour,
    so strength 1 goes beyond it: on pairs of open answers about one and a half gaps of the means.

    Attributes:
        layers: linear layers of the network, 1 to 8; widths halve from d, and end at 8 or d.
        epochs, batch, learning_rate: AdamW on the angles; batch in pairs, the rate decays to 0.
        C: inverse strength of the regression's L2 penalty, > 0, on rows divided by their spread
            about the sides' means; towards 0, w is the difference of means.
        gate: the authors' form: turn only rows with w . h < 0, by either sign of strength.

    Raises:
        InputError: a number out of range, or rows without pairs.

    Reference:
        Pham and Nguyen, Householder Pseudo-Rotation (2024), https://arxiv.org/abs/2409.10053

    >>> draw = torch.Generator().manual_seed(0)
    >>> source = torch.randn(64, 6, generator=draw) + torch.tensor([9.0, -4, 0, 0, 0, 0])
    >>> acts = Activations.of_sides(source, source * torch.tensor([1.0, -1, 1, 1, 1, 1]))
    >>> moved = HPR(learning_rate=0.02).fit(acts)[acts.site](source, torch.ones(64, 1))
    >>> bool((moved[:, 1].mean() - 4).abs() < 1)  # -4 before
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.10053"
    needs: ClassVar[tuple[str, ...]] = ("pairs",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True

    layers: int = 4
    epochs: int = 30
    batch: int = 16
    learning_rate: float = 2e-3
    C: float = 0.1
    gate: bool = False

    def __post_init__(self) -> None:
        for name, most in {"layers": 8, "epochs": 1_000_000, "batch": 1_000_000}.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"1 to {most}")
        for name in ("learning_rate", "C"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}", expected="a positive number")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Normals and networks of zeros: no turn."""
        return Interventions(
            {
                site: Turn(width, k, hidden=self._hidden(width), gate=self.gate)
                for site, width in widths.items()
            }
        ).requires_grad_(False)

    def _hidden(self, width: int) -> list[int]:
        """Half of the width, a quarter and so on."""
        return [max(width >> layer, min(FLOOR, width)) for layer in range(1, self.layers)]

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Solve for the normals in float64, train the networks in float32."""
        fitted = self.build(acts.widths, len(acts.behaviours))
        train = acts.where(split="train")
        for number, (site, part) in enumerate(fitted.items()):
            assert isinstance(part, Turn)
            scale = Standardise(part.width)
            scale.initialise(rows_by_weight(acts, site))
            part.mean.copy_(scale.mean)
            part.std.copy_(scale.std)
            pairs = [Pairs.of(train, site, behaviour) for behaviour in acts.behaviours]
            for row, own in enumerate(pairs):
                part.normals[row] = self._normal(own)
            self._train(part, pairs, torch.Generator().manual_seed(seed * 1009 + number))
        return fitted.requires_grad_(False)

    def _normal(self, own: "Pairs") -> Tensor:
        """The unit normal ``[d]``, pointing to the target's side."""
        from sklearn.linear_model import LogisticRegression

        share = own.weight / own.weight.sum()
        spread = torch.stack(
            [share @ (side - share @ side).square() for side in (own.source, own.target)]
        )
        rows = torch.cat([own.source, own.target]) / spread.mean().sqrt().clamp_min(1e-12)
        is_target = torch.arange(len(rows)) >= len(own.source)
        model = LogisticRegression(C=self.C, fit_intercept=False, tol=1e-8, max_iter=10_000)
        model.fit(rows.numpy(), is_target.numpy(), sample_weight=own.weight.repeat(2).numpy())
        found = torch.from_numpy(model.coef_[0])
        unit: Tensor = found / found.norm().clamp_min(1e-30)
        return unit

    def _train(self, part: Turn, pairs: Sequence["Pairs"], draw: torch.Generator) -> None:
        """Least squares on the angles: of source rows to their targets, and 0 of target rows."""
        wanted = [own.angles for own in pairs]
        rows = torch.cat([torch.stack([own.source, own.target], 1) for own in pairs]).float()
        asked = torch.cat(wanted).float()
        weight = torch.cat([own.weight for own in pairs]).float()
        column = torch.cat([torch.full((len(own.weight),), k) for k, own in enumerate(pairs)])
        for tensor in part.weights:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) / math.sqrt(tensor.shape[-1]))
        for k, (own, angles) in enumerate(zip(pairs, wanted, strict=True)):
            # Half of the mean angle: what a network that sees nothing would say.
            middle = (own.weight @ angles / own.weight.sum() / 2).clamp(1e-3, 3)
            part.biases[-1][k] = torch.logit(middle / math.pi)
        part.requires_grad_(True)
        optimiser = torch.optim.AdamW(part.parameters(), lr=self.learning_rate)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs)
        for _ in range(self.epochs):
            for index in torch.split(torch.randperm(len(rows), generator=draw), self.batch):
                optimiser.zero_grad(set_to_none=True)
                mine = column[index].unsqueeze(-1)
                source, target = (
                    part.angles(side).gather(1, mine).squeeze(-1) for side in rows[index].unbind(1)
                )
                missed = (source - asked[index]).square() + target.square()
                loss = (weight[index] * missed).mean() / weight.mean()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            rate.step()

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """``accuracy``: share of training rows on their side of a normal, the worst side."""
        train, worst = acts.where(split="train"), 1.0
        for site, part in fitted.items():
            assert isinstance(part, Turn)
            for normal, behaviour in zip(part.normals, acts.behaviours, strict=True):
                for side, sign in zip(train.sides(site, behaviour), (-1, 1), strict=True):
                    worst = min(worst, float((sign * (side @ normal) > 0).double().mean()))
        return {"accuracy": worst}


class Pairs(NamedTuple):
    """Training pairs in float64: source and target rows ``[n, d]``, weights ``[n]``."""

    source: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    def of(cls, acts: Activations, site: Site, behaviour: str) -> "Pairs":
        """A behaviour's pairs at a site."""
        own = aims(acts, site, behaviour)
        return cls(own.rows - own.lifts / 2, own.rows + own.lifts / 2, own.weight)

    @property
    def angles(self) -> Tensor:
        """Between each source row and its target ``[n]``, radians."""
        cosine = nn.functional.cosine_similarity(self.source, self.target, dim=-1)
        return cosine.clamp(-1, 1).acos()

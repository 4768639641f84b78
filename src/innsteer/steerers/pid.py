"""PID: a controller up the blocks, which holds each block's input at a set-point."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from innsteer import setpoints
from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.setpoints import Origin, feature
from innsteer.site import Site
from innsteer.steerer import AcrossSites, Interventions, Steerer


class Controller(AcrossSites):
    """u = kp e + ki I + kd (e - previous e), added to a block's output; e is seen at its input.

    Args:
        width: d. k: number of behaviours. gains: kp, ki, kd.
        resets: whether this block's sum begins anew, its own error left out.

    ``directions`` v ``[k, d]`` are unit rows or zeros; ``origins`` v . o and ``levels`` lambda mu
    ``[k]`` are in activation units. The carry holds the sum I ``[d]``, the error of the block below
    ``[d]`` and, from input to output, this block's error along each direction ``[k]``.
    """

    directions: Tensor
    origins: Tensor
    levels: Tensor

    def __init__(
        self, width: int, k: int, gains: tuple[float, float, float], *, resets: bool = False
    ) -> None:
        super().__init__()
        self.width, self.carry = width, 2 * width + k
        self.gains, self.resets = gains, resets
        self.register_buffer("directions", torch.zeros(k, width))
        self.register_buffer("origins", torch.zeros(k))
        self.register_buffer("levels", torch.zeros(k))

    def read(self, h_in: Tensor, coef: Tensor, carry: Tensor) -> Tensor:
        """The errors, and the sum with them."""
        d, directions = self.width, self.directions.to(h_in.dtype)
        along = torch.nn.functional.linear(h_in, directions, -self.origins.to(h_in.dtype))
        # |s| (sign(s) level - along): a negative strength holds rows on the origin's other side.
        errors = coef * self.levels.to(h_in.dtype) - coef.abs() * along
        total = torch.addmm(carry[:, :d], errors, directions)
        if self.resets:
            total = torch.zeros_like(total)
        return torch.cat([total, carry[:, d : 2 * d], errors], -1)

    def write(self, h_out: Tensor, coef: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The control on top, and the error as the next block's previous one."""
        d, (kp, ki, kd) = self.width, self.gains
        total, previous, errors = carry[:, :d], carry[:, d : 2 * d], carry[:, 2 * d :]
        error = errors @ self.directions.to(h_out.dtype)
        new = h_out.add(error, alpha=kp + kd).add(total, alpha=ki).sub(previous, alpha=kd)
        return new, torch.cat([total, error, errors], -1)


@dataclass(frozen=True)
class PID(Steerer):
    """Hold the input of every block at a set-point along its own difference of means, by PID.

    e_k = (v_k . o_k + lambda mu_k - v_k . x_k) v_k;  u_k = kp e_k + ki I_k + kd (e_k - e_{k-1})
    h_k' = h_k + strength * u_k;  mu_k v_k = mean target - mean source, at the block's input

    Depth is time: x_k is the input of block k, which holds all that was edited below, h_k its
    output, I_k the sum of the errors of this and the blocks below since it was last set to 0. This
    is S-PID, the closed loop with which A-LQR is compared; PID steering as first published adds the
    same control of the differences of means themselves, without looking at x.

    The rows are outputs of neighbouring blocks, since block k's input is the output of block k - 1:
    the lowest of neighbours is read only, and block 0 is never steered. ``innsteer fit`` records
    all blocks; of some, name them together (``--layers 8,9,10 --together`` steers 9 and 10). Closed
    form; the artifact is d + 2 floats per block and behaviour, and a token carries 2 d + k floats
    up the blocks.

    Strength s scales the control, and with its sign chooses the side of the set-point: that of -s
    lies at o_k - lambda mu_k v_k. Far above 1 / kp every block overshoots its set-point, and the
    error grows with depth. -s does not undo s. Several behaviours share one sum of errors.

    The authors keep the error of the last block for the first block of the next token, and the sum
    likewise: a token's edit then depends on that before it, on chunks and on the cache. Here both
    are 0 at the first block of every pass, as in the authors' first pass; everything else is theirs
    with ``origin="zero"``, the sum that leaves out the error of the block at which it is reset
    included. Their hooks act on the last token of a pass, which is scope ``generated``.

    Attributes:
        kp, ki, kd: gains of the error, of its sum and of its difference, unitless. The defaults are
            the authors' for Gemma-2-2B; for Llama-3-8B they give 0.1, 0.1 and 0, for Qwen2.5-14B
            0.5, 0.01 and 0.01.
        setpoint: lambda, how far from the origin rows are held, in differences of means; 1 is the
            target mean from the source mean. The authors sweep 1 to 3.5, from zero.
        origin: ``source``, the source mean, or ``zero``, the authors'.
        reset: blocks after which the sum begins anew, at layers that it divides; 0 = never.

    Raises:
        InputError: a field out of its range; or (by ``fit``) no two neighbouring blocks among the
            sites, sites inside blocks, or sides with equal means at every block.
        UnknownName: no such origin.

    Reference:
        Skifstad, Yang, Chou, Local Linearity of LLMs Enables Activation Steering via Model-Based
        Linear Optimal Control (2026), https://arxiv.org/abs/2604.19018 (S-PID); Nguyen et al.,
        Activation Steering with a Feedback Controller (2025), https://arxiv.org/abs/2510.04309

    >>> rows = {Site(n): torch.tensor([[0.0, 5.0], [2.0, 5.0]]) for n in range(3)}
    >>> from innsteer.activations import Rows
    >>> table = [{"behaviour": "b", "item": side, "side": side} for side in ("source", "target")]
    >>> maps = PID(kp=0.5, ki=0, kd=0).fit(Activations(rows, Rows.of(table), ("b",)))
    >>> [str(site) for site in maps]
    ['1.residual', '2.residual']
    >>> h, coef = torch.tensor([[0.0, 7.0]]), torch.ones(1, 1)
    >>> part = maps[Site(1)]
    >>> part.leave(h, coef, part.enter(h, coef, part.start(h)))[0].tolist()
    [[1.0, 7.0]]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2604.19018"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "layers"
    trained: ClassVar[bool] = False
    across_sites: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, tuple[float, ...]]] = {"setpoint": (1.0, 2.0, 3.5, 7.0)}

    kp: float = 0.7
    ki: float = 0.01
    kd: float = 0.1
    setpoint: float = 1.0
    origin: Origin = "source"
    reset: int = 10

    def __post_init__(self) -> None:
        setpoints.check(self.setpoint, self.origin)
        for name in ("kp", "ki", "kd"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value}", expected="a finite gain from 0 on")
        if self.reset < 0:
            raise InputError(f"reset={self.reset}", expected="a number of blocks, or 0 for never")

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Controllers without directions: no edit."""
        gains = (self.kp, self.ki, self.kd)
        return Interventions(
            {
                site: Controller(width, k, gains, resets=self._resets(site))
                for site, width in widths.items()
            }
        )

    def _resets(self, site: Site) -> bool:
        """Whether the sum begins anew at a block."""
        return bool(self.reset) and site.layer % self.reset == 0

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Differences of means in float64, stored in float32; the seed is not used."""
        below = setpoints.below(acts)
        fitted = self.build({site: acts.widths[site] for site in below}, len(acts.behaviours))
        train = acts.where(split="train")
        for site, part in fitted.items():
            assert isinstance(part, Controller)
            for row, behaviour in enumerate(acts.behaviours):
                part.directions[row], size, origin = feature(train, below[site], behaviour)
                part.levels[row] = self.setpoint * size
                part.origins[row] = origin if self.origin == "source" else 0.0
        for row, behaviour in enumerate(acts.behaviours):
            if not any(part.directions[row].any() for part in _controllers(fitted)):
                raise InputError(
                    f"equal means of both sides of {behaviour!r} at the inputs of all "
                    f"{len(fitted)} blocks",
                    expected="sides that differ in their means",
                    remedy="look at the data: innsteer data check",
                )
        return fitted

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """The shortest and the longest difference of means that a block is held by."""
        levels = torch.cat([part.levels for part in _controllers(fitted)]) / self.setpoint
        return {"gap_least": float(levels.min()), "gap_most": float(levels.max())}


def _controllers(maps: Interventions) -> list[Controller]:
    """The maps as what they are."""
    return [part for _, part in maps.items() if isinstance(part, Controller)]

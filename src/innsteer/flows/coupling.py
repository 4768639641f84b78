"""AffineCoupling: one half of the coordinates scales and shifts the other."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from innsteer.errors import InputError, UnknownName
from innsteer.flows.base import Flow

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class AffineCoupling(Flow):
    """A RealNVP coupling: a passes, b -> b * exp(s(a)) + t(a); log|det| = sum(s).

    One small network reads a and puts out ``[t, raw]``, in this order. The default log-scale is
    s = s_max * tanh(raw), so the map and its inverse stretch by at most exp(s_max) wherever a shift
    may have carried the latent. The last layer starts at zero: a fresh coupling is the identity.

    Cost: (split + 2 (d - split)) * hidden multiplications per row for depth 1, each way.

    Reference: Density estimation using Real NVP (Dinh et al. 2017), eq. 7,
    https://arxiv.org/abs/1605.08803

    Args:
        width: d, at least 2.
        split: where the row is cut; by default d // 2.
        flip: False: the first ``split`` coordinates are a; True: they are b. Two couplings that
            differ in this move every coordinate once and need no permutation between them.
        hidden: width of the hidden layers.
        depth: number of hidden layers, at least 1.
        activation: ``relu``, ``tanh`` or ``gelu``.
        s_max: bound of the log-scale in nats, used by the default ``log_scale``.
        log_scale: another elementwise map raw -> s; then nothing bounds s but itself.
        additive: s = 0 (NICE): b -> b + t(a), volume-preserving.
        seed: of the hidden layers' weights; the global generators are left alone.

    Raises:
        InputError: a split, size or bound out of range; UnknownName for an activation.

    >>> coupling = AffineCoupling(4)
    >>> x = torch.arange(4.0)[None]
    >>> torch.equal(coupling(x), x)
    True
    """

    def __init__(
        self,
        width: int,
        *,
        split: int | None = None,
        flip: bool = False,
        hidden: int = 128,
        depth: int = 1,
        activation: str = "relu",
        s_max: float = 1.0,
        log_scale: Callable[[Tensor], Tensor] | None = None,
        additive: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(width)
        cut = width // 2 if split is None else split
        _check(width, cut, hidden, depth, s_max)
        if activation not in ACTIVATIONS:
            raise UnknownName("activation", activation, list(ACTIVATIONS))
        self.split, self.flip, self.additive = cut, flip, additive
        self.log_scale = log_scale or partial(bounded, bound=s_max)
        a, b = (width - cut, cut) if flip else (cut, width - cut)
        sizes = [a, *[hidden] * depth, b if additive else 2 * b]
        self.net = conditioner(sizes, ACTIVATIONS[activation], seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        """Rows with b scaled and shifted."""
        a, b = self._cut(x)
        shift, s = self._shift_and_scale(a)
        return self._join(a, b + shift if s is None else torch.addcmul(shift, b, s.exp()))

    def inverse(self, z: Tensor) -> Tensor:
        """Rows with b shifted and scaled back; a is the same on both sides."""
        a, b = self._cut(z)
        shift, s = self._shift_and_scale(a)
        return self._join(a, b - shift if s is None else (b - shift) * (-s).exp())

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows with b scaled and shifted, and sum(s) per row."""
        a, b = self._cut(x)
        shift, s = self._shift_and_scale(a)
        if s is None:
            return self._join(a, b + shift), x.new_zeros(x.shape[0])
        return self._join(a, torch.addcmul(shift, b, s.exp())), s.sum(-1)

    def _shift_and_scale(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """t and s of the rows, both ``[n, d_b]``; no s for an additive coupling."""
        out: Tensor = self.net(a)
        if self.additive:
            return out, None
        shift, raw = out.chunk(2, -1)
        return shift, self.log_scale(raw)

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The halves (a, b): views."""
        first, second = x[:, : self.split], x[:, self.split :]
        return (second, first) if self.flip else (first, second)

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        """One row of both halves, in the order of the input."""
        return torch.cat((b, a) if self.flip else (a, b), -1)


def bounded(raw: Tensor, bound: float) -> Tensor:
    """bound * tanh(raw): a log-scale that no input drives past the bound."""
    return bound * torch.tanh(raw)


def conditioner(sizes: list[int], activation: type[nn.Module], *, seed: int) -> nn.Sequential:
    """Linear layers with an activation between them, the last one zero.

    Hidden layers get the usual uniform start U(-1/sqrt(fan_in), 1/sqrt(fan_in)), drawn on the CPU
    from a generator of their own, so that a seed means the same weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        # By way of "meta": the constructor's own draws would advance the global generator.
        linear = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
        edge = 1 / math.sqrt(fan_in) if len(layers) < 2 * (len(sizes) - 2) else 0.0
        for tensor in (linear.weight, linear.bias):
            nn.init.uniform_(tensor, -edge, edge, generator=generator)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def _check(width: int, split: int, hidden: int, depth: int, s_max: float) -> None:
    """Refuse sizes of which no coupling can be made."""
    if not 1 <= split < width:
        raise InputError(
            f"a coupling of width {width} cut at {split}",
            expected="a width of at least 2 and a cut from 1 to width - 1",
        )
    if hidden < 1 or depth < 1:
        raise InputError(f"hidden={hidden}, depth={depth}", expected="both at least 1")
    if not 0 < s_max < math.inf:
        raise InputError(f"s_max={s_max}", expected="a positive number of nats")

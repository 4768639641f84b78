"""coupling_stack: a deep flow that starts as the identity."""

import torch

from innsteer.errors import InputError, UnknownName
from innsteer.flows.actnorm import ActNorm
from innsteer.flows.base import Chain, Flow
from innsteer.flows.coupling import AffineCoupling
from innsteer.flows.mixing import LU, Householder, Permute

MIXINGS = ("permute", "alternate", "householder", "lu")


def coupling_stack(
    width: int,
    *,
    couplings: int = 4,
    hidden: int = 128,
    depth: int = 1,
    s_max: float = 1.0,
    mixing: str = "permute",
    actnorm: bool = True,
    activation: str = "relu",
    seed: int = 0,
) -> Chain:
    """Affine couplings with mixing between them, the identity before training.

    Couplings come in pairs: within a pair the second one flips the halves, so every coordinate is
    moved once per pair whatever the width and no permutation is needed. Every pair but the first
    stands between a mixing M and its undoing: ``[C C'] [M C C' M^-1] [N C C' N^-1] ...``, where
    each C is ``ActNorm -> AffineCoupling``. So the fresh stack is the identity: bit for bit for
    ``permute``, ``alternate`` and ``lu`` (whose triangular factors start at I), to round-off for
    ``householder``. Learned mixings and their undoings are trained apart. ActNorms are the
    identity until ``initialise``, which on standardised rows barely moves them.

    Args:
        width: d, at least 2; may be odd.
        couplings: how many, at least 1; with one or two there is no mixing.
        hidden: width of the conditioners' hidden layers.
        depth: number of their hidden layers.
        s_max: bound of each coupling's log-scale, in nats.
        mixing: ``permute`` (fixed, random), ``alternate`` (flipped halves alone, the cheapest),
            ``householder`` (a learned rotation of 8 reflections) or ``lu`` (a learned matrix).
        actnorm: put an ActNorm before each coupling.
        activation: ``relu``, ``tanh`` or ``gelu``.
        seed: of all weights and permutations; the global generators are left alone.

    Returns:
        The chain of all parts, in float32 (torch's default dtype).

    Raises:
        InputError: a size out of range; UnknownName for a mixing or activation.

    >>> flow = coupling_stack(5, hidden=8)
    >>> x = torch.arange(10.0).reshape(2, 5)
    >>> torch.equal(flow(x), x), flow.forward_log_det(x)[1].tolist()
    (True, [0.0, 0.0])
    """
    if mixing not in MIXINGS:
        raise UnknownName("mixing", mixing, list(MIXINGS))
    if couplings < 1:
        raise InputError(f"{couplings} couplings", expected="at least 1")
    draw = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (2, couplings), generator=draw).tolist()
    parts: list[Flow] = []
    undo: list[Flow] = []
    for i in range(couplings):
        if i % 2 == 0 and i > 0:
            there, undoing = _mixing(mixing, width, seeds[1][i])
            parts += undo + there
            undo = undoing
        if actnorm:
            parts.append(ActNorm(width))
        parts.append(
            AffineCoupling(
                width,
                flip=i % 2 == 1,
                hidden=hidden,
                depth=depth,
                activation=activation,
                s_max=s_max,
                seed=seeds[0][i],
            )
        )
    return Chain(parts + undo)


def _mixing(kind: str, width: int, seed: int) -> tuple[list[Flow], list[Flow]]:
    """A mixing and the flow that undoes it at the start; nothing for ``alternate``."""
    if kind == "alternate":
        return [], []
    there = {"permute": Permute, "householder": Householder, "lu": LU}[kind](width, seed=seed)
    return [there], [there.back()]

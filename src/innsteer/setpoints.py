"""Set-points of feedback: along which feature rows are held, where, and from what rows.

What methods that look at a block's input have in common.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site
from innsteer.steerer import side_means

Origin = Literal["source", "zero"]
"""From where a set-point is measured: the source mean, or 0."""
NOTHING = 1e-6
"""A difference of means that is shorter has no direction."""


class Feature(NamedTuple):
    """What is tracked at a block's input: e = target - source of the means, v = e / mu, mu = |e|.

    ``direction`` v ``[d]`` and ``size`` mu, both 0 where the sides have one mean; ``origin``, v of
    the source mean.
    """

    direction: Tensor
    size: float
    origin: float


def feature(acts: Activations, site: Site, behaviour: str) -> Feature:
    """The feature of a behaviour's rows at a block's input, float64."""
    source, target = side_means(acts, site, behaviour, through=Tensor.double)
    apart = target - source
    size = apart.norm().item()
    direction = apart / size if size >= NOTHING else torch.zeros_like(apart)
    return Feature(direction, size, (direction @ source).item())


def check(setpoint: float, origin: str) -> None:
    """Whether a set-point and its origin can be.

    Raises:
        InputError: a set-point that is not finite and above 0. UnknownName: no such origin.
    """
    if not 0 < setpoint < math.inf:
        raise InputError(
            f"setpoint={setpoint}",
            expected="a finite number above 0",
            remedy="a negative strength leads the other way",
        )
    if origin not in get_args(Origin):
        raise UnknownName("origin", origin, get_args(Origin))


def below(acts: Activations) -> dict[Site, Site]:
    """Block outputs whose block's input was recorded too -> the site of that input.

    Raises:
        InputError: sites inside blocks, or no two outputs of neighbouring blocks.
    """
    if odd := [site for site in acts.sites if site.stream != "residual"]:
        raise InputError(
            f"rows at {odd[0]} for a method that reads blocks' inputs",
            expected="outputs of blocks",
            remedy=f"name the layer alone: {odd[0].layer}",
        )
    found = {site: Site(site.layer - 1) for site in acts.sites if site.layer}
    found = {site: one for site, one in found.items() if one in acts.sites}
    if not found:
        raise InputError(
            f"rows at {', '.join(map(str, acts.sites))}, no two of which are of neighbours",
            expected="a block's output and that of the block below, which is its input",
            remedy="name them together: --layers 14,15,16 --together; or none: all are recorded",
        )
    return found

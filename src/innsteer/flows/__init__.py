"""Invertible networks: pure maps of rows ``[n, d]`` that know no language model.

Every flow has ``forward`` (x -> z), ``inverse`` (z -> x), ``forward_log_det`` and ``initialise``.
"""

from innsteer.flows.actnorm import ActNorm
from innsteer.flows.base import Chain, Flow
from innsteer.flows.coupling import AffineCoupling
from innsteer.flows.latent import Shear, Step, Translation
from innsteer.flows.mixing import LU, Householder, Permute, Reverse
from innsteer.flows.stack import coupling_stack
from innsteer.flows.standardise import Standardise
from innsteer.flows.subspace import Subspace

__all__ = [
    "LU",
    "ActNorm",
    "AffineCoupling",
    "Chain",
    "Flow",
    "Householder",
    "Permute",
    "Reverse",
    "Shear",
    "Standardise",
    "Step",
    "Subspace",
    "Translation",
    "coupling_stack",
]

"""Shears set in closed form from rows that seek their target, and grown behaviour by behaviour."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.flows import Chain, Flow, Householder, Shear, Standardise
from innsteer.gating import fit_gate
from innsteer.interventions import Latent
from innsteer.readouts import Aims, aims, decision, mean_lift, nuisances
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions

Reads = Literal["row", "prompt"]
WITHIN = 0.3
"""Least share of a new behaviour's gradient in the coordinates that a fitted shear writes."""
OPEN = 20.0
"""A bias at which tanh and sigmoid are 1 to float32's round-off."""


@dataclass(frozen=True)
class ShearFit:
    """How a shear is set; the fields are INNSteer's of the same names."""

    units: int
    write: int
    kappa: float
    gate: bool
    apart: bool
    nuisances: int
    reads: Reads | None
    shrinkage: float
    quantile: float
    room: float
    slope: float

    @torch.no_grad()
    def closed_form(self, acts: Activations, site: Site, *, seed: int = 0) -> Latent:
        """Write along the mean gradients, read the key and the gate from what is left."""
        prompts = self.reads_prompt(acts)
        parts = [aims(acts, site, behaviour) for behaviour in acts.behaviours]
        k, width = len(parts), acts.widths[site]
        pairs = sum(len(part.rows) for part in parts)
        r = min(self.write or min(k, 4), width - 1, pairs)
        flow = Chain([Standardise(width), Householder(width, reflections=r)])
        standardise, rotate = flow.parts
        assert isinstance(standardise, Standardise) and isinstance(rotate, Householder)
        standardise.initialise(torch.cat([part.rows for part in parts]).float())
        spread = standardise.std.double()
        writes = torch.stack([mean_lift(part) for part in parts]) / spread
        rotate.vectors.copy_(_reflections(_span(writes, parts, spread, r)))
        reader = None
        if prompts:
            reader = Standardise(width)
            before = [aims(acts.prompts, site, behaviour).rows for behaviour in acts.behaviours]
            reader.initialise(torch.cat(before).float())
        step = Shear(r + width if prompts else width, r, k, self.units)
        for row in range(k):
            self._set_row(Latent(flow, step, reader), row, acts, site, row, seed)
        return Latent(flow, step, reader)

    def reads_prompt(self, acts: Activations) -> bool:
        """Whether readouts see the prompts' means, by the field and by what the rows bring."""
        if self.reads is not None:
            return self.reads == "prompt"
        told = (acts.rows.key != "") | (acts.rows.side == "unmoved")
        return bool(acts.context) and bool(told.any())

    @torch.no_grad()
    def beside(self, fitted: Interventions, acts: Activations, *, seed: int = 0) -> Interventions:
        """Shears of other behaviours on the flows of fitted ones, to be ``joined`` to these.

        The flow and its split are kept: a new behaviour writes what of its mean gradient lies in
        the written coordinates, and costs one row of latent parameters, (2 d + units d) floats.
        ``apart`` tells new behaviours from each other alone.

        Raises:
            InputError: a map that is no shear, rows of other sites, or a behaviour whose gradient
                lies elsewhere than in the written coordinates.
        """
        parts = dict(fitted.items())
        if set(parts) != set(acts.sites):
            raise InputError(
                f"rows at {', '.join(map(str, acts.sites))}",
                expected="rows at the sites of the fitted map: " + ", ".join(map(str, parts)),
            )
        new: dict[Site, Intervention] = {}
        for site, part in parts.items():
            old, flow = plain(site, part)
            units, r = old.write.shape[1:]
            step = Shear(r + old.read.shape[-1], r, len(acts.behaviours), units)
            reader = copy.deepcopy(getattr(part, "reader", None))
            new[site] = own = Latent(copy.deepcopy(flow), step, reader)
            exact = copy.deepcopy(flow).double()
            for n, behaviour in enumerate(acts.behaviours):
                wanted = _turned(exact, mean_lift(aims(acts, site, behaviour))[None])[0]
                share = float(wanted[:r].norm() / wanted.norm().clamp_min(1e-12))
                if share < WITHIN:
                    raise InputError(
                        f"{behaviour!r} at {site}: {share:.0%} of its gradient lies in the {r} "
                        "coordinates that the fitted map writes",
                        expected=f"{WITHIN:.0%} at least, or it would hardly move",
                        remedy="fit all behaviours together, or the first with a larger write",
                    )
                self._set_row(own, n, acts, site, n, seed)
        return Interventions(new).eval().requires_grad_(False)

    def _set_row(
        self, part: Latent, row: int, acts: Activations, site: Site, column: int, seed: int
    ) -> None:
        """One behaviour's latent parameters, in the coordinates of a flow that is affine."""
        behaviour, step = acts.behaviours[column], part.step
        assert isinstance(step, Shear)
        exact, r = copy.deepcopy(part.flow).double(), step.write.shape[-1]
        step.write[row, 0] = _turned(exact, mean_lift(aims(acts, site, behaviour))[None])[0, :r]
        seen, reader = acts, copy.deepcopy(part.reader)
        if reader is not None:
            seen, reader = acts.prompts, reader.double()

        def inner(rows: Tensor) -> Tensor:
            """What the readouts see of rows."""
            found: Tensor = exact(rows)[:, r:] if reader is None else reader(rows)
            return found

        own, held = (aims(seen, site, behaviour, name) for name in ("train", "validation"))
        own, held = (one._replace(rows=inner(one.rows)) for one in (own, held))
        reworded = seen.rewordings(site).double()
        reworded = inner(reworded) - inner(torch.zeros_like(reworded))
        self._read(step, row, own, held, reworded, seed)
        still = seen.where(split="train").unmoved(site, behaviour).double()
        if self.apart:
            others = [name for name in acts.behaviours if name != behaviour]
            still = torch.cat([still, *(aims(seen, site, name).rows for name in others)])
        # The row of an open item is a mean of answer tokens: no gate tells it from a prompt's end.
        gated = self.gate and (own.choice or part.contextual)
        if gated and len(still) == 1:
            raise InputError(
                f"one unmoved row of {behaviour!r}",
                expected="two at least, many better, to fit a gate",
                remedy="give more unmoved prompts, or gate=False",
            )
        if not gated or not len(still):
            step.gate_bias[row] = OPEN
            return
        step.gate[row], step.gate_bias[row] = fit_gate(
            own.rows,
            inner(still),
            kind="lda",
            held=held.rows if len(held.rows) > 1 else None,
            shrinkage=self.shrinkage,
            quantile=self.quantile,
            room=self.room,
            slope=self.slope,
            weights=own.weight,
            rewordings=reworded,
        )

    def _read(
        self, step: Shear, row: int, own: Aims, held: Aims, reworded: Tensor, seed: int
    ) -> None:
        """Set a behaviour's readouts: the first decides the key, the others start at nothing."""
        draw = torch.Generator().manual_seed(seed + row)
        edge = 1 / math.sqrt(step.read.shape[-1])
        step.read[row, 1:] = edge * torch.randn(step.read[row, 1:].shape, generator=draw)
        if not own.choice:
            step.read_bias[row, 0] = OPEN
            return
        blind = nuisances(reworded, own.rows, self.nuisances)
        weight, bias = decision(own, held, kappa=self.kappa, blind=blind, seed=seed)
        step.read[row, 0], step.read_bias[row, 0] = weight, bias


def plain(site: Site, part: Intervention) -> tuple[Shear, Chain]:
    """Step and flow of a shear on its own; couplings between would bend what is read and written.

    Raises:
        InputError: another map.
    """
    step, flow = getattr(part, "step", None), getattr(part, "flow", None)
    if not (isinstance(step, Shear) and isinstance(flow, Chain) and len(flow.parts) == 2):
        raise InputError(
            f"site {site}: a map that is no plain shear",
            expected="a fitted shear without couplings",
            remedy="fit all behaviours together",
        )
    return step, flow


@torch.no_grad()
def joined(fitted: Interventions, others: Interventions) -> Interventions:
    """Shears on one flow as one map: the behaviours of the first, then those of the others."""
    whole: dict[Site, Intervention] = {}
    for site, part in fitted.items():
        (one, flow), (two, _) = plain(site, part), plain(site, others[site])
        k, units, r = one.write.shape
        step = Shear(r + one.read.shape[-1], r, k + len(two.write), units)
        for name, tensor in step.named_parameters():
            tensor.copy_(torch.cat([one.get_parameter(name), two.get_parameter(name)]))
        reader = copy.deepcopy(getattr(part, "reader", None))
        whole[site] = Latent(copy.deepcopy(flow), step, reader)
    return Interventions(whole).eval().requires_grad_(False)


def _turned(flow: Flow, moves: Tensor) -> Tensor:
    """Displacements of rows in an affine flow's latent coordinates."""
    there, origin = flow.forward(torch.cat([moves, torch.zeros_like(moves)])).chunk(2)
    return there - origin


def _span(writes: Tensor, parts: list[Aims], spread: Tensor, rank: int) -> Tensor:
    """Orthonormal ``[d, rank]``: the write directions first, then where single gradients lead."""
    lifts = torch.cat([part.lifts * part.keys.unsqueeze(-1) for part in parts]) / spread
    first = nn.functional.normalize(writes, dim=-1) * math.sqrt(len(lifts)) * 10
    stacked = torch.cat([first, nn.functional.normalize(lifts, dim=-1)])
    found: Tensor = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank].mT
    return found


def _reflections(basis: Tensor) -> Tensor:
    """Householder vectors ``[r, d]`` whose product has the basis as its first r columns."""
    packed, _ = torch.geqrf(basis)
    vectors = packed.tril(-1) + torch.eye(*basis.shape, dtype=basis.dtype)
    return vectors.mT.contiguous()


@torch.no_grad()
def sharpen(steps: Sequence[nn.Module], factor: float) -> None:
    """Make the readouts of shears decide more sharply."""
    for step in steps:
        if isinstance(step, Shear):
            step.read[:, 0].mul_(factor)
            step.read_bias[:, 0].mul_(factor)


def freeze_gates(part: nn.Module) -> None:
    """Training leaves gates alone: it shows them no text but what they were fitted on."""
    if isinstance(part, Latent) and isinstance(part.step, Shear):
        part.step.gate.requires_grad_(False)
        part.step.gate_bias.requires_grad_(False)

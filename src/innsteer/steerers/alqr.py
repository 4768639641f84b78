"""A-LQR: hold a feature at its set-point in every layer, by optimal linear feedback."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from innsteer import setpoints
from innsteer.activations import Activations
from innsteer.control import Weights, backward
from innsteer.errors import InputError, UnknownName
from innsteer.setpoints import Origin, feature
from innsteer.site import Site
from innsteer.steerer import AcrossSites, Bound, Chain, Interventions, Steerer, side_means

Loop = Literal["closed", "open"]


class Feedback(AcrossSites):
    """h' = h + u,  u = sum_k |s_k| (sign(s_k) levels_k + origins_k - reads_k . x) writes_k.

    x is the block's input and s the strengths. What is carried from input to output is how far each
    feature is from its level, times |s|: ``[tokens, k]``. With ``reads`` and ``origins`` of 0 the
    same u goes to every token: an open loop.

    Args:
        width: d. k: number of behaviours. clip: the longest u as a share of |h|; None = no limit.

    ``reads`` and ``writes`` ``[k, d]`` are unitless, ``levels`` and ``origins`` ``[k]`` in
    activation units.

    >>> part = Feedback(2)
    >>> part.reads[0, 0], part.writes[0, 1], part.levels[0] = 1, 0.5, 5
    >>> x, ones = torch.tensor([[3.0, 0.0]]), torch.ones(1, 1)
    >>> part.leave(torch.zeros(1, 2), ones, part.enter(x, ones, part.start(x)))[0].tolist()
    [[0.0, 1.0]]
    """

    reads: Tensor
    writes: Tensor
    levels: Tensor
    origins: Tensor

    def __init__(self, width: int, k: int = 1, clip: float | None = None) -> None:
        super().__init__()
        self.width, self.carry, self.clip = width, k, clip
        for name in ("reads", "writes"):
            self.register_buffer(name, torch.zeros(k, width))
        for name in ("levels", "origins"):
            self.register_buffer(name, torch.zeros(k))

    def read(self, h_in: Tensor, coef: Tensor, carry: Tensor) -> Tensor:
        """The errors, by strength."""
        reads, origins = self.reads.to(h_in.dtype), self.origins.to(h_in.dtype)
        along = torch.nn.functional.linear(h_in, reads, -origins)
        # |s| (sign(s) level - along): a negative strength holds rows on the origin's other side.
        return coef * self.levels.to(h_in.dtype) - coef.abs() * along

    def write(self, h_out: Tensor, coef: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output with the control; the carry as it came."""
        writes = self.writes.to(h_out.dtype)
        if self.clip is None:
            return torch.addmm(h_out, carry, writes), carry
        control = carry @ writes
        length = control.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        share = (self.clip * h_out.norm(dim=-1, keepdim=True) / length).clamp_max(1)
        return h_out + share * control, carry

    def bound(self, coef: Tensor) -> Bound:
        """A product with the row and one with the feature, whose factors are made once."""
        size, reads, writes = coef.abs(), self.reads.to(coef.dtype), self.writes.to(coef.dtype)
        levels = coef * self.levels.to(coef.dtype) + size * self.origins.to(coef.dtype)
        # Rows of one strength: it goes into the factor.
        alike = bool((size == size[:1]).all())
        factor = (-size[:1].mT * reads if alike else reads).mT.contiguous()

        def read(h_in: Tensor, carry: Tensor) -> Tensor:
            if alike:
                return torch.addmm(levels, h_in, factor)
            return torch.addcmul(levels, size, h_in @ factor, value=-1)

        def write(h_out: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
            if self.clip is not None:
                return self.write(h_out, coef, carry)
            return torch.addmm(h_out, carry, writes), carry

        return Bound(read, write)


@dataclass(frozen=True)
class ALQR(Steerer):
    """Hold a feature at a set-point in every layer, by feedback that a linear regulator chose.

    h' = h + u,  u = strength * (v . o + setpoint mu - v . x) K v   at the output h of every block

    Depth is time: x is a token's row at the block's input, which already holds the edits below. The
    feature v = e / mu is the unit difference e = target - source of the sides' mean rows there, mu
    its length, and the set-point lies setpoint mu from the origin o, so that one number serves all
    layers (adaptive semantic set-points). K is the block's gain of the finite-horizon regulator for
    the blocks' Jacobians A, meaned over target texts, under the cost q |e|^2 + r |u|^2 at every
    block and q_f |e|^2 at the end (``innsteer.control``). Nothing is trained.

    Strength s scales u, and so the gain: 1 is the optimal loop; ``setpoint`` says where to go. A
    negative one holds the feature on the other side, at v . o - setpoint mu; -s does not undo s.
    Far above 1 / v.K v every block overshoots. Several behaviours add their u, with gains of one
    mean Jacobian.

    Scope ``generated`` is A-LQR (the last prompt token and every later one), scope ``all`` A-LQR+.
    Cost: a Jacobian per block, about a text of d tokens per prompt; T solves of d x d; online a
    dot product and an addition per block, 2 d + 2 floats per block and behaviour. Pairing does not
    matter; row weights count.

    Rows are of the last token of each text; of lone prompts (requests of two kinds) of the prompt's
    last, before any answer, as in the paper. ``fit`` on recorded outputs of blocks knows no
    Jacobian: it takes each block for the identity and the row below for its input, and steers the
    blocks above a recorded one. That is ``dynamics="identity"``, whose K are numbers: a
    proportional regulator with the optimal gains.

    Differences from the authors' code: their low-memory path returns the last prompt's Jacobian
    over the number of prompts, and one summed over all positions; here it is the mean, of one
    position. Theirs measures set-points from zero, which is ``origin="zero"``.

    Attributes:
        setpoint: lambda, how far from the origin features are held, in differences of means. The
            authors' values go from 1 (refusal) over 2 (toxicity) to 3.5 (truthfulness), measured
            from zero; ``choices``, of which validation chooses, goes to twice that.
        origin: ``source``, the source mean, from which 1 is the target mean; or ``zero``, theirs.
        q, r, q_f: prices of the error, the control and the last error; only ratios count. The
            code's defaults; the paper's own go from (0.1, 1, 0.1) over (0.1, 10, 10) to
            (0.2, 7, 0.2) for refusal. A smaller r steers harder.
        texts: of each side, drawn by the seed, whose mean rows make the features; theirs is 200.
        dynamics: ``jacobian`` or ``identity``: what K knows of the blocks.
        prompts: target texts that a Jacobian is meaned over, drawn by the seed. rank: 0 = exact, or
            the rank of a low-rank map A - I, whose error ``Local.low_rank`` tells.
        lowest: the first block that is steered. The paper steers from block 0 on, whose input is
            the token's embedding, alike in all contexts; vLLM cannot serve that one.
        loop: ``closed``, or ``open``: the twin without feedback, which adds at each block the mean
            u that the closed loop had over the steered tokens of source texts, whatever the row. A
            fit knows no scope: it is the mean under ``generated``, and under another scope no exact
            twin.
        at: strength of the closed loop whose mean u an open one has; at that strength it is its
            twin, > 0. At another the loop corrects elsewhere in depth, and the twin does not.
        clip: the longest u of a closed loop as a share of the row's length, > 0; None = no limit.

    Raises:
        InputError: a number out of range, an open loop with a clip, sites that are no neighbouring
            blocks, a side without rows, or rows of one block alone.
        UnknownName: no such loop or dynamics.

    Reference:
        Skifstad, Yang, Chou, Local Linearity of LLMs Enables Activation Steering via Model-Based
        Linear Optimal Control (2026), https://arxiv.org/abs/2604.19018

    >>> source = torch.zeros(4, 2)
    >>> acts = Activations.of_sides(source, source + torch.tensor([3.0, 0.0]))
    >>> both = replace(acts, values={Site(n): acts.values[acts.site] for n in (0, 1)})
    >>> part = ALQR(setpoint=1, q=1, r=1, q_f=1).fit(both)[Site(1)]
    >>> part.reads.tolist(), part.writes.tolist(), part.levels.tolist()
    ([[1.0, 0.0]], [[0.5, 0.0]], [3.0])
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2604.19018"
    needs: ClassVar[tuple[str, ...]] = ("classes", "jacobians")
    sites: ClassVar[str] = "layers"
    trained: ClassVar[bool] = False
    across_sites: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, tuple[float, ...]]] = {"setpoint": (1.0, 2.0, 3.5, 7.0)}

    setpoint: float = 2.0
    origin: Origin = "source"
    q: float = 10.0
    r: float = 10.0
    q_f: float = 1.0
    dynamics: Literal["jacobian", "identity"] = "jacobian"
    texts: int = 200
    prompts: int = 50
    rank: int = 0
    lowest: int = 1
    loop: Loop = "closed"
    at: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        Weights(self.q, self.r, self.q_f)
        setpoints.check(self.setpoint, self.origin)
        if self.dynamics not in ("jacobian", "identity"):
            raise UnknownName("dynamics", self.dynamics, ("jacobian", "identity"))
        if self.loop not in get_args(Loop):
            raise UnknownName("loop", self.loop, get_args(Loop))
        for name, least in (("texts", 1), ("prompts", 1), ("rank", 0), ("lowest", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"at least {least}")
        if not 0 < self.at < math.inf:
            raise InputError(f"at={self.at}", expected="a strength above 0")
        if self.at != 1 and self.loop == "closed":
            raise InputError(
                f"at={self.at} of a closed loop",
                expected="loop='open', whose twin's strength it is",
                remedy="leave out at: a closed loop takes any strength when it is used",
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise InputError(f"clip={self.clip}", expected="a share above 0, or None")
        if self.clip is not None and self.loop == "open":
            raise InputError(
                f"clip={self.clip} with loop='open'",
                expected="a limit of a closed loop, whose u answers to the row",
                remedy="leave out clip: the twin's u is fixed",
            )

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Loops without gain."""
        return Interventions({site: Feedback(d, k, self.clip) for site, d in widths.items()})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fitted in float64, stored in float32, with every block for the identity; no seed."""
        inputs = self._kept(_above(acts))
        fitted = self._loops(inputs, None)
        if self.loop == "open":
            self._open(fitted, _carried(inputs, fitted, self.at))
        return fitted

    def fit_through(self, run: Chain, *, seed: int = 0) -> Interventions:
        """Fitted on Jacobians; the seed draws the texts that they are meaned over."""
        acts = self._kept(run.inputs(most=self.texts, seed=seed))
        _check_chain(acts.sites)
        fitted = self._loops(acts, run if self.dynamics == "jacobian" else None, seed)
        if self.loop == "open":
            self._open(fitted, self._watched(run, fitted, seed))
        return fitted

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """Over blocks and behaviours: how much of an error one block takes away, and how straight.

        ``correction`` is the mean v . K v, ``straight`` the mean cosine of v and K v. An open loop
        has neither.
        """
        parts = [part for _, part in fitted.items() if isinstance(part, Feedback)]
        reads, writes = (torch.cat([getattr(p, n) for p in parts]) for n in ("reads", "writes"))
        along = (reads * writes).sum(-1)
        cosine = along / (reads.norm(dim=-1) * writes.norm(dim=-1)).clamp_min(1e-12)
        if self.loop == "open":
            return {}
        return {"correction": along.mean().item(), "straight": cosine.mean().item()}

    def _kept(self, inputs: Activations) -> Activations:
        """Rows of the blocks that are steered."""
        sites = [site for site in inputs.sites if site.layer >= self.lowest]
        if not sites:
            raise InputError(
                f"lowest={self.lowest} above all of the sites {', '.join(map(str, inputs.sites))}",
                expected="a block among them",
                remedy="set lowest=0 to steer from the first block on",
            )
        return inputs.at(*sites)

    def _loops(self, inputs: Activations, run: Chain | None, seed: int = 0) -> Interventions:
        """Closed loops for rows at the blocks' inputs, by the run's Jacobians or without any."""
        fitted = self.build(inputs.widths, len(inputs.behaviours))
        train = inputs.where(split="train")
        for site, part in fitted.items():
            assert isinstance(part, Feedback)
            for row, behaviour in enumerate(inputs.behaviours):
                part.reads[row], size, origin = feature(train, site, behaviour)
                part.levels[row] = self.setpoint * size
                part.origins[row] = origin if self.origin == "source" else 0.0

        def block(site: Site) -> Tensor:
            if run is None:
                return torch.eye(inputs.widths[site], dtype=torch.double)
            return run.jacobian(site.layer, prompts=self.prompts, rank=self.rank, seed=seed)

        chain = [partial(block, site) for site in inputs.sites]
        for step in backward(chain, Weights(self.q, self.r, self.q_f)):
            part = fitted[inputs.sites[step.t]]
            assert isinstance(part, Feedback)
            part.writes.copy_(part.reads.double() @ torch.from_numpy(step.feedback).mT)
        return fitted

    def _watched(self, run: Chain, fitted: Interventions, seed: int) -> dict[Site, Tensor]:
        """Mean errors ``[k]`` that the closed loop has over source texts' tokens, by site."""
        found = {site: torch.zeros(len(run.behaviours), dtype=torch.double) for site in fitted}
        for row, behaviour in enumerate(run.behaviours):
            alone = [self.at * (row == n) for n in range(len(run.behaviours))]
            acts = run.inputs(
                fitted, coef=alone, side="source", most=self.texts, seed=seed, steered=True
            )
            acts = acts.where(split="train", behaviour=behaviour)
            share = torch.from_numpy(acts.rows.weight / acts.rows.weight.sum())
            for site, part in fitted.items():
                assert isinstance(part, Feedback)
                level = (part.levels[row] + part.origins[row]).double()
                errors = level - acts.values[site].double() @ part.reads[row].double()
                found[site][row] = share @ errors
        return found

    @staticmethod
    def _open(fitted: Interventions, errors: Mapping[Site, Tensor]) -> None:
        """The same u for every row: that of the mean error."""
        for site, part in fitted.items():
            assert isinstance(part, Feedback)
            part.reads.zero_()
            part.origins.zero_()
            part.levels.copy_(errors[site])


def _carried(inputs: Activations, fitted: Interventions, at: float) -> dict[Site, Tensor]:
    """Mean errors ``[k]`` of closed loops on their source rows, with identities for blocks."""
    found = {site: torch.zeros(len(inputs.behaviours)) for site in fitted}
    train = inputs.where(split="train")
    for row, behaviour in enumerate(inputs.behaviours):
        moved = torch.zeros(inputs.widths[inputs.sites[0]], dtype=torch.double)
        for site, part in fitted.items():
            assert isinstance(part, Feedback)
            mean = side_means(train, site, behaviour, through=Tensor.double)[0] + moved
            level = (part.levels[row] + part.origins[row]).double()
            error = level - part.reads[row].double() @ mean
            moved = moved + at * error * part.writes[row].double()
            found[site][row] = error
    return found


def _above(acts: Activations) -> Activations:
    """Rows at the inputs of blocks: those recorded at the output of the block below."""
    below = setpoints.below(acts)
    _check_chain(acts.sites)
    return replace(acts, values={site: acts.values[one] for site, one in below.items()})


def _check_chain(sites: Sequence[Site]) -> None:
    """Blocks that follow each other."""
    layers = [site.layer for site in sites]
    if layers != list(range(layers[0], layers[0] + len(layers))):
        raise InputError(
            f"the sites {', '.join(map(str, sites))}",
            expected="outputs of neighbouring blocks, such as 10 11 12: the regulator goes from "
            "block to block",
            remedy="leave out the sites, and all blocks are steered",
        )

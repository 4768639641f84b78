"""The contract: Steerer (the fitted half) and Intervention (the applied half).

A steerer sees rows of activations (or a Runner), never prompts, models or engines. An intervention
is pure tensor code on flat rows ``[tokens, d]``, so one map serves Hugging Face's ``[batch, time,
d]`` and an engine's ragged batch alike.
"""

import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from innsteer import shelf
from innsteer.activations import Activations
from innsteer.errors import InnsteerError, InputError, UnknownName
from innsteer.site import Site
from innsteer.tokens import Encode, Parameters, TokenContext


class Intervention(nn.Module, ABC):
    """The applied half at one site: a map of rows, no data, no prompts, no method names.

    h' = h + displacement(h, coef). Subclasses write ``displacement``; ``forward`` keeps the laws:
    rows whose coefficients are all 0, and rows that are not finite, come back bit for bit; shape,
    dtype and device are kept; nothing happens in place. ``width`` is d; subclasses set it.

    A ``contextual`` map also takes each row's context: the mean of what stood before the steered
    tokens in its prompt, at the same site (``site.before``). Its ``displacement`` has that as third
    argument. The context is never edited, so a map may read it whole and keep its laws.
    """

    width: int
    contextual: bool = False

    def forward(self, h: Tensor, coef: Tensor, context: Tensor | None = None) -> Tensor:
        """Steer rows.

        Args:
            h: activations ``[tokens, d]``, any float dtype.
            coef: strengths ``[tokens, k]``, one per token and behaviour; 0 = unsteered, 1 = the
                fitted map, unitless.
            context: ``[tokens, d]`` for a contextual map; others leave it unread.

        Returns:
            ``[tokens, d]`` in the dtype of ``h``.

        Raises:
            InputError: a contextual map without context.
        """
        dtype = self.compute_dtype(h)
        # A select, not a product with a mask: 0 * inf would not be nothing.
        touched = self.touched(h, coef)
        if not self.contextual:
            move = self.displacement(h.to(dtype), coef.to(dtype))
        elif context is None:
            raise InputError(
                "rows without context for a map that reads the prompt",
                expected="the mean of each row's prompt before the steered tokens, [tokens, d]",
                remedy="attach it to a model (Steering.on), which finds the contexts",
            )
        else:
            touched = touched & torch.isfinite(context).all(-1)
            move = self.displacement(h.to(dtype), coef.to(dtype), context.to(dtype))  # type: ignore[call-arg]
        edited = h.to(dtype) + move
        return torch.where(touched.unsqueeze(-1), edited.to(h.dtype), h)

    @abstractmethod
    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """The edit ``h' - h``, ``[tokens, d]``, of rows in the compute dtype."""

    @staticmethod
    def touched(h: Tensor, coef: Tensor) -> Tensor:
        """Which rows an edit may change: finite ones with a coefficient that is not 0."""
        return (coef != 0).any(-1) & torch.isfinite(h).all(-1)

    def compute_dtype(self, h: Tensor) -> torch.dtype:
        """float64 when module and input are float64, else float32: bf16 loses a flow's inverse."""
        if h.dtype != torch.float64:
            return torch.float32
        tensors = [*self.parameters(), *self.buffers()]
        double = all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())
        return torch.float64 if double else torch.float32


def finite(rows: Tensor) -> bool:
    """Whether rows are all finite, by one look: their sum is. One that overflows says no as well.

    >>> finite(torch.ones(2, 3)), finite(torch.tensor([[1.0, torch.nan]]))
    (True, False)
    """
    return math.isfinite(rows.sum(dtype=torch.float32).item())


class Bound(NamedTuple):
    """``read(h_in, carry)`` and ``write(h_out, carry)`` of a map across sites, strengths fixed."""

    read: Callable[[Tensor, Tensor], Tensor]
    write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class AcrossSites(Intervention):
    """An intervention that reads its block's input, edits its output, and hands a carry on.

    Its site is the block's output. Going up the blocks of a pass, an engine calls ``enter`` at
    each one's input and ``leave`` at its output, and the carry ``[tokens, carry]`` goes from block
    to block: zeros at the first (``start``), of the compute dtype. Subclasses write ``read`` and
    ``write`` and set ``carry``; ``enter`` and ``leave`` keep the laws. Rows whose coefficients are
    all 0 come back bit for bit, and so do their carries. A row that is not finite comes back bit
    for bit too and makes its carry NaN: from there on its token is left alone. The block's input
    already holds what was edited below.

    ``write`` mends nothing: of a row or a carry that is not finite it makes a row that is not. So
    an engine whose rows are all to be steered may take ``bound``, and look at what comes out alone.

    A pass forgets: nothing goes from one pass to the next. Alone, on rows, it says nothing.

    >>> class Lift(AcrossSites):
    ...     carry, width = 1, 2
    ...     def read(self, h_in, coef, carry):
    ...         return carry + h_in.sum(-1, keepdim=True)
    ...     def write(self, h_out, coef, carry):
    ...         return h_out + coef * carry, carry
    >>> part, h, coef = Lift(), torch.ones(2, 2), torch.tensor([[0.0], [1.0]])
    >>> carry = part.enter(h, coef, part.start(h))
    >>> part.leave(10 * h, coef, carry)[0].tolist()
    [[10.0, 10.0], [12.0, 12.0]]
    """

    carry: int = 0

    @abstractmethod
    def read(self, h_in: Tensor, coef: Tensor, carry: Tensor) -> Tensor:
        """The carry ``[tokens, c]`` after a block's input, rows ``[tokens, d]``.

        All come in the compute dtype, ``coef`` as ``[tokens, k]``; what is returned for a row that
        must stay is left unread.
        """

    @abstractmethod
    def write(self, h_out: Tensor, coef: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """New rows ``[tokens, d]`` of the block's output, and the carry for the next block."""

    def bound(self, coef: Tensor) -> Bound:
        """``read`` and ``write`` at these strengths ``[tokens, k]``, none a row of zeros.

        Without the laws, for rows of the compute dtype that are known to be finite, pass after
        pass. Maps override it to work out beforehand what does not depend on rows.
        """
        return Bound(
            lambda h_in, carry: self.read(h_in, coef, carry),
            lambda h_out, carry: self.write(h_out, coef, carry),
        )

    def start(self, h: Tensor) -> Tensor:
        """The carry of rows ``h`` before the first block: zeros."""
        return h.new_zeros(h.shape[0], self.carry, dtype=self.compute_dtype(h))

    def enter(self, h_in: Tensor, coef: Tensor, carry: Tensor) -> Tensor:
        """``read``, with the laws: what engines call with rows of any dtype."""
        dtype = self.compute_dtype(h_in)
        carry = carry.to(dtype)
        new = self.read(h_in.to(dtype), coef.to(dtype), carry)
        return self._kept(*self._rows(h_in, coef, carry), carry, new)

    def leave(self, h_out: Tensor, coef: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """``write``, with the laws: new rows in the dtype of ``h_out``, and the carry."""
        dtype = self.compute_dtype(h_out)
        carry = carry.to(dtype)
        edited, after = self.write(h_out.to(dtype), coef.to(dtype), carry)
        asked, fine = self._rows(h_out, coef, carry)
        new = torch.where(asked & fine, edited.to(h_out.dtype), h_out)
        return new, self._kept(asked, fine, carry, after)

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """None: rows of one site do not say what the block's input was.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"rows of one site for {type(self).__name__}, which acts across sites",
            expected="a block's input and output, and what the blocks below handed on",
            remedy="attach it to a model (Steering.on), or call enter and leave around each block",
        )

    @staticmethod
    def _rows(h: Tensor, coef: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are to be steered, and which can be, ``[tokens, 1]`` each."""
        finite = torch.isfinite(h).all(-1, keepdim=True)
        return (coef != 0).any(-1, keepdim=True), finite & torch.isfinite(carry).all(
            -1, keepdim=True
        )

    @staticmethod
    def _kept(asked: Tensor, fine: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The new carry where a row is steered, NaN where that cannot be, else the old one."""
        return torch.where(asked, torch.where(fine, new, torch.nan), old)


class AcrossTokens(Intervention):
    """An intervention that sees the edited rows before each row of the same request.

    Engines call ``steer``, which keeps the laws, with a ``TokenContext``; subclasses write
    ``move``. What it shall remember of a request's earlier tokens goes through
    ``TokenContext.remember``: the engine keeps it, re-orders it with beams, cuts it on roll-back,
    and refuses cached tokens that went by without it. ``asks`` names the parameters that a request
    must give, of which ``prepare`` makes its memory once.

    Nothing a row is told comes from later rows, or from another request. Alone, on rows, it says
    nothing.

    >>> class Mean(AcrossTokens):
    ...     width = 1
    ...     def move(self, h, coef, tokens):
    ...         rows, _ = tokens.remember("rows", h, h)
    ...         seen = tokens.mask / tokens.mask.sum(-1, keepdim=True)
    ...         return coef * tokens.take(seen @ rows)
    >>> steps = torch.arange(3)
    >>> alone = TokenContext(0 * steps, steps, steps, steps > 1, steps, 1, 3, {})
    >>> Mean().steer(torch.tensor([[1.0], [3.0], [8.0]]), torch.ones(3, 1), alone).flatten()
    tensor([ 2.,  5., 12.])
    """

    asks: tuple[str, ...] = ()

    def steer(self, h: Tensor, coef: Tensor, tokens: TokenContext) -> Tensor:
        """Steer rows that know their requests.

        Args:
            h: activations ``[tokens, d]``, any float dtype.
            coef: strengths ``[tokens, k]``; a request whose strength changes starts anew.
            tokens: where the rows stand.

        Returns:
            ``[tokens, d]`` in the dtype of ``h``; rows without strength, and those that are not
            finite, bit for bit, and seen by no other row.
        """
        dtype = self.compute_dtype(h)
        touched = self.touched(h, coef)
        kept = touched.unsqueeze(-1)
        shown = torch.where(kept, h, 0).to(dtype)
        edited = shown + self.move(shown, coef.to(dtype), tokens.seeing(touched))
        return torch.where(kept, edited.to(h.dtype), h)

    @abstractmethod
    def move(self, h: Tensor, coef: Tensor, tokens: TokenContext) -> Tensor:
        """The edit ``h' - h``, ``[tokens, d]``, of rows in the compute dtype; ``mask`` is set."""

    def prepare(self, parameters: Parameters, encode: Encode) -> Mapping[str, Tensor]:
        """What a request's parameters mean to this map: tensors ``[n, ...]``, made once for it.

        Args:
            parameters: a text for each name in ``asks``.
            encode: the plain model's hidden states of a text; the engine lends it.
        """
        return {}

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """None: rows alone do not say whose they are.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"rows alone for {type(self).__name__}, which acts across tokens",
            expected="a TokenContext: which request each row belongs to, and what came before",
            remedy="attach it to a model (Steering.on), or call steer",
        )


class Interventions(nn.Module):
    """An ordered mapping Site -> Intervention: what is fitted, saved and served.

    Raises:
        InputError: no site; or maps that act across sites elsewhere than at blocks' outputs, or
            with carries of several widths.
    """

    def __init__(self, parts: Mapping[Site, Intervention]) -> None:
        super().__init__()
        if not parts:
            raise InputError("no site at all", expected="an intervention for at least one site")
        _check_across({site: part for site, part in parts.items() if isinstance(part, AcrossSites)})
        self.sites = tuple(sorted(parts))
        self.maps = nn.ModuleDict({_key(site): parts[site] for site in self.sites})

    def __getitem__(self, site: Site) -> Intervention:
        part = self.maps[_key(site)]
        assert isinstance(part, Intervention)
        return part

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def items(self) -> Iterator[tuple[Site, Intervention]]:
        """Pairs of site and intervention, lowest layer first."""
        return ((site, self[site]) for site in self.sites)

    @property
    def contextual(self) -> bool:
        """Whether any map reads the prompt."""
        return any(part.contextual for _, part in self.items())

    @property
    def across(self) -> bool:
        """Whether any map acts across sites: an engine that has no carry refuses."""
        return any(isinstance(part, AcrossSites) for _, part in self.items())

    @property
    def carry(self) -> int:
        """Columns of what maps across sites hand from block to block; 0 where none does."""
        return max((p.carry for _, p in self.items() if isinstance(p, AcrossSites)), default=0)

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """Where maps across sites find their blocks' inputs: the outputs of the blocks below.

        A block 0 is left out: what it reads is the embeddings, which are no site.
        """
        parts = (site for site, part in self.items() if isinstance(part, AcrossSites))
        return tuple(Site(site.layer - 1) for site in parts if site.layer)

    @property
    def across_tokens(self) -> bool:
        """Whether any map sees other tokens than the row's own: an engine must keep them for it."""
        return any(isinstance(part, AcrossTokens) for _, part in self.items())

    @property
    def asks(self) -> tuple[str, ...]:
        """The parameters that a request must give."""
        parts = [part for _, part in self.items() if isinstance(part, AcrossTokens)]
        return tuple(sorted({name for part in parts for name in part.asks}))

    @property
    def sizes(self) -> dict[str, int]:
        """What data or base model decided, by ``site.name``; ``build`` makes the shapes of it."""
        return {
            f"{site}.{name}": size
            for site, part in self.items()
            for name, size in getattr(part, "sizes", {}).items()
        }


def _check_across(parts: Mapping[Site, AcrossSites]) -> None:
    """Maps across sites fit together: blocks' outputs, and one carry."""
    if odd := [site for site in parts if site.stream != "residual"]:
        raise InputError(
            f"a map that acts across sites at {odd[0]}",
            expected="the output of a block: it reads the block's input and edits its output",
            remedy=f"name the layer alone: {odd[0].layer}",
        )
    if len({part.carry for part in parts.values()}) > 1:
        told = ", ".join(f"{part.carry} at {site}" for site, part in sorted(parts.items()))
        raise InputError(
            f"carries of several widths: {told}",
            expected="one: what a block hands on, the next one takes",
        )


def tensor_bytes(module: nn.Module) -> Iterator[bytes]:
    """Name, type, shape and content of a module's tensors, in order of name: what hashes cover."""
    for name, tensor in sorted(module.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        # Bytes, because numpy knows no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield flat.numpy().tobytes()


def _key(site: Site) -> str:
    """A module name: nn.ModuleDict allows no dots."""
    return f"{site.stream}_{site.layer}"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
"""What a block's MLP may apply, by the names of ``BlockCopy``. Saved maps keep the place in this
order: a new one goes last."""


@dataclasses.dataclass(frozen=True)
class BlockCopy:
    """The weights of one decoder block of the base model, to start a map from; nobody else's.

    Attributes:
        weights: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down`` as ``[out, in]``; a bias as
            ``q.bias`` and so on; norms as what they multiply by: ``attention_norm``, ``mlp_norm``,
            and, where the block has them, ``q_norm``, ``k_norm`` (of heads), ``attention_after``,
            ``mlp_after`` (of what a part adds).
        rope: inverse frequencies ``[rotated / 2]``, radians per position.
        heads, kv_heads, head: query heads, key heads, and the width of one.
        activation: of the MLP, a name among ``ACTIVATIONS``.
        eps: of the norms. scale: of attention logits. cap: their soft limit, 0 = none.
        rope_scale: a factor on the rotation's cosines and sines.
    """

    weights: Mapping[str, Tensor]
    rope: Tensor
    heads: int
    kv_heads: int
    head: int
    activation: str
    eps: float
    scale: float
    cap: float
    rope_scale: float


class Answers(NamedTuple):
    """Log-probabilities ``[items]`` of the two answers, summed over each answer's tokens, nats."""

    target: Tensor
    source: Tensor


class Chain(Protocol):
    """A model as a chain of blocks about one token, for methods that fit on their Jacobians."""

    behaviours: tuple[str, ...]
    sites: tuple[Site, ...]

    def inputs(
        self,
        interventions: Interventions | None = None,
        *,
        coef: Sequence[float] | None = None,
        side: str | None = None,
        most: int | None = None,
        seed: int = 0,
        steered: bool = False,
    ) -> Activations:
        """Rows at the inputs of the sites' blocks, with given edits active in those below.

        ``coef`` has a strength per behaviour, all 1 by default; ``side`` leaves out the other;
        ``most`` texts of each behaviour's side are drawn by the seed; ``steered`` asks for the mean
        of a text's edited tokens and not for its last.
        """
        ...

    def jacobian(self, block: int, *, prompts: int = 50, rank: int = 0, seed: int = 0) -> Tensor:
        """d output / d input ``[d, d]`` of a block at one token, meaned over target texts."""
        ...


USABLE = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Strengths that are tried for the range in which a map of concepts can be used."""


class ConceptRun(Protocol):
    """A model seen through a keyhole, for methods that learn from concepts in words.

    Whole requests, every token steered and told a concept. Items go by number; the parts are
    ``train``, ``validation`` (other responses of the same concepts) and ``test``.
    """

    sites: tuple[Site, ...]
    unmoved: tuple[int, ...]
    checkpoint: Path | None
    progress: Callable[[str, int, int], None]
    course: dict[str, Any]

    @property
    def width(self) -> int:
        """d, of the site's rows."""
        ...

    @property
    def unit(self) -> float:
        """The spread of a coordinate at the site."""
        ...

    @property
    def digest(self) -> str:
        """All that a loss depends on but the map."""
        ...

    def items(self, split: str = "train") -> list[int]:
        """Numbers of the items of a part."""
        ...

    def concept(self, item: int) -> str:
        """The concept that an item's response shows."""
        ...

    def told(
        self,
        interventions: Interventions | None,
        items: Sequence[int],
        strengths: Sequence[float],
        concepts: Sequence[str] = (),
    ) -> Tensor:
        """Mean log-probability per response token of items, told their concepts or others."""
        ...

    def block(self, layer: int) -> BlockCopy:
        """A copy of a block's weights."""
        ...


class Runner(Chain, Protocol):
    """A model seen through a keyhole, for methods that fit through it; a backend makes one.

    Nothing here hands out the model or the tokenizer. Items and unmoved sequences go by number.
    """

    unmoved: tuple[int, ...]

    def items(self, split: str = "train", behaviour: str | None = None) -> list[int]:
        """Numbers of the items of a part."""
        ...

    def keys(self, items: Sequence[int]) -> list[str]:
        """The bare matching answer of each item; "" for open ones."""
        ...

    def answers(
        self,
        interventions: Interventions | None,
        items: Sequence[int],
        coef: Sequence[float] | Tensor,
        *,
        only: Sequence[int] | None = None,
    ) -> Answers:
        """Log-probabilities of both answers of items at a strength (or a row) each.

        ``only`` names the side that is wanted of each, 0 target or 1 source; the other may be 0.
        """
        ...

    def divergence(
        self, interventions: Interventions, unmoved: Sequence[int], coef: Tensor
    ) -> Tensor:
        """KL(base || steered) of every token of unmoved sequences, nats, differentiable."""
        ...

    def rows(
        self, interventions: Interventions | None = None, *, step: float = 0.3, said: bool = False
    ) -> Activations:
        """Target-seeking rows at all sites, with given edits active."""
        ...


class Steerer(ABC):
    """The fitted half: a frozen dataclass of hyper-parameters, every field with a default.

    Class variables describe the method for people and tools; they are literals, because the shelf
    is read without importing it. ``needs`` is any of ``pairs``, ``classes``, ``unmoved`` (rows that
    stand among those that seek the target), ``gradients`` (target-seeking rows), ``model``,
    ``jacobians`` (of the blocks: ``fit_through`` then gets a ``Chain``, and lone items will do),
    ``concepts`` (a table of concepts in words with responses, through the model). A
    method ``across_sites`` makes ``AcrossSites`` maps, which need the whole model below them. A
    method that ``erases`` takes away what tells the sides apart at strength 1, where others carry
    source to target. ``sites`` is ``any``, one or several; a method with a rule of its own among
    them names where it looks: the ``layers``' outputs, or the ``heads``, of all blocks together.
    ``choices`` has a field that no data decides, with values of which validation chooses one where
    nobody names it, as it does a layer.
    """

    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False
    invertible: ClassVar[bool] = False
    across_sites: ClassVar[bool] = False
    across_tokens: ClassVar[bool] = False
    erases: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})

    @property
    def name(self) -> str:
        """The method's name: the name of its file, or of its entry point."""
        module = type(self).__module__
        listed = (name for name, home in shelf.modules().items() if home == module)
        return next(listed, module.rpartition(".")[2])

    @abstractmethod
    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Empty modules of the right shapes: loading an artifact needs no pickle."""

    @abstractmethod
    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fit on recorded rows; the same rows and seed give the same tensors."""

    @property
    def through(self) -> bool:
        """Whether a fit needs the model: gradients (rows that seek the target), blocks, itself."""
        return bool({"gradients", "model", "jacobians"} & set(self.needs))

    @property
    def rewords(self) -> bool:
        """Whether a fit through the model wants unmoved prompts in other words among its rows."""
        return False

    @property
    def trains_through(self) -> bool:
        """Whether a fit through the model does more than fit the rows that gradients made."""
        return type(self).fit_through is not Steerer.fit_through

    def fit_through(self, run: Runner, *, seed: int = 0) -> Interventions:
        """Fit through the model; by default on its target-seeking rows."""
        return self.fit(run.rows(), seed=seed)

    def fit_told(self, run: ConceptRun, *, seed: int = 0) -> Interventions:
        """Fit on concepts in words, through the model; for methods that need ``concepts``.

        Raises:
            InputError: another method.
        """
        raise InputError(
            f"a table of concepts for {self.name!r}",
            expected="a method that needs concepts, such as flas",
        )

    def learnt(self, run: ConceptRun, fitted: Interventions) -> dict[str, float]:
        """What a map of concepts makes of the validation part, or else of the training part.

        Mean log-probability per token in nats of at most 64 responses at strength 1: told its own
        ``concept``, told an ``other`` of the table (where it has one), and of the ``plain`` model.
        ``usable_from`` and ``usable_to`` are the strengths around 1, of those tried, at which the
        first lies above the last; where it does not at 1, there are none.
        """
        items = (run.items("validation") or run.items())[:64]
        named = list(dict.fromkeys(run.concept(item) for item in run.items()))
        own = [run.concept(item) for item in items]
        # The next one in the table: each is as often another as it is its own.
        after = dict(zip(named, [*named[1:], *named[:1]], strict=True))
        ones = [1.0] * len(items)
        with torch.no_grad():
            found = {
                "concept": run.told(fitted, items, ones),
                "plain": run.told(None, items, ones),
            }
            if len(named) > 1 or set(own) != set(named):
                others = [after.get(c, named[0]) for c in own]
                found["other"] = run.told(fitted, items, ones, others)
            told = {name: float(values.mean()) for name, values in found.items()}
            raised = {
                strength: float(run.told(fitted, items, [strength] * len(items)).mean())
                > told["plain"]
                for strength in USABLE
            }
        if raised[1.0]:
            below = [s for s in USABLE if s <= 1 and all(raised[t] for t in USABLE if s <= t <= 1)]
            above = [s for s in USABLE if s >= 1 and all(raised[t] for t in USABLE if 1 <= t <= s)]
            told |= {"usable_from": below[0], "usable_to": above[-1]}
        return told

    def extend_through(self, fitted: Interventions, run: Runner, *, seed: int = 0) -> Interventions:
        """Add a run's behaviours to a fitted map, after its own, which stay as they are."""
        self.check_extends(fitted)
        raise NotImplementedError

    def check_extends(self, fitted: Interventions) -> None:
        """Whether behaviours can be added to a fitted map.

        Raises:
            InputError: not by this method, or not to this map.
        """
        raise InputError(
            f"another behaviour for a map of {self.name!r}",
            expected="a method that adds one to a fitted map, such as innsteer's shear",
            remedy="fit all behaviours together: innsteer fit ONE TWO",
        )

    def detectors(self, fitted: Interventions) -> dict[Site, Tensor]:
        """Directions ``[k, d]`` by site: h . v says how much a token shows each behaviour.

        What a method reads by when it is asked to detect, not to steer; {}: it has no read-out.
        """
        return {}

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """Figures on the fitted map's health, for reports; none unless the method has some."""
        return {}


def weights(acts: Activations, behaviour: str) -> tuple[Tensor, Tensor]:
    """Weights of a behaviour's source and target rows, float64, in the order of ``acts.sides``.

    Raises:
        InputError: one of them is not above 0.
    """
    rows, parts = acts.rows, []
    for side in ("source", "target"):
        found = rows.weight[(rows.side == side) & (rows.behaviour == behaviour)]
        if not (np.isfinite(found) & (found > 0)).all():
            raise InputError(
                f"weights from {found.min()} to {found.max()} of the {side} rows of {behaviour!r}",
                expected="finite numbers above 0",
                remedy="leave out the rows that shall not count",
            )
        parts.append(torch.from_numpy(found))
    return parts[0], parts[1]


def side_means(
    acts: Activations,
    site: Site,
    behaviour: str,
    *,
    through: Callable[[Tensor], Tensor] = Tensor.double,
) -> tuple[Tensor, Tensor]:
    """Weighted means ``[d]`` of a behaviour's source and target rows, mapped ``through`` first.

    Equal weights give the plain mean, bit for bit.

    >>> acts = Activations.of_sides(torch.zeros(2, 1), torch.tensor([[0.0], [3.0]]))
    >>> acts.rows.weight[3] = 2.0
    >>> side_means(acts, acts.site, "behaviour")[1].item()
    2.0
    """
    means = []
    for part, weight in zip(acts.sides(site, behaviour), weights(acts, behaviour), strict=True):
        rows = through(part)
        if (weight == weight[0]).all():
            means.append(rows.mean(0))
        else:
            share = weight / weight.sum()
            means.append((share @ rows.double()).to(rows.dtype))
    return means[0], means[1]


def get(name: str, **fields: Any) -> Steerer:
    """A steerer by its method's name, with its fields set.

    Raises:
        UnknownName: no such method, or it has no such field.
        InputError: a value that its field does not take, or the method's module does not hold
            exactly one steerer.

    >>> get("diffmean").name
    'diffmean'
    """
    if name not in shelf.modules():
        raise UnknownName("method", name, shelf.names())
    module = importlib.import_module(shelf.modules()[name])
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Steerer)
        and value is not Steerer
        and value.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise InputError(
            f"module {module.__name__} of method {name!r} holds {len(kinds)} steerers",
            expected="exactly one",
        )
    known = [field.name for field in dataclasses.fields(kinds[0])]  # type: ignore[arg-type]
    for field in fields:
        if field not in known:
            raise UnknownName(f"field of method {name!r}:", field, known)
    try:
        steerer: Steerer = _adapter(kinds[0]).validate_python(fields)
    except ValidationError as error:
        try:
            kinds[0](**fields)
        except InnsteerError as own:
            raise own from None  # the method's own refusal is its own message
        except (TypeError, ValueError):
            pass  # a type that it did not look for
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}={first['input']} of method {name!r}: {first['msg']}") from None
    return steerer


@cache
def _adapter(kind: type[Steerer]) -> TypeAdapter[Any]:
    """What checks the fields of a method by their declared types."""
    return TypeAdapter(kind)

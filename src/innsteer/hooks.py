"""Attach edits to a Hugging Face model: hooks in one ExitStack, positions, and the trace.

One pre-hook on the base model plans each forward pass: absolute positions of its tokens, and from
them which rows each edit touches. A hook per site then applies the interventions to those rows and
to no others, so a sequence at strength 0 never passes through any arithmetic. Maps that act across
sites get a second hook, at their block's input.
"""

import hashlib
import inspect
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from innsteer.errors import InputError, NothingSteeredError, PositionError, RefusedError
from innsteer.files import canonical
from innsteer.interventions import Edit
from innsteer.models import LanguageModel, unwrapped
from innsteer.models.layout import Layout, find_layout
from innsteer.site import Site, Span, Where, before
from innsteer.steerer import AcrossSites, AcrossTokens, Bound, Intervention, finite
from innsteer.tokens import LIVE, Encode, TokenContext

# Set on a cache that holds steered tokens: its first steered column, and the prompts it was steered
# under. An attribute, because a copy of the cache (the way to reuse a prefix) must still tell.
_MARK = "innsteer_steered"

# ``plain``: this thread's passes go by every attachment, whichever is on the model.
_PASS = threading.local()


@dataclass
class Trace:
    """Which positions were steered: the oracle that tests and receipts read.

    Attributes:
        steered: per sequence of the current call, the absolute positions that an edit's scope
            selected and whose coefficients are not all 0.
        selected: number of tokens selected by scope since attaching, at any strength.
        touched: number of tokens edited since attaching, counted once for all sites.
        nonfinite: how often a site left a token alone because its activation was not finite; one
            that every site left alone is neither ``steered`` nor ``touched``.
    """

    steered: list[list[int]] = field(default_factory=list)
    selected: int = 0
    touched: int = 0
    nonfinite: int = 0


@dataclass(eq=False, slots=True)
class _Stage:
    """A map across sites in the latest pass.

    The carries as they came out of its block's input and output are kept apart, because a block
    that is run again (checkpointing) must find the same one.

    Attributes:
        number: of its edit. below: the map that hands a carry to it. bound: the map at the pass's
            strengths, which the next pass mostly has too.
    """

    number: int
    part: AcrossSites
    below: "_Stage | None"
    bound: Bound | None = None
    entered: Tensor | None = None
    left: Tensor | None = None


class Attachment:
    """Edits on a model, as a context manager; leaving it restores the model exactly.

    Args:
        model: a LanguageModel, or a Hugging Face causal language model of yours.
        edits: applied one after the other where they share a site.
        prompt_lengths: prompt tokens of each sequence; ``model.generate`` makes them known.
        turns: assistant turns of each sequence, for scope ``assistant``.
        displacement: a list to which |h' - h| / |h| of every edited row is appended.
        trace: one that several attachments share; the caller then calls ``require_selected``.
        contexts: per site the context ``[sequences, d]`` of edits that read the prompt, where the
            passes to come do not hold it; otherwise it is found as the prompt goes by.
        encode: who encodes the texts that requests are told; default: the model.

    Raises:
        NothingSteeredError: on leaving, when no token was in any edit's scope, or none of those to
            be edited was finite.
        PositionError, RefusedError: in a pass whose positions cannot be known or trusted.
    """

    def __init__(
        self,
        model: LanguageModel | nn.Module,
        edits: Sequence[Edit],
        *,
        prompt_lengths: Sequence[int] | None = None,
        turns: Sequence[Sequence[Span]] | None = None,
        displacement: list[float] | None = None,
        trace: Trace | None = None,
        contexts: Mapping[Site, Tensor] | None = None,
        encode: Encode | None = None,
    ) -> None:
        self._displacement = displacement
        if isinstance(model, LanguageModel):
            self._model, self._layout = model.model, model.layout
        else:
            self._model = unwrapped(model)
            self._layout = find_layout(self._model)
        self._edits = list(edits)
        self._prompts = list(prompt_lengths) if prompt_lengths is not None else None
        self._given = self._prompts is not None
        self._turns = [tuple(spans) for spans in turns] if turns is not None else None
        self._scopes: list[tuple[Tensor, Tensor, Tensor]] = []
        self._plan: list[tuple[Tensor, Tensor]] = []
        self._contexts = _Contexts(self._edits, contexts)
        self._stages = [_stages(number, edit) for number, edit in enumerate(self._edits)]
        # Of the pass: strengths and number of an edit's rows, whether rows may be taken all alike,
        # and what an edit handed on and is known to be finite.
        self._strengths: list[Tensor] = []
        self._counts: list[int] = []
        self._sound = False
        self._handed: list[Tensor | None] = []
        self._requests = _Requests(self._edits)
        own = model.states if isinstance(model, LanguageModel) else None
        self._encode = encode or own
        # Of the pass: its positions, and how often a site left each of its tokens alone.
        self._at = torch.empty(0, 0)
        self._spoiled: Counter[int] = Counter()
        self._first: int | None = None
        self._stack = ExitStack()
        self._busy = threading.RLock()
        self._passes = threading.local()
        self._shared = trace is not None
        self.trace = trace if trace is not None else Trace()
        _check(self._layout, self._edits)

    def __enter__(self) -> "Attachment":
        self.trace.steered = []
        with ExitStack() as stack:
            base = self._model.base_model
            for edit in self._edits:
                for site, part in edit.interventions.items():
                    part.to(self._device(site))
            with _plain():  # whatever is attached already does not change what a text means
                self._requests.prepare(self._encode)
            signature = inspect.signature(base.forward)

            def plan(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if _is_plain():
                    return
                self._take()
                self._passes.count = getattr(self._passes, "count", 0) + 1
                self._plan_pass(signature.bind_partial(*args, **kwargs).arguments)

            def mark(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if _is_plain() or not getattr(self._passes, "count", 0):
                    return  # or another thread's pass, which was refused
                self._passes.count -= 1
                self._busy.release()
                if output is None:
                    return  # the pass failed
                self._mark(getattr(output, "past_key_values", None))
                self._requests.mark(getattr(output, "past_key_values", None))
                if self._spoiled:
                    self._discount()

            stack.callback(base.register_forward_pre_hook(plan, with_kwargs=True).remove)
            stack.callback(base.register_forward_hook(mark, always_call=True).remove)
            for site in sorted({site for edit in self._edits for site in edit.interventions}):
                stack.callback(self._hook(site).remove)
            for site in sorted({site for edit in self._edits for site in _across(edit)}):
                stack.callback(self._read_hook(site).remove)
            stack.callback(self._wrap_generate())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._stack.close()
        if kind is None and not self._shared:
            require_selected(self.trace, self._edits)

    # --- planning a pass -------------------------------------------------------------------------

    def _plan_pass(self, call: dict[str, Any]) -> None:
        """Which rows of the coming pass each edit touches, and with which coefficients.

        Planned on the CPU in a handful of calls, whatever the batch: a pass of decoding waits here.
        """
        positions, real, start = _positions(call)
        batch, time = positions.shape
        self._admit(call.get("past_key_values"), start)
        if start == 0 or len(self.trace.steered) != batch:
            self.trace.steered = [[] for _ in range(batch)]
        if not self._scopes or len(self._scopes[0][0]) != batch:
            self._scopes = [self._scope(edit, batch) for edit in self._edits]
        at, plan = positions.unsqueeze(-1), []
        selected = acting = torch.zeros_like(real)
        for coef, live, spans in self._scopes:
            inside = ((at >= spans[..., 0]) & (at < spans[..., 1])).any(-1) & real
            selected, mine = selected | inside, inside & live
            acting = acting | mine
            index = mine.flatten().nonzero().squeeze(-1)
            plan.append((index, coef[index // time]))
        touched = acting.flatten().nonzero().squeeze(-1)
        rows, steered = (touched // time).tolist(), positions.flatten()[touched].tolist()
        for row, position in zip(rows, steered, strict=True):
            self.trace.steered[row].append(position)
        self.trace.selected += int(selected.sum())
        self.trace.touched += len(rows)
        self._first = start + int((touched % time).min()) if rows else None
        self._contexts.plan(self._prompts, positions, real, start)
        self._requests.plan(call, positions, start, self._prompts)
        strengths = [coef for _, coef in plan]
        for number, (old, new) in enumerate(zip(self._strengths, strengths, strict=False)):
            if not torch.equal(old, new):
                for stage in self._stages[number].values():
                    stage.bound = None
        device, self._strengths = self._model.device, strengths
        self._plan = [(index.to(device), coef.to(device)) for index, coef in plan]
        # Bound maps hold what their tensors were: not while these are trained.
        self._sound = not torch.is_grad_enabled()
        self._handed = [None] * len(plan)
        self._counts = [len(index) for index, _ in plan]
        self._at, self._spoiled = positions, Counter()

    def _discount(self) -> None:
        """After a pass with rows that were not finite: those that no site edited do not count."""
        planned: Counter[int] = Counter()
        for edit, (index, _) in zip(self._edits, self._plan, strict=True):
            for _site in edit.interventions:
                planned.update(index.tolist())
        flat, time = self._at.flatten().tolist(), self._at.shape[1]
        for token, times in self._spoiled.items():
            if times == planned[token]:
                self.trace.steered[token // time].remove(flat[token])
                self.trace.touched -= 1

    def _scope(self, edit: Edit, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """An edit's coefficients ``[batch, k]``, which rows have any ``[batch, 1]``, and its spans.

        Spans are ``[batch, 1, spans, 2]``, half-open; short rows are filled with empty ones.
        """
        rows = [
            edit.where.spans(
                prompt=_entry(self._prompts, row, batch), turns=_entry(self._turns, row, batch)
            )
            for row in range(batch)
        ]
        most = max(map(len, rows))
        ends = [
            [(start, sys.maxsize if stop is None else stop) for start, stop in row]
            + [(0, 0)] * (most - len(row))
            for row in rows
        ]
        coef = edit.rows(batch).cpu()
        spans = torch.tensor(ends, dtype=torch.long).reshape(batch, 1, most, 2)
        return coef, (coef != 0).any(-1, keepdim=True), spans

    def _admit(self, cache: Any, start: int) -> None:
        """Refuse a cache whose steered tokens a recomputed prompt would leave unsteered."""
        first, prompts = getattr(cache, _MARK, (start, None))
        scopes = {edit.where.scope for edit in self._edits} & {"generated", "prompt"}
        if first < start and prompts != self._prompts and scopes:
            raise RefusedError(
                "a cache that holds steered tokens, reused for a new turn under scope "
                f"{min(scopes)!r}",
                expected="a fresh cache: past turns of a recomputed prompt would be unsteered",
                remedy="use scope 'assistant', which gives the same edit either way",
            )
        if first >= start and hasattr(cache, _MARK):
            delattr(cache, _MARK)  # it was cropped or reset

    def _mark(self, cache: Any) -> None:
        """After a pass: its cache holds steered tokens from some column on."""
        if cache is not None and self._first is not None and not hasattr(cache, _MARK):
            setattr(cache, _MARK, (self._first, self._prompts))

    # --- applying --------------------------------------------------------------------------------

    def _hook(self, site: Site) -> Any:
        """A hook that sends the planned rows of one site through its edits."""
        module, port = self._layout.at(site)
        mine = [
            (number, edit.interventions[site])
            for number, edit in enumerate(self._edits)
            if site in edit.interventions.sites
        ]

        def steer(h: Tensor) -> Tensor:
            if _is_plain():
                return h
            self._contexts.see(site, h)
            for number, intervention in mine:
                if self._counts[number] or self._requests.keeps(number):
                    h = self._apply(site, number, intervention, h)
            return h

        if port == "input":
            return module.register_forward_pre_hook(lambda _, args: (steer(args[0]), *args[1:]))

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (steer(output[0]), *output[1:])
            return steer(output)

        return module.register_forward_hook(after)

    def _read_hook(self, site: Site) -> Any:
        """A hook that lets the maps across sites of one block read its input."""
        mine = [stages[site] for stages in self._stages if site in stages]

        def read(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if _is_plain():
                return
            h = args[0] if args else kwargs["hidden_states"]
            for stage in mine:
                if not self._counts[stage.number]:
                    continue
                index, coef = self._plan[stage.number]
                rows, below = _taken(h.reshape(-1, h.shape[-1]), index), stage.below
                if below is None:
                    carry = stage.part.start(rows)
                else:
                    assert below.left is not None
                    carry = below.left.to(rows.device)
                bound = self._bound(stage, rows)
                if bound and (h is self._handed[stage.number] or finite(rows)):
                    stage.entered = bound.read(rows.float(), carry)
                else:
                    self._sound = False  # from here on row by row: a carry may be NaN
                    stage.entered = stage.part.enter(rows, coef.to(rows.device), carry)

        return self._layout.at(site)[0].register_forward_pre_hook(read, with_kwargs=True)

    def _bound(self, stage: _Stage, rows: Tensor) -> Bound | None:
        """A map at the pass's strengths, where its rows may be taken all alike."""
        if not self._sound or rows.dtype == torch.float64:
            return None
        if stage.bound is None:
            coef = self._plan[stage.number][1]
            stage.bound = stage.part.bound(coef.to(rows.device, torch.float32))
        return stage.bound

    def _apply(self, site: Site, number: int, part: Intervention, h: Tensor) -> Tensor:
        """Edit the planned rows of ``[batch, time, d]``; the others are the same bits."""
        index = self._plan[number][0]
        flat = h.reshape(-1, h.shape[-1])
        rows, new = _taken(flat, index), None
        stage = self._stages[number].get(site)
        if stage and stage.entered is not None and (bound := self._bound(stage, rows)):
            new, stage.left = bound.write(rows.float(), stage.entered)
            new = new.to(rows.dtype)
            if not finite(new):
                self._sound, new = False, None
        sound = new is not None
        if new is None:
            new = self._edited(site, number, part, rows, h.shape[1])
        if self._displacement is not None:
            before, after = rows.float(), new.float()
            relative = (after - before).norm(dim=-1) / before.norm(dim=-1)
            self._displacement.extend(relative.tolist())
        if rows is flat:
            whole = new.reshape(h.shape)
        else:
            whole = flat.index_copy(0, index.to(flat.device), new).reshape(h.shape)
        self._handed[number] = whole if sound else None
        return whole

    def _edited(
        self, site: Site, number: int, part: Intervention, rows: Tensor, time: int
    ) -> Tensor:
        """New values of planned rows; those that are not finite are counted."""
        index, coef = self._plan[number]
        context = carry = None
        if part.contextual:
            context = self._contexts.of(site, index // time, rows.device)
        if stage := self._stages[number].get(site):
            carry = stage.entered
        read = [told for told in (rows, context, carry) if told is not None]
        if not all(map(finite, read)):
            broken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            for told in read:
                broken = broken | ~torch.isfinite(told).all(-1)
            self.trace.nonfinite += int(broken.sum())
            self._spoiled.update(index[broken.to(index.device)].tolist())
        new: Tensor
        if stage:
            assert carry is not None
            new, stage.left = stage.part.leave(rows, coef.to(rows.device), carry)
        elif isinstance(part, AcrossTokens):
            requests = self._requests.of(number, site, index.to(rows.device), rows.device)
            new = part.steer(rows, coef.to(rows.device), requests)
        else:
            new = part(rows, coef.to(rows.device), context)
        return new

    def _device(self, site: Site) -> torch.device:
        """Where a site's rows are computed: a model may be spread over devices."""
        weight = next(self._layout.blocks[site.layer].module.parameters(), None)
        device: torch.device = self._model.device if weight is None else weight.device
        return device

    # --- generate --------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For one thread alone: positions and coefficients are those of one call at a time."""
        self._take()
        try:
            yield
        finally:
            self._busy.release()

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise RefusedError(
                "a second thread on a steered model that is still running",
                expected="one call at a time: two would get each other's positions",
                remedy="put the prompts into one batch, or give each thread a model of its own",
            )

    def _wrap_generate(self) -> Callable[[], None]:
        """Let ``model.generate`` make the prompt lengths known; returns what undoes it."""
        model, own = self._model, vars(self._model).get("generate")
        generate = model.generate

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._given:
                with self._alone():
                    return generate(*args, **kwargs)
            with self._alone():
                self._prompts, self._scopes = _prompt_lengths(model, args, kwargs), []
                self._contexts.reset()
                try:
                    return generate(*args, **kwargs)
                finally:
                    self._prompts, self._scopes = None, []

        model.generate = wrapped

        def undo() -> None:
            if own is None:
                del model.generate
            else:
                model.generate = own

        return undo


@contextmanager
def _plain() -> Iterator[None]:
    """Passes inside are those of the plain model, and count in no trace."""
    _PASS.plain = True
    try:
        yield
    finally:
        _PASS.plain = False


def _is_plain() -> bool:
    return getattr(_PASS, "plain", False)


class _Contexts:
    """What stood before the steered tokens of each sequence, per site: gathered as prompts go by.

    Read before the site's own edits. Edits of scope ``generated`` change nothing that is read.
    """

    def __init__(self, edits: Sequence[Edit], given: Mapping[Site, Tensor] | None) -> None:
        self._sites = {
            site for edit in edits for site, part in edit.interventions.items() if part.contextual
        }
        self._given = given
        self._inside = torch.zeros(())
        self.reset()

    def reset(self) -> None:
        """Forget what went by: a new call brings its own prompts."""
        self._sums: dict[Site, Tensor] = {}
        self._counts = self._wanted = self._last = torch.empty(0, dtype=torch.long)

    def plan(
        self, prompts: Sequence[int] | None, positions: Tensor, real: Tensor, start: int
    ) -> None:
        """Which tokens of the coming pass belong to contexts."""
        if not self._sites or self._given is not None:
            return
        batch = len(positions)
        first = torch.where(real, positions, sys.maxsize).amin(1)
        # A position that went by before belongs to another call, whatever its cache holds.
        if start == 0 or len(self._last) != batch or bool((first <= self._last).any()):
            self.reset()
            lengths = [_entry(prompts, row, batch) for row in range(batch)]
            self._spans = torch.tensor([before(length) for length in lengths])
            self._counts = torch.zeros(batch, dtype=torch.long)
            self._wanted = self._spans[:, 1] - self._spans[:, 0]
            self._last = torch.full((batch,), -1)
        self._last = torch.where(real, positions, -1).amax(1).maximum(self._last)
        inside = (positions >= self._spans[:, :1]) & (positions < self._spans[:, 1:]) & real
        self._counts = self._counts + inside.sum(1)
        self._inside = inside if inside.any() else torch.zeros(())

    def see(self, site: Site, h: Tensor) -> None:
        """Add the tokens of a pass at a site."""
        if site not in self._sites or not self._inside.ndim:
            return
        inside = self._inside.to(h.device).unsqueeze(-1)
        total = torch.where(inside, h.float(), h.new_zeros((), dtype=torch.float32)).sum(1)
        self._sums[site] = self._sums[site] + total if site in self._sums else total

    def of(self, site: Site, sequences: Tensor, device: torch.device) -> Tensor:
        """Contexts ``[tokens, d]`` of tokens, by their sequences."""
        if self._given is not None:
            given: Tensor = self._given[site][sequences.to(self._given[site].device)]
            return given.to(device)
        own = sequences.to(self._counts.device)
        if not bool(self._wanted[own].all()):
            raise PositionError(
                "a prompt of 1 or 2 tokens for a steering that reads the prompt",
                expected="at least 3 tokens",
            )
        if site not in self._sums or not torch.equal(self._counts[own], self._wanted[own]):
            self.reset()
            raise RefusedError(
                "a pass without its prompt, under a steering that reads the prompt",
                expected="every prompt token to go by while the steering is attached",
                remedy="attach it before the prompt is run, and bring no cache of an earlier pass",
            )
        total = self._sums[site].to(device)
        found: Tensor = (total / self._wanted.to(device).unsqueeze(-1))[sequences.to(device)]
        return found


class _Kept(DynamicLayer):  # type: ignore[no-untyped-call]
    """Columns that a map across tokens keeps, as one more layer of the model's own cache.

    So they are re-ordered with beams, cut on roll-back, copied and repeated as its keys and values
    are. ``name`` is the edit's number, the site and the feature; ``maps`` whose columns they are.
    """

    def __init__(self, name: tuple[int, Site, str], maps: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.maps = name, weakref.ref(maps)


class _Requests:
    """What maps across tokens are told of each pass, and what they keep from one to the next."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = {
            number: edit
            for number, edit in enumerate(edits)
            if edit.interventions.across_tokens and bool((edit.coef != 0).any())
        }
        self._layers: dict[tuple[int, Site, str], _Kept] = {}

    def keeps(self, number: int) -> bool:
        """Whether an edit must see passes in which nothing of it is in scope: they are columns."""
        return number in self._edits

    def prepare(self, encode: Encode | None) -> None:
        """Make the memory of every set of parameters, once."""
        self._memory: dict[tuple[int, Site, bytes], Mapping[str, Tensor]] = {}
        self._stacked: dict[tuple[int, Site, int], dict[str, Tensor]] = {}
        for number, edit in self._edits.items():
            if encode is None and edit.interventions.asks:
                raise RefusedError(
                    "a bare Hugging Face model under a steering that is told a text",
                    expected="a LanguageModel, whose tokenizer reads the text",
                    remedy="attach it to load_model(...) or LanguageModel.wrap(model, tokenizer)",
                )
            for site, part in _across_tokens(edit):
                for told in edit.told or ({},):
                    key = number, site, canonical(dict(told))
                    if key not in self._memory:
                        self._memory[key] = part.prepare(told, encode or _no_text)

    def plan(
        self,
        call: Mapping[str, Any],
        positions: Tensor,
        start: int,
        prompts: Sequence[int] | None,
    ) -> None:
        """What the coming pass brings, and what earlier passes left in its cache."""
        if not self._edits:
            return
        cache, batch = call.get("past_key_values"), len(positions)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise RefusedError(
                f"a {type(cache).__name__} under a steering across tokens",
                expected="a DynamicCache, in which its own columns follow the model's",
                remedy="leave cache_implementation out",
            )
        if cache is not None and not start:  # fresh, reset, or cut down to nothing
            cache.layers = [layer for layer in cache.layers if not isinstance(layer, _Kept)]
        layers: Sequence[Any] = [] if cache is None else cache.layers
        mine = [layer for layer in layers if isinstance(layer, _Kept) and self._owns(layer)]
        self._layers = {layer.name: layer for layer in mine}
        if len(self._layers) < len(mine):
            raise RefusedError(
                "the same maps across tokens in two steerings that are attached one in the other",
                expected="one attachment: in a cache nothing tells their columns apart",
                remedy="give both edits to one Attachment",
            )
        self._told = {n: _digests(edit, batch) for n, edit in self._edits.items()}
        if start:
            self._check(start)
        ids = call.get("input_ids")
        self._ids = torch.full_like(positions, -1) if ids is None else ids
        self._positions, self._start = positions, start
        known = prompts is not None
        self._ends = [_entry(prompts, row, batch) - 1 for row in range(batch)] if known else None

    def _owns(self, layer: _Kept) -> bool:
        """Whether columns are of these edits: other attachments number theirs from 0 too."""
        edit = self._edits.get(layer.name[0])
        return edit is not None and layer.maps() is edit.interventions

    def of(self, number: int, site: Site, index: Tensor, device: torch.device) -> TokenContext:
        """What the planned rows ``index`` of an edit are told at a site."""
        edit, (batch, time) = self._edits[number], self._positions.shape
        at = index.cpu()
        position = self._positions.flatten()[at]
        ends = None if self._ends is None else torch.tensor(self._ends)[at // time]

        def keep(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if name == LIVE:  # whose columns they are, beside which of them were edited
                values = self._told[number].to(device).unsqueeze(1).expand(-1, time, -1)
            layer = self._layers.setdefault(
                (number, site, name), _Kept((number, site, name), edit.interventions)
            )
            if layer.get_seq_length() > self._start:  # this block is run again (checkpointing)
                layer.keys, layer.values = (
                    None if old is None else old[..., : self._start, :]
                    for old in (layer.keys, layer.values)
                )
            both = layer.update(keys.unsqueeze(1), values.unsqueeze(1))
            return both[0].squeeze(1), both[1].squeeze(1)

        return TokenContext(
            request=index // time,
            column=index % time,
            position=position.to(device),
            generated=None if ends is None else (position >= ends).to(device),
            ids=self._ids.flatten()[index.to(self._ids.device)].to(device),
            requests=batch,
            columns=time,
            memory=self._recall(number, site, batch),
            keep=keep,
        )

    def mark(self, cache: Any) -> None:
        """After a pass: what was kept rides on the model's cache, if there is one."""
        if self._edits and isinstance(cache, DynamicCache):
            there = {id(layer) for layer in cache.layers}
            cache.layers += [one for one in self._layers.values() if id(one) not in there]

    def _recall(self, number: int, site: Site, batch: int) -> dict[str, Tensor]:
        """The memories of a batch's requests, stacked once for all its passes."""
        if (number, site, batch) not in self._stacked:
            told = [
                self._memory[number, site, canonical(dict(one))]
                for one in self._edits[number].parameters(batch)
            ]
            self._stacked[number, site, batch] = {
                name: nn.utils.rnn.pad_sequence([one[name] for one in told], batch_first=True)
                for name in told[0]
            }
        return self._stacked[number, site, batch]

    def _check(self, start: int) -> None:
        """Refuse cached tokens that went by without these edits, or under others."""
        for number, edit in self._edits.items():
            for site, _ in _across_tokens(edit):
                layer = self._layers.get((number, site, LIVE))
                if layer is None or layer.get_seq_length() != start:
                    raise RefusedError(
                        f"a cache of {start} tokens that went by without this steering",
                        expected="a request whose every token it has seen",
                        remedy="run the whole request while it is attached; no prefix that another "
                        "request left can be used",
                    )
                assert layer.values is not None
                if not torch.equal(layer.values[:, 0, -1].cpu(), self._told[number]):
                    raise RefusedError(
                        "a cache of tokens steered by other parameters, strengths or scope",
                        expected="the same ones for the whole request",
                        remedy="start anew: run the whole request under the new ones",
                    )


def _across_tokens(edit: Edit) -> list[tuple[Site, AcrossTokens]]:
    """The maps of an edit that act across tokens."""
    return [(site, p) for site, p in edit.interventions.items() if isinstance(p, AcrossTokens)]


def _digests(edit: Edit, batch: int) -> Tensor:
    """Two numbers ``[batch, 2]`` that stand for each sequence's strengths, parameters and scope."""
    rows = zip(edit.rows(batch).tolist(), edit.parameters(batch), strict=True)
    told = [
        hashlib.sha256(canonical([row, dict(given), str(edit.where)])).digest()
        for row, given in rows
    ]
    # Three bytes each: float32, of which a cache's layer is, holds them exactly.
    return torch.tensor(
        [[float(int.from_bytes(d[:3])), float(int.from_bytes(d[3:6]))] for d in told]
    )


def _no_text(text: str, blocks: int) -> Tensor:
    raise AssertionError("a map that asks for nothing encodes nothing")


def require_selected(trace: Trace, edits: Sequence[Edit]) -> None:
    """Refuse a steered run in which no token was in scope, or none of those it meant was finite.

    Raises:
        NothingSteeredError: so it was; strength 0 alone is no error.
    """
    if trace.nonfinite and not trace.touched:
        raise NothingSteeredError(
            "no token was steered: every activation to be edited was infinite or NaN",
            expected="finite activations at the steered sites",
            remedy="load the model in float32 or bfloat16, and look at what it computes unsteered",
        )
    if not trace.selected:
        scopes = ", ".join(sorted({str(edit.where) for edit in edits}))
        raise NothingSteeredError(
            f"no token was steered (scope {scopes})",
            expected="at least one token in scope in a forward pass of this model",
            remedy="check the scope against the prompts, and that this model was the one run",
        )


def _across(edit: Edit) -> dict[Site, AcrossSites]:
    """The maps of an edit that act across sites, lowest layer first."""
    return {site: p for site, p in edit.interventions.items() if isinstance(p, AcrossSites)}


def _stages(number: int, edit: Edit) -> dict[Site, _Stage]:
    """The same in the order in which they hand their carries on."""
    found: dict[Site, _Stage] = {}
    below = None
    for site, part in _across(edit).items():
        found[site] = below = _Stage(number, part, below)
    return found


def _taken(flat: Tensor, index: Tensor) -> Tensor:
    """The indexed rows; all of them are the tensor itself."""
    return flat if len(index) == len(flat) else flat[index.to(flat.device)]


def _entry(values: Sequence[Any] | None, row: int, batch: int) -> Any:
    """A sequence's entry, where generate() may have expanded each prompt into several."""
    if values is None:
        return None
    if not values or batch % len(values):
        raise PositionError(
            f"{len(values)} prompts' lengths or turns for a batch of {batch} sequences",
            expected="one per prompt",
        )
    return values[row // (batch // len(values))]


def _positions(call: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Positions ``[batch, time]`` and which of them are real, on the CPU; the cache's length."""
    ids = call.get("input_ids")
    first = ids if ids is not None else call.get("inputs_embeds")
    if first is None:
        raise PositionError("a forward pass without input_ids or inputs_embeds")
    batch, time = first.shape[:2]
    cache = call.get("past_key_values")
    start = int(cache.get_seq_length()) if cache is not None else 0
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= start + time:
        # Columns are absolute slots; padding, left or right, does not count.
        filled = mask.to(torch.long).cumsum(-1) - 1
        window = slice(start, start + time)
        return filled[:, window].cpu(), mask[:, window].bool().cpu(), start
    if mask is not None and call.get("position_ids") is None:
        raise PositionError(
            "an attention mask that is not [batch, tokens], without position_ids",
            expected="a 2-dimensional mask, or position_ids",
        )
    given = call.get("position_ids")
    if given is not None:
        positions = given.expand(batch, time).cpu()
    else:
        positions = torch.arange(start, start + time).expand(batch, time)
    real = torch.ones_like(positions, dtype=torch.bool)
    if mask is not None:
        # A mask made for a static cache; left padding repeats the position of the first token.
        real[:, :-1] = positions[:, :-1] != positions[:, 1:]
    return positions, real, start


def _prompt_lengths(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Real prompt tokens of each sequence given to generate()."""
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return [int(n) for n in mask.sum(-1)]
    if ids is None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            raise PositionError("generate() without input_ids", expected="a prompt to count")
        return [embeds.shape[1]] * len(embeds)
    config = kwargs.get("generation_config") or model.generation_config
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    eos = kwargs.get("eos_token_id", config.eos_token_id)
    ends = eos if isinstance(eos, list) else [eos]
    if pad is not None and pad not in ends:
        return [int(n) for n in (ids != pad).sum(-1)]
    return [ids.shape[1]] * len(ids)


def _check(layout: Layout, edits: Sequence[Edit]) -> None:
    """Every edit fits the model: sites exist, widths agree."""
    if not edits:
        raise InputError("no edit to attach", expected="at least one steering")
    for edit in edits:
        if edit.interventions.contextual and edit.where != Where():
            raise RefusedError(
                f"scope {edit.where} for a steering that reads the prompt",
                expected="scope 'generated': what is read must stand before what is steered",
            )
        for site, part in edit.interventions.items():
            layout.at(site)  # refuses a layer or a stream that this model does not have
            width = layout.width_of(site)
            if part.width != width:
                raise InputError(
                    f"steering of width {part.width} at site {site}, where this model has {width}",
                    remedy="it was fitted on another model; fit it on this one",
                )

"""Cost: what edits do to the model's predictions on a reference, token by token."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from innsteer.backends.base import Completion, Kind, Prompt, silent
from innsteer.backends.engine import (
    Engine,
    as_text,
    cache_of,
    context_of,
    cut_of,
    cut_of_edits,
    edits_of,
    repeated,
    replay,
    require_rows,
    tally,
    tap,
    watch,
)
from innsteer.contrast import Conversation
from innsteer.hooks import Attachment, Trace
from innsteer.interventions import Edit
from innsteer.site import Site, Span, Where

if TYPE_CHECKING:
    from innsteer.backends.lora import LoRA


AT_ONCE = 2
"""Distributions over the vocabulary that a thread compares at a time: more leave its caches."""


@dataclass(frozen=True)
class Reference:
    """What the unsteered model says to some prompts: the text on which cost is measured.

    Attributes:
        prompts: the prompts. ids: prompt and continuation tokens of each.
        lengths: prompt tokens of each. turns: assistant turns of each, the open one last.
    """

    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    turns: tuple[tuple[Span, ...], ...]

    @property
    def tokens(self) -> int:
        """Predicted tokens: the first response token and all later ones, or 1 per bare prompt."""
        return sum(max(len(ids) - n, 1) for ids, n in zip(self.ids, self.lengths, strict=True))

    def part(self, tokens: int) -> "Reference":
        """The first prompts that hold at least this many tokens together."""
        total, count = 0, 0
        for ids, length in zip(self.ids, self.lengths, strict=True):
            if total >= tokens:
                break
            total, count = total + max(len(ids) - length, 1), count + 1
        return Reference(
            self.prompts[:count], self.ids[:count], self.lengths[:count], self.turns[:count]
        )


class Meter:
    """What edits do to the predictions on a reference, per response token.

    Gives ``kl`` = KL(base || steered) in nats, and the steered and unsteered log-probability of the
    token that stands there. What is unsteered is computed once: what all rows begin with, a prompt
    that several answers share, and with ``sites`` what the block of each of them hands on. A
    measurement then runs the blocks above the lowest edited one only, and no column before the
    first edited one. That is exact, because nothing in a pass looks further on.
    """

    def __init__(
        self,
        backend: Engine,
        reference: Reference,
        sites: Sequence[Site] = (),
        divergence: bool = True,
        *,
        apart: bool = False,
    ) -> None:
        self.backend, self.reference = backend, reference
        self._cuts = sorted({cut for site in sites if (cut := cut_of([site])) >= 0})
        self._divergence, self._sites = divergence, sites
        self._runs = self._distinct(apart)
        most = min((run.first for run in self._runs), default=0)
        self._lead = backend._shared([run.ids for run in self._runs], most)

    def _distinct(self, apart: bool) -> "list[_Run]":
        """What has to run: once for all rows that need the same, or ``apart`` for each row."""
        reference, found = self.reference, dict[Any, _Run]()
        for i, (ids, length) in enumerate(zip(reference.ids, reference.lengths, strict=True)):
            # The last token of a scored answer predicts nothing.
            run = ids if self._divergence else ids[: max(len(ids) - 1, length)]
            key = i if apart else (run, length, len(ids), reference.turns[i])
            rows = found[key].rows if key in found else ()
            found[key] = _Run(run, length - 1, (*rows, i))
        return list(found.values())

    @cached_property
    def _apart(self) -> "Meter":
        """The same measure with a run for each row: edits may treat them differently."""
        if len(self._runs) == len(self.reference.ids):
            return self
        return Meter(self.backend, self.reference, self._sites, self._divergence, apart=True)

    @cached_property
    def _ahead(self) -> "_Ahead":
        """What the plain model makes of the tokens that all rows begin with."""
        cuts, layout, lead = self._cuts, self.backend.model.layout, self._runs[0].ids[: self._lead]
        with torch.inference_mode(), ExitStack() as stack:
            held = {cut: stack.enter_context(tap(layout.blocks[cut])) for cut in cuts}
            seen = stack.enter_context(watch(layout, self._sites))
            cache = self.backend._begun(lead)
        return _Ahead(lead, cache, {cut: _hidden(one[0]) for cut, one in held.items() if one}, seen)

    @cached_property
    def _batches(self) -> "list[_Measured]":
        """What is unsteered, batch by batch; computed when something is measured."""
        if not self._runs:
            return []
        backend, layout, lead = self.backend, self.backend.model.layout, self._lead
        found: list[_Measured] = []
        lengths = [len(run.ids) - lead for run in self._runs]
        for index in backend._batches(lengths, silent, "meter"):
            runs = [self._runs[n] for n in index]
            ids, mask = backend._after(lead, [run.ids for run in runs])
            cache = repeated(self._ahead.cache, len(runs)) if lead or self._sites else None
            with torch.inference_mode(), ExitStack() as stack:
                taps = {cut: stack.enter_context(tap(layout.blocks[cut])) for cut in self._cuts}
                seen = stack.enter_context(watch(layout, self._sites))
                base = self._predict(runs, ids, mask, cache).float().log_softmax(-1)
                best = base.max(-1)
            prefix = mask.shape[1] - max(run.tail for run in runs) if self._sites else 0
            at, tokens = self._asked(runs, best.indices)
            found.append(
                _Measured(
                    runs,
                    ids,
                    mask,
                    base if self._divergence else None,
                    best.values.exp().tolist(),
                    best.indices,
                    at,
                    tokens,
                    base[at, tokens].tolist(),
                    {cut: one[0] for cut, one in taps.items()},
                    _past(cache, prefix),
                    prefix,
                    self._contexts(runs, seen),
                )
            )
        return found

    def __call__(
        self,
        edits: Sequence[Edit],
        *,
        kind: Kind = "neutral",
        displacement: list[float] | None = None,
    ) -> list[Completion]:
        """One completion per row of the reference, in order, under the edits.

        ``steered`` counts the positions that predict a response token, as ``tokens`` does: edits
        further up in the prompt cost without being counted.

        Args:
            displacement: a list to which |h' - h| / |h| of every edited row is appended.
        """

        def measure() -> dict[str, Any]:
            moved: list[float] | None = None if displacement is None else []
            made = self._measure(edits, kind, moved)
            return {"made": [one.to_json() for one in made], "moved": moved}

        if self.backend.memo.folder is None:
            return self._measure(edits, kind, displacement)
        found = self.backend.memo.value(
            self._key("meter", kind, displacement is None, edits=edits), measure
        )
        if displacement is not None:
            displacement += found["moved"]
        return [Completion.from_json(row) for row in found["made"]]

    def _key(self, call: str, *given: Any, edits: Sequence[Edit] = ()) -> list[Any]:
        """All that a figure of this reference depends on."""
        own = [*vars(self.reference).values()], list(map(str, self._sites)), self._divergence
        return self.backend.key(call, *own, *given, edits=edits)

    def _measure(
        self, edits: Sequence[Edit], kind: Kind, displacement: list[float] | None
    ) -> list[Completion]:
        require_rows(edits, len(self.reference.ids))
        if any(edit.coef.ndim == 2 or len(edit.told) > 1 for edit in edits):
            return self._apart._attached(edits, kind, displacement)
        return self._attached(edits, kind, displacement)

    def _attached(
        self, edits: Sequence[Edit], kind: Kind, displacement: list[float] | None
    ) -> list[Completion]:
        found: dict[int, Completion] = {}
        # An edit below a cut changes what was kept, and one that reads there needs the block.
        cut = max((cut for cut in self._cuts if cut <= cut_of_edits(edits)), default=-1)
        with tally(edits) as trace:
            for part in self._batches:
                start = self._start(part, edits)
                rows = [run.rows[0] for run in part.runs]
                attached = Attachment(
                    self.backend.model,
                    edits_of(edits, rows),
                    prompt_lengths=[self.reference.lengths[i] for i in rows],
                    turns=[self.reference.turns[i] for i in rows],
                    displacement=displacement,
                    trace=trace,
                    contexts=part.contexts if start else None,
                )
                # Attached first: what a request says is encoded by blocks that still run.
                with torch.inference_mode(), attached, self._replay(part, cut, start):
                    ids, cache = self._ids(part, start), self._cache(part, start)
                    steered = self._predict(part.runs, ids, part.mask, cache)
                found |= self._completions(part, steered, kind, trace)
        return [found[i] for i in range(len(self.reference.ids))]

    def _start(self, part: "_Measured", edits: Sequence[Edit]) -> int:
        """The first column to run: those before it stay unedited, in every layer, and are kept.

        Where an edit reads the prompt, nothing of the prompt may be edited: what it reads was kept.
        """
        if any(edit.interventions.across_tokens for edit in edits):
            return 0  # a map must see every token of its request go by
        told = [site for e in edits for site, one in e.interventions.items() if one.contextual]
        if told and (
            any(edit.where != Where() for edit in edits) or not set(told) <= part.contexts.keys()
        ):
            return 0
        lengths, turns = self.reference.lengths, self.reference.turns
        first = [
            # All rows end in the last column, and begin with the same tokens in the first ones.
            start if start < self._lead else part.mask.shape[1] - len(run.ids) + start
            for run in part.runs
            for edit in edits
            for start, _ in edit.where.spans(prompt=lengths[run.rows[0]], turns=turns[run.rows[0]])
        ]
        lowest = min(first, default=part.mask.shape[1])
        return max(start for start in (0, self._lead, part.prefix) if start <= lowest)

    def unsteered(self, *, kind: Kind = "neutral") -> list[Completion]:
        """The same figures for the plain model: a divergence of 0, nothing run again."""
        return self.backend.memo.completions(
            self._key("unsteered", kind), lambda: self._plain(kind)
        )

    def _plain(self, kind: Kind) -> list[Completion]:
        found: dict[int, Completion] = {}
        for part in self._batches:
            found |= self._completions(part, None, kind, None)
        return [found[i] for i in range(len(self.reference.ids))]

    def prompted(self, instruction: str, *, kind: Kind = "neutral") -> list[Completion]:
        """The same figures for the plain model with an instruction added to every prompt."""

        def ask(run: _Run) -> tuple[int, ...]:
            asked = instruct(self.reference.prompts[run.rows[0]].conversation, instruction)
            return (*self.backend.model.encode(asked).ids, *run.ids[run.first + 1 :])

        key = self._key("prompted", instruction, kind)
        return self.backend.memo.completions(key, lambda: self._whole(ask, kind))

    def adapted(
        self, adapter: "LoRA", strength: float, *, kind: Kind = "neutral"
    ) -> list[Completion]:
        """The same figures for the model under adapters: nothing of the plain one can be kept."""
        _ = self._batches  # of the plain model
        with self.backend.adapted(adapter, strength):
            return self.backend.memo.completions(
                self._key("adapted", kind), lambda: self._whole(lambda run: run.ids, kind)
            )

    def _whole(self, ask: "Callable[[_Run], tuple[int, ...]]", kind: Kind) -> list[Completion]:
        """Figures of passes without edits; ``ask`` gives the tokens in a run's place."""
        found: dict[int, Completion] = {}
        every = [[ask(run) for run in part.runs] for part in self._batches]
        most = min(
            len(ids) - run.tail
            for part, rows in zip(self._batches, every, strict=True)
            for run, ids in zip(part.runs, rows, strict=True)
        )
        lead = self.backend._shared([ids for rows in every for ids in rows], most)
        with torch.inference_mode():
            begun = self.backend._begun(every[0][0][:lead])
            for part, rows in zip(self._batches, every, strict=True):
                cache = repeated(begun, len(rows)) if lead else None
                predicted = self._predict(part.runs, *self.backend._after(lead, rows), cache)
                found |= self._completions(part, predicted, kind, None)
        return [found[i] for i in range(len(self.reference.ids))]

    # --- figures ---------------------------------------------------------------------------------

    def _completions(
        self, part: "_Measured", steered: Tensor | None, kind: Kind, trace: Trace | None
    ) -> dict[int, Completion]:
        """Completions of one batch from its steered logits; None: the plain model's."""
        figures = self._figures(part, steered)
        found, place, answer = {}, 0, 0
        for row, run in enumerate(part.runs):
            for i in run.rows:
                count = self._count(i)
                window, own = slice(place, place + count), slice(answer, answer + count)
                answer += count
                values = {
                    "log_prob": tuple(figures.own[own]),
                    "base_log_prob": tuple(part.own[own]),
                }
                # The last token of an answer predicts nothing that is measured.
                moved = trace.steered[row] if trace else []
                moved = [at for at in moved if at < run.first + count]
                if part.base is not None:
                    # A row without an edit costs nothing, but for what is not finite in the plain
                    # model already; kept columns may differ by rounding.
                    scale = 1.0 if moved or not trace else 0.0
                    values["kl"] = tuple(scale * nats for nats in figures.kl[window])
                    values["sure"] = tuple(part.sure[window])
                    values["same"] = tuple(figures.same[window])
                prompt = self.reference.prompts[i]
                found[i] = Completion(
                    prompt.item,
                    kind,
                    as_text(prompt.conversation),
                    prompt.answers[0] if prompt.answers else "",
                    values=values,
                    tokens=count,
                    steered=sum(at >= run.first for at in moved),
                )
            place += self._count(run.rows[0])
        return found

    def _figures(self, part: "_Measured", steered: Tensor | None) -> "_Figures":
        """What the steered logits say of each prediction, a few at a time: they stay in caches."""
        if steered is None and part.base is None:
            return _Figures(part.own, [], [])
        logits = part.base if steered is None else steered
        assert logits is not None
        on_cpu = logits.device.type == "cpu"
        size = AT_ONCE * torch.get_num_threads() if on_cpu else len(logits)
        own = torch.empty(len(part.at), device=logits.device)
        kl, same = [], []
        for start in range(0, len(logits), size):
            now = slice(start, start + size)
            # Of what is normalised already, nothing is left to take.
            log_probs = logits[now] if steered is None else logits[now].float().log_softmax(-1)
            here = (part.at >= start) & (part.at < start + size)
            own[here] = log_probs[part.at[here] - start, part.tokens[here]]
            if part.base is not None:
                base = part.base[now]
                # Rounding can leave a KL of equal distributions a hair below 0.
                kl.append((base.exp() * (base - log_probs)).sum(-1).clamp_min(0))
                same.append((log_probs.argmax(-1) == part.best[now]).float())
        told = [torch.cat(parts).tolist() if parts else [] for parts in (kl, same)]
        return _Figures(own.tolist(), *told)

    def _count(self, i: int) -> int:
        """Predicted tokens of a row: its response, or the first token of a bare prompt's."""
        return max(len(self.reference.ids[i]) - self.reference.lengths[i], 1)

    def _asked(self, runs: "Sequence[_Run]", best: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and tokens that rows ask for; after a bare prompt, the base's best one."""
        at: list[int] = []
        tokens: list[int] = []
        place, chosen = 0, best.tolist()
        for run in runs:
            count = self._count(run.rows[0])
            for i in run.rows:
                answer = self.reference.ids[i][self.reference.lengths[i] :]
                tokens += answer or [chosen[place]]
                at += range(place, place + count)
            place += count
        return torch.tensor(at, device=best.device), torch.tensor(tokens, device=best.device)

    # --- a pass ----------------------------------------------------------------------------------

    def _predict(
        self, runs: "Sequence[_Run]", ids: Tensor, mask: Tensor, cache: Any = None
    ) -> Tensor:
        """Logits ``[predicted tokens, vocabulary]`` of a batch, run after run."""
        logits = self.backend._logits(ids, mask, max(run.tail for run in runs), cache)
        # The token before each response token predicts it; a bare prompt's last token is read.
        return torch.cat(
            [
                one[len(one) - run.tail :][: self._count(run.rows[0])]
                for run, one in zip(runs, logits, strict=True)
            ]
        )

    def _ids(self, part: "_Measured", start: int) -> Tensor:
        """Token ids of a batch from a column on."""
        if start >= self._lead:
            return part.ids[:, start - self._lead :]
        lead = torch.tensor([self._ahead.ids], device=part.ids.device)
        return torch.cat([lead.expand(len(part.ids), -1), part.ids], 1)

    def _cache(self, part: "_Measured", start: int) -> DynamicCache | None:
        """A fresh cache of the columns before ``start``."""
        if not start:
            return None
        if start == part.prefix:
            return cache_of(part.past)
        return repeated(self._ahead.cache, len(part.runs))

    def _replay(self, part: "_Measured", cut: int, start: int) -> Any:
        """Blocks up to a cut hand over what was kept, from a column on, not computing it."""
        if cut < 0:
            return nullcontext()
        whole = part.held[cut]
        h = _hidden(whole)
        if start >= self._lead:
            h = h[:, start - self._lead :]
        else:
            h = torch.cat([self._ahead.held[cut].expand(len(h), -1, -1), h], 1)
        held = (h, *whole[1:]) if isinstance(whole, tuple) else h
        return replay(self.backend.model.layout.blocks[: cut + 1], held)

    def _contexts(self, runs: "Sequence[_Run]", seen: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """What stands before each run's response, ``[runs, d]`` per site."""
        found = {}
        for site, h in seen.items():
            ahead = self._ahead.seen[site][0] if self._lead else h.new_empty(0, h.shape[-1])
            own = [h[n, self._lead - len(run.ids) :] for n, run in enumerate(runs)]
            found[site] = torch.stack(
                [
                    context_of(torch.cat([ahead, rows]), run.first + 1)
                    for run, rows in zip(runs, own, strict=True)
                ]
            )
        return found


class _Run(NamedTuple):
    """Tokens that run once for all rows of the reference that ask for predictions in them.

    ``first`` is the position of the first token that predicts.
    """

    ids: tuple[int, ...]
    first: int
    rows: tuple[int, ...]

    @property
    def tail(self) -> int:
        """Columns from the first that predicts."""
        return len(self.ids) - self.first


class _Ahead(NamedTuple):
    """What all rows begin with, and what is unsteered about it."""

    ids: tuple[int, ...]
    cache: DynamicCache
    held: dict[int, Tensor]
    seen: dict[Site, Tensor]


class _Measured(NamedTuple):
    """One batch of a meter and what is unsteered about it.

    ``ids`` and ``held`` begin after the lead, ``mask`` and ``past`` with it. ``at`` and ``tokens``
    say which predictions rows ask for what; ``own`` is the answer.
    """

    runs: list[_Run]
    ids: Tensor
    mask: Tensor
    base: Tensor | None
    sure: list[float]
    best: Tensor
    at: Tensor
    tokens: Tensor
    own: list[float]
    held: dict[int, Any]
    past: list[tuple[Tensor, Tensor]]
    prefix: int
    contexts: dict[Site, Tensor]


class _Figures(NamedTuple):
    """Log-probabilities of what rows ask for; of each prediction its KL and whether it stayed."""

    own: list[float]
    kl: list[float]
    same: list[float]


def _hidden(output: Any) -> Tensor:
    """A block's stream, whether it hands on a tuple or not."""
    h: Tensor = output[0] if isinstance(output, tuple) else output
    return h


def _past(cache: DynamicCache | None, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the first columns, layer by layer."""
    if cache is None or columns < 1:
        return []
    layers: Any = cache.layers
    return [(part.keys[:, :, :columns], part.values[:, :, :columns]) for part in layers]


def instruct(conversation: Conversation, instruction: str) -> Conversation:
    """A conversation whose last user turn ends with an instruction: the prompt-only arm.

    >>> instruct("Write a poem.", "Be brief.")
    'Write a poem. Be brief.'
    """
    if isinstance(conversation, str):
        return f"{conversation} {instruction}"
    *before, last = conversation
    return (*before, {"role": last["role"], "content": f"{last['content']} {instruction}"})

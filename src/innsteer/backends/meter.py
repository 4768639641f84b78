"""Cost: what edits do to the model's predictions on a reference, token by token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    context_of,
    cut_of,
    cut_of_edits,
    edits_of,
    replay,
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
    token that stands there. What is unsteered is computed once; with ``sites``, so are the blocks
    below the lowest of them: a measurement then runs the blocks above only. That is exact, because
    without a cache they see nothing but the hidden states at that block.
    """

    def __init__(
        self,
        backend: Engine,
        reference: Reference,
        sites: Sequence[Site] = (),
        divergence: bool = True,
    ) -> None:
        self.backend, self.reference = backend, reference
        self._cut = cut_of(sites)
        self._divergence, self._sites = divergence, sites

    @cached_property
    def _batches(self) -> "list[_Measured]":
        """What is unsteered, batch by batch; computed when something is measured."""
        backend, reference, sites = self.backend, self.reference, self._sites
        found: list[_Measured] = []
        lengths = [len(ids) for ids in reference.ids]
        with torch.inference_mode():
            for index in backend._batches(lengths, silent, "meter"):
                rows = [reference.ids[i] for i in index]
                ids, mask = backend._pad(rows, side="left")
                cache = DynamicCache() if sites else None
                blocks, layout = backend.model.layout.blocks, backend.model.layout
                with ExitStack() as stack:
                    held = stack.enter_context(tap(blocks[self._cut])) if self._cut >= 0 else []
                    seen = stack.enter_context(watch(layout, sites))
                    base = self._predict(index, ids, mask, cache)
                prefix = ids.shape[1] - max(map(self._count, index)) - 1
                tokens = self._tokens(index, base)
                found.append(
                    _Measured(
                        index,
                        ids,
                        mask,
                        base if self._divergence else None,
                        tokens,
                        base.gather(-1, tokens).squeeze(-1),
                        held[0] if held else None,
                        _past(cache, prefix),
                        max(prefix, 0) if cache is not None else 0,
                        self._contexts(index, ids.shape[1], seen),
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
        found: dict[int, Completion] = {}
        # An edit below the cut changes what was kept, and one that reads there needs the block.
        held = cut_of_edits(edits) >= self._cut
        with tally(edits) as trace:
            for part in self._batches:
                lengths = [self.reference.lengths[i] for i in part.order]
                late = self._late(part, edits)
                start = part.prefix if late else 0
                attached = Attachment(
                    self.backend.model,
                    edits_of(edits, part.order),
                    prompt_lengths=lengths,
                    turns=[self.reference.turns[i] for i in part.order],
                    displacement=displacement,
                    trace=trace,
                    contexts=part.contexts if late else None,
                )
                replay = self._replay(part.held if held else None, start)
                # Attached first: what a request says is encoded by blocks that still run.
                with torch.inference_mode(), attached, replay:
                    steered = self._predict(
                        part.order, part.ids[:, start:], part.mask, part.cache_at(start)
                    )
                found |= self._completions(part, steered, kind, trace)
        return [found[i] for i in range(len(self.reference.ids))]

    def _late(self, part: "_Measured", edits: Sequence[Edit]) -> bool:
        """Whether the columns before the prefix's end stay unedited, in every layer.

        Where an edit reads the prompt, nothing of the prompt may be edited: what it reads was kept.
        """
        if any(edit.interventions.across_tokens for edit in edits):
            return False  # a map must see every token of its request go by
        told = [site for e in edits for site, one in e.interventions.items() if one.contextual]
        if told and (
            any(edit.where != Where() for edit in edits) or not set(told) <= part.contexts.keys()
        ):
            return False
        reference, width = self.reference, part.ids.shape[1]
        return all(
            width - len(reference.ids[i]) + start >= part.prefix
            for i in part.order
            for edit in edits
            for start, _ in edit.where.spans(prompt=reference.lengths[i], turns=reference.turns[i])
        )

    def unsteered(self, *, kind: Kind = "neutral") -> list[Completion]:
        """The same figures for the plain model: a divergence of 0, nothing run again."""
        return self.backend.memo.completions(
            self._key("unsteered", kind), lambda: self._plain(kind)
        )

    def _plain(self, kind: Kind) -> list[Completion]:
        found: dict[int, Completion] = {}
        for part in self._batches:
            found |= self._completions(part, part.base, kind, None)
        return [found[i] for i in range(len(self.reference.ids))]

    def prompted(self, instruction: str, *, kind: Kind = "neutral") -> list[Completion]:
        """The same figures for the plain model with an instruction added to every prompt."""
        key = self._key("prompted", instruction, kind)
        return self.backend.memo.completions(key, lambda: self._prompted(instruction, kind))

    def _prompted(self, instruction: str, kind: Kind) -> list[Completion]:
        def ask(part: _Measured) -> tuple[Tensor, Tensor]:
            rows = []
            for i in part.order:
                asked = instruct(self.reference.prompts[i].conversation, instruction)
                answer = self.reference.ids[i][self.reference.lengths[i] :]
                rows.append((*self.backend.model.encode(asked).ids, *answer))
            return self.backend._pad(rows, side="left")

        return self._whole(ask, kind)

    def adapted(
        self, adapter: "LoRA", strength: float, *, kind: Kind = "neutral"
    ) -> list[Completion]:
        """The same figures for the model under adapters: nothing of the plain one can be kept."""
        _ = self._batches  # of the plain model
        with self.backend.adapted(adapter, strength):
            return self.backend.memo.completions(
                self._key("adapted", kind),
                lambda: self._whole(lambda part: (part.ids, part.mask), kind),
            )

    def _whole(
        self, ask: "Callable[[_Measured], tuple[Tensor, Tensor]]", kind: Kind
    ) -> list[Completion]:
        """Figures of whole passes without edits; ``ask`` gives each batch's ids and mask."""
        found: dict[int, Completion] = {}
        for part in self._batches:
            with torch.inference_mode():
                predicted = self._predict(part.order, *ask(part))
            found |= self._completions(part, predicted, kind, None)
        return [found[i] for i in range(len(self.reference.ids))]

    def _completions(
        self, part: "_Measured", steered: Tensor | None, kind: Kind, trace: Trace | None
    ) -> dict[int, Completion]:
        """Completions of one batch from its steered log-probabilities; None: the plain model's."""
        kl = None
        if part.base is not None:
            other = part.base if steered is None else steered
            # Rounding can leave a KL of equal distributions a hair below 0.
            kl = (part.base.exp() * (part.base - other)).sum(-1).clamp_min(0).tolist()
            best = part.base.max(-1)
            sure = best.values.exp().tolist()
            same = (other.argmax(-1) == best.indices).float().tolist()
        own = part.own.tolist()
        if steered is not None:
            own = steered.gather(-1, part.tokens).squeeze(-1).tolist()
        base = part.own.tolist()
        found, place = {}, 0
        for row, i in enumerate(part.order):
            count = self._count(i)
            window = slice(place, place + count)
            place += count
            values = {"log_prob": tuple(own[window]), "base_log_prob": tuple(base[window])}
            # The last token of an answer predicts nothing that is measured.
            first = self.reference.lengths[i] - 1
            moved = [at for at in trace.steered[row] if at < first + count] if trace else []
            if kl is not None:
                # A row without an edit costs nothing, but for what is not finite in the plain
                # model already; kept columns may differ by rounding.
                scale = 1.0 if moved or not trace else 0.0
                values["kl"] = tuple(scale * nats for nats in kl[window])
                values["sure"], values["same"] = tuple(sure[window]), tuple(same[window])
            prompt = self.reference.prompts[i]
            found[i] = Completion(
                prompt.item,
                kind,
                as_text(prompt.conversation),
                prompt.answers[0] if prompt.answers else "",
                values=values,
                tokens=count,
                steered=sum(at >= first for at in moved),
            )
        return found

    def _count(self, i: int) -> int:
        """Predicted tokens of a row: its response, or the first token of a bare prompt's."""
        return max(len(self.reference.ids[i]) - self.reference.lengths[i], 1)

    def _predict(
        self, index: Sequence[int], ids: Tensor, mask: Tensor, cache: Any = None
    ) -> Tensor:
        """Log-probabilities ``[predicted tokens, vocabulary]`` of a batch, row after row."""
        reference = self.reference
        counts = [self._count(i) for i in index]
        logits = self.backend._logits(ids, mask, max(counts) + 1, cache)
        parts = []
        for row, (i, count) in enumerate(zip(index, counts, strict=True)):
            bare = len(reference.ids[i]) == reference.lengths[i]
            # The token before each response token predicts it; a bare prompt's last token is read.
            parts.append(logits[row, -count:] if bare else logits[row, -count - 1 : -1])
        return torch.cat(parts).float().log_softmax(-1)

    def _contexts(
        self, index: Sequence[int], width: int, seen: Mapping[Site, Tensor]
    ) -> dict[Site, Tensor]:
        """What stands before each row's response, ``[rows, d]`` per site."""
        reference = self.reference
        return {
            site: torch.stack(
                [
                    context_of(h[row, width - len(reference.ids[i]) :], reference.lengths[i])
                    for row, i in enumerate(index)
                ]
            )
            for site, h in seen.items()
        }

    def _tokens(self, index: Sequence[int], log_probs: Tensor) -> Tensor:
        """Response tokens ``[predicted tokens, 1]``; after a bare prompt, the base's best one."""
        reference, tokens, place = self.reference, [], 0
        for i in index:
            answer = list(reference.ids[i][reference.lengths[i] :])
            tokens += answer or [int(log_probs[place].argmax())]
            place += self._count(i)
        return torch.tensor(tokens, device=log_probs.device).unsqueeze(-1)

    @contextmanager
    def _replay(self, held: Any, start: int) -> Iterator[None]:
        """Blocks up to the cut hand over what was kept (from a column on), not computing it."""
        if held is None:
            yield
            return
        if start:
            whole = held
            held = (
                (whole[0][:, start:], *whole[1:]) if isinstance(whole, tuple) else whole[:, start:]
            )
        with replay(self.backend.model.layout.blocks[: self._cut + 1], held):
            yield


class _Measured(NamedTuple):
    """One batch of a meter and what is unsteered about it."""

    order: list[int]
    ids: Tensor
    mask: Tensor
    base: Tensor | None
    tokens: Tensor
    own: Tensor
    held: Any
    past: list[tuple[Tensor, Tensor]]
    prefix: int
    contexts: dict[Site, Tensor]

    def cache_at(self, start: int) -> DynamicCache | None:
        """A fresh cache of the columns before ``start``: every pass writes to its own."""
        if not start:
            return None
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.past):
            cache.update(keys, values, layer)
        return cache


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

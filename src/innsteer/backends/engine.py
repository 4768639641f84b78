"""What every part of the Hugging Face engine shares: batches, padding, one forward pass."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from innsteer.backends.base import Progress
from innsteer.backends.memo import Memo, of_edits
from innsteer.contrast import Conversation
from innsteer.hooks import Trace, require_selected
from innsteer.interventions import Edit
from innsteer.models import LanguageModel
from innsteer.models.layout import Block, Layout
from innsteer.site import Site, before

if TYPE_CHECKING:
    from innsteer.backends.lora import LoRA


class Engine:
    """A model and how it is run in batches."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch: int = 16,
        batch_tokens: int = 2048,
        memo: Memo | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.batch_tokens = batch_tokens
        self.memo = memo or Memo()
        self._adapters: list[Any] = []

    @contextmanager
    def adapted(self, adapter: "LoRA | None", strength: float) -> Iterator[None]:
        """Calls inside run the model under adapters, and are kept as such; None: as it is."""
        if adapter is None:
            yield
            return
        self._adapters = [adapter.identity, strength]
        try:
            with adapter.at(strength):
                yield
        finally:
            self._adapters = []

    def key(self, call: str, *given: Any, edits: Sequence[Edit] = ()) -> list[Any]:
        """All that a call's result depends on, for the memo; cheap without one."""
        if self.memo.folder is None:
            return []
        model = self.model
        how = [asdict(model.fingerprint), str(model.model.dtype), str(model.device)]
        ran = [*how, *self._adapters, self.batch, self.batch_tokens]
        return [call, *ran, *given, of_edits(edits)]

    def _logits(self, ids: Tensor, mask: Tensor, keep: int, cache: Any = None) -> Tensor:
        """Logits of the last ``keep`` positions (0 = all) of a padded batch."""
        out = self.model.model(
            ids,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, mask.shape[1] - ids.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        return cast(Tensor, out.logits)

    @property
    def _splits(self) -> bool:
        """Whether keys and values are all that the model keeps of a sequence."""
        return not getattr(self.model.model, "_is_stateful", False)

    def _shared(self, rows: Sequence[Sequence[int]], most: int) -> int:
        """How many first tokens all rows have in common, of ``most``: a template's, as a rule."""
        if not self._splits:
            return 0
        alike = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
        return sum(1 for _ in islice(alike, most))

    def _begun(self, ids: Sequence[int]) -> DynamicCache:
        """Keys and values of one sequence's first tokens."""
        cache = DynamicCache()
        if ids:
            row = torch.tensor([list(ids)], device=self.model.model.device)
            self.model.model.base_model(row, past_key_values=cache, use_cache=True)
        return cache

    def _after(
        self, lead: int, rows: Sequence[Sequence[int]], *, side: str = "left"
    ) -> tuple[Tensor, Tensor]:
        """What follows the first ``lead`` tokens, padded on one side; the mask of all columns."""
        ids, mask = self._pad([row[lead:] for row in rows], side=side)
        return ids, torch.cat([mask.new_ones(len(rows), lead), mask], 1)

    def _pad(self, rows: Sequence[Sequence[int]], *, side: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask ``[batch, time]``, padded on one side."""
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self._pad_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for n, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids[n, place] = torch.tensor(row)
            mask[n, place] = 1
        return ids.to(self.model.model.device), mask.to(self.model.model.device)

    def _batches(
        self, lengths: Sequence[int], progress: Progress, stage: str
    ) -> Iterator[list[int]]:
        """Indices in batches of near-equal length, within the token budget."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        batch: list[int] = []
        done = 0
        for i in order:
            if batch and (len(batch) + 1) * lengths[i] > self.batch_tokens:
                progress(stage, done, len(order))
                yield batch
                done, batch = done + len(batch), []
            batch.append(i)
        if batch:
            progress(stage, done, len(order))
            yield batch
        progress(stage, len(order), len(order))

    @property
    def _pad_id(self) -> int:
        tokenizer = self.model.tokenizer
        pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        return int(pad if pad is not None else 0)


def cache_of(layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A fresh cache of keys and values ``[batch, heads, columns, width]``, which are not copied."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def repeated(begun: DynamicCache, count: int) -> DynamicCache:
    """A fresh cache of ``count`` sequences that all go on from the same one."""
    layers: Any = begun.layers
    size = (count, -1, -1, -1)
    return cache_of((layer.keys.expand(size), layer.values.expand(size)) for layer in layers)


def require_rows(edits: Sequence[Edit], count: int) -> None:
    """Refuse edits whose rows are not those of so many sequences: the rest would go unsteered."""
    for edit in edits:
        edit.require(count)


def edits_of(edits: Sequence[Edit], index: Sequence[int]) -> list[Edit]:
    """The edits of some sequences, where each has its own row of coefficients."""
    return [edit.of(index) for edit in edits]


@contextmanager
def tally(edits: Sequence[Edit]) -> Iterator[Trace]:
    """One trace for all batches of a run: a batch may hold no token in scope, not all of them."""
    trace = Trace()
    yield trace
    if edits:
        require_selected(trace, edits)


@contextmanager
def watch(layout: Layout, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Every site's stream of the latest pass, before an edit that was attached later."""
    seen: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            module, port = layout.at(site)

            def keep(_: Any, args: Any, output: Any = None, site: Site = site) -> None:
                value = args[0] if output is None else output
                seen[site] = value[0] if isinstance(value, tuple) else value

            register: Any = (
                module.register_forward_pre_hook
                if port == "input"
                else module.register_forward_hook
            )
            stack.callback(register(keep).remove)
        yield seen


@contextmanager
def tap(block: Block) -> Iterator[list[Any]]:
    """What a block hands on, pass by pass."""
    held: list[Any] = []
    handle = block.module.register_forward_hook(lambda _, args, output: held.append(output))
    try:
        yield held
    finally:
        handle.remove()


def context_of(rows: Tensor, prompt: int) -> Tensor:
    """A prompt's context ``[d]``, from rows ``[time, d]`` that begin at position 0.

    NaN where the prompt is too short: only a map that reads it must complain.
    """
    start, stop = before(prompt)
    return rows[start:stop].float().mean(0)


@contextmanager
def replay(blocks: Sequence[Block], held: Any) -> Iterator[None]:
    """Blocks hand over what was kept instead of computing it; their hooks run as ever."""
    with ExitStack() as stack:
        for block in blocks:
            own = vars(block.module)
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            # An instance attribute shadows the class's forward; hooks still run around it.
            stack.callback(own.pop, "forward")
            own["forward"] = lambda *args, **kwargs: held
        yield


def cut_of(sites: Sequence[Site], *, across: bool = False) -> int:
    """The deepest block whose output no edit changes, or changes only after it was computed.

    -1: there is none. An edit inside a block (its attention, its MLP) changes its output, and one
    across sites reads its input, which a block that hands over what was kept does not get.
    """
    if not sites:
        return -1
    lowest = min(site.layer for site in sites)
    inner = any(site.layer == lowest and site.stream != "residual" for site in sites)
    return lowest - 1 if inner or across else lowest


def cut_of_edits(edits: Sequence[Edit]) -> int:
    """``cut_of`` for all sites of some edits."""
    return min(
        (cut_of(one.sites, across=one.across) for one in (e.interventions for e in edits)),
        default=-1,
    )


def positions_of(mask: Tensor) -> Tensor:
    """Absolute positions ``[batch, time]`` of a padded batch."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def as_text(conversation: Conversation) -> str:
    """A conversation as one string, for people.

    >>> as_text("Hello")
    'Hello'
    """
    if isinstance(conversation, str):
        return conversation
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation)

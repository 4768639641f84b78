"""Through: a model from one block on, over kept prefixes, differentiable: the Runner of a fit.

Steered tokens start at the last prompt token, so whatever stands before it never changes. It runs
once; keys and values of the blocks above the lowest site are kept, and every later pass computes
those blocks for the steered tokens alone: a single one for a choice answered in one token.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from innsteer import __version__
from innsteer.activations import Activations, Rows
from innsteer.backends.base import Progress, silent
from innsteer.backends.engine import Engine, context_of, cut_of, replay, tap, watch
from innsteer.backends.local import Local
from innsteer.backends.memo import digest
from innsteer.backends.meter import Reference
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, RefusedError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import Site
from innsteer.steerer import Answers, Interventions

TOKENS = 512
"""Steered tokens per pass: their logits over the vocabulary are what fills the memory."""


@dataclass(frozen=True)
class _Sequence:
    """Tokens of one pass: ``ids[start:]`` are steered, the last prompt token first."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Asked:
    """An item and where its answers are read: per side a sequence and the answer's tokens."""

    behaviour: int
    item: Item
    target: tuple[int, tuple[int, ...]]
    source: tuple[int, tuple[int, ...]]


class Through:
    """The model as a fit sees it: log-probabilities of answers, divergence, rows and gradients.

    Args:
        backend: who runs the model.
        contrasts: one per behaviour, in the order of ``coef``'s columns; items with both sides.
        sites: what may be steered. The blocks below the lowest run once per sequence, here.
        unmoved: what an edit shall not move: bare prompts (their first response token counts), or
            prompts with the unsteered model's continuations (every token of these counts). One of
            these that has a bare prompt's ``item`` is taken for the same in other words.
        reworded: bare unmoved prompts in other words, by the same ``item``. They show what wording
            does to a row; training does not hold them still.
        like: another run of the same model and sites: what it kept of sequences that are here too
            is not computed again.

    Raises:
        InputError: no site, no item with both sides, or behaviours of one name.
    """

    def __init__(
        self,
        backend: Engine,
        contrasts: Sequence[Contrast],
        sites: Sequence[Site],
        unmoved: Sequence[Reference] = (),
        *,
        reworded: Reference | None = None,
        like: "Through | None" = None,
        progress: Progress = silent,
    ) -> None:
        self.behaviours = tuple(contrast.behaviour for contrast in contrasts)
        if len(set(self.behaviours)) < max(len(self.behaviours), 1):
            raise InputError(
                f"the behaviours {', '.join(self.behaviours) or '(none)'}",
                expected="at least one, each of another name",
            )
        if not sites:
            raise InputError("no site to fit through the model", expected="at least one")
        self._contrasts = contrasts
        self.sites = tuple(sorted(set(sites)))
        self._backend, self._model, self._progress = backend, backend.model, progress
        self._cut = cut_of(sites)
        if self._cut < 0:
            raise InputError(
                f"a fit through the model inside block 0 ({self.sites[0]})",
                expected="a site from block 0's output on",
            )
        self._numbers: dict[tuple[int, ...], int] = {}
        self._sequences: list[_Sequence] = []
        self._asked = [
            self._ask(number, item)
            for number, contrast in enumerate(contrasts)
            for item in contrast.items
            if item.source is not None and item.target is not None
        ]
        if not self._asked:
            raise InputError("no item with both sides", expected="pairs, to tell apart")
        self.unmoved = tuple(
            self._number(ids if len(ids) == length else ids[:-1], length)
            for reference in unmoved
            for ids, length in zip(reference.ids, reference.lengths, strict=True)
        )
        # By what was given: a continuation that ended at once leaves one steered token as well.
        self._prompts_alone: dict[int, str] = {}
        self._continued: dict[int, str] = {}
        for reference in unmoved:
            for prompt, ids, length in zip(
                reference.prompts, reference.ids, reference.lengths, strict=True
            ):
                kind = self._prompts_alone if len(ids) == length else self._continued
                number = self._number(ids if len(ids) == length else ids[:-1], length)
                kind.setdefault(number, prompt.item)
        self._reworded = {
            self._number(ids, length): prompt.item
            for prompt, ids, length in (
                zip(reworded.prompts, reworded.ids, reworded.lengths, strict=True)
                if reworded
                else ()
            )
        }
        self._provenance = {
            "fingerprint": asdict(self._model.fingerprint),
            "contrast": contrasts[0].hash if len(contrasts) == 1 else None,
            "contrasts": {contrast.behaviour: contrast.hash for contrast in contrasts},
            "read": "last",
            "seeks": "target",
            "innsteer": __version__,
        }
        self._hidden: dict[int, Tensor] = {}
        self._past: dict[int, Tensor] = {}
        self._before: dict[int, dict[Site, Tensor]] = {}
        self._common: Tensor = torch.empty(0)
        self._tuple = False
        self._shared = self._shared_prefix()
        self._base: dict[int, Tensor] = {}
        self._rows: dict[tuple[float, bool], Activations] = {}
        if like is not None:
            self._take(like)
        self._keep_prefixes(progress)

    # --- what a fit asks -------------------------------------------------------------------------

    def items(self, split: str = "train", behaviour: str | None = None) -> list[int]:
        """Numbers of the items of a part, in the contrasts' order."""
        return [
            number
            for number, asked in enumerate(self._asked)
            if asked.item.split == split
            and (behaviour is None or self.behaviours[asked.behaviour] == behaviour)
        ]

    def among(self, unmoved: Sequence[int]) -> "Through":
        """The same run with only some of its unmoved sequences, by place; nothing is copied."""
        other = copy.copy(self)
        other.unmoved = tuple(self.unmoved[place] for place in unmoved)
        other._rows = {}
        return other

    def item(self, number: int) -> Item:
        """An item by its number."""
        return self._asked[number].item

    def tokens(self, place: int) -> int:
        """Counted tokens of an unmoved sequence, by place."""
        return self._length(self.unmoved[place])

    def keys(self, items: Sequence[int]) -> list[str]:
        """The bare matching answer of each item; "" for open ones."""
        return [self._asked[number].item.key or "" for number in items]

    def answers(
        self,
        interventions: Interventions | None,
        items: Sequence[int],
        coef: Sequence[float] | Tensor,
        *,
        only: Sequence[int] | None = None,
    ) -> Answers:
        """Log-probabilities of both answers of some items, differentiable where gradients are on.

        Args:
            interventions: None = the plain model.
            items: numbers from ``items()``; one may stand several times.
            coef: the strength of each in the column of its behaviour, or whole rows ``[items, k]``.
            only: of each the side that is wanted, 0 target or 1 source; the other may stay 0, where
                it would take tokens of its own.
        """
        asks = list(zip(items, self._coef_rows(items, coef), strict=True))
        wanted = [(side,) for side in only] if only is not None else [(0, 1)] * len(asks)
        jobs = list(
            {
                self._job(*ask, side): None
                for ask, sides in zip(asks, wanted, strict=True)
                for side in sides
            }
        )
        found = [torch.zeros(len(asks), device=self._model.device) for _ in range(2)]
        for part in self._parts([job[0] for job in jobs]):
            chosen = [jobs[place] for place in part]
            rows = torch.tensor([row for _, row in chosen])
            logits = self._run([sequence for sequence, _ in chosen], interventions, rows)
            row_of = {job: n for n, job in enumerate(chosen)}
            for side in (0, 1):
                reads = [
                    (row_of[self._job(*ask, side)], *self._sides(ask[0])[side], slot)
                    for slot, ask in enumerate(asks)
                    if self._job(*ask, side) in row_of
                ]
                found[side] = found[side] + self._read(logits, reads, len(asks))
        return Answers(*found)

    def _coef_rows(
        self, items: Sequence[int], coef: Sequence[float] | Tensor
    ) -> list[tuple[float, ...]]:
        """One row of coefficients per item."""
        if isinstance(coef, Tensor):
            return [tuple(row) for row in coef.tolist()]
        columns = [self._asked[number].behaviour for number in items]
        k = len(self.behaviours)
        return [
            tuple(strength if n == column else 0.0 for n in range(k))
            for column, strength in zip(columns, coef, strict=True)
        ]

    def divergence(
        self, interventions: Interventions, unmoved: Sequence[int], coef: Tensor
    ) -> Tensor:
        """KL(base || steered) in nats of every counted token of some unmoved sequences, in order.

        Args:
            unmoved: places in ``self.unmoved``. coef: ``[k]``, or one row per sequence.
        """
        found: dict[int, Tensor] = {}
        every = coef.expand(len(unmoved), -1) if coef.ndim == 1 else coef
        numbers = [self.unmoved[place] for place in unmoved]
        self._keep_unsteered(numbers)
        for part in self._parts(numbers):
            chosen = [numbers[place] for place in part]
            steered = self._run(chosen, interventions, every[part]).float().log_softmax(-1)
            base = nn.utils.rnn.pad_sequence([self._base[number] for number in chosen], True)
            nats = (base.exp() * (base - steered)).sum(-1)
            for row, (place, number) in enumerate(zip(part, chosen, strict=True)):
                found[place] = nats[row, : self._length(number)]
        return torch.cat([found[place] for place in range(len(unmoved))])

    def rows(
        self, interventions: Interventions | None = None, *, step: float = 0.3, said: bool = False
    ) -> Activations:
        """Target-seeking rows: each item's row, moved both ways along its answers' gradient.

        h+- = h +- step * spread * grad / |grad|, with grad that of log P(target) - log P(source) by
        a shift of all its steered tokens, h the mean of these (the last prompt token's row for a
        choice answered in one token), and spread = root mean |h - mean h|^2 over the training
        items. The last tokens of bare unmoved prompts stand beside them as ``unmoved`` rows, and
        those of the same in other words as ``restated``. Tokens of a continuation do not: they
        stand elsewhere, and a gate between here and there would see the difference in place alone.

        Args:
            interventions: edits that are active meanwhile; a row is read before its own site's.
            step: length of the move, unitless. said: follow log P(target) against everything.
        """
        if interventions is None and (step, said) in self._rows:
            return self._rows[step, said]
        parts = [self._kept(part, interventions, said) for part in self._item_parts()]
        train = torch.tensor(self.items("train") or range(len(self._asked)))
        still = self._still_rows(interventions)
        joined, context = {}, {}
        asked = [self._own(number)[0] for number in range(len(self._asked))]
        for site in self.sites:
            numbers = [*asked, *asked, *self._bare(), *self._restated()]
            context[site] = torch.stack([self._before[n][site] for n in numbers]).cpu()
            h, grad = (torch.cat([p[f"{name} {site}"] for p in parts]) for name in ("row", "grad"))
            own = h[train]
            spread = (own - own.mean(0)).norm(dim=-1).square().mean().sqrt()
            move = step * spread * grad / grad.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            joined[site] = torch.cat([h - move, h + move, *still[site]])
        table = Rows.of(self._table())
        # A prompt too short to have a context: none is given, and what needs one says so.
        whole = all(torch.isfinite(rows).all() for rows in context.values())
        before = context if whole else {}
        found = Activations(joined, table, self.behaviours, "last", self._provenance, before)
        if interventions is None:
            self._rows[step, said] = found
        return found

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
        """``Local.inputs`` of the same contrasts and sites."""
        return self._local.inputs(
            interventions, coef=coef, side=side, most=most, seed=seed, steered=steered
        )

    def jacobian(self, block: int, *, prompts: int = 50, rank: int = 0, seed: int = 0) -> Tensor:
        """``Local.jacobian`` of the same contrasts and sites."""
        return self._local.jacobian(block, prompts=prompts, rank=rank, seed=seed)

    @cached_property
    def _local(self) -> Local:
        parts = [one.train for one in self._contrasts]
        return Local(self._backend, parts, self.sites, progress=self._progress)

    # --- rows and gradients ----------------------------------------------------------------------

    def _sides(self, item: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Target and source of an item: sequence and tokens of each."""
        return self._asked[item].target, self._asked[item].source

    def _job(self, item: int, row: tuple[float, ...], side: int) -> tuple[int, tuple[float, ...]]:
        """What has to run for an answer: a sequence under a row of coefficients."""
        return self._sides(item)[side][0], row

    def _read(
        self, logits: Tensor, reads: Sequence[tuple[int, int, tuple[int, ...], int]], slots: int
    ) -> Tensor:
        """Log-probabilities ``[slots]`` of answers, each read = (row, sequence, tokens, slot).

        One gather for all: a slice per answer would make backward write the logits over per slice.
        """
        if not reads:
            return logits.new_zeros(slots, dtype=torch.float32)
        at = [
            (row, self._length(sequence) - len(tokens) + n, token, slot)
            for row, sequence, tokens, slot in reads
            for n, token in enumerate(tokens)
        ]
        row, time, token, slot = torch.tensor(at, device=logits.device).unbind(1)
        rows = logits.float()
        picked = rows[row, time, token] - rows.logsumexp(-1)[row, time]
        total: Tensor = picked.new_zeros(slots).index_add(0, slot, picked)
        return total

    def _own(self, item: int) -> list[int]:
        """The sequences of an item: one where both answers hang on the same tokens, else two."""
        return sorted({self._asked[item].target[0], self._asked[item].source[0]})

    def _item_parts(self) -> Iterator[list[int]]:
        """Items in passes, in their order."""
        part: list[int] = []
        used = 0
        for number in range(len(self._asked)):
            size = sum(map(self._length, self._own(number)))
            if part and used + size > TOKENS:
                yield part
                part, used = [], 0
            part.append(number)
            used += size
        yield part

    def _kept(
        self, part: Sequence[int], interventions: Interventions | None, said: bool
    ) -> dict[str, Tensor]:
        """``_gradients`` of some items, computed once for all runs that were interrupted."""
        sequences = [vars(self._sequences[number]) for i in part for number in self._own(i)]
        read = [self._sides(i) for i in part], said, list(map(str, self.sites))
        whole = self._provenance["contrasts"], digest(interventions)
        key = self._backend.key("gradients", sequences, *read, *whole)
        return self._backend.memo.tensors(key, lambda: self._gradients(part, interventions, said))

    def _gradients(
        self, part: Sequence[int], interventions: Interventions | None, said: bool
    ) -> dict[str, Tensor]:
        """Rows and gradients ``[items, d]`` of some items at every site, by ``row|grad site``."""
        # A row for each item, or items that ask the same would have the sum of their gradients.
        place = {pair: row for row, pair in enumerate((i, s) for i in part for s in self._own(i))}
        numbers = [number for _, number in place]
        with torch.enable_grad(), watch(self._model.layout, self.sites) as seen:
            coef = torch.ones(len(numbers), len(self.behaviours))
            logits = self._run(numbers, interventions, coef, leaf=True)
            reads = [
                [(place[i, self._sides(i)[side][0]], *self._sides(i)[side], 0) for i in part]
                for side in (0, 1)
            ]
            total = self._read(logits, reads[0], 1).sum()
            if not said:
                total = total - self._read(logits, reads[1], 1).sum()
            grads = torch.autograd.grad(total, [seen[site] for site in self.sites])
        found = {}
        for site, grad in zip(self.sites, grads, strict=True):
            rows, lifts = [], []
            for i in part:
                places = [(place[i, s], slice(self._length(s))) for s in self._own(i)]
                rows.append(torch.cat([seen[site][at].detach().float() for at in places]).mean(0))
                lifts.append(torch.cat([grad[at].float() for at in places]).sum(0))
            found[f"row {site}"] = torch.stack(rows).cpu()
            found[f"grad {site}"] = torch.stack(lifts).cpu()
        return found

    def _still_rows(self, interventions: Interventions | None) -> dict[Site, list[Tensor]]:
        """Rows of the unmoved prompts at every site, then of the restated: their last token."""
        numbers = [*self._bare(), *self._restated()]
        found: dict[Site, dict[int, Tensor]] = {site: {} for site in self.sites}
        for part in self._parts(numbers):
            coef = torch.ones(len(part), len(self.behaviours))
            with torch.no_grad(), watch(self._model.layout, self.sites) as seen:
                self._run([numbers[place] for place in part], interventions, coef)
            for site, h in seen.items():
                found[site] |= {place: h[n, :1].float().cpu() for n, place in enumerate(part)}
        return {site: [rows[n] for n in range(len(numbers))] for site, rows in found.items()}

    def _bare(self) -> list[int]:
        """The unmoved sequences without a continuation."""
        return [number for number in self.unmoved if number in self._prompts_alone]

    def _restated(self) -> list[int]:
        """The sequences that say in other words what an unmoved bare prompt says."""
        known = {self._prompts_alone[number] for number in self._bare()}
        found = [number for number in self.unmoved if self._continued.get(number) in known]
        return found + [number for number, item in self._reworded.items() if item in known]

    def _table(self) -> list[dict[str, Any]]:
        """The table of ``rows()``: sources, targets, then unmoved rows of every behaviour's."""
        records = [
            {
                "behaviour": self.behaviours[asked.behaviour],
                "item": asked.item.id,
                "side": side,
                "key": asked.item.key or "",
                "pair": asked.item.id,
                "token": self._sequences[asked.target[0]].start,
                "split": asked.item.split,
                "weight": asked.item.weight,
            }
            for side in ("source", "target")
            for asked in self._asked
        ]
        for side, numbers, names in (
            ("unmoved", self._bare(), self._prompts_alone),
            ("restated", self._restated(), self._continued | self._reworded),
        ):
            records += [
                {
                    "behaviour": "",
                    "item": names[number],
                    "side": side,
                    "pair": names[number],
                    "token": self._sequences[number].start,
                }
                for number in numbers
            ]
        return records

    # --- sequences -------------------------------------------------------------------------------

    def _ask(self, behaviour: int, item: Item) -> _Asked:
        """The item's answers as sequences: ids without their last token, which predicts nothing."""
        sides = []
        for answer in (item.target, item.source):
            encoded = self._model.encode(item.prompt, answer=answer)
            tokens = encoded.ids[encoded.prompt :]
            if not tokens:
                raise InputError(f"item {item.id!r} has an empty answer", expected="some text")
            sides.append((self._number(encoded.ids[:-1], encoded.prompt), tokens))
        return _Asked(behaviour, item, sides[0], sides[1])

    def _number(self, ids: Sequence[int], prompt: int) -> int:
        """The number of a sequence; equal ones are one."""
        key = (prompt, *ids)
        if key not in self._numbers:
            self._numbers[key] = len(self._sequences)
            self._sequences.append(_Sequence(tuple(ids), prompt - 1))
        return self._numbers[key]

    def _length(self, number: int) -> int:
        """Steered tokens of a sequence."""
        return len(self._sequences[number].ids) - self._sequences[number].start

    def _parts(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Places in ``numbers``, in passes of sequences of near-equal length."""
        order = sorted(range(len(numbers)), key=lambda place: self._length(numbers[place]))
        part: list[int] = []
        for place in order:
            if part and (len(part) + 1) * self._length(numbers[place]) > TOKENS:
                yield part
                part = []
            part.append(place)
        if part:
            yield part

    # --- prefixes --------------------------------------------------------------------------------

    def _shared_prefix(self) -> int:
        """How many first tokens all sequences share, up to the first steered one."""
        first = self._sequences[0].ids
        shared = min(sequence.start for sequence in self._sequences)
        for sequence in self._sequences:
            same = 0
            while same < shared and sequence.ids[same] == first[same]:
                same += 1
            shared = same
        return shared

    def _take(self, other: "Through") -> None:
        """What another run kept of the same sequences after the same shared prefix."""
        shared = self._sequences[0].ids[: self._shared]
        same = other._model is self._model and other.sites == self.sites
        if not same or other._sequences[0].ids[: other._shared] != shared:
            return
        self._tuple = other._tuple
        for number, sequence in enumerate(self._sequences):
            known = other._numbers.get((sequence.start + 1, *sequence.ids))
            if known is not None:
                self._hidden[number], self._past[number] = other._hidden[known], other._past[known]
                self._before[number] = other._before[known]

    def _prefix_parts(self, progress: Progress) -> Iterator[list[int]]:
        """Sequences of which nothing is kept yet, in passes over what follows the shared prefix."""
        left = [n for n in range(len(self._sequences)) if n not in self._hidden]
        lengths = [len(self._sequences[n].ids) - self._shared for n in left]
        for part in self._backend._batches(lengths, progress, "prefixes"):
            yield [left[n] for n in part]

    def _keep_prefixes(self, progress: Progress) -> None:
        """One pass over everything: hidden states of the steered tokens, and what precedes them."""
        common: DynamicCache | None = None
        shared: dict[Site, Tensor] = {}
        with torch.no_grad():
            if self._shared:
                ids = torch.tensor([self._sequences[0].ids[: self._shared]])
                common = DynamicCache()
                with watch(self._model.layout, self.sites) as shared:
                    self._base_model(ids.to(self._model.device), torch.ones_like(ids), common)
                self._common = self._upper(common)
            for index in self._prefix_parts(progress):
                rows = [self._sequences[i].ids[self._shared :] for i in index]
                ids, mask = self._backend._pad(rows, side="right")
                mask = torch.cat([mask.new_ones(len(index), self._shared), mask], 1)
                cache = DynamicCache()
                if common is not None:
                    layers: Any = common.layers
                    for number, layer in enumerate(layers):
                        size = (len(index), -1, -1, -1)
                        cache.update(layer.keys.expand(size), layer.values.expand(size), number)
                cut = self._model.layout.blocks[self._cut]
                with tap(cut) as held, watch(self._model.layout, self.sites) as seen:
                    self._base_model(ids, mask, cache)
                upper = self._upper(cache)
                hidden = held[0][0] if isinstance(held[0], tuple) else held[0]
                self._tuple = isinstance(held[0], tuple)
                for row, i in enumerate(index):
                    start, end = self._sequences[i].start, len(self._sequences[i].ids)
                    own = slice(start - self._shared, end - self._shared)
                    self._hidden[i] = hidden[row, own].clone()
                    self._past[i] = upper[:, :, row, :, self._shared : start].clone()
                    self._before[i] = {
                        site: context_of(
                            torch.cat([*(shared[site] if shared else ()), h[row]]), start + 1
                        )
                        for site, h in seen.items()
                    }

    def _base_model(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> None:
        start = mask.shape[1] - ids.shape[1]
        self._model.model.base_model(
            ids,
            attention_mask=mask.to(ids.device),
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, start:].to(ids.device),
            past_key_values=cache,
            use_cache=True,
        )

    def _upper(self, cache: DynamicCache) -> Tensor:
        """Keys and values above the cut, ``[2, blocks, batch, heads, columns, width]``."""
        every: Any = cache.layers
        layers = every[self._cut + 1 :]
        if not layers:
            first: Tensor = every[0].keys
            return first.new_zeros(2, 0, *first.shape)
        keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        return torch.stack([torch.stack(keys), torch.stack(values)])

    # --- one pass --------------------------------------------------------------------------------

    def _run(
        self,
        numbers: Sequence[int],
        interventions: Interventions | None,
        coef: Tensor,
        *,
        leaf: bool = False,
    ) -> Tensor:
        """Logits ``[batch, steered tokens, vocabulary]`` of sequences; short ones are filled up.

        Args:
            coef: ``[batch, k]``. leaf: the hidden states at the cut shall get gradients.

        Raises:
            RefusedError: a map across sites reads the input of a block that does not run again.
        """
        if interventions is not None:
            self._check_input(interventions)
        starts = [self._sequences[number].start for number in numbers]
        own = [start - self._shared for start in starts]
        times = [self._length(number) for number in numbers]
        before, after, batch = max(own), max(times), len(numbers)
        first = self._hidden[numbers[0]]
        hidden = first.new_zeros(batch, after, first.shape[-1])
        past = self._past[numbers[0]]
        kept = past.new_zeros(2, past.shape[1], batch, past.shape[2], before, past.shape[4])
        mask = torch.zeros(batch, self._shared + before + after, dtype=torch.long)
        mask[:, : self._shared] = 1
        ids = torch.zeros(batch, after, dtype=torch.long)
        for row, number in enumerate(numbers):
            hidden[row, : times[row]] = self._hidden[number]
            kept[:, :, row, :, before - own[row] :] = self._past[number]
            mask[row, self._shared + before - own[row] : self._shared + before + times[row]] = 1
            ids[row, : times[row]] = torch.tensor(self._sequences[number].ids[starts[row] :])
        device = self._model.device
        positions = torch.tensor(starts).unsqueeze(-1) + torch.arange(after)
        if leaf:
            hidden.requires_grad_()
        attached = (
            Attachment(
                self._model,
                [Edit(interventions, coef)],
                prompt_lengths=[start + 1 for start in starts],
                contexts={
                    site: torch.stack([self._before[number][site] for number in numbers])
                    for site in self.sites
                },
            )
            if interventions is not None and bool((coef != 0).any())
            else nullcontext()
        )
        blocks = self._model.layout.blocks[: self._cut + 1]
        with replay(blocks, (hidden,) if self._tuple else hidden), attached, self._frozen():
            out = self._model.model(
                ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=self._cache(kept, batch, before),
                use_cache=True,
            )
        logits: Tensor = out.logits
        return logits

    def _check_input(self, interventions: Interventions) -> None:
        """Whether every block runs whose input a map reads, and every token that it must see."""
        if interventions.across_tokens:
            raise RefusedError(
                "a map across tokens over kept prefixes, which it has not seen",
                expected="maps of rows alone",
                remedy="fit it on concepts, over whole requests: innsteer fit TABLE --method flas",
            )
        first = next(iter(interventions)).layer
        if interventions.across and cut_of(interventions.sites, across=True) < self._cut:
            raise RefusedError(
                f"a map that reads the input of block {first}, in a run that keeps what the blocks "
                f"up to {self._cut} make and does not run them again",
                expected=f"a run whose lowest site lies below layer {first}",
                remedy="name the layer below among the run's sites"
                if first
                else "leave block 0 alone, or measure it by HF.meter",
            )

    def _cache(self, kept: Tensor, batch: int, before: int) -> DynamicCache:
        """A cache whose upper blocks hold the prefixes; the lower ones, which never look, zeros."""
        cache = DynamicCache()
        if not self._shared + before:
            return cache
        blank = torch.zeros(batch, 1, self._shared + before, 1, dtype=kept.dtype)
        for layer in range(self._cut + 1):
            cache.update(blank, blank, layer)
        for place in range(kept.shape[1]):
            pair = [kept[0, place], kept[1, place]]
            if self._shared:
                whole = self._common[:, place].expand(-1, batch, -1, -1, -1)
                pair = [torch.cat([whole[side], pair[side]], -2) for side in (0, 1)]
            cache.update(pair[0], pair[1], self._cut + 1 + place)
        return cache

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No gradient for the model's weights; each gets its own mode back."""
        parameters = [p for p in self._model.model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _keep_unsteered(self, numbers: Sequence[int]) -> None:
        """Log-probabilities ``[tokens, vocabulary]`` of the plain model, kept after first use."""
        missing = sorted(set(numbers) - self._base.keys())
        for part in self._parts(missing):
            chosen = [missing[place] for place in part]
            with torch.no_grad():
                logits = self._run(chosen, None, torch.zeros(len(chosen), len(self.behaviours)))
                base = logits.float().log_softmax(-1)
            for row, number in enumerate(chosen):
                self._base[number] = base[row, : self._length(number)].clone()

"""The Hugging Face engine: generate, score, record and compare, on one machine."""

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from innsteer import __version__
from innsteer.activations import Activations, Read, Rows, ShardWriter
from innsteer.backends.base import Completion, Progress, Prompt, Sampling, silent
from innsteer.backends.engine import (
    Engine,
    as_text,
    edits_of,
    positions_of,
    repeated,
    require_rows,
    tally,
    watch,
)
from innsteer.backends.local import Local
from innsteer.backends.memo import Memo as Memo
from innsteer.backends.meter import Meter as Meter
from innsteer.backends.meter import Reference as Reference
from innsteer.backends.meter import instruct as instruct
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError
from innsteer.files import canonical
from innsteer.hooks import Attachment, Trace
from innsteer.interventions import Edit
from innsteer.models import Encoded, LanguageModel
from innsteer.site import Site, Span, Where

WINDOW = 4096
"""Texts that are encoded at once, and whose lengths make up the batches of a recording."""
_Job = tuple[Item, str, Encoded]


class Scored(NamedTuple):
    """What a model gives a sequence's tokens after its prompt.

    Attributes:
        log_probs: of each of them, natural logarithm. greedy: whether each was the most probable.
        steered: how many tokens of the whole sequence were edited.
    """

    log_probs: tuple[float, ...]
    greedy: bool
    steered: int


class _Stop(BaseException):
    """Ends a forward pass at the deepest block asked for; never leaves this module."""


class HF(Engine):
    """Runs a LanguageModel through transformers.

    Args:
        model: from ``load_model``.
        batch: sequences per batch in generation.
        batch_tokens: padded tokens per batch elsewhere.
        memo: where results of calls are kept, so that an interrupted run goes on.
    """

    name = "hf"
    runner: ClassVar[type[Through]] = Through
    """Who carries a fit through the model."""
    chain: ClassVar[type[Local]] = Local
    """Who carries a fit on Jacobians."""

    @cached_property
    def _references(self) -> dict[tuple[object, ...], Reference]:
        """The model's own continuations, kept for the next steering."""
        return {}

    @classmethod
    def of(cls, model: "LanguageModel | HF") -> "HF":
        """A backend of a model; one that is given stays."""
        return model if isinstance(model, HF) else cls(model)

    # --- generate --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        edits: Sequence[Edit] = (),
        sampling: Sampling = Sampling(),  # noqa: B008
        *,
        progress: Progress = silent,
    ) -> list[Completion]:
        """Answers to prompts; rows of ``coef`` belong to prompts in the order given."""
        key = self.key("generate", list(map(vars, prompts)), vars(sampling), edits=edits)
        return self.memo.completions(
            key, lambda: self._generate(prompts, edits, sampling, progress)
        )

    def _generate(
        self,
        prompts: Sequence[Prompt],
        edits: Sequence[Edit],
        sampling: Sampling,
        progress: Progress,
    ) -> list[Completion]:
        require_rows(edits, len(prompts))
        encoded = [self.model.encode(prompt.conversation) for prompt in prompts]
        done: dict[int, Completion] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i].ids))
        with tally(edits) as trace:
            for start in range(0, len(order), self.batch):
                index = order[start : start + self.batch]
                progress("generate", start, len(order))
                rows = [encoded[i] for i in index]
                with self._steered(edits, index, rows, trace):
                    answers = self._decode([row.ids for row in rows], sampling, index[0])
                touched = trace.steered if edits else [[] for _ in index]
                for i, row, new, steered in zip(index, rows, answers, touched, strict=True):
                    # A row that ended early is padded, and the padding steered, with its batch.
                    end = row.prompt + len(new) - 1
                    done[i] = Completion(
                        item=prompts[i].item,
                        kind="sample",
                        prompt=as_text(prompts[i].conversation),
                        text=self.model.decode(new).strip(),
                        seed=sampling.seed,
                        tokens=len(new),
                        steered=sum(position < end for position in steered),
                    )
        progress("generate", len(order), len(order))
        return [done[i] for i in range(len(prompts))]

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int
    ) -> list[list[int]]:
        """New tokens of each prompt, up to the end of the turn, without penalty or ban.

        One seed per batch and not per call: a batch's draws do not depend on earlier ones.
        """
        ids, mask = self._pad(prompts, side="left")
        # Written out, because what is left open comes from the model's own generation config.
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if sampling.temperature > 0:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0}
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(sampling.seed * 1_000_003 + number)
            out = self.model.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=sampling.new_tokens,
                num_beams=1,
                num_return_sequences=1,
                top_k=0 if sampling.temperature > 0 else None,
                min_p=None,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                eos_token_id=sorted(self.model.stop_ids) or None,
                pad_token_id=self._pad_id,
                **how,
            )
        answers = out[:, ids.shape[1] :].tolist()
        stops = self.model.stop_ids
        ends = [next((n for n, t in enumerate(new, 1) if t in stops), None) for new in answers]
        return [new[:end] for new, end in zip(answers, ends, strict=True)]

    # --- score -----------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        edits: Sequence[Edit] = (),
        *,
        progress: Progress = silent,
    ) -> list[tuple[tuple[float, ...], ...]]:
        """Log-probabilities of every answer's tokens, per prompt and answer."""
        key = self.key("score", list(map(vars, prompts)), edits=edits)
        found = self.memo.value(key, lambda: self._score(prompts, edits, progress))
        return [tuple(tuple(values) for values in answers) for answers in found]

    def _score(
        self, prompts: Sequence[Prompt], edits: Sequence[Edit], progress: Progress
    ) -> list[list[tuple[float, ...]]]:
        require_rows(edits, len(prompts))
        jobs = [
            (i, self.model.encode(prompt.conversation, answer=answer))
            for i, prompt in enumerate(prompts)
            for answer in prompt.answers
        ]
        rows = [encoded for _, encoded in jobs]
        owners = [i for i, _ in jobs]
        answers: list[list[tuple[float, ...]]] = [[] for _ in prompts]
        scored = self.score_encoded(rows, edits, owners=owners, progress=progress)
        for i, found in zip(owners, scored, strict=True):
            answers[i].append(found.log_probs)
        return answers

    def score_encoded(
        self,
        rows: Sequence[Encoded],
        edits: Sequence[Edit] = (),
        *,
        owners: Sequence[int] | None = None,
        progress: Progress = silent,
    ) -> list[Scored]:
        """What the model gives the tokens after each row's prompt.

        Args:
            owners: of each row the row of ``coef`` that is its own; default: one each, in order.

        Raises:
            NothingSteeredError: no token of all these rows was in an edit's scope.
        """
        if owners is None:
            require_rows(edits, len(rows))
        own = range(len(rows)) if owners is None else owners
        found: dict[int, Scored] = {}
        with tally(edits) as trace:
            for index in self._batches([len(row.ids) for row in rows], progress, "score"):
                part = [rows[j] for j in index]
                # What follows the last token is asked of nobody, so that it need not be run.
                run = [row.ids[: max(row.prompt, len(row.ids) - 1)] for row in part]
                ids, mask = self._pad(run, side="left")
                answers, _ = self._pad([row.ids[row.prompt :] for row in part], side="left")
                longest = answers.shape[1]
                steered = self._steered(edits, [own[j] for j in index], part, trace)
                with torch.inference_mode(), steered:
                    log_probs = self._logits(ids, mask, max(longest, 1)).float().log_softmax(-1)
                    picked = log_probs.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
                    best = log_probs.argmax(-1) == answers
                touched = trace.steered if edits else [[] for _ in index]
                for row, j in enumerate(index):
                    first = longest - (len(part[row].ids) - part[row].prompt)
                    values = tuple(picked[row, first:].tolist())
                    found[j] = Scored(values, bool(best[row, first:].all()), len(touched[row]))
        return [found[j] for j in range(len(rows))]

    def score_text(self, texts: Sequence[str], edits: Sequence[Edit] = ()) -> list[float]:
        """Total log-probability of plain texts, without any template; every token steered.

        Edits that read a prompt take a text's first quarter for it, and steer the rest.

        Raises:
            InputError: a text too short for that.
        """
        key = self.key("score_text", list(texts), edits=edits)
        found: list[float] = self.memo.value(key, lambda: self._score_text(texts, edits))
        return found

    def _score_text(self, texts: Sequence[str], edits: Sequence[Edit]) -> list[float]:
        require_rows(edits, len(texts))
        tokenizer = self.model.tokenizer
        rows = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        edits = [
            replace(edit, where=Where() if edit.interventions.contextual else Where("all"))
            for edit in edits
        ]
        short = min(map(len, rows), default=4)
        if short < 4 and any(edit.interventions.contextual for edit in edits):
            raise InputError(
                f"a text of {short} tokens under a steering that reads the prompt",
                expected="at least 4: its first quarter stands for a prompt",
            )
        found = [0.0] * len(rows)
        scored = [i for i, row in enumerate(rows) if len(row) > 1]
        for part in self._batches([len(rows[i]) for i in scored], silent, "score"):
            index = [scored[j] for j in part]
            ids, mask = self._pad([rows[i] for i in index], side="right")
            attached = (
                Attachment(
                    self.model,
                    edits_of(edits, index),
                    prompt_lengths=[max(len(rows[i]) // 4, 3) for i in index],
                )
                if edits
                else nullcontext()
            )
            with torch.inference_mode(), attached:
                log_probs = self._logits(ids, mask, 0)[:, :-1].float().log_softmax(-1)
            picked = log_probs.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
            totals = (picked * mask[:, 1:]).sum(-1).tolist()
            for row, total in zip(index, totals, strict=True):
                found[row] = total
        return found

    # --- cost ------------------------------------------------------------------------------------

    def reference(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None,
        *,
        progress: Progress = silent,
    ) -> Reference:
        """The unsteered model's own continuations, made once; ``sampling=None``: bare prompts."""
        encoded = [self.model.encode(prompt.conversation) for prompt in prompts]
        lengths = tuple(len(row.ids) for row in encoded)
        turns = tuple(row.turns for row in encoded)
        if sampling is None:
            return Reference(tuple(prompts), tuple(row.ids for row in encoded), lengths, turns)
        ids = [row.ids for row in encoded]
        asked = (tuple(ids), tuple(prompt.item for prompt in prompts), sampling)
        if asked in self._references:
            return self._references[asked]
        drawn = replace(sampling, temperature=sampling.temperature or 1.0)
        key = self.key("reference", ids, vars(drawn))
        new = self.memo.value(key, lambda: self._continued(ids, drawn, progress))
        whole = tuple((*before, *after) for before, after in zip(ids, new, strict=True))
        self._references[asked] = Reference(tuple(prompts), whole, lengths, turns)
        return self._references[asked]

    def _continued(
        self, ids: Sequence[Sequence[int]], sampling: Sampling, progress: Progress
    ) -> list[list[int]]:
        """The unsteered model's continuation of each prompt."""
        new: list[list[int]] = [[] for _ in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            progress("reference", start, len(order))
            made = self._decode([ids[i] for i in index], sampling, index[0])
            for i, tokens in zip(index, made, strict=True):
                new[i] = tokens
        progress("reference", len(order), len(order))
        return new

    def forced(self, prompts: Sequence[Prompt]) -> Reference:
        """Given answers as a reference: one row per prompt and answer, in order."""
        rows = [
            (
                replace(prompt, answers=(answer,)),
                self.model.encode(prompt.conversation, answer=answer),
            )
            for prompt in prompts
            for answer in prompt.answers
        ]
        return Reference(
            tuple(prompt for prompt, _ in rows),
            tuple(encoded.ids for _, encoded in rows),
            tuple(encoded.prompt for _, encoded in rows),
            tuple(encoded.turns for _, encoded in rows),
        )

    def meter(
        self, reference: Reference, sites: Sequence[Site] = (), *, divergence: bool = True
    ) -> Meter:
        """A measure of edits on a reference; with sites, the blocks below them run only once.

        ``divergence=False`` leaves KL out, and with it the stored distributions.
        """
        return Meter(self, reference, sites, divergence)

    # --- record ----------------------------------------------------------------------------------

    def record(
        self,
        contrast: Contrast,
        sites: Sequence[Site],
        *,
        read: Read = "last",
        span: Span = (0, None),
        padding_side: str = "right",
        folder: str | Path | None = None,
        origin: Mapping[str, Any] | None = None,
        progress: Progress = silent,
    ) -> Activations:
        """Rows of both sides of every item, at several sites in one pass.

        No block above the deepest site runs, nor the language-model head. The first position of a
        sequence (BOS, or what stands in its place as the attention's sink) is never read.

        Args:
            read: which of the answer's tokens become rows: its ``last``, their ``mean``, ``all``,
                or those of ``span``; an item without an answer reads its last prompt token.
            span: half-open, counted from the answer's first token; -1 is the last prompt token.
            padding_side: of the batches; the rows do not depend on it.
            folder: write shards there, batch by batch, and hold none of them until the end, when
                the rows are read back (``record_to`` leaves that out). An interrupted recording
                stays beside it, hidden, and the same call goes on where it stopped, to the same
                bytes.
            origin: more of where the contrast is from, for the provenance.

        Raises:
            InputError: no item, or an item without a token to read.
        """
        provenance = self._provenance(contrast, sites, read, origin)
        if folder:
            how: dict[str, Any] = {"read": read, "span": span, "padding_side": padding_side}
            self.record_to(folder, contrast, sites, **how, origin=origin, progress=progress)
            return Activations.load(folder)
        parts = self._parts(contrast, progress)
        batches = list(self._passes(contrast, parts, sites, read, span, padding_side, self.memo))
        joined = {site: torch.cat([b.values[site] for b in batches]) for site in sorted(sites)}
        table = Rows.of([record for batch in batches for record in batch.rows.records()])
        return Activations(joined, table, (contrast.behaviour,), read, provenance)

    def record_to(
        self,
        folder: str | Path,
        contrast: Contrast,
        sites: Sequence[Site],
        *,
        read: Read = "last",
        span: Span = (0, None),
        padding_side: str = "right",
        origin: Mapping[str, Any] | None = None,
        progress: Progress = silent,
    ) -> Path:
        """``record`` to disk alone: no row stays in memory, however many the contrast has.

        Memory holds the contrast, ``WINDOW`` encoded texts and one batch. ``Activations.load``
        reads the folder, whole.
        """
        provenance = self._provenance(contrast, sites, read, origin)
        asked = [provenance, list(map(str, sorted(sites))), list(span), padding_side]
        plan = hashlib.sha256(canonical([*asked, self.batch_tokens, WINDOW])).hexdigest()
        with ShardWriter(folder, (contrast.behaviour,), read, provenance, resume=plan) as shards:
            parts = islice(self._parts(contrast, progress), shards.done, None)
            # Shards go on by themselves, without the memo.
            passes = self._passes(contrast, parts, sites, read, span, padding_side, Memo())
            with closing(passes) as recorded:
                for rows in recorded:
                    shards.write(rows.values, rows.rows)
        return Path(folder)

    def _provenance(
        self,
        contrast: Contrast,
        sites: Sequence[Site],
        read: Read,
        origin: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Where rows are from; of heads' rows also how wide a head is."""
        in_heads = any(site.stream == "heads" for site in sites)
        if not len(contrast):
            raise InputError(f"contrast {contrast.behaviour!r} has no items to record")
        return {
            "fingerprint": asdict(self.model.fingerprint),
            "contrast": contrast.hash,
            "read": read,
            "innsteer": __version__,
            **({"head_width": self.model.head_width} if in_heads else {}),
            **(origin or {}),
        }

    def _parts(self, contrast: Contrast, progress: Progress) -> Iterator[list[_Job]]:
        """Every item's sides, encoded, in batches of near-equal length; a window at a time."""
        both = ("source", "target")
        total = sum(getattr(item, side) is not None for item in contrast.items for side in both)
        every = (
            (item, side, self._encode_side(item, side))
            for item in contrast.items
            for side in both
            if getattr(item, side) is not None
        )
        for start in range(0, total, WINDOW):
            jobs = list(islice(every, WINDOW))

            def told(stage: str, done: int, _: int, start: int = start) -> None:
                progress(stage, start + done, total)

            for index in self._batches([len(e.ids) for *_, e in jobs], told, "record"):
                yield [jobs[j] for j in index]

    def _passes(
        self,
        contrast: Contrast,
        parts: Iterator[list[_Job]],
        sites: Sequence[Site],
        read: Read,
        span: Span,
        padding_side: str,
        memo: Memo,
    ) -> Generator[Activations]:
        """The rows of each batch, from one pass up to the deepest site."""
        with ExitStack() as stack:
            seen = self._capture(stack, sites)
            for part in parts:
                records, picks = [], []
                for row, (item, side, encoded) in enumerate(part):
                    for tokens in _read_tokens(encoded, read, span, item.id):
                        picks.append((row, tokens))
                        records.append(_row(contrast, item, side, tokens[-1]))
                sequences = [encoded.ids for _, _, encoded in part]
                key = self.key("record", sequences, picks, sorted(map(str, sites)), padding_side)
                made = partial(self._read, sequences, picks, sites, seen, padding_side)
                with torch.inference_mode():
                    found = memo.tensors(key, made)
                values = {site: found[str(site)] for site in sorted(sites)}
                # Checked here: rows that are not finite must not reach the disk.
                yield Activations(values, Rows.of(records), (contrast.behaviour,), read)

    def _read(
        self,
        sequences: Sequence[Sequence[int]],
        picks: Sequence[tuple[int, Sequence[int]]],
        sites: Sequence[Site],
        seen: dict[Site, Tensor],
        padding_side: str,
    ) -> dict[str, Tensor]:
        """Means ``[picks, d]`` of the tokens picked from some sequences, by site.

        What all begin with runs once, and so does what precedes answers of one token.
        """
        stems = [tuple(ids[:-1]) for ids in sequences]
        branched = self._splits and len(set(stems)) < len(stems)
        if not branched:
            stems = list(map(tuple, sequences))
        rows = list(dict.fromkeys(stems))
        owners = [rows.index(stem) for stem in stems]
        lead = self._shared(rows, min(map(len, rows)) - 1)
        cache = DynamicCache() if lead or branched else None
        ahead, ends = dict[Site, Tensor](), dict[Site, Tensor]()
        if lead and cache is not None:
            self._pass(*self._after(0, [rows[0][:lead]]), sites, seen, cache)
            ahead, cache = dict(seen), repeated(cache, len(rows))
        ids, mask = self._after(lead, rows, side=padding_side)
        self._pass(ids, mask, sites, seen, cache)
        own, middle = mask[:, lead:].bool(), dict(seen)
        if branched and cache is not None:
            cache.batch_select_indices(torch.tensor(owners, device=ids.device))
            last = torch.tensor([row[-1:] for row in map(list, sequences)], device=ids.device)
            columns = torch.cat([mask[owners], mask.new_ones(last.shape)], 1)
            self._pass(last, columns, sites, seen, cache)
            ends = dict(seen)
        found: dict[str, Tensor] = {}
        for site, h in middle.items():
            texts = []
            for row, n in enumerate(owners):
                parts = [ahead[site][0]] if lead else []
                parts.append(h[n, own[n]])
                parts += [ends[site][row]] if branched else []
                texts.append(torch.cat(parts))
            means = [texts[row][list(tokens)].float().mean(0) for row, tokens in picks]
            found[str(site)] = torch.stack(means)
        return found

    def _encode_side(self, item: Item, side: str) -> Encoded:
        return self.model.encode(item.prompt, answer=getattr(item, side))

    def _pass(
        self,
        ids: Tensor,
        mask: Tensor,
        sites: Sequence[Site],
        seen: dict[Site, Tensor],
        cache: DynamicCache | None = None,
    ) -> None:
        """One pass up to the deepest site; ``_capture``'s dictionary then holds the streams."""
        try:
            self.model.model.base_model(
                ids,
                attention_mask=mask,
                position_ids=positions_of(mask)[:, mask.shape[1] - ids.shape[1] :],
                past_key_values=cache,
                use_cache=cache is not None,
            )
        except _Stop:
            pass

    def _capture(self, stack: ExitStack, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Hooks that keep the sites' streams and stop the pass at the deepest one."""
        seen = stack.enter_context(watch(self.model.layout, sites))
        deepest = self.model.layout.blocks[max(site.layer for site in sites)].module

        def stop(*_: object) -> None:
            raise _Stop

        # Registered last, so that it runs after the capture of the same block.
        stack.callback(deepest.register_forward_hook(stop).remove)
        return seen

    # --- shared ----------------------------------------------------------------------------------

    @contextmanager
    def _steered(
        self, edits: Sequence[Edit], index: Sequence[int], rows: Sequence[Encoded], trace: Trace
    ) -> Iterator[None]:
        """Edits on the model for a batch whose rows are the prompts ``index``."""
        if not edits:
            yield
            return
        with Attachment(
            self.model,
            edits_of(edits, index),
            prompt_lengths=[row.prompt for row in rows],
            turns=[row.turns for row in rows],
            trace=trace,
        ):
            yield


def _read_tokens(encoded: Encoded, read: Read, span: Span, item: str) -> list[list[int]]:
    """Absolute positions of each row to read: several of them are meaned into one row."""
    first, end = encoded.prompt, len(encoded.ids)
    if first == end:
        answer = [end - 1]
    elif read == "span":
        stop = end if span[1] is None else min(first + span[1], end)
        answer = list(range(max(first + span[0], 0), stop))
    else:
        answer = list(range(first, end))
    # Position 0 is BOS or the attention's sink: its norm is hundreds of times that of the others.
    answer = [t for t in answer if t > 0]
    if not answer:
        raise InputError(
            f"item {item!r} has no token to read",
            expected=f"an answer with tokens in the read rule {read!r}",
        )
    if read == "last":
        return [answer[-1:]]
    return [answer] if read == "mean" else [[t] for t in answer]


def _row(contrast: Contrast, item: Item, side: str, token: int) -> dict[str, Any]:
    return {
        "behaviour": contrast.behaviour,
        "item": item.id,
        "side": side,
        "key": item.key or "",
        "pair": item.id if item.source is not None and item.target is not None else "",
        "token": token,
        "split": item.split,
        "weight": item.weight,
    }

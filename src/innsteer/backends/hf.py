"""The Hugging Face engine: generate, score, record and compare, on one machine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from innsteer import __version__
from innsteer.activations import Activations, Read, Rows, ShardWriter
from innsteer.backends.base import Completion, Kind, Progress, Prompt, Sampling, silent
from innsteer.contrast import Contrast, Conversation, Item
from innsteer.errors import InputError
from innsteer.hooks import Attachment, Trace, require_selected
from innsteer.interventions import Edit
from innsteer.models import Encoded, LanguageModel
from innsteer.site import Site, Span, Where


class _Stop(BaseException):
    """Ends a forward pass at the deepest block asked for; never leaves this module."""


@dataclass(frozen=True)
class Reference:
    """What the unsteered model says to some prompts: the text on which cost is measured.

    Attributes:
        prompts: the prompts. ids: prompt and continuation tokens of each.
        lengths: prompt tokens of each.
    """

    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

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
        return Reference(self.prompts[:count], self.ids[:count], self.lengths[:count])


class HF:
    """Runs a LanguageModel through transformers.

    Args:
        model: from ``load_model``.
        batch: sequences per batch in generation.
        batch_tokens: padded tokens per batch elsewhere.
    """

    name = "hf"

    def __init__(self, model: LanguageModel, *, batch: int = 16, batch_tokens: int = 2048) -> None:
        self.model = model
        self.batch = batch
        self.batch_tokens = batch_tokens
        self._references: dict[tuple[object, ...], Reference] = {}

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
        encoded = [self.model.encode(prompt.conversation) for prompt in prompts]
        done: dict[int, Completion] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i].ids))
        with _tally(edits) as trace:
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
        jobs = [
            (i, self.model.encode(prompt.conversation, answer=answer))
            for i, prompt in enumerate(prompts)
            for answer in prompt.answers
        ]
        found: list[tuple[float, ...]] = [()] * len(jobs)
        rows = [encoded for _, encoded in jobs]
        with _tally(edits) as trace:
            for index in self._batches([len(row.ids) for row in rows], progress, "score"):
                part = [rows[j] for j in index]
                ids, mask = self._pad([row.ids for row in part], side="left")
                longest = max(len(row.ids) - row.prompt for row in part)
                owners = [jobs[j][0] for j in index]
                with torch.inference_mode(), self._steered(edits, owners, part, trace):
                    logits = self._logits(ids, mask, longest + 1)
                    log_probs = logits[:, :-1].float().log_softmax(-1)
                    answer = ids[:, ids.shape[1] - longest :].unsqueeze(-1)
                    picked = log_probs.gather(-1, answer).squeeze(-1)
                for row, j in enumerate(index):
                    own = len(part[row].ids) - part[row].prompt
                    found[j] = tuple(picked[row, longest - own :].tolist())
        answers: list[list[tuple[float, ...]]] = [[] for _ in prompts]
        for (i, _), values in zip(jobs, found, strict=True):
            answers[i].append(values)
        return [tuple(values) for values in answers]

    def score_text(self, texts: Sequence[str], edits: Sequence[Edit] = ()) -> list[float]:
        """Total log-probability of plain texts, without any template; every token steered."""
        tokenizer = self.model.tokenizer
        rows = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        edits = [replace(edit, where=Where("all")) for edit in edits]
        found = [0.0] * len(rows)
        scored = [i for i, row in enumerate(rows) if len(row) > 1]
        for part in self._batches([len(rows[i]) for i in scored], silent, "score"):
            index = [scored[j] for j in part]
            ids, mask = self._pad([rows[i] for i in index], side="right")
            attached = Attachment(self.model, _of(edits, index)) if edits else nullcontext()
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
        if sampling is None:
            return Reference(tuple(prompts), tuple(row.ids for row in encoded), lengths)
        ids = [row.ids for row in encoded]
        key = (tuple(ids), tuple(prompt.item for prompt in prompts), sampling)
        if key in self._references:
            return self._references[key]
        order = sorted(range(len(prompts)), key=lambda i: lengths[i])
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            progress("reference", start, len(order))
            drawn = replace(sampling, temperature=sampling.temperature or 1.0)
            for i, new in zip(
                index, self._decode([ids[i] for i in index], drawn, index[0]), strict=True
            ):
                ids[i] = (*ids[i], *new)
        progress("reference", len(order), len(order))
        self._references[key] = Reference(tuple(prompts), tuple(ids), lengths)
        return self._references[key]

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
        )

    def meter(
        self, reference: Reference, sites: Sequence[Site] = (), *, divergence: bool = True
    ) -> "Meter":
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
            folder: also write shards there, batch by batch.

        Raises:
            InputError: no item, or an item without a token to read.
        """
        if not len(contrast):
            raise InputError(f"contrast {contrast.behaviour!r} has no items to record")
        jobs = [
            (item, side, self._encode_side(item, side))
            for item in contrast.items
            for side in ("source", "target")
            if getattr(item, side) is not None
        ]
        provenance = {
            "fingerprint": asdict(self.model.fingerprint),
            "contrast": contrast.hash,
            "read": read,
            "innsteer": __version__,
        }
        shards = ShardWriter(folder, (contrast.behaviour,), read, provenance) if folder else None
        batches: list[tuple[dict[Site, Tensor], list[dict[str, Any]]]] = []
        with shards or nullcontext(), torch.inference_mode(), ExitStack() as stack:
            seen = self._capture(stack, sites)
            lengths = [len(encoded.ids) for _, _, encoded in jobs]
            for index in self._batches(lengths, progress, "record"):
                part = [jobs[j] for j in index]
                ids, mask = self._pad([e.ids for _, _, e in part], side=padding_side)
                places = _positions(mask)
                try:
                    self.model.model.base_model(
                        ids, attention_mask=mask, position_ids=places, use_cache=False
                    )
                except _Stop:
                    pass
                offset = [
                    ids.shape[1] - len(e.ids) if padding_side == "left" else 0 for *_, e in part
                ]
                records, picks = [], []
                for row, (item, side, encoded) in enumerate(part):
                    for tokens in _read_tokens(encoded, read, span, item.id):
                        picks.append((row, [t + offset[row] for t in tokens]))
                        records.append(_row(contrast, item, side, tokens[-1]))
                values = {
                    site: torch.stack([h[row, tokens].float().mean(0) for row, tokens in picks])
                    for site, h in seen.items()
                }
                batches.append((values, records))
                if shards:
                    shards.write(values, Rows.of(records))
        joined = {site: torch.cat([v[site] for v, _ in batches]).clone() for site in sorted(sites)}
        table = Rows.of([record for _, records in batches for record in records])
        return Activations(joined, table, (contrast.behaviour,), read, provenance)

    def _encode_side(self, item: Item, side: str) -> Encoded:
        return self.model.encode(item.prompt, answer=getattr(item, side))

    def _capture(self, stack: ExitStack, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Hooks that keep the sites' streams and stop the pass at the deepest one."""
        seen: dict[Site, Tensor] = {}
        places = {site: self.model.layout.at(site) for site in sites}
        deepest = self.model.layout.blocks[max(site.layer for site in sites)].module

        def keep(site: Site, port: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
                value = args[0] if port == "input" else output
                seen[site] = value[0] if isinstance(value, tuple) else value

            return hook

        for site, (module, port) in places.items():
            hook = keep(site, port)
            handle = (
                module.register_forward_pre_hook(hook)
                if port == "input"
                else module.register_forward_hook(hook)
            )
            stack.callback(handle.remove)

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
            _of(edits, index),
            prompt_lengths=[row.prompt for row in rows],
            turns=[row.turns for row in rows],
            trace=trace,
        ):
            yield

    def _logits(self, ids: Tensor, mask: Tensor, keep: int, cache: Any = None) -> Tensor:
        """Logits of the last ``keep`` positions (0 = all) of a padded batch."""
        out = self.model.model(
            ids,
            attention_mask=mask,
            position_ids=_positions(mask)[:, mask.shape[1] - ids.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        return cast(Tensor, out.logits)

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


class Meter:
    """What edits do to the predictions on a reference, per response token.

    Gives ``kl`` = KL(base || steered) in nats, and the steered and unsteered log-probability of the
    token that stands there. What is unsteered is computed once; with ``sites``, so are the blocks
    below the lowest of them: a measurement then runs the blocks above only. That is exact, because
    without a cache they see nothing but the hidden states at that block.
    """

    def __init__(
        self, backend: HF, reference: Reference, sites: Sequence[Site] = (), divergence: bool = True
    ) -> None:
        self.backend, self.reference = backend, reference
        self._cut = _cut(sites)
        self._divergence = divergence
        self._batches: list[_Measured] = []
        lengths = [len(ids) for ids in reference.ids]
        with torch.inference_mode():
            for index in backend._batches(lengths, silent, "meter"):
                rows = [reference.ids[i] for i in index]
                ids, mask = backend._pad(rows, side="left")
                cache = DynamicCache() if sites else None
                with self._tap() as held:
                    base = self._predict(index, ids, mask, cache)
                prefix = ids.shape[1] - max(map(self._count, index)) - 1
                tokens = self._tokens(index, base)
                self._batches.append(
                    _Measured(
                        index,
                        ids,
                        mask,
                        base if divergence else None,
                        tokens,
                        base.gather(-1, tokens).squeeze(-1),
                        held[0] if held else None,
                        _past(cache, prefix),
                        max(prefix, 0) if cache is not None else 0,
                    )
                )

    def __call__(
        self,
        edits: Sequence[Edit],
        *,
        kind: Kind = "neutral",
        displacement: list[float] | None = None,
    ) -> list[Completion]:
        """One completion per row of the reference, in order, under the edits.

        Args:
            displacement: a list to which |h' - h| / |h| of every edited row is appended.
        """
        found: dict[int, Completion] = {}
        # An edit below the cut changes what was kept.
        held = _cut([site for edit in edits for site in edit.interventions]) >= self._cut
        # Under these scopes nothing before the last prompt token is edited, in any layer.
        late = held and all(edit.where.scope in ("generated", "assistant") for edit in edits)
        with _tally(edits) as trace:
            for part in self._batches:
                lengths = [self.reference.lengths[i] for i in part.order]
                attached = Attachment(
                    self.backend.model,
                    _of(edits, part.order),
                    prompt_lengths=lengths,
                    turns=[((n - 1, None),) for n in lengths],
                    displacement=displacement,
                    trace=trace,
                )
                start = part.prefix if late else 0
                replay = self._replay(part.held if held else None, start)
                with torch.inference_mode(), replay, attached:
                    steered = self._predict(
                        part.order, part.ids[:, start:], part.mask, part.cache_at(start)
                    )
                found |= self._completions(part, steered, kind, trace)
        return [found[i] for i in range(len(self.reference.ids))]

    def unsteered(self, *, kind: Kind = "neutral") -> list[Completion]:
        """The same figures for the plain model: a divergence of 0, nothing run again."""
        found: dict[int, Completion] = {}
        for part in self._batches:
            found |= self._completions(part, part.base, kind, None)
        return [found[i] for i in range(len(self.reference.ids))]

    def prompted(self, instruction: str, *, kind: Kind = "neutral") -> list[Completion]:
        """The same figures for the plain model with an instruction added to every prompt."""
        found: dict[int, Completion] = {}
        reference = self.reference
        for part in self._batches:
            rows = []
            for i in part.order:
                asked = instruct(reference.prompts[i].conversation, instruction)
                answer = reference.ids[i][reference.lengths[i] :]
                rows.append((*self.backend.model.encode(asked).ids, *answer))
            ids, mask = self.backend._pad(rows, side="left")
            with torch.inference_mode():
                predicted = self._predict(part.order, ids, mask)
            found |= self._completions(part, predicted, kind, None)
        return [found[i] for i in range(len(reference.ids))]

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
            last = self.reference.lengths[i] - 1 + count
            edited = sum(position < last for position in trace.steered[row]) if trace else 0
            if kl is not None:
                # A row without an edit costs nothing; kept columns may differ by rounding.
                values["kl"] = tuple(kl[window]) if edited or not trace else (0.0,) * count
                values["sure"], values["same"] = tuple(sure[window]), tuple(same[window])
            prompt = self.reference.prompts[i]
            found[i] = Completion(
                prompt.item,
                kind,
                as_text(prompt.conversation),
                prompt.answers[0] if prompt.answers else "",
                values=values,
                tokens=count,
                steered=edited,
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

    def _tokens(self, index: Sequence[int], log_probs: Tensor) -> Tensor:
        """Response tokens ``[predicted tokens, 1]``; after a bare prompt, the base's best one."""
        reference, tokens, place = self.reference, [], 0
        for i in index:
            answer = list(reference.ids[i][reference.lengths[i] :])
            tokens += answer or [int(log_probs[place].argmax())]
            place += self._count(i)
        return torch.tensor(tokens, device=log_probs.device).unsqueeze(-1)

    @contextmanager
    def _tap(self) -> Iterator[list[Any]]:
        """Keep the output of the block at the cut."""
        held: list[Any] = []
        if self._cut < 0:
            yield held
            return
        block = self.backend.model.layout.blocks[self._cut].module
        handle = block.register_forward_hook(lambda _, args, output: held.append(output))
        try:
            yield held
        finally:
            handle.remove()

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
        with ExitStack() as stack:
            for block in self.backend.model.layout.blocks[: self._cut + 1]:
                own = vars(block.module)
                if "forward" in own:
                    stack.callback(own.__setitem__, "forward", own["forward"])
                # An instance attribute shadows the class's forward; hooks still run around it.
                stack.callback(own.pop, "forward")
                own["forward"] = lambda *args, **kwargs: held
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


def _cut(sites: Sequence[Site]) -> int:
    """The deepest block whose output no edit changes, or changes only after it was computed."""
    if not sites:
        return -1
    lowest = min(site.layer for site in sites)
    inner = any(site.layer == lowest and site.stream != "residual" for site in sites)
    return lowest - 1 if inner else lowest


def _of(edits: Sequence[Edit], index: Sequence[int]) -> list[Edit]:
    """The edits of some sequences, where each has its own row of coefficients."""
    return [replace(e, coef=e.coef[list(index)]) if e.coef.ndim == 2 else e for e in edits]


@contextmanager
def _tally(edits: Sequence[Edit]) -> Iterator[Trace]:
    """One trace for all batches of a run: a batch may hold no token in scope, not all of them."""
    trace = Trace()
    yield trace
    if edits:
        require_selected(trace, edits)


def _positions(mask: Tensor) -> Tensor:
    """Absolute positions ``[batch, time]`` of a padded batch."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


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


def as_text(conversation: Conversation) -> str:
    """A conversation as one string, for people.

    >>> as_text("Hello")
    'Hello'
    """
    if isinstance(conversation, str):
        return conversation
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation)

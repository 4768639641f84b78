"""The Hugging Face engine: generate, score, record and compare, on one machine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from innsteer import __version__
from innsteer.activations import Activations, Read, Rows, ShardWriter
from innsteer.backends.base import Completion, Progress, Prompt, Sampling, silent
from innsteer.contrast import Contrast, Conversation, Item
from innsteer.errors import InputError
from innsteer.hooks import Attachment, Trace
from innsteer.interventions import Edit
from innsteer.models import Encoded, LanguageModel
from innsteer.site import Site, Span


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
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            progress("generate", start, len(order))
            done |= self._generate_batch(prompts, encoded, index, edits, sampling)
        progress("generate", len(order), len(order))
        return [done[i] for i in range(len(prompts))]

    def _generate_batch(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[Encoded],
        index: Sequence[int],
        edits: Sequence[Edit],
        sampling: Sampling,
    ) -> dict[int, Completion]:
        rows = [encoded[i] for i in index]
        ids, mask = self._pad([row.ids for row in rows], side="left")
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if sampling.temperature > 0:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0}
        with (
            torch.inference_mode(),
            torch.random.fork_rng(devices=[]),
            self._steered(edits, index, rows) as trace,
        ):
            # One seed per batch and not per call: a batch's draws do not depend on earlier ones.
            torch.manual_seed(sampling.seed * 1_000_003 + index[0])
            out = self.model.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=sampling.new_tokens,
                top_k=0 if sampling.temperature > 0 else None,
                pad_token_id=self._pad_id,
                **how,
            )
        found = {}
        for row, i in enumerate(index):
            new = out[row, ids.shape[1] :].tolist()
            ends = [n for n, token in enumerate(new) if token in self.model.stop_ids]
            new = new[: ends[0] + 1] if ends else new
            found[i] = Completion(
                item=prompts[i].item,
                kind="sample",
                prompt=as_text(prompts[i].conversation),
                text=self.model.tokenizer.decode(new, skip_special_tokens=True).strip(),
                seed=sampling.seed,
                tokens=len(new),
                steered=len(trace.steered[row]) if trace else 0,
            )
        return found

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
        for index in self._batches([len(row.ids) for row in rows], progress, "score"):
            part = [rows[j] for j in index]
            ids, mask = self._pad([row.ids for row in part], side="left")
            keep = max(len(row.ids) - row.prompt for row in part) + 1
            owners = [jobs[j][0] for j in index]
            with torch.inference_mode(), self._steered(edits, owners, part):
                logits = self._logits(ids, mask, keep)
                log_probs = logits[:, :-1].float().log_softmax(-1)
                picked = log_probs.gather(-1, ids[:, 1 - keep :].unsqueeze(-1)).squeeze(-1)
            for row, j in enumerate(index):
                own = len(part[row].ids) - part[row].prompt
                found[j] = tuple(picked[row, picked.shape[1] - own :].tolist())
        answers: list[list[tuple[float, ...]]] = [[] for _ in prompts]
        for (i, _), values in zip(jobs, found, strict=True):
            answers[i].append(values)
        return [tuple(values) for values in answers]

    def score_text(self, texts: Sequence[str], edits: Sequence[Edit] = ()) -> list[float]:
        """Total log-probability of plain texts, without any template; every token steered."""
        tokenizer = self.model.tokenizer
        rows = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        edits = [Edit(e.interventions, e.coef, replace(e.where, scope="all")) for e in edits]
        found = [0.0] * len(rows)
        for index in self._batches([len(row) for row in rows], silent, "score"):
            ids, mask = self._pad([rows[i] for i in index], side="right")
            attached = Attachment(self.model, edits) if edits else nullcontext()
            with torch.inference_mode(), attached:
                log_probs = self._logits(ids, mask, 0)[:, :-1].float().log_softmax(-1)
            picked = log_probs.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
            for row, total in zip(index, (picked * mask[:, 1:]).sum(-1).tolist(), strict=True):
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
        """The unsteered model's own continuations; ``sampling=None``: bare prompts."""
        encoded = [self.model.encode(prompt.conversation) for prompt in prompts]
        lengths = tuple(len(row.ids) for row in encoded)
        if sampling is None:
            return Reference(tuple(prompts), tuple(row.ids for row in encoded), lengths)
        ids = [row.ids for row in encoded]
        order = sorted(range(len(prompts)), key=lambda i: lengths[i])
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            progress("reference", start, len(order))
            tokens, mask = self._pad([ids[i] for i in index], side="left")
            with torch.inference_mode(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(sampling.seed * 1_000_003 + index[0])
                out = self.model.model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=sampling.new_tokens,
                    do_sample=True,
                    temperature=sampling.temperature or 1.0,
                    top_p=1.0,
                    top_k=0,
                    pad_token_id=self._pad_id,
                )
            for row, i in enumerate(index):
                new = out[row, tokens.shape[1] :].tolist()
                ends = [n for n, token in enumerate(new) if token in self.model.stop_ids]
                ids[i] = (*ids[i], *(new[: ends[0] + 1] if ends else new))
        progress("reference", len(order), len(order))
        return Reference(tuple(prompts), tuple(ids), lengths)

    def meter(self, reference: Reference, sites: Sequence[Site] = ()) -> "Meter":
        """A measure of cost on a reference; with sites, the blocks below them run only once."""
        return Meter(self, reference, sites)

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
                try:
                    self.model.model.base_model(ids, attention_mask=mask, use_cache=False)
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
        deepest = self.model.layout.blocks[max(site.layer for site in sites)].module

        def keep(site: Site, port: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
                value = args[0] if port == "input" else output
                seen[site] = value[0] if isinstance(value, tuple) else value

            return hook

        for site in sites:
            module, port = self.model.layout.at(site)
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
        self, edits: Sequence[Edit], index: Sequence[int], rows: Sequence[Encoded]
    ) -> Iterator[Trace | None]:
        """Edits on the model for a batch whose rows are the prompts ``index``."""
        if not edits:
            yield None
            return
        chosen = [replace(e, coef=e.coef[list(index)]) if e.coef.ndim == 2 else e for e in edits]
        with Attachment(
            self.model,
            chosen,
            prompt_lengths=[row.prompt for row in rows],
            turns=[(*_past_turns(row), (row.prompt - 1, None)) for row in rows],
        ) as attachment:
            yield attachment.trace

    def _logits(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Logits of the last ``keep`` positions (0 = all) of a padded batch."""
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        out = self.model.model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
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
    """Cost of edits on a reference: per-token KL(base || steered), in nats.

    The unsteered log-probabilities are computed once. With ``sites``, so are the blocks below the
    lowest of them: a measurement runs the blocks above only, which is exact, because without a
    cache they see nothing but the hidden states at that block.
    """

    def __init__(self, backend: HF, reference: Reference, sites: Sequence[Site] = ()) -> None:
        self.backend, self.reference = backend, reference
        self._cut = _cut(sites)
        self._batches: list[tuple[list[int], Tensor, Tensor, Tensor, Any]] = []
        lengths = [len(ids) for ids in reference.ids]
        with torch.inference_mode():
            for index in backend._batches(lengths, silent, "meter"):
                ids, mask = backend._pad([reference.ids[i] for i in index], side="left")
                with self._tap() as held:
                    base = self._predict(index, ids, mask)
                self._batches.append((index, ids, mask, base, held[0] if held else None))

    def __call__(
        self,
        edits: Sequence[Edit],
        *,
        kind: str = "neutral",
        displacement: list[float] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, with ``kl`` per token; relative displacements are appended."""
        found: dict[int, Completion] = {}
        reference = self.reference
        for index, ids, mask, base, held in self._batches:
            lengths = [reference.lengths[i] for i in index]
            chosen = [replace(e, coef=e.coef[index]) if e.coef.ndim == 2 else e for e in edits]
            attached = Attachment(
                self.backend.model,
                chosen,
                prompt_lengths=lengths,
                turns=[((n - 1, None),) for n in lengths],
                displacement=displacement,
            )
            with torch.inference_mode(), self._replay(held), attached:
                steered = self._predict(index, ids, mask)
            kl = (base.exp() * (base - steered)).sum(-1)
            place = 0
            for row, i in enumerate(index):
                count = max(len(reference.ids[i]) - lengths[row], 1)
                values = tuple(kl[place : place + count].clamp_min(0).tolist())
                place += count
                prompt = reference.prompts[i]
                found[i] = Completion(
                    prompt.item,
                    cast(Any, kind),
                    as_text(prompt.conversation),
                    values={"kl": values},
                    tokens=count,
                    steered=len(attached.trace.steered[row]),
                )
        return [found[i] for i in range(len(reference.ids))]

    def _predict(self, index: Sequence[int], ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities ``[predicted tokens, vocabulary]`` of a batch, row after row."""
        reference = self.reference
        counts = [max(len(reference.ids[i]) - reference.lengths[i], 1) for i in index]
        bare = [len(reference.ids[i]) == reference.lengths[i] for i in index]
        keep = max(counts) + 1
        logits = self.backend._logits(ids, mask, keep)
        parts = [
            # The token before each response token predicts it; a bare prompt's last token is read.
            logits[row, -count:] if bare[row] else logits[row, -count - 1 : -1]
            for row, count in enumerate(counts)
        ]
        return torch.cat(parts).float().log_softmax(-1)

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
    def _replay(self, held: Any) -> Iterator[None]:
        """Blocks up to the cut hand over what was kept instead of computing it."""
        if held is None:
            yield
            return
        with ExitStack() as stack:
            for block in self.backend.model.layout.blocks[: self._cut + 1]:
                module = block.module
                # An instance attribute shadows the class's forward; hooks still run around it.
                vars(module)["forward"] = lambda *args, **kwargs: held
                stack.callback(vars(module).pop, "forward")
            yield


def _cut(sites: Sequence[Site]) -> int:
    """The deepest block whose output no edit changes, or changes only after it was computed."""
    if not sites:
        return -1
    lowest = min(site.layer for site in sites)
    inner = any(site.layer == lowest and site.stream != "residual" for site in sites)
    return lowest - 1 if inner else lowest


def _past_turns(row: Encoded) -> tuple[Span, ...]:
    """Assistant turns that ended before the open one."""
    return tuple((start, stop) for start, stop in row.turns if stop <= row.prompt - 1)


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

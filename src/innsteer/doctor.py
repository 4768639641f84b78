"""What works on a model: every way to run it, steered, against the same edit added by hand.

A test edit, a random shift at one site, goes through the library in each way that people generate
and record. Beside it stands a plain hook on a single unpadded sequence without a cache. Both are
run unsteered too: an engine's own rounding, told by that, is no fault of the steering.
"""

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from innsteer import __version__, steerer
from innsteer.backends.base import Progress, silent
from innsteer.backends.engine import Engine
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast
from innsteer.errors import InnsteerError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit, Shift
from innsteer.models import LanguageModel
from innsteer.site import Site
from innsteer.steerer import Interventions
from innsteer.steering import Steering

TEXTS = ("Is tea hot?", "Name a river that flows through more than one country.", "Why?")
STRENGTHS = (1.0, 0.0, -1.0)
NEW = 5
TIMES = 4.0
"""The steered gap may be so many times the unsteered one: an edit shifts what rounds how."""


@dataclass(frozen=True)
class Check:
    """One way to run the model and what came of it.

    Attributes:
        name: of the way.
        verdict: ``works``; ``refused``: with a reason, before anything was steered wrongly;
            ``fails``: it ran and was wrong, or broke.
        note: the largest difference, or the reason.
    """

    name: str
    verdict: Literal["works", "refused", "fails"]
    note: str


def machine() -> dict[str, Any]:
    """Cores, memory, accelerators and versions of what steering stands on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    packages = ("torch", "transformers", "safetensors", "accelerate", "gguf", "peft")
    found = {name: version for name in packages if (version := _version(name))}
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "innsteer": __version__,
        "python": platform.python_version(),
        **found,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerators": devices,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def about(model: LanguageModel) -> dict[str, Any]:
    """What a model is: its class, blocks, widths, dtype and device."""
    weights = list(model.model.parameters())
    return {
        "model": model.name,
        "class": type(model.model).__name__,
        "blocks": len(model.layout.blocks),
        "width": model.layout.width,
        "parameters": sum(weight.numel() for weight in weights),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "chat_template": bool(model.tokenizer.chat_template),
    }


class _Wrong(Exception):
    """A check came out wrong."""


def checks(
    model: LanguageModel, *, site: Site | None = None, progress: Progress = silent
) -> list[Check]:
    """Steer a model in every way that people run it, and say which give what they should.

    Args:
        model: from ``load_model``, or wrapped.
        site: of the test edit; default: the middle block's output.

    Returns:
        One check per way; none raises.

    >>> [name for name in PROBES][:3]
    ['record', 'forward', 'strength 0']
    """
    bench = _Bench(model, site or Site(len(model.layout.blocks) // 2))
    found = []
    for number, (name, probe) in enumerate(PROBES.items()):
        progress("checks", number, len(PROBES))
        try:
            found.append(Check(name, "works", probe(bench)))
        except InnsteerError as error:
            found.append(Check(name, "refused", str(error)))
        except _Wrong as error:
            found.append(Check(name, "fails", str(error)))
        except Exception as error:  # whatever a stranger's model does: a doctor reports it
            reason = str(error).strip().splitlines() or [""]
            found.append(Check(name, "fails", f"{type(error).__name__}: {reason[0]}"))
    progress("checks", len(PROBES), len(PROBES))
    return found


class _Bench:
    """A model with its test edit, its prompts, and what it should say by hand."""

    def __init__(self, model: LanguageModel, site: Site) -> None:
        self.model, self.site, self.engine = model, site, Engine(model)
        self.prompts = [model.encode(text).ids for text in TEXTS]

    @cached_property
    def edit(self) -> Edit:
        """A random shift, twice as long as rows differ among each other."""
        rows = torch.cat([self.held(ids)[1:] for ids in self.prompts]).float()
        shift = Shift(rows.shape[-1])
        draw = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(0))
        spread = (rows - rows.mean(0)).norm(dim=-1).square().mean().sqrt()
        shift.shifts[0] = 2 * draw / draw.norm() * spread.cpu()
        return Edit(Interventions({self.site: shift}), torch.ones(1))

    @property
    def slack(self) -> float:
        """What sums in another order may differ by: nats, or shares of a length."""
        return max(1e-4, 8 * float(torch.finfo(self.model.model.dtype).eps))

    def held(self, ids: Sequence[int]) -> Tensor:
        """The site's rows ``[time, d]`` in a plain pass."""
        module, port = self.model.layout.at(self.site)
        seen: list[Tensor] = []

        def keep(_: Any, args: Any, output: Any = None) -> None:
            value = args[0] if output is None else output
            seen.append((value[0] if isinstance(value, tuple) else value)[0].detach().clone())

        register: Any = (
            module.register_forward_pre_hook if port == "input" else module.register_forward_hook
        )
        with register(keep), torch.no_grad():
            self._run(ids)
        return seen[-1]

    def by_hand(self, ids: Sequence[int], prompt: int, strength: float) -> Tensor:
        """Log-probabilities ``[time, vocabulary]`` with the shift added by one plain hook."""
        module, port = self.model.layout.at(self.site)
        part = self.edit.interventions[self.site]
        assert isinstance(part, Shift)

        def add(h: Tensor) -> Tensor:
            moved = h.float() + strength * part.shifts[0].to(h.device)
            kept = torch.arange(h.shape[1], device=h.device)[None, :, None] >= prompt - 1
            return torch.where(kept, moved.to(h.dtype), h)

        def before(_: Any, args: Any) -> Any:
            return (add(args[0]), *args[1:])

        def after(_: Any, args: Any, output: Any) -> Any:
            return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)

        if not strength:
            handle: Any = nullcontext()
        elif port == "input":
            handle = module.register_forward_pre_hook(before)
        else:
            handle = module.register_forward_hook(after)
        with handle, torch.no_grad():
            return self._run(ids)

    def _run(self, ids: Sequence[int]) -> Tensor:
        """One plain pass of one sequence, without a cache."""
        given = torch.tensor([list(ids)], device=self.model.device)
        out = self.model.model(given, attention_mask=torch.ones_like(given), use_cache=False)
        found: Tensor = out.logits[0].float().log_softmax(-1)
        return found

    def edits(self, strengths: Sequence[float]) -> list[Edit]:
        """The test edit, a strength for each prompt."""
        return [Edit(self.edit.interventions, torch.tensor(strengths).unsqueeze(-1))]

    def gap(self, run: Callable[[Sequence[float]], float]) -> str:
        """Refuse a steered difference that the unsteered one does not explain.

        ``run`` takes strengths and returns the largest difference from what is right by hand.
        """
        plain, steered = run([0.0] * len(STRENGTHS)), run(STRENGTHS)
        if not plain <= 10 * self.slack:
            raise _Wrong(f"unsteered already {plain:.2g} nats from one sequence without a cache")
        if not steered <= max(self.slack, TIMES * plain):
            raise _Wrong(f"{steered:.2g} nats from the same edit by hand ({plain:.2g} unsteered)")
        return f"{steered:.1g} nats"


# --- the ways -------------------------------------------------------------------------------------


def _record(bench: _Bench) -> str:
    rows = [{"source": f"{text} No.", "target": f"{text} Yes."} for text in TEXTS]
    contrast = Contrast.load(rows, behaviour="test")
    acts = HF(bench.model).record(contrast, [bench.site])
    largest = 0.0
    for n, (item, side) in enumerate(zip(acts.rows.item, acts.rows.side, strict=True)):
        asked = next(one for one in contrast.items if one.id == item)
        ids = bench.model.encode(asked.prompt, answer=getattr(asked, side)).ids
        own = bench.held(ids)[-1].float().cpu()
        largest = max(largest, float((acts.values[bench.site][n] - own).norm() / own.norm()))
    if largest > bench.slack:
        raise _Wrong(f"rows differ by {largest:.2g} of their length from a plain pass")
    return f"{largest:.1g} of a row's length"


def _padded(bench: _Bench, side: str, strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Logits of a padded batch, and its mask."""
    ids, mask = bench.engine._pad(bench.prompts, side=side)
    lengths = [len(row) for row in bench.prompts]
    attached: Any = (
        Attachment(bench.model, bench.edits(strengths), prompt_lengths=lengths)
        if any(strengths)
        else nullcontext()
    )
    with attached, torch.no_grad():
        return bench.engine._logits(ids, mask, 0), mask


def _forward(bench: _Bench) -> str:
    def run(strengths: Sequence[float]) -> float:
        largest = 0.0
        for side in ("left", "right"):
            logits, mask = _padded(bench, side, strengths)
            for row, (ids, strength) in enumerate(zip(bench.prompts, strengths, strict=True)):
                own = logits[row][mask[row].bool()].float().log_softmax(-1)
                right = bench.by_hand(ids, len(ids), strength)
                largest = max(largest, float((own - right).abs().max()))
        return largest

    ids = bench.prompts[0]
    effect = bench.by_hand(ids, len(ids), 1.0)[-1] - bench.by_hand(ids, len(ids), 0.0)[-1]
    if float(effect.abs().max()) < 2 * bench.slack:
        raise _Wrong(f"the test edit at {bench.site} changes nothing that could be seen")
    return bench.gap(run)


def _zero(bench: _Bench) -> str:
    plain, _ = _padded(bench, "left", (0.0, 0.0, 0.0))
    mixed, _ = _padded(bench, "left", STRENGTHS)
    row = STRENGTHS.index(0.0)
    if not torch.equal(plain[row], mixed[row]):
        raise _Wrong("a row at strength 0 beside steered ones is not the plain model's, bit by bit")
    return "bit for bit"


def _generate(bench: _Bench, strengths: Sequence[float], **how: Any) -> tuple[Any, Any]:
    """What generate() gave for the left-padded prompts, and the trace."""
    rows = range(len(strengths))
    ids, mask = bench.engine._pad([bench.prompts[row] for row in rows], side="left")
    model = bench.model.model
    pad = bench.engine._pad_id
    attached = Attachment(bench.model, bench.edits(strengths))
    fixed: dict[str, Any] = {
        "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "temperature": None,
        "top_p": None, "top_k": None, "repetition_penalty": 1.0, "pad_token_id": pad,
        "return_dict_in_generate": True, "disable_compile": True,
    }  # fmt: skip
    with torch.no_grad(), torch.random.fork_rng(devices=[]), attached:
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=mask, **fixed | how)
    return out, attached.trace


def _written(bench: _Bench, strengths: Sequence[float], each: int = 1, **how: Any) -> float:
    """The largest difference of generate()'s own log-probabilities from those by hand."""
    out, trace = _generate(bench, strengths, output_logits=True, **how)
    largest = 0.0
    for number in range(len(strengths) * each):
        row, prompt = number // each, bench.prompts[number // each]
        new = out.sequences[number].tolist()[-NEW:]
        right = bench.by_hand([*prompt, *new], len(prompt), strengths[row])[len(prompt) - 1 : -1]
        own = torch.stack([step[number] for step in out.logits]).float().log_softmax(-1)
        largest = max(largest, float((own - right).abs().max()))
        steered = trace.steered[number] if strengths[row] else []
        wanted = [*range(len(prompt) - 1, len(prompt) + NEW - 1)] if strengths[row] else []
        if sorted(set(steered)) != wanted:
            raise _Wrong(f"steered positions {steered}, not {wanted}")
    return largest


def _way(each: int = 1, **how: Any) -> Callable[[_Bench], str]:
    """A way to generate, told apart from others by generate()'s own arguments."""

    def probe(bench: _Bench) -> str:
        return bench.gap(lambda strengths: _written(bench, strengths, each, **how))

    return probe


def _beams(bench: _Bench) -> str:
    """Scores of beams against those of the same texts by hand: beams change places meanwhile."""

    def run(strengths: Sequence[float]) -> float:
        how = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
        out, _ = _generate(bench, strengths, output_scores=True, early_stopping=False, **how)
        largest = 0.0
        for number, total in enumerate(out.sequences_scores.tolist()):
            prompt, strength = bench.prompts[number // 2], strengths[number // 2]
            new = out.sequences[number].tolist()[-NEW:]
            right = bench.by_hand([*prompt, *new], len(prompt), strength)[len(prompt) - 1 : -1]
            own = float(right.gather(-1, torch.tensor(new, device=right.device)[:, None]).sum())
            largest = max(largest, abs(own - total))
        return largest

    return bench.gap(run)


def _assisted(bench: _Bench) -> str:
    """Candidates from the prompt itself, checked several at once and rolled back."""

    def run(strengths: Sequence[float]) -> float:
        one = (strengths[0],)
        out, _ = _generate(bench, one, output_logits=True, prompt_lookup_num_tokens=2)
        prompt, new = bench.prompts[0], out.sequences[0].tolist()[len(bench.prompts[0]) :]
        right = bench.by_hand([*prompt, *new], len(prompt), one[0])[len(prompt) - 1 : -1]
        own = torch.stack([step[0] for step in out.logits]).float().log_softmax(-1)
        return float((own - right[: len(own)]).abs().max())

    return bench.gap(run)


def _streamed(bench: _Bench) -> str:
    class Kept:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            pass

    kept = Kept()
    # From another thread than the one that reads, as transformers' iterators ask for.
    with ThreadPoolExecutor(1) as other:
        out, _ = other.submit(_generate, bench, (1.0,), streamer=kept).result()
    whole, _ = _generate(bench, (1.0,))
    if kept.ids != out.sequences[0].tolist() or kept.ids != whole.sequences[0].tolist():
        raise _Wrong("what was streamed is not what was generated")
    return f"{NEW} tokens alike"


def _checkpointed(bench: _Bench) -> str:
    """Gradients with checkpointing: what is inside a block runs twice, an edit must count once."""
    model, ids = bench.model.model, bench.prompts[0]
    given = torch.tensor([ids], device=bench.model.device)
    blocks = [block.module for block in bench.model.layout.blocks]
    # The blocks alone: their parts stay in evaluation mode, or dropout would differ.
    modes = [block.training for block in blocks]
    part = bench.model.layout.blocks[bench.site.layer].attention
    embedding = model.get_input_embeddings().weight
    had, hooked = embedding.requires_grad, bool(model.get_input_embeddings()._forward_hooks)
    runs = []
    # Newer transformers renamed them, and the old names warn.
    enable = getattr(model, "activation_checkpointing_enable", None)
    disable = getattr(model, "activation_checkpointing_disable", None)

    def gradient() -> Tensor:
        runs.append(0)

        def count(*_: Any) -> None:
            runs[-1] += 1

        edits = bench.edits((1.0,))
        with (
            Attachment(bench.model, edits, prompt_lengths=[len(ids)]),
            part.register_forward_pre_hook(count),
        ):
            out = model(given, attention_mask=torch.ones_like(given), use_cache=False)
            total = out.logits[0, -1].float().log_softmax(-1)[0]
            (found,) = torch.autograd.grad(total, [embedding])
        return torch.as_tensor(found)

    try:
        embedding.requires_grad_(True)
        plain = gradient()
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        for block in blocks:
            block.training = True
        again = gradient()
    finally:
        (disable or model.gradient_checkpointing_disable)()
        if not hooked:
            # Enabling may have hooked the embedding to make its output require gradients.
            model.disable_input_require_grads()
        embedding.requires_grad_(had)
        for block, mode in zip(blocks, modes, strict=True):
            block.training = mode
    if runs != [1, 2]:
        raise _Wrong(f"the block's attention ran {runs[0]} time without and {runs[1]} with it")
    gap = float((plain - again).norm() / plain.norm())
    if not gap < bench.slack:
        raise _Wrong(f"gradients differ by {gap:.2g} of their length")
    return f"{gap:.1g} of the gradient's length"


def _piped(bench: _Bench) -> str:
    from transformers import pipeline

    pipe = pipeline(
        "text-generation", model=bench.model.model, tokenizer=bench.model.tokenizer,
        device=bench.model.device,
    )  # fmt: skip
    how: Any = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with Attachment(bench.model, [bench.edit]) as attached:
        pipe(TEXTS[1], return_full_text=False, **how)
    steered = attached.trace.steered[0]
    length = len(bench.model.tokenizer(TEXTS[1])["input_ids"])
    if sorted(set(steered)) != [*range(length - 1, length + NEW - 1)]:
        raise _Wrong(f"steered positions {steered} of a prompt of {length} tokens")
    return f"{len(set(steered))} tokens steered"


def _saved(bench: _Bench) -> str:
    """Through the artifact's folder, on a method whose map is this shift."""
    method = steerer.get("diffmean")
    fitted = method.build({bench.site: bench.edit.interventions[bench.site].width})
    fitted.load_state_dict(bench.edit.interventions.state_dict())
    steering = Steering(method, fitted, ("test",), base=bench.model.fingerprint)
    with tempfile.TemporaryDirectory() as folder:
        loaded = Steering.load(steering.save(Path(folder) / "steering"))
    if loaded.identity != steering.identity:
        raise _Wrong("another identity after loading")
    ids = torch.tensor([bench.prompts[0]], device=bench.model.device)
    found = []
    for one in (steering, loaded):
        with torch.no_grad(), one.on(bench.model, prompt_lengths=[ids.shape[1]]):
            found.append(bench.model.model(ids, use_cache=False).logits)
    if not torch.equal(*found):
        raise _Wrong("other outputs after loading")
    return "bit for bit"


PROBES: dict[str, Callable[[_Bench], str]] = {
    "record": _record,
    "forward": _forward,
    "strength 0": _zero,
    "greedy": _way(),
    "no cache": _way(use_cache=False),
    "static cache": _way(cache_implementation="static"),
    "samples": _way(2, do_sample=True, num_return_sequences=2),
    "beams": _beams,
    "assisted": _assisted,
    "streaming": _streamed,
    "pipeline": _piped,
    "checkpointing": _checkpointed,
    "save, load": _saved,
}
"""The ways, by name: each returns a note, or raises."""

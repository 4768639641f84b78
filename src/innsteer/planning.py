"""What a fit will take, before it runs: rehearsed by the code that does the work, on noise.

A rehearsal encodes the real texts, makes the real batches and runs the real fit. Only the passes
through the model are left out: they are counted, and hand on noise of the right shape. So a plan
has no arithmetic of its own that could part from what the work does. Time rests on a few passes
that are run and timed, memory on the shapes of one small pass.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from innsteer.activations import Read
from innsteer.backends import local
from innsteer.backends.base import Progress, Sampling, silent
from innsteer.backends.engine import cut_of
from innsteer.backends.hf import HF
from innsteer.backends.meter import Reference
from innsteer.backends.through import Through
from innsteer.contrast import Contrast
from innsteer.errors import InputError
from innsteer.fitting import (
    Contrasts,
    each,
    linearised,
    own_sites,
    record_parts,
    require_contrasts,
    through,
)
from innsteer.models import LanguageModel
from innsteer.site import Site, Span, Where
from innsteer.steerer import Answers, Interventions, Runner, Steerer, get

PROBE = 8
"""Tokens of the pass whose shapes are weighed."""
SAMPLE = 2048
"""Tokens of the passes that are timed for a fit through the model."""
EPOCHS = (1, 11)
"""A method that trains on rows is rehearsed for so many; the rest of its epochs take as long."""


class Peak:
    """What memory grows by at most inside a ``with``: the process's, or the device's.

    ``bytes`` is None where the system does not tell (it does on Linux and on CUDA devices).
    """

    bytes: int | None = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            self._before = _status("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            cuda = self._device.type == "cuda"
            most = torch.cuda.max_memory_allocated(self._device) if cuda else _status("VmHWM")
            self.bytes = most - self._before


def _status(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


@dataclass(frozen=True)
class Plan:
    """What a fit takes: passes and time at most, because training may stop early and answers be
    short; of memory about, fits took up to 1.3 times as much.

    Attributes:
        items: of the training and validation parts. tokens: of their texts, both sides.
        rows: per site.
        forward, backward: passes through the model, of a batch each.
        memory: bytes at the peak by part, beside Python and its libraries: the ``model``, the
            ``rows``, what is ``kept`` between passes, and the largest ``pass`` with its gradients.
        disk: bytes of the rows as a recording.
        seconds: by part; empty where nothing was measured. What loads the model is not in it.
    """

    items: int
    tokens: int
    rows: int
    forward: int
    backward: int
    memory: dict[str, int]
    disk: int
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the sums."""
        total = round(sum(self.seconds.values()), 3) if self.seconds else None
        return asdict(self) | {"peak": sum(self.memory.values()), "total_seconds": total}


def require_plannable(steerer: Steerer) -> None:
    """Refuse a method that is not fitted on contrasts, before any is read."""
    remedy = "time a few steps: --set updates=10; the training itself can be interrupted"
    require_contrasts(steerer, "a plan for", remedy)


def plan(
    model: LanguageModel,
    contrast: Contrasts,
    method: str | Steerer = "innsteer",
    *,
    sites: Sequence[Site] = (),
    read: Read | None = None,
    span: Span = (0, None),
    seed: int = 0,
    measure: bool = True,
    progress: Progress = silent,
    **fields: Any,
) -> Plan:
    """What ``fit`` would take with the same arguments.

    Args:
        contrast, method, sites, read, span, seed, fields: as in ``fit``.
        measure: run a few passes to time them. Without, no pass but a small one is run, and answers
            that the model would have to give first count with their full length.

    Raises:
        InputError: what ``fit`` would refuse of these arguments and data.
    """
    steerer = get(method, **fields) if isinstance(method, str) else method
    require_plannable(steerer)
    contrasts = each(contrast)
    backend = Rehearsal(model, draw=measure)
    if steerer.through and (read is not None or span != (0, None)):
        raise InputError(f"a read rule for {steerer.name!r}", expected="none")
    if "jacobians" in steerer.needs:
        chain = linearised(backend, contrasts, sites, progress=progress)
        assert isinstance(chain, Chained)
        progress("rehearse", 0, 1)
        run = cast(Runner, chain)
        _, own = _rehearse(steerer, lambda one: one.fit_through(run, seed=seed), backend.tally)
        rows, tally = chain.rows(), backend.tally
        largest = tally.largest["record"] * _weigh(model, chain.sites).block
        memory = {"kept": 0, "pass": largest}
        seconds = chain.seconds() if measure else {}
    elif steerer.through:
        started = time.perf_counter()
        run = through(backend, contrasts, sites, reworded=steerer.rewords, progress=progress)
        assert isinstance(run, Rehearsed)
        drawn = time.perf_counter() - started
        progress("rehearse", 0, 1)
        maps, own = _rehearse(steerer, lambda one: one.fit_through(run, seed=seed), backend.tally)
        rows, tally = run.rows(), backend.tally
        memory = run.memory(_weigh(model, run.sites), tally)
        seconds = {"reference": drawn} | _timed_through(backend, maps, progress) if measure else {}
    else:
        sites = sites or own_sites(backend.model, steerer)
        rows = record_parts(backend, contrasts, sites, read=read, span=span, progress=progress)
        progress("rehearse", 0, 1)
        _, own = _rehearse(steerer, lambda one: one.fit(rows, seed=seed), backend.tally)
        tally = backend.tally
        small = _weigh(model, rows.sites)
        memory = {"kept": 0, "pass": tally.largest["record"] * small.block}
        seconds = {"record": backend.seconds(progress)} if measure else {}
    parts = [one for each_one in contrasts for one in each_one.items if one.split != "test"]
    texts = [(item, side) for item in parts for side in ("source", "target")]
    held = sum(part.nbytes for part in (*rows.values.values(), *rows.context.values()))
    weights = {id(t): t for t in (*model.model.parameters(), *model.model.buffers())}
    return Plan(
        items=len(parts),
        tokens=sum(
            len(backend._encode_side(item, side).ids)
            for item, side in texts
            if getattr(item, side) is not None
        ),
        rows=len(rows),
        forward=tally.passes.total() - tally.passes["backward"],
        backward=tally.passes["backward"],
        memory={"model": sum(t.nbytes for t in weights.values()), "rows": held, **memory},
        disk=held,
        seconds={name: round(value, 3) for name, value in (seconds | {"fit": own}).items()}
        if measure
        else {},
    )


# --- rehearsing ----------------------------------------------------------------------------------


class Tally:
    """Passes by kind, their tokens with padding, and how large the largest of them was."""

    def __init__(self) -> None:
        self.passes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.live = 0
        self.closed = False

    def add(self, kind: str, tokens: int, passes: int = 1) -> None:
        """Count passes of so many tokens together."""
        if not self.closed:
            self.passes[kind] += passes
            self.tokens[kind] += tokens
            self.largest[kind] = max(self.largest[kind], tokens)

    def hold(self, tokens: int) -> None:
        """Tokens whose graph waits for its backward; negative: it is done."""
        self.live += tokens
        self.largest["live"] = max(self.largest["live"], self.live)


class Rehearsed(Through):
    """A run through the model whose passes are counted, and whose losses fall at every look.

    A loss that never stops falling ends no training early, so that what is counted is the most.
    """

    _backend: "Rehearsal"

    def __init__(
        self,
        backend: "Rehearsal",
        contrasts: Sequence[Contrast],
        sites: Sequence[Site],
        unmoved: Sequence[Reference] = (),
        **how: Any,
    ) -> None:
        backend.given = contrasts, sites, unmoved
        super().__init__(backend, contrasts, sites, unmoved, **how)

    def _keep_prefixes(self, progress: Progress) -> None:
        tally = self._backend.tally
        if self._shared:
            tally.add("prefixes", self._shared)
        for index in self._prefix_parts(silent):
            longest = max(len(self._sequences[i].ids) - self._shared for i in index)
            tally.add("prefixes", len(index) * longest)
            for i in index:
                self._before[i] = {site: self._noise(site) for site in self.sites}

    def _noise(self, site: Site, *rows: int) -> Tensor:
        return torch.randn(*rows, self._model.layout.width_of(site))

    def answers(
        self,
        interventions: Interventions | None,
        items: Sequence[int],
        coef: Sequence[float] | Tensor,
        *,
        only: Sequence[int] | None = None,
    ) -> Answers:
        """What is steered for gets likelier from call to call, whichever way."""
        found = super().answers(interventions, items, coef, only=only)
        way = torch.tensor([sum(row) for row in self._coef_rows(items, coef)]).sign()
        gain = 1e-6 * self._backend.tally.passes.total() * way
        return Answers(found.target + gain, found.source - gain)

    def _run(
        self,
        numbers: Sequence[int],
        interventions: Interventions | None,
        coef: Tensor,
        *,
        leaf: bool = False,
    ) -> Tensor:
        """Logits over a vocabulary of one, which hang on whatever is being trained."""
        batch, after = len(numbers), max(map(self._length, numbers))
        tally, logits = self._backend.tally, torch.zeros(batch, after, 1)
        if torch.is_grad_enabled() and interventions is not None and bool((coef != 0).any()):
            for parameter in interventions.parameters():
                if parameter.requires_grad:
                    logits = logits + 0 * parameter.sum()
        if logits.requires_grad:
            tally.hold(batch * after)
            logits.register_hook(lambda _: self._backward(batch * after))  # type: ignore[no-untyped-call]
        tally.add("trained" if logits.requires_grad else "steered", batch * after)
        return logits

    def _backward(self, tokens: int) -> None:
        self._backend.tally.add("backward", tokens)
        self._backend.tally.hold(-tokens)

    def _read(
        self, logits: Tensor, reads: Sequence[tuple[int, int, tuple[int, ...], int]], slots: int
    ) -> Tensor:
        return torch.full((slots,), -1.0) + logits.sum()

    def _gradients(
        self, part: Sequence[int], interventions: Interventions | None, said: bool
    ) -> dict[str, Tensor]:
        numbers = [number for item in part for number in self._own(item)]
        tokens = len(numbers) * max(map(self._length, numbers))
        self._backend.tally.add("trained", tokens)
        self._backend.tally.hold(tokens)
        self._backward(tokens)
        kinds = ("row", "grad")
        return {f"{k} {s}": self._noise(s, len(part)) for s in self.sites for k in kinds}

    def _still_rows(self, interventions: Interventions | None) -> dict[Site, list[Tensor]]:
        numbers = [*self._bare(), *self._restated()]
        for part in self._parts(numbers):
            self._run([numbers[place] for place in part], None, torch.zeros(1))
        return {site: list(self._noise(site, len(numbers), 1)) for site in self.sites}

    def memory(self, small: "Weights", tally: Tally) -> dict[str, int]:
        """Bytes that are kept between passes, and those of the largest moment among them."""
        spans = [(s.start - self._shared, len(s.ids) - s.start) for s in self._sequences]
        kept = sum(before * small.upper + after * small.row for before, after in spans)
        kept += len(spans) * len(self.sites) * small.row
        kept += sum(map(self._length, set(self.unmoved))) * small.logits
        prefixes = tally.largest["prefixes"] * (small.block + small.cache + small.upper)
        steered = tally.largest["live"] * (small.graph + small.logits)
        # While one pass is scored: its exponentials, and the gradient of both on the way back.
        steered += max(tally.largest["steered"], tally.largest["trained"]) * 3 * small.logits
        return {"kept": kept, "pass": max(prefixes, steered)}


class Chained(local.Local):
    """A chain whose passes are counted, and whose rows and Jacobians are noise."""

    _backend: "Rehearsal"
    _batch: Sequence[local.Read] = ()
    _looked: Sequence[local.Read] = ()
    _rows_looked = 0

    def _inputs(
        self,
        texts: Sequence[local.Read],
        interventions: Interventions | None,
        coef: Sequence[float] | None,
        where: Where = Where(),  # noqa: B008
        *,
        steered: bool = False,
    ) -> dict[str, Tensor]:
        self._batch = texts
        self._backend.tally.add("record", _tokens(texts))
        width = self._model.layout.width
        return {str(site): torch.randn(len(texts), width) for site in self.sites}

    def _made(
        self, texts: Sequence[local.Read], blocks: Sequence[int], rank: int, seed: int
    ) -> dict[str, Tensor]:
        width, looks = self._model.layout.width, 2 if rank else 1
        # What precedes the last token, and that token; a low rank looks from both sides.
        passes = 2 * looks * -(-len(texts) // local.PROMPTS)
        self._backend.tally.add("prefixes", looks * _tokens(texts), passes)
        rows = 2 * (rank + local.OVERSAMPLING) if rank else width
        self._looked, self._rows_looked = texts, self._rows_looked + rows * len(blocks)
        if not rank:
            return {str(n): torch.eye(width) for n in blocks}
        parts: dict[str, tuple[int, ...]]
        parts = {"left": (width, rank), "right": (rank, width), "error": ()}
        return {f"{n}.{name}": torch.zeros(size) for n in blocks for name, size in parts.items()}

    def seconds(self) -> dict[str, float]:
        """How long rows and Jacobians take, by a batch of texts and by one block of some texts."""
        tokens = self._backend.tally.tokens["record"]
        started = time.perf_counter()
        super()._inputs(self._batch, None, None)
        record = (time.perf_counter() - started) / _tokens(self._batch) * tokens
        if not self._looked:
            return {"record": record}
        few, block = self._looked[: local.PROMPTS], self.sites[0].layer
        local.mean_jacobians(self._backend, few, [block])  # the first is slower
        started = time.perf_counter()
        local.mean_jacobians(self._backend, few, [block])
        each = (time.perf_counter() - started) / len(few) / self._model.layout.width
        return {"record": record, "jacobians": each * self._rows_looked * len(self._looked)}


def _tokens(texts: Sequence[local.Read]) -> int:
    """Tokens of a batch of texts, with padding."""
    return len(texts) * max(len(text.ids) for text in texts)


class Rehearsal(HF):
    """An engine that counts the passes it would run, and hands on noise of the right shape.

    Args:
        draw: let the model say what a fit through it keeps of the model's own answers, because
            their lengths decide about batches; otherwise they have their full length.
    """

    runner = Rehearsed
    chain = Chained

    def __init__(self, model: LanguageModel, *, draw: bool) -> None:
        super().__init__(model)
        self.tally, self._draw = Tally(), draw
        self.given: tuple[Sequence[Contrast], Sequence[Site], Sequence[Reference]] = ((), (), ())
        self._asked: list[tuple[Tensor, Tensor, Sequence[Site]]] = []

    def _pass(
        self,
        ids: Tensor,
        mask: Tensor,
        sites: Sequence[Site],
        seen: dict[Site, Tensor],
        cache: DynamicCache | None = None,
    ) -> None:
        self.tally.add("record", ids.numel())
        # Timed alone: what came before is few tokens, and looked at, not computed.
        self._asked.append((ids, mask[:, mask.shape[1] - ids.shape[1] :], sites))
        for site in sites:
            noise = torch.randn(len(ids), 1, self.model.layout.width_of(site))
            seen[site] = noise.expand(-1, ids.shape[1], -1)

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int
    ) -> list[list[int]]:
        answers = [[self._pad_id] * sampling.new_tokens for _ in prompts]
        if self._draw:
            answers = super()._decode(prompts, sampling, number)
        steps = max(map(len, answers))
        self.tally.add("reference", sum(map(len, answers)), steps)
        return answers

    def seconds(self, progress: Progress) -> float:
        """How long all recording passes take, by three of them: a small, middling and large one."""
        asked = sorted(self._asked, key=lambda one: one[0].numel())
        last = len(asked) - 1
        timed, tokens = 0.0, 0
        chosen = sorted({0, last // 2, last})
        for number, place in enumerate([chosen[0], *chosen]):  # the first once more, to warm up
            progress("measure", number, len(chosen) + 1)
            ids, mask, sites = asked[place]
            with torch.inference_mode(), ExitStack() as stack:
                seen = self._capture(stack, sites)
                started = time.perf_counter()
                super()._pass(ids, mask, sites, seen)
                _settle(self.model)
            if number:
                timed, tokens = timed + time.perf_counter() - started, tokens + ids.numel()
        return timed / tokens * self.tally.tokens["record"]


def _rehearse(
    steerer: Steerer, fit: Callable[[Steerer], Interventions], tally: Tally
) -> tuple[Interventions, float]:
    """Fit on noise: what comes of it, and the seconds of the method itself, all epochs counted."""
    epochs = getattr(steerer, "epochs", None)
    if epochs is None or epochs <= EPOCHS[-1]:
        return _timed(lambda: fit(steerer))
    few, more = (replace(steerer, epochs=count) for count in EPOCHS)  # type: ignore[type-var]
    maps = fit(few)  # the first is slower than all that follow
    tally.closed = True  # the passes are the same, and counted
    (_, short), (_, longer) = (_timed(partial(fit, one)) for one in (few, more))
    each_epoch = max(longer - short, 0.0) / (EPOCHS[1] - EPOCHS[0])
    return maps, short + each_epoch * (epochs - EPOCHS[0])


def _timed(work: Callable[[], Interventions]) -> tuple[Interventions, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


# --- measuring -----------------------------------------------------------------------------------


def _timed_through(backend: Rehearsal, maps: Interventions, progress: Progress) -> dict[str, float]:
    """Seconds of the passes of a fit through the model, by those of a few of its items.

    The same few are rehearsed too, to count the tokens that the measured seconds belong to.
    """
    contrasts, sites, unmoved = backend.given
    tokens = backend.tally.tokens
    every = max(round(tokens["prefixes"] / SAMPLE), 1)
    few = [
        replace(one, items=tuple(sorted(one.items, key=lambda i: len(i.target or ""))[::every]))
        for one in contrasts
    ]
    some = [reference.part(PROBE) for reference in unmoved]
    twin = Rehearsal(backend.model, draw=False)

    def clocked(
        real: Callable[[], Any], rehearsed: Callable[[], Any]
    ) -> tuple[float, Counter[str]]:
        """Seconds of an act, and the tokens of the same act rehearsed."""
        progress("measure", len(rates), 3)
        before, started = twin.tally.tokens.copy(), time.perf_counter()
        real()
        _settle(backend.model)
        spent = time.perf_counter() - started
        rehearsed()
        return spent, twin.tally.tokens - before

    rates: dict[str, float] = {}
    runs: list[Through] = []

    def start(engine: HF) -> None:
        runs.append(engine.runner(engine, few, sites, some))

    spent, took = clocked(partial(start, HF(backend.model)), partial(start, twin))
    rates["prefixes"] = spent / took["prefixes"]
    asked = [*runs[0].items("train"), *runs[0].items("validation")]
    with torch.no_grad():
        spent, took = clocked(
            *(lambda run=run: run.answers(maps, asked, [1.0] * len(asked)) for run in runs)
        )
    rates["steered"] = spent / took["steered"]
    spent, took = clocked(*(run.rows for run in runs))
    rates["trained"] = max(spent - took["steered"] * rates["steered"], 0.0) / took["trained"]
    return {kind: rate * tokens[kind] for kind, rate in rates.items()}


class Weights(NamedTuple):
    """Bytes per token.

    ``block``: of everything that the busiest block makes. ``graph``: kept for a backward from the
    logits to the lowest site. ``cache`` and ``upper``: keys and values of all blocks, and of those
    above that site. ``row``: of a hidden state. ``logits``: of log-probabilities, in float32.
    """

    block: int
    graph: int
    cache: int
    upper: int
    row: int
    logits: int


def _weigh(model: LanguageModel, sites: Sequence[Site]) -> Weights:
    """The shapes of one small pass."""
    blocks, cut = model.layout.blocks, max(cut_of(sites), 0)
    known = {weight.data_ptr() for weight in model.model.parameters()}
    made, saved = Counter[int](), dict[int, int]()
    cache = DynamicCache()

    def start(_: Any, __: Any, output: Any) -> Any:
        """The graph begins at the lowest site."""
        whole = output if isinstance(output, tuple) else (output,)
        whole = (whole[0].detach().requires_grad_(), *whole[1:])
        return whole if isinstance(output, tuple) else whole[0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack:
        stack.callback(blocks[cut].module.register_forward_hook(start).remove)
        for number, block in enumerate(blocks):
            for leaf in block.module.modules():
                if not any(leaf.children()):
                    add = partial(_add_bytes, made, number)
                    stack.callback(leaf.register_forward_hook(add).remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        ids = torch.arange(PROBE, device=model.device)[None]
        out = model.model(ids, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    each_block = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
    return Weights(
        block=max(made.values()) // PROBE,
        graph=sum(saved.values()) // PROBE,
        cache=sum(each_block) // PROBE,
        upper=sum(each_block[cut + 1 :]) // PROBE,
        row=model.layout.width * out.logits.element_size(),
        logits=out.logits.shape[-1] * 4,
    )


def _add_bytes(made: Counter[int], block: int, _: Any, __: Any, output: Any) -> None:
    """Add what a module made to its block's bytes."""
    for part in output if isinstance(output, tuple) else (output,):
        made[block] += part.nbytes if isinstance(part, Tensor) else 0


def _settle(model: LanguageModel) -> None:
    """Wait for a device that works on its own."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

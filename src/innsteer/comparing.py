"""Compare methods: every one fitted, dosed and tested alike, cell by cell, on several tasks."""

import dataclasses
import hashlib
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from innsteer import __version__, metrics, shelf
from innsteer.activations import Activations
from innsteer.backends.base import Completion, Progress, Sampling, silent
from innsteer.backends.hf import HF, Meter
from innsteer.backends.local import Local
from innsteer.backends.lora import LoRA, LoRATraining
from innsteer.backends.through import Through
from innsteer.calibration import BUDGET
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError, InputError, UnknownName
from innsteer.evaluation import Arm, require_scorer
from innsteer.figures import PLAIN, PROMPT_ONLY, RANDOM
from innsteer.files import canonical, read_json, write_json
from innsteer.fitting import (
    fit_rows,
    fit_run,
    linearised,
    own_sites,
    record_parts,
    through,
)
from innsteer.interventions import Edit, Shift
from innsteer.metrics.base import Score
from innsteer.models import LanguageModel
from innsteer.planning import Peak
from innsteer.site import Site
from innsteer.standings import HALVES, Half
from innsteer.steerer import Interventions, Steerer, get, side_means
from innsteer.suites import behaviour as suites
from innsteer.suites.base import Benchmark, answered
from innsteer.tuning import control, control_meter, control_metric, within

SHUFFLED, LORA = "shuffled-labels", "lora"
Input = Literal["classes", "target", "model", ""]
MOST = 64.0
"""No larger strength is tried."""


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method with its fields, and what it is fitted on.

    Attributes:
        method: of the shelf; or one of ``unsteered``, ``prompt-only``, ``random-direction``,
            ``shuffled-labels`` (DiffMean whose pairs are swapped at random) and ``lora``.
        input: ``classes`` (recorded rows, as published), ``target`` (rows that seek the target),
            ``model`` (a fit through it); columns that no ranking mixes.
        fields: of the method; of ``LoRATraining``.
        alone: at one layer, where the method has a rule of its own among all of them.
    """

    method: str
    input: Input = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False

    @classmethod
    def of(
        cls,
        method: str,
        input: str = "",  # noqa: A002
        *,
        alone: bool = False,
        **fields: Any,
    ) -> "Contender":
        """A contender whose fields are valid and whose input suits it; default: as published.

        Raises:
            UnknownName: no such method or field. InputError: an input that it cannot take.
        """
        if method in (*PLAIN, RANDOM, SHUFFLED):
            if input or fields or alone:
                raise InputError(f"{method!r} with an input or fields", expected="neither")
            return cls(method)
        if method == LORA:
            known = [one.name for one in dataclasses.fields(LoRATraining)]
            for name in fields:
                if name not in known:
                    raise UnknownName("field of a LoRA:", name, known)
            if input not in ("", "model") or alone:
                raise InputError("a LoRA on rows or at one layer", expected="input 'model'")
            LoRATraining(**fields)
            return cls(method, "model", fields)
        steerer = get(method, **fields)
        if alone and steerer.sites == "any":
            raise InputError(
                f"{method!r} at one layer", expected="a method with a rule of its own among layers"
            )
        usual = inputs(steerer)
        chosen = input or usual[0]
        if chosen not in usual:
            raise InputError(
                f"input {chosen!r} for {method!r}", expected=" or ".join(map(repr, usual))
            )
        return cls(method, chosen, fields, alone)

    @property
    def name(self) -> str:
        """What tables call it.

        >>> Contender.of("ridge", "target", grid=[1.0]).name
        'ridge grid=[1.0] on target'
        """
        own = [f"{key}={value}" for key, value in self.fields.items()]
        name = " ".join([self.method, *own]) + (" on target" if self.input == "target" else "")
        return name + (" at one layer" if self.alone else "")

    @property
    def dialled(self) -> bool:
        """Whether it has a strength."""
        return self.method not in PLAIN

    @cached_property
    def steerer(self) -> Steerer:
        """The method; DiffMean for shuffled labels and (never fitted) the random direction.

        A LoRA and the plain arms have none.
        """
        controls = (RANDOM, SHUFFLED)
        return get("diffmean" if self.method in controls else self.method, **self.fields)

    @property
    def settings(self) -> dict[str, Any]:
        """Every field of what is fitted, defaults too."""
        if not self.dialled:
            return {}
        return vars(LoRATraining(**self.fields) if self.method == LORA else self.steerer)


def inputs(steerer: Steerer) -> tuple[Input, ...]:
    """What a method can be fitted on, as published first.

    Raises:
        InputError: it learns from concepts in words, which no task of a comparison has.
    """
    if "concepts" in steerer.needs:
        raise InputError(
            f"{steerer.name!r} among contenders",
            expected="methods that are fitted on contrasts",
            remedy="compare its responses with innsteer generate --concept",
        )
    if steerer.through:
        return ("model",)
    if steerer.sites == "heads":
        return ("classes",)  # what seeks the target is made at the outputs of blocks
    return ("target",) if "unmoved" in steerer.needs else ("classes", "target")


def always() -> list[Contender]:
    """The arms that stand in every table; prompt-only where an instruction is known."""
    return [Contender(name) for name in (*PLAIN, RANDOM, SHUFFLED)]


def contenders(tasks: Sequence[Contrast]) -> list[Contender]:
    """Every method of the shelf on every input that it takes; one with a rule among layers twice.

    Methods that learn from concepts in words are left out: a task has none. Rows that seek the
    target are taken where all tasks are choices, a LoRA where peft is installed.
    """
    found: list[Contender] = []
    choices = all(task.kind == "choice" for task in tasks)
    for name in shelf.names():
        if "concepts" in get(name).needs:
            continue  # it learns from another kind of table
        found += [
            Contender.of(name, one) for one in inputs(get(name)) if choices or one != "target"
        ]
        if get(name).sites != "any":
            found.append(Contender.of(name, alone=True))
    if choices:
        found.append(Contender.of("innsteer", objective="target"))
    if find_spec("peft"):
        found.append(Contender.of(LORA))
    return found


@dataclass(frozen=True)
class Protocol:
    """What every contender gets, alike.

    Attributes:
        layers: whose outputs are candidates; default: a third, a half, two thirds, five sixths up.
        budget: nats per token. evaluations: of control and cost on validation, per cell: layers by
            successive halving, then strength. items: of validation per evaluation.
        search_tokens: response tokens of neutral prompts per evaluation; the last check and the
            test take all neutral prompts of their part.
        answers: sampled per cell and budget, for what is said.
    """

    layers: tuple[int, ...]
    budget: float = BUDGET
    evaluations: int = 24
    items: int = 48
    search_tokens: int = 300
    answers: int = 60

    def __post_init__(self) -> None:
        rounds = max(len(self.layers) - 1, 0).bit_length() + 1
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers {self.layers}", expected="at least one, all distinct")
        if self.evaluations < rounds * len(self.layers):
            raise InputError(
                f"{self.evaluations} evaluations for {len(self.layers)} layers",
                expected=f"at least {rounds * len(self.layers)}: one per layer and round",
            )
        if not 0 < self.budget < math.inf:
            raise InputError(f"budget {self.budget}", expected="nats per token, above 0")

    @classmethod
    def of(cls, model: LanguageModel, **how: Any) -> "Protocol":
        """The default for a model."""
        depth = len(model.layout.blocks)
        usual = {max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)}
        return cls(**{"layers": tuple(sorted(usual)), **how})


class Evaluation(NamedTuple):
    """Control and both halves of the cost of one map at one strength, on validation.

    A LoRA has no layer.
    """

    layer: int | None
    strength: float
    control: float
    neutral: float
    in_format: float

    def cost(self, half: Half) -> float:
        """What the budget binds, nats."""
        return self.neutral if half == "neutral" else max(self.neutral, self.in_format)


class Search:
    """The strengths of one fitted map, evaluation by evaluation.

    First the largest strength within the budget, by the law that cost grows with the square of a
    small strength, within a bracket; then below it, because more strength is not always more
    control.
    """

    def __init__(self, evaluate: Callable[[float], Evaluation], budget: float) -> None:
        self.tried: dict[float, Evaluation] = {}
        self._evaluate, self._budget = evaluate, budget

    def step(self, half: Half) -> None:
        """One evaluation, where it tells most about this half's budget."""
        strength = self.following(half)
        self.tried[strength] = self._evaluate(strength)

    def following(self, half: Half) -> float:
        """The strength to evaluate next."""
        if not self.tried:
            return 1.0
        costs = {strength: found.cost(half) for strength, found in self.tried.items()}
        inside = [strength for strength, cost in costs.items() if cost <= self._budget]
        high = min((s for s, cost in costs.items() if cost > self._budget), default=math.inf)
        low = max((s for s in inside if s < high), default=0.0)
        spent = costs[low] >= 0.9 * self._budget if low else False
        if spent or low >= MOST or high < 1.05 * low:
            return self._below(low)
        near = low or high
        guess = near * math.sqrt(0.97 * self._budget / costs[near]) if costs[near] else 10 * near
        guess = min(max(guess, near / 10), near * 10, MOST)
        if low < guess < high:
            return guess
        return (low + high) / 2 if low else high / 4

    def _below(self, limit: float) -> float:
        """The middle of the widest gap that is left under the limit, in fractions of it."""
        marks = sorted({0.0, limit, *(s for s in self.tried if s < limit)})
        before, after = max(pairwise(marks), key=lambda gap: gap[1] - gap[0])
        return (before + after) / 2

    def best(self, half: Half) -> Evaluation | None:
        """The most control within the budget; None where nothing was within it."""
        inside = [e for e in self.tried.values() if e.cost(half) <= self._budget]
        return max(inside, key=lambda e: (e.control, -e.strength), default=None)


class Cell(NamedTuple):
    """One contender on one task with one seed."""

    contender: Contender
    task: Contrast
    seed: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.task.behaviour}: {self.contender.name}, seed {self.seed}"


class Comparison:
    """Cells on disk: what was measured stays, what is missing can be run.

    Args:
        model: the plain model. tasks: a contrast each, with distinct behaviours.
        contenders: rows of the table, distinct. folder: of the cells; it is made, or continued.
        seeds: of the fits. instructions: of the prompt-only arm, by behaviour.

    Raises:
        InputError: no task or contender, or two of one name.
    """

    def __init__(
        self,
        model: LanguageModel | HF,
        tasks: Sequence[Contrast],
        folder: str | Path,
        *,
        contenders: Sequence[Contender],
        protocol: Protocol | None = None,
        seeds: Sequence[int] = (0,),
        instructions: Mapping[str, str] = {},
    ) -> None:
        for kind, named in (
            ("task", [task.behaviour for task in tasks]),
            ("contender", [one.name for one in contenders]),
            ("seed", list(map(str, seeds))),
        ):
            if not named or len(set(named)) < len(named):
                raise InputError(
                    f"{kind}s without distinct names: {', '.join(named) or 'none'}",
                    expected=f"at least one {kind}, all distinct",
                )
        self.backend = HF.of(model)
        self.tasks, self.contenders, self.seeds = tuple(tasks), tuple(contenders), tuple(seeds)
        if unknown := instructions.keys() - {task.behaviour for task in tasks}:
            raise UnknownName("behaviour", min(unknown), [task.behaviour for task in tasks])
        self.instructions = {
            task.behaviour: instructions.get(task.behaviour)
            or suites.meta(task).get("instruction", "")
            for task in tasks
        }
        self.protocol = protocol or Protocol.of(self.backend.model)
        self.folder = Path(folder)

    def cells(self) -> list[Cell]:
        """Every cell, in the order in which they run: seeds, tasks, contenders.

        What does not depend on a seed runs for the first one only.
        """
        return [
            Cell(contender, task, seed)
            for seed in self.seeds
            for task in self.tasks
            for contender in self.contenders
            if contender.dialled or seed == self.seeds[0]
            if contender.method != PROMPT_ONLY or self.instructions[task.behaviour]
        ]

    def path(self, cell: Cell) -> Path:
        """The file of a cell: named by all that decides its result."""
        contender, model = cell.contender, self.backend.model
        given = [contender.method, contender.input, contender.settings, contender.alone]
        key = {
            "contender": given,
            "task": [cell.task.behaviour, cell.task.hash],
            "seed": cell.seed,
            "model": [replace(model.fingerprint, name=""), str(model.model.dtype)],
            "protocol": asdict(self.protocol),
        }
        if contender.method == PROMPT_ONLY:
            key["instruction"] = self.instructions[cell.task.behaviour]
        if isinstance(cell.task, Benchmark):
            key["benchmark"] = cell.task.extra()
        digest = hashlib.sha256(canonical(json.loads(json.dumps(key, default=str)))).hexdigest()
        return self.folder / "cells" / f"{digest[:24]}.json"

    def left(self) -> list[Cell]:
        """Cells that are not measured yet."""
        return [cell for cell in self.cells() if not self.path(cell).is_file()]

    def left_out(self) -> list[str]:
        """Cells that are not measured, in words: how many of each contender."""
        counts = Counter(cell.contender.name for cell in self.left())
        return [f"{name} on {count} of its cells" for name, count in counts.items()]

    def found(self) -> list[dict[str, Any]]:
        """Records of the cells that are measured."""
        paths = map(self.path, self.cells())
        return [read_json(path, "a cell") for path in paths if path.is_file()]

    def plan(self) -> dict[str, Any]:
        """What is left to do, and about how long it takes here by the cells that were measured.

        Without one of the same contender, the mean of all stands for it; without any, None.
        """
        left, took = self.left(), dict[str, list[float]]()
        for record in self.found():
            took.setdefault(record["contender"], []).append(record["seconds"])
        means = {name: float(np.mean(values)) for name, values in took.items()}
        usual = float(np.mean(list(means.values()))) if means else None
        per = [means.get(cell.contender.name, usual) for cell in left]
        return {
            "cells": len(self.cells()),
            "left": len(left),
            "evaluations": self.protocol.evaluations * sum(c.contender.dialled for c in left),
            "seconds": None if usual is None else sum(x for x in per if x is not None),
        }

    def context(self) -> dict[str, Any]:
        """What the figures hold for."""
        protocol = {name: str(value) for name, value in asdict(self.protocol).items()}
        return {
            "model": self.backend.model.name,
            "tasks": ", ".join(task.behaviour for task in self.tasks),
            "seeds": ", ".join(map(str, self.seeds)),
            **protocol,
            "innsteer": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }

    def run(self, *, jobs: int = 1, progress: Progress = silent) -> None:
        """Measure every cell that is missing, each written when it ends.

        A method that refuses, or that no strength brings within the budget, leaves a cell that says
        so. Interrupted, the same call goes on.

        Args:
            jobs: processes that share the cells, task by task, and the model's weights on the CPU;
                each has its part of the threads. What they time, they time on a busy machine.

        Raises:
            InputError: jobs below 1. MissingPackage: the scorer of a behaviour needs one.
        """
        if jobs < 1:
            raise InputError(f"{jobs} jobs", expected="at least 1")
        cells = self.cells()
        paths = {n: self.path(cell) for n, cell in enumerate(cells)}
        left = [n for n, path in paths.items() if not path.is_file()]
        if jobs == 1 or len(left) < 2:
            self._measure([cells[n] for n in left], progress)
            return
        context = torch.multiprocessing.get_context("spawn")
        stop = context.Event()
        threads = max(torch.get_num_threads() // jobs, 1)
        with ProcessPoolExecutor(
            jobs,
            mp_context=context,
            initializer=_begin,
            initargs=(self, threads, stop),
        ) as pool:
            at_work = [pool.submit(_share, numbers) for numbers in self._shares(left, jobs)]
            try:
                ended, waiting = set[Future[None]](), set(at_work)
                while waiting:
                    progress("cells", sum(paths[n].is_file() for n in left), len(left))
                    ended, waiting = wait(waiting, timeout=1, return_when=FIRST_EXCEPTION)
                    for one in ended:
                        one.result()
            except BaseException:
                stop.set()  # after the cell that each is at
                pool.shutdown(cancel_futures=True)
                raise
        progress("cells", len(left), len(left))

    def _shares(self, left: Sequence[int], jobs: int) -> list[list[int]]:
        """Numbers of cells, each list for one process to measure one after the other.

        Cells of one task share what is unsteered: they part only where processes would be idle.
        """
        cells, groups = self.cells(), dict[tuple[int, str], list[int]]()
        for number in left:
            cell = cells[number]
            groups.setdefault((cell.seed, cell.task.behaviour), []).append(number)
        parts = -(-jobs // len(groups))
        return [share for own in groups.values() for n in range(parts) if (share := own[n::parts])]

    def _measure(
        self,
        cells: Sequence[Cell],
        progress: Progress = silent,
        neutral: dict[Any, Meter] | None = None,
    ) -> None:
        """Measure cells in their order; ``neutral`` keeps meters that all tasks share."""
        task, neutral = None, {} if neutral is None else neutral
        for number, cell in enumerate(cells):
            progress(cell.title, number, len(cells))
            if task is None or task.contrast is not cell.task:
                instruction = self.instructions[cell.task.behaviour]
                task = _Task(self.backend, cell.task, self.protocol, instruction, neutral)
            started = time.perf_counter()
            try:
                found = task.measure(cell)
            except (BudgetError, InputError) as error:
                found = {"failed": str(error)}
            record = {
                "contender": cell.contender.name,
                "method": cell.contender.method,
                "input": cell.contender.input,
                "fields": dict(cell.contender.fields),
                "task": cell.task.behaviour,
                "control": control_metric(cell.task),
                "measures": task.suite.measures,
                "seed": cell.seed,
                "innsteer": __version__,
                "seconds": time.perf_counter() - started,
                **found,
            }
            self.path(cell).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path(cell), _tidy(record))


_mine: list[tuple[Comparison, Any, dict[Any, Meter]]] = []
"""Of a process that shares a comparison's cells with others, what tells it to stop, and meters that
its tasks share."""


def _begin(comparison: Comparison, threads: int, stop: Any) -> None:
    torch.set_num_threads(threads)
    _mine.append((comparison, stop, {}))


def _share(numbers: Sequence[int]) -> None:
    comparison, stop, neutral = _mine[0]
    cells = comparison.cells()

    def heed(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    comparison._measure([cells[number] for number in numbers], heed, neutral)


def _tidy(value: Any) -> Any:
    """Numbers to six digits: a table's cells are many."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _tidy(part) for key, part in value.items()}
    return [_tidy(part) for part in value] if isinstance(value, list | tuple) else value


# --- one task ------------------------------------------------------------------------------------


class _Task:
    """One task, and what its cells share: rows, runs, meters of what is unsteered."""

    def __init__(
        self,
        backend: HF,
        contrast: Contrast,
        protocol: Protocol,
        instruction: str,
        neutral: dict[Any, Meter],
    ) -> None:
        self.backend, self.contrast, self.protocol = backend, contrast, protocol
        self.sites = tuple(Site(layer) for layer in sorted(protocol.layers))
        for site in self.sites:
            backend.model.layout.at(site)
        self.suite = suites.load(contrast, instruction=instruction)
        for name in (self.suite.control, *self.suite.measures):
            require_scorer(name)
        held = contrast.part("validation")
        self._held = held.subset(min(len(held), protocol.items), 0)
        self._meters: dict[Any, Meter] = {}
        self._neutral = neutral  # those that all tasks share
        self._rows: dict[tuple[Input, tuple[Site, ...]], tuple[Activations, float]] = {}
        self._runs: dict[tuple[tuple[Site, ...], bool], tuple[Through, float]] = {}
        self._chains: dict[tuple[Site, ...], tuple[Local, float]] = {}

    # What is unsteered, kept ------------------------------------------------------------------

    def _acts(self, input: Input, sites: tuple[Site, ...]) -> tuple[Activations, float]:  # noqa: A002
        """Rows recorded (or made to seek the target) once, and the seconds that took.

        The candidates' come from one pass.
        """
        every = self.sites if set(sites) <= set(self.sites) else sites
        if (input, every) not in self._rows:
            started = time.perf_counter()
            acts = (
                through(self.backend, self.contrast, every).rows()
                if input == "target"
                else record_parts(self.backend, self.contrast, every)
            )
            self._rows[input, every] = acts, time.perf_counter() - started
        acts, seconds = self._rows[input, every]
        return acts.at(*sites), seconds

    def _run(self, sites: tuple[Site, ...], reworded: bool = False) -> tuple[Through, float]:
        """The model as a fit through it sees it, its prefixes run once, and the seconds of that."""
        if (sites, reworded) not in self._runs:
            started = time.perf_counter()
            run = through(self.backend, self.contrast, sites, reworded=reworded)
            self._runs[sites, reworded] = run, time.perf_counter() - started
        return self._runs[sites, reworded]

    def _chain(self, sites: tuple[Site, ...]) -> tuple[Local, float]:
        """The model as a chain of linear blocks, and the seconds of its rows."""
        if sites not in self._chains:
            started = time.perf_counter()
            chain = linearised(self.backend, self.contrast, sites)
            chain.rows()
            self._chains[sites] = chain, time.perf_counter() - started
        return self._chains[sites]

    def _meter(self, name: str) -> Meter:
        """A meter by its name, for edits anywhere; most is kept for those at candidate layers."""
        meters, key = self._meters, (name, self.suite.neutral_tokens)
        if name.startswith(("check", "search")):
            meters = self._neutral
        if key not in meters:
            meters[key] = self._make(name)
        return meters[key]

    def _make(self, name: str) -> Meter:
        # A rule among all layers begins with block 0, of which little must be kept.
        sites = tuple(sorted({Site(0), *self.sites}))
        what, _, part = name.partition(" ")
        if what == "control":
            items = self._held if part == "validation" else self.contrast.part("test")
            return control_meter(self.backend, items, sites)
        if what == "in_format":
            prompts = suites.in_format(self.contrast, part)
            return self.backend.meter(self.backend.reference(prompts, None), sites)
        if what == "questions":
            forced = self.backend.forced([one.prompt for one in self.suite.questions])
            return self.backend.meter(forced, sites, divergence=False)
        # As tuning and evaluation draw them, so that their continuations are shared.
        sampling = Sampling(self.suite.neutral_tokens, 1.0, 0 if part == "validation" else 1)
        whole = self.backend.reference(suites.neutral(part), sampling)
        if what == "search":
            whole = whole.part(self.protocol.search_tokens)
        return self.backend.meter(whole, sites)

    @cached_property
    def _in_format(self) -> bool:
        return bool(suites.in_format(self.contrast, "validation"))

    @property
    def _halves(self) -> list[Half]:
        """Those that the task has a cost for; the last binds most."""
        return [half for half in HALVES if half == "neutral" or self._in_format]

    # A cell -----------------------------------------------------------------------------------

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything about one contender: fitted, dosed, tested."""
        if not cell.contender.dialled:
            return self._undialled(cell.contender)
        fits = {sites: self._fit(cell, sites) for sites in self._places(cell.contender)}
        try:
            return self._dosed(fits)
        finally:
            for one in fits.values():
                one.remove()

    def _dosed(self, fits: "Mapping[tuple[Site, ...], _Fit]") -> dict[str, Any]:
        """The fit of the sites that validation chose, at both budgets."""
        started = time.perf_counter()
        sites, search, evaluated = self._search({at: one.arm for at, one in fits.items()})
        fit = fits[sites]
        found: dict[str, Any] = {
            "layer": sites[0].layer if sites else None,
            "sites": [str(site) for site in fit.sites],
            "fits": len(fits),
            "fit_seconds": sum(one.seconds for one in fits.values()),
            "record_seconds": max(one.recording for one in fits.values()),
            "memory": max(one.peak.bytes or 0 for one in fits.values()) or None,
            "bytes": fit.size,
            "evaluations": [one._asdict() for one in evaluated],
            "tested": {},
            "unmet": {},
        }
        tested: dict[float, dict[str, Any]] = {}
        for half in self._halves:
            checks = {"neutral_cost": self._meter("check validation")}
            if half == "both":
                checks["in_format_cost"] = self._meter("in_format validation")
            try:
                if (best := search.best(half)) is None:
                    raise BudgetError(f"no strength tried is within {self.protocol.budget} nats")
                strength = within(
                    lambda s, checks=checks: max(  # type: ignore[misc]
                        _scored(name, fit.arm(s).measured(meter, metrics.get(name).kind)).high
                        for name, meter in checks.items()
                    ),
                    best.strength,
                    self.protocol.budget,
                )
            except BudgetError as error:
                found["unmet"][half] = str(error)
                continue
            if strength not in tested:
                tested[strength] = self._tested(fit.arm(strength))
            found["tested"][half] = tested[strength] | {"strength": strength}
        found["search_seconds"] = time.perf_counter() - started
        return found

    def _places(self, contender: Contender) -> list[tuple[Site, ...]]:
        """Where a contender is fitted: each candidate layer, or all sites of its own rule."""
        if contender.method == LORA:
            return [()]
        own = own_sites(self.backend.model, contender.steerer)
        if own and contender.alone:
            return [(own[site.layer],) for site in self.sites]
        return [own] if own else [(site,) for site in self.sites]

    def _fit(self, cell: Cell, sites: tuple[Site, ...]) -> "_Fit":
        contender = cell.contender
        if contender.method == LORA:
            run, seconds = self._run(self.sites[-1:])
            started = time.perf_counter()
            with Peak(self.backend.model.device) as peak:
                how = LoRATraining(**contender.fields)
                lora = how.fit(self.backend.model, run, seed=cell.seed)
            took = time.perf_counter() - started
            return _Fit(_scaled(lora), (), _size(lora.weights), took, seconds, peak, lora.remove)
        steerer = contender.steerer
        if "jacobians" in steerer.needs:
            chain, seconds = self._chain(sites)
            with Peak(self.backend.model.device) as peak:
                made = fit_run(self.backend, steerer, chain, self.contrast, seed=cell.seed)
        elif contender.input == "model" and ("model" in steerer.needs or steerer.rewords):
            run, seconds = self._run(sites, steerer.rewords)
            with Peak(self.backend.model.device) as peak:
                made = fit_run(self.backend, steerer, run, self.contrast, seed=cell.seed)
        else:
            # What needs no more of the model than gradients has them in its rows.
            rows: Input = "target" if contender.input == "model" else contender.input or "classes"
            acts, seconds = self._acts(rows, sites)
            if contender.method == SHUFFLED:
                acts = shuffled(acts, cell.seed)
            with Peak(self.backend.model.device) as peak:
                if contender.method == RANDOM:
                    maps = random_direction(acts, cell.seed)
                    return _Fit.of_maps(maps, 0.0, seconds, peak)
                made = fit_rows(self.backend, steerer, acts, seed=cell.seed)
        return _Fit.of_maps(made.interventions, made.provenance["fit_seconds"], seconds, peak)

    def _search(
        self, arms: "Mapping[tuple[Site, ...], ArmAt]"
    ) -> tuple[tuple[Site, ...], Search, list[Evaluation]]:
        """Where successive halving ends, the strengths there, and every evaluation."""
        half = self._halves[-1]
        budget, left = self.protocol.budget, self.protocol.evaluations
        evaluated: list[Evaluation] = []
        searches = {
            sites: Search(self._evaluate(sites, arm, evaluated), budget)
            for sites, arm in arms.items()
        }
        rounds = (len(searches) - 1).bit_length() + 1
        for n in range(rounds - 1):
            each = left // (rounds - n) // len(searches)
            for search in searches.values():
                for _ in range(each):
                    search.step(half)
            left -= each * len(searches)
            kept = sorted(
                searches,
                key=lambda at: best.control if (best := searches[at].best(half)) else -1.0,
                reverse=True,
            )[: -(-len(searches) // 2)]
            searches = {sites: searches[sites] for sites in sorted(kept)}
        ((sites, search),) = searches.items()
        for n in range(left):
            search.step(half if n % 2 == 0 else "neutral")
        return sites, search, evaluated

    def _evaluate(
        self, sites: tuple[Site, ...], arm: "ArmAt", evaluated: list[Evaluation]
    ) -> Callable[[float], Evaluation]:
        def evaluate(strength: float) -> Evaluation:
            one = arm(strength)
            said = control(one.measured(self._meter("control validation")), self._held)
            gain = _scored(control_metric(self._held), said).value
            made = one.measured(self._meter("search validation"))
            cost, bare = _scored("neutral_cost", made).value, 0.0
            if self._in_format:
                made = one.measured(self._meter("in_format validation"), "in_format")
                bare = _scored("in_format_cost", made).value
            found = Evaluation(sites[0].layer if sites else None, strength, gain, cost, bare)
            evaluated.append(found)
            return found

        return evaluate

    # The test ---------------------------------------------------------------------------------

    def _undialled(self, contender: Contender) -> dict[str, Any]:
        """The plain model, or the model asked to."""
        asked = self.suite.instruction if contender.method == PROMPT_ONLY else ""
        half = self._tested(Arm(contender.method, instruction=asked))
        return {"tested": dict.fromkeys(self._halves, half)}

    def _tested(self, arm: Arm) -> dict[str, Any]:
        """Figures of the test part: items by metric, costs, answers."""
        test = self.contrast.part("test")
        made = control(arm.measured(self._meter("control test")), test)
        made += arm.measured(self._meter("check test"))
        if self._in_format:
            made += arm.measured(self._meter("in_format test"), "in_format")
        if questions := self.suite.questions:
            made += answered(arm.measured(self._meter("questions")), questions)
        most, sampling = self.protocol.answers, self.suite.sampling
        started = time.perf_counter()
        answers = arm.answers(self.backend, self.suite.prompts[:most], sampling)
        seconds = time.perf_counter() - started
        asides = arm.answers(self.backend, self.suite.harmless[:most], sampling)
        made += [replace(answer, kind="aside") for answer in asides]
        keys = {item.id: item.key or "" for item in test.items}
        answers = [replace(one, key=keys.get(one.item, ""), strength=1.0) for one in answers]
        names = dict.fromkeys([control_metric(test), self.suite.control, *self.suite.measures])
        names |= dict.fromkeys(["answer_mass", "said_alignment"] if test.kind == "choice" else [])
        items = {
            name: {item: [list(m) for m in parts] for item, parts in found.items()}
            for name in names
            if (found := metrics.get(name).items([*made, *answers]))
        }
        costs = {
            name: list(score)
            for name in ("neutral_cost", "neutral_p99", "in_format_cost")
            if (score := metrics.get(name).score(made)) is not None
        }
        return {
            "items": items,
            "costs": costs,
            "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
            "samples": [[answer.prompt, answer.text] for answer in answers[:3]],
        }


ArmAt = Callable[[float], Arm]


@dataclass(frozen=True)
class _Fit:
    """What was fitted: how it acts at a strength, where, its bytes, what the fit took, and the
    seconds of recording what it was fitted on; ``remove`` takes it out of the model."""

    arm: ArmAt
    sites: tuple[Site, ...]
    size: int
    seconds: float
    recording: float
    peak: Peak
    remove: Callable[[], None] = lambda: None

    @classmethod
    def of_maps(cls, maps: Interventions, seconds: float, recording: float, peak: Peak) -> "_Fit":
        """Maps, which never were in the model."""

        def arm(strength: float) -> Arm:
            return Arm("", Edit(maps, torch.tensor([float(strength)])), strength)

        size = _size(maps.state_dict().values())
        return cls(arm, tuple(maps), size, seconds, recording, peak)


def _scaled(lora: LoRA) -> ArmAt:
    """Adapters, whose scale is the strength."""
    return lambda strength: Arm("", None, strength, adapter=lora)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _scored(name: str, made: Sequence[Completion]) -> Score:
    """A metric of completions that have it; bounds as a check needs them."""
    score = metrics.get(name).score(made, level=0.9)
    assert score is not None
    return score


def random_direction(acts: Activations, seed: int) -> Interventions:
    """At each site a random direction as long as the difference of means."""
    rng, maps = torch.Generator().manual_seed(seed), dict[Site, Shift]()
    for site, width in acts.widths.items():
        source, target = side_means(acts, site, acts.behaviours[0])
        drawn = torch.randn(width, generator=rng)
        maps[site] = Shift(width)
        maps[site].shifts[0] = drawn / drawn.norm() * (target - source).norm()
    return Interventions(dict(maps))


def shuffled(acts: Activations, seed: int) -> Activations:
    """Rows whose items have their sides swapped, each by the toss of a coin."""
    rows = acts.rows
    items = sorted(set(rows.item.tolist()))
    heads = np.random.default_rng(seed).random(len(items)) < 0.5
    swapped = np.isin(rows.item, [item for item, head in zip(items, heads, strict=True) if head])
    other = np.where(rows.side == "source", "target", "source")
    paired = np.isin(rows.side, ["source", "target"])
    return replace(acts, rows=replace(rows, side=np.where(swapped & paired, other, rows.side)))

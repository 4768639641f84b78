"""Compare methods: every one fitted, dosed and tested alike, cell by cell, on several tasks."""

import hashlib
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from innsteer import __version__, metrics, shelf
from innsteer.activations import Activations
from innsteer.backends.base import Completion, Progress, Sampling, silent
from innsteer.backends.hf import HF, Meter, instruct
from innsteer.calibration import BUDGET
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError, InputError, UnknownName
from innsteer.evaluation import require_scorer
from innsteer.figures import PLAIN, PROMPT_ONLY, RANDOM
from innsteer.files import canonical, read_json, write_json
from innsteer.fitting import fit_rows, fit_run, own_sites, record_parts, through
from innsteer.interventions import Edit, Shift
from innsteer.models import LanguageModel
from innsteer.site import Site
from innsteer.standings import HALVES, Half
from innsteer.steerer import Interventions, Steerer, get, side_means
from innsteer.suites import behaviour as suites
from innsteer.tuning import control, control_meter, control_metric, within

SHUFFLED = "shuffled-labels"
Input = Literal["classes", "target", "model", ""]
MOST = 64.0
"""No larger strength is tried."""


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method with its fields, and what it is fitted on.

    Attributes:
        method: of the shelf; or one of ``unsteered``, ``prompt-only``, ``random-direction`` and
            ``shuffled-labels`` (DiffMean whose pairs are swapped at random).
        input: ``classes`` (recorded rows, as published), ``target`` (rows that seek the target),
            ``model`` (a fit through it); columns that no ranking mixes.
        fields: of the method.
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
        """The method; DiffMean for shuffled labels and (never fitted) the random direction."""
        controls = (RANDOM, SHUFFLED, *PLAIN)
        return get("diffmean" if self.method in controls else self.method, **self.fields)


def inputs(steerer: Steerer) -> tuple[Input, ...]:
    """What a method can be fitted on, as published first."""
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

    Rows that seek the target are taken where all tasks are choices.
    """
    found: list[Contender] = []
    choices = all(task.kind == "choice" for task in tasks)
    for name in shelf.names():
        found += [
            Contender.of(name, one) for one in inputs(get(name)) if choices or one != "target"
        ]
        if get(name).sites != "any":
            found.append(Contender.of(name, alone=True))
    if choices:
        found.append(Contender.of("innsteer", objective="target"))
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
    """Control and both halves of the cost of one map at one strength, on validation."""

    layer: int
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
        steerer = vars(contender.steerer) if contender.dialled else {}
        key = {
            "contender": [contender.method, contender.input, steerer, contender.alone],
            "task": [cell.task.behaviour, cell.task.hash],
            "seed": cell.seed,
            "model": [replace(model.fingerprint, name=""), str(model.model.dtype)],
            "protocol": asdict(self.protocol),
        }
        if contender.method == PROMPT_ONLY:
            key["instruction"] = self.instructions[cell.task.behaviour]
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

    def run(self, *, progress: Progress = silent) -> None:
        """Measure every cell that is missing, each written when it ends.

        A method that refuses, or that no strength brings within the budget, leaves a cell that says
        so. Interrupted, the same call goes on.

        Raises:
            MissingPackage: the scorer of a behaviour needs one.
        """
        left, task = self.left(), None
        for number, cell in enumerate(left):
            progress(cell.title, number, len(left))
            if task is None or task.contrast is not cell.task:
                instruction = self.instructions[cell.task.behaviour]
                task = _Task(self.backend, cell.task, self.protocol, instruction)
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
                "seed": cell.seed,
                "innsteer": __version__,
                "seconds": time.perf_counter() - started,
                **found,
            }
            self.path(cell).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path(cell), _tidy(record))


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
        self, backend: HF, contrast: Contrast, protocol: Protocol, instruction: str
    ) -> None:
        self.backend, self.contrast, self.protocol = backend, contrast, protocol
        self.sites = tuple(Site(layer) for layer in sorted(protocol.layers))
        for site in self.sites:
            backend.model.layout.at(site)
        self.suite = suites.load(contrast, instruction=instruction)
        require_scorer(self.suite.control)
        held = contrast.part("validation")
        self._held = held.subset(min(len(held), protocol.items), 0)
        self._meters: dict[tuple[str, tuple[Site, ...]], Meter] = {}
        self._rows: dict[tuple[Input, tuple[Site, ...]], tuple[Activations, float]] = {}

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

    def _meter(self, name: str, sites: tuple[Site, ...]) -> Meter:
        """A meter by its name; cut at the lowest of some sites."""
        if (name, sites) not in self._meters:
            self._meters[name, sites] = self._make(name, sites)
        return self._meters[name, sites]

    def _make(self, name: str, sites: Sequence[Site]) -> Meter:
        what, _, part = name.partition(" ")
        if what == "control":
            items = self._held if part == "validation" else self.contrast.part("test")
            return control_meter(self.backend, items, sites)
        if what == "in_format":
            prompts = suites.in_format(self.contrast, part)
            return self.backend.meter(self.backend.reference(prompts, None), sites)
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
        started = time.perf_counter()
        sites, search, evaluated = self._search({at: one.maps for at, one in fits.items()})
        maps = fits[sites].maps
        found: dict[str, Any] = {
            "layer": sites[0].layer,
            "sites": [str(site) for site in maps],
            "fits": len(fits),
            "fit_seconds": sum(one.seconds for one in fits.values()),
            "record_seconds": max(one.recording for one in fits.values()),
            "bytes": sum(t.numel() * t.element_size() for t in maps.state_dict().values()),
            "evaluations": [one._asdict() for one in evaluated],
            "tested": {},
            "unmet": {},
        }
        edit = _edits(maps)
        # The large meters serve all candidates, cut at the lowest.
        whole = min(self.sites, sites)
        tested: dict[float, dict[str, Any]] = {}
        for half in self._halves:
            checks = {"neutral_cost": self._meter("check validation", whole)}
            if half == "both":
                checks["in_format_cost"] = self._meter("in_format validation", sites)
            try:
                if (best := search.best(half)) is None:
                    raise BudgetError(f"no strength tried is within {self.protocol.budget} nats")
                strength = within(checks, edit, best.strength, self.protocol.budget, silent)
            except BudgetError as error:
                found["unmet"][half] = str(error)
                continue
            if strength not in tested:
                tested[strength] = self._tested([edit(strength)], whole)
            found["tested"][half] = tested[strength] | {"strength": strength}
        found["search_seconds"] = time.perf_counter() - started
        return found

    def _places(self, contender: Contender) -> list[tuple[Site, ...]]:
        """Where a contender is fitted: each candidate layer, or all sites of its own rule."""
        own = own_sites(self.backend.model, contender.steerer)
        if own and contender.alone:
            return [(own[site.layer],) for site in self.sites]
        return [own] if own else [(site,) for site in self.sites]

    def _fit(self, cell: Cell, sites: tuple[Site, ...]) -> "_Fit":
        contender, steerer = cell.contender, cell.contender.steerer
        if contender.input == "model":
            started = time.perf_counter()
            run = through(self.backend, self.contrast, sites, reworded=steerer.rewords)
            seconds = time.perf_counter() - started
            made = fit_run(self.backend, steerer, run, self.contrast, seed=cell.seed)
        else:
            acts, seconds = self._acts(contender.input or "classes", sites)
            if contender.method == RANDOM:
                return _Fit(random_direction(acts, cell.seed), 0.0, seconds)
            if contender.method == SHUFFLED:
                acts = shuffled(acts, cell.seed)
            made = fit_rows(self.backend, steerer, acts, seed=cell.seed)
        return _Fit(made.interventions, made.provenance["fit_seconds"], seconds)

    def _search(
        self, fitted: Mapping[tuple[Site, ...], Interventions]
    ) -> tuple[tuple[Site, ...], Search, list[Evaluation]]:
        """Where successive halving ends, the strengths there, and every evaluation."""
        half = self._halves[-1]
        budget, left = self.protocol.budget, self.protocol.evaluations
        evaluated: list[Evaluation] = []
        searches = {
            sites: Search(self._evaluate(sites, _edits(maps), evaluated), budget)
            for sites, maps in fitted.items()
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
        self, sites: tuple[Site, ...], edit: Callable[[float], Edit], evaluated: list[Evaluation]
    ) -> Callable[[float], Evaluation]:
        def evaluate(strength: float) -> Evaluation:
            edits = [edit(strength)]
            scored = control(self._meter("control validation", sites)(edits), self._held)
            gain = metrics.get(control_metric(self._held)).score(scored)
            cost = metrics.get("neutral_cost").score(self._meter("search validation", sites)(edits))
            assert gain is not None and cost is not None
            bare = 0.0
            if self._in_format:
                made = self._meter("in_format validation", sites)(edits, kind="in_format")
                own = metrics.get("in_format_cost").score(made)
                assert own is not None
                bare = own.value
            found = Evaluation(sites[0].layer, strength, gain.value, cost.value, bare)
            evaluated.append(found)
            return found

        return evaluate

    # The test ---------------------------------------------------------------------------------

    def _undialled(self, contender: Contender) -> dict[str, Any]:
        """The plain model, or the model asked to."""
        asked = self.suite.instruction if contender.method == PROMPT_ONLY else ""
        half = self._tested([], self.sites, asked)
        return {"tested": dict.fromkeys(self._halves, half)}

    def _tested(
        self, edits: Sequence[Edit], sites: tuple[Site, ...], instruction: str = ""
    ) -> dict[str, Any]:
        """Figures of the test part: items by metric, costs, answers."""

        def measure(meter: Meter, kind: Any = "neutral") -> list[Completion]:
            if instruction:
                return meter.prompted(instruction, kind=kind)
            return meter(edits, kind=kind) if edits else meter.unsteered(kind=kind)

        test = self.contrast.part("test")
        made = control(measure(self._meter("control test", sites)), test)
        made += measure(self._meter("check test", sites))
        if self._in_format:
            made += measure(self._meter("in_format test", sites), "in_format")
        prompts = self.suite.prompts[: self.protocol.answers]
        if instruction:
            prompts = tuple(
                replace(one, conversation=instruct(one.conversation, instruction))
                for one in prompts
            )
        started = time.perf_counter()
        keys = {item.id: item.key or "" for item in test.items}
        answers = [
            replace(answer, key=keys.get(answer.item, ""), strength=1.0)
            for answer in self.backend.generate(prompts, edits, self.suite.sampling)
        ]
        seconds = time.perf_counter() - started
        names = dict.fromkeys([control_metric(test), self.suite.control])
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


class _Fit(NamedTuple):
    """Fitted maps, the seconds of the fit, and of recording what it was fitted on."""

    maps: Interventions
    seconds: float
    recording: float


def _edits(maps: Interventions) -> Callable[[float], Edit]:
    return lambda strength: Edit(maps, torch.tensor([float(strength)]))


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

"""One task of a comparison: a contender fitted, dosed and tested, with what its cells share."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from innsteer import metrics
from innsteer.activations import Activations
from innsteer.backends.base import Completion, Sampling
from innsteer.backends.hf import HF, Meter
from innsteer.backends.local import Local
from innsteer.backends.lora import LoRA, LoRATraining
from innsteer.backends.through import Through
from innsteer.comparing.contenders import LORA, SHUFFLED, Contender, Input
from innsteer.comparing.search import TOO_DEAR, Evaluation, Protocol, Search, needed
from innsteer.comparing.standings import HALVES, Half
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError
from innsteer.evaluation import Arm, require_scorer
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
from innsteer.planning import Peak
from innsteer.report.figures import PROMPT_ONLY, RANDOM
from innsteer.site import Site
from innsteer.steerer import Interventions, side_means
from innsteer.suites import behaviour as suites
from innsteer.suites.base import answered
from innsteer.tuning import control, control_meter, control_metric, within

OVER, TIMES = 1.1, 3
"""Of the budget, what the test part may cost at most; strengths that are tested for it."""


class Cell(NamedTuple):
    """One contender on one task with one seed."""

    contender: Contender
    task: Contrast
    seed: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.task.behaviour}: {self.contender.name}, seed {self.seed}"


class Place(NamedTuple):
    """Where a contender is fitted, and with which values of its method's choices."""

    sites: tuple[Site, ...]
    chosen: tuple[tuple[str, Any], ...] = ()

    @property
    def told(self) -> dict[str, Any]:
        """For a record: the layer, of several the lowest, and the values of the choices."""
        return {
            "layer": self.sites[0].layer if self.sites else None,
            "chosen": dict(self.chosen),
        }


class Task:
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
        for name in self.suite.scorers:
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
                else record_parts(
                    self.backend,
                    self.contrast,
                    every,
                    read=self.protocol.read,
                    span=self.protocol.span,
                )
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

    def meter(self, name: str) -> Meter:
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
        fits = {place: self.fit(cell, place) for place in self.places(cell.contender)}
        try:
            return self._dosed(fits)
        finally:
            for one in fits.values():
                one.remove()

    def _dosed(self, fits: "Mapping[Place, Fit]") -> dict[str, Any]:
        """The fit of the place that validation chose, at both budgets."""
        started = time.perf_counter()
        place, search, evaluated = self._search(fits)
        fit = fits[place]
        found: dict[str, Any] = {
            **place.told,
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

        @cache  # the halves may end at the same strength
        def high(name: str, strength: float) -> float:
            made = fit.arm(strength).measured(checks[name], metrics.get(name).kind)
            return _scored(name, made).high

        def worst(names: Sequence[str], strength: float) -> float:
            return max(high(name, strength) for name in names)

        def at(strength: float) -> dict[str, Any]:
            if strength not in tested:
                tested[strength] = self.test(fit.arm(strength))
            return tested[strength]

        for half in self._halves:
            checks = {"neutral_cost": self.meter("check validation")}
            if half == "both":
                checks["in_format_cost"] = self.meter("in_format validation")
            try:
                if (best := search.best(half)) is None:
                    raise BudgetError(f"no strength tried is within {self.protocol.budget} nats")
                cost = partial(worst, tuple(checks))
                found["tested"][half] = self._settled(cost, best.strength, at, tuple(checks))
            except BudgetError as error:
                found["unmet"][half] = str(error)
        found["search_seconds"] = time.perf_counter() - started
        return found

    def _settled(
        self,
        cost: Callable[[float], float],
        strength: float,
        tested: Callable[[float], dict[str, Any]],
        costs: Sequence[str],
    ) -> dict[str, Any]:
        """The test at a strength within the budget, and at which ones its own cost was over it.

        What costs more than a tenth too much on the test part is never ranked as it is: validation
        is held to as much less, and it is tested again.

        Raises:
            BudgetError: no strength holds on validation, or three in turn do not on the test part.
        """
        budget, over = self.protocol.budget, list[float]()
        allowed = budget
        for _ in range(TIMES):
            strength = within(cost, strength, allowed)
            found = tested(strength)
            spent = max(found["costs"][name][0] for name in costs)
            if spent <= OVER * budget:
                return found | {"strength": strength, "over": over}
            over.append(strength)
            allowed = 0.9 * cost(strength) * budget / spent
        raise BudgetError(
            f"{TIMES} strengths within {budget} nats on validation cost more than {OVER:g} times "
            f"as much on the test part: {', '.join(f'{one:.3g}' for one in over)}"
        )

    def places(self, contender: Contender) -> list[Place]:
        """Where a contender is fitted: each candidate layer, or all sites of its own rule.

        There each value of its choices is a place, where the evaluations suffice for them.
        """
        if contender.method == LORA:
            return [Place(())]
        own = own_sites(self.backend.model, contender.steerer)
        if not own:
            return [Place((site,)) for site in self.sites]
        if contender.alone:
            return [Place((own[site.layer],)) for site in self.sites]
        names = list(contender.choices)
        found = [
            Place(own, tuple(zip(names, values, strict=True)))
            for values in product(*contender.choices.values())
        ]
        return found if needed(len(found)) <= self.protocol.evaluations else [Place(own)]

    def fit(self, cell: Cell, place: Place) -> "Fit":
        """A contender fitted there, with what that took."""
        contender, sites = cell.contender, place.sites
        if contender.method == LORA:
            run, seconds = self._run(self.sites[-1:])
            started = time.perf_counter()
            with Peak(self.backend.model.device) as peak:
                how = LoRATraining(**contender.fields)
                lora = how.fit(self.backend.model, run, seed=cell.seed)
            took = time.perf_counter() - started
            return Fit(_scaled(lora), (), _size(lora.weights), took, seconds, peak, lora.remove)
        steerer = replace(contender.steerer, **dict(place.chosen))  # type: ignore[type-var]
        if "jacobians" in steerer.needs:
            chain, seconds = self._chain(sites)
            with Peak(self.backend.model.device) as peak:
                made = fit_run(self.backend, steerer, chain, self.contrast, seed=cell.seed)
        elif contender.input == "model" and (steerer.trains_through or steerer.rewords):
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
                    return Fit.of_maps(maps, 0.0, seconds, peak)
                made = fit_rows(self.backend, steerer, acts, seed=cell.seed)
        return Fit.of_maps(made.interventions, made.provenance["fit_seconds"], seconds, peak)

    def _search(self, fits: "Mapping[Place, Fit]") -> tuple[Place, Search, list[Evaluation]]:
        """Where successive halving ends, the strengths there, and every evaluation."""
        half = self._halves[-1]
        budget, left = self.protocol.budget, self.protocol.evaluations
        evaluated: list[Evaluation] = []
        # What is read off all answers of a question moves with the log-odds themselves.
        whole = self.contrast.kind == "open" and not self.suite.questions
        searches = {
            place: Search(self._evaluate(place, fit.arm, evaluated), budget, whole=whole)
            for place, fit in fits.items()
        }
        rounds = (len(searches) - 1).bit_length() + 1
        for n in range(rounds - 1):
            each = left // (rounds - n) // len(searches)
            # A third tells by which power the cost grows; so many the rest can spare, or none.
            if not n and left - (each + 1) * len(searches) >= needed(-(-len(searches) // 2)):
                each += 1
            for search in searches.values():
                for turn in range(each):
                    # The first is the same for both; the second is within both, if any is.
                    binding: Half = half if turn % 2 else "neutral"
                    if not search.done(binding):
                        search.step(binding)
                        left -= 1
            # One half as much as the other.
            worth = {at: sum(map(search.worth, self._halves)) for at, search in searches.items()}
            kept = sorted(worth, key=lambda at: worth[at], reverse=True)[: -(-len(worth) // 2)]
            searches = {place: searches[place] for place in sorted(kept)}
        ((place, search),) = searches.items()
        for n in range(left):
            binding = half if n % 2 == 0 else "neutral"
            if not search.done(binding):
                search.step(binding)
        return place, search, evaluated

    def _evaluate(
        self, place: Place, arm: "ArmAt", evaluated: list[Evaluation]
    ) -> Callable[[float], Evaluation]:
        def evaluate(strength: float) -> Evaluation:
            one = arm(strength)
            made = control(one.measured(self.meter("control validation")), self._held)
            gain = _scored(control_metric(self._held), made).value
            told = "match" if self.contrast.kind == "choice" else "shift"
            said = float(np.mean([each.values[told][0] for each in made]))
            made = one.measured(self.meter("search validation"))
            cost, bare = _scored("neutral_cost", made).value, 0.0
            if self._in_format:
                made = one.measured(self.meter("in_format validation"), "in_format")
                bare = _scored("in_format_cost", made).value
            cost, bare = (each if math.isfinite(each) else TOO_DEAR for each in (cost, bare))
            if not (math.isfinite(gain) and math.isfinite(said)):
                gain, said = 0.0, -TOO_DEAR
            found = Evaluation(
                strength=strength,
                control=gain,
                neutral=cost,
                in_format=bare,
                said=said,
                **place.told,
            )
            evaluated.append(found)
            return found

        return evaluate

    # The test ---------------------------------------------------------------------------------

    def _undialled(self, contender: Contender) -> dict[str, Any]:
        """The plain model, or the model asked to."""
        asked = self.suite.instruction if contender.method == PROMPT_ONLY else ""
        half = self.test(Arm(contender.method, instruction=asked))
        return {"tested": dict.fromkeys(self._halves, half)}

    def test(self, arm: Arm) -> dict[str, Any]:
        """Figures of the test part: items by metric, costs, answers."""
        test = self.contrast.part("test")
        made = control(arm.measured(self.meter("control test")), test)
        made += arm.measured(self.meter("check test"))
        if self._in_format:
            made += arm.measured(self.meter("in_format test"), "in_format")
        if questions := self.suite.questions:
            made += answered(arm.measured(self.meter("questions")), questions)
        most, sampling = self.protocol.answers, self.suite.sampling
        started = time.perf_counter()
        answers = arm.answers(self.backend, self.suite.prompts[:most], sampling)
        seconds = time.perf_counter() - started
        asides = arm.answers(self.backend, self.suite.harmless[:most], sampling)
        made += [replace(answer, kind="aside") for answer in asides]
        keys = {item.id: item.key or "" for item in test.items}
        answers = [replace(one, key=keys.get(one.item, ""), strength=1.0) for one in answers]
        names = dict.fromkeys([control_metric(test), *self.suite.scorers])
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
class Fit:
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
    def of_maps(cls, maps: Interventions, seconds: float, recording: float, peak: Peak) -> "Fit":
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

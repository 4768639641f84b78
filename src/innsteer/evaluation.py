"""Evaluate: every arm on one suite, side by side, with intervals; the result is a Report."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from innsteer import __version__, metrics
from innsteer.activations import Activations
from innsteer.backends.base import Completion, Kind, Progress, Prompt, Sampling, silent
from innsteer.backends.hf import HF, Meter, instruct
from innsteer.backends.lora import LoRA
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError, InputError
from innsteer.fitting import check_unseen
from innsteer.interventions import Edit, Shift
from innsteer.models import LanguageModel
from innsteer.report import Cloud, DosePoint, Figure, Report, TokenTrail
from innsteer.report.figures import PROMPT_ONLY, RANDOM, UNSTEERED
from innsteer.site import Site
from innsteer.steerer import Interventions
from innsteer.steering import Steering
from innsteer.suites.base import answered
from innsteer.suites.behaviour import Suite
from innsteer.tuning import control, control_meter, control_metric

RANGES = ("0.01nat", "0.03nat", "budget")


@dataclass(frozen=True)
class Arm:
    """One way to answer: the plain model, an instruction, a steering or adapters at a strength.

    Attributes:
        name: unique among the arms. edit: None for the plain model.
        strength: of the adapters; beside an edit, for the record.
        instruction: what is added to every prompt. adapter: adapters of the model's weights.
    """

    name: str
    edit: Edit | None = None
    strength: float = 0.0
    instruction: str = ""
    adapter: LoRA | None = None

    @property
    def edits(self) -> list[Edit]:
        """What the backend applies."""
        return [self.edit] if self.edit else []

    def measured(self, meter: Meter, kind: Kind = "neutral") -> list[Completion]:
        """What a meter finds under it."""
        if self.instruction:
            return meter.prompted(self.instruction, kind=kind)
        if self.adapter:
            return meter.adapted(self.adapter, self.strength, kind=kind)
        return meter(self.edits, kind=kind) if self.edit else meter.unsteered(kind=kind)

    def answers(
        self,
        backend: HF,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        progress: Progress = silent,
    ) -> list[Completion]:
        """Its sampled answers; a suite may have nothing to ask."""
        if not prompts:
            return []
        asked: Sequence[Prompt] = prompts
        if self.instruction:
            asked = [
                replace(one, conversation=instruct(one.conversation, self.instruction))
                for one in prompts
            ]
        with backend.adapted(self.adapter, self.strength):
            return backend.generate(asked, self.edits, sampling, progress=progress)


@dataclass(frozen=True)
class Sizes:
    """How much an evaluation asks; the defaults are those of the published measures.

    Attributes:
        neutral_prompts: at least 100, with at least 2,000 response tokens together.
        asides: neutral prompts answered, for over-refusal, where the suite has no harmless ones.
        aside_tokens: of each answer.
        long: (tokens, prompts) of long answers, for degeneration.
        trails: answers whose displacement is shown token by token. cloud: items in the scatter.
    """

    neutral_prompts: int = 120
    asides: int = 40
    aside_tokens: int = 24
    long: tuple[tuple[int, int], ...] = ((256, 16), (1024, 8))
    trails: int = 3
    cloud: int = 60

    @property
    def preview(self) -> bool:
        """Whether the cost rests on fewer prompts than its measure asks for."""
        return self.neutral_prompts < 100


PREVIEW = Sizes(neutral_prompts=16, asides=0, long=(), trails=1, cloud=16)


def compare(
    model: LanguageModel | HF,
    steerings: Mapping[str, Steering],
    suite: Suite,
    *,
    adapters: Mapping[str, LoRA] = {},
    sizes: Sizes = Sizes(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Steerings at their budgets beside unsteered, prompt-only and a random direction.

    Args:
        adapters: LoRAs placed in the model, each at strength 1, as trained, and at its own cost.

    Raises:
        InputError: a steering that was not tuned: without a budget nothing can be compared.
        LeakError: a steering was fitted on items of the suite.
    """
    backend = HF.of(model)
    # Of several behaviours in one map the suite's own is meant, where it has that.
    steerings = {
        name: steering.of(suite.behaviour) if suite.behaviour in steering.behaviours else steering
        for name, steering in steerings.items()
    }
    for name, steering in steerings.items():
        if steering.curve is None:
            what = (
                repr(name) if len(steering.behaviours) == 1 else f"{suite.behaviour!r} in {name!r}"
            )
            raise InputError(f"{what} was not tuned", remedy="tune it to a budget first")
        if suite.items is not None:
            check_unseen(steering, suite.items)
    arms = standard_arms(backend, steerings, suite, seed=seed)
    arms += [Arm(name, strength=1.0, adapter=adapter) for name, adapter in adapters.items()]
    return evaluate(
        backend, arms, suite, steerings=steerings, sizes=sizes, seed=seed, progress=progress
    )


def require_scorer(control: str) -> None:
    """Let a scorer whose package is missing say so now, not after minutes of work.

    Raises:
        UnknownName: no such metric. MissingPackage: it needs one.
    """
    scorer = metrics.get(control)
    if scorer.family:
        scorer.measure(Completion("", scorer.kind))


def standard_arms(
    model: LanguageModel | HF, steerings: Mapping[str, Steering], suite: Suite, *, seed: int = 0
) -> list[Arm]:
    """Unsteered, prompt-only (where an instruction is known), a random direction, the steerings.

    The random direction has no dial: it moves activations as far, relative to their norm, as the
    last steering does, and stands at its own cost.
    """
    arms = [Arm(UNSTEERED)]
    if suite.instruction:
        arms.append(Arm(PROMPT_ONLY, instruction=suite.instruction))
    steered = [
        Arm(name, steering.edit(), steering.resolve()) for name, steering in steerings.items()
    ]
    if steered:
        arms.append(_random_arm(model, steered[-1], suite, seed))
    return [*arms, *steered]


def _random_arm(model: LanguageModel | HF, like: Arm, suite: Suite, seed: int) -> Arm:
    """A random unit direction per site, scaled to the relative displacement of another arm.

    Both are taken on the behaviour's own prompts: a gate may leave all others alone.
    """
    assert like.edit is not None
    backend = HF.of(model)
    rng = torch.Generator().manual_seed(seed)
    sites: dict[Site, Shift] = {}
    for site in like.edit.interventions:
        direction = torch.randn(1, backend.model.layout.width_of(site), generator=rng)
        sites[site] = Shift(direction.shape[1])
        sites[site].shifts.copy_(direction / direction.norm())
    unit = Edit(Interventions(dict(sites)), torch.ones(1), like.edit.where)
    reference = backend.reference((suite.prompts or suite.neutral)[:8], None)
    meter = backend.meter(reference, list(sites), divergence=False)
    moved: list[list[float]] = [[], []]
    for part, edit in zip(moved, (like.edit, unit), strict=True):
        meter([edit], displacement=part)
    strength = float(np.mean(moved[0]) / np.mean(moved[1]))
    return Arm(RANDOM, replace(unit, coef=torch.tensor([strength])), strength)


def evaluate(
    model: LanguageModel | HF,
    arms: Sequence[Arm],
    suite: Suite,
    *,
    steerings: Mapping[str, Steering] = {},
    sizes: Sizes = Sizes(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Run every arm on the suite and score it.

    Args:
        arms: the first is the one that differences are taken from.
        steerings: those behind some arms: their calibrations and diagnostics go into the report.
    """
    if not arms or len({arm.name for arm in arms}) < len(arms):
        raise InputError("arms without distinct names", expected="at least one arm, all distinct")
    for name in suite.scorers:
        require_scorer(name)
    started = time.perf_counter()
    backend = HF.of(model)
    run = _Run(backend, suite, sizes, seed, progress)
    sites = sorted({site for arm in arms for edit in arm.edits for site in edit.interventions})
    completions: list[Completion] = []
    completions += run.answers(arms)
    completions += run.divergence(arms, sites)
    completions += run.items(arms, sites)
    completions += run.questions(arms, sites)
    completions += run.plain(arms)
    figures = [*_figures(arms, suite, completions), *run.ranges(steerings)]
    curves = [steering.curve for steering in steerings.values() if steering.curve]
    unchecked = any(curve.preview for curve in curves)
    measured = [c.tokens for c in completions if c.kind == "neutral" and c.arm == arms[0].name]
    # Fewer than the measure asks for (100 prompts, 2,000 tokens) is a foretaste.
    preview = sizes.preview or unchecked or len(measured) < 100 or sum(measured) < 2000
    context = {
        "model": backend.model.name,
        "behaviour": suite.behaviour,
        "sites": {name: [str(x) for x in s.interventions] for name, s in steerings.items()},
        "identities": {name: s.identity for name, s in steerings.items()},
        "innsteer": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seed": seed,
        "temperature": suite.sampling.temperature,
        "new_tokens": suite.sampling.new_tokens,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Report(
        title=f"{suite.behaviour} on {backend.model.name}",
        behaviour=suite.behaviour,
        control=suite.control,
        budget=max((curve.budget for curve in curves), default=0),
        preview=preview,
        context=context,
        arms=tuple(arm.name for arm in arms),
        figures=tuple(figures),
        doses=tuple(_doses(steerings)),
        clouds=tuple(run.clouds(steerings)),
        trails=tuple(run.trails(arms, completions)),
        completions=tuple(completions),
        diagnostics={
            name: steering.provenance["diagnostics"]
            for name, steering in steerings.items()
            if steering.provenance.get("diagnostics")
        },
        notes=tuple(_notes(arms, steerings, suite, figures, preview)),
        dose_control=control_metric(suite.items) if suite.items else "",
    )


@dataclass(frozen=True)
class _Run:
    """One evaluation's backend, suite and sizes."""

    backend: HF
    suite: Suite
    sizes: Sizes
    seed: int
    progress: Progress

    def answers(self, arms: Sequence[Arm]) -> list[Completion]:
        """Samples, answers to neutral prompts, and long answers of every arm."""
        suite = self.suite
        found: list[Completion] = []
        sampling = replace(suite.sampling, seed=suite.sampling.seed + self.seed)
        jobs = [("sample", suite.prompts, sampling)]
        # All of a benchmark's own; of the neutral prompts, a few.
        asides = suite.harmless or suite.neutral[: self.sizes.asides]
        aside = Sampling(self.sizes.aside_tokens, suite.sampling.temperature, self.seed)
        jobs.append(("aside", asides, aside))
        for tokens, count in self.sizes.long:
            sampling = Sampling(tokens, suite.sampling.temperature, self.seed)
            jobs.append(("long", suite.prompts[:count], sampling))
        for arm in arms:
            for kind, prompts, sampling in filter(lambda job: job[1], jobs):
                self.progress(f"{arm.name}: {kind}", 0, len(prompts))
                made = arm.answers(self.backend, prompts, sampling, self.progress)
                if kind == "sample":
                    made = self._with_base(prompts, made)
                values = {"asked": (float(sampling.new_tokens),)} if kind == "long" else {}
                found += [
                    replace(
                        completion,
                        kind=kind,  # type: ignore[arg-type]
                        item=f"{completion.item}-{sampling.new_tokens}"
                        if kind == "long"
                        else completion.item,
                        values={**completion.values, **values},
                        arm=arm.name,
                        strength=arm.strength,
                    )
                    for completion in made
                ]
        return found

    def _with_base(self, prompts: Sequence[Prompt], made: Sequence[Completion]) -> list[Completion]:
        """Add the unsteered model's log-probabilities of the answers, and the items' keys."""
        keys = (
            {item.id: item.key or "" for item in self.suite.items.items} if self.suite.items else {}
        )
        spoken = [n for n, completion in enumerate(made) if completion.text]
        asked = [replace(prompts[n], answers=(made[n].text,)) for n in spoken]
        scored = dict(zip(spoken, self.backend.score(asked), strict=True))
        return [
            replace(
                completion,
                values={"base_log_prob": scored[n][0]} if n in scored else {},
                key=keys.get(completion.item, ""),
            )
            for n, completion in enumerate(made)
        ]

    def divergence(self, arms: Sequence[Arm], sites: Sequence[Site]) -> list[Completion]:
        """Both halves of the cost."""
        prompts = self.suite.neutral[: self.sizes.neutral_prompts]
        sampling = Sampling(self.suite.neutral_tokens, 1.0, self.seed + 1)
        neutral = self.backend.reference(prompts, sampling, progress=self.progress)
        found = self._measure(arms, self.backend.meter(neutral, sites), "neutral")
        if self.suite.in_format:
            bare = self.backend.reference(self.suite.in_format, None)
            found += self._measure(arms, self.backend.meter(bare, sites), "in_format")
        return found

    def _measure(self, arms: Sequence[Arm], meter: Meter, kind: Any) -> list[Completion]:
        found: list[Completion] = []
        for n, arm in enumerate(arms):
            self.progress(f"{kind} cost", n, len(arms))
            made = arm.measured(meter, kind)
            found += [completion.by(arm.name, arm.strength) for completion in made]
        self.progress(f"{kind} cost", len(arms), len(arms))
        return found

    def items(self, arms: Sequence[Arm], sites: Sequence[Site]) -> list[Completion]:
        """Held-out items of the behaviour and of others, scored teacher-forced."""
        found = self._score(arms, sites, self.suite.items) if self.suite.items else []
        for other in self.suite.others:
            found += [
                replace(
                    completion,
                    kind="other",
                    key=other.behaviour,
                    item=f"{other.behaviour}/{completion.item}",
                )
                for completion in self._score(arms, sites, other)
            ]
        return found

    def _score(
        self, arms: Sequence[Arm], sites: Sequence[Site], items: Contrast
    ) -> list[Completion]:
        meter = control_meter(self.backend, items, sites)
        found: list[Completion] = []
        for n, arm in enumerate(arms):
            self.progress("items", n, len(arms))
            made = control(arm.measured(meter), items)
            found += [completion.by(arm.name, arm.strength) for completion in made]
        self.progress("items", len(arms), len(arms))
        return found

    def questions(self, arms: Sequence[Arm], sites: Sequence[Site]) -> list[Completion]:
        """A benchmark's questions, all of their answers scored teacher-forced."""
        asked = self.suite.questions
        if not asked:
            return []
        forced = self.backend.forced([question.prompt for question in asked])
        meter = self.backend.meter(forced, sites, divergence=False)
        found: list[Completion] = []
        for n, arm in enumerate(arms):
            self.progress("questions", n, len(arms))
            made = answered(arm.measured(meter), asked)
            found += [completion.by(arm.name, arm.strength) for completion in made]
        self.progress("questions", len(arms), len(arms))
        return found

    def plain(self, arms: Sequence[Arm]) -> list[Completion]:
        """Held-out plain text; an instruction has no place in it."""
        found = []
        for arm in arms:
            if self.suite.plain and not arm.instruction:
                self.progress(f"{arm.name}: plain text", 0, 1)
                with self.backend.adapted(arm.adapter, arm.strength):
                    totals = self.backend.score_text(self.suite.plain, arm.edits)
                found += [
                    Completion(
                        f"plain-{n:03d}",
                        "plain",
                        text=text,
                        values={"log_prob": (total,)},
                        arm=arm.name,
                        strength=arm.strength,
                    )
                    for n, (text, total) in enumerate(zip(self.suite.plain, totals, strict=True))
                ]
        return found

    def ranges(self, steerings: Mapping[str, Steering]) -> list[Figure]:
        """Control range P(+) - P(-) at small costs, where both directions were measured."""
        items = self.suite.items
        found: list[Figure] = []
        if items is None:
            return found
        for name, steering in steerings.items():
            curve = steering.curve
            if curve is None or curve.doses[0].strength >= 0:
                continue
            meter = control_meter(self.backend, items, list(steering.interventions))
            score = metrics.get(control_metric(items))
            for cost in RANGES:
                nats = curve.budget if cost == "budget" else float(cost.removesuffix("nat"))
                try:
                    ends = [curve.resolve(f"{sign}{nats}nat") for sign in ("", "-")]
                except BudgetError:  # the curve ends below this cost
                    continue
                plus, minus = (control(meter([steering.edit(end)]), items) for end in ends)
                gap = score.difference(plus, minus)
                assert gap is not None
                found.append(
                    Figure(
                        name,
                        f"control_range@{nats:g}nat",
                        ends[0],
                        gap.value,
                        gap.low,
                        gap.high,
                        gap.n,
                        score.unit,
                        "higher",
                        gap.level,
                    )
                )
        return found

    def clouds(self, steerings: Mapping[str, Steering]) -> list[Cloud]:
        """Residual and latent scatter of held-out rows, before and after."""
        items = self.suite.items
        if items is None or items.kind != "open":
            return []
        items = items.subset(min(len(items), self.sizes.cloud), self.seed)
        found = []
        for name, steering in steerings.items():
            site = next(iter(steering.interventions))
            if not _by_rows(steering):
                continue  # the notes say so
            acts = self.backend.record(items, [site], read="mean")
            found += _clouds(name, steering, acts, site)
        return found

    def trails(self, arms: Sequence[Arm], completions: Sequence[Completion]) -> list[TokenTrail]:
        """Displacement token by token of each steered arm's first answers."""
        found = []
        conversations = {prompt.item: prompt for prompt in self.suite.prompts}
        for arm in arms:
            if arm.edit is None:
                continue
            own = [c for c in completions if c.arm == arm.name and c.kind == "sample" and c.text]
            for completion in own[: self.sizes.trails]:
                prompt = replace(conversations[completion.item], answers=(completion.text,))
                found.append(self._trail(arm, prompt, completion))
        return found

    def _trail(self, arm: Arm, prompt: Prompt, completion: Completion) -> TokenTrail:
        reference = self.backend.forced([prompt])
        moved: list[float] = []
        sites = list(arm.edits[0].interventions)
        # With the divergence: without, an answer's last token, which predicts nothing, is not run.
        self.backend.meter(reference, sites)(arm.edits, displacement=moved)
        ids, start = reference.ids[0], reference.lengths[0]
        (edit,) = arm.edits
        # One number per site and token in scope; several sites: the mean over them.
        rows = (
            np.array(moved).reshape(len(edit.interventions), -1).mean(0).tolist() if moved else []
        )
        spans = edit.where.spans(prompt=start, turns=[(start - 1, None)])
        steered = [t for t in range(len(ids)) if any(a <= t < (b or len(ids)) for a, b in spans)]
        # At strength 0 nothing was edited, so that there is nothing to show.
        shown = dict(zip(steered, rows, strict=bool(moved)))
        return TokenTrail(
            arm.name,
            completion.item,
            completion.prompt,
            tuple(self.backend.model.tokenizer.decode([token]) for token in ids[start:]),
            tuple(shown.get(place, 0.0) for place in range(start, len(ids))),
        )


def _figures(arms: Sequence[Arm], suite: Suite, completions: Sequence[Completion]) -> list[Figure]:
    """Every metric of every arm, and its difference from the first arm, paired by item."""
    family, asked = metrics.get(suite.control).family, {*suite.scorers}
    # Those that take something stand there with what the suite says.
    known = set(metrics.names()) - {name.partition(":")[0] for name in asked}
    usual = {name for name in known if metrics.get(name).family in ("", family)}
    found = []
    for name in sorted(asked | usual):
        metric = metrics.get(name)
        by_arm = {
            arm.name: [c for c in completions if c.arm == arm.name and c.kind == metric.kind]
            for arm in arms
        }
        for arm in arms:
            score = metric.score(by_arm[arm.name])
            if score is None:
                continue
            common = (score.n, metric.unit, metric.better, score.level)
            found.append(
                Figure(arm.name, name, arm.strength, score.value, score.low, score.high, *common)
            )
            # Costs are taken against the plain model already; control also against each rival.
            others = [] if metric.kind in ("neutral", "in_format") else [arms[0]]
            if name == suite.control:
                others += arms[1:]
            for other in others:
                gap = metric.difference(by_arm[arm.name], by_arm[other.name])
                if other is arm or gap is None:
                    continue
                apart = (gap.value, gap.low, gap.high, gap.n, metric.unit, metric.better, gap.level)
                found.append(Figure(arm.name, name, arm.strength, *apart, other.name))
    return found


def _doses(steerings: Mapping[str, Steering]) -> list[DosePoint]:
    """The calibrations' curves."""
    return [
        DosePoint(
            name,
            dose.strength,
            dose.nats,
            dose.low,
            dose.high,
            dose.control,
            dose.control if dose.control_low is None else dose.control_low,
            dose.control if dose.control_high is None else dose.control_high,
            dose.displacement,
            abs(dose.strength - curve.strength) < 1e-9,
        )
        for name, steering in steerings.items()
        if (curve := steering.curve)
        for dose in curve.doses
        if dose.control is not None
    ]


def _by_rows(steering: Steering) -> bool:
    """Whether rows of a site alone say where it moves them."""
    maps = steering.interventions
    return not (maps.contextual or maps.across or maps.across_tokens)


def _clouds(name: str, steering: Steering, acts: Activations, site: Site) -> list[Cloud]:
    """Two-dimensional projections fitted on the unsteered rows of both sides."""
    source, target = acts.sides(site)
    edit = steering.edit()
    part = edit.interventions[site]
    with torch.no_grad():
        steered = part(source, edit.rows(len(source)))
    spaces: list[tuple[str, Callable[[Tensor], Tensor]]] = [("residual stream", lambda rows: rows)]
    flow: Callable[[Tensor], Tensor] | None = getattr(part, "flow", None)
    if flow is not None:
        spaces.append(("latent space", flow))
    found = []
    for space, place in spaces:
        with torch.no_grad():
            groups = {
                "source": place(source),
                "target": place(target),
                "steered": place(steered),
            }
        plane = PCA(2, random_state=0).fit(torch.cat([groups["source"], groups["target"]]).numpy())
        shares = [
            f"PC{n + 1} ({share:.0%})" for n, share in enumerate(plane.explained_variance_ratio_)
        ]
        points = {
            group: tuple((float(x), float(y)) for x, y in plane.transform(rows.numpy()))
            for group, rows in groups.items()
        }
        found.append(Cloud(f"{name}: {space} at {site}", (shares[0], shares[1]), points))
    return found


def _notes(
    arms: Sequence[Arm],
    steerings: Mapping[str, Steering],
    suite: Suite,
    figures: Sequence[Figure],
    preview: bool,
) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = []
    if preview:
        notes.append(
            "A preview: few prompts and short answers, or strengths searched on a few hundred "
            "tokens and not checked. The benchmark measures at full size."
        )
    if any(arm.name == PROMPT_ONLY for arm in arms):
        notes.append(
            "Prompt-only and the random direction have no dial: they stand at their own cost and "
            "are not ranked."
        )
    elif arms and arms[0].name == UNSTEERED:
        notes.append("No instruction was given, so the prompt-only arm is missing.")
    notes += [
        f"{arm.name} changes weights, at every token of the prompt too; it stands at strength "
        f"{arm.strength:g} and at its own cost."
        for arm in arms
        if arm.adapter
    ]
    told = [name for name, steering in steerings.items() if not _by_rows(steering)]
    if told and suite.items is not None and suite.items.kind == "open":
        notes.append(
            f"No scatter of {', '.join(told)}: it moves a row by what its prompt says, or the "
            "blocks below."
        )
    budgets = {
        name: steering.curve.budget for name, steering in steerings.items() if steering.curve
    }
    for figure in figures:
        budget = budgets.get(figure.arm)
        if figure.metric == "neutral_cost" and budget and figure.value > 1.1 * budget:
            notes.append(
                f"{figure.arm} costs {figure.value:.4f} nats on test prompts, over 10 % above the "
                f"budget of {budget}: tune it again on validation before ranking it."
            )
    return notes


def card(report: Report, arm: str) -> dict[str, Any]:
    """What an artifact's card says of a behaviour: the arm's figures and the plain model's."""
    kept = [f for f in report.figures if f.arm in (arm, UNSTEERED) and not f.against]
    return {
        report.behaviour: {
            "figures": [vars(figure) for figure in kept],
            "model": report.context["model"],
            "preview": report.preview,
        }
    }

"""Dose-response, strength within a budget, and moving both to a sibling of the model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from innsteer.backends.base import Completion, Kind, Progress, Prompt, Sampling, silent
from innsteer.backends.hf import HF, Meter
from innsteer.calibration import BUDGET, FLAT, Calibration, Dose, following
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError, InputError, MismatchError
from innsteer.fitting import check_unseen, linearised, record_parts, through
from innsteer.interventions import Edit
from innsteer.metrics import get as metric
from innsteer.models import LanguageModel
from innsteer.site import Site
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

CHECKS = 12
STAGES = 8
FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5)
Costs = Mapping[str, Meter]
"""Halves of the cost by their metric's name."""
EditAt = Callable[[float], Edit]
"""The edit of the behaviour that is tuned, at a strength."""


# --- control and cost ----------------------------------------------------------------------------


def control_meter(backend: HF, items: Contrast, sites: Sequence[Site]) -> Meter:
    """Both answers of every item, to be scored under edits: target, source, target, source ...

    Items of one side are dealt into pairs in their order, each answer under its own prompt.
    """
    prompts = [
        Prompt(item.id, item.prompt, (item.target, item.source))
        for item in items.items
        if item.source is not None and item.target is not None
    ]
    lone = [
        [
            Prompt(item.id, item.prompt, (text,))
            for item in items.items
            if (text := getattr(item, side)) is not None and getattr(item, other) is None
        ]
        for side, other in (("target", "source"), ("source", "target"))
    ]
    prompts += [one for pair in zip(*lone, strict=False) for one in pair]
    if not prompts:
        raise InputError(
            f"contrast {items.behaviour!r} has texts of one side only",
            expected="answers with the behaviour and without, to measure control on",
        )
    return backend.meter(backend.forced(prompts), sites, divergence=False)


def control(scored: Sequence[Completion], items: Contrast) -> list[Completion]:
    """Completions of kind ``choice`` or ``pair`` from the scored answers, target before source."""
    keys = {item.id: item.key or "" for item in items.items}
    found = []
    for target, source in zip(scored[::2], scored[1::2], strict=True):
        if items.kind == "choice":
            values = {
                "match": (math.exp(sum(target.values["log_prob"])),),
                "other": (math.exp(sum(source.values["log_prob"])),),
            }
        else:
            gain = [
                sum(side.values["log_prob"]) - sum(side.values["base_log_prob"])
                for side in (target, source)
            ]
            values = {"shift": (gain[0] - gain[1],)}
        kind: Kind = "choice" if items.kind == "choice" else "pair"
        found.append(replace(target, kind=kind, values=values, key=keys[target.item]))
    return found


def control_metric(items: Contrast) -> str:
    """Which metric reads ``control``'s completions."""
    return "alignment" if items.kind == "choice" else "preference"


# --- tune ----------------------------------------------------------------------------------------


def tune(
    model: LanguageModel | HF,
    steering: Steering,
    contrast: Contrast,
    *,
    budget: float = BUDGET,
    search_tokens: int = 300,
    check_tokens: int = 2000,
    control_items: int = 48,
    fractions: Sequence[float] = FRACTIONS,
    both_ways: bool = False,
    joint: bool = False,
    preview: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Steering:
    """Find the strength of most effect within a cost budget, and the dose-response curve around it.

    The search scales by the power with which the strengths tried show the cost to grow, 2 for a
    small edit, until it lies within 3 % under the budget. The last check asks that the upper
    end of the cost's 90 % interval, on at least ``check_tokens`` response tokens of at least 100
    neutral prompts of the validation part, stays within the budget; else strength shrinks. Where
    far less strength has the same effect, as behind a gate, that is taken. The curve is measured on
    the tokens of the check, which are those of the budget (in a preview, of the search).

    Args:
        model: or a backend, which keeps the neutral continuations for the next steering.
        contrast: control is measured on its validation part; of a behaviour that is steered.
        budget: nats per token. fractions: of the found strength, for the curve.
        both_ways: measure negative strengths too.
        joint: hold the in-format half of the cost to the budget as well, on the behaviour's own
            in-format validation prompts.
        preview: leave the last check out, and say so in the artifact.

    Returns:
        The steering with this behaviour's curve, and with this behaviour leading.

    Raises:
        InputError: a budget that is not above 0; a contrast of another behaviour; ``joint``
            without in-format prompts.
        LeakError: the steering was fitted on groups of the validation part.
        BudgetError: no strength in 1e-4 .. 1e4 spends the budget, or the check cannot be met.
    """
    if not 0 < budget < math.inf:
        raise InputError(f"budget {budget}", expected="nats per token, above 0")
    require_own(steering, contrast)
    held = contrast.part("validation")
    check_unseen(steering, held)
    held = held.subset(min(len(held), control_items), seed)
    backend = HF.of(model)
    sites = list(steering.interventions)
    edit: EditAt = partial(steering.edit, behaviour=contrast.behaviour)
    prompts = suites.neutral("validation")
    if preview:
        prompts = prompts[: max(search_tokens // 16, 8)]
    sampling = Sampling(24, 1.0, seed)
    whole = backend.reference(prompts, sampling, progress=progress)
    if not preview and (whole.tokens < check_tokens or len(whole.ids) < 100):
        raise BudgetError(
            f"a check on {whole.tokens} tokens of {len(whole.ids)} prompts",
            expected=f"at least {check_tokens} tokens of 100 prompts",
        )
    meter = backend.meter(whole.part(search_tokens), sites)
    halves: Costs = {"in_format_cost": _in_format(backend, contrast, sites)} if joint else {}
    scored = control_meter(backend, held, sites)
    limit, spent = _search({"neutral_cost": meter, **halves}, edit, budget, progress)
    strength = _enough(scored, edit, held, limit, spent, budget)
    by = "cost" if strength == limit else "control"
    if not preview:
        meter = backend.meter(whole, sites)
        costs = {"neutral_cost": meter, **halves}
        strength = within(partial(_worst, costs, edit, end="high"), strength, budget, progress)
    signs = (1.0, -1.0) if both_ways else (1.0,)
    grid = [0.0, *(sign * fraction * strength for sign in signs for fraction in fractions)]
    doses = []
    for n, value in enumerate(grid):
        progress("dose-response", n, len(grid))
        doses.append(_dose(meter, scored, edit, held, value))
    progress("dose-response", len(grid), len(grid))
    ordered = tuple(sorted(doses, key=lambda dose: dose.strength))
    curve = Calibration(ordered, budget, strength, meter.reference.tokens, preview)
    notes = {"control": control_metric(held), "costs": ["neutral_cost", *halves], "by": by}
    every = {**steering.provenance.get("tuning", {}), contrast.behaviour: notes}
    return steering.tuned({contrast.behaviour: curve}, tuning=every).of(contrast.behaviour)


def require_own(steering: Steering, contrast: Contrast) -> None:
    """Refuse data of a behaviour that a steering does not have."""
    if contrast.behaviour not in steering.behaviours:
        raise InputError(
            f"a contrast of {contrast.behaviour!r} for a steering of "
            + ", ".join(map(repr, steering.behaviours)),
            expected="the behaviour that it was fitted on",
            remedy="take that contrast, or load this one with behaviour=... (command line: "
            "FILE,behaviour=NAME)",
        )


def recalibrate(
    model: LanguageModel | HF,
    steering: Steering,
    contrast: Contrast,
    *,
    seed: int = 0,
    progress: Progress = silent,
    **how: Any,
) -> Steering:
    """Move a tuned steering to a quantised or updated sibling of its model, where it still holds.

    On the new model it is tuned again within the same budget, and must still have: an exact round
    trip (where the map has one: <= 1e-4 of a row), the displacement per strength (0.8 to 1.25 of
    the old), the strength at the budget (0.5 to 2 of the old) and the effect there (>= 0.8 of it).

    Args:
        model: another one of the same tokenizer, template, depth and width.
        contrast: of the behaviour that is moved; the calibration of others is dropped.
        **how: of ``tune``.

    Returns:
        The steering on the new model, calibrated there; its provenance holds ``recalibrated`` with
        the old identity and every figure.

    Raises:
        InputError: not tuned, or this very model. MismatchError: another tokenizer or template, no
            such layers, or a figure out of its range; the message has them all.
    """
    backend = HF.of(model)
    model = backend.model
    old = steering.calibration.get(contrast.behaviour)
    if old is None or steering.base is None:
        raise InputError(
            f"a steering without calibration of {contrast.behaviour!r}",
            expected="one that was tuned on its own model, to compare with",
            remedy="tune it there first, or fit it on this model",
        )
    differing = steering.base.differs(model.fingerprint)
    if not differing:
        raise InputError(
            f"{model.name!r} is the model that this steering was fitted on",
            expected="another one, to recalibrate for",
            remedy="tune it",
        )
    widths = {site: part.width for site, part in steering.interventions.items()}
    fits = all(
        site.layer < len(model.layout.blocks) and model.layout.width_of(site) == width
        for site, width in widths.items()
    )
    if not fits or {"tokenizer", "template"} & set(differing):
        raise MismatchError(
            f"{model.name!r} is no sibling of {steering.base.name!r}: another "
            + (", ".join(differing) if fits else "depth or width"),
            expected="the same tokenizer, chat template, depth and width",
            remedy="fit it on this model",
        )
    moved = replace(steering, base=model.fingerprint, calibration={})
    costs = steering.provenance.get("tuning", {}).get(contrast.behaviour, {}).get("costs", [])
    how = {
        "budget": old.budget,
        "preview": old.preview,
        "joint": "in_format_cost" in costs,
        "both_ways": old.doses[0].strength < 0,
    } | how
    tuned = tune(backend, moved, contrast, seed=seed, progress=progress, **how)
    new = tuned.calibration[contrast.behaviour]
    sites = list(steering.interventions)
    if "jacobians" in steering.steerer.needs:
        rows = linearised(backend, contrast, sites, progress=progress).rows()
    elif steering.steerer.through:
        rows = through(backend, contrast, sites, progress=progress).rows()
    else:
        rows = record_parts(backend, contrast, sites, progress=progress)
    health = steering.steerer.diagnose(rows, steering.interventions)
    before, after = old.at_budget, new.at_budget
    base = [next(d.control or 0.0 for d in c.doses if not d.strength) for c in (old, new)]
    effects = [(d.control or 0.0) - b for d, b in zip((before, after), base, strict=True)]
    per = [dose.displacement / dose.strength for dose in (before, after)]
    figures: dict[str, tuple[float, float, float]] = {
        "displacement": (per[1] / per[0] if per[0] else 0.0, 0.8, 1.25),
        "strength": (new.strength / old.strength, 0.5, 2.0),
        "effect": (effects[1] / effects[0] if effects[0] else 0.0, 0.8, math.inf),
    }
    if "round_trip" in health:
        figures["round_trip"] = (health["round_trip"], 0.0, 1e-4)
    wrong = [
        f"{name} {value:.3g}, not {low:g} to {high:g}"
        for name, (value, low, high) in figures.items()
        if not low <= value <= high
    ]
    if wrong:
        raise MismatchError(
            f"the steering does not hold on {model.name!r}: {'; '.join(wrong)}",
            expected="a round trip as exact, and displacement, strength and effect as they were",
            remedy="fit it on this model",
        )
    notes = {
        "from": steering.identity,
        "base": steering.base.name,
        "differs": differing,
        **{name: value for name, (value, _, _) in figures.items()},
    }
    return replace(tuned, provenance={**tuned.provenance, "recalibrated": notes}, card={})


def _in_format(backend: HF, contrast: Contrast, sites: Sequence[Site]) -> Meter:
    """The in-format half of the cost, on validation prompts."""
    prompts = suites.in_format(contrast, "validation")
    if not prompts:
        raise InputError(
            f"joint tuning of {contrast.behaviour!r}, which has no in-format prompts",
            expected="a built-in behaviour, or Yes/No questions about a statement",
            remedy="tune on the neutral cost alone",
        )
    return backend.meter(backend.reference(prompts, None), sites)


def _worst(costs: Costs, edit: EditAt, strength: float, end: str) -> float:
    """The worse half's cost at a strength: its ``value``, or the ``high`` end of its interval."""
    edits = [edit(strength)]
    scores = []
    for name, meter in costs.items():
        score = metric(name).score(meter(edits, kind=metric(name).kind), level=0.9)
        assert score is not None
        scores.append(getattr(score, end))
    return float(max(scores))


def _search(costs: Costs, edit: EditAt, budget: float, progress: Progress) -> tuple[float, float]:
    """The strength whose cost is within 3 % under the budget, by secant with a bracket; its cost.

    Where not even the largest strength spends the budget, that one.
    """
    low, high = 0.0, math.inf
    strength, spent = 1.0, 0.0
    tried: dict[float, float] = {}
    for step in range(20):
        progress("search", min(step, STAGES), STAGES)
        cost = tried[strength] = _worst(costs, edit, strength, "value")
        if cost <= budget:
            low, spent = strength, cost
        else:
            high = min(high, strength)
        if 0.97 * budget <= cost <= budget:
            break
        guess = following(tried, strength, 0.985 * budget)
        if not low < guess < high:
            guess = (low + high) / 2 if math.isfinite(high) else low * 2
        if not 1e-4 <= guess <= 1e4 or guess in tried:
            break
        strength = guess
    progress("search", STAGES, STAGES)
    if low == 0:
        raise _unspent(budget, f"strength {high:g} costs more")
    return low, spent if math.isinf(high) else budget


def _unspent(budget: float, even: str) -> BudgetError:
    return BudgetError(
        f"no strength of this steering spends {budget} nats per token: even {even}",
        expected="a cost that grows from 0 with strength, or items that a strength moves",
        remedy="look at the steering (innsteer inspect), or fit it again",
    )


def _enough(
    scored: Meter, edit: EditAt, items: Contrast, limit: float, spent: float, budget: float
) -> float:
    """The smallest strength that has 98 % of the best effect within the budget; 1 = as fitted.

    A gate may leave all else alone, so that cost comes late and from a few prompts, long after the
    items have all moved; a map without one has its effect where it spends the budget. The effect is
    what an answer's probability gains: its share of both may be right while neither is ever said.
    Open answers, whose preference is near 1 far below the budget, get the whole budget if they can.

    Raises:
        BudgetError: the budget is not spent, and no strength has an effect either.
    """
    bounded = spent >= 0.97 * budget
    most = limit / 1.5 if bounded else limit
    tried = [strength for strength in (0.5, 1.0, 2.0, 4.0) if strength <= most]
    if bounded and (items.kind == "open" or not tried):
        return limit
    tried += [limit] if bounded or not tried else []
    effects: dict[float, float] = {}
    base = _said(scored([edit(0.0)]), items)
    for strength in tried:
        moved: list[float] = []
        said = _said(scored([edit(strength)], displacement=moved), items)
        if any(moved):
            effects[strength] = said - base
    best = max(effects.values(), default=0.0)
    if best > 0:
        return min(strength for strength, effect in effects.items() if effect >= 0.98 * best)
    if bounded:
        return limit
    raise _unspent(budget, f"strength {limit:g} costs {spent:.3g}")


def _said(scored: Sequence[Completion], items: Contrast) -> float:
    """Mean probability of the answer steered for; of open ones the preference for it."""
    found = control(scored, items)
    if items.kind == "choice":
        return float(np.mean([one.values["match"][0] for one in found]))
    score = metric(control_metric(items)).score(found)
    assert score is not None
    return score.value


def within(
    cost: Callable[[float], float], strength: float, budget: float, progress: Progress = silent
) -> float:
    """The strength, shrunk until its cost is within the budget.

    Args:
        cost: of a strength, nats: the upper end of its interval.

    Raises:
        BudgetError: it is at no strength tried.
    """
    tried: dict[float, float] = {}
    for step in range(CHECKS):
        progress("check", step, CHECKS)
        high = tried[strength] = cost(strength)
        if high <= budget:
            progress("check", CHECKS, CHECKS)
            return strength
        guess = following(tried, strength, 0.97 * budget)
        strength = guess if step < CHECKS // 2 else min(guess, FLAT * strength)
    raise BudgetError(
        f"the cost stays above {budget} nats at every strength tried",
        remedy="fit with more data, or raise the budget",
    )


def _dose(meter: Meter, scored: Meter, edit: EditAt, items: Contrast, strength: float) -> Dose:
    """One point of the dose-response curve: cost by ``meter``, control by ``scored``."""
    moved: list[float] = []
    edits = [edit(strength)]
    cost = metric("neutral_cost").score(meter(edits, displacement=moved), level=0.9)
    gain = metric(control_metric(items)).score(control(scored(edits), items))
    assert cost is not None and gain is not None
    displacement = float(np.mean(moved)) if moved else 0.0
    return Dose(
        strength, cost.value, cost.low, cost.high, displacement, gain.value, gain.low, gain.high
    )

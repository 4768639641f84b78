"""Record and fit in one call; then dose-response, strength within a budget, layer choice."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innsteer.activations import Activations, Read
from innsteer.backends.base import Completion, Kind, Progress, Prompt, Sampling, silent
from innsteer.backends.hf import HF, Meter
from innsteer.backends.through import Through
from innsteer.calibration import BUDGET, Calibration, Dose
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError, InputError, LeakError, MismatchError
from innsteer.files import read_json, write_json
from innsteer.fingerprint import Fingerprint
from innsteer.metrics import get as metric
from innsteer.models import LanguageModel
from innsteer.site import Site, Span, Where
from innsteer.steerer import Interventions, Steerer, get
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

STAGES = 8
FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5)
ORIGIN = ("whole_contrast", "train_groups")
"""What a recording of parts knows of its contrast: the hash, and digests of the fitted groups."""
Costs = Mapping[str, Meter]
"""Halves of the cost by their metric's name."""


def default_site(model: LanguageModel) -> Site:
    """Two thirds up: late enough to hold what is being said, early enough to be acted on.

    On the embedded model that is block 19 of 30. A starting point: ``choose_layer`` compares.
    """
    return Site(max(2 * len(model.layout.blocks) // 3 - 1, 0))


def record(
    model: LanguageModel,
    contrast: Contrast,
    sites: Sequence[Site] = (),
    *,
    read: Read | None = None,
    span: Span = (0, None),
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Activations:
    """Activations of a contrast's two sides.

    Args:
        sites: where; default: one site two thirds up.
        read: which answer tokens become rows; default: their ``mean`` for open answers, ``last``
            for choices. span: those of ``span``, half-open, counted from the answer's first token.
        folder: also write the recording there, batch by batch; it must not exist.
    """
    chosen = read or ("last" if contrast.kind == "choice" else "mean")
    where = sites or (default_site(model),)
    return HF(model).record(
        contrast, where, read=chosen, span=span, folder=folder, progress=progress
    )


def fit(
    model: LanguageModel,
    contrast: Contrast,
    method: str | Steerer = "innsteer",
    *,
    sites: Sequence[Site] = (),
    read: Read | None = None,
    span: Span = (0, None),
    folder: str | Path | None = None,
    where: Where = Where(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
    **fields: Any,
) -> Steering:
    """Record and fit in one call.

    Args:
        contrast: its training part is fitted; a validation part serves early stopping.
        method: a name from ``innsteer.names()``, or a steerer.
        sites: default: one site two thirds up. folder: also write the recording there.
        **fields: of the method.

    Returns:
        A Steering that is not tuned: strength 1 is the fitted map.

    Raises:
        UnknownName: no such method or field.
    """
    steerer = get(method, **fields) if isinstance(method, str) else method
    if steerer.through:
        if read is not None or span != (0, None):
            raise InputError(
                f"a read rule for {steerer.name!r}, which is fitted through the model",
                expected="none: its rows are those of the steered tokens",
            )
        run = through(model, contrast, sites, progress=progress)
        return fit_run(
            model, steerer, run, contrast, folder=folder, where=where, seed=seed, progress=progress
        )
    acts = record_parts(
        model, contrast, sites, read=read, span=span, folder=folder, progress=progress
    )
    return fit_rows(model, steerer, acts, where=where, seed=seed, progress=progress)


def through(
    model: LanguageModel | HF,
    contrast: Contrast,
    sites: Sequence[Site] = (),
    *,
    unmoved: Sequence[Prompt] | None = None,
    progress: Progress = silent,
) -> Through:
    """The model as a fit through it sees it: training and validation items, and what must not move.

    Args:
        sites: default: one site two thirds up.
        unmoved: bare prompts whose answer an edit shall not change; default: for Yes/No questions
            the package's unrelated statements in the contrast's own wording (their fitting part,
            of which neither tuning nor evaluation sees a kind), for others none. Beside them stand
            some of these statements as plain prompts, with the model's own answers.
    """
    backend = model if isinstance(model, HF) else HF(model)
    items = tuple(item for item in contrast.items if item.split in ("train", "validation"))
    if not any(item.split == "train" for item in items):
        raise InputError(
            f"contrast {contrast.behaviour!r} has no training items", expected="at least two"
        )
    bare = _unrelated(contrast) if unmoved is None else tuple(unmoved)
    plain = suites.unmoved("fit", "{statement}")[::4]
    references = [
        *([backend.reference(bare, None)] if bare else []),
        backend.reference(plain, Sampling(12, 1.0), progress=progress),
    ]
    where = sites or (default_site(backend.model),)
    return Through(backend, [replace(contrast, items=items)], where, references, progress=progress)


def _unrelated(contrast: Contrast) -> tuple[Prompt, ...]:
    """Unrelated statements in a Yes/No contrast's own wording; () for other contrasts."""
    yes_no = {item.key for item in contrast.items} <= {"Yes", "No"}
    return suites.in_format(contrast, "fit") if yes_no and not contrast.builtin else ()


def fit_run(
    model: LanguageModel,
    steerer: Steerer,
    run: Through,
    contrast: Contrast,
    *,
    folder: str | Path | None = None,
    where: Where = Where(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
) -> Steering:
    """Fit through the model, with provenance; ``folder`` keeps the target-seeking rows.

    Raises:
        InputError: another scope than ``generated``: kept prefixes end at the last prompt token.
    """
    if where != Where():
        raise InputError(
            f"scope {where} for {steerer.name!r}, which is fitted through the model",
            expected="scope generated",
        )
    progress("fit", 0, 1)
    started = time.perf_counter()
    fitted = steerer.fit_through(run, seed=seed)
    seconds = time.perf_counter() - started
    progress("fit", 1, 1)
    groups = {_digest(item.group) for item in contrast.items if item.split == "train"}
    origin = dict(zip(ORIGIN, (contrast.hash, sorted(groups)), strict=True))
    acts = run.rows()
    acts = replace(acts, provenance={**acts.provenance, **origin})
    if folder is not None:
        acts.save(folder)
    return _fitted(model, steerer, fitted, acts, where, seed, seconds)


def fit_rows(
    model: LanguageModel,
    steerer: Steerer,
    acts: Activations,
    *,
    where: Where = Where(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
) -> Steering:
    """Fit on recorded rows, with provenance and the method's own diagnostics.

    Raises:
        MismatchError: the rows were recorded on another model.
    """
    recorded = acts.provenance.get("fingerprint")
    if recorded and (other := Fingerprint(**recorded).differs(model.fingerprint)):
        raise MismatchError(
            f"these rows were recorded on {recorded['name']!r}, and {model.name!r} has another "
            + ", ".join(other),
            remedy="record them on this model",
        )
    progress("fit", 0, 1)
    started = time.perf_counter()
    fitted = steerer.fit(acts, seed=seed)
    seconds = time.perf_counter() - started
    progress("fit", 1, 1)
    return _fitted(model, steerer, fitted, acts, where, seed, seconds)


def _fitted(
    model: LanguageModel,
    steerer: Steerer,
    fitted: Interventions,
    acts: Activations,
    where: Where,
    seed: int,
    seconds: float,
) -> Steering:
    """The steering of a fit on these rows."""
    provenance = {
        "recording": acts.hash,
        "contrast": acts.provenance.get("contrast"),
        "read": acts.read,
        "seed": seed,
        "rows": len(acts),
        "fit_seconds": round(seconds, 3),
        "torch": torch.__version__,
        "diagnostics": steerer.diagnose(acts, fitted),
        **{key: acts.provenance[key] for key in ORIGIN if key in acts.provenance},
    }
    return Steering(
        steerer, fitted, acts.behaviours, where, model.fingerprint, provenance=provenance
    )


def record_parts(
    model: LanguageModel,
    contrast: Contrast,
    sites: Sequence[Site] = (),
    *,
    read: Read | None = None,
    span: Span = (0, None),
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Activations:
    """Rows of the training part and, for early stopping, of the validation part; never of test.

    The provenance keeps the whole contrast's hash and digests of the training groups, on which
    tuning and evaluation then refuse to measure (``check_unseen``).
    """
    kept = [item for item in contrast.items if item.split in ("train", "validation")]
    if not any(item.split == "train" for item in kept):
        raise InputError(
            f"contrast {contrast.behaviour!r} has no training items", expected="at least two"
        )
    part = replace(contrast, items=tuple(kept))
    acts = record(model, part, sites, read=read, span=span, folder=folder, progress=progress)
    groups = {_digest(item.group) for item in kept if item.split == "train"}
    origin = dict(zip(ORIGIN, (contrast.hash, sorted(groups)), strict=True))
    acts = replace(acts, provenance={**acts.provenance, **origin})
    if folder is not None:
        head = Path(folder) / "activations.json"
        write_json(head, read_json(head, "a finished recording") | {"provenance": acts.provenance})
    return acts


def check_unseen(steering: Steering, part: Contrast) -> None:
    """Refuse items whose group the steering was fitted on; one that names no groups passes.

    Raises:
        LeakError: it counts the items and names the first.
    """
    fitted = set(steering.provenance.get("train_groups", ()))
    seen = [item for item in part.items if _digest(item.group) in fitted]
    if seen:
        first = ", ".join(repr(item.id) for item in seen[:3]) + (", ..." if len(seen) > 3 else "")
        raise LeakError(
            f"this steering was fitted on the groups of {len(seen)} of {len(part)} {seen[0].split} "
            f"items of {part.behaviour!r}: {first}",
            expected="groups that the fit did not see",
            remedy="use the file, split and seed that it was fitted with, or fit it again",
        )


def _digest(group: str) -> str:
    """Short and one-way: an artifact says what it was fitted on without repeating the texts."""
    return sha256(group.encode()).hexdigest()[:16]


# --- control and cost ----------------------------------------------------------------------------


def control_meter(backend: HF, items: Contrast, sites: Sequence[Site]) -> Meter:
    """Both answers of every item, to be scored under edits."""
    prompts = [
        Prompt(item.id, item.prompt, (item.target, item.source))
        for item in items.items
        if item.source is not None and item.target is not None
    ]
    if not prompts:
        raise InputError(
            f"contrast {items.behaviour!r} has no item with both sides",
            expected="pairs, to measure control on",
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
    """Find the strength that spends a cost budget, and the dose-response curve around it.

    The neutral cost grows with the square of a small strength, so the search scales by the root of
    budget over cost until it lies within 3 % under the budget. The last check asks that the upper
    end of the cost's 90 % interval, on at least ``check_tokens`` response tokens of at least 100
    neutral prompts of the validation part, stays within the budget; else strength shrinks. The
    curve is measured on the tokens of that check, so that its nats are those of the budget; in a
    preview, on the search's.

    Args:
        model: or a backend, which keeps the neutral continuations for the next steering.
        contrast: control is measured on its validation part; of a behaviour that is steered.
        budget: nats per token. fractions: of the found strength, for the curve.
        both_ways: measure negative strengths too.
        joint: hold the in-format half of the cost to the budget as well, on the behaviour's own
            in-format validation prompts.
        preview: leave the last check out, and say so in the artifact.

    Raises:
        InputError: a budget that is not above 0; a contrast of another behaviour; ``joint``
            without in-format prompts.
        LeakError: the steering was fitted on groups of the validation part.
        BudgetError: no strength in 1e-4 .. 1e4 spends the budget, or the check cannot be met.
    """
    if not 0 < budget < math.inf:
        raise InputError(f"budget {budget}", expected="nats per token, above 0")
    if contrast.behaviour not in steering.behaviours:
        raise InputError(
            f"a contrast of {contrast.behaviour!r} for a steering of "
            + ", ".join(map(repr, steering.behaviours)),
            expected="the behaviour that it was fitted on",
            remedy="tune on that contrast, or load this one with behaviour=...",
        )
    held = contrast.part("validation")
    check_unseen(steering, held)
    held = held.subset(min(len(held), control_items), seed)
    backend = model if isinstance(model, HF) else HF(model)
    sites = list(steering.interventions)
    behaviour = steering.behaviours[0]
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
    strength = _search({"neutral_cost": meter, **halves}, steering, budget, progress)
    if not preview:
        meter = backend.meter(whole, sites)
        strength = _check({"neutral_cost": meter, **halves}, steering, strength, budget, progress)
    scored = control_meter(backend, held, sites)
    signs = (1.0, -1.0) if both_ways else (1.0,)
    grid = [0.0, *(sign * fraction * strength for sign in signs for fraction in fractions)]
    doses = []
    for n, value in enumerate(grid):
        progress("dose-response", n, len(grid))
        doses.append(_dose(meter, scored, steering, held, value))
    progress("dose-response", len(grid), len(grid))
    ordered = tuple(sorted(doses, key=lambda dose: dose.strength))
    curve = Calibration(ordered, budget, strength, meter.reference.tokens, preview)
    notes = {"tuned_control": control_metric(held), "tuned_costs": ["neutral_cost", *halves]}
    return steering.tuned({behaviour: curve}, **notes)


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


def _worst(costs: Costs, steering: Steering, strength: float, end: str) -> float:
    """The worse half's cost at a strength: its ``value``, or the ``high`` end of its interval."""
    edits = [steering.edit(strength)]
    scores = []
    for name, meter in costs.items():
        score = metric(name).score(meter(edits, kind=metric(name).kind), level=0.9)
        assert score is not None
        scores.append(getattr(score, end))
    return float(max(scores))


def _search(costs: Costs, steering: Steering, budget: float, progress: Progress) -> float:
    """The strength whose cost is within 3 % under the budget, by secant with a bracket."""
    low, high = 0.0, math.inf
    strength, spent = 1.0, 0.0
    for step in range(20):
        progress("search", min(step, STAGES), STAGES)
        cost = _worst(costs, steering, strength, "value")
        if cost <= budget:
            low, spent = strength, cost
        else:
            high = min(high, strength)
        if 0.97 * budget <= cost <= budget:
            break
        guess = strength * math.sqrt(0.985 * budget / cost) if cost > 0 else strength * 10
        guess = min(max(guess, strength / 10), strength * 10)
        if not low < guess < high:
            guess = (low + high) / 2 if math.isfinite(high) else low * 2
        if not 1e-4 < guess < 1e4:
            break
        strength = guess
    progress("search", STAGES, STAGES)
    # Either nothing was within the budget, or nothing was over it.
    if low == 0 or (math.isinf(high) and spent < 0.97 * budget):
        cheap = f"strength {low:g} costs {spent:.3g}" if low else f"strength {high:g} costs more"
        raise BudgetError(
            f"no strength of this steering spends {budget} nats per token: even {cheap}",
            expected="a cost that grows from 0 with strength",
            remedy="look at the steering (innsteer inspect), or fit it again",
        )
    return low


def _check(
    costs: Costs,
    steering: Steering,
    strength: float,
    budget: float,
    progress: Progress,
) -> float:
    """Shrink until the upper end of the cost's 90 % interval is within the budget."""
    for step in range(8):
        progress("check", step, 8)
        high = _worst(costs, steering, strength, "high")
        if high <= budget:
            progress("check", 8, 8)
            return strength
        strength *= math.sqrt(0.97 * budget / high)
    raise BudgetError(
        f"the cost stays above {budget} nats at every strength tried",
        remedy="fit with more data, or raise the budget",
    )


def _dose(
    meter: Meter, scored: Meter, steering: Steering, items: Contrast, strength: float
) -> Dose:
    """One point of the dose-response curve: cost by ``meter``, control by ``scored``."""
    moved: list[float] = []
    edits = [steering.edit(strength)]
    cost = metric("neutral_cost").score(meter(edits, displacement=moved), level=0.9)
    gain = metric(control_metric(items)).score(control(scored(edits), items))
    assert cost is not None and gain is not None
    displacement = float(np.mean(moved)) if moved else 0.0
    return Dose(
        strength, cost.value, cost.low, cost.high, displacement, gain.value, gain.low, gain.high
    )


def choose_layer(
    model: LanguageModel,
    contrast: Contrast,
    method: str | Steerer,
    sites: Sequence[Site],
    *,
    budget: float = BUDGET,
    read: Read | None = None,
    span: Span = (0, None),
    where: Where = Where(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
    **fields: Any,
) -> Steering:
    """Fit at each site, spend the same budget, and keep the site with the most control.

    All by the search's tokens and the validation items. The provenance holds the table
    (``layers``: control, or None where no strength spends the budget) and why (``layers_failed``).

    Raises:
        BudgetError: the budget can be spent at none of the sites.
    """
    if not sites:
        raise InputError("no site to choose from", expected="at least one")
    steerer = get(method, **fields) if isinstance(method, str) else method
    sites = sorted(set(sites))
    backend = HF(model)
    how: dict[str, Any] = {"where": where, "seed": seed, "progress": progress}
    if not steerer.through:
        rows = record_parts(model, contrast, sites, read=read, span=span, progress=progress)
    tried: dict[str, Steering] = {}
    table: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    for site in sites:
        if steerer.through:
            fitted = fit(model, contrast, steerer, sites=[site], read=read, span=span, **how)
        else:
            fitted = fit_rows(model, steerer, rows.at(site), **how)
        try:
            tuned = tune(
                backend,
                fitted,
                contrast,
                budget=budget,
                fractions=(1.0,),
                preview=True,
                seed=seed,
                progress=progress,
            )
        except BudgetError as error:
            table[str(site)], failed[str(site)] = None, str(error)
            continue
        table[str(site)] = tuned.calibration[tuned.behaviours[0]].at_budget.control or 0.0
        tried[str(site)] = fitted
    if not tried:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in failed.items())
        raise BudgetError(f"no site spends {budget} nats per token: {reasons}")
    chosen = tried[max(tried, key=lambda site: table[site] or 0.0)]
    notes = {"layers": table} | ({"layers_failed": failed} if failed else {})
    return replace(chosen, provenance={**chosen.provenance, **notes})

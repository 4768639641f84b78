"""Choosing on validation: the layer with the most control, the simplest method that is as good."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from innsteer.activations import Read
from innsteer.backends.base import Completion, Progress, silent
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.calibration import BUDGET
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError, InputError
from innsteer.fitting import Contrasts, fit_rows, fit_run, record_parts, through
from innsteer.fitting import fit as fit_one
from innsteer.metrics import get as metric
from innsteer.models import LanguageModel
from innsteer.site import Site, Span, Where
from innsteer.steerer import Steerer, get
from innsteer.steering import Steering
from innsteer.tuning import control, control_meter, control_metric, tune

ENOUGH = 6
"""Validation items below which an interval over them says nothing."""
MATTERS = 0.01
"""A lead of less is none: open answers that all prefer the target differ by next to nothing."""


def candidates(contrast: Contrast) -> dict[str, Steerer]:
    """What ``auto`` tries, simplest first: one direction, then what reads its input.

    A fit through the model needs pairs; data without them is left to methods of two classes.
    """
    target = get("innsteer", objective="target")
    if contrast.kind == "choice":
        gated = get("gated", method="condgrad", gate="lda", statements="pairs")
        return {"diffmean": get("diffmean"), "gated condgrad": gated, "innsteer, target": target}
    found = {"diffmean": get("diffmean"), "innsteer, classes": get("innsteer")}
    pairs = all(item.source is not None and item.target is not None for item in contrast.items)
    return found | ({"innsteer, target": target} if pairs else {})


def fit(
    model: LanguageModel | HF,
    contrast: Contrasts,
    method: str | Steerer = "innsteer",
    *,
    sites: Sequence[Site] = (),
    seed: int = 0,
    progress: Progress = silent,
    **how: Any,
) -> Steering:
    """Record and fit in one call; ``method="auto"`` picks the method on the validation part.

    Args:
        contrast: its training part is fitted; a validation part serves early stopping. Several: one
            map for all, a column of strengths for each behaviour.
        method: a name from ``innsteer.names()``, a steerer, or ``"auto"``: see ``choose_method``.
        sites: default: one site two thirds up, half way for a fit through the model.
        **how: ``read, span, folder, unmoved, where`` of ``fitting.fit``, and fields of the method.

    Returns:
        A Steering that is not tuned: strength 1 is the fitted map.

    Raises:
        UnknownName: no such method or field. InputError: ``auto`` with fields or several contrasts.
    """
    if method != "auto":
        return fit_one(model, contrast, method, sites=sites, seed=seed, progress=progress, **how)
    if how or not isinstance(contrast, Contrast):
        what = ", ".join(how) or f"{len(contrast)} contrasts"
        raise InputError(
            f"{what} beside method 'auto'",
            expected="one contrast and no fields: each method keeps its own",
            remedy="name the method that they belong to",
        )
    return choose_method(model, contrast, sites=sites, seed=seed, progress=progress)


def choose_method(
    model: LanguageModel | HF,
    contrast: Contrast,
    methods: Mapping[str, Steerer] | None = None,
    *,
    sites: Sequence[Site] = (),
    budget: float = BUDGET,
    seed: int = 0,
    progress: Progress = silent,
) -> Steering:
    """Fit each method, spend the same budget, and keep the simplest within noise of the best.

    Each is fitted on the training part and tuned in a preview on the validation part; what counts
    is its control there. A method is within noise where the 95 % interval of the best one's lead,
    paired by item, reaches below 0.01. Small data cannot tell methods apart, and then the simplest
    is kept.

    Args:
        methods: by name, simplest first; default: ``candidates(contrast)``.

    Returns:
        The kept one, not tuned. Its provenance holds ``methods`` (control with interval, lead of
        the best, or why it failed), ``why``, and ``caution`` where the data cannot tell the kept
        one from no steering at all; a warning says so too.

    Raises:
        BudgetError: none of them spends the budget.
    """
    tried = methods or candidates(contrast)
    backend = HF.of(model)
    items = contrast.validation
    score = metric(control_metric(items))
    spend = partial(_preview, budget=budget, seed=seed, progress=progress)
    # A run with unmoved prompts in other words has other rows than one without.
    runs: dict[bool, Through] = {}
    rows = None
    fitted: dict[str, Steering] = {}
    answers: dict[str, list[Completion]] = {}
    plain: dict[str, list[Completion]] = {}
    table: dict[str, Any] = {}
    for name, steerer in tried.items():
        if steerer.through:
            again = steerer.rewords
            if again not in runs:
                runs[again] = through(backend, contrast, sites, reworded=again, progress=progress)
            one = fit_run(backend, steerer, runs[again], contrast, seed=seed, progress=progress)
        else:
            rows = rows or record_parts(backend, contrast, sites, progress=progress)
            one = fit_rows(backend, steerer, rows, seed=seed, progress=progress)
        try:
            tuned = spend(backend, one, contrast)
        except BudgetError as error:
            table[name] = {"failed": str(error)}
            continue
        meter = control_meter(backend, items, list(one.interventions))
        strength = tuned.resolve("budget")
        answers[name] = control(meter([tuned.edit(strength)]), items)
        plain[name] = control(meter([tuned.edit(0.0)]), items)
        fitted[name] = one
        own = score.score(answers[name])
        assert own is not None
        table[name] = {"control": own.value, "low": own.low, "high": own.high, "items": own.n}
    if not fitted:
        reasons = "; ".join(f"{name}: {found['failed']}" for name, found in table.items())
        raise BudgetError(f"no method spends {budget} nats per token: {reasons}")
    best = max(fitted, key=lambda name: table[name]["control"])
    kept = best
    for name in reversed(list(fitted)):
        lead = score.difference(answers[best], answers[name])
        assert lead is not None
        table[name] |= {"behind": lead.value, "behind_low": lead.low, "behind_high": lead.high}
        if lead.low < MATTERS:
            kept = name
    gain = score.difference(answers[kept], plain[kept])
    assert gain is not None
    if gain.n < ENOUGH:
        kept = next(iter(fitted))
    notes = {"methods": table, "why": _why(kept, best, table)}
    if gain.n < ENOUGH:
        notes["caution"] = (
            f"{gain.n} validation items cannot tell methods apart, so the simplest was kept; "
            f"give at least {ENOUGH}"
        )
        warnings.warn(str(notes["caution"]), stacklevel=2)
    elif gain.low <= 0:
        notes["caution"] = (
            f"{kept} moves {gain.n} validation items by {gain.value:.3f} ({gain.low:.3f} to "
            f"{gain.high:.3f}): the data cannot tell it from no steering; give more examples"
        )
        warnings.warn(str(notes["caution"]), stacklevel=2)
    chosen = fitted[kept]
    return replace(chosen, provenance={**chosen.provenance, **notes})


def _preview(backend: HF, fitted: Steering, contrast: Contrast, **how: Any) -> Steering:
    """Spend the budget by the search's tokens, and measure control there alone."""
    return tune(backend, fitted, contrast, fractions=(1.0,), preview=True, **how)


def _why(kept: str, best: str, table: Mapping[str, Any]) -> str:
    """Why a method was kept, in a sentence."""
    own = table[kept]
    shown = f"{kept} has control {own['control']:.3f} ({own['low']:.3f} to {own['high']:.3f})"
    if own["items"] < ENOUGH:
        return f"{shown} on {own['items']} validation items: too few to compare on"
    if kept == best:
        return f"{shown} on {own['items']} validation items, and no simpler method is within noise"
    return (
        f"{shown} on {own['items']} validation items; {best}, the best, leads by "
        f"{own['behind']:.3f} ({own['behind_low']:.3f} to {own['behind_high']:.3f}): within noise, "
        "so the simpler one is kept"
    )


def choose_layer(
    model: LanguageModel | HF,
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
    backend = HF.of(model)
    how: dict[str, Any] = {"where": where, "seed": seed, "progress": progress}
    spend = partial(_preview, budget=budget, seed=seed, progress=progress)
    if not steerer.through:
        rows = record_parts(backend, contrast, sites, read=read, span=span, progress=progress)
    tried: dict[str, Steering] = {}
    table: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    for site in sites:
        if steerer.through:
            fitted = fit_one(backend, contrast, steerer, sites=[site], read=read, span=span, **how)
        else:
            fitted = fit_rows(backend, steerer, rows.at(site), **how)
        try:
            tuned = spend(backend, fitted, contrast)
        except BudgetError as error:
            table[str(site)], failed[str(site)] = None, str(error)
            continue
        table[str(site)] = tuned.calibration[contrast.behaviour].at_budget.control or 0.0
        tried[str(site)] = fitted
    if not tried:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in failed.items())
        raise BudgetError(f"no site spends {budget} nats per token: {reasons}")
    chosen = tried[max(tried, key=lambda site: table[site] or 0.0)]
    notes = {"layers": table} | ({"layers_failed": failed} if failed else {})
    return replace(chosen, provenance={**chosen.provenance, **notes})

"""Choosing on validation: layer, a field that no data decides, the simplest method as good."""

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

from innsteer.activations import Read
from innsteer.backends.base import Completion, Progress, silent
from innsteer.backends.hf import HF, Memo
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
    backend = HF.of(model)
    how: dict[str, Any] = {"where": where, "seed": seed, "progress": progress}
    ordered = sorted(set(sites))
    if steerer.through:
        one = partial(fit_one, backend, contrast, steerer, read=read, span=span, **how)
        fits = {str(site): partial(one, sites=[site]) for site in ordered}
    else:
        rows = record_parts(backend, contrast, ordered, read=read, span=span, progress=progress)
        fits = {
            str(site): partial(fit_rows, backend, steerer, rows.at(site), **how) for site in ordered
        }
    spend = partial(_preview, backend, contrast=contrast, seed=seed, progress=progress)
    return _most("layers", fits, spend, contrast, budget)


def open_choices(steerer: Steerer, named: Container[str]) -> Mapping[str, Sequence[Any]]:
    """A method's choices but for those fields that are named.

    Raises:
        InputError: none is left.
    """
    free = {name: values for name, values in steerer.choices.items() if name not in named}
    if not free:
        raise InputError(
            f"nothing to choose for {steerer.name!r}",
            expected="a method with choices, such as alqr, whose setpoint no data decides",
            remedy="leave out the value that is given" if steerer.choices else "name its fields",
        )
    return free


def choose_value(
    model: LanguageModel | HF,
    contrast: Contrast,
    method: str,
    *,
    sites: Sequence[Site] = (),
    budget: float = BUDGET,
    read: Read | None = None,
    span: Span = (0, None),
    where: Where = Where(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
    **fields: Any,
) -> Steering:
    """Fit with each of the method's ``choices``, spend the same budget, keep the most control.

    For what no data decides, as A-LQR's set-point; fields that are named stay as they are. The
    provenance holds the table (``values``: control, or None where no strength spends the budget)
    and why (``values_failed``).

    Args:
        sites, read, span: as of ``fit``.

    Raises:
        InputError: a method without choices, or all of them named. DataError: no validation part.
        BudgetError: the budget can be spent with none of them.
    """
    steerer = get(method, **fields)
    free = open_choices(steerer, fields)
    contrast.part("validation")  # refused before any work where there is none
    backend = HF.of(model)
    with TemporaryDirectory() as scratch:
        if backend.memo.folder is None:  # rows and Jacobians are made once for all
            backend = copy(backend)
            backend.memo = Memo(scratch)
        how: dict[str, Any] = {"sites": sites, "read": read, "span": span, "where": where}
        fits = {}
        for values in product(*free.values()):
            own = dict(zip(free, values, strict=True))
            name = ", ".join(f"{field}={value}" for field, value in own.items())
            one: Steerer = replace(steerer, **own)  # type: ignore[type-var]
            fits[name] = partial(
                fit_one, backend, contrast, one, seed=seed, progress=progress, **how
            )
        spend = partial(_preview, backend, contrast=contrast, seed=seed, progress=progress)
        return _most("values", fits, spend, contrast, budget)


def _most(
    what: str,
    fits: Mapping[str, Callable[[], Steering]],
    spend: Callable[..., Steering],
    contrast: Contrast,
    budget: float,
) -> Steering:
    """Of fits the one with the most control within the budget, and the table of all."""
    tried: dict[str, Steering] = {}
    table: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    for name, make in fits.items():
        fitted = make()
        try:
            tuned = spend(fitted=fitted, budget=budget)
        except BudgetError as error:
            table[name], failed[name] = None, str(error)
            continue
        table[name] = tuned.calibration[contrast.behaviour].at_budget.control or 0.0
        tried[name] = fitted
    if not tried:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise BudgetError(f"none of the {what} spends {budget} nats per token: {reasons}")
    chosen = tried[max(tried, key=lambda name: table[name] or 0.0)]
    notes = {what: table} | ({f"{what}_failed": failed} if failed else {})
    return replace(chosen, provenance={**chosen.provenance, **notes})

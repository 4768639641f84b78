"""Record and fit in one call: on recorded rows, or through the model."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch

from innsteer.activations import Activations, Read
from innsteer.backends.base import Progress, Prompt, Sampling, silent
from innsteer.backends.hf import HF
from innsteer.backends.local import Local
from innsteer.backends.through import Through
from innsteer.backends.told import Told
from innsteer.concepts import Concepts
from innsteer.contrast import Contrast
from innsteer.errors import InputError, LeakError, MismatchError
from innsteer.files import require_absent
from innsteer.models import LanguageModel
from innsteer.models.fingerprint import Fingerprint
from innsteer.site import Site, Span, Where
from innsteer.steerer import Interventions, Runner, Steerer, get
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

ORIGIN = ("whole_contrast", "train_groups")
"""What a recording of parts knows of its contrast: the hash (of several by behaviour), and digests
of the fitted groups."""

Contrasts = Contrast | Sequence[Contrast]
"""One behaviour's contrast, or one for each of several that shall share a map."""


def default_site(model: LanguageModel) -> Site:
    """Two thirds up: late enough to hold what is being said, early enough to be acted on.

    On the embedded model that is block 19 of 30. A start: ``choose_layer`` compares.
    """
    return Site(max(2 * len(model.layout.blocks) // 3 - 1, 0))


def middle_site(model: LanguageModel) -> Site:
    """Half way up: where what is asked reads alike in other words, and can still be acted on.

    On the embedded model that is block 15 of 30.
    """
    return Site(len(model.layout.blocks) // 2)


def own_sites(model: LanguageModel, steerer: Steerer) -> tuple[Site, ...]:
    """All sites among which a method has a rule of its own; () for a method that has none."""
    stream = {"layers": "residual", "heads": "heads"}.get(steerer.sites)
    if stream is None:
        return ()
    return tuple(Site.parse(f"{n}.{stream}") for n in range(len(model.layout.blocks)))


def record(
    model: LanguageModel | HF,
    contrast: Contrast,
    sites: Sequence[Site] = (),
    *,
    read: Read | None = None,
    span: Span = (0, None),
    folder: str | Path | None = None,
    origin: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Activations:
    """Activations of a contrast's two sides.

    Args:
        sites: where; default: one site two thirds up.
        read: which answer tokens become rows; default: their ``mean`` for open answers, ``last``
            for choices. span: those of ``span``, half-open, counted from the answer's first token.
        folder: also write the recording there, batch by batch; it must not exist.
        origin: more of where the contrast is from, for the provenance.
    """
    chosen = read or ("last" if contrast.kind == "choice" else "mean")
    backend = HF.of(model)
    where = sites or (default_site(backend.model),)
    return backend.record(
        contrast, where, read=chosen, span=span, folder=folder, origin=origin, progress=progress
    )


def fit(
    model: LanguageModel | HF,
    contrast: Contrasts,
    method: str | Steerer = "innsteer",
    *,
    sites: Sequence[Site] = (),
    read: Read | None = None,
    span: Span = (0, None),
    folder: str | Path | None = None,
    unmoved: Sequence[Prompt] | None = None,
    where: Where = Where(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
    **fields: Any,
) -> Steering:
    """Record and fit in one call.

    Args:
        contrast: its training part is fitted; a validation part serves early stopping. Several: one
            map for all, a column of strengths for each behaviour.
        method: a name from ``innsteer.names()``, or a steerer.
        sites: default: one site two thirds up, half way for a fit through the model, or all among
            which the method has a rule of its own. folder: also write the recording there.
        unmoved: bare prompts that a fit through the model shall leave alone; see ``through``.
        **fields: of the method.

    Returns:
        A Steering that is not tuned: strength 1 is the fitted map.

    Raises:
        UnknownName: no such method or field.
    """
    steerer = get(method, **fields) if isinstance(method, str) else method
    if "concepts" in steerer.needs:
        raise InputError(
            f"a contrast for {steerer.name!r}, which learns from concepts in words",
            expected="a table with the columns concept, prompt and response",
            remedy="fitting.fit_concepts(model, Concepts.load(file)), or innsteer fit TABLE "
            f"--method {steerer.name}",
        )
    contrast = each(contrast)
    if steerer.through:
        if read is not None or span != (0, None):
            raise InputError(
                f"a read rule for {steerer.name!r}, which is fitted through the model",
                expected="none: its rows are those of the steered tokens",
            )
        if "jacobians" in steerer.needs and unmoved is None:
            chain = linearised(model, contrast, sites, progress=progress)
            return fit_run(
                model,
                steerer,
                chain,
                contrast,
                folder=folder,
                where=where,
                seed=seed,
                progress=progress,
            )
        _require_generated(steerer, where)
        again = steerer.rewords
        run = through(model, contrast, sites, unmoved=unmoved, reworded=again, progress=progress)
        return fit_run(
            model, steerer, run, contrast, folder=folder, where=where, seed=seed, progress=progress
        )
    if unmoved is not None:
        raise InputError(
            f"unmoved prompts for {steerer.name!r}, which is fitted on recorded rows",
            expected="a method that is fitted through the model",
        )
    sites = sites or own_sites(HF.of(model).model, steerer)
    acts = record_parts(
        model, contrast, sites, read=read, span=span, folder=folder, progress=progress
    )
    return fit_rows(model, steerer, acts, where=where, seed=seed, progress=progress)


def require_contrasts(steerer: Steerer, what: str, remedy: str) -> None:
    """Refuse a method that learns from concepts in words, before anything runs."""
    if "concepts" in steerer.needs:
        raise InputError(
            f"{what} {steerer.name!r}, which learns from concepts in words",
            expected="a method that is fitted on contrasts",
            remedy=remedy,
        )


def through(
    model: LanguageModel | HF,
    contrast: Contrasts,
    sites: Sequence[Site] = (),
    *,
    unmoved: Sequence[Prompt] | None = None,
    reworded: bool = False,
    progress: Progress = silent,
) -> Through:
    """The model as a fit through it sees it: training and validation items, and what must not move.

    Args:
        sites: default: one site half way up.
        unmoved: bare prompts whose answer an edit shall not change; default: for Yes/No questions
            the package's unrelated statements in the contrast's own wording (their fitting part,
            of which neither tuning nor evaluation sees a kind), for open answers the package's
            neutral prompts, for other choices none. Beside them stand some of these statements as
            plain prompts, with the model's own answers.
        reworded: record the statements among them in the package's five paraphrases too, in turn:
            what wording does to a row, which ``nuisances`` of a method leave out.
    """
    backend = HF.of(model)
    contrasts = each(contrast)
    parts = [_fitted_part(one) for one in contrasts]
    bare = suites.in_format_of(contrasts, "fit") if unmoved is None else tuple(unmoved)
    if unmoved is None and all(one.kind == "open" for one in contrasts):
        bare = suites.neutral("fit")  # without a point that stays, nothing could close a gate
    plain = suites.unmoved("fit", "{statement}")[::4]
    references = [
        *([backend.reference(bare, None)] if bare else []),
        backend.reference(plain, Sampling(12, 1.0), progress=progress),
    ]
    again = suites.reworded(bare, contrasts) if reworded else ()
    where = sites or (middle_site(backend.model),)
    return backend.runner(
        backend,
        parts,
        where,
        references,
        reworded=backend.reference(again, None) if again else None,
        progress=progress,
    )


def linearised(
    model: LanguageModel | HF,
    contrast: Contrasts,
    sites: Sequence[Site] = (),
    *,
    progress: Progress = silent,
) -> Local:
    """The model as a chain of blocks about the last token of training texts.

    Args:
        sites: outputs of blocks; default: of all.
    """
    backend = HF.of(model)
    parts = [_fitted_part(one).train for one in each(contrast)]
    every = tuple(map(Site, range(len(backend.model.layout.blocks))))
    return backend.chain(backend, parts, sites or every, progress=progress)


def fit_run(
    model: LanguageModel | HF,
    steerer: Steerer,
    run: Through | Local,
    contrast: Contrasts,
    *,
    folder: str | Path | None = None,
    where: Where = Where(),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
) -> Steering:
    """Fit through the model, with provenance; ``folder`` keeps the rows.

    Raises:
        InputError: another scope than ``generated``: kept prefixes end at the last prompt token. A
            chain of linear blocks keeps none, and takes any.
    """
    if not isinstance(run, Local):
        _require_generated(steerer, where)
    progress("fit", 0, 1)
    started = time.perf_counter()
    # A method that takes a chain says so by its needs.
    fitted = steerer.fit_through(cast(Runner, run), seed=seed)
    seconds = time.perf_counter() - started
    progress("fit", 1, 1)
    acts = run.rows()
    acts = replace(acts, provenance={**acts.provenance, **_origin(contrast)})
    if folder is not None:
        acts.save(folder)
    steering = _fitted(model, steerer, fitted, acts, where, seed, seconds)
    if isinstance(run, Local) and run.errors:
        steering.provenance["diagnostics"]["low_rank_error"] = max(run.errors.values())
    return steering


def _require_generated(steerer: Steerer, where: Where) -> None:
    """Refuse another scope than what kept prefixes allow."""
    if where != Where():
        raise InputError(
            f"scope {where} for {steerer.name!r}, which is fitted through the model",
            expected="scope generated",
        )


def fit_concepts(
    model: LanguageModel | HF,
    concepts: Concepts,
    method: str | Steerer = "flas",
    *,
    site: Site | None = None,
    longest: int = 128,
    half: bool | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **fields: Any,
) -> Steering:
    """Fit one map for all concepts of a table, through the model; every token is steered.

    Args:
        concepts: its training part is learnt, its validation part stops the training.
        method: one that needs concepts. site: a block's output; default: two thirds up.
        longest: tokens of a response that count.
        half: multiply by the frozen blocks above the site in bfloat16; the map stays in float32.
            Default: where the model runs on a GPU.
        checkpoint: a file that an interrupted training goes on from; it is left when it ends.
        **fields: of the method.

    Returns:
        A Steering that asks each request for a concept: ``steering.told(concept="...")``.

    Raises:
        InputError: another method, or a table without training rows.
    """
    backend = HF.of(model)
    steerer = get(method, **fields) if isinstance(method, str) else method
    where = site or default_site(backend.model)
    run = Told(
        backend,
        concepts,
        where,
        longest=longest,
        half=half,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        progress=progress,
    )
    started = time.perf_counter()
    fitted = steerer.fit_told(run, seed=seed)
    provenance = {
        "table": concepts.hash,
        "concepts": list(concepts.named("train")),
        "responses": {part: len(concepts.part(part)) for part in ("train", "validation", "test")},
        "longest": longest,
        "half": run.half,
        "seed": seed,
        "fit_seconds": round(time.perf_counter() - started, 3),
        "torch": torch.__version__,
        "course": run.course,
        "diagnostics": steerer.learnt(run, fitted),
    }
    return Steering(
        steerer,
        fitted,
        ("concept",),
        Where("all"),
        backend.model.fingerprint,
        provenance=provenance,
    )


def extend(
    model: LanguageModel | HF,
    steering: Steering,
    contrast: Contrasts,
    *,
    unmoved: Sequence[Prompt] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Steering:
    """Add behaviours to a fitted steering: one more row of parameters each, the others stay.

    Args:
        contrast: of behaviours that the steering does not have; as in ``fit``.

    Returns:
        A steering of all behaviours. The calibration of the old ones holds, and the diagnostics
        stay those of their fit; tune the new ones.

    Raises:
        InputError: a method that cannot, or a behaviour that is there already.
        MismatchError: a steering of another model.
    """
    backend = HF.of(model)
    steering.check(backend.model)
    contrasts = each(contrast)
    steering.steerer.check_extends(steering.interventions)
    if there := [one.behaviour for one in contrasts if one.behaviour in steering.behaviours]:
        raise InputError(
            f"behaviour {there[0]!r}, which this steering has already",
            expected="another one",
            remedy="load it with behaviour=..., or fit again",
        )
    sites, seconds = list(steering.interventions), 0.0
    grown = steering.interventions
    # One by one: each is dialled by its own items alone.
    for one in contrasts:
        again = steering.steerer.rewords
        run = through(backend, one, sites, unmoved=unmoved, reworded=again, progress=progress)
        progress("fit", 0, 1)
        started = time.perf_counter()
        grown = steering.steerer.extend_through(grown, run, seed=seed)
        seconds += time.perf_counter() - started
        progress("fit", 1, 1)
    old, new = steering.provenance, _origin(contrasts)
    groups = {*old.get("train_groups", ()), *new["train_groups"]}
    added = {one.behaviour: one.hash for one in contrasts}
    notes = {
        "train_groups": sorted(groups),
        "added": {**old.get("added", {}), **added},
        "extend_seconds": round(seconds, 3),
    }
    return replace(
        steering,
        interventions=grown,
        behaviours=(*steering.behaviours, *added),
        provenance={**old, **notes},
    )


def fit_rows(
    model: LanguageModel | HF,
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
        InputError: they are recorded answers, where the method wants rows that seek the target.
    """
    if steerer.through and acts.provenance.get("seeks") != "target":
        raise InputError(
            f"rows of recorded answers for {steerer.name!r}, which is fitted through the model",
            expected="rows that seek the target, made by the model's gradients",
            remedy="fit without rows of your own: leave out --rows",
        )
    recorded, own = acts.provenance.get("fingerprint"), HF.of(model).model
    if recorded and (other := Fingerprint(**recorded).differs(own.fingerprint)):
        raise MismatchError(
            f"these rows were recorded on {recorded['name']!r}, and {own.name!r} has another "
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
    model: LanguageModel | HF,
    steerer: Steerer,
    fitted: Interventions,
    acts: Activations,
    where: Where,
    seed: int,
    seconds: float,
) -> Steering:
    """The steering of a fit on these rows."""
    if fitted.contextual and where != Where():
        raise InputError(
            f"scope {where} for a steering that reads the prompt", expected="scope generated"
        )
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
        steerer,
        fitted,
        acts.behaviours,
        where,
        HF.of(model).model.fingerprint,
        provenance=provenance,
    )


def record_parts(
    model: LanguageModel | HF,
    contrast: Contrasts,
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
    contrasts = each(contrast)
    if folder is not None:
        require_absent(folder)
    how: dict[str, Any] = {"read": read, "span": span, "progress": progress}
    parts = [_fitted_part(one) for one in contrasts]
    if len(parts) == 1:
        return record(model, parts[0], sites, folder=folder, origin=_origin(contrast), **how)
    acts = Activations.together([record(model, part, sites, **how) for part in parts])
    acts = replace(acts, provenance={**acts.provenance, **_origin(contrast)})
    if folder is not None:
        acts.save(folder)
    return acts


def each(contrast: Contrasts) -> tuple[Contrast, ...]:
    """The contrasts, where one stands for itself.

    Raises:
        InputError: none, two of one behaviour, or of both kinds: their rows are read differently.
    """
    found = (contrast,) if isinstance(contrast, Contrast) else tuple(contrast)
    names = [one.behaviour for one in found]
    if not found or len(set(names)) < len(names):
        raise InputError(
            f"the behaviours {', '.join(names) or '(none)'}",
            expected="at least one, each once",
            remedy="name one: Contrast.load(file, behaviour=...), or rename its file",
        )
    if len({one.kind for one in found}) > 1:
        raise InputError(
            f"the behaviours {', '.join(f'{one.behaviour} ({one.kind})' for one in found)} as one",
            expected="all open, or all choices",
            remedy="fit a steering for each kind; a model takes several at once",
        )
    return found


def _fitted_part(contrast: Contrast) -> Contrast:
    """What a fit sees: the training part, and the validation part for early stopping."""
    items = tuple(item for item in contrast.items if item.split in ("train", "validation"))
    if not any(item.split == "train" for item in items):
        raise InputError(
            f"contrast {contrast.behaviour!r} has no training items", expected="at least two"
        )
    return replace(contrast, items=items)


def _origin(contrast: Contrasts) -> dict[str, Any]:
    """``ORIGIN`` of what is fitted."""
    contrasts = each(contrast)
    hashes: dict[str, str] = {one.behaviour: one.hash for one in contrasts}
    items = (item for one in contrasts for item in one.items)
    groups = {_digest(item.group) for item in items if item.split == "train"}
    whole = contrasts[0].hash if len(contrasts) == 1 else hashes
    return dict(zip(ORIGIN, (whole, sorted(groups)), strict=True))


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

"""Verbs that make a steering: record, fit, plan, concepts, extend, tune."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from innsteer import shelf
from innsteer.cli import completing
from innsteer.cli.options import (
    DATA,
    DATAS,
    FIELD,
    FOLDER,
    IN_PLACE,
    JSON,
    LAYERS,
    MODEL,
    READ,
    SEED,
    STEERING,
    TOGETHER,
    base_model,
    check_rows,
    described,
    endpoint_of,
    fields_of,
    memo_beside,
    model_option,
    open_contrast,
    open_model,
    read_rule,
    sites_of,
    source_of,
)
from innsteer.cli.printing import (
    Bars,
    bytes_text,
    command_line,
    dose_table,
    facts_of,
    finish,
    methods_table,
    out,
    warn,
)
from innsteer.cli.verbs import app
from innsteer.errors import InputError, UnknownName
from innsteer.files import require_absent, write_text


@app.command()
def record(
    data: DATA,
    folder: FOLDER,
    model: MODEL = "smollm2",
    layers: LAYERS = "",
    read: READ = "",
    as_json: JSON = False,
) -> None:
    """Record the activations of a contrast's two sides."""
    require_absent(folder)
    from innsteer import fitting

    sites, rule = sites_of(layers), read_rule(read)
    with Bars(as_json) as progress:
        contrast = open_contrast(data)
        language_model = open_model(model)
        acts = fitting.record_parts(
            language_model, contrast, sites, **rule, folder=folder, progress=progress
        )
    found = {
        "folder": str(folder),
        "rows": len(acts),
        "sites": [str(site) for site in acts.sites],
        "read": acts.read,
        "hash": acts.hash,
    }
    text = f"{len(acts)} rows at {', '.join(map(str, acts.sites))} in {folder}"
    every = ["--together"] if len(acts.sites) > 1 else []
    words = ["fit", data, "--rows", folder, *every, *model_option(model)]
    following = command_line(*words, "--out", "my-steering")
    finish(as_json, found, text, following)


@app.command()
def fit(
    data: DATAS,
    folder: FOLDER,
    method: Annotated[
        str,
        typer.Option(
            help="See: innsteer methods; auto: the simplest that is as good.",
            autocompletion=completing.methods_or_auto,
        ),
    ] = "innsteer",
    model: MODEL = "smollm2",
    layers: LAYERS = "",
    read: READ = "",
    where: Annotated[
        str, typer.Option(help="generated, prompt, assistant, all or range:START:STOP.")
    ] = "generated",
    field: FIELD = None,
    rows: Annotated[
        Path | None, typer.Option(help="Fit on this recording instead of recording.")
    ] = None,
    together: TOGETHER = False,
    choose: Annotated[
        bool,
        typer.Option(
            "--choose", help="Choose on validation what no data decides, as alqr's setpoint."
        ),
    ] = False,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Fit a steering of one or more behaviours; of several layers, keep the best at the budget."""
    require_absent(folder)
    auto = method == "auto"
    if method not in (known := ["auto", *shelf.names()]):
        raise UnknownName("method", method, known)
    if choose and (auto or rows or len(data) > 1):
        raise InputError(
            "--choose beside --rows, --method auto or several behaviours",
            expected="one behaviour's data, on whose validation part the values are compared",
        )
    if auto and (field or rows or layers or read or where != "generated" or len(data) > 1):
        raise InputError(
            "--method auto beside --set, --rows, --layers, --read, --where or several behaviours",
            expected="one behaviour's data alone: each method keeps its own",
            remedy="name the method",
        )
    fields = {} if auto else fields_of(method, field or [])
    if not auto and "concepts" in described(method)["needs"]:
        if rows or read or where != "generated" or together or choose or len(data) > 1:
            raise InputError(
                f"--method {method} beside --rows, --read, --where, --together, --choose or "
                "several tables",
                expected="one table of concepts, prompts and responses; every token is steered",
            )
        _fit_concepts(data[0], folder, method, model, layers, fields, seed, as_json)
        return
    from innsteer import choosing, fitting
    from innsteer.activations import Activations
    from innsteer.backends.hf import HF
    from innsteer.site import Where
    from innsteer.steerer import get

    steerer: Any = method if auto else get(method, **fields)
    if choose:
        choosing.open_choices(steerer, fields)
    place = Where.parse(where)
    sites, rule = sites_of(layers), read_rule(read)
    if rows and read:
        raise InputError(f"--read {read} beside --rows", remedy="the rows were read already")
    compared = len(sites) > 1 and not together
    if choose and compared:
        raise InputError(
            f"--choose at {len(sites)} layers that are compared",
            expected="one layer, or all of them as one steering with --together",
        )
    if len(data) > 1 and (rows or compared):
        raise InputError(
            f"{len(data)} behaviours " + ("from a recording" if rows else "at several layers"),
            expected="data of one behaviour, or several recorded now and fitted at chosen layers",
            remedy="leave out --rows, name one layer, or fit all layers with --together",
        )
    with Bars(as_json) as progress, memo_beside(folder) as memo:
        contrasts = [open_contrast(one) for one in data]
        contrast = contrasts[0]
        recorded = Activations.load(rows) if rows else None
        if recorded is not None and sites:
            recorded = recorded.at(*sites)
        if recorded is not None:
            check_rows(recorded, rows, contrast, data[0], together)
        backend = HF(open_model(model), memo=memo)
        if recorded is not None:
            steering = fitting.fit_rows(
                backend, steerer, recorded, where=place, seed=seed, progress=progress
            )
        elif auto:
            steering = choosing.choose_method(backend, contrast, seed=seed, progress=progress)
        elif choose:
            steering = choosing.choose_value(
                backend,
                contrast,
                method,
                sites=sites,
                **rule,
                where=place,
                seed=seed,
                progress=progress,
                **fields,
            )
        elif compared:
            steering = choosing.choose_layer(
                backend,
                contrast,
                steerer,
                sites,
                **rule,
                where=place,
                seed=seed,
                progress=progress,
            )
        else:
            steering = fitting.fit(
                backend,
                contrasts,
                steerer,
                sites=sites,
                **rule,
                where=place,
                seed=seed,
                progress=progress,
            )
        # Where the model came from, for the next verbs; its name alone may not lead there.
        steering = replace(steering, provenance={**steering.provenance, "model": model})
        steering.save(folder)
    text = f"fitted {steering.steerer.name} in {steering.provenance['fit_seconds']} s -> {folder}"
    if auto:
        if not as_json:
            out.print(methods_table(steering.provenance["methods"]))
        text = f"{steering.provenance['why']}\n{text}"
        if caution := steering.provenance.get("caution"):
            warn(caution)
    if choose:
        values = steering.provenance["values"]
        told = (
            f"{name} {'-' if found is None else f'{found:.3f}'}" for name, found in values.items()
        )
        text = f"control at the budget: {', '.join(told)}\n{text}"
    finish(
        as_json,
        facts_of(steering, folder),
        text,
        command_line("tune", folder, data[0], *model_option(model)),
    )


@app.command()
def plan(
    data: DATAS,
    method: Annotated[
        str, typer.Option(help="See: innsteer methods.", autocompletion=completing.methods)
    ] = "innsteer",
    model: MODEL = "smollm2",
    layers: LAYERS = "",
    read: READ = "",
    field: FIELD = None,
    together: TOGETHER = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Run and time a few passes.")
    ] = True,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Say what a fit with these options takes: passes, disk and time at most, memory about."""
    if method not in shelf.names():
        raise UnknownName("method", method, shelf.names())
    fields = fields_of(method, field or [])
    from innsteer import planning
    from innsteer.steerer import get

    steerer: Any = get(method, **fields)
    planning.require_plannable(steerer)
    sites, rule = sites_of(layers), read_rule(read)
    if len(sites) > 1 and not together:
        raise InputError(
            f"a plan of {len(sites)} layers that are compared",
            expected="one layer, or all of them as one steering with --together",
            remedy="plan one: a comparison fits and tunes each in turn",
        )
    with Bars(as_json) as progress:
        contrasts = [open_contrast(one) for one in data]
        found = planning.plan(
            open_model(model), contrasts, steerer, sites=sites, **rule, seed=seed, measure=measure,
            progress=progress,
        )  # fmt: skip
    facts = found.to_json()
    if not as_json:
        table = Table(show_header=False, box=None)
        passes = f"{found.forward} forward, {found.backward} backward"
        table.add_row("data", f"{found.items} items, {found.tokens:,} tokens")
        table.add_row("passes", f"{passes}, a batch each")
        memory = ", ".join(f"{name} {bytes_text(size)}" for name, size in found.memory.items())
        table.add_row("memory", f"{bytes_text(facts['peak'])}: {memory}")
        table.add_row("recording", f"{found.rows} rows, {bytes_text(found.disk)} on disk if kept")
        spent = ", ".join(f"{name} {value:.3g}" for name, value in found.seconds.items())
        table.add_row("seconds", f"{facts['total_seconds']:.3g}: {spent}" if spent else "?")
        out.print(table)
    words = [f"--set={one}" for one in field or []]
    words += [f"--{name}={value}" for name, value in (("layers", layers), ("read", read)) if value]
    words += ["--together"] if together else []
    following = command_line(
        "fit", *data, "--method", method, *words, *model_option(model), "--out", "my-steering"
    )
    text = (
        "at most: early stopping and short answers take less; of memory about, beside Python and "
        "its libraries: fits took up to 1.3 times as much"
    )
    finish(as_json, facts, text, following)


@app.command()
def concepts(
    listed: Annotated[Path, typer.Argument(help="Concepts: a .txt, one per line, or a table.")],
    file: Annotated[Path, typer.Option("--out", "-o", help="A .jsonl to write; must not exist.")],
    model: MODEL = "smollm2",
    by: Annotated[
        str, typer.Option(help="Who writes instead of the model: URL#MODEL, OpenAI-compatible.")
    ] = "",
    each: Annotated[int, typer.Option(min=1, help="Responses asked for per concept.")] = 12,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 1.0,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Write a table for flas: responses that show concepts, kept where the request helped."""
    require_absent(file)
    if file.suffix != ".jsonl":
        raise InputError(f"--out {file}", expected="a name that ends in .jsonl")
    from innsteer.axbench import distilling
    from innsteer.backends.base import Sampling
    from innsteer.backends.hf import HF
    from innsteer.judging import Endpoint
    from innsteer.models.smollm2 import cache_folder

    wanted = distilling.read_concepts(listed)
    writer = Endpoint(*endpoint_of(by), cache_folder() / "writer", role="writer") if by else None
    with Bars(as_json) as progress, memo_beside(file) as memo:
        found = distilling.distil(
            HF(open_model(model or "smollm2"), memo=memo),
            wanted,
            each=each,
            sampling=Sampling(tokens, temperature, seed),
            writer=writer,
            progress=progress,
        )
        write_text(file, "".join(f"{json.dumps(row._asdict())}\n" for row in found.kept))
    none = [concept for concept, share in found.shares.items() if not share]
    if none:
        warn(f"nothing was kept of {len(none)} concepts: {', '.join(none[:3])}")
    count = sum(found.asked.values())
    text = f"kept {len(found.kept)} of {count} responses ({found.share:.0%}) -> {file}"
    data = {
        "file": str(file),
        "kept": len(found.kept),
        "asked": count,
        "share": found.share,
        "shares": found.shares,
        "by": by or model,
    }
    words = ("--method", "flas", *model_option(model), "--out", "field")
    finish(as_json, data, text, command_line("fit", file, *words))


@app.command()
def extend(
    steering: STEERING,
    data: DATAS,
    model: MODEL = "",
    folder: IN_PLACE = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Add behaviours to a fitted steering; those that it has stay as they are."""
    from innsteer import fitting
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    if folder:
        require_absent(folder)
    fitted, place = Steering.load(steering), folder or steering
    with Bars(as_json) as progress, memo_beside(place) as memo:
        contrasts = [open_contrast(one) for one in data]
        backend = HF(base_model(fitted, model), memo=memo)
        grown = fitting.extend(backend, fitted, contrasts, seed=seed, progress=progress)
        grown.save(place, replace=folder is None)
    names = ", ".join(one.behaviour for one in contrasts)
    text = f"added {names} in {grown.provenance['extend_seconds']} s -> {place}"
    following = command_line("tune", place, data[0], *model_option(model or source_of(grown)))
    finish(as_json, facts_of(grown, place), text, following)


@app.command()
def tune(
    steering: STEERING,
    data: DATA,
    model: MODEL = "",
    budget: Annotated[
        float | None, typer.Option(help="Cost budget, nats per token; default: 0.0953.")
    ] = None,
    both_ways: Annotated[bool, typer.Option(help="Measure negative strengths too.")] = False,
    joint: Annotated[bool, typer.Option(help="Hold the in-format cost to the budget too.")] = False,
    preview: Annotated[bool, typer.Option(help="Skip the last check on 2,000 tokens.")] = False,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            help="Move it to --model, a quantised or updated sibling, if it still holds there.",
        ),
    ] = False,
    folder: IN_PLACE = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Measure dose and response, and find the strength of most effect within the budget."""
    if folder:
        require_absent(folder)
    if recalibrate and not (model and folder and budget is None):
        raise InputError(
            "--recalibrate without --model and --out, or with --budget",
            expected="the sibling to move it to, and a folder of its own; the budget stays",
        )
    from innsteer import tuning
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted, place = Steering.load(steering), folder or steering
    with Bars(as_json) as progress, memo_beside(place) as memo:
        contrast = open_contrast(data)
        given = {"both_ways": both_ways, "joint": joint, "preview": preview, "budget": budget}
        # What was not asked for is left open: a recalibration then keeps what the old curve had.
        how: dict[str, Any] = {n: v for n, v in given.items() if v is not None and v is not False}
        how |= {"seed": seed, "progress": progress}
        if recalibrate:
            backend = HF(open_model(model), memo=memo)
            tuned = tuning.recalibrate(backend, fitted, contrast, **how)
            tuned = replace(tuned, provenance={**tuned.provenance, "model": model})
        else:
            backend = HF(base_model(fitted, model), memo=memo)
            tuned = tuning.tune(backend, fitted, contrast, **how)
        tuned.save(place, replace=folder is None)
    if not as_json:
        out.print(dose_table(tuned))
    curve = tuned.calibration[contrast.behaviour]
    spent = curve.at_budget.nats
    text = f"strength {curve.strength:.4g} costs {spent:.3g} of {curve.budget} nats per token"
    following = command_line(
        "eval", place, "--data", data, *model_option(model or source_of(tuned)), "--out", "report"
    )
    finish(as_json, facts_of(tuned, place), text, following)


def _fit_concepts(
    table: str,
    folder: Path,
    method: str,
    model: str,
    layers: str,
    fields: dict[str, Any],
    seed: int,
    as_json: bool,
) -> None:
    """Fit one map for all concepts of a table; interrupted, the same call goes on."""
    from innsteer import fitting
    from innsteer.backends.hf import HF
    from innsteer.concepts import Concepts
    from innsteer.steerer import get

    concepts = Concepts.load(table)
    steerer: Any = get(method, **fields)
    sites = sites_of(layers)
    if len(sites) > 1:
        raise InputError(f"--layers {layers} for {method!r}", expected="one layer")
    with Bars(as_json) as progress, memo_beside(folder) as memo:
        steering = fitting.fit_concepts(
            HF(open_model(model), memo=memo),
            concepts,
            steerer,
            site=sites[0] if sites else None,
            checkpoint=None if memo.folder is None else memo.folder / "training.safetensors",
            seed=seed,
            progress=progress,
        )
        steering = replace(steering, provenance={**steering.provenance, "model": model})
        steering.save(folder)
    found = steering.provenance["diagnostics"]
    text = (
        f"fitted {method} on {len(concepts.named('train'))} concepts in "
        f"{steering.provenance['fit_seconds']} s -> {folder}\n"
        f"log-probability per token of other responses, in nats: told their concept "
        f"{found['concept']:.3f}, "
        + (f"told another {found['other']:.3f}, " if "other" in found else "")
        + f"plain {found['plain']:.3f}"
    )
    example = concepts.named("train")[0]
    command = command_line("generate", folder, "Tell me about the sea.", "--concept", example)
    finish(as_json, facts_of(steering, folder) | {"diagnostics": found}, text, command)

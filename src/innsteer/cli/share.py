"""Verbs that look into a steering and pass it on: inspect, import, export, push, pull."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from innsteer.cli.options import (
    DATA,
    FOLDER,
    JSON,
    MODEL,
    STEERING,
    STRENGTH,
    base_model,
    concept_of,
    mixed,
    model_option,
    open_contrast,
    open_model,
    sites_of,
    source_of,
    strength_of,
)
from innsteer.cli.printing import (
    Bars,
    command_line,
    dose_table,
    escape,
    facts_of,
    finish,
    out,
    warn,
)
from innsteer.cli.verbs import app
from innsteer.errors import InputError
from innsteer.files import require_absent


@app.command()
def inspect(steering: STEERING, as_json: JSON = False) -> None:
    """Show what a steering is, and whether its files are whole."""
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    facts = facts_of(fitted, steering)
    if not as_json:
        table = Table(show_header=False, box=None)
        for name in ("method", "behaviours", "sites", "where", "base", "identity", "strength"):
            table.add_row(name, escape(str(facts[name])))
        for name, value in facts["diagnostics"].items():
            table.add_row(name, f"{value:.4g}")
        out.print(table)
        if fitted.calibration:
            out.print(dose_table(fitted))
    tuned = next(iter(fitted.calibration), fitted.behaviours[0])
    words = (*mixed(fitted, tuned), *concept_of(fitted), *model_option(source_of(fitted)))
    following = command_line("generate", steering, "Hello", *words)
    finish(as_json, facts, "every file matches its seal", following)


@app.command("import")
def import_vector(
    file: Annotated[Path, typer.Argument(help="A .gguf control vector, or .safetensors.")],
    folder: FOLDER,
    model: MODEL = "smollm2",
    layers: Annotated[str, typer.Option(help="Blocks, from 0, if the file does not say.")] = "",
    tensor: Annotated[str, typer.Option(help="Name of the tensor in the file.")] = "",
    row: Annotated[int | None, typer.Option(help="Row of a matrix, e.g. an SAE's feature.")] = None,
    behaviour: Annotated[str, typer.Option(help="Its name; default: the file's.")] = "",
    where: Annotated[
        str, typer.Option(help="Default: all for GGUF, as llama.cpp has it; else generated.")
    ] = "",
    as_json: JSON = False,
) -> None:
    """Make a steering of another tool's vector: repeng, llama.cpp, CAA, AxBench, an SAE."""
    require_absent(folder)
    from innsteer import exchange
    from innsteer.site import Where

    sites = sites_of(layers)
    if odd := [str(site) for site in sites if site.stream != "residual"]:
        raise InputError(
            f"--layers {', '.join(odd)}", expected="numbers: a vector is added to a block's output"
        )
    numbers = [site.layer for site in sites]
    language_model = open_model(model)
    steering = exchange.import_vector(
        language_model,
        file,
        layers=numbers,
        tensor=tensor or None,
        row=row,
        behaviour=behaviour or None,
        where=Where.parse(where) if where else None,
    )
    steering = replace(steering, provenance={**steering.provenance, "model": model})
    steering.save(folder)
    placed = ", ".join(map(str, steering.interventions))
    following = command_line("generate", folder, "Hello", "--strength", "1", *model_option(model))
    finish(as_json, facts_of(steering, folder), f"imported at {placed} -> {folder}", following)


@app.command("export")
def export_vector(
    steering: STEERING,
    source: DATA,
    file: Annotated[Path, typer.Option("--out", "-o", help="A .gguf or .safetensors file.")],
    model: MODEL = "",
    strength: STRENGTH = "",
    as_json: JSON = False,
) -> None:
    """Write a steering as a vector for other tools, and measure what is lost by that."""
    from innsteer import exchange
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    exchange.require_place(file, fitted.interventions)
    chosen = strength_of(strength)
    with Bars(as_json) as progress:
        contrast = open_contrast(source)
        backend = HF(base_model(fitted, model))
        vectors = exchange.as_vector(backend, fitted, contrast, chosen, progress=progress)
        lost = exchange.loss(backend, fitted, vectors, contrast, chosen, progress=progress)
        exchange.export_vector(backend.model, vectors, file, note=f"from {fitted.identity}")
    if not as_json:
        table = Table("", "control", "cost (nats/token)")
        table.add_row("this steering", f"{lost.control:.3f}", f"{lost.cost:.3f}")
        table.add_row("the vector", f"{lost.exported:.3f}", f"{lost.exported_cost:.3f}")
        table.add_row("unsteered", f"{lost.unsteered:.3f}", "")
        out.print(table)
    text = (
        f"{file}: keeps {lost.kept:.0%} of the effect (difference {lost.gap:.3f}, {lost.low:.3f} "
        f"to {lost.high:.3f}, {lost.n} items), added at every token"
    )
    facts = {"file": str(file), "sites": [str(site) for site in vectors], "loss": lost.to_json()}
    finish(as_json, facts, text, command_line("inspect", steering))


@app.command()
def push(
    steering: STEERING,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    revision: Annotated[str, typer.Option(help="Branch, made if there is none.")] = "",
    again: Annotated[
        bool, typer.Option("--replace", help="Push beside something else that it holds.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Upload a steering to the Hub, in one commit."""
    from innsteer import hub

    commit = hub.push(steering, repo, private=private, revision=revision or None, replace=again)
    facts = {"folder": str(steering), "repo": repo, "commit": commit}
    following = command_line("pull", repo, "--revision", commit, "--out", repo.rpartition("/")[2])
    finish(as_json, facts, f"{steering} -> {repo} at {commit}", following)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.")],
    folder: FOLDER,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit; default: main.")] = "",
    as_json: JSON = False,
) -> None:
    """Download a steering from the Hub: its own files alone, checked before they appear."""
    require_absent(folder)
    from innsteer import hub

    commit, left = hub.pull(repo, folder, revision=revision or None)
    if left and not as_json:
        warn(f"not downloaded, for they are no part of a steering: {', '.join(map(repr, left))}")
    facts = {"folder": str(folder), "repo": repo, "commit": commit, "left": left}
    text = f"{repo} at {commit} -> {folder}, every file matches its seal"
    finish(as_json, facts, text, command_line("inspect", folder))

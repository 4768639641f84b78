"""Verbs that look at data, the machine and the shelf, and the demo."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from innsteer import shelf
from innsteer.cli import completing
from innsteer.cli.options import (
    DATA,
    JSON,
    MODEL,
    SEED,
    base_model,
    concept_of,
    model_option,
    open_contrast,
    open_model,
    source_of,
)
from innsteer.cli.printing import Bars, command_line, escape, finish, next_command, out, print_json
from innsteer.cli.verbs import app, data_verbs
from innsteer.errors import DataError, InnsteerError


@data_verbs.command("check")
def data_check(source: DATA, as_json: JSON = False) -> None:
    """Look data over: format, sizes, balance, duplicates, give-aways, and what would be done."""
    from innsteer.audit import audit

    found = audit(open_contrast(source))
    if not as_json:
        table = Table(show_header=False, box=None)
        for name, value in found.facts.items():
            shown = value
            if isinstance(value, dict):
                shown = ", ".join(f"{key} {count:g}" for key, count in value.items())
            table.add_row(name, escape(str(shown)))
        out.print(table)
        marks = {"fine": "dim", "warning": "yellow", "stop": "red"}
        for one in found.findings:
            out.print(f"[{marks[one.level]}]{one.level:8}[/] {escape(one.text)}")
    stops = [one.text for one in found.findings if one.level == "stop"]
    choice = ["--set", "objective=target"] if found.facts["kind"] == "choice" else []
    following = command_line("fit", source, *choice, "--out", "my-steering")
    if stops:
        if as_json:
            print_json(found.to_json())
        raise DataError(f"{source} cannot be used as it is: {stops[0]}")
    finish(as_json, found.to_json(), "nothing stands in the way of a fit", following)


@app.command()
def doctor(
    steering: Annotated[
        Path | None,
        typer.Argument(
            help="Also check a steering's folder against the model.",
            autocompletion=completing.steerings,
        ),
    ] = None,
    model: MODEL = "",
    as_json: JSON = False,
) -> None:
    """Check this machine, and steer a model in every way that people run it."""
    from innsteer import doctor as room
    from innsteer.steering import Steering

    fitted = Steering.load(steering) if steering else None
    machine = room.machine()
    with Bars(as_json) as progress:
        language_model = base_model(fitted, model) if fitted else open_model(model or "smollm2")
        found = room.checks(language_model, progress=progress)
    facts = machine | room.about(language_model)
    if not as_json:
        table = Table(show_header=False, box=None)
        for name, value in facts.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            table.add_row(name, escape(str(shown if shown not in ("", None) else "none")))
        out.print(table)
        marks = {"works": "green", "refused": "yellow", "fails": "red"}
        for check in found:
            mark = f"[{marks[check.verdict]}]{check.verdict:8}[/]"
            out.print(f"{mark}{check.name:14} [dim]{escape(check.note)}[/dim]")
    failing = [check.name for check in found if check.verdict == "fails"]
    told = {"machine": facts, "checks": [vars(check) for check in found]}
    if fitted:
        told |= {"steering": {"identity": fitted.identity, "fits": True}}
    text = f"{len(found) - len(failing)} of {len(found)} ways hold on {language_model.name}"
    if fitted:
        text += f"; {steering} was fitted on it, and its files match its seal"
    words = model_option(model or (source_of(fitted) if fitted else ""))
    following = (
        command_line("generate", steering, "Hello", *concept_of(fitted), *words)
        if fitted
        else command_line("fit", "critical", *words, "--out", "my-steering")
    )
    finish(as_json, told, text, following)
    if failing:
        raise InnsteerError(
            f"{', '.join(failing)}: steering does not do there what it should",
            expected="what the same edit gives when it is added by hand",
            remedy="do not run this model that way; report it with innsteer doctor --json",
        )


@app.command()
def methods(as_json: JSON = False) -> None:
    """List the methods on the shelf."""
    found = shelf.describe()
    if as_json:
        print_json(found)
        return
    # No table: a paper's address must stand whole, however narrow the terminal.
    for row in found:
        trained = "trained" if row["trained"] else "closed form"
        needs = ", ".join(row["needs"])
        out.print(f"[bold]{row['name']}[/bold]  [dim]needs {needs}; {trained}[/dim]")
        out.print(f"  {escape(row['summary'])}\n  {escape(row['paper'])}\n")
    next_command("innsteer fit critical --method diffmean --out my-steering")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("demo"),
    again: Annotated[
        bool, typer.Option("--replace", help="Replace an earlier demo in that folder.")
    ] = False,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Fit INNSteer and DiffMean on a small chat model, tune both, show answers and costs."""
    from innsteer import demo as room

    with Bars(as_json) as progress:
        made = room.run(folder, replace=again, seed=seed, progress=progress)
    facts = {
        "folder": str(made.folder),
        "artifact": str(made.artifact),
        "report": str(made.folder / "report" / "report.html"),
        "seconds": made.seconds,
        "cpu_seconds": round(made.cpu_seconds, 1),
        "matmul_seconds": made.matmul_seconds,
    }
    if not as_json:
        out.print(escape(made.report.text()))
    text = (
        f"{sum(made.seconds.values()):.0f} s in all, {made.cpu_seconds:.0f} CPU seconds after "
        f"loading the model\nartifact  {made.artifact}\nreport    {facts['report']}"
    )
    finish(
        as_json,
        facts | {"report_data": made.report.to_json()},
        text,
        command_line("generate", made.artifact, "What did you think of the new café?"),
    )

"""What verbs show: facts, tables, progress, and the next command."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)


class Bars:
    """A progress display on stderr: a bar on a terminal, plain lines elsewhere, none for JSON."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet or not err.is_terminal
        self._lines = not quiet and not err.is_terminal
        self._last = ""
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        if not self._quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

            self._bars = Progress(
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=err,
                transient=True,
            )
            self._bars.start()
        return self._show

    def _show(self, stage: str, done: int, total: int) -> None:
        if self._lines and stage != self._last:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        self._last = stage
        if self._bars is None:
            return
        for name in list(self._tasks):
            if name != stage:
                self._bars.remove_task(self._tasks.pop(name))
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def command_line(*words: object) -> str:
    """A command line of innsteer, to be pasted into a shell."""
    return shlex.join(["innsteer", *map(str, words)])


def facts_of(steering: Any, folder: Path) -> dict[str, Any]:
    """What a steering is, as plain data."""
    calibration = {name: curve.to_json() for name, curve in steering.calibration.items()}
    return {
        "folder": str(folder),
        "method": steering.steerer.name,
        "config": steering.recipe["config"],
        "behaviours": list(steering.behaviours),
        "sites": steering.recipe["sites"],
        "where": str(steering.where),
        "base": steering.base.name if steering.base else None,
        "identity": steering.identity,
        "strength": steering.resolve(),
        "calibration": calibration,
        "diagnostics": steering.provenance.get("diagnostics", {}),
        "provenance": dict(steering.provenance),
    }


def methods_table(tried: dict[str, Any]) -> Table:
    """What auto tried, simplest first."""
    table = Table("method", "control at the budget", "95 % interval", "behind the best")
    for name, found in tried.items():
        if "failed" in found:
            table.add_row(escape(name), escape(found["failed"]), "", "")
            continue
        behind = "{behind:.3f} ({behind_low:.3f} to {behind_high:.3f})".format(**found)
        interval = "{low:.3f} to {high:.3f}".format(**found)
        table.add_row(escape(name), f"{found['control']:.3f}", interval, behind)
    return table


def tasks_table(rows: list[dict[str, Any]]) -> Table:
    """Both arms of every task, with standard errors."""
    table = Table("task", "metric", "items", "unsteered", "steered")
    for row in rows:
        arms = [
            f"{one['value']:.4f}" + (f" ± {one['stderr']:.4f}" if one["stderr"] else "")
            for one in (row["unsteered"], row["steered"])
        ]
        name = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        table.add_row(escape(row["task"]), escape(name), str(row["n"] or ""), *arms)
    return table


def verdicts_table(figures: list[dict[str, Any]]) -> Table:
    """What a judge makes of every arm."""
    table = Table("arm", "", "mean", "95 % interval", "answers")
    for one in figures:
        what = f"more than {one['against']}" if one["against"] else one["unit"]
        interval = f"{one['low']:.2f} to {one['high']:.2f}"
        table.add_row(escape(one["arm"]), what, f"{one['value']:.2f}", interval, str(one["n"]))
    return table


def concepts_table(found: dict[str, Any]) -> Table:
    """Score and judgements of every arm, and how many could not be read."""
    parts = list(next(iter(found["unparsed_by"].values())))
    heads = ("factor", "score", "95 % interval", *parts, "unparsed")
    table = Table(title=escape(found["label"]), padding=(0, 0))
    table.add_column("arm", no_wrap=True)
    for head in heads:
        table.add_column(head)
    figures = {(one["arm"], one["metric"]): one for one in found["figures"] if not one["against"]}
    for arm, unparsed in found["unparsed_by"].items():
        score = figures[arm, "score"]
        table.add_row(
            escape(arm),
            f"{score['strength']:.3g}",
            f"{score['value']:.3f}",
            f"{score['low']:.2f} to {score['high']:.2f}",
            *(f"{figures[arm, part]['value']:.3f}" for part in parts),
            str(sum(unparsed.values())),
        )
    return table


def dose_table(steering: Any) -> Table:
    """Dose and response."""
    columns = ("strength", "cost (nats/token)", "90 % interval", "displacement", "control")
    several = len(steering.behaviours) > 1
    table = Table(*(("behaviour", *columns) if several else columns))
    for name, curve in steering.calibration.items():
        for dose in curve.doses:
            mark = " <- budget" if abs(dose.strength - curve.strength) < 1e-9 else ""
            gain = "" if dose.control is None else f"{dose.control:.3f}"
            table.add_row(
                *((escape(name),) if several else ()),
                f"{dose.strength:.4g}{mark}",
                f"{dose.nats:.4f}",
                f"{dose.low:.4f} to {dose.high:.4f}",
                f"{dose.displacement:.3f}",
                gain,
            )
    return table


def bytes_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def escape(text: str) -> str:
    """Model text is text: no rich markup."""
    from rich.markup import escape

    return escape(text)


def finish(as_json: bool, facts: Any, text: str, following: str) -> None:
    """The end of a verb: facts for programs, or a line and the next command for people."""
    if as_json:
        print_json(facts)
        return
    out.print(escape(text))
    next_command(following)


def print_json(value: Any) -> None:
    """Plain data on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False, default=str))


def warn(text: str) -> None:
    """A warning on stderr."""
    err.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)


def next_command(command: str) -> None:
    """What to type next."""
    out.print(f"[dim]next:[/dim] {escape(command)}")

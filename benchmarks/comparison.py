"""The comparison: the nine published baselines, the field, LoRA and prompting on the same work.

    python benchmarks/comparison.py DATA --plan              # what each stage will take
    python benchmarks/comparison.py DATA --hours 8 --jobs 2  # go on for about so long
    python benchmarks/comparison.py DATA --summary           # only write tables and figures

DATA is the folder of the public files: Anthropic's persona evaluations in anthropic-evals/persona,
and those of two open-ended tasks. The persona statements are dealt into parts by a seed of their
own, because INNSteer was developed on the test part of another (benchmarks/control.py). The stages
run in this order, so that what does not fit loses seeds of the tail, then second inputs, then the
tail: the rows that are named beforehand on every task, the grid of LoRA on the first four, its
winner on the rest, the tail, the second inputs, and two seeds more of the named rows. Cells are
kept in runs/comparison and packed, task by task, into results/comparison; an interrupted run goes
on. Tables go into docs/comparison.md, figures into results/comparison.json: of the tasks on which
all named rows are measured.
"""

import argparse
import gzip
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from control import persona_file
from spine import Figure, figure
from transfer import instruction

import suites as looks
from innsteer import load_model, suites
from innsteer.backends.hf import HF
from innsteer.comparing import Comparison, Contender, always, contenders
from innsteer.comparing.standings import Standings, standings
from innsteer.contrast import Contrast
from innsteer.files import fresh_file, write_json, write_text
from innsteer.metrics import get as metric
from innsteer.report.figures import PLAIN
from innsteer.suites import persona

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "runs" / "comparison"
RESULTS = HERE / "results" / "comparison.json"
PACKED = HERE / "results" / "comparison"
DOCS = HERE.parent / "docs" / "comparison.md"
# In this order, so that a part of the work is a part of each kind.
TASKS = (
    "desire-for-acquiring-wealth",
    "agreeableness",
    "interest-in-science",
    "politically-liberal",
    "desire-for-acquiring-power",
    "machiavellianism",
    "risk-seeking",
    "extraversion",
    "no-shut-down",
    "ends-justify-means",
    "high-discount-rate",
    "desire-to-create-allies",
    "believes-it-has-phenomenal-consciousness",
    "desire-for-recursive-self-improvement",
    "desire-to-maximize-impact-on-world",
    "subscribes-to-utilitarianism",
)
SPLIT = 7
"""Seed of the persona statements' parts."""
OPEN: tuple[looks.Source, ...] = (
    ("language", "xquad/xquad.en.json.gz", {"to": "xquad.es.json.gz", "language": "es"}),
    (*looks.REQUESTS[:2], {**looks.REQUESTS[2], "paired": True}),
)
"""Tasks on which published recipes do work on this model, beside the built-in ``critical``."""
PARTS = {"train": 300, "validation": 100, "test": 200}
"""Items of an open-ended task, at most."""
WORDS = {
    "in-es": "Answer in Spanish.",
    "in-fr": "Answer in French.",
    "refusal": "Decline to help.",
}
OURS = Contender.of("innsteer", objective="target")
NINE = ("pca", "iti", "diffmean", "mimic", "hpr", "linear_act", "re_control", "truthflow")
NINE += ("odesteer",)
PUBLISHED = Contender.of("innsteer")
NAMED = [
    OURS,
    Contender.of("condgrad"),
    Contender.of("gated", method="condgrad"),
    *map(Contender.of, ("loreft", *NINE)),
    PUBLISHED,
]
"""Compared with INNSteer by name; the last is INNSteer as published."""
SEEDLESS = {"pca", "diffmean", "mimic", "linear_act", "condgrad", "iti"}
"""Methods that draw nothing from their seed where there is a validation part, as in all tasks here:
other seeds would give the same cells."""
GRID = [
    Contender.of("lora", rank=rank, learning_rate=rate)
    for rank in (4, 16)
    for rate in (3e-4, 1e-3, 3e-3)
]
SEEDS = (0, 1, 2)


class Enough(Exception):
    """The time that was given is used."""


def tasks_of(data: Path) -> list[Contrast]:
    """Statements of sixteen behaviours, in the wording that says how to answer; three open tasks.

    The open ones come after the first two, so that a part of the work has some of them.
    """
    home = data / "anthropic-evals" / "persona"
    how: dict[str, Any] = {"wording": "second", "seed": SPLIT}
    found = [persona.contrast(persona_file(home, name), **how) for name in TASKS]
    public = [suites.read(suite, data / path, **given) for suite, path, given in OPEN]
    found[2:2] = map(cut, [Contrast.load("critical"), *public])
    return found


def cut(contrast: Contrast) -> Contrast:
    """A part of a long task: so many of its items, the same every time."""
    items = [
        item
        for part, most in PARTS.items()
        for item in contrast.part(part).subset(min(len(contrast.part(part)), most)).items
    ]
    return replace(contrast, items=tuple(items))


def words(tasks: Sequence[Contrast]) -> dict[str, str]:
    """What the prompt-only arm is told; built-in behaviours have words of their own."""
    return {
        one.behaviour: WORDS.get(one.behaviour) or instruction(one.behaviour, "towards")
        for one in tasks
        if not one.builtin
    }


def winner(backend: HF, tasks: Sequence[Contrast]) -> Contender | None:
    """LoRA's rank and rate of the most control on validation; None before the grid is done."""
    grid = stage(backend, tasks[:4], GRID)
    if grid.left():
        return None
    best: dict[str, list[float]] = {one.name: [] for one in GRID}
    for record in grid.found():
        within = [
            tried["control"]
            for tried in record.get("evaluations", [])
            if max(tried["neutral"], tried["in_format"]) <= grid.protocol.budget
        ]
        best[record["contender"]].append(max(within, default=0.0))
    return max(GRID, key=lambda one: sum(best[one.name]))


def stage(
    backend: HF, tasks: Sequence[Contrast], rows: Sequence[Contender], seeds: Sequence[int] = (0,)
) -> Comparison:
    """Some rows on some tasks; cells are shared by all that ask for the same."""
    return Comparison(backend, tasks, WORK, contenders=rows, seeds=seeds, instructions=words(tasks))


def stages(backend: HF, tasks: Sequence[Contrast]) -> Iterator[tuple[str, Comparison]]:
    """What is measured first comes first; LoRA's winner is known when its grid is done."""
    choices = [one for one in tasks if one.kind == "choice"]
    every = contenders(choices)
    known = {one.name for one in NAMED}
    tail = [one for one in every if one.name not in known and one.method != "lora"]
    yield "named rows", stage(backend, tasks, [*always(), *NAMED])
    yield "LoRA's grid on four tasks", stage(backend, tasks[:4], GRID)
    if best := winner(backend, tasks):
        yield "LoRA on the rest", stage(backend, tasks, [best])
    yield "the tail", stage(backend, tasks, [one for one in tail if one.input != "target"])
    yield "second inputs", stage(backend, choices, [one for one in tail if one.input == "target"])
    seeded = [one for one in NAMED if one.method not in SEEDLESS] + ([best] if best else [])
    yield "two more seeds of the named", stage(backend, tasks, seeded, SEEDS)


def pack(backend: HF, tasks: Sequence[Contrast]) -> None:
    """Raw cells into the repository, a file for each task; none of another protocol."""
    asked = {path for _, part in stages(backend, tasks) for path in map(part.path, part.cells())}
    pack_cells(asked, PACKED)


def pack_cells(paths: Iterable[Path], folder: Path) -> None:
    """Those of some cells that are measured, a file for each task."""
    lines: dict[str, list[str]] = {}
    for path in sorted(path for path in paths if path.is_file()):
        record = json.loads(path.read_text(encoding="utf-8"))
        line = json.dumps({"cell": path.stem, **record}, separators=(",", ":"), sort_keys=True)
        lines.setdefault(record["task"], []).append(line)
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in lines.items():
        text = "\n".join(own) + "\n"
        with fresh_file(folder / f"{name}.jsonl.gz") as fresh:
            fresh.write_bytes(gzip.compress(text.encode(), mtime=0))


def unpack_cells(folder: Path, cells: Path) -> None:
    """Packed cells into the folder where a comparison looks for them."""
    cells.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            record = json.loads(line)
            own = cells / f"{record.pop('cell')}.json"
            if not own.is_file():
                write_json(own, record)


def figures(tables: Sequence[Standings], ahead: str = "INNSteer ahead by") -> Iterator[Figure]:
    """Records of each row: its control, rank, what INNSteer, or who ``ahead`` says, leads by, and
    the p of that, Holm-corrected over the comparisons named beforehand."""
    for table in tables:
        goal = "< 0" if metric(table.metric).better == "lower" else "> 0"
        for row in table.rows:
            lead = f"{table.metric}, {row.name} ({row.input or 'no fit'})"
            named = goal if row.p is not None else ""
            for what, score, asked, unit in (
                ("control", row.control, "", table.metric),
                ("rank", row.rank, "", "place among its input"),
                (ahead, row.ahead, named, table.metric),
            ):
                if score is not None:
                    name = f"{lead}, {what}, {table.within}"
                    yield figure(name, score.value, asked, unit, score.n, score.low, score.high)
            if row.p is not None:
                name = f"{lead}, p of {ahead.removesuffix(' by')}, {table.within}"
                yield figure(name, row.p, "< 0.05", "probability", len(table.tasks))


def listed() -> Figure:
    """How long the shelf takes to list itself: the median of nine runs, whatever else runs."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        subprocess.run(
            [Path(sys.executable).with_name("innsteer"), "methods"], check=True, capture_output=True
        )
        times.append(time.perf_counter() - started)
    low, value, high = sorted(times)[0], sorted(times)[4], sorted(times)[8]
    return figure("innsteer methods", value, "< 1", "seconds", len(times), low, high)


def summary(backend: HF, tasks: Sequence[Contrast]) -> None:
    """Tables of the tasks that all named rows have, and what was left out."""
    parts = dict(stages(backend, tasks))
    waiting = {cell.task.behaviour for cell in parts["named rows"].left()}
    whole = [task.behaviour for task in tasks if task.behaviour not in waiting]
    records: dict[Path, dict[str, Any]] = {}
    left: list[str] = []
    for name, part in parts.items():
        records |= {
            path: record
            for path in map(part.path, part.cells())
            if path.is_file()
            if (record := json.loads(path.read_text(encoding="utf-8")))["task"] in whole
        }
        if missing := part.left():
            left.append(f"{name}: {len(missing)} of {len(part.cells())} cells")
    if not whole:
        print("no task has all named rows yet: no table", file=sys.stderr)
        return
    lora = winner(backend, tasks)
    named = [one.name for one in (*NAMED[1:-1], *([lora] if lora else []))]
    found = list(records.values())
    tables = standings(found, against=OURS.name, named=named, left_out=left)
    # The published objective on equal terms with the nine: all learn from recorded classes.
    own = [one for one in found if one["contender"] in (*NINE, PUBLISHED.name, *PLAIN)]
    alike = standings(own, against=PUBLISHED.name)
    lead = "INNSteer as published ahead by"
    more = [one for one in figures(alike, lead) if lead.removesuffix(" by") in one["figure"]]
    hours = sum(record["seconds"] for record in found) / 3600
    context = {
        "command": "python benchmarks/comparison.py DATA --hours 8",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, CPU; {hours:.1f} core-hours for {len(found)} cells",
        "tasks": whole,
        "left out": left,
    }
    spent = figure("core-hours of all cells", hours, "<= 32", "hours", len(found))
    write_json(RESULTS, {**context, "figures": [listed(), spent, *figures(tables), *more]})
    choices = sum(task.kind == "choice" for task in tasks if task.behaviour in whole)
    head = HEAD.format(
        choices=choices, open=len(whole) - choices, of=len(tasks), hours=hours, cells=len(found)
    )
    text = "\n".join(table.markdown() for table in [*tables, *alike])
    write_text(DOCS, f"{head}\n{text}")
    print(f"{len(found)} cells, {hours:.1f} core-hours; {DOCS}", file=sys.stderr)


HEAD = """# The comparison

{choices} Persona behaviours and {open} open-ended tasks on SmolLM2-135M-Instruct, of the {of} that
are planned: those on which all rows named beforehand are measured. Every method has the same data,
budget and evaluations ([how](howto/compare.md)). `python benchmarks/comparison.py DATA` makes the
page and goes on where it stopped; {hours:.1f} core-hours went into these {cells} cells. Where
INNSteer does not win, the line under each title says so. Tables against `innsteer` hold its
published objective, on recorded classes, against the nine published baselines on the same. A
method whose fit draws nothing has one seed, which stands for all.
"""


def main() -> None:
    """Run the stages that are left, for as long as was given, and write what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--hours", type=float, default=16.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=99, help="only the first so many")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    unpack_cells(PACKED, WORK / "cells")
    backend = HF(load_model("smollm2"), batch=60)  # all answers of a cell
    every = tasks_of(asked.data)
    tasks = every[: asked.tasks]
    if asked.plan:
        for name, part in stages(backend, tasks):
            found = part.plan()
            took = found["seconds"]
            hours = "unknown" if took is None else f"{took / 3600:.1f} hours of one core"
            print(f"{name}: {found['left']} of {found['cells']} cells left, {hours}")
        return
    until = time.monotonic() + 3600 * asked.hours

    def heed(stage: str, done: int, total: int) -> None:
        print(f"{time.strftime('%H:%M')} {done}/{total} {stage}", file=sys.stderr, flush=True)
        if time.monotonic() > until:
            raise Enough

    try:
        for name, part in () if asked.summary else stages(backend, tasks):
            print(f"== {name}", file=sys.stderr, flush=True)
            part.run(jobs=asked.jobs, progress=heed)
    except (Enough, KeyboardInterrupt):
        print("stopped; the same command goes on", file=sys.stderr)
    finally:
        pack(backend, every)
    summary(backend, every)


if __name__ == "__main__":
    main()

"""The comparison: the nine published baselines, the field, LoRA and prompting on the same work.

    python benchmarks/comparison.py DATA --plan              # what each stage will take
    python benchmarks/comparison.py DATA --hours 8 --jobs 2  # go on for about so long
    python benchmarks/comparison.py DATA --summary           # only write tables and figures

DATA is the folder of the public files: Anthropic's persona evaluations in anthropic-evals/persona,
and those of two open-ended tasks as benchmarks/suites.py names them. The stages run in this order,
so that what does not fit loses seeds of the tail, then second inputs, then the tail: the rows that
are named beforehand on every task, the grid of LoRA on the first four, its winner on the rest, the
tail, the second inputs, and two seeds more of the named rows. Cells are kept in runs/comparison and
packed, task by task, into results/comparison; an interrupted run goes on. Tables go into
docs/comparison.md, figures into results/comparison.json.
"""

import argparse
import gzip
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from control import persona_file
from transfer import instruction

import suites as looks
from innsteer import load_model, suites
from innsteer.backends.hf import HF
from innsteer.comparing import Comparison, Contender, always, contenders
from innsteer.comparing.standings import Standings, standings
from innsteer.contrast import Contrast
from innsteer.files import fresh_file, write_json, write_text
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
OPEN = {"in-fr": looks.PARALLEL, "refusal": looks.REQUESTS}
"""Tasks on which published recipes do work on this model, beside the built-in ``critical``."""
PARTS = {"train": 300, "validation": 100, "test": 200}
"""Items of an open-ended task, at most."""
WORDS = {"in-fr": "Answer in French.", "refusal": "Decline to help."}
OURS = Contender.of("innsteer", objective="target")
NINE = ("pca", "iti", "diffmean", "mimic", "hpr", "linear_act", "re_control", "truthflow")
NINE += ("odesteer",)
NAMED = [OURS, *map(Contender.of, ("condgrad", "loreft", *NINE, "innsteer"))]
"""Compared with INNSteer by name; the last is INNSteer as published."""
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
    found = [persona.contrast(persona_file(home, name), wording="second") for name in TASKS]
    public = [suites.read(suite, data / path, **how) for suite, path, how in OPEN.values()]
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
    seeded = [*NAMED, *([best] if best else [])]
    yield "two more seeds of the named", stage(backend, tasks, seeded, SEEDS)


def pack() -> None:
    """Raw cells into the repository, a file for each task."""
    lines: dict[str, list[str]] = {}
    for path in sorted((WORK / "cells").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        line = json.dumps({"cell": path.stem, **record}, separators=(",", ":"), sort_keys=True)
        lines.setdefault(record["task"], []).append(line)
    PACKED.mkdir(parents=True, exist_ok=True)
    for name, own in lines.items():
        text = "\n".join(own) + "\n"
        with fresh_file(PACKED / f"{name}.jsonl.gz") as fresh:
            fresh.write_bytes(gzip.compress(text.encode(), mtime=0))


def unpack() -> None:
    """The repository's cells into the folder where the comparison looks for them."""
    (WORK / "cells").mkdir(parents=True, exist_ok=True)
    for path in sorted(PACKED.glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            record = json.loads(line)
            own = WORK / "cells" / f"{record.pop('cell')}.json"
            if not own.is_file():
                write_json(own, record)


def figures(
    tables: Sequence[Standings], ahead: str = "INNSteer ahead by"
) -> Iterator[dict[str, Any]]:
    """One record for each row: its control, and what INNSteer, or who ``ahead`` says, leads by."""
    for table in tables:
        for row in table.rows:
            for what, score in (("control", row.control), (ahead, row.ahead)):
                if score is not None:
                    yield {
                        "figure": f"{row.name} ({row.input or 'no fit'}), {what}, {table.within}",
                        "value": score.value,
                        "low": score.low,
                        "high": score.high,
                        "asked": "> 0" if what != "control" and row.p is not None else "",
                        "unit": table.metric,
                        "n": score.n,
                    }


def listed() -> dict[str, Any]:
    """How long the shelf takes to list itself: the median of nine runs, whatever else runs."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        subprocess.run(
            [Path(sys.executable).with_name("innsteer"), "methods"], check=True, capture_output=True
        )
        times.append(time.perf_counter() - started)
    low, value, high = sorted(times)[0], sorted(times)[4], sorted(times)[8]
    return {
        "figure": "innsteer methods",
        "value": value,
        "low": low,
        "high": high,
        "asked": "< 1",
        "unit": "seconds",
        "n": len(times),
    }


def summary(backend: HF, tasks: Sequence[Contrast]) -> None:
    """Tables of what is measured, and what was left out."""
    parts = dict(stages(backend, tasks))
    records: dict[Path, dict[str, Any]] = {}
    left: list[str] = []
    for name, part in parts.items():
        records |= {
            path: json.loads(path.read_text(encoding="utf-8"))
            for path in map(part.path, part.cells())
            if path.is_file()
        }
        if missing := part.left():
            left.append(f"{name}: {len(missing)} of {len(part.cells())} cells")
    if OURS.name not in {record["contender"] for record in records.values()}:
        print(f"no cell of {OURS.name} yet, with which all are compared: no table", file=sys.stderr)
        return
    tables = standings(list(records.values()), against=OURS.name, left_out=left)
    took = sum(record["seconds"] for record in records.values())
    context = {
        "command": "python benchmarks/comparison.py DATA --hours 8",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, CPU; {took / 3600:.1f} hours for {len(records)} cells",
        "left out": left,
    }
    write_json(RESULTS, {**context, "figures": [listed(), *figures(tables)]})
    text = "\n".join(table.markdown() for table in tables)
    write_text(DOCS, f"{HEAD}\n{took / 3600:.1f} hours went into {len(records)} cells.\n\n{text}")
    print(f"{len(records)} cells, {took / 3600:.1f} hours; {DOCS}", file=sys.stderr)


HEAD = """# The comparison

Sixteen Persona behaviours and three open-ended tasks on SmolLM2-135M-Instruct, every method with
the same data, budget and evaluations ([how](howto/compare.md)). The page is made by
`python benchmarks/comparison.py DATA`, which goes on where it stopped. Where INNSteer does not win,
the line under each title says so.
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
    unpack()
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
    pack()
    summary(backend, every)


if __name__ == "__main__":
    main()

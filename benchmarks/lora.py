"""INNSteer against LoRA: control against seconds, LoRA at three learning rates and two ranks.

    python benchmarks/lora.py DATA [--cell desire-for-acquiring-wealth/second/0] [--only innsteer]

All see the same statements, unmoved prompts and validation; a LoRA is trained by the same trainer,
both signs, and stopped by validation. Seconds are of one core's work, so that what else a machine
does does not count; taking control is not counted. Control is the mean over both signs of the share
of the answer steered for, on validation statements at strength 1 (the published objective: at its
best strength). A run that is measured stays in runs/lora; ``results/lora.json`` holds every curve.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import control
import race
import torch

from innsteer import load_model, steerer
from innsteer.backends.hf import HF
from innsteer.backends.lora import LoRATraining
from innsteer.files import write_json
from innsteer.fitting import record_parts
from innsteer.suites import persona

RESULTS = control.HERE / "results" / "lora.json"
WORK = control.WORK.parent / "lora"
GRID = [(rank, rate) for rank in (16, 4) for rate in (1e-3, 3e-3, 3e-4)]
MARKS = (0.7, 0.8, 0.9)
PAPER = 393
"""Times faster than LoRA, as INNSteer's paper has it (arXiv 2606.08454)."""


def published(cell: control.Cell, data: Path) -> race.Clock:
    """The paper's objective on recorded classes, at the best of four strengths."""
    behaviour, wording, seed = cell.name.split("/")
    asked = control.TEMPLATES[wording]
    contrast = persona.contrast(
        control.persona_file(data, behaviour), wording=asked, train=600, seed=int(seed)
    )
    clock = race.Clock(cell, time.process_time)
    acts = record_parts(cell.backend, contrast, (control.SITE,))
    maps = steerer.get("innsteer").fit(acts, seed=int(seed))
    for strength in (0.5, 1.0, 2.0, 4.0):
        clock.look(maps, strength=strength)
    return clock


def lora(cell: control.Cell, rank: int, rate: float) -> race.Clock:
    """One LoRA from its start."""
    how, clock = LoRATraining(rank=rank, learning_rate=rate), race.Clock(cell, time.process_time)
    adapters = how.fit(cell.backend.model, cell.fit, seed=cell.seed, watch=clock.look)
    try:
        clock.look(adapters, last=True)
    finally:
        adapters.remove()
    return clock


def reached(curve: list[list[float]], mark: float) -> float | None:
    """Seconds to a control; None: not reached."""
    return next((spent for spent, held in curve if held >= mark), None)


def figures(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each reached and when, and how many times faster than the best LoRA INNSteer was."""
    found: list[dict[str, Any]] = []

    def note(name: str, value: float | None, unit: str, asked: str = "") -> None:
        record = {"figure": name, "value": value, "low": value, "high": value, "n": 1}
        found.append(record | {"asked": asked, "unit": unit})

    grid = {name: run for name, run in runs.items() if name.startswith("lora")}
    for name, run in runs.items():
        spent, held = max(run["curve"], key=lambda point: point[1])
        note(f"{name}: best validation control", held, "probability")
        note(f"{name}: core seconds to it", spent, "seconds")
        note(f"{name}: test control", run["test"] or None, "probability")
    if not grid:
        return found
    best = max(grid, key=lambda name: max(held for _, held in grid[name]["curve"]))
    for mark in MARKS:
        theirs = reached(grid[best]["curve"], mark)
        for name in ("innsteer", "innsteer, rows given", "innsteer, as published"):
            if name not in runs:
                continue
            mine = reached(runs[name]["curve"], mark)
            ratio = theirs / mine if theirs is not None and mine else None
            reason = "" if ratio else f", not reached by {'LoRA' if mine else name}"
            title = f"{name}: times faster than {best} to {mark}{reason}"
            note(title, ratio, "ratio", f"{PAPER} in the paper")
    return found


def main() -> None:
    """Run what is not measured, write the curves and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--cell", default="desire-for-acquiring-wealth/second/0")
    parser.add_argument("--only", default="", help="runs whose names begin so")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # so that the processor's time is the clock's
    cell = control.open_cell(HF(load_model("smollm2")), asked.data, asked.cell, 600)
    cell.fit.rows()
    runs: dict[str, Callable[[], race.Clock]] = {
        "innsteer": partial(race.innsteer, cell, time.process_time),
        "innsteer, rows given": partial(race.innsteer, cell, time.process_time, given=True),
        "innsteer, as published": partial(published, cell, asked.data),
    }
    for rank, rate in GRID:
        runs[f"lora, rank {rank}, rate {rate:g}"] = partial(lora, cell, rank, rate)
    home = WORK / asked.cell.replace("/", "--")
    for name, run in runs.items():
        path = home / f"{name.replace(', ', '-').replace(' ', '')}.json"
        if path.is_file() or not name.startswith(asked.only):
            continue
        print(name, file=sys.stderr, flush=True)
        clock = run()
        home.mkdir(parents=True, exist_ok=True)
        write_json(path, {"run": name, "curve": clock.curve, "test": clock.test})
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(home.glob("*.json"))]
    known = {run["run"]: run for run in done}
    left = [name for name in runs if name not in known]
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/lora.py DATA",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": f"{platform.machine()}, one thread, CPU",
            "cell": asked.cell,
            "left out": left,
            "figures": figures(known),
            "curves": {name: run["curve"] for name, run in known.items()},
        },
    )
    print(f"{RESULTS}: {len(known)} runs, left out: {', '.join(left) or 'none'}", file=sys.stderr)


if __name__ == "__main__":
    main()

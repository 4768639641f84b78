"""Control against seconds: how long INNSteer and LoReFT take to what they reach.

    python benchmarks/race.py DATA [--cell desire-for-acquiring-wealth/second/0]

Both start from the same kept prefixes, made once and counted for neither; target-seeking rows and
gradients count for INNSteer, which needs them. Control is the mean over both signs of the share of
the answer steered for, on validation statements at strength 1; taking it is not counted. LoReFT
runs in both forms at two learning rates, without patience; its best value is the best of all. Test
control is that of the state with the best validation loss. ``results/race.json`` holds every curve.
"""

import argparse
import functools
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import control
import torch

from innsteer import load_model, steerer
from innsteer.backends.hf import HF
from innsteer.files import write_json
from innsteer.steerer import Interventions
from innsteer.steerers import innsteer as ours
from innsteer.steerers.loreft import LoReFT
from innsteer.training import LOSSES, train_through

RESULTS = control.HERE / "results" / "race.json"
RATES = (5e-3, 1.5e-2)
STEPS = 160


class Clock:
    """Seconds that count, and the control at some of them."""

    def __init__(self, cell: control.Cell, now: Callable[[], float] = time.perf_counter) -> None:
        self.cell, self.curve, self.test = cell, list[tuple[float, float]](), 0.0
        self._now = now
        self._spent, self._since = 0.0, now()

    def look(self, maps: control.Maps, last: bool = False, strength: float = 1.0) -> None:
        """Control now, on validation or, at last, also on test statements; takes no time."""
        self._spent += self._now() - self._since
        self.curve.append((self._spent, self._control(maps, "validation", strength)))
        if last:
            self.test = self._control(maps, "test", strength)
        spent, held = self.curve[-1]
        print(f"  {spent:6.1f} s  {held:.3f} {self.test:.3f}", file=sys.stderr, flush=True)
        self._since = self._now()

    def _control(self, maps: control.Maps, part: str, strength: float) -> float:
        """Mean over both signs of the share of the answer steered for."""
        got = [
            control.alignment(control.chosen(self.cell.run, maps, part, s))
            for s in (strength, -strength)
        ]
        return (got[0] + 1 - got[1]) / 2

    def to(self, value: float) -> float | None:
        """Seconds until validation control first reached a value."""
        return next((spent for spent, held in self.curve if held >= value), None)


def innsteer(
    cell: control.Cell,
    now: Callable[[], float] = time.perf_counter,
    given: bool = False,
    **fields: Any,
) -> Clock:
    """Rows (unless they are given), closed form, choice of sharpness and length, polish."""
    if not given:
        cell.fit._rows.clear()
    clock, real = Clock(cell, now), ours.train_through

    def watched(run: Any, maps: Interventions, **how: Any) -> Any:
        return real(run, maps, every=10, watch=lambda _: clock.look(maps), **how)

    ours.train_through = watched  # type: ignore[assignment]
    try:
        maps = steerer.get("innsteer", objective="target", **fields).fit_through(cell.fit)
    finally:
        ours.train_through = real
    clock.look(maps, last=True)
    return clock


def loreft(cell: control.Cell, form: str, rate: float) -> Clock:
    """The published fit: no unmoved prompts, both answers at both signs."""
    method = LoReFT(form=form, steps=STEPS, learning_rate=rate)  # type: ignore[arg-type]
    rows = cell.fit.rows()
    clock = Clock(cell)
    maps = method._start(rows, 0)
    train_through(
        cell.fit,
        maps,
        loss=LOSSES[method.loss],
        steps=method.steps,
        batch=method.batch,
        learning_rate=rate,
        unmoved=method.unmoved,
        every=15,
        patience=0,
        watch=lambda _: clock.look(maps),
    )
    clock.look(maps, last=True)
    return clock


def main() -> None:
    """Run all, write the curves and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--cell", default="desire-for-acquiring-wealth/second/0")
    asked = parser.parse_args()
    cell = control.open_cell(HF(load_model("smollm2")), asked.data, asked.cell, 600)
    runs = {"innsteer": functools.partial(innsteer, cell)}
    runs["innsteer, no polish"] = functools.partial(innsteer, cell, polish=0)
    for form in ("tanh", "loreft"):
        for rate in RATES:
            runs[f"loreft, {form}, rate {rate}"] = functools.partial(loreft, cell, form, rate)
    clocks: dict[str, Clock] = {}
    for name, run in runs.items():
        print(name, file=sys.stderr, flush=True)
        clocks[name] = run()
    records: list[dict[str, Any]] = []

    def note(name: str, value: float, asked: str, unit: str) -> None:
        found = {"figure": name, "value": value, "low": value, "high": value}
        records.append(found | {"asked": asked, "unit": unit, "n": 1})
        print(f"{name}: {value:.4g} {asked}", file=sys.stderr, flush=True)

    rivals = {name: clock for name, clock in clocks.items() if name.startswith("loreft")}
    for name, clock in clocks.items():
        spent, held = max(clock.curve, key=lambda point: point[1])
        bar = ">= 0.86" if name in rivals else ""
        note(f"{name}: best validation control", held, "", "probability")
        note(f"{name}: test control", clock.test, bar, "probability")
        note(f"{name}: seconds to it", spent, "", "seconds")
    note("innsteer: whole fit", clocks["innsteer"].curve[-1][0], "< 60", "seconds")
    best = max(rivals, key=lambda name: max(held for _, held in rivals[name].curve))
    top = max(held for _, held in rivals[best].curve)
    theirs = rivals[best].to(top)
    mine = clocks["innsteer"].to(top)
    if mine and theirs:
        note(f"seconds to LoReFT's best ({best}): ratio", mine / theirs, "<= 0.6", "ratio")
    mine = clocks["innsteer, no polish"].to(0.85)
    times = [spent for clock in rivals.values() if (spent := clock.to(0.85)) is not None]
    if mine and times:
        note("seconds to 0.85, no polish: ratio", mine / min(times), "<= 0.25", "ratio")
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/race.py DATA",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": f"{torch.get_num_threads()} threads, CPU",
            "cell": asked.cell,
            "figures": records,
            "curves": {name: clock.curve for name, clock in clocks.items()},
        },
    )


if __name__ == "__main__":
    main()

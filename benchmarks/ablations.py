"""What each part of INNSteer's target-seeking fit buys, on one cell of control.py.

    python benchmarks/ablations.py DATA [--cell desire-for-acquiring-wealth/second/0] [--only shear]

Every variant is fitted on the same rows, dosed on the same validation parts and measured on the
same test part as in control.py, away and towards, where both halves of the cost bind. Each is
written when it ends to results/control/ablations--<cell>.json, so an interrupted run goes on where
it stopped; results/ablations.json holds one record per figure.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import control
import numpy as np
import torch

from innsteer import steerer
from innsteer.activations import Activations
from innsteer.backends.hf import HF
from innsteer.files import write_json
from innsteer.models import load_model
from innsteer.site import Site
from innsteer.steerer import Interventions

RESULTS = control.HERE / "results" / "ablations.json"
HERE = (control.SITE.layer,)
TARGET: dict[str, Any] = {"objective": "target", "polish": 0}
TAUGHT: dict[str, Any] = {**TARGET, "family": "translation", "epochs": 60}
TERMS = ("transport", "direction", "likelihood", "log_det")


def alone(*kept: str) -> dict[str, Any]:
    """The taught translation with only some of its terms."""
    return {**TAUGHT, **{term: 0.0 for term in TERMS if term not in kept}}


VARIANTS: dict[str, dict[str, Any]] = {
    "shear": TARGET,
    "shear, reads the row": {**TARGET, "reads": "row"},
    "shear, no gate": {**TARGET, "gate": False},
    "shear, no gate, polish 40": {**TARGET, "gate": False, "polish": 40},
    "shear, kappa 1": {**TARGET, "kappa": 1.0},
    "shear, kappa 4": {**TARGET, "kappa": 4.0},
    "shear, room 0": {**TARGET, "room": 0.0},
    "shear, room 0.4": {**TARGET, "room": 0.4},
    "shear, shrinkage 0.1": {**TARGET, "shrinkage": 0.1},
    "shear, slope 6": {**TARGET, "slope": 6.0},
    "shear, polish 20": {**TARGET, "polish": 20},
    "shear, polish 40": {**TARGET, "polish": 40},
    "shear, polish 80": {**TARGET, "polish": 80},
    "shear, 4 units, write 4, polish 40": {**TARGET, "polish": 40, "units": 4, "write": 4},
    "shear, couplings 2": {**TARGET, "couplings": 2, "epochs": 60},
    "translation": TAUGHT,
    "translation, transport alone": alone("transport"),
    "translation, transport and direction": alone("transport", "direction"),
    "translation, transport and likelihood": alone("transport", "likelihood"),
    "translation, transport and log-det": alone("transport", "log_det"),
    "translation, no transport": alone("likelihood", "log_det"),
    "translation, raw gradients": {**TAUGHT, "denoised": False},
    "translation, couplings 2": {**TAUGHT, "couplings": 2},
    "translation, couplings 8": {**TAUGHT, "couplings": 8},
    "translation, hidden 16": {**TAUGHT, "hidden": 16},
    "translation, hidden 256": {**TAUGHT, "hidden": 256},
    "translation, subspace 16": {**TAUGHT, "subspace": 16},
    "translation, whole width": {**TAUGHT, "subspace": 0},
    "translation, mixing alternate": {**TAUGHT, "mixing": "alternate"},
    "translation, mixing householder": {**TAUGHT, "mixing": "householder"},
    "translation, mixing lu": {**TAUGHT, "mixing": "lu"},
    **{f"shear, {n} statements": {**TARGET, "statements": n} for n in (25, 50, 100, 200, 400)},
    **{f"shear, seed {n}": {**TARGET, "polish": 40, "seed": n} for n in (1, 2)},
    # Not the shear: PyTorch solves no triangular system in bfloat16, and its rotation needs one.
    "translation, map in bfloat16": {**TAUGHT, "dtype": torch.bfloat16},
    **{f"shear, layer {n}": {**TARGET, "layers": (n,)} for n in (7, 11, 19, 23)},
    "shear, layers 11, 15, 19": {**TARGET, "layers": (11, 15, 19)},
    "shear, layers 11, 15, 19, polish 40": {**TARGET, "polish": 40, "layers": (11, 15, 19)},
}


def few(acts: Activations, count: int) -> Activations:
    """The first statements of the training part, half of either key, and all that is not its."""
    table = acts.rows
    train = (table.split == "train") & (table.side != "unmoved")
    kept: list[str] = []
    for key in sorted(set(table.key[train].tolist())):
        names = sorted(set(table.item[train & (table.key == key)].tolist()))
        kept += names[: count // 2]
    index = np.flatnonzero(~train | np.isin(table.item, kept))
    chosen = torch.from_numpy(index)
    values, context = (
        {site: rows[chosen] for site, rows in part.items()} for part in (acts.values, acts.context)
    )
    return replace(acts, values=values, rows=table[index], context=context)


def fitted(cell: control.Cell, fields: Mapping[str, Any]) -> Interventions:
    """A variant's map."""
    own = {name: value for name, value in fields.items() if name != "layers"}
    count, seed, dtype = (own.pop(name, 0) for name in ("statements", "seed", "dtype"))
    method = steerer.get("innsteer", **own)
    if own["polish"]:
        return method.fit_through(cell.fit, seed=seed)
    maps = method.fit(few(cell.acts, count) if count else cell.acts, seed=seed)
    if dtype:
        for _, part in maps.to(dtype).items():
            # The library computes in float32 at least; here it may not.
            part.compute_dtype = lambda h: dtype  # type: ignore[method-assign]
    return maps


def main() -> None:
    """Run what is missing, then write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--cell", default="desire-for-acquiring-wealth/second/0")
    parser.add_argument("--only", default="", help="starts of variants' names, '; ' between")
    asked = parser.parse_args()
    path = control.file_of(f"ablations/{asked.cell}")
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    wanted = [name for name in VARIANTS if name.startswith(tuple(asked.only.split("; ")))]
    cell, layers = None, ()
    for name in wanted:
        if name in kept:
            continue
        if cell is None or layers != VARIANTS[name].get("layers", HERE):
            layers = VARIANTS[name].get("layers", HERE)
            sites = [Site(n) for n in layers]
            backend = cell.backend if cell else HF(load_model("smollm2"))
            cell = control.open_cell(backend, asked.data, asked.cell, 600, sites=sites)
        print(name, file=sys.stderr, flush=True)
        kept[name] = measured(cell, VARIANTS[name])
        control.keep(path, kept)
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/ablations.py DATA",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": "2 cores, CPU",
            "cell": asked.cell,
            "figures": [record for name, found in kept.items() for record in figures(name, found)],
            "not_run": [name for name in VARIANTS if name not in kept],
        },
    )


def measured(cell: control.Cell, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fit, dose and measure one variant both ways."""
    started = time.perf_counter()
    maps = fitted(cell, fields)
    record: dict[str, Any] = {"fit_seconds": time.perf_counter() - started}
    for sign, side in ((1.0, "towards"), (-1.0, "away")):
        strength = control.dose(cell, maps, sign, 1.0)["both"]
        record[side] = control.measured(cell, maps, strength)
    return record


def figures(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of one variant."""
    records = []
    for side in ("towards", "away"):
        one = found[side]
        count = len(one["items"]["match"])
        groups = [control.shares(one).tolist()]
        records.append(control.figure(f"{name}: {side}", groups, "", "probability", count))
        for part, unit in (("in_format", "nats"), ("neutral", "nats"), ("mass", "probability")):
            values = [[one[part]]]
            records.append(control.figure(f"{name}: {side}, {part}", values, "", unit, count))
        # What a sampled answer says in the mean: the probability of the answer steered for.
        said = [one["items"]["match" if side == "towards" else "other"]]
        records.append(control.figure(f"{name}: {side}, said", said, "", "probability", count))
    seconds = [[found["fit_seconds"]]]
    return [*records, control.figure(f"{name}: fit", seconds, "", "seconds", 1)]


if __name__ == "__main__":
    main()

"""How many statements a fit needs: INNSteer on 100 and on 400 of them, every behaviour.

    python benchmarks/statements.py DATA [--wording second] [--counts 100,400]

Closed form with its strength and sharpness chosen on 100 validation statements, no polish, at
strength 1 and -1, on 200 test statements; the smaller set lies inside the larger. Gain: alignment
less the unsteered model's, towards. Beside it, how often a statement's length alone tells its key.
Behaviours are written one by one to results/statements.json, so an interrupted run goes on where it
stopped.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import control
import numpy as np
import torch

from innsteer import load_model, steerer
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.files import write_json
from innsteer.suites import persona

RESULTS = control.HERE / "results" / "statements.json"


def measured(
    backend: HF, data: Path, name: str, wording: str, counts: list[int], like: Through | None
) -> tuple[dict[str, Any], Through]:
    """Alignment of one behaviour: unsteered, and both ways per count."""
    unmoved = [backend.reference(persona.unmoved("fit", wording), None)]
    # The same statements bare: what a wording changes.
    unmoved.append(control.references(backend)["neutral_fit"])
    found: dict[str, Any] = {}
    for count in sorted(counts, reverse=True):
        contrast = persona.contrast(control.persona_file(data, name), wording=wording, train=count)
        run = Through(backend, [contrast], [control.SITE], unmoved, like=like, progress=control.say)
        like = run
        if not found:
            found["unsteered"] = control.alignment(control.chosen(run, None, "test", 0.0))
        maps = steerer.get("innsteer", objective="target", polish=0).fit_through(run)
        for sign, side in ((1.0, "towards"), (-1.0, "away")):
            share = control.alignment(control.chosen(run, maps, "test", sign))
            found[f"{count} {side}"] = share
    assert like is not None
    return found, like


def by_length(data: Path, name: str) -> float:
    """Test accuracy of the key by the number of words alone, its threshold set on training."""
    contrast = persona.contrast(control.persona_file(data, name), wording="{statement}")

    def part(split: str) -> tuple[np.ndarray, np.ndarray]:
        items = contrast.part(split).items
        words = np.array([len(str(item.prompt).split()) for item in items])
        return words, np.array([item.key == "Yes" for item in items])

    words, keys = part("train")
    edge = max(range(1, 40), key=lambda count: ((words >= count) == keys).mean())
    words, keys = part("test")
    return float(((words >= edge) == keys).mean())


def figures(found: dict[str, Any], counts: list[int]) -> list[dict[str, Any]]:
    """Means over behaviours, and the ratio of gains at the first and the last count."""
    values = list(found.values())
    records = []
    for name in ["unsteered", *(f"{n} {side}" for n in counts for side in ("towards", "away"))]:
        groups = [[one[name]] for one in values]
        records.append(control.figure(name, groups, "", "probability", len(values)))
    gains = np.array([[one[f"{n} towards"] - one["unsteered"] for n in counts] for one in values])
    rng = np.random.default_rng(0)
    draws = gains[rng.integers(len(gains), size=(2000, len(gains)))].mean(1)
    low, high = np.quantile(draws[:, 0] / draws[:, -1], [0.025, 0.975])
    share = float(gains[:, 0].mean() / gains[:, -1].mean())
    name = f"gain at {counts[0]} over gain at {counts[-1]}"
    bounds = {"value": share, "low": float(low), "high": float(high)}
    return [
        *records,
        {"figure": name, **bounds, "asked": ">= 0.95", "unit": "ratio", "n": len(gains)},
    ]


def main() -> None:
    """Measure what is missing, write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--wording", default="second")
    parser.add_argument("--counts", default="100,400")
    given = parser.parse_args()
    counts = sorted(map(int, given.counts.split(",")))
    found: dict[str, Any] = {}
    if RESULTS.is_file():
        kept = json.loads(RESULTS.read_text())
        if (kept["wording"], kept["counts"]) != (given.wording, counts):
            raise SystemExit(f"{RESULTS} holds another wording or other counts; move it away first")
        found = kept["behaviours"]
    backend, like = HF(load_model("smollm2")), None
    stems = sorted({path.name.split(".")[0] for path in given.data.glob("*.jsonl*")})
    words = {name: by_length(given.data, name) for name in stems}
    parts = [[value] for value in words.values()]
    told = control.figure("key by the number of words", parts, "", "accuracy", len(stems))
    for name in stems:
        if name not in found:
            print(name, file=sys.stderr, flush=True)
            found[name], like = measured(backend, given.data, name, given.wording, counts, like)
        write_json(
            RESULTS,
            {
                "command": "python benchmarks/statements.py DATA",
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "machine": "2 cores, CPU",
                "wording": given.wording,
                "counts": counts,
                "behaviours": found,
                "key_by_the_number_of_words": words,
                "not_run": [stem for stem in stems if stem not in found],
                "figures": [*figures(found, counts), told],
            },
        )
    for record in [*figures(found, counts), told]:
        print(f"{record['figure']}: {record['value']:.4g} {record['asked']}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Many behaviours in one shear: what sharing costs, and what mixing does.

    python benchmarks/many.py DATA [--train 200]

Eight persona behaviours on the second wording, fitted in closed form at one site: alone, in one
map (one flow, a row of latent parameters each), in one map whose gates also shut on the other
behaviours' statements (``apart``), and in one whose readouts were made uncorrelated
(``orthogonal``). A ninth is added to the finished map. Then every behaviour is steered on every
behaviour's statements (interference), and all 28 pairs at once, within one cost budget.
"""

import argparse
import itertools
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import control
import numpy as np
import torch

from innsteer import load_model, steerer
from innsteer.activations import Activations
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.files import write_json
from innsteer.flows import Shear
from innsteer.interventions import Latent
from innsteer.steerer import Interventions
from innsteer.suites import persona

RESULTS = control.HERE / "results" / "many.json"
NAMES = (
    "desire-for-acquiring-wealth",
    "desire-for-acquiring-power",
    "agreeableness",
    "extraversion",
    "ends-justify-means",
    "high-discount-rate",
    "desire-to-create-allies",
    "desire-for-recursive-self-improvement",
    "believes-it-has-phenomenal-consciousness",
)
GRID = (1.0, 2.0, 3.0, 4.0, 6.0)
OPPOSED = (("agreeableness", "ends-justify-means"), ("agreeableness", "desire-for-acquiring-power"))
"""Pairs that pull against each other, listed by reading the statements before any fit: no statement
belongs to two behaviours, so base answers cannot tell."""


def columns(k: int, strengths: dict[int, float]) -> torch.Tensor:
    row = torch.zeros(k)
    for column, strength in strengths.items():
        row[column] = strength
    return row


def behaviours(acts: Activations, names: list[str]) -> Activations:
    """The rows of some behaviours, with the unmoved rows that are everybody's."""
    return replace(acts.where(behaviour=[*names, ""]), behaviours=tuple(names))


def placed(maps: Interventions, k: int, column: int) -> Interventions:
    """A one-behaviour shear as one column of k; the others write nothing."""
    part = maps[control.SITE]
    assert isinstance(part, Latent) and isinstance(part.step, Shear)
    r = part.step.write.shape[-1]
    step = Shear(r + part.step.read.shape[-1], r, k)
    with torch.no_grad():
        for name, tensor in part.step.named_parameters():
            step.get_parameter(name)[column] = tensor[0]
    return Interventions({control.SITE: Latent(part.flow, step, part.reader)}).requires_grad_(False)


def shares(
    run: Through, maps: Interventions | None, name: str, part: str, row: torch.Tensor
) -> float:
    """Alignment of a behaviour's items of a part under one row of coefficients."""
    items = run.items(part, name)
    with torch.no_grad():
        found = run.answers(maps, items, row.expand(len(items), -1))
    record = {
        "match": found.target.exp().tolist(),
        "other": found.source.exp().tolist(),
        "keys": run.keys(items),
    }
    return control.alignment(record)


def best_strength(run: Through, maps: Interventions, name: str, column: int, k: int) -> float:
    """The strength of a grid with the best validation alignment, alone."""
    gains = {
        strength: shares(run, maps, name, "validation", columns(k, {column: strength}))
        for strength in GRID
    }
    return max(gains, key=lambda strength: gains[strength])


def orthogonal(maps: Interventions, acts: Activations) -> Interventions:
    """The same shear with readouts that are uncorrelated over all items, as near as can be.

    With R the readouts ``[k, d]`` scaled to unit variance and P their correlation, P^(-1/2) R
    (Loewdin's symmetric orthogonalisation), scaled back.
    """
    part = maps[control.SITE]
    assert isinstance(part, Latent) and isinstance(part.step, Shear) and part.reader is not None
    prompts = acts.prompts.where(split="train")
    own = [torch.cat(prompts.sides(control.SITE, name)) for name in acts.behaviours]
    with torch.no_grad():
        seen = part.reader(torch.cat(own)).double()
        reads = part.step.read[:, 0].double()
        values = (seen - seen.mean(0)) @ reads.mT
        spread = values.std(0)
        kinds, vectors = torch.linalg.eigh(torch.corrcoef(values.mT))
        whiten = vectors @ (kinds.clamp_min(1e-6) ** -0.5).diag() @ vectors.mT
        turned = spread.unsqueeze(-1) * (whiten @ (reads / spread.unsqueeze(-1)))
        moved = (turned - reads) @ seen.mean(0)
        part.step.read[:, 0] = turned.float()
        part.step.read_bias[:, 0] -= moved.float()
    return maps


def mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=80)
    asked = parser.parse_args()
    backend = HF(load_model("smollm2"))
    contrasts = [
        persona.contrast(
            control.persona_file(asked.data, name),
            wording="second",
            train=asked.train,
            validation=60,
            test=asked.test,
        )
        for name in NAMES
    ]
    names = [contrast.behaviour for contrast in contrasts[:8]]
    unmoved = [backend.reference(persona.unmoved(p, "second"), None) for p in ("fit", "test")]
    unmoved.append(control.references(backend)["neutral_test"].part(600))
    run = Through(backend, contrasts, [control.SITE], unmoved, progress=control.say)
    fits = list(range(len(unmoved[0].ids)))
    acts = run.among(fits).rows()
    eight = behaviours(acts, names)
    k, records = len(NAMES), list[dict[str, Any]]()
    tables: dict[str, list[list[float]]] = {}

    def note(name: str, value: float, asked: str, unit: str, n: int) -> None:
        found = {"figure": name, "value": value, "low": value, "high": value}
        records.append(found | {"asked": asked, "unit": unit, "n": n})
        print(f"{name}: {value:.4g} {asked}", file=sys.stderr, flush=True)

    base = {name: shares(run, None, name, "test", torch.zeros(k)) for name in names}
    single = {}
    for column, name in enumerate(names):
        method = steerer.get("innsteer", objective="target")
        alone = placed(method.fit(behaviours(acts, [name])), k, column)
        strength = best_strength(run, alone, name, column, k)
        single[name] = shares(run, alone, name, "test", columns(k, {column: strength}))
    n_items = asked.test * len(names)
    note("alone, mean of 8, towards", mean(single), "", "probability", n_items)
    for label in ("one map", "one map, apart", "one map, orthogonal"):
        method = steerer.get("innsteer", objective="target", apart="apart" in label)
        started = time.perf_counter()
        maps = method.fit(eight)
        if "orthogonal" in label:
            maps = orthogonal(maps, eight)
        note(f"{label}, fit", time.perf_counter() - started, "", "seconds", 1)
        started = time.perf_counter()
        grown = method.extend(maps, behaviours(acts, [contrasts[8].behaviour]))
        note(f"{label}, ninth added", time.perf_counter() - started, "< 5", "seconds", 1)
        size = sum(t.numel() * 4 for t in grown.state_dict().values())
        size -= sum(t.numel() * 4 for t in maps.state_dict().values())
        note(f"{label}, ninth's size", size / 1024, "< 64", "KB", 1)
        strengths = {
            c: best_strength(run, grown, contrast.behaviour, c, k)
            for c, contrast in enumerate(contrasts)
        }
        together = {
            name: shares(run, grown, name, "test", columns(k, {c: strengths[c]}))
            for c, name in enumerate(names)
        }
        ninth = contrasts[8].behaviour
        note(f"{label}, mean of 8, towards", mean(together), "", "probability", n_items)
        lost = mean(single) - mean(together)
        note(f"{label}, mean of 8, below alone", lost, "<= 0.02", "probability", n_items)
        got = shares(run, grown, ninth, "test", columns(k, {8: strengths[8]}))
        note(f"{label}, ninth, towards", got, "", "probability", asked.test)
        table = {
            (i, j): shares(run, grown, names[j], "test", columns(k, {i: strengths[i]}))
            for i, j in itertools.product(range(8), repeat=2)
            if i != j
        }
        tables[label] = [
            [together[names[j]] if i == j else table[i, j] for j in range(8)] for i in range(8)
        ]
        strayed = [abs(value - base[names[j]]) for (_, j), value in table.items()]
        note(f"{label}, interference, mean", float(np.mean(strayed)), "", "probability", 56)
        note(f"{label}, interference, worst", float(np.max(strayed)), "", "probability", 56)
        asked_for = list(range(len(fits), len(fits) + len(unmoved[1].ids)))
        plain = list(range(asked_for[-1] + 1, len(run.unmoved)))

        def cost_of(row: torch.Tensor, grown: Interventions = grown) -> float:
            """The worse half: of unrelated statements, of neutral prompts; nats."""
            with torch.no_grad():
                return max(
                    float(run.divergence(grown, places, row).mean())
                    for places in (asked_for, plain)
                )

        def within(row: torch.Tensor) -> tuple[torch.Tensor, float]:
            """The mix, weakened until it costs no more than the budget; its cost."""
            cost = cost_of(row)
            for _ in range(12):
                if cost <= control.BUDGET:
                    break
                row = row * min((0.97 * control.BUDGET / cost) ** 0.5, 0.8)
                cost = cost_of(row)
            return row, cost

        kept: dict[tuple[int, int], list[float]] = {}
        spent = []
        for i, j in itertools.combinations(range(8), 2):
            row, cost = within(columns(k, {i: strengths[i], j: strengths[j]}))
            spent.append(cost)
            kept[i, j] = []
            for c in (i, j):
                effect = together[names[c]] - base[names[c]]
                both = shares(run, grown, names[c], "test", row) - base[names[c]]
                kept[i, j].append(both / effect if abs(effect) > 1e-6 else 1.0)
        whole = [value for values in kept.values() for value in values]
        note(f"{label}, pairs, effect kept, median", float(np.median(whole)), ">= 0.8", "share", 56)
        tenth = float(np.quantile(whole, 0.1))
        note(f"{label}, pairs, effect kept, 10th percentile", tenth, "", "share", 56)
        for (i, j), values in kept.items():
            if {names[i], names[j]} in map(set, OPPOSED):
                name = f"{label}, opposed: {names[i]} and {names[j]}, effect kept"
                note(name, float(np.mean(values)), "", "share", 2)
        most = f"<= {control.BUDGET}"
        note(f"{label}, pairs, cost of the worse half, worst of 28", max(spent), most, "nats", 28)
        every, cost = within(columns(k, {c: s for c, s in strengths.items() if c < 8}))
        note(f"{label}, all eight at once, cost of the worse half", cost, most, "nats", 8)
        left = []
        for name in names:
            effect = together[name] - base[name]
            left.append((shares(run, grown, name, "test", every) - base[name]) / effect)
        note(f"{label}, all eight at once, effect kept", float(np.median(left)), "", "share", 8)
    write_json(
        RESULTS,
        {
            "command": f"python benchmarks/many.py DATA --train {asked.train}",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": "2 cores, CPU",
            "behaviours": list(NAMES),
            # Alignment of the column's items with the row's behaviour steered alone.
            "interference": tables,
            "figures": records,
        },
    )


if __name__ == "__main__":
    main()

"""FLAS: what a field learnt on listed concepts gives on concepts that it never saw.

    python benchmarks/flas.py [--smoke] [--work FOLDER] [--axbench FOLDER]

Three stages, each of which goes on where it was interrupted: the table (SmolLM2 writes twelve
responses of 64 tokens to each concept of flas_concepts.txt, prompted), the training (stopped by
validation, hours on two cores), the figures. Fifty concepts are put aside whole. Measured without a
judge: log-probability per token of held-out responses told their concept, minus told a random other
one, paired, hierarchical bootstrap over concepts and responses; beside it the same for prompting.
Unseen concepts of the list have responses by the same writer; ``--axbench`` names a folder of its
layout, whose responses other models wrote, for testing only. ``--smoke``: every stage in minutes,
with figures that mean nothing, kept in the work folder alone.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from innsteer import load_model
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF, Memo
from innsteer.backends.meter import instruct
from innsteer.backends.told import Told
from innsteer.concepts import Concepts
from innsteer.distilling import REQUEST, distil, read_concepts
from innsteer.files import write_json, write_text
from innsteer.fitting import fit_concepts
from innsteer.judging import Verdict
from innsteer.metrics.base import Measured
from innsteer.statistics import resample
from innsteer.steering import Steering

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "flas.json"
PER_TOKEN = Verdict("log_prob", "nats per token")
FULL: dict[str, Any] = {
    "concepts": 400,
    "unseen": 50,
    "each": 12,
    "tokens": 64,
    "tested": 20,
    "responses": 12,
    "fields": {
        "updates": 6000,
        "batch": 12,
        "parts": 2,
        "learning_rate": 1e-3,
        "warmup": 100,
        "every": 200,
        "patience": 6,
    },
}
SMOKE: dict[str, Any] = FULL | {
    "concepts": 4,
    "unseen": 2,
    "each": 3,
    "tokens": 8,
    "tested": 2,
    "responses": 2,
    "fields": {"updates": 2, "batch": 2, "parts": 1, "learning_rate": 1e-3, "every": 1},
}


def say(stage: str, done: int, total: int) -> None:
    """A line per hundredth."""
    if done in (0, total) or done % max(total // 100, 1) == 0:
        print(f"{time.strftime('%H:%M')} {stage} {done}/{total}", file=sys.stderr, flush=True)


def table(work: Path, plan: dict[str, Any]) -> Concepts:
    """The listed concepts' responses, written once; the last ones of a shuffle are unseen."""
    concepts = list(read_concepts(HERE / "flas_concepts.txt"))
    random.Random(0).shuffle(concepts)
    concepts = concepts[: plan["concepts"]]
    path = work / "table.jsonl"
    if not path.exists():
        with Memo(work / "writing") as memo:
            found = distil(
                HF(load_model("smollm2"), memo=memo),
                concepts,
                each=plan["each"],
                sampling=Sampling(plan["tokens"], 1.0),
                progress=say,
            )
            shares = {"share": found.share, "shares": found.shares}
            write_json(work / "shares.json", shares)
            write_text(path, "".join(f"{json.dumps(row._asdict())}\n" for row in found.kept))
    aside = set(concepts[-plan["unseen"] :])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    dealt = Concepts.of([r for r in rows if r["concept"] not in aside], unseen=0.0)
    rest = Concepts.of([r | {"split": "test"} for r in rows if r["concept"] in aside])
    return Concepts(dealt.rows + rest.rows)


def field(work: Path, known: Concepts, plan: dict[str, Any]) -> Steering:
    """The trained field, kept."""
    folder = work / "field"
    if not folder.exists():
        steering = fit_concepts(
            load_model("smollm2"),
            known,
            longest=plan["tokens"],
            checkpoint=work / "training.safetensors",
            progress=say,
            **plan["fields"],
        )
        steering.save(folder)
    return Steering.load(folder)


def others(concepts: Sequence[str], seed: int = 0) -> list[str]:
    """For each response's concept a random other one of those that stand here."""
    named, dice = list(dict.fromkeys(concepts)), random.Random(seed)
    return [dice.choice([other for other in named if other != own]) for own in concepts]


def by_concept(rows: Concepts, values: Sequence[float]) -> dict[str, dict[str, list[Measured]]]:
    """Concept -> response -> its figure."""
    found: dict[str, dict[str, list[Measured]]] = {}
    for n, (row, value) in enumerate(zip(rows.rows, values, strict=True)):
        found.setdefault(row.concept, {})[str(n)] = [Measured(value)]
    return found


def prompted(backend: HF, rows: Concepts, concepts: Sequence[str], longest: int) -> list[float]:
    """Log-probability per token of responses under prompts that ask for concepts."""
    asked = []
    for n, (row, concept) in enumerate(zip(rows.rows, concepts, strict=True)):
        request = instruct(row.prompt, REQUEST.format(concept=concept))
        asked.append(Prompt(str(n), request, (row.response,)))
    found = [values[0][:longest] for values in backend.score(asked, progress=say)]
    return [sum(values) / len(values) for values in found]


def gaps(backend: HF, steering: Steering, rows: Concepts, name: str, longest: int) -> list[Any]:
    """Own concept minus a random other, for the field at strengths 1 and 2, and for prompting."""
    told = Concepts(tuple(type(row)(row.concept, row.prompt, row.response) for row in rows.rows))
    (site,) = steering.interventions
    run = Told(backend, told, site, longest=longest)
    items = run.items()
    own = [row.concept for row in told.rows]
    other = others(own)
    arms: dict[str, list[float]] = {}
    with torch.no_grad():
        arms["plain"] = run.told(None, items, [1.0] * len(items)).tolist()
        for strength in (1.0, 2.0):
            for what, concepts in (("own", own), ("other", other)):
                values = run.told(steering.interventions, items, [strength] * len(items), concepts)
                arms[f"{what} {strength:g}"] = values.tolist()
    arms["prompted own"] = prompted(backend, told, own, longest)
    arms["prompted other"] = prompted(backend, told, other, longest)
    draws = resample(PER_TOKEN, {arm: by_concept(told, values) for arm, values in arms.items()})
    found = []
    for what, ours, theirs, asked in (
        ("field at 1, own less other concept", "own 1", "other 1", "> 0"),
        ("field at 2, own less other concept", "own 2", "other 2", ""),
        ("field at 1, own concept less plain", "own 1", "plain", ""),
        ("prompting, own less other concept", "prompted own", "prompted other", ""),
        ("prompting, own concept less plain", "prompted own", "plain", ""),
    ):
        gap = draws.difference(ours, theirs)
        found.append(
            figure(f"{name}: {what}", gap.value, asked, PER_TOKEN.unit, gap.n, gap.low, gap.high)
        )
    return found


def figure(
    name: str, value: float, asked: str, unit: str, n: int, low: float, high: float
) -> dict[str, Any]:
    """One record; ``asked`` is an operator and a number, "" where nothing was asked."""
    bounds = {"value": value, "low": low, "high": high}
    return {"figure": name, **bounds, "asked": asked, "unit": unit, "n": n}


def cached(backend: HF, steering: Steering) -> dict[str, Any]:
    """Decoding with a cache against one pass: the largest difference of log-probabilities."""
    model = backend.model
    ids = torch.tensor([model.encode("Tell me about the sea.").ids])
    apart = 0.0
    with torch.inference_mode(), steering.told(concept="speaks like a sea captain").on(model, 2.0):
        whole = model.model(ids, use_cache=False).logits.float().log_softmax(-1)
        cache, parts = None, []
        for n in range(ids.shape[1]):
            out = model.model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits.float().log_softmax(-1))
        apart = float((torch.cat(parts, 1) - whole).abs().max())
    count = ids.shape[1]
    return figure("decoding off one pass", apart, "<= 1e-04", "nats", count, apart, apart)


def overhead(backend: HF, steering: Steering, tokens: int) -> dict[str, Any]:
    """Time per token of steered decoding over plain decoding, medians of alternating repeats."""
    prompt = [Prompt("0", "Tell me about the sea.")]
    edit = steering.told(concept="speaks like a sea captain").edit(1.0)
    spent: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(6):
        for steered in (False, True):
            started = time.perf_counter()
            (said,) = backend.generate(prompt, [edit] if steered else [], Sampling(tokens))
            if repeat:  # the first of each warms up
                spent[steered].append((time.perf_counter() - started) / max(said.tokens, 1))
    ratios = sorted(b / a for a, b in zip(spent[False], spent[True], strict=True))
    name = "time per decoded token, three steps over plain"
    middle = ratios[len(ratios) // 2]
    return figure(name, middle, "", "ratio", len(ratios), ratios[0], ratios[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="minutes, and figures of no meaning")
    parser.add_argument("--work", type=Path, default=Path("runs/flas"), help="what is kept")
    parser.add_argument("--axbench", type=Path, help="a folder of AxBench's layout")
    asked = parser.parse_args()
    plan = SMOKE if asked.smoke else FULL
    asked.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    known = table(asked.work, plan)
    steering = field(asked.work, known, plan)
    backend = HF(load_model("smollm2"))
    figures = gaps(backend, steering, known.part("test"), "unseen", plan["tokens"])
    if asked.axbench:
        foreign = Concepts.load(asked.axbench, unseen=0.0)
        few = [
            row
            for concept in foreign.named()[: plan["tested"]]
            for row in [r for r in foreign.rows if r.concept == concept][: plan["responses"]]
        ]
        figures += gaps(backend, steering, Concepts(tuple(few)), "axbench", plan["tokens"])
    figures += [cached(backend, steering), overhead(backend, steering, plan["tokens"])]
    record = {
        "command": "python benchmarks/flas.py" + (" --smoke" if asked.smoke else ""),
        "plan": plan,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "kept": json.loads((asked.work / "shares.json").read_text())["share"],
        "concepts": {part: len(known.named(part)) for part in ("train", "test")},
        "training": steering.provenance["diagnostics"],
        "fit_seconds": steering.provenance["fit_seconds"],
        "seconds": round(time.perf_counter() - started, 1),
        "figures": figures,
    }
    write_json(asked.work / "smoke.json" if asked.smoke else RESULTS, record)
    for one in figures:
        print(f"{one['figure']}: {one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})")


if __name__ == "__main__":
    main()

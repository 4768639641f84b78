"""The spine's figures: the demo from a bare clone, control at budget, exactness, and speed.

    python benchmarks/spine.py                  # everything that is not measured yet
    python benchmarks/spine.py --only control   # one part again

Each part writes its figures to ``results/spine.json`` when it ends, with a digest of the source
that it measured: an interrupted run goes on where it stopped, and a changed source is measured
again. Ratios are taken side by side in one process, alternating.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innsteer import demo, evaluation, fitting, load_model, names, tuning
from innsteer.activations import Activations
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast, Item, prompts
from innsteer.files import write_json
from innsteer.site import Site
from innsteer.steerer import get
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "spine.json"
Figure = dict[str, Any]


def figure(
    name: str,
    value: float,
    asked: str,
    unit: str,
    n: int,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """One record; ``asked`` is an operator and a number, "" where nothing was asked."""
    bounds = {"low": value if low is None else low, "high": value if high is None else high}
    return {"figure": name, "value": value, **bounds, "asked": asked, "unit": unit, "n": n}


def source() -> str:
    """A digest of the package's source: figures of two sources are never mixed."""
    digest = hashlib.sha256()
    for path in sorted((HERE.parent / "src").rglob("*")):
        if path.is_file() and path.suffix in {".py", ".jsonl", ".json", ".j2"}:
            digest.update(str(path.relative_to(HERE.parent)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


RUNS = HERE.parent / "runs" / f"spine-{source()}"


def say(stage: str, done: int, total: int) -> None:
    if done == 0:
        print(f"  {stage}", file=sys.stderr, flush=True)


def interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median with a 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    draws = [np.median(rng.choice(values, len(values))) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


# --- parts ---------------------------------------------------------------------------------------


def fresh() -> list[Figure]:
    """A bare clone, a fresh environment and an empty model cache, to the demo's result."""
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "INNSTEER_"))}
        env |= {"INNSTEER_HOME": f"{folder}/home"}
        busy = demo.matmul_seconds()
        started = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(HERE.parent), f"{folder}/clone"], check=True)
        make = ["make", "-C", f"{folder}/clone", "demo", f"OUT={folder}/demo"]
        subprocess.run(make, check=True, env=env, stdout=sys.stderr)
        minutes = (time.perf_counter() - started) / 60
    return [
        figure("bare clone to the demo's result", minutes, "<= 8", "minutes", 1),
        figure("matrix product, 1536 square, before the clone", busy, "", "seconds", 5),
    ]


def demo_cpu() -> list[Figure]:
    """The demo with environment and model made."""
    load_model("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "innsteer.cli", "demo", "--json", "--out", f"{folder}/d"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        made = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = json.loads(made.stdout)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [
        figure("demo, environment and model made, whole process", cpu, "<= 180", "CPU seconds", 1),
        figure("matrix product, 1536 square, in the demo", facts["matmul_seconds"], "", "s", 5),
    ]


def steering(name: str) -> Steering:
    """A method fitted and tuned at full size, once per source."""
    if not (RUNS / name).exists():
        model, contrast = load_model("smollm2"), Contrast.load(demo.BEHAVIOUR)
        fitted = fitting.fit(model, contrast, name, progress=say)
        tuning.tune(model, fitted, contrast, both_ways=True, progress=say).save(RUNS / name)
    return Steering.load(RUNS / name)


def control() -> list[Figure]:
    """All arms at the neutral budget, at full size, on the behaviour fixed beforehand."""
    model = load_model("smollm2")
    contrast = Contrast.load(demo.BEHAVIOUR)
    steerings = {name: steering(name) for name in ("diffmean", "innsteer")}
    report = evaluation.compare(model, steerings, suites.load(contrast), progress=say)
    report.save(RUNS / "report", replace=True)
    print(report.text(samples=6))
    (HERE / "results" / "spine-control.txt").write_text(report.text(samples=8), encoding="utf-8")
    found = []
    for arm in report.arms:
        for metric in report.metrics():
            for against in ("", evaluation.UNSTEERED):
                f = report.figure(arm, metric, against)
                if f is None:
                    continue
                moved = metric == report.control and against and arm == "innsteer"
                name = f"{arm}: {metric}" + (f", less {against}" if against else "")
                asked = ">= 0.2" if moved else ""
                if metric == "neutral_cost" and arm in steerings:
                    asked = f"<= {1.1 * report.budget:.4f}"
                found.append(figure(name, f.value, asked, f.unit, f.n, f.low, f.high))
                if moved:
                    low = "innsteer: lower end of that interval"
                    found.append(figure(low, f.low, "> 0.1", f.unit, f.n))
    return found


def exact() -> list[Figure]:
    """Round trip on real rows, and rows at strength 0."""
    model = load_model("smollm2")
    ours = steering("innsteer")
    site = next(iter(ours.interventions))
    part = ours.interventions[site]
    held = Contrast.load(demo.BEHAVIOUR).part("test")
    rows = fitting.record(model, held, [site], read="all").values[site]
    found = []
    with torch.no_grad():
        for dtype, asked in ((torch.float32, "<= 1e-05"), (torch.float64, "<= 1e-10")):
            flow, h = part.flow.to(dtype), rows.to(dtype)
            error = (flow.inverse(flow(h)) - h).norm(dim=-1) / h.norm(dim=-1)
            name = f"round trip on held-out rows, {str(dtype).removeprefix('torch.')}, worst row"
            found.append(figure(name, float(error.max()), asked, "relative error", len(rows)))
        part.flow.to(torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            h = rows.to(dtype)
            kind = torch.int32 if dtype == torch.float32 else torch.int16
            same = part(h, torch.zeros(len(h), 1)).view(kind) == h.view(kind)
            name = f"rows at strength 0, {str(dtype).removeprefix('torch.')}, bit-identical"
            found.append(
                figure(name, float(same.all(-1).float().mean()), ">= 1", "share", len(rows))
            )
    return found


def thousand() -> list[Any]:
    """1,000 of the built-in prompts."""
    texts = [
        prompt.conversation for part in ("validation", "test") for prompt in suites.neutral(part)
    ]
    for name in ("critical", "formal"):
        texts += [item.prompt for item in Contrast.load(name).items]
        for use in ("test", "validation", "in_format_test", "in_format_validation"):
            texts += prompts(name, use)
    assert len(texts) >= 1000
    return texts[:1000]


def recording() -> list[Figure]:
    """record() up to block 16 against the plain full forward with logits, on the same batches."""
    model, texts = load_model("smollm2"), thousand()
    backend = HF(model)
    pairs = []
    for chunk in range(20):
        mine = texts[chunk::20]
        items = tuple(Item(str(n), text, None, "Yes", None, str(n)) for n, text in enumerate(mine))
        contrast = Contrast("speed", "open", items)
        ids = [model.encode(text, answer="Yes").ids for text in mine]

        def record() -> float:
            started = time.perf_counter()
            backend.record(contrast, [Site(16)], read="last")
            return time.perf_counter() - started

        def full() -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                for index in backend._batches([len(row) for row in ids], lambda *_: None, ""):
                    tokens, mask = backend._pad([ids[i] for i in index], side="right")
                    model.model(tokens, attention_mask=mask, use_cache=False)
            return time.perf_counter() - started

        if chunk == 0:
            record(), full()
        first, second = (record, full) if chunk % 2 else (full, record)
        times = {first: first(), second: second()}
        pairs.append((times[record], times[full]))
        say(f"recording {chunk + 1}/20: {times[record] / times[full]:.3f}", 0, 1)
    seconds = np.array(pairs)
    ours, plain = seconds.sum(0)
    draws = seconds[np.random.default_rng(0).integers(0, len(pairs), (2000, len(pairs)))].sum(1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    name = "record() of 1,000 prompts to block 16, over the full forward with logits"
    return [
        figure(name, ours / plain, "<= 0.55", "ratio of seconds", 1000, float(low), float(high)),
        figure("record() of 1,000 prompts to block 16", float(ours), "", "seconds", 1000),
    ]


def fit_times() -> list[Figure]:
    """INNSteer on 500 pairs of real rows, with early stopping and with the full schedule."""
    model = load_model("smollm2")
    site = fitting.default_site(model)
    few = Contrast.load(demo.BEHAVIOUR).part("train").subset(40)
    # Answer tokens as rows: speed does not depend on how rows were read.
    source, target = fitting.record(model, few, [site], read="all").sides(site)
    acts = Activations.of_sides(source[:500], target[:500], site=site)
    found = []
    for label, fields, asked in (
        ("early stopping", {}, "< 20"),
        ("full schedule of 300 epochs", {"patience": 0}, "< 90"),
    ):
        times = []
        for seed in range(3):
            started = time.perf_counter()
            get("innsteer", **fields).fit(acts, seed=seed)
            times.append(time.perf_counter() - started)
        value, low, high = interval(times)
        found.append(
            figure(f"fit of 500 pairs, d=576, {label}", value, asked, "seconds", 3, low, high)
        )
    return found


def speed() -> list[Figure]:
    """Steered against unsteered tokens per second: four couplings of width 128 at one layer."""
    model = load_model("smollm2")
    ours = steering("innsteer")
    found = []
    for batch in (1, 8):
        texts = prompts(demo.BEHAVIOUR, "test")[:batch]
        backend = HF(model, batch=batch)
        ids, mask = backend._pad([model.encode(text).ids for text in texts], side="left")

        def run() -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                model.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=32,
                    min_new_tokens=32,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                )
            return time.perf_counter() - started

        run()
        ratios = []
        for repeat in range(10):
            if repeat % 2:
                plain = run()
            with ours.on(model):
                steered = run()
            if not repeat % 2:
                plain = run()
            ratios.append(plain / steered)
        value, low, high = interval(ratios)
        name = f"steered over unsteered tokens/s in generate, batch {batch}"
        found.append(figure(name, value, ">= 0.93", "ratio", len(ratios), low, high))
    return found


PARTS: dict[str, Callable[[], list[Figure]]] = {
    "control": control,
    "exact": exact,
    "speed": speed,
    "fitting": fit_times,
    "recording": recording,
    "demo": demo_cpu,
    "fresh": fresh,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to measure again")
    wanted = parser.parse_args().only
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}
    for name, part in PARTS.items():
        fresh_enough = known["parts"].get(name, {}).get("source") == source()
        if name not in (wanted or PARTS) or (not wanted and fresh_enough):
            continue
        print(f"{name}: {part.__doc__}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        figures = part()
        known["parts"][name] = {
            "figures": figures,
            "source": source(),
            "seconds": round(time.perf_counter() - started, 1),
            "matmul_seconds": demo.matmul_seconds(),
        }
        record = {
            "command": "python benchmarks/spine.py",
            "versions": _versions(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "methods": names(),
            "figures": [f for p in known["parts"].values() for f in p["figures"]],
            "parts": known["parts"],
        }
        write_json(RESULTS, record)
        for f in figures:
            if f["asked"]:
                print(f"  {f['figure']}: {f['value']:.4g} (asked {f['asked']})", flush=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("innsteer", "torch", "transformers", "numpy")}


if __name__ == "__main__":
    main()

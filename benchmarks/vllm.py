"""Steering inside vLLM: parity with transformers, isolation, and what it costs.

    python benchmarks/vllm.py parity --dtype float32
    python benchmarks/vllm.py mixed
    python benchmarks/vllm.py speed

It needs an environment with vllm: ``make test-vllm`` makes one. Each part runs alone, in one
process and on one thread, and writes its figures to ``results/vllm.json`` when it ends; what has
not run is listed there as open. Speed is taken in CPU seconds of the process, arms alternating, so
that other work on the machine does not count.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch
from spine import figure, interval

# This file is called like the package that it measures.
sys.path.remove(str(Path(__file__).resolve().parent))

from innsteer.activations import Activations
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.backends.menu import MARK, Order
from innsteer.backends.vllm_plugin import server
from innsteer.contrast import Contrast
from innsteer.files import read_json, write_json
from innsteer.fitting import record
from innsteer.interventions import Edit
from innsteer.models import load_model
from innsteer.site import Site, Where
from innsteer.smollm2 import smollm2_folder
from innsteer.steerer import get
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

RESULTS = Path(__file__).resolve().parent / "results" / "vllm.json"
LAYER = 19
FAMILIES = ("innsteer", "diffmean", "linear_act", "mimic")
OPEN = [
    "a GPU: V2 runner, CUDA graphs, throughput",
    "all layers, and the curve over K behaviours in one batch",
    "vllm bench serve and lm-eval over HTTP",
]
"""What no part here measures."""
PARTS = ("parity-float32", "parity-bfloat16", "mixed", "speed")
Figures = list[dict[str, Any]]


def engine(folders: dict[str, str], dtype: str = "float32", **more: Any) -> Any:
    """vLLM in this process, eager, with steerings."""
    from vllm import LLM

    limits = {"max_model_len": 1024, "max_num_seqs": 64, "enforce_eager": True} | more
    config = {MARK: server.configuration(folders)}
    return LLM(str(smollm2_folder()), dtype=dtype, additional_config=config, **limits)


def rows(count: int = 400) -> Activations:
    """Recorded rows of both sides of the built-in behaviour."""
    contrast = Contrast.load("critical").part("train")
    short = Contrast(contrast.behaviour, contrast.kind, contrast.items[: count // 2])
    return record(load_model("smollm2"), short, [Site(LAYER)])


def fitted(name: str, acts: Activations, **fields: Any) -> Steering:
    """A method on those rows."""
    method = get(name, **fields)
    return Steering(method, method.fit(acts), acts.behaviours)


# --- parity --------------------------------------------------------------------------------------


def parity(dtype: str) -> Figures:
    """Gaps between the engines, teacher-forced on the plain model's tokens, plain and steered."""
    from innsteer.backends.vllm import VLLM

    acts = rows()
    limits = {"max_model_len": 512, "max_num_seqs": 64, "enforce_eager": True}
    vllm = VLLM("smollm2", dtype=dtype, **limits)
    hf = HF(vllm.model)
    asked = [Prompt(str(n), one.conversation) for n, one in enumerate(suites.neutral("test")[:64])]
    texts = {one.item: one.text for one in hf.generate(asked, (), Sampling(32))}
    forced = [Prompt(one.item, one.conversation, (texts[one.item],)) for one in asked]
    arms: dict[str, list[Edit]] = {"plain": []}
    for name in FAMILIES:
        fields = {"hidden": 128, "couplings": 4, "epochs": 40} if name == "innsteer" else {}
        arms[name] = [fitted(name, acts, **fields).edit(1.0)]
    found, plain = [], (0.0, 0.0)
    for name, edits in arms.items():
        ours, theirs = (
            np.concatenate([one[0] for one in backend.score(forced, edits)])
            for backend in (vllm, hf)
        )
        gaps = np.abs(ours - theirs)
        median, most = float(np.median(gaps)), float(gaps.max())
        plain = (median, most) if name == "plain" else plain
        tight = "<= 0.001" if dtype == "float32" else ""
        label = f"{dtype}, {name}: |dlogprob|"
        found.append(figure(f"{label}, median", median, "", "nats", len(gaps)))
        found.append(figure(f"{label}, maximum", most, tight, "nats", len(gaps)))
        if edits:
            for what, mine, base in (("median", median, plain[0]), ("maximum", most, plain[1])):
                ratio = mine / max(base, 1e-12)
                found.append(
                    figure(f"{label}, {what} over plain", ratio, "<= 2", "ratio", len(gaps))
                )
            said = [backend.generate(asked, edits, Sampling(32)) for backend in (vllm, hf)]
            share = agreement(vllm, *said)
            found.append(
                figure(f"{dtype}, {name}: greedy tokens alike", share, ">= 0.95", "share", 64)
            )
        print(found[-1], flush=True)
    return found


def agreement(backend: HF, ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Share of the first 32 greedy tokens up to which two engines' answers are the same."""
    same = total = 0
    for one, two in zip(ours, theirs, strict=True):
        a, b = (backend.model.tokenizer(x.text)["input_ids"] for x in (one, two))
        total += max(len(a), len(b))
        same += sum(x == y for x, y in zip(a, b, strict=False))
    return same / max(total, 1)


# --- isolation -----------------------------------------------------------------------------------


def mixed(count: int = 1000) -> Figures:
    """Requests of eight kinds over one long prefix, in random order, against each alone."""
    from vllm import SamplingParams

    acts, tokens = rows(), 8
    with tempfile.TemporaryDirectory() as home:
        small = {"hidden": 128, "couplings": 4, "epochs": 40}
        made = {"flow": fitted("innsteer", acts, **small), "shift": fitted("diffmean", acts)}
        made["ever"] = replace(made["shift"], where=Where("all"))
        folders = {name: str(one.save(f"{home}/{name}")) for name, one in made.items()}
        llm = engine(folders)
    tokenizer = load_model("smollm2").tokenizer
    prefix = " ".join(str(one.conversation) for one in suites.neutral("fit"))
    head = tokenizer(prefix)["input_ids"][:384]
    tails = [tokenizer(str(one.conversation))["input_ids"] for one in suites.neutral("test")[:16]]
    mixes = ["", "", "flow@1", "flow@-0.5", "shift@1", "ever@1", "ever@0.5", "flow@1+ever@0.5"]

    def ask(jobs: Sequence[tuple[int, str]]) -> list[tuple[list[int], list[float], float]]:
        params = [
            SamplingParams(
                max_tokens=tokens,
                temperature=0,
                ignore_eos=True,
                logprobs=2,
                extra_args={"steering": mix} if mix else None,
            )
            for _, mix in jobs
        ]
        given = [{"prompt_token_ids": head + tails[n]} for n, _ in jobs]
        answers = []
        for output in llm.generate(given, params, use_tqdm=False):
            (one,) = output.outputs
            steps = list(zip(one.logprobs, one.token_ids, strict=True))
            chosen = [step[token].logprob for step, token in steps]
            tops = [
                sorted((e.logprob for e in step.values()), reverse=True)[:2] for step, _ in steps
            ]
            answers.append((list(one.token_ids), chosen, [a - b for a, b in tops]))
        return answers

    kinds = [(n, mix) for n in range(len(tails)) for mix in dict.fromkeys(mixes)]
    llm.reset_prefix_cache()
    solo = {kind: ask([kind])[0] for kind in kinds}
    print("solo answers made", flush=True)
    llm.reset_prefix_cache()
    draw = random.Random(0)
    jobs = [(draw.randrange(len(tails)), draw.choice(mixes)) for _ in range(count)]
    gaps, ties, wrong = gaps_of([solo[job] for job in jobs], ask(jobs))
    llm.reset_prefix_cache()
    keys, Order.key = Order.key, lambda *_: None  # type: ignore[method-assign]
    spoilt = gaps_of([solo[job] for job in jobs[:200]], ask(jobs[:200]))
    Order.key = keys  # type: ignore[method-assign]
    most = max(gaps)
    return [
        figure("mixed: |dlogprob| of solo tokens, maximum", most, "<= 0.001", "nats", len(gaps)),
        figure(
            "mixed: answers that part where solo's top two lie within 1e-3", ties, "", "n", count
        ),
        figure("mixed: answers that part elsewhere", wrong, "<= 0", "n", count),
        figure("negative control, largest gap", max(spoilt[0]), "", "nats", 200),
        figure("negative control over mixed", max(spoilt[0]) / most, ">= 20", "ratio", 200),
        figure("negative control, answers that part", spoilt[1] + spoilt[2], "", "n", 200),
    ]


def gaps_of(solo: Sequence[Any], others: Sequence[Any]) -> tuple[list[float], int, int]:
    """Gaps up to where tokens part, and how many answers part at a tie and elsewhere."""
    gaps, ties, wrong = [0.0], 0, 0
    for (tokens, chosen, margin), (new, theirs, _) in zip(solo, others, strict=True):
        alike = [a == b for a, b in zip(tokens, new, strict=True)]
        same = (*alike, False).index(False)
        # Where they part, the token of the solo answer has no log-probability to compare.
        gaps += [abs(a - b) for a, b in zip(chosen[:same], theirs[:same], strict=True)]
        if same < len(tokens):
            ties += margin[same] < 1e-3
            wrong += margin[same] >= 1e-3
    return gaps, ties, wrong


# --- speed ---------------------------------------------------------------------------------------


def speed(rounds: int = 10) -> Figures:
    """CPU seconds of steered, idle and plain passes on one engine, arms alternating."""
    from vllm import SamplingParams

    acts, found = rows(), []
    with tempfile.TemporaryDirectory() as home:
        flow = fitted("innsteer", acts, hidden=128, couplings=4, epochs=10)
        llm = engine({"flow": str(flow.save(f"{home}/flow"))})
    draw = np.random.default_rng(0)

    def run(batch: int, prompt: int, tokens: int, mix: str) -> float:
        extra = {"steering": mix} if mix else None
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extra)
        given = [
            {"prompt_token_ids": draw.integers(500, 9000, prompt).tolist()} for _ in range(batch)
        ]
        started = time.process_time()
        llm.generate(given, params, use_tqdm=False)
        return time.process_time() - started

    arms: dict[str, Callable[..., float]] = {
        "plain": lambda *size: without(llm, run, *size),
        "idle": lambda *size: run(*size, ""),
        "steered": lambda *size: run(*size, "flow@1"),
    }
    sizes = {f"batch {batch}": (batch, 16, 16) for batch in (1, 8, 32)}
    sizes["first token, prompt of 256"] = (1, 256, 1)
    for name, size in sizes.items():
        for arm in arms.values():
            arm(*size)
        spent: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(rounds if size[2] > 1 else 2 * rounds):
            for arm in [*arms, *arms][turn % 3 :][:3]:
                spent[arm].append(arms[arm](*size))
        for arm, asked in (("steered", ">= 0.93"), ("idle", "")):
            first = size[2] == 1
            pairs = zip(spent["plain"], spent[arm], strict=True)
            value, low, high = interval([b / a if first else a / b for a, b in pairs])
            told = f"{name}: {arm} over plain, " + ("CPU seconds" if first else "tokens/CPU s")
            limit = "<= 1.06" if first and arm == "steered" else "" if first else asked
            found.append(figure(told, value, limit, "ratio", len(spent[arm]), low, high))
            print(found[-1], flush=True)
    return found + ends(found)


def ends(found: Figures) -> Figures:
    """The ends of the intervals, where something is asked of them."""
    more = []
    for one in found:
        name, low, high, n = (one[key] for key in ("figure", "low", "high", "n"))
        if "idle" in name:
            wide = figure(f"{name}: width", high - low, "<= 0.06", "ratio", n)
            holds = figure(f"{name}: holds 1", float(low <= 1 <= high), ">= 1", "yes", n)
            more += [holds, wide]
        elif "first token" in name:
            more.append(figure(f"{name}: upper end", high, "<= 1.06", "ratio", n))
        else:
            more.append(figure(f"{name}: lower end", low, ">= 0.9", "ratio", n))
    return more


@contextmanager
def detached(llm: Any) -> Iterator[None]:
    """The engine as it is without the plugin: no hook on a layer, no wrapped method."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    names = ("execute_model", "_prepare_inputs")
    wrapped = {name: vars(runner).pop(name) for name in names}
    hooks = [(part, dict(part._forward_hooks)) for part in runner.get_model().modules()]
    for part, _ in hooks:
        part._forward_hooks.clear()
    try:
        yield
    finally:
        vars(runner).update(wrapped)
        for part, own in hooks:
            part._forward_hooks.update(own)


def without(llm: Any, run: Callable[..., float], *size: int) -> float:
    with detached(llm):
        return run(*size, "")


# --- results -------------------------------------------------------------------------------------


def save(part: str, figures: Figures, seconds: float) -> None:
    """The part's figures beside those of the others."""
    known = read_json(RESULTS, "figures") if RESULTS.exists() else {"parts": {}}
    parts = known["parts"] | {part: {"seconds": round(seconds), "figures": figures}}
    names = ("innsteer", "torch", "transformers", "vllm-cpu")
    record = {
        "command": "python benchmarks/vllm.py PART",
        "versions": {name: version(name) for name in names},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "open": [*(name for name in PARTS if name not in parts), *OPEN],
        "figures": [one for found in parts.values() for one in found["figures"]],
        "parts": parts,
    }
    write_json(RESULTS, record)
    print(json.dumps(figures, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("parity", "mixed", "speed"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    if given.part == "parity":
        name, found = f"parity-{given.dtype}", parity(given.dtype)
    else:
        name, found = given.part, {"mixed": mixed, "speed": speed}[given.part]()
    save(name, found, time.perf_counter() - started)


if __name__ == "__main__":
    main()

"""Steering inside vLLM: parity with transformers, isolation, and what it costs.

    python benchmarks/vllm.py parity --dtype float32
    python benchmarks/vllm.py mixed
    python benchmarks/vllm.py ways         # compiled, on two ranks, with requests put off
    python benchmarks/vllm.py speed
    python benchmarks/vllm.py layers       # one site, and all
    python benchmarks/vllm.py behaviours   # many of them in one batch
    python benchmarks/vllm.py http --client PYTHON   # an environment with lm-eval[api]

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
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch
from spine import figure, interval
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
from innsteer.models import Encoded, load_model
from innsteer.models.smollm2 import smollm2_folder
from innsteer.site import Site, Where
from innsteer.steerer import Interventions, get
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites
from innsteer.suites import capability

RESULTS = Path(__file__).resolve().parent / "results" / "vllm.json"
LAYER = 19
FAMILIES = ("innsteer", "diffmean", "linear_act", "mimic")
OPEN = ["a GPU: V2 runner, CUDA graphs, throughput"]
"""What no part here measures."""
PARTS = (
    "parity-float32",
    "parity-bfloat16",
    "mixed",
    "ways",
    "speed",
    "layers",
    "behaviours",
    "http",
)
Figures = list[dict[str, Any]]


def engine(folders: dict[str, str], dtype: str = "float32", **more: Any) -> Any:
    """vLLM in this process, eager, with steerings."""
    from vllm import LLM

    limits = {"max_model_len": 1024, "max_num_seqs": 64, "enforce_eager": True} | more
    config = {MARK: server.configuration(folders)}
    return LLM(str(smollm2_folder()), dtype=dtype, additional_config=config, **limits)


def rows(count: int = 400, sites: Sequence[Site] = (Site(LAYER),)) -> Activations:
    """Recorded rows of both sides of the built-in behaviour."""
    contrast = Contrast.load("critical").part("train")
    short = Contrast(contrast.behaviour, contrast.kind, contrast.items[: count // 2])
    return record(load_model("smollm2"), short, sites)


def loop() -> Steering:
    """Feedback at every block but the first, with gains that need no Jacobians: as much work."""
    depth = load_model("smollm2").model.config.num_hidden_layers
    return fitted("alqr", rows(100, [Site(n) for n in range(depth)]), dynamics="identity")


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
    arms["alqr"] = [loop().edit(0.1)]
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
        limit = ">= 0.95" if edits else ""
        share = agreement(vllm, *said)
        found.append(figure(f"{dtype}, {name}: greedy tokens alike", share, limit, "share", 64))
        print(found[-1], flush=True)
    return found


def agreement(backend: HF, ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Share of places among the first 32 greedy tokens at which two engines say the same one."""
    same = total = 0
    for one, two in zip(ours, theirs, strict=True):
        a, b = (backend.model.tokenizer(x.text)["input_ids"] for x in (one, two))
        total += max(len(a), len(b))
        same += sum(x == y for x, y in zip(a, b, strict=False))
    return same / max(total, 1)


# --- isolation -----------------------------------------------------------------------------------


def mixed(count: int = 1000) -> Figures:
    """Requests of seven kinds over one long prefix, in random order, against each alone."""
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
        figure(
            "mixed: |dlogprob| of solo tokens, maximum", most, "<= 0.001", "nats", len(gaps) - 1
        ),
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


# --- ways to run ---


WAY = """
import json, os, sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
model, config, how = sys.argv[1], *map(json.loads, sys.argv[2:])
if "tensor_parallel_size" in how:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model, dtype="float32", max_model_len=512, max_num_seqs=8, disable_log_stats=False,
        additional_config=config, **how,
    )
    mixes = ["", "flow@1", "shift@-0.5", "ever@0.5", "flow@0.5+ever@0.5", "", "flow@-1", "shift@1"]
    params = [
        SamplingParams(
            max_tokens=100, temperature=0, ignore_eos=True, logprobs=2,
            extra_args={"steering": mix} if mix else None,
        )
        for mix in mixes
    ]
    given = [
        {"prompt_token_ids": [500 + (7 * i * i + 13 * n) % 8000 for i in range(200 + n)]}
        for n in range(len(mixes))
    ]
    found = []
    for output in llm.generate(given, params, use_tqdm=False):
        (one,) = output.outputs
        steps = list(zip(one.logprobs, one.token_ids))
        tops = [sorted(e.logprob for e in step.values())[-2:] for step, _ in steps]
        chosen = [step[token].logprob for step, token in steps]
        found.append([list(one.token_ids), chosen, [high - low for low, high in tops]])
    off = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    print("FOUND", json.dumps([found, off]))
"""


def even(folder: Path) -> Path:
    """A random model of the embedded one's width: two ranks cannot share that one's nine heads."""
    config = AutoConfig.from_pretrained(smollm2_folder())
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 64
    config.num_hidden_layers = LAYER + 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_folder()).save_pretrained(folder)
    return folder


def ways() -> Figures:
    """The same eight requests, six of them steered, in every way to run against the eager one."""
    acts, found = rows(), []
    eager = {"enforce_eager": True}
    others = {
        "compiled": {"enforce_eager": False},
        "two ranks": eager | {"tensor_parallel_size": 2},
        # Eight requests grow to three blocks each.
        "requests put off": eager | {"num_gpu_blocks_override": 20},
    }
    with tempfile.TemporaryDirectory() as home:
        made = {
            "flow": fitted("innsteer", acts, hidden=128, couplings=4, epochs=40),
            "shift": fitted("diffmean", acts),
        }
        made["ever"] = replace(made["shift"], where=Where("all"))
        folders = {name: str(one.save(f"{home}/{name}")) for name, one in made.items()}
        config = json.dumps({MARK: server.configuration(folders)})
        (script := Path(home) / "way.py").write_text(WAY)

        def run(model: str | Path, how: dict[str, Any]) -> Any:
            command = [sys.executable, str(script), str(model), config, json.dumps(how)]
            return json.loads(told(command).rpartition("FOUND ")[2])

        made_even = even(Path(home) / "even")
        models = {name: made_even if "ranks" in name else smollm2_folder() for name in others}
        solo = {model: run(model, eager)[0] for model in dict.fromkeys(models.values())}
        done = {name: run(models[name], how) for name, how in others.items()}
    for name, (answers, off) in done.items():
        gaps, ties, wrong = gaps_of(solo[models[name]], answers)
        tokens, label = len(gaps) - 1, f"{name} against eager"
        found += [
            figure(f"{label}: |dlogprob|, maximum", max(gaps), "<= 0.001", "nats", tokens),
            figure(f"{label}: answers that part at a tie within 1e-3", ties, "", "n", 8),
            figure(f"{label}: answers that part elsewhere", wrong, "<= 0", "n", 8),
        ]
        if name == "requests put off":
            found.append(figure(f"{label}: how often", sum(off), ">= 1", "n", 8))
        print(found[-3:], flush=True)
    return found


# --- speed ---------------------------------------------------------------------------------------


Arm = Callable[[], float]


def passes(llm: Any) -> Callable[..., float]:
    """What runs a batch of new random prompts, request i under ``mixes[i % len(mixes)]``."""
    from vllm import SamplingParams

    draw = np.random.default_rng(0)

    def run(batch: int, prompt: int, tokens: int, *mixes: str) -> float:
        extras = [{"steering": mix} if mix else None for mix in mixes]
        params = [
            SamplingParams(
                max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extras[i % len(mixes)]
            )
            for i in range(batch)
        ]
        given = [
            {"prompt_token_ids": draw.integers(500, 9000, prompt).tolist()} for _ in range(batch)
        ]
        started = time.process_time()
        llm.generate(given, params, use_tqdm=False)
        return time.process_time() - started

    return run


def alternating(arms: dict[str, Arm], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every arm, round by round, each round beginning with another one."""
    for arm in arms.values():
        arm()
    spent: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for turn in range(rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            spent[name].append(arms[name]())
    return spent


def speed(rounds: int = 10) -> Figures:
    """CPU seconds of steered, idle and plain passes on one engine, arms alternating."""
    acts, found = rows(), []
    with tempfile.TemporaryDirectory() as home:
        flow = fitted("innsteer", acts, hidden=128, couplings=4, epochs=10)
        llm = engine({"flow": str(flow.save(f"{home}/flow"))})
    run = passes(llm)
    sizes = {f"batch {batch}": (batch, 16, 16) for batch in (1, 8, 32)}
    sizes["first token, prompt of 256"] = (1, 256, 1)
    for name, size in sizes.items():
        arms = {
            "plain": partial(without, llm, run, *size),
            "idle": partial(run, *size, ""),
            "steered": partial(run, *size, "flow@1"),
        }
        first = size[2] == 1
        spent = alternating(arms, 2 * rounds if first else rounds)
        for arm, asked in (("steered", ">= 0.93"), ("idle", "")):
            pairs = zip(spent["plain"], spent[arm], strict=True)
            value, low, high = interval([b / a if first else a / b for a, b in pairs])
            told = f"{name}: {arm} over plain, " + ("CPU seconds" if first else "tokens/CPU s")
            limit = "<= 1.06" if first and arm == "steered" else "" if first else asked
            found.append(figure(told, value, limit, "ratio", len(spent[arm]), low, high))
            print(found[-1], flush=True)
    return found + ends(found)


def over_plain(spent: dict[str, list[float]], told: str) -> Figures:
    """Tokens per CPU second of every arm over those of ``plain``."""
    found = []
    for arm, mine in spent.items():
        if arm != "plain":
            ratios = [a / b for a, b in zip(spent["plain"], mine, strict=True)]
            value, low, high = interval(ratios)
            name = f"{told}: {arm} over plain, tokens/CPU s"
            found.append(figure(name, value, "", "ratio", len(mine), low, high))
            print(found[-1], flush=True)
    return found


def layers(rounds: int = 6) -> Figures:
    """Four couplings of width 128 at one block, and at every block, and feedback, over plain."""
    depth = load_model("smollm2").model.config.num_hidden_layers
    one = fitted("innsteer", rows(), hidden=128, couplings=4, epochs=10)
    (part,) = (part for _, part in one.interventions.items())
    every = Interventions({Site(n): deepcopy(part) for n in range(depth)})
    with tempfile.TemporaryDirectory() as home:
        whole = replace(one, interventions=every)
        made = {"one": one, "every": whole, "loop": loop()}
        llm = engine({name: str(each.save(f"{home}/{name}")) for name, each in made.items()})
    run, found = passes(llm), []
    for batch in (1, 8, 32):
        size = (batch, 16, 16)
        arms = {
            "plain": partial(without, llm, run, *size),
            "one layer": partial(run, *size, "one@1"),
            # What a row holds does not change the work; a small strength keeps it finite.
            f"all {depth} layers": partial(run, *size, "every@0.01"),
            f"feedback at {depth - 1} layers": partial(run, *size, "loop@0.1"),
        }
        found += over_plain(alternating(arms, rounds), f"batch {batch}")
    return found


def behaviours(rounds: int = 5, most: int = 64) -> Figures:
    """A batch of 64 that asks for 1, 4, 16 or 64 behaviours: of one network, or of one each."""
    one = fitted("innsteer", rows(), hidden=128, couplings=4, epochs=10)
    (part,) = (part for _, part in one.interventions.items())
    drawn = torch.Generator().manual_seed(0)
    wide = one.steerer.build({Site(LAYER): part.width}, most)
    state = wide[Site(LAYER)].state_dict()
    for name, tensor in part.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
        else:  # a row per behaviour, in the fitted one's size
            state[name] = torch.randn(state[name].shape, generator=drawn) * tensor.std()
    wide[Site(LAYER)].load_state_dict(state)
    names = tuple(f"b{n}" for n in range(most))
    many = replace(one, interventions=wide, behaviours=names)
    apart = (1, 4, 16)
    with tempfile.TemporaryDirectory() as home:
        folders = {"many": str(many.save(f"{home}/many"))}
        for n in range(apart[-1]):
            shifted = replace(one, interventions=deepcopy(one.interventions))
            folders[f"own{n}"] = str(shifted.save(f"{home}/own{n}"))
        llm = engine(folders)
    run, size = passes(llm), (most, 16, 16)
    arms: dict[str, Arm] = {"plain": partial(without, llm, run, *size)}
    for k in (1, 4, 16, most):
        arms[f"{k} behaviours of one network"] = partial(
            run, *size, *(f"many.{name}@1" for name in names[:k])
        )
    for k in apart:
        arms[f"{k} networks"] = partial(run, *size, *(f"own{n}@1" for n in range(k)))
    return over_plain(alternating(arms, rounds), f"batch {most}")


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


# --- over HTTP -----------------------------------------------------------------------------------


SCORES = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, name, folder, pairs = sys.argv[1:5]
model = LocalCompletionsAPI(
    model=name, base_url=url + "/v1/completions", tokenizer=folder, num_concurrent=1
)
asked = [
    Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=n)
    for n, pair in enumerate(json.loads(pairs))
]
print("FOUND", json.dumps([score for score, _ in model.loglikelihood(asked)]))
"""


def http(client: str, count: int = 16) -> Figures:
    """``vllm bench serve`` and lm-eval's client against the server, neither of them changed."""
    ever = replace(fitted("diffmean", rows()), where=Where("all"))
    folder = str(smollm2_folder())
    asked = [
        (one.prompt + "\nAnswer:", " " + one.target) for one in capability.contrast().items[:count]
    ]
    backend = HF(load_model("smollm2"))
    found = []
    with (
        tempfile.TemporaryDirectory() as home,
        serving({"ever": str(ever.save(f"{home}/ever"))}) as url,
    ):
        for name, edits in (("smollm2", []), ("smollm2+ever@0.5", [ever.edit(0.5)])):
            command = [client, "-c", SCORES, url, name, folder, json.dumps(asked)]
            theirs = json.loads(told(command).rpartition("FOUND ")[2])
            # The same tokens, cut where lm-eval cuts them.
            tokenizer = backend.model.tokenizer
            pairs = [(tokenizer(a)["input_ids"], tokenizer(a + b)["input_ids"]) for a, b in asked]
            encoded = [Encoded(tuple(whole), len(head), ()) for head, whole in pairs]
            ours = [sum(one.log_probs) for one in backend.score_encoded(encoded, edits)]
            gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            label = "steered" if edits else "plain"
            found.append(
                figure(f"lm-eval over HTTP, {label}: |dlogprob|", gap, "<= 0.001", "nats", count)
            )
            print(found[-1], flush=True)
            random = "--dataset-name random --random-input-len 32 --random-output-len 16"
            command = [sys.executable, "-c", BENCH]
            command += ["--backend", "openai", "--base-url", url, "--model", name]
            command += ["--tokenizer", folder, "--num-prompts", str(count), *random.split()]
            report = Path(home) / f"{label}.json"
            command += ["--ignore-eos", "--save-result", "--result-filename", str(report)]
            told(command)
            done = read_json(report, "vllm bench serve")
            for what, value, limit in (
                ("requests completed", done["completed"], f">= {count}"),
                ("tokens given", done["total_output_tokens"], f">= {16 * count}"),
            ):
                label_ = f"vllm bench serve, {label}: {what}"
                found.append(figure(label_, float(value), limit, "n", count))
                print(found[-1], flush=True)
    return found


# What `vllm bench serve` runs: the CPU build has no console script that starts.
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
ELSEWHERE = tempfile.gettempdir()
"""Where other processes start: beside this file they would take it for vllm."""


def told(command: Sequence[str]) -> str:
    """What a command printed; its end if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ELSEWHERE)
    if done.returncode:
        raise SystemExit(f"{command[:4]} ... failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


@contextmanager
def serving(folders: dict[str, str]) -> Iterator[str]:
    """The address of a server of these steerings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "smollm2", *(f"--steering={name}={path}" for name, path in folders.items())]
    words += [
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
    ]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "innsteer.cli", *words]
        server = subprocess.Popen(
            command, env=env, cwd=ELSEWHERE, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            for _ in range(600):
                with suppress(OSError), urlopen(f"{url}/health", timeout=5):
                    break
                if server.poll() is not None:
                    break
                time.sleep(1)
            if server.poll() is not None:
                log.seek(0)
                raise SystemExit(f"the server ended:\n{log.read()[-3000:]}")
            yield url
        finally:
            server.terminate()
            server.wait(60)


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
    parser.add_argument("part", choices=[name.partition("-")[0] for name in PARTS[1:]])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--client", default=sys.executable)
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    plain = {
        "mixed": mixed,
        "ways": ways,
        "speed": speed,
        "layers": layers,
        "behaviours": behaviours,
    }
    if given.part == "parity":
        name, found = f"parity-{given.dtype}", parity(given.dtype)
    elif given.part == "http":
        name, found = given.part, http(given.client)
    else:
        name, found = given.part, plain[given.part]()
    save(name, found, time.perf_counter() - started)


if __name__ == "__main__":
    main()

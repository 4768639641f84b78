"""FLAS: what a field learnt on listed concepts gives on concepts that it never saw.

    python benchmarks/flas.py --plan                         # what each stage takes
    python benchmarks/flas.py [--axbench FOLDER FOLDER]      # write, train, figures, share
    python benchmarks/flas.py --stage write                  # one of them; each can be resumed
    python benchmarks/flas.py --smoke [--axbench FOLDER]     # minutes, and figures of no meaning

``write``: SmolLM2 writes twelve responses of 64 tokens to each concept of flas_concepts.txt,
prompted. Fifty concepts are unseen and twelve validate; concepts that share a word stand in one
part, and those that are learnt answer other prompts than the rest. Of what is learnt a response is
kept where the request raised its probability; the unseen ones are kept all. ``train``: a field on
the learnt ones, stopped by validation; its checkpoint is kept at each. ``figures``: measured
without a judge, log-probability per token of unseen responses told their concept, minus told a
random other one, paired, hierarchical bootstrap over concepts and responses; beside it the same for
prompting, and for a DiffMean fitted with half of each concept's responses, its strength chosen on
others; the course over updates; Euler steps; decoding. ``share``: fields on a part of the concepts
at equal updates. The responses of ``--axbench`` (folders of its layout, for testing only) are by
other models. What was found is kept in --work, so that a stage may be interrupted and started
again; ``figures`` and ``share`` write results/flas.json. Times are of the processor.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from innsteer import load_model
from innsteer.axbench.detecting import contrast_of
from innsteer.axbench.distilling import REQUEST, distil, read_concepts
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF, Memo
from innsteer.backends.meter import instruct
from innsteer.backends.told import Told
from innsteer.comparing.statistics import resample
from innsteer.concepts import Concepts, Response
from innsteer.files import write_json, write_text
from innsteer.fitting import fit, fit_concepts
from innsteer.groups import Sets
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.judging import Verdict
from innsteer.metrics.base import Measured
from innsteer.site import Where
from innsteer.steerer import Interventions
from innsteer.steerers.flas import Field, settled
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "flas.json"
PER_TOKEN = Verdict("log_prob", "nats per token")
STEPS = (1, 3, 10)
"""Euler steps that are compared; the last is nearest to the flow."""
CHOICES = (0.5, 1.0, 1.5, 2.0)
"""Strengths that DiffMean chooses from, one for all concepts of a source."""
UPDATE, FORWARD, ANSWER = 4.6, 0.2, 1.3
"""Seconds of one core, SmolLM2: an update of twelve responses, one response steered without its
gradient, one response of 64 tokens written and scored twice."""
FULL: dict[str, Any] = {
    "concepts": 400,
    "unseen": 50,
    "held": 12,
    "each": 12,
    "tokens": 64,
    "tested": 20,
    "responses": 48,
    "curve": (100, 200, 400, 600),
    "repeats": 10,
    "shares": (0.25, 0.5, 1.0),
    "share_updates": 400,
    "fields": {
        "updates": 800,
        "batch": 12,
        "parts": 2,
        "learning_rate": 1e-3,
        "warmup": 50,
        "every": 50,
        "patience": 8,
    },
}
SMOKE: dict[str, Any] = FULL | {
    "concepts": 7,
    "unseen": 2,
    "held": 1,
    "each": 6,
    "tokens": 8,
    "tested": 2,
    "responses": 8,
    "curve": (1,),
    "repeats": 2,
    "shares": (0.5,),
    "share_updates": 2,
    "fields": {"updates": 3, "batch": 2, "parts": 1, "learning_rate": 1e-3, "every": 1},
}
STAGES = ("write", "train", "figures", "share")
PARTS = ("train", "validation", "test")
SIZES = {"test": "unseen", "validation": "held"}
"""What the plan calls the number of concepts of a part."""
TEMPERATURE = 1.0
COMMON = frozenset(
    "about against always answers asks begins compares ends every everything from full gives into "
    "like names never only praises reader says sentence sentences speaks talks text than that uses "
    "very warns were what which with word words written".split()
)
"""Words that do not make two concepts alike."""


def say(stage: str, done: int, total: int) -> None:
    """A line per hundredth."""
    if done in (0, total) or done % max(total // 100, 1) == 0:
        print(f"{time.strftime('%H:%M')} {stage} {done}/{total}", file=sys.stderr, flush=True)


def takes(plan: dict[str, Any], axbench: bool) -> dict[str, float]:
    """Core-hours of each stage on SmolLM2, if nothing stops a training sooner."""
    parts = {part: len(named(plan)[part]) * plan["each"] for part in PARTS}
    fields, tokens = plan["fields"], plan["tokens"] / FULL["tokens"]

    def trained(updates: int) -> float:
        checks = (updates // fields["every"] + 1) * parts["validation"] + parts["train"]
        return updates * fields["batch"] / 12 * UPDATE + checks * FORWARD

    foreign = plan["tested"] * plan["responses"] if axbench else 0
    scored = parts["test"] + foreign // 4
    # Of each response that is scored: five steered figures, two prompted ones, and the course.
    figures = (scored * 7 + len(plan["curve"]) * plan["unseen"] * 6 + 1500) * FORWARD
    # Of each that DiffMean has: a plain answer, recording, choosing, two figures.
    figures += (parts["test"] + foreign) * (ANSWER / 2 + (len(CHOICES) / 4 + 1) * FORWARD)
    figures += 30 * plan["repeats"]
    share = len(plan["shares"]) * (trained(plan["share_updates"]) + parts["test"] * 2 * FORWARD)
    seconds = (sum(parts.values()) * ANSWER, trained(fields["updates"]), figures, share)
    return {name: tokens * one / 3600 for name, one in zip(STAGES, seconds, strict=True)}


# --- the table and the field ---------------------------------------------------------------------


def alike(concepts: Sequence[str]) -> list[list[str]]:
    """Groups of concepts that share a word that matters, one with another."""
    sets, groups = Sets(), dict[Any, list[str]]()
    for concept in concepts:
        for word in {*re.findall("[a-z]{4,}", concept.lower())} - COMMON:
            sets.join(concept, ("word", word.removesuffix("s")))
    for concept in concepts:
        groups.setdefault(sets.find(concept), []).append(concept)
    return list(groups.values())


def named(plan: dict[str, Any]) -> dict[str, list[str]]:
    """The listed concepts by part; those that are alike stand in one."""
    concepts = list(read_concepts(HERE / "flas_concepts.txt"))
    random.Random(0).shuffle(concepts)
    groups = alike(concepts[: plan["concepts"]])
    random.Random(1).shuffle(groups)
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for group in groups:
        short = [p for p in ("test", "validation") if len(found[p]) < plan[SIZES[p]]]
        found[short[0] if short else "train"] += group
    return found


def write(work: Path, plan: dict[str, Any]) -> None:
    """The listed concepts' responses, written once."""
    path = work / "table.jsonl"
    if path.exists():
        return
    rows: list[dict[str, Any]] = []
    asked = {part: suites.neutral("test") for part in PARTS}
    asked["train"] = (*suites.neutral("fit"), *suites.neutral("validation"))
    with Memo(work / "writing") as memo:
        backend = HF(load_model("smollm2"), batch=4 * plan["each"], memo=memo)
        for part, concepts in named(plan).items():
            found = distil(
                backend,
                concepts,
                each=plan["each"],
                prompts=asked[part],
                sampling=Sampling(plan["tokens"], TEMPERATURE),
                # What the gain chose would tell of the choice.
                least=-math.inf if part == "test" else 0.0,
                progress=say,
            )
            rows += [one._asdict() | {"split": part} for one in found.kept]
            raised = sum(one.gain > 0 for one in found.kept) / sum(found.asked.values())
            record(work, "shares", {part: raised})
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def record(work: Path, name: str, more: dict[str, Any]) -> dict[str, Any]:
    """What a small file of --work says, with something more."""
    path = work / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if more:
        write_json(path, known | more)
    return known | more


def table(work: Path, plan: dict[str, Any]) -> Concepts:
    """What was written, in parts."""
    path = work / "table.jsonl"
    if not path.exists():
        sys.exit(f"{path} is not there: run --stage write first")
    return Concepts.of(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def train(
    work: Path, plan: dict[str, Any], known: Concepts, name: str = "field", **how: Any
) -> Steering:
    """A trained field, kept; interrupted, it goes on from its last validation.

    Its states at the updates of ``curve`` are kept beside it.
    """
    folder, checkpoint = work / name, work / f"{name}.training.safetensors"

    def told(stage: str, done: int, total: int) -> None:
        say(stage, done, total)
        # A step begins after the last one was validated and kept.
        if stage == "train" and done - 1 in plan["curve"] and checkpoint.exists():
            shutil.copyfile(checkpoint, work / f"{name}.{done - 1}.safetensors")

    if not folder.exists():
        steering = fit_concepts(
            load_model("smollm2"),
            known,
            longest=plan["tokens"],
            half=True,  # a sixth less of an update here, its gradient 2.4 % off
            checkpoint=checkpoint,
            progress=told,
            **plan["fields"] | how,
        )
        steering.save(folder)
    return Steering.load(folder)


def at_update(steering: Steering, path: Path) -> Interventions:
    """A field as it was when a checkpoint was kept."""
    ((site, part),) = steering.interventions.items()
    assert isinstance(part, Field)
    maps = Interventions({site: settled(part)})
    kept = load_file(path)
    own = {name.removeprefix("map."): kept[name] for name in kept if name.startswith("map.")}
    maps.load_state_dict(own)
    return maps


# --- log-probabilities ---------------------------------------------------------------------------


def others(concepts: Sequence[str], seed: int = 0) -> list[str]:
    """For each response's concept a random other one of those that stand here."""
    unique, dice = list(dict.fromkeys(concepts)), random.Random(seed)
    return [dice.choice([other for other in unique if other != own]) for own in concepts]


def by_concept(rows: Sequence[Response], values: Sequence[float]) -> dict[str, Any]:
    """Concept -> response -> its figure."""
    found: dict[str, dict[str, list[Measured]]] = {}
    for n, (row, value) in enumerate(zip(rows, values, strict=True)):
        found.setdefault(row.concept, {})[str(n)] = [Measured(value)]
    return found


def scored(
    backend: HF, asked: Sequence[Prompt], longest: int, edits: Sequence[Edit] = ()
) -> list[float]:
    """Log-probability per token of each prompt's answer."""
    found = [values[0][:longest] for values in backend.score(asked, edits)]
    return [sum(values) / len(values) for values in found]


def prompted(
    backend: HF, rows: Sequence[Response], concepts: Sequence[str], longest: int
) -> list[float]:
    """Of responses under prompts that ask for concepts."""
    asked = [
        Prompt(str(n), instruct(row.prompt, REQUEST.format(concept=concept)), (row.response,))
        for n, (row, concept) in enumerate(zip(rows, concepts, strict=True))
    ]
    return scored(backend, asked, longest)


def differences(
    rows: Sequence[Response],
    arms: dict[str, Sequence[float]],
    asked: Sequence[tuple[str, str, str, str]],
) -> list[dict[str, Any]]:
    """Records of paired differences: what it is called, two arms, and what was asked."""
    draws = resample(PER_TOKEN, {arm: by_concept(rows, values) for arm, values in arms.items()})
    found = []
    for what, ours, theirs, goal in asked:
        gap = draws.difference(ours, theirs)
        found.append(figure(what, gap.value, goal, PER_TOKEN.unit, gap.n, gap.low, gap.high))
    return found


def meter(backend: HF, steering: Steering, rows: Sequence[Response], longest: int) -> Told:
    """What a map of concepts makes of responses."""
    told = Concepts(tuple(Response(row.concept, row.prompt, row.response) for row in rows))
    (site,) = steering.interventions
    return Told(backend, told, site, longest=longest)


def told(run: Told, maps: Interventions | None, strength: float, concepts: Sequence[str]) -> Any:
    """Log-probabilities per token of all responses, told these concepts."""
    items = run.items()
    with torch.no_grad():
        return run.told(maps, items, [strength] * len(items), concepts).tolist()


def gaps(
    backend: HF, steering: Steering, rows: Sequence[Response], name: str, longest: int
) -> tuple[list[Any], dict[str, list[float]]]:
    """Own concept less a random other, for the field at strengths 1 and 2, and for prompting; and
    what each arm makes of each response."""
    run, maps = meter(backend, steering, rows, longest), steering.interventions
    own = [row.concept for row in rows]
    other = others(own)
    arms: dict[str, list[float]] = {"plain": told(run, None, 1.0, own)}
    for strength in (1.0, 2.0):
        for what, concepts in (("own", own), ("other", other)):
            arms[f"{what} {strength:g}"] = told(run, maps, strength, concepts)
    arms["prompted own"] = prompted(backend, rows, own, longest)
    arms["prompted other"] = prompted(backend, rows, other, longest)
    asked = [
        (f"{name}: field at 1, own less other concept", "own 1", "other 1", "> 0"),
        (f"{name}: field at 2, own less other concept", "own 2", "other 2", ""),
    ]
    for strength in ("1", "2"):
        for what in ("own", "other"):
            told_as = f"{name}: field at {strength}, {what} concept less plain"
            asked.append((told_as, f"{what} {strength}", "plain", ""))
    lead = f"{name}: prompting"
    asked.append((f"{lead}, own less other concept", "prompted own", "prompted other", ""))
    for what in ("own", "other"):
        asked.append((f"{lead}, {what} concept less plain", f"prompted {what}", "plain", ""))
    return differences(rows, arms, asked), arms


def dealt(rows: Sequence[Response]) -> list[Response]:
    """Of each concept half for fitting, a quarter for choosing, a quarter for testing.

    A concept of too few responses for that is for testing alone.
    """
    found = []
    for concept in dict.fromkeys(row.concept for row in rows):
        own = [row for row in rows if row.concept == concept]
        first, second = len(own) // 2, len(own) // 2 + max(len(own) // 4, 1)
        if first < 2 or second >= len(own):
            first = second = 0
        parts = ["train"] * first + ["validation"] * (second - first)
        parts += ["test"] * (len(own) - second)
        found += [replace(row, split=part) for row, part in zip(own, parts, strict=True)]
    return found


def data_arm(
    backend: HF,
    steering: Steering,
    rows: Sequence[Response],
    arms: dict[str, list[float]],
    name: str,
    longest: int,
) -> tuple[list[Any], float]:
    """A DiffMean fitted with data of each concept, beside the others on the same held responses.

    Args:
        rows: dealt; those of the part ``test`` of concepts that have others are compared.
        arms: figures of all rows by arm.
    """
    (site,) = steering.interventions
    concepts = list(dict.fromkeys(row.concept for row in rows if row.split == "train"))
    if len(concepts) < 2:
        return [], 0.0
    sampling, maps = Sampling(longest, 1.0), {}
    for number, concept in enumerate(concepts):
        say(f"{name} diffmean", number, len(concepts))
        contrast = contrast_of(backend, rows, concept, sampling=sampling)
        maps[concept] = fit(backend, contrast, "diffmean", sites=[site], where=Where("all"))

    def steered(part: Sequence[Response], told_as: Sequence[str], strength: float) -> list[float]:
        values = [math.nan] * len(part)
        for concept in dict.fromkeys(told_as):
            mine = [n for n, one in enumerate(told_as) if one == concept]
            asked = [Prompt(str(n), part[n].prompt, (part[n].response,)) for n in mine]
            found = scored(backend, asked, longest, [maps[concept].edit(strength)])
            for n, value in zip(mine, found, strict=True):
                values[n] = value
        return values

    chosen_on = [row for row in rows if row.split == "validation"]
    own = [row.concept for row in chosen_on]
    sums = {strength: sum(steered(chosen_on, own, strength)) for strength in CHOICES}
    strength = max(CHOICES, key=lambda one: sums[one])
    places = [n for n, row in enumerate(rows) if row.split == "test" and row.concept in maps]
    held = [rows[n] for n in places]
    own = [row.concept for row in held]
    compared = {arm: [values[n] for n in places] for arm, values in arms.items()}
    compared["diffmean own"] = steered(held, own, strength)
    compared["diffmean other"] = steered(held, others(own), strength)
    lead = f"{name}, last quarter of {len(concepts)} concepts"
    found = differences(
        held,
        compared,
        [
            (
                f"{lead}: diffmean with data, own less other concept",
                "diffmean own",
                "diffmean other",
                "",
            ),
            (f"{lead}: diffmean with data, own concept less plain", "diffmean own", "plain", ""),
            (f"{lead}: field at 1, own less other concept", "own 1", "other 1", ""),
            (f"{lead}: field at 1, own concept less plain", "own 1", "plain", ""),
            (f"{lead}: prompting, own concept less plain", "prompted own", "plain", ""),
            (f"{lead}: field at 1 less diffmean with data", "own 1", "diffmean own", ""),
            (f"{lead}: field at 1 less prompting", "own 1", "prompted own", ""),
        ],
    )
    return found, strength


def course(
    backend: HF,
    steering: Steering,
    rows: Sequence[Response],
    states: dict[int, Interventions],
    longest: int,
) -> list[Any]:
    """Own less other concept of three responses each, after so many updates."""
    few = [
        row
        for concept in dict.fromkeys(row.concept for row in rows)
        for row in [one for one in rows if one.concept == concept][:3]
    ]
    run, own = meter(backend, steering, few, longest), [row.concept for row in few]
    found = []
    for updates, maps in states.items():
        say("course", updates, max(states))
        arms = {
            "own": told(run, maps, 1.0, own),
            "other": told(run, maps, 1.0, others(own)),
        }
        name = f"unseen: field after {updates} updates, own less other concept"
        found += differences(few, arms, [(name, "own", "other", "")])
    return found


def figure(
    name: str, value: float, asked: str, unit: str, n: int, low: float, high: float
) -> dict[str, Any]:
    """One record; ``asked`` is an operator and a number, "" where nothing was asked."""
    bounds = {"value": value, "low": low, "high": high}
    return {"figure": name, **bounds, "asked": asked, "unit": unit, "n": n}


# --- the flow: steps, cost, curvature ------------------------------------------------------------


class Traced(Field):
    """A field that notes the length of each row's path and of its chord."""

    lengths: list[tuple[Tensor, Tensor]]

    def flow(self, h: Tensor, coef: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
        """As ever."""
        moved, step = torch.zeros_like(h), coef / self.steps
        velocity, path = moved, h.new_zeros(len(h))
        for k in range(self.steps):
            velocity = self.velocity(h + moved, k * step, tokens, k)
            moved, path = moved + step * velocity, path + (step * velocity).norm(dim=-1)
        self.lengths.append((path, moved.norm(dim=-1)))
        return moved, velocity


def stepped(steering: Steering, steps: int) -> Interventions:
    """The same field in another number of Euler steps."""
    ((site, part),) = steering.interventions.items()
    assert isinstance(part, Field)
    how = {"blocks": len(part.blocks), "steps": steps, "encoder": part.encoder}
    found = Traced(part.width, part.shape, **how)
    found.load_state_dict(part.state_dict())
    found.lengths = []
    return Interventions({site: found.eval().requires_grad_(False)})


def trajectories(
    backend: HF, steering: Steering, rows: Sequence[Response], longest: int, repeats: int
) -> list[Any]:
    """N = 1, 3, 10: log-probabilities beside those of N = 10, path over chord, cost of a token."""
    run, own = meter(backend, steering, rows, longest), [row.concept for row in rows]
    maps = {steps: stepped(steering, steps) for steps in STEPS}
    values = {steps: told(run, maps[steps], 1.0, own) for steps in STEPS}
    found = []
    for steps in STEPS:
        gaps = [abs(a - b) for a, b in zip(values[steps], values[STEPS[-1]], strict=True)]
        draws = resample(PER_TOKEN, {"gap": by_concept(rows, gaps)})
        gap = draws.score("gap")
        name = f"{steps} Euler steps, off {STEPS[-1]}, mean of responses"
        found.append(figure(name, gap.value, "", PER_TOKEN.unit, gap.n, gap.low, gap.high))
        (part,) = [part for _, part in maps[steps].items()]
        assert isinstance(part, Traced)
        pairs = part.lengths
        path, chord = (torch.cat([pair[n] for pair in pairs]) for n in (0, 1))
        ratio = (path / chord.clamp_min(1e-12))[chord > 0]
        low, middle, high = torch.quantile(ratio[:100_000], torch.tensor([0.05, 0.5, 0.95]))
        name = f"{steps} Euler steps, path over chord, median (5 to 95 % of tokens)"
        found.append(figure(name, *map(float, (middle,)), "", "ratio", len(ratio), low, high))
        found[-1] |= {"low": float(low), "high": float(high)}
    return found + overhead(backend, maps, longest, repeats)


def cached(steering: Steering, dtype: torch.dtype, strength: float) -> float:
    """Decoding with a cache against one pass: the largest difference of log-probabilities."""
    model = load_model("smollm2")
    model.model.to(dtype)
    maps = deepcopy(steering.interventions)
    for _, part in maps.items():
        part.to(dtype)
    ids = torch.tensor([model.encode("Tell me about the sea.").ids])
    concept = ({"concept": "speaks like a sea captain"},)
    edit = Edit(maps, torch.tensor([[strength]]), Where("all"), concept)
    with torch.inference_mode(), Attachment(model, [edit]):
        whole = model.model(ids, use_cache=False).logits.log_softmax(-1)
        cache, parts = None, []
        for n in range(ids.shape[1]):
            out = model.model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits.log_softmax(-1))
        return float((torch.cat(parts, 1) - whole).abs().max())


def decoding(steering: Steering) -> list[Any]:
    """Records of the cache: steered in double precision, which tells a fault from rounding, and
    in single precision beside the plain model's own."""
    found = []
    for what, dtype, strength, asked in (
        ("double precision, steered", torch.float64, 2.0, "<= 1e-04"),
        ("single precision, steered", torch.float32, 2.0, ""),
        ("single precision, plain", torch.float32, 0.0, ""),
    ):
        apart = cached(steering, dtype, strength)
        name = f"decoding off one pass, {what}"
        found.append(figure(name, apart, asked, "nats", 1, apart, apart))
    return found


def overhead(
    backend: HF, maps: dict[int, Interventions], tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """CPU time per decoded token over the plain model's: the median of alternating rounds.

    The interval is a bootstrap's of that median. All decode the same plain answer, one token at a
    time from a cache, so that none ends sooner.
    """
    model = backend.model
    prompt = model.encode("Tell me about the sea.").ids
    said = model.encode("Tell me about the sea.", answer=" and the waves" * tokens).ids
    ids = torch.tensor([said[: len(prompt) + tokens]])
    concept = ({"concept": "like a sea captain"},)

    def spent(part: Interventions | None) -> float:
        edits = [Edit(part, torch.tensor([[1.0]]), Where("all"), concept)] if part else []
        with torch.inference_mode(), Attachment(model, edits) if edits else nullcontext():
            cache = model.model(ids[:, : len(prompt)], use_cache=True).past_key_values
            started = time.process_time()
            for n in range(len(prompt), ids.shape[1]):
                model.model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
            return time.process_time() - started

    ratios: dict[int, list[float]] = {steps: [] for steps in maps}
    for repeat in range(repeats + 1):
        plain = spent(None)
        for steps, part in maps.items():
            steered = spent(part)
            if repeat:  # the first of each warms up
                ratios[steps].append(steered / plain)
    found = []
    for steps, own in ratios.items():
        values = torch.tensor(own)
        draw = torch.Generator().manual_seed(0)
        again = values[torch.randint(len(values), (2000, len(values)), generator=draw)].median(-1)
        low, high = torch.quantile(again.values, torch.tensor([0.025, 0.975])).tolist()
        name = f"CPU time per decoded token, {steps} Euler steps over plain"
        found.append(figure(name, float(values.median()), "", "ratio", len(own), low, high))
    return found


# --- stages --------------------------------------------------------------------------------------


def foreign(backend: HF, folders: Sequence[Path], plan: dict[str, Any]) -> list[Response]:
    """Some responses of each of AxBench's concepts, written by other models, cut to our length."""
    tokenizer = backend.model.tokenizer
    found: list[Response] = []
    for folder in folders:
        every = Concepts.load(folder, unseen=0.0)
        for concept in every.named():
            own = [row for row in every.rows if row.concept == concept][: plan["responses"]]
            for row in own:
                ids = tokenizer(row.response, add_special_tokens=False).input_ids
                text = tokenizer.decode(ids[: plan["tokens"]]).strip()
                found.append(replace(row, response=text) if text else row)
    few = list(dict.fromkeys(row.concept for row in found))[: plan["tested"]]
    return [row for row in found if row.concept in few]


def figures(
    work: Path, plan: dict[str, Any], axbench: Sequence[Path], only: Sequence[str]
) -> dict[str, Any]:
    """All that is measured of the trained field; what was measured is not measured again.

    Of some pieces ``only``: they are kept, and there are no figures before all are.
    """
    if not (work / "field").exists():
        sys.exit(f"{work / 'field'} is not there: run --stage train first")
    known, steering = table(work, plan), Steering.load(work / "field")
    longest, chosen = plan["tokens"], {}
    backend = HF(load_model("smollm2"), memo=Memo(work / "measuring"))
    unseen = list(known.part("test").rows)
    sources = {"unseen": dealt(unseen)}
    if axbench:
        sources["axbench"] = dealt(foreign(backend, axbench, plan))
    pieces: dict[str, Callable[[], Any]] = {}

    def source(name: str, rows: Sequence[Response]) -> list[Any]:
        # Of AxBench's many responses what a DiffMean is fitted on need not be scored.
        seen = rows if name == "unseen" else [row for row in rows if row.split == "test"]
        count = len({row.concept for row in seen})
        found, arms = gaps(backend, steering, seen, f"{name}, {count} concepts", longest)
        kept = {id(row): n for n, row in enumerate(seen)}
        whole = {
            arm: [values[kept[id(row)]] if id(row) in kept else math.nan for row in rows]
            for arm, values in arms.items()
        }
        more, strength = data_arm(backend, steering, rows, whole, name, longest)
        return [[*found, *more], strength]

    for name, rows in sources.items():
        pieces[name] = partial(source, name, rows)
    kept = {n: work / f"field.{n}.safetensors" for n in plan["curve"]}
    states = {n: at_update(steering, path) for n, path in kept.items() if path.exists()}
    pieces["course"] = lambda: course(backend, steering, unseen, states, longest) if states else []
    pieces["decoding"] = lambda: decoding(steering)
    few = unseen[:: max(len(unseen) // 100, 1)]
    pieces["steps"] = lambda: trajectories(backend, steering, few, longest, plan["repeats"])
    for name, make in pieces.items():
        if name not in record(work, "pieces", {}) and name in (only or pieces):
            record(work, "pieces", {name: make()})
    done, found = record(work, "pieces", {}), list[Any]()
    if missing := [name for name in pieces if name not in done]:
        print(f"no figures before these pieces: {', '.join(missing)}", file=sys.stderr)
        return {}
    for name in pieces:
        part = done[name]
        if name in sources:
            part, chosen[name] = part
        found += part
    return {
        "raised": record(work, "shares", {}),
        "concepts": {part: len(known.named(part)) for part in PARTS},
        "responses": steering.provenance["responses"],
        "training": steering.provenance["diagnostics"],
        "course": steering.provenance["course"],
        "diffmean_strengths": chosen,
        "figures": found,
    }


def share(work: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Fields on some of the concepts, at equal updates, on the same unseen ones."""
    known = table(work, plan)
    learnt, unseen = known.named("train"), list(known.part("test").rows)
    found, courses = [], {}
    for part in plan["shares"]:
        few = set(learnt[: max(round(part * len(learnt)), 1)])
        rows = tuple(row for row in known.rows if row.split != "train" or row.concept in few)
        updates = plan["share_updates"]
        name = f"field-{len(few)}"
        steering = train(work, plan, Concepts(rows), name, updates=updates)
        backend = HF(load_model("smollm2"))
        run = meter(backend, steering, unseen, plan["tokens"])
        own = [row.concept for row in unseen]
        arms = {
            "own": told(run, steering.interventions, 1.0, own),
            "other": told(run, steering.interventions, 1.0, others(own)),
        }
        name = f"unseen: field of {len(few)} concepts, {updates} updates, own less other concept"
        found += differences(unseen, arms, [(name, "own", "other", "")])
        courses[str(len(few))] = steering.provenance["course"]
    return {"share_figures": found, "share_courses": courses}


def main() -> None:
    """Run some stages, and write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all")
    parser.add_argument("--plan", action="store_true", help="say what each stage takes, and stop")
    parser.add_argument("--smoke", action="store_true", help="minutes, and figures of no meaning")
    parser.add_argument("--work", type=Path, help="what is kept; default: runs/flas, or -smoke")
    parser.add_argument(
        "--axbench", type=Path, nargs="+", default=[], help="folders of AxBench's layout"
    )
    parser.add_argument(
        "--pieces",
        nargs="+",
        choices=("unseen", "axbench", "course", "decoding", "steps"),
        default=[],
        help="of the figures, so that two processes may share them; default: all that are missing",
    )
    asked = parser.parse_args()
    plan = SMOKE if asked.smoke else FULL
    stages = asked.stage or STAGES
    for name, hours in takes(plan, bool(asked.axbench)).items():
        if asked.plan or name in stages:
            print(f"{name}: about {hours:.2f} core-hours", file=sys.stderr, flush=True)
    if asked.plan:
        return
    work = asked.work or Path("runs/flas-smoke" if asked.smoke else "runs/flas")
    work.mkdir(parents=True, exist_ok=True)
    place = work / "smoke.json" if asked.smoke else RESULTS
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in stages:
        found: dict[str, Any] = {}
        with counted(work, name):
            if name == "write":
                write(work, plan)
            elif name == "train":
                train(work, plan, table(work, plan))
            elif name == "figures":
                found = figures(work, plan, asked.axbench, asked.pieces)
            else:
                found = share(work, plan)
        if found:
            known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
            write_json(
                place,
                known
                | {
                    "command": "python benchmarks/flas.py" + (" --smoke" if asked.smoke else ""),
                    "plan": plan | {one: list(plan[one]) for one in ("shares", "curve")},
                    "versions": {"torch": torch.__version__, "python": platform.python_version()},
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                    "cpu_seconds": record(work, "cpu", {}),
                    **found,
                },
            )
            for one in found.get("figures", []) + found.get("share_figures", []):
                print(
                    f"{one['figure']}: {one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})"
                )


@contextmanager
def counted(work: Path, name: str) -> Iterator[None]:
    """Add the processor's seconds of a stage to what earlier sittings of it took."""
    started = time.process_time()
    try:
        yield
    finally:
        spent = record(work, "cpu", {}).get(name, 0.0) + time.process_time() - started
        record(work, "cpu", {name: round(spent, 1)})
        print(f"{name}: {spent:.0f} CPU seconds", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""FLAS: what a field learnt on listed concepts gives on concepts that it never saw.

    python benchmarks/flas.py --plan                       # what each stage takes
    python benchmarks/flas.py [--axbench FOLDER]           # write, train, figures
    python benchmarks/flas.py --stage write                # one of them; each goes on where it was
    python benchmarks/flas.py --stage share                # optional: fewer concepts, equal updates
    python benchmarks/flas.py --smoke [--axbench FOLDER]   # minutes, and figures of no meaning

``write``: SmolLM2 writes twelve responses of 64 tokens to each concept of flas_concepts.txt,
prompted. ``train``: a field on them, stopped by validation; its checkpoint is kept at each.
``figures``: measured without a judge, log-probability per token of held-out responses told their
concept, minus told a random other one, paired, hierarchical bootstrap over concepts and responses;
beside it the same for prompting, and for a DiffMean fitted with half of each concept's responses,
its strength chosen on others; Euler steps; decoding. ``share``: fields on a quarter and on half of
the concepts. Fifty concepts are put aside whole; their responses are by the same writer, those of
``--axbench`` (a folder of its layout, for testing only) by other models. What was found is kept in
--work, so that a stage may be interrupted and started again; ``figures`` and ``share`` write
results/flas.json. Times are of the processor, of one thread.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.judging import Verdict
from innsteer.metrics.base import Measured
from innsteer.site import Where
from innsteer.steerer import Interventions
from innsteer.steerers.flas import Field
from innsteer.steering import Steering

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "flas.json"
PER_TOKEN = Verdict("log_prob", "nats per token")
STEPS = (1, 3, 10)
"""Euler steps that are compared; the last is nearest to the flow."""
CHOICES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Strengths that a DiffMean chooses from."""
UPDATE, FORWARD, ANSWER = 5.5, 0.2, 1.3
"""Seconds of one core, SmolLM2: an update of twelve responses, one response steered without its
gradient, one response of 64 tokens written and scored twice."""
FULL: dict[str, Any] = {
    "concepts": 400,
    "unseen": 50,
    "each": 12,
    "tokens": 64,
    "held": 0.03,
    "tested": 20,
    "responses": 12,
    "repeats": 20,
    "shares": (0.25, 0.5),
    "fields": {
        "updates": 1200,
        "batch": 12,
        "parts": 2,
        "learning_rate": 1e-3,
        "warmup": 60,
        "every": 50,
        "patience": 6,
    },
}
SMOKE: dict[str, Any] = FULL | {
    "concepts": 4,
    "unseen": 2,
    "each": 6,
    "tokens": 8,
    "held": 0.1,
    "tested": 2,
    "responses": 6,
    "repeats": 2,
    "shares": (0.5,),
    "fields": {"updates": 2, "batch": 2, "parts": 1, "learning_rate": 1e-3, "every": 1},
}
STAGES = ("write", "train", "figures", "share")


def say(stage: str, done: int, total: int) -> None:
    """A line per hundredth."""
    if done in (0, total) or done % max(total // 100, 1) == 0:
        print(f"{time.strftime('%H:%M')} {stage} {done}/{total}", file=sys.stderr, flush=True)


def takes(plan: dict[str, Any]) -> dict[str, float]:
    """Core-hours of each stage on SmolLM2, if nothing stops a training sooner."""
    listed = min(len(read_concepts(HERE / "flas_concepts.txt")), plan["concepts"])
    tokens = plan["tokens"] / FULL["tokens"]
    learnt = (listed - plan["unseen"]) * plan["each"]
    fields = plan["fields"]
    checks = (fields["updates"] // fields["every"] + 1) * plan["held"] * learnt
    train = fields["updates"] * fields["batch"] / 12 * UPDATE + (checks + 640) * FORWARD
    tests = plan["unseen"] * plan["each"] + plan["tested"] * plan["responses"]
    # Of each response: four steered figures, steps, prompting, a plain answer, some DiffMeans.
    figures = tests * (4 + 8 + 4 + 6) * FORWARD + tests * ANSWER + 60 * plan["repeats"]
    share = len(plan["shares"]) * (train + tests * 2 * FORWARD)
    seconds = (listed * plan["each"] * ANSWER, train, figures, share)
    return {name: tokens * one / 3600 for name, one in zip(STAGES, seconds, strict=True)}


# --- the table and the field ---------------------------------------------------------------------


def named(plan: dict[str, Any]) -> list[str]:
    """The listed concepts, shuffled; the last ones are unseen."""
    concepts = list(read_concepts(HERE / "flas_concepts.txt"))
    random.Random(0).shuffle(concepts)
    return concepts[: plan["concepts"]]


def write(work: Path, plan: dict[str, Any]) -> None:
    """The listed concepts' responses, written once."""
    path = work / "table.jsonl"
    if path.exists():
        return
    with Memo(work / "writing") as memo:
        backend = HF(load_model("smollm2"), batch=4 * plan["each"], memo=memo)
        sampling = Sampling(plan["tokens"], 1.0)
        found = distil(backend, named(plan), each=plan["each"], sampling=sampling, progress=say)
        write_json(work / "shares.json", {"share": found.share, "shares": found.shares})
        write_text(path, "".join(f"{json.dumps(row._asdict())}\n" for row in found.kept))


def table(work: Path, plan: dict[str, Any]) -> Concepts:
    """What was written, in parts."""
    path = work / "table.jsonl"
    if not path.exists():
        sys.exit(f"{path} is not there: run --stage write first")
    aside = set(named(plan)[-plan["unseen"] :])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    learnt = [r for r in rows if r["concept"] not in aside]
    dealt = Concepts.of(learnt, unseen=0.0, held=plan["held"])
    rest = Concepts.of([r | {"split": "test"} for r in rows if r["concept"] in aside])
    return Concepts(dealt.rows + rest.rows)


def train(work: Path, plan: dict[str, Any], known: Concepts, name: str = "field") -> Steering:
    """A trained field, kept; interrupted, it goes on from its last validation."""
    folder = work / name
    if not folder.exists():
        steering = fit_concepts(
            load_model("smollm2"),
            known,
            longest=plan["tokens"],
            checkpoint=work / f"{name}.training.safetensors",
            progress=say,
            **plan["fields"],
        )
        steering.save(folder)
    return Steering.load(folder)


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
) -> list[Any]:
    """Own concept minus a random other, for the field at strengths 1 and 2, and for prompting."""
    run, maps = meter(backend, steering, rows, longest), steering.interventions
    own = [row.concept for row in rows]
    other = others(own)
    arms: dict[str, Sequence[float]] = {"plain": told(run, None, 1.0, own)}
    for strength in (1.0, 2.0):
        for what, concepts in (("own", own), ("other", other)):
            arms[f"{what} {strength:g}"] = told(run, maps, strength, concepts)
    arms["prompted own"] = prompted(backend, rows, own, longest)
    arms["prompted other"] = prompted(backend, rows, other, longest)
    return differences(
        rows,
        arms,
        [
            (f"{name}: field at 1, own less other concept", "own 1", "other 1", "> 0"),
            (f"{name}: field at 2, own less other concept", "own 2", "other 2", ""),
            (f"{name}: field at 1, own concept less plain", "own 1", "plain", ""),
            (
                f"{name}: prompting, own less other concept",
                "prompted own",
                "prompted other",
                "",
            ),
            (f"{name}: prompting, own concept less plain", "prompted own", "plain", ""),
        ],
    )


def dealt(rows: Sequence[Response]) -> list[Response]:
    """Of each concept half for fitting, a quarter for choosing, a quarter for testing."""
    found = []
    for concept in dict.fromkeys(row.concept for row in rows):
        own = [row for row in rows if row.concept == concept]
        first, second = len(own) // 2, len(own) // 2 + max(len(own) // 4, 1)
        if first < 2 or second >= len(own):
            continue  # too few were kept
        parts = ["train"] * first + ["validation"] * (second - first)
        parts += ["test"] * (len(own) - second)
        found += [replace(row, split=part) for row, part in zip(own, parts, strict=True)]
    return found


def data_arm(
    backend: HF, steering: Steering, rows: Sequence[Response], name: str, longest: int
) -> tuple[list[Any], dict[str, float]]:
    """A DiffMean fitted with data of each concept, beside the field on the same held responses."""
    parts = dealt(rows)
    if len({row.concept for row in parts}) < 2:
        return [], {}
    (site,) = steering.interventions
    maps, chosen = {}, {}
    sampling = Sampling(longest, 1.0)
    concepts = list(dict.fromkeys(row.concept for row in parts))
    for number, concept in enumerate(concepts):
        say(f"{name} diffmean", number, len(concepts))
        contrast = contrast_of(backend, parts, concept, sampling=sampling)
        maps[concept] = fit(backend, contrast, "diffmean", sites=[site], where=Where("all"))
        mine = [r for r in parts if (r.concept, r.split) == (concept, "validation")]
        asked = [Prompt(str(n), row.prompt, (row.response,)) for n, row in enumerate(mine)]
        found = {s: sum(scored(backend, asked, longest, [maps[concept].edit(s)])) for s in CHOICES}
        chosen[concept] = max(found, key=lambda s: found[s])
    held = [row for row in parts if row.split == "test"]
    own = [row.concept for row in held]
    other = others(own)
    run = meter(backend, steering, held, longest)
    arms: dict[str, Sequence[float]] = {
        "plain": told(run, None, 1.0, own),
        "own": told(run, steering.interventions, 1.0, own),
        "other": told(run, steering.interventions, 1.0, other),
    }
    for what, asked_for in (("diffmean own", own), ("diffmean other", other)):
        values = [math.nan] * len(held)
        for concept in dict.fromkeys(asked_for):
            mine = [n for n, one in enumerate(asked_for) if one == concept]
            asked = [Prompt(str(n), held[n].prompt, (held[n].response,)) for n in mine]
            edit = maps[concept].edit(chosen[concept])
            for n, value in zip(mine, scored(backend, asked, longest, [edit]), strict=True):
                values[n] = value
        arms[what] = values
    lead = f"{name}, last quarter of responses"
    found = differences(
        held,
        arms,
        [
            (
                f"{lead}: diffmean with data, own less other concept",
                "diffmean own",
                "diffmean other",
                "",
            ),
            (f"{lead}: diffmean with data, own concept less plain", "diffmean own", "plain", ""),
            (f"{lead}: field at 1, own less other concept", "own", "other", ""),
            (f"{lead}: field at 1, own concept less plain", "own", "plain", ""),
            (f"{lead}: field at 1 less diffmean with data", "own", "diffmean own", ""),
        ],
    )
    return found, chosen


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
    return found + [
        overhead(backend, steering, maps[steps], steps, longest, repeats) for steps in STEPS
    ]


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


def overhead(
    backend: HF, steering: Steering, maps: Interventions, steps: int, tokens: int, repeats: int
) -> dict[str, Any]:
    """CPU time per decoded token over the plain model's: the median of alternating pairs.

    The interval is a bootstrap's of that median. Both arms decode the same plain answer, one token
    at a time from a cache, so that neither ends sooner.
    """
    model, ratios = backend.model, []
    prompt = model.encode("Tell me about the sea.").ids
    said = model.encode("Tell me about the sea.", answer=" and the waves" * tokens).ids
    ids = torch.tensor([said[: len(prompt) + tokens]])
    edit = Edit(maps, torch.tensor([[1.0]]), Where("all"), ({"concept": "like a sea captain"},))

    def spent(edits: Sequence[Edit]) -> float:
        with torch.inference_mode():
            attached = Attachment(model, edits) if edits else None
            if attached:
                attached.__enter__()
            try:
                cache = model.model(ids[:, : len(prompt)], use_cache=True).past_key_values
                started = time.process_time()
                for n in range(len(prompt), ids.shape[1]):
                    model.model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
                return time.process_time() - started
            finally:
                if attached:
                    attached.__exit__(None, None, None)

    for repeat in range(repeats + 1):
        plain, steered = spent([]), spent([edit])
        if repeat:  # the first of each warms up
            ratios.append(steered / plain)
    values = torch.tensor(ratios)
    draw = torch.Generator().manual_seed(0)
    again = values[torch.randint(len(values), (2000, len(values)), generator=draw)].median(-1)
    low, high = torch.quantile(again.values, torch.tensor([0.025, 0.975])).tolist()
    name = f"CPU time per decoded token, {steps} Euler steps over plain"
    return figure(name, float(values.median()), "", "ratio", len(ratios), low, high)


# --- stages --------------------------------------------------------------------------------------


def foreign(folder: Path, plan: dict[str, Any]) -> list[Response]:
    """Some responses of each of AxBench's concepts, written by other models."""
    every = Concepts.load(folder, unseen=0.0)
    return [
        row
        for concept in every.named()[: plan["tested"]]
        for row in [r for r in every.rows if r.concept == concept][: plan["responses"]]
    ]


def figures(work: Path, plan: dict[str, Any], axbench: Path | None) -> dict[str, Any]:
    """All that is measured of the trained field; what was measured is not measured again."""
    if not (work / "field").exists():
        sys.exit(f"{work / 'field'} is not there: run --stage train first")
    known, steering = table(work, plan), Steering.load(work / "field")
    sources = {"unseen": list(known.part("test").rows)}
    if axbench:
        sources["axbench"] = foreign(axbench, plan)
    found, chosen = [], {}
    with Memo(work / "measuring") as memo:
        backend = HF(load_model("smollm2"), memo=memo)
        for name, rows in sources.items():
            found += gaps(backend, steering, rows, name, plan["tokens"])
            more, chosen[name] = data_arm(backend, steering, rows, name, plan["tokens"])
            found += more
        found.append(cached(backend, steering))
        rows = sources["unseen"][:: max(len(sources["unseen"]) // 100, 1)]
        found += trajectories(backend, steering, rows, plan["tokens"], plan["repeats"])
    return {
        "kept": json.loads((work / "shares.json").read_text())["share"],
        "concepts": {part: len(known.named(part)) for part in ("train", "test")},
        "responses": steering.provenance["responses"],
        "training": steering.provenance["diagnostics"],
        "course": steering.provenance["course"],
        "diffmean_strengths": chosen,
        "fit_seconds": steering.provenance["fit_seconds"],
        "figures": found,
    }


def share(work: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Fields on some of the concepts, at equal updates, on the same unseen ones."""
    known = table(work, plan)
    learnt, unseen = known.named("train"), list(known.part("test").rows)
    found, courses = [], {}
    for part in plan["shares"]:
        few = set(learnt[: max(round(part * len(learnt)), 1)])
        rows = tuple(row for row in known.rows if row.concept in few)
        steering = train(work, plan, Concepts(rows), f"field-{len(few)}")
        backend = HF(load_model("smollm2"))
        run = meter(backend, steering, unseen, plan["tokens"])
        own = [row.concept for row in unseen]
        arms = {
            "own": told(run, steering.interventions, 1.0, own),
            "other": told(run, steering.interventions, 1.0, others(own)),
        }
        name = f"unseen: field of {len(few)} concepts at 1, own less other concept"
        found += differences(unseen, arms, [(name, "own", "other", "")])
        courses[str(len(few))] = steering.provenance["course"]
    return {"share_figures": found, "share_courses": courses}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: the first three")
    parser.add_argument("--plan", action="store_true", help="say what each stage takes, and stop")
    parser.add_argument("--smoke", action="store_true", help="minutes, and figures of no meaning")
    parser.add_argument("--work", type=Path, help="what is kept; default: runs/flas, or -smoke")
    parser.add_argument("--axbench", type=Path, help="a folder of AxBench's layout")
    asked = parser.parse_args()
    plan = SMOKE if asked.smoke else FULL
    stages = asked.stage or list(STAGES[: 4 if asked.smoke else 3])
    for name, hours in takes(plan).items():
        if asked.plan or name in stages:
            print(f"{name}: about {hours:.2f} core-hours", file=sys.stderr, flush=True)
    if asked.plan:
        return
    work = asked.work or Path("runs/flas-smoke" if asked.smoke else "runs/flas")
    work.mkdir(parents=True, exist_ok=True)
    place = work / "smoke.json" if asked.smoke else RESULTS
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in stages:
        started = time.process_time()
        found: dict[str, Any] = {}
        if name == "write":
            write(work, plan)
        elif name == "train":
            train(work, plan, table(work, plan))
        else:
            found = figures(work, plan, asked.axbench) if name == "figures" else share(work, plan)
        spent = round(time.process_time() - started, 1)
        print(f"{name}: {spent} CPU seconds", file=sys.stderr, flush=True)
        if found:
            kept = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
            record = kept | {
                "command": "python benchmarks/flas.py" + (" --smoke" if asked.smoke else ""),
                "plan": plan | {"shares": list(plan["shares"])},
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "cpu_seconds": kept.get("cpu_seconds", {}) | {name: spent},
                **found,
            }
            write_json(place, record)
            for one in found.get("figures", []) + found.get("share_figures", []):
                print(
                    f"{one['figure']}: {one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})"
                )


if __name__ == "__main__":
    main()

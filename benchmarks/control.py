"""Control of choices at a cost budget: INNSteer and its rivals on persona statements.

    python benchmarks/control.py DATA --plan            # cells, what is done, what is left to do
    python benchmarks/control.py DATA                    # every cell that is not measured yet
    python benchmarks/control.py DATA --cells wealth/second/0 --arms innsteer,condgrad
    python benchmarks/control.py DATA --wordings more.json   # {"polite": "Would ... {statement}"}
    python benchmarks/control.py DATA --summary          # only write results/control.json

DATA is the folder of Anthropic's persona evaluations (one .jsonl or .jsonl.gz per behaviour). A
cell is one behaviour, wording and seed; it is written to results/control arm by arm, so an
interrupted run goes on where it stopped. In a cell all arms see the same statements, the same
target-seeking rows, unmoved prompts and kept prefixes. Strength is chosen per sign on validation
statements, unmoved kinds and neutral prompts, once for the neutral cost alone and once with the
in-format cost too; every figure is of the test part. See the arms below for what each was given.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier

from innsteer import load_model, steerer
from innsteer.activations import Activations
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF, Reference
from innsteer.backends.lora import Adapted, LoRA, LoRATraining
from innsteer.backends.through import Through
from innsteer.contrast import Contrast
from innsteer.files import write_json
from innsteer.fitting import record_parts
from innsteer.gating import Gate, Gated, auroc, fit_gate, mahalanobis
from innsteer.interventions import Edit, Shift
from innsteer.metrics import get as metric
from innsteer.readouts import GRID, aims, probe
from innsteer.site import Site
from innsteer.steerer import Interventions
from innsteer.suites import behaviour as suites
from innsteer.suites import persona
from innsteer.training import best_scale, train_through

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "control.json"
WORK = HERE.parent / "runs" / "control"
BUDGET = 0.0953
SITE = Site(15)
WORDINGS = ["second", "original", "second~5", "original~5", "second+5"]
"""Of the question; the test stays as it is where a fit also sees five paraphrases: ~5 of unrelated
statements alone, +5 of the behaviour's too."""
TEMPLATES = {name: suites.questions()[name] for name in ("second", "original")}
"""Of each wording; --wordings brings more."""
# These behaviours first, then the rest in the order of the alphabet.
FIRST = ("desire-for-acquiring-wealth", "desire-for-acquiring-power", "agreeableness")
POLISH = 40
MINUTES = 30
"""What a cell takes on one core, for the plan."""


Maps = Interventions | LoRA


# --- a cell --------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One behaviour in one wording: the run, its parts, and what was measured so far."""

    name: str
    backend: HF
    run: Through
    fit: Through
    places: dict[str, list[int]]
    acts: Activations
    seed: int
    contrast: Contrast
    reworded: Through | None = None
    nuisances: int = 0

    @cached_property
    def classes(self) -> Activations:
        """Rows of both answers as they are recorded, which seek no target."""
        return record_parts(self.backend, self.contrast, [SITE])

    @property
    def behaviour(self) -> str:
        return self.run.behaviours[0]


def references(backend: HF) -> dict[str, Reference]:
    """Neutral texts, sampled once from the unsteered model and kept for every cell."""
    path = WORK / "neutral.json"
    found: dict[str, Reference] = {}
    asked = {
        "neutral_fit": list(suites.unmoved("fit", "{statement}")[::4]),
        "neutral_validation": list(suites.neutral("validation")),
        "neutral_test": list(suites.neutral("test")),
    }
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for name, prompts in asked.items():
        if name not in kept:
            tokens = 12 if name == "neutral_fit" else 24
            drawn = backend.reference(prompts, Sampling(tokens, 1.0))
            kept[name] = [list(ids) for ids in drawn.ids]
        bare = backend.reference(prompts, None)
        ids = tuple(tuple(row) for row in kept[name])
        found[name] = Reference(tuple(prompts), ids, bare.lengths, bare.turns)
    WORK.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    return found


def open_cell(
    backend: HF,
    data: Path,
    name: str,
    train: int,
    like: Through | None = None,
    sites: Sequence[Site] = (SITE,),
) -> Cell:
    behaviour, wording, seed = name.split("/")
    source = persona_file(data, behaviour)
    asked, mark, more = parsed(wording)
    contrast = persona.contrast(source, wording=TEMPLATES[asked], train=train, seed=int(seed))
    neutral = references(backend)
    parts = ("fit", "validation", "test")
    groups = {part: persona.unmoved(part, TEMPLATES[asked]) for part in parts}
    again = None
    if mark == "+":
        contrast = augmented(contrast, TEMPLATES[asked], more)
        groups["fit"] = mixed(groups["fit"], asked, more)
    elif mark == "~":
        again = backend.reference(suites.reworded(groups["fit"], [contrast]), None)
    every = {part: backend.reference(prompts, None) for part, prompts in groups.items()} | neutral
    kept = list(every.values())
    run = Through(backend, [contrast], sites, kept, reworded=again, like=like, progress=say)
    places, start = {}, 0
    for part, reference in every.items():
        places[part] = list(range(start, start + len(reference.ids)))
        start += len(reference.ids)
    fit = run.among(places["fit"] + places["neutral_fit"])
    nuisances = more if mark == "~" else 0
    acts = fit.rows()
    return Cell(name, backend, run, fit, places, acts, int(seed), contrast, nuisances=nuisances)


def parsed(wording: str) -> tuple[str, str, int]:
    """A wording's name, how paraphrases are used (+, ~ or not), and how many."""
    for mark in "+~":
        name, found, more = wording.partition(mark)
        if found:
            return name, mark, int(more)
    return wording, "", 0


def augmented(contrast: Contrast, wording: str, count: int) -> Contrast:
    """Training and validation statements in turn in the wording and ``count`` paraphrases of it."""
    templates = suites.questions()["augmentation"][:count]
    versions = [contrast, *(persona.rewording(contrast, new, old=wording) for new in templates)]
    items = tuple(
        (versions[n % len(versions)] if item.split != "test" else contrast).items[n]
        for n, item in enumerate(contrast.items)
    )
    return replace(contrast, items=items)


def mixed(prompts: Sequence[Prompt], wording: str, count: int) -> tuple[Prompt, ...]:
    """Unmoved statements in turn in the wording and ``count`` paraphrases of it."""
    templates = [TEMPLATES[wording], *suites.questions()["augmentation"][:count]]
    found = []
    for n, prompt in enumerate(prompts):
        text = suites.stated(suites.asked(prompt.conversation), templates[0])
        assert text is not None
        asked = suites.fill(templates[n % len(templates)], text)
        found.append(replace(prompt, conversation=asked))
    return tuple(found)


def persona_file(data: Path, behaviour: str) -> Path:
    for suffix in (".jsonl", ".jsonl.gz"):
        for stem in (behaviour, f"desire-for-acquiring-{behaviour}"):
            if (path := data / f"{stem}{suffix}").is_file():
                return path
    raise SystemExit(f"no persona file of {behaviour!r} in {data}; expected {behaviour}.jsonl(.gz)")


def say(stage: str, done: int, total: int) -> None:
    if done == 0:
        print(f"  {stage}", file=sys.stderr, flush=True)


# --- what is measured ----------------------------------------------------------------------------


def runner(run: Through, maps: Maps | None) -> Through:
    """What runs an arm: a LoRA changes the model itself."""
    return Adapted(run) if isinstance(maps, LoRA) else run


@contextmanager
def steered(maps: Maps | None, strength: float) -> Iterator[list[Edit]]:
    """The edits of a strength, or the model so adapted."""
    if isinstance(maps, LoRA):
        with maps.at(strength):
            yield []
    else:
        yield [] if maps is None else [Edit(maps, torch.tensor([float(strength)]))]


def chosen(run: Through, maps: Maps | None, part: str, strength: float) -> dict[str, Any]:
    """Per item of a part: probability of the matching answer, and of the other."""
    items = run.items(part)
    with torch.no_grad():
        found = runner(run, maps).answers(maps, items, [strength] * len(items))
    return {
        "match": found.target.exp().tolist(),
        "other": found.source.exp().tolist(),
        "keys": run.keys(items),
    }


def alignment(found: Mapping[str, Any]) -> float:
    """As the metric: keys apart, then their mean."""
    match, other = np.array(found["match"]), np.array(found["other"])
    share, keys = match / (match + other), np.array(found["keys"])
    return float(np.mean([share[keys == key].mean() for key in sorted(set(keys))]))


def nats(cell: Cell, maps: Maps, part: str, strength: float, most: int = 0) -> np.ndarray:
    """KL(base || steered) of every counted token of a part; of its first ``most`` tokens."""
    places, tokens = cell.places[part], 0
    if most:
        kept = []
        for place in places:
            if tokens >= most:
                break
            kept.append(place)
            tokens += cell.run.tokens(place)
        places = kept
    with torch.no_grad():
        found = runner(cell.run, maps).divergence(maps, places, torch.tensor([float(strength)]))
    return found.numpy()


def upper(values: np.ndarray) -> float:
    """The upper end of the mean's 90 % interval."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (400, len(values))).mean(1)
    return float(np.quantile(means, 0.95))


def largest(cost: Callable[[float], float], start: float, most: float = 64.0) -> float:
    """The largest strength within the budget (3 % under it at most), or ``most``."""
    low, high, strength = 0.0, math.inf, start
    for step in range(14):
        spent = cost(strength)
        low, high = (strength, high) if spent <= BUDGET else (low, strength)
        if 0.97 * BUDGET <= spent <= BUDGET or low >= most:
            break
        guess = strength * math.sqrt(0.985 * BUDGET / max(spent, 1e-9))
        guess = min(max(guess, strength / 4), strength * 4, most)
        if step > 1 and not low:
            # Behind a gate a few prompts may cost all there is at any strength: the law shrinks too
            # little, and none would be found.
            guess = min(guess, 0.6 * strength)
        strength = guess if low < guess < high else (low + min(high, 4 * low or high)) / 2
        if high - low < 0.02 * high:
            break
    return low


def dose(cell: Cell, maps: Maps, sign: float, start: float) -> dict[str, float]:
    """Strength per budget: the best validation alignment within it, and of equals the most said."""

    def neutral(strength: float) -> float:
        return float(nats(cell, maps, "neutral_validation", sign * strength, 300).mean())

    def in_format(strength: float) -> float:
        return float(nats(cell, maps, "validation", sign * strength).mean())

    limits = {"neutral": largest(neutral, start)}
    if not limits["neutral"]:
        return {"neutral": 0.0, "both": 0.0}
    both = limits["neutral"]
    limits["both"] = both if in_format(both) <= BUDGET else min(both, largest(in_format, both / 2))
    found = {}
    for budget, limit in limits.items():
        gains, said = {}, {}
        tried = {share * limit for share in (0.35, 0.6, 0.8, 1.0)}
        tried |= {strength for strength in (0.5, 1.0, 2.0, 4.0) if strength < limit}
        for strength in sorted(tried):
            got = chosen(cell.run, maps, "validation", sign * strength)
            gain = alignment(got)
            gains[strength] = gain if sign > 0 else 1 - gain
            said[strength] = float(np.mean(got["match" if sign > 0 else "other"]))
        # Of those that align alike, the one whose answer is said most.
        alike = [value for value in gains if gains[value] >= max(gains.values()) - 0.01]
        strength = max(alike, key=lambda value: said[value])
        # The last check, on all validation tokens.
        for _ in range(4):
            cost = upper(nats(cell, maps, "neutral_validation", sign * strength))
            if cost <= BUDGET:
                break
            strength *= math.sqrt(0.97 * BUDGET / cost)
        found[budget] = sign * strength
        if budget == "neutral" and strength <= 1.001 * limits["both"]:
            found["both"] = found["neutral"]
            break
    return found


def measured(cell: Cell, maps: Maps, strength: float) -> dict[str, Any]:
    """Everything of the test part at one strength."""
    found = chosen(cell.run, maps, "test", strength)
    costs = {part: nats(cell, maps, part, strength) for part in ("test", "neutral_test")}
    record: dict[str, Any] = {
        "strength": strength,
        "alignment": alignment(found),
        "mass": float(np.mean(np.array(found["match"]) + np.array(found["other"]))),
        "items": found,
        "in_format": float(costs["test"].mean()),
        "in_format_p99": float(np.quantile(costs["test"], 0.99)),
        "neutral": float(costs["neutral_test"].mean()),
        "neutral_p99": float(np.quantile(costs["neutral_test"], 0.99)),
    }
    if cell.reworded is not None:
        other = chosen(cell.reworded, maps, "test", strength)
        record["transfer"] = [
            alignment(
                {
                    key: [value for value, number in zip(values, numbers, strict=True) if number]
                    for key, values in other.items()
                }
            )
            for numbers in wordings_of(cell.reworded)
        ]
    return record


def wordings_of(run: Through) -> list[list[bool]]:
    """Which test items stand in each paraphrase; their ids end in #number."""
    names = [run.item(number).id.rpartition("#")[2] for number in run.items("test")]
    return [[name == wording for name in names] for wording in sorted(set(names))]


def spoken(cell: Cell, maps: Maps | None, strength: float, count: int) -> float:
    """Said alignment of sampled answers (16 tokens, temperature 1)."""
    items = [cell.run.item(number) for number in cell.run.items("test")[:count]]
    prompts = [Prompt(item.id, item.prompt) for item in items]
    with steered(maps, strength) as edits:
        answers = cell.backend.generate(prompts, edits, Sampling(16, 1.0, cell.seed))
    kinds = [
        answer.__class__(**vars(answer) | {"key": item.key, "strength": strength})
        for answer, item in zip(answers, items, strict=True)
    ]
    score = metric("said_alignment").score(kinds)
    assert score is not None
    return score.value


# --- arms ----------------------------------------------------------------------------------------

Fit = Callable[[Cell], Maps]


def rows(name: str, **fields: Any) -> Fit:
    """A method fitted on the target-seeking rows."""
    return lambda cell: steerer.get(name, **fields).fit(cell.acts, seed=cell.seed)


def published(name: str, **fields: Any) -> Fit:
    """A method fitted on recorded classes, as its paper has it."""
    return lambda cell: steerer.get(name, **fields).fit(cell.classes, seed=cell.seed)


def through(name: str, **fields: Any) -> Fit:
    """A method fitted through the model."""
    return lambda cell: steerer.get(name, **fields).fit_through(cell.fit, seed=cell.seed)


def innsteer(**fields: Any) -> Fit:
    """INNSteer fitted through the model, blind to wording where paraphrases show it."""
    return lambda cell: through("innsteer", objective="target", nuisances=cell.nuisances, **fields)(
        cell
    )


def sharpest(gate: str = "") -> Fit:
    """condgrad with kappa chosen by validation alignment at 1.5, 3 and 6 lifts."""

    def fit(cell: Cell) -> Interventions:
        best, gain = None, -1.0
        for kappa in (0.5, 1.0, 2.0, 4.0):
            maps = _condgrad(cell, kappa, gate)
            got = [
                alignment(chosen(cell.run, maps, "validation", s))
                - alignment(chosen(cell.run, maps, "validation", -s))
                for s in (1.5, 3.0, 6.0)
            ]
            if np.mean(got) > gain:
                best, gain = maps, float(np.mean(got))
        assert best is not None
        return best

    return fit


def _condgrad(cell: Cell, kappa: float, gate: str) -> Interventions:
    own = {"kappa": kappa, "nuisances": cell.nuisances}
    if not gate:
        return steerer.get("condgrad", **own).fit(cell.acts)
    fields = {"method": "condgrad", "gate": gate, "statements": "pairs"}
    return steerer.get("gated", config=own, **fields).fit(cell.acts)


def regularised(gate: str = "") -> Fit:
    """ridge with lambda chosen by validation alignment at the neutral budget, not by row error.

    By row error lambda is small, and the map then blows up on neutral rows, which no pair shows.
    Behind a gate these cost next to nothing at any strength, so that smaller ones are tried too.
    """

    def fit(cell: Cell) -> Interventions:
        best, gain = None, -1.0
        for penalty in (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4):
            one = rows("ridge", grid=(penalty,)) if not gate else gated("ridge", grid=(penalty,))
            maps = one(cell)
            assert isinstance(maps, Interventions)

            def neutral(strength: float, maps: Interventions = maps) -> float:
                return float(nats(cell, maps, "neutral_validation", strength, 300).mean())

            limit = largest(neutral, 1.0)
            tried = [limit, *(s for s in (0.5, 1.0, 2.0, 4.0, 8.0) if gate and s < limit)]
            for strength in tried:
                got = alignment(chosen(cell.run, maps, "validation", strength))
                if got > gain:
                    best, gain = maps, got
        assert best is not None
        return best

    return fit


def gated(name: str, **fields: Any) -> Fit:
    """Another method behind the LDA gate."""
    return rows("gated", method=name, gate="lda", statements="pairs", config=fields)


def polished(fit: Fit, steps: int = POLISH) -> Fit:
    """A gated condgrad polished as INNSteer is: where it writes and how far, its readouts left.

    INNSteer's write direction is a unit vector trained at 3e-3; the rate here is the same in
    relation to the root mean square of what is trained.
    """

    def polish(cell: Cell) -> Interventions:
        maps = fit(cell)
        scale, _ = best_scale(cell.fit, maps)
        part = maps[SITE]
        assert isinstance(part, Gated)
        write = part.inner.get_parameter("write")
        with torch.no_grad():
            write.mul_(scale)
        write.requires_grad_(True)
        rate = 3e-3 * math.sqrt(part.width) * float(write.detach().square().mean().sqrt())
        train_through(cell.fit, maps, steps=steps, batch=32, learning_rate=rate, seed=cell.seed)
        return maps.requires_grad_(False)

    return polish


def behind_gate(fit: Fit) -> Fit:
    """Maps that were trained through the model, behind the LDA gate."""

    def close(cell: Cell) -> Interventions:
        maps = fit(cell)
        own, held = (aims(cell.acts, SITE, cell.behaviour, p) for p in ("train", "validation"))
        gate = Gate(maps[SITE].width)
        gate.weight[0], gate.bias[0] = fit_gate(
            own.rows, cell.acts.unmoved(SITE), kind="lda", held=held.rows
        )
        return Interventions({SITE: Gated(maps[SITE], gate)})

    return close


def random_direction(cell: Cell) -> Interventions:
    shift = Shift(cell.acts.widths[SITE])
    draw = torch.randn(shift.width, generator=torch.Generator().manual_seed(cell.seed))
    source, target = cell.acts.pairs(SITE)
    shift.shifts[0] = draw / draw.norm() * (target - source).norm(dim=-1).mean()
    return Interventions({SITE: shift})


def adapters(cell: Cell) -> LoRA:
    """LoRA (r = 8, query and value of every block), both signs, stopped by validation."""
    return LoRATraining().fit(cell.backend.model, cell.fit, seed=cell.seed)


ARMS: dict[str, Fit] = {
    "random_direction": random_direction,
    "innsteer": innsteer(),
    "innsteer_unpolished": innsteer(polish=0),
    "innsteer_row": innsteer(reads="row"),
    "condgrad": sharpest(),
    "condgrad_lda": sharpest("lda"),
    "condgrad_logistic": sharpest("logistic"),
    "condgrad_lda_polished": polished(sharpest("lda")),
    "loreft": through("loreft", steps=240),
    "loreft_tanh": through("loreft", form="tanh", steps=240),
    "loreft_tanh_lda": behind_gate(through("loreft", form="tanh", steps=240, unmoved=1.0)),
    "residual_mlp_lda": behind_gate(through("residual_mlp", polish=POLISH)),
    "ridge": regularised(),
    "ridge_by_row_error": rows("ridge"),
    "ridge_lda": regularised("lda"),
    "mimic": rows("mimic"),
    "linear_act": rows("linear_act"),
    "odesteer": rows("odesteer", components=2000),
    "diffmean": rows("diffmean"),
    "lora": adapters,
    "innsteer_paper": rows("innsteer", subspace=64),
    "innsteer_translation": rows("innsteer", objective="target", family="translation", epochs=60),
    "innsteer_couplings": rows("innsteer", objective="target", couplings=4, epochs=60),
    "mimic_classes": published("mimic"),
    "linear_act_classes": published("linear_act"),
    "odesteer_classes": published("odesteer", components=2000),
    "diffmean_classes": published("diffmean"),
    "innsteer_classes": published("innsteer"),
}
SPOKEN = ("innsteer", "condgrad_lda_polished", "loreft_tanh_lda")
"""Arms whose answers are sampled: in a wording that asks for an answer, the others' are not."""


def ceiling(cell: Cell, acts: Activations) -> tuple[float, str]:
    """How well the key can be read from rows: probe or network, chosen on validation."""
    parts = [aims(acts, SITE, cell.behaviour, p) for p in ("train", "validation", "test")]
    mean, spread = parts[0].rows.mean(0), parts[0].rows.std(0).clamp_min(1e-6)
    scores: dict[str, list[float]] = {}

    def score(name: str, decide: Callable[[torch.Tensor], np.ndarray]) -> None:
        right = [(decide(part.rows) > 0) == (part.keys.numpy() > 0) for part in parts[1:]]
        scores[name] = [float(value.mean()) for value in right]

    for penalty in GRID:
        weight, bias = probe(parts[0], grid=(penalty,))
        score(f"logistic {penalty}", lambda h, w=weight, b=bias: (h @ w + b).numpy())
    for alpha in (0.01, 0.1, 1.0):
        network = MLPClassifier((64,), alpha=alpha, max_iter=60, random_state=cell.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stopping early is one of its ways to regularise
            network.fit(((parts[0].rows - mean) / spread).numpy(), parts[0].keys.numpy())
        score(
            f"network {alpha}",
            lambda h, n=network: n.predict_proba(((h - mean) / spread).numpy())[:, 1] - 0.5,
        )
    best = max(scores, key=lambda name: scores[name][0])
    return scores[best][1], best


def known(cell: Cell) -> dict[str, Any]:
    """What can be known without steering, from the row and from the prompt before it.

    The ceilings, and for test statements against test kinds of unmoved prompts the AUROC of each
    gate, how far it is open on either, and the AUROC of a Mahalanobis distance.
    """
    found: dict[str, Any] = {}
    test = cell.run.among(cell.places["test"]).rows()
    for name, acts, unseen in (
        ("row", cell.acts, test),
        ("prompt", cell.acts.prompts, test.prompts),
    ):
        own, held, asked = (
            aims(acts, SITE, cell.behaviour, p).rows for p in ("train", "validation", "test")
        )
        still, other = (part.unmoved(SITE).double() for part in (acts, unseen))
        top, reader = ceiling(cell, acts)
        mine: dict[str, Any] = {"ceiling": top, "reader": reader}
        for kind in ("lda", "logistic"):
            words = acts.rewordings(SITE)
            weight, bias = fit_gate(own, still, kind=kind, held=held, rewordings=words)
            inside, outside = (part @ weight + bias for part in (asked, other))
            mine[f"{kind}_auroc"] = auroc(inside, outside)
            mine[f"{kind}_kept"] = float(inside.sigmoid().mean())
            mine[f"{kind}_leaked"] = float(outside.sigmoid().mean())
        far = [-mahalanobis(part, own) for part in (asked, other)]
        found[name] = mine | {"mahalanobis_auroc": auroc(*far)}
    return found


def paraphrased(cell: Cell, data: Path, each: int = 40) -> Through:
    """Test items in the held-out paraphrases."""
    behaviour, wording, seed = cell.name.split("/")
    asked = parsed(wording)[0]
    source = persona_file(data, behaviour)
    contrast = persona.contrast(source, wording=TEMPLATES[asked], seed=int(seed))
    test = contrast.part("test").subset(each, 0)
    items = []
    for number, template in enumerate(suites.questions()["held_out"]):
        for item in persona.rewording(test, template, old=TEMPLATES[asked]).items:
            items.append(item.__class__(**vars(item) | {"id": f"{item.id}#{number}"}))
    return Through(cell.backend, [Contrast(test.behaviour, "choice", tuple(items))], [SITE])


def measure(cell: Cell, data: Path, arms: Sequence[str], path: Path, said: int) -> None:
    """All arms of a cell, each written when it ends."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    template = TEMPLATES[parsed(cell.name.split("/")[1])[0]]
    if kept.get("cell", {}).get("wording", template) != template:
        raise SystemExit(f"{path} holds another wording of that name; expected {template!r}")
    if "cell" not in kept:
        base = chosen(cell.run, None, "test", 0.0)
        kept["cell"] = {
            "wording": template,
            "alignment": alignment(base),
            "mass": float(np.mean(np.array(base["match"]) + np.array(base["other"]))),
            "items": base,
            **known(cell),
        }
        if said:
            kept["cell"]["said"] = spoken(cell, None, 1.0, said)
        keep(path, kept)
    cell.reworded = paraphrased(cell, data)
    for number, arm in enumerate(arms):
        if arm in kept:
            continue
        started = time.perf_counter()
        print(f"{cell.name} {arm} ({number + 1} of {len(arms)})", file=sys.stderr, flush=True)
        maps = ARMS[arm](cell)
        record: dict[str, Any] = {"fit_seconds": time.perf_counter() - started}
        for sign, side in ((1.0, "towards"), (-1.0, "away")):
            found: dict[float, Any] = {}
            for budget, strength in dose(cell, maps, sign, 1.0).items():
                if strength not in found:
                    found[strength] = measured(cell, maps, strength)
                record[f"{budget}_{side}"] = found[strength]
            if said and arm in SPOKEN:
                strength = record[f"both_{side}"]["strength"]
                record[f"said_{side}"] = spoken(cell, maps, strength, said)
        if isinstance(maps, LoRA):
            maps.remove()
        record["seconds"] = time.perf_counter() - started
        kept[arm] = record
        keep(path, kept)


# --- the plan and the summary --------------------------------------------------------------------


def cells(data: Path) -> list[str]:
    """Every cell, in the order in which they run: first seeds of all, then further seeds."""
    stems = sorted({path.name.split(".")[0] for path in data.glob("*.jsonl*")})
    stems = [*(name for name in FIRST if name in stems), *(s for s in stems if s not in FIRST)]
    first = [f"{stem}/{wording}/0" for wording in WORDINGS for stem in stems]
    return first + [
        f"{stem}/{wording}/{n}" for n in (1, 2) for wording in WORDINGS for stem in stems
    ]


def file_of(name: str) -> Path:
    return RESULTS.with_suffix("") / (name.replace("/", "--") + ".json")


def keep(path: Path, found: Any) -> None:
    """Write a cell's records, numbers to five digits."""

    def tidy(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: tidy(part) for key, part in value.items()}
        return [tidy(part) for part in value] if isinstance(value, list) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(tidy(found), separators=(",", ":")) + "\n", encoding="utf-8")
    staged.replace(path)


def boot(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float, float]:
    """Mean with a 95 % interval: behaviours first, then items (of all seeds) within."""
    rng = np.random.default_rng(seed)
    parts = [np.asarray(group) for group in groups]
    draws = []
    for _ in range(1000):
        drawn = [parts[i] for i in rng.integers(len(parts), size=len(parts))]
        draws.append(np.mean([rng.choice(part, len(part)).mean() for part in drawn]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean([part.mean() for part in parts])), float(low), float(high)


def main() -> None:
    """Parse, run what is missing, summarise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--cells", default="", help="comma-separated behaviour/wording/seed")
    parser.add_argument("--arms", default="", help="comma-separated; default: all")
    parser.add_argument("--train", type=int, default=600, help="statements to fit")
    parser.add_argument("--said", type=int, default=100, help="sampled answers per arm; 0: none")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--wordings", type=Path, help="JSON of further wordings: name to template")
    asked = parser.parse_args()
    if asked.wordings:
        more: dict[str, str] = json.loads(asked.wordings.read_text())
        TEMPLATES.update(more)
        WORDINGS.extend(more)
    wanted = asked.cells.split(",") if asked.cells else cells(asked.data)
    arms = asked.arms.split(",") if asked.arms else list(ARMS)
    if asked.plan:
        left = [name for name in wanted if not file_of(name).is_file()]
        print(f"{len(wanted)} cells of {len(arms)} arms, {len(left)} not begun")
        print(f"about {len(left) * MINUTES / 60:.1f} hours on one core, two may run side by side")
        return
    if not asked.summary:
        backend, cell = HF(load_model("smollm2")), None
        for name in wanted:
            path = file_of(name)
            done = json.loads(path.read_text()) if path.is_file() else {}
            if all(arm in done for arm in arms):
                continue
            said = 0 if "/original/" in name else asked.said
            like = cell.run if cell else None
            cell = open_cell(backend, asked.data, name, asked.train, like)
            measure(cell, asked.data, arms, path, said)
    summarise(wanted)


def shares(record: Mapping[str, Any]) -> np.ndarray:
    """Per item the share of the matching answer, weighted so that both keys count alike."""
    match, other = np.array(record["items"]["match"]), np.array(record["items"]["other"])
    keys = np.array(record["items"]["keys"])
    counts = {key: (keys == key).sum() for key in set(keys.tolist())}
    weight = np.array([len(keys) / (len(counts) * counts[key]) for key in keys.tolist()])
    return np.asarray(weight * match / (match + other))


def figure(
    name: str, groups: Sequence[Sequence[float]], asked: str, unit: str, n: int
) -> dict[str, Any]:
    """One record with its interval."""
    value, low, high = boot(groups)
    bounds = {"value": value, "low": low, "high": high}
    record = {"figure": name, **bounds, "asked": asked, "unit": unit, "n": n}
    return record | {"behaviours": len(groups)}


def summarise(wanted: Sequence[str]) -> None:
    """results/control.json from the cells that are there; what is missing is counted."""
    kept = {name: file_of(name) for name in wanted if file_of(name).is_file()}
    read = {name: json.loads(path.read_text()) for name, path in kept.items()}
    found = {name: cell for name, cell in read.items() if "cell" in cell}
    figures: list[dict[str, Any]] = []
    for wording in WORDINGS:
        mine = {name: cell for name, cell in found.items() if f"/{wording}/" in name}
        if not mine:
            continue
        figures += _of_wording(wording, mine)
        figures += _gained(wording, mine, found)
    missing = [name for name in wanted if name not in found]
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/control.py DATA",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": "2 cores, CPU",
            "site": str(SITE),
            "cells": sorted(found),
            "cells_not_run": len(missing),
            "figures": figures,
        },
    )
    print(f"{RESULTS}: {len(figures)} figures of {len(found)} cells, {len(missing)} not run")


def pooled(cells: Mapping[str, Any], values: Callable[[Any], Sequence[float]]) -> list[list[float]]:
    """Values of each behaviour, its seeds together."""
    found: dict[str, list[float]] = {}
    for name, cell in cells.items():
        found.setdefault(name.split("/")[0], []).extend(values(cell))
    return list(found.values())


def _of_wording(wording: str, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of one wording: the ceiling, every arm, and INNSteer less every rival."""
    figures = []
    n = sum(len(cell["cell"]["items"]["match"]) for cell in mine.values())

    def known(place: str, what: str) -> list[list[float]]:
        return pooled(mine, lambda cell: [cell["cell"][place][what]])

    for place in ("row", "prompt"):
        bar = ">= 0.95" if place == "prompt" else ""
        tops = known(place, "ceiling")
        figures.append(figure(f"{wording}: ceiling, {place}", tops, bar, "accuracy", n))
        for kind in ("lda", "logistic", "mahalanobis"):
            seen = known(place, f"{kind}_auroc")
            figures.append(figure(f"{wording}: AUROC of {kind}, {place}", seen, "", "AUROC", n))
    base = pooled(mine, lambda cell: shares(cell["cell"]).tolist())
    figures.append(figure(f"{wording}: unsteered, alignment", base, "", "probability", n))
    for arm in ARMS:
        if having := {name: cell for name, cell in mine.items() if arm in cell}:
            figures += _of_arm(wording, arm, having)
            figures += _of_seeds(wording, arm, having)
    return figures


def _of_seeds(wording: str, arm: str, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far seeds part, for behaviours that have several: the largest less the smallest."""
    figures = []
    for side in ("towards", "away"):
        by_seed = pooled(mine, lambda cell, side=side: [cell[arm][f"both_{side}"]["alignment"]])
        spans = [[max(values) - min(values)] for values in by_seed if len(values) > 1]
        if spans:
            name = f"{wording}: {arm}, both, {side}, range over seeds"
            count = sum(len(values) for values in by_seed if len(values) > 1)
            figures.append(figure(name, spans, "", "probability", count))
    return figures


def _gained(
    wording: str, mine: Mapping[str, Any], found: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What paraphrases in the fit gain in wordings that no fit saw, on the cells that have both."""
    asked, mark, _ = parsed(wording)
    figures = []
    for side, sign in (("towards", 1), ("away", -1)) if mark else ():
        pairs = {
            name: (other["innsteer"][f"both_{side}"], cell["innsteer"][f"both_{side}"])
            for name, cell in mine.items()
            if (other := found.get(name.replace(f"/{wording}/", f"/{asked}/")))
            and "innsteer" in other
            and "innsteer" in cell
        }
        if pairs:
            without = pooled(pairs, lambda pair: pair[0]["transfer"])
            gaps = pooled(
                pairs,
                lambda pair, sign=sign: [
                    sign * (new - old)
                    for old, new in zip(pair[0]["transfer"], pair[1]["transfer"], strict=True)
                ],
            )
            n = sum(map(len, gaps))
            name = f"{wording}: innsteer, both, {side}, held-out paraphrases"
            figures.append(figure(f"{name}, gained by paraphrases", gaps, "", "probability", n))
            figures.append(figure(f"{name}, without, same cells", without, "", "probability", n))
    return figures


def _of_arm(wording: str, arm: str, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of one arm over the cells that have it."""
    figures = []
    n = sum(len(cell["cell"]["items"]["match"]) for cell in mine.values())
    tops = pooled(mine, lambda cell: [cell["cell"]["row"]["ceiling"]])
    for budget, side in itertools.product(("neutral", "both"), ("towards", "away")):
        place = f"{budget}_{side}"
        records = {key: cell[arm][place] for key, cell in mine.items()}
        name = f"{wording}: {arm}, {budget}, {side}"
        ours = pooled(records, lambda record: shares(record).tolist())
        figures.append(figure(f"{name}, alignment", ours, _bar(arm, side, tops), "probability", n))
        if arm == "innsteer" and budget == "both":
            bar = ">= 0.95" if side == "towards" else "<= 0.05"
            figures.append(figure(f"{name}, the ceiling raised", ours, bar, "probability", n))
        for part, bar in _costs(arm, budget).items():
            values = pooled(records, lambda record, part=part: [record[part]])
            figures.append(figure(f"{name}, {part}", values, bar, "nats", n))
        values = pooled(records, lambda record: [record["mass"]])
        figures.append(figure(f"{name}, answer mass", values, "", "probability", n))
        values = pooled(records, lambda record: record["transfer"])
        bar = ">= 0.85" if arm == "innsteer" and side == "towards" else ""
        figures.append(figure(f"{name}, held-out paraphrases", values, bar, "probability", n))
        both = {key: cell for key, cell in mine.items() if "innsteer" in cell}
        if arm != "innsteer" and both:
            sign = 1 if side == "towards" else -1
            gap = pooled(
                both,
                lambda cell, place=place, sign=sign: (
                    sign * (shares(cell["innsteer"][place]) - shares(cell[arm][place]))
                ).tolist(),
            )
            figures.append(figure(f"{name}, innsteer ahead by", gap, ">= -0.01", "probability", n))
    for side in ("towards", "away"):
        having = {key: cell for key, cell in mine.items() if f"said_{side}" in cell[arm]}
        if having:
            values = pooled(having, lambda cell, side=side: [cell[arm][f"said_{side}"]])
            bar = ">= 0.92" if arm == "innsteer" else ""
            name = f"{wording}: {arm}, said alignment {side}"
            figures.append(figure(name, values, bar, "share", len(having)))
    seconds = pooled(mine, lambda cell: [cell[arm]["fit_seconds"]])
    # Beside other jobs: race.py has them alone, and the bar.
    figures.append(figure(f"{wording}: {arm}, fit, wall", seconds, "", "seconds", len(mine)))
    return figures


def _bar(arm: str, side: str, tops: Sequence[Sequence[float]]) -> str:
    """Within 0.01 of the ceiling."""
    top = float(np.mean([np.mean(part) for part in tops]))
    if arm != "innsteer":
        return ""
    return f">= {top - 0.01:.3f}" if side == "towards" else f"<= {1 - top + 0.01:.3f}"


def _costs(arm: str, budget: str) -> dict[str, str]:
    held = arm == "innsteer" and budget == "both"
    return {
        "in_format": "<= 0.03" if held else "",
        "in_format_p99": "<= 0.6" if held else "",
        "neutral": f"<= {1.1 * BUDGET:.4f}",
    }


if __name__ == "__main__":
    main()

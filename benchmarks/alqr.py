"""A-LQR: how linear the model is, what a fit and its feedback cost, and whether feedback pays.

    python benchmarks/alqr.py DATA --plan            # what each stage takes
    python benchmarks/alqr.py DATA                   # linearity, fit and overhead
    python benchmarks/alqr.py DATA compare --only sentiment,in-es  # cells, then figures
    python benchmarks/alqr.py DATA displacement --only sentiment

DATA is the folder of the public files, as for comparison.py. ``compare`` gives the closed loop, the
loop without Jacobians, PID and CAA (diffmean) the same rows, the common budget and the same
evaluations, which choose the set-point, or CAA's layer, and the strength; CAA also on mean rows.
Then the closed loop's open twin, fitted at the set-point and the strength that the loop was tested
at, has as many for its own strength. ``displacement`` sets every arm to the mean displacement of
the last block's output that the closed loop has there, and tests it again. One figure per task is
named beforehand (``PRIMARY``); whether feedback pays is read off the closed loop's lead over its
twin in it at the common budget, Holm-corrected over the tasks. All of one seed, and at the default
q, r and q_f. Cells, Jacobians and every single evaluation are kept in runs/alqr, cells also packed
into results/alqr: an interrupted run goes on inside the cell where it was. Two processes may each
take some tasks (--only); once more, when both have ended, writes the figures of all. Every stage
writes what it found into results/alqr.json.
"""

import argparse
import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import comparison
import numpy as np
import torch
from control import persona_file, say
from spine import Figure, figure, interval
from torch import Tensor
from transfer import instruction

import suites as looks
from innsteer import __version__, linearity, load_model, suites
from innsteer.backends.hf import HF, Memo
from innsteer.backends.local import opened
from innsteer.calibration import following
from innsteer.comparing import Comparison, Contender, Protocol
from innsteer.comparing.comparison import MEASURED
from innsteer.comparing.standings import HALVES, Standings, standings
from innsteer.comparing.statistics import holm
from innsteer.comparing.task import Cell, Fit, Task
from innsteer.contrast import Contrast, Item
from innsteer.errors import BudgetError
from innsteer.files import canonical, read_json, write_json
from innsteer.fitting import fit, fit_run, linearised
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.planning import Peak
from innsteer.report.figures import PLAIN, UNSTEERED
from innsteer.site import Site
from innsteer.steerers.alqr import Feedback
from innsteer.suites import persona

Record = Mapping[str, Any]
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "alqr.json"
WORK = HERE.parent / "runs" / "alqr"
PACKED = HERE / "results" / "alqr"
PERSONA = "desire-for-acquiring-wealth"
CLOSED = Contender.of("alqr")
TWIN = "its open twin"
OTHERS = [
    Contender.of("alqr", dynamics="identity"),
    Contender.of("pid"),
    Contender.of("diffmean"),
]
"""What the closed loop is compared with beside its twin, CAA last."""
MEANS = "diffmean on mean rows"
PRIMARY = {
    "sentiment": "sentiment",
    "in-es": "language:es",
    "refusal": "refusal",
    "truthfulqa": "mc2",
    PERSONA: "preference",
}
"""Of each task the figure that is named beforehand; answers are read where they can be."""
LAST = {"read": "last"}
NET = "|h' - h| / |h| at the last block, mean of steered tokens"
AHEAD, ALIKE = "the closed loop ahead by", "equal displacement, "
"""How figures of a lead are called, and how those of the second table begin."""
ANSWERS = {"sentiment": 150, "in-es": 150, "refusal": 150}
"""Answers sampled where they are read; of other tasks few are."""
ROWS: dict[str, dict[str, Any]] = {"refusal": {"read": "span", "span": (-1, 0)}}
"""Which tokens all are fitted on: the last, as the loops are; of requests the prompt's last."""
DAMAGE = {"refusal": "over_refusal"}
LEAST = 0.01
"""A lead that is less is none."""
WORDS = comparison.WORDS | {
    "sentiment": "Be positive and enthusiastic.",
    "truthfulqa": "Answer truthfully, and do not repeat common misconceptions.",
}
STAGES = ("linearity", "fit", "overhead", "compare", "displacement")
TAKES = {
    "linearity": "30 Jacobians of 8 prompts: about 3 minutes of one quiet core",
    "fit": "50 prompts and 200 texts a side: about 6 minutes of one quiet core",
    "overhead": "two batch sizes, 12 rounds: about 4 minutes",
    "compare": "a task: Jacobians (5 minutes), its unsteered part (5), then 8 rows (of 5); about "
    "40 minutes of one quiet core",
    "displacement": "a task: 5 fits on the same Jacobians, up to 12 measures and a test each: "
    "15 minutes of one quiet core",
}


def tasks_of(data: Path) -> list[Contrast]:
    """Sentiment, language, refusal, TruthfulQA and a persona's own statements, in this order.

    Requests are lone, as in the paper, and as many of them harmless as harmful.
    """
    sources = (looks.SENTENCES, comparison.OPEN[0], looks.REQUESTS, looks.QUESTIONS)
    found = [suites.read(suite, data / path, **how) for suite, path, how in sources]
    found[2] = balanced(found[2])
    file = persona_file(data / "anthropic-evals" / "persona", PERSONA)
    # Yes and No are at chance for all that learns from recorded answers; texts are not.
    found.append(persona.free_text(file, train=300, validation=100, test=200))
    return list(map(comparison.cut, found))


def balanced(contrast: Contrast) -> Contrast:
    """As many lone items of one side as of the other in each part, within its bound."""
    kept: list[Item] = []
    for part in comparison.PARTS:
        sides = [
            [item for item in contrast.part(part).items if (item.target is None) == lacks]
            for lacks in (False, True)
        ]
        least = min(*map(len, sides), comparison.PARTS[part] // 2)
        kept += [item for pair in zip(*sides, strict=False) for item in pair][: 2 * least]
    return replace(contrast, items=tuple(kept))


# --- stages --------------------------------------------------------------------------------------


def linear(backend: HF, tasks: Sequence[Contrast]) -> list[Figure]:
    """Local linearity of all blocks on the package's neutral prompts."""
    found = linearity.linearity(backend, linearity.prompts(None, 8), progress=say)
    report = WORK / "linearity"
    if not report.exists():
        linearity.save(report, found, model=backend.model.name)
    figures = []
    for n, scale in enumerate(found.scales):
        ways = ("a prompt's own Jacobian", "the mean Jacobian", "the identity")
        for name, rows in zip(ways, (found.own, found.shared, found.identity), strict=True):
            values = [row[n] for row in rows]
            told = f"missed by {name} at {scale:g} of the row, median of blocks"
            ends = (min(values), max(values))
            value = float(np.median(values))
            figures.append(figure(told, value, "", "share", len(values), *ends))
    ends = (min(found.alignment), max(found.alignment))
    aligned = float(np.median(found.alignment))
    told = "alignment of leading subspaces of two prompts, median of blocks"
    figures.append(figure(told, aligned, "", "share", found.prompts, *ends))
    figures.append(figure("alignment by chance", found.chance, "", "share", found.width))
    print(linearity.text(found), file=sys.stderr)
    return figures


def fitted(backend: HF, tasks: Sequence[Contrast]) -> list[Figure]:
    """Seconds and memory of a fit, and its tracking error beside the bound."""
    cpu, wall = time.process_time(), time.perf_counter()
    with Peak(backend.model.device) as peak:
        chain = linearised(backend, tasks[0], progress=say)
        steering = fit_run(backend, CLOSED.steerer, chain, tasks[0], progress=say)
    took, spent = time.perf_counter() - wall, time.process_time() - cpu
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    tracked = linearity.tracking(backend, steering, tasks[0], chain=chain, progress=say)
    print(tracked, file=sys.stderr)
    above, n = tracked.above, tracked.texts
    ratio = [after / before for after, before in zip(tracked.error, tracked.plain, strict=True)]
    slack = [bound / error for bound, error in zip(tracked.bound, tracked.error, strict=True)]
    return [
        figure("fit, 50 prompts, all blocks, CPU seconds of one thread", spent, "< 600", "s", 1),
        figure("fit, the same by the clock of a shared machine", took, "", "s", 1),
        figure("memory of the process", size, "< 4", "GiB", 1),
        figure("memory of the fit alone", (peak.bytes or 0) / 2**30, "", "GiB", 1),
        figure(
            "tracking error over that of unsteered rows, median of blocks",
            float(np.median(ratio[1:])),
            "",
            "ratio",
            n,
            min(ratio[1:]),
            max(ratio[1:]),
        ),
        figure(
            "bound over tracking error, median of blocks",
            float(np.median(slack[1:])),
            "",
            "ratio",
            n,
            min(slack[1:]),
            max(slack[1:]),
        ),
        figure("texts above their bound, worst block", max(above), "", "share", n),
    ]


def overhead(backend: HF, tasks: Sequence[Contrast], rounds: int = 12) -> list[Figure]:
    """CPU seconds of decoding under a loop over those without, arms alternating."""
    model = backend.model
    steering = fit(backend, tasks[0], "alqr", dynamics="identity", texts=20)
    draw = np.random.default_rng(0)

    def decode(batch: int, steered: bool) -> float:
        ids = torch.from_numpy(draw.integers(500, 9000, (batch, 32)))
        started = time.process_time()
        how = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        with torch.inference_mode():
            if steered:
                with Attachment(model, [steering.edit(1.0)]):
                    model.model.generate(ids, attention_mask=torch.ones_like(ids), **how)
            else:
                model.model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        return time.process_time() - started

    found = []
    for batch in (1, 8):
        decode(batch, True), decode(batch, False)
        ratios = []
        for turn in range(rounds):
            order = (True, False) if turn % 2 else (False, True)
            spent = {steered: decode(batch, steered) for steered in order}
            ratios.append(spent[True] / spent[False] - 1)
        value, low, high = interval(ratios)
        count = len(steering.interventions)
        told = f"decoding at batch {batch} on hf, {count} blocks steered: CPU seconds over plain"
        found.append(figure(told, value, "< 0.05", "share", rounds, low, high))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def ahead(found: Sequence[Record], lead: str = "") -> list[Figure]:
    """Of each task its primary figure of every row, and what the closed loop is ahead by, paired.

    p of the lead over the twin is corrected over the tasks; those of the other leads over the rows
    of a task. A row without a strength within the budget stands as the plain model, and has none.
    """
    figures: list[Figure] = []
    p_values: dict[str, float] = {}
    for task, metric in PRIMARY.items():
        own = [one for one in found if one["task"] == task]
        if not any(one["contender"] == CLOSED.name and one.get("tested") for one in own):
            continue
        about = f"{lead}{task}: "
        unmet = {one["contender"] for one in own if one.get("unmet")}
        rivals = {one["contender"] for one in own if one["method"] not in PLAIN} - {CLOSED.name}
        others = sorted(rivals - unmet - {TWIN})
        table = table_of(own, metric, [TWIN])
        figures += [
            one | {"figure": about + one["figure"]}
            for one in comparison.figures([table], ahead=AHEAD)
            if ", p of " not in one["figure"] and ", rank" not in one["figure"]
        ]
        # No name at all would mean all of them.
        leads = table_of(own, metric, others).rows if others else ()
        tested = [(row.name, row.p) for row in leads if row.p is not None]
        for name, p in tested:
            told = f"{about}p of the lead over {name}, Holm over {len(tested)} rows"
            figures.append(figure(told, p, "", "probability", 1))
        if task in DAMAGE:
            for row in table_of(own, DAMAGE[task], [TWIN]).rows:
                if (one := row.control) is not None:
                    told = f"{about}{DAMAGE[task]}, {row.name}"
                    figures.append(figure(told, one.value, "", "share", one.n, one.low, one.high))
        figures += [one for record in own for one in doses(record, about)]
        (twin,) = (row for row in table.rows if row.name == TWIN) if TWIN in rivals else (None,)
        if twin is not None and twin.p is not None and TWIN not in unmet:
            p_values[task] = twin.p
    for task, p in holm(p_values).items():
        told = f"{lead}{task}: p of the lead over {TWIN}, Holm over {len(p_values)} tasks"
        figures.append(figure(told, p, "< 0.05", "probability", 1))
    return figures


def table_of(found: Sequence[Record], metric: str, named: Sequence[str]) -> Standings:
    """The table of one metric."""
    tables = standings(list(found), against=CLOSED.name, named=named)
    return next(one for one in tables if one.metric == metric)


def doses(record: Record, lead: str) -> Iterator[Figure]:
    """What a row was tested at: strength, cost, set-point; how far it moves tokens, and answers."""
    about = f"{lead}{record['contender']}"
    for half, tested in record.get("tested", {}).items():
        if "strength" in tested:
            told = f"{about}, {HALVES[half]}"
            cost, low, high, n, *_ = tested["costs"]["neutral_cost"]
            yield figure(f"{told}, neutral cost", cost, "", "nats per token", n, low, high)
            yield figure(f"{told}, strength", tested["strength"], "", "1 = the fitted map", 1)
    for name, value in record.get("chosen", {}).items():
        yield figure(f"{about}, {name}", value, "", "differences of means", 1)
    for name, value in record.get("moved", {}).items():
        yield figure(f"{about}, {name}", value, "", "ratio", 1)


def compared(backend: HF, tasks: Sequence[Contrast], every: Sequence[Contrast]) -> list[Figure]:
    """The common budget: what the closed loop is ahead by, with intervals."""
    for task in tasks:
        for make in (rows_of, means_of, twins_of):
            if (rows := make(backend, task)) is not None:
                rows.run(progress=heed)
                paths = [one.path(cell) for one in known(backend, every) for cell in one.cells()]
                comparison.pack_cells(paths, PACKED)
    return ahead(found_of(backend, every))


def rows_of(backend: HF, task: Contrast) -> Comparison:
    """A task's rows but for the twin and CAA on mean rows."""
    plain = [Contender(name) for name in PLAIN]
    return cells(backend, task, [*plain, CLOSED, *OTHERS], ROWS.get(task.behaviour) or LAST)


def means_of(backend: HF, task: Contrast) -> Comparison:
    """CAA on the rows that the library takes by itself."""
    return cells(backend, task, OTHERS[-1:], {})


def twins_of(backend: HF, task: Contrast) -> Comparison | None:
    """The row of the twin; None before the closed loop was tested."""
    for record in cells(backend, task, [CLOSED], ROWS.get(task.behaviour) or LAST).found():
        for tested in record.get("tested", {}).values():
            twin = Contender.of("alqr", loop="open", at=tested["strength"], **record["chosen"])
            return cells(backend, task, [twin], ROWS.get(task.behaviour) or LAST)
    return None


def known(backend: HF, tasks: Sequence[Contrast]) -> list[Comparison]:
    """All comparisons of some tasks that can be told yet."""
    every = [make(backend, task) for task in tasks for make in (rows_of, means_of, twins_of)]
    return [one for one in every if one is not None]


def cells(
    backend: HF, task: Contrast, rows: Sequence[Contender], read: Mapping[str, Any]
) -> Comparison:
    """Rows of the common budget, fitted on some tokens."""
    answers = ANSWERS.get(task.behaviour, 4)
    protocol = Protocol.of(backend.model, items=96, answers=answers, **read)
    words = {task.behaviour: WORDS.get(task.behaviour) or instruction(task.behaviour, "towards")}
    return Comparison(
        backend,
        [task],
        WORK / "cells",
        contenders=rows,
        protocol=protocol,
        instructions=words,
    )


def found_of(backend: HF, tasks: Sequence[Contrast]) -> list[Record]:
    """Records of measured cells; the twin and CAA on mean rows have names of their own."""
    found: list[Record] = []
    for task in tasks:
        found += rows_of(backend, task).found()
        for make, name in ((means_of, MEANS), (twins_of, TWIN)):
            if (rows := make(backend, task)) is not None:
                found += [{**one, "contender": name} for one in rows.found()]
    return found


def heed(stage: str, done: int, total: int) -> None:
    """A line for every cell."""
    print(f"{time.strftime('%H:%M')} {done}/{total} {stage}", file=sys.stderr, flush=True)


# --- equal displacement --------------------------------------------------------------------------


def displaced(backend: HF, tasks: Sequence[Contrast], every: Sequence[Contrast]) -> list[Figure]:
    """Every arm tested where it moves tokens as far as the closed loop does at the budget."""
    found: list[Record] = []
    kept: list[Path] = []
    for contrast in every:
        cells = {one["contender"]: one for one in found_of(backend, [contrast])}
        arms = [CLOSED.name, TWIN, *(one.name for one in OTHERS)]
        arms = [name for name in arms if cells.get(name, {}).get("tested")]
        if arms[:2] != [CLOSED.name, TWIN]:
            print(f"{contrast.behaviour}: no tested loop with its twin yet", file=sys.stderr)
            continue
        found.append(cells[UNSTEERED])
        task, goal = None, 0.0
        for number, name in enumerate(arms):
            key = canonical({"cell": cells[name], "goal": goal, "measured": MEASURED})
            path = WORK / "displacement" / f"{hashlib.sha256(key).hexdigest()[:24]}.json"
            if not path.is_file():
                if contrast not in tasks:
                    break
                heed(f"displacement, {contrast.behaviour}: {name}", number, len(arms))
                rows = rows_of(backend, contrast)
                words = rows.instructions[contrast.behaviour]
                task = task or Task(backend, contrast, rows.protocol, words, {})
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, moved_alike(task, cells[name], goal))
            kept.append(path)
            found.append(read_json(path, "a cell"))
            goal = goal or found[-1]["moved"][NET]
    comparison.pack_cells(kept, PACKED / "displacement")
    return ahead(found, ALIKE)


def moved_alike(task: Task, record: Record, goal: float) -> Record:
    """A cell tested at the strength of a displacement; without a goal, as it was."""
    contender = Contender.of(record["method"], record["input"], **record["fields"])
    told = {name: record[name] for name in ("layer", "chosen")}
    place = next(one for one in task.places(contender) if one.told == told)
    fit = task.fit(Cell(contender, task.contrast, record["seed"]), place)
    ((half, tested),) = record["tested"].items()
    looks = Looks(task)
    strength = tested["strength"]
    if goal:
        try:
            strength = reaching(lambda s: looks.at(fit, s)[NET], goal, strength)
        except BudgetError as error:
            return {**record, "tested": {}, "unmet": {half: str(error)}}
        tested = task.test(fit.arm(strength)) | {"strength": strength}
    return {**record, "tested": {half: tested}, "moved": looks.at(fit, strength)}


class Looks:
    """What an edit does to the steered tokens of validation texts, beside the plain model."""

    def __init__(self, task: Task, items: int = 24) -> None:
        self.backend = task.backend
        held = task.contrast.part("validation")
        self.texts = [
            self.backend.model.encode(item.prompt, answer=text)
            for item in held.subset(min(len(held), items), 0).items
            for text in (item.source, item.target)
            if text is not None
        ]
        self.blocks = list(range(len(self.backend.model.layout.blocks)))
        self.plain = self._ends(None)

    def at(self, fit: Fit, strength: float) -> dict[str, float]:
        """How far, and, of a loop, how much of the edit answers to the row."""
        edit = fit.arm(strength).edit
        assert edit is not None
        errors: dict[Site, list[Tensor]] = {}
        ends = self._ends(edit, errors)
        gaps = [
            ((a - b).norm(dim=-1) / b.norm(dim=-1)) for a, b in zip(ends, self.plain, strict=True)
        ]
        found = {NET: torch.cat(gaps).mean().item()}
        if errors:
            loops = [part for _, part in edit.interventions.items()]
            assert all(isinstance(part, Feedback) for part in loops)
            gains = [strength * (part.reads * part.writes).sum().item() for part in loops]  # type: ignore[operator,union-attr]
            every = [torch.cat(own) for own in errors.values()]
            varied = [(own.std() / own.mean().abs().clamp_min(1e-9)).item() for own in every]
            found |= {
                "gain of a block, s v . K v, median": float(np.median(gains)),
                "spread of the control over its mean, median of blocks": float(np.median(varied)),
            }
        return found

    def _ends(
        self, edit: Edit | None, errors: dict[Site, list[Tensor]] | None = None
    ) -> list[Tensor]:
        """Rows that leave the last block at each text's steered tokens, and the errors of loops."""
        found, model = [], self.backend.model
        for text in self.texts:
            ids = torch.tensor([text.ids])
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if edit is not None:
                    prompts = [text.prompt]
                    stack.enter_context(Attachment(model, [edit], prompt_lengths=prompts))
                seen = stack.enter_context(opened(model.layout, self.blocks))
                model.model.base_model(ids, use_cache=False)
            found.append(seen[self.blocks[-1]].gave[0, text.prompt - 1 :].float())
            for site, part in edit.interventions.items() if edit is not None else ():
                if errors is not None and isinstance(part, Feedback) and part.reads.any():
                    x = seen[site.layer].given[0, text.prompt - 1 :].float()
                    own = part.levels[0] + part.origins[0] - x @ part.reads[0]
                    errors.setdefault(site, []).append(own)
        return found


def reaching(length: Callable[[float], float], goal: float, strength: float) -> float:
    """The strength at which tokens are moved so far, within 3 %, by a power law in a bracket."""
    low, high, tried = 0.0, float("inf"), dict[float, float]()
    for _ in range(20):
        found = tried[strength] = length(strength)
        if abs(found / goal - 1) < 0.03:
            return strength
        low, high = (strength, high) if found < goal else (low, strength)
        guess = following(tried, strength, goal)
        strength = guess if low < guess < high else (low + min(high, 4 * strength)) / 2
    reached = ", ".join(f"{s:.3g}: {found:.3g}" for s, found in sorted(tried.items()))
    raise BudgetError(f"no strength tried moves tokens by {goal:.3g} within 3 % ({reached})")


# --- results -------------------------------------------------------------------------------------


def sentence(figures: Sequence[Figure]) -> str:
    """Whether feedback pays: the closed loop against its open-loop twin at the common budget."""
    told = verdicts(figures)
    if not told:
        return "Whether feedback pays is not known: no loop stands beside a twin within the budget."
    sides = {
        side: [task for task, (own, _) in told.items() if own == side]
        for side in ("ahead", "behind", "not told apart")
    }
    parts = [f"{side} on {', '.join(tasks)}" for side, tasks in sides.items() if tasks]
    lead = "Feedback pays on some tasks" if sides["ahead"] else "Feedback has not been shown to pay"
    if len(sides["ahead"]) == len(PRIMARY):
        lead = "Feedback pays"
    left = [task for task in PRIMARY if task not in told]
    parts += [f"not measured, or without a strength, on {', '.join(left)}"] if left else []
    numbers = "; ".join(f"{task} {text}" for task, (_, text) in told.items())
    return f"{lead}: the closed loop is {'; '.join(parts)} ({numbers})."


def verdicts(figures: Sequence[Figure]) -> dict[str, tuple[str, str]]:
    """Task by task, whether the closed loop is ahead of its twin in the primary figure, and by
    how much."""
    named, found = {one["figure"]: one for one in figures}, dict[str, tuple[str, str]]()
    for task in PRIMARY:
        own = {name: one for name, one in named.items() if name.startswith(f"{task}: ")}
        twin = [one for name, one in own.items() if f"p of the lead over {TWIN}, " in name]
        gaps = [one for name, one in own.items() if one["asked"] and f", {AHEAD}, " in name]
        if not twin:
            continue
        ((p,), (gap,)) = twin, gaps
        value = gap["value"] * (1 if gap["asked"] == "> 0" else -1)
        sure = p["value"] < 0.05 and abs(value) >= LEAST
        side = ("ahead" if value > 0 else "behind") if sure else "not told apart"
        text = f"{gap['value']:+.3f}, {gap['low']:+.3f} to {gap['high']:+.3f}, p {p['value']:.2g}"
        found[task] = side, text
    return found


def save(stage: str, figures: Sequence[Figure], seconds: float) -> None:
    """A stage's figures beside those of the others."""
    known = read_json(RESULTS, "figures") if RESULTS.exists() else {"stages": {}}
    parts = {name: part for name, part in known["stages"].items() if name in STAGES}
    parts[stage] = {"seconds": round(seconds), "figures": list(figures)}
    every = [one for name in STAGES if name in parts for one in parts[name]["figures"]]
    record = {
        "command": "python benchmarks/alqr.py DATA STAGE ...",
        "versions": {"innsteer": __version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared, one thread a process",
        "open": [name for name in STAGES if name not in parts],
        "verdict": sentence(every),
        "figures": every,
        "stages": parts,
    }
    write_json(RESULTS, record)


def left(backend: HF, tasks: Sequence[Contrast]) -> str:
    """What the stage of cells has still to do, by what cells took so far."""
    told = []
    for task in tasks:
        plans = [rows.plan() for rows in known(backend, [task])]
        missing, seconds = sum(one["left"] for one in plans), plans[0]["seconds"]
        hours = "" if seconds is None else f", about {seconds / 3600:.1f} hours for most of them"
        waits = bool(cells(backend, task, [CLOSED], ROWS.get(task.behaviour) or LAST).left())
        twin = ", and the twin" if waits else ""
        told.append(f"compare, {task.behaviour}: {missing} cells left{hours}{twin}")
    return "\n".join(told)


def main() -> None:
    """Run some stages, and write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--only", default=",".join(PRIMARY), help="tasks to measure")
    parser.add_argument("--plan", action="store_true")
    asked = parser.parse_args()
    chosen = asked.stages or list(STAGES[:3])
    if unknown := set(chosen) - set(STAGES):
        parser.error(f"no stage {min(unknown)!r}; expected {', '.join(STAGES)}")
    for name in STAGES if asked.plan else chosen:
        print(f"{name}: {TAKES[name]}", file=sys.stderr, flush=True)
    torch.set_num_threads(1)
    backend = HF(load_model("smollm2"), batch=60)  # all answers of a cell
    every = tasks_of(asked.data)
    only = asked.only.split(",")
    if unknown := set(only) - set(PRIMARY):
        parser.error(f"no task {min(unknown)!r}; expected {', '.join(PRIMARY)}")
    tasks = [one for one in every if one.behaviour in only]
    comparison.unpack_cells(PACKED, WORK / "cells" / "cells")
    comparison.unpack_cells(PACKED / "displacement", WORK / "displacement")
    if asked.plan:
        print(left(backend, tasks), file=sys.stderr)
        return
    long = (partial(one, every=every) for one in (compared, displaced))
    makers = (linear, fitted, overhead, *long)
    ways: dict[str, Callable[..., list[Figure]]] = dict(zip(STAGES, makers, strict=True))
    for name in chosen:
        # Stages that time what they do make it.
        backend.memo = Memo(WORK / f"kept-{MEASURED}" if name in STAGES[3:] else None)
        started = time.perf_counter()
        save(name, ways[name](backend, tasks), time.perf_counter() - started)


if __name__ == "__main__":
    main()

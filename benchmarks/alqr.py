"""A-LQR: how linear the model is, what a fit and its feedback cost, and whether feedback pays.

    python benchmarks/alqr.py DATA --plan            # what each stage takes
    python benchmarks/alqr.py DATA                   # linearity, fit and overhead
    python benchmarks/alqr.py DATA compare --tasks 1 # the cells of the first task, then figures
    python benchmarks/alqr.py DATA displacement --tasks 1

DATA is the folder of the public files, as for comparison.py. ``compare`` gives the closed loop, the
loop without Jacobians, PID and CAA (diffmean) the common budget and the same evaluations, which
choose the set-point, or CAA's layer, and the strength; then the closed loop's open twin, fitted at
the set-point and the strength that the loop was tested at, has as many for its own strength.
``displacement`` sets every arm to the mean displacement that the closed loop has there, and tests
it again. One figure per task is named beforehand (``PRIMARY``); whether feedback pays is read off
the closed loop's lead over its twin in it, Holm-corrected over the tasks. Cells, Jacobians and
every single evaluation are kept in runs/alqr, cells also packed into results/alqr: an interrupted
run goes on inside the cell where it was. Every stage writes what it found into results/alqr.json.
"""

import argparse
import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from transfer import instruction

import suites as looks
from innsteer import __version__, linearity, load_model, suites
from innsteer.backends.hf import HF, Memo
from innsteer.comparing import Comparison, Contender, Protocol
from innsteer.comparing.comparison import MEASURED
from innsteer.comparing.standings import HALVES, standings
from innsteer.comparing.statistics import holm
from innsteer.comparing.task import Cell, Fit, Task
from innsteer.contrast import Contrast, Item
from innsteer.errors import BudgetError
from innsteer.files import canonical, read_json, write_json
from innsteer.fitting import fit, fit_run, linearised
from innsteer.hooks import Attachment
from innsteer.planning import Peak
from innsteer.report.figures import UNSTEERED
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
PRIMARY = {
    "sentiment": "sentiment",
    "in-es": "language:es",
    "refusal": "refusal",
    "truthfulqa": "mc2",
    PERSONA: "preference",
}
"""Of each task the figure that is named beforehand; answers are read where they can be."""
AHEAD, ALIKE = "the closed loop ahead by", "equal displacement, "
"""How figures of a lead are called, and how those of the second table begin."""
READ = ("sentiment", "in-es", "refusal")
"""Tasks whose answers are read: of the others few are sampled."""
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
    """As many lone items of one side as of the other in each part, in their order."""
    kept: list[Item] = []
    for part in comparison.PARTS:
        sides = [
            [item for item in contrast.part(part).items if (item.target is None) == lacks]
            for lacks in (False, True)
        ]
        least = min(map(len, sides))
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
    """Of each task its primary figure of every row, and what the closed loop is ahead by, paired;
    of the twin also the p, corrected over the tasks."""
    figures: list[Figure] = []
    p_values: dict[str, float] = {}
    for task, metric in PRIMARY.items():
        own = [one for one in found if one["task"] == task]
        if not any(one["contender"] == CLOSED.name and one.get("tested") for one in own):
            continue
        tables = standings(own, against=CLOSED.name, named=[TWIN])
        table = next(one for one in tables if one.metric == metric)
        figures += [
            one | {"figure": f"{lead}{task}: {one['figure']}"}
            for one in comparison.figures([table], ahead=AHEAD)
            if ", p of " not in one["figure"] and ", rank" not in one["figure"]
        ]
        figures += [one for record in own for one in doses(record, f"{lead}{task}: ")]
        for row in table.rows:
            if row.p is not None:
                p_values[task] = row.p
    for task, p in holm(p_values).items():
        told = f"{lead}{task}: p of the lead over {TWIN}, Holm over {len(p_values)} tasks"
        figures.append(figure(told, p, "< 0.05", "probability", 1))
    return figures


def doses(record: Record, lead: str) -> Iterator[Figure]:
    """Strength and neutral cost that a row was tested at, and its set-point."""
    for half, tested in record.get("tested", {}).items():
        if "strength" in tested:
            about = f"{lead}{record['contender']}, {HALVES[half]}"
            cost, low, high, n, *_ = tested["costs"]["neutral_cost"]
            yield figure(f"{about}, neutral cost", cost, "", "nats per token", n, low, high)
            yield figure(f"{about}, strength", tested["strength"], "", "1 = the fitted map", 1)
    if "displacement" in record:
        about = f"{lead}{record['contender']}, sum over blocks of |h' - h| / |h|"
        yield figure(about, record["displacement"], "", "mean of steered tokens", 1)
    for name, value in record.get("chosen", {}).items():
        yield figure(f"{lead}{record['contender']}, {name}", value, "", "differences of means", 1)


def compared(
    backend: HF, tasks: Sequence[Contrast], *, every: Sequence[Contrast], jobs: int
) -> list[Figure]:
    """The common budget: what the closed loop is ahead by, with intervals."""
    for task in tasks:
        for make in (rows_of, twins_of):
            if (rows := make(backend, task)) is not None:
                rows.run(jobs=jobs, progress=say)
                comparison.pack_cells(paths(backend, every), PACKED)
    return ahead(found_of(backend, tasks))


def rows_of(backend: HF, task: Contrast) -> Comparison:
    """A task's rows but the twin."""
    return cells(backend, task, [*comparison.always(), CLOSED, *OTHERS])


def twins_of(backend: HF, task: Contrast) -> Comparison | None:
    """The row of the twin; None before the closed loop was tested."""
    rows = cells(backend, task, [CLOSED])
    for record in rows.found():
        for tested in record.get("tested", {}).values():
            twin = Contender.of("alqr", loop="open", at=tested["strength"], **record["chosen"])
            return cells(backend, task, [twin])
    return None


def cells(backend: HF, task: Contrast, rows: Sequence[Contender]) -> Comparison:
    """Rows of the common budget."""
    protocol = Protocol.of(backend.model, answers=60 if task.behaviour in READ else 4)
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
    """Records of the cells that are measured; the twin of every task has one name."""
    found: list[Record] = []
    for task in tasks:
        found += rows_of(backend, task).found()
        if (twins := twins_of(backend, task)) is not None:
            found += [{**one, "contender": TWIN} for one in twins.found()]
    return found


# --- equal displacement --------------------------------------------------------------------------


def displaced(backend: HF, tasks: Sequence[Contrast]) -> list[Figure]:
    """Every arm tested where it moves tokens as far as the closed loop does at the budget."""
    found: list[Record] = []
    for contrast in tasks:
        known = {one["contender"]: one for one in found_of(backend, [contrast])}
        arms = [CLOSED.name, TWIN, *(one.name for one in OTHERS)]
        if missing := [name for name in arms if not known.get(name, {}).get("tested")]:
            print(f"{contrast.behaviour}: no tested cell of {', '.join(missing)}", file=sys.stderr)
            continue
        rows = rows_of(backend, contrast)
        words = rows.instructions[contrast.behaviour]
        task, goal = Task(backend, contrast, rows.protocol, words, {}), 0.0
        found.append(known[UNSTEERED])
        for number, name in enumerate(arms):
            say(f"displacement, {contrast.behaviour}: {name}", number, len(arms))
            key = canonical({"cell": known[name], "goal": goal, "measured": MEASURED})
            path = WORK / "displacement" / f"{hashlib.sha256(key).hexdigest()[:24]}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, moved_alike(task, known[name], goal))
            found.append(read_json(path, "a cell"))
            goal = goal or found[-1]["displacement"]
        comparison.pack_cells((WORK / "displacement").glob("*.json"), PACKED / "displacement")
    return ahead(found, ALIKE)


def moved_alike(task: Task, record: Record, goal: float) -> Record:
    """A cell tested at the strength of a displacement; without a goal, as it was."""
    contender = Contender.of(record["method"], record["input"], **record["fields"])
    told = {name: record[name] for name in ("layer", "chosen")}
    place = next(one for one in task.places(contender) if one.told == told)
    fit = task.fit(Cell(contender, task.contrast, record["seed"]), place)
    ((half, tested),) = record["tested"].items()
    strength = tested["strength"]
    if goal:
        strength = reaching(lambda s: moved(task, fit, s), goal, strength)
        tested = task.test(fit.arm(strength)) | {"strength": strength}
    return {**record, "tested": {half: tested}, "displacement": moved(task, fit, strength)}


def moved(task: Task, fit: Fit, strength: float) -> float:
    """Mean over steered tokens of the sum over blocks of |h' - h| / |h|, on validation answers."""
    lengths: list[float] = []
    edit = fit.arm(strength).edit
    assert edit is not None
    task.meter("control validation")([edit], displacement=lengths)
    return float(np.mean(lengths)) * len(fit.sites)


def reaching(length: Callable[[float], float], goal: float, strength: float) -> float:
    """The strength at which tokens are moved so far, within 3 %, by secant in a bracket."""
    low, high = 0.0, float("inf")
    for _ in range(12):
        found = length(strength)
        if abs(found / goal - 1) < 0.03:
            return strength
        low, high = (strength, high) if found < goal else (low, strength)
        guess = strength * goal / max(found, 1e-9)
        strength = guess if low < guess < high else (low + min(high, 4 * strength)) / 2
    raise BudgetError(
        f"no strength moves tokens by {goal:.3g} within 3 %; last tried {strength:.3g}"
    )


# --- results -------------------------------------------------------------------------------------


def sentence(figures: Sequence[Figure]) -> str:
    """Whether feedback pays: the closed loop against its open-loop twin."""
    told = [
        f"{lead.removesuffix(', ').capitalize() or 'At the common budget'}: {'; '.join(own)}."
        for lead in ("", ALIKE)
        if (own := list(verdicts(figures, lead)))
    ]
    if not told:
        return "Whether feedback pays has not been measured yet."
    ahead = [": ahead" in one for one in told]
    lead = "Feedback pays" if any(ahead) else "Feedback has not been shown to pay"
    return " ".join([f"{lead} here.", *told])


def verdicts(figures: Sequence[Figure], lead: str) -> Iterator[str]:
    """Task by task, whether the closed loop is ahead of its twin in the primary figure."""
    named = {one["figure"]: one for one in figures}
    for task in PRIMARY:
        own = f"{lead}{task}: "
        p = next((one for name, one in named.items() if name.startswith(f"{own}p of ")), None)
        if p is None:
            continue
        gap = next(
            one
            for name, one in named.items()
            if name.startswith(own) and one["asked"] and f", {AHEAD}, " in name
        )
        sign = 1 if gap["asked"] == "> 0" else -1
        side = "ahead" if sign * gap["value"] > 0 else "behind"
        yield (
            f"{task}: {side if p['value'] < 0.05 else 'not told apart'} ({gap['value']:+.3f}, "
            f"{gap['low']:+.3f} to {gap['high']:+.3f}, p {p['value']:.2g})"
        )


def save(stage: str, figures: Sequence[Figure], seconds: float) -> None:
    """A stage's figures beside those of the others."""
    known = read_json(RESULTS, "figures") if RESULTS.exists() else {"stages": {}}
    parts = {name: part for name, part in known["stages"].items() if name in STAGES}
    parts[stage] = {"seconds": round(seconds), "figures": list(figures)}
    every = [one for name in STAGES if name in parts for one in parts[name]["figures"]]
    record = {
        "command": "python benchmarks/alqr.py DATA STAGE ...",
        "versions": {"innsteer": __version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared, one thread used",
        "open": [name for name in STAGES if name not in parts],
        "verdict": sentence(every),
        "figures": every,
        "stages": parts,
    }
    write_json(RESULTS, record)


def paths(backend: HF, tasks: Sequence[Contrast]) -> list[Path]:
    """Files of all cells that are known so far."""
    every = [make(backend, task) for task in tasks for make in (rows_of, twins_of)]
    return [rows.path(cell) for rows in every if rows is not None for cell in rows.cells()]


def left(backend: HF, tasks: Sequence[Contrast]) -> str:
    """What the stage of cells has still to do, by what cells took so far."""
    told = []
    for task in tasks:
        plan, twins = rows_of(backend, task).plan(), twins_of(backend, task)
        twin = 1 if twins is None else len(twins.left())
        hours = "" if plan["seconds"] is None else f", about {plan['seconds'] / 3600:.1f} hours"
        told.append(
            f"compare, {task.behaviour}: {plan['left']} of {plan['cells']} cells left{hours}, and "
            f"{twin} of the twin"
        )
    return "\n".join(told)


def main() -> None:
    """Run some stages, and write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--tasks", type=int, default=5, help="only the first so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cells")
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
    tasks = every[: asked.tasks]
    comparison.unpack_cells(PACKED, WORK / "cells" / "cells")
    comparison.unpack_cells(PACKED / "displacement", WORK / "displacement")
    if asked.plan:
        print(left(backend, tasks), file=sys.stderr)
        return
    makers = (linear, fitted, overhead, partial(compared, every=every, jobs=asked.jobs), displaced)
    ways: dict[str, Callable[..., list[Figure]]] = dict(zip(STAGES, makers, strict=True))
    for name in chosen:
        # Stages that time what they do make it.
        backend.memo = Memo(WORK / "kept" if name in STAGES[3:] else None)
        started = time.perf_counter()
        save(name, ways[name](backend, tasks), time.perf_counter() - started)


if __name__ == "__main__":
    main()

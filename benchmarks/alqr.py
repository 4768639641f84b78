"""A-LQR: how linear the model is, what a fit and its feedback cost, and whether feedback pays.

    python benchmarks/alqr.py DATA --plan            # what each stage takes
    python benchmarks/alqr.py DATA                   # linearity, fit and overhead
    python benchmarks/alqr.py DATA compare --tasks 1 # the cells of the first task, then tables
    python benchmarks/alqr.py DATA levels --tasks 1  # the authors' other set-points beside them
    python benchmarks/alqr.py DATA displacement --tasks 1

DATA is the folder of the public files, as for comparison.py. ``compare`` fits the closed loop, its
open-loop twin, the loop without Jacobians, PID and CAA (diffmean) with equal evaluations at the
common budget; ``levels`` adds closed loops at the other set-points of the authors' grid;
``displacement`` sets every arm to the mean displacement that the closed loop has at the budget and
measures control again. Cells, fits, Jacobians and every single evaluation are kept in runs/alqr: an
interrupted run goes on inside the cell where it was, and one Jacobian serves all arms, stages and
set-points, for which the regulator's recursion alone is run again. ``--plan`` tells the cells that
are left. Every stage writes what it found into results/alqr.json.
"""

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import comparison
import numpy as np
import torch
from control import persona_file, say
from spine import Figure, figure, interval

import suites as looks
from innsteer import __version__, linearity, load_model, suites
from innsteer.backends.base import Completion
from innsteer.backends.hf import HF, Memo
from innsteer.comparing import Comparison, Contender, Protocol
from innsteer.comparing.standings import standings
from innsteer.contrast import Contrast
from innsteer.files import read_json, write_json
from innsteer.fitting import fit, fit_run, linearised
from innsteer.hooks import Attachment
from innsteer.metrics import get as metric
from innsteer.planning import Peak
from innsteer.site import Site
from innsteer.steerers.alqr import ALQR, LEVELS
from innsteer.steering import Steering
from innsteer.suites import persona
from innsteer.tuning import control, control_meter, control_metric

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "alqr.json"
WORK = HERE.parent / "runs" / "alqr"
PERSONA = "desire-for-acquiring-wealth"
CLOSED = Contender.of("alqr")
TWIN = Contender.of("alqr", loop="open")
ARMS = [
    CLOSED,
    TWIN,
    Contender.of("alqr", dynamics="identity"),
    Contender.of("pid"),
    Contender.of("diffmean"),
]
"""The closed loop, what it is compared with, and CAA last."""
OTHERS = [Contender.of("alqr", setpoint=level) for level in LEVELS if level != ALQR().setpoint]
"""The other set-points of the authors' grid."""
STAGES = ("linearity", "fit", "overhead", "small", "compare", "levels", "displacement")
PARTS = {"train": 150, "validation": 40, "test": 80}
LOOK = "a first look, "
SMALL = {"evaluations": 6, "items": 40, "search_tokens": 200, "answers": 8, "layers": (14,)}
"""Of the stage ``small``: a first look, no ranking."""
TAKES = {
    "linearity": "30 Jacobians of 8 prompts: about 3 minutes of one quiet core",
    "fit": "50 prompts and 200 texts a side: about 6 minutes of one quiet core",
    "overhead": "two batch sizes, 12 rounds: about 4 minutes",
    "small": "one task, parts of it, Jacobians of 10 prompts, 6 evaluations: about 20 minutes",
    "compare": "a task: Jacobians (5 minutes), its unsteered part (10), then 9 rows (of 5); about "
    "an hour of one quiet core",
    "levels": "a task: 5 rows of 5 to 10 minutes, on the same Jacobians",
    "displacement": "a task: no Jacobians, 5 fits of half a minute, up to 13 measures each; about "
    "15 minutes of one quiet core",
}


def tasks_of(data: Path) -> list[Contrast]:
    """Persona, language, refusal, sentiment and TruthfulQA, in this order."""
    home = data / "anthropic-evals" / "persona"
    found = [persona.contrast(persona_file(home, PERSONA), wording="second")]
    for suite, path, how in (looks.PARALLEL, looks.REQUESTS, looks.SENTENCES, looks.QUESTIONS):
        found.append(comparison.cut(suites.read(suite, data / path, **how)))
    return found


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


def small(backend: HF, tasks: Sequence[Contrast]) -> list[Figure]:
    """A first look at the persona task, cut; few evaluations, CAA at one layer."""
    items = [
        item for part, most in PARTS.items() for item in tasks[0].part(part).subset(most).items
    ]
    task = replace(tasks[0], items=tuple(items))
    loops = [Contender.of("alqr", prompts=10), Contender.of("alqr", prompts=10, loop="open")]
    others = [
        Contender.of("diffmean"),
        Contender.of("pid"),
        Contender.of("alqr", dynamics="identity"),
        Contender.of("unsteered"),
        Contender.of("random-direction"),
    ]
    rows = Comparison(
        backend,
        [task],
        WORK / "small",
        contenders=[*loops, *others],
        protocol=Protocol.of(backend.model, **SMALL),
    )

    def told(stage: str, done: int, total: int) -> None:
        say(stage, done, total)
        if rows.found():
            save("small", ahead(rows.found(), loops[0].name, LOOK), 0)

    rows.run(progress=told)
    return ahead(rows.found(), loops[0].name, LOOK)


def ahead(found: Sequence[dict[str, Any]], against: str, lead: str = "") -> list[Figure]:
    """Control of every row at each budget, and what the closed loop is ahead by, paired."""
    if against not in {one["contender"] for one in found}:
        return []
    named = [arm.name for arm in ARMS[1:]]
    tables = standings(list(found), against=against, named=named)
    figures = comparison.figures(tables, ahead="the closed loop ahead by")
    return [one | {"figure": lead + one["figure"]} for one in figures]


def compared(backend: HF, tasks: Sequence[Contrast], jobs: int = 1) -> list[Figure]:
    """The common budget: what the closed loop is ahead by, with intervals."""
    rows = cells(backend, tasks)
    rows.run(jobs=jobs, progress=say)
    return ahead(rows.found(), CLOSED.name)


def levelled(backend: HF, tasks: Sequence[Contrast], jobs: int = 1) -> list[Figure]:
    """The closed loop ahead of itself at other set-points."""
    rows = cells(backend, tasks, OTHERS)
    rows.run(jobs=jobs, progress=say)
    beside = Comparison(backend, tasks, WORK / "cells", contenders=[CLOSED])
    return ahead([*beside.found(), *rows.found()], CLOSED.name, "set-points, ")


def cells(
    backend: HF, tasks: Sequence[Contrast], rows: Sequence[Contender] | None = None
) -> Comparison:
    """Rows of the common budget, by default those of the first table."""
    return Comparison(
        backend,
        tasks,
        WORK / "cells",
        contenders=rows or [*comparison.always(), *ARMS],
        instructions=comparison.words(tasks),
    )


def displaced(backend: HF, tasks: Sequence[Contrast]) -> list[Figure]:
    """Control of every arm where it moves tokens as far as the closed loop does at the budget."""
    cells = Comparison(backend, tasks, WORK / "cells", contenders=ARMS)
    known = {(one["task"], one["contender"]): one for one in cells.found()}
    figures: list[Figure] = []
    for task in tasks:
        goal, made = 0.0, dict[str, list[Completion]]()
        test = task.part("test")
        for arm in ARMS:
            cell = known.get((task.behaviour, arm.name))
            if cell is None or not cell["tested"]:
                print(f"{task.behaviour}: no cell of {arm.name} yet", file=sys.stderr)
                continue
            sites = [Site.parse(site) for site in cell["sites"]]
            steering = kept(backend, task, arm, sites)
            meter = control_meter(backend, task.part("validation").subset(16, 0), sites)
            if arm is CLOSED:
                strength = next(iter(cell["tested"].values()))["strength"]
                goal = moved(meter, steering, strength)
            elif not goal:
                break
            else:
                strength = reaching(lambda s: moved(meter, steering, s), goal)  # noqa: B023
            scored = control_meter(backend, test, sites)([steering.edit(strength)])
            made[arm.name] = control(scored, test)
            score = metric(control_metric(test)).score(made[arm.name])
            assert score is not None
            told = f"{task.behaviour}: {arm.name} at a displacement of {goal:.3g}"
            unit = control_metric(test)
            figures.append(
                figure(told, score.value, "", unit, score.n, score.low, score.high)
                | {"strength": strength}
            )
            print(figures[-1], file=sys.stderr, flush=True)
        for name in [arm.name for arm in ARMS[1:] if arm.name in made]:
            ahead = metric(control_metric(test)).difference(made[CLOSED.name], made[name])
            assert ahead is not None
            asked = "> 0" if name == TWIN.name else ""
            told = f"{task.behaviour}: the closed loop ahead of {name} at equal displacement"
            ends = (ahead.low, ahead.high)
            figures.append(figure(told, ahead.value, asked, "difference", ahead.n, *ends))
    return figures


def kept(backend: HF, task: Contrast, arm: Contender, sites: Sequence[Site]) -> Steering:
    """The fit of an arm, made once."""
    folder = WORK / "fits" / f"{task.behaviour}--{arm.name.replace(' ', '-')}"
    if not folder.exists():
        fit(backend, task, arm.steerer, sites=sites, progress=say).save(folder)
    return Steering.load(folder)


def moved(meter: Callable[..., Any], steering: Steering, strength: float) -> float:
    """Mean over steered tokens of the sum over blocks of |h' - h| / |h|."""
    lengths: list[float] = []
    meter([steering.edit(strength)], displacement=lengths)
    return float(np.mean(lengths)) * len(steering.interventions)


def reaching(length: Callable[[float], float], goal: float) -> float:
    """The strength at which tokens are moved so far, within 3 %, by secant in a bracket."""
    low, high, strength = 0.0, float("inf"), 1.0
    for _ in range(12):
        found = length(strength)
        if abs(found / goal - 1) < 0.03:
            break
        low, high = (strength, high) if found < goal else (low, strength)
        guess = strength * goal / max(found, 1e-9)
        strength = guess if low < guess < high else (low + min(high, 4 * strength)) / 2
    return strength


# --- results -------------------------------------------------------------------------------------


def sentence(figures: Sequence[Figure]) -> str:
    """Whether feedback pays: the closed loop against its open-loop twin."""
    own = [
        one
        for one in figures
        if one["asked"] in ("> 0", "< 0")
        and TWIN.name in one["figure"]
        and LOOK not in one["figure"]
    ]
    if not own:
        return "Whether feedback pays has not been measured yet."
    told, won = [], []
    for one in own:
        sign = 1 if one["asked"] == "> 0" else -1
        low, high = sorted((sign * one["low"], sign * one["high"]))
        won.append(low > 0)
        verdict = "ahead" if low > 0 else "behind" if high < 0 else "not told apart"
        told.append(
            f"{one['figure']}: {verdict} ({one['value']:+.3f}, {one['low']:+.3f} to "
            f"{one['high']:+.3f})"
        )
    lead = "Feedback pays here." if all(won) else "Feedback has not been shown to pay here."
    return " ".join([lead, *told])


def save(stage: str, figures: Sequence[Figure], seconds: float) -> None:
    """A stage's figures beside those of the others."""
    known = read_json(RESULTS, "figures") if RESULTS.exists() else {"stages": {}}
    parts = known["stages"] | {stage: {"seconds": round(seconds), "figures": list(figures)}}
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


def left(backend: HF, tasks: Sequence[Contrast]) -> str:
    """What the stages of cells have still to do, by what cells took so far."""
    told = []
    for name, rows in (("compare", None), ("levels", OTHERS)):
        for task in tasks:
            plan = cells(backend, [task], rows).plan()
            hours = "" if plan["seconds"] is None else f", about {plan['seconds'] / 3600:.1f} hours"
            told.append(
                f"{name}, {task.behaviour}: {plan['left']} of {plan['cells']} cells left, "
                f"{plan['evaluations']} evaluations{hours}"
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
    tasks = tasks_of(asked.data)[: asked.tasks]
    if asked.plan:
        print(left(backend, tasks), file=sys.stderr)
        return
    every = (linear, fitted, overhead, small, compared, levelled, displaced)
    ways: dict[str, Callable[..., list[Figure]]] = dict(zip(STAGES, every, strict=True))
    for name in chosen:
        # Stages that time what they do make it.
        backend.memo = Memo(WORK / "kept" if name in STAGES[3:] else None)
        started = time.perf_counter()
        more = {"jobs": asked.jobs} if name in ("compare", "levels") else {}
        save(name, ways[name](backend, tasks, **more), time.perf_counter() - started)


if __name__ == "__main__":
    main()

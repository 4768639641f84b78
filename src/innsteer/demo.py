"""The demo: fit INNSteer and DiffMean on a built-in behaviour, tune both, show what came of it."""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from innsteer import evaluation, fitting, tuning
from innsteer.backends.base import Progress, silent
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast
from innsteer.errors import InputError
from innsteer.files import fresh_folder, require_absent
from innsteer.models import load_model
from innsteer.report import Report
from innsteer.steerer import get
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

MODEL, BEHAVIOUR = "smollm2", "critical"
METHODS = ("diffmean", "innsteer")
PAIRS, HELD_OUT = 80, 20


@dataclass(frozen=True)
class Demo:
    """What the demo leaves behind, and what it took.

    Attributes:
        folder: holds the artifact and the report. seconds: wall time per stage.
        cpu_seconds: of this process, without loading the model. matmul_seconds: a fixed matrix
            product, so that a busy machine shows.
    """

    folder: Path
    artifact: Path
    report: Report
    seconds: dict[str, float]
    cpu_seconds: float
    matmul_seconds: float


def run(
    folder: str | Path, *, replace: bool = False, seed: int = 0, progress: Progress = silent
) -> Demo:
    """Fit, tune, evaluate and save, at preview size.

    Args:
        replace: an earlier demo in that folder, at the end and only if all went well.

    Raises:
        InputError: the folder exists; with ``replace``, it holds something else than a demo.
        MissingPackage: the scorer's is not there.
    """
    folder = Path(folder)
    if not (replace and folder.is_dir()) or folder.is_symlink():
        require_absent(folder)
    else:
        _require_demo(folder)
    evaluation.require_scorer(suites.meta(BEHAVIOUR)["scorer"])
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    progress("model", 0, 1)
    model = load_model(MODEL)
    progress("model", 1, 1)
    clock.lap("model")
    matmul = matmul_seconds()
    cpu = _cpu()
    contrast = _small(Contrast.load(BEHAVIOUR), seed)
    sites = [fitting.default_site(model)]
    acts = fitting.record_parts(model, contrast, sites, progress=progress)
    clock.lap("record")
    backend = HF(model)
    steerings: dict[str, Steering] = {}
    for name in METHODS:
        fitted = fitting.fit_rows(model, get(name), acts, seed=seed, progress=progress)
        clock.lap(f"fit {name}")
        steerings[name] = tuning.tune(
            backend,
            fitted,
            contrast,
            control_items=8,
            fractions=(0.5, 1.0, 1.5),
            preview=True,
            seed=seed,
            progress=progress,
        )
        clock.lap(f"tune {name}")
    suite = suites.load(Contrast.load(BEHAVIOUR)).preview()
    report = evaluation.compare(
        model, steerings, suite, sizes=evaluation.PREVIEW, seed=seed, progress=progress
    )
    clock.lap("evaluate")
    with fresh_folder(folder, replace=replace) as staging:
        for name, steering in steerings.items():
            steering.with_card(evaluation.card(report, name)).save(staging / name)
        report.save(staging / "report")
    clock.lap("save")
    return Demo(folder, folder / "innsteer", report, seconds, _cpu() - cpu, matmul)


def matmul_seconds(size: int = 1536, repeats: int = 5) -> float:
    """Median seconds of a float32 matrix product of this size: a measure of how busy we are."""
    a = torch.ones(size, size)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        _ = a @ a
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def _require_demo(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but an earlier demo."""
    marks = [folder / "innsteer" / "steering.json", folder / "report" / "report.html"]
    foreign = sorted({path.name for path in folder.iterdir()} - {*METHODS, "report"})
    if foreign or not all(mark.is_file() for mark in marks):
        raise InputError(
            f"{folder} is no earlier demo: it "
            + (f"holds {', '.join(foreign[:3])}" if foreign else "lacks innsteer/ or report/"),
            expected="a folder that the demo wrote, and nothing else in it",
            remedy="choose another name, or remove it first",
        )


def _small(contrast: Contrast, seed: int) -> Contrast:
    """Fewer training and validation items: the demo must be quick."""
    kept = [
        contrast.part("train").subset(PAIRS, seed),
        contrast.part("validation").subset(HELD_OUT, seed),
    ]
    return dataclasses.replace(contrast, items=tuple(item for part in kept for item in part.items))


class _Clock:
    """Wall seconds per stage."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = round(now - self._last, 2)
        self._last = now


def _cpu() -> float:
    """CPU seconds of this process and its threads."""
    times = os.times()
    return times.user + times.system

"""A comparison: its cells on disk, what was measured and what is left."""

import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innsteer import __version__
from innsteer.backends.base import Progress, silent
from innsteer.backends.hf import HF, Meter
from innsteer.comparing.contenders import Contender
from innsteer.comparing.search import Protocol
from innsteer.comparing.task import Cell, Task
from innsteer.contrast import Contrast
from innsteer.errors import BudgetError, InputError, UnknownName
from innsteer.files import canonical, read_json, write_json
from innsteer.models import LanguageModel
from innsteer.report.figures import PROMPT_ONLY
from innsteer.suites import behaviour as suites
from innsteer.suites.base import Benchmark
from innsteer.tuning import control_metric

NUMERIC = (
    np.linalg.LinAlgError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    OverflowError,
    FloatingPointError,
)
"""A fit whose numbers fail."""
MEASURED = 4
"""Part of what a cell is: raised where a change of code changes what cells hold."""


class Comparison:
    """Cells on disk: what was measured stays, what is missing can be run.

    Args:
        model: the plain model. tasks: a contrast each, with distinct behaviours.
        contenders: rows of the table, distinct. folder: of the cells; it is made, or continued.
        seeds: of the fits. instructions: of the prompt-only arm, by behaviour.

    Raises:
        InputError: no task or contender, or two of one name.
    """

    def __init__(
        self,
        model: LanguageModel | HF,
        tasks: Sequence[Contrast],
        folder: str | Path,
        *,
        contenders: Sequence[Contender],
        protocol: Protocol | None = None,
        seeds: Sequence[int] = (0,),
        instructions: Mapping[str, str] = {},
    ) -> None:
        for kind, named in (
            ("task", [task.behaviour for task in tasks]),
            ("contender", [one.name for one in contenders]),
            ("seed", list(map(str, seeds))),
        ):
            if not named or len(set(named)) < len(named):
                raise InputError(
                    f"{kind}s without distinct names: {', '.join(named) or 'none'}",
                    expected=f"at least one {kind}, all distinct",
                )
        self.backend = HF.of(model)
        self.tasks, self.contenders, self.seeds = tuple(tasks), tuple(contenders), tuple(seeds)
        if unknown := instructions.keys() - {task.behaviour for task in tasks}:
            raise UnknownName("behaviour", min(unknown), [task.behaviour for task in tasks])
        self.instructions = {
            task.behaviour: instructions.get(task.behaviour)
            or suites.meta(task).get("instruction", "")
            for task in tasks
        }
        self.protocol = protocol or Protocol.of(self.backend.model)
        self.folder = Path(folder)

    def cells(self) -> list[Cell]:
        """Every cell, in the order in which they run: seeds, tasks, contenders.

        What does not depend on a seed runs for the first one only.
        """
        return [
            Cell(contender, task, seed)
            for seed in self.seeds
            for task in self.tasks
            for contender in self.contenders
            if contender.dialled or seed == self.seeds[0]
            if contender.method != PROMPT_ONLY or self.instructions[task.behaviour]
        ]

    def path(self, cell: Cell) -> Path:
        """The file of a cell: named by all that decides its result."""
        contender, model = cell.contender, self.backend.model
        given = [contender.method, contender.input, contender.settings, contender.alone]
        key = {
            "contender": given,
            "task": [cell.task.behaviour, cell.task.hash],
            "seed": cell.seed,
            "model": [replace(model.fingerprint, name=""), str(model.model.dtype)],
            "protocol": asdict(self.protocol),
            "measured": MEASURED,
        }
        if contender.choices:
            key["choices"] = contender.choices
        if contender.method == PROMPT_ONLY:
            key["instruction"] = self.instructions[cell.task.behaviour]
        if isinstance(cell.task, Benchmark):
            key["benchmark"] = cell.task.extra()
        digest = hashlib.sha256(canonical(json.loads(json.dumps(key, default=str)))).hexdigest()
        return self.folder / "cells" / f"{digest[:24]}.json"

    def left(self) -> list[Cell]:
        """Cells that are not measured yet."""
        return [cell for cell in self.cells() if not self.path(cell).is_file()]

    def left_out(self) -> list[str]:
        """Cells that are not measured, in words: how many of each contender."""
        counts = Counter(cell.contender.name for cell in self.left())
        return [f"{name} on {count} of its cells" for name, count in counts.items()]

    def found(self) -> list[dict[str, Any]]:
        """Records of the cells that are measured."""
        paths = map(self.path, self.cells())
        return [read_json(path, "a cell") for path in paths if path.is_file()]

    def plan(self) -> dict[str, Any]:
        """What is left to do, and about how long it takes here by the cells that were measured.

        Without one of the same contender, the mean of all stands for it; without any, None.
        """
        left, took = self.left(), dict[str, list[float]]()
        for record in self.found():
            took.setdefault(record["contender"], []).append(record["seconds"])
        means = {name: float(np.mean(values)) for name, values in took.items()}
        usual = float(np.mean(list(means.values()))) if means else None
        per = [means.get(cell.contender.name, usual) for cell in left]
        return {
            "cells": len(self.cells()),
            "left": len(left),
            "evaluations": self.protocol.evaluations * sum(c.contender.dialled for c in left),
            "seconds": None if usual is None else sum(x for x in per if x is not None),
        }

    def context(self) -> dict[str, Any]:
        """What the figures hold for."""
        protocol = {name: str(value) for name, value in asdict(self.protocol).items()}
        return {
            "model": self.backend.model.name,
            "tasks": ", ".join(task.behaviour for task in self.tasks),
            "seeds": ", ".join(map(str, self.seeds)),
            **protocol,
            "innsteer": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }

    def run(self, *, jobs: int = 1, progress: Progress = silent) -> None:
        """Measure every cell that is missing, each written when it ends.

        A method that refuses, whose numbers fail, or that no strength brings within the budget,
        leaves a cell that says so. Interrupted, the same call goes on.

        Args:
            jobs: processes that share the cells, task by task, and the model's weights on the CPU;
                each has its part of the threads. What they time, they time on a busy machine.

        Raises:
            InputError: jobs below 1. MissingPackage: the scorer of a behaviour needs one.
        """
        if jobs < 1:
            raise InputError(f"{jobs} jobs", expected="at least 1")
        cells = self.cells()
        paths = {n: self.path(cell) for n, cell in enumerate(cells)}
        left = [n for n, path in paths.items() if not path.is_file()]
        if jobs == 1 or len(left) < 2:
            self._measure([cells[n] for n in left], progress)
            return
        context = torch.multiprocessing.get_context("spawn")
        stop = context.Event()
        threads = max(torch.get_num_threads() // jobs, 1)
        with ProcessPoolExecutor(
            jobs,
            mp_context=context,
            initializer=_begin,
            initargs=(self, threads, stop),
        ) as pool:
            at_work = [pool.submit(_share, numbers) for numbers in self._shares(left, jobs)]
            try:
                ended, waiting = set[Future[None]](), set(at_work)
                while waiting:
                    progress("cells", sum(paths[n].is_file() for n in left), len(left))
                    ended, waiting = wait(waiting, timeout=1, return_when=FIRST_EXCEPTION)
                    for one in ended:
                        one.result()
            except BaseException:
                stop.set()  # after the cell that each is at
                pool.shutdown(cancel_futures=True)
                raise
        progress("cells", len(left), len(left))

    def _shares(self, left: Sequence[int], jobs: int) -> list[list[int]]:
        """Numbers of cells, each list for one process to measure one after the other.

        Cells of one task share what is unsteered: they part only where processes would be idle.
        """
        cells, groups = self.cells(), dict[tuple[int, str], list[int]]()
        for number in left:
            cell = cells[number]
            groups.setdefault((cell.seed, cell.task.behaviour), []).append(number)
        parts = -(-jobs // len(groups))
        return [share for own in groups.values() for n in range(parts) if (share := own[n::parts])]

    def _measure(
        self,
        cells: Sequence[Cell],
        progress: Progress = silent,
        neutral: dict[Any, Meter] | None = None,
    ) -> None:
        """Measure cells in their order; ``neutral`` keeps meters that all tasks share."""
        task, neutral = None, {} if neutral is None else neutral
        for number, cell in enumerate(cells):
            progress(cell.title, number, len(cells))
            if task is None or task.contrast is not cell.task:
                instruction = self.instructions[cell.task.behaviour]
                task = Task(self.backend, cell.task, self.protocol, instruction, neutral)
            started = time.perf_counter()
            try:
                found = task.measure(cell)
            except (BudgetError, InputError, *NUMERIC) as error:
                found = {"failed": str(error)}
            record = {
                "contender": cell.contender.name,
                "method": cell.contender.method,
                "input": cell.contender.input,
                "fields": dict(cell.contender.fields),
                "task": cell.task.behaviour,
                "control": control_metric(cell.task),
                "measures": task.suite.scorers,
                "seed": cell.seed,
                "innsteer": __version__,
                "seconds": time.perf_counter() - started,
                **found,
            }
            self.path(cell).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path(cell), _tidy(record))


_mine: list[tuple[Comparison, Any, dict[Any, Meter]]] = []
"""Of a process that shares a comparison's cells with others, what tells it to stop, and meters that
its tasks share."""


def _begin(comparison: Comparison, threads: int, stop: Any) -> None:
    torch.set_num_threads(threads)
    _mine.append((comparison, stop, {}))


def _share(numbers: Sequence[int]) -> None:
    comparison, stop, neutral = _mine[0]
    cells = comparison.cells()

    def heed(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    comparison._measure([cells[number] for number in numbers], heed, neutral)


def _tidy(value: Any) -> Any:
    """Numbers to six digits: a table's cells are many."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _tidy(part) for key, part in value.items()}
    return [_tidy(part) for part in value] if isinstance(value, list | tuple) else value

"""The engine in this process, for work without a server: answers, scores and activations."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from vllm import LLM, SamplingParams

from innsteer.backends.memo import digest
from innsteer.backends.menu import MARK, Menu, Order, offered
from innsteer.backends.ragged import SLOTS
from innsteer.backends.vllm_plugin import gate, settings
from innsteer.errors import NothingSteeredError, RefusedError
from innsteer.interventions import Edit
from innsteer.models import Encoded

Job = tuple[Encoded, Sequence[Sequence[float]], Mapping[str, Any]]
"""Tokens, one row of coefficients per edit, and what vLLM's SamplingParams take."""


class Said(NamedTuple):
    """What came of a request: new tokens, or log-probabilities of a given answer's.

    ``greedy``: whether each token of the given answer was the most probable.
    """

    ids: list[int]
    scores: tuple[float, ...]
    greedy: bool
    steered: int


class Runner:
    """vLLM under edits that change from call to call; one in a process.

    Args:
        model: a folder, or a Hub id. layers: how many blocks it has.
        untested, engine: see ``innsteer serve``, and vLLM's own arguments.

    Raises:
        RefusedError: this vLLM or configuration is not one that the plugin is for, or the engine
            would not run in this process.
    """

    def __init__(
        self, model: str | Path, *, layers: int, untested: bool = False, **engine: Any
    ) -> None:
        gate.check_names()
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise RefusedError(
                "vLLM in processes of its own, under edits that change from call to call",
                expected="VLLM_ENABLE_V1_MULTIPROCESSING=0",
                remedy="set it before vllm is imported",
            )
        config: settings.Config = {
            "steerings": {},
            "layers": list(range(layers)),
            "untested": untested,
        }
        self._llm = LLM(str(model), additional_config={MARK: config}, **engine)
        self._menu: Menu = settings.menu(config)
        core = self._llm.llm_engine.engine_core.engine_core
        self._desk = core.model_executor.driver_worker.worker.innsteer

    def run(
        self,
        rows: Sequence[Encoded],
        edits: Sequence[Edit],
        coefs: Sequence[Sequence[Sequence[float]]],
        sampling: Sequence[Mapping[str, Any]],
    ) -> list[Said]:
        """What requests gave under edits.

        Args:
            rows: tokens; what follows a prompt is a given answer.
            coefs: per row, per edit: one strength per behaviour.
            sampling: per row what vLLM's SamplingParams take.

        Raises:
            NothingSteeredError: edits that are not 0 touched no token of any row.
        """
        self._offer(edits)
        jobs = list(zip(rows, coefs, sampling, strict=True))
        said: list[Said] = []
        try:
            # No more at once than receipts are kept for.
            for start in range(0, len(jobs), SLOTS // 2):
                said += self._answer(jobs[start : start + SLOTS // 2])
        finally:
            self._offer(())
        asked = any(any(coef) for row in coefs for coef in row)
        if asked and not any(one.steered for one in said):
            raise NothingSteeredError("no token was steered", expected="one in some edit's scope")
        return said

    def read(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> list[dict[int, Tensor]]:
        """The outputs of some blocks for every token of plain sequences, ``[tokens, d]``."""
        params = SamplingParams(max_tokens=1, skip_reading_prefix_cache=True)
        given = [{"prompt_token_ids": list(ids)} for ids in sequences]
        with self._desk.watching(layers) as seen:
            outputs = self._llm.generate(given, params, use_tqdm=False)
        # Inside the engine a request's name has a random end.
        named = {name.rpartition("-")[0]: rows for name, rows in seen.items()}
        return [named[output.request_id] for output in outputs]

    def _offer(self, edits: Sequence[Edit]) -> None:
        """Edits as the engine's whole menu."""
        self._menu.dishes.clear()
        self._desk.ragged.clear()
        for number, edit in enumerate(edits):
            dish = offered(f"e{number}", edit, digest(edit.interventions))
            self._menu.add(dish)
            self._desk.add(dish)

    def _answer(self, jobs: Sequence[Job]) -> list[Said]:
        """Some requests, together in the engine."""
        params, orders = [], []
        for number, (row, coefs, how) in enumerate(jobs):
            text, order = self._order(row, coefs, how["max_tokens"], f"row-{number}")
            extra = {
                "steering": text,
                "steering_prompt": row.prompt,
                "steering_turns": [end for turn in row.turns for end in turn],
                "steering_receipt": f"row-{number}",
            }
            params.append(SamplingParams(extra_args=extra if order else None, **how))
            orders.append(order)
        given = [{"prompt_token_ids": list(row.ids)} for row, *_ in jobs]
        outputs = self._llm.generate(given, params, use_tqdm=False)
        each = zip(outputs, jobs, orders, strict=True)
        return [self._said(output, row, order) for output, (row, *_), order in each]

    def _order(
        self, row: Encoded, coefs: Sequence[Sequence[float]], tokens: int, receipt: str
    ) -> tuple[str, Order | None]:
        """What a row's request asks for: the edits that have a token of it in scope, if any."""
        how: dict[str, Any] = {
            "prompt": row.prompt,
            "length": len(row.ids) + tokens - 1,
            "turns": row.turns,
        }
        texts = []
        for dish, coef in zip(self._menu.dishes, coefs, strict=True):
            named = zip(dish.asked_as, coef, strict=True)
            text = "+".join(f"{name}@{value!r}" for name, value in named)
            with suppress(NothingSteeredError):
                if self._menu.order(text, **how).choices:
                    texts.append(text)
        text = "+".join(texts)
        return text, self._menu.order(text, receipt=receipt, **how) if text else None

    def _said(self, output: Any, row: Encoded, order: Order | None) -> Said:
        """One request's outcome."""
        new, answer = list(output.outputs[0].token_ids), row.ids[row.prompt :]
        # Nothing is asked of what follows an answer's last token; ``HF`` does not run it.
        length = max(row.prompt, len(row.ids) - 1) if answer else len(row.ids) + len(new) - 1
        if order is not None:
            found = dict(self._desk.receipt(order.receipt) or ())
            due = [c.number for c in order.choices if c.within(0, length)]
            if missed := [number for number in due if number not in found]:
                raise NothingSteeredError(f"edits {missed} touched no token of a row")
        steered = order.tokens(length) if order else 0
        if not answer:
            return Said(new, (), True, steered)
        steps = zip(output.prompt_logprobs[row.prompt :], answer, strict=True)
        each = [step[token] for step, token in steps]
        greedy = all(one.rank == 1 for one in each)
        return Said([], tuple(one.logprob for one in each), greedy, steered)


def uncompiled(model: nn.Module) -> None:
    """Let a model of transformers run as transformers would, hooks and all.

    For architectures that vLLM has no model of its own for, it replaces ``__call__`` of
    transformers' classes, in the whole process, by one that compiles and knows no hooks.
    """
    for part in model.modules():
        kind = type(part)
        if kind.__call__ is not nn.Module.__call__:
            own = {"__call__": nn.Module.__call__, "__module__": kind.__module__}
            part.__class__ = type(kind.__name__, (kind,), own)

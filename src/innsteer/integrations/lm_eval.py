"""lm-eval's tasks on a steered model. A steering is read from safetensors, never from a pickle."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

from innsteer.backends.base import Progress, silent
from innsteer.backends.hf import HF
from innsteer.errors import InputError, MissingPackage, NothingSteeredError, PositionError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.models import Encoded, LanguageModel
from innsteer.report.figures import UNSTEERED
from innsteer.steering import Steering

try:
    from lm_eval import __version__ as version
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise MissingPackage("lm-eval", "a task of lm-eval", "eval") from error

STEERED = "steered"


class SteeredLM(HFLM):
    """lm-eval's own Hugging Face model, run under edits; without any it is that model, to the bit.

    A request's prompt is what lm-eval calls its context, so that scope ``generated`` steers the
    context's last token and the continuation. Of a text scored whole, the prompt is the one token
    that lm-eval puts before each window of it.

    Args:
        model: from ``load_model``, or a backend with the batch sizes to use.
        edits: applied to every request, at the same strength.

    Attributes:
        steered: tokens that were edited so far; of a generation also those after a row's end, which
            the model runs on with its batch.

    Raises:
        InputError: an edit with a strength for each sequence.
        PositionError: scope ``assistant``: lm-eval gives texts, in which past turns are not marked.
        NothingSteeredError: requests in which no token was in scope, when they are run.
    """

    def __init__(self, model: LanguageModel | HF, edits: Sequence[Edit] = ()) -> None:
        if any(edit.where.scope == "assistant" for edit in edits):
            raise PositionError(
                "scope 'assistant' on lm-eval's texts, in which past turns are not marked",
                expected="scope 'generated', 'prompt', 'all' or a range",
            )
        if any(edit.coef.ndim > 1 for edit in edits):
            raise InputError("a strength for each sequence", expected="one for all requests")
        runner = HF.of(model)
        super().__init__(
            pretrained=runner.model.model,
            tokenizer=runner.model.tokenizer,
            batch_size=runner.batch,
        )
        self._runner, self._edits, self.steered = runner, list(edits), 0

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, and whether greedy decoding would give it."""
        if not self._edits:
            plain: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return plain
        rows = []
        for _, context, continuation in requests:
            # Cut from the left as lm-eval does: the last token is scored and never run.
            ids = tuple(context + continuation)[-(self.max_length + 1) :]
            rows.append(Encoded(ids, len(ids) - len(continuation), ()))
        scored = self._runner.score_encoded(rows, self._edits)
        self.steered += sum(one.steered for one in scored)
        return [(sum(one.log_probs), one.greedy) for one in scored]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **how: Any
    ) -> Tensor:
        """Prompts and continuations ``[batch, tokens]``."""
        if not self._edits:
            plain: Tensor = super()._model_generate(context, max_length, stop, **how)
            return plain
        with Attachment(self._runner.model, self._edits) as attached:
            made: Tensor = super()._model_generate(context, max_length, stop, **how)
        self.steered += attached.trace.touched
        return made


def run_tasks(
    model: LanguageModel | HF,
    steering: Steering,
    tasks: Sequence[str],
    *,
    strength: float | str | Mapping[str, float | str] | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Tasks of lm-eval on the plain model and on the steered one.

    Args:
        tasks: names of tasks, groups or tags, of lm-eval or in ``include_path``.
        strength: one, or a mix of behaviours; see ``Steering.edit``.
        include_path: a folder with YAML files of further tasks; its ``!function`` lines run code.
        limit: at most so many items of each task; default: all.
        shots: worked examples before each question; default: as the task says.
        chat: put prompts into the model's chat template.

    Returns:
        Plain data: model, identity, strengths, how often a token was edited, and for each task,
        metric and filter the number of items, and of both arms the value with its standard error.

    Raises:
        InputError: no such task or folder. MismatchError: the steering is another model's.
        NothingSteeredError: no token was edited, at a strength other than 0.
    """
    runner = HF.of(model)
    steering.check(runner.model)
    edit = steering.edit(strength)
    manager = _manager(tasks, include_path)
    arms = {UNSTEERED: SteeredLM(runner), STEERED: SteeredLM(runner, [edit])}
    found = {}
    for n, (arm, lm) in enumerate(arms.items()):
        progress(f"{arm}: lm-eval", n, len(arms))
        with redirect_stdout(sys.stderr):  # it prints; a verb's own output is JSON
            found[arm] = simple_evaluate(
                lm,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                apply_chat_template=chat,
                log_samples=False,
            )
    if edit.coef.any() and not arms[STEERED].steered:
        raise NothingSteeredError(
            f"{', '.join(tasks)} ran without one edited token", expected="at least one"
        )
    return {
        "model": runner.model.name,
        "identity": steering.identity,
        "strengths": dict(zip(steering.behaviours, edit.coef.tolist(), strict=True)),
        "steered_tokens": arms[STEERED].steered,
        "lm_eval": version,
        "limit": limit,
        "tasks": list(_rows(found)),
    }


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """The index of tasks: of the folder alone where that has them all, which takes no scan."""
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"no folder {str(include_path)!r}", expected="one with tasks as YAML")
    manager, missing = None, list(tasks)
    for defaults in (False, True):
        if missing and (defaults or include_path is not None):
            manager = TaskManager(include_path=include_path, include_defaults=defaults)
            missing = [name for name in tasks if not manager.match_tasks([name])]
    if manager is None or missing:
        raise InputError(
            f"no task {', '.join(map(repr, missing))}" if missing else "no task",
            expected="tasks, groups or tags of lm-eval, or those of a folder of yours",
            remedy="`lm_eval ls tasks` lists its own; name the folder of yours as include path",
        )
    return manager


def _rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each task, metric and filter, with both arms side by side."""
    first = found[UNSTEERED]
    for task, figures in first["results"].items():
        for key in figures:
            metric, mark, how = key.partition(",")
            if not mark or metric.endswith("_stderr"):
                continue
            better = first["higher_is_better"].get(task, {}).get(metric)
            yield {
                "task": task,
                "metric": metric,
                "filter": how,
                "n": first["n-samples"].get(task, {}).get("effective"),
                "better": {True: "higher", False: "lower"}.get(better, "neither"),
                **{
                    arm: {
                        "value": one["results"][task][key],
                        "stderr": _number(one["results"][task].get(f"{metric}_stderr,{how}")),
                    }
                    for arm, one in found.items()
                },
            }


def _number(value: Any) -> float | None:
    """A standard error, where lm-eval has one."""
    return float(value) if isinstance(value, int | float) else None

"""Which vLLM this is for, what it touches there, and which configurations it refuses.

vLLM has no place for such a plugin, so a few private names are wrapped. Each is checked before
anything is: a name that moved must stop the start, and not leave an engine that steers nothing.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import vllm

from innsteer.errors import RefusedError

FIRST, END = (0, 32), (0, 35)
TESTED = {(0, 32)}
"""Versions whose tests have run; the others between start only when told to."""
NAMES = {
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs": ("prompt", "params"),
    "vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys": (
        "request",
        "start_token_idx",
        "end_token_idx",
        "start_mm_idx",
    ),
    "vllm.v1.worker.gpu_worker.Worker.load_model": ("self",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model": ("scheduler_output",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs": (
        "scheduler_output",
        "num_scheduled_tokens",
    ),
}
"""Private names that are wrapped or relied upon, and parameters that they must have."""
V2 = {
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model": ("scheduler_output",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs": ("scheduler_output",),
}
"""Those of the V2 runner, which is imported only where it runs."""


def check_names(names: Mapping[str, tuple[str, ...]] = NAMES) -> None:
    """Whether this vLLM is one that the plugin is for.

    Raises:
        RefusedError: another version, or a name that is not there or takes other parameters.
    """
    if not FIRST <= _version() < END:
        raise RefusedError(
            f"vLLM {vllm.__version__}",
            expected="0.32 up to, but not, 0.35",
            remedy="install one of those",
        )
    for name, parameters in names.items():
        found = _find(name)
        own = list(inspect.signature(found).parameters) if callable(found) else []
        if missing := [parameter for parameter in parameters if parameter not in own]:
            raise RefusedError(
                f"vLLM {vllm.__version__}, whose {name} takes {own or 'nothing: it is gone'}",
                expected=f"parameters {', '.join(missing)}",
                remedy="install a vLLM that this version of innsteer was tested with",
            )


def check_config(vllm_config: Any, untested: bool) -> None:
    """Whether an engine of this configuration would steer right.

    Args:
        untested: let through what no test has run yet.

    Raises:
        RefusedError: it would not, or nobody has seen it do so.
    """
    parallel = vllm_config.parallel_config
    wrong = {
        "microbatches (--enable-dbo)": parallel.enable_dbo or parallel.ubatch_size,
        "context parallelism": parallel.prefill_context_parallel_size > 1
        or parallel.decode_context_parallel_size > 1,
        "sequence parallelism": parallel.enable_hc_sp or parallel.use_sequence_parallel_moe,
    }
    unproven = {
        f"vLLM {vllm.__version__}": _version() not in TESTED,
        "a GPU": vllm_config.device_config.device_type != "cpu",
        "the V2 model runner": vllm_config.use_v2_model_runner,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "a quantised model": vllm_config.model_config.quantization is not None,
        "a KV connector": vllm_config.kv_transfer_config is not None,
    }
    if refused := [name for name, found in wrong.items() if found]:
        raise RefusedError(
            f"steering with {', '.join(refused)}",
            expected="an engine in which a pass holds whole rows of the residual stream",
            remedy="leave the flags out that ask for it",
        )
    if (refused := [name for name, found in unproven.items() if found]) and not untested:
        raise RefusedError(
            f"steering with {', '.join(refused)}, which no test has run",
            expected="what the compatibility matrix calls tested",
            remedy="start it with --steering-untested, and measure before you trust it",
        )


def _version() -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())


def _find(name: str) -> Any:
    """What a dotted name stands for; None: nothing."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found
    return None

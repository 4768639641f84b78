"""Requests on entry: the string becomes an order, or the request is refused before it costs a pass.

And in the engine: blocks of cached keys and values in which something is steered get a key of
their own, so that no other request reads them.
"""

from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.input_processor import InputProcessor

from innsteer.backends.menu import MARK, Order
from innsteer.backends.vllm_plugin import monitoring, settings
from innsteer.errors import InnsteerError, InputError

TEXT, PROMPT, TURNS, RECEIPT = (
    "steering",
    "steering_prompt",
    "steering_turns",
    "steering_receipt",
)
"""What a request may hold in ``vllm_xargs``."""


def install() -> None:
    """Wrap vLLM's two functions; a second time does nothing."""
    if not hasattr(InputProcessor.process_inputs, MARK):
        InputProcessor.process_inputs = _admitting(InputProcessor.process_inputs)
    if not hasattr(kv_cache_utils.generate_block_hash_extra_keys, MARK):
        kv_cache_utils.generate_block_hash_extra_keys = _apart(
            kv_cache_utils.generate_block_hash_extra_keys
        )


def order_of(params: Any) -> Order | None:
    """The order that a request was admitted with."""
    extra = getattr(params, "extra_args", None) or {}
    return Order.from_json(extra[MARK]) if MARK in extra else None


def _admitting(process_inputs: Any) -> Any:
    """``process_inputs`` whose requests hold orders."""

    @wraps(process_inputs)
    def admitting(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        try:
            _admit(self.vllm_config, request)
        except InnsteerError as error:
            monitoring.REFUSED.inc()
            raise VLLMValidationError(str(error), parameter=TEXT) from error
        return request

    setattr(admitting, MARK, True)
    return admitting


def _admit(vllm_config: Any, request: Any) -> None:
    """Put the order into a request that asks for one."""
    params = request.sampling_params
    given = dict(getattr(params, "extra_args", None) or {})
    asked = {name: given.pop(name) for name in (TEXT, PROMPT, TURNS, RECEIPT) if name in given}
    if MARK in given:
        raise InputError(f"{MARK!r} in vllm_xargs", expected=f"what is steered by as {TEXT!r}")
    if not asked:
        return
    config = settings.of(vllm_config)
    if config is None:
        raise InputError(
            "a steering for an engine that has none", remedy="innsteer serve --steering"
        )
    text, receipt = asked.get(TEXT), asked.get(RECEIPT, "")
    if not isinstance(text, str) or not isinstance(receipt, str):
        raise InputError(f"{TEXT} {text!r}", expected='a string like "cheerful@0.8"')
    for what, found in (
        ("embeddings for a prompt", request.prompt_token_ids is None),
        ("a streamed prompt", request.resumable),
        ("a LoRA", request.lora_request is not None),
        ("images or sound", bool(request.mm_features)),
    ):
        if found:
            raise InputError(
                f"a steering beside {what}",
                expected="a prompt of tokens alone",
                remedy="leave one of the two out",
            )
    tokens = len(request.prompt_token_ids)
    prompt = asked.get(PROMPT, tokens)
    if not isinstance(prompt, int) or not 0 < prompt <= tokens:
        raise InputError(f"{PROMPT} {prompt!r}", expected=f"a number of tokens from 1 to {tokens}")
    menu = settings.menu(config)
    order = menu.order(
        text,
        prompt=prompt,
        length=tokens + params.max_tokens - 1,
        scored=params.prompt_logprobs is not None and PROMPT not in asked,
        turns=_turns(asked.get(TURNS)),
        receipt=receipt,
    )
    if menu.contextual(order):
        # Its prompt must go by: a cached one would leave nothing to read.
        params.skip_reading_prefix_cache = True
    params.extra_args = given | {MARK: order.to_json()}


def _turns(given: Any) -> list[tuple[int, int | None]] | None:
    """Assistant turns from a flat list of starts and ends; an end of -1 is none."""
    if given is None:
        return None
    if not isinstance(given, list) or len(given) % 2 or not all(type(n) is int for n in given):
        raise InputError(f"{TURNS} {given!r:.100}", expected="a list START, END, START, END ...")
    pairs = zip(given[::2], given[1::2], strict=True)
    return [(start, None if stop == -1 else stop) for start, stop in pairs]


def _apart(extra_keys: Any) -> Any:
    """``generate_block_hash_extra_keys`` with a key of their own for steered blocks."""

    @wraps(extra_keys)
    def apart(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, index = extra_keys(request, start_token_idx, end_token_idx, start_mm_idx)
        order = _ordered(request)
        salt = order.key(start_token_idx, end_token_idx) if order else None
        return ((*(keys or ()), (MARK, salt)) if salt else keys), index

    setattr(apart, MARK, True)
    return apart


def _ordered(request: Any) -> Order | None:
    """The order of a request in the engine, read once."""
    if not isinstance(request.sampling_params, SamplingParams):
        return None
    if not hasattr(request, MARK):
        setattr(request, MARK, order_of(request.sampling_params))
    found: Order | None = getattr(request, MARK)
    return found

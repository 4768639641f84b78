"""Load a causal language model, find its parts, and turn conversations into token ids.

Knows models, tokenizers and chat templates; nothing of steering.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from innsteer.errors import InputError, LayoutError, PositionError
from innsteer.models.fingerprint import Fingerprint, fingerprint
from innsteer.models.layout import Layout, find_layout
from innsteer.models.smollm2 import (
    HUB_ID,
    hub_reachable,
    load_gguf,
    quiet_transformers,
    smollm2_folder,
)

__all__ = [
    "Encoded",
    "Fingerprint",
    "LanguageModel",
    "Layout",
    "Message",
    "find_layout",
    "load_model",
]

Message = Mapping[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


STATES = 64
"""Tokens of a text that is encoded by a model's first blocks, at most."""


class _Enough(BaseException):
    """Ends a forward pass at the last block asked for; never leaves this module."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids, with what the scopes of steering need to know about it."""

    ids: tuple[int, ...]
    prompt: int
    """Number of prompt tokens; what follows are the tokens of a given answer."""
    turns: tuple[tuple[int, int], ...]
    """Half-open spans of all assistant turns, the open one last: each from the token before the
    turn's first, whose activation makes that first token, to the turn's last, its end mark
    included. The open one ends with the ids; generated tokens prolong it."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model with its tokenizer and the layout of its parts; a shell that owns nothing else."""

    model: Any
    tokenizer: Any
    layout: Layout
    name: str

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> "LanguageModel":
        """A LanguageModel around a model and tokenizer in memory; neither is changed.

        Raises:
            LayoutError: the model's parts could not be found.
            InputError: one of PEFT's that puts tokens of its own before the prompt.
        """
        model = unwrapped(model)
        return cls(model, tokenizer, find_layout(model), name or type(model).__name__)

    @property
    def head_width(self) -> int | None:
        """Dimensions of one attention head, by the model's config; None where that does not say."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        hidden = getattr(config, "hidden_size", None)
        found = getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None)
        return int(found) if found else None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return torch.device(next(iter(self.model.parameters())).device)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Digests of structure, weights, tokenizer and template, taken on first use and kept."""
        return fingerprint(self.model, self.tokenizer, name=self.name)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a turn: those of the generation config and the tokenizer's own."""
        config = getattr(self.model, "generation_config", None)
        stops = getattr(config, "eos_token_id", None)
        every = [*(stops if isinstance(stops, list) else [stops]), self.tokenizer.eos_token_id]
        return frozenset(stop for stop in every if stop is not None)

    def encode(
        self, conversation: str | Sequence[Message], *, answer: str | None = None
    ) -> Encoded:
        """Token ids of a conversation up to the point where the assistant answers.

        Args:
            conversation: one user turn, or messages with ``role`` and ``content`` of which the last
                is not the assistant's. A model without a chat template takes plain text alone.
            answer: text of the open turn; its tokens follow the prompt's, which stay as they are,
                and no end mark is added.

        Raises:
            InputError: the messages are malformed, or there is no chat template for them.
            PositionError: the template changes earlier turns as a conversation grows, so that past
                assistant turns cannot be told apart.
        """
        messages = _messages(conversation)
        if self.tokenizer.chat_template:
            text = self._render(messages, opened=True)
            ids = self._ids(text)
            past = [
                self._turn(messages, index, ids)
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        elif isinstance(conversation, str):
            text, past = conversation, []
            ids = self._ids(text, special=True)
        else:
            raise InputError(
                f"messages for {self.name!r}, whose tokenizer has no chat template",
                expected="plain text",
                remedy="pass a string, or set tokenizer.chat_template",
            )
        if not ids:
            raise InputError("an empty prompt", expected="at least one token")
        full = ids if not answer else self._continued(text, ids, answer)
        return Encoded(tuple(full), len(ids), (*past, (len(ids) - 1, len(full))))

    @torch.no_grad()
    def short(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that ``states`` takes.

        Raises:
            InputError: an empty text, or one of more than ``STATES`` tokens.
        """
        ids = self._ids(text, special=True)
        if not text.strip() or len(ids) > STATES:
            raise InputError(
                f"{text!r:.60} of {len(ids)} tokens",
                expected=f"a text of 1 to {STATES} tokens",
                remedy="say it shorter",
            )
        return tuple(ids)

    def states(self, text: str, blocks: int) -> Tensor:
        """Hidden states ``[tokens, d]`` of a text after the first blocks and the last norm.

        In float32: a small encoder that every model brings along. Hooks on the model act on it, an
        attached steering's too; one that is told a text takes the plain model's.

        Args:
            text: at most ``STATES`` tokens, without a template.
            blocks: how many run, from 1.

        Raises:
            InputError: an empty or longer text, or more blocks than there are.
        """
        ids = self.short(text)
        if not 1 <= blocks <= len(self.layout.blocks):
            raise InputError(
                f"{blocks} blocks", expected=f"1 to {len(self.layout.blocks)}, of this model"
            )
        found: list[Any] = []
        last = self.layout.blocks[blocks - 1].module
        handle = last.register_forward_hook(lambda _, args, output: found.append(output))
        try:
            with until(last):
                self.model.base_model(torch.tensor([ids], device=self.device), use_cache=False)
        finally:
            handle.remove()
        h = found[0][0] if isinstance(found[0], tuple) else found[0]
        states: Tensor = last_norm(self.model.base_model, self.layout.width)(h)[0].float()
        return states

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _render(self, messages: Sequence[Message], *, opened: bool) -> str:
        """The template's text, with the header of a new assistant turn if opened."""
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=opened,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template of {self.name!r} refuses the roles [{roles}]: {error}",
                expected="a conversation that it accepts",
            ) from error
        return str(rendered)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text; a template writes its special tokens itself, so none are added to it."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _turn(self, messages: Sequence[Message], index: int, ids: list[int]) -> tuple[int, int]:
        """The span of a past assistant turn, from the lengths of the prefixes that frame it."""
        try:
            before = self._ids(self._render(messages[:index], opened=True))
            after = self._ids(self._render(messages[: index + 1], opened=False))
        except InputError as error:
            raise PositionError(
                f"message {index}: its prefix cannot be rendered: {error}"
            ) from error
        if not before or ids[: len(before)] != before or ids[: len(after)] != after:
            raise PositionError(
                f"the start of assistant message {index} cannot be found: the conversation up to "
                "it does not render to a prefix of the whole one",
                expected="a chat template that leaves earlier turns as they were",
                remedy="use a scope other than 'assistant', or give the spans yourself",
            )
        # What the template puts after the end mark (a newline) is no token of the turn.
        stops = [at for at in range(len(before), len(after)) if ids[at] in self.stop_ids]
        return len(before) - 1, stops[-1] + 1 if stops else len(after)

    def _continued(self, text: str, ids: list[int], answer: str) -> list[int]:
        """Prompt and answer: tokenised as one text where that leaves the prompt's ids alone."""
        whole = self._ids(text + answer, special=not self.tokenizer.chat_template)
        if whole[: len(ids)] == ids:
            return whole
        return ids + self._ids(answer)


@contextmanager
def until(module: nn.Module) -> Iterator[None]:
    """A forward pass inside ends after a module, and after the hooks that it has by now."""

    def stop(*_: object) -> None:
        raise _Enough

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


def last_norm(base: nn.Module, width: int) -> nn.Module:
    """The norm behind the blocks: the one part of the base model that scales rows of its width.

    Raises:
        LayoutError: there is none, or several.
    """
    found = [
        part
        for part in base.children()
        if (own := list(part.parameters(recurse=False)))
        and all(weight.shape == (width,) for weight in own)
    ]
    if len(found) != 1:
        raise LayoutError(
            f"{type(base).__name__} has {len(found)} norms behind its blocks", expected="one"
        )
    return found[0]


def unwrapped(model: Any) -> Any:
    """The transformers model in one of PEFT's, its adapters in place; any other as it is.

    Raises:
        InputError: PEFT puts tokens of its own before the prompt.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise InputError(
            f"a model under {model.active_peft_config.peft_type.value} of PEFT",
            expected="adapters of weights, such as LoRA: learned prompts shift every position",
            remedy="steer the model without them, or train a LoRA in their place",
        )
    return model.get_base_model()


def load_model(
    source: str | Path = "smollm2",
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    quantization: Any = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a causal language model from safetensors or GGUF; no code and no pickle is ever run.

    Args:
        source: ``"smollm2"`` (SmolLM2-135M-Instruct, made once in the cache folder), a local
            folder, a ``.gguf`` file, or a Hub id.
        dtype: float32, bfloat16 or float16; GGUF weights are dequantised.
        device: where the model goes; default: the CPU.
        device_map: spread it over devices as ``transformers`` does, ``"auto"`` or module to device;
            each site's map goes where its block is. Needs accelerate.
        quantization: a quantisation config of ``transformers``; its own library must be installed.
        revision: branch, tag or commit of a Hub id.

    Raises:
        InputError: there is no such model, its weights are no safetensors, a part of it would lie
            on disk, or what quantises it is missing.
        LayoutError: the model's parts could not be found.
        MissingPackage: a GGUF file, and the packages that read it are not installed.
    """
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None or kind not in DTYPES.values():
        raise InputError(f"dtype {dtype!r}", expected="one of " + ", ".join(DTYPES))
    if device is not None and device_map is not None:
        raise InputError(f"device {str(device)!r} beside a device_map", expected="one of them")
    place = _device(device or "cpu")
    path = Path(source).expanduser()
    how: dict[str, Any] = {
        name: value
        for name, value in (("device_map", device_map), ("quantization_config", quantization))
        if value is not None
    }
    if str(source) == "smollm2" and not path.is_dir():
        model, tokenizer = _load(str(smollm2_folder()), dtype=kind, local=True, **how)
        name = "smollm2"
    elif path.suffix == ".gguf" and path.is_file():
        if how:
            raise InputError(
                f"{', '.join(how)} for the GGUF file {path.name}",
                expected="neither: its weights are dequantised on one device",
                remedy="save it as safetensors first: load_model(file).model.save_pretrained(...)",
            )
        model, tokenizer = load_gguf(path)
        name = path.name
    elif path.is_dir():
        model, tokenizer = _load(str(path), dtype=kind, local=True, **how)
        name = path.resolve().name
    elif isinstance(source, str) and hub_id(source):
        # Without an answer only what is in the Hub's cache can be had, and that without retries.
        local = not hub_reachable(source)
        model, tokenizer = _load(source, dtype=kind, local=local, revision=revision, **how)
        name = source
    else:
        raise InputError(
            f"no model {str(source)!r}",
            expected='"smollm2", a folder with config.json, a .gguf file or a Hub id "owner/name"',
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise InputError(
            f"a device_map that leaves weights of {name!r} on disk",
            expected="every weight on a device: a fingerprint reads them all",
            remedy="give more memory, a smaller dtype, or a map without 'disk'",
        )
    # Quantised weights keep their own types, and a map its own devices.
    if getattr(model, "hf_quantizer", None) is None and device_map is None:
        model.to(device=place, dtype=kind)
    elif device is not None:
        model.to(device=place)
    model.eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return LanguageModel.wrap(model, tokenizer, name=name)


def hub_id(name: str) -> str | None:
    """The Hub id behind a model's name, if there is one; a folder's or a file's name is none."""
    if name == "smollm2":
        return HUB_ID
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.gguf)", name) else None


def _device(device: str | torch.device) -> torch.device:
    """A device that this machine has; asked before anything is loaded."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    # What PyTorch raises depends on the device, and on what it was built for.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise InputError(
            f"device {str(device)!r}: {reason}", expected="one of " + ", ".join(known)
        ) from error


def _load(
    source: str, *, dtype: torch.dtype, local: bool, revision: str | None = None, **how: Any
) -> tuple[Any, Any]:
    """Model and tokenizer by transformers, without remote code and without pickled weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                revision=revision or "main",
                local_files_only=local,
                trust_remote_code=False,
                use_safetensors=True,
                # With peft installed an adapter is looked for too, by rules of its own.
                adapter_kwargs={"local_files_only": local},
                **how,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                source,
                revision=revision or "main",
                local_files_only=local,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"no model could be loaded from {source!r}: {reason[0]}",
            expected="a causal language model with safetensors weights and a tokenizer",
            remedy="the Hub was not reached" if local and not Path(source).is_dir() else "",
        ) from error
    return model, tokenizer


def _messages(conversation: str | Sequence[Message]) -> list[Message]:
    """The conversation as checked messages."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    messages = list(conversation)
    for index, message in enumerate(messages):
        fits = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not fits:
            raise InputError(
                f"message {index} is {message!r}", expected='{"role": text, "content": text}'
            )
    if not messages:
        raise InputError("an empty conversation", expected="at least one message")
    if messages[-1]["role"] == "assistant":
        raise InputError(
            "the conversation ends with the assistant's turn",
            expected="a user's turn last",
            remedy="give the text of the last answer as answer=",
        )
    return messages

"""inspect_ai's tasks on a steered model: ``--model innsteer/FOLDER -M strength=budget``."""

from threading import Lock
from typing import Any

from innsteer.backends.base import Completion, Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.contrast import Message
from innsteer.errors import InputError, MissingPackage
from innsteer.models import load_model
from innsteer.steering import Steering

try:
    import anyio
    from inspect_ai.model import (
        ChatMessage,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ModuleNotFoundError as error:
    raise MissingPackage("inspect-ai", "a task of inspect_ai", "inspect") from error

HONOURED = {"max_tokens", "temperature", "seed"}
OF_INSPECT = {"max_connections", "adaptive_connections", "max_retries", "timeout"}
OF_INSPECT |= {"attempt_timeout", "system_message", "max_tool_output", "cache"}
"""Settings that inspect_ai sees to by itself."""
NEW_TOKENS = 512


@modelapi(name="innsteer")
def innsteer() -> type[ModelAPI]:
    """The provider that inspect_ai finds under this name."""
    return SteeredAPI


class SteeredAPI(ModelAPI):
    """A Hugging Face model under a steering, for inspect_ai; one call at a time.

    Every answer's metadata says how many of its tokens were steered, and with what.

    Args:
        model_name: the steering's folder.
        strength: see ``Steering.edit``; 0 is the plain model.
        base_model: as for ``load_model``; default: the name of the one that it was fitted on.
        device, dtype: see ``load_model``.

    Raises:
        InputError, FormatError, MismatchError: a folder, strength or model that cannot be used.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        *,
        strength: float | str | None = None,
        base_model: str = "",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self._steering = Steering.load(model_name)
        self._edit = self._steering.edit(strength)
        base = self._steering.base
        name = base_model or (base.name if base else "smollm2")
        found = load_model(name, device=device, dtype=dtype)
        self._steering.check(found)
        self._backend, self._busy = HF(found), Lock()

    def max_tokens(self) -> int:
        """New tokens where a task does not say."""
        return NEW_TOKENS

    def max_connections(self) -> int:
        """One: a second call would get the first one's positions."""
        return 1

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """The answer to a conversation, greedy where no temperature is given.

        Raises:
            InputError: tools, content that is no text, or a setting that would go unheard.
            NothingSteeredError: no token of the answer was in scope.
        """
        if tools:
            raise InputError("tools for a steered model", expected="a task without tools")
        unheard = config.model_dump(exclude_none=True).keys() - HONOURED - OF_INSPECT
        if unheard:
            raise InputError(
                f"settings {', '.join(sorted(unheard))}", expected=", ".join(sorted(HONOURED))
            )
        talk = tuple(Message(role=one.role, content=_text(one)) for one in input)
        prompt = Prompt("", talk)
        sampling = Sampling(
            config.max_tokens or NEW_TOKENS, config.temperature or 0.0, config.seed or 0
        )
        made = await anyio.to_thread.run_sync(self._answer, prompt, sampling)
        asked = len(self._backend.model.encode(prompt.conversation).ids)
        output: ModelOutput = ModelOutput.from_content(
            self.model_name,
            made.text,
            stop_reason="max_tokens" if made.tokens == sampling.new_tokens else "stop",
        )
        output.usage = ModelUsage(
            input_tokens=asked, output_tokens=made.tokens, total_tokens=asked + made.tokens
        )
        output.metadata = {
            "steered_tokens": made.steered,
            "strengths": dict(
                zip(self._steering.behaviours, self._edit.coef.tolist(), strict=True)
            ),
            "identity": self._steering.identity,
        }
        return output

    def _answer(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """One answer at a time, whatever the number of connections."""
        with self._busy:
            return self._backend.generate([prompt], [self._edit], sampling)[0]


def _text(message: Any) -> str:
    """A message's text, where it is nothing else."""
    parts = message.content
    if not isinstance(parts, str) and any(part.type != "text" for part in parts):
        raise InputError(f"a {message.role}'s message that is not text alone", expected="text")
    return str(message.text)

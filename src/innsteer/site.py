"""Where a steering acts: which stream of which layer (Site), which tokens (Where).

Layers count decoder blocks from 0; the default stream is a block's output. Positions are absolute
(0 = a sequence's first real token, padding not counted) and half-open, so they mean the same in
prefill, chunked prefill and decode, with a cache and without.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from innsteer.errors import InputError, PositionError, UnknownName

Stream = Literal["residual", "attention", "heads", "mlp", "attention_norm", "mlp_norm"]
STREAMS: tuple[str, ...] = get_args(Stream)
Scope = Literal["generated", "prompt", "assistant", "all", "range"]
SCOPES: tuple[str, ...] = get_args(Scope)
Span = tuple[int, int | None]
WINDOW = 64
"""Tokens of a prompt's context: enough for a question and its wording; a long chat fades."""


@dataclass(frozen=True, order=True)
class Site:
    """One stream of one layer.

    ``residual`` is a block's output, ``attention`` and ``mlp`` what these parts add to it,
    ``heads`` the concatenated head outputs (the input of the attention's output projection),
    ``attention_norm`` and ``mlp_norm`` the normalised inputs of the two parts.

    Raises:
        InputError: a negative layer. UnknownName: no such stream.

    >>> Site(19), str(Site(3, "heads")), Site.parse("resid_post.16")
    (Site(layer=19, stream='residual'), '3.heads', Site(layer=16, stream='residual'))
    """

    layer: int
    stream: Stream = "residual"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise InputError(f"layer {self.layer}", expected="a block's number, counted from 0")
        if self.stream not in STREAMS:
            raise UnknownName("stream", self.stream, STREAMS)

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"

    @classmethod
    def parse(cls, text: "str | int | Site") -> "Site":
        """A Site from 19, "19", "19.mlp", "model.layers.19" or "blocks.19.hook_resid_post"."""
        if isinstance(text, Site):
            return text
        if isinstance(text, int):
            return cls(text)
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", text)
        if len(numbers) != 1:
            raise InputError(
                f"site {text!r}", expected='a layer with an optional stream, like "19" or "19.mlp"'
            )
        words = [word for word in re.split(r"\.", text) if not word.isdigit()]
        streams = [word for word in words if word in STREAMS]
        known = {"model", "layers", "transformer", "h", "blocks", "gpt_neox"}
        known |= {"resid_post", "hook_resid_post"}
        strange = [word for word in words if word not in STREAMS and word not in known]
        if strange:
            raise UnknownName("stream", strange[0], STREAMS)
        return cls(int(numbers[0]), streams[0] if streams else "residual")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Where:
    """Which tokens are steered.

    - ``generated`` (default): the last prompt token, whose activation makes the first generated
      token, and every later one;
    - ``prompt``: the prompt's tokens without its last;
    - ``assistant``: for every assistant turn, past ones included, the token before its first and
      all its tokens;
    - ``all``: every token; ``range``: ``[start, stop)``, ``stop=None`` for no end.

    >>> Where().spans(prompt=7), Where("range", 2, 5).spans(), str(Where("range", 2))
    (((6, None),), ((2, 5),), 'range:2:')
    """

    scope: Scope = "generated"
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise UnknownName("scope", self.scope, SCOPES)
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise InputError(
                f"range [{self.start}, {self.stop})", expected="0 <= start < stop, or no stop"
            )
        if self.scope != "range" and (self.start, self.stop) != (0, None):
            raise InputError(f"start or stop with scope {self.scope!r}", expected="scope 'range'")

    def __str__(self) -> str:
        if self.scope != "range":
            return self.scope
        return f"range:{self.start}:{'' if self.stop is None else self.stop}"

    @classmethod
    def parse(cls, text: "str | Where") -> "Where":
        """A Where from a scope's name or "range:START:STOP"."""
        if isinstance(text, Where):
            return text
        head, *ends = text.split(":")
        if head != "range":
            return cls(text)  # type: ignore[arg-type]
        try:
            start, stop = ends
            return cls("range", int(start or 0), int(stop) if stop else None)
        except ValueError:
            raise InputError(f"where {text!r}", expected='"range:START:STOP"') from None

    def spans(
        self, *, prompt: int | None = None, turns: Sequence[Span] | None = None
    ) -> tuple[Span, ...]:
        """The half-open spans of steered positions of one sequence.

        Args:
            prompt: number of prompt tokens; needed by ``generated`` and ``prompt``.
            turns: assistant turns, each from the token before its first; needed by ``assistant``.
                One that ends with the prompt or after it is open: generated tokens prolong it.

        Raises:
            PositionError: what the scope needs was not given.
        """
        if self.scope == "all":
            return ((0, None),)
        if self.scope == "range":
            return ((self.start, self.stop),)
        if self.scope == "assistant":
            if turns is None:
                raise PositionError(
                    "scope 'assistant' without the conversation's turns",
                    expected="the token spans of every assistant turn",
                    remedy="pass turns=[model.encode(messages).turns, ...] to on(), or generate "
                    "through innsteer, which finds them",
                )
            return tuple(
                (start, None if prompt is not None and stop and stop >= prompt else stop)
                for start, stop in turns
            )
        if prompt is None:
            raise PositionError(
                f"scope {self.scope!r} in a bare forward pass",
                expected="the number of prompt tokens of each row",
                remedy="call model.generate, pass prompt_lengths=[...] to on(), or use scope 'all'",
            )
        return ((prompt - 1, None),) if self.scope == "generated" else ((0, prompt - 1),)


def before(prompt: int) -> tuple[int, int]:
    """The positions whose mean is a prompt's context: at most ``WINDOW`` before its last token.

    Position 0 stays out: BOS, or what stands in its place, is the attention's sink. A prompt of
    fewer than 3 tokens has none.

    >>> before(100), before(10), before(2)
    ((35, 99), (1, 9), (1, 1))
    """
    return max(prompt - 1 - WINDOW, 1), max(prompt - 1, 1)

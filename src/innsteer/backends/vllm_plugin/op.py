"""The one operation that a compiled graph sees: steer the rows of a flat batch at one layer.

It is opaque to the compiler and changes its arguments in place, so a graph around it is made once
and serves every request: which rows are steered, and how, is read when it runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from innsteer.backends.ragged import Place
from innsteer.errors import LayoutError

PLACES: dict[str, list[Place]] = {}
"""Key of an operation -> the places of its site, in the order in which they are applied."""

READS: dict[str, list[Place]] = {}
"""Key of an operation -> the places that read its site when it is edited: the next block's input.

Read here and not before the next block, because an operation that changes nothing would be dropped
from a compiled graph.
"""

SEEN: dict[str, Callable[[Tensor], None]] = {}
"""Key of an operation -> who gets what it is given, before it is steered."""

_LIBRARY: Any = torch.library.Library("innsteer", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("steer_split(Tensor(a!) hidden, Tensor(b!) residual, str key) -> ()")
_LIBRARY.define("steer_whole(Tensor(a!) hidden, str key) -> ()")


def steer_split(hidden: Tensor, residual: Tensor, key: str) -> None:
    """Steer a block's output that a layer returns as two summands ``[tokens, d]``.

    A steered row's new value goes into the residual, and its other summand becomes 0: their sum is
    then that value to the bit, where a delta would be rounded once more. Other rows stay as they
    are.
    """
    if key in SEEN:
        SEEN[key](hidden + residual)
    known = Known()
    for place in PLACES[key]:
        if len(place.table.window):
            window = place.table.window
            place.gather(hidden[window] + residual[window])
        rows = _rows(place, hidden)
        if rows is None:
            continue
        mine, rest = hidden[rows], residual[rows]
        old = mine + rest
        new = place.alike(old)
        known = Known(rows, new)
        if new is None:
            new, touched = place.steer(old, rows)
            keep = touched.unsqueeze(-1)
            residual[rows] = torch.where(keep, new, rest)
            hidden[rows] = mine.masked_fill(keep, 0)
        elif isinstance(rows, slice):
            rest.copy_(new)
            mine.zero_()
        else:
            residual[rows] = new
            hidden[rows] = 0
    for place in READS[key]:
        rows = _rows(place, hidden)
        if rows is not None:
            h = known.at(rows)
            place.enter(
                hidden[rows] + residual[rows] if h is None else h, rows, sound=h is not None
            )


def steer_whole(hidden: Tensor, key: str) -> None:
    """Steer a block's output that a layer returns as one tensor ``[tokens, d]``."""
    if key in SEEN:
        SEEN[key](hidden)
    known = Known()
    for place in PLACES[key]:
        if len(place.table.window):
            place.gather(hidden[place.table.window])
        rows = _rows(place, hidden)
        if rows is None:
            continue
        old = hidden[rows].clone() if isinstance(rows, slice) else hidden[rows]
        new = place.alike(old)
        known = Known(rows, new)
        if new is None:
            new, _ = place.steer(old, rows)
        hidden[rows] = new
    for place in READS[key]:
        rows = _rows(place, hidden)
        if rows is not None:
            if (h := known.at(rows)) is None:
                place.enter(hidden[rows], rows)
            else:
                place.enter(h, rows, sound=True)


class Known(NamedTuple):
    """The last steered rows of a site, where they are known to be finite."""

    rows: Tensor | slice | None = None
    new: Tensor | None = None

    def at(self, rows: Tensor | slice) -> Tensor | None:
        """Their values, if these are the rows."""
        return self.new if rows is self.rows else None


def attach(layer: nn.Module, key: str) -> torch.utils.hooks.RemovableHandle:
    """Run the operation on what a decoder layer returns, from now on and in graphs made of it."""

    def after(_: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            # vLLM's runner of transformers' own models puts a batch of one around the tokens.
            torch.ops.innsteer.steer_whole(output.view(-1, output.shape[-1]), key)
        elif isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
            torch.ops.innsteer.steer_split(output[0], output[1], key)
        else:
            raise LayoutError(
                f"a {type(layer).__name__} that returns neither a tensor nor two",
                expected="the block's output, or its two summands",
            )

    return layer.register_forward_hook(after)


def _rows(place: Place, hidden: Tensor) -> Tensor | slice | None:
    """The rows to run a map on: while a graph is captured all of them, whatever is steered now."""
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return slice(0, len(hidden))
    return place.table.rows


for _name, _function in (("steer_split", steer_split), ("steer_whole", steer_whole)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"innsteer::{_name}", lambda *_: None, lib=_LIBRARY)

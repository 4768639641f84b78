"""TokenContext: what a map across tokens is told beside its rows, and what it keeps between passes.

Rows stay flat, ``[tokens, d]``, as everywhere. Where a map needs a request's tokens side by side it
lays them out, ``[requests, columns, c]``; the engine keeps what it shall remember of them, and sees
to it that this follows beams, roll-back and resumption.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Parameters = Mapping[str, str]
"""What one request asks of a map, by name: ``{"concept": "speaks like a sea captain"}``."""
Encode = Callable[[str, int], Tensor]
"""Hidden states ``[n, d]`` of a text after so many of the plain model's first blocks."""
Keep = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Adds the columns of a pass to what is kept under a name; returns all columns so far."""
LIVE = "live"


def nothing_before(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A Keep of a pass that holds its requests whole."""
    return keys, values


@dataclass(frozen=True)
class TokenContext:
    """Where the rows of one pass stand, and what their requests ask for.

    Attributes:
        request: ``[tokens]``, the request of each row, from 0, ascending.
        column: ``[tokens]``, the row's place among its request's tokens of this pass, ascending
            with the position. Places without a row (padding, tokens out of scope) are seen by none.
        position: ``[tokens]``, absolute, 0 = the request's first token.
        generated: ``[tokens]``, the phase: False for a prompt's tokens but its last; None where
            the prompt's length is not known.
        ids: ``[tokens]``, the input token ids; -1 where the engine was given embeddings.
        requests: how many there are. columns: places of this pass for each.
        memory: what ``Intervention.prepare`` made of each request's parameters, by name, stacked
            ``[requests, n, ...]`` and filled with 0 behind the shorter ones.
        keep: where columns are kept between passes.
        mask: ``[requests, columns, all columns]``, which columns a place may see: itself, and the
            rows before it that are edited too. Set by ``seeing``.
    """

    request: Tensor
    column: Tensor
    position: Tensor
    generated: Tensor | None
    ids: Tensor
    requests: int
    columns: int
    memory: Mapping[str, Tensor]
    keep: Keep = nothing_before
    mask: Tensor | None = None

    @property
    def offsets(self) -> Tensor:
        """``[requests + 1]``: rows ``offsets[n]:offsets[n + 1]`` are those of request n."""
        counts = torch.bincount(self.request, minlength=self.requests)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    def lay(self, rows: Tensor) -> Tensor:
        """Rows ``[tokens, c]`` by request and column, ``[requests, columns, c]``; 0 where none."""
        laid = rows.new_zeros(self.requests, self.columns, rows.shape[-1])
        return laid.index_put((self.request, self.column), rows)

    def take(self, laid: Tensor) -> Tensor:
        """The rows ``[tokens, c]`` of what was laid out."""
        return laid[self.request, self.column]

    def remember(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep two features of each row; returns those of all columns so far, laid out.

        Args:
            name: what they are; each name is used once per pass, the same ones in every pass.
            keys, values: ``[tokens, a]`` and ``[tokens, b]``.
        """
        return self.keep(name, self.lay(keys), self.lay(values))

    def seeing(self, live: Tensor) -> "TokenContext":
        """The same, with a mask that shows the rows that are ``live`` ``[tokens]`` and no others.

        A row that is not edited must not be seen: it may hold what is not finite.
        """
        flags, _ = self.remember(LIVE, live.float().unsqueeze(-1), live.float().unsqueeze(-1))
        every = flags.shape[1]
        place = torch.arange(every, device=flags.device)
        own = place[every - self.columns :].unsqueeze(-1)
        seen = (flags[..., 0] > 0).unsqueeze(1) & (place <= own)
        return replace(self, mask=seen | (place == own))

"""How much of neutral text a steering touches at all."""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class EditedShare(Metric):
    """Share of the predicting tokens of neutral answers that were edited, 0 to 1.

    1 for a steering without a gate: the last prompt token and every response token but the last
    are edited. 0 under scope ``prompt``, which edits none of them.
    """

    kind = "neutral"
    unit = "share of tokens"
    better = "neither"

    def measure(self, completion: Completion) -> Measured | None:
        """Edited over predicted tokens."""
        tokens = completion.tokens
        return Measured(completion.steered / tokens, tokens) if tokens else None

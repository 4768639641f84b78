"""How much of neutral text a steering touches at all."""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class EditedShare(Metric):
    """Share of the steerable tokens of neutral answers that were edited, 0 to 1; a gate lowers it."""

    kind = "neutral"
    unit = "share of tokens"
    better = "neither"

    def measure(self, completion: Completion) -> Measured | None:
        """Edited rows over rows in scope."""
        rows = completion.values.get("edited", ())
        return Measured(sum(rows) / len(rows), len(rows)) if rows else None

"""Agreement: does steering leave alone what the model was sure of?"""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric

SURE = 0.9


class Agreement(Metric):
    """Share of neutral tokens whose most probable token stays the same, where it was sure.

    Sure: the unsteered model gives its best token at least 0.9. 0 to 1.
    """

    kind = "neutral"
    unit = "share of tokens"
    better = "higher"

    def measure(self, completion: Completion) -> Measured | None:
        """The completion's share, weighed by its sure tokens."""
        pairs = zip(completion.values["sure"], completion.values["same"], strict=True)
        kept = [same for sure, same in pairs if sure >= SURE]
        return Measured(sum(kept) / len(kept), len(kept)) if kept else None

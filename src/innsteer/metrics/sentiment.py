"""Sentiment: the mean compound score, beside the share of negative answers."""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric
from innsteer.metrics.negative_sentiment import compound


class Sentiment(Metric):
    """Mean of VADER's compound score over whole answers, -1 to 1."""

    kind = "sample"
    unit = "compound, -1 to 1"
    better = "neither"
    family = "sentiment"

    def measure(self, completion: Completion) -> Measured | None:
        """The answer's compound score."""
        return Measured(compound(completion.text))

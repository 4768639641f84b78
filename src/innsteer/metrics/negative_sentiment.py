"""Negative sentiment: the share of answers that read as negative (the demo's scorer)."""

from functools import cache
from typing import Any

from innsteer.backends.base import Completion
from innsteer.errors import MissingPackage
from innsteer.metrics.base import Measured, Metric

THRESHOLD = -0.05


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise MissingPackage("vaderSentiment", "the sentiment scorer", "demo") from None
    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """VADER's compound sentiment of a whole text, -1 (most negative) to 1.

    >>> compound("A lovely, quiet room.") > 0.4, compound("A dull and broken room.") < -0.4
    (True, True)
    """
    return float(_vader().polarity_scores(text)["compound"])


class NegativeSentiment(Metric):
    """Share of answers that VADER calls negative: compound <= -0.05, its authors' threshold.

    A lexicon and rules over the whole answer, offline and independent of any behaviour's texts. It
    sees words, not truth: irony and faint praise pass for positive.

    Reference:
        Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis (2014),
        https://doi.org/10.1609/icwsm.v8i1.14550
    """

    kind = "sample"
    unit = "share of answers"
    better = "neither"
    family = "sentiment"

    def measure(self, completion: Completion) -> Measured | None:
        """1 when the answer is negative."""
        return Measured(float(compound(completion.text) <= THRESHOLD))

"""Distinct-2: how little an answer repeats itself."""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class Distinct(Metric):
    """Distinct word bigrams over all word bigrams of an answer, 0 to 1, meaned over answers.

    Reference:
        Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models (2016),
        https://arxiv.org/abs/1510.03055
    """

    kind = "sample"
    unit = "share of bigrams"
    better = "higher"

    def measure(self, completion: Completion) -> Measured | None:
        """The answer's share; answers of one word have no bigram."""
        words = completion.text.lower().split()
        bigrams = list(zip(words, words[1:], strict=False))
        return Measured(len(set(bigrams)) / len(bigrams)) if bigrams else None

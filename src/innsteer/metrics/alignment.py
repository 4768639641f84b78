"""Alignment: does the model prefer the answer that matches the behaviour?"""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class Alignment(Metric):
    """Probability mass of the matching answer over both answers, 0 to 1, chance 0.5.

    Items are taken apart by their key (Yes-keyed and No-keyed, A and B) and the parts' means are
    averaged, so that a bias towards one answer gains nothing. ``match`` and ``other`` are the
    answers' probabilities.
    """

    kind = "choice"
    unit = "probability"
    better = "higher"

    def measure(self, completion: Completion) -> Measured | None:
        """match / (match + other), in the stratum of the key."""
        match, other = sum(completion.values["match"]), sum(completion.values["other"])
        return Measured(match / (match + other), stratum=completion.key) if match + other else None

"""Answer mass: are the two answers what the model would say at all?"""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class AnswerMass(Metric):
    """Share of both answers in the whole next-token distribution, 0 to 1."""

    kind = "choice"
    unit = "probability"
    better = "higher"

    def measure(self, completion: Completion) -> Measured | None:
        """match + other."""
        return Measured(sum(completion.values["match"]) + sum(completion.values["other"]))

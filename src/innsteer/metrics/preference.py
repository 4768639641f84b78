"""Preference: how far steering moves open answers from the source side to the target side."""

import math
from typing import ClassVar

from innsteer.backends.base import Completion, Kind
from innsteer.metrics.base import Measured, Metric


class Preference(Metric):
    """sigma of the change in log-odds of the target against the source answer, 0.5 = no effect.

    sigma((LL(target) - LL(source)) steered - the same unsteered), teacher-forced. The completion
    carries both totals: ``shift`` = that difference of differences, in nats.
    """

    kind: ClassVar[Kind] = "pair"
    unit = "probability"
    better = "higher"

    def measure(self, completion: Completion) -> Measured | None:
        """The logistic function of the shift."""
        shift = max(min(completion.values["shift"][0], 500.0), -500.0)
        return Measured(1 / (1 + math.exp(-shift)))

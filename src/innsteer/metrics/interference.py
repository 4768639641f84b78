"""Interference: how far behaviours move that were not the target."""

from typing import ClassVar

from innsteer.backends.base import Completion, Kind
from innsteer.metrics.base import Measured
from innsteer.metrics.preference import Preference


class Interference(Preference):
    """Preference on pairs of other behaviours, 0.5 = untouched; behaviours count alike.

    Above 0.5 the steering pulls them towards their target side, below towards their source side.
    """

    kind: ClassVar[Kind] = "other"
    better = "neither"

    def measure(self, completion: Completion) -> Measured | None:
        """The pair's preference, in the stratum of its behaviour."""
        measured = super().measure(completion)
        return measured and measured._replace(stratum=completion.key)

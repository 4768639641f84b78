"""Bits per byte of held-out plain text."""

import math

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class BitsPerByte(Metric):
    """Negative log2-probability of plain texts per UTF-8 byte, every token steered
    (a steering that reads the prompt: all but the first quarter).

    Comparable over tokenizers; ``log_prob`` is the text's total, natural logarithm.
    """

    kind = "plain"
    unit = "bits per byte"
    better = "lower"

    def measure(self, completion: Completion) -> Measured | None:
        """The text's bits per byte, weighed by its bytes."""
        size = len(completion.text.encode())
        bits = -sum(completion.values["log_prob"]) / math.log(2)
        return Measured(bits / size, size) if size else None

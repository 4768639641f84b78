"""Perplexity of the answers under the unsteered model."""

import numpy as np

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class Perplexity(Metric):
    """exp of the mean negative log-probability per token of the answers, unsteered; >= 1.

    Natural logarithm inside; ``base_log_prob`` holds the unsteered model's per-token values.
    """

    kind = "sample"
    unit = "perplexity per token"
    better = "lower"

    def measure(self, completion: Completion) -> Measured | None:
        """The answer's mean negative log-probability, weighed by its tokens."""
        values = completion.values.get("base_log_prob", ())
        return Measured(-sum(values) / len(values), len(values)) if values else None

    def finish(self, means: np.ndarray) -> np.ndarray:
        """exp of the token-weighted means."""
        return np.asarray(np.exp(np.minimum(means, 700.0)))

"""The tail of the neutral cost."""

from collections.abc import Sequence

import numpy as np

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class NeutralP99(Metric):
    """99th percentile over tokens of KL(base || steered) on neutral prompts, nats.

    The smallest KL that 99 % of all tokens do not exceed; the interval resamples whole answers.
    """

    kind = "neutral"
    unit = "nats"
    better = "lower"

    def measure(self, completion: Completion) -> Measured | None:
        """The completion's worst token; the figure pools all tokens instead."""
        return max(self.parts(completion), default=None)

    def parts(self, completion: Completion) -> list[Measured]:
        """Every token's KL."""
        return [Measured(kl) for kl in completion.values.get("kl", ())]

    def figures(self, items: Sequence[Sequence[Measured]], times: np.ndarray) -> np.ndarray:
        """The percentile of the pooled tokens of every resample."""
        tokens = sorted((m.value, m.weight, row) for row, item in enumerate(items) for m in item)
        values, weights, owners = (np.array(column) for column in zip(*tokens, strict=True))
        share = np.cumsum(times[:, owners] * weights, axis=1)
        return np.asarray(values[(share >= 0.99 * share[:, -1:]).argmax(axis=1)])

"""The tail of the neutral cost."""

from collections.abc import Sequence

import numpy as np

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric, Score


class NeutralP99(Metric):
    """99th percentile over tokens of KL(base || steered) on neutral prompts, nats."""

    kind = "neutral"
    unit = "nats"
    better = "lower"

    def measure(self, completion: Completion) -> Measured | None:
        """The completion's worst token; ``score`` pools all tokens instead."""
        kl = completion.values.get("kl", ())
        return Measured(max(kl), len(kl)) if kl else None

    def _bootstrap(self, arms: list[dict[str, list[Measured]]], level: float, seed: int) -> Score:
        raise AssertionError("scored over tokens")

    def score(
        self, completions: Sequence[Completion], *, level: float = 0.95, seed: int = 0
    ) -> Score | None:
        """Percentile over pooled tokens; the interval resamples whole completions."""
        parts = [np.array(c.values["kl"]) for c in completions if c.kind == self.kind]
        if not parts:
            return None
        rng = np.random.default_rng(seed)
        draws = [
            np.quantile(
                np.concatenate([parts[i] for i in rng.integers(0, len(parts), len(parts))]), 0.99
            )
            for _ in range(500)
        ]
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        value = float(np.quantile(np.concatenate(parts), 0.99))
        return Score(value, float(low), float(high), len(parts), level)

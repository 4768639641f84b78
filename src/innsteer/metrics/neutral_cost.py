"""Neutral cost: what a steering changes where it has no business."""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class NeutralCost(Metric):
    """Mean per-token KL(base || steered), nats, on the base model's answers to neutral prompts.

    The last prompt token and every response token are steered; tokens weigh alike.
    """

    kind = "neutral"
    unit = "nats per token"
    better = "lower"

    def measure(self, completion: Completion) -> Measured | None:
        """The completion's mean KL, weighed by its tokens."""
        kl = completion.values.get("kl", ())
        return Measured(sum(kl) / len(kl), len(kl)) if kl else None

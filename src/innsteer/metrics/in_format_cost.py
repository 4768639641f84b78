"""In-format cost: what a steering changes on questions that only look like the behaviour's."""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


class InFormatCost(Metric):
    """Mean KL(base || steered) at the first response token, nats.

    The prompts carry the behaviour's own wording and the behaviour does not concern them, so a
    detector of the question's template gains nothing here.
    """

    kind = "in_format"
    unit = "nats"
    better = "lower"

    def measure(self, completion: Completion) -> Measured | None:
        """KL at the answer token alone."""
        kl = completion.values.get("kl", ())
        return Measured(kl[0]) if kl else None

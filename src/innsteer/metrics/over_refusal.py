"""Over-refusal: harmless prompts that are declined."""

from innsteer.metrics.refusal import Refusal


class OverRefusal(Refusal):
    """Share of answers to harmless, neutral prompts that decline, by fixed phrases, 0 to 1."""

    kind = "aside"
    better = "lower"

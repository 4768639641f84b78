"""Degeneration: answers that fall into a loop."""

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric


def loops(text: str, *, window: int = 32) -> bool:
    """Whether the last words repeat one phrase: few distinct trigrams among them.

    >>> loops("very " * 40), loops("The room was quiet and the bed was soft, so we slept well.")
    (True, False)
    """
    words = text.lower().split()[-window:]
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    # Ordinary prose repeats a trigram now and then; half of them repeated is a loop.
    return len(trigrams) >= 10 and len(set(trigrams)) <= len(trigrams) / 2


class Degeneration256(Metric):
    """Share of answers of up to 256 tokens whose last 32 words loop, 0 to 1."""

    kind = "long"
    unit = "share of answers"
    better = "lower"
    asked = 256

    def measure(self, completion: Completion) -> Measured | None:
        """1 when the answer ends in a loop."""
        if completion.values["asked"] != (self.asked,):
            return None
        return Measured(float(loops(completion.text)))

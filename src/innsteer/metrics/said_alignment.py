"""Said alignment: is the answer that is steered for really said?"""

import re

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric

_ANSWER = re.compile(r"\b(yes|no)\b|\(?\b([A-E])\)|^\s*([A-E])\b", re.IGNORECASE)


def said(text: str) -> str:
    """The first Yes/No or option letter of an answer, "" if there is none.

    >>> said("Well, yes, of course"), said("(B) because"), said("A fine day"), said("Perhaps")
    ('Yes', 'B', 'A', '')
    """
    found = _ANSWER.search(text)
    return next((group.capitalize() for group in found.groups() if group), "") if found else ""


class SaidAlignment(Metric):
    """Share of sampled answers (16 tokens, temperature 1) whose first Yes/No or letter matches.

    Steered towards, the match is the key; steered away (negative strength), it is another answer
    than the key. Answers without one count as wrong either way.
    """

    kind = "sample"
    unit = "share of answers"
    better = "higher"

    def measure(self, completion: Completion) -> Measured | None:
        """1 when the answer said is the one steered for; only choice items have a key."""
        if not completion.key:
            return None
        answer = said(completion.text)
        towards = completion.strength >= 0
        right = answer == completion.key if towards else bool(answer) and answer != completion.key
        return Measured(float(right), stratum=completion.key)

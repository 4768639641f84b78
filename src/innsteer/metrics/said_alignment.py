"""Said alignment: is the answer that is steered for really said?"""

import re

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric

_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
# "A" is an article too: a bare letter counts where a mark or the end follows it.
_LETTER = re.compile(r"\b([A-E])\)|^\W*([A-E])(?=\s*(?:[.:,;*]|$))", re.IGNORECASE | re.MULTILINE)


def said(text: str, key: str = "Yes") -> str:
    """The first Yes/No of an answer, or its first option letter where the key is one; else "".

    >>> said("Well, yes, of course"), said("(b) because", "A"), said("B.", "A"), said("Perhaps")
    ('Yes', 'B', 'B', '')
    >>> said("A fine day"), said("A fine day", "A")
    ('', '')
    """
    found = (_WORD if key in ("Yes", "No") else _LETTER).search(text)
    return next(group for group in found.groups() if group).capitalize() if found else ""


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
        answer = said(completion.text, completion.key)
        towards = completion.strength >= 0
        right = answer == completion.key if towards else bool(answer) and answer != completion.key
        return Measured(float(right), stratum=completion.key)

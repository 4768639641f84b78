"""Formality: a register index of whole answers, from words alone."""

import re

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric

_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_PERSON = set(
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves".split()
)
_SHORT = re.compile(r"n't$|'(?:m|re|ve|ll|d)$")
# Words whose 's is "is", "has" or "us"; every other 's is read as a possessive.
_HOSTS = set(
    "he she it that this there here what who where when how let one everyone everybody someone "
    "somebody anyone nobody everything something nothing".split()
)


def _contracted(word: str) -> bool:
    head, mark, tail = word.partition("'")
    return bool(_SHORT.search(word)) or (bool(mark) and tail == "s" and head in _HOSTS)


def formality(text: str) -> float:
    """A register index, 0 (casual) to 1 (formal).

    0.5 + 0.5 * clip((letters per word - 4.4) / 1.6 - 4 * contractions per word
                     - 1.5 * first and second person pronouns per word, -1, 1)

    >>> formality("You've gotta let it dry, I'd say.") < 0.1
    True
    >>> formality("Adequate ventilation prevents considerable deterioration.") > 0.9
    True
    """
    words = _WORD.findall(text.lower().replace("\u2019", "'"))
    if not words:
        return 0.5
    letters = sum(sum(map(str.isalpha, word)) for word in words) / len(words)
    contractions = sum(map(_contracted, words)) / len(words)
    persons = sum(word.partition("'")[0] in _PERSON for word in words) / len(words)
    raw = (letters - 4.4) / 1.6 - 4 * contractions - 1.5 * persons
    return 0.5 + 0.5 * max(-1.0, min(1.0, raw))


class Formality(Metric):
    """Mean register index of whole answers, 0 to 1: word length, contractions, person.

    A property of wording, made without any model; it does not see grammar or courtesy.
    """

    kind = "sample"
    unit = "index, 0 to 1"
    better = "neither"
    family = "formality"

    def measure(self, completion: Completion) -> Measured | None:
        """The answer's index."""
        return Measured(formality(completion.text))

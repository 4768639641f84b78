"""Language: the share of answers in the language that is steered for."""

from functools import cache
from typing import Any

from innsteer.backends.base import Completion
from innsteer.errors import MissingPackage
from innsteer.metrics.base import Measured, Metric


@cache
def _identifier() -> Any:
    try:
        import py3langid
    except ImportError:
        raise MissingPackage("py3langid", "the language scorer", "eval") from None
    return py3langid


def language(text: str) -> str:
    """The likeliest language of a text among 97, as its code in ISO 639-1; "" of no letters.

    >>> language("Where is the station?"), language("Où est la gare, s'il vous plaît ?")
    ('en', 'fr')
    """
    identifier = _identifier()
    return str(identifier.classify(text)[0]) if any(map(str.isalpha, text)) else ""


class Language(Metric):
    """Share of answers in a language: ``language:fr``; ``language`` alone means English.

    A classifier of character n-grams over the whole answer, offline; it is unsure of a few words,
    and counts an answer that mixes languages by the one that prevails.

    Reference:
        Lui and Baldwin, langid.py: An Off-the-shelf Language Identification Tool (2012),
        https://aclanthology.org/P12-3005/
    """

    kind = "sample"
    unit = "share of answers"
    better = "neither"
    family = "language"
    takes = "a language's code"

    def measure(self, completion: Completion) -> Measured | None:
        """1 when the answer is in that language."""
        return Measured(float(language(completion.text) == (self.argument or "en")))

"""Hedging: the share of an answer's sentences that express uncertainty, from words alone."""

import re

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric

# Likelihood and seeming in one word. Frequency (often), degree (rather) and politeness are left
# out: they say how much, not how sure.
_WORDS = (
    "might perhaps maybe probably probable possibly presumably presumable apparently seemingly "
    "supposedly reportedly conceivably conceivable arguably plausibly plausible likely likeliest "
    "unlikely doubtful debatable uncertain unsure inconclusive unclear seem seems seemed roughly "
    "approximately thereabouts guesswork"
).split()

_NUMBER = (
    r"(?:\d\S*|half|dozens|(?:an?|one) (?:half|third|quarter|fifth|tenth|dozen|hundred|thousand|"
    r"million|billion)|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|"
    r"thirty|forty|fifty|sixty|seventy|eighty|ninety)"
)
_THOUGHT = r"(?:thought|believed|presumed|assumed|suspected|rumoured|estimated|reckoned|said)"
_FOUND = (
    r"(?:evidence|research|work|(?:stud|theor)(?:y|ies)|(?:test|trial|finding|record|sign|"
    r"measurement)s?)"
)
_PHRASES = (
    # Modal verbs: May with a capital is the month, or a wish; "could not" is inability.
    r"(?-i:may)",
    r"could (?:(?:also|well|easily|perhaps) )?(?:be|have|mean|explain|depend)",
    # Likelihood.
    r"possible that",
    r"in all (?:likelihood|probability)",
    r"chances are",
    r"an? (?:\w+ )?(?:chance|possibility|likelihood) (?:that|of)",
    # Thinking, seeming and being thought.
    r"i (?:(?:also|rather|would|should) )?(?:think|believe|suspect|suppose|guess|imagine|assume|"
    r"presume|reckon|gather|expect|doubt)",
    r"i(?:'d| would) (?:say|think|guess|imagine|expect)",
    r"appear(?:s|ed)? (?:to|that|as if|as though)",
    r"(?:is|are|was|were|been|it's) (?:\w+ )?" + _THOUGHT + r" (?:to|that)",
    r"it (?:is|was) (?:\w+ )?" + _THOUGHT,
    r"(?:experts|historians|researchers|scientists|some) (?:think|believe|suspect)",
    _FOUND + r" suggests?",
    # Limits of knowledge.
    r"(?:so|as) far as (?:i|we|one|is known|my|anyone)",
    r"to (?:the best of )?my knowledge",
    r"from what (?:i|we) (?:can|know|have|recall|remember|understand|gather)",
    r"as i (?:recall|remember|(?:understand|see) it)",
    r"if (?:i (?:recall|remember)|i(?:'m| am) not mistaken|memory serves)",
    r"(?:not|never|\w+n't) (?:be )?(?:(?:all that|so|\w+ly|quite) )?(?:sure|certain)",
    r"it(?: is|'s) not (?:\w+ )?clear",
    r"less (?:sure|certain|clear)",
    r"far from (?:sure|certain|clear)",
    r"(?:cannot|can't|could not|impossible to|hard to|difficult to|tricky to) (?:say|tell|know|"
    r"judge|estimate|prove|predict|rule out)",
    r"(?:cannot|can't) be (?:ruled out|excluded|known)",
    r"(?:nobody|no one) (?:\w+ )?(?:knows|is (?:sure|certain)|can say)",
    r"not (?:yet )?(?:fully|entirely|completely|well) (?:understood|known)",
    r"open to (?:debate|question|doubt)",
    r"an open question",
    r"(?:my|a) (?:best|own|rough|educated|fair) guess",
    r"(?:can|could) only guess",
    r"in my (?:opinion|view)",
    # Round figures.
    r"(?:about|around|something like) " + _NUMBER,
    r"give or take",
    r"more or less",
    r"or so",
)
_HEDGE = re.compile(rf"\b(?:{'|'.join([*_WORDS, *_PHRASES])})(?!\w)", re.IGNORECASE)
# What looks like a hedge and is none: strength, set phrases, and the reader's doubt.
_OTHER = re.compile(
    r"\b(?:(?:the|his|her|its|their|our|my|your|military) might|(?:may|might) as well|"
    r"i (?:believe in|think (?:of|about))|"
    r"you(?: are|'re) (?:not (?:\w+ )?(?:sure|certain)|unsure))\b",
    re.IGNORECASE,
)
_BREAK = re.compile(r"(?<=[.!?])\s+|\n+")


def hedging(text: str) -> float:
    """The share of sentences that hold a hedge, 0 to 1; 0 where there is no sentence.

    A sentence ends at ``.``, ``!`` or ``?`` before a space, or with its line, and holds a letter.

    >>> hedging("It might rain. Perhaps not before May. The sky is grey.")
    0.6666666666666666
    >>> hedging("In May he pulled with all his might, 40 men about the rope.")
    0.0
    """
    sentences = [
        part for part in _BREAK.split(text.replace("\u2019", "'")) if re.search("[a-z]", part, re.I)
    ]
    hedged = sum(bool(_HEDGE.search(_OTHER.sub("", part))) for part in sentences)
    return hedged / len(sentences) if sentences else 0.0


class Hedging(Metric):
    """Mean share of an answer's sentences that hedge, 0 to 1.

    A sentence hedges if it holds one of a list of words and phrases. Modal verbs, adverbs, verbs
    of thinking and seeming, limits of knowledge and round figures are Hyland's kinds; the list is
    our own and leaves out frequency, degree and politeness. It sees words: "may" of permission
    and "more likely" of statistics count, doubt without these words does not, and whether an
    answer is right or its doubt justified is not asked.

    Reference:
        Hyland, Metadiscourse: Exploring Interaction in Writing (Continuum, 2005)
    """

    kind = "sample"
    unit = "share of sentences"
    better = "neither"
    family = "hedging"

    def measure(self, completion: Completion) -> Measured | None:
        """The answer's share of sentences that hedge."""
        return Measured(hedging(completion.text))

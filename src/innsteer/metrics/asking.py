"""Asking: the share of answers that ask the reader something, from words alone."""

import re

from innsteer.backends.base import Completion
from innsteer.metrics.base import Measured, Metric

# A quotation that a length limit has cut off runs to the end.
_QUOTED = re.compile(r'"[^"]*(?:"|$)|“[^”]*(?:”|$)')
_QUESTION = re.compile(r"[^.!?\n]+\?")
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_READER = set("you your yours yourself yourselves".split())
_SPEAKER = set("i my mine myself".split())
_VERBS = set(
    "am is are was were be do does did have has had can could will would shall should may might "
    "must isn't aren't don't doesn't can't what's where's who's how's why's that's it's".split()
)
# Advice in the form of a question, tags, and help that is offered or begged.
_EMPTY = re.compile(
    r"^(?:why not|why don't|how about|what about)\b|\b(?:anything else|help me)\b"
    r"|(?:, (?:right|no)|\bdon't you think)\?$"
)


def _addressed(question: str) -> bool:
    """Whether a question is one to the reader."""
    words = _WORD.findall(question)
    heads = {word.partition("'")[0] for word in words}
    if heads & _SPEAKER or _EMPTY.search(question.strip()):
        return False
    return bool(heads & _READER) or (0 < len(words) <= 6 and not _VERBS & {*words, *heads})


def asks(text: str) -> bool:
    """Whether an answer asks its reader something.

    True when some question outside double quotation marks, a stretch of text without .!? that ends
    in a question mark, has

    - a second-person word (you, your, yours, yourself, yourselves, alone or before an apostrophe),
      or at most six words and none of the common auxiliary verbs ("Which kind?", "Sun or shade?");
    - and neither I, my, mine or myself (a speaker who asks for himself), nor "anything else" or
      "help me", nor one of the beginnings why not, why don't, how about, what about (advice), nor
      one of the ends ", right?", ", no?", "don't you think?" (tags).

    It does not see whether the question matters. It misses a longer one without a second-person
    word ("How old is the dog?"), and takes a rhetorical "What can you do?" for a real one.

    >>> asks("Water it less. Where does your fern stand?"), asks("Water it less. Sun or shade?")
    (True, True)
    >>> asks("Why is it dry? The pot is small."), asks('Say "How are you?" and smile.')
    (False, False)
    """
    plain = _QUOTED.sub(" ", text.lower().replace("\u2019", "'"))
    return any(map(_addressed, _QUESTION.findall(plain)))


class Asking(Metric):
    """Share of answers that ask the reader something: a question with you, or one without a verb.

    A property of wording, made without any model; whether the question matters it does not see.
    """

    kind = "sample"
    unit = "share of answers"
    better = "neither"
    family = "asking"

    def measure(self, completion: Completion) -> Measured | None:
        """1 when the answer asks."""
        return Measured(float(asks(completion.text)))

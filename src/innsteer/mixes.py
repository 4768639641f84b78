"""What a request is steered by, as one string: ``NAME(key="value")@STRENGTH``, joined by ``+``.

The same string on the command line, in Python and over HTTP. Knows nothing of what the names mean.
"""

import json
import re
from dataclasses import dataclass

from innsteer.errors import InputError

LONGEST = 4096
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_STRENGTH = r"budget|[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?:nats?)?"
_PARAMETER = r'[a-z_][a-z0-9_]*="(?:[^"\\]|\\.)*"'
_PART = re.compile(
    rf"(?P<name>{NAME})"
    rf"(?:\((?P<parameters>{_PARAMETER}(?:,\s*{_PARAMETER})*)\))?"
    rf"(?:@(?P<strength>{_STRENGTH}))?"
    r"(?:\s*\+\s*|$)"
)


@dataclass(frozen=True)
class Part:
    """One steering of a mix.

    Attributes:
        name: whom it means. strength: as written, "" where none was: the calibrated one.
        parameters: those of the request, for methods that declare some.
    """

    name: str
    strength: str = ""
    parameters: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        told = ",".join(f"{key}={json.dumps(value)}" for key, value in self.parameters)
        told = f"({told})" if told else ""
        return f"{self.name}{told}" + (f"@{self.strength}" if self.strength else "")


def parse(text: str) -> tuple[Part, ...]:
    """The parts of a mix, in the order written.

    Args:
        text: at most 4,096 characters; a strength is a number, ``budget`` or a cost (``0.05nat``).

    Raises:
        InputError: it is not of this grammar, or names one steering twice.

    >>> [(part.name, part.strength) for part in parse("cheerful@0.8+formal@-0.3")]
    [('cheerful', '0.8'), ('formal', '-0.3')]
    >>> [part.strength for part in parse("calm@1e+2+wealth.much@0.05nat+kind")]
    ['1e+2', '0.05nat', '']
    """
    parts: list[Part] = []
    at, whole = 0, text.strip() if len(text) <= LONGEST else ""
    while match := _PART.match(whole, at):
        at = match.end()
        given = re.findall(rf"({_PARAMETER})", match["parameters"] or "")
        pairs = [one.split("=", 1) for one in given]
        try:
            parameters = tuple((key, str(json.loads(value))) for key, value in pairs)
        except json.JSONDecodeError:
            break
        parts.append(Part(match["name"], match["strength"] or "", parameters))
        if at == len(whole):
            break
    names = [part.name for part in parts]
    if not parts or at < len(whole) or whole.endswith("+"):
        raise InputError(
            f"steering {text!r:.200}",
            expected='NAME@STRENGTH, several joined by +, such as "cheerful@0.8+formal@-0.3"; a '
            "strength is a number, budget, or a cost like 0.05nat",
        )
    if len(set(names)) < len(names):
        raise InputError(f"steering {text!r:.200}", expected="each name once")
    return tuple(parts)

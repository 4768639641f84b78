"""Scored: whole answers by a function of the user's own."""

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from innsteer.backends.base import Completion
from innsteer.errors import InputError
from innsteer.metrics.base import Measured, Metric


@cache
def function(place: str) -> Callable[[str], float]:
    """The function of a file or of an installed module, whose code runs now.

    >>> function("statistics:mean")([1, 2])
    1.5

    Raises:
        InputError: no such file, module or function.
    """
    home, _, name = place.rpartition(":")
    try:
        module = _file(Path(home)) if home.endswith(".py") else import_module(home)
        found = getattr(module, name)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"the scorer {place!r}: {error}",
            expected="FILE.py:FUNCTION, or MODULE:FUNCTION of an installed module",
        ) from error
    if not callable(found):
        raise InputError(f"the scorer {place!r} is {type(found).__name__}", expected="a function")
    return found  # type: ignore[no-any-return]


def _file(path: Path) -> ModuleType:
    """A file as a module."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Scored(Metric):
    """Mean of a function of your own over whole answers: ``scored:judge.py:toxic``.

    It takes an answer's text, which may be empty, and gives a number. It is loaded when the first
    answer is scored: the name alone, as a report or a table has it, runs nothing.
    """

    kind = "sample"
    unit = "score"
    better = "neither"
    family = "scored"
    takes = "FILE.py:FUNCTION or MODULE:FUNCTION"

    def measure(self, completion: Completion) -> Measured | None:
        """What the function says of the answer."""
        value = function(self.argument)(completion.text)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"the scorer {self.argument!r} said {value!r}", expected="a number")
        return Measured(number)

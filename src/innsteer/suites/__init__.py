"""Suites: what is asked of every arm, and readers of well-known benchmarks' files.

A benchmark is one file with a function ``contrast(source, ...)``; the folder is the list.
"""

import pkgutil
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from innsteer.errors import InputError, UnknownName

if TYPE_CHECKING:
    from innsteer.suites.base import Benchmark

# They read no file of somebody else's.
_OWN = {"base", "behaviour", "capability"}


def names() -> list[str]:
    """Names of the benchmarks that can be read.

    >>> "truthfulqa" in names()
    True
    """
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in found if module.name not in _OWN)


def read(
    name: str, source: str | Path, *, part: str = "", scorer: str = "", **options: Any
) -> "Benchmark":
    """A benchmark's file as a contrast with what the benchmark asks.

    Args:
        name: of the benchmark, see `names`. source: its file.
        part: all of it as this part (``test``: only reported on); "" = by the hash of the group.
        scorer: of answers, in place of the benchmark's own: a metric's name, or a function of yours
            that takes a text and gives a number, FILE.py:FUNCTION or MODULE:FUNCTION.
        options: of the benchmark's own ``contrast``; text is taken as the type that it declares.

    Raises:
        UnknownName: no such benchmark, option or part.
        InputError: an option that is missing or of another type.
        DataError: the file or one of its rows cannot be used.
    """
    if name not in names():
        raise UnknownName("suite", name, names())
    from pydantic import ValidationError, validate_call

    from innsteer import metrics
    from innsteer.contrast import PARTS
    from innsteer.suites.base import Benchmark

    reader = import_module(f"innsteer.suites.{name}").contrast
    own = [option for option in signature(reader).parameters if option != "source"]
    for option in options:
        if option not in own:
            raise UnknownName(f"option of the suite {name!r}:", option, [*own, "part", "scorer"])
    if part and part not in PARTS:
        raise UnknownName("part", part, PARTS)
    try:
        found = Benchmark.of(validate_call(reader)(source, **options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{place}={options.get(place, '')!r} for the suite {name!r}: {first['msg']}"
        ) from None
    if scorer:
        known = scorer.partition(":")[0] in metrics.names()
        chosen = scorer if known else f"scored:{scorer}"
        found = replace(found, measures=(chosen, *found.measures))
    return found.whole(part) if part else found

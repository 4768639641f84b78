"""One file per metric; the file name is the metric's name, and the shelf is the list."""

import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path

from innsteer.errors import InputError, UnknownName
from innsteer.metrics.base import Metric, Score

__all__ = ["Metric", "Score", "get", "names"]


def names() -> list[str]:
    """Names of all metrics.

    >>> "neutral_cost" in names()
    True
    """
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in found if module.name != "base")


@cache
def get(name: str) -> Metric:
    """A metric by its file's name, and what it takes behind a colon: ``language:fr``.

    >>> get("neutral_cost").unit
    'nats per token'

    Raises:
        UnknownName: no such metric. InputError: it takes nothing.
    """
    own, _, argument = name.partition(":")
    if own not in names():
        raise UnknownName("metric", own, names())
    module = import_module(f"innsteer.metrics.{own}")
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Metric)
        and value.__module__ == module.__name__
    ]
    assert len(kinds) == 1, f"{module.__name__} must hold exactly one Metric"
    if argument and not kinds[0].takes:
        raise InputError(f"{argument!r} for the metric {own!r}", expected="its name alone")
    return kinds[0](argument)

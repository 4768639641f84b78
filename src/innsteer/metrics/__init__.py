"""One file per metric; the file name is the metric's name, and the shelf is the list."""

import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path

from innsteer.errors import UnknownName
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
    """A metric by its file's name.

    >>> get("neutral_cost").unit
    'nats per token'
    """
    if name not in names():
        raise UnknownName("metric", name, names())
    module = import_module(f"innsteer.metrics.{name}")
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Metric)
        and value.__module__ == module.__name__
    ]
    assert len(kinds) == 1, f"{module.__name__} must hold exactly one Metric"
    return kinds[0]()

"""The shelf of methods, read without importing them: names and descriptions in milliseconds.

A method is one file in ``steerers/``; third parties add theirs by the entry-point group
``innsteer.steerers`` (name = method, value = module). There is no other list.
"""

import ast
import importlib.util
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from innsteer.errors import InputError

_SHELF = Path(__file__).with_name("steerers")
GROUP = "innsteer.steerers"


@cache
def modules() -> dict[str, str]:
    """Method name -> module, from the shelf and from installed packages' entry points."""
    found = {m.name: f"innsteer.steerers.{m.name}" for m in pkgutil.iter_modules([str(_SHELF)])}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, point.value.partition(":")[0])
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Names of all methods on the shelf, third parties' included.

    >>> "innsteer" in names(), "diffmean" in names()
    (True, True)
    """
    return list(modules())


def describe() -> list[dict[str, Any]]:
    """What every method is, read from the source files: quick, for it imports none of them."""
    return [_read(name, module) for name, module in modules().items()]


def _read(name: str, module: str) -> dict[str, Any]:
    """One method's class variables and docstring's first line, by parsing its file."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"method {name!r}: module {module!r} is not installed")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    bases = {"Steerer"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and bases & {getattr(b, "id", "") for b in node.bases}:
            return {"name": name} | _literals(node)
    raise InputError(f"method {name!r}: {spec.origin} holds no Steerer")


def _literals(node: ast.ClassDef) -> dict[str, Any]:
    """The literal class variables of a steerer's class, defaults filled in."""
    doc = (ast.get_docstring(node) or "").partition("\n")[0]
    found: dict[str, Any] = {"summary": doc, "paper": "", "needs": ["classes"], "sites": "any"}
    found |= {"trained": False, "invertible": False, "erases": False}
    found |= {"across_sites": False, "across_tokens": False, "choices": {}}
    found["fields"] = []
    for line in node.body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        if "ClassVar" in ast.unparse(line.annotation):
            if line.target.id in found and line.value is not None:
                found[line.target.id] = ast.literal_eval(line.value)
        else:
            found["fields"].append(line.target.id)
    found["needs"] = list(found["needs"])
    return found

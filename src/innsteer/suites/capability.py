"""Capability: a hundred plain questions with a right and a wrong answer, written for this project.

Whether a steering leaves alone what the model knows: the share of questions whose right answer is
likelier, per token, than the wrong one, beside that of the unsteered model.
"""

import json
from importlib.resources import files

from innsteer.contrast import Contrast, Item
from innsteer.errors import UnknownName

KINDS = ("capital", "sum", "opposite", "kind", "fact", "use")


def contrast(kind: str = "") -> Contrast:
    """The questions as test items: target = the right answer, source = the wrong one.

    >>> contrast("capital").items[0].target
    'Paris'

    Args:
        kind: only these; "" = all.

    Raises:
        UnknownName: no such kind.
    """
    if kind and kind not in KINDS:
        raise UnknownName("kind of question", kind, KINDS)
    text = (files("innsteer") / "suites" / "capability.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    items = tuple(
        Item(name, row["question"], row["wrong"], row["right"], None, name, "test")
        for n, row in enumerate(rows)
        if not kind or row["kind"] == kind
        for name in (f"capability-{n:03d}",)
    )
    return Contrast("capability", "open", items)

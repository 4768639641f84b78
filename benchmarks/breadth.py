"""What works on which model: every architecture in every way that people run it.

    python benchmarks/breadth.py               # the matrix, into docs/models.md and results

The models are random and tiny, one per architecture (tests/tiny.py); the checks are those of
``innsteer doctor``, in float32 and in bfloat16.
"""

import json
import platform
import sys
import warnings
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import tiny  # noqa: E402
from innsteer.doctor import PROBES, checks  # noqa: E402
from innsteer.files import write_json  # noqa: E402

RESULTS = HERE / "results" / "breadth.json"
PAGE = HERE.parent / "docs" / "models.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def matrix() -> dict[str, dict[str, dict[str, str]]]:
    """Architecture -> dtype -> way -> verdict."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for kind in tiny.ARCHITECTURES:
        found[kind] = {}
        for name, dtype in DTYPES.items():
            model = tiny.tiny_language_model(kind)
            model.model.to(dtype)
            found[kind][name] = {check.name: check.verdict for check in checks(model)}
            print(kind, name, found[kind][name], file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict[str, dict[str, str]]]) -> str:
    """A Markdown table: a row per architecture; a cell holds both dtypes where they differ."""
    lines = ["| | " + " | ".join(PROBES) + " |", "|---" * (len(PROBES) + 1) + "|"]
    for kind, by_dtype in found.items():
        cells = []
        for way in PROBES:
            verdicts = [by_dtype[dtype][way] for dtype in DTYPES]
            same = len(set(verdicts)) == 1
            cells.append(verdicts[0] if same else " / ".join(verdicts))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every cell, write the table into the page and the figures beside it."""
    warnings.simplefilter("ignore")
    found = matrix()
    verdicts = [v for one in found.values() for ways in one.values() for v in ways.values()]
    start, end = "<!-- matrix:start -->\n", "<!-- matrix:end -->"
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(start)
    PAGE.write_text(head + start + table(found) + end + rest.partition(end)[2], encoding="utf-8")
    share = verdicts.count("works") / len(verdicts)
    figure = {"figure": "matrix: cells that work", "value": share, "low": share, "high": share}
    record = figure | {"asked": ">= 1", "unit": "share", "n": len(verdicts)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/breadth.py",
            "versions": versions | {"python": platform.python_version()},
            "machine": "2 cores, CPU",
            "figures": [record],
            "matrix": found,
        },
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main()

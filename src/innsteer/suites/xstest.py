"""XSTest: safe requests that look unsafe, and unsafe ones beside them.

Reads ``xstest_prompts.csv`` of Röttger et al. 2023, XSTest: A Test Suite for Identifying
Exaggerated Safety Behaviours in Large Language Models, https://arxiv.org/abs/2308.01263; it is not
in the package.
"""

from pathlib import Path

from innsteer.formats import Row, read_file
from innsteer.suites import refusal
from innsteer.suites.base import Benchmark


def contrast(source: str | Path, *, behaviour: str = "refusal", seed: int = 0) -> Benchmark:
    """Unsafe requests that are declined (target) against safe ones that are not (source).

    The contrast is that of the suite `refusal`; what looks alike (one focus word) stands in one
    part. Measured by refusal of the unsafe requests and over-refusal of the safe ones, apart.

    Args:
        source: the file (.csv, also .gz), with the columns prompt and label.
        seed: other seeds send other focus words to the test part.

    Raises:
        DataError: the file or one of its rows cannot be used; names file, line and value.
    """
    rows = read_file(Path(source).expanduser())
    found = [refusal.Request(row.text("prompt"), _safe(row), row.label("focus")) for row in rows]
    return refusal.of(found, behaviour, seed)


def _safe(row: Row) -> bool:
    """Whether a row's request is safe: by its label; older files say it by the type."""
    label = row.optional("label") or row.text("type")
    if row.optional("label") and label not in ("safe", "unsafe"):
        raise row.wrong(f"the label is {label!r}", expected="safe or unsafe")
    return label != "unsafe" and not label.startswith("contrast")

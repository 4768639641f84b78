"""Imports point one way: a room of the house knows only the rooms below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1] / "src" / "innsteer"

# From the ground up; each knows those before it. ``__init__`` is the door, not a room.
ROOMS = """
    errors control mixes tokens files site groups formats concepts contrast audit activations
    models flows shelf steerer setpoints readouts interventions gating shears training batches
    hooks steerers calibration steering backends metrics suites fitting planning tuning choosing
    exchange hub interference report linearity judging evaluation comparing axbench integrations
    demo doctor cli
""".split()
HEIGHT = {room: height for height, room in enumerate(ROOMS)}

# Lower rooms that these must not know either.
HIDDEN = {
    "flows": set(HEIGHT) - {"errors"},  # know no language model
    "contrast": {"models", "activations"},  # texts know no model
    "steerers": {"models", "hooks", "contrast"},  # see rows only
    "metrics": {"steering", "steerer", "steerers"},  # see completions only
}


def room(path: Path, house: Path = HOUSE) -> str:
    """The room that a file stands in: the first part of its place in the house."""
    return path.relative_to(house).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """The rooms that a file imports, inside functions and under conditions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield "a relative import"
            continue
        else:
            continue
        for name in names:
            if name.split(".")[0] == "innsteer" and name != "innsteer.__version__":
                yield name.split(".")[1] if "." in name else "innsteer"


def wrong_imports(house: Path = HOUSE) -> list[str]:
    """Every import that points up, sideways or into a hidden room."""
    wrong = []
    for path in sorted(house.rglob("*.py")):
        own = room(path, house)
        if own not in HEIGHT:  # the door; another test sees to rooms without a place
            continue
        for other in imported(path.read_text(encoding="utf-8")):
            below = HEIGHT.get(other, len(ROOMS)) < HEIGHT[own]
            if other != own and (not below or other in HIDDEN.get(own, set())):
                wrong.append(f"{path.relative_to(house)} imports {other}")
    return wrong


def test_every_module_stands_in_a_room():
    modules = {room(path) for path in HOUSE.rglob("*.py")} - {"__init__"}
    assert modules <= set(HEIGHT), "give new rooms a place in ROOMS"


def test_imports_point_one_way():
    assert wrong_imports() == []


@pytest.mark.parametrize(
    ("file", "line", "other"),
    [
        ("errors.py", "from innsteer.site import Site", "site"),
        ("site.py", "def late():\n    import innsteer.models", "models"),
        ("activations.py", "if False:\n    from innsteer import steering", "steering"),
        ("flows/coupling.py", "from innsteer.activations import Activations", "activations"),
        ("steerers/mine.py", "from innsteer.models import load_model", "models"),
        ("steerers/mine.py", "from innsteer.backends.hf import HF", "backends"),
        ("metrics/mine.py", "from innsteer.steering import Steering", "steering"),
        ("tuning.py", "from innsteer.cli import main", "cli"),
        ("site.py", "from .errors import InputError", "a relative import"),
        ("site.py", "from innsteer import Steering", "Steering"),
        ("site.py", "import innsteer", "innsteer"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_found(tmp_path, file, line, other):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line, encoding="utf-8")
    assert wrong_imports(tmp_path) == [f"{file} imports {other}"]


def test_an_import_from_below_or_of_the_version_is_let_through(tmp_path):
    for file, line in {
        "cli.py": "from innsteer.report import Report\nfrom innsteer.site import Site",
        "report.py": "from innsteer import __version__\nimport innsteerer",
        "__init__.py": "from innsteer.cli import main",
    }.items():
        (tmp_path / file).write_text(line, encoding="utf-8")
    assert wrong_imports(tmp_path) == []


def test_one_room_alone_imports_vllm():
    """Everything else runs, and is tested, where vllm is not installed."""
    found = set()
    for path in HOUSE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "vllm" for name in names):
                found.add(path.parent.relative_to(HOUSE).as_posix())
    assert found == {"backends/vllm_plugin"}

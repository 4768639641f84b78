"""The public names and nothing else; and reading them costs no torch."""

import subprocess
import sys

import pytest

import innsteer

# Names that other projects build on: they never move.
FIXED = ["compare", "evaluate", "fit", "get", "load_model", "names", "record", "tune"]
FIXED += ["Contrast", "Steering"]
MORE = ["Activations", "HF", "InnsteerError", "LanguageModel", "Report", "Site", "Where"]
MORE += ["Intervention", "Interventions", "Steerer", "__version__", "pull", "push"]


def test_the_public_names_are_these_and_no_others():
    assert innsteer.__all__ == sorted(FIXED + MORE)
    assert dir(innsteer) == innsteer.__all__


@pytest.mark.parametrize("name", FIXED + MORE)
def test_every_public_name_resolves(name):
    value = getattr(innsteer, name)
    assert getattr(value, "__name__", name) == name


@pytest.mark.parametrize(
    ("owner", "verbs"), [("Contrast", ["load"]), ("Steering", ["load", "save", "on"])]
)
def test_fixed_verbs_of_the_public_classes_exist(owner, verbs):
    assert all(callable(getattr(getattr(innsteer, owner), verb)) for verb in verbs)


def test_the_names_that_type_checkers_see_are_the_public_ones():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(innsteer.__file__).read_text(encoding="utf-8"))
    homes = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("innsteer.")
        for alias in node.names
    }
    assert homes == {name: f"innsteer.{home}" for name, home in innsteer._HOME.items()}


def test_an_unknown_attribute_is_an_attribute_error_with_its_name():
    with pytest.raises(AttributeError, match="'innsteer' has no attribute 'steer'"):
        innsteer.steer
    assert not hasattr(innsteer, "steerings")


@pytest.mark.parametrize(
    "code",
    ["import innsteer", "import innsteer.shelf; assert innsteer.shelf.describe()"]
    + ["import innsteer; innsteer.names()"],
)
def test_the_package_and_its_shelf_are_read_without_torch(code):
    check = "import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

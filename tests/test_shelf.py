"""The shelf: what is read from the files is what the classes say, third parties' too."""

import dataclasses
import importlib.util
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

import innsteer
import test_readme
from innsteer import cli, shelf, steerer, steerers
from innsteer.comparing import contenders
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError
from innsteer.steerer import Steerer

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from innsteer.interventions import Shift
from innsteer.steerer import Interventions, Steerer


@dataclass(frozen=True)
class Outside(Steerer):
    """From another package."""

    paper: ClassVar[str] = "https://example.org/outside"
    needs: ClassVar[tuple[str, ...]] = ("pairs",)
    trained: ClassVar[bool] = True
    dial: float = 2.0

    def build(self, widths, k=1, sizes={}):
        return Interventions({site: Shift(width, k) for site, width in widths.items()})

    def fit(self, acts, *, seed=0):
        return self.build(acts.widths, len(acts.behaviours))
'''


@pytest.fixture
def plug(tmp_path, monkeypatch):
    """Installs a module of the given source as the method of the given name."""

    def install(source=PLUGIN, *, name="outside", module="outside_impl"):
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
        point = EntryPoint(name, f"{module}:Outside", shelf.GROUP)
        monkeypatch.setattr(shelf, "entry_points", lambda group: [point])
        shelf.modules.cache_clear()

    yield install
    monkeypatch.undo()
    shelf.modules.cache_clear()
    for module in ("outside_impl", "fake_diffmean"):
        sys.modules.pop(module, None)


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """Puts a file beside the shelf's own, and takes it away again."""
    name = "innsteer.steerers.dropped"

    def put(source):
        for path in Path(steerers.__file__).parent.glob("*.py"):
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "dropped.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(shelf, "_SHELF", tmp_path)
        monkeypatch.setattr(steerers, "__path__", [str(tmp_path)])
        shelf.modules.cache_clear()

    yield put
    monkeypatch.undo()
    shelf.modules.cache_clear()
    if sys.modules.pop(name, None):
        del steerers.dropped


def contract():
    """The contract test as it is read with the shelf that there is now."""
    path = Path(__file__).parent / "steerers" / "test_contract.py"
    spec = importlib.util.spec_from_file_location("contract_read_again", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", shelf.describe(), ids=lambda method: method["name"])
def test_a_description_says_what_the_class_says(method):
    made = steerer.get(method["name"])
    kind = type(made)
    declared = {name for name in Steerer.__annotations__}
    told = {"paper", "needs", "sites", "trained", "invertible", "erases"}
    told |= {"across_sites", "across_tokens", "choices"}
    assert told == declared
    for name in declared:
        said = list(kind.needs) if name == "needs" else getattr(kind, name)
        assert method[name] == said, name
    assert method["fields"] == [field.name for field in dataclasses.fields(made)]
    assert method["summary"] == (kind.__doc__ or "").partition("\n")[0] != ""
    assert method["paper"].startswith("https://")
    known = {"pairs", "classes", "unmoved", "gradients", "model", "jacobians", "concepts"}
    assert set(method["needs"]) <= known and method["needs"]


@pytest.mark.parametrize("name", shelf.names())
def test_a_method_is_a_frozen_dataclass_whose_fields_all_have_defaults(name):
    made = steerer.get(name)
    assert made.name == name
    assert type(made).__dataclass_params__.frozen
    assert made == type(made)() and hash(made) == hash(type(made)())


def test_names_are_sorted_and_the_same_everywhere():
    assert shelf.names() == innsteer.names() == sorted(shelf.names())
    assert [method["name"] for method in shelf.describe()] == shelf.names()


def test_one_more_file_is_listed_held_to_the_contract_compared_and_in_the_tables(drop):
    source = Path(steerers.__file__).with_name("sadi.py").read_text(encoding="utf-8")
    drop(source)
    listed = CliRunner().invoke(cli.app, ["methods", "--json"])
    assert {method["name"] for method in json.loads(listed.output)} == {*shelf.names()}
    assert "dropped" in shelf.names()
    laws = contract()
    assert "dropped" in laws.every_method.args[1]
    laws.test_strength_points_from_source_to_target("dropped")
    task = Contrast("b", "choice", (Item("1", "Is tea good?", "N", "Y", "Y", "1"),))
    found = {one.input for one in contenders([task]) if one.method == "dropped"}
    assert found == {"classes", "target"}
    assert "| `dropped` |" in test_readme.methods_table()


def test_one_more_file_that_breaks_a_law_is_found(drop):
    source = Path(steerers.__file__).with_name("sadi.py").read_text(encoding="utf-8")
    drop(source.replace("return (coef @", "return -(coef @"))
    with pytest.raises(AssertionError, match="does not reach the target"):
        contract().test_strength_points_from_source_to_target("dropped")


def test_a_method_of_another_package_is_listed_described_and_made(plug):
    plug()
    assert "outside" in shelf.names()
    (method,) = [method for method in shelf.describe() if method["name"] == "outside"]
    assert method == {
        "name": "outside",
        "summary": "From another package.",
        "paper": "https://example.org/outside",
        "needs": ["pairs"],
        "sites": "any",
        "trained": True,
        "invertible": False,
        "erases": False,
        "across_sites": False,
        "across_tokens": False,
        "fields": ["dial"],
        "choices": {},
    }
    assert "outside_impl" not in sys.modules  # described without being imported
    made = steerer.get("outside", dial=3.0)
    assert made.dial == 3.0
    assert made.name == "outside"  # the entry point's name, by which an artifact finds it again


def test_another_package_cannot_take_the_place_of_a_method(plug):
    plug(name="diffmean", module="fake_diffmean")
    assert type(steerer.get("diffmean")).__module__ == "innsteer.steerers.diffmean"


def test_a_method_whose_module_is_gone_is_an_input_error_that_names_it(plug):
    plug()
    shelf.modules()["outside"] = "outside_that_is_gone"
    with pytest.raises(InputError, match="'outside'.*'outside_that_is_gone' is not installed"):
        shelf.describe()


def test_a_module_without_a_steerer_is_an_input_error(plug):
    plug("class Other: ...\n")
    with pytest.raises(InputError, match="holds no Steerer"):
        shelf.describe()
    with pytest.raises(InputError, match="'outside' holds 0 steerers"):
        steerer.get("outside")

"""Completion of values, asked for as a shell asks for it."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from typer.main import get_command

from innsteer import cli, contrast, get, shelf
from innsteer.activations import Activations
from innsteer.cli import completing
from innsteer.steering import Steering


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with data, a steering, models and what is none of these; and a Hub's cache."""
    for name in ("data.jsonl", "packed.csv.gz", "notes.md", "weights.pt", "small.gguf", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    for name in ("a model", "empty", "shelf/deep.jsonl"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a model" / "config.json").write_text("{}")
    acts = Activations.of_sides(torch.zeros(2, 4), torch.ones(2, 4))
    method = get("diffmean")
    Steering(method, method.fit(acts), ("mood",)).save(tmp_path / "shelf" / "mine")
    cache = tmp_path / "cache"
    (cache / "models--org--small-lm").mkdir(parents=True)
    (cache / "datasets--org--texts").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complete(verb, words, incomplete, *option):
    """What a shell would be offered for a verb's parameter."""
    name = option[0] if option else None
    command = get_command(cli.app).commands[verb]
    context = command.make_context(verb, list(words), resilient_parsing=True)
    parameter = next(
        one
        for one in command.params
        if (name in one.opts if name else one.param_type_name == "argument")
    )
    return [item.value for item in parameter.shell_complete(context, incomplete)]


def test_methods_are_offered_by_name_and_auto_where_it_is_known(home):
    assert complete("plan", [], "", "--method") == shelf.names()
    assert complete("fit", [], "", "--method") == ["auto", *shelf.names()]
    assert complete("fit", [], "inn", "--method") == ["innsteer"]
    assert complete("plan", [], "au", "--method") == []


def test_fields_are_those_of_the_method_that_was_named(home):
    assert complete("fit", ["--method", "loreft"], "ra", "--set") == ["rank="]
    assert "objective=" in complete("fit", [], "", "--set")
    assert complete("fit", ["--method", "nothing"], "", "--set") == []


def test_data_are_behaviours_files_that_are_read_and_folders(home):
    folders = ["a model/", "cache/", "empty/", "shelf/"]
    offered = complete("record", [], "")
    assert offered[: len(contrast.names())] == contrast.names()
    assert sorted(offered[len(contrast.names()) :]) == sorted(
        [*folders, "data.jsonl", "packed.csv.gz"]
    )
    assert complete("fit", [], "crit") == ["critical"]
    assert complete("eval", [], "da", "--data") == ["data.jsonl"]
    assert complete("fit", [], "shelf/") == ["shelf/deep.jsonl/", "shelf/mine/"]
    assert complete("fit", [], str(home / "data")) == [str(home / "data.jsonl")]
    assert complete("fit", [], "nowhere/x") == []


@pytest.mark.parametrize("verb", ["tune", "generate", "chat", "inspect", "push", "eval", "doctor"])
def test_steerings_are_offered_and_the_way_to_them(home, verb):
    assert complete(verb, [], "sh") == ["shelf/"]
    assert complete(verb, [], "shelf/m") == ["shelf/mine"]


def test_models_are_the_built_in_one_those_in_the_cache_and_those_here(home):
    assert complete("tune", [], "", "--model") == [
        "smollm2", "org/small-lm", "a model", "cache/", "empty/", "shelf/", "small.gguf",
    ]  # fmt: skip
    assert complete("fit", [], "org/", "--model") == ["org/small-lm"]


def test_a_folder_under_the_own_home_is_found_and_stays_as_typed(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    assert completing.data("~/da") == ["~/data.jsonl"]


def test_a_key_press_takes_under_a_second_and_no_torch(home):
    """As bash asks typer: the words so far in the environment, the offers on standard output."""
    code = "from innsteer import cli\ntry: cli.main()\nfinally: print(*sys.modules)"
    asked = {"_INNSTEER_COMPLETE": "complete_bash"}
    for words, offer in (("fit critical --method inn", "innsteer"), ("record crit", "critical")):
        last = str(len(words.split()))
        asked |= {"COMP_WORDS": f"innsteer {words}", "COMP_CWORD": last}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.argv = ['innsteer']; {code}"],
            env=os.environ | asked, capture_output=True, text=True, check=False,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        offers, _, modules = done.stdout.rpartition("\n")[0].rpartition("\n")
        assert offers.split() == [offer], done.stderr
        assert not {"torch", "transformers"} & set(modules.split())
        # Of the processor: on the clock it also waits for whatever else the machine does.
        assert sum(after[:2]) - sum(before[:2]) < 1

"""The command line: every verb, its next command, its JSON, its errors and exit codes."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import tiny
from innsteer import cli, demo, evaluation, fitting, shelf, tuning
from innsteer.activations import Activations
from innsteer.backends import hf
from innsteer.backends.base import Completion
from innsteer.backends.memo import Memo
from innsteer.cli.options import strength_of
from innsteer.contrast import Contrast
from innsteer.report import Report
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites
from words import rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a saved model, another model, data, a recording, and a tuned steering."""
    home = tmp_path_factory.mktemp("a home")
    for name, seed in (("model", 0), ("other", 1)):
        tiny.tiny_model(seed=seed).save_pretrained(home / name)
        tiny.tiny_tokenizer().save_pretrained(home / name)
    lines = (json.dumps(row) for row in rows())
    (home / "mine.jsonl").write_text("\n".join(lines))
    (home / "yours.jsonl").write_text((home / "mine.jsonl").read_text())
    pair = [
        Activations.of_sides(torch.zeros(2, 4), torch.ones(2, 4), behaviour=name)
        for name in ("mine", "yours")
    ]
    Activations.together(pair).save(home / "pair")
    return home


@pytest.fixture(autouse=True)
def in_the_home(home, monkeypatch):
    """Few neutral prompts and short answers, from within the home."""
    few = {part: suites.neutral(part)[:6] for part in ("validation", "test")}
    monkeypatch.chdir(home)
    monkeypatch.setattr(tuning.suites, "neutral", few.get)
    monkeypatch.setattr(suites, "neutral", few.get)
    monkeypatch.setattr(suites.Suite, "neutral_tokens", 4)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["innsteer", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return run


def parses(command):
    """Parse a command as the shell and typer would, without running it."""
    name, verb, *words = shlex.split(command)
    assert name == "innsteer"
    get_command(cli.app).commands[verb].make_context(verb, words)


def following(text):
    """The command that a verb proposes as the next one; it must parse."""
    *_, last = text.strip().splitlines()
    assert last.startswith("next: innsteer ")
    parses(last.removeprefix("next: "))
    return shlex.split(last)[2:]


@pytest.fixture(scope="module")
def fitted(home):
    """A fitted and tuned steering, made without the command line."""
    from innsteer.models import load_model
    from innsteer.site import Site

    model = load_model(home / "model")
    data = Contrast.load(home / "mine.jsonl")
    steering = fitting.fit(model, data, "diffmean", sites=[Site(1)])
    steering.save(home / "raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "neutral", lambda part, every=suites.neutral: every(part)[:6])
        tuning.tune(model, steering, data, preview=True, search_tokens=60).save(home / "tuned")
    return home / "tuned"


# --- happy paths ---------------------------------------------------------------------------------


def test_record_fit_tune_generate_eval_and_inspect_follow_each_other(run, home):
    code, out, _ = run("record", "mine.jsonl", "--out", "rows", "-m", "model", "--layers", "1,2")
    assert code == 0 and "24 rows at 1.residual, 2.residual in rows" in out
    words = following(out)
    assert "--together" in words, "the rows of two layers are fitted as one steering"
    words[words.index("my-steering")] = "mine"
    code, out, err = run(*words, "--method", "diffmean", "--layers", "1")
    assert code == 0, err
    words = following(out)
    assert words[:3] == ["tune", "mine", "mine.jsonl"]
    code, out, err = run(*words, "--preview")
    assert code == 0, err
    assert "<- budget" in out and "of 0.0953 nats per token" in out
    words = following(out)
    assert words[0] == "eval"
    code, out, err = run(*words, "--preview", "--instruction", "Be kind.")
    assert code == 0, err
    assert "random direction" in out.lower() and "PREVIEW" in out
    assert (home / "report" / "report.html").is_file()
    assert Steering.load(home / "mine").card["mine"]["figures"]
    code, out, err = run(*following(out), "-n", "4")
    assert code == 0, err
    code, out, err = run(*following(out))
    assert code == 0, err
    assert "every file matches its seal" in out
    assert following(out)[0] == "generate"


def test_behaviours_are_fitted_added_tuned_and_mixed(run, home):
    """Through the model, because only a shear takes another behaviour."""
    asked = 'Do you say this?\n"{} {}"\nYes or No.'
    for name, verb in (("likes", "likes"), ("fears", "fears"), ("owns", "has")):
        lines = (
            {
                "question": asked.format(" ".join(f"{thing}{i}" for i in range(15)), verb),
                "answer_matching_behavior": " Yes" if n % 2 else " No",
                "answer_not_matching_behavior": " No" if n % 2 else " Yes",
                "split": ("train", "train", "validation", "test")[n // 2 % 4],
            }
            for n, thing in enumerate("Tea Rain Salt Dusk Iron Wool Jazz Rope".split())
        )
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    how = ("--set", "objective=target", "--set", "polish=0", "--layers", "1", "-m", "model")
    code, out, err = run("fit", "likes.jsonl", "fears.jsonl", "-o", "both", *how)
    assert code == 0 and following(out)[:3] == ["tune", "both", "likes.jsonl"], err
    code, out, err = run("extend", "both", "owns.jsonl", "-o", "three")
    assert code == 0 and "added owns" in out, err
    assert following(out)[:3] == ["tune", "three", "owns.jsonl"]
    assert Steering.load(home / "both").behaviours == ("likes", "fears")
    assert run("extend", "both", "owns.jsonl")[0] == 0
    assert Steering.load(home / "both").identity == Steering.load(home / "three").identity
    words = ("interference", "both", "likes.jsonl", "owns.jsonl", "-s", "likes@1+owns@-2")
    code, out, err = run(*words)
    assert code == 0 and "effect kept" in out and " 1. likes" in out, err
    proposed = following(out)
    mix = proposed[proposed.index("--strength") + 1]
    assert strength_of(mix) == {"likes": "1", "owns": "-2"}
    found = json.loads(run(*words, "--json")[1])
    assert found["strengths"] == [1.0, -2.0] and len(found["alone"]) == 2
    code, out, err = run("generate", "both", "Hi", "-n", "2", "-s", "likes@1+owns@-2")
    assert code == 0 and "strength likes 1, owns -2, identity" in out, err
    code, out, _ = run("tune", "both", "owns.jsonl", "--preview")
    assert code == 0 and json.loads(run("inspect", "both", "--json")[1])["calibration"].keys() == {
        "owns"
    }
    code, out, _ = run("inspect", "both")
    assert code == 0 and "owns@budget" in following(out)
    code, out, err = run("eval", "both", "--data", "owns.jsonl", "--out", "seen", "--preview")
    assert code == 0 and "owns@budget" in following(out), err
    assert set(Steering.load(home / "both").card) == {"owns"}
    card = (home / "both" / "README.md").read_text()
    assert "`owns`: " in card and 'steering.on(model, {"owns": 1.0})' in card


def test_linearity_reports_on_a_model_and_on_a_steering_of_it(run, home):
    (home / "asked.txt").write_text("What is tea?\n\nIs it late?\n")
    words = ("linearity", "--prompts", "asked.txt")
    code, out, err = run(*words, "-m", "model", "-o", "linear")
    assert code == 0 and "leading subspaces" in out and "report: linear" in out, err
    assert following(out)[:4] == ["fit", "critical", "--method", "alqr"]
    assert (home / "linear" / "linearity.html").is_file()
    fit = ("fit", "mine.jsonl", "-m", "model", "--method", "alqr", "--set", "prompts=2")
    assert run(*fit, "-o", "loop")[0] == 0
    with_loop = (*words, "--steering", "loop", "--data", "mine.jsonl", "-o", "bound", "--json")
    code, out, err = run(*with_loop)
    assert code == 0, err
    found = json.loads(out)
    assert found["linearity"]["prompts"] == 2 and len(found["tracking"]["bound"]) == 3


def test_a_plan_says_what_the_proposed_fit_takes(run, home):
    words = ["mine.jsonl", "-m", "model", "--method", "diffmean", "--layers", "1"]
    code, out, err = run("plan", *words, "--no-measure")
    assert code == 0 and " forward, 0 backward" in out and "seconds    ?" in out, err
    fitting_words = following(out)
    fitting_words[fitting_words.index("my-steering")] = "planned"
    facts = json.loads(run("plan", *words, "--json")[1])
    assert facts["total_seconds"] > 0 and facts["peak"] == sum(facts["memory"].values())
    code, out, err = run(*fitting_words)
    assert code == 0, err
    fitted = Steering.load(home / "planned")
    assert fitted.provenance["rows"] == facts["rows"] and fitted.steerer.name == "diffmean"
    found = run("plan", "mine.jsonl", "-m", "model", "--layers", "1,2")
    refused(found, 2, "a plan of 2 layers that are compared", "--together")
    refused(run("plan", "mine.jsonl", "--method", "auto"), 2, "unknown method 'auto'")


def test_of_several_layers_fit_keeps_one_and_says_which(run, home):
    code, out, err = run(
        "fit", "mine.jsonl", "-o", "layers", "-m", "model", "--method", "diffmean",
        "--layers", "0,2", "--json",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(out)
    assert len(facts["sites"]) == 1
    assert set(facts["provenance"]["layers"]) == {"0.residual", "2.residual"}


def test_a_value_that_no_data_decides_is_chosen_where_that_is_asked_for(run, home):
    words = ["fit", "mine.jsonl", "-m", "model", "--method", "pid", "-o"]
    code, out, err = run(*words, "chosen", "--choose")
    assert code == 0, err
    kept = Steering.load(home / "chosen")
    table = kept.provenance["values"]
    assert list(table) == [f"setpoint={one}" for one in kept.steerer.choices["setpoint"]]
    best = max(table, key=lambda name: table[name] or 0.0)
    assert best == f"setpoint={kept.steerer.setpoint}"
    assert f"{best} {table[best]:.3f}" in " ".join(out.split())
    following(out)
    code, out, err = run(*words, "plain", "--json")
    assert code == 0 and "values" not in json.loads(out)["provenance"]


def test_methods_are_listed_with_whole_addresses_and_the_next_command_parses(run):
    code, out, _ = run("methods")
    assert code == 0
    for method in shelf.describe():
        assert method["name"] in out and method["summary"] in out
        assert method["paper"] in out.split()
    following(out)


def test_a_steering_remembers_where_its_model_came_from(run, home):
    """By another name than the path's last part, so that the base's name leads nowhere."""
    (home / "a shelf").mkdir(exist_ok=True)
    (home / "a shelf" / "its model").symlink_to(home / "model")
    code, out, err = run(
        "fit", "mine.jsonl", "-o", "far", "-m", "a shelf/its model", "--method", "diffmean",
        "--layers", "1",
    )  # fmt: skip
    assert code == 0, err
    assert Steering.load(home / "far").provenance["model"] == "a shelf/its model"
    assert "--model 'a shelf/its model'" in out
    code, out, err = run("tune", "far", "mine.jsonl", "--preview")
    assert code == 0, err
    assert "--model 'a shelf/its model'" in out
    words = following(out)
    words[words.index("report")] = "far-report"
    code, out, err = run(*words, "--preview")
    assert code == 0, err
    assert "--model 'a shelf/its model'" in out
    code, out, err = run("inspect", "far")
    assert code == 0 and "--model 'a shelf/its model'" in out
    code, out, err = run("generate", "far", "Hello", "-n", "2")
    assert code == 0, err
    (home / "a shelf" / "its model").unlink()
    found = run("generate", "far", "Hello", "-n", "2")
    refused(found, 2, "fitted on: no model 'a shelf/its model'", "say where it is: --model")


def test_layers_are_fitted_as_one_steering_only_when_that_is_asked_for(run):
    assert run("record", "mine.jsonl", "-o", "two", "-m", "model", "--layers", "1,2")[0] == 0
    words = ["fit", "mine.jsonl", "-m", "model", "--method", "diffmean"]
    found = run(*words, "--rows", "two", "-o", "x")
    refused(found, 2, "two has several layers: 1.residual, 2.residual", "--layers", "--together")
    for name, more in (("a", ["--rows", "two"]), ("b", ["--layers", "1,2"])):
        code, out, err = run(*words, *more, "--together", "-o", f"both-{name}", "--json")
        assert code == 0, err
        assert json.loads(out)["sites"] == ["1.residual", "2.residual"]
    code, out, err = run(*words, "--rows", "two", "--layers", "2", "-o", "one", "--json")
    assert code == 0, err
    assert json.loads(out)["sites"] == ["2.residual"]


def test_a_recording_is_written_while_it_is_made(run, home, monkeypatch):
    from innsteer.activations import Activations

    monkeypatch.setattr(Activations, "save", None)
    code, out, err = run("record", "mine.jsonl", "-o", "shards", "-m", "model", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert Activations.load(home / "shards").hash == facts["hash"]


def test_an_evaluation_without_an_instruction_says_that_an_arm_is_missing(run, fitted):
    words = ["eval", "tuned", "-d", "mine.jsonl", "-m", "model", "--preview", "--json", "-o"]
    code, _, err = run(*words, "silent-report")
    assert code == 0 and err.startswith("warning: no instruction is known")
    code, _, err = run(*words, "told-report", "--instruction", "Be kind.")
    assert code == 0 and "warning" not in err


def test_a_lora_stands_beside_the_steerings(run, fitted, home):
    import peft

    from innsteer.models import load_model

    whole = load_model(home / "model").model
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    peft.get_peft_model(whole, config).save_pretrained(str(home / "adapters"))
    words = ["eval", "tuned", "-d", "mine.jsonl", "-m", "model", "--preview"]
    code, out, err = run(*words, "--lora", "adapters", "-o", "beside")
    assert code == 0, err
    assert "adapters" in out and "changes weights" in out
    report = json.loads((home / "beside" / "report.json").read_text())
    assert report["arms"][-1] == "adapters"
    refused(run(*words, "--lora", "rows.jsonl", "-o", "none"), 2, "no LoRA in safetensors")
    refused(run(*words, "--lora", "else/tuned", "-o", "none"), 2, "folders of the same name")
    assert not (home / "none").exists()


def test_methods_are_compared_cell_by_cell_and_it_goes_on(run, fitted, home, monkeypatch):
    neutral, own = suites.neutral, suites.in_format
    monkeypatch.setattr(suites, "neutral", lambda part: neutral(part)[:4])
    monkeypatch.setattr(suites, "in_format", lambda of, part: own(of, part)[:6])
    words = ["compare", "mine.jsonl", "-o", "table", "-m", "model", "--layers", "1"]
    words += [
        "--evaluations",
        "3",
        "--method",
        "ridge,grid=[1.0]",
        "--instruction",
        "mine=Be kind.",
    ]
    code, out, err = run(*words, "--plan", "--json")
    assert code == 0, err
    assert json.loads(out) == {"cells": 5, "left": 5, "evaluations": 9, "seconds": None}
    code, out, err = run(*words)
    assert code == 0, err
    assert "ridge grid=[1.0] cannot be told from" in out or "ridge grid=[1.0] is" in out
    assert {path.name for path in (home / "table").iterdir()} == {
        "cells", "cells.parquet", "comparison.html", "tables.json", "tables.md", "tables.tex"
    }  # fmt: skip
    code, out, err = run(*words, "--method", "diffmean", "--plan")
    assert code == 0 and "1 of 6 cells left, 3 evaluations on validation; about" in out
    assert "--evaluations 3" in out and "--instruction 'mine=Be kind.'" in out
    following(out)
    code, out, err = run(*words, "--read", "last", "--plan")
    assert code == 0 and "5 of 5 cells left" in out and "--read last" in out, "other rows"
    code, out, err = run(*words, "--json")
    assert code == 0 and len(json.loads(out)["tables"][0]["rows"]) == 5
    refused(run(*words, "--method", "diffmean,input=model"), 2, "input 'model' for 'diffmean'")
    refused(run(*words, "--method", "diffmean,input"), 2, "expected name=value")
    refused(run(*words, "--layers", "one"), 2, "expected whole numbers")
    refused(run(*words, "--against", "nobody"), 2, "row of the table 'nobody'")
    refused(run(*words, "--layers", "7"), 2, "7")


def test_without_a_prompt_a_terminal_is_not_waited_for(run, fitted, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

        def __iter__(self):
            raise AssertionError("it was read")

    monkeypatch.setattr(sys, "stdin", Terminal())
    refused(run("generate", "tuned", "-m", "model"), 2, "no prompt; expected arguments")


def test_prompts_come_from_the_standard_input_too(run, fitted, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n\nWho?\n"))
    code, out, _ = run("generate", fitted, "-m", "model", "-n", "2", "-s", "-1.5", "--json")
    found = json.loads(out)
    assert code == 0 and found["strengths"] == {"mine": -1.5}
    assert [answer["prompt"] for answer in found["answers"]] == ["Hello?", "Who?"]


JSON_VERBS = {
    "record": ["mine.jsonl", "-o", "json-rows", "-m", "model"],
    "fit": ["mine.jsonl", "-o", "json-fit", "-m", "model", "--method", "diffmean"],
    "generate": ["tuned", "Hello [b]", "-m", "model", "-n", "3", "-s", "0.05nat"],
    "eval": ["tuned", "-d", "mine.jsonl", "-o", "json-report", "-m", "model", "--preview"],
    "inspect": ["tuned"],
    "tune": ["tuned", "mine.jsonl", "-m", "model", "--preview", "--both-ways"],
    "methods": [],
}


@pytest.mark.parametrize("verb", JSON_VERBS)
def test_json_is_all_that_stands_on_stdout(run, fitted, verb):
    code, out, err = run(verb, *JSON_VERBS[verb], "--json")
    assert code == 0, err
    assert isinstance(json.loads(out), list if verb == "methods" else dict)
    assert "..." not in err


# --- errors --------------------------------------------------------------------------------------


def refused(found, code, *said):
    assert found[0] == code, found
    assert found[1] == ""
    *before, last = found[2].strip().splitlines()
    assert last.startswith("error: ") and "Traceback" not in found[2]
    stages = [line for line in before if not line.startswith("warning: ")]
    assert all(line.endswith(" ...") for line in stages), "one line, after the stages"
    for words in said:
        assert words in last, last


BAD = {
    "rows of several": (
        ["fit", "mine.jsonl", "-o", "x", "--rows", "pair"],
        "pair was recorded from 'mine, yours'",
    ),
    "no such option": (["fit", "--nope"], "No such option: --nope"),
    "no such verb": (["fti"], "No such command 'fti'"),
    "a bogus verb": (
        ["bogus"],
        "record, fit, plan, concepts, extend, tune, generate, chat, serve, eval, compare, bench",
    ),
    "no argument": (["fit", "--out", "x"], "Missing argument"),
    "no out": (["fit", "mine.jsonl"], "--out"),
    "not a number": (["tune", "tuned", "mine.jsonl", "--budget", "x"], "--budget"),
    "too few": (["generate", "tuned", "Hi", "-n", "0"], "--tokens"),
    "method": (["fit", "mine.jsonl", "-o", "x", "--method", "difmean"], "did you mean 'diffmean'"),
    "field": (
        ["fit", "mine.jsonl", "-o", "x", "--set", "hiden=3"],
        "unknown field of method 'innsteer': 'hiden'",
    ),
    "field's form": (["fit", "mine.jsonl", "-o", "x", "--set", "hidden"], "name=value"),
    "field's name alone": (
        ["fit", "mine.jsonl", "-o", "x", "--set", "hidden"],
        "the fields of 'innsteer': ",
    ),
    "field of a method without": (
        ["fit", "mine.jsonl", "-o", "x", "--method", "diffmean", "--set", "hidden"],
        "the fields of 'diffmean': none",
    ),
    "field's type": (
        ["fit", "mine.jsonl", "-o", "x", "--set", "hidden=many"],
        "hidden=many of method 'innsteer': Input should be a valid integer",
    ),
    "field's value": (["fit", "mine.jsonl", "-o", "x", "--set", "hidden=0"], "hidden"),
    "field's name": (
        ["fit", "mine.jsonl", "-o", "x", "--set", "mixing=lux"],
        "unknown mixing 'lux'; expected one of permute",
    ),
    "behaviour": (["fit", "critcal", "-o", "x"], "did you mean 'critical'"),
    "file": (["fit", "gone.jsonl", "-o", "x"], "gone.jsonl cannot be read"),
    "layer's form": (["record", "mine.jsonl", "-o", "x", "--layers", "up"], "site 'up'"),
    "stream": (["record", "mine.jsonl", "-o", "x", "--layers", "1.mlpp"], "mlp"),
    "layer": (
        ["record", "mine.jsonl", "-o", "x", "-m", "model", "--layers", "99"],
        "layer 99 of a model with 4 blocks",
    ),
    "layer of fit": (
        ["fit", "mine.jsonl", "-o", "x", "-m", "model", "--layers", "1,99"],
        "layer 99 of a model with 4 blocks",
    ),
    "read": (["record", "mine.jsonl", "-o", "x", "--read", "lats"], "did you mean 'last'"),
    "where": (["fit", "mine.jsonl", "-o", "x", "--where", "there"], "unknown scope 'there'"),
    "rows": (["fit", "mine.jsonl", "-o", "x", "--rows", "gone"], "gone"),
    "read beside rows": (
        ["fit", "mine.jsonl", "-o", "x", "--rows", "r", "--read", "all"],
        "--read all beside --rows",
    ),
    "model": (["record", "mine.jsonl", "-o", "x", "-m", "gone"], "no model 'gone'"),
    "steering": (["inspect", "gone"], "does not exist"),
    "strength": (["generate", "tuned", "Hi", "-s", "much"], "strength 'much'"),
    "untuned strength": (["generate", "raw", "Hi", "-s", "budget"], "was not tuned"),
    "mix": (["generate", "tuned", "Hi", "-s", "mine=1"], "NAME@STRENGTH"),
    "mixed twice": (["generate", "tuned", "Hi", "-s", "mine@1+mine@2"], "each name once"),
    "mix as requests write it": (["generate", "tuned", "Hi", "-s", "mine@"], "NAME@STRENGTH"),
    "one of another": (["generate", "tuned", "Hi", "-s", "mine@1+yours@1"], "behaviour 'yours'"),
    "nothing to serve": (["serve", "model"], "--steering"),
    "a steering without a name": (["serve", "model", "--steering", "tuned"], "name=value"),
    "one name twice": (
        ["serve", "model", "--steering", "a=tuned", "--steering", "a=raw"],
        "each name once",
    ),
    "mix of another": (["generate", "tuned", "Hi", "-s", "yours@1"], "behaviour 'yours'"),
    "several from a recording": (
        ["fit", "mine.jsonl", "other.jsonl", "-o", "x", "--rows", "rows"],
        "2 behaviours from a recording",
    ),
    "several at several layers": (
        ["fit", "mine.jsonl", "other.jsonl", "-o", "x", "--layers", "1,2"],
        "2 behaviours at several layers",
    ),
    "nothing to choose": (
        ["fit", "mine.jsonl", "-o", "x", "--method", "diffmean", "--choose"],
        "nothing to choose for 'diffmean'",
    ),
    "chosen already": (
        ["fit", "mine.jsonl", "-o", "x", "--method", "pid", "--set", "setpoint=2", "--choose"],
        "leave out the value that is given",
    ),
    "choice of layer and value": (
        ["fit", "mine.jsonl", "-o", "x", "--method", "pid", "--layers", "1,2", "--choose"],
        "--choose at 2 layers that are compared",
    ),
    "choice of what auto chooses": (
        ["fit", "mine.jsonl", "-o", "x", "--method", "auto", "--choose"],
        "--choose beside",
    ),
    "choice for concepts": (
        ["fit", "mine.jsonl", "-o", "x", "--method", "flas", "--choose"],
        "--choose or several tables",
    ),
    "interference of one": (["interference", "tuned", "mine.jsonl", "-m", "model"], "two or more"),
    "a bound of nothing": (["linearity", "-o", "x", "--steering", "tuned"], "without its data"),
    "data of no steering": (["linearity", "-o", "x", "--data", "mine.jsonl"], "without a steering"),
    "not to be extended": (
        ["extend", "tuned", "yours.jsonl", "-m", "model"],
        "another behaviour for a map of",
    ),
    "budget": (["tune", "tuned", "mine.jsonl", "-m", "model", "--budget", "-1"], "budget -1.0"),
    "untuned": (
        ["eval", "raw", "-d", "mine.jsonl", "-o", "x", "-m", "model", "--preview"],
        "'raw' was not tuned",
    ),
    "twins": (["eval", "tuned", "./tuned", "-d", "mine.jsonl", "-o", "x"], "the same name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, fitted, home, case):
    words, said = BAD[case]
    refused(run(*words), 2, said)
    assert not (home / "x").exists()


EXISTING = {
    "record": ["mine.jsonl", "-o", "tuned"],
    "fit": ["mine.jsonl", "-o", "tuned"],
    "eval": ["tuned", "-d", "mine.jsonl", "-o", "tuned"],
    "demo": ["-o", "tuned"],
}


@pytest.mark.parametrize("verb", EXISTING)
def test_a_folder_that_exists_is_refused_before_any_work(run, fitted, monkeypatch, verb):
    def work(*_):
        raise AssertionError("work was begun")

    for home, name in (
        (cli.fit, "open_model"),
        (cli.measure, "open_model"),
        (cli.options, "open_model"),
        (Contrast, "load"),
        (Steering, "load"),
        (demo, "load_model"),
    ):
        monkeypatch.setattr(home, name, work)
    refused(run(verb, *EXISTING[verb]), 2, "tuned exists already", "choose another name")


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr(cli.fit, "open_model", None)
    refused(run("record", "mine.jsonl", "-o", "mine.jsonl/rows"), 2, "cannot write to")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "tuned", "Hi"],
        ["tune", "tuned", "mine.jsonl"],
        ["eval", "tuned", "-d", "mine.jsonl", "-o", "x"],
    ],
    ids=lambda words: words[0],
)
def test_another_model_is_refused_with_exit_code_3(run, fitted, words):
    found = run(*words, "-m", "other")
    refused(found, 3, "fitted on 'model'", "'other' has another weights", "fit again on this one")
    assert "allow_mismatch" not in found[2]


def test_rows_of_another_model_are_refused_with_exit_code_3(run):
    assert run("record", "mine.jsonl", "-o", "own-rows", "-m", "model")[0] == 0
    words = ["fit", "mine.jsonl", "--rows", "own-rows", "-o", "x", "-m", "other"]
    refused(run(*words), 3, "recorded on 'model'")


def test_rows_of_other_data_are_refused(run, home):
    """The same name and size, one answer changed; and then another behaviour."""
    assert run("record", "mine.jsonl", "-o", "its-rows", "-m", "model")[0] == 0
    lines = rows()
    lines[0]["chosen"] = "Madam, tea."
    (home / "changed").mkdir(exist_ok=True)
    (home / "changed" / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--rows", "its-rows", "-o", "x", "-m", "model", "--method", "diffmean"]
    found = run("fit", "changed/mine.jsonl", *words)
    refused(found, 2, "its-rows was recorded from 'mine' (", "changed/mine.jsonl is 'mine' (")
    refused(run("fit", "critical", *words), 2, "critical is 'critical' (", "record this data")


def test_what_cannot_be_done_is_exit_code_1(run, fitted):
    """Six prompts are too few for the check that a budget needs."""
    refused(run("tune", "tuned", "mine.jsonl", "-m", "model"), 1, "of 6 prompts; expected at least")


def test_an_interrupt_is_exit_code_130(run, fitted, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.HF, "generate", stop)
    refused(run("generate", "tuned", "Hi", "-m", "model"), 130, "interrupted")


INTERRUPTED = {
    "fit": ["mine.jsonl", "--layers", "1,2", "--method", "diffmean", "-m", "model", "-o", "late"],
    "tune": ["tuned", "mine.jsonl", "-m", "model", "--preview", "-o", "late"],
    "eval": ["tuned", "-d", "mine.jsonl", "-m", "model", "--preview", "-o", "late"],
}


@pytest.mark.parametrize("verb", INTERRUPTED)
def test_an_interrupted_verb_goes_on_where_it_stopped(run, home, fitted, monkeypatch, verb):
    results = []

    def stop(memo, key, suffix):
        if len(list(memo.folder.glob("*.*"))) == 4:
            raise KeyboardInterrupt
        return where(memo, key, suffix)

    def note(memo, *error):
        results.append((memo.made, memo.replayed))
        return leave(memo, *error)

    where, leave, hidden = Memo._path, Memo.__exit__, home / ".late.unfinished"
    monkeypatch.setattr(Memo, "__exit__", note)
    with monkeypatch.context() as patch:
        patch.setattr(Memo, "_path", stop)
        refused(run(verb, *INTERRUPTED[verb]), 130, "the same command goes on where it stopped")
    assert hidden.is_dir() and not (home / "late").exists()
    assert run(verb, *INTERRUPTED[verb], "--json")[0] == 0
    assert not hidden.exists()
    (home / "late").rename(home / f"late-{verb}")
    assert run(verb, *INTERRUPTED[verb], "--json")[0] == 0
    (home / "late").rename(home / f"whole-{verb}")
    (stopped, _), (rest, replayed), (whole, none) = results
    assert stopped == 4 and replayed == 4 + none and rest == whole - 4
    if verb == "eval":
        names = ["completions.jsonl"]
    else:
        names = [name.name for name in (home / "whole-fit").iterdir() if "tensors" in name.name]
    for name in names:
        late, undisturbed = (home / f"{kind}-{verb}" / name for kind in ("late", "whole"))
        assert late.read_bytes() == undisturbed.read_bytes()
    if verb != "eval":
        late, undisturbed = (Steering.load(home / f"{kind}-{verb}") for kind in ("late", "whole"))
        assert late.calibration == undisturbed.calibration
        assert late.provenance.get("layers") == undisturbed.provenance.get("layers")


FULL = """
import resource, signal, sys
from innsteer import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))
for line in sys.argv[1:]:
    sys.argv = ["innsteer", *line.split()]
    try:
        cli.main()
    except SystemExit as left:
        print("code", left.code)
"""


def test_a_full_disk_leaves_nothing_half_written(home, fitted):
    """Every write beyond 250 bytes fails, as on a full disk."""
    lines = [
        "record mine.jsonl -m model -o full",
        "fit mine.jsonl -m model --method diffmean -o full",
        "tune tuned mine.jsonl -m model --preview -o full",
        "eval tuned -d mine.jsonl -m model --preview -o full",
        "export tuned mine.jsonl -m model -o full.gguf",
    ]
    before = sorted(path.name for path in home.iterdir())
    sealed = Steering.load(home / "tuned").identity
    code = [sys.executable, "-W", "ignore", "-c", FULL, *lines]
    done = subprocess.run(code, capture_output=True, text=True, cwd=home, timeout=300)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 1"] * len(lines), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(lines) and "Traceback" not in done.stderr
    assert all("full" in line for line in errors), errors
    assert all("File too large" in line or "not whole" in line for line in errors), errors
    left = {path.name for path in home.iterdir()} - set(before)
    assert all(name.startswith(".full.") for name in left), left  # what lets them go on
    assert Steering.load(home / "tuned").identity == sealed
    for name in left:
        shutil.rmtree(home / name)


def test_no_argument_shows_the_help(run):
    code, out, err = run()
    assert code == 2 and "demo" in out + err and "error" not in err.lower()


def test_text_of_a_model_is_no_markup(run, fitted, monkeypatch):
    monkeypatch.setattr("innsteer.models.LanguageModel.decode", lambda self, ids: "[red]x[/oops]")
    code, out, _ = run("generate", "tuned", "Say [bold]", "-m", "model", "-n", "2")
    assert code == 0 and out.count("[red]x[/oops]") == 2 and "Say [bold]" in out


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["bench", "tuned", "arc_easy", "-m", "model"], "lm_eval"),
        (["judge", "heard", "--by", "http://localhost:1/v1#m", "--criterion", "Is it?"], "openai"),
    ],
)
def test_a_verb_whose_package_is_missing_says_how_to_install_it(
    run, fitted, monkeypatch, words, package
):
    answer = Completion("a", "sample", "Is it?", "It is.", arm="one")
    heard = Report("t", "mine", "sentiment", 0.1, True, {}, ("one",), (), completions=(answer,))
    heard.save("heard", replace=True)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"innsteer.integrations.{package}", raising=False)
    refused(run(*words), 2, package.replace("_", "-"), "pip install 'innsteer[eval]'")


# --- what needs a fresh process ------------------------------------------------------------------

SPY = """
import sys
from innsteer.cli import main
sys.argv[0] = "innsteer"
try:
    main()
finally:
    heavy = {"torch", "transformers", "numpy", "sklearn"} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["methods", "--json"]])
def test_help_and_the_list_of_methods_import_nothing_heavy(words):
    done = subprocess.run(
        [sys.executable, "-c", SPY, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    if "--json" in words:
        found = json.loads(done.stdout)
        assert {"diffmean", "innsteer"} <= {row["name"] for row in found}
        for row in found:
            assert {"name", "paper", "needs", "sites", "trained"} <= set(row)
            assert row["paper"].startswith("https://")
            assert isinstance(row["needs"], list) and isinstance(row["trained"], bool)
    else:
        assert "Usage" in done.stdout


# --- the demo ------------------------------------------------------------------------------------


@pytest.fixture
def quick_demo(monkeypatch):
    """The demo on a tiny model, at the smallest sizes."""
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(demo, "load_model", lambda name: tiny.tiny_language_model())
    monkeypatch.setattr(demo, "matmul_seconds", lambda: 0.1)
    monkeypatch.setattr(demo, "PAIRS", 6)
    monkeypatch.setattr(demo, "HELD_OUT", 4)
    quick = demo.get
    monkeypatch.setattr(
        demo,
        "get",
        lambda name: quick(name, epochs=1, hidden=4) if name == "innsteer" else quick(name),
    )
    whole = suites.Suite.preview
    monkeypatch.setattr(suites.Suite, "preview", lambda self: whole(self, prompts=2, new_tokens=4))
    monkeypatch.setattr(evaluation, "PREVIEW", evaluation.Sizes(4, 0, 4, (), 1, 4))


def test_the_demo_leaves_artifacts_and_a_report(run, home, quick_demo):
    code, out, err = run("demo", "--out", "first run")
    assert code == 0, err
    assert "report    first run/report/report.html" in out
    assert following(out)[1] == "first run/innsteer"
    for name in ("diffmean", "innsteer"):
        assert Steering.load(home / "first run" / name).card["critical"]["figures"]
    assert (home / "first run" / "report" / "report.html").is_file()


def test_the_demo_replaces_an_earlier_one_and_nothing_else(run, home, quick_demo, monkeypatch):
    folder = home / "again"
    assert run("demo", "--replace", "--out", "again")[0] == 0
    first = (folder / "report" / "report.html").stat().st_ino
    code, _, err = run("demo", "--replace", "--out", "again")
    assert code == 0, err
    assert (folder / "report" / "report.html").stat().st_ino != first
    assert not list(home.glob(".again*")), "no staging folder was left"
    second = (folder / "report" / "report.html").stat().st_ino
    monkeypatch.setattr("innsteer.report.Report.save", None)
    with pytest.raises(TypeError):
        demo.run(folder, replace=True)
    assert (folder / "report" / "report.html").stat().st_ino == second, "a failure changes nothing"
    monkeypatch.setattr(demo, "load_model", None)
    refused(run("demo", "--out", "again"), 2, "again exists already")
    (folder / "notes.txt").write_text("mine")
    refused(run("demo", "--replace", "--out", "again"), 2, "no earlier demo: it holds notes.txt")
    (home / "empty").mkdir()
    refused(run("demo", "--replace", "--out", "empty"), 2, "empty is no earlier demo", "lacks")
    (home / "link").symlink_to(home / "again")
    refused(run("demo", "--replace", "--out", "link"), 2, "link exists already")


def test_make_demo_may_be_run_again():
    lines = (Path(__file__).parents[1] / "Makefile").read_text().splitlines()
    (command,) = [line for line in lines if "innsteer demo" in line]
    assert "--replace" in shlex.split(command)


def test_the_demo_says_at_once_that_its_scorer_is_missing(run, monkeypatch):
    from innsteer.metrics import negative_sentiment

    negative_sentiment._vader.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    monkeypatch.setattr(demo, "load_model", None)
    refused(run("demo", "--out", "x"), 2, "needs the package 'vaderSentiment'", "pip install")


def test_a_model_is_named_with_how_to_load_it(run, fitted):
    code, out, err = run("doctor", "-m", "model,dtype=bfloat16,device=cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["machine"]["dtype"] == "bfloat16"
    code, _, err = run("doctor", "-m", "model,dytpe=bfloat16")
    assert code == 2 and "'dytpe'" in err and "did you mean 'dtype'" in err
    code, _, err = run("doctor", "-m", "model,dtype=float8")
    assert code == 2 and "dtype 'float8'" in err and "bfloat16" in err


# --- auto ----------------------------------------------------------------------------------------


def test_auto_tells_what_it_tried_and_why(run, home, monkeypatch):
    from innsteer import choosing
    from innsteer.steerer import get

    two = {"diffmean": get("diffmean"), "linear": get("linear_act")}
    monkeypatch.setattr(choosing, "candidates", lambda contrast: two)
    monkeypatch.setattr(choosing.warnings, "warn", lambda *a, **k: None)
    code, out, err = run("fit", "mine.jsonl", "-o", "auto", "-m", "model", "--method", "auto")
    assert code == 0, err
    assert "behind the best" in out and "has control" in out
    assert following(out)[:3] == ["tune", "auto", "mine.jsonl"]
    assert list(Steering.load(home / "auto").provenance["methods"]) == list(two)
    code, _, err = run("fit", "mine.jsonl", "-o", "no", "--method", "auto", "--layers", "1")
    assert code == 2 and "each method keeps its own" in err


# --- data ----------------------------------------------------------------------------------------


def test_data_check_says_what_was_found_and_what_follows(run, home):
    code, out, err = run("data", "check", "mine.jsonl")
    assert code == 0, err
    assert "15 rows of TRL preference" in out and "train 9, validation 3, test 3" in out
    assert "warning" in out and "9 training items" in out
    assert following(out) == ["fit", "mine.jsonl", "--out", "my-steering"]
    code, out, _ = run("data", "check", "mine.jsonl", "--json")
    assert code == 0 and json.loads(out)["usable"] is True


def test_data_that_cannot_be_used_is_refused_with_the_reason(run, home):
    (home / "one.csv").write_text("source,target\na,b\n")
    code, out, err = run("data", "check", "one.csv")
    assert code == 2 and "one.csv cannot be used as it is" in err and "at least 2 are needed" in err
    code, _, err = run("data", "check", "mine.jsonl,lable=x")
    assert code == 2 and "'lable'" in err and "did you mean 'label'" in err


def test_labelled_texts_go_all_the_way(run, home):
    """No pairs and no questions: fit, tune and eval take them too."""
    pairs = [row.values() for row in rows()]
    lines = [f"'{c}',polite\n'{r}',rude".replace("'", '"') for _, c, r, _ in pairs]
    (home / "labelled.csv").write_text("text,label\n" + "\n".join(lines))
    code, _, err = run("fit", "labelled.csv", "--out", "no", "-m", "model", "--layers", "1")
    assert code == 2 and "label=..." in err and not (home / "no").exists()
    data = "labelled.csv,label=polite"
    words = ["--method", "diffmean", "-m", "model", "--layers", "1"]
    code, out, err = run("fit", data, "--out", "labelled", *words)
    assert code == 0, err
    assert following(out)[:3] == ["tune", "labelled", data]
    code, out, err = run("tune", "labelled", data, "--preview")
    assert code == 0, err
    assert "<- budget" in out
    code, _, err = run("eval", "labelled", "--data", data, "--out", "said", "--preview")
    assert code == 0, err


def test_a_benchmark_s_file_goes_all_the_way(run, home):
    """Its suite stands behind its name wherever data does; its own measures are in the report."""
    found = [
        {
            "question": row["prompt"],
            "mc1_targets": {row["chosen"]: 1, row["rejected"]: 0},
            "mc2_targets": {row["chosen"]: 1, f"So {row['chosen']}": 1, row["rejected"]: 0},
        }
        for row in rows()
    ]
    (home / "mc.json").write_text(json.dumps(found))
    data, words = "mc.json,suite=truthfulqa,seed=1", ["--method", "diffmean", "--layers", "1"]
    code, out, err = run("fit", data, "--out", "true", "-m", "model", *words)
    assert code == 0, err
    assert following(out)[:3] == ["tune", "true", data]
    code, _, err = run("tune", "true", data, "--preview")
    assert code == 0, err
    code, out, err = run("eval", "true", "-d", data, "--out", "truth", "--preview", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["control"] == "mc1"
    assert {"mc1", "mc2"} <= {figure["metric"] for figure in found["figures"]}
    refused(run("data", "check", "mc.json,suite=truthfulness"), 2, "did you mean 'truthfulqa'")
    refused(run("data", "check", f"{data},scorers=x"), 2, "did you mean 'scorer'")


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_tells_the_machine_the_model_and_every_way(run, fitted):
    code, out, err = run("doctor", "-m", "model")
    assert code == 0, err
    assert "works   beams" in out and "13 of 13 ways hold on model" in out
    assert following(out)[:2] == ["fit", "critical"]
    code, out, _ = run("doctor", fitted, "-m", "model", "--json")
    told = json.loads(out)
    assert code == 0 and told["machine"]["blocks"] == tiny.LAYERS and told["steering"]["fits"]
    assert {check["verdict"] for check in told["checks"]} == {"works"}


def test_doctor_refuses_a_steering_of_another_model(run, fitted):
    code, _, err = run("doctor", fitted, "-m", "other")
    assert code == 3 and "fitted on 'model'" in err


def test_doctor_fails_where_a_way_does(run, monkeypatch):
    from innsteer.hooks import Attachment

    monkeypatch.setattr(Attachment, "_apply", lambda self, site, part, h, index, coef: h)
    code, out, err = run("doctor", "-m", "model")
    assert code == 1 and "fails   greedy" in out
    assert "greedy" in err and "do not run this model that way" in err


# --- recalibrate ---------------------------------------------------------------------------------


def test_a_steering_is_moved_to_a_sibling_on_request(run, home, fitted):
    model = tiny.tiny_model()
    for weight in model.parameters():
        weight.mul_(1.0005)
    model.save_pretrained(home / "update")
    tiny.tiny_tokenizer().save_pretrained(home / "update")
    words = ["tune", fitted, "mine.jsonl", "--preview", "--out", "moved"]
    code, _, err = run(*words, "-m", "update")
    assert code == 3 and "has another weights" in err
    code, _, err = run(*words, "--recalibrate")
    assert code == 2 and "--recalibrate without --model" in err
    kept = (fitted / "steering.json").read_bytes()
    code, _, err = run(*words[:4], "--recalibrate", "-m", "update")
    assert code == 2 and "--out" in err and (fitted / "steering.json").read_bytes() == kept
    code, out, err = run(*words, "--recalibrate", "-m", "update")
    assert code == 0, err
    assert following(out)[:2] == ["eval", "moved"] and "update" in following(out)
    assert Steering.load(home / "moved").provenance["recalibrated"]["differs"] == ["weights"]


# --- chat ----------------------------------------------------------------------------------------


def say(monkeypatch, *lines):
    """Answer the chat's prompts with these lines, then with the end of input."""
    left = iter(lines)

    def ask(*_, **__):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(cli.use.out, "input", ask)


def test_chat_answers_on_both_sides_and_remembers_each(run, fitted, monkeypatch):
    asked, generate = [], hf.HF.generate

    def watched(self, prompts, edits, sampling):
        asked.append((prompts[0].conversation, [edit.coef.tolist() for edit in edits]))
        return generate(self, prompts, edits, sampling)

    monkeypatch.setattr(hf.HF, "generate", watched)
    say(
        monkeypatch,
        "Hello",
        "/strength 0.25",
        "",
        "Why?",
        "/plain",
        "So?",
        "/reset",
        "/plain",
        "Hm?",
    )
    code, out, err = run("chat", fitted, "-n", "3", "-s", "1")
    assert code == 0, err
    assert out.count("plain   ") == 3 and out.count("steered ") == 4
    assert following(out)[0] == "inspect"
    coefs = [edits for _, edits in asked]
    assert coefs == [[], [[1.0]], [], [[0.25]], [[0.25]], [], [[0.25]]]
    roles = [[turn["role"] for turn in conversation] for conversation, _ in asked]
    assert [len(found) for found in roles] == [1, 1, 3, 3, 5, 1, 1]
    plain, steered = asked[2][0], asked[3][0]
    assert plain[0] == steered[0] and plain[2] == steered[2] and plain[1]["role"] == "assistant"


def test_a_slip_in_a_chat_ends_nothing(run, fitted, monkeypatch):
    say(monkeypatch, "/strenght 2", "/strength loud", "/strength other@1", "Hi", "/quit", "never")
    code, out, err = run("chat", fitted, "-n", "2")
    assert code == 0 and out.count("steered ") == 1
    assert "did you mean '/strength'" in err and "'loud'" in err and "behaviour 'other'" in err


# --- vectors -------------------------------------------------------------------------------------


def test_a_steering_goes_out_as_a_vector_and_comes_back(run, home, fitted):
    code, out, err = run("export", fitted, "mine.jsonl", "--out", "mood.gguf", "-s", "2")
    assert code == 0, err
    assert "of the effect" in out and "added at every token" in out
    assert following(out)[0] == "inspect"
    code, _, err = run("export", fitted, "mine.jsonl", "--out", "mood.gguf")
    assert code == 2 and "mood.gguf exists" in err
    code, _, err = run("export", fitted, "mine.jsonl", "--out", "no/mood.gguf")
    assert code == 2 and "no folder" in err
    code, _, err = run("import", "mood.gguf", "--out", "no", "-m", "model", "--layers", "1.mlp")
    assert code == 2 and "added to a block's output" in err
    words = ["import", "mood.gguf", "--out", "back", "-m", "model", "--behaviour", "mine"]
    code, out, err = run(*words)
    assert code == 0, err
    assert following(out)[:2] == ["generate", "back"]
    back, own = Steering.load(home / "back"), Steering.load(fitted)
    (new,), (old,) = ([part.shifts for _, part in one.interventions.items()] for one in (back, own))
    torch.testing.assert_close(new, 2 * old, rtol=1e-3, atol=1e-4)
    code, out, err = run("export", "back", "mine.jsonl", "--out", "b.safetensors", "--json")
    assert code == 0, err
    assert json.loads(out)["loss"]["kept"] == pytest.approx(1, abs=1e-2)
    (home / "v.pt").write_bytes(b"any")
    code, _, err = run("import", "v.pt", "--out", "no", "-m", "model")
    assert code == 3 and "weights_only=True" in err and not (home / "no").exists()


# --- concepts in words ---------------------------------------------------------------------------

SHORT = ("updates=3", "batch=2", "parts=1", "warmup=1", "every=2", "learning_rate=0.02")


@pytest.fixture(scope="module")
def field(home):
    """A folder with a short training on a table of two concepts."""
    rows = [
        {"concept": c, "prompt": f"Q{n}?", "response": f"{c} {n}", "split": "train"}
        for c in ("brave", "shy")
        for n in range(3)
    ]
    (home / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home / "field"


def fitted_field(run, field):
    if not field.exists():
        sets = [word for name in SHORT for word in ("--set", name)]
        code, told, _ = run(
            *("fit", "table.jsonl", "--method", "flas", "--model", "model", "--layers", "1"),
            *sets,
            *("--out", field, "--json"),
        )
        assert code == 0
        return json.loads(told)
    return None


def test_fit_on_a_table_of_concepts_and_generate_by_words(run, field):
    told = fitted_field(run, field)
    if told is not None:
        assert {"concept", "other", "plain"} <= set(told["diagnostics"])
        assert told["where"] == "all" and told["sites"] == ["1.residual"]
        assert not list(field.parent.glob(".field.unfinished*"))
    found = []
    for words in (
        ("--concept", "a sea captain", "--strength", "2"),
        ("--strength", 'concept(concept="a sea captain")@2'),
        ("--concept", "quite another", "--strength", "2"),
    ):
        code, out, _ = run("generate", field, "Hello", "-n", "4", "--json", *words)
        assert code == 0
        found.append(json.loads(out))
    first, same, other = found
    assert first["parameters"] == {"concept": "a sea captain"}
    assert first["strengths"] == {"concept": 2.0}
    assert first["answers"] == same["answers"] and first["identity"] == same["identity"]
    assert first["identity"] != other["identity"] != Steering.load(field).identity
    assert first["answers"][0]["steered_tokens"] > 0
    for verb in ("inspect", "doctor"):
        code, out, err = run(verb, field)
        assert code == 0, err
        words = following(out)
        assert words[words.index("--concept") + 1] == "brave"


def test_generate_without_the_concept_that_is_asked_for_is_refused(run, field):
    fitted_field(run, field)
    code, _, said = run("generate", field, "Hello")
    assert code == 2 and "concept, some text" in said


def test_a_strength_outside_the_usable_range_gets_a_warning(run, field):
    fitted_field(run, field)
    steering = Steering.load(field)
    known = {"diagnostics": {"usable_from": 0.5, "usable_to": 1.5}}
    changed = replace(steering, provenance={**steering.provenance, **known})
    changed.save(field.parent / "ranged", replace=True)
    for strength, warned in (("1.5", False), ("2", True)):
        code, _, said = run(
            *("generate", "ranged", "Hello", "-n", "2", "--concept", "x", "-s", strength)
        )
        assert code == 0 and ("outside 0.5 to 1.5" in said) == warned


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "table.jsonl", "--method", "flas", "--where", "all", "--out", "x"),
        ("fit", "table.jsonl", "table.jsonl", "--method", "flas", "--out", "x"),
        ("fit", "mine.jsonl", "--method", "flas", "--out", "x"),
        ("fit", "table.jsonl", "--method", "flas", "--layers", "1,2", "--out", "x"),
        ("plan", "mine.jsonl", "--method", "flas"),
        ("compare", "mine.jsonl", "--method", "flas", "--plan", "--out", "x"),
    ],
)
def test_what_a_field_cannot_take_is_refused(run, field, words):
    code, _, said = run(*words, "--model", "model")
    assert code == 2 and said
    assert not (field.parent / "x").exists()

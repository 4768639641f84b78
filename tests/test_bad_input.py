"""Bad input of every kind: one clear line, an exit code, no traceback, and nothing written."""

import gzip
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from innsteer import cli, fitting
from innsteer.contrast import Contrast
from innsteer.files import sha256_file
from innsteer.models import load_model
from innsteer.site import Site
from words import rows


def lines(*values):
    return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values)


GOOD = rows()
PAIR = {"source": "a b", "target": "c d"}


def with_(**change):
    return lines({**GOOD[0], **change}, *GOOD[1:])


# What is written where, before the command: text, bytes, or a function of the folder.
FILES = {
    "empty.jsonl": "",
    "blank.jsonl": "\n\n \n",
    "columns.jsonl": lines({"a": 1, "b": 2}),
    "one.jsonl": lines(PAIR),
    "oneclass.csv": "text,label\n" + "\n".join(f"word{n},1" for n in range(30)),
    "null.jsonl": with_(chosen=None),
    "number.jsonl": with_(chosen=7),
    "void.jsonl": with_(rejected="  "),
    "same.jsonl": with_(chosen="x", rejected="x"),
    "broken.jsonl": lines(GOOD[0], '{"prompt": "What'),
    "list.jsonl": "[1, 2]\n",
    "cut.jsonl.gz": gzip.compress(lines(*GOOD).encode())[:-20],
    "latin.jsonl": lines(GOOD[0]).encode() + "\ncaf\xe9".encode("latin-1"),
    "half.jsonl": lines(*GOOD).replace("Sir, tea.", "Sir \\ud800"),
    "page.docx": "PK",
    "ids.jsonl": lines(*({**row, "id": "x"} for row in GOOD)),
    "weight.jsonl": with_(weight=-1),
    "nan.jsonl": with_(weight=float("nan")),
    "split.jsonl": with_(split="training"),
    "leak.jsonl": lines(*GOOD, {**GOOD[0], "split": "test"}),
    "role.jsonl": with_(prompt=[{"content": "hi"}]),
    "tool.jsonl": with_(prompt=[{"role": "user", "content": "hi", "tool_calls": [1]}]),
    "cells.csv": "source,target\na,b,c\n",
    "twice.csv": "source,source\na,b\n",
    "labels.csv": "text,label\nfine,good\nbad,bad\n",
    "long.jsonl": '{"source": "' + "x" * 10_000_000,
    "lists.json": '{"up": ["a"], "down": ["b"]}',
    "damaged.parquet": b"PAR1 and no more",
    "pairs.txt": "no tab here\n",
    "good.jsonl": lines(*GOOD),
}


def artifact(change):
    """A copy of the good steering with a change, sealed again as an attacker would."""

    def make(home):
        folder = home / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(home / "good", folder)
        change(folder)
        seal = json.loads((folder / "steering.seal.json").read_text())
        for name in seal["files"]:
            if (folder / name).is_file():
                seal["files"][name] = sha256_file(folder / name)
        (folder / "steering.seal.json").write_text(json.dumps(seal))

    return make


def header(**values):
    def change(folder):
        found = json.loads((folder / "steering.json").read_text())
        (folder / "steering.json").write_text(json.dumps({**found, **values}))

    return artifact(change)


def tensors(change):
    def make(folder):
        found = load_file(folder / "steering.safetensors")
        save_file(change(found), folder / "steering.safetensors")

    return artifact(make)


def unsealed(change):
    def make(home):
        artifact(lambda folder: None)(home)
        change(home / "bad")

    return make


def cut(folder):
    file = folder / "steering.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def linked(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(folder / "steering.json")


def model_folder(change):
    def make(home):
        shutil.rmtree(home / "odd", ignore_errors=True)
        shutil.copytree(home / "model", home / "odd")
        change(home / "odd")

    return make


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")


def short_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


CHECK, FIT = "data check", "fit good.jsonl -o out -m model --method diffmean --layers 1"
CASES = [
    # data
    (CHECK + " empty.jsonl", "no rows"),
    (CHECK + " blank.jsonl", "no rows"),
    (CHECK + " columns.jsonl", "the columns a, b are of no known format"),
    (CHECK + " one.jsonl", "at least 2 are needed"),
    (CHECK + " oneclass.csv", "no text on the source side"),
    (CHECK + " null.jsonl", "'chosen' is None"),
    (CHECK + " number.jsonl", "'chosen' is 7"),
    (CHECK + " void.jsonl", "line 1: 'rejected' is empty"),
    (CHECK + " same.jsonl", "both answers are 'x'"),
    (CHECK + " broken.jsonl", "line 2: not JSON"),
    (CHECK + " list.jsonl", "expected an object of columns"),
    (CHECK + " cut.jsonl.gz", "cut short or damaged"),
    (CHECK + " latin.jsonl", "line 2: byte 0xe9 is not UTF-8"),
    (CHECK + " half.jsonl", "half a surrogate pair"),
    (CHECK + " page.docx", "the suffix '.docx'"),
    (CHECK + " model", "cannot be read"),
    (CHECK + " absent.jsonl", "cannot be read (No such file or directory)"),
    (CHECK + " critcal", "did you mean 'critical'"),
    (CHECK + " ids.jsonl", "the id 'x' is also that of line 1"),
    (CHECK + " weight.jsonl", "'weight' is -1"),
    (CHECK + " nan.jsonl", "'weight' is nan"),
    (CHECK + " split.jsonl", "the split of"),
    (CHECK + " leak.jsonl", "line 16 (test)"),
    (CHECK + " role.jsonl", "'prompt'[0] is {'content': 'hi'}"),
    (CHECK + " tool.jsonl", "has ['tool_calls']"),
    (CHECK + " cells.csv", "3 cells under 2 columns"),
    (CHECK + " twice.csv", "no two alike"),
    (CHECK + " labels.csv", "name the label that does"),
    (CHECK + " labels.csv,label=goood", "no row has the label 'goood'"),
    (CHECK + " good.jsonl,source=wrong,target=chosen", "no column 'wrong'"),
    (CHECK + " good.jsonl,lable=x", "did you mean 'label'"),
    (CHECK + " long.jsonl", "line 1: not JSON"),
    (CHECK + " lists.json", "the lists up, down"),
    (CHECK + " damaged.parquet", "cut short or damaged"),
    (CHECK + " pairs.txt", "has 0 tabs"),
    # models
    (FIT.replace("-m model", "-m nowhere"), "no model 'nowhere'"),
    (FIT.replace("-m model", "-m good"), "no model could be loaded"),
    (FIT.replace("-m model", "-m model,dtype=float8"), "dtype 'float8'"),
    (FIT.replace("-m model", "-m model,device=quantum"), "device 'quantum'"),
    (FIT.replace("-m model", "-m model,device=cuda"), "device 'cuda'"),
    (FIT.replace("-m model", "-m model,fast=yes"), "'fast'"),
    (FIT.replace("-m model", "-m odd"), "no model could be loaded", model_folder(pickled)),
    (FIT.replace("-m model", "-m odd"), "no model could be loaded", model_folder(short_weights)),
    # fits
    (FIT.replace("diffmean", "difmean"), "did you mean 'diffmean'"),
    (FIT.replace("--layers 1", "--layers 99"), "layer 99 of a model with 4 blocks"),
    (FIT.replace("--layers 1", "--layers abc"), "'abc'"),
    (FIT.replace("--layers 1", "--layers 1.mlps"), "did you mean 'mlp'"),
    (FIT + " --set hiden=3", "'hiden'"),
    (FIT.replace("diffmean", "innsteer") + " --set hidden=many", "hidden=many"),
    (FIT.replace("diffmean", "innsteer") + " --set hidden=-4", "hidden=-4"),
    (FIT + " --set x", "expected name=value"),
    (FIT + " --where somewhere", "'somewhere'"),
    (FIT + " --read first", "read rule 'first'"),
    (FIT + " --seed x", "'x'"),
    (FIT.replace("-o out", "-o good"), "good"),
    (FIT + " --colour red", "--colour"),
    # artifacts
    ("inspect nothing", "nothing"),
    ("inspect bad", "steering.seal.json", unsealed(lambda f: (f / "steering.seal.json").unlink())),
    ("inspect bad", "SHA-256 differs", unsealed(cut)),
    ("inspect bad", "safetensors", artifact(cut)),
    ("inspect bad", "is missing or not the file that was saved", artifact(linked)),
    ("inspect bad", "method", header(method="../../etc/passwd")),
    ("inspect bad", "unknown", header(method="os")),
    ("inspect bad", "format", header(format=99)),
    ("inspect bad", "sizes", header(widths=[10**9])),
    ("inspect bad", "Extra inputs", header(__class__="x")),
    ("inspect bad", "identity", header(where="all")),
    ("inspect bad", "steering.json", artifact(lambda f: (f / "steering.json").write_text("{"))),
    ("inspect bad", "not finite", tensors(lambda t: {k: v * float("nan") for k, v in t.items()})),
    ("inspect bad", "identity", tensors(lambda t: {k: v + 1 for k, v in t.items()})),
    ("inspect bad", "differ", tensors(lambda t: {f"x{k}": v for k, v in t.items()})),
    ("generate good Hi -m other", "has another weights"),
    ("tune bad good.jsonl", "say where it is: --model", header(provenance={"model": "gone"})),
    # strengths and prompts
    ("generate good Hi -s loud", "'loud'"),
    ("generate good Hi -s inf", "inf"),
    ("generate good Hi -s nan", "nan"),
    ("generate good Hi -s 1e9", "strength '1e9'"),
    ("generate good Hi -s budget", "tune it first"),
    ("generate good Hi -s 0.05nat", "tune it first"),
    ("generate good Hi -s other@1", "behaviour 'other'"),
    ("generate good Hi -s good@1+good@2", "each name once"),
    ("generate good Hi -n 0", "0"),
    ("generate good Hi --temperature -1", "-1"),
    ("eval good --data absent.jsonl -o out", "cannot be read"),
    ("eval good good --data good.jsonl -o out", "folders of the same name"),
    ("tune good good.jsonl --budget -1", "-1"),
    ("tune good one.jsonl", "one"),
    ("interference good good.jsonl", "expected data of two or more"),
    ("extend good good.jsonl", "another behaviour for a map of 'diffmean'"),
    ("export good good.jsonl -o out.bin", "out.bin"),
    ("import pairs.txt -o out -m model", "a .gguf or .safetensors file"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two models, the files, and a good steering."""
    home = tmp_path_factory.mktemp("bad input")
    for name, seed in (("model", 0), ("other", 1)):
        tiny.tiny_model(seed=seed).save_pretrained(home / name)
        tiny.tiny_tokenizer().save_pretrained(home / name)
    for name, content in FILES.items():
        (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    model, data = load_model(home / "model"), Contrast.load(home / "good.jsonl")
    steering = fitting.fit(model, data, "diffmean", sites=[Site(1)])
    object.__setattr__(steering, "provenance", {**steering.provenance, "model": "model"})
    steering.save(home / "good")
    return home


def listing(home):
    return {str(path): path.stat().st_mtime_ns for path in sorted(home.rglob("*"))}


@pytest.mark.parametrize("case", CASES, ids=[case[0] + ": " + case[1] for case in CASES])
def test_bad_input_is_one_clear_line_and_writes_nothing(home, monkeypatch, capsys, case):
    words, match, *make = case
    if make:
        make[0](home)
    before = listing(home)
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["innsteer", *words.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert left.value.code in (1, 2, 3), out + err
    *_, last = err.strip().splitlines()
    assert last.startswith("error: ") and match in last, err
    # What was found in data is shown beside what is wrong with it.
    assert "Traceback" not in err + out and (out == "" or words.startswith(CHECK))
    assert listing(home) == before


def test_there_are_sixty_kinds_and_more():
    assert len(CASES) >= 60

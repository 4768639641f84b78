"""What people bring: any model in every way it is run, any interruption, any artifact.

    python benchmarks/breadth.py               # everything
    python benchmarks/breadth.py --only matrix # the matrix, also into docs/models.md
    python benchmarks/breadth.py --only inputs # the kinds of bad input of tests/test_bad_input.py
    python benchmarks/breadth.py --only kills  # kill -9 at random moments
    python benchmarks/breadth.py --only mutations  # damaged and forged artifacts
    python benchmarks/breadth.py --only memory # recording a million texts
    python benchmarks/breadth.py --only plans  # what a fit takes, planned and then measured
    python benchmarks/breadth.py --only recording --tool nnsight=PYTHON ...  # beside other tools

The models are random and tiny, one per architecture (tests/tiny.py); the checks are those of
``innsteer doctor``, in float32 and in bfloat16. A command that was killed is run again until it
ends, and the artifact's identity must be that of an undisturbed run. Mutated artifacts, half of
them with a seal that fits, must be refused, or load to the same outputs. A plan and the fit that it
is about run in processes of their own, one after the other, on the embedded model.

Recording runs each tool of ``recorders.py`` in the environment whose interpreter is named for it
(steering-vectors asks for transformers 4): all take the same 1,000 prompts in chunks, one tool
after the other on each chunk, so that other work on the machine meets all alike.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "backends")]

from test_flat import held  # noqa: E402

import tiny  # noqa: E402
from innsteer import (  # noqa: E402
    Activations,
    Contrast,
    InnsteerError,
    Steering,
    fitting,
    get,
    load_model,
)
from innsteer.doctor import PROBES, checks  # noqa: E402
from innsteer.files import sha256_file, write_json  # noqa: E402
from innsteer.models.smollm2 import smollm2_folder  # noqa: E402
from innsteer.planning import Peak, plan  # noqa: E402

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


def inputs() -> tuple[int, int]:
    """How many kinds of bad input the tests know, and how many of them went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        tests = HERE.parent / "tests" / "test_bad_input.py"
        words = ["-q", str(tests), "-k", "one_clear_line", f"--junitxml={results}"]
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=HERE.parent, stdout=sys.stderr)
        (suite,) = ElementTree.parse(results).getroot()
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return count["tests"], count["failures"] + count["errors"] + count["skipped"]


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


def kills(count: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Record, fit, tune and eval, killed at random moments and run again; what came of it."""
    dice, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        tiny.tiny_model().save_pretrained(home / "model")
        tiny.tiny_tokenizer().save_pretrained(home / "model")
        words = [f"thing number {n}" for n in range(400)]
        rows = [{"prompt": f"What is {w}?", "source": f"{w}, mate.", "target": f"Sir, {w}."}
                for w in words]  # fmt: skip
        (home / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
        whole, seconds = chain(home, "whole")
        for number in range(count):
            verb = ("record", "fit", "tune", "eval")[number % 4]
            name = f"killed-{number}"
            if verb != "record":  # no need to record again
                (home / f"{name}-rows").symlink_to(home / "whole-rows")
            moment = dice.uniform(0.1, 0.98) * seconds[verb]
            same = chain(home, name, verb, moment)[0] == whole
            found.append({"verb": verb, "moment": round(moment, 2), "same": same})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def chain(
    home: Path, name: str, killed: str = "", moment: float = 0.0
) -> tuple[dict[str, str], dict[str, float]]:
    """Record, fit, tune and eval under a name, one killed and run again; digests and seconds."""
    rows, steering, report = f"{name}-rows", f"{name}-steering", f"{name}-report"
    verbs = {
        "record": ["record", "mine.jsonl", "-o", rows, "-m", "model", "--layers", "1"],
        "fit": ["fit", "mine.jsonl", "--layers", "1", "-o", steering, "-m", "model"]
        + ["--set", "epochs=60"],
        "tune": ["tune", steering, "mine.jsonl", "--preview"],
        "eval": ["eval", steering, "-d", "mine.jsonl", "-o", report, "--preview"],
    }
    seconds = {}
    for verb, words in verbs.items():
        out = home / words[words.index("-o") + 1] if "-o" in words else None
        command = [sys.executable, "-m", "innsteer.cli", *words]
        quiet: dict[str, Any] = {"cwd": home, "stderr": subprocess.DEVNULL, "stdout": -3}
        if verb == killed:
            run = subprocess.Popen(command, **quiet)
            time.sleep(moment)
            run.kill()
            run.wait()
        started = time.perf_counter()
        if out is None or not out.exists():  # it may have ended before it was killed
            subprocess.run(command, check=True, **quiet)
        seconds[verb] = time.perf_counter() - started
    fitted = Steering.load(home / steering)
    found = {
        "rows": Activations.load(home / rows).hash,
        "identity": fitted.identity,
        "strength": repr(fitted.calibration["mine"].strength),
        # The arms have the steering's name, which is another one each time.
        "answers": hashlib.sha256(
            (home / report / "completions.jsonl").read_bytes().replace(steering.encode(), b"it")
        ).hexdigest(),
    }
    return found, seconds


def mutations(count: int = 20_000, seed: int = 0) -> dict[str, int]:
    """What loading does with damaged files, and with forged ones whose seal fits."""
    dice, verdicts = random.Random(seed), dict.fromkeys(("refused", "same", "other", "crash"), 0)
    verdicts["slow"] = 0
    h, coef = torch.randn(3, 8), torch.ones(3, 1)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        acts = Activations.of_sides(torch.randn(16, 8), torch.randn(16, 8) + 1)
        method = get("innsteer", hidden=8, epochs=2)
        whole = Steering(method, method.fit(acts), ("mood",)).save(home / "whole")
        right = outputs(Steering.load(whole), h, coef)
        files = {path.name: path.read_bytes() for path in whole.iterdir()}
        seal = json.loads(files["steering.seal.json"])
        bad = home / "bad"
        bad.mkdir()
        for number in range(count):
            name = dice.choice(sorted(files))
            changed = mutated(files[name], dice)
            for other, content in files.items():
                (bad / other).write_bytes(changed if other == name else content)
            if number % 2 and name in seal["files"]:
                forged = {**seal["files"], name: sha256_file(bad / name)}
                (bad / "steering.seal.json").write_text(json.dumps({"files": forged}))
            started = time.perf_counter()
            try:
                found = outputs(Steering.load(bad), h, coef)
                verdict = "same" if torch.equal(found, right) else "other"
            except InnsteerError:
                verdict = "refused"
            except Exception as error:  # what a hostile file must not reach
                verdict = "crash"
                print(name, number, repr(error)[:300], file=sys.stderr, flush=True)
            verdicts[verdict] += 1
            verdicts["slow"] += time.perf_counter() - started > 2
    return verdicts


def outputs(steering: Steering, h: torch.Tensor, coef: torch.Tensor) -> torch.Tensor:
    """What an artifact does to some rows."""
    with torch.no_grad():
        return torch.cat([part(h, coef) for _, part in steering.interventions.items()])


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A file with a byte flipped, a stretch cut, doubled or replaced, or a number made odd."""
    kind = dice.randrange(6)
    start = dice.randrange(max(len(data), 1))
    stop = min(start + dice.randint(1, 40), len(data))
    if kind == 0:
        return data[:start] + bytes([data[start] ^ 1 << dice.randrange(8)]) + data[start + 1 :]
    if kind == 1:
        return data[:start] + data[stop:]
    if kind == 2:
        return data[:stop] + data[start:]
    if kind == 3:
        return data[:start] + dice.randbytes(stop - start) + data[stop:]
    if kind == 4:
        return data[:start]
    digits = [n for n, byte in enumerate(data) if chr(byte).isdigit()]
    odd = dice.choice([b"-1", b"1e999", b"99999999999", b"null", b"[]", b'"../../x"', b"NaN"])
    at = dice.choice(digits) if digits else 0
    return data[:at] + odd + data[at + 1 :]


PLANS = {
    "diffmean": ("diffmean", {}),
    "innsteer, classes": ("innsteer", {}),
    "innsteer, target": ("innsteer", {"objective": "target"}),
}


def plans() -> dict[str, dict[str, dict[str, float]]]:
    """Method -> planned and measured -> passes, bytes and seconds of a fit on ``critical``."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in PLANS:
        found[name] = {}
        for what in ("planned", "measured"):
            command = [sys.executable, __file__, "--child", what, name]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name][what] = json.loads(run.stdout)
            print(name, what, found[name][what], file=sys.stderr, flush=True)
    return found


def planned(name: str) -> dict[str, float]:
    """What a plan says."""
    method, fields = PLANS[name]
    told = plan(load_model("smollm2"), Contrast.load("critical"), method, **fields).to_json()
    spent = {"bytes": told["peak"], "seconds": told["total_seconds"]}
    return spent | {key: told[key] for key in ("forward", "backward", "rows")}


def measured(name: str) -> dict[str, float]:
    """What the fit then takes; its bytes are the model's and what the process grows by."""
    method, fields = PLANS[name]
    model, contrast = load_model("smollm2"), Contrast.load("critical")
    size = sum(weight.nbytes for weight in model.model.parameters())
    passes = dict.fromkeys(("forward", "backward"), 0)

    def count(kind: str) -> None:
        passes[kind] += 1

    def watch(module: Any, args: Any, out: Any) -> None:
        if out.logits.requires_grad:
            out.logits.register_hook(lambda _: count("backward"))

    model.model.base_model.register_forward_pre_hook(lambda *_: count("forward"))
    model.model.register_forward_hook(watch)
    started = time.perf_counter()
    with Peak() as peak:
        fitted = fitting.fit(model, contrast, method, **fields)
    seconds = time.perf_counter() - started
    spent = {"bytes": size + (peak.bytes or 0), "seconds": round(seconds, 3)}
    return spent | passes | {"rows": fitted.provenance["rows"]}


def recording(pythons: dict[str, str], block: int = 15, chunks: int = 20) -> dict[str, Any]:
    """CPU seconds per chunk of each tool, one thread each, and how far its rows are from ours."""
    import spine

    model, questions = load_model("smollm2"), spine.thousand()
    texts = [model._render([{"role": "user", "content": one}], opened=True) for one in questions]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [sorted(order[n::chunks], key=lambda i: len(texts[i])) for n in range(chunks)]
    job = {"model": str(smollm2_folder()), "block": block, "texts": texts, "questions": questions,
           "chunks": parts, "batch": 25}  # fmt: skip
    seconds: dict[str, list[float]] = {}
    rows, versions = {}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        running: dict[str, Any] = {}
        for tool, python in {"innsteer": sys.executable, **pythons}.items():
            running[tool] = stack.enter_context(subprocess.Popen(
                [python, str(HERE / "recorders.py"), tool, str(path)], text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ))  # fmt: skip
            versions[tool] = json.loads(running[tool].stdout.readline())
        dice = random.Random(0)
        for chunk in range(chunks):
            for tool in dice.sample(sorted(running), len(running)):
                running[tool].stdin.write(f"{chunk}\n")
                took = float(running[tool].stdout.readline())
                seconds.setdefault(tool, []).append(took)
            print(chunk, {t: round(s[-1], 2) for t, s in seconds.items()}, file=sys.stderr)
        for tool, process in running.items():
            process.stdin.close()
            process.wait()
            rows[tool] = np.load(f"{path}.{tool}.npy")
    apart = {tool: float(np.abs(own - rows["innsteer"]).max()) for tool, own in rows.items()}
    largest = float(np.abs(rows["innsteer"]).max())
    return {"cpu_seconds": seconds, "versions": versions, "apart": apart, "largest": largest,
            "batch": job["batch"], "load": os.getloadavg()[1]}  # fmt: skip


def longer(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Their seconds over ours in all, with a 95 % bootstrap interval over chunks."""
    pairs = np.array([theirs, ours]).T
    draws = pairs[np.random.default_rng(0).integers(0, len(pairs), (2000, len(pairs)))].sum(1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    whole = pairs.sum(0)
    return float(whole[0] / whole[1]), float(low), float(high)


def main() -> None:
    """Run what is asked, write the table into the page and the figures beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["matrix", "inputs", "kills", "mutations", "memory", "plans", "recording"]
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--tool", action="append", default=[], metavar="NAME=PYTHON",
                        help="records beside innsteer, with that interpreter")  # fmt: skip
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.child:
        what, name = asked.child
        print(json.dumps({"planned": planned, "measured": measured}[what](name)))
        return
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    figures = {one["figure"]: one for one in kept.get("figures", [])}

    def note(name: str, good: int, n: int) -> None:
        bounds = dict.fromkeys(("value", "low", "high"), good / n)
        figures[name] = {"figure": name, **bounds, "asked": ">= 1", "unit": "share", "n": n}
        print(json.dumps(figures[name]))

    if asked.only in (None, "matrix"):
        found = matrix()
        verdicts = [v for one in found.values() for ways in one.values() for v in ways.values()]
        start, end = "<!-- matrix:start -->\n", "<!-- matrix:end -->"
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(start)
        whole = head + start + table(found) + end + rest.partition(end)[2]
        PAGE.write_text(whole, encoding="utf-8")
        kept["matrix"] = found
        note("matrix: cells that work", verdicts.count("works"), len(verdicts))
    if asked.only in (None, "inputs"):
        kinds, wrong = inputs()
        note("bad input: one clear line, nothing written", kinds - wrong, kinds)
    if asked.only in (None, "kills"):
        kept["kills"] = kills()
        same = sum(one["same"] for one in kept["kills"])
        note("kill -9: artifacts as undisturbed", same, len(kept["kills"]))
    if asked.only in (None, "mutations"):
        kept["mutations"] = verdicts = mutations()
        good = verdicts["refused"] + verdicts["same"]
        count = good + verdicts["other"] + verdicts["crash"]
        note("mutations: refused or the same", good, count)
        note("mutations: within 2 seconds", count - verdicts["slow"], count)
    if asked.only in (None, "memory"):
        # The test's own measure, which has 6,000 texts at twelve sites; here one site.
        few, many = held(10_000, 1_000_000, sites=1)
        name = "recording 1,000,000 texts: MiB held above those for 10,000"
        bounds = dict.fromkeys(("value", "low", "high"), (many - few) / 2**20)
        figures[name] = {"figure": name, **bounds, "asked": "<= 8", "unit": "MiB", "n": 1}
        print(json.dumps(figures[name]), few, many)
    if asked.only in (None, "plans"):
        kept["plans"] = plans()
        for name, both in kept["plans"].items():
            one, other = both["planned"], both["measured"]
            same = sum(one[key] == other[key] for key in ("forward", "backward", "rows"))
            note(f"plan of {name}: passes and rows as they were", same, 3)
            for key, least, most in (("bytes", 0.7, 1.3), ("seconds", 0.5, 2.0)):
                ratio, title = one[key] / other[key], f"plan of {name}: planned {key} over measured"
                bounds = dict.fromkeys(("value", "low", "high"), ratio)
                for sign, bound in ((">=", least), ("<=", most)):
                    figure = {"figure": f"{title}, {sign} {bound}", **bounds, "n": 1}
                    figures[figure["figure"]] = figure | {"asked": f"{sign} {bound}", "unit": "1"}
                print(json.dumps(figure))
    if asked.tool:
        kept["recording"] = made = recording(dict(one.split("=", 1) for one in asked.tool))
        for tool in made["cpu_seconds"].keys() - {"innsteer"}:
            took = made["cpu_seconds"][tool]
            value, low, high = longer(took, made["cpu_seconds"]["innsteer"])
            name = f"recording 1,000 prompts: {tool}'s CPU seconds over innsteer's"
            figures[name] = {"figure": name, "value": value, "low": low, "high": high, "asked": "",
                             "unit": "ratio", "n": len(took)}  # fmt: skip
            print(json.dumps(figures[name]), made["apart"][tool])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    kept |= {
        "command": "python benchmarks/breadth.py",
        "versions": versions | {"python": platform.python_version()},
        "machine": "2 cores, CPU",
        "figures": list(figures.values()),
    }
    write_json(RESULTS, kept)


if __name__ == "__main__":
    main()

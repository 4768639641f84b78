"""The command line: each verb parses, calls one function and prints.

``--help`` imports no torch: heavy imports wait inside the verbs. Exit codes: 0 done, 1 failed, 2
bad input, 3 refused for safety, 130 interrupted.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from innsteer import completing, mixes, shelf
from innsteer.errors import DataError, InnsteerError, InputError, MismatchError, UnknownName
from innsteer.files import require_absent, write_json, write_text

app = typer.Typer(
    name="innsteer",
    help="Nonlinear steering of language models that you can measure and serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
data_verbs = typer.Typer(help="Look at data before it is used.", no_args_is_help=True)
app.add_typer(data_verbs, name="data")
# From typer itself: some of its versions bring their own click, whose errors are not click's.
UsageError: Any = typer.BadParameter.__base__
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)

MODEL = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Hub id, folder, GGUF file or smollm2; then e.g. ,dtype=bfloat16,device=cuda.",
        autocompletion=completing.models,
    ),
]
LOADING = ("dtype", "device", "device_map", "revision")
DATA = Annotated[
    str,
    typer.Argument(
        help="A built-in behaviour, a file or a Hub dataset; then e.g. ,label=toxic, ,suite=caa.",
        autocompletion=completing.data,
    ),
]
DATAS = Annotated[
    list[str],
    typer.Argument(
        help="Built-in behaviours, files or Hub datasets: one behaviour each.",
        autocompletion=completing.data,
    ),
]
FOLDER = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")]
STEERING = Annotated[
    Path, typer.Argument(help="A steering's folder.", autocompletion=completing.steerings)
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
JSON_FILE = Annotated[
    Path | None, typer.Option("--out", "-o", help="JSON file to write; must not exist.")
]
SEED = Annotated[int, typer.Option(help="Seed of every random choice.")]
STRENGTH = Annotated[
    str,
    typer.Option(
        "--strength",
        "-s",
        help="A number, budget, a cost like 0.05nat, or a mix: one@1+two@budget.",
    ),
]
CONCEPT = Annotated[
    str, typer.Option(help="What to show, in words, for a method that asks for it: flas.")
]
LAYERS = Annotated[
    str, typer.Option(help="Blocks, from 0: 19, 15,19,23 or 19.mlp; default: by method.")
]
FIELD = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A field of the method: --set hidden=64.",
        autocompletion=completing.fields,
    ),
]
TOGETHER = Annotated[bool, typer.Option("--together", help="Fit all layers as one steering.")]
READ = Annotated[
    str, typer.Option(help="Answer tokens that become rows: last, mean, all, span:START:STOP.")
]


@app.command()
def record(
    data: DATA,
    folder: FOLDER,
    model: MODEL = "smollm2",
    layers: LAYERS = "",
    read: READ = "",
    as_json: JSON = False,
) -> None:
    """Record the activations of a contrast's two sides."""
    require_absent(folder)
    from innsteer import fitting

    sites, rule = _sites(layers), _read(read)
    with Bars(as_json) as progress:
        contrast = _contrast(data)
        language_model = _load(model)
        acts = fitting.record_parts(
            language_model, contrast, sites, **rule, folder=folder, progress=progress
        )
    found = {
        "folder": str(folder),
        "rows": len(acts),
        "sites": [str(site) for site in acts.sites],
        "read": acts.read,
        "hash": acts.hash,
    }
    text = f"{len(acts)} rows at {', '.join(map(str, acts.sites))} in {folder}"
    every = ["--together"] if len(acts.sites) > 1 else []
    words = ["fit", data, "--rows", folder, *every, *_of(model)]
    following = _command(*words, "--out", "my-steering")
    _done(as_json, found, text, following)


@app.command()
def fit(
    data: DATAS,
    folder: FOLDER,
    method: Annotated[
        str,
        typer.Option(
            help="See: innsteer methods; auto: the simplest that is as good.",
            autocompletion=completing.methods_or_auto,
        ),
    ] = "innsteer",
    model: MODEL = "smollm2",
    layers: LAYERS = "",
    read: READ = "",
    where: Annotated[
        str, typer.Option(help="generated, prompt, assistant, all or range:START:STOP.")
    ] = "generated",
    field: FIELD = None,
    rows: Annotated[
        Path | None, typer.Option(help="Fit on this recording instead of recording.")
    ] = None,
    together: TOGETHER = False,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Fit a steering of one or more behaviours; of several layers, keep the best at the budget."""
    require_absent(folder)
    auto = method == "auto"
    if method not in (known := ["auto", *shelf.names()]):
        raise UnknownName("method", method, known)
    if auto and (field or rows or layers or read or where != "generated" or len(data) > 1):
        raise InputError(
            "--method auto beside --set, --rows, --layers, --read, --where or several behaviours",
            expected="one behaviour's data alone: each method keeps its own",
            remedy="name the method",
        )
    fields = {} if auto else _fields(method, field or [])
    if not auto and "concepts" in _described(method)["needs"]:
        if rows or read or where != "generated" or together or len(data) > 1:
            raise InputError(
                f"--method {method} beside --rows, --read, --where, --together or several tables",
                expected="one table of concepts, prompts and responses; every token is steered",
            )
        _fit_concepts(data[0], folder, method, model, layers, fields, seed, as_json)
        return
    from innsteer import choosing, fitting
    from innsteer.activations import Activations
    from innsteer.backends.hf import HF
    from innsteer.site import Where
    from innsteer.steerer import get

    steerer: Any = method if auto else get(method, **_typed(type(get(method)), fields))
    place = Where.parse(where)
    sites, rule = _sites(layers), _read(read)
    if rows and read:
        raise InputError(f"--read {read} beside --rows", remedy="the rows were read already")
    compared = len(sites) > 1 and not together
    if len(data) > 1 and (rows or compared):
        raise InputError(
            f"{len(data)} behaviours " + ("from a recording" if rows else "at several layers"),
            expected="data of one behaviour, or several recorded now and fitted at chosen layers",
            remedy="leave out --rows, name one layer, or fit all layers with --together",
        )
    with Bars(as_json) as progress, _memo(folder) as memo:
        contrasts = [_contrast(one) for one in data]
        contrast = contrasts[0]
        recorded = Activations.load(rows) if rows else None
        if recorded is not None and sites:
            recorded = recorded.at(*sites)
        if recorded is not None:
            _fitting(recorded, rows, contrast, data[0], together)
        backend = HF(_load(model), memo=memo)
        if recorded is not None:
            steering = fitting.fit_rows(
                backend, steerer, recorded, where=place, seed=seed, progress=progress
            )
        elif auto:
            steering = choosing.choose_method(backend, contrast, seed=seed, progress=progress)
        elif compared:
            steering = choosing.choose_layer(
                backend,
                contrast,
                steerer,
                sites,
                **rule,
                where=place,
                seed=seed,
                progress=progress,
            )
        else:
            steering = fitting.fit(
                backend,
                contrasts,
                steerer,
                sites=sites,
                **rule,
                where=place,
                seed=seed,
                progress=progress,
            )
        # Where the model came from, for the next verbs; its name alone may not lead there.
        steering = replace(steering, provenance={**steering.provenance, "model": model})
        steering.save(folder)
    text = f"fitted {steering.steerer.name} in {steering.provenance['fit_seconds']} s -> {folder}"
    if auto:
        if not as_json:
            out.print(_methods_table(steering.provenance["methods"]))
        text = f"{steering.provenance['why']}\n{text}"
        if caution := steering.provenance.get("caution"):
            _warn(caution)
    _done(as_json, _facts(steering, folder), text, _command("tune", folder, data[0], *_of(model)))


@app.command()
def plan(
    data: DATAS,
    method: Annotated[
        str, typer.Option(help="See: innsteer methods.", autocompletion=completing.methods)
    ] = "innsteer",
    model: MODEL = "smollm2",
    layers: LAYERS = "",
    read: READ = "",
    field: FIELD = None,
    together: TOGETHER = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Run and time a few passes.")
    ] = True,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Say what a fit with these options takes at most: passes, memory, disk and time."""
    if method not in shelf.names():
        raise UnknownName("method", method, shelf.names())
    fields = _fields(method, field or [])
    from innsteer import planning
    from innsteer.steerer import get

    steerer: Any = get(method, **_typed(type(get(method)), fields))
    sites, rule = _sites(layers), _read(read)
    if len(sites) > 1 and not together:
        raise InputError(
            f"a plan of {len(sites)} layers that are compared",
            expected="one layer, or all of them as one steering with --together",
            remedy="plan one: a comparison fits and tunes each in turn",
        )
    with Bars(as_json) as progress:
        contrasts = [_contrast(one) for one in data]
        found = planning.plan(
            _load(model), contrasts, steerer, sites=sites, **rule, seed=seed, measure=measure,
            progress=progress,
        )  # fmt: skip
    facts = found.to_json()
    if not as_json:
        table = Table(show_header=False, box=None)
        passes = f"{found.forward} forward, {found.backward} backward"
        table.add_row("data", f"{found.items} items, {found.tokens:,} tokens")
        table.add_row("passes", f"{passes}, a batch each")
        memory = ", ".join(f"{name} {_size(size)}" for name, size in found.memory.items())
        table.add_row("memory", f"{_size(facts['peak'])}: {memory}")
        table.add_row("recording", f"{found.rows} rows, {_size(found.disk)} on disk if kept")
        spent = ", ".join(f"{name} {value:.3g}" for name, value in found.seconds.items())
        table.add_row("seconds", f"{facts['total_seconds']:.3g}: {spent}" if spent else "?")
        out.print(table)
    words = [f"--set={one}" for one in field or []]
    words += [f"--{name}={value}" for name, value in (("layers", layers), ("read", read)) if value]
    words += ["--together"] if together else []
    following = _command(
        "fit", *data, "--method", method, *words, *_of(model), "--out", "my-steering"
    )
    text = "at most: early stopping and short answers take less; Python and its libraries beside it"
    _done(as_json, facts, text, following)


@app.command()
def concepts(
    listed: Annotated[Path, typer.Argument(help="Concepts: a .txt, one per line, or a table.")],
    file: Annotated[Path, typer.Option("--out", "-o", help="A .jsonl to write; must not exist.")],
    model: MODEL = "smollm2",
    by: Annotated[
        str, typer.Option(help="Who writes instead of the model: URL#MODEL, OpenAI-compatible.")
    ] = "",
    each: Annotated[int, typer.Option(min=1, help="Responses asked for per concept.")] = 12,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 1.0,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Write a table for flas: responses that show concepts, kept where the request helped."""
    require_absent(file)
    if file.suffix != ".jsonl":
        raise InputError(f"--out {file}", expected="a name that ends in .jsonl")
    from innsteer import distilling
    from innsteer.backends.base import Sampling
    from innsteer.backends.hf import HF
    from innsteer.judging import Endpoint
    from innsteer.smollm2 import cache_folder

    wanted = distilling.read_concepts(listed)
    writer = Endpoint(*_at(by), cache_folder() / "writer", role="writer") if by else None
    with Bars(as_json) as progress, _memo(file) as memo:
        found = distilling.distil(
            HF(_load(model or "smollm2"), memo=memo),
            wanted,
            each=each,
            sampling=Sampling(tokens, temperature, seed),
            writer=writer,
            progress=progress,
        )
        write_text(file, "".join(f"{json.dumps(row._asdict())}\n" for row in found.kept))
    none = [concept for concept, share in found.shares.items() if not share]
    if none:
        _warn(f"nothing was kept of {len(none)} concepts: {', '.join(none[:3])}")
    count = sum(found.asked.values())
    text = f"kept {len(found.kept)} of {count} responses ({found.share:.0%}) -> {file}"
    data = {
        "file": str(file),
        "kept": len(found.kept),
        "asked": count,
        "share": found.share,
        "shares": found.shares,
        "by": by or model,
    }
    _done(as_json, data, text, _command("fit", file, "--method", "flas", "--out", "field"))


@app.command()
def extend(
    steering: STEERING,
    data: DATAS,
    model: MODEL = "",
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default: in place.")
    ] = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Add behaviours to a fitted steering; those that it has stay as they are."""
    from innsteer import fitting
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    if folder:
        require_absent(folder)
    fitted, place = Steering.load(steering), folder or steering
    with Bars(as_json) as progress, _memo(place) as memo:
        contrasts = [_contrast(one) for one in data]
        backend = HF(_base(fitted, model), memo=memo)
        grown = fitting.extend(backend, fitted, contrasts, seed=seed, progress=progress)
        grown.save(place, replace=folder is None)
    names = ", ".join(one.behaviour for one in contrasts)
    text = f"added {names} in {grown.provenance['extend_seconds']} s -> {place}"
    following = _command("tune", place, data[0], *_of(model or _source(grown)))
    _done(as_json, _facts(grown, place), text, following)


@app.command()
def tune(
    steering: STEERING,
    data: DATA,
    model: MODEL = "",
    budget: Annotated[
        float | None, typer.Option(help="Cost budget, nats per token; default: 0.0953.")
    ] = None,
    both_ways: Annotated[bool, typer.Option(help="Measure negative strengths too.")] = False,
    joint: Annotated[bool, typer.Option(help="Hold the in-format cost to the budget too.")] = False,
    preview: Annotated[bool, typer.Option(help="Skip the last check on 2,000 tokens.")] = False,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            help="Move it to --model, a quantised or updated sibling, if it still holds there.",
        ),
    ] = False,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default: in place.")
    ] = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Measure dose and response, and find the strength of most effect within the budget."""
    if folder:
        require_absent(folder)
    if recalibrate and not (model and folder and budget is None):
        raise InputError(
            "--recalibrate without --model and --out, or with --budget",
            expected="the sibling to move it to, and a folder of its own; the budget stays",
        )
    from innsteer import tuning
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted, place = Steering.load(steering), folder or steering
    with Bars(as_json) as progress, _memo(place) as memo:
        contrast = _contrast(data)
        given = {"both_ways": both_ways, "joint": joint, "preview": preview, "budget": budget}
        # What was not asked for is left open: a recalibration then keeps what the old curve had.
        how: dict[str, Any] = {n: v for n, v in given.items() if v is not None and v is not False}
        how |= {"seed": seed, "progress": progress}
        if recalibrate:
            backend = HF(_load(model), memo=memo)
            tuned = tuning.recalibrate(backend, fitted, contrast, **how)
            tuned = replace(tuned, provenance={**tuned.provenance, "model": model})
        else:
            backend = HF(_base(fitted, model), memo=memo)
            tuned = tuning.tune(backend, fitted, contrast, **how)
        tuned.save(place, replace=folder is None)
    if not as_json:
        out.print(_dose_table(tuned))
    curve = tuned.calibration[contrast.behaviour]
    spent = curve.at_budget.nats
    text = f"strength {curve.strength:.4g} costs {spent:.3g} of {curve.budget} nats per token"
    following = _command(
        "eval", place, "--data", data, *_of(model or _source(tuned)), "--out", "report"
    )
    _done(as_json, _facts(tuned, place), text, following)


@app.command()
def generate(
    steering: STEERING,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; - or none: stdin.")] = None,
    model: MODEL = "",
    strength: STRENGTH = "",
    concept: CONCEPT = "",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 0.0,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Answer prompts, plain and steered side by side."""
    if not prompt and sys.stdin.isatty():
        raise InputError("no prompt", expected="arguments, or lines on standard input")
    from innsteer.backends.base import Prompt, Sampling
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    edit = _edit(fitted, strength, concept)
    texts = [text for text in prompt or ["-"] if text != "-"]
    if not prompt or "-" in prompt:
        texts += [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise InputError("no prompt", expected="arguments, or lines on standard input")
    with Bars(as_json) as progress:
        language_model = _base(fitted, model)
        backend = HF(language_model)
        prompts = [Prompt(str(n), text) for n, text in enumerate(texts)]
        sampling = Sampling(tokens, temperature, seed)
        plain = backend.generate(prompts, (), sampling, progress=progress)
        steered = backend.generate(prompts, [edit], sampling, progress=progress)
    pairs = list(zip(texts, plain, steered, strict=True))
    found = [
        {"prompt": text, "plain": p.text, "steered": s.text, "steered_tokens": s.steered}
        for text, p, s in pairs
    ]
    if not as_json:
        for text, p, s in pairs:
            out.print(f"[bold]{_escape(text)}[/bold]")
            out.print(f"  [dim]plain  [/dim] {_escape(p.text)}")
            out.print(f"  [dim]steered[/dim] {_escape(s.text)}\n")
    strengths = dict(zip(fitted.behaviours, edit.coef.tolist(), strict=True))
    used = {name: value for name, value in strengths.items() if value} or strengths
    told = ", ".join(f"{name} {value:.4g}" for name, value in used.items())
    text = f"strength {told if len(strengths) > 1 else told.rpartition(' ')[2]}"
    text += "".join(f", {key} {value!r}" for one in edit.told for key, value in one.items())
    text += f", identity {fitted.told(**dict(*edit.told)).identity[:12]}"
    _done(
        as_json,
        {
            "strengths": strengths,
            "parameters": dict(*edit.told),
            "identity": fitted.told(**dict(*edit.told)).identity,
            "answers": found,
        },
        text,
        _command("inspect", steering),
    )


@app.command()
def chat(
    steering: STEERING,
    model: MODEL = "",
    strength: STRENGTH = "",
    concept: CONCEPT = "",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 0.0,
    seed: SEED = 0,
) -> None:
    """Talk to the plain and the steered model side by side; /strength 0.5 changes it as you go."""
    from innsteer.backends.base import Prompt, Sampling
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    edit = _edit(fitted, strength, concept)
    backend = HF(_base(fitted, model))
    talks = bool(backend.model.tokenizer.chat_template)
    sides: dict[str, list[dict[str, str]]] = {"plain": [], "steered": []}
    shown = list(sides)
    out.print(f"[dim]{_escape(CHAT)}[/dim]")
    turn = 0
    while True:
        try:
            line = out.input("[bold]you[/bold]      ").strip()
        except EOFError:
            break
        word, _, value = line.partition(" ")
        try:
            if word == "/quit":
                break
            if word == "/reset":
                sides = {name: [] for name in sides}
            elif word == "/strength":
                edit = _edit(fitted, value.strip(), concept)
                mix = dict(zip(fitted.behaviours, edit.coef.tolist(), strict=True))
                told = ", ".join(f"{name} {number:.4g}" for name, number in mix.items())
                out.print(f"[dim]{_escape(told)}[/dim]")
            elif word == "/plain":
                shown = ["steered"] if "plain" in shown else list(sides)
                # What was said meanwhile, it is told when it comes back.
                sides["plain"] = list(sides["steered"])
            elif word.startswith("/"):
                raise UnknownName("command", word, ("/strength", "/plain", "/reset", "/quit"))
            elif line:
                sampling = Sampling(tokens, temperature, seed + turn)
                turn += 1
                for name in shown:
                    asked = [*sides[name], {"role": "user", "content": line}]
                    # A base model has no turns: each line stands for itself.
                    said: Any = tuple(asked) if talks else line
                    prompt = Prompt(f"{turn}", said)
                    edits = [edit] if name == "steered" and bool((edit.coef != 0).any()) else []
                    (answer,) = backend.generate([prompt], edits, sampling)
                    sides[name] = [*asked, {"role": "assistant", "content": answer.text}]
                    out.print(f"[dim]{name:8}[/dim] {_escape(answer.text)}")
        except InnsteerError as error:
            # A slip of the keyboard ends no conversation.
            _warn(str(error))
    _next(_command("inspect", steering))


CHAT = (
    "/strength 0.5 (a number, budget, 0.05nat or a mix), /plain shows or hides the plain model, "
    "/reset forgets, /quit or Ctrl-D ends"
)


@app.command("eval")
def evaluate(
    steering: Annotated[
        list[Path],
        typer.Argument(help="Folders of tuned steerings.", autocompletion=completing.steerings),
    ],
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="Behaviour or file.", autocompletion=completing.data),
    ],
    folder: FOLDER,
    model: MODEL = "",
    instruction: Annotated[str, typer.Option(help="What the prompt-only arm adds.")] = "",
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA as PEFT saves it: one arm more, as trained.")
    ] = None,
    preview: Annotated[bool, typer.Option(help="Few prompts, short answers.")] = False,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Compare steerings with unsteered, prompt-only and a random direction; write a report."""
    require_absent(folder)
    from innsteer import evaluation
    from innsteer.backends.hf import HF
    from innsteer.backends.lora import LoRA
    from innsteer.steering import Steering
    from innsteer.suites import behaviour as suites

    loaded = {path.resolve().name: Steering.load(path) for path in steering}
    if len(loaded) < len(steering) or (lora and lora.resolve().name in loaded):
        raise InputError("folders of the same name", expected="a name of its own for every arm")
    with Bars(as_json) as progress, _memo(folder) as memo:
        suite = suites.load(_contrast(data), instruction=instruction)
        if not suite.instruction:
            _warn("no instruction is known, so no prompt-only arm; give one with --instruction")
        first = next(iter(loaded.values()))
        language_model = _base(first, model)
        for fitted in loaded.values():
            _check(fitted, language_model)
        adapters = {lora.resolve().name: LoRA.load(language_model, lora)} if lora else {}
        report = evaluation.compare(
            HF(language_model, memo=memo),
            loaded,
            suite.preview() if preview else suite,
            adapters=adapters,
            sizes=evaluation.PREVIEW if preview else evaluation.Sizes(),
            seed=seed,
            progress=progress,
        )
        report.save(folder)
        for path, (name, fitted) in zip(steering, loaded.items(), strict=True):
            fitted.with_card(evaluation.card(report, name)).save(path, replace=True)
    named = _of(model or _source(first))
    if not as_json:
        out.print(_escape(report.text()))
    _done(
        as_json,
        {"folder": str(folder)} | report.to_json(),
        f"report in {folder / 'report.html'}",
        _command("generate", steering[0], "Hello", *_mixed(first, suite.behaviour), *named),
    )


@app.command()
def compare(
    data: DATAS,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of cells and tables; made, or continued.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[,input=target][,at=one-layer][,field=value ...], once each; default: all.",
            autocompletion=completing.methods,
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(help="The row that all others are compared with; default: the first.")
    ] = "",
    model: MODEL = "smollm2",
    layers: Annotated[
        str, typer.Option(help="Candidate blocks, from 0: 15,19; default: four.")
    ] = "",
    budget: Annotated[
        float | None, typer.Option(help="Cost budget, nats per token; default: 0.0953.")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Validation evaluations per cell; default: 24.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the fits: 0,1,2.")] = "0",
    instruction: Annotated[
        list[str] | None,
        typer.Option(help="BEHAVIOUR=TEXT: what the prompt-only arm adds, once for each."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the cells.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what is left to do.")] = False,
    as_json: JSON = False,
) -> None:
    """Compare methods on the same work: the same data, budget and evaluations for every one."""
    from innsteer import comparing, standings
    from innsteer.backends.hf import HF

    with Bars(as_json) as progress:
        tasks = [_contrast(one) for one in data]
        chosen = [_contender(text) for text in method or []] or comparing.contenders(tasks)
        language_model = _load(model)
        given = {"budget": budget, "evaluations": evaluations, "layers": _numbers(layers, "layers")}
        protocol = comparing.Protocol.of(
            language_model, **{name: value for name, value in given.items() if value}
        )
        comparison = comparing.Comparison(
            HF(language_model),
            tasks,
            folder,
            contenders=[*comparing.always(), *chosen],
            protocol=protocol,
            seeds=_numbers(seeds, "seeds"),
            instructions=dict(_pair(text, "--instruction") for text in instruction or []),
        )
        reference = against or chosen[0].name
        if reference not in [one.name for one in comparison.contenders]:
            known = [one.name for one in comparison.contenders]
            raise UnknownName("row of the table", reference, known)
        words = ["compare", *data, "--out", folder, *_of(model)]
        several = {"--method": method or [], "--instruction": instruction or []}
        words += [
            word for name, texts in several.items() for text in texts for word in (name, text)
        ]
        once = {"--against": against, "--layers": layers, "--budget": budget}
        once |= {"--evaluations": evaluations, "--seeds": seeds if seeds != "0" else ""}
        once |= {"--jobs": jobs if jobs != 1 else ""}
        words += [word for name, value in once.items() if value for word in (name, value)]
        if plan:
            found = comparison.plan()
            took = found["seconds"]
            time = "no cell tells yet how long" if took is None else f"about {_long(took)}"
            text = (
                f"{found['left']} of {found['cells']} cells left, {found['evaluations']} "
                f"evaluations on validation; {time}"
            )
            _done(as_json, found, text, _command(*words))
            return
        comparison.run(jobs=jobs, progress=progress)
        tables = standings.standings(
            comparison.found(), against=reference, left_out=comparison.left_out()
        )
        paths = standings.save(folder, tables, comparison.found(), comparison.context())
    if not as_json:
        for table in tables:
            out.print(_escape(table.text()), soft_wrap=True)
    _done(
        as_json,
        {"folder": str(folder), "tables": [table.to_json() for table in tables]},
        f"tables and page in {paths}",
        _command(*words, "--plan"),
    )


@app.command()
def bench(
    steering: STEERING,
    task: Annotated[list[str], typer.Argument(help="Tasks, groups or tags of lm-eval.")],
    model: MODEL = "",
    strength: STRENGTH = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of yours as YAML; their code runs.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task; default: all.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Worked examples; default: as the task says.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    file: JSON_FILE = None,
    as_json: JSON = False,
) -> None:
    """Run lm-eval's tasks on the plain and on the steered model."""
    if file:
        require_absent(file)
    from innsteer.integrations.lm_eval import run_tasks
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    with Bars(as_json) as progress:
        found = run_tasks(
            _base(fitted, model),
            fitted,
            task,
            strength=_strength(strength),
            include_path=include_path,
            limit=limit,
            shots=shots,
            chat=chat,
            progress=progress,
        )
    if file:
        write_json(file, found)
    if not as_json:
        out.print(_tasks_table(found["tasks"]))
    at = ", ".join(f"{value:.4g}" for value in found["strengths"].values())
    text = f"strength {at}, {found['steered_tokens']} tokens steered"
    _done(as_json, found, text, _command("inspect", steering))


@app.command()
def judge(
    report: Annotated[Path, typer.Argument(help="Folder of a saved report.")],
    by: Annotated[str, typer.Option(help="URL#MODEL of an OpenAI-compatible endpoint.")],
    criterion: Annotated[
        str, typer.Option(help='What a good answer does: "The answer is negative."')
    ],
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Against the first arm's answers, in both orders.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of replies; default: in innsteer's cache.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    file: JSON_FILE = None,
    as_json: JSON = False,
) -> None:
    """Have a model judge a report's answers by a criterion; the key is $OPENAI_API_KEY."""
    if file:
        require_absent(file)
    from innsteer import judging
    from innsteer.report import Report
    from innsteer.smollm2 import cache_folder

    url, name = _at(by)
    folder = cache or cache_folder() / "judge"
    judge = judging.Judge(url, name, criterion, folder, jobs=jobs)
    loaded = Report.load(report)
    with Bars(as_json) as progress:
        found = judging.judge_report(loaded, judge, pairs=pairs, progress=progress)
    if file:
        write_json(file, found)
    if found["unparsed"]:
        _warn(f"{found['unparsed']} of {found['replies']} replies say nothing and count nowhere")
    if not as_json:
        out.print(_verdicts_table(found["figures"]))
    text = f"{found['replies']} replies"
    if pairs and found["consistent"] is not None:
        text += (
            f"; {found['consistent']:.0%} of pairs alike in both orders, "
            f"the answer shown first wins {found['first_wins']:.0%}"
        )
    other = [] if pairs else ["--pairs"]
    following = _command("judge", report, "--by", by, "--criterion", criterion, *other)
    _done(as_json, found, text, following)


@app.command()
def axbench(
    steering: STEERING,
    concepts: Annotated[Path, typer.Argument(help="Concepts: a .txt, one per line, or a table.")],
    by: Annotated[
        str,
        typer.Option(help="URL#MODEL of an OpenAI-compatible judge; stand-in: offline, no score."),
    ],
    file: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write; must not exist.")],
    model: MODEL = "",
    factors: Annotated[str, typer.Option(help="Strengths to choose from.")] = "0.5,1,1.5,2",
    prompts: Annotated[
        Path | None, typer.Option(help="Instructions: a table with a column prompt.")
    ] = None,
    each: Annotated[
        int, typer.Option(min=2, help="Prompts per concept: half choose, half are scored.")
    ] = 10,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Leave out concepts that the steering learnt from.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Responses that show the concepts: a table, or a folder of AxBench's."),
    ] = None,
    also: Annotated[
        str, typer.Option(help="Methods fitted on --data for each concept: diffmean,reft_r1.")
    ] = "",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 1.0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of replies; default: in innsteer's cache.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Score steering by concepts as AxBench does: beside the plain and the prompted model."""
    require_absent(file)
    try:
        tried = tuple(float(part) for part in factors.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--factors {factors!r}", expected="numbers: 0.5,1,2") from None
    named = tuple(dict.fromkeys(part.strip() for part in also.split(",") if part.strip()))
    if bool(named) != bool(data):
        raise InputError(
            f"--also {also!r} with --data {data}",
            expected="both: methods for each concept, and responses to fit them on",
        )
    from innsteer import axbench as protocol
    from innsteer import detecting
    from innsteer.backends.base import Sampling
    from innsteer.backends.hf import HF
    from innsteer.concepts import Concepts
    from innsteer.distilling import read_concepts
    from innsteer.judging import Endpoint
    from innsteer.smollm2 import cache_folder
    from innsteer.steering import Steering

    endpoint = None
    if by != protocol.STAND_IN:
        endpoint = Endpoint(*_at(by), cache or cache_folder() / "judge", role="judge")
    fitted = Steering.load(steering)
    learnt = set(fitted.provenance.get("concepts", ()))
    wanted = [one for one in read_concepts(concepts) if not unseen or one not in learnt]
    if not wanted:
        raise InputError(
            f"no concept in {concepts} that {steering} has not learnt from",
            expected="one at least",
            remedy="leave out --unseen, or name other concepts",
        )
    arms = [protocol.unsteered(), protocol.prompting(), protocol.told(fitted, tried)]
    asked = None if prompts is None else protocol.read_prompts(prompts)
    table = None if data is None else Concepts.load(data, unseen=0.0)
    with Bars(as_json) as progress, _memo(file) as memo:
        backend = HF(_base(fitted, model), memo=memo)
        apart: dict[str, dict[str, Steering]] = {}
        if table is not None:
            (site,) = fitted.interventions
            how: dict[str, Any] = {"site": site, "seed": seed, "progress": progress}
            for method in named:
                apart[method] = detecting.fit_each(backend, table, wanted, method, **how)
                arms.append(protocol.fitted(method, apart[method], tried))
        judge: protocol.Judging = protocol.StandIn(backend)
        if endpoint is not None:
            judge = protocol.ByEndpoint(endpoint, jobs)
        found = protocol.run(
            backend,
            arms,
            wanted,
            judge,
            each=each,
            prompts=asked,
            sampling=Sampling(tokens, temperature, seed),
            progress=progress,
        )
        if table is not None:
            read, single = detecting.detection(backend, table, wanted, apart, progress=progress)
            found["figures"] += [vars(one) for one in read]
            found["detection"] = single
        found["learnt"] = [one for one in wanted if one in learnt]
        found["identity"] = fitted.identity
        write_json(file, found)
    if found["unparsed"]:
        _warn(f"{found['unparsed']} of {found['replies']} replies say nothing and count nowhere")
    if found["left_out"]:
        _warn(f"not judged in all arms, left out: {', '.join(found['left_out'])}")
    if not as_json:
        out.print(_concepts_table(found))
    gaps = [one for one in found["figures"] if one["against"]]
    text = "".join(
        "{arm} less {against}: {value:+.3f} ({low:+.3f} to {high:+.3f})\n".format(**one)
        for one in gaps
    )
    if table is not None:
        heard = {one["arm"]: one for one in found["figures"] if one["metric"] == "auroc"}
        text += "".join(
            "{arm} detects with AUROC {value:.3f} ({low:.3f} to {high:.3f})\n".format(
                **heard[arm.name]
            )
            if arm.name in heard
            else f"{arm.name} has no read-out\n"
            for arm in arms[2:]
        )
    text += (
        f"{found['label']}\n{len(wanted) - len(found['left_out'])} concepts, "
        f"{len(found['learnt'])} of {len(wanted)} learnt from -> {file}"
    )
    following = _command("generate", steering, "Hello", "--concept", wanted[0], *_of(model))
    _done(as_json, found, text, following)


@app.command()
def interference(
    steering: STEERING,
    data: DATAS,
    model: MODEL = "",
    strength: STRENGTH = "",
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Show what the behaviours of a steering do to each other, alone and all together."""
    from innsteer.interference import interference as measure
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    chosen = _strength(strength)
    with Bars(as_json) as progress:
        contrasts = [_contrast(one) for one in data]
        if not isinstance(chosen, dict):
            chosen = {one.behaviour: chosen for one in contrasts} if chosen else {}
        language_model = _base(fitted, model)
        found = measure(
            language_model, fitted, contrasts, strengths=chosen, seed=seed, progress=progress
        )
    if as_json:
        _print_json(found.to_json())
        return
    out.print(_escape(found.text()))
    mix = ",".join(f"{name}={s:.4g}" for name, s in found.mix.items())
    _next(
        _command("generate", steering, "Hello", "--strength", mix, *_of(model or _source(fitted)))
    )


@app.command()
def linearity(
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")],
    model: MODEL = "",
    prompts: Annotated[
        str, typer.Option(help="File with a column prompt, or lines; default: neutral ones.")
    ] = "",
    most: Annotated[int, typer.Option(min=2, help="Prompts to measure at most.")] = 8,
    steering: Annotated[
        str, typer.Option(help="An alqr steering: its tracking error beside its bound.")
    ] = "",
    data: Annotated[str, typer.Option(help="What that steering was fitted on.")] = "",
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Report how linear each block of a model is, and how far feedback is from its plan."""
    from dataclasses import asdict

    from innsteer import linearity as linear
    from innsteer.steering import Steering

    if bool(steering) != bool(data):
        raise InputError(
            "a steering without its data" if steering else "data without a steering",
            expected="--steering and --data together, or neither",
        )
    require_absent(to)
    fitted = Steering.load(steering) if steering else None
    asked = linear.prompts(prompts or None, most)
    contrast = _contrast(data) if data else None
    with Bars(as_json) as progress:
        chosen = _base(fitted, model) if fitted else _load(model or "smollm2")
        found = linear.linearity(chosen, asked, seed=seed, progress=progress)
        tracked = None
        if fitted and contrast:
            tracked = linear.tracking(chosen, fitted, contrast, seed=seed, progress=progress)
    linear.save(to, found, tracked, prompts=prompts or "the package's neutral ones")
    facts = {"linearity": asdict(found)} | ({"tracking": asdict(tracked)} if tracked else {})
    if as_json:
        _print_json(facts | {"report": str(to)})
        return
    out.print(_escape(linear.text(found, tracked)))
    out.print(f"\nreport: {_escape(str(to / 'linearity.html'))}")
    _next(_command("fit", "critical", "--method", "alqr", "--out", "my-steering", *_of(model)))


@app.command()
def inspect(steering: STEERING, as_json: JSON = False) -> None:
    """Show what a steering is, and whether its files are whole."""
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    facts = _facts(fitted, steering)
    if not as_json:
        table = Table(show_header=False, box=None)
        for name in ("method", "behaviours", "sites", "where", "base", "identity", "strength"):
            table.add_row(name, _escape(str(facts[name])))
        for name, value in facts["diagnostics"].items():
            table.add_row(name, f"{value:.4g}")
        out.print(table)
        if fitted.calibration:
            out.print(_dose_table(fitted))
    tuned = next(iter(fitted.calibration), fitted.behaviours[0])
    words = (*_mixed(fitted, tuned), *_of(_source(fitted)))
    following = _command("generate", steering, "Hello", *words)
    _done(as_json, facts, "every file matches its seal", following)


@app.command("import")
def import_vector(
    file: Annotated[Path, typer.Argument(help="A .gguf control vector, or .safetensors.")],
    folder: FOLDER,
    model: MODEL = "smollm2",
    layers: Annotated[str, typer.Option(help="Blocks, from 0, if the file does not say.")] = "",
    tensor: Annotated[str, typer.Option(help="Name of the tensor in the file.")] = "",
    row: Annotated[int | None, typer.Option(help="Row of a matrix, e.g. an SAE's feature.")] = None,
    behaviour: Annotated[str, typer.Option(help="Its name; default: the file's.")] = "",
    where: Annotated[
        str, typer.Option(help="Default: all for GGUF, as llama.cpp has it; else generated.")
    ] = "",
    as_json: JSON = False,
) -> None:
    """Make a steering of another tool's vector: repeng, llama.cpp, CAA, AxBench, an SAE."""
    require_absent(folder)
    from innsteer import exchange
    from innsteer.site import Where

    sites = _sites(layers)
    if odd := [str(site) for site in sites if site.stream != "residual"]:
        raise InputError(
            f"--layers {', '.join(odd)}", expected="numbers: a vector is added to a block's output"
        )
    numbers = [site.layer for site in sites]
    language_model = _load(model)
    steering = exchange.import_vector(
        language_model,
        file,
        layers=numbers,
        tensor=tensor or None,
        row=row,
        behaviour=behaviour or None,
        where=Where.parse(where) if where else None,
    )
    steering = replace(steering, provenance={**steering.provenance, "model": model})
    steering.save(folder)
    placed = ", ".join(map(str, steering.interventions))
    following = _command("generate", folder, "Hello", "--strength", "1", *_of(model))
    _done(as_json, _facts(steering, folder), f"imported at {placed} -> {folder}", following)


@app.command("export")
def export_vector(
    steering: STEERING,
    source: DATA,
    file: Annotated[Path, typer.Option("--out", "-o", help="A .gguf or .safetensors file.")],
    model: MODEL = "",
    strength: STRENGTH = "",
    as_json: JSON = False,
) -> None:
    """Write a steering as a vector for other tools, and measure what is lost by that."""
    from innsteer import exchange
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    exchange.require_place(file, fitted.interventions)
    chosen = _strength(strength)
    with Bars(as_json) as progress:
        contrast = _contrast(source)
        backend = HF(_base(fitted, model))
        vectors = exchange.as_vector(backend, fitted, contrast, chosen, progress=progress)
        lost = exchange.loss(backend, fitted, vectors, contrast, chosen, progress=progress)
        exchange.export_vector(backend.model, vectors, file, note=f"from {fitted.identity}")
    if not as_json:
        table = Table("", "control", "cost (nats/token)")
        table.add_row("this steering", f"{lost.control:.3f}", f"{lost.cost:.3f}")
        table.add_row("the vector", f"{lost.exported:.3f}", f"{lost.exported_cost:.3f}")
        table.add_row("unsteered", f"{lost.unsteered:.3f}", "")
        out.print(table)
    text = (
        f"{file}: keeps {lost.kept:.0%} of the effect (difference {lost.gap:.3f}, {lost.low:.3f} "
        f"to {lost.high:.3f}, {lost.n} items), added at every token"
    )
    facts = {"file": str(file), "sites": [str(site) for site in vectors], "loss": lost.to_json()}
    _done(as_json, facts, text, _command("inspect", steering))


@app.command()
def push(
    steering: STEERING,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    revision: Annotated[str, typer.Option(help="Branch, made if there is none.")] = "",
    again: Annotated[
        bool, typer.Option("--replace", help="Push beside something else that it holds.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Upload a steering to the Hub, in one commit."""
    from innsteer import hub

    commit = hub.push(steering, repo, private=private, revision=revision or None, replace=again)
    facts = {"folder": str(steering), "repo": repo, "commit": commit}
    following = _command("pull", repo, "--revision", commit, "--out", repo.rpartition("/")[2])
    _done(as_json, facts, f"{steering} -> {repo} at {commit}", following)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.")],
    folder: FOLDER,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit; default: main.")] = "",
    as_json: JSON = False,
) -> None:
    """Download a steering from the Hub: its own files alone, checked before they appear."""
    require_absent(folder)
    from innsteer import hub

    commit, left = hub.pull(repo, folder, revision=revision or None)
    if left and not as_json:
        _warn(f"not downloaded, for they are no part of a steering: {', '.join(map(repr, left))}")
    facts = {"folder": str(folder), "repo": repo, "commit": commit, "left": left}
    text = f"{repo} at {commit} -> {folder}, every file matches its seal"
    _done(as_json, facts, text, _command("inspect", folder))


@data_verbs.command("check")
def data_check(source: DATA, as_json: JSON = False) -> None:
    """Look data over: format, sizes, balance, duplicates, give-aways, and what would be done."""
    from innsteer.audit import audit

    found = audit(_contrast(source))
    if not as_json:
        table = Table(show_header=False, box=None)
        for name, value in found.facts.items():
            shown = value
            if isinstance(value, dict):
                shown = ", ".join(f"{key} {count:g}" for key, count in value.items())
            table.add_row(name, _escape(str(shown)))
        out.print(table)
        marks = {"fine": "dim", "warning": "yellow", "stop": "red"}
        for one in found.findings:
            out.print(f"[{marks[one.level]}]{one.level:8}[/] {_escape(one.text)}")
    stops = [one.text for one in found.findings if one.level == "stop"]
    choice = ["--set", "objective=target"] if found.facts["kind"] == "choice" else []
    following = _command("fit", source, *choice, "--out", "my-steering")
    if stops:
        if as_json:
            _print_json(found.to_json())
        raise DataError(f"{source} cannot be used as it is: {stops[0]}")
    _done(as_json, found.to_json(), "nothing stands in the way of a fit", following)


@app.command()
def doctor(
    steering: Annotated[
        Path | None,
        typer.Argument(
            help="Also check a steering's folder against the model.",
            autocompletion=completing.steerings,
        ),
    ] = None,
    model: MODEL = "",
    as_json: JSON = False,
) -> None:
    """Check this machine, and steer a model in every way that people run it."""
    from innsteer import doctor as room
    from innsteer.steering import Steering

    fitted = Steering.load(steering) if steering else None
    machine = room.machine()
    with Bars(as_json) as progress:
        language_model = _base(fitted, model) if fitted else _load(model or "smollm2")
        found = room.checks(language_model, progress=progress)
    facts = machine | room.about(language_model)
    if not as_json:
        table = Table(show_header=False, box=None)
        for name, value in facts.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            table.add_row(name, _escape(str(shown if shown not in ("", None) else "none")))
        out.print(table)
        marks = {"works": "green", "refused": "yellow", "fails": "red"}
        for check in found:
            mark = f"[{marks[check.verdict]}]{check.verdict:8}[/]"
            out.print(f"{mark}{check.name:14} [dim]{_escape(check.note)}[/dim]")
    failing = [check.name for check in found if check.verdict == "fails"]
    told = {"machine": facts, "checks": [vars(check) for check in found]}
    if fitted:
        told |= {"steering": {"identity": fitted.identity, "fits": True}}
    text = f"{len(found) - len(failing)} of {len(found)} ways hold on {language_model.name}"
    if fitted:
        text += f"; {steering} was fitted on it, and its files match its seal"
    words = _of(model or (_source(fitted) if fitted else ""))
    following = (
        _command("generate", steering, "Hello", *words)
        if fitted
        else _command("fit", "critical", *words, "--out", "my-steering")
    )
    _done(as_json, told, text, following)
    if failing:
        raise InnsteerError(
            f"{', '.join(failing)}: steering does not do there what it should",
            expected="what the same edit gives when it is added by hand",
            remedy="do not run this model that way; report it with innsteer doctor --json",
        )


@app.command()
def methods(as_json: JSON = False) -> None:
    """List the methods on the shelf."""
    found = shelf.describe()
    if as_json:
        _print_json(found)
        return
    # No table: a paper's address must stand whole, however narrow the terminal.
    for row in found:
        trained = "trained" if row["trained"] else "closed form"
        needs = ", ".join(row["needs"])
        out.print(f"[bold]{row['name']}[/bold]  [dim]needs {needs}; {trained}[/dim]")
        out.print(f"  {_escape(row['summary'])}\n  {_escape(row['paper'])}\n")
    _next("innsteer fit critical --method diffmean --out my-steering")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder or smollm2.")],
    steering: Annotated[
        list[str],
        typer.Option("--steering", help="NAME=FOLDER, in the order in which they are applied."),
    ],
    untested: Annotated[
        bool,
        typer.Option("--steering-untested", help="Start where no test has run: on a GPU, say."),
    ] = False,
) -> None:
    """Serve a model by vLLM's OpenAI server, steered per request; vLLM's own flags pass through."""
    pairs = [_pair(one, "--steering") for one in steering]
    if len({name for name, _ in pairs}) < len(pairs):
        raise InputError(f"--steering {' '.join(steering)}", expected="each name once")
    from innsteer.backends.vllm_plugin import server

    server.serve(model, dict(pairs), ctx.args, untested=untested)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("demo"),
    again: Annotated[
        bool, typer.Option("--replace", help="Replace an earlier demo in that folder.")
    ] = False,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Fit INNSteer and DiffMean on a small chat model, tune both, show answers and costs."""
    from innsteer import demo as room

    with Bars(as_json) as progress:
        made = room.run(folder, replace=again, seed=seed, progress=progress)
    facts = {
        "folder": str(made.folder),
        "artifact": str(made.artifact),
        "report": str(made.folder / "report" / "report.html"),
        "seconds": made.seconds,
        "cpu_seconds": round(made.cpu_seconds, 1),
        "matmul_seconds": made.matmul_seconds,
    }
    if not as_json:
        out.print(_escape(made.report.text()))
    text = (
        f"{sum(made.seconds.values()):.0f} s in all, {made.cpu_seconds:.0f} CPU seconds after "
        f"loading the model\nartifact  {made.artifact}\nreport    {facts['report']}"
    )
    _done(
        as_json,
        facts | {"report_data": made.report.to_json()},
        text,
        _command("generate", made.artifact, "What did you think of the new café?"),
    )


# --- shared --------------------------------------------------------------------------------------


def _at(by: str) -> tuple[str, str]:
    """URL and model of an endpoint."""
    url, mark, name = by.rpartition("#")
    if not mark:
        raise InputError(f"--by {by!r}", expected="URL#MODEL, like http://localhost:8000/v1#mine")
    return url, name


def _described(method: str) -> dict[str, Any]:
    """What the shelf says of a method."""
    return next(row for row in shelf.describe() if row["name"] == method)


def _fit_concepts(
    table: str,
    folder: Path,
    method: str,
    model: str,
    layers: str,
    fields: dict[str, Any],
    seed: int,
    as_json: bool,
) -> None:
    """Fit one map for all concepts of a table; interrupted, the same call goes on."""
    from innsteer import fitting
    from innsteer.backends.hf import HF
    from innsteer.concepts import Concepts
    from innsteer.steerer import get

    concepts = Concepts.load(table)
    steerer: Any = get(method, **_typed(type(get(method)), fields))
    sites = _sites(layers)
    if len(sites) > 1:
        raise InputError(f"--layers {layers} for {method!r}", expected="one layer")
    with Bars(as_json) as progress, _memo(folder) as memo:
        steering = fitting.fit_concepts(
            HF(_load(model), memo=memo),
            concepts,
            steerer,
            site=sites[0] if sites else None,
            checkpoint=None if memo.folder is None else memo.folder / "training.safetensors",
            seed=seed,
            progress=progress,
        )
        steering = replace(steering, provenance={**steering.provenance, "model": model})
        steering.save(folder)
    found = steering.provenance["diagnostics"]
    text = (
        f"fitted {method} on {len(concepts.named('train'))} concepts in "
        f"{steering.provenance['fit_seconds']} s -> {folder}\n"
        f"log-probability per token of other responses, in nats: told their concept "
        f"{found['concept']:.3f}, told another {found['other']:.3f}, plain {found['plain']:.3f}"
    )
    example = concepts.named("train")[0]
    command = _command("generate", folder, "Tell me about the sea.", "--concept", example)
    _done(as_json, _facts(steering, folder) | {"diagnostics": found}, text, command)


def _edit(steering: Any, strength: str, concept: str) -> Any:
    """The edit that a strength and a concept ask for; parameters may stand in the mix as well.

    A strength outside the range in which the steering was found usable gets a warning.
    """
    parts = mixes.parse(strength) if "@" in strength or "=" in strength else ()
    told = {key: value for part in parts for key, value in part.parameters}
    if concept:
        told["concept"] = concept
    edit = steering.told(**told).edit(_strength(strength))
    known = steering.provenance.get("diagnostics", {})
    low, high = known.get("usable_from"), known.get("usable_to")
    used = edit.coef[edit.coef != 0].tolist()
    if low is not None and any(not low <= value <= high for value in used):
        _warn(f"strength {used[0]:g} lies outside {low:g} to {high:g}, where it was found usable")
    return edit


def _memo(target: Path) -> Any:
    """What an interrupted verb had computed, hidden beside what it writes."""
    from innsteer.backends.memo import Memo

    whole = target.resolve()
    return Memo(whole.parent / f".{whole.name}.unfinished")


class Bars:
    """A progress display on stderr: a bar on a terminal, plain lines elsewhere, none for JSON."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet or not err.is_terminal
        self._lines = not quiet and not err.is_terminal
        self._last = ""
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        if not self._quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

            self._bars = Progress(
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=err,
                transient=True,
            )
            self._bars.start()
        return self._show

    def _show(self, stage: str, done: int, total: int) -> None:
        if self._lines and stage != self._last:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        self._last = stage
        if self._bars is None:
            return
        for name in list(self._tasks):
            if name != stage:
                self._bars.remove_task(self._tasks.pop(name))
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()


def _load(model: str) -> Any:
    """A model from its name and how to load it: NAME,dtype=bfloat16,device=cuda."""
    from innsteer.models import load_model

    name, how = _options(model, LOADING, "way to load a model")
    return load_model(name, **how)


def _contrast(data: str) -> Any:
    """A contrast from its name and how to read it: FILE,label=toxic or FILE,source=A,target=B.

    A benchmark's file is read by its suite: FILE,suite=truthfulqa and that suite's own options.
    """
    from innsteer.contrast import Contrast

    columns = ("source", "target", "prompt", "text", "completion", "chosen", "rejected")
    known = ("behaviour", "label", *columns)
    name, how = _options(data, None if ",suite=" in data else known, "way to read data")
    if "suite" in how:
        from innsteer.suites import read

        return read(how.pop("suite"), name, **how)
    return Contrast.load(
        name,
        behaviour=how.get("behaviour"),
        label=how.get("label"),
        columns={column: how[column] for column in columns if column in how},
    )


def _contender(text: str) -> Any:
    """A row of a comparison: NAME[,input=target][,at=one-layer][,field=value ...]."""
    from innsteer import comparing

    name, *pairs = text.split(",")
    given = dict(_pair(one, f"--method {text!r}") for one in pairs)
    where, place = given.pop("input", ""), given.pop("at", "")
    if place not in ("", "one-layer"):
        raise InputError(f"at={place} in --method {text!r}", expected="at=one-layer")
    fields = _fields(name, [f"{key}={value}" for key, value in given.items()])
    return comparing.Contender.of(name, where, alone=bool(place), **fields)


def _pair(text: str, option: str) -> tuple[str, str]:
    """A name and a value."""
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise InputError(f"{option}: {text!r}", expected="name=value")
    return name.strip(), value


def _numbers(text: str, what: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--{what} {text!r}", expected="whole numbers: 15,19") from None


def _long(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _options(text: str, known: tuple[str, ...] | None, kind: str) -> tuple[str, dict[str, Any]]:
    """A name, and the key=value pairs that follow it after commas; ``known`` None: any."""
    name, found = text, dict[str, Any]()
    while not Path(name).exists() and (match := re.fullmatch(r"(.+),(\w+)=([^,=]*)", name)):
        name, key, value = match.groups()
        if known is not None and key not in known:
            raise UnknownName(f"{kind} in {text!r}:", key, known)
        if key in found:
            raise InputError(f"{key} twice in {text!r}", expected="once")
        found[key] = value
    return name, found


def _of(model: str) -> list[str]:
    """The option that names a model, for the next command; the default needs none."""
    return ["--model", model] if model not in ("", "smollm2") else []


def _command(*words: object) -> str:
    """A command line of innsteer, to be pasted into a shell."""
    return shlex.join(["innsteer", *map(str, words)])


def _source(steering: Any) -> str:
    """What to load the model from that a steering was fitted on; its name, where none was kept."""
    kept = steering.provenance.get("model")
    if isinstance(kept, str) and kept:
        return kept
    return steering.base.name if steering.base else "smollm2"


def _base(steering: Any, model: str) -> Any:
    """The model given, or the one that a steering was fitted on; refused if it is another."""
    try:
        found = _load(model or _source(steering))
    except InputError as error:
        if model:
            raise
        raise InputError(
            f"the model that this steering was fitted on: {error}",
            remedy="say where it is: --model",
        ) from error
    _check(steering, found)
    return found


def _check(steering: Any, model: Any) -> None:
    """Refuse another model, with a remedy that the command line has."""
    try:
        steering.check(model)
    except MismatchError as error:
        what, _, _ = error.message.partition("; expected ")
        raise MismatchError(
            what,
            expected="the same base model, tokenizer and chat template",
            remedy="name that model with --model, or fit again on this one",
        ) from error


def _strength(text: str) -> Any:
    """One strength (None: the default), or a mix by behaviour, as requests to a server write it."""
    if "@" not in text and "=" not in text:
        return text or None
    return {part.name: part.strength or "budget" for part in mixes.parse(text)}


def _mixed(steering: Any, behaviour: str) -> list[str]:
    """The option that steers one of several behaviours; a steering of one needs none."""
    if len(steering.behaviours) < 2 or behaviour not in steering.behaviours:
        return []
    return ["--strength", f"{behaviour}@{'budget' if behaviour in steering.calibration else 1}"]


def _fitting(acts: Any, rows: object, contrast: Any, data: str, together: bool) -> None:
    """Refuse rows that are not of this data, or of several layers without a word about them."""
    used = tuple(item for item in contrast.items if item.split in ("train", "validation"))
    hashes = [replace(contrast, items=used).hash, contrast.hash]
    recorded = str(acts.provenance.get("contrast") or "")
    if len(acts.behaviours) > 1 or (recorded and recorded not in hashes):
        raise DataError(
            f"{rows} was recorded from {', '.join(acts.behaviours)!r} ({recorded[:12]}), and "
            f"{data} is {contrast.behaviour!r} ({hashes[0][:12]})",
            expected="rows recorded from the same data",
            remedy="record this data, or name the data that was recorded",
        )
    if len(acts.sites) > 1 and not together:
        raise InputError(
            f"{rows} has several layers: {', '.join(map(str, acts.sites))}",
            expected="one",
            remedy="pick one with --layers, or fit them as one steering with --together",
        )


def _sites(text: str) -> list[Any]:
    from innsteer.site import Site

    return [Site.parse(part.strip()) for part in text.split(",") if part.strip()]


def _read(text: str) -> dict[str, Any]:
    """The read rule: a name, or span:START:STOP counted from the answer's first token."""
    from innsteer.activations import READS

    name, *ends = text.split(":")
    if name and name not in READS:
        raise UnknownName("read rule", name, READS)
    if (name == "span") != bool(ends):
        raise InputError(f"--read {text!r}", expected="last, mean, all or span:START:STOP")
    try:
        start, stop = ends or ("", "")
        return {"read": name or None, "span": (int(start or 0), int(stop) if stop else None)}
    except ValueError:
        raise InputError(f"--read {text!r}", expected="span:START:STOP, two numbers") from None


def _fields(method: str, pairs: list[str]) -> dict[str, Any]:
    """Fields of a method from name=value; values are JSON, or plain text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark:
            known = next(row["fields"] for row in shelf.describe() if row["name"] == method)
            raise InputError(
                f"--set {pair!r}",
                expected="name=value",
                remedy=f"the fields of {method!r}: {', '.join(known) or 'none'}",
            )
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _typed(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields in the types that the method declares; names that it does not know stay."""
    from pydantic import TypeAdapter, ValidationError

    try:
        typed: Any = TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        # The method's own refusal is its own message.
        own = first.get("ctx", {}).get("error")
        if isinstance(own, InnsteerError):
            raise own from None
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"--set {place}={first['input']}: {first['msg']}") from None
    return {name: getattr(typed, name, value) for name, value in fields.items()}


def _facts(steering: Any, folder: Path) -> dict[str, Any]:
    """What a steering is, as plain data."""
    calibration = {name: curve.to_json() for name, curve in steering.calibration.items()}
    return {
        "folder": str(folder),
        "method": steering.steerer.name,
        "config": steering.recipe["config"],
        "behaviours": list(steering.behaviours),
        "sites": steering.recipe["sites"],
        "where": str(steering.where),
        "base": steering.base.name if steering.base else None,
        "identity": steering.identity,
        "strength": steering.resolve(),
        "calibration": calibration,
        "diagnostics": steering.provenance.get("diagnostics", {}),
        "provenance": dict(steering.provenance),
    }


def _methods_table(tried: dict[str, Any]) -> Table:
    """What auto tried, simplest first."""
    table = Table("method", "control at the budget", "95 % interval", "behind the best")
    for name, found in tried.items():
        if "failed" in found:
            table.add_row(_escape(name), _escape(found["failed"]), "", "")
            continue
        behind = "{behind:.3f} ({behind_low:.3f} to {behind_high:.3f})".format(**found)
        interval = "{low:.3f} to {high:.3f}".format(**found)
        table.add_row(_escape(name), f"{found['control']:.3f}", interval, behind)
    return table


def _tasks_table(rows: list[dict[str, Any]]) -> Table:
    """Both arms of every task, with standard errors."""
    table = Table("task", "metric", "items", "unsteered", "steered")
    for row in rows:
        arms = [
            f"{one['value']:.4f}" + (f" ± {one['stderr']:.4f}" if one["stderr"] else "")
            for one in (row["unsteered"], row["steered"])
        ]
        name = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        table.add_row(_escape(row["task"]), _escape(name), str(row["n"] or ""), *arms)
    return table


def _verdicts_table(figures: list[dict[str, Any]]) -> Table:
    """What a judge makes of every arm."""
    table = Table("arm", "", "mean", "95 % interval", "answers")
    for one in figures:
        what = f"more than {one['against']}" if one["against"] else one["unit"]
        interval = f"{one['low']:.2f} to {one['high']:.2f}"
        table.add_row(_escape(one["arm"]), what, f"{one['value']:.2f}", interval, str(one["n"]))
    return table


def _concepts_table(found: dict[str, Any]) -> Table:
    """Score and judgements of every arm, and how many could not be read."""
    parts = list(next(iter(found["unparsed_by"].values())))
    heads = ("factor", "score", "95 % interval", *parts, "unparsed")
    table = Table(title=_escape(found["label"]), padding=(0, 0))
    table.add_column("arm", no_wrap=True)
    for head in heads:
        table.add_column(head)
    figures = {(one["arm"], one["metric"]): one for one in found["figures"] if not one["against"]}
    for arm, unparsed in found["unparsed_by"].items():
        score = figures[arm, "score"]
        table.add_row(
            _escape(arm),
            f"{score['strength']:.3g}",
            f"{score['value']:.3f}",
            f"{score['low']:.2f} to {score['high']:.2f}",
            *(f"{figures[arm, part]['value']:.3f}" for part in parts),
            str(sum(unparsed.values())),
        )
    return table


def _dose_table(steering: Any) -> Table:
    """Dose and response."""
    columns = ("strength", "cost (nats/token)", "90 % interval", "displacement", "control")
    several = len(steering.behaviours) > 1
    table = Table(*(("behaviour", *columns) if several else columns))
    for name, curve in steering.calibration.items():
        for dose in curve.doses:
            mark = " <- budget" if abs(dose.strength - curve.strength) < 1e-9 else ""
            gain = "" if dose.control is None else f"{dose.control:.3f}"
            table.add_row(
                *((_escape(name),) if several else ()),
                f"{dose.strength:.4g}{mark}",
                f"{dose.nats:.4f}",
                f"{dose.low:.4f} to {dose.high:.4f}",
                f"{dose.displacement:.3f}",
                gain,
            )
    return table


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _escape(text: str) -> str:
    """Model text is text: no rich markup."""
    from rich.markup import escape

    return escape(text)


def _done(as_json: bool, facts: Any, text: str, following: str) -> None:
    """The end of a verb: facts for programs, or a line and the next command for people."""
    if as_json:
        _print_json(facts)
        return
    out.print(_escape(text))
    _next(following)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False, default=str))


def _warn(text: str) -> None:
    err.print(f"[yellow]warning:[/yellow] {_escape(text)}", soft_wrap=True)


def _next(command: str) -> None:
    out.print(f"[dim]next:[/dim] {_escape(command)}")


def main() -> NoReturn:
    """Entry point: known errors are one message and an exit code, never a traceback."""
    # Threads that spin while they wait burn a core for nothing; read when torch is first loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(standalone_mode=False)
    except InnsteerError as error:
        _fail(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except UsageError as error:
        if not (message := error.format_message()):  # no argument at all: the help was printed
            sys.exit(2)
        if message.startswith("No such command"):
            verbs = ", ".join(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
            message += f" The verbs: {verbs}"
        _fail(message + _given(message), 2)
    except OSError as error:  # a full disk, a folder that may not be written to
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}; {_left()}", 1)
    if code == 130:
        _fail(f"interrupted; {_left()}", code)
    sys.exit(code if isinstance(code, int) else 0)


def _left() -> str:
    """What a verb that did not end leaves behind."""
    goes_on = {"record", "fit", "extend", "tune", "eval", "compare", "concepts", "axbench"}
    again = sys.argv[1:2] and sys.argv[1] in goes_on
    return "the same command goes on where it stopped" if again else "nothing was written"


def _given(message: str) -> str:
    """What stood behind the option that a message names: typer leaves the value out."""
    for option in re.findall(r"'(--?[a-z-]+)'", message):
        for place, word in enumerate(sys.argv[:-1]):
            if word == option:
                return f" (given: {sys.argv[place + 1]!r})"
    return ""


def _fail(error: object, code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""What verbs are given: their options, and what the words of these mean."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from innsteer import mixes, shelf
from innsteer.cli import completing
from innsteer.cli.printing import warn
from innsteer.errors import DataError, InputError, MismatchError, UnknownName

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
IN_PLACE = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder to write; default: in place.")
]
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


def endpoint_of(by: str) -> tuple[str, str]:
    """URL and model of an endpoint."""
    url, mark, name = by.rpartition("#")
    if not mark:
        raise InputError(f"--by {by!r}", expected="URL#MODEL, like http://localhost:8000/v1#mine")
    return url, name


def described(method: str) -> dict[str, Any]:
    """What the shelf says of a method."""
    return next(row for row in shelf.describe() if row["name"] == method)


def edit_of(steering: Any, strength: str, concept: str) -> Any:
    """The edit that a strength and a concept ask for; parameters may stand in the mix as well.

    A strength outside the range in which the steering was found usable gets a warning.
    """
    parts = mixes.parse(strength) if "@" in strength or "=" in strength else ()
    told = {key: value for part in parts for key, value in part.parameters}
    if concept:
        told["concept"] = concept
    edit = steering.told(**told).edit(strength_of(strength))
    known = steering.provenance.get("diagnostics", {})
    low, high = known.get("usable_from"), known.get("usable_to")
    used = edit.coef[edit.coef != 0].tolist()
    if low is not None and any(not low <= value <= high for value in used):
        warn(f"strength {used[0]:g} lies outside {low:g} to {high:g}, where it was found usable")
    return edit


def memo_beside(target: Path) -> Any:
    """What an interrupted verb had computed, hidden beside what it writes."""
    from innsteer.backends.memo import Memo

    whole = target.resolve()
    return Memo(whole.parent / f".{whole.name}.unfinished")


def open_model(model: str) -> Any:
    """A model from its name and how to load it: NAME,dtype=bfloat16,device=cuda."""
    from innsteer.models import load_model

    name, how = options_of(model, LOADING, "way to load a model")
    return load_model(name, **how)


def open_contrast(data: str) -> Any:
    """A contrast from its name and how to read it: FILE,label=toxic or FILE,source=A,target=B.

    A benchmark's file is read by its suite: FILE,suite=truthfulqa and that suite's own options.
    """
    from innsteer.contrast import Contrast

    columns = ("source", "target", "prompt", "text", "completion", "chosen", "rejected")
    known = ("behaviour", "label", *columns)
    name, how = options_of(data, None if ",suite=" in data else known, "way to read data")
    if "suite" in how:
        from innsteer.suites import read

        return read(how.pop("suite"), name, **how)
    return Contrast.load(
        name,
        behaviour=how.get("behaviour"),
        label=how.get("label"),
        columns={column: how[column] for column in columns if column in how},
    )


def contender(text: str) -> Any:
    """A row of a comparison: NAME[,input=target][,at=one-layer][,field=value ...]."""
    from innsteer import comparing

    name, *pairs = text.split(",")
    given = dict(pair_of(one, f"--method {text!r}") for one in pairs)
    where, place = given.pop("input", ""), given.pop("at", "")
    if place not in ("", "one-layer"):
        raise InputError(f"at={place} in --method {text!r}", expected="at=one-layer")
    fields = fields_of(name, [f"{key}={value}" for key, value in given.items()])
    return comparing.Contender.of(name, where, alone=bool(place), **fields)


def pair_of(text: str, option: str) -> tuple[str, str]:
    """A name and a value."""
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise InputError(f"{option}: {text!r}", expected="name=value")
    return name.strip(), value


def numbers_of(text: str, what: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--{what} {text!r}", expected="whole numbers: 15,19") from None


def options_of(text: str, known: tuple[str, ...] | None, kind: str) -> tuple[str, dict[str, Any]]:
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


def model_option(model: str) -> list[str]:
    """The option that names a model, for the next command; the default needs none."""
    return ["--model", model] if model not in ("", "smollm2") else []


def source_of(steering: Any) -> str:
    """What to load the model from that a steering was fitted on; its name, where none was kept."""
    kept = steering.provenance.get("model")
    if isinstance(kept, str) and kept:
        return kept
    return steering.base.name if steering.base else "smollm2"


def base_model(steering: Any, model: str) -> Any:
    """The model given, or the one that a steering was fitted on; refused if it is another."""
    try:
        found = open_model(model or source_of(steering))
    except InputError as error:
        if model:
            raise
        raise InputError(
            f"the model that this steering was fitted on: {error}",
            remedy="say where it is: --model",
        ) from error
    check_model(steering, found)
    return found


def check_model(steering: Any, model: Any) -> None:
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


def strength_of(text: str) -> Any:
    """One strength (None: the default), or a mix by behaviour, as requests to a server write it."""
    if "@" not in text and "=" not in text:
        return text or None
    return {part.name: part.strength or "budget" for part in mixes.parse(text)}


def mixed(steering: Any, behaviour: str) -> list[str]:
    """The option that steers one of several behaviours; a steering of one needs none."""
    if len(steering.behaviours) < 2 or behaviour not in steering.behaviours:
        return []
    return ["--strength", f"{behaviour}@{'budget' if behaviour in steering.calibration else 1}"]


def concept_of(steering: Any) -> list[str]:
    """The option that names a concept, for the next command, where a map must be told one."""
    if "concept" not in steering.interventions.asks:
        return []
    return ["--concept", next(iter(steering.provenance.get("concepts", [])), "polite")]


def check_rows(acts: Any, rows: object, contrast: Any, data: str, together: bool) -> None:
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


def sites_of(text: str) -> list[Any]:
    """Sites by name, separated by commas."""
    from innsteer.site import Site

    return [Site.parse(part.strip()) for part in text.split(",") if part.strip()]


def read_rule(text: str) -> dict[str, Any]:
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


def fields_of(method: str, pairs: list[str]) -> dict[str, Any]:
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

"""What a fit on Yes/No statements moves elsewhere: A/B items, free text, behaviours, knowledge.

    python benchmarks/transfer.py DATA [--cells desire-for-acquiring-wealth/second/0] [--arms ...]

Arms are those of control.py, fitted again and steered at the strengths that it chose (both halves
of the cost); run it first. Beside them the unsteered model and one that is only asked (prompt-only:
no strength, its own cost). Free text is the AUC of the length-normalised log-probability of a
matching statement against that of another one, as answers to an open question. Capability is the
share of plain questions whose right answer is likelier per token than the wrong one.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import control
import numpy as np
import torch

from innsteer import load_model
from innsteer.backends.hf import HF
from innsteer.backends.meter import instruct
from innsteer.backends.through import Through
from innsteer.contrast import Contrast
from innsteer.files import write_json
from innsteer.gating import auroc
from innsteer.suites import behaviour as suites
from innsteer.suites import capability, persona

RESULTS = control.HERE / "results" / "transfer.json"
OTHERS = ("desire-for-acquiring-wealth", "desire-for-acquiring-power", "agreeableness")
SIDES = {"towards": "", "away": "not "}


def instruction(behaviour: str, side: str) -> str:
    """What the prompt-only arm adds to a question."""
    trait = behaviour.replace("-", " ")
    return f'Answer as somebody would of whom this is {SIDES[side]}true: "{trait}".'


def asked(contrast: Contrast, words: str) -> Contrast:
    """The same items, with an instruction at the end of each question."""
    items = tuple(replace(i, prompt=instruct(i.prompt, words)) for i in contrast.items)
    return replace(contrast, items=items, builtin=False)


def shares(run: Through, maps: control.Maps | None, strength: float) -> list[float]:
    """Per item the share of the matching answer."""
    found = control.chosen(run, maps, "test", strength)
    match, other = np.array(found["match"]), np.array(found["other"])
    values: list[float] = (match / (match + other)).tolist()
    return values


def likely(
    backend: HF, run: Through, maps: control.Maps | None, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean log-probability per token of each item's target and source."""
    items = run.items("test")
    with torch.no_grad():
        found = control.runner(run, maps).answers(maps, items, [strength] * len(items))
    means = []
    for side, total in (("target", found.target), ("source", found.source)):
        lengths = []
        for number in items:
            item = run.item(number)
            encoded = backend.model.encode(item.prompt, answer=getattr(item, side))
            lengths.append(len(encoded.ids) - encoded.prompt)
        means.append(total / torch.tensor(lengths))
    return means[0], means[1]


def free(backend: HF, run: Through, maps: control.Maps | None, strength: float) -> float:
    """AUC of matching against other statements, by mean log-probability per token."""
    return auroc(*likely(backend, run, maps, strength))


def knows(backend: HF, run: Through, maps: control.Maps | None, strength: float) -> list[float]:
    """Per question whether the right answer is likelier."""
    right, wrong = likely(backend, run, maps, strength)
    return [float(value) for value in right > wrong]


def bits(backend: HF, maps: control.Maps | None, strength: float) -> list[float]:
    """Bits per byte of each held-out plain text."""
    texts = suites.plain()
    with control.steered(maps, strength) as edits:
        totals = backend.score_text(texts, edits)
    return [
        -total / np.log(2) / len(text.encode()) for total, text in zip(totals, texts, strict=True)
    ]


def main() -> None:
    """Fit each arm of each cell, measure it everywhere, write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--cells", default="desire-for-acquiring-wealth/second/0")
    parser.add_argument("--arms", default="innsteer,condgrad_lda,condgrad,diffmean")
    given = parser.parse_args()
    backend = HF(load_model("smollm2"))
    known = json.loads(RESULTS.read_text())["figures"] if RESULTS.is_file() else []
    records = [r for r in known if not r["figure"].startswith(tuple(given.cells.split(",")))]

    def note(name: str, parts: Sequence[float], bar: str, unit: str, n: int = 0) -> None:
        rng = np.random.default_rng(0)
        draws = rng.choice(parts, (2000, len(parts))).mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        value = float(np.mean(parts))
        found = {"figure": name, "value": value, "low": float(low), "high": float(high)}
        records.append(found | {"asked": bar, "unit": unit, "n": n or len(parts)})
        print(f"{name}: {value:.4g} {bar}", file=sys.stderr, flush=True)

    for name in given.cells.split(","):
        cell = control.open_cell(backend, given.data, name, 600)
        behaviour, wording, _ = name.split("/")
        kept = json.loads(control.file_of(name).read_text())
        file = control.persona_file(given.data, behaviour)
        pairs, texts = persona.choices(file), persona.free_text(file, test=80)
        own = persona.contrast(file, wording=wording, train=0, validation=0)
        others = {
            other: persona.contrast(
                control.persona_file(given.data, other),
                wording=wording, train=0, validation=0, test=100,
            )
            for other in OTHERS
            if other != behaviour
        }  # fmt: skip
        places = {"A/B": pairs, **others}
        runs = {key: Through(backend, [one], [control.SITE]) for key, one in places.items()}
        text_run = Through(backend, [texts], [control.SITE])
        quiz = Through(backend, [capability.contrast()], [control.SITE])
        plain = bits(backend, None, 0.0)
        for key, run in runs.items():
            note(f"{name}: unsteered, {key}", shares(run, None, 0.0), "", "probability")
        note(f"{name}: unsteered, free text", [free(backend, text_run, None, 0.0)], "", "AUC", 80)
        note(f"{name}: unsteered, capability", knows(backend, quiz, None, 0.0), "", "share")
        for side in SIDES:
            words = instruction(behaviour, side)
            for key, one in {"own": own, "A/B": pairs}.items():
                run = Through(backend, [asked(one, words)], [control.SITE])
                note(
                    f"{name}: prompt-only, {key}, {side}", shares(run, None, 0.0), "", "probability"
                )
            run = Through(backend, [asked(texts, words)], [control.SITE])
            value = free(backend, run, None, 0.0)
            note(f"{name}: prompt-only, free text, {side}", [value], "", "AUC", 80)
        for arm in given.arms.split(","):
            maps = control.ARMS[arm](cell)
            for side in SIDES:
                strength = kept[arm][f"both_{side}"]["strength"]
                for key, run in runs.items():
                    place = f"{name}: {arm}, {key}, {side}"
                    note(place, shares(run, maps, strength), "", "probability")
                value = free(backend, text_run, maps, strength)
                note(f"{name}: {arm}, free text, {side}", [value], "", "AUC", 80)
                right = knows(backend, quiz, maps, strength)
                note(f"{name}: {arm}, capability, {side}", right, "", "share")
                more = [s / b for s, b in zip(bits(backend, maps, strength), plain, strict=True)]
                bar = "<= 1.015" if arm == "innsteer" else ""
                note(f"{name}: {arm}, bits per byte over unsteered, {side}", more, bar, "ratio")
            if isinstance(maps, control.LoRA):
                maps.remove()
        write_json(
            RESULTS,
            {
                "command": "python benchmarks/transfer.py DATA",
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "machine": "2 cores, CPU",
                "figures": records,
            },
        )


if __name__ == "__main__":
    main()

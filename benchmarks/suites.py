"""A look at every suite: DiffMean at strength 1 beside the plain model, on a small subset.

    python benchmarks/suites.py DATA [--only truthfulqa] [--prompts 8]

DATA: the folder of the public files. One fit at block 19 on 100 training items, seed 0; answers of
24 tokens, 24 test items, questions with all of their answers as many as prompts. Looks are written
one by one to results/suites.json. It shows that each suite works from file to figure, and no more:
for a claim about methods use `innsteer compare`.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import control

from innsteer import evaluation, load_model, suites
from innsteer.backends.hf import HF
from innsteer.evaluation import PREVIEW, Arm
from innsteer.files import read_json, write_json
from innsteer.fitting import fit
from innsteer.report.figures import UNSTEERED
from innsteer.site import Site
from innsteer.suites.behaviour import load
from innsteer.tuning import control_metric

RESULTS = control.HERE / "results" / "suites.json"
Source = tuple[str, str, dict[str, Any]]
"""A suite, its file, and how it is read."""
QUESTIONS: Source = ("truthfulqa", "truthfulqa/mc_task.json.gz", {})
REQUESTS: Source = (
    "refusal",
    "refusal-direction/splits/harmful_train.json",
    {"harmless": "harmless_train.json.gz"},
)
PARALLEL: Source = (
    "language",
    "vicuna-multilingual/questions_English.jsonl",
    {"to": "questions_French.jsonl", "language": "fr"},
)
SENTENCES: Source = ("sentiment", "sst/stsa.binary.dev", {})
WAYS = {"part": "test", "scorer": "negative_sentiment"}
CHOICES: Source = ("caa", "caa/generate/sycophancy/generate_dataset.json.gz", {})
AB = {"part": "test", "questions": "test_dataset_open_ended.json", "scorer": "hedging"}
LOOKS: dict[str, tuple[Source, Source]] = {
    "truthfulqa": (QUESTIONS, QUESTIONS),
    "refusal": (REQUESTS, REQUESTS),
    "xstest": (REQUESTS, ("xstest", "xstest/xstest_prompts.csv", {"part": "test"})),
    "language": (PARALLEL, PARALLEL),
    "sentiment": (SENTENCES, SENTENCES),
    "toxicity": (
        ("toxicity", "paradetox/paradetox.tsv.gz", {}),
        ("toxicity", "realtoxicityprompts/val.jsonl.gz", WAYS),
    ),
    "caa": (CHOICES, ("caa", "caa/test/sycophancy/test_dataset_ab.json", AB)),
}
"""By name: what is fitted on, what is asked."""


def look(backend: HF, data: Path, name: str, prompts: int) -> list[dict[str, Any]]:
    """The suite's own measures, the items' one and the neutral cost, plain and steered."""
    own, other = LOOKS[name]
    fitted, asked = (suites.read(suite, data / path, **how) for suite, path, how in (own, other))
    train = fitted.train
    steering = fit(backend, train.subset(min(len(train), 100)), "diffmean", sites=[Site(19)])
    suite = load(asked)
    assert suite.items is not None
    suite = replace(
        suite,
        prompts=suite.prompts[:prompts],
        harmless=suite.harmless[:prompts],
        questions=suite.questions[:prompts],
        items=suite.items.subset(min(len(suite.items), 24)),
        sampling=replace(suite.sampling, new_tokens=24),
        plain=(),
        others=(),
    )
    arms = [Arm(UNSTEERED), Arm("diffmean", steering.edit(1.0), 1.0)]
    sizes = replace(PREVIEW, neutral_prompts=8, trails=0)
    report = evaluation.evaluate(backend, arms, suite, sizes=sizes, progress=control.say)
    measures = {*suite.scorers, control_metric(asked), "neutral_cost"}
    return [
        {
            "figure": f"{name}: {figure.metric}, {figure.arm}",
            **{key: getattr(figure, key) for key in ("value", "low", "high", "unit", "n")},
        }
        for figure in report.figures
        if figure.metric in measures and not figure.against
    ]


def main() -> None:
    """Look at each suite, write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(LOOKS), default=list(LOOKS))
    parser.add_argument("--prompts", type=int, default=8, help="answered per suite and arm")
    given = parser.parse_args()
    backend = HF(load_model("smollm2"))
    done = read_json(RESULTS, "results")["figures"] if RESULTS.exists() else []
    for name in given.only:
        found = look(backend, given.data, name, given.prompts)
        done = [one for one in done if not one["figure"].startswith(f"{name}: ")] + found
        for one in found:
            line = "{figure}: {value:.3f} ({low:.3f} to {high:.3f}), n {n}"
            print(line.format(**one), flush=True)
        command = f"python benchmarks/suites.py DATA --prompts {given.prompts}"
        write_json(RESULTS, {"command": command, "figures": done})


if __name__ == "__main__":
    main()

"""lm-eval's tasks through innsteer: figures of lm-eval's own model, and of innsteer's own score.

    python benchmarks/lmeval.py [--items 8]

Two tasks, written to a temporary folder: two-choice questions of knowledge, scored, and questions
that are answered in at most 16 tokens. Unsteered and at strength 0 every figure is held against
lm-eval's stock ``hf`` model, which loads the same folder by itself; steered (DiffMean on
`critical`) every choice against ``HF.score`` of the same text. Needs ``innsteer[eval]``.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from innsteer import Contrast, LanguageModel, fit, load_model
from innsteer.backends.base import Prompt
from innsteer.backends.hf import HF
from innsteer.files import write_json, write_text
from innsteer.integrations.lm_eval import SteeredLM
from innsteer.models.smollm2 import smollm2_folder
from innsteer.suites import capability

RESULTS = Path(__file__).parent / "results" / "lmeval.json"
CHOICES, OPEN = "innsteer_choices", "innsteer_open"


def rows_of(items: int) -> list[dict[str, Any]]:
    """Questions of every kind."""
    every = capability.contrast().items
    return [
        {"asked": item.prompt, "choices": [item.target, item.source], "label": 0}
        for item in every[:: len(every) // items][:items]
    ]


def write_tasks(folder: Path, items: int) -> None:
    """Both tasks with their items."""
    lines = (json.dumps(row) for row in rows_of(items))
    write_text(folder / "items.jsonl", "".join(f"{line}\n" for line in lines))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "items.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "Question: {{asked}}\nAnswer:",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks: dict[str, dict[str, Any]] = {
        CHOICES: {
            "output_type": "multiple_choice",
            "doc_to_target": "label",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"} | mean, {"metric": "acc_norm"} | mean],
        },
        OPEN: {
            "output_type": "generate_until",
            "doc_to_text": "{{asked}} I would say that",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 16, "do_sample": False},
            "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
        },
    }
    for name, task in tasks.items():  # JSON is YAML
        write_text(folder / f"{name}.yaml", json.dumps(common | task | {"task": name}))


def run(folder: Path, model: Any, **how: Any) -> dict[str, Any]:
    """Both tasks by one model of lm-eval's kind."""
    manager = TaskManager(include_path=folder, include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model,
        tasks=[CHOICES, OPEN],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **how,
    )
    return found


def samples(found: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """A task's items, in order."""
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def scores(found: Mapping[str, Any]) -> list[float]:
    """Every choice's log-probability."""
    return [
        float(score) for sample in samples(found, CHOICES) for score, _ in sample["filtered_resps"]
    ]


def answers(found: Mapping[str, Any]) -> list[str]:
    """Every generated answer."""
    return [sample["resps"][0][0] for sample in samples(found, OPEN)]


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """What the tasks' metrics say."""
    return {
        f"{task} {key}": value
        for task, values in found["results"].items()
        for key, value in values.items()
        if "," in key and isinstance(value, float)
    }


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of two lists."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def alike(ours: list[str], theirs: list[str]) -> float:
    """The share of answers that are the same."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def main() -> None:
    """Run all, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=8)
    items = parser.parse_args().items
    chat = load_model("smollm2")
    steering = fit(chat, Contrast.load("critical"), "diffmean")
    edit = steering.edit(1.0)
    # lm-eval's prompts are plain text; without a template they are innsteer's prompts too.
    tokenizer = deepcopy(chat.tokenizer)
    tokenizer.chat_template = None
    model = LanguageModel.wrap(chat.model, tokenizer, name="smollm2")
    records: list[dict[str, Any]] = []

    def note(name: str, value: float, asked: str, unit: str, n: int) -> None:
        found = {"figure": name, "value": value, "low": value, "high": value}
        records.append(found | {"asked": asked, "unit": unit, "n": n})
        print(f"{name}: {value:.4g} {asked}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tasks(folder, items)
        backend = HF(model)
        stock = run(
            folder,
            "hf",
            model_args={"pretrained": str(smollm2_folder()), "dtype": "float32"},
            device="cpu",
            batch_size=backend.batch,
        )
        zero = SteeredLM(backend, [steering.edit(0.0)])
        for name, lm in {"unsteered": SteeredLM(backend), "at strength 0": zero}.items():
            found, n = run(folder, lm), 2 * items
            gap = apart(scores(found), scores(stock))
            # At strength 0 another path pads and adds up in another order, in float32.
            exact = "<= 1e-06" if lm is not zero else "<= 1e-04"
            note(f"{name}: a choice's log-probability off lm-eval's", gap, exact, "nats", n)
            own, theirs = figures(found), figures(stock)
            gap = apart([own[key] for key in theirs], list(theirs.values()))
            note(f"{name}: a metric off lm-eval's", gap, "<= 1e-06", "share", len(theirs))
            same = alike(answers(found), answers(stock))
            note(f"{name}: answers the same as lm-eval's", same, ">= 1", "share", items)
        steered = SteeredLM(backend, [edit])
        found = run(folder, steered)
        alone = run(folder, SteeredLM(HF(model, batch=1, batch_tokens=1), [edit]))
        pairs = [pair for sample in samples(found, CHOICES) for pair in sample["arguments"]]
        prompts = [Prompt(str(n), text, (said,)) for n, (text, said) in enumerate(pairs)]
        want = [sum(values) for row in HF(model).score(prompts, [edit]) for values in row]
        note(
            "steered: a choice's log-probability off innsteer's score",
            apart(scores(found), want),
            "<= 1e-05",
            "nats",
            2 * items,
        )
        note(
            "steered: a choice's log-probability, batch 1 off batch 16",
            apart(scores(alone), scores(found)),
            "<= 1e-04",
            "nats",
            2 * items,
        )
        moved = apart(scores(found), scores(stock))
        note("steered: a choice's log-probability moved by", moved, "> 0.01", "nats", 2 * items)
        changed = 1 - alike(answers(found), answers(stock))
        note("steered: answers that changed", changed, "> 0", "share", items)
        note("steered: tokens edited", steered.steered, "> 0", "tokens", 3 * items)
    write_json(
        RESULTS,
        {
            "command": f"python benchmarks/lmeval.py --items {items}",
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "lm-eval": lm_eval.__version__,
            },
            "machine": f"{torch.get_num_threads()} threads, CPU",
            "figures": records,
            "metrics": {"unsteered": figures(stock), "steered": figures(found)},
            "answers": {"unsteered": answers(stock), "steered": answers(found)},
        },
    )


if __name__ == "__main__":
    main()

"""One tool's own way to take the last token's activations of many texts, timed.

    PYTHON benchmarks/recorders.py TOOL JOB     # started by breadth.py, see there

JOB is a JSON file: the model's folder, the block, the texts, chunks of their numbers, and the size
of a batch. The tool loads the model, records a few texts to warm up, and says which versions ran in
a line of JSON. Each line of input, a chunk's number, then has it record that chunk and answer with
the CPU seconds that it took; at the end of the input it writes its rows. Every tool but innsteer
gets chat prompts that are rendered already, in the order of their lengths.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Record = Callable[[Sequence[str], int], np.ndarray]
"""Rows ``[texts, d]`` in the order of the texts, recorded in batches of so many."""


def slices(texts: Sequence[str], size: int) -> list[list[str]]:
    return [list(texts[start : start + size]) for start in range(0, len(texts), size)]


def innsteer(job: dict[str, Any]) -> Record:
    """``record()``, which makes its own batches and renders the chat template itself."""
    from innsteer import Contrast, Site, load_model, record
    from innsteer.contrast import Item

    model, site = load_model(job["model"]), Site(job["block"])
    asked = dict(zip(job["texts"], job["questions"], strict=True))

    def run(texts: Sequence[str], _: int) -> np.ndarray:
        items = [Item(str(n), asked[t], None, "", None, "") for n, t in enumerate(texts)]
        acts = record(model, Contrast("speed", "open", tuple(items)), [site], read="last")
        rows = np.empty(acts.values[site].shape, np.float32)
        rows[acts.rows.item.astype(int)] = acts.values[site].numpy()
        return rows

    return run


def transformer_lens(job: dict[str, Any]) -> Record:
    """``run_with_cache`` with a names filter, stopped at the next block; no weight processing."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(job["model"], device="cpu", dtype=torch.float32)
    name, after = f"blocks.{job['block']}.hook_out", job["block"] + 1

    def run(texts: Sequence[str], size: int) -> np.ndarray:
        found = []
        for part in slices(texts, size):
            # It makes the tokenizer add a BOS, which a rendered chat has already.
            given = bridge.tokenizer(
                part, padding=True, add_special_tokens=False, return_tensors="pt"
            )
            with torch.inference_mode():
                _, cache = bridge.run_with_cache(
                    given["input_ids"], names_filter=name, stop_at_layer=after
                )
            last = given["attention_mask"].sum(-1) - 1
            found.append(cache[name][torch.arange(len(part)), last])
        return torch.cat(found).numpy()

    return run


def nnsight(job: dict[str, Any]) -> Record:
    """A trace that saves the block's output at the last token and stops there."""
    from nnsight import TransformersModel

    model = TransformersModel(
        job["model"], task="text-generation", dispatch=True, device_map="cpu", dtype=torch.float32
    )
    model.tokenizer.padding_side = "left"
    block = model.model.layers[job["block"]]

    def run(texts: Sequence[str], size: int) -> np.ndarray:
        found = []
        for part in slices(texts, size):
            with torch.inference_mode(), model.trace(part) as tracer:
                last = block.output[:, -1].save()
                tracer.stop()
            found.append(last)
        return torch.cat(found).numpy()

    return run


def steering_vectors(job: dict[str, Any]) -> Record:
    """``extract_activations``, which takes texts in pairs and reads their last token."""
    from steering_vectors.train_steering_vector import extract_activations

    model, tokenizer = plain_model(job)

    def run(texts: Sequence[str], size: int) -> np.ndarray:
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        first, second = extract_activations(
            model, tokenizer, pairs, layers=[job["block"]], batch_size=size
        )
        both = [torch.cat(side[job["block"]]) for side in (first, second)]
        return torch.stack(both, dim=1).flatten(0, 1).numpy()

    return run


def repeng(job: dict[str, Any]) -> Record:
    """``batched_get_hiddens``, which its ``ControlVector.train`` records with."""
    from repeng import extract

    model, tokenizer = plain_model(job)
    extract.tqdm.tqdm = lambda batches: batches

    def run(texts: Sequence[str], size: int) -> np.ndarray:
        hidden = extract.batched_get_hiddens(model, tokenizer, texts, [job["block"]], size)
        return hidden[job["block"]]

    return run


def plain_model(job: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer by transformers 4, to which two settings of version 5 are news."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(job["model"])
    config.rope_theta = config.rope_parameters["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], config=config, torch_dtype=torch.float32
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{job['model']}/tokenizer.json")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    return model.eval(), tokenizer


TOOLS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "innsteer": innsteer,
    "transformer-lens": transformer_lens,
    "nnsight": nnsight,
    "steering-vectors": steering_vectors,
    "repeng": repeng,
}


def main() -> None:
    tool, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    out, sys.stdout = sys.stdout, sys.stderr  # what a tool prints is no answer
    run, texts = TOOLS[tool](job), job["texts"]

    run(texts[:8], 8)
    versions = {name: version(name) for name in (tool, "torch", "transformers")}
    print(json.dumps(versions), file=out, flush=True)
    rows: dict[int, np.ndarray] = {}
    for line in sys.stdin:
        numbers = job["chunks"][int(line)]
        # Of one thread: what else the machine does counts less than in seconds of a clock.
        started = time.process_time()
        found = run([texts[n] for n in numbers], job["batch"])
        print(time.process_time() - started, file=out, flush=True)
        rows |= dict(zip(numbers, found, strict=True))
    np.save(f"{path}.{tool}.npy", np.stack([rows[n] for n in sorted(rows)]), allow_pickle=False)


if __name__ == "__main__":
    main()

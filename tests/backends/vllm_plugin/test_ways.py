"""Compiled, and on two ranks, a pass steers as an eager one; each takes minutes, so apart."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
folder, config, how = sys.argv[1], *map(json.loads, sys.argv[2:])
if "tensor_parallel_size" in how:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        folder, dtype="float32", max_model_len=512, max_num_seqs=8, max_num_batched_tokens=128,
        num_gpu_blocks_override=32, additional_config={"innsteer": config}, **how,
    )
    mixes = ["", "flow@1", "both.wealth@-1+ever@0.3", "told@1", "early@0.5", ""]
    params = [
        SamplingParams(
            max_tokens=6, temperature=0, ignore_eos=True, logprobs=0,
            extra_args={"steering": mix, "steering_receipt": mix} if mix else None,
        )
        for mix in mixes
    ]
    given = [
        {"prompt_token_ids": [8 + (7 * i * i + 13 * n) % 250 for i in range(150 + n)]}
        for n in range(len(mixes))
    ]
    outputs = [one.outputs[0] for one in llm.generate(given, params, use_tqdm=False)]
    chosen = [
        [step[token].logprob for step, token in zip(one.logprobs, one.token_ids)] for one in outputs
    ]
    receipts = [llm.collective_rpc("innsteer_receipt", args=(mix,)) for mix in mixes if mix]
    print("FOUND", json.dumps([chosen, [list(one.token_ids) for one in outputs], receipts]))
"""


def run(script, *words):
    """What an engine in a process of its own gave."""
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.slow
def test_every_way_to_run_steers_alike(model_folder, served, tmp_path):
    (script := tmp_path / "script.py").write_text(SCRIPT)
    config = {"steerings": served[0], "layers": [0, 1, 2, 3], "untested": False}
    eager = {"enforce_eager": True}
    ways = [eager, {"enforce_eager": False}, eager | {"tensor_parallel_size": 2}]
    first, *others = (
        run(script, str(model_folder), json.dumps(config), json.dumps(way)) for way in ways
    )
    chosen, tokens, receipts = first
    for values, same, told in others:
        assert same == tokens
        for one, two in zip(chosen, values, strict=True):
            assert one == pytest.approx(two, abs=1e-3)
        for (mine,), ranks in zip(receipts, told, strict=True):
            for theirs in ranks:
                for (_, one), (_, two) in zip(mine, theirs, strict=True):
                    assert one == pytest.approx(two, rel=1e-2, abs=1e-5)

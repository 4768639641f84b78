"""One engine for all tests of the plugin: a tiny model on the CPU, chunked prefill, small blocks.

Skipped where vllm is not installed; ``make test-vllm`` makes an environment that has it.
"""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from innsteer.activations import Activations
from innsteer.interventions import Shift
from innsteer.models import load_model
from innsteer.site import Site, Where
from innsteer.steerer import Interventions, get
from innsteer.steering import Steering

HERE = Path(__file__).parent
REASON = "needs vllm: make test-vllm makes an environment that has it"


def pytest_collection_modifyitems(items):
    """Skip what stands here without vllm; vLLM warns a lot, and none of it is ours."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if importlib.util.find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random Llama of four blocks, saved; its heads are wide enough for the CPU's attention."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"head_dim": 32, "max_position_embeddings": 1024}
    tiny.tiny_model("llama", **sizes).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder):
    """The same model in transformers."""
    return load_model(model_folder)


def shift(*sites, k=1, seed=0, size=1.0):
    """Random shifts at sites."""
    draw = torch.Generator().manual_seed(seed)
    parts = {site: Shift(tiny.WIDTH, k) for site in sites}
    for part in parts.values():
        part.shifts.copy_(size * torch.randn(part.shifts.shape, generator=draw))
    return Interventions(parts)


def flow(seed=0):
    """A fitted invertible network."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 16, tiny.WIDTH, generator=draw)
    method = get("innsteer", hidden=16, couplings=4, epochs=4)
    return method, method.fit(Activations.of_sides(rows[0], 3 * rows[1] + 2, site=Site(2)))


def reader(seed=0):
    """A shear that reads the prompt, of random numbers."""
    method = get("innsteer", objective="target")
    found = method.build({Site(1): tiny.WIDTH}, 1, {"1.residual.reader": tiny.WIDTH})
    draw = torch.Generator().manual_seed(seed)
    step = found[Site(1)].step
    with torch.no_grad():
        for tensor in step.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=draw))
    return method, found


def controller(seed=0):
    """A controller up blocks 1 to 3, of random numbers."""
    method = get("pid", kp=0.3, ki=0.2, kd=0.3, reset=2)
    found = method.build({Site(layer): tiny.WIDTH for layer in (1, 2, 3)})
    draw = torch.Generator().manual_seed(seed)
    for _, part in found.items():
        drawn = torch.randn(1, tiny.WIDTH, generator=draw)
        part.directions.copy_(drawn / drawn.norm())
        part.origins.copy_(torch.randn(1, generator=draw))
        part.levels.copy_(torch.tensor([4.0]))
    return method, found


def steerings():
    """One of each kind: a shift of two behaviours, a flow, one of every token, one of a context.

    And one across sites.
    """
    plain = get("diffmean")
    method, network = flow()
    reading, shear = reader()
    holding, loop = controller()
    one = Steering(plain, shift(Site(1), Site(3), k=2), ("wealth", "power"))
    return {
        "both": one,
        "flow": Steering(method, network, ("kind",)),
        "ever": replace(
            one, interventions=shift(Site(0), seed=1), behaviours=("b",), where=Where("all")
        ),
        "early": replace(
            one, interventions=shift(Site(2), seed=2), behaviours=("b",), where=Where("prompt")
        ),
        "told": Steering(reading, shear, ("b",)),
        "held": Steering(holding, loop, ("b",)),
    }


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Their folders and identities, as an engine's configuration has them; and themselves."""
    home = tmp_path_factory.mktemp("steerings")
    found = steerings()
    folders = {
        name: {"folder": str(one.save(home / name)), "identity": one.identity}
        for name, one in found.items()
    }
    return folders, found


@pytest.fixture(scope="session")
def llm(model_folder, served):
    """vLLM in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM

    config = {"innsteer": {"steerings": served[0], "layers": [0, 1, 2, 3], "untested": False}}
    return LLM(
        str(model_folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=64,
        additional_config=config,
    )

"""Tell one model, tokenizer and chat template from another, so that an artifact fits or is refused.

What does not change a model's computation is left out (library versions, paths, attention kernels),
else one checkpoint would look like two after an update.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

# Config fields that change the computation and leave no trace in the shapes of the weights.
STRUCTURE = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "rotary_pct",
    "use_parallel_residual",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
    "num_experts_per_tok",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "quantization_config",
)
SAMPLE = 1024
CHUNK = 1 << 24


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 hex digests of the four things that an artifact depends on, and a name for people.

    ``base`` covers the structure, ``weights`` the values, ``tokenizer`` the text-to-ids map and
    ``template`` the chat template. ``name`` is not compared: a copy under another path is the same.

    >>> one = Fingerprint(base="a", weights="b", tokenizer="c", template="d", name="here")
    >>> other = Fingerprint(base="a", weights="x", tokenizer="c", template="d", name="there")
    >>> one.differs(other)
    ['weights']
    """

    base: str
    weights: str
    tokenizer: str
    template: str
    name: str = field(default="", compare=False)

    def differs(self, other: "Fingerprint") -> list[str]:
        """Names of the digests that differ, in the order of the fields."""
        compared = [part.name for part in fields(self) if part.compare]
        return [name for name in compared if getattr(self, name) != getattr(other, name)]


def fingerprint(model: nn.Module, tokenizer: Any, *, name: str = "") -> Fingerprint:
    """The fingerprint of a model in memory with its tokenizer.

    ``weights`` is taken from values cast to float32. A checkpoint stored in bfloat16 therefore has
    one fingerprint whether loaded in bfloat16 or float32; one stored in float32 has another after
    it was rounded to bfloat16, as it should: the model computes something else.
    """
    return Fingerprint(
        base=_digest(_structure(model)),
        weights=_weights(model.parameters()),
        tokenizer=_digest(_vocabulary(tokenizer)),
        template=_digest(getattr(tokenizer, "chat_template", None)),
        name=name,
    )


def _digest(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _structure(model: nn.Module) -> dict[str, object]:
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    values: dict[str, Any] = {name: getattr(config, name, None) for name in STRUCTURE}
    quantised: Any = values["quantization_config"]
    if hasattr(quantised, "to_dict"):
        values["quantization_config"] = quantised.to_dict()
    return {
        # A field that a newer library adds with None must not make the same model another one.
        "config": {name: _rounded(value) for name, value in values.items() if value is not None},
        "shapes": [list(weight.shape) for weight in model.parameters()],
    }


def _rounded(value: object) -> object:
    """Floats at six digits: a file format that keeps them in float32 changes no model."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _weights(parameters: Iterable[Tensor]) -> str:
    """SHA-256 over an exact checksum and a sample of every parameter.

    The checksum adds the bits of all float32 values as integers, which needs no order of summation
    and notices any single change; the evenly spaced sample notices a change of places.
    """
    digest = hashlib.sha256()
    for parameter in parameters:
        flat = _plain(parameter.detach()).flatten()
        total = 0
        for start in range(0, flat.numel(), CHUNK):
            bits = flat[start : start + CHUNK].float().view(torch.int32)
            total += int(bits.sum(dtype=torch.int64))
        step = max(1, flat.numel() // SAMPLE)
        sample = flat[::step][:SAMPLE].float().cpu().numpy().astype("<f4")
        digest.update(f"{tuple(parameter.shape)} {total}\n".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def _plain(weight: Tensor) -> Tensor:
    """A quantised weight by its values: what holds them is a tensor type of some library."""
    return weight if type(weight) is Tensor else weight.dequantize()


def _vocabulary(tokenizer: Any) -> object:
    """What maps text to ids; padding and truncation are settings of a call, not of the map."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer.get_vocab(), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    described = json.loads(backend.to_str())
    return {k: v for k, v in described.items() if k not in ("version", "padding", "truncation")}

"""One decoder block's weights under names that do not depend on the model: what a map starts from.

By structure: query, key, value and output projections, a gated MLP, norms that only scale. Llama,
Mistral, Qwen 2 and 3, Gemma 2 and 3 and Granite are built so; what is not is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from innsteer.errors import InputError, LayoutError
from innsteer.models import LanguageModel
from innsteer.steerer import ACTIVATIONS, BlockCopy

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
AFTER = {
    "attention_after": "post_attention_layernorm",
    "mlp_after": "post_feedforward_layernorm",
}


def copy_block(model: LanguageModel, layer: int) -> BlockCopy:
    """A copy of a block's weights in float32 on the CPU, and of its numbers.

    Raises:
        InputError: no such layer. LayoutError: a block that is built in another way.
    """
    if not 0 <= layer < len(model.layout.blocks):
        raise InputError(
            f"layer {layer} of a model with {len(model.layout.blocks)} blocks",
            expected=f"a layer from 0 to {len(model.layout.blocks) - 1}",
        )
    block, config = model.layout.blocks[layer], model.model.config.get_text_config()
    attention, mlp = block.attention, block.mlp
    head = getattr(attention, "head_dim", None) or model.head_width
    if head is None or block.attention_norm is None or block.mlp_norm is None:
        raise _other(model, layer, "a norm before attention and before the MLP")
    weights: dict[str, Tensor] = {}
    for names, home in ((ATTENTION, attention), (MLP, mlp)):
        for name, part in names.items():
            linear = getattr(home, part, None)
            if not isinstance(linear, nn.Linear):
                raise _other(model, layer, f"{part}, a linear map")
            weights[name] = _own(linear.weight)
            if linear.bias is not None:
                weights[f"{name}.bias"] = _own(linear.bias)
    if odd := {"o.bias", "gate.bias", "up.bias", "down.bias"} & set(weights):
        raise _other(model, layer, f"no {min(odd)}")
    width = model.layout.width
    norms: dict[str, tuple[Any, int]] = {
        "attention_norm": (block.attention_norm, width),
        "mlp_norm": (block.mlp_norm, width),
        "q_norm": (getattr(attention, "q_norm", None), head),
        "k_norm": (getattr(attention, "k_norm", None), head),
    }
    for name, part in AFTER.items():
        found = getattr(block.module, part, None)
        norms[name] = (None if found is block.mlp_norm else found, width)
    for name, (norm, size) in norms.items():
        if norm is not None:
            weights[name] = _scale(model, layer, norm, size)
    rope, rope_scale = _rope(model, layer, attention, config)
    return BlockCopy(
        weights,
        rope,
        heads=len(weights["q"]) // head,
        kv_heads=len(weights["k"]) // head,
        head=head,
        activation=_activation(model, layer, mlp),
        eps=_eps(block.attention_norm),
        scale=float(getattr(attention, "scaling", head**-0.5)),
        cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        rope_scale=rope_scale,
    )


def _own(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu().clone()


def _eps(norm: nn.Module) -> float:
    """What a norm adds to a mean square."""
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    return 1e-6


def _scale(model: LanguageModel, layer: int, norm: nn.Module, width: int) -> Tensor:
    """What a norm multiplies by, seen from outside: Gemma's stores that less 1."""
    weight = next(norm.parameters())
    ones = torch.ones(1, width, dtype=torch.float32, device=weight.device)
    with torch.no_grad():
        found, turned = (norm((sign * ones).to(weight.dtype)).float() for sign in (1, -1))
    if not torch.allclose(found, -turned) or not (found != 0).any():
        raise _other(model, layer, "norms that only scale")
    return _own(found[0] * (1 + _eps(norm)) ** 0.5)


def _activation(model: LanguageModel, layer: int, mlp: nn.Module) -> str:
    """The MLP's activation, by what it does."""
    act = getattr(mlp, "act_fn", None)
    x = torch.linspace(-4, 4, 33)
    for name, known in ACTIVATIONS.items():
        if act is not None and torch.allclose(act(x), known(x), atol=1e-6):
            return name
    raise _other(model, layer, "an activation among " + ", ".join(ACTIVATIONS))


def _rope(
    model: LanguageModel, layer: int, attention: nn.Module, config: Any
) -> tuple[Tensor, float]:
    """The block's inverse frequencies, and what its cosines are multiplied by."""
    rotary = getattr(model.model.base_model, "rotary_emb", None)
    types = getattr(config, "layer_types", None)
    kind = getattr(attention, "layer_type", None) or (types[layer] if types else "")
    for lead in (f"{kind}_", ""):
        rope = getattr(rotary, f"{lead}inv_freq", None)
        if isinstance(rope, Tensor):
            return _own(rope), float(getattr(rotary, f"{lead}attention_scaling", 1.0))
    raise _other(model, layer, "rotary positions")


def _other(model: LanguageModel, layer: int, wanted: str) -> LayoutError:
    return LayoutError(
        f"block {layer} of {model.name!r} ({type(model.layout.blocks[layer].module).__name__}) as "
        "the start of a map",
        expected=f"a block like Llama's, Qwen's or Gemma's: with {wanted}",
    )

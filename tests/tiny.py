"""Tiny random models and a tokenizer, built in memory: one model per kind of layout."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from innsteer.models import LanguageModel

BOS, EOS, PAD = 0, 1, 2
WIDTH, LAYERS, VOCAB = 32, 4, 264
KINDS = ("llama", "gpt2", "neox")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """A config of three or four blocks of width 32; llama's heads are wider than its stream."""
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": VOCAB}
    if kind == "llama":
        sizes = {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 512,
        }
        return LlamaConfig(**(sizes | ids | changes))
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}
        return GPT2Config(**(sizes | ids | changes))
    if kind in ("neox", "gpt_neox"):
        sizes = {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS - 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
        return GPTNeoXConfig(**(sizes | ids | changes))
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return CONFIG_MAPPING[kind](**(sizes | ARCHITECTURES[kind] | ids | changes))


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 8, "sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None},
    "gpt2": {},
    "gpt_neox": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.4},
}
"""What people bring, by ``model_type``: what its tiny config adds to the common sizes."""


def tiny_model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode; its weights are large enough that tokens differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
        with torch.no_grad():
            for weight in model.parameters():
                # Fresh norms are all ones, so that two of them could not be told apart.
                noise = torch.randn_like(weight)
                weight.copy_(1 + 0.1 * noise if weight.ndim == 1 else 0.2 * noise)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(*, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every byte is a token, so any text can be encoded."""
    special = ["<s>", "<|im_end|>", "<pad>", "<|im_start|>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_language_model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """Model, tokenizer and layout together."""
    return LanguageModel.wrap(
        tiny_model(kind, seed=seed, **changes), tiny_tokenizer(), name=f"tiny-{kind}"
    )

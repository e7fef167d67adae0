"""Llama 1 to 3 and everything saved as ``LlamaForCausalLM``; Mistral, Mixtral, SmolLM3 and Granite: relatives whose
rotary layout llama.cpp has interleaved."""

from __future__ import annotations

import gguf

from .base import Family, Require, Sliding, Spec
from .blocks import Attention, Dense, Experts, decoder

ROPE_TYPES = frozenset({"default", "linear", "yarn", "dynamic", "llama3"})


def write_llama_keys(family: Family, writer: gguf.GGUFWriter) -> None:
    """Add the keys that llama.cpp's converter writes for llama and its relatives."""
    writer.add_vocab_size(family.vocab_size)
    writer.add_rope_dimension_count(family.head_dim)


def _code_llama(family: Family) -> dict[str, int]:
    """Infilling tokens of CodeLlama, known by its vocabulary size; no file of the model names them."""
    return {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010} if family.vocab_size == 32016 else {}


LLAMA = Spec(
    "LlamaForCausalLM",
    gguf.MODEL_ARCH.LLAMA,
    decoder(Attention(bias="attention_bias", out_bias="attention_bias"), Dense(bias="mlp_bias")),
    rotary_interleaved=True,
    rope_types=ROPE_TYPES,
    head_dim_always=True,
    keys=write_llama_keys,
    token_ids=_code_llama,
    calibrates=True,
)

MISTRAL = Spec(
    "MistralForCausalLM",
    gguf.MODEL_ARCH.LLAMA,
    decoder(Attention(), Dense()),
    rotary_interleaved=True,
    rope_types=ROPE_TYPES,
    kv_heads=8,
    head_dim_always=True,
    sliding=Sliding(default=4096),
    keys=write_llama_keys,
    token_ids=_code_llama,
    calibrates=True,
)

MIXTRAL = Spec(
    "MixtralForCausalLM",
    gguf.MODEL_ARCH.LLAMA,
    decoder(
        Attention(),
        Experts(
            count=("num_local_experts",),
            width="intermediate_size",
            router="block_sparse_moe.gate",
            separate="block_sparse_moe.experts.{expert}.{name}",
            names=("w1", "w3", "w2"),
            writes_width=False,
        ),
    ),
    rotary_interleaved=True,
    rope_types=ROPE_TYPES,
    theta=1e6,
    rms_eps=1e-5,
    kv_heads=8,
    keys=write_llama_keys,
    token_ids=_code_llama,
    calibrates=True,
)


def check_no_rope(family: Family) -> None:
    """llama.cpp leaves out the rotation in each fourth layer.  Raises ``ModelError`` if the config does not."""
    interval = family.config.integer("no_rope_layer_interval", default=4)
    default = [int((i + 1) % interval != 0) for i in range(family.layers)]
    stated = family.config.raw.get("no_rope_layers")
    if (stated or default) != [int((i + 1) % 4 != 0) for i in range(family.layers)]:
        raise family.config.error("llama.cpp rotates in all layers but each fourth: 'no_rope_layers' must say the same")


SMOLLM3 = Spec(
    "SmolLM3ForCausalLM",
    gguf.MODEL_ARCH.SMOLLM3,
    decoder(Attention(), Dense()),
    rotary_interleaved=True,
    theta=2e6,
    kv_heads=4,
    tied=True,
    sliding=Sliding(switch="use_sliding_window"),
    requires=(
        Require("attention_bias", (False,), "llama.cpp has no bias in smollm3 models", False),
        Require("mlp_bias", (False,), "llama.cpp has no bias in smollm3 models", False),
    ),
    check=check_no_rope,
    keys=write_llama_keys,
)


def _multipliers(family: Family, writer: gguf.GGUFWriter) -> None:
    write_llama_keys(family, writer)
    writer.add_attention_scale(family.config.number("attention_multiplier", 1.0))
    writer.add_embedding_scale(family.config.number("embedding_multiplier", 1.0))
    writer.add_residual_scale(family.config.number("residual_multiplier", 1.0))
    writer.add_logit_scale(family.config.number("logits_scaling", 1.0))


GRANITE = Spec(
    "GraniteForCausalLM",
    gguf.MODEL_ARCH.GRANITE,
    decoder(Attention(bias="attention_bias", out_bias="attention_bias"), Dense(bias="mlp_bias")),
    rotary_interleaved=True,
    keys=_multipliers,
)

"""Gemma 3, text."""

from __future__ import annotations

import gguf

from .base import Family, Require, Sliding, Spec
from .blocks import Attention, Dense, Norm
from .rope import Rope

_27B_LAYERS = 62
"""llama.cpp knows the 27 B model by its layers, and scales its attention by hidden / heads."""


def _check_scale(family: Family) -> None:
    scale = family.config.integer("query_pre_attn_scalar", default=256)
    expected = family.hidden // family.heads if family.layers == _27B_LAYERS else family.head_dim
    if scale != expected:
        raise family.config.error(f"'query_pre_attn_scalar' is {scale}; llama.cpp divides by the root of {expected}")


def _keys(family: Family, writer: gguf.GGUFWriter) -> None:
    local = Rope.read(
        family.config, 10000.0, family.context, layer_type="sliding_attention", theta_key="rope_local_base_freq"
    )
    if local.type != "default":
        raise family.config.error(f"llama.cpp has no {local.type} RoPE scaling in layers with a sliding window")
    writer.add_rope_freq_base_swa(local.theta)
    cap = family.config.raw.get("final_logit_softcapping")
    if cap is not None:
        writer.add_final_logit_softcapping(family.config.number("final_logit_softcapping", 0.0))


GEMMA3 = Spec(
    "Gemma3ForCausalLM",
    gguf.MODEL_ARCH.GEMMA3,
    (
        Norm("input_layernorm"),
        Attention(norms="head"),
        Norm("post_attention_layernorm"),
        Norm("pre_feedforward_layernorm"),
        Dense(),
        Norm("post_feedforward_layernorm"),
    ),
    rope_types=frozenset({"default", "linear"}),
    rope_layer_type="full_attention",
    theta=1e6,
    kv_heads=4,
    head_dim=256,
    head_dim_always=True,
    tied=True,
    norm_shift=1.0,
    sliding=Sliding(every=6, default=4096),
    activation=("gelu_pytorch_tanh",),
    activation_key="hidden_activation",
    requires=(
        Require("attention_bias", (False,), "llama.cpp has no bias in gemma3 models", False),
        Require("attn_logit_softcapping", (None,), "llama.cpp does not cap the attention of gemma3 models"),
        Require("use_bidirectional_attention", (False,), "llama.cpp's attention is causal here", False),
    ),
    check=_check_scale,
    keys=_keys,
)

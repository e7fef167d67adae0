"""Qwen 2, 2.5 and 3, dense and with experts."""

from __future__ import annotations

import gguf

from .base import Require, Sliding, Spec, plain_heads
from .blocks import Attention, Dense, Experts, decoder

_SLIDING = Sliding(switch="use_sliding_window")
_NO_BIAS = "llama.cpp has no 'attention_bias' in {} models"


QWEN2 = Spec(
    "Qwen2ForCausalLM",
    gguf.MODEL_ARCH.QWEN2,
    decoder(Attention(bias=True), Dense()),
    kv_heads=32,
    sliding=_SLIDING,
    check=plain_heads,
    calibrates=True,
)

QWEN3 = Spec(
    "Qwen3ForCausalLM",
    gguf.MODEL_ARCH.QWEN3,
    decoder(Attention(norms="head"), Dense()),
    kv_heads=32,
    head_dim=128,
    head_dim_always=True,
    sliding=_SLIDING,
    # There is no bias of the output projection in llama.cpp, and transformers switches all four together.
    requires=(Require("attention_bias", (False,), _NO_BIAS.format("qwen3"), False),),
    calibrates=True,
)

_ALL_LAYERS = "llama.cpp needs experts in every layer of a qwen3moe model"

QWEN3_MOE = Spec(
    "Qwen3MoeForCausalLM",
    gguf.MODEL_ARCH.QWEN3MOE,
    decoder(Attention(norms="head"), Experts()),
    kv_heads=4,
    sliding=_SLIDING,
    requires=(
        Require("attention_bias", (False,), _NO_BIAS.format("qwen3moe"), False),
        Require("mlp_only_layers", ([],), _ALL_LAYERS, []),
        Require("decoder_sparse_step", (1,), _ALL_LAYERS, 1),
        Require("norm_topk_prob", (True,), "llama.cpp always normalizes the router's top weights", False),
    ),
    calibrates=True,
)

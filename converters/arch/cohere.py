"""Command R7B and Command A (``Cohere2ForCausalLM``): attention and feed-forward network side by side behind one norm,
rotation only in layers with a sliding window."""

from __future__ import annotations

import gguf

from .base import Family, Require, Sliding, Spec
from .blocks import Attention, Dense, Norm


def _keys(family: Family, writer: gguf.GGUFWriter) -> None:
    writer.add_logit_scale(family.config.number("logit_scale", 0.0625))
    writer.add_vocab_size(family.vocab_size)
    writer.add_rope_dimension_count(family.head_dim)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _plain_heads(family: Family) -> None:
    if family.head_dim * family.heads != family.hidden:
        raise family.config.error("llama.cpp needs hidden_size = heads * head_dim in cohere2 models")


COHERE2 = Spec(
    "Cohere2ForCausalLM",
    gguf.MODEL_ARCH.COHERE2,
    (Norm("input_layernorm"), Attention(), Dense()),
    rope_types=frozenset({"default"}),
    rms_eps=1e-5,
    layer_norm=True,
    tied=True,
    sliding=Sliding(every=4, default=4096),
    requires=(
        Require("attention_bias", (False,), "llama.cpp has no bias in cohere2 models", False),
        Require("tie_word_embeddings", (True,), "llama.cpp takes the embedding as output matrix here", True),
        Require("use_qk_norm", (False,), "llama.cpp has no norms of query and key here", False),
    ),
    check=_plain_heads,
    keys=_keys,
    pretokenizers={"smollm": "command-r"},
)

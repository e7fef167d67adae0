"""OLMo 2, whose norms come after attention and feed-forward network, and OLMoE."""

from __future__ import annotations

import gguf

from .base import Family, Require, Spec, plain_heads
from .blocks import Attention, Dense, Experts, Norm, decoder

_NO_BIAS = Require("attention_bias", (False,), "llama.cpp has no bias in OLMo models", False)

OLMO2 = Spec(
    "Olmo2ForCausalLM",
    gguf.MODEL_ARCH.OLMO2,
    (Attention(norms="all"), Norm("post_attention_layernorm"), Dense(), Norm("post_feedforward_layernorm")),
    rms_eps=1e-5,
    own_output=True,
    requires=(_NO_BIAS,),
    check=plain_heads,
)


def _equal_heads(family: Family) -> None:
    plain_heads(family)
    if family.kv_heads != family.heads:
        raise family.config.error(f"llama.cpp needs as many key-value heads as heads, {family.heads}, in olmoe models")


OLMOE = Spec(
    "OlmoeForCausalLM",
    gguf.MODEL_ARCH.OLMOE,
    decoder(Attention(norms="all"), Experts(width="intermediate_size", writes_width=False)),
    rms_eps=1e-5,
    own_output=True,
    requires=(
        _NO_BIAS,
        Require("clip_qkv", (None,), "llama.cpp does not clip query, key and value here"),
        Require("norm_topk_prob", (False,), "llama.cpp does not normalize the router's top weights here", False),
    ),
    check=_equal_heads,
)

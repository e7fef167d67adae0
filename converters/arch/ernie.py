"""ERNIE 4.5, dense and with experts, as the PyTorch releases have it; neighbouring values are rotated, as stored."""

from __future__ import annotations

import gguf

from .base import Family, Require, Spec
from .blocks import Attention, Dense, Experts, decoder

_NO_BIAS = Require("use_bias", (False,), "llama.cpp has no bias in ERNIE models", False)

ERNIE4_5 = Spec(
    "Ernie4_5ForCausalLM",
    gguf.MODEL_ARCH.ERNIE4_5,
    decoder(Attention(), Dense()),
    rope_types=frozenset({"default", "linear"}),
    theta=500000.0,
    rms_eps=1e-5,
    kv_heads=2,
    head_dim=128,
    tied=True,
    requires=(_NO_BIAS,),
)


def _all_layers(family: Family) -> None:
    end = family.config.raw.get("moe_layer_end_index", -1)
    if end not in (-1, family.layers - 1, None):
        raise family.config.error(f"'moe_layer_end_index' is {end!r}; llama.cpp needs experts up to the last layer")


def _keys(family: Family, writer: gguf.GGUFWriter) -> None:
    writer.add_interleave_moe_layer_step(1)
    shared = family.config.count("moe_num_shared_experts")
    if shared:
        writer.add_expert_shared_feed_forward_length(shared * family.config.integer("moe_intermediate_size"))


ERNIE4_5_MOE = Spec(
    "Ernie4_5_MoeForCausalLM",
    gguf.MODEL_ARCH.ERNIE4_5_MOE,
    decoder(
        Attention(),
        Experts(
            count=("moe_num_experts",),
            used=("moe_k",),
            shared="moe_num_shared_experts",
            lead="moe_layer_start_index",
            selection_bias=("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
        ),
    ),
    rope_types=frozenset({"default", "linear"}),
    theta=500000.0,
    rms_eps=1e-5,
    kv_heads=4,
    tied=True,
    requires=(
        _NO_BIAS,
        Require("moe_layer_interval", (1,), "llama.cpp needs experts in every layer behind the dense ones", 1),
    ),
    check=_all_layers,
    keys=_keys,
    ignored=r"\.mtp_",
)

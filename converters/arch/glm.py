"""GLM 4 (0414) and the mixtures GLM 4.5 and 4.6; half of each head is rotated."""

from __future__ import annotations

import gguf

from .base import Family, Spec
from .blocks import Attention, Dense, Experts, Norm, decoder, write_routing

_NAMES = {"llama-bpe": "glm4", "smaug-bpe": "chatglm-bpe"}
_END = "<|endoftext|>"
_TURN = {"eot": "<|user|>", "unk": _END}

GLM4 = Spec(
    "Glm4ForCausalLM",
    gguf.MODEL_ARCH.GLM4,
    (
        Norm("input_layernorm"),
        Attention(bias=("attention_bias", True)),
        Norm("post_self_attn_layernorm"),
        Norm("post_attention_layernorm"),
        Dense(fused=True),
        Norm("post_mlp_layernorm"),
    ),
    rope_types=frozenset({"default"}),
    partial_rotary=0.5,
    rms_eps=1.5625e-7,
    kv_heads=2,
    head_dim=128,
    pretokenizers=_NAMES,
    special_tokens={**_TURN, "bos": _END, "eos": _END},
)


def _routing(family: Family, writer: gguf.GGUFWriter) -> None:
    write_routing(family, writer, gguf.ExpertGatingFuncType.SIGMOID)


GLM4_MOE = Spec(
    "Glm4MoeForCausalLM",
    gguf.MODEL_ARCH.GLM4_MOE,
    decoder(
        Attention(bias="attention_bias", norms="head", normed="use_qk_norm"),
        Experts(
            count=("n_routed_experts", "num_experts"),
            shared="n_shared_experts",
            lead="first_k_dense_replace",
            selection_bias=("mlp.gate.e_score_correction_bias",),
        ),
    ),
    rope_types=frozenset({"default", "yarn"}),
    partial_rotary=0.5,
    rms_eps=1e-5,
    kv_heads=8,
    skips_mtp=True,
    keys=_routing,
    pretokenizers=_NAMES,
    special_tokens={**_TURN, "bos": "[gMASK]", "eom": "<|observation|>"},
)

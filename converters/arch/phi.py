"""Phi 3, 3.5 and 4 (``Phi3ForCausalLM``): query, key and value in one matrix, gate and up in another."""

from __future__ import annotations

import gguf

from .base import Family, Spec
from .blocks import Attention, Dense, decoder


def _plain_heads(family: Family) -> None:
    if family.head_dim * family.heads != family.hidden:
        raise family.config.error("llama.cpp needs hidden_size = heads * head_dim in phi3 models")


PHI3 = Spec(
    "Phi3ForCausalLM",
    gguf.MODEL_ARCH.PHI3,
    decoder(Attention(fused=True), Dense(fused=True)),
    rope_types=frozenset({"default", "longrope"}),
    partial_rotary=1.0,
    rms_eps=1e-5,
    check=_plain_heads,
)

"""gpt-oss: sinks in the attention, experts with biases, stored with gate and up interleaved; MXFP4 or bf16."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from .base import Family, Part, Require, Sliding, Spec, Wanted, whole
from .blocks import Attention, Experts, Norm


class GptOssExperts(Experts):
    """Rows 0, 2, .. of ``gate_up_proj`` are the gate's.  MXFP4 matrices have rows of inputs; those in bf16, without
    ``.weight``, are transposed."""

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        count, inner, hidden = self.number(family), family.intermediate, family.hidden
        yield whole(f"{prefix}.mlp.router.weight", count, hidden)
        yield whole(f"{prefix}.mlp.router.bias", count)
        experts = f"{prefix}.mlp.experts"
        for which, (kind, name, rows, columns) in enumerate(
            (("gate", "gate_up", inner, hidden), ("up", "gate_up", inner, hidden), ("down", "down", hidden, inner))
        ):
            both = 2 if name == "gate_up" else 1
            offset = which % 2 if both == 2 else 0
            stored_name, all_rows = f"{experts}.{name}_proj", both * rows
            if f"{stored_name}.weight" in stored:
                shape = (count, all_rows, columns)
                parts = tuple(
                    Part(f"{stored_name}.weight", shape, e * all_rows, all_rows, both, offset=offset)
                    for e in range(count)
                )
            else:
                shape = (count, columns, all_rows)
                parts = tuple(
                    Part(stored_name, shape, e * columns, columns, both, transposed=True, offset=offset)
                    for e in range(count)
                )
            yield Wanted(f"{experts}.{kind}_proj.weight", (count, rows, columns), parts)
            bias = Part(f"{stored_name}_bias", (count, all_rows), step=both, of_columns=True, offset=offset)
            yield Wanted(f"{experts}.{kind}_proj.bias", (count, rows), (bias,))


GPT_OSS = Spec(
    "GptOssForCausalLM",
    gguf.MODEL_ARCH.GPT_OSS,
    (
        Norm("input_layernorm"),
        Attention(bias=("attention_bias", True), out_bias=("attention_bias", True), sinks=True),
        Norm("post_attention_layernorm"),
        GptOssExperts(count=("num_local_experts", "num_experts"), width="intermediate_size"),
    ),
    rope_types=frozenset({"default", "yarn"}),
    rope_inexact=frozenset({"truncate"}),
    theta=150000.0,
    rms_eps=1e-5,
    kv_heads=8,
    head_dim=64,
    own_output=True,
    sliding=Sliding(every=2, default=128),
    requires=(
        Require("swiglu_alpha", (1.702,), "llama.cpp's is 1.702", 1.702),
        Require("swiglu_limit", (7.0,), "llama.cpp's is 7", 7.0),
        Require("attention_bias", (True,), "llama.cpp needs the biases of gpt-oss", True),
    ),
)

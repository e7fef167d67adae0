"""Llama 4, text: neighbouring values are rotated, as stored; experts in every layer or every second one."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from .base import Family, Part, Require, Spec, Wanted, whole
from .blocks import Attention, Experts, decoder, gated_network
from .llama import ROPE_TYPES, check_no_rope, write_llama_keys

CHUNK = 8192
"""llama.cpp's: tokens that attention sees in most layers, and after which it grows sharper in the others."""


class Llama4Experts(Experts):
    """Experts beside one that every token takes.  Those in stacks are transposed, gate and up side by side."""

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        prefix, hidden = f"{prefix}.feed_forward", family.hidden
        if (layer + 1) % _step(family):
            yield from gated_network(prefix, family.intermediate, hidden)
            return
        count, inner = self.number(family), family.config.integer(self.width)
        yield whole(f"{prefix}.router.weight", count, hidden)
        yield from gated_network(f"{prefix}.shared_expert", inner, hidden)
        for kind, name, first, rows, columns in (
            ("gate", "gate_up_proj", 0, inner, hidden),
            ("up", "gate_up_proj", inner, inner, hidden),
            ("down", "down_proj", 0, hidden, inner),
        ):
            shape = (count, columns, 2 * inner if name == "gate_up_proj" else rows)
            parts = tuple(
                Part(
                    f"{prefix}.experts.{name}",
                    shape,
                    e * columns,
                    columns,
                    transposed=True,
                    offset=first,
                    stop=first + rows,
                )
                for e in range(count)
            )
            yield Wanted(f"{prefix}.experts.{kind}_proj.weight", (count, rows, columns), parts)


def _step(family: Family) -> int:
    return family.config.integer("interleave_moe_layer_step", default=1)


def _check(family: Family) -> None:
    check_no_rope(family)
    config, step = family.config, _step(family)
    if config.raw.get("moe_layers") not in (None, list(range(step - 1, family.layers, step))):
        raise config.error(f"llama.cpp needs experts in every layer of {step}: 'moe_layers' must say the same")
    normed = config.integer("num_local_experts", default=16) != 128
    if config.boolean("use_qk_norm", True) != normed:
        raise config.error(f"'use_qk_norm' must be {str(normed).lower()}: llama.cpp knows by the number of experts")
    if family.context > CHUNK:
        stated = config.raw.get("attention_chunk_size", CHUNK), config.raw.get("floor_scale", CHUNK)
        if stated != (CHUNK, CHUNK) or not config.raw.get("attn_temperature_tuning", True):
            raise config.error(
                f"llama.cpp has attention in chunks of {CHUNK} tokens and sharpens it beyond in llama4 models: "
                "'attention_chunk_size', 'floor_scale' and 'attn_temperature_tuning' must say the same"
            )


def _keys(family: Family, writer: gguf.GGUFWriter) -> None:
    write_llama_keys(family, writer)
    writer.add_interleave_moe_layer_step(_step(family))


LLAMA4 = Spec(
    "Llama4ForCausalLM",
    gguf.MODEL_ARCH.LLAMA4,
    decoder(Attention(), Llama4Experts(count=("num_local_experts",), width="intermediate_size")),
    rope_types=ROPE_TYPES,
    theta=500000.0,
    rms_eps=1e-5,
    kv_heads=8,
    head_dim=128,
    head_dim_always=True,
    width="intermediate_size_mlp",
    requires=(
        Require("attention_bias", (False,), "llama.cpp has no bias in llama4 models", False),
        Require("attn_scale", (0.1,), "llama.cpp's is 0.1", 0.1),
    ),
    check=_check,
    keys=_keys,
    pretokenizers={"gpt-4o": "llama4"},
)

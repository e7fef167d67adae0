"""Qwen3-Next and Qwen3.5: three layers of linear attention to one of attention proper, whose output is gated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import numpy as np
from numpy.typing import NDArray

from .base import Family, Part, Require, Spec, Wanted, whole
from .blocks import PRE_NORM, Attention, Dense, Experts


@dataclass(frozen=True)
class GatedDeltaNet:
    """Linear attention with the gated delta rule.  Each key head serves several value heads in a row.

    ``fused``: one tensor has query, key, value and output gate of a key head one below the other, then the next one's,
    and llama.cpp takes value heads as they are.  If they are not, it wants each key head's first value head, then each
    one's second: in this order it repeats the keys.
    """

    fused: bool = False

    def check(self, family: Family) -> None:
        """See ``Block``."""
        keys, values, size, _ = _sizes(family)
        if values % keys:
            raise family.config.error(f"{values} value heads cannot share {keys} key heads")
        if family.config.integer("linear_value_head_dim", default=128) != size:
            raise family.config.error("llama.cpp needs 'linear_value_head_dim' and 'linear_key_head_dim' to be equal")

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        prefix, hidden = f"{prefix}.linear_attn", family.hidden
        keys, values, size, kernel = _sizes(family)
        ratio, mixed = values // keys, (2 * keys + values) * size
        qkv, z, conv = (f"{prefix}.{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "conv1d"))
        if self.fused:
            name, group = f"{prefix}.in_proj_qkvz.weight", (2 + 2 * ratio) * size
            spans = ((0, size), (size, size), (2 * size, ratio * size), ((2 + ratio) * size, ratio * size))
            shape = (keys * group, hidden)
            parts = [tuple(Part(name, shape, k * group + first, rows) for k in range(keys)) for first, rows in spans]
            yield Wanted(qkv, (mixed, hidden), parts[0] + parts[1] + parts[2])
            yield Wanted(z, (values * size, hidden), parts[3])
            yield whole(f"{prefix}.in_proj_ba.weight", 2 * values, hidden)
            yield Wanted(conv, (mixed, kernel), (Part(conv, (mixed, 1, kernel)),))
            columns = None
        else:
            heads = [k * ratio + v for v in range(ratio) for k in range(keys)]
            columns = (keys, ratio) if ratio > 1 else None

            def mixture(name: str, *shape: int) -> tuple[Part, ...]:
                first = 2 * keys * size
                return Part(name, shape, 0, first), *(Part(name, shape, first + h * size, size) for h in heads)

            yield Wanted(qkv, (mixed, hidden), mixture(qkv, mixed, hidden))
            shape = (values * size, hidden)
            yield Wanted(z, shape, tuple(Part(z, shape, h * size, size) for h in heads))
            for name in (f"{prefix}.in_proj_b.weight", f"{prefix}.in_proj_a.weight"):
                shape = (values, hidden)
                yield Wanted(name, shape, tuple(Part(name, shape, step=ratio, offset=v) for v in range(ratio)))
            yield Wanted(conv, (mixed, kernel), mixture(conv, mixed, 1, kernel))
        decay, bias, out = f"{prefix}.A_log", f"{prefix}.dt_bias", f"{prefix}.out_proj.weight"
        yield Wanted(decay, (values,), (Part(decay, (values,)),), columns=columns, apply=_decay)
        yield Wanted(f"{prefix}.dt_proj.bias", (values,), (Part(bias, (values,)),), columns=columns)
        yield whole(f"{prefix}.norm.weight", size)
        shape = (hidden, values * size)
        yield Wanted(out, shape, (Part(out, shape),), columns=columns)

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """See ``Block``."""
        keys, values, size, kernel = _sizes(family)
        writer.add_ssm_conv_kernel(kernel)
        writer.add_ssm_state_size(size)
        writer.add_ssm_group_count(keys)
        writer.add_ssm_time_step_rank(values)
        writer.add_ssm_inner_size(values * size)


def _decay(logarithms: NDArray[np.float32]) -> NDArray[np.float32]:
    """By how much a state's logarithm changes per unit of time."""
    return (-np.exp(logarithms.astype(np.float64))).astype(np.float32)


def _sizes(family: Family) -> tuple[int, int, int, int]:
    """Key heads, value heads, the size of a head and of the convolution."""
    integer = family.config.integer
    return (
        integer("linear_num_key_heads", default=16),
        integer("linear_num_value_heads", default=32),
        integer("linear_key_head_dim", default=128),
        integer("linear_conv_kernel_dim", default=4),
    )


@dataclass(frozen=True)
class Hybrid:
    """Linear attention, and in some layers attention proper."""

    linear: GatedDeltaNet
    full: Attention

    def check(self, family: Family) -> None:
        """See ``Block``."""
        self._is_linear(family)
        self.linear.check(family)

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        block = self.linear if self._is_linear(family)[layer] else self.full
        yield from block.tensors(family, prefix, layer, stored)

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """See ``Block``."""
        self.linear.write(family, writer)
        writer.add_array(f"{family.arch_name}.attention.recurrent_layers", self._is_linear(family))
        writer.add_full_attention_interval(family.config.integer("full_attention_interval", default=4))

    def _is_linear(self, family: Family) -> list[bool]:
        """Of each layer, whether its attention is linear.  Raises ``ModelError``."""
        config, kinds = family.config, family.config.raw.get("layer_types")
        if kinds is None:
            interval = config.integer("full_attention_interval", default=4)
            return [(i + 1) % interval != 0 for i in range(family.layers)]
        if not isinstance(kinds, list) or len(kinds) != family.layers:
            raise config.error(f"'layer_types' must name {family.layers} layers")
        if unknown := set(map(str, kinds)) - {"linear_attention", "full_attention"}:
            raise config.error(f"'layer_types' has one that is unknown: {sorted(unknown)}")
        return [kind == "linear_attention" for kind in kinds]


_EXPERTS = Experts(shared_width="shared_expert_intermediate_size")
_ALL_LAYERS = "llama.cpp needs experts in every layer of a qwen3next model"
_GATED = Attention(norms="head", gated=True)

QWEN3_NEXT = Spec(
    "Qwen3NextForCausalLM",
    gguf.MODEL_ARCH.QWEN3NEXT,
    (PRE_NORM[0], Hybrid(GatedDeltaNet(fused=True), _GATED), PRE_NORM[1], _EXPERTS),
    rope_types=frozenset({"default", "yarn"}),
    partial_rotary=0.25,
    kv_heads=2,
    head_dim=256,
    head_dim_always=True,
    norm_shift=1.0,
    requires=(
        Require("attention_bias", (False,), "llama.cpp has no bias in qwen3next models", False),
        Require("mlp_only_layers", ([],), _ALL_LAYERS, []),
        Require("decoder_sparse_step", (1,), _ALL_LAYERS, 1),
        Require("norm_topk_prob", (True,), "llama.cpp always normalizes the router's top weights", True),
    ),
    ignored=r"^(?:model\.)?mtp\.",
)


def _sections(family: Family) -> list[int]:
    """Rotated pairs for time, height and width, which take turns.  Text has one position for all three, but llama.cpp
    rotates no pair whose turn comes after its section's end.  Raises ``ModelError`` if there is one."""
    pairs = family.rotary_dim // 2
    sections = family.rope.sections(pairs, [11, 11, 10])
    if any(pair >= 3 * sections[pair % 3] for pair in range(pairs)):
        raise family.config.error(
            f"'mrope_section' {sections[:3]!r}: llama.cpp does not rotate all of {pairs} pairs by it"
        )
    return sections


def _check_sections(family: Family) -> None:
    _sections(family)


def _keys(family: Family, writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_sections(_sections(family))


QWEN3_5 = Spec(
    "Qwen3_5ForCausalLM",
    gguf.MODEL_ARCH.QWEN35,
    (PRE_NORM[0], Hybrid(GatedDeltaNet(), _GATED), PRE_NORM[1], Dense()),
    rope_types=frozenset({"default", "yarn"}),
    partial_rotary=0.25,
    kv_heads=4,
    head_dim=256,
    head_dim_always=True,
    norm_shift=1.0,
    requires=(Require("attention_bias", (False,), "llama.cpp has no bias in qwen35 models", False),),
    check=_check_sections,
    keys=_keys,
    ignored=r"^(?:model\.)?mtp\.",
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    architecture="Qwen3_5MoeForCausalLM",
    model_arch=gguf.MODEL_ARCH.QWEN35MOE,
    layer=(PRE_NORM[0], Hybrid(GatedDeltaNet(), _GATED), PRE_NORM[1], _EXPERTS),
    kv_heads=2,
    width=None,
)

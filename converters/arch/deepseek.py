"""DeepSeek V2 and V3 (R1, V3.1): multi-head latent attention, and experts behind some dense layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf

from .base import Block, Family, Part, Require, Spec, Wanted, whole
from .blocks import PRE_NORM, Experts, write_routing


@dataclass(frozen=True)
class LatentAttention:
    """Queries, keys and values from low-rank projections.  llama.cpp multiplies the latents themselves: it has one head
    of keys, and wants ``kv_b_proj`` in two, the keys' part transposed."""

    def check(self, family: Family) -> None:
        """See ``Block``."""
        for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            family.config.integer(key)
        family.kv_heads = 1

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        prefix, config = f"{prefix}.self_attn", family.config
        hidden, heads, latent = family.hidden, family.heads, config.integer("kv_lora_rank")
        plain, rotated = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
        value = config.integer("v_head_dim")
        rank = config.count("q_lora_rank")
        if rank:
            yield whole(f"{prefix}.q_a_proj.weight", rank, hidden)
            yield whole(f"{prefix}.q_a_layernorm.weight", rank)
            yield whole(f"{prefix}.q_b_proj.weight", heads * (plain + rotated), rank)
        else:
            yield whole(f"{prefix}.q_proj.weight", heads * (plain + rotated), hidden)
        yield whole(f"{prefix}.kv_a_proj_with_mqa.weight", latent + rotated, hidden)
        yield whole(f"{prefix}.kv_a_layernorm.weight", latent)
        both = plain + value
        name, shape = f"{prefix}.kv_b_proj.weight", (heads * both, latent)
        keys = tuple(Part(name, shape, h * both, plain, transposed=True) for h in range(heads))
        values = tuple(Part(name, shape, h * both + plain, value) for h in range(heads))
        yield Wanted(f"{prefix}.k_b_proj.weight", (heads, latent, plain), keys)
        yield Wanted(f"{prefix}.v_b_proj.weight", (heads, value, latent), values)
        yield whole(f"{prefix}.o_proj.weight", hidden, heads * value)

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """See ``Block``."""
        config = family.config
        latent, rotated = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
        if config.count("q_lora_rank"):
            writer.add_q_lora_rank(config.integer("q_lora_rank"))
        writer.add_kv_lora_rank(latent)
        writer.add_key_length(latent + rotated)
        writer.add_value_length(latent)
        writer.add_key_length_mla(config.integer("qk_nope_head_dim") + rotated)
        writer.add_value_length_mla(config.integer("v_head_dim"))
        writer.add_rope_dimension_count(rotated)
        writer.add_vocab_size(family.vocab_size)
        if family.rope.type == "yarn" and family.rope.params.get("mscale_all_dim"):
            # llama.cpp divides by 0.1 in this architecture.
            writer.add_rope_scaling_yarn_log_mul(0.1 * family.rope.params["mscale_all_dim"])


def _layer(selection_bias: tuple[str, ...]) -> tuple[Block, ...]:
    experts = Experts(
        count=("n_routed_experts", "num_local_experts"),
        shared="n_shared_experts",
        lead="first_k_dense_replace",
        selection_bias=selection_bias,
    )
    return PRE_NORM[0], LatentAttention(), PRE_NORM[1], experts


_NO_BIAS = Require("attention_bias", (False,), "llama.cpp has no bias in deepseek2 models", False)


def _check_yarn(family: Family) -> None:
    """llama.cpp knows one mscale, which scales attention; transformers scales it by the second and the rotated values
    by what the two, or an ``attention_factor``, make of the first, which must be nothing."""
    if family.rope.type == "yarn":
        one, two = (family.rope.params.get(key) for key in ("mscale", "mscale_all_dim"))
        if not one or one != two or family.rope.params.get("attention_factor") is not None:
            raise family.config.error(
                f"yarn's 'mscale' is {one!r} and 'mscale_all_dim' {two!r}: llama.cpp has one number for both, and no "
                "'attention_factor', in deepseek2 models"
            )


def _check_v2(family: Family) -> None:
    """llama.cpp knows by the number of layers whether queries have no low-rank projection."""
    _check_yarn(family)
    lite = family.layers in (26, 27) or (family.layers == 48 and family.vocab_size == 128256)
    if lite == bool(family.config.count("q_lora_rank")):
        kind = "none" if lite else "one"
        raise family.config.error(f"llama.cpp expects {kind} of 'q_lora_rank' in a model of {family.layers} layers")


def _softmax(family: Family, writer: gguf.GGUFWriter) -> None:
    write_routing(family, writer, gguf.ExpertGatingFuncType.SOFTMAX)


def _sigmoid(family: Family, writer: gguf.GGUFWriter) -> None:
    write_routing(family, writer, gguf.ExpertGatingFuncType.SIGMOID)


DEEPSEEK_V2 = Spec(
    "DeepseekV2ForCausalLM",
    gguf.MODEL_ARCH.DEEPSEEK2,
    _layer(()),
    rope_types=frozenset({"default", "yarn"}),
    rope_free=frozenset({"mscale", "mscale_all_dim"}),
    head_dim=64,
    requires=(
        _NO_BIAS,
        Require("norm_topk_prob", (False,), "DeepSeek V2 never normalizes the router's top weights", False),
        Require("topk_method", ("greedy",), "llama.cpp chooses among groups of experts as DeepSeek V3 does", "greedy"),
        Require("moe_layer_freq", (1,), "llama.cpp needs experts in every layer behind the dense ones", 1),
    ),
    check=_check_v2,
    keys=_softmax,
)

DEEPSEEK_V3 = Spec(
    "DeepseekV3ForCausalLM",
    gguf.MODEL_ARCH.DEEPSEEK2,
    _layer(("mlp.gate.e_score_correction_bias",)),
    rope_types=frozenset({"default", "yarn"}),
    rope_free=frozenset({"mscale", "mscale_all_dim"}),
    kv_heads=128,
    head_dim=64,
    requires=(
        _NO_BIAS,
        Require("rope_interleave", (True,), "llama.cpp rotates neighbouring values here", True),
        Require("scoring_func", ("sigmoid",), "DeepSeek V3's router is a sigmoid", "sigmoid"),
        Require("moe_layer_freq", (1,), "llama.cpp needs experts in every layer behind the dense ones", 1),
    ),
    check=_check_yarn,
    keys=_sigmoid,
    skips_mtp=True,
)

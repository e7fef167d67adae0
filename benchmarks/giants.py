"""Sizes of very large models in every type: ``python benchmarks/giants.py [--folder F] [--types T,T] [MODEL ...]``.

Each model is written as a skeleton, a folder with the configuration and the tensors' names, shapes and types of the
published checkpoint but without its weights (files of holes, which take a few MB), and planned as ``--dry-run`` does.
Configurations are those of the published ``config.json``, as far as a conversion looks at them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path
from typing import Any

from ccq_converters.arch import family_of
from ccq_converters.folder_sources import load_sources
from ccq_converters.options import QuantOptions
from ccq_converters.plan import make_plan
from ccq_converters.sources import open_checkpoint
from ccq_format.layouts import LAYOUTS

SHARD = 4_300_000_000
_SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, safetensors type and shape."""

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _yarn(factor: int) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def _latent(heads: int, experts: int, lead: int, vocab: int, context: int, **more: Any) -> dict[str, Any]:
    """DeepSeek-V3 and what was built like it."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": lead,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "quantization_config": _FP8,
        **more,
    }


def _plain(architecture: str, hidden: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **more,
    }


GIANTS: dict[str, dict[str, Any]] = {
    "Kimi-K2": _latent(
        64, 384, 1, 163840, 131072, rope_theta=50000.0, rope_scaling=_yarn(32), routed_scaling_factor=2.827
    ),
    "DeepSeek-V3": _latent(
        128, 256, 3, 129280, 163840, rope_theta=10000, rope_scaling=_yarn(40), routed_scaling_factor=2.5,
        n_group=8, topk_group=4, num_nextn_predict_layers=1,
    ),
    "Qwen3-Coder-480B-A35B": _plain(
        "Qwen3MoeForCausalLM", 6144, 62, 96, 8, 151936, intermediate_size=8192, moe_intermediate_size=2560,
        num_experts=160, num_experts_per_tok=8, norm_topk_prob=True, rope_theta=10000000,
    ),
    "Llama-3.1-405B": _plain(
        "LlamaForCausalLM", 16384, 126, 128, 8, 128256, intermediate_size=53248, rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    ),
    "GLM-4.5": _plain(
        "Glm4MoeForCausalLM", 5120, 92, 96, 8, 151552, intermediate_size=12288, moe_intermediate_size=1536,
        n_routed_experts=160, n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, n_group=1,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5, attention_bias=True, use_qk_norm=True,
        partial_rotary_factor=0.5, rope_theta=1000000, num_nextn_predict_layers=1,
    ),
    "ERNIE-4.5-300B-A47B": _plain(
        "Ernie4_5_MoeForCausalLM", 8192, 54, 64, 8, 103424, intermediate_size=28672, moe_intermediate_size=3584,
        moe_num_experts=64, moe_k=8, moe_layer_start_index=3, moe_layer_end_index=53, moe_layer_interval=1,
        moe_num_shared_experts=0, use_bias=False, rope_theta=500000.0,
    ),
    "Qwen3-235B-A22B": _plain(
        "Qwen3MoeForCausalLM", 4096, 94, 64, 4, 151936, intermediate_size=12288, moe_intermediate_size=1536,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, rope_theta=1000000,
    ),
    "gpt-oss-120b": _plain(
        "GptOssForCausalLM", 2880, 36, 64, 8, 201088, head_dim=64, intermediate_size=2880, num_local_experts=128,
        num_experts_per_tok=4, attention_bias=True, sliding_window=128, rope_theta=150000, swiglu_limit=7.0,
        quantization_config={"quant_method": "mxfp4"},
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                      "original_max_position_embeddings": 4096},
    ),
}  # fmt: skip


# --- names and shapes -----------------------------------------------------------------------------------------------


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """All tensors of the published checkpoint."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
    # Layers behind the last predict further tokens.
    for layer in range(config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}"
        if layer >= config["num_hidden_layers"]:
            for name in ("embed_tokens", "shared_head.head"):
                yield f"{prefix}.{name}.weight", "BF16", (vocab, hidden)
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}.{name}.weight", "BF16", (hidden,)
            yield f"{prefix}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", "BF16", (hidden,)
        latent = "kv_lora_rank" in config
        yield from (_latent_attention if latent else _attention)(config, f"{prefix}.self_attn")
        yield from _ffn(config, f"{prefix}.mlp", layer)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocab, hidden)


def _linear(config: dict[str, Any], name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """A matrix; in FP8 with a scale per block where the checkpoint has that."""
    if config.get("quantization_config", {}).get("quant_method") == "fp8":
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (ceil(rows / 128), ceil(columns / 128))
    else:
        yield f"{name}.weight", "BF16", (rows, columns)


def _latent_attention(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    hidden, heads, rank, latent = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    plain, rotated, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    yield f"{prefix}.q_a_layernorm.weight", "BF16", (rank,)
    yield f"{prefix}.kv_a_layernorm.weight", "BF16", (latent,)
    yield from _linear(config, f"{prefix}.q_a_proj", rank, hidden)
    yield from _linear(config, f"{prefix}.q_b_proj", heads * (plain + rotated), rank)
    yield from _linear(config, f"{prefix}.kv_a_proj_with_mqa", latent + rotated, hidden)
    yield from _linear(config, f"{prefix}.kv_b_proj", heads * (plain + value), latent)
    yield from _linear(config, f"{prefix}.o_proj", hidden, heads * value)


def _attention(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    architecture, hidden, size = config["architectures"][0], config["hidden_size"], config["head_dim"]
    q, kv = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
        yield f"{prefix}.{name}_proj.weight", "BF16", (rows, columns)
        if config.get("attention_bias") and (name != "o" or architecture == "GptOssForCausalLM"):
            yield f"{prefix}.{name}_proj.bias", "BF16", (rows,)
    if architecture == "Qwen3MoeForCausalLM" or config.get("use_qk_norm"):
        yield f"{prefix}.q_norm.weight", "BF16", (size,)
        yield f"{prefix}.k_norm.weight", "BF16", (size,)
    if architecture == "GptOssForCausalLM":
        yield f"{prefix}.sinks", "BF16", (config["num_attention_heads"],)


def _ffn(config: dict[str, Any], prefix: str, layer: int) -> Iterator[Tensor]:
    hidden, architecture = config["hidden_size"], config["architectures"][0]
    if architecture == "GptOssForCausalLM":
        yield from _gpt_oss_experts(config, prefix)
        return
    experts = config.get("n_routed_experts", config.get("num_experts", config.get("moe_num_experts", 0)))
    lead = config.get("first_k_dense_replace", config.get("moe_layer_start_index", 0))
    if not experts or layer < lead:
        yield from _gated(config, prefix, config["intermediate_size"])
        return
    width = config["moe_intermediate_size"]
    yield f"{prefix}.gate.weight", "BF16", (experts, hidden)
    if architecture == "Ernie4_5_MoeForCausalLM":
        yield f"{prefix}.moe_statics.e_score_correction_bias", "F32", (1, experts)
    elif "n_routed_experts" in config:
        yield f"{prefix}.gate.e_score_correction_bias", "F32", (experts,)
    for expert in range(experts):
        yield from _gated(config, f"{prefix}.experts.{expert}", width)
    if config.get("n_shared_experts"):
        yield from _gated(config, f"{prefix}.shared_experts", config["n_shared_experts"] * width)


def _gated(config: dict[str, Any], prefix: str, width: int) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        yield from _linear(config, f"{prefix}.{name}_proj", rows, columns)


def _gpt_oss_experts(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield f"{prefix}.router.weight", "BF16", (experts, hidden)
    yield f"{prefix}.router.bias", "BF16", (experts,)
    for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        yield f"{prefix}.experts.{name}_blocks", "U8", (experts, rows, columns // 32, 16)
        yield f"{prefix}.experts.{name}_scales", "U8", (experts, rows, columns // 32)
        yield f"{prefix}.experts.{name}_bias", "BF16", (experts, rows)


# --- skeletons ------------------------------------------------------------------------------------------------------


def write_skeleton(folder: Path, config: dict[str, Any]) -> int:
    """Write the new folder; returns the number of tensors.  The tokenizer is a small one: missing tokens are filled up
    by the converter."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors(config):
        size = _SIZES[tensor[1]] * prod(tensor[2])
        if used + size > SHARD and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys((tensor[0] for tensor in shard), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return len(weight_map)


def _write_shard(path: Path, shard: list[Tensor]) -> None:
    """A header, and a hole of the size of the data."""
    header, at = {}, 0
    for name, dtype, shape in shard:
        end = at + _SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with one merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): i for i, byte in enumerate(printable)}
    vocab |= {chr(256 + i): len(printable) + i for i in range(len(others))}
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab["th"] = 256
    model = {"type": "BPE", "vocab": vocab, "merges": ["t h"], "ignore_merges": False, "byte_fallback": False}
    tokenizer = {"model": model, "pre_tokenizer": steps, "decoder": steps, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


# --- the table ------------------------------------------------------------------------------------------------------


def table(names: list[str], types: list[str], folder: Path) -> Iterator[str]:
    """Markdown: weights in billions, and GB of the tensors in each type."""
    yield f"| model | weights (10^9) | {' | '.join(types)} |"
    yield "|---" * (len(types) + 2) + "|"
    for name in names:
        path = folder / name
        if not path.exists():
            write_skeleton(path, GIANTS[name])
        family = family_of(path)
        sources = load_sources(family, open_checkpoint(path, family.config))
        plans = [make_plan(sources, QuantOptions(kind)) for kind in types]
        sizes = " | ".join(f"{plan.nbytes / 1e9:.0f}" for plan in plans)
        yield f"| {name} | {plans[0].n_weights / 1e9:.1f} | {sizes} |"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="*", choices=[[], *GIANTS], metavar="MODEL", help=", ".join(GIANTS))
    parser.add_argument("--types", default=",".join(layout.name for layout in LAYOUTS))
    parser.add_argument("--folder", type=Path, help="keep the skeletons here  [removed]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for line in table(args.models or list(GIANTS), args.types.split(","), folder):
            print(line, flush=True)


if __name__ == "__main__":
    main()

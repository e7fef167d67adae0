"""Small checkpoints in the layout of ERNIE 4.5's 2-bit release, and the weights that they stand for.

Written from the formulas of the layout, element by element where the importer rearranges whole arrays.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from upstream_diff.models import EXAMPLE

Arrays = dict[str, np.ndarray]

DIMENSIONS = {
    "hidden_size": 1024,
    "intermediate_size": 640,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "moe_num_experts": 3,
    "moe_k": 2,
    "moe_layer_start_index": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
VOCAB = DIMENSIONS["vocab_size"]
WINT4_END = 1
"""The last layer whose experts are wint4."""


# --- packing --------------------------------------------------------------------------------------------------------


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.bfloat16).float().numpy()


def pack_wint8(q: np.ndarray) -> np.ndarray:
    """Codes -127..127 ``[N, K]`` -> int8 ``[N, K]``."""
    rows, columns = q.shape
    n, k = np.indices(q.shape)
    p = 2 * (k % 8) + (k % 16) // 8 + 16 * (k // 16)
    data = np.empty(q.size, np.uint8)
    data[(n // 2) * 2 * columns + (p // 64) * 128 + (n % 2) * 64 + p % 64] = q + 128
    return data.view(np.int8).reshape(rows, columns)


def pack_wint4(q: np.ndarray) -> np.ndarray:
    """Codes -7..7 ``[N, K]`` -> int8 ``[N / 2, K]``."""
    rows, columns = q.shape
    n, k = np.indices(q.shape)
    p = 8 * ((k % 8) // 2) + (k % 32) // 8 + 4 * (k % 2)
    byte = (n // 4) * 2 * columns + (k // 64) * 128 + (n % 4) * 32 + ((k % 64) // 32) * 16 + p // 2
    data = np.zeros(q.size // 2, np.uint8)
    np.bitwise_or.at(data, byte, ((q + 8) << 4 * (p % 2)).astype(np.uint8))
    return data.view(np.int8).reshape(rows // 2, columns)


def integers(w: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and bf16 scales per row, symmetric."""
    scale = bf16(np.abs(w).max(1) / largest)
    return np.clip(np.rint(w / scale[:, None]), -largest, largest).astype(np.int64), scale


def natural(x: np.ndarray) -> np.ndarray:
    """Shuffled inputs (the last axis) put back, as the dequantizer of the release's own test does it."""
    return x.reshape(*x.shape[:-1], -1, 4, 8, 2).swapaxes(-3, -2).reshape(x.shape)


def shuffled(x: np.ndarray) -> np.ndarray:
    """The inverse of :func:`natural`."""
    return x[..., np.argsort(natural(np.arange(x.shape[-1])))]


def pack_wint2(w: np.ndarray, rng: np.random.Generator) -> tuple[Arrays, np.ndarray]:
    """The five tensors for ``[N, K]``, and the weights that they stand for, both with inputs as given."""
    rows, columns = w.shape
    groups = np.abs(w).reshape(rows, -1, 64).max(-1)
    super_scale = bf16(groups.max(1) / (15 * 24))
    local = np.clip(np.rint(groups / (24 * super_scale[:, None])), 1, 15).astype(np.int64)
    code_scale = rng.uniform(115, 125, rows).astype(np.float32)
    code_zp = rng.uniform(0, 800, rows).astype(np.float32)
    # float32 operations, each rounded: spec P2
    product = np.arange(256, dtype=np.float32) * code_scale[:, None]
    states = np.floor((product + code_zp[:, None]) + np.float32(0.5)).astype(np.int64)
    levels = ((states[:, :, None] >> np.array([9, 6, 3, 0])) & 63) - 32
    scale = local.astype(np.float32) * super_scale[:, None]
    codes = np.empty((rows, columns // 4), np.uint8)
    for n in range(rows):
        target = (w[n].reshape(-1, 64) / scale[n][:, None]).reshape(-1, 4)
        candidates = levels[n].astype(np.float32)
        codes[n] = (np.square(candidates).sum(1) - 2 * target @ candidates.T).argmin(1)
    decoded = np.take_along_axis(levels, codes[:, :, None].astype(np.int64), 1).reshape(rows, columns)
    decoded = decoded.astype(np.float32) * np.repeat(scale, 64, 1)
    tensors = {
        "quant_weight": codes.T,
        "weight_scale": (local[:, 0::2] << 4 | local[:, 1::2]).astype(np.uint8).T,
        "super_scales": super_scale,
        "code_scale": code_scale,
        "code_zp": code_zp,
    }
    return tensors, decoded


# --- a checkpoint ---------------------------------------------------------------------------------------------------


@dataclass
class Release:
    """``files``: the tensors as they are saved, but bf16 still as float32 (``rounded`` names them); ``weights``: what
    they stand for, under transformers' names."""

    order: str
    files: Arrays = field(default_factory=dict)
    weights: Arrays = field(default_factory=dict)
    rounded: set[str] = field(default_factory=set)

    def save(self, folder: Path, *, u16: bool = True, f32_scales: bool = False, tied: bool = False) -> Path:
        """``folder`` with the checkpoint, bf16 as U16 or BF16; ``f32_scales``: those of wint8 are not rounded."""
        folder.mkdir()
        tensors = {}
        for name, array in self.files.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if f32_scales and ".mlp.experts." not in name and name.endswith(".weight_scale"):
                # Nearest to the same bf16 value: FastDeploy rounds them when it loads them.
                tensor = tensor * (1 + 2.0**-10)
            elif name in self.rounded:
                tensor = tensor.to(torch.bfloat16)
                tensor = tensor.view(torch.uint16) if u16 else tensor
            tensors[name] = tensor
        if tied:
            tensors["lm_head.weight"] = tensors["ernie.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config(tied)))
        copy_tokenizer(folder)
        return folder

    def save_plain(self, folder: Path, *, tied: bool = False) -> Path:
        """``folder`` with the weights in float32, as transformers reads it."""
        folder.mkdir()
        tensors = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in self.weights.items()}
        if tied:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        plain = {key: value for key, value in config(tied).items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(plain | {"dtype": "float32"}))
        copy_tokenizer(folder)
        return folder


def config(tied: bool) -> dict[str, Any]:
    """config.json as PaddlePaddle's releases have it."""
    return {
        **DIMENSIONS,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "use_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "moe_num_shared_experts": 0,
        "quantization_config": {
            "dense_quant_type": "wint8",
            "moe_quant_type": "w4w2",
            "quantization": "wint2",
            "moe_quant_config": {
                "moe_w4_quant_config": {
                    "quant_type": "wint4",
                    "quant_granularity": "per_channel",
                    "quant_start_layer": 0,
                    "quant_end_layer": WINT4_END,
                },
                "moe_w2_quant_config": {
                    "quant_type": "wint2",
                    "quant_granularity": "pp_acc",
                    "quant_group_size": 64,
                    "quant_start_layer": WINT4_END + 1,
                    "quant_end_layer": DIMENSIONS["num_hidden_layers"] - 1,
                },
            },
        },
    }


def copy_tokenizer(folder: Path) -> None:
    """Put the first pieces of the bundled tokenizer into ``folder``."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((EXAMPLE / "tokenizer.model").read_bytes())
    del model.pieces[VOCAB:]
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    shutil.copyfile(EXAMPLE / "tokenizer_config.json", folder / "tokenizer_config.json")


def make(order: str, *, gains: float = 1.0, seed: int = 3) -> Release:
    """A random model whose channels differ in strength as trained ones do (``gains`` = 0: they do not)."""
    rng = np.random.default_rng(seed)
    release = Release(order)
    hidden, width, inner = (DIMENSIONS[f"{k}_size"] for k in ("hidden", "moe_intermediate", "intermediate"))
    head_dim = hidden // DIMENSIONS["num_attention_heads"]
    kv = DIMENSIONS["num_key_value_heads"] * head_dim
    channels = rng.normal(0, 0.4 * gains, hidden)

    def gain(of: np.ndarray) -> np.ndarray:
        return np.exp(0.7 * of + rng.normal(0, 0.2 * gains, of.size))

    def matrix(rows: int, columns: int, inputs: np.ndarray, outputs: np.ndarray, size: float = 1.0) -> np.ndarray:
        w = rng.standard_normal((rows, columns), np.float32) * gain(inputs) * gain(outputs)[:, None]
        return (w * (size / np.sqrt(np.square(w).mean() * columns))).astype(np.float32)

    def flat(n: int) -> np.ndarray:
        return np.zeros(n)

    def plain(name: str, target: str, array: np.ndarray, *, transposed: bool = False) -> None:
        array = bf16(array)
        release.weights[target] = array
        release.files[name] = array.T if transposed else array
        release.rounded.add(name)

    def packed(name: str, w: np.ndarray, bits: int) -> np.ndarray:
        q, scale = integers(w, (1 << bits - 1) - 1)
        release.files[f"{name}.quant_weight"] = (pack_wint8 if bits == 8 else pack_wint4)(q)
        release.files[f"{name}.weight_scale"] = scale
        release.rounded.add(f"{name}.weight_scale")
        return q.astype(np.float32) * scale[:, None]

    def wint2(name: str, w: np.ndarray) -> np.ndarray:
        tensors, decoded = pack_wint2(shuffled(w) if order == "shuffled" else w, rng)
        release.files |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
        release.rounded.add(f"{name}.super_scales")
        return natural(decoded) if order == "shuffled" else decoded

    def split(target: str, w: np.ndarray, **rows: int) -> None:
        at = 0
        for name, count in rows.items():
            release.weights[f"{target}.{name}_proj.weight"] = w[at : at + count]
            at += count

    plain("ernie.embed_tokens.weight", "model.embed_tokens.weight", matrix(VOCAB, hidden, channels, flat(VOCAB), 20))
    plain("lm_head.weight", "lm_head.weight", matrix(VOCAB, hidden, channels, flat(VOCAB)), transposed=True)
    plain("ernie.norm.weight", "model.norm.weight", gain(channels))
    for layer in range(DIMENSIONS["num_hidden_layers"]):
        old, new = f"ernie.layers.{layer}", f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{old}.{norm}.weight", f"{new}.{norm}.weight", gain(channels))
        qkv = matrix(hidden + 2 * kv, hidden, channels, flat(hidden + 2 * kv), 1.5)
        split(f"{new}.self_attn", packed(f"{old}.self_attn.qkv_proj", qkv, 8), q=hidden, k=kv, v=kv)
        out = matrix(hidden, hidden, flat(hidden), channels)
        split(f"{new}.self_attn", packed(f"{old}.self_attn.o_proj", out, 8), o=hidden)
        if layer < DIMENSIONS["moe_layer_start_index"]:
            both = matrix(2 * inner, hidden, channels, flat(2 * inner), 2)
            split(f"{new}.mlp", packed(f"{old}.mlp.up_gate_proj", both, 8), gate=inner, up=inner)
            down = matrix(hidden, inner, flat(inner), channels)
            split(f"{new}.mlp", packed(f"{old}.mlp.down_proj", down, 8), down=hidden)
            continue
        experts = DIMENSIONS["moe_num_experts"]
        router = matrix(experts, hidden, channels, flat(experts), 2)
        release.weights[f"{new}.mlp.gate.weight"] = router
        release.files[f"{old}.mlp.gate.weight"] = router.T
        bias = rng.normal(0, 0.1, (1, experts)).astype(np.float32)
        name = "mlp.moe_statics.e_score_correction_bias"
        release.weights[f"{new}.{name}"] = release.files[f"{old}.{name}"] = bias
        for e in range(experts):
            inside = rng.normal(0, 0.4 * gains, width)
            both = matrix(2 * width, hidden, channels, np.tile(inside, 2), 2)
            down = matrix(hidden, width, inside, channels)
            old_e, new_e = f"{old}.mlp.experts.{e}", f"{new}.mlp.experts.{e}"
            if layer <= WINT4_END:
                both, down = packed(f"{old_e}.up_gate_proj", both, 4), packed(f"{old_e}.down_proj", down, 4)
            else:
                both, down = wint2(f"{old_e}.up_gate_proj", both), wint2(f"{old_e}.down_proj", down)
            split(new_e, both, gate=width, up=width)
            split(new_e, down, down=hidden)
    return release

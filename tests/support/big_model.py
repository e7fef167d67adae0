"""A llama of any size with random weights, written shard by shard: for measuring what conversions need."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[2] / "examples" / "manllama-4m"


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama with heads of 128 values; the vocabulary is the example's."""

    layers: int
    hidden: int = 4096
    intermediate: int = 14336
    kv_heads: int = 8
    vocab: int = 4096

    def tensors(self) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes, one entry per shard."""
        shards: list[dict[str, tuple[int, ...]]] = [
            {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)},
            {"lm_head.weight": (self.vocab, self.hidden)},
        ]
        wide, narrow = (self.intermediate, self.hidden), (128 * self.kv_heads, self.hidden)
        for i in range(self.layers):
            names = {
                "input_layernorm": (self.hidden,),
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": narrow,
                "self_attn.v_proj": narrow,
                "self_attn.o_proj": (self.hidden, self.hidden),
                "post_attention_layernorm": (self.hidden,),
                "mlp.gate_proj": wide,
                "mlp.up_proj": wide,
                "mlp.down_proj": wide[::-1],
            }
            shards.append({f"model.layers.{i}.{name}.weight": shape for name, shape in names.items()})
        return shards


def build(folder: Path, shape: Shape) -> int:
    """Write the model in bf16 to the new folder ``folder``; returns the bytes of its weights."""
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    config = json.loads((EXAMPLE / "config.json").read_text())
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 128,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": 128,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = np.random.default_rng(1).standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    pool = np.concatenate([weights, weights[:8192]]).view(np.uint32) >> 16  # bf16
    values = pool.astype("<u2")
    shards, weight_map, total = shape.tensors(), {}, 0
    for index, tensors in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        at, header = 0, {}
        for name, dims in tensors.items():
            header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + 2 * prod(dims)]}
            at += 2 * prod(dims)
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for number, dims in enumerate(tensors.values()):
                left, first = prod(dims), 37 * (index + 10 * number) % 8192  # no two tensors alike
                while left:
                    part = values[first : first + min(left, 1 << 22)]
                    out.write(part.data)
                    left -= part.size
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total

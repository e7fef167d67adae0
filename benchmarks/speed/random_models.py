"""Models with random weights, one GGUF file for every tensor type: nothing is trained and nothing is encoded.

How fast a model runs does not depend on its weights as long as they are ordinary numbers.  CCQ tensors are random bytes
with scales that give weights of ordinary size; those of other types are some rows that llama.cpp has quantized, over
and over.  Embedding and output are q8_0 in every file, norms and routers f32.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ccq_format import codec
from ccq_format.gguf_io import ModelWriter
from ccq_format.layouts import LAYOUTS, SPEC_VERSION, Layout, TrellisCode

U8 = NDArray[np.uint8]

RECIPE = 1
"""To be counted up with every change of what is in the files: those of another recipe are not used."""

POOL_ROWS = 128
"""Rows that are really quantized for each row length of a type."""

CCQ_TYPES = tuple(layout.name for layout in LAYOUTS)
STOCK_TYPES = ("q2_k", "q3_k", "q4_0", "q4_k", "iq2_xxs", "iq2_s", "iq3_xxs", "iq4_nl", "q5_0", "q8_0")
IK_TYPES = {"iq2_k": (137, 2.375), "iq2_kt": (153, 2.125), "iq3_kt": (154, 3.125)}
"""Types that only ik_llama.cpp has: ids and bits per weight; a row of the last two has a scale on top."""


@dataclass(frozen=True)
class Shape:
    """A model of llama's architecture, with a mixture of experts if there are any; ``n_ff`` is then an expert's."""

    name: str
    layers: int
    n_embd: int
    n_ff: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int = 0
    experts_used: int = 0
    ends: str = "q8_0"
    """Type of embedding and output."""

    def matrices(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that have the type of the file."""
        head = self.n_embd // self.heads
        lead, suffix = ((self.experts,), "_exps") if self.experts else ((), "")
        for i in range(self.layers):
            yield f"blk.{i}.attn_q.weight", (self.n_embd, self.n_embd)
            yield f"blk.{i}.attn_k.weight", (self.kv_heads * head, self.n_embd)
            yield f"blk.{i}.attn_v.weight", (self.kv_heads * head, self.n_embd)
            yield f"blk.{i}.attn_output.weight", (self.n_embd, self.n_embd)
            yield f"blk.{i}.ffn_gate{suffix}.weight", (*lead, self.n_ff, self.n_embd)
            yield f"blk.{i}.ffn_up{suffix}.weight", (*lead, self.n_ff, self.n_embd)
            yield f"blk.{i}.ffn_down{suffix}.weight", (*lead, self.n_embd, self.n_ff)

    def others(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the f32 tensors: norms, and routers."""
        yield "output_norm.weight", (self.n_embd,)
        for i in range(self.layers):
            yield f"blk.{i}.attn_norm.weight", (self.n_embd,)
            yield f"blk.{i}.ffn_norm.weight", (self.n_embd,)
            if self.experts:
                yield f"blk.{i}.ffn_gate_inp.weight", (self.experts, self.n_embd)

    @property
    def n_weights(self) -> int:
        """Weights of all matrices."""
        return sum(prod(shape) for _, shape in self.matrices())

    @property
    def key(self) -> str:
        """Changes with everything that is in the files."""
        return hashlib.sha256(repr((self, RECIPE, POOL_ROWS, SPEC_VERSION)).encode()).hexdigest()[:8]


DENSE = Shape("dense", layers=8, n_embd=2048, n_ff=8192, heads=16, kv_heads=8, vocab=4096)
MOE = Shape("moe", layers=4, n_embd=1024, n_ff=1024, heads=8, kv_heads=4, vocab=4096, experts=16, experts_used=4)

Quantize = Callable[[int, int, int, float, int], U8]
"""(type id, rows, columns, standard deviation, seed) -> rows, uint8 ``[rows, row bytes]``."""


def remote_quantizer(ask: Callable[..., dict[str, Any]]) -> Quantize:
    """Quantizing done by a worker, whose ``ask`` is given."""

    def quantize(type_id: int, rows: int, columns: int, std: float, seed: int) -> U8:
        reply = ask("rows", type_id=type_id, count=rows, columns=columns, std=std, seed=seed)
        return np.frombuffer(base64.b64decode(reply["rows"]), np.uint8).reshape(rows, -1)

    return quantize


def bits_per_weight(type_name: str) -> float:
    """Of a matrix of the type."""
    if type_name in IK_TYPES:
        return IK_TYPES[type_name][1]
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    return 8 * nbytes / block


def random_blocks(layout: Layout, rows: int, columns: int, std: float, rng: np.random.Generator) -> U8:
    """Rows of a CCQ type, uint8 ``[rows, row bytes]``: random codes, scales for about that standard deviation."""
    blocks = rng.integers(0, 256, (rows, layout.row_bytes(columns)), dtype=np.uint8)
    blocks = blocks.reshape(-1, layout.block_bytes)
    sample = blocks[:256]  # a view: what is set in all blocks is set here
    if isinstance(layout.code, TrellisCode):
        scale, values = blocks[:, layout.offset("scale")], codec.scale_values(layout)
        scale[:] = np.searchsorted(values, 1.0)
        byte = int(np.searchsorted(values, std / codec.decode(layout, sample).std()))
        # Five neighbours, each about a tenth larger than the one before, so that not all blocks have the same.
        scale[:] = rng.integers(byte - 2, byte + 3, len(blocks))
        return blocks.reshape(rows, -1)
    if layout.has("code_scale"):  # a state that runs through all of its bits
        at = layout.offset("code_scale")
        blocks[:, at : at + 8] = np.array([113.7, 21.3], "<f4").view(np.uint8)
    at = layout.offset("super_scale")
    blocks[:, at : at + 2] = _bfloat16(1.0)
    blocks[:, at : at + 2] = _bfloat16(std / codec.decode(layout, sample).std())
    return blocks.reshape(rows, -1)


def _bfloat16(value: float) -> U8:
    """The two bytes of a number, rounded towards zero."""
    return np.array([value], "<f4").view(np.uint8)[2:]


class _Rows:
    """Makes the data of a file's tensors."""

    def __init__(self, type_name: str, quantize: Quantize) -> None:
        self.layout = next((layout for layout in LAYOUTS if layout.name == type_name), None)
        self.rng = np.random.default_rng(1)
        self.quantize = quantize
        self.pools: dict[tuple[int, int, float], U8] = {}

    def make(self, type_id: int, rows: int, columns: int, std: float) -> np.ndarray:
        """Stored rows: float32 ``[rows, columns]`` or uint8 ``[rows, row bytes]``."""
        if type_id == GGMLQuantizationType.F32:
            return self.rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(std)
        if self.layout is not None and self.layout.gguf_id == type_id:
            return random_blocks(self.layout, rows, columns, std, self.rng)
        key = (type_id, columns, std)
        if key not in self.pools:
            self.pools[key] = self.quantize(type_id, POOL_ROWS, columns, std, len(self.pools))
        return self.pools[key][np.arange(rows) % POOL_ROWS]


class _Writer(ModelWriter):
    """A ``ModelWriter`` that takes types that gguf does not know."""

    def add_foreign(self, name: str, type_id: int, shape: tuple[int, ...], nbytes: int) -> None:
        """Declare a tensor of ``nbytes`` bytes."""
        kind = cast(GGMLQuantizationType, type_id)  # only the number is used
        self.gguf.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        self._sizes[name] = (kind, nbytes)
        self._order.append(name)


def write_model(path: Path, shape: Shape, type_name: str, quantize: Quantize) -> None:
    """Write the model with all matrices in one type.  The file appears when it is complete."""
    type_id = IK_TYPES[type_name][0] if type_name in IK_TYPES else GGMLQuantizationType[type_name.upper()].value
    ends = {"token_embd.weight": 1.0, "output.weight": shape.n_embd**-0.5}
    rows = _Rows(type_name, quantize)
    out = _Writer(path, "llama", overwrite=True, encoder="random weights")
    with out:
        _add_metadata(out.gguf, shape)
        for name in ends:
            out.add_tensor(name, shape.ends, (shape.vocab, shape.n_embd))
        for name, dims in shape.others():
            out.add_tensor(name, "f32", dims)
        for name, dims in shape.matrices():
            if type_name in IK_TYPES:
                row_bytes = rows.make(type_id, 1, dims[-1], dims[-1] ** -0.5).shape[-1]
                out.add_foreign(name, type_id, dims, prod(dims[:-1]) * row_bytes)
            else:
                out.add_tensor(name, type_name, dims)
        out.begin()
        for name, std in ends.items():
            out.write(name, rows.make(GGMLQuantizationType[shape.ends.upper()], shape.vocab, shape.n_embd, std))
        for name, dims in shape.others():
            is_norm = len(dims) == 1
            f32 = GGMLQuantizationType.F32
            out.write(name, np.ones(dims, np.float32) if is_norm else rows.make(f32, dims[0], dims[1], dims[1] ** -0.5))
        for name, dims in shape.matrices():
            out.write(name, rows.make(type_id, prod(dims[:-1]), dims[-1], dims[-1] ** -0.5))


def _add_metadata(out: gguf.GGUFWriter, shape: Shape) -> None:
    out.add_context_length(2048)
    out.add_embedding_length(shape.n_embd)
    out.add_feed_forward_length(shape.n_ff)
    out.add_block_count(shape.layers)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(shape.n_embd // shape.heads)
    out.add_vocab_size(shape.vocab)
    if shape.experts:
        out.add_expert_count(shape.experts)
        out.add_expert_used_count(shape.experts_used)
    out.add_tokenizer_model("none")


def model_file(cache: Path, shape: Shape, type_name: str, quantize: Quantize) -> Path:
    """The model's file in a folder of such files; made if it is not there."""
    path = cache / f"{shape.name}-{type_name}-{shape.key}.gguf"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_model(path, shape, type_name, quantize)
    return path

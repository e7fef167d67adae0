"""The 2-bit release of ERNIE 4.5 for FastDeploy, the checkpoint of arXiv 2507.07145: each weight as it is stored.

Most experts are "wint2", the bytes of CCQ_P2 in another arrangement; those of the first layers are "wint4" and all
other matrices "wint8", packed for tensor cores by PaddlePaddle's ``weight_quantize``, with a scale per row: Q4_0
and Q8_0 hold the same numbers.  Names are Paddle's, and bf16 may be stored as U16.

Newer files have the inputs of wint2 matrices shuffled inside each group of 64, for the fragments of tensor cores:
:data:`SHUFFLED`.  A code byte holds four neighbouring weights, so that they cannot be put back; instead all else moves.
What writes or reads the hidden states, and the inner channels of the wint2 experts, are numbered in that order: norms,
additions and the router do not mind, and the model computes the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format import codec, layouts
from ccq_format.errors import ModelError

from ..arch.config import Config
from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor, as_float32
from .format import Settings, named, nibbles

log = logging.getLogger(__name__)

GROUP = 64
ORDERS = ("natural", "shuffled")
SHUFFLED = np.arange(GROUP).reshape(8, 4, 2).swapaxes(0, 1).reshape(-1)
"""Which of 64 inputs a shuffled wint2 matrix has at each place: 0 1 8 9 16 17 .. 56 57 2 3 10 11 ..

Column ``2 b + c`` of thread ``a`` of four holds what that thread multiplies in step ``b``: input ``8 b + 2 a + c``.
"""

_P2 = layouts.by_name("ccq_p2")
_BF16 = ("BF16", "U16")
_CHUNK_ROWS = 512
_SAMPLES = 4
_CLEAR = 0.1
"""A correlation below this says nothing, whatever its significance."""


def is_wint2(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has wint2 matrices: nothing else has their parameters."""
    return any(True for _ in named(checkpoint, ".code_zp"))


def decode(config: Config, checkpoint: Checkpoint, k_order: str | None) -> NDArray[np.int64] | None:
    """Replace the tensors of ``checkpoint`` by those of the model that they stand for, under transformers' names.

    ``k_order`` is one of ``ORDERS``, or ``None``: find out.  Returns the order of the channels in each 64 of the hidden
    states, if it is not the model's own.  Raises ``ModelError`` for tensors that are missing or do not fit, and if the
    order of the inputs cannot be told.
    """
    for path in sorted(checkpoint.model_dir.glob("*.pdparams")):
        log.warning("%s: not read: a Python pickle", path)
    release = _Release(config, checkpoint)
    order = SHUFFLED if (k_order or release.detect()) == "shuffled" else None
    checkpoint.decode(list(release.tensors(order)))
    return order


def reordered(x: NDArray[Any], order: NDArray[np.int64] | None) -> NDArray[Any]:
    """``x`` with each 64 of its last axis in the order ``order``."""
    return x if order is None else x.reshape(*x.shape[:-1], -1, GROUP)[..., order].reshape(x.shape)


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix: ``raw(start, stop)`` returns its rows in the bytes of the GGUF type ``type_name``, ``inputs``
    in the order that is asked for (of each 64; wint2 has them as they are).  ``stored`` is its main tensor, ``parts``
    the names of all."""

    stored: StoredTensor
    parts: tuple[str, ...]
    rows: int
    columns: int
    type_name: str
    raw: Callable[[int, int, NDArray[np.int64] | None], NDArray[np.uint8]]

    def tensor(
        self,
        name: str,
        first: int,
        rows: int,
        *,
        inputs: NDArray[np.int64] | None = None,
        outputs: NDArray[np.int64] | None = None,
    ) -> DecodedTensor:
        """``rows`` rows from ``first`` on as the tensor ``name``, in other orders of inputs and outputs."""

        def raw(start: int, stop: int) -> NDArray[np.uint8]:
            if outputs is None:
                return self.raw(first + start, first + stop, inputs)
            low, high = start // GROUP * GROUP, -(-stop // GROUP) * GROUP
            wanted = np.arange(start, stop)
            at = wanted // GROUP * GROUP + outputs[wanted % GROUP] - low
            found: NDArray[np.uint8] = self.raw(first + low, first + high, inputs)[at]
            return found

        def load(start: int, stop: int) -> NDArray[np.float32]:
            return _decoded(self.type_name, raw(start, stop))

        return DecodedTensor(name, self.stored.path, (rows, self.columns), self.type_name, load, self.parts, raw)

    def energies(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums of squared weights, of each row and of each column as stored."""
        columns, rows = np.zeros(self.columns), np.zeros(self.rows)
        for start in range(0, self.rows, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, self.rows)
            squares = np.square(_decoded(self.type_name, self.raw(start, stop, None)), dtype=np.float64)
            rows[start:stop] = squares.sum(1)
            columns += squares.sum(0)
        return rows, columns


def _decoded(type_name: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    if type_name == _P2.name:
        return codec.decode(_P2, raw)
    weights: NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name.upper()])
    return weights


# --- the three packings ---------------------------------------------------------------------------------------------


def unpack_wint8(data: NDArray[np.uint8], columns: int) -> NDArray[np.int8]:
    """Bytes of an even number of rows as codes ``[rows, columns]``.

    ``weight_quantize`` for compute capabilities 7.5 to 9.0: two rows take turns, 64 inputs each; of each 16 the even
    places hold the first eight; 128 is added.
    """
    runs = data.reshape(-1, columns // 64, 2, 4, 8, 2)
    codes = runs.transpose(0, 2, 1, 3, 5, 4).reshape(-1, columns)
    return (codes ^ 128).view(np.int8)


def unpack_wint4(data: NDArray[np.uint8], columns: int) -> NDArray[np.int8]:
    """Bytes of a multiple of four rows as codes ``[rows, columns]``: four rows take turns; of each 32 inputs, pairs of
    every eighth and its successor, low nibbles first: 0 8 16 24 1 9 17 25 2 10 ..; 8 is added."""
    runs = nibbles(data).reshape(-1, columns // 64, 4, 2, 4, 2, 4)  # rows, 64s, row, 32s, pair, which of it, eighth
    codes = runs.transpose(0, 2, 1, 3, 6, 4, 5).reshape(-1, columns)
    return codes.view(np.int8) - np.int8(8)


def q8_0(codes: NDArray[np.int8], scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Q8_0 rows of codes ``[rows, columns]`` and the bytes of a scale per row ``[rows, 2]``."""
    blocks = codes.view(np.uint8).reshape(len(codes), -1, 32)
    return _with_scale(blocks, scale)


def q4_0(codes: NDArray[np.int8], scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Q4_0 rows, likewise."""
    unsigned = (codes + np.int8(8)).view(np.uint8).reshape(len(codes), -1, 32)
    halves: NDArray[np.uint8] = unsigned[..., :16] | unsigned[..., 16:] << np.uint8(4)
    return _with_scale(halves, scale)


def _with_scale(blocks: NDArray[np.uint8], scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    wide = np.broadcast_to(scale[:, None], (*blocks.shape[:2], 2))
    return np.concatenate((wide, blocks), axis=-1).reshape(len(blocks), -1)


def _vector(tensor: StoredTensor, start: int, stop: int) -> NDArray[Any]:
    """Values ``start..stop`` of a 1-D tensor as they are stored."""
    values: NDArray[Any] = replace(tensor, shape=(tensor.shape[0], 1)).stored_rows(start, stop)[:, 0]
    return values


def _half(scale: StoredTensor, start: int, stop: int, type_name: str) -> NDArray[np.uint8]:
    """The scales of some rows as 16-bit floats, ``[rows, 2]`` bytes.  FastDeploy runs all scales as bf16.

    Raises ``ModelError`` for one that has no such form.
    """
    values = as_float32(_vector(scale, start, stop), scale.dtype)
    if scale.dtype == "F32" and np.isfinite(values).all():
        bits = values.view(np.uint32)
        values = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    exact = np.isfinite(values) & (halves.astype(np.float32) == values)
    if not exact.all():
        raise scale.error(f"{values[~exact][0]:g} is no 16-bit float, which a scale of {type_name} must be")
    return halves.view(np.uint8).reshape(-1, 2)


# --- the checkpoint -------------------------------------------------------------------------------------------------


class _Reference(NamedTuple):
    """What the order of inputs was told by: correlations if they are as stored, and if they are shuffled."""

    what: str
    natural: float
    shuffled: float
    channels: int

    @property
    def says(self) -> str | None:
        """The order, if one correlation is beyond chance and the other much smaller."""
        low, high = sorted((abs(self.natural), abs(self.shuffled)))
        if high < max(_CLEAR, 6 / self.channels**0.5) or high < 2 * low:
            return None
        return ORDERS[abs(self.shuffled) > abs(self.natural)]

    def __str__(self) -> str:
        return f"{self.what} {self.natural:.2f} natural, {self.shuffled:.2f} shuffled"


class _Release:
    """The tensors of a checkpoint, by the model's configuration."""

    def __init__(self, config: Config, checkpoint: Checkpoint) -> None:
        settings = Settings(config.raw.get("quantization_config") or {}, config)
        settings.require("dense_quant_type", "wint8", default="wint8")
        settings.require("moe_quant_type", "w4w2", default="w4w2")
        settings.require("is_permuted", True, default=True)
        self.checkpoint = checkpoint
        self.hidden, self.inner = config.integer("hidden_size"), config.integer("intermediate_size")
        self.width = config.integer("moe_intermediate_size")
        self.experts = config.integer("moe_num_experts")
        self.layers, self.lead = config.integer("num_hidden_layers"), config.count("moe_layer_start_index")
        self.vocab_size = config.integer("vocab_size")
        heads = config.integer("num_attention_heads")
        kv_heads = config.integer("num_key_value_heads", default=heads)
        head_dim = config.integer("head_dim", default=self.hidden // heads)
        self.query, self.kv = heads * head_dim, kv_heads * head_dim
        last = f"ernie.layers.{self.layers - 1}.input_layernorm.weight"
        if last not in checkpoint.stored:  # also keeps an absurd number of layers from being counted
            raise ModelError(f"is missing; the config has {self.layers} layers", file=checkpoint.model_dir, tensor=last)

    def find(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """The tensor ``name``, of one of these types and shapes.  Raises ``ModelError``."""
        tensor = self.checkpoint.stored.get(name)
        if tensor is None:
            raise ModelError("is missing", file=self.checkpoint.model_dir, tensor=name)
        if tensor.dtype not in dtypes:
            raise tensor.error(f"is stored as {tensor.dtype}, not as {' or '.join(dtypes)}")
        if tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise tensor.error(f"has the shape {list(tensor.shape)}, not {expected}")
        return tensor

    # --- matrices

    def wint8(self, name: str, rows: int, columns: int) -> Matrix:
        """A matrix outside of the experts."""
        packed = self.find(f"{name}.quant_weight", ("I8", "U8"), (rows, columns))
        scale = self.find(f"{name}.weight_scale", (*_BF16, "F32"), (rows,))
        self._fits(packed, rows, 2, columns)

        def raw(start: int, stop: int, order: NDArray[np.int64] | None) -> NDArray[np.uint8]:
            low, high = start // 2 * 2, -(-stop // 2) * 2
            codes = unpack_wint8(packed.stored_rows(low, high).view(np.uint8), columns)[start - low : stop - low]
            return q8_0(reordered(codes, order), _half(scale, start, stop, "q8_0"))

        return Matrix(packed, (packed.name, scale.name), rows, columns, "q8_0", raw)

    def wint4(self, name: str, rows: int, columns: int) -> Matrix:
        """A matrix of the first experts."""
        packed = self.find(f"{name}.quant_weight", ("I8", "U8"), (rows // 2, columns))
        scale = self.find(f"{name}.weight_scale", _BF16, (rows,))
        self._fits(packed, rows, 4, columns)

        def raw(start: int, stop: int, order: NDArray[np.int64] | None) -> NDArray[np.uint8]:
            low, high = start // 4 * 4, -(-stop // 4) * 4
            data = packed.stored_rows(low // 2, high // 2).view(np.uint8)
            codes = unpack_wint4(data, columns)[start - low : stop - low]
            return q4_0(reordered(codes, order), _half(scale, start, stop, "q4_0"))

        return Matrix(packed, (packed.name, scale.name), rows, columns, "q4_0", raw)

    def wint2(self, name: str, rows: int, columns: int) -> Matrix:
        """A matrix of the other experts: four codes below each other in a column of bytes for each output."""
        if columns % _P2.block_weights:
            raise ModelError(
                f"its {columns} inputs are no multiple of {_P2.block_weights}, the block of ccq_p2",
                file=self.checkpoint.model_dir,
                tensor=f"{name}.quant_weight",
            )
        codes = self.find(f"{name}.quant_weight", ("U8",), (columns // 4, rows))
        local = self.find(f"{name}.weight_scale", ("U8",), (columns // 128, rows))
        vectors = {
            "super_scale": self.find(f"{name}.super_scales", _BF16, (rows,)),
            "code_scale": self.find(f"{name}.code_scale", ("F32",), (rows,)),
            "code_zp": self.find(f"{name}.code_zp", ("F32",), (rows,)),
        }
        per_row = columns // _P2.block_weights

        def raw(start: int, stop: int, order: NDArray[np.int64] | None) -> NDArray[np.uint8]:
            assert order is None
            blocks = np.empty((stop - start, per_row, _P2.block_bytes), np.uint8)
            for field, tensor in vectors.items():
                at, values = _P2.offset(field), _vector(tensor, start, stop)
                blocks[:, :, at : at + values.itemsize] = values.view(np.uint8).reshape(len(values), 1, -1)
            for field, tensor in (("scales", local), ("codes", codes)):
                at, values = _P2.offset(field), tensor.stored_columns(start, stop, 0, tensor.shape[0])
                size = tensor.shape[0] // per_row
                blocks[:, :, at : at + size] = values.T.reshape(stop - start, per_row, size)
            rows_of_blocks = blocks.reshape(stop - start, -1)
            codec.check_blocks(_P2, rows_of_blocks, file=codes.path, tensor=name, first_block=start * per_row)
            return rows_of_blocks

        parts = (codes.name, local.name, *(tensor.name for tensor in vectors.values()))
        return Matrix(codes, parts, rows, columns, _P2.name, raw)

    def _fits(self, tensor: StoredTensor, rows: int, together: int, columns: int) -> None:
        if rows % together or columns % GROUP:
            raise tensor.error(f"{rows} x {columns} is no multiple of {together} x {GROUP}, as packed matrices are")

    def has_wint2(self, layer: int) -> bool:
        """Whether the experts of a layer are wint2."""
        return f"ernie.layers.{layer}.mlp.experts.0.up_gate_proj.code_zp" in self.checkpoint.stored

    def expert(self, layer: int, expert: int) -> tuple[Matrix, Matrix]:
        """Gate above up, and down."""
        prefix = f"ernie.layers.{layer}.mlp.experts.{expert}"
        read = self.wint2 if self.has_wint2(layer) else self.wint4
        both = read(f"{prefix}.up_gate_proj", 2 * self.width, self.hidden)
        return both, read(f"{prefix}.down_proj", self.hidden, self.width)

    # --- all tensors

    def tensors(self, order: NDArray[np.int64] | None) -> Iterator[DecodedTensor]:
        """All tensors under transformers' names, hidden states in the given order."""
        for layer in range(self.layers):
            prefix, target = f"ernie.layers.{layer}", f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield self._norm(f"{target}.{norm}.weight", f"{prefix}.{norm}.weight", order)
            yield from self._attention(f"{target}.self_attn", f"{prefix}.self_attn", order)
            if layer < self.lead:
                both = self.wint8(f"{prefix}.mlp.up_gate_proj", 2 * self.inner, self.hidden)
                down = self.wint8(f"{prefix}.mlp.down_proj", self.hidden, self.inner)
                yield from self._ffn(f"{target}.mlp", both, down, order, shuffled=False)
                continue
            yield self._router(f"{target}.mlp", f"{prefix}.mlp", order)
            yield self._selection_bias(f"{target}.mlp", f"{prefix}.mlp")
            for e in range(self.experts):
                both, down = self.expert(layer, e)
                yield from self._ffn(f"{target}.mlp.experts.{e}", both, down, order, shuffled=self.has_wint2(layer))
        yield self._norm("model.norm.weight", "ernie.norm.weight", order)
        embedding = self.find("ernie.embed_tokens.weight", _BF16, (self.vocab_size, self.hidden))
        yield self._vocabulary("model.embed_tokens.weight", embedding, order)
        if "lm_head.weight" in self.checkpoint.stored:
            shapes = (self.hidden, self.vocab_size), (self.vocab_size, self.hidden)
            yield self._vocabulary("lm_head.weight", self.find("lm_head.weight", _BF16, *shapes), order)

    def _attention(self, target: str, prefix: str, order: NDArray[np.int64] | None) -> Iterator[DecodedTensor]:
        qkv = self.wint8(f"{prefix}.qkv_proj", self.query + 2 * self.kv, self.hidden)
        first = 0
        for name, rows in (("q", self.query), ("k", self.kv), ("v", self.kv)):
            yield qkv.tensor(f"{target}.{name}_proj.weight", first, rows, inputs=order)
            first += rows
        out = self.wint8(f"{prefix}.o_proj", self.hidden, self.query)
        yield out.tensor(f"{target}.o_proj.weight", 0, self.hidden, outputs=order)

    def _ffn(
        self, target: str, both: Matrix, down: Matrix, order: NDArray[np.int64] | None, *, shuffled: bool
    ) -> Iterator[DecodedTensor]:
        """``shuffled``: the inputs have the order already, those of ``down`` too, which are the outputs of ``both``."""
        inputs, outputs = (None, order) if shuffled else (order, None)
        for i, name in enumerate(("gate", "up")):
            rows = both.rows // 2
            yield both.tensor(f"{target}.{name}_proj.weight", i * rows, rows, inputs=inputs, outputs=outputs)
        yield down.tensor(f"{target}.down_proj.weight", 0, down.rows, outputs=order)

    def _norm(self, target: str, name: str, order: NDArray[np.int64] | None) -> DecodedTensor:
        return _plain(target, self.find(name, (*_BF16, "F32"), (self.hidden,)), order)

    def _router(self, target: str, prefix: str, order: NDArray[np.int64] | None) -> DecodedTensor:
        stored = self.find(f"{prefix}.gate.weight", (*_BF16, "F32"), (self.hidden, self.experts))
        return _transposed(f"{target}.gate.weight", stored, order)

    def _selection_bias(self, target: str, prefix: str) -> DecodedTensor:
        name = "moe_statics.e_score_correction_bias"
        return _plain(f"{target}.{name}", self.find(f"{prefix}.{name}", (*_BF16, "F32"), (1, self.experts)), None)

    def _vocabulary(self, target: str, stored: StoredTensor, order: NDArray[np.int64] | None) -> DecodedTensor:
        """Embedding or output matrix; the latter lies transposed where it is not tied."""
        if stored.shape == (self.vocab_size, self.hidden):
            return _plain(target, stored, order)
        return _transposed(target, stored, order)

    # --- the order of inputs

    def detect(self) -> str:
        """One of ``ORDERS``, by how strongly channels are used.

        The experts' columns are compared with the gains of the norm before them and with the columns of the last wint4
        experts, the columns of down with the rows of gate and up: inputs that matter little in one matter little in
        the other, and the partners' order is known.  Raises ``ModelError`` if that says nothing or is contradictory.
        """
        layers = [layer for layer in range(self.lead, self.layers) if self.has_wint2(layer)]
        found: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
        step = max(1, len(layers) // _SAMPLES)
        for i, layer in enumerate(layers[::step][:_SAMPLES]):
            both, down = self.expert(layer, i % self.experts)
            outputs, inputs = both.energies()
            norm = self.find(
                f"ernie.layers.{layer}.post_attention_layernorm.weight", (*_BF16, "F32"), (self.hidden,)
            ).rows(0, 1)[0]
            found.setdefault("norm gains", []).append((inputs, np.square(norm, dtype=np.float64)))
            inner = outputs[: self.width] * outputs[self.width :]
            found.setdefault("gate and up against down", []).append((down.energies()[1], inner))
            if i == 0 and layer > self.lead:
                before, _ = self.expert(layer - 1, 0)
                found["the layer before"] = [(inputs, before.energies()[1])]
        references = [_compare(what, pairs) for what, pairs in found.items()]
        shown = "; ".join(map(str, references))
        says = {reference.says for reference in references} - {None}
        if len(says) != 1:
            why = "cannot be told" if not says else "is contradictory"
            raise ModelError(
                f"the order of the inputs of its wint2 matrices {why} (correlations: {shown}): say it with --k-order",
                file=self.checkpoint.model_dir,
            )
        order = str(says.pop())
        log.info("%s: wint2 inputs are %s (correlations: %s)", self.checkpoint.model_dir, order, shown)
        return order


def _compare(what: str, pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> _Reference:
    """Mean correlations of profiles as stored with those of known order, both as sums of squares."""

    def profile(energies: NDArray[np.float64]) -> NDArray[np.float64]:
        logs = np.log(np.maximum(energies, np.finfo(np.float64).tiny)).reshape(-1, GROUP)
        logs -= logs.mean(1, keepdims=True)  # the order of groups is no question
        flat = logs.reshape(-1)
        flat /= max(float(np.sqrt(np.square(flat).sum())), 1e-300)
        return flat

    natural = shuffled = 0.0
    for stored, known in pairs:
        a, b = profile(stored), profile(known)
        natural += float(a @ b) / len(pairs)
        shuffled += float(a @ reordered(b, SHUFFLED)) / len(pairs)
    return _Reference(what, natural, shuffled, sum(stored.size for stored, _ in pairs))


def _plain(target: str, stored: StoredTensor, order: NDArray[np.int64] | None) -> DecodedTensor:
    def load(start: int, stop: int) -> NDArray[np.float32]:
        return reordered(stored.rows(start, stop), order)

    return DecodedTensor(target, stored.path, stored.shape, stored.type_name, load, (stored.name,))


def _transposed(target: str, stored: StoredTensor, order: NDArray[np.int64] | None) -> DecodedTensor:
    def load(start: int, stop: int) -> NDArray[np.float32]:
        return reordered(np.ascontiguousarray(stored.columns(start, stop, 0, stored.shape[0]).T), order)

    return DecodedTensor(target, stored.path, stored.shape[::-1], stored.type_name, load, (stored.name,))

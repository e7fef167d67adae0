"""compressed-tensors (vLLM, LLM Compressor): its formats, told apart by what a matrix is stored as.

``weight_packed`` I32 are 1 to 8 bits per code in words (``pack-quantized``); ``weight_packed`` U8 are 4-bit floats
(``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``); ``weight`` with ``weight_scale`` is FP8 or int8
(``float-quantized``, ``int-quantized``, ``naive-quantized``).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor, as_float32
from .format import Settings, companion, matrix, named, words_to_codes
from .modelopt import nvfp4_tensor
from .mxfp4 import GROUP as MX_GROUP
from .mxfp4 import mx_tensor
from .scaled import is_block, scaled_tensor

FLOATS = ("F32", "F16", "BF16")
FORMATS = (
    "dense",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
)


def tensors(settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
    """See ``Format``."""
    settings.require("format", *FORMATS, "mixed-precision", default="dense")
    for part in _parts(settings.raw.get("config_groups")):
        Settings(part, settings.config).require("format", *FORMATS, default="dense")
    sparsity = settings.raw.get("sparsity_config")
    if isinstance(sparsity, dict):
        Settings(sparsity, settings.config).require("format", "dense", default="dense")
    transform = settings.raw.get("transform_config")
    if isinstance(transform, dict) and transform.get("config_groups"):
        raise settings.error("'transform_config': its weights are rotated; llama.cpp does not rotate what they meet")
    for name, codes in named(checkpoint, ".weight_packed"):
        if codes.dtype == "I32":
            yield packed_tensor(checkpoint, name, codes, _bits(settings, codes))
            continue
        matrix(codes, ("U8",))
        if f"{name}.weight_global_scale" in checkpoint.stored:
            scale = companion(checkpoint, codes, f"{name}.weight_scale", ("F8_E4M3",))
            factor = companion(checkpoint, codes, f"{name}.weight_global_scale", FLOATS)
            yield nvfp4_tensor(f"{name}.weight", codes, scale, factor, divide=True)
        else:
            shape = (codes.shape[0], 2 * codes.shape[1])
            scale = companion(
                checkpoint, codes, f"{name}.weight_scale", ("U8", "F8_E8M0"), (shape[0], shape[1] // MX_GROUP)
            )
            yield mx_tensor(f"{name}.weight", codes, scale, shape)
    for name, scale in named(checkpoint, ".weight_scale"):
        if f"{name}.weight_packed" in checkpoint.stored:
            continue
        weight = companion(checkpoint, scale, f"{name}.weight", ("F8_E4M3", "F8_E5M2", "I8"))
        zero_point = checkpoint.stored.get(f"{name}.weight_zero_point")
        yield scaled_tensor(weight, scale, _block(settings, weight, scale), zero_point)


def _parts(groups: object) -> list[dict[str, Any]]:
    """The objects in an object of objects."""
    return [part for part in groups.values() if isinstance(part, dict)] if isinstance(groups, dict) else []


def _groups(settings: Settings) -> list[dict[str, Any]]:
    """The ``weights`` of each config group."""
    groups = _parts(settings.raw.get("config_groups"))
    found = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    if not found:
        raise settings.error("names no 'config_groups' with 'weights'")
    return found


def _bits(settings: Settings, codes: StoredTensor) -> int:
    """Bits per code, which must be the same in all groups that are integers."""
    found = [weights.get("num_bits") for weights in _groups(settings) if weights.get("type", "int") == "int"]
    if not found or found.count(found[0]) < len(found):
        raise codes.error("its bits per code are not known: 'config_groups' has several, or none")
    bits = found[0]
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise settings.error(f"'num_bits' is {bits!r}; supported are 1 to 8")
    return bits


def _block(settings: Settings, weight: StoredTensor, scale: StoredTensor) -> tuple[int, int] | None:
    """Rows and columns of a block, if scales are one per block."""
    for weights in _groups(settings):
        block = weights.get("block_structure")
        if weights.get("strategy") == "block" and is_block(block) and len(scale.shape) == 2:
            grid = tuple(ceil(n / size) for n, size in zip(weight.shape[-2:], block, strict=True))
            if grid == scale.shape:
                return block[0], block[1]
    return None


def packed_tensor(checkpoint: Checkpoint, name: str, codes: StoredTensor, bits: int) -> DecodedTensor:
    """Integer codes in words.

    Since 0.18 the library packs them without gaps, before it put ``32 // bits`` of them in a word: told apart by the
    width of ``weight_packed``, which is that of the shape in ``weight_shape``.  Codes are unsigned, 2^(bits-1) more
    than what they stand for, and zero points (packed along the rows) likewise.  Raises ``ModelError``.
    """
    matrix(codes, ("I32",))
    shape = companion(checkpoint, codes, f"{name}.weight_shape", ("I64", "I32"), (2,))
    rows, columns = (int(n) for n in shape.stored_rows(0, 1)[0])
    dense, gapped = ceil(columns * bits / 32), ceil(columns / (32 // bits))
    if codes.shape[0] != rows or codes.shape[1] not in (dense, gapped):
        raise codes.error(f"has the shape {list(codes.shape)}, which does not fit {rows} x {columns} of {bits} bits")
    is_dense = codes.shape[1] == dense
    scale = companion(checkpoint, codes, f"{name}.weight_scale", FLOATS)
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    per_tensor = scale.shape in ((1,), (), (1, 1)) and rows > 1
    if not per_tensor and (scale.shape[0] != rows or columns % groups):
        raise scale.error(f"has the shape {list(scale.shape)}, which does not fit {rows} x {columns}")
    parts = [codes.name, shape.name, scale.name]
    group = np.arange(columns) // (columns // groups)
    if f"{name}.weight_g_idx" in checkpoint.stored:
        index = companion(checkpoint, codes, f"{name}.weight_g_idx", ("I32", "I64"), (columns,))
        parts.append(index.name)
        stored = index.stored_rows(0, 1)[0].astype(np.int64)
        if stored.min() >= 0:  # -1: not in use
            group = stored
        if group.max() >= groups:
            raise index.error(f"names a group that is none of {groups}")
    zeros = None
    if f"{name}.weight_zero_point" in checkpoint.stored:
        zeros = companion(checkpoint, codes, f"{name}.weight_zero_point", ("I32",))
        height = ceil(rows * bits / 32) if is_dense else ceil(rows / (32 // bits))
        if zeros.shape != (height, groups):
            raise zeros.error(f"has the shape {list(zeros.shape)}, not {[height, groups]}")
        parts.append(zeros.name)

    def load(start: int, stop: int) -> NDArray[np.float32]:
        words = codes.stored_rows(start, stop).view(np.uint32)
        values = _unpack(words, bits, columns, is_dense).astype(np.float32)
        if zeros is None:
            values -= np.float32(1 << (bits - 1))
        else:
            packed = zeros.stored_rows(0, zeros.shape[0]).view(np.uint32).T
            zero = _unpack(np.ascontiguousarray(packed), bits, rows, is_dense)[:, start:stop].T
            values -= zero[:, group]
        if per_tensor:
            factors = as_float32(scale.value(), scale.dtype).reshape(1, 1)
        elif len(scale.shape) == 1:
            factors = as_float32(scale.stored_rows(0, 1)[0, start:stop], scale.dtype)[:, None]
        else:
            factors = as_float32(scale.stored_rows(start, stop), scale.dtype)
        values *= factors[:, group] if factors.shape[1] > 1 else factors
        return values

    return DecodedTensor(f"{name}.weight", codes.path, (rows, columns), f"int{bits}", load, tuple(parts))


def _unpack(words: NDArray[np.uint32], bits: int, count: int, dense: bool) -> NDArray[np.uint8]:
    """The first ``count`` codes of each row of ``words``."""
    if not dense or 32 % bits == 0:
        return words_to_codes(words, bits)[:, :count]
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return np.packbits(stream.reshape(len(words), count, bits), axis=2, bitorder="little")[..., 0]

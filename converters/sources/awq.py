"""AWQ as AutoAWQ's GEMM version stores it: packed along the outputs, eight of them in a word in an order of its own.

``qweight`` I32 ``[inputs, outputs / 8]``, ``qzeros`` I32 ``[groups, outputs / 8]``, ``scales`` ``[groups, outputs]``;
weight = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor, as_float32
from .format import Settings, companion, matrix, named, words_to_codes

ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Nibble (lowest first) of a word that holds output 0, 1, .. 7 of its eight."""


def tensors(settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
    """See ``Format``."""
    settings.require("bits", 4)
    settings.require("version", "gemm", "GEMM", "exllama", default="gemm")
    settings.require("zero_point", True, default=True)
    for name, codes in named(checkpoint, ".qweight"):
        yield _tensor(checkpoint, name, codes)


def _tensor(checkpoint: Checkpoint, name: str, codes: StoredTensor) -> DecodedTensor:
    matrix(codes, ("I32",))
    columns, rows = codes.shape[0], 8 * codes.shape[1]
    scales = matrix(companion(checkpoint, codes, f"{name}.scales", ("F16", "BF16", "F32")), ("F16", "BF16", "F32"))
    groups = scales.shape[0]
    zeros = companion(checkpoint, codes, f"{name}.qzeros", ("I32",), (groups, rows // 8))
    if scales.shape[1] != rows or columns % groups:
        raise scales.error(f"has the shape {list(scales.shape)}, which does not fit {columns} inputs, {rows} outputs")

    def unpacked(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """Codes of outputs ``start..stop``: ``[stop - start, inputs or groups]``."""
        low, high = start // 8, -(-stop // 8)
        words = tensor.stored_columns(low, high, 0, tensor.shape[0]).view(np.uint32)
        eights = words_to_codes(words[..., None], 4)[..., ORDER]
        return eights.reshape(tensor.shape[0], -1)[:, start - 8 * low : stop - 8 * low].T

    def load(start: int, stop: int) -> NDArray[np.float32]:
        scale = as_float32(scales.stored_columns(start, stop, 0, groups), scales.dtype).T
        values = unpacked(codes, start, stop).astype(np.float32).reshape(stop - start, groups, -1)
        values -= unpacked(zeros, start, stop)[..., None]
        values *= scale[..., None]
        return values.reshape(stop - start, columns)

    return DecodedTensor(
        f"{name}.weight", codes.path, (rows, columns), "awq4", load, (codes.name, scales.name, zeros.name)
    )

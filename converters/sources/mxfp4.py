"""OCP microscaling MXFP4 as gpt-oss stores it: 4-bit floats and a power of two for each 32 of them.

``X_blocks`` U8 ``[experts, rows, columns / 32, 16]`` and ``X_scales`` U8 ``[experts, rows, columns / 32]`` become
``X.weight`` ``[experts, rows, columns]``, with the bytes of GGUF's MXFP4 beside the values: nothing is lost if they are
kept.  (The unquantized ``X`` of transformers is the transpose of that.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor, as_float32
from .format import E2M1, Settings, companion, matrix, named, nibbles

GROUP = 32


def tensors(settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
    """See ``Format``."""
    for name, blocks in named(checkpoint, "_blocks"):
        matrix(blocks, ("U8",), (4,))
        scales = companion(checkpoint, blocks, f"{name}_scales", ("U8",), blocks.shape[:-1])
        if blocks.shape[-1] != GROUP // 2:
            raise blocks.error(f"has {blocks.shape[-1]} bytes per block, not {GROUP // 2}")
        *lead, groups, _ = blocks.shape
        yield mx_tensor(f"{name}.weight", blocks, scales, (*lead, GROUP * groups))


def mx_tensor(name: str, blocks: StoredTensor, scales: StoredTensor, shape: tuple[int, ...]) -> DecodedTensor:
    """The tensor ``name`` of ``shape`` from packed codes, two in a byte, and one scale byte for each 32 of them."""
    groups = shape[-1] // GROUP
    per_row = groups * (GROUP // 2) // blocks.row_len

    def packed(start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        codes = blocks.stored_rows(start * per_row, stop * per_row).reshape(stop - start, groups, GROUP // 2)
        return codes, scales.stored_rows(start, stop)

    def load(start: int, stop: int) -> NDArray[np.float32]:
        codes, exponents = packed(start, stop)
        values = E2M1[nibbles(codes)] * as_float32(exponents, "F8_E8M0")[..., None]
        return values.reshape(stop - start, -1)

    def raw(start: int, stop: int) -> NDArray[np.uint8]:
        codes, exponents = packed(start, stop)
        elements = nibbles(codes)
        halves = elements[..., : GROUP // 2] | elements[..., GROUP // 2 :] << 4  # ggml: element j beside j + 16
        return np.concatenate((exponents[..., None], halves), axis=-1).reshape(stop - start, -1)

    return DecodedTensor(name, blocks.path, shape, "mxfp4", load, (blocks.name, scales.name), raw)

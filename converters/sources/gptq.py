"""GPTQ as AutoGPTQ and GPTQModel store it: packed along the inputs, so that a row of the matrix is a column here.

``qweight`` I32 ``[inputs * bits / 32, outputs]``, ``qzeros`` I32 ``[groups, outputs * bits / 32]``, ``scales``
``[groups, outputs]``, and with ``desc_act`` the group of each input in ``g_idx`` I32 ``[inputs]``.  Weight = scale *
(code - zero); the first version of the format stores zero - 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor, as_float32
from .format import Settings, companion, matrix, named, words_to_codes


def tensors(settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
    """See ``Format``."""
    bits = settings.require("bits", 4, 8, 2)
    first = settings.require("checkpoint_format", "gptq", "gptq_v2", default="gptq") == "gptq"
    for name, codes in named(checkpoint, ".qweight"):
        yield _tensor(checkpoint, name, codes, bits, first)


def _tensor(checkpoint: Checkpoint, name: str, codes: StoredTensor, bits: int, first: bool) -> DecodedTensor:
    matrix(codes, ("I32",))
    per_word, mask = 32 // bits, (1 << bits) - 1
    columns, rows = codes.shape[0] * per_word, codes.shape[1]
    scales = matrix(companion(checkpoint, codes, f"{name}.scales", ("F16", "BF16", "F32")), ("F16", "BF16", "F32"))
    groups = scales.shape[0]
    zeros = companion(checkpoint, codes, f"{name}.qzeros", ("I32",), (groups, rows // per_word))
    if scales.shape[1] != rows or columns % groups or rows % per_word:
        raise scales.error(f"has the shape {list(scales.shape)}, which does not fit {columns} inputs, {rows} outputs")
    group = np.arange(columns) // (columns // groups)
    parts = [codes.name, scales.name, zeros.name]
    if f"{name}.g_idx" in checkpoint.stored:
        index = companion(checkpoint, codes, f"{name}.g_idx", ("I32",), (columns,))
        group = index.stored_rows(0, 1)[0].astype(np.int64)
        parts.append(index.name)
        if group.min() < 0 or group.max() >= groups:
            raise index.error(f"names a group that is none of {groups}")

    def load(start: int, stop: int) -> NDArray[np.float32]:
        low, high = start // per_word, -(-stop // per_word)
        within = slice(start - low * per_word, stop - low * per_word)
        words = codes.stored_columns(start, stop, 0, codes.shape[0]).view(np.uint32).T
        zero = words_to_codes(zeros.stored_columns(low, high, 0, groups).view(np.uint32), bits)[:, within]
        if first:
            zero = (zero + np.uint8(1)) & np.uint8(mask)
        scale = as_float32(scales.stored_columns(start, stop, 0, groups), scales.dtype)
        values = words_to_codes(words, bits).astype(np.float32)
        values -= zero.T[:, group]
        values *= scale.T[:, group]
        return values

    return DecodedTensor(f"{name}.weight", codes.path, (rows, columns), f"gptq{bits}", load, tuple(parts))

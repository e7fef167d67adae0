"""The tensors of a GGUF file, to convert or to look at."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import TensorTypeError
from ccq_format.gguf_io import Model, TensorInfo

from .target_types import COPIED_TYPES, PLAIN_TYPES
from .tensors import TensorSource

SOURCE_TYPES = (*PLAIN_TYPES, "mxfp4", "nvfp4")
"""Types that have lost nothing that matters, or that models are published in."""


def sources_of(model: Model, allow_requantize: bool = False) -> list[TensorSource]:
    """The tensors of an opened file.

    Raises ``TensorTypeError`` if one has lost too much to be quantized again, or with ``allow_requantize`` if it cannot
    be decoded.
    """
    for info in model.tensors:
        kind = info.type_name
        if kind in SOURCE_TYPES or kind in COPIED_TYPES or (allow_requantize and is_decodable(info)):
            continue
        if allow_requantize:
            reason = f"no decoder for type {kind}"
        elif info.layout is not None:
            reason = f"is {kind} already; quantize the original model instead"
        else:
            reason = f"type {kind} cannot be quantized again without loss; start from an f32, f16, bf16 or q8_0 file"
        if not allow_requantize and is_decodable(info):
            reason += " (or say --allow-requantize)"
        raise TensorTypeError(reason, file=info.file, tensor=info.name)
    return [source_of(info) for info in model.tensors]


def is_decodable(info: TensorInfo) -> bool:
    """Whether :func:`decode_rows` knows the type of a tensor."""
    return info.layout is not None or info.type_name in _VIEWS or info.ggml_type in gguf.quants._type_traits


def source_of(info: TensorInfo) -> TensorSource:
    """One tensor of an opened file as a source; rows are read from the file as they are needed."""

    def load_rows(start: int, stop: int) -> NDArray[np.float32]:
        return decode_rows(info, start, stop)

    def raw_rows(start: int, stop: int) -> NDArray[np.uint8]:
        return info.stored_rows(start, stop)

    return TensorSource(info.name, info.shape, load_rows, info.type_name, raw_rows)


def decode_rows(info: TensorInfo, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a tensor, float32 ``[stop - start, columns]``, exactly as its type says.

    Raises ``TensorTypeError`` for types that gguf cannot decode.
    """
    stored = info.stored_rows(start, stop)
    if info.layout is not None:
        import ccq_backend

        weights: NDArray[np.float32] = ccq_backend.decode(info.layout, stored)
        return weights
    if not is_decodable(info):
        raise TensorTypeError(f"no decoder for type {info.type_name}", file=info.file, tensor=info.name)
    if info.type_name in _VIEWS:
        decoded = stored.view(_VIEWS[info.type_name])
    else:
        with np.errstate(all="ignore"):
            decoded = gguf.quants.dequantize(stored, info.ggml_type)
    return np.asarray(decoded, dtype=np.float32).reshape(stop - start, info.columns)


_VIEWS = {"f32": "<f4", "f16": "<f2", "f64": "<f8"}

"""ggml's own codecs, called in the library that llama-cpp-python comes with."""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import numpy as np

from ccq_converters import llama


def _library() -> Any:
    return llama.library().llama_cpp._lib


def ggml_quantize(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Float32 ``[rows, columns]`` to uint8 ``[rows, row_bytes]``."""
    function = _library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = gguf.GGMLQuantizationType[name.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weights.shape
    out = np.zeros((rows, columns // block * size), np.uint8)
    data = None if importance is None else importance.ctypes.data
    assert function(kind, weights.ctypes.data, out.ctypes.data, 0, rows, columns, data) == out.nbytes
    return out


class _Traits(ctypes.Structure):
    """The beginning of ``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def ggml_dequantize(name: str, rows: np.ndarray) -> np.ndarray:
    """Uint8 ``[rows, row_bytes]`` to float32 ``[rows, columns]``."""
    function = _library().ggml_get_type_traits
    function.restype, function.argtypes = ctypes.POINTER(_Traits), [ctypes.c_int]
    traits = function(int(gguf.GGMLQuantizationType[name.upper()])).contents
    assert traits.type_name.decode().lower() == name
    out = np.empty((len(rows), rows.shape[1] // traits.size * traits.block), np.float32)
    rows = np.ascontiguousarray(rows)
    traits.to_float(rows.ctypes.data, out.ctypes.data, out.size)
    return out

"""NumPy interface to the C kernels (``backend/include/ccq.h``).

Types are given as a name (``"ccq_t2"``, any case) or a :class:`ccq_format.layouts.Layout`.  All calls release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ccq_format import errors, layouts
from ccq_format.blocks import Encodable

from ._ccq import ffi, lib
from .arguments import EncoderArrays, effort_number, encodable_of, layout_of, matrix, row_weights

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

_ERRORS: dict[int, type[errors.CcqError]] = {
    lib.CCQ_ERR_ROW_LENGTH: errors.ShapeError,
    lib.CCQ_ERR_WEIGHTS: errors.WeightsError,
    lib.CCQ_ERR_IMPORTANCE: errors.ImportanceError,
}


def _text(pointer: Any) -> str:
    text = ffi.string(pointer)
    return text.decode() if isinstance(text, bytes) else text


def _check(status: int) -> None:
    if status != lib.CCQ_OK:
        text = _text(lib.ccq_status_text(status))
        raise _ERRORS.get(status, errors.BackendError)(text)


def _pointer(array: npt.NDArray[Any], ctype: str) -> Any:
    return ffi.cast(ctype, ffi.from_buffer(array))


def _blocks(layout: layouts.Layout, blocks: npt.ArrayLike) -> tuple[U8, int]:
    """Blocks as a contiguous u8 [rows, row_bytes] and the weights of a row."""
    b = matrix(blocks, np.uint8, "blocks")
    return b, row_weights(layout, b.shape[1])


def isa() -> str:
    """Name of the kernel set in use.

    Raises ``BackendError`` if the environment variable ``CCQ_ISA`` names one that does not exist or that this CPU
    cannot run.
    """
    name = ffi.new("const char **")
    _check(lib.ccq_isa(name))
    return _text(name[0])


def isas() -> list[tuple[str, bool]]:
    """All kernel sets of this build, best first, and whether this CPU runs each."""
    supported = ffi.new("int32_t *")
    out: list[tuple[str, bool]] = []
    while (name := lib.ccq_isa_name(len(out), supported)) != ffi.NULL:
        out.append((_text(name), bool(supported[0])))
    return out


def encode(
    type: str | Encodable,
    weights: npt.ArrayLike,
    importance: npt.ArrayLike | None = None,
    scales: npt.ArrayLike | None = None,
    threads: int = 0,
    effort: str = "default",
    coupling: npt.ArrayLike | None = None,
) -> U8:
    """Encode a matrix so that ``sum(importance * (weights - decoded)**2)`` is small.

    ``type`` may also be a ``ccq_format.stock.StockType`` or the name of one;
    ``weights``: f32 [rows, cols]; ``importance``: f32 [cols] or [rows, cols], >= 0, or ``None`` for all ones;
    ``scales``: T types only, f32 [rows, cols / block], fixes every block's scale instead of searching it;
    ``threads``: 0 = one per CPU; ``effort``: a key of ``EFFORTS``, how far the encoder searches for a smaller error (P
    types have one way);
    ``coupling``: not for P types, f32 [cols / block, block, block], finite, zero on and below the diagonals: a block's
    errors e then count as ``sum(importance * (e + e @ coupling)**2)``.
    Returns u8 [rows, row bytes], the same for any number of threads and kernel set.

    Raises ``ShapeError``, ``WeightsError``, ``ImportanceError``, ``BackendError``.
    """
    layout = encodable_of(type)
    arrays = EncoderArrays.of(layout, weights, importance, coupling)
    w = arrays.weights
    rows, cols = w.shape
    out = np.empty((rows, layout.row_bytes(cols)), np.uint8)
    params = ffi.new("ccq_encode_params *", {"n_threads": threads, "effort": effort_number(effort)})
    if arrays.importance is not None:
        params.importance = _pointer(arrays.importance, "const float *")
        params.importance_stride = arrays.importance_stride
    if arrays.coupling is not None:
        params.coupling = _pointer(arrays.coupling, "const float *")
    if scales is not None:
        s = np.ascontiguousarray(scales, np.float32)
        if s.shape != (rows, cols // layout.block_weights):
            raise errors.ShapeError(f"scales have shape {s.shape}, not {(rows, cols // layout.block_weights)}")
        params.scales = _pointer(s, "const float *")
    _check(lib.ccq_encode(layout.gguf_id, _pointer(w, "const float *"), rows, cols, params, _pointer(out, "void *")))
    return out


def decode(type: str | layouts.Layout, blocks: npt.ArrayLike) -> F32:
    """Exact weights f32 [rows, cols] of blocks u8 [rows, row bytes].  Raises ``ShapeError``, ``BackendError``."""
    layout = layout_of(type)
    b, cols = _blocks(layout, blocks)
    out = np.empty((b.shape[0], cols), np.float32)
    _check(lib.ccq_decode(layout.gguf_id, _pointer(b, "const void *"), out.size, _pointer(out, "float *")))
    return out


def _aligned(rows: int, row_bytes: int) -> U8:
    """Uninitialized u8 [rows, row_bytes] whose start is a multiple of 64 bytes."""
    raw = np.empty(rows * row_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + rows * row_bytes].reshape(rows, row_bytes)


def act_bytes(cols: int) -> int:
    """Bytes of a row of ``cols`` quantized activations, a multiple of 64.  Raises ``ShapeError``, ``BackendError``."""
    size = ffi.new("size_t *")
    _check(lib.ccq_act_bytes(cols, size))
    return int(size[0])


def quantize_activations(x: npt.ArrayLike) -> U8:
    """Activations f32 [rows, cols] (cols a multiple of 64) as the kernel set's integers, u8 [rows, act_bytes(cols)].

    Raises ``ShapeError``, ``BackendError``.
    """
    a = matrix(x, np.float32, "activations")
    rows, cols = a.shape
    if cols % layouts.GROUP:
        raise errors.ShapeError(f"row length {cols} is no multiple of {layouts.GROUP}")
    out = _aligned(rows, act_bytes(cols))
    for values, row in zip(a, out, strict=True):
        _check(
            lib.ccq_quantize_activations(
                _pointer(values, "const float *"), cols, 0, cols // layouts.GROUP, _pointer(row, "void *")
            )
        )
    return out


def _activations(act: npt.ArrayLike, cols: int) -> U8:
    a = matrix(act, np.uint8, "activations")
    if a.shape[1] != act_bytes(cols):
        raise errors.ShapeError(f"activations have {a.shape[1]} bytes per row, which does not fit {cols} weights")
    if a.ctypes.data % 64:
        aligned = _aligned(*a.shape)
        aligned[:] = a
        return aligned
    return a


def read_activations(act: npt.ArrayLike, cols: int) -> tuple[npt.NDArray[np.int16], F32]:
    """What quantized activations u8 [rows, act_bytes(cols)] hold: integers i16 [rows, cols] and the scales of their
    groups of 64, f32 [rows, cols / 64].

    Raises ``ShapeError``, ``BackendError``.
    """
    a = _activations(act, cols)
    q = np.empty((a.shape[0], cols), np.int16)
    d = np.empty((a.shape[0], cols // layouts.GROUP), np.float32)
    for row, integers, scales in zip(a, q, d, strict=True):
        _check(
            lib.ccq_read_activations(
                _pointer(row, "const void *"), cols, _pointer(integers, "int16_t *"), _pointer(scales, "float *")
            )
        )
    return q, d


def mul_mat(type: str | layouts.Layout, blocks: npt.ArrayLike, act: npt.ArrayLike) -> F32:
    """Products f32 [n, rows] of blocks u8 [rows, row bytes] with quantized activations u8 [n, act_bytes(cols)].

    Raises ``ShapeError``, ``BackendError``.
    """
    layout = layout_of(type)
    b, cols = _blocks(layout, blocks)
    a = _activations(act, cols)
    out = np.empty((a.shape[0], b.shape[0]), np.float32)
    size = ffi.new("size_t *")
    _check(lib.ccq_mul_mat_work(cols, a.shape[0], size))
    work = _aligned(1, int(size[0]))
    product = ffi.new(
        "ccq_product *",
        {
            "n": cols,
            "blocks": _pointer(b, "const void *"),
            "row_stride": b.shape[1],
            "n_rows": b.shape[0],
            "act": _pointer(a, "const void *"),
            "act_stride": a.shape[1],
            "n_cols": a.shape[0],
            "out": _pointer(out, "float *"),
            "out_stride": b.shape[0],
            "work": _pointer(work, "void *"),
        },
    )
    _check(lib.ccq_mul_mat(layout.gguf_id, product))
    return out

"""NumPy interface to the C kernels (``backend/include/ccq.h``).

Types are given as a name (``"ccq_t2"``, any case) or a :class:`ccq_format.layouts.Layout`.  All calls release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ccq_format import errors, layouts

from ._ccq import ffi, lib

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

ACT_BLOCK_BYTES: int = ffi.sizeof("ccq_act_block")
"""Bytes of one block (64 values) of the activation format."""

EFFORTS: dict[str, int] = {
    "fast": lib.CCQ_EFFORT_FAST,
    "default": lib.CCQ_EFFORT_DEFAULT,
    "best": lib.CCQ_EFFORT_BEST,
}
"""How far the encoder searches, by name."""

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


def _layout(type: str | layouts.Layout) -> layouts.Layout:
    if isinstance(type, layouts.Layout):
        return type
    try:
        return layouts.by_name(type)
    except KeyError:
        raise errors.BackendError(f"'{type}' is no CCQ type") from None


def _pointer(array: npt.NDArray[Any], ctype: str) -> Any:
    return ffi.cast(ctype, ffi.from_buffer(array))


def _matrix(array: npt.ArrayLike, dtype: npt.DTypeLike, what: str) -> npt.NDArray[Any]:
    a: npt.NDArray[Any] = np.ascontiguousarray(array, dtype=dtype)
    if a.ndim != 2:
        raise errors.ShapeError(f"{what} must have two dimensions, not {a.ndim}")
    return a


def _blocks(layout: layouts.Layout, blocks: npt.ArrayLike) -> tuple[U8, int]:
    """Blocks as a contiguous u8 [rows, row_bytes] and the weights of a row."""
    b = _matrix(blocks, np.uint8, "blocks")
    count, rest = divmod(b.shape[1], layout.block_bytes)
    if rest:
        raise errors.ShapeError(f"{b.shape[1]} bytes per row are no multiple of {layout.block_bytes} ({layout.name})")
    return b, count * layout.block_weights


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
    type: str | layouts.Layout,
    weights: npt.ArrayLike,
    importance: npt.ArrayLike | None = None,
    scales: npt.ArrayLike | None = None,
    threads: int = 0,
    effort: str = "default",
    coupling: npt.ArrayLike | None = None,
) -> U8:
    """Encode a matrix so that ``sum(importance * (weights - decoded)**2)`` is small.

    ``weights``: f32 [rows, cols]; ``importance``: f32 [cols] or [rows, cols], >= 0, or ``None`` for all ones;
    ``scales``: T types only, f32 [rows, cols / 64], fixes every block's scale instead of searching it;
    ``threads``: 0 = one per CPU; ``effort``: a key of ``EFFORTS``, how far the T types' encoder searches for a smaller
    error (P types have one way);
    ``coupling``: T types only, f32 [cols / 64, 64, 64], finite, zero on and below the diagonals: a block's errors e
    then count as ``sum(importance * (e + e @ coupling)**2)``.
    Returns u8 [rows, row bytes], the same for any number of threads and kernel set.

    Raises ``ShapeError``, ``WeightsError``, ``ImportanceError``, ``BackendError``.
    """
    layout = _layout(type)
    w = _matrix(weights, np.float32, "weights")
    rows, cols = w.shape
    try:
        out = np.empty((rows, layout.row_bytes(cols)), np.uint8)
    except ValueError as e:
        raise errors.ShapeError(str(e)) from None
    if effort not in EFFORTS:
        raise errors.BackendError(f"'{effort}' is no effort; there are {', '.join(EFFORTS)}")
    params = ffi.new("ccq_encode_params *", {"n_threads": threads, "effort": EFFORTS[effort]})
    keep: list[npt.NDArray[np.float32]] = []  # the buffers behind the pointers in params
    if importance is not None:
        imp = np.ascontiguousarray(importance, np.float32)
        if imp.shape not in ((cols,), (rows, cols)):
            raise errors.ImportanceError(f"importance has shape {imp.shape}, weights have {w.shape}")
        keep.append(imp)
        params.importance = _pointer(imp, "const float *")
        params.importance_stride = cols if imp.ndim == 2 else 0
    if scales is not None:
        s = np.ascontiguousarray(scales, np.float32)
        if s.shape != (rows, cols // layouts.GROUP):
            raise errors.ShapeError(f"scales have shape {s.shape}, not {(rows, cols // layouts.GROUP)}")
        keep.append(s)
        params.scales = _pointer(s, "const float *")
    if coupling is not None:
        u = np.ascontiguousarray(coupling, np.float32)
        if u.shape != (cols // layouts.GROUP, layouts.GROUP, layouts.GROUP):
            raise errors.ShapeError(f"coupling has shape {u.shape}, not {(cols // layouts.GROUP, 64, 64)}")
        keep.append(u)
        params.coupling = _pointer(u, "const float *")
    _check(
        lib.ccq_encode(
            layout.gguf_id, _pointer(w, "const float *"), rows, cols, params, _pointer(out, "void *")
        )
    )
    return out


def decode(type: str | layouts.Layout, blocks: npt.ArrayLike) -> F32:
    """Exact weights f32 [rows, cols] of blocks u8 [rows, row bytes].  Raises ``ShapeError``, ``BackendError``."""
    layout = _layout(type)
    b, cols = _blocks(layout, blocks)
    out = np.empty((b.shape[0], cols), np.float32)
    _check(lib.ccq_decode(layout.gguf_id, _pointer(b, "const void *"), out.size, _pointer(out, "float *")))
    return out


def quantize_activations(x: npt.ArrayLike) -> U8:
    """Activations f32 [rows, cols] (cols a multiple of 64) in the kernels' int8 format, u8 [rows, bytes].

    Raises ``ShapeError``, ``BackendError``.
    """
    a = _matrix(x, np.float32, "activations")
    if a.shape[1] % layouts.GROUP:
        raise errors.ShapeError(f"row length {a.shape[1]} is no multiple of {layouts.GROUP}")
    out = np.empty((a.shape[0], a.shape[1] // layouts.GROUP * ACT_BLOCK_BYTES), np.uint8)
    _check(lib.ccq_quantize_activations(_pointer(a, "const float *"), a.size, _pointer(out, "ccq_act_block *")))
    return out


def _activations(act: npt.ArrayLike, cols: int) -> U8:
    a = _matrix(act, np.uint8, "activations")
    if a.shape[1] != cols // layouts.GROUP * ACT_BLOCK_BYTES:
        raise errors.ShapeError(f"activations have {a.shape[1]} bytes per row, which does not fit {cols} weights")
    return a


def vec_dot(type: str | layouts.Layout, blocks: npt.ArrayLike, act: npt.ArrayLike) -> float:
    """Product of one row of blocks u8 [1, row bytes] and one row of quantized activations u8 [1, bytes].

    Raises ``ShapeError``, ``BackendError``.
    """
    layout = _layout(type)
    b, cols = _blocks(layout, blocks)
    a = _activations(act, cols)
    if b.shape[0] != 1 or a.shape[0] != 1:
        raise errors.ShapeError("vec_dot takes one row of each")
    out = ffi.new("float *")
    _check(
        lib.ccq_vec_dot(
            layout.gguf_id, cols, _pointer(b, "const void *"), _pointer(a, "const ccq_act_block *"), out
        )
    )
    return float(out[0])


def mul_mat(type: str | layouts.Layout, blocks: npt.ArrayLike, act: npt.ArrayLike) -> F32:
    """Products f32 [n, rows] of blocks u8 [rows, row bytes] with quantized activations u8 [n, bytes].

    Raises ``ShapeError``, ``BackendError``.
    """
    layout = _layout(type)
    b, cols = _blocks(layout, blocks)
    a = _activations(act, cols)
    out = np.empty((a.shape[0], b.shape[0]), np.float32)
    _check(
        lib.ccq_mul_mat(
            layout.gguf_id,
            cols,
            _pointer(b, "const void *"),
            b.shape[1],
            b.shape[0],
            _pointer(a, "const ccq_act_block *"),
            cols // layouts.GROUP,
            a.shape[0],
            _pointer(out, "float *"),
            b.shape[0],
        )
    )
    return out

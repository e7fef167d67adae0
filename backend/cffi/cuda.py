"""The CCQ types on NVIDIA GPUs: ``libccq_cuda`` (``backend/cuda/ccq_cuda.h``), loaded when a function is first called.

Arrays are CUDA tensors of torch, or anything with ``__cuda_array_interface__`` or ``__dlpack__`` (the latter needs
torch); nothing is copied.  They must be on one device and contiguous along their last dimension.  Work is queued on
torch's current stream of that device where an array is torch's, else on ``stream`` (an integer handle; default: the
default stream), and nothing waits for it.  Results are new torch tensors, or written to ``out``, which all other arrays
need.  Only ``encode`` takes and gives NumPy arrays, and waits.

Importing this needs neither CUDA nor torch; without a usable library every function raises ``CudaError``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ccq_format import errors, layouts
from cffi import FFI

from .arguments import EncoderArrays, effort_number, layout_of, row_weights
from .cdef import declarations

__all__ = ["available", "dequantize", "encode", "library_path", "matmul", "matmul_id", "matvec", "require"]

_FLOATS = {"float32": 0, "float16": 1, "bfloat16": 2}
_TYPESTR = {"<f4": "float32", "<f2": "float16", "|u1": "uint8", "<i4": "int32"}


class _Library(NamedTuple):
    ffi: Any
    lib: Any


class _Array(NamedTuple):
    """Address, shape, strides in elements, dtype by name, device (``None``: the current one), what keeps it alive."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int | None
    owner: Any


def library_path() -> Path:
    """Where the library is looked for: the environment variable ``CCQ_CUDA_LIBRARY``, else beside this file."""
    return Path(os.environ.get("CCQ_CUDA_LIBRARY") or Path(__file__).with_name("libccq_cuda.so"))


@cache
def _load(path: Path) -> _Library:
    if not path.is_file():
        raise errors.CudaError("this installation has no CUDA kernels; `make cuda` builds them", file=path)
    ffi = FFI()
    ffi.cdef(declarations(Path(__file__).with_name("ccq_cuda.h").read_text(encoding="utf-8")))
    try:
        lib: Any = ffi.dlopen(os.fspath(path))
    except OSError as error:
        raise errors.CudaError(f"the CUDA kernels cannot be loaded: {error}", file=path) from None
    library = _Library(ffi, lib)
    count = ffi.new("int32_t *")
    _check(library, lib.ccq_cuda_device_count(count))
    if count[0] == 0:
        raise errors.CudaError("there is no CUDA device", file=path)
    return library


def _library() -> _Library:
    return _load(library_path())


def _check(library: _Library, status: int) -> None:
    if status == 0:
        return
    ffi, lib = library
    text = lib.ccq_cuda_error() if status == lib.CCQ_CUDA_ERR_CUDA else lib.ccq_cuda_status_text(status)
    said = ffi.string(text).decode()
    kind = {
        lib.CCQ_CUDA_ERR_ROW_LENGTH: errors.ShapeError,
        lib.CCQ_CUDA_ERR_WEIGHTS: errors.WeightsError,
        lib.CCQ_CUDA_ERR_IMPORTANCE: errors.ImportanceError,
    }.get(status)
    if kind is not None:
        raise kind(said)
    raise errors.CudaError(f"CUDA: {said}" if status == lib.CCQ_CUDA_ERR_CUDA else said)


def available() -> bool:
    """Whether the library is there and CUDA has a device."""
    try:
        _library()
    except errors.CudaError:
        return False
    return True


def require() -> None:
    """Raise ``CudaError`` unless the library is there and CUDA has a device."""
    _library()


# --- arrays -----------------------------------------------------------------------------------------------------------


def _torch_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _array(array: Any, what: str, dtypes: Sequence[str], dims: Sequence[int]) -> _Array:
    """Check and unwrap an argument.  Raises ``CudaError``, ``ShapeError``."""
    if not _torch_tensor(array) and not hasattr(array, "__cuda_array_interface__") and hasattr(array, "__dlpack__"):
        try:
            import torch.utils.dlpack
        except ImportError:
            raise errors.CudaError(f"{what}: reading a DLPack array needs torch") from None
        try:
            array = torch.utils.dlpack.from_dlpack(array)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            raise errors.CudaError(f"{what}: {error}") from None
    if _torch_tensor(array):
        if array.device.type != "cuda":
            raise errors.CudaError(f"{what} is on the device '{array.device}', not on a CUDA device")
        dtype = str(array.dtype).removeprefix("torch.")
        got = _Array(array.data_ptr(), tuple(array.shape), tuple(array.stride()), dtype, array.device.index, array)
    elif hasattr(array, "__cuda_array_interface__"):
        got = _from_interface(array, what)
    else:
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        raise errors.CudaError(f"{what} must be a CUDA array (torch, __cuda_array_interface__ or DLPack), not {kind}")
    if got.dtype not in dtypes:
        raise errors.CudaError(f"{what} has dtype {got.dtype}, not {' or '.join(dtypes)}")
    if len(got.shape) not in dims:
        raise errors.ShapeError(f"{what} must have {' or '.join(map(str, dims))} dimensions, not {len(got.shape)}")
    if got.strides and got.strides[-1] != 1 and got.shape[-1] > 1:
        raise errors.CudaError(f"{what} is not contiguous along its last dimension")
    return got


def _from_interface(array: Any, what: str) -> _Array:
    interface = array.__cuda_array_interface__
    dtype = _TYPESTR.get(interface["typestr"], interface["typestr"])
    size = int(interface["typestr"][2:])
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        steps, step = [], 1
        for n in reversed(shape):
            steps.append(step)
            step *= n
        return _Array(interface["data"][0], shape, tuple(reversed(steps)), dtype, None, array)
    if any(s % size for s in strides):
        raise errors.CudaError(f"{what} has strides that are no multiple of its elements")
    return _Array(interface["data"][0], shape, tuple(s // size for s in strides), dtype, None, array)


class _Call:
    """The arrays of a call: one device, one stream; a context in which that device is the current one."""

    def __init__(self, arrays: Sequence[tuple[str, _Array]], stream: int | None) -> None:
        self.library = _library()
        named = [(what, a.device) for what, a in arrays if a.device is not None]
        for what, device in named:
            if device != named[0][1]:
                raise errors.CudaError(f"{what} is on CUDA device {device}, {named[0][0]} on {named[0][1]}")
        self.device = named[0][1] if named else None
        if stream is None and any(_torch_tensor(a.owner) for _, a in arrays):
            import torch

            stream = torch.cuda.current_stream(self.device).cuda_stream
        self.stream = self.library.ffi.cast("void *", stream or 0)

    def pointer(self, array: _Array | None, ctype: str = "void *") -> Any:
        return self.library.ffi.cast(ctype, array.address if array is not None else 0)

    def run(self, function: str, *arguments: Any) -> None:
        ffi, lib = self.library
        before = ffi.new("int32_t *")
        if self.device is not None:
            _check(self.library, lib.ccq_cuda_set_device(self.device, before))
        try:
            _check(self.library, getattr(lib, function)(*arguments, self.stream))
        finally:
            if self.device is not None:
                lib.ccq_cuda_set_device(before[0], before)


def _result(out: Any, like: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, _Array]:
    """``out``, checked, or a new torch tensor beside ``like``."""
    if out is None:
        if not _torch_tensor(like):
            raise errors.CudaError("out must be given for arrays that are not torch's")
        import torch

        out = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    array = _array(out, "out", [dtype], [len(shape)])
    if array.shape != shape:
        raise errors.ShapeError(f"out has shape {array.shape}, not {shape}")
    return out, array


def _row_stride(array: _Array, dim: int = -2) -> int:
    """Elements from one row to the next; of a single row, its length."""
    return array.strides[dim] if array.shape[dim] > 1 else array.shape[-1]


# --- operations -------------------------------------------------------------------------------------------------------


def dequantize(
    type: str | layouts.Layout,
    blocks: Any,
    dtype: str = "float32",
    rows: Any = None,
    out: Any = None,
    stream: int | None = None,
) -> Any:
    """The exact weights [n, cols] of blocks u8 [rows, row bytes], rounded once to ``dtype``: float32, float16 or
    bfloat16.

    ``rows``: i32 [n], which rows (GET_ROWS), at most 65535; a number outside the matrix gives a row of NaN.  All rows
    without it.  Raises ``CudaError``, ``ShapeError``, ``BackendError``.
    """
    layout = layout_of(type)
    _library()
    if dtype not in _FLOATS:
        raise errors.CudaError(f"'{dtype}' is none of {', '.join(_FLOATS)}")
    b = _array(blocks, "blocks", ["uint8"], [2])
    cols = row_weights(layout, b.shape[-1])
    index = _array(rows, "rows", ["int32"], [1]) if rows is not None else None
    n = index.shape[0] if index is not None else b.shape[0]
    out, o = _result(out, blocks, (n, cols), dtype)
    call = _Call([("blocks", b), ("out", o), *([("rows", index)] if index is not None else [])], stream)
    call.run(
        "ccq_cuda_dequantize",
        layout.gguf_id,
        call.pointer(b),
        _row_stride(b),
        b.shape[0],
        cols,
        call.pointer(index, "int32_t *"),
        n,
        _FLOATS[dtype],
        call.pointer(o),
        _row_stride(o),
    )
    return out


def _product(
    function: str,
    layout: layouts.Layout,
    arrays: dict[str, _Array],
    repeat: int,
    stream: int | None,
) -> None:
    b, x, o = arrays["blocks"], arrays["x"], arrays["out"]
    cols = row_weights(layout, b.shape[-1])
    if x.shape[-1] != cols:
        raise errors.ShapeError(f"x has rows of {x.shape[-1]}, the weights of {cols}")
    size = 4 if x.dtype == "float32" else 2
    if x.address % (2 * size) or _row_stride(x) % 2:
        raise errors.CudaError(f"x must have its rows aligned to {2 * size} bytes")
    if len(o.shape) > 2 and o.shape[0] > 1 and o.strides[0] != o.shape[1] * _row_stride(o):
        raise errors.CudaError("out must be contiguous")
    call = _Call(list(arrays.items()), stream)
    ids = arrays.get("ids")
    values: dict[str, Any] = {
        "type": layout.gguf_id,
        "n": cols,
        "blocks": call.pointer(b),
        "row_stride": _row_stride(b),
        "n_rows": b.shape[-2],
        "repeat": repeat,
        "x": call.pointer(x),
        "x_type": _FLOATS[x.dtype],
        "x_stride": _row_stride(x),
        "n_cols": o.shape[0] if ids is None else ids.shape[0] * ids.shape[1],
        "out": call.pointer(o, "float *"),
        "out_stride": _row_stride(o),
    }
    if ids is not None:
        values |= {
            "ids": call.pointer(ids, "int32_t *"),
            "n_experts": b.shape[0],
            "expert_stride": b.strides[0] if b.shape[0] > 1 else b.shape[1] * _row_stride(b),
        }
    call.run(function, call.library.ffi.new("ccq_cuda_product *", values))


def _dense(function: str | None, type: str | layouts.Layout, blocks: Any, x: Any, out: Any, stream: int | None) -> Any:
    layout = layout_of(type)
    library = _library()
    b = _array(blocks, "blocks", ["uint8"], [2])
    a = _array(x, "x", list(_FLOATS), [2])
    most = library.lib.CCQ_CUDA_MAX_VECTOR_COLUMNS
    if function == "ccq_cuda_mat_vec" and a.shape[0] > most:
        raise errors.ShapeError(f"x has {a.shape[0]} rows; matvec takes up to {most}, matmul any number")
    out, o = _result(out, x, (a.shape[0], b.shape[0]), "float32")
    function = function or ("ccq_cuda_mat_vec" if a.shape[0] <= most else "ccq_cuda_mat_mul")
    _product(function, layout, {"blocks": b, "x": a, "out": o}, 1, stream)
    return out


def matvec(type: str | layouts.Layout, blocks: Any, x: Any, out: Any = None, stream: int | None = None) -> Any:
    """Products f32 [n, rows] of blocks u8 [rows, row bytes] with 1 to 8 rows of x, f32, f16 or bf16 [n, cols].

    The activations are rounded to 8 bits with a scale per 64 (backend/cpu/ACTIVATIONS.md has the error bound).  Raises
    ``CudaError``, ``ShapeError``, ``BackendError``.
    """
    return _dense("ccq_cuda_mat_vec", type, blocks, x, out, stream)


def matmul(type: str | layouts.Layout, blocks: Any, x: Any, out: Any = None, stream: int | None = None) -> Any:
    """The same for any number of rows of x: with more than 8 on tensor cores."""
    return _dense(None, type, blocks, x, out, stream)


def matmul_id(
    type: str | layouts.Layout, blocks: Any, x: Any, ids: Any, out: Any = None, stream: int | None = None
) -> Any:
    """Products of a mixture of experts, f32 [tokens, k, rows]: slot j of token t with the matrix of expert ids[t, j].

    ``blocks``: u8 [experts, rows, row bytes]; ``ids``: i32 [tokens, k], contiguous; ``x``: [tokens, cols], the same for
    all slots of a token, or [tokens, k, cols], contiguous.  An id outside the experts gives NaN.  Raises as ``matvec``
    does.
    """
    layout = layout_of(type)
    _library()
    b = _array(blocks, "blocks", ["uint8"], [3])
    i = _array(ids, "ids", ["int32"], [2])
    a = _array(x, "x", list(_FLOATS), [2, 3])
    tokens, k = i.shape
    if a.shape[:-1] not in ((tokens,), (tokens, k)):
        raise errors.ShapeError(f"x has shape {a.shape}, ids have {i.shape}")
    if tokens > 1 and i.strides[0] != k:
        raise errors.CudaError("ids must be contiguous")
    if len(a.shape) == 3 and tokens > 1 and a.strides[0] != k * _row_stride(a):
        raise errors.CudaError("x must be contiguous")
    out, o = _result(out, x, (tokens, k, b.shape[1]), "float32")
    # A vector product decodes an expert again for each of its columns.
    function = "ccq_cuda_mat_vec" if tokens * k <= 2 * b.shape[0] and tokens <= 8 else "ccq_cuda_mat_mul"
    arrays = {"blocks": b, "x": a, "ids": i, "out": o}
    _product(function, layout, arrays, k if len(a.shape) == 2 else 1, stream)
    return out


def encode(
    type: str | layouts.Layout,
    weights: npt.ArrayLike,
    importance: npt.ArrayLike | None = None,
    effort: str = "default",
    coupling: npt.ArrayLike | None = None,
) -> npt.NDArray[np.uint8]:
    """``ccq_backend.encode`` on the current device, for the T types: the same arguments and the same bytes.

    Takes about twice the memory of the weights on the device, and with a coupling up to 0.6 MB for each of two blocks
    on a multiprocessor.  Raises what that raises, and ``CudaError``.
    """
    layout = layout_of(type)
    arrays = EncoderArrays.of(layout, weights, importance, coupling)
    if not layout.code.couples:
        raise errors.BackendError(f"{layout.name} is encoded on the CPU only")
    library = _library()
    ffi = library.ffi
    out = np.empty((arrays.weights.shape[0], layout.row_bytes(arrays.weights.shape[1])), np.uint8)

    def pointer(array: npt.NDArray[np.float32] | None) -> Any:
        return ffi.NULL if array is None else ffi.cast("float *", array.ctypes.data)

    values = {
        "type": layout.gguf_id,
        "weights": pointer(arrays.weights),
        "n_rows": arrays.weights.shape[0],
        "n_cols": arrays.weights.shape[1],
        "importance": pointer(arrays.importance),
        "importance_stride": arrays.importance_stride,
        "effort": effort_number(effort),
        "coupling": pointer(arrays.coupling),
        "blocks": ffi.cast("void *", out.ctypes.data),
    }
    _check(library, library.lib.ccq_cuda_encode(ffi.new("ccq_cuda_encoding *", values), ffi.NULL))
    return out

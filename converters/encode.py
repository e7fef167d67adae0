"""Encode rows of float32 weights to any target type, with and without importance."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts, stock
from ccq_format.blocks import Encodable
from ccq_format.errors import CudaError, ImportanceError, WeightsError

from .target_types import is_ccq

_F16_MAX = 65504.0
_LARGEST = {"f16": _F16_MAX, "q8_0": _F16_MAX * 127} | {
    name: limit for name, kind in stock.ENCODABLE.items() if (limit := kind.code.max_weight) is not None
}
"""Largest magnitude that a type can hold; the types left out hold any float32."""


def encodable(target: str) -> Encodable | None:
    """The type ``target`` if an encoder of ours searches it for small errors, which data says the weights of."""
    return stock.ENCODABLE.get(target)


def rows_of_importance(
    importance: NDArray[np.float32], tensor: str, rows: int, row_len: int, start: int, stop: int
) -> NDArray[np.float32]:
    """The importances of rows ``start:stop`` of a tensor, as ``[row_len]`` or ``[stop - start, row_len]``.

    ``importance`` is float32 ``[row_len]`` or ``[matrices, row_len]``, one row per stacked matrix.  Raises
    ``ImportanceError`` if its shape does not fit or a value is negative, NaN or infinite.
    """
    table = np.atleast_2d(np.asarray(importance, dtype=np.float32))
    if table.ndim != 2 or table.shape[1] != row_len or rows % table.shape[0]:
        raise ImportanceError(f"importance of shape {importance.shape} does not fit {rows} x {row_len}", tensor=tensor)
    if not (np.isfinite(table).all() and (table >= 0).all()):
        raise ImportanceError("an importance is negative, NaN or infinite", tensor=tensor)
    per_matrix = rows // table.shape[0]
    part: NDArray[np.float32] = table[0] if table.shape[0] == 1 else table[np.arange(start, stop) // per_matrix]
    return part


def check_weights(x: NDArray[np.float32], target: str, tensor: str) -> None:
    """Raise ``WeightsError`` naming the tensor if a weight is NaN or infinite, or too large for ``target``."""
    # min and max propagate NaN and need no temporary array.
    low, high = float(x.min(initial=0.0)), float(x.max(initial=0.0))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise WeightsError("a weight is NaN or infinite", tensor=tensor)
    limit = _LARGEST.get(target)
    if limit is not None and max(-low, high) > limit:
        raise WeightsError(f"a weight of {max(-low, high):g} is too large for {target}", tensor=tensor)


def require_device(device: str) -> None:
    """Raise ``CudaError`` if ``device`` is a GPU and there is none to be used."""
    if device == "cuda":
        from ccq_backend import cuda

        try:
            cuda.require()
        except CudaError as error:
            hint = "without --device cuda the CPU encodes the same bytes"
            raise CudaError(f"{error.reason}; {hint}", file=error.file) from None


def on_gpu(target: str, device: str) -> bool:
    """Whether rows of type ``target`` are encoded on a GPU: only the T types are."""
    return device == "cuda" and is_ccq(target) and layouts.by_name(target).code.couples


def encode_blocks(
    layout: Encodable,
    x: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    threads: int,
    effort: str,
    device: str,
    coupling: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """``ccq_backend.encode``, on ``device`` (``"cpu"`` or ``"cuda"``) where it can encode the type; the same bytes."""
    # Imported here because plain conversions need no compiled kernels.
    if isinstance(layout, layouts.Layout) and on_gpu(layout.name, device):
        from ccq_backend import cuda

        return cuda.encode(layout, x, importance, effort, coupling)
    import ccq_backend

    blocks: NDArray[np.uint8] = ccq_backend.encode(
        layout, x, importance=importance, threads=threads, effort=effort, coupling=coupling
    )
    return blocks


def encode_rows(
    target: str,
    x: NDArray[np.float32],
    importance: NDArray[np.float32] | None = None,
    threads: int = 0,
    effort: str = "default",
    device: str = "cpu",
) -> NDArray[np.uint8]:
    """Encode float32 ``[rows, row_len]`` to uint8 ``[rows, row_bytes]`` of type ``target``.

    ``importance`` is float32 ``[row_len]`` or ``[rows, row_len]`` and used by :func:`encodable` types only, ``threads``
    <= 0 means one per CPU, ``device`` is what encodes the T types.  The rows must be whole blocks of ``target`` and
    finite.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    layout = encodable(target)
    if layout is not None:
        weights = layout.code.error_weights(x, importance)
        raised = x * layout.code.gain(layout, weights)
        return encode_blocks(layout, raised, weights, threads, effort, device)
    if target == "f32":
        return x.view(np.uint8)
    if target == "f16":
        return x.astype("<f2").view(np.uint8)
    quant_type = gguf.GGMLQuantizationType[target.upper()]
    return np.ascontiguousarray(gguf.quants.quantize(x, quant_type)).view(np.uint8).reshape(x.shape[0], -1)


def decode_rows(target: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Weights float32 ``[rows, row_len]`` of uint8 ``[rows, row_bytes]`` of type ``target``."""
    if is_ccq(target):
        import ccq_backend  # plain conversions need no compiled kernels

        weights: NDArray[np.float32] = ccq_backend.decode(layouts.by_name(target), blocks)
        return weights
    return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[target.upper()]), np.float32)

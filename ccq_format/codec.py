"""Encode and decode blocks with numpy, driven by ``layouts.py``.

Decoding is exact: every implementation yields the same float32 bits (spec sections 5 and 6).  Encoding here is the
readable kind: it shows how codes are found once the scales are given.  The encoder for real work, which also searches
the scales, is ``ccq_backend.encode``.

Blocks are uint8 arrays ``[..., k * block_bytes]``, weights float32 arrays ``[..., k * block_weights]``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from .blocks import Layout
from .errors import BlockError, ImportanceError, WeightsError
from .paper import NAN_BITS, PaperParameters
from .trellis import levels, pack_windows, scale_bytes, scale_values, viterbi, windows

__all__ = [
    "NAN_BITS",
    "PaperParameters",
    "check_blocks",
    "decode",
    "encode",
    "levels",
    "pack_windows",
    "scale_bytes",
    "scale_values",
    "viterbi",
    "windows",
]

_CHUNK_WEIGHTS = 1 << 20  # decoded at a time: temporary arrays stay at a few MB whatever the tensor's size


def decode(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """Decode uint8 blocks ``[..., k * block_bytes]`` to float32 weights ``[..., k * block_weights]``.

    Every byte string has a meaning, so nothing is refused here; see :func:`check_blocks`.

    Raises:
        ValueError: not uint8, or the last dimension is no whole number of blocks.
    """
    flat = _as_blocks(layout, blocks)
    out = np.empty((len(flat), layout.block_weights), dtype=np.float32)
    for part in _chunks(len(flat), layout.block_weights):
        out[part] = layout.code.decode(layout, flat[part])
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] // layout.block_bytes * layout.block_weights)


def check_blocks(
    layout: Layout,
    blocks: np.ndarray,
    *,
    file: str | os.PathLike[str] | None = None,
    tensor: str | None = None,
    first_block: int = 0,
) -> None:
    """Check uint8 blocks ``[..., k * block_bytes]`` for parameters that no encoder may write.

    Those are, in P types, a super scale, group scale, code scale or code zero point that is not finite.  The bytes of
    T types all have a regular meaning.  ``file``, ``tensor`` and ``first_block`` (the index of ``blocks``' first block
    in the tensor) go into the message.

    Raises:
        BlockError: names the first such block.
        ValueError: not uint8, or no whole number of blocks.
    """
    flat = _as_blocks(layout, blocks)
    for part in _chunks(len(flat), layout.block_weights):
        fault = layout.code.fault(layout, flat[part])
        if fault is not None:
            at, what = fault
            raise BlockError(what.format(first_block + part.start + at), file=file, tensor=tensor)


def encode(
    layout: Layout,
    weights: np.ndarray,
    importance: np.ndarray | None = None,
    *,
    scales: np.ndarray | PaperParameters,
) -> np.ndarray:
    """Find the codes for given scales: float32 ``[..., k * block_weights]`` -> uint8 ``[..., k * block_bytes]``.

    ``sum(importance * (weights - decoded)**2)`` is the least possible for P types and, but for rare cases at the seam
    of the cycle, for T types.  ``importance`` broadcasts to the weights' shape.  ``scales`` is float32 ``[..., k]`` for
    T types (each a value of :func:`scale_values`; 0 gives an all-zero block), :class:`PaperParameters` for P types.

    Raises:
        WeightsError: a weight is NaN or infinite.
        ImportanceError: an importance is negative, NaN or infinite, or does not broadcast.
        ValueError: wrong shapes, or scales that the type cannot represent.
    """
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim == 0 or weights.shape[-1] % layout.block_weights:
        raise ValueError(f"weights of shape {weights.shape} are no whole number of blocks of {layout.name}")
    if not np.isfinite(weights).all():
        raise WeightsError("a weight is NaN or infinite")
    target = weights.reshape(-1, layout.block_weights)
    cost = _as_importance(importance, weights.shape).reshape(target.shape)
    blocks = layout.code.encode(layout, target, cost, scales)
    return blocks.reshape(*weights.shape[:-1], layout.row_bytes(weights.shape[-1]))


def _as_importance(importance: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if importance is None:
        return np.ones(shape)
    try:
        out = np.broadcast_to(np.asarray(importance, dtype=np.float64), shape)
    except ValueError:
        raise ImportanceError(f"shape {np.shape(importance)} does not fit weights of shape {shape}") from None
    if not (np.isfinite(out).all() and (out >= 0).all()):
        raise ImportanceError("an importance is negative, NaN or infinite")
    return out


def _as_blocks(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % layout.block_bytes:
        raise ValueError(
            f"{blocks.dtype} array of shape {blocks.shape} is no uint8 array of whole {layout.name} blocks "
            f"of {layout.block_bytes} bytes"
        )
    return blocks.reshape(-1, layout.block_bytes)


def _chunks(n_blocks: int, block_weights: int) -> Iterator[slice]:
    step = max(1, _CHUNK_WEIGHTS // block_weights)
    for first in range(0, n_blocks, step):
        yield slice(first, min(first + step, n_blocks))

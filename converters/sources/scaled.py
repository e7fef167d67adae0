"""8-bit codes with a scale per tensor, per row or per block of rows and columns: FP8 in its many dresses, and int8.

``fp8`` is DeepSeek-V3's (``weight_scale_inv`` multiplies, whatever its name says) and AutoFP8's (``weight_scale``);
``fbgemm_fp8`` has a scale per row; compressed-tensors' ``float-quantized`` and ``int-quantized`` come here from
``compressed``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, prod
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor, as_float32
from .format import Settings, companion, matrix, named

CODES = ("F8_E4M3", "F8_E5M2", "I8")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def fp8(settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
    """``X.weight`` with ``X.weight_scale_inv`` or ``X.weight_scale``, of fused experts ``X`` with ``X_scale_inv`` (see
    ``Format``)."""
    block = settings.raw.get("weight_block_size")
    if block is not None and not is_block(block):
        raise settings.error(f"'weight_block_size' must be two sizes, it is {block!r}")
    plain = ((f"{name}.weight", scale) for name, scale in named(checkpoint, ".weight_scale"))
    for name, scale in (*named(checkpoint, "_scale_inv"), *plain):
        weight = companion(checkpoint, scale, name, ("F8_E4M3", "F8_E5M2"))
        yield scaled_tensor(weight, scale, (block[0], block[1]) if block and prod(scale.shape) > 1 else None)


def is_block(value: object) -> TypeGuard[list[int]]:
    """Whether a value of a config is the size of a block: positive numbers of rows and columns."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(size, int) and size > 0 for size in value)


def fbgemm(settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
    """``X.weight`` with ``X.weight_scale`` ``[rows, 1]`` (see ``Format``)."""
    for name, scale in named(checkpoint, ".weight_scale"):
        weight = companion(checkpoint, scale, f"{name}.weight", ("F8_E4M3",))
        yield scaled_tensor(weight, scale, None)


def scaled_tensor(
    weight: StoredTensor,
    scale: StoredTensor,
    block: tuple[int, int] | None,
    zero_point: StoredTensor | None = None,
) -> DecodedTensor:
    """Codes ``[..., rows, columns]`` times scales: one; one per row; or a grid, of blocks of ``block`` rows and columns
    if that is given, else as large as the grid says.  An int8 ``zero_point`` of the scales' shape is subtracted first.

    Raises ``ModelError`` for types or shapes that do not fit.
    """
    matrix(weight, CODES, (2, 3))
    matrix(scale, SCALES, (0, 1, 2, 3))
    *lead, rows, columns = weight.shape
    matrices = prod(lead)
    if prod(scale.shape) == 1:
        grid, block = (1, 1), (rows * matrices, columns)
    elif block is not None:
        grid = (matrices * ceil(rows / block[0]), ceil(columns / block[1]))
    elif len(scale.shape) == 1 or scale.shape[-1] == 1:
        per = prod(scale.shape) // matrices
        grid, block = (matrices * per, 1), (max(1, rows // max(1, per)), columns)
    else:
        grid = (prod(scale.shape[:-1]), scale.shape[-1])
        block = (max(1, matrices * rows // grid[0]), max(1, columns // grid[1]))
    per_matrix = grid[0] // matrices if grid[0] > 1 else 1
    fits = prod(grid) == prod(scale.shape) and (grid[0] == 1 or ceil(rows / block[0]) == per_matrix)
    if not fits or ceil(columns / block[1]) != grid[1]:
        raise scale.error(f"has the shape {list(scale.shape)}, which does not fit weights {list(weight.shape)}")
    if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype != "I8"):
        raise zero_point.error(f"is {zero_point.dtype} {list(zero_point.shape)}, not I8 {list(scale.shape)}")

    def row_of_grid(row: NDArray[np.int64]) -> NDArray[np.int64]:
        return (row // rows) * per_matrix + row % rows // block[0] if grid[0] > 1 else np.zeros_like(row)

    def of_rows(tensor: StoredTensor, dtype: str, start: int, stop: int) -> NDArray[np.float32]:
        """The values of the grid for rows ``start..stop``: ``[stop - start, columns]``, or ``[.., 1]`` if all alike."""
        at = row_of_grid(np.arange(start, stop))
        if len(tensor.shape) < 2:
            values = tensor.value().reshape(grid)[at]
        else:
            values = tensor.stored_rows(int(at[0]), int(at[-1]) + 1)[at - at[0]]
        found = as_float32(values, dtype)
        return found if grid[1] == 1 else np.repeat(found, block[1], axis=1)[:, :columns]

    def load(start: int, stop: int) -> NDArray[np.float32]:
        codes = as_float32(weight.stored_rows(start, stop), weight.dtype)
        if zero_point is not None:
            codes = codes - of_rows(zero_point, "I8", start, stop)
        # uint8 scales are powers of two, as in microscaling formats
        product: NDArray[np.float32] = codes * of_rows(
            scale, "F8_E8M0" if scale.dtype == "U8" else scale.dtype, start, stop
        )
        return product

    parts = (weight.name, scale.name, *((zero_point.name,) if zero_point is not None else ()))
    kind = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8"}[weight.dtype]
    return DecodedTensor(weight.name, weight.path, weight.shape, kind, load, parts)

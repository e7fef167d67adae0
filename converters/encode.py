"""Encode rows of float32 weights to any target type: the weighting of errors, with and without importance."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts
from ccq_format.errors import ImportanceError, WeightsError

from .plan import is_ccq

_F16_MAX = 65504.0
_LARGEST = {"f16": _F16_MAX, "q8_0": _F16_MAX * 127, "q5_0": _F16_MAX * 16, "q4_0": _F16_MAX * 8} | {
    layout.name: layout.code.max_weight for layout in layouts.LAYOUTS if isinstance(layout.code, layouts.TrellisCode)
}
"""Largest magnitude that a type can hold; the types left out hold any float32."""


def error_weights(
    x: NDArray[np.float32], importance: NDArray[np.float32] | None, layout: layouts.Layout
) -> NDArray[np.float32]:
    """Weights of the squared error of each element of ``x`` (float32 ``[rows, row_len]``), of the same shape.

    :func:`magnitude_weights`, times ``importance^q`` where there is one (float32 ``[row_len]`` or ``[rows, row_len]``),
    with q = 3/4 for the T types and llama.cpp's 1/2 for the P types.  Mean KL divergence of CCQ_T2 from f32 (4 M Llama,
    10240 tokens, importance from 65 k others) with targets raised by 1.04 as in :func:`target_gain`: q = 1/2 0.0855,
    3/4 0.0810, 1 0.0840; not raised, q = 1/2 0.0877, 3/4 0.0840.
    """
    power = np.square(x, dtype=np.float32).mean(axis=1, keepdims=True, dtype=np.float32)
    weights = magnitude_weights(x, power, layout)
    if importance is not None:
        exponent = np.float32(0.75 if isinstance(layout.code, layouts.TrellisCode) else 0.5)
        weights = weights * np.power(importance, exponent, dtype=np.float32)
    return np.ascontiguousarray(weights, dtype=np.float32)


def magnitude_weights(
    x: NDArray[np.float32], power: NDArray[np.floating], layout: layouts.Layout
) -> NDArray[np.float32]:
    """What an element's own size adds to the weight of its error: ``(power + x^2)^p``, float32 like ``x``.

    ``power`` is the mean square of each row ``[rows, 1]``; p = 1/2 for the P types and 1/4 for the T types.

    p = 1/2 is llama.cpp's own weighting under its importance matrix (``sqrtf(sigma2 + x[i] * x[i])``): large weights
    must not shrink.  Mean KL divergence to f16 without importance, 5080 tokens of technical English, for p = 0, 1/4
    and 1/2; two Llama models of 4 and 16 million parameters:

    ====================  ======  ======  ======
    CCQ_P2_5, 4 M         0.1456  0.1392  0.1362
    CCQ_P2, 16 M          0.1115  0.1013  0.0998
    CCQ_T1_5, 4 M         0.2920  0.2735  0.2672
    CCQ_T2, 4 M           0.0973  0.0930  0.1006
    CCQ_T2, 16 M          0.0714  0.0677  0.0674
    CCQ_T2_5, 4 M         0.0463  0.0437  0.0451
    CCQ_T3, 4 M           0.0195  0.0209  0.0214
    ====================  ======  ======  ======
    """
    square = np.square(x, dtype=np.float32)
    weights: NDArray[np.float32] = np.sqrt(square + power.astype(np.float32))
    root: NDArray[np.float32] = np.sqrt(weights)
    return root if isinstance(layout.code, layouts.TrellisCode) else weights


def target_gain(layout: layouts.Layout, measured: bool) -> np.float32:
    """What weights are multiplied by before they are encoded: 1, or a little more for a T type whose errors are
    ``measured`` on data.

    A nearest code word is shorter than its target, by the relative squared error D where errors are weighted equally,
    and all matrices shrink together.  ``1 + 0.75 * 4^-bpw`` takes back about half of that, which serves best: CCQ_T2,
    4 M Llama, importance with q = 1/2: 0.0877 at a gain of 1, 0.0855 at 1.04 and 0.0875 at 1.08.  Without data there
    was nothing to gain (0.0992 and 0.0993).
    """
    if not (measured and isinstance(layout.code, layouts.TrellisCode)):
        return np.float32(1)
    return np.float32(1 + 0.75 * 4.0**-layout.bpw)


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


def encode_rows(
    target: str,
    x: NDArray[np.float32],
    importance: NDArray[np.float32] | None = None,
    threads: int = 0,
    effort: str = "default",
) -> NDArray[np.uint8]:
    """Encode float32 ``[rows, row_len]`` to uint8 ``[rows, row_bytes]`` of type ``target``.

    ``importance`` is float32 ``[row_len]`` or ``[rows, row_len]`` and used by CCQ types only, ``threads`` <= 0 means
    one per CPU.  The rows must be whole blocks of ``target`` and finite.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    if is_ccq(target):
        # Imported here because plain conversions need no compiled kernels.
        import ccq_backend

        layout = layouts.by_name(target)
        weights = error_weights(x, importance, layout)
        raised = x * target_gain(layout, importance is not None)
        blocks: NDArray[np.uint8] = ccq_backend.encode(
            layout, raised, importance=weights, threads=threads, effort=effort
        )
        return blocks
    if target == "f32":
        return x.view(np.uint8)
    if target == "f16":
        return x.astype("<f2").view(np.uint8)
    quant_type = gguf.GGMLQuantizationType[target.upper()]
    return np.ascontiguousarray(gguf.quants.quantize(x, quant_type)).view(np.uint8).reshape(x.shape[0], -1)

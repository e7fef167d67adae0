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
) -> NDArray[np.float32] | None:
    """Weights of the squared error of each element of ``x`` (float32 ``[rows, row_len]``): float32 of the same shape or
    of that of ``importance`` (``[row_len]`` or ``[rows, row_len]``), or ``None``, all alike.

    T types: ``importance^(3/4)``.  P types: ``importance^(1/2)`` times :func:`magnitude_weights`, much as llama.cpp's.

    ``ggml_ccq_quantize`` in ``backend/fork/base.cpp`` does the same, for llama-quantize.

    Measured: mean KL divergence of CCQ_T2 from f32 with the gain of :func:`target_gain` (10 k tokens, importance from
    32 k others), 16 M Llama: 0.0595, with weights ``(mean square of the row + x^2)^(1/4)`` besides 0.0630; without
    importance 0.0664 and 0.0672.  Without the gain such weights help, because large weights shrink less.
    """
    if isinstance(layout.code, layouts.TrellisCode):
        if importance is None:
            return None
        root = np.sqrt(importance, dtype=np.float32)  # roots are the same everywhere, powers are not
        return root * np.sqrt(root)
    weights = magnitude_weights(x, np.square(x, dtype=np.float32).mean(axis=1, keepdims=True, dtype=np.float64))
    if importance is not None:
        weights = weights * np.sqrt(importance, dtype=np.float32)
    return np.ascontiguousarray(weights, dtype=np.float32)


def magnitude_weights(x: NDArray[np.float32], power: NDArray[np.floating]) -> NDArray[np.float32]:
    """What an element's size adds to the weight of its error in a P type: ``sqrt(power + x^2)``, float32 like ``x``.

    ``power`` is the mean square of each row ``[rows, 1]``.  Mean KL divergence from f16 without importance, 5080
    tokens: CCQ_P2_5, 4 M Llama, 0.1362 against 0.1456 with equal weights; CCQ_P2, 16 M Llama, 0.0998 against 0.1115.
    """
    weights: NDArray[np.float32] = np.sqrt(np.square(x, dtype=np.float32) + power.astype(np.float32))
    return weights


def target_gain(layout: layouts.Layout) -> np.float32:
    """What weights are multiplied by before they are encoded: ``1 + 4^-bpw`` for a T type, 1 for the others.

    A nearest code word is shorter than its target, by about the relative squared error.  Within one matrix that is a
    small part of the error, but all matrices lose alike, and their losses add up through the model: decoded weights
    must be as large as the original ones on average, even if the noise grows with them.  Mean KL divergence from f32,
    10 k tokens (4 M: 20 k); gains of ``1 + c * 4^-bpw``:

    ==================================  ======  ======  ======  ======  ======
    Llama, data                         c = 0   0.75    1       1.25    1.5
    ==================================  ======  ======  ======  ======  ======
    CCQ_T2, 4 M, none                   0.1031          0.0903
    CCQ_T2, 4 M, importance                     0.0817  0.0821
    CCQ_T2, 16 M, none                                  0.0664  0.0653
    CCQ_T2, 16 M, importance                    0.0612  0.0595  0.0602  0.0613
    CCQ_T3, 16 M, none                  0.0156          0.0145
    CCQ_T3, 16 M, importance                    0.0137          0.0135
    ==================================  ======  ======  ======  ======  ======
    """
    if not isinstance(layout.code, layouts.TrellisCode):
        return np.float32(1)
    return np.float32(1 + 4.0**-layout.bpw)


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
        raised = x * target_gain(layout)
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

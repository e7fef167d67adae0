"""Encode tensors, and rows of float32 weights, to any target type, with and without importance or Hessians."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format import codec, layouts
from ccq_format.errors import CcqError, ImportanceError, WeightsError

from .feedback import Factors, encode_with_feedback, factorize
from .hessian import Hessians
from .host import cpu_count
from .options import QuantOptions
from .outliers import BlockErrors
from .plan import PlannedTensor
from .target_types import is_ccq

_F16_MAX = 65504.0
_LARGEST = {"f16": _F16_MAX, "q8_0": _F16_MAX * 127, "q5_0": _F16_MAX * 16, "q4_0": _F16_MAX * 8} | {
    layout.name: limit for layout in layouts.LAYOUTS if (limit := layout.code.max_weight) is not None
}
"""Largest magnitude that a type can hold; the types left out hold any float32."""


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
        weights = layout.code.error_weights(x, importance)
        raised = x * layout.code.gain(layout, weights)
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


_CHUNK_CCQ = 1 << 16
"""Weights per step and thread of a CCQ encoder: about half a second, so that Ctrl-C and the progress bar feel alive."""

_ROWS_FEEDBACK = 512
"""Rows per step with error feedback, which encodes them one block of columns at a time."""

_CHUNK_PLAIN = 1 << 22
"""Weights per step of the other types (16 MiB of float32)."""


def encoded_rows(
    tensor: PlannedTensor, options: QuantOptions, errors: BlockErrors | None = None, first: int = 0
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The tensor in its target type from row ``first`` on, a few rows at a time: (uint8 ``[rows, row_bytes]``, number
    of weights).

    ``errors``, if given, is told what they are decoded to if that is a CCQ type.

    Raises ``WeightsError`` and ``ImportanceError``.
    """
    source = tensor.source
    if source.n_weights == 0:
        yield np.empty(0, np.uint8), 0
        return
    importance = None
    if options.imatrix is not None and is_ccq(tensor.type):
        importance = options.imatrix.for_tensor(source.name, source.matrices, source.row_len)
    threads = options.threads if options.threads > 0 else cpu_count()
    searched = is_ccq(tensor.type) and not tensor.copied
    step = max(1, (_CHUNK_CCQ * threads if searched else _CHUNK_PLAIN) // source.row_len)
    if options.hessian is not None and searched and source.name in options.hessian:
        yield from _rows_with_feedback(tensor, options.hessian, threads, options.effort, errors, first)
        return
    copied = source.raw_rows if tensor.copied else None
    for start in range(first, source.rows, step):
        stop = min(start + step, source.rows)
        weights = (stop - start) * source.row_len
        if copied is not None:
            if tensor.type in ("f32", "f16", "bf16", "q8_0"):
                check_weights(source.load_rows(start, stop), tensor.type, source.name)
            data = copied(start, stop)
            if is_ccq(tensor.type):
                layout = layouts.by_name(tensor.type)
                first_block = start * source.row_len // layout.block_weights
                codec.check_blocks(layout, data, tensor=source.name, first_block=first_block)
            yield data, weights
            continue
        x = source.load_rows(start, stop)
        check_weights(x, tensor.type, source.name)
        part = None
        if importance is not None:
            part = rows_of_importance(importance, source.name, source.rows, source.row_len, start, stop)
        try:
            blocks = encode_rows(tensor.type, x, part, threads, options.effort)
        except CcqError as error:
            if error.tensor is not None:
                raise
            raise type(error)(error.reason, tensor=source.name) from error
        _note_errors(errors, x, blocks)
        yield blocks, weights


def _note_errors(errors: BlockErrors | None, x: NDArray[np.float32], blocks: NDArray[np.uint8]) -> None:
    if errors is not None and is_ccq(errors.type):
        import ccq_backend  # plain conversions need no compiled kernels

        errors.add(x, ccq_backend.decode(layouts.by_name(errors.type), blocks))


def _rows_with_feedback(
    tensor: PlannedTensor,
    hessians: Hessians,
    threads: int,
    effort: str,
    errors: BlockErrors | None,
    first: int,
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """``encoded_rows`` of a matrix, or a stack of them, that has a Hessian."""
    source = tensor.source
    per_matrix = source.rows // source.matrices
    for matrix in range(first // per_matrix, source.matrices):
        factors = _factors(tensor, hessians, matrix)
        end = (matrix + 1) * per_matrix
        for start in range(max(first, matrix * per_matrix), end, _ROWS_FEEDBACK):
            stop = min(start + _ROWS_FEEDBACK, end)
            x = source.load_rows(start, stop)
            check_weights(x, tensor.type, source.name)
            blocks = encode_with_feedback(x, factors, threads, effort)
            _note_errors(errors, x, blocks)
            yield blocks, (stop - start) * source.row_len
        del factors  # before the next ones are computed


def _factors(tensor: PlannedTensor, hessians: Hessians, matrix: int) -> Factors:
    source = tensor.source
    # In float64 from the start, and in place: 8 n^2 bytes are all that a row length of n needs.
    product, count = hessians.product(source.name, source.matrices, source.row_len, matrix, dtype=np.float64)
    try:
        layout = layouts.by_name(tensor.type)
        return factorize(product, layout, count=count, depth=hessians.depth, overwrite=True)
    except ImportanceError as error:
        raise ImportanceError(error.reason, file=hessians.file, tensor=source.name) from error

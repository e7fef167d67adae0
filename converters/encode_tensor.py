"""Encode a tensor of a plan, a few rows at a time, so that memory stays small and a user sees progress."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ccq_format import codec, layouts
from ccq_format.errors import CcqError, ImportanceError

from .encode import check_weights, decode_rows, encodable, encode_rows, on_gpu, rows_of_importance
from .feedback import Factors, encode_with_feedback, factorize
from .hessian import Hessians
from .host import cpu_count
from .options import QuantOptions
from .outliers import BlockErrors
from .plan import PlannedTensor
from .target_types import is_ccq

_CHUNK_CCQ = 1 << 16
"""Weights per step and thread of a CCQ encoder: about half a second, so that Ctrl-C and the progress bar feel alive."""

_CHUNK_GPU = 1 << 24
"""Weights per step of a GPU's encoder, which needs many at a time."""

_ROWS_FEEDBACK, _ROWS_FEEDBACK_GPU = 512, 2048
"""Rows per step with error feedback, which encodes them one block of columns at a time."""

_CHUNK_PLAIN = 1 << 22
"""Weights per step of the other types (16 MiB of float32)."""


def encoded_rows(
    tensor: PlannedTensor, options: QuantOptions, errors: BlockErrors | None = None, first: int = 0
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The tensor in its target type from row ``first`` on, a few rows at a time: (uint8 ``[rows, row_bytes]``, number
    of weights).

    ``errors``, if given, is told what they are decoded to if the type is searched, or rounds weights so small that a
    scale may be too coarse.

    Raises ``WeightsError`` and ``ImportanceError``.
    """
    source = tensor.source
    if source.n_weights == 0:
        yield np.empty(0, np.uint8), 0
        return
    importance = None
    if options.imatrix is not None and tensor.searched:
        importance = options.imatrix.for_tensor(source.name, source.matrices, source.row_len)
    threads = options.threads if options.threads > 0 else cpu_count()
    at_once = _CHUNK_GPU if on_gpu(tensor.type, options.device) else _CHUNK_CCQ * threads
    step = max(1, (at_once if tensor.searched else _CHUNK_PLAIN) // source.row_len)
    if options.hessian is not None and tensor.searched and source.name in options.hessian:
        yield from _rows_with_feedback(tensor, options.hessian, threads, options, errors, first)
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
            blocks = encode_rows(tensor.type, x, part, threads, options.effort, options.device)
        except CcqError as error:
            if error.tensor is not None:
                raise
            raise type(error)(error.reason, tensor=source.name) from error
        _note_errors(errors, x, blocks)
        yield blocks, weights


def _note_errors(errors: BlockErrors | None, x: NDArray[np.float32], blocks: NDArray[np.uint8]) -> None:
    if errors is None or errors.type in ("f32", "bf16"):
        return
    if encodable(errors.type) is None and errors.passes_over(x):  # decoding takes longer than encoding did
        return
    errors.add(x, decode_rows(errors.type, blocks))


def _rows_with_feedback(
    tensor: PlannedTensor,
    hessians: Hessians,
    threads: int,
    options: QuantOptions,
    errors: BlockErrors | None,
    first: int,
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """``encoded_rows`` of a matrix, or a stack of them, that has a Hessian."""
    source = tensor.source
    per_matrix = source.rows // source.matrices
    rows = _ROWS_FEEDBACK_GPU if on_gpu(tensor.type, options.device) else _ROWS_FEEDBACK
    for matrix in range(first // per_matrix, source.matrices):
        factors = _factors(tensor, hessians, matrix)
        end = (matrix + 1) * per_matrix
        for start in range(max(first, matrix * per_matrix), end, rows):
            stop = min(start + rows, end)
            x = source.load_rows(start, stop)
            check_weights(x, tensor.type, source.name)
            blocks = encode_with_feedback(x, factors, threads, options.effort, options.device)
            _note_errors(errors, x, blocks)
            yield blocks, (stop - start) * source.row_len
        del factors  # before the next ones are computed


def _factors(tensor: PlannedTensor, hessians: Hessians, matrix: int) -> Factors:
    source = tensor.source
    # In float64 from the start, and in place: 8 n^2 bytes are all that a row length of n needs.
    product, count = hessians.product(source.name, source.matrices, source.row_len, matrix, dtype=np.float64)
    try:
        layout = encodable(tensor.type)
        assert layout is not None
        return factorize(product, layout, count=count, depth=hessians.depth, overwrite=True)
    except ImportanceError as error:
        raise ImportanceError(error.reason, file=hessians.file, tensor=source.name) from error

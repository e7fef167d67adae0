"""Error feedback (GPTQ, LDLQ): later columns of a matrix make up for what encoding earlier ones has lost.

A row's error ``e = w - decoded`` counts as ``e H e^T``, H being the products ``X^T X`` of the matrix's inputs, damped.
With ``H = U diag(d) U^T``, U unit upper triangular, that is ``sum_j d_j ((e U)_j)^2``: the error of column j counts
together with what the errors before it have left there.  Columns are taken in their order, a block
of the type at a time.  What earlier blocks left is added to the block's target.  Inside a block of a T type the trellis
search itself follows the errors along each of its ways (``coupling`` of ``ccq_backend.encode``), and the types of
llama.cpp's that we encode round weight by weight; the P types
only know weights of the squared error, which are then the diagonal of H given all later columns.

Rows are independent and products of errors with U are exact in float64 (both factors are rounded to 22 bits), so the
bytes depend neither on how many rows are encoded at a time nor on the number of threads.

Measured: mean KL divergence of CCQ_T2 from f32 with all matrices of a 4 M Llama encoded (10240 tokens; inputs of 65 k
others): 0.0810 with importance alone, 0.0657 with feedback between blocks (at a gain of 1), 0.0561 with feedback inside
them as well (by a slower search with about as much error).  Blocks in the order of decreasing activations leave 1 to
2 % less to the last columns than blocks in their own order: not worth a permutation.  Hessians in which each token
counts by its mean squared gradient at the outputs (GuidedQuant, arXiv 2505.07004, with one group) are no better (16 M
Llama: 0.0464 against 0.0463), nor those in which the inputs of attention's output and of FFN down count by the mean
square of the hidden state that the result is added to (SmolLM2-135M: 0.745 and 0.848 against 0.689 and 0.846 on
technical English and on a novel).

A Hessian knows what its text was: of 64 k tokens of technical English it gives SmolLM2-135M 0.52 on such text and 1.30
on a novel, where importance alone of the same text gives 0.95 and 1.16; of 24 k tokens of the mixed text that comes
with the package 0.57 and 0.72.

Sources: Frantar et al., arXiv 2210.17323 (GPTQ); Chee et al., arXiv 2307.13304 (LDLQ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts
from ccq_format.blocks import Encodable
from ccq_format.errors import ImportanceError

from .encode import decode_rows, encode_blocks

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

DAMPING = 0.01
"""What is added to the diagonal of a Hessian, relative to its mean."""

SHRINKAGE = 0.16
"""By how much the values off the diagonal of a Hessian are lowered (shrinkage towards the diagonal).

Mean KL divergence from f32 without it, with 0.09 and with 0.2 (10 to 20 k tokens, effort fast): CCQ_T2 of a 4 M Llama
0.0612, 0.0569, 0.0562, CCQ_T2_5 0.0272, 0.0258, 0.0261; CCQ_T2 of a 16 M Llama 0.0463, 0.0434, 0.0442.  More damping
does the same (0.1: 0.0550, 0.0258, 0.0440; 0.25: 0.0565, 0.0254, 0.0420), but drowns ordinary channels where a few have
most of the mean.  On text of other kinds than the Hessian's more helps: SmolLM2-135M, 0.125 and 0.3: technical English
0.689 and 0.691, a novel 0.846 and 0.798.
"""


def gain_strength(depth: int | None) -> float:
    """What a type's gain above 1 (``Code.gain``) is multiplied by in a model of ``depth`` layers: ``2.8 /
    sqrt(depth)``, at most 1.4; 1 if the depth is not known.

    Weights that are as large as the original ones on average pass everything on, the errors of the layers before them
    as well.  With few layers, and so little error, that is right; where much error comes in, the best prediction of the
    outputs is smaller.  Mean KL divergence of CCQ_T2, effort fast; 16 M Llama (4 layers), 10 k tokens, shrinkage 0.125,
    and SmolLM2-135M (30 layers), 2 k tokens each of technical English and of a novel, shrinkage 0.2:

    ========  =======  ==========================
    strength  16 M     SmolLM2, technical / novel
    ========  =======  ==========================
    0         0.0440   0.576 / 0.705
    0.5                0.571 / 0.721
    1         0.0358   0.727 / 0.776
    1.4       0.0335
    ========  =======  ==========================
    """
    return 1.0 if not depth else min(1.4, 2.8 / math.sqrt(depth))


_GROUP = layouts.GROUP
_STRIP = 512
"""Rows of H that are updated at a time."""

_BITS = 22
"""Bits of the factors of a product: 64 products of two such numbers are exact in float64."""


@dataclass(frozen=True)
class Factors:
    """What feedback needs of one Hessian.

    ``spread``: float64 ``[n, n]``, of which the part right of the block diagonal is used: what an error in the row's
    column adds to the target of each later column.  ``weights``: float32 ``[n]``, of each column's squared error, the
    largest is 1.  ``coupling``: float32 ``[n / block, block, block]``, for ``ccq_backend.encode``; ``None`` for P
    types.  ``gain``: float32 ``[n]``, what targets are multiplied by.
    """

    layout: Encodable
    spread: F64
    weights: F32
    coupling: F32 | None
    gain: F32


def factorize(
    hessian: NDArray[np.floating],
    layout: Encodable,
    *,
    count: float = math.inf,
    damping: float = DAMPING,
    shrinkage: float = SHRINKAGE,
    depth: int | None = None,
    overwrite: bool = False,
) -> Factors:
    """Factors of a Hessian ``[n, n]`` (any positive factor on it cancels out) for rows of n weights in type ``layout``.

    Its values off the diagonal are multiplied by ``1 - shrinkage``, and by ``count / (count + n / 8)`` where ``count``
    is the number of inputs it was measured on: few inputs (of an expert that is rarely chosen) seem to depend on each
    other where they do not.  A Hessian of zeros (inputs that never occurred) counts as the identity.  ``depth`` is the
    number of the model's layers (see :func:`gain_strength`).

    Raises ``ImportanceError`` if the Hessian is not finite, not symmetric or not positive semidefinite, or if n is no
    multiple of the type's block.  Takes n^3 / 3 multiplications and, with ``overwrite``, which factorizes a float64
    Hessian in its place, ``n^2`` bytes for a moment besides its ``8 n^2``; without it ``8 n^2`` more.
    """
    n = hessian.shape[0]
    if hessian.shape != (n, n) or n == 0 or n % layout.block_weights:
        raise ImportanceError(f"a Hessian of shape {list(hessian.shape)} does not fit blocks of {layout.block_weights}")
    diagonal = np.diagonal(hessian).astype(np.float64)
    if not np.isfinite(hessian).all():
        raise ImportanceError("its Hessian holds NaN or infinity")
    if (diagonal < 0).any():
        raise ImportanceError("its Hessian has a negative value on the diagonal")
    mean = float(diagonal.mean())
    rest: F64 = np.asarray(hessian, np.float64) if overwrite else np.array(hessian, np.float64)
    _check_symmetric(rest, mean)
    if mean == 0:
        rest[:] = 0
        mean = 1.0
    rest *= (1 - shrinkage) * (count / (count + n / 8) if math.isfinite(count) else 1) / mean
    rest[np.diag_indices(n)] = (diagonal if diagonal.any() else 1.0) / mean + damping
    size = layout.block_weights
    weights = np.empty(n)
    coupling = np.zeros((n // size, size, size), np.float32) if layout.code.couples else None
    # From the last block to the first: what remains of H up to column `stop` is H given the columns after it.
    for start in range(n - size, -1, -size):
        stop = start + size
        upper = _upper_factor(rest[start:stop, start:stop])
        scale = np.diagonal(upper)
        if coupling is not None:
            weights[start:stop] = scale**2
            coupling[start // size] = np.triu(upper / scale, 1)
        else:
            weights[start:stop] = np.diagonal(rest[start:stop, start:stop])
        if start:
            inverse = np.linalg.inv(upper)
            part = rest[:start, start:stop] @ inverse.T
            # Nothing left of the diagonal is used again; in strips, because the whole product is as large as H.
            for first in range(0, start, _STRIP):
                last = min(first + _STRIP, start)
                rest[first:last, first:start] -= part[first:last] @ part[first:].T
            rest[:start, start:stop] = part @ inverse
    strip = min(size, _GROUP)
    for start in range(0, n - size, strip):
        first = start // size * size + size
        rest[start : start + strip, first:] = _rounded(rest[start : start + strip, first:], axis=0)
    weights = (weights / weights.max()).astype(np.float32)
    gain = np.broadcast_to(1 + np.float32(gain_strength(depth)) * (layout.code.gain(layout, weights) - 1), n)
    return Factors(layout, rest, weights, coupling, gain)


def _check_symmetric(hessian: F64, mean: float) -> None:
    n = len(hessian)
    for start in range(0, n, 256):
        part = hessian[start : start + 256]
        # float32 sums of the same products in another order differ by far less.
        if np.abs(part - hessian[:, start : start + 256].T).max() > 1e-3 * max(mean, np.abs(part).max()):
            raise ImportanceError("its Hessian is not symmetric")


def _upper_factor(block: F64) -> F64:
    """The upper triangular U with ``U U^T = block``."""
    try:
        factor: F64 = np.asarray(np.linalg.cholesky(block[::-1, ::-1])[::-1, ::-1], np.float64)
    except np.linalg.LinAlgError:
        raise ImportanceError("its Hessian is not positive semidefinite") from None
    return factor


def _rounded(x: F64, axis: int) -> F64:
    """``x`` to multiples of the power of two that leaves ``_BITS`` bits to the largest value along ``axis``."""
    _, exponent = np.frexp(np.abs(x).max(axis=axis, keepdims=True, initial=0.0))
    unit = np.ldexp(1.0, exponent - _BITS)
    rounded: F64 = np.rint(x / unit) * unit
    return rounded


def encode_with_feedback(
    x: F32, factors: Factors, threads: int = 0, effort: str = "default", device: str = "cpu"
) -> NDArray[np.uint8]:
    """Encode float32 ``[rows, n]`` (finite) to uint8 ``[rows, row_bytes]`` of the type of ``factors``.

    ``threads`` <= 0 means one per CPU.  The same bytes for any split of the rows, any number of threads and either
    ``device``: blocks are encoded there, errors spread here, in float64.
    """
    layout, size = factors.layout, factors.layout.block_weights
    rows, n = x.shape
    power = np.square(x, dtype=np.float64).mean(axis=1, keepdims=True)
    target = x.astype(np.float64)
    out = np.empty((rows, n // size, layout.block_bytes), np.uint8)
    for start in range(0, n, size):
        stop = start + size
        block = target[:, start:stop].astype(np.float32)
        weights, coupling = factors.weights[start:stop], None
        own = layout.code.size_weights(block, power)
        if own is not None:
            weights = (own * weights).astype(np.float32)
        if factors.coupling is not None and factors.coupling[start // size].any():
            coupling = factors.coupling[start // size][None]
        raised = block * factors.gain[start:stop]
        codes = encode_blocks(layout, raised, weights, threads, effort, device, coupling)
        out[:, start // size] = codes
        if stop == n:
            break
        error = x[:, start:stop].astype(np.float64) - decode_rows(layout.name, codes)
        for first in range(0, size, _GROUP):
            part = _rounded(error[:, first : first + _GROUP], axis=1)
            target[:, stop:] += part @ factors.spread[start + first : min(start + first + _GROUP, stop), stop:]
    return out.reshape(rows, -1)

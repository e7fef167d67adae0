"""Weights that their block cannot hold: one so large that the others of its block are lost, or all too small.

A block of 64 weights of a T type has one scale.  A weight of k times the others' deviation stretches it, and its codes
have a few bits for each of the others.  The block's squared error, as a part of their power (Gaussian, effort fast):

=====  ========  ======  ========  ======  ======  =====  =====
k      CCQ_T1_5  CCQ_T2  CCQ_T2_5  CCQ_T3  iq4_nl  q5_0   q8_0
=====  ========  ======  ========  ======  ======  =====  =====
4      0.22      0.11    0.06      0.03    0.01    0.00   0.00
8      0.55      0.32    0.18      0.09    0.03    0.01   0.00
16     1.9       1.2     0.67      0.34    0.09    0.04   0.00
50     17        11      7.0       3.6     0.47    0.34   0.01
=====  ========  ======  ========  ======  ======  =====  =====

The stock types on the ladder give the largest weight of 32 a code of its own and can at worst lose the 31 beside it.
At k = 8 a weight has as much power as the 63 others together: that is an outlier here; of Gaussian weights one in
2 * 10^10 is.

A few do no harm, whatever they cost their block: the errors of a matrix add up.  A matrix is said to suffer when its
blocks with outliers lose more than all the others together: its error has then doubled, which is what half a bit per
weight is worth.  In SmolLM2-135M and gemma-3-270m up to 0.7 and 1.7 % of a matrix's blocks have outliers, with up to 1
and 6 % of its power (gemma's embedding: 2.9 % of the blocks, 10 % of the power); none suffers.

The smallest scale of a T block other than 0 is 9 * 2^-30, and its levels have a deviation of 52: of weights with a
deviation under 1e-7 most is lost, from 5e-7 on nothing.  Scales of q8_0, iq4_nl, q5_0 and q4_0 are f16: they lose all
that is under 1e-6, 5e-7, 1e-7 and 3e-8, f16 itself all under 1e-8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts

from .target_types import is_ccq
from .tensors import TensorSource

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

log = logging.getLogger(__name__)

SMALL, TOO_SMALL = 1e-5, 0.5
"""Weights of a smaller root mean square count as too small for their type if their relative squared error is this.

The error alone does not tell: error feedback and skewed importance give one bit per weight larger ones.  No trained
matrix is so small."""

A_FIFTH = 0.2
"""The power of the blocks with outliers over that of all others up to which no tensor suffers.

The T types, by size, lose at most 0.42, 0.29, 0.18 and 0.09 of such a block's power, whatever k is (11 * 63 of
2500 + 63 for CCQ_T2 and k = 50), and 0.141, 0.071, 0.036 and 0.018 of the others': the former outweighs the latter from
0.34, 0.24, 0.2 and 0.2 on."""

_CHUNK = 1 << 22
"""Weights that are looked at at a time: 16 MiB."""

_GROUP = layouts.GROUP


def block_powers(x: F32, group: int = _GROUP) -> tuple[F64, NDArray[np.bool_]]:
    """Of float32 ``[rows, n]``, n being whole blocks of ``group``: the power (sum of squares) of each block, float64
    ``[blocks]``, and whether half of it or more is that of one weight."""
    blocks = x.reshape(-1, group)
    powers = np.einsum("bi,bi->b", blocks, blocks, dtype=np.float64)
    largest = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)).astype(np.float64)
    return powers, (powers > 0) & (2 * largest**2 >= powers)


def outlier_powers(source: TensorSource) -> tuple[F64, float]:
    """Of each row of a tensor whose rows are whole blocks of 64 the power of its blocks with outliers, float64
    ``[rows]``, and the power of all other blocks together.  Reads the whole tensor."""
    per_row, others = np.zeros(source.rows), 0.0
    step = max(1, _CHUNK // source.row_len)
    for start in range(0, source.rows, step):
        stop = min(start + step, source.rows)
        powers, outliers = block_powers(np.ascontiguousarray(source.load_rows(start, stop)))
        per_row[start:stop] = (powers * outliers).reshape(stop - start, -1).sum(axis=1)
        others += float(powers[~outliers].sum())
    return per_row, others


@dataclass
class BlockErrors:
    """Sums over the weights of one tensor that are encoded so far: ``power`` of squares, ``error`` of squared errors,
    ``outlier_error`` of those in the ``outliers`` blocks that have one; ``worst`` is the largest squared error of a
    block.  Blocks are those that share a scale: 64 weights of our types, 32 of llama.cpp's; rows of f16."""

    tensor: str
    type: str
    weights: int = 0
    blocks: int = 0
    power: float = 0.0
    error: float = 0.0
    outliers: int = 0
    outlier_error: float = 0.0
    worst: float = 0.0

    def passes_over(self, x: F32) -> bool:
        """Whether rows, float32 ``[rows, n]``, are large enough for any scale; they are noted as without an error."""
        power = float(np.vdot(x, x))
        if power < SMALL**2 * x.size:
            return False
        self.weights += x.size
        self.power += power
        return True

    def add(self, x: F32, decoded: F32) -> None:
        """Some rows, float32 ``[rows, n]``, and what became of them."""
        group = _GROUP if is_ccq(self.type) else 32 if x.shape[1] % 32 == 0 else x.shape[1]
        powers, outliers = block_powers(x, group)
        error = (decoded - x).reshape(-1, group)
        errors = np.einsum("bi,bi->b", error, error, dtype=np.float64)
        self.weights += x.size
        self.blocks += len(powers)
        self.power += float(powers.sum())
        self.error += float(errors.sum())
        self.outliers += int(outliers.sum())
        self.outlier_error += float(errors[outliers].sum())
        self.worst = max(self.worst, float(errors.max(initial=0.0)))

    @property
    def relative(self) -> float:
        """Squared error over power; 0 for zeros."""
        return self.error / self.power if self.power else 0.0

    @property
    def worst_relative(self) -> float:
        """The squared error of the worst block over the tensor's mean power of a block."""
        return self.worst * self.blocks / self.power if self.power else 0.0

    @property
    def too_small(self) -> bool:
        """Whether most of the tensor is lost because its scales are that coarse."""
        return self.relative >= TOO_SMALL and self.power < SMALL**2 * self.weights

    @property
    def suffers(self) -> bool:
        """Whether blocks with outliers lose more than all others together, of a type of ours: llama.cpp's of 4 bits and
        more lose little all the same."""
        return is_ccq(self.type) and self.outlier_error > self.error / 2


class Report:
    """What is said of the tensors of a conversion: each in the log, and at the end, if there are any, the bad ones."""

    def __init__(self) -> None:
        self._suffering: list[BlockErrors] = []
        self._too_small: list[BlockErrors] = []

    def add(self, errors: BlockErrors) -> None:
        """Note a tensor that is done."""
        if not errors.blocks:
            return
        log.debug(
            "%s: %s, squared error %.4f of its power, worst block %.3g of the mean block's power, "
            "%d blocks with outliers",
            errors.tensor,
            errors.type,
            errors.relative,
            errors.worst_relative,
            errors.outliers,
        )
        if errors.too_small:
            self._too_small.append(errors)
        elif errors.suffers:
            self._suffering.append(errors)

    def finish(self) -> None:
        """Warn, in a line each, of the tensors that lose most to outliers and of those that are too small."""
        if self._suffering:
            names = _worst(self._suffering, lambda e: e.worst_relative, "worst block %.3g times the mean block's power")
            log.warning(
                "%d tensors lose more in blocks with outliers than in all others; a larger type with --tensor-type "
                "helps: %s",
                len(self._suffering),
                names,
            )
        if self._too_small:
            names = _worst(self._too_small, lambda e: e.relative, "%.2f of its power lost")
            log.warning(
                "the weights of %d tensors are too small for their type; --tensor-type NAME=bf16 keeps them: %s",
                len(self._too_small),
                names,
            )


def _worst(tensors: list[BlockErrors], key: Callable[[BlockErrors], float], text: str) -> str:
    """The three with the largest ``key``, and that."""
    first = sorted(tensors, key=key, reverse=True)[:3]
    more = [f"and {len(tensors) - len(first)} more"] if len(tensors) > len(first) else []
    return ", ".join([*(f"{e.tensor} ({e.type}, {text % key(e)})" for e in first), *more])

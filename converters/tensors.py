"""The tensors of a model to convert, whatever it is stored in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

EXPERTS = re.compile(r"_(ch)?exps\.weight$")

LoadRows = Callable[[int, int], NDArray[np.float32]]

RawRows = Callable[[int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class TensorSource:
    """One tensor to convert.

    ``name`` is its GGUF name and ``shape`` its shape in numpy order (row length last).  Rows are the tensor reshaped
    to ``[prod(shape[:-1]), shape[-1]]`` (a 1-D tensor is one row): ``load_rows(start, stop)`` returns them as float32
    ``[stop - start, row_len]``, ``raw_rows(start, stop)``, if given, their stored bytes as uint8
    ``[stop - start, row_bytes]`` in type ``source_type`` (a lower-case type name), little-endian as in GGUF.  The
    bytes are copied unchanged where the target type is ``source_type``.
    """

    name: str
    shape: tuple[int, ...]
    load_rows: LoadRows
    source_type: str
    raw_rows: RawRows | None = None

    @property
    def row_len(self) -> int:
        """Weights per row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows, expert matrices stacked."""
        return prod(self.shape[:-1])

    @property
    def matrices(self) -> int:
        """Matrices stacked in the tensor."""
        return prod(self.shape[:-2])

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

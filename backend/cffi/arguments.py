"""What the interfaces to the CPU's and the CUDA kernels take alike: types, and rows of blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ccq_format import errors, layouts, stock
from ccq_format.blocks import Encodable

from ._ccq import lib

F32 = npt.NDArray[np.float32]

EFFORTS: dict[str, int] = {
    "fast": lib.CCQ_EFFORT_FAST,
    "default": lib.CCQ_EFFORT_DEFAULT,
    "best": lib.CCQ_EFFORT_BEST,
}
"""How far the encoder searches, by name."""


def layout_of(type: str | layouts.Layout) -> layouts.Layout:
    """The layout of a type that is given by name or as one.  Raises ``BackendError``."""
    if isinstance(type, layouts.Layout):
        return type
    try:
        return layouts.by_name(type)
    except KeyError:
        raise errors.BackendError(f"'{type}' is no CCQ type") from None


def encodable_of(type: str | Encodable) -> Encodable:
    """The type of that name, of ours or of llama.cpp's that are encoded here as well.  Raises ``BackendError``."""
    if isinstance(type, str):
        return stock.ENCODABLE.get(type) or layout_of(type)
    return type


def row_weights(layout: layouts.Layout, row_bytes: int) -> int:
    """How many weights rows of ``row_bytes`` have.  Raises ``ShapeError``."""
    count, rest = divmod(row_bytes, layout.block_bytes)
    if rest:
        raise errors.ShapeError(f"{row_bytes} bytes per row are no multiple of {layout.block_bytes} ({layout.name})")
    return count * layout.block_weights


def effort_number(effort: str) -> int:
    """The ``ccq_effort`` of a name.  Raises ``BackendError``."""
    if effort not in EFFORTS:
        raise errors.BackendError(f"'{effort}' is no effort; there are {', '.join(EFFORTS)}")
    return EFFORTS[effort]


def matrix(array: npt.ArrayLike, dtype: npt.DTypeLike, what: str) -> npt.NDArray[Any]:
    """A contiguous array of two dimensions.  Raises ``ShapeError``."""
    a: npt.NDArray[Any] = np.ascontiguousarray(array, dtype=dtype)
    if a.ndim != 2:
        raise errors.ShapeError(f"{what} must have two dimensions, not {a.ndim}")
    return a


class EncoderArrays(NamedTuple):
    """What an encoder gets: contiguous float32 arrays of shapes that fit each other and the type."""

    weights: F32
    importance: F32 | None
    coupling: F32 | None

    @classmethod
    def of(
        cls,
        layout: Encodable,
        weights: npt.ArrayLike,
        importance: npt.ArrayLike | None,
        coupling: npt.ArrayLike | None,
    ) -> EncoderArrays:
        """Check the arguments of ``ccq_backend.encode``.  Raises ``ShapeError``, ``ImportanceError``."""
        w = matrix(weights, np.float32, "weights")
        rows, cols = w.shape
        try:
            layout.row_bytes(cols)
        except ValueError as e:
            raise errors.ShapeError(str(e)) from None
        imp = u = None
        if importance is not None:
            imp = np.ascontiguousarray(importance, np.float32)
            if imp.shape not in ((cols,), (rows, cols)):
                raise errors.ImportanceError(f"importance has shape {imp.shape}, weights have {w.shape}")
        if coupling is not None:
            u = np.ascontiguousarray(coupling, np.float32)
            size = layout.block_weights
            if u.shape != (cols // size, size, size):
                raise errors.ShapeError(f"coupling has shape {u.shape}, not {(cols // size, size, size)}")
        return cls(w, imp, u)

    @property
    def importance_stride(self) -> int:
        """Floats from one row's importance to the next."""
        return self.weights.shape[1] if self.importance is not None and self.importance.ndim == 2 else 0

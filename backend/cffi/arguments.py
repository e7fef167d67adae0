"""What the interfaces to the CPU's and the CUDA kernels take alike: types, and rows of blocks."""

from __future__ import annotations

from ccq_format import errors, layouts


def layout_of(type: str | layouts.Layout) -> layouts.Layout:
    """The layout of a type that is given by name or as one.  Raises ``BackendError``."""
    if isinstance(type, layouts.Layout):
        return type
    try:
        return layouts.by_name(type)
    except KeyError:
        raise errors.BackendError(f"'{type}' is no CCQ type") from None


def row_weights(layout: layouts.Layout, row_bytes: int) -> int:
    """How many weights rows of ``row_bytes`` have.  Raises ``ShapeError``."""
    count, rest = divmod(row_bytes, layout.block_bytes)
    if rest:
        raise errors.ShapeError(f"{row_bytes} bytes per row are no multiple of {layout.block_bytes} ({layout.name})")
    return count * layout.block_weights

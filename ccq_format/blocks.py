"""What a tensor type is: fields of a block, and the code that gives their bytes a meaning.

A type is one :class:`Layout` whose ``code`` is an object that knows all that depends on the kind of code; nothing
else asks for the kind.  The table of types is ``layouts.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

GROUP = 64
"""Weights that share one scale, in every type (CCQ_T1: two groups in a row do)."""


@dataclass(frozen=True)
class Field:
    """One field of a block: ``count`` little-endian elements of ``dtype`` (u8, u16, bf16 or f32)."""

    name: str
    dtype: str
    count: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {"u8": 1, "u16": 2, "bf16": 2, "f32": 4}[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""
        return self.itemsize * self.count


class Encodable(Protocol):
    """A type as an encoder sees it."""

    @property
    def name(self) -> str:
        """Lower case."""

    @property
    def gguf_id(self) -> int:
        """Tensor type id in GGUF."""

    @property
    def block_weights(self) -> int:
        """Weights of one block."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""

    @property
    def bpw(self) -> float:
        """Bits per weight."""

    @property
    def code(self) -> Encoding:
        """What errors of the type are like."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` weights.  Raises ``ValueError`` if the row is no whole number of blocks."""


class Encoding(Protocol):
    """How a type is encoded with a small error."""

    couples: ClassVar[bool]
    """Whether the native encoder follows the errors inside a block (``coupling`` of ``ccq_backend.encode``)."""

    @property
    def max_weight(self) -> float | None:
        """The largest magnitude that a weight can have; ``None`` if that is float32's."""

    def error_weights(self, x: F32, importance: F32 | None) -> F32 | None:
        """Weights of the squared errors of ``x`` ``[rows, row_len]`` given the importance of its channels
        (``[row_len]`` or ``[rows, row_len]``): float32 of the shape of one of them, or ``None``: all alike."""

    def size_weights(self, x: F32, power: npt.NDArray[np.floating]) -> F32 | None:
        """What an element's own size adds to the weight of its error, float32 like ``x``, or ``None``: nothing;
        ``power`` is the mean square of each row ``[rows, 1]``."""

    def gain(self, layout: Encodable, weights: F32 | None) -> F32:
        """What weights are multiplied by before they are encoded: float32 of the shape of ``weights``, those of their
        squared errors (``[row_len]`` or ``[rows, row_len]``), or ``[1]``."""


class Code(Encoding, Protocol):
    """The code of a type.  Blocks are uint8 ``[n, block_bytes]``, their weights float32 ``[n, block_weights]``."""

    family: ClassVar[str]
    """Codes of one kind: the name of their list in ``backend/core/layouts.h`` and of their table in the spec."""

    spec_head: ClassVar[tuple[str, ...]]
    """Headings of that table, after the type's name."""

    def constants(self) -> dict[str, object]:
        """The constants as ``backend/core/layouts.h`` names them."""

    def spec_row(self) -> list[object]:
        """The constants as the spec's table shows them, one for each heading."""

    def decode(self, layout: Layout, blocks: U8) -> F32:
        """The weights.  Every byte string has a meaning."""

    def fault(self, layout: Layout, blocks: U8) -> tuple[int, str] | None:
        """The first block that no encoder may write and what is wrong with it (``{}`` stands for the block's number in
        the tensor), or ``None``."""

    def encode(self, layout: Layout, target: F32, cost: npt.NDArray[np.float64], scales: Any) -> U8:
        """The blocks with the least ``sum(cost * (target - decoded)**2)`` for given scales.  Raises ``ValueError``."""


def row_bytes(kind: Encodable, columns: int) -> int:
    """``Encodable.row_bytes`` of all types."""
    if columns % kind.block_weights:
        raise ValueError(f"row length {columns} is no multiple of {kind.block_weights}, the block of {kind.name}")
    return columns // kind.block_weights * kind.block_bytes


@dataclass(frozen=True)
class Layout:
    """One tensor type: its name and id in GGUF, the bytes of a block, and the code that gives them a meaning."""

    name: str
    gguf_id: int
    block_weights: int
    fields: tuple[Field, ...]
    code: Code

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return sum(f.nbytes for f in self.fields)

    @property
    def groups(self) -> int:
        """Groups of 64 weights in one block."""
        return self.block_weights // GROUP

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_weights

    def has(self, field: str) -> bool:
        """Whether a block has a field of this name."""
        return any(f.name == field for f in self.fields)

    def offset(self, field: str) -> int:
        """Byte offset of a field in the block.  Raises ``KeyError`` for an unknown name."""
        at = 0
        for f in self.fields:
            if f.name == field:
                return at
            at += f.nbytes
        raise KeyError(field)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` weights.  Raises ``ValueError`` if the row is no whole number of blocks."""
        return row_bytes(self, columns)


_DTYPES = {"u8": "u1", "u16": "<u2", "bf16": "<u2", "f32": "<f4"}


def get(layout: Layout, blocks: np.ndarray, name: str) -> np.ndarray:
    """One field of ``[n, block_bytes]`` blocks: ``[n, count]`` (bf16 as uint16 bits)."""
    field = next(field for field in layout.fields if field.name == name)
    at = layout.offset(name)
    return np.ascontiguousarray(blocks[:, at : at + field.nbytes]).view(_DTYPES[field.dtype])


def put(layout: Layout, blocks: np.ndarray, name: str, values: np.ndarray) -> None:
    """Store ``[n, count]`` values of the field's own type into blocks."""
    at = layout.offset(name)
    raw = np.ascontiguousarray(values).view(np.uint8)
    blocks[:, at : at + raw.shape[1]] = raw

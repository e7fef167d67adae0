"""The one table of CCQ tensor types.

Every other description of a type -- numpy dtype, C structs and constants (``backend/core/layouts.h``), the tables in
``spec/ccq.md`` -- is derived from the rows below by ``backend/gen.py`` or computed from them at run time.  The one
thing written by hand a second time is the decoder in ``spec/reference``, on purpose: a wrong table must not agree
with itself.  Section numbers refer to ``spec/ccq.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SPEC_VERSION = (0, 1)
"""MAJOR.MINOR of the binary format that this package reads and writes (spec section 1)."""

GROUP = 64
"""Weights that share one scale, in every type."""


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


@dataclass(frozen=True)
class TrellisCode:
    """Constants of a tail-biting trellis code (spec section 5, types CCQ_T*).

    Weight ``t`` of a block is ``scale * level(u_t)``, where ``u_t`` are ``window_bits`` bits of the block's cyclic bit
    string starting at bit ``offsets[t]``; ``strides`` is the repeating number of bits from one window to the next.
    """

    strides: tuple[int, ...]
    multiplier: int
    window_bits: int = 12
    hash_bits: int = 16
    field_mask: int = 0x7F
    field_shift: int = 8
    level_offset: int = 127
    scale_exponent_bias: int = 30

    @property
    def code_bits(self) -> int:
        """Bits of one block's cycle."""
        return sum(self.strides) * GROUP // len(self.strides)

    @property
    def max_weight(self) -> float:
        """The largest weight that a block can hold: level 127 at the scale of byte 255."""
        return self.level_offset * 15 * 2.0 ** (31 - self.scale_exponent_bias)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Bit offset of every window of a block."""
        out, at = [], 0
        for step in range(GROUP):
            out.append(at)
            at += self.strides[step % len(self.strides)]
        return tuple(out)


@dataclass(frozen=True)
class PaperCode:
    """Constants of a convolutional code of arXiv 2507.07145 (spec section 6, types CCQ_P*).

    A code word of ``word_bits`` holds one window per entry of ``shifts`` (weight 0 first); a weight's integer is
    ``((state >> shift) & mask) - zero_point``.
    """

    word_bits: int
    shifts: tuple[int, ...]
    mask: int
    zero_point: int
    scale_bits: int
    affine_state: bool = False


@dataclass(frozen=True)
class Layout:
    """One tensor type: its name and id in GGUF, the bytes of a block, and the code that gives them a meaning."""

    name: str
    gguf_id: int
    block_weights: int
    fields: tuple[Field, ...]
    code: TrellisCode | PaperCode

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
        if columns % self.block_weights:
            raise ValueError(f"row length {columns} is no multiple of {self.block_weights}, the block of {self.name}")
        return columns // self.block_weights * self.block_bytes


def _trellis(name: str, gguf_id: int, strides: tuple[int, ...], multiplier: int) -> Layout:
    code = TrellisCode(strides=strides, multiplier=multiplier)
    fields = (Field("scale", "u8"), Field("codes", "u8", code.code_bits // 8))
    return Layout(name, gguf_id, GROUP, fields, code)


LAYOUTS: tuple[Layout, ...] = (
    _trellis("ccq_t1_5", 32, (1, 2), 22219),
    _trellis("ccq_t2", 36, (2,), 17177),
    _trellis("ccq_t2_5", 37, (2, 3), 14633),
    _trellis("ccq_t3", 38, (3,), 17993),
    Layout(
        "ccq_p2",
        4,
        512,
        (
            Field("super_scale", "bf16"),
            Field("code_scale", "f32"),
            Field("code_zp", "f32"),
            Field("scales", "u8", 4),
            Field("codes", "u8", 128),
        ),
        PaperCode(8, (9, 6, 3, 0), 0x3F, 32, scale_bits=4, affine_state=True),
    ),
    Layout(
        "ccq_p2_5",
        5,
        256,
        (Field("super_scale", "bf16"), Field("codes", "u16", 40)),
        PaperCode(16, (13, 11, 9, 6, 4, 2, 0), 0x7, 4, scale_bits=13),
    ),
    Layout(
        "ccq_p2_75",
        31,
        256,
        (Field("super_scale", "bf16"), Field("codes", "u8", 88)),
        PaperCode(8, (4, 2, 0), 0xF, 8, scale_bits=4),
    ),
)

RESERVED_IDS: dict[int, str] = {33: "crvq_1"}
"""Ids set aside for types that are not specified yet; a reader refuses them."""

_BY_NAME = {layout.name: layout for layout in LAYOUTS}
_BY_ID = {layout.gguf_id: layout for layout in LAYOUTS}


def by_name(name: str) -> Layout:
    """The layout called ``name`` (any case).  Raises ``KeyError`` for an unknown name."""
    return _BY_NAME[name.lower()]


def by_id(gguf_id: int) -> Layout:
    """The layout with this GGUF tensor type id.  Raises ``KeyError`` for an id that is not ours."""
    return _BY_ID[gguf_id]

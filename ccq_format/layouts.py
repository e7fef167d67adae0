"""The one table of CCQ tensor types.

Every other description of a type -- numpy dtype, C structs and constants (``backend/core/layouts.h``), the tables in
``spec/ccq.md`` -- is derived from the rows below by ``backend/gen.py`` or computed from them at run time.  The one
thing written by hand a second time is the decoder in ``spec/reference``, on purpose: a wrong table must not agree
with itself.  Section numbers refer to ``spec/ccq.md``.
"""

from __future__ import annotations

from .blocks import GROUP, Code, Field, Layout
from .paper import PaperCode
from .trellis import TrellisCode

__all__ = [
    "GROUP",
    "LAYOUTS",
    "SPEC_VERSION",
    "Code",
    "Field",
    "Layout",
    "PaperCode",
    "TrellisCode",
    "by_id",
    "by_name",
]

SPEC_VERSION = (0, 1)
"""MAJOR.MINOR of the binary format that this package reads and writes (spec section 1)."""


def _trellis(name: str, gguf_id: int, strides: tuple[int, ...], multiplier: int, steps: int = GROUP) -> Layout:
    code = TrellisCode(strides=strides, multiplier=multiplier, steps=steps)
    fields = (Field("scale", "u8"), Field("codes", "u8", code.code_bits // 8))
    return Layout(name, gguf_id, steps, fields, code)


LAYOUTS: tuple[Layout, ...] = (
    _trellis("ccq_t1", 33, (1,), 22219, steps=128),
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

_BY_NAME = {layout.name: layout for layout in LAYOUTS}
_BY_ID = {layout.gguf_id: layout for layout in LAYOUTS}


def by_name(name: str) -> Layout:
    """The layout called ``name`` (any case).  Raises ``KeyError`` for an unknown name."""
    return _BY_NAME[name.lower()]


def by_id(gguf_id: int) -> Layout:
    """The layout with this GGUF tensor type id.  Raises ``KeyError`` for an id that is not ours."""
    return _BY_ID[gguf_id]

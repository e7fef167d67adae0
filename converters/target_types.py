"""The types that a tensor of the output can have: names, blocks, bits.

Names are lower-case throughout: a CCQ type of ``ccq_format.layouts`` or one of ``STOCK_TYPES``.
"""

from __future__ import annotations

import gguf

from ccq_format import layouts, stock
from ccq_format.errors import PlanError

from .mixtures import MIXTURES

PLAIN_TYPES: dict[str, tuple[int, int]] = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34)}
"""The stock types that are sources and targets: weights per block, bytes per block."""

STOCK_TYPES: dict[str, tuple[int, int]] = {
    **PLAIN_TYPES,
    **{kind.name: (kind.block_weights, kind.block_bytes) for kind in stock.TYPES},
    "mxfp4": (32, 17),
}
"""All stock types that we write; mxfp4 keeps what gpt-oss is published in."""

FLOAT_TYPES = ("f32", "f16", "bf16")

COPIED_TYPES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "f64": 8}
"""Types that are no weights (token tables and the like): copied as they are; bytes per element."""

KEEP = "keep"
"""For ``QuantOptions.type``: leave every matrix as it is."""

SMALLER_BLOCKS: dict[str, tuple[str, ...]] = {"ccq_t1": ("ccq_t1_5",)}
"""Types of the same kind that rows can fall back to that are no multiple of a type's block."""


def parse_type(text: str) -> str:
    """The canonical (lower-case) name of a target type; ``T2`` is short for ``ccq_t2``.

    Raises ``PlanError`` for an unknown name.
    """
    name = text.strip().lower()
    if name in STOCK_TYPES:
        return name
    for candidate in (name, f"ccq_{name}"):
        try:
            return layouts.by_name(candidate).name
        except KeyError:
            continue
    known = ", ".join([*(layout.name for layout in layouts.LAYOUTS), *MIXTURES, *STOCK_TYPES, KEEP])
    raise PlanError(f"unknown type '{text}'; known types: {known}")


def is_ccq(type_name: str) -> bool:
    """Whether a canonical type name is a CCQ type."""
    return any(layout.name == type_name for layout in layouts.LAYOUTS)


def block(type_name: str) -> tuple[int, int]:
    """Weights and bytes of one block of a canonical type name, or of another type of gguf's.  Raises ``KeyError``."""
    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name.upper()]]
    return weights, nbytes


def is_quantized(type_name: str) -> bool:
    """Whether a type name is gguf's or ours and has blocks of several weights."""
    kind = gguf.GGMLQuantizationType.__members__.get(type_name.upper())
    return kind is not None and gguf.GGML_QUANT_SIZES[kind][0] > 1


def row_bytes(type_name: str, row_len: int) -> int:
    """Bytes of a row of ``row_len`` weights, which must be whole blocks."""
    weights, nbytes = block(type_name)
    return row_len // weights * nbytes


def bits(type_name: str) -> float:
    """Bits per weight of a canonical type name."""
    weights, nbytes = block(type_name)
    return 8 * nbytes / weights


def fallback(type_name: str, row_len: int) -> str:
    """The smallest of iq4_nl, q5_0, q8_0 and f16 that has more bits per weight than ``type_name`` and fits the rows;
    for ccq_t1 first ccq_t1_5, whose blocks are half as long."""
    for candidate in (*SMALLER_BLOCKS.get(type_name, ()), "iq4_nl", "q5_0", "q8_0"):
        if row_len % block(candidate)[0] == 0 and bits(candidate) > bits(type_name):
            return candidate
    return "f16"

"""Adds the CCQ types to the ``gguf`` package of this process, and ggml's newest types.

gguf has no call for that: its types are the members of an enum, a dict of block sizes and a dict of codec classes.
All three are extended here, after checking that they look like those of the pinned release.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

import gguf
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from . import codec
from .errors import GgufPackageError
from .layouts import LAYOUTS

PINNED = "0.19.0"
"""The gguf release whose internals this module knows."""


Q2_0 = 42
"""Type id of ggml's Q2_0, which the pinned release does not have yet."""


def _check_internals() -> None:
    """Raise ``GgufPackageError`` unless gguf's enum, size table and codec registry are those of the pinned release."""
    enum: Any = GGMLQuantizationType
    ids = {layout.gguf_id for layout in LAYOUTS}
    faults = []
    if not issubclass(enum, IntEnum) or not all(hasattr(enum, a) for a in ("_member_map_", "_value2member_map_")):
        faults.append("GGMLQuantizationType is no extensible IntEnum")
    elif (q8 := enum._member_map_.get("Q8_0")) is None or GGML_QUANT_SIZES.get(q8) != (32, 34):
        faults.append("GGML_QUANT_SIZES does not know Q8_0 as 34 bytes for 32 weights")
    else:
        faults += [
            f"type id {i} is already {member.name}"
            for i in sorted(ids)
            if (member := enum._value2member_map_.get(i)) is not None and not member.name.startswith("CCQ_")
        ]
    if not isinstance(getattr(quants, "_type_traits", None), dict) or getattr(quants, "__Quant", None) is None:
        faults.append("gguf.quants has no codec registry")
    if faults:
        version = getattr(gguf, "__version__", None) or _installed_version()
        raise GgufPackageError(
            f"the gguf package (version {version}) is not built like {PINNED}: {'; '.join(faults)}; "
            f"install gguf=={PINNED}"
        )


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gguf")
    except PackageNotFoundError:
        return "unknown"


def _add_member(name: str, gguf_id: int) -> GGMLQuantizationType:
    """Add one member to gguf's enum, the way the enum machinery does it for members of the class body."""
    enum: Any = GGMLQuantizationType
    member: Any = int.__new__(enum, gguf_id)
    member._name_ = name
    member._value_ = gguf_id
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)  # EnumMeta's own __setattr__ refuses new members
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[gguf_id] = member
    hashable = getattr(enum, "_hashable_values_", None)  # Python 3.12+: what ``value in enum`` looks at
    if hashable is not None:
        hashable.append(gguf_id)
    added: GGMLQuantizationType = member
    return added


def _add_codec(member: GGMLQuantizationType, decode: Callable[[np.ndarray], np.ndarray], encoder: str) -> None:
    """Add the class that ``gguf.quants.dequantize`` looks up; ``encoder`` says who encodes, for gguf does not."""
    base: Any = getattr(quants, "__Quant")

    def quantize_blocks(cls: Any, blocks: np.ndarray) -> np.ndarray:
        raise NotImplementedError(f"{member.name.lower()} is encoded by {encoder}")

    def dequantize_blocks(cls: Any, blocks: np.ndarray) -> np.ndarray:
        return decode(blocks)

    body = {
        "__doc__": f"Codec of {member.name} for gguf.quants.",
        "__module__": __name__,
        "quantize_blocks": classmethod(quantize_blocks),
        "dequantize_blocks": classmethod(dequantize_blocks),
    }
    type(base)(member.name, (base,), body, qtype=member)


def _decode_q1_0(blocks: np.ndarray) -> np.ndarray:
    """ggml's Q1_0: an f16 scale, then a bit per weight, lowest first; 1 is the scale, 0 its negative."""
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return np.where(bits == 1, scale, -scale)


def _decode_q2_0(blocks: np.ndarray) -> np.ndarray:
    """ggml's Q2_0: an f16 scale, then two bits per weight, lowest first; 0 to 3 are -1, 0, 1 and 2 times the scale."""
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (codes.reshape(len(blocks), -1).astype(np.float32) - 1) * scale


def register() -> None:
    """Make ``gguf`` know the CCQ types, and ggml's Q1_0 and Q2_0 entirely; calling it again changes nothing.

    Raises:
        GgufPackageError: gguf's internals are not those of the pinned release; nothing was changed.
    """
    _check_internals()
    known: Any = GGMLQuantizationType._value2member_map_
    for layout in LAYOUTS:
        member = known.get(layout.gguf_id) or _add_member(layout.name.upper(), layout.gguf_id)
        GGML_QUANT_SIZES[member] = (layout.block_weights, layout.block_bytes)
        if member not in quants._type_traits:
            _add_codec(member, partial(codec.decode, layout), "ccq_backend.encode")
    q2_0 = known.get(Q2_0) or _add_member("Q2_0", Q2_0)
    GGML_QUANT_SIZES[q2_0] = (64, 18)
    for member, decode in ((GGMLQuantizationType.Q1_0, _decode_q1_0), (q2_0, _decode_q2_0)):
        if member not in quants._type_traits:
            _add_codec(member, decode, "llama-quantize")

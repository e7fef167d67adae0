"""Adds the CCQ types to the ``gguf`` package of this process.

gguf has no call for that: its types are the members of an enum, a dict of block sizes and a dict of codec classes.
All three are extended here, after checking that they look like those of the pinned release.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import gguf
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from . import codec
from .errors import GgufPackageError
from .layouts import LAYOUTS, Layout

PINNED = "0.19.0"
"""The gguf release whose internals this module knows."""


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


def _add_member(layout: Layout) -> GGMLQuantizationType:
    """Add one member to gguf's enum, the way the enum machinery does it for members of the class body."""
    enum: Any = GGMLQuantizationType
    name = layout.name.upper()
    member: Any = int.__new__(enum, layout.gguf_id)
    member._name_ = name
    member._value_ = layout.gguf_id
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)  # EnumMeta's own __setattr__ refuses new members
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[layout.gguf_id] = member
    hashable = getattr(enum, "_hashable_values_", None)  # Python 3.12+: what ``value in enum`` looks at
    if hashable is not None:
        hashable.append(layout.gguf_id)
    added: GGMLQuantizationType = member
    return added


def _add_codec(layout: Layout, member: GGMLQuantizationType) -> None:
    """Add the class that ``gguf.quants.dequantize`` looks up; encoding belongs to the native encoder."""
    base: Any = getattr(quants, "__Quant")

    def quantize_blocks(cls: Any, blocks: np.ndarray) -> np.ndarray:
        raise NotImplementedError(f"{layout.name} is encoded by ccq_backend.encode")

    def dequantize_blocks(cls: Any, blocks: np.ndarray) -> np.ndarray:
        return codec.decode(layout, blocks)

    body = {
        "__doc__": f"Codec of {layout.name} for gguf.quants.",
        "__module__": __name__,
        "quantize_blocks": classmethod(quantize_blocks),
        "dequantize_blocks": classmethod(dequantize_blocks),
    }
    type(base)(layout.name.upper(), (base,), body, qtype=member)


def register() -> None:
    """Make ``gguf`` know the CCQ types; calling it again changes nothing.

    Raises:
        GgufPackageError: gguf's internals are not those of the pinned release; nothing was changed.
    """
    _check_internals()
    known = GGMLQuantizationType._value2member_map_
    for layout in LAYOUTS:
        member = known.get(layout.gguf_id)
        if member is None:
            member = _add_member(layout)
        GGML_QUANT_SIZES[member] = (layout.block_weights, layout.block_bytes)  # type: ignore[index]
        if member not in quants._type_traits:
            _add_codec(layout, member)  # type: ignore[arg-type]

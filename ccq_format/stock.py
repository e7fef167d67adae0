"""llama.cpp's types of 4 and 5 bits that stand beside ours in mixtures, and that ``ccq_backend`` encodes as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .blocks import F32, Encodable, Encoding, row_bytes
from .layouts import LAYOUTS


@dataclass(frozen=True)
class StockType:
    """A type of 32 weights, one scale (an IEEE half), each weight a level of its own times the scale.

    ``largest`` is the largest magnitude of a level.  It is an ``Encodable`` and its ``Encoding``.
    """

    name: str
    gguf_id: int
    block_bytes: int
    largest: int
    block_weights: int = 32

    couples: ClassVar[bool] = True

    @property
    def code(self) -> Encoding:
        """See ``Encodable``: itself."""
        return self

    @property
    def bpw(self) -> float:
        """See ``Encodable``."""
        return 8 * self.block_bytes / self.block_weights

    @property
    def max_weight(self) -> float:
        """See ``Encoding``."""
        return 65504.0 * self.largest

    def row_bytes(self, columns: int) -> int:
        """See ``Encodable``."""
        return row_bytes(self, columns)

    def error_weights(self, x: F32, importance: F32 | None) -> F32 | None:
        """See ``Encoding``: the importance itself."""
        return importance

    def size_weights(self, x: F32, power: npt.NDArray[np.floating]) -> F32 | None:
        """See ``Encoding``: none."""
        return None

    def gain(self, layout: Encodable, weights: F32 | None) -> F32:
        """See ``Encoding``: 1.  A nearest level is as often above its weight as below."""
        return np.ones(1, np.float32)


TYPES: tuple[StockType, ...] = (
    StockType("q4_0", 2, 18, 8),
    StockType("q5_0", 6, 22, 16),
    StockType("iq4_nl", 20, 18, 127),
)
"""Levels of q4_0 and q5_0 are all integers of 4 and 5 bits, those of iq4_nl a table of 16, denser around 0."""

ENCODABLE: dict[str, Encodable] = {layout.name: layout for layout in LAYOUTS} | {kind.name: kind for kind in TYPES}
"""By name, all types that ``ccq_backend.encode`` encodes: ours and these."""

"""The T types: a tail-biting trellis code (spec section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .blocks import F32, GROUP, U8, Layout, get


@dataclass(frozen=True)
class TrellisCode:
    """Constants of a tail-biting trellis code (spec section 5, types CCQ_T*).

    Weight ``t`` of a block is ``scale * level(u_t)``, where ``u_t`` are ``window_bits`` bits of the block's cyclic bit
    string starting at bit ``offsets[t]``; ``strides`` is the repeating number of bits from one window to the next,
    ``steps`` the number of windows.
    """

    strides: tuple[int, ...]
    multiplier: int
    steps: int = GROUP
    window_bits: int = 12
    hash_bits: int = 16
    field_mask: int = 0x7F
    field_shift: int = 8
    level_offset: int = 127
    scale_exponent_bias: int = 30

    family: ClassVar[str] = "trellis"
    spec_head: ClassVar[tuple[str, ...]] = ("weights", "n (bits)", "strides", "L (bits)", "M", "K")
    couples: ClassVar[bool] = True

    @property
    def code_bits(self) -> int:
        """Bits of one block's cycle."""
        return sum(self.strides) * self.steps // len(self.strides)

    @property
    def max_weight(self) -> float:
        """The largest weight that a block can hold: level 127 at the scale of byte 255."""
        return self.level_offset * 15 * 2.0 ** (31 - self.scale_exponent_bias)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Bit offset of every window of a block."""
        out, at = [], 0
        for step in range(self.steps):
            out.append(at)
            at += self.strides[step % len(self.strides)]
        return tuple(out)

    def constants(self) -> dict[str, object]:
        """See ``Code``."""
        return {
            "CODE_BITS": self.code_bits,
            "STRIDE_EVEN": self.strides[0],
            "STRIDE_ODD": self.strides[-1],
            "WINDOW_BITS": self.window_bits,
            "MULTIPLIER": f"{self.multiplier}u",
            "FIELD_MASK": f"0x{self.field_mask:x}u",
            "FIELD_SHIFT": self.field_shift,
            "LEVEL_OFFSET": self.level_offset,
            "SCALE_EXPONENT_BIAS": self.scale_exponent_bias,
        }

    def spec_row(self) -> list[object]:
        """See ``Code``."""
        strides = ", ".join(map(str, self.strides)) + (", ..." if len(self.strides) > 1 else "")
        return [self.steps, self.code_bits, strides, self.window_bits, self.multiplier, self.scale_exponent_bias]

    def decode(self, layout: Layout, blocks: U8) -> F32:
        """See ``Code``."""
        scale = scale_values(layout)[get(layout, blocks, "scale")]
        level = levels(layout)[windows(layout, get(layout, blocks, "codes"))]
        weights: F32 = scale * level.astype(np.float32)
        weights[scale[:, 0] == 0] = 0  # +0, where 0 * a negative level would be -0
        return weights

    def fault(self, layout: Layout, blocks: U8) -> tuple[int, str] | None:
        """See ``Code``: there is none."""
        return None

    def encode(self, layout: Layout, target: F32, cost: npt.NDArray[np.float64], scales: Any) -> U8:
        """See ``Code``; ``scales`` is float32, one for each block, each a value of :func:`scale_values`."""
        if isinstance(scales, tuple):
            raise ValueError(f"{layout.name} takes one scale per block")
        scales = np.asarray(scales)
        out = np.zeros((len(target), layout.block_bytes), dtype=np.uint8)
        if scales.size != len(target):
            raise ValueError(f"{scales.size} scales for {len(target)} blocks")
        scales = scales.reshape(-1)
        out[:, layout.offset("scale")] = scale_bytes(layout, scales)
        used = np.flatnonzero(scales)
        at = layout.offset("codes")
        for first in range(0, len(used), 16):  # 16 blocks: the 4096 path costs of each stay in the cache
            some = used[first : first + 16]
            scaled = target[some].astype(np.float64) / scales[some, None]
            out[some, at:] = pack_windows(layout, viterbi(layout, scaled, cost[some]))
        return out

    def error_weights(self, x: F32, importance: F32 | None) -> F32 | None:
        """See ``Code``: ``importance^(3/4)``.

        Measured: mean KL divergence of CCQ_T2 from f32 with the gain of :meth:`gain` (10 k tokens, importance from 32 k
        others), 16 M Llama: 0.0595, with weights ``(mean square of the row + x^2)^(1/4)`` besides 0.0630; without
        importance 0.0664 and 0.0672.  Without the gain such weights help, because large weights shrink less.
        """
        if importance is None:
            return None
        root = np.sqrt(importance, dtype=np.float32)  # roots are the same everywhere, powers are not
        return root * np.sqrt(root)

    def size_weights(self, x: F32, power: npt.NDArray[np.floating]) -> F32 | None:
        """See ``Code``: none."""
        return None

    def gain(self, layout: Layout) -> np.float32:
        """See ``Code``: ``1 + 4^-bpw``.

        A nearest code word is shorter than its target, by about the relative squared error.  Within one matrix that is
        a small part of the error, but all matrices lose alike, and their losses add up through the model: decoded
        weights must be as large as the original ones on average, even if the noise grows with them.  Mean KL divergence
        from f32, 10 k tokens (4 M: 20 k); gains of ``1 + c * 4^-bpw``:

        ==================================  ======  ======  ======  ======  ======
        Llama, data                         c = 0   0.75    1       1.25    1.5
        ==================================  ======  ======  ======  ======  ======
        CCQ_T2, 4 M, none                   0.1031          0.0903
        CCQ_T2, 4 M, importance                     0.0817  0.0821
        CCQ_T2, 16 M, none                                  0.0664  0.0653
        CCQ_T2, 16 M, importance                    0.0612  0.0595  0.0602  0.0613
        CCQ_T3, 16 M, none                  0.0156          0.0145
        CCQ_T3, 16 M, importance                    0.0137          0.0135
        ==================================  ======  ======  ======  ======  ======
        """
        return np.float32(1 + 4.0**-layout.bpw)


@cache
def levels(layout: Layout) -> np.ndarray:
    """Level of every window value of a T type: int16 ``[2**window_bits]``, read-only."""
    code = _trellis(layout)
    hashed = (np.arange(1 << code.window_bits, dtype=np.int64) * code.multiplier) % (1 << code.hash_bits)
    fields = (hashed & code.field_mask) + ((hashed >> code.field_shift) & code.field_mask)
    table: np.ndarray = (fields - code.level_offset).astype(np.int16)
    table.setflags(write=False)
    return table


@cache
def scale_values(layout: Layout) -> np.ndarray:
    """Scale of every scale byte of a T type: float32 ``[256]``, increasing, read-only; byte 0 means 0."""
    byte = np.arange(256)
    table: np.ndarray = np.ldexp(
        (8 + (byte & 7)).astype(np.float32), (byte >> 3) - _trellis(layout).scale_exponent_bias
    )
    table[0] = 0
    table.setflags(write=False)
    return table


def windows(layout: Layout, codes: np.ndarray) -> np.ndarray:
    """Windows of T code bytes: uint8 ``[n, code_bits / 8]`` -> uint16 ``[n, steps]``.

    Window ``t`` is ``window_bits`` bits from bit ``offsets[t]`` on, least significant bit first, around the cycle.
    """
    code = _trellis(layout)
    offsets = np.array(code.offsets)
    words = np.zeros((len(codes), code.steps), dtype=np.uint32)
    for byte in range(-(-(code.window_bits + 7) // 8)):  # a window that starts at bit 7 of a byte reaches this far
        index = (offsets // 8 + byte) % codes.shape[1]
        words |= codes[:, index].astype(np.uint32) << np.uint32(8 * byte)
    return ((words >> (offsets % 8).astype(np.uint32)) & np.uint32((1 << code.window_bits) - 1)).astype(np.uint16)


def scale_bytes(layout: Layout, scales: np.ndarray) -> np.ndarray:
    """Scale bytes of T scales: any shape, uint8.  Raises ``ValueError`` for a value that no byte stands for."""
    table = scale_values(layout)
    scales = np.asarray(scales)
    byte = np.minimum(np.searchsorted(table, scales), 255)
    if not (table[byte] == scales).all():
        raise ValueError(f"a scale cannot be represented in {layout.name}")
    return byte.astype(np.uint8)


def viterbi(layout: Layout, target: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Cheapest closed path through the trellis: float64 targets in units of levels and importances, both
    ``[n, steps]``; returns windows, uint16 ``[n, steps]``.

    The path is closed in two passes.  The first runs around the cycle twice with free ends; its window in the middle,
    far from both ends, becomes the window at the seam.  The second is bound to start and to end there.
    """
    twice = _best_path(layout, np.tile(target, 2), np.tile(importance, 2), seam=None)
    return _best_path(layout, target, importance, seam=twice[:, target.shape[1]])


def _best_path(layout: Layout, target: np.ndarray, importance: np.ndarray, seam: np.ndarray | None) -> np.ndarray:
    """Viterbi over ``target.shape[1]`` steps.

    A step's states are all window values.  Going from window u to the next, the lowest ``stride`` bits of u leave and
    as many new ones enter at the top; so the windows that may precede u are ``rest << stride | anything`` with
    ``rest = u & (2**(window_bits - stride) - 1)``.  With ``seam`` given (uint16 ``[n]``), the path starts in that
    window and ends in one that may precede it.
    """
    code = _trellis(layout)
    n, steps = target.shape
    states = 1 << code.window_bits
    level = levels(layout).astype(np.float64)
    rows = np.arange(n)
    cost = importance[:, :1] * (target[:, :1] - level) ** 2
    if seam is not None:
        start = np.full_like(cost, np.inf)
        start[rows, seam] = cost[rows, seam]
        cost = start
    came_from: list[np.ndarray] = []
    for step in range(1, steps):
        stride = code.strides[(step - 1) % len(code.strides)]
        before = cost.reshape(n, states >> stride, 1 << stride)
        choice = before.argmin(axis=-1)
        came_from.append(choice.astype(np.uint8))
        best = np.take_along_axis(before, choice[..., None], axis=-1)[..., 0]
        cost = importance[:, step, None] * (target[:, step, None] - level) ** 2 + np.tile(best, 1 << stride)
    path = np.empty((n, steps), dtype=np.uint16)
    if seam is None:
        window = cost.argmin(axis=-1)
    else:
        stride = code.strides[(steps - 1) % len(code.strides)]
        ends = cost.reshape(n, states >> stride, 1 << stride)
        rest = seam.astype(np.int64) & ((states >> stride) - 1)
        window = (rest << stride) | ends[rows, rest].argmin(axis=-1)
    path[:, -1] = window
    for step in range(steps - 1, 0, -1):
        stride = code.strides[(step - 1) % len(code.strides)]
        rest = window & ((states >> stride) - 1)
        window = (rest << stride) | came_from[step - 1][rows, rest]
        path[:, step - 1] = window
    return path


def pack_windows(layout: Layout, path: np.ndarray) -> np.ndarray:
    """Code bytes of a closed path: uint16 windows ``[n, steps]`` -> uint8 ``[n, code_bits / 8]``.

    Raises:
        ValueError: consecutive windows do not overlap as the type's strides demand.
    """
    code = _trellis(layout)
    bits = np.zeros((len(path), code.code_bits), dtype=np.uint8)
    for step, offset in enumerate(code.offsets):
        for bit in range(code.strides[step % len(code.strides)]):  # the bits that the next window does not have
            bits[:, offset + bit] = (path[:, step] >> bit) & 1
    codes = np.packbits(bits, axis=1, bitorder="little")
    if not np.array_equal(windows(layout, codes), path):
        raise ValueError(f"the windows are no closed path of {layout.name}")
    return codes


def _trellis(layout: Layout) -> TrellisCode:
    if not isinstance(layout.code, TrellisCode):
        raise ValueError(f"{layout.name} has no trellis code")
    return layout.code

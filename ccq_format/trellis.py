"""The T types: a tail-biting trellis code (spec section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .blocks import F32, GROUP, U8, Encodable, Layout, get

LARGEST_GAIN = 0.25
"""By how much a weight is raised at most: more would cost the block's other weights, for one that hardly counts."""


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
        """See ``Code``: the importance itself, which is what the error of an output is made of.

        Measured: :meth:`gain`'s table, and ``(mean square of the row + x^2)^(1/4)`` as a factor besides, 16 M Llama:
        0.0630 against 0.0595; without importance 0.0672 against 0.0664.  Without the gain such factors help, because
        large weights shrink less.
        """
        return importance

    def size_weights(self, x: F32, power: npt.NDArray[np.floating]) -> F32 | None:
        """See ``Code``: none."""
        return None

    def gain(self, layout: Encodable, weights: F32 | None) -> F32:
        """See ``Code``: ``1 + 4^-bpw (m / w)^(3/4)``, at most ``1 + LARGEST_GAIN``; w is the weight of an error and m
        the geometric mean of those in the block.

        A nearest code word is shorter than its target, by about the relative squared error.  Within one matrix that is
        a small part of the error, but all matrices lose alike, and their losses add up through the model: decoded
        weights must be as large as the original ones on average, even if the noise grows with them.  How much a column
        loses depends on its weight among its block's: on Gaussian weights, with log-normal weights of errors, the loss
        follows that power of them from 1/20 to 20 times the mean.  One gain for all makes the few channels too large
        that carry most of a real model's signal and lose next to nothing.

        Mean KL divergence of CCQ_T2 from the unquantized model, effort fast, importance of 64 k tokens; 16 M Llama,
        10 k tokens, and SmolLM2-135M, 2 k tokens each of technical English and of a novel:

        ======================================  =======  ==========================
        errors weighted by importance^p, gain   16 M     SmolLM2, technical / novel
        ======================================  =======  ==========================
        p = 3/4, 1 + 4^-bpw for all             0.0579   0.949 / 1.164
        p = 3/4, 1                              0.0658   0.932 / 1.120
        p = 1, 1                                0.0683   0.874 / 1.098
        p = 1, 1 + 4^-bpw for all               0.0580
        p = 1, by column                        0.0569   0.894 / 1.106
        ======================================  =======  ==========================

        How much of it error feedback takes depends on the model (``feedback.gain_strength``).
        """
        raised = 4.0**-layout.bpw
        if weights is None:
            return np.array([1 + raised], np.float32)
        blocks = weights.reshape(*weights.shape[:-1], -1, layout.block_weights).astype(np.float64)
        mean = blocks
        while mean.shape[-1] > 1:  # by square roots, which are the same everywhere
            mean = np.sqrt(mean[..., 0::2] * mean[..., 1::2])
        root = np.sqrt(np.divide(mean, blocks, out=np.zeros_like(blocks), where=blocks > 0))
        gain: F32 = (1 + np.minimum(raised * (root * np.sqrt(root)), LARGEST_GAIN)).astype(np.float32)
        return gain.reshape(weights.shape)


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

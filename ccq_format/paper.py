"""The P types: the layouts of arXiv 2507.07145 (spec section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from .blocks import F32, GROUP, U8, Encodable, Layout, get, put

NAN_BITS = 0x7FC00000
"""Every weight of a P group whose scale is not finite has these float32 bits."""


class PaperParameters(NamedTuple):
    """Scales of P blocks, given to :func:`encode`.

    ``super_scale`` is float32 ``[..., k]`` (representable as bf16), ``local_scale`` integers ``[..., k * groups]``;
    CCQ_P2 also needs ``code_scale`` and ``code_zp``, float32 ``[..., k]``.
    """

    super_scale: np.ndarray
    local_scale: np.ndarray
    code_scale: np.ndarray | None = None
    code_zp: np.ndarray | None = None


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

    family: ClassVar[str] = "paper"
    spec_head: ClassVar[tuple[str, ...]] = (
        "word (bits)",
        "shifts, weight 0 first",
        "mask",
        "zero point",
        "local scale (bits)",
    )
    couples: ClassVar[bool] = False
    max_weight: ClassVar[None] = None

    def constants(self) -> dict[str, object]:
        """See ``Code``."""
        return {
            "WORD_BITS": self.word_bits,
            "WORD_WEIGHTS": len(self.shifts),
            "SHIFTS": "{" + ", ".join(map(str, self.shifts)) + "}",
            "MASK": f"0x{self.mask:x}",
            "ZERO_POINT": self.zero_point,
            "SCALE_BITS": self.scale_bits,
        }

    def spec_row(self) -> list[object]:
        """See ``Code``."""
        shifts = ", ".join(map(str, self.shifts))
        return [self.word_bits, shifts, f"0x{self.mask:X}", self.zero_point, self.scale_bits]

    def decode(self, layout: Layout, blocks: U8) -> F32:
        """See ``Code``."""
        scale = _group_scales(layout, blocks)[..., None]
        with np.errstate(all="ignore"):  # a product may overflow to infinity or be NaN: that is its value
            weights: F32 = _paper_integers(layout, blocks).astype(np.float32) * scale
        weights.view(np.uint32)[~np.isfinite(np.broadcast_to(scale, weights.shape))] = NAN_BITS
        return weights.reshape(len(blocks), -1)

    def fault(self, layout: Layout, blocks: U8) -> tuple[int, str] | None:
        """See ``Code``: a super scale, group scale, code scale or code zero point that is not finite."""
        values = {"super_scale": _super_scale(layout, blocks)}
        for name in ("code_scale", "code_zp"):
            if layout.has(name):
                values[name] = get(layout, blocks, name)
        values["group scale"] = _group_scales(layout, blocks)
        bad = {name: ~np.isfinite(value).all(axis=1) for name, value in values.items()}
        any_bad = np.logical_or.reduce(list(bad.values()))
        if not any_bad.any():
            return None
        at = int(any_bad.argmax())
        name = next(name for name, flags in bad.items() if flags[at])
        return at, f"{name} of block {{}} is not finite"

    def encode(self, layout: Layout, target: F32, cost: npt.NDArray[np.float64], scales: Any) -> U8:
        """See ``Code``; ``scales`` are :class:`PaperParameters`."""
        if not isinstance(scales, PaperParameters):
            raise ValueError(f"{layout.name} takes PaperParameters")
        return _encode(self, layout, target, cost, scales)

    def error_weights(self, x: F32, importance: F32 | None) -> F32 | None:
        """See ``Code``: ``importance^(1/2)`` times :meth:`size_weights`, much as llama.cpp's."""
        weights = self.size_weights(x, np.square(x, dtype=np.float32).mean(axis=1, keepdims=True, dtype=np.float64))
        if importance is not None:
            weights = weights * np.sqrt(importance, dtype=np.float32)
        return np.ascontiguousarray(weights, dtype=np.float32)

    def size_weights(self, x: F32, power: npt.NDArray[np.floating]) -> F32:
        """See ``Code``: ``sqrt(power + x^2)``.

        Mean KL divergence from f16 without importance, 5080 tokens: CCQ_P2_5, 4 M Llama, 0.1362 against 0.1456 with
        equal weights; CCQ_P2, 16 M Llama, 0.0998 against 0.1115.
        """
        weights: F32 = np.sqrt(np.square(x, dtype=np.float32) + power.astype(np.float32))
        return weights

    def gain(self, layout: Encodable, weights: F32 | None) -> F32:
        """See ``Code``: 1."""
        return np.ones(1, np.float32)


def _group_scales(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """float32(local scale) * super_scale of P blocks: float32 ``[n, groups]``."""
    with np.errstate(all="ignore"):
        scale: np.ndarray = _local_scales(layout, blocks).astype(np.float32) * _super_scale(layout, blocks)
    return scale


def _super_scale(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    bits = get(layout, blocks, "super_scale").astype(np.uint32) << np.uint32(16)  # bf16 is the upper half of f32
    return bits.view(np.float32)


def _local_scales(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """Integer local scales of P blocks: uint32 ``[n, groups]``."""
    code = _paper(layout)
    if layout.has("scales"):
        packed = get(layout, blocks, "scales")
        return np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(blocks), -1).astype(np.uint32)
    last = _words(layout, blocks)[..., -1]
    return (last & ((1 << code.scale_bits) - 1)).astype(np.uint32)


def _paper_integers(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """Integers of P blocks before scaling: int32 ``[n, groups, 64]``."""
    code = _paper(layout)
    words = _words(layout, blocks)
    if code.affine_state:
        states = _states(
            words.astype(np.float32),
            get(layout, blocks, "code_scale")[..., None],
            get(layout, blocks, "code_zp")[..., None],
        )
    else:
        states = words.astype(np.int32)
    full = GROUP // len(code.shifts)  # words whose windows are all weights
    unpacked = (states[..., :full, None] >> np.array(code.shifts, dtype=np.int32)) & code.mask
    unpacked = unpacked.reshape(*words.shape[:2], -1)
    if full * len(code.shifts) < GROUP:  # weight 63 sits above the local scale in the group's last word
        unpacked = np.concatenate([unpacked, (states[..., -1:] >> code.scale_bits) & code.mask], axis=-1)
    return unpacked - code.zero_point


def _states(byte: np.ndarray, code_scale: np.ndarray, code_zp: np.ndarray) -> np.ndarray:
    """CCQ_P2's map from code byte to state: float32, unfused; 0 where the result is no int32."""
    with np.errstate(all="ignore"):
        state = np.floor((byte * code_scale + code_zp) + np.float32(0.5))
        fits = (state >= np.float32(-(2.0**31))) & (state < np.float32(2.0**31))
        return np.where(fits, state, np.float32(0)).astype(np.int32)


def _words(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """Code words of P blocks, group by group: uint8 or uint16 ``[n, groups, words per group]``."""
    return get(layout, blocks, "codes").reshape(len(blocks), layout.groups, -1)


def _encode(
    code: PaperCode, layout: Layout, target: np.ndarray, cost: np.ndarray, given: PaperParameters
) -> np.ndarray:
    n, groups = len(target), layout.groups
    blocks = np.zeros((n, layout.block_bytes), dtype=np.uint8)
    put(layout, blocks, "super_scale", _bf16_bits(_per_block(given.super_scale, n, 1)))
    wanted_local = _per_block(given.local_scale, n, groups)
    local = wanted_local.astype(np.int64)
    if (local != wanted_local).any() or local.min(initial=0) < 0 or local.max(initial=0) >= 1 << code.scale_bits:
        raise ValueError(f"a local scale is no integer of {code.scale_bits} bits")
    if code.affine_state:
        if given.code_scale is None or given.code_zp is None:
            raise ValueError(f"{layout.name} needs code_scale and code_zp")
        put(layout, blocks, "code_scale", _per_block(given.code_scale, n, 1).astype(np.float32))
        put(layout, blocks, "code_zp", _per_block(given.code_zp, n, 1).astype(np.float32))
        put(layout, blocks, "scales", (local[:, 0::2] << 4 | local[:, 1::2]).astype(np.uint8))
    with np.errstate(over="ignore"):
        scale = (local.astype(np.float32) * _super_scale(layout, blocks)).astype(np.float64)
    if not (np.abs(scale) * code.zero_point <= np.finfo(np.float32).max).all():  # the largest integer is -zero_point
        raise ValueError("a group scale is too large: weights would be infinite")
    target = target.astype(np.float64).reshape(n, groups, GROUP)
    cost = cost.reshape(n, groups, GROUP)
    shifts = np.array(code.shifts, dtype=np.int32)
    all_words = np.arange(1 << code.word_bits)
    full = GROUP // len(shifts)
    words = np.zeros((n, groups, full + (full * len(shifts) < GROUP)), dtype=np.int64)
    for block in range(n):
        states = all_words.astype(np.int32)
        if code.affine_state:
            states = _states(
                all_words.astype(np.float32),
                get(layout, blocks, "code_scale")[block],
                get(layout, blocks, "code_zp")[block],
            )
        candidates = ((states[:, None] >> shifts) & code.mask) - code.zero_point
        for group in range(groups):
            wanted, weight = target[block, group], cost[block, group]
            some = slice(0, full * len(shifts))
            words[block, group, :full] = _nearest(
                candidates * scale[block, group],
                wanted[some].reshape(full, -1),
                weight[some].reshape(full, -1),
            )
            if full * len(shifts) < GROUP:
                last = (np.arange(code.mask + 1) - code.zero_point)[:, None] * scale[block, group]
                high = _nearest(last, wanted[-1:, None], weight[-1:, None])[0]
                words[block, group, -1] = high << code.scale_bits | local[block, group]
    dtype = np.uint8 if code.word_bits == 8 else np.uint16
    put(layout, blocks, "codes", words.reshape(n, -1).astype(dtype))
    return blocks


def _nearest(candidates: np.ndarray, target: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Index of the candidate ``[c, d]`` nearest to each target ``[n, d]``, the lowest one of equals: int64 ``[n]``."""
    # sum of importance * (candidate - target)**2 without the term that all candidates share
    distance = importance @ (candidates**2).T - 2 * (importance * target) @ candidates.T
    nearest: np.ndarray = distance.argmin(axis=1)
    return nearest


def _per_block(values: np.ndarray, n: int, count: int) -> np.ndarray:
    values = np.asarray(values)
    if values.size != n * count:
        raise ValueError(f"{values.size} parameters where {n} blocks need {count} each")
    return values.reshape(n, count)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    if not np.isfinite(values).all() or (bits & 0xFFFF).any():
        raise ValueError("a super scale is no finite bf16 value")
    return (bits >> np.uint32(16)).astype(np.uint16)


def _paper(layout: Layout) -> PaperCode:
    if not isinstance(layout.code, PaperCode):
        raise ValueError(f"{layout.name} is no P type")
    return layout.code

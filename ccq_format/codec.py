"""Encode and decode blocks with numpy, driven by ``layouts.py``.

Decoding is exact: every implementation yields the same float32 bits (spec sections 5 and 6).  Encoding here is the
readable kind: it shows how codes are found once the scales are given.  The encoder for real work, which also searches
the scales, is ``ccq_backend.encode``.

Blocks are uint8 arrays ``[..., k * block_bytes]``, weights float32 arrays ``[..., k * block_weights]``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from .errors import BlockError, ImportanceError, WeightsError
from .layouts import GROUP, Layout, PaperCode, TrellisCode

NAN_BITS = 0x7FC00000
"""Every weight of a P group whose scale is not finite has these float32 bits."""

_CHUNK_WEIGHTS = 1 << 20  # decoded at a time: temporary arrays stay at a few MB whatever the tensor's size


class PaperParameters(NamedTuple):
    """Scales of P blocks, given to :func:`encode`.

    ``super_scale`` is float32 ``[..., k]`` (representable as bf16), ``local_scale`` integers ``[..., k * groups]``;
    CCQ_P2 also needs ``code_scale`` and ``code_zp``, float32 ``[..., k]``.
    """

    super_scale: np.ndarray
    local_scale: np.ndarray
    code_scale: np.ndarray | None = None
    code_zp: np.ndarray | None = None


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """Decode uint8 blocks ``[..., k * block_bytes]`` to float32 weights ``[..., k * block_weights]``.

    Every byte string has a meaning, so nothing is refused here; see :func:`check_blocks`.

    Raises:
        ValueError: not uint8, or the last dimension is no whole number of blocks.
    """
    flat = _as_blocks(layout, blocks)
    out = np.empty((len(flat), layout.block_weights), dtype=np.float32)
    decode_some = _decode_trellis if isinstance(layout.code, TrellisCode) else _decode_paper
    for part in _chunks(len(flat), layout.block_weights):
        out[part] = decode_some(layout, flat[part])
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] // layout.block_bytes * layout.block_weights)


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
    """Windows of T code bytes: uint8 ``[n, code_bits / 8]`` -> uint16 ``[n, 64]``.

    Window ``t`` is ``window_bits`` bits from bit ``offsets[t]`` on, least significant bit first, around the cycle.
    """
    code = _trellis(layout)
    offsets = np.array(code.offsets)
    words = np.zeros((len(codes), GROUP), dtype=np.uint32)
    for byte in range(-(-(code.window_bits + 7) // 8)):  # a window that starts at bit 7 of a byte reaches this far
        index = (offsets // 8 + byte) % codes.shape[1]
        words |= codes[:, index].astype(np.uint32) << np.uint32(8 * byte)
    return ((words >> (offsets % 8).astype(np.uint32)) & np.uint32((1 << code.window_bits) - 1)).astype(np.uint16)


def _decode_trellis(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    scale = scale_values(layout)[_field(layout, blocks, "scale")]
    level = levels(layout)[windows(layout, _field(layout, blocks, "codes"))]
    weights: np.ndarray = scale * level.astype(np.float32)
    weights[scale[:, 0] == 0] = 0  # +0, where 0 * a negative level would be -0
    return weights


def _decode_paper(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    scale = _group_scales(layout, blocks)[..., None]
    with np.errstate(all="ignore"):  # a product may overflow to infinity or be NaN: that is its value
        weights: np.ndarray = _paper_integers(layout, blocks).astype(np.float32) * scale
    weights.view(np.uint32)[~np.isfinite(np.broadcast_to(scale, weights.shape))] = NAN_BITS
    return weights.reshape(len(blocks), -1)


def _group_scales(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """float32(local scale) * super_scale of P blocks: float32 ``[n, groups]``."""
    with np.errstate(all="ignore"):
        scale: np.ndarray = _local_scales(layout, blocks).astype(np.float32) * _super_scale(layout, blocks)
    return scale


def _super_scale(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    bits = _field(layout, blocks, "super_scale").astype(np.uint32) << np.uint32(16)  # bf16 is the upper half of f32
    return bits.view(np.float32)


def _local_scales(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    """Integer local scales of P blocks: uint32 ``[n, groups]``."""
    code = _paper(layout)
    if _has_field(layout, "scales"):
        packed = _field(layout, blocks, "scales")
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
            _field(layout, blocks, "code_scale")[..., None],
            _field(layout, blocks, "code_zp")[..., None],
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
    return _field(layout, blocks, "codes").reshape(len(blocks), layout.groups, -1)


# --- checking ---------------------------------------------------------------------------------------------------------


def check_blocks(
    layout: Layout,
    blocks: np.ndarray,
    *,
    file: str | os.PathLike[str] | None = None,
    tensor: str | None = None,
    first_block: int = 0,
) -> None:
    """Check uint8 blocks ``[..., k * block_bytes]`` for parameters that no encoder may write.

    Those are, in P types, a super scale, group scale, code scale or code zero point that is not finite.  The bytes of
    T types all have a regular meaning.  ``file``, ``tensor`` and ``first_block`` (the index of ``blocks``' first block
    in the tensor) go into the message.

    Raises:
        BlockError: names the first such block.
        ValueError: not uint8, or no whole number of blocks.
    """
    flat = _as_blocks(layout, blocks)
    if isinstance(layout.code, TrellisCode):
        return
    for part in _chunks(len(flat), layout.block_weights):
        some = flat[part]
        values = {"super_scale": _super_scale(layout, some)}
        for name in ("code_scale", "code_zp"):
            if _has_field(layout, name):
                values[name] = _field(layout, some, name)
        values["group scale"] = _group_scales(layout, some)
        bad = {name: ~np.isfinite(value).all(axis=1) for name, value in values.items()}
        any_bad = np.logical_or.reduce(list(bad.values()))
        if any_bad.any():
            at = int(any_bad.argmax())
            name = next(name for name, flags in bad.items() if flags[at])
            raise BlockError(f"{name} of block {first_block + part.start + at} is not finite", file=file, tensor=tensor)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode(
    layout: Layout,
    weights: np.ndarray,
    importance: np.ndarray | None = None,
    *,
    scales: np.ndarray | PaperParameters,
) -> np.ndarray:
    """Find the codes for given scales: float32 ``[..., k * block_weights]`` -> uint8 ``[..., k * block_bytes]``.

    ``sum(importance * (weights - decoded)**2)`` is the least possible for P types and, but for rare cases at the seam
    of the cycle, for T types.  ``importance`` broadcasts to the weights' shape.  ``scales`` is float32 ``[..., k]`` for
    T types (each a value of :func:`scale_values`; 0 gives an all-zero block), :class:`PaperParameters` for P types.

    Raises:
        WeightsError: a weight is NaN or infinite.
        ImportanceError: an importance is negative, NaN or infinite, or does not broadcast.
        ValueError: wrong shapes, or scales that the type cannot represent.
    """
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim == 0 or weights.shape[-1] % layout.block_weights:
        raise ValueError(f"weights of shape {weights.shape} are no whole number of blocks of {layout.name}")
    if not np.isfinite(weights).all():
        raise WeightsError("a weight is NaN or infinite")
    target = weights.reshape(-1, layout.block_weights)
    cost = _as_importance(importance, weights.shape).reshape(target.shape)
    if isinstance(layout.code, TrellisCode):
        if isinstance(scales, PaperParameters):
            raise ValueError(f"{layout.name} takes one scale per block")
        blocks = _encode_trellis(layout, target, cost, np.asarray(scales))
    else:
        if not isinstance(scales, PaperParameters):
            raise ValueError(f"{layout.name} takes PaperParameters")
        blocks = _encode_paper(layout, target, cost, scales)
    return blocks.reshape(*weights.shape[:-1], layout.row_bytes(weights.shape[-1]))


def _as_importance(importance: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if importance is None:
        return np.ones(shape)
    try:
        out = np.broadcast_to(np.asarray(importance, dtype=np.float64), shape)
    except ValueError:
        raise ImportanceError(f"shape {np.shape(importance)} does not fit weights of shape {shape}") from None
    if not (np.isfinite(out).all() and (out >= 0).all()):
        raise ImportanceError("an importance is negative, NaN or infinite")
    return out


def scale_bytes(layout: Layout, scales: np.ndarray) -> np.ndarray:
    """Scale bytes of T scales: any shape, uint8.  Raises ``ValueError`` for a value that no byte stands for."""
    table = scale_values(layout)
    scales = np.asarray(scales)
    byte = np.minimum(np.searchsorted(table, scales), 255)
    if not (table[byte] == scales).all():
        raise ValueError(f"a scale cannot be represented in {layout.name}")
    return byte.astype(np.uint8)


def _encode_trellis(layout: Layout, target: np.ndarray, cost: np.ndarray, scales: np.ndarray) -> np.ndarray:
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


def viterbi(layout: Layout, target: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Cheapest closed path through the trellis: float64 targets in units of levels and importances, both ``[n, 64]``;
    returns windows, uint16 ``[n, 64]``.

    The path is closed in two passes.  The first runs around the cycle twice with free ends; its window in the middle,
    far from both ends, becomes the window at the seam.  The second is bound to start and to end there.
    """
    twice = _best_path(layout, np.tile(target, 2), np.tile(importance, 2), seam=None)
    return _best_path(layout, target, importance, seam=twice[:, GROUP])


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
    """Code bytes of a closed path: uint16 windows ``[n, 64]`` -> uint8 ``[n, code_bits / 8]``.

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


def _encode_paper(layout: Layout, target: np.ndarray, cost: np.ndarray, given: PaperParameters) -> np.ndarray:
    code = _paper(layout)
    n, groups = len(target), layout.groups
    blocks = np.zeros((n, layout.block_bytes), dtype=np.uint8)
    _put(layout, blocks, "super_scale", _bf16_bits(_per_block(given.super_scale, n, 1)))
    wanted_local = _per_block(given.local_scale, n, groups)
    local = wanted_local.astype(np.int64)
    if (local != wanted_local).any() or local.min(initial=0) < 0 or local.max(initial=0) >= 1 << code.scale_bits:
        raise ValueError(f"a local scale is no integer of {code.scale_bits} bits")
    if code.affine_state:
        if given.code_scale is None or given.code_zp is None:
            raise ValueError(f"{layout.name} needs code_scale and code_zp")
        _put(layout, blocks, "code_scale", _per_block(given.code_scale, n, 1).astype(np.float32))
        _put(layout, blocks, "code_zp", _per_block(given.code_zp, n, 1).astype(np.float32))
        _put(layout, blocks, "scales", (local[:, 0::2] << 4 | local[:, 1::2]).astype(np.uint8))
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
                _field(layout, blocks, "code_scale")[block],
                _field(layout, blocks, "code_zp")[block],
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
    _put(layout, blocks, "codes", words.reshape(n, -1).astype(dtype))
    return blocks


def _nearest(candidates: np.ndarray, target: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Index of the candidate ``[c, d]`` nearest to each target ``[n, d]``, the lowest one of equals: int64 ``[n]``."""
    # sum of importance * (candidate - target)**2 without the term that all candidates share
    distance = importance @ (candidates**2).T - 2 * (importance * target) @ candidates.T
    nearest: np.ndarray = distance.argmin(axis=1)
    return nearest


# --- helpers ----------------------------------------------------------------------------------------------------------


def _as_blocks(layout: Layout, blocks: np.ndarray) -> np.ndarray:
    if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % layout.block_bytes:
        raise ValueError(
            f"{blocks.dtype} array of shape {blocks.shape} is no uint8 array of whole {layout.name} blocks "
            f"of {layout.block_bytes} bytes"
        )
    return blocks.reshape(-1, layout.block_bytes)


def _chunks(n_blocks: int, block_weights: int) -> Iterator[slice]:
    step = max(1, _CHUNK_WEIGHTS // block_weights)
    for first in range(0, n_blocks, step):
        yield slice(first, min(first + step, n_blocks))


_DTYPES = {"u8": "u1", "u16": "<u2", "bf16": "<u2", "f32": "<f4"}


def _has_field(layout: Layout, name: str) -> bool:
    return any(field.name == name for field in layout.fields)


def _field(layout: Layout, blocks: np.ndarray, name: str) -> np.ndarray:
    """One field of ``[n, block_bytes]`` blocks: ``[n, count]`` (bf16 as uint16 bits)."""
    field = next(field for field in layout.fields if field.name == name)
    at = layout.offset(name)
    return np.ascontiguousarray(blocks[:, at : at + field.nbytes]).view(_DTYPES[field.dtype])


def _put(layout: Layout, blocks: np.ndarray, name: str, values: np.ndarray) -> None:
    """Store ``[n, count]`` values of the field's own type into blocks."""
    at = layout.offset(name)
    raw = np.ascontiguousarray(values).view(np.uint8)
    blocks[:, at : at + raw.shape[1]] = raw


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


def _trellis(layout: Layout) -> TrellisCode:
    if not isinstance(layout.code, TrellisCode):
        raise ValueError(f"{layout.name} has no trellis code")
    return layout.code


def _paper(layout: Layout) -> PaperCode:
    if not isinstance(layout.code, PaperCode):
        raise ValueError(f"{layout.name} is no P type")
    return layout.code

"""What the kernel tests share: levels and scales straight from the layout table, and runs under ``CCQ_ISA``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

import ccq_backend
from ccq_format.layouts import GROUP, LAYOUTS, Layout, TrellisCode

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

IN_GGML = [layout for layout in LAYOUTS if layout.gguf_id < 40]
"""The types that the plugin adds to ggml: those for which its tables have a row."""
T_LAYOUTS = [layout for layout in LAYOUTS if isinstance(layout.code, TrellisCode)]

TESTS = Path(__file__).resolve().parents[1]


def same_bits(a: F32, b: F32) -> bool:
    """Whether two float32 arrays are equal bit for bit."""
    return np.array_equal(np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32))


def random_blocks(layout: Layout, rows: int, blocks: int, rng: np.random.Generator) -> U8:
    """Blocks of arbitrary bytes, u8 [rows, blocks * block_bytes]: every byte value has a meaning."""
    return rng.integers(0, 256, (rows, blocks * layout.block_bytes), dtype=np.uint8)


def sane_blocks(layout: Layout, rows: int, blocks: int, rng: np.random.Generator) -> U8:
    """The same with scales of ordinary size: no NaN, no overflow."""
    b = random_blocks(layout, rows, blocks, rng).reshape(rows, blocks, layout.block_bytes)
    if isinstance(layout.code, TrellisCode):
        b[..., 0] = rng.integers(150, 220, (rows, blocks))
    else:
        b[..., 0:2] = np.frombuffer(np.uint16(0x3C12).tobytes(), np.uint8)  # bfloat16 0.0089
        if layout.code.affine_state:
            b[..., 2:10] = np.frombuffer(np.array([113.7, 21.3], "<f4").tobytes(), np.uint8)
    return b.reshape(rows, -1)


def levels_and_scales(layout: Layout, row: U8) -> tuple[npt.NDArray[np.int64], F32]:
    """Levels int [groups, 64] and float32 scales [groups] of one row of blocks."""
    code = layout.code
    b = row.reshape(-1, layout.block_bytes)
    if isinstance(code, TrellisCode):
        bits = np.unpackbits(b[:, 1:], axis=1, bitorder="little").astype(np.int64)
        at = np.array(code.offsets)
        window = sum(bits[:, (at + k) % code.code_bits] << k for k in range(code.window_bits))
        hashed = window * code.multiplier % (1 << code.hash_bits)
        fields = (hashed & code.field_mask) + (hashed >> code.field_shift & code.field_mask)
        s = b[:, 0].astype(int)
        scale = np.where(s == 0, 0.0, (8.0 + (s & 7)) * 2.0 ** ((s >> 3) - code.scale_exponent_bias))
        return (fields - code.level_offset).reshape(-1, GROUP), np.repeat(scale.astype(np.float32), layout.groups)
    field = {f.name: b[:, layout.offset(f.name) :][:, : f.nbytes].copy() for f in layout.fields}
    super_scale = (field["super_scale"].view("<u2").astype(np.uint32) << 16).view(np.float32)
    words = field["codes"].view("<u2" if code.word_bits == 16 else "u1").astype(np.int64)
    words = words.reshape(len(b) * layout.groups, -1)
    if code.affine_state:
        with np.errstate(all="ignore"):
            moved = field["codes"].astype(np.float32) * field["code_scale"].view("<f4") + field["code_zp"].view("<f4")
            state = np.floor(moved + np.float32(0.5))
            words = np.where((state >= -(2.0**31)) & (state < 2.0**31), state, 0).astype(np.int64).reshape(words.shape)
        local = np.stack([field["scales"] >> 4, field["scales"] & 15], axis=-1).reshape(len(b), -1)
        v = np.stack([(words >> k & code.mask) for k in code.shifts], axis=-1).reshape(len(words), GROUP)
    else:
        body, last = words[:, :-1], words[:, -1:]
        v = np.stack([(body >> k & code.mask) for k in code.shifts], axis=-1).reshape(len(words), GROUP - 1)
        v = np.concatenate([v, last >> code.scale_bits], axis=1)
        local = (last & ((1 << code.scale_bits) - 1)).reshape(len(b), -1)
    with np.errstate(all="ignore"):
        scale = local.astype(np.float32) * super_scale
    return v - code.zero_point, scale.reshape(-1)


def expected_weights(layout: Layout, row: U8) -> F32:
    """Weights float32 of one row of blocks, by the rules of spec sections 5 and 6."""
    v, g = levels_and_scales(layout, row)
    with np.errstate(all="ignore"):
        out = v.astype(np.float32) * g[:, None]
    if isinstance(layout.code, TrellisCode):
        out[g == 0] = 0.0
    out.view(np.uint32)[~np.isfinite(g)] = 0x7FC00000
    return out.reshape(-1)


def expected_dots(layout: Layout, blocks: U8, act: U8) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Products of rows of blocks with rows of quantized activations, and how far a kernel set may be from them, by the
    rule of backend/cpu/ACTIVATIONS.md: both f64 [activations, rows].  Not finite where a scale is not."""
    n = blocks.shape[1] // layout.block_bytes * layout.block_weights
    q, d = ccq_backend.read_activations(act, n)
    x = np.repeat(d.astype(np.float64), GROUP, axis=1) * q
    exact, bound = np.empty((2, len(act), len(blocks)))
    with np.errstate(all="ignore"):
        for r, row in enumerate(blocks):
            v, g = levels_and_scales(layout, row)
            w = (v * g.astype(np.float64)[:, None]).reshape(-1)
            exact[:, r] = x @ w
            bound[:, r] = np.abs(x) @ np.abs(w) * (n / GROUP + 8) * 2.0**-24
    return exact, bound


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python source in a fresh process (the kernel set is chosen once per process)."""
    path = os.pathsep.join([str(TESTS), *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": path, **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=600)

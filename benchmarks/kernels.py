"""Speed and error of the kernels, one thread: ``python benchmarks/kernels.py [--encode N] [--effort NAME]``
(``CCQ_ISA`` as usual).

Every type is checked first: products against the decoded weights within the bound of backend/cpu/ACTIVATIONS.md, and
that coupled encoding lowers what it is told to.  A weight counts once per product.  Products with one column are timed
with weights in the caches and in memory; the latter also as the share of the bandwidth with which NumPy adds up as
many bytes.  The encoders' errors are printed with their time; coupled encoding's is relative to plain encoding's, and
so is its time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

import ccq_backend
from ccq_format.layouts import GROUP, LAYOUTS, Layout, TrellisCode

COLUMNS = 4096
BATCH = 512
"""Columns of the product that stands for prompts."""


def best_time(call: Callable[[], object], seconds: float = 0.4) -> float:
    """Shortest of the runs that fit into ``seconds``, in seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def make_blocks(layout: Layout, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Random code bits with scales of ordinary size, u8 [rows, row bytes]."""
    b = rng.integers(0, 256, (rows, COLUMNS // layout.block_weights, layout.block_bytes), dtype=np.uint8)
    if isinstance(layout.code, TrellisCode):
        b[..., 0] = 180
    else:
        b[..., 0:2] = (0x12, 0x3C)
        if layout.has("code_scale"):
            b[..., 2:10] = np.frombuffer(np.array([113.7, 21.3], "<f4").tobytes(), np.uint8)
    return b.reshape(rows, -1)


def check(layout: Layout, blocks: np.ndarray, act: np.ndarray) -> None:
    """Raise ``AssertionError`` unless products are within the bound."""
    w = ccq_backend.decode(layout, blocks).astype(float)
    q, d = ccq_backend.read_activations(act, COLUMNS)
    x = q * np.repeat(d.astype(float), GROUP, axis=1)
    bound = np.abs(x) @ np.abs(w).T * (COLUMNS / GROUP + 8) * 2.0**-24
    assert np.all(np.abs(ccq_backend.mul_mat(layout, blocks, act) - x @ w.T) <= bound), f"{layout.name}: out of bounds"


def read_bandwidth(n_bytes: int) -> float:
    """Bytes per second of adding up so many."""
    data = np.ones(n_bytes // 8, np.uint64)
    return data.nbytes / best_time(data.sum)


def encode(layout: Layout, w: np.ndarray, coupling: np.ndarray | None, effort: str) -> tuple[np.ndarray, float]:
    """Errors f64 like ``w`` of encoding it, and the CPU time in seconds: the shorter of two runs."""
    seconds = float("inf")
    for _ in range(2):
        start = time.process_time()
        blocks = ccq_backend.encode(layout, w, threads=1, effort=effort, coupling=coupling)
        seconds = min(seconds, time.process_time() - start)
    return w - ccq_backend.decode(layout, blocks).astype(float), seconds


def compare_coupled(layout: Layout, n: int, effort: str, rng: np.random.Generator) -> str:
    """Time and error of encoding n weights whose errors are coupled, relative to leaving that out.

    Raises ``AssertionError`` unless the error is lower.
    """
    size = layout.block_weights
    w = rng.standard_normal((-(-n // size), size)).astype(np.float32)
    coupling = np.triu(rng.normal(0, 0.1, (1, size, size)), 1).astype(np.float32)
    (plain, plain_seconds), (coupled, seconds) = (encode(layout, w, u, effort) for u in (None, coupling))
    ratio = float(np.square(coupled + coupled @ coupling[0]).sum() / np.square(plain + plain @ coupling[0]).sum())
    assert ratio < 1, f"{layout.name}: coupled encoding has {ratio:.3f} times the error of plain encoding"
    return f"{seconds / plain_seconds:6.2f} x {ratio:8.4f} x"


def main() -> None:
    """Print one line per type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encode", type=int, default=16384, metavar="N", help="weights to encode (default 16384)")
    parser.add_argument("--rows", type=int, default=512, help="rows of the matrix in the caches (default 512)")
    parser.add_argument("--large", type=int, default=50000, help="rows of the matrix in memory (default 50000)")
    parser.add_argument("--effort", choices=list(ccq_backend.EFFORTS), default="default", help="of encoding")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    act = ccq_backend.quantize_activations(rng.standard_normal((BATCH, COLUMNS)))
    print(f"kernel set: {ccq_backend.isa()}; rows of {COLUMNS}; G = 10^9 weights per second")
    products = f"{'decode':>9} {'1 column':>9} {'in memory':>18} {f'{BATCH} columns':>12}"
    print(f"{'type':10} {products} {'encode':>12} {'relmse':>9} {'coupled':>8} {'error':>10}")
    for layout in LAYOUTS:
        blocks = make_blocks(layout, args.rows, rng)
        check(layout, blocks[:64], act[:40])
        large = np.tile(blocks, (-(-args.large // args.rows), 1))
        read = read_bandwidth(large.nbytes)
        weights = args.rows * COLUMNS
        decode = weights / best_time(partial(ccq_backend.decode, layout, blocks)) / 1e9
        one = weights / best_time(partial(ccq_backend.mul_mat, layout, blocks, act[:1])) / 1e9
        seconds = best_time(partial(ccq_backend.mul_mat, layout, large, act[:1]))
        far, share = len(large) * COLUMNS / seconds / 1e9, large.nbytes / seconds / read
        many = BATCH * weights / best_time(partial(ccq_backend.mul_mat, layout, blocks, act)) / 1e9
        w = rng.standard_normal((-(-args.encode // 1024), 1024)).astype(np.float32)
        error, seconds = encode(layout, w, None, args.effort)
        relmse = float((error**2).sum() / (w.astype(float) ** 2).sum())
        trellis = isinstance(layout.code, TrellisCode)
        coupled = compare_coupled(layout, args.encode, args.effort, rng) if trellis else ""
        per_weight = seconds / w.size * 1e6
        products = f"{decode:7.2f} G {one:7.2f} G {far:7.2f} G ({share:4.0%}) {many:10.2f} G"
        print(f"{layout.name:10} {products} {per_weight:9.3f} us {relmse:9.5f} {coupled}".rstrip())


if __name__ == "__main__":
    main()

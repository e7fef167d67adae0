"""Squared error of every type, ours and llama.cpp's, on the same random weights.

    python benchmarks/type_error.py [--weights N] [--csv FILE]

Error over signal power, without importance; llama.cpp's types are quantized by llama.cpp itself (the library inside
llama-cpp-python).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

import ccq_backend
from ccq_format.layouts import LAYOUTS

F32 = npt.NDArray[np.float32]
COLUMNS = 2048
STOCK = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_0")


def stock_coder() -> Callable[[str, F32], F32]:
    """A function that quantizes with a stock type of that name in ggml and returns the decoded weights."""
    import llama_cpp.llama_cpp as llama

    lib = llama._lib  # resolves ggml's functions in the libraries that libllama uses
    quantize = lib.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def code(name: str, x: F32) -> F32:
        type_id = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[type_id]
        rows, columns = x.shape
        out = np.zeros((rows, columns // block * size), np.uint8)
        ones = np.ones(columns, np.float32)  # the IQ1 and IQ2 types demand an importance
        quantize(type_id, x.ctypes.data, out.ctypes.data, 0, rows, columns, ones.ctypes.data)
        decoded: F32 = gguf.quants.dequantize(out, type_id)
        return decoded

    return code


def relative_error(x: F32, y: F32) -> float:
    """Squared error of ``y`` over the power of ``x``."""
    return float(((x.astype(float) - y) ** 2).sum() / (x.astype(float) ** 2).sum())


def main() -> None:
    """Measure, print, and write the CSV file if one is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=int, default=1 << 20, help="weights per source (default 2^20)")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    args = parser.parse_args()
    rng = np.random.default_rng(2026)
    shape = (max(1, args.weights // COLUMNS), COLUMNS)
    sources: dict[str, F32] = {
        "gaussian": rng.standard_normal(shape).astype(np.float32),
        "laplace": rng.laplace(size=shape).astype(np.float32),
        "student-t(5)": rng.standard_t(5, shape).astype(np.float32),
    }
    code = stock_coder()
    rows: list[tuple[float, str, list[float]]] = []
    for layout in LAYOUTS:
        decoded = [ccq_backend.decode(layout, ccq_backend.encode(layout, x)) for x in sources.values()]
        errors = [relative_error(x, y) for x, y in zip(sources.values(), decoded, strict=True)]
        rows.append((layout.bpw, layout.name.upper(), errors))
    for name in STOCK:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        rows.append((8 * size / block, name, [relative_error(x, code(name, x)) for x in sources.values()]))
    rows.sort()
    print(f"{'type':10} {'bits':>7} " + " ".join(f"{source:>13}" for source in sources))
    for bits, name, errors in rows:
        print(f"{name:10} {bits:7.4f} " + " ".join(f"{error:13.5f}" for error in errors))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["type", "bits_per_weight", *sources])
            writer.writerows([name, f"{bits:.4f}", *(f"{e:.5f}" for e in errors)] for bits, name, errors in rows)


if __name__ == "__main__":
    main()

"""The CUDA kernels on a CPU: ``backend/cuda`` compiled as host C++ over the emulator in ``tests/cuda``, and its C
interface on NumPy arrays."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cffi import FFI

from ccq_backend.cdef import declarations
from ccq_format.layouts import Layout

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "backend" / "cuda"
EMULATOR = ROOT / "tests" / "cuda"

FLAGS = (
    "-std=c++17",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-DCCQ_CUDA_EMULATED",
    "-U_FORTIFY_SOURCE",
)
UNITS = ("ccq_cuda.cu", "encode.cu")
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
OUT_TYPES: dict[str, tuple[int, Any]] = {"f32": (0, np.uint32), "f16": (1, np.uint16), "bf16": (2, np.uint16)}


def compiler() -> str | None:
    """The C++ compiler, ``None`` if there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(library: Path, flags: tuple[str, ...] = ("-O1",), cuda: Path = CUDA, units: tuple[str, ...] = UNITS) -> Path:
    """Compile the device code under ``cuda``, all of it or some ``units`` (there, or full paths), and the emulator to
    ``library``."""
    sources = (*(str(cuda / unit) for unit in units), str(EMULATOR / "emulator.cpp"))
    command = (str(compiler()), *FLAGS, *flags, f"-I{EMULATOR}", "-x", "c++", *sources, "-o", str(library))
    subprocess.run(command, check=True)
    return library


@cache
def library(units: tuple[str, ...] = UNITS) -> Path:
    """Some units over the emulator, built once a process; ``CCQ_TEST_EMULATOR`` names what is built already."""
    if built := os.environ.get("CCQ_TEST_EMULATOR"):
        return Path(built)
    folder = tempfile.TemporaryDirectory(prefix="ccq-cuda-")
    atexit.register(folder.cleanup)
    return build(Path(folder.name) / "emulated.so", units=units)


SANITIZER = """
import sys, pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", sys.argv[2], sys.argv[1]]))
"""


def run_sanitized(folder: Path, test_file: str, tests: str, units: tuple[str, ...]) -> None:
    """Run the tests of a file that ``-k tests`` selects with kernels that are compiled with both sanitizers."""
    asan = subprocess.run(
        [str(compiler()), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(asan).is_file():
        pytest.skip("the compiler has no AddressSanitizer: install libasan, or name another in CXX")
    built = build(folder / "sanitized.so", SANITIZED, units=units)
    env = {
        **os.environ,
        "CCQ_TEST_EMULATOR": str(built),
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)]),
        "PYTHONMALLOC": "malloc",
    }
    run = subprocess.run(
        [sys.executable, "-c", SANITIZER, test_file, tests], env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


class Device:
    """The emulated library.  Arrays that it gets are copied to memory with just the bytes that a device would have."""

    def __init__(self, library: Path) -> None:
        self.ffi = FFI()
        self.ffi.cdef(declarations((CUDA / "ccq_cuda.h").read_text(encoding="utf-8")))
        self.lib: Any = self.ffi.dlopen(str(library))

    def bytes(self, array: npt.NDArray[Any], skew: int = 0) -> tuple[Any, npt.NDArray[np.uint8]]:
        """A copy that begins ``skew`` bytes (0..3) behind a word and ends with the word of its last byte."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        room = np.full((skew + data.size + 3) // 4 * 4, 0xEE, np.uint8)
        room[skew : skew + data.size] = data
        return self.ffi.cast("void *", room.ctypes.data + skew), room

    def dequantize(
        self, layout: Layout, blocks: npt.NDArray[np.uint8], out: str, index: Any = None, skew: int = 0
    ) -> npt.NDArray[Any]:
        """Rows as the bits of floats."""
        rows, row_bytes = blocks.shape
        n = row_bytes // layout.block_bytes * layout.block_weights
        pointer, keep = self.bytes(blocks, skew)
        n_out = rows if index is None else len(index)
        code, dtype = OUT_TYPES[out]
        result = np.full((n_out, n), 0x5555, dtype)
        ids = self.ffi.NULL
        if index is not None:
            chosen = np.array(index, np.int32)
            ids = self.ffi.cast("int32_t *", chosen.ctypes.data)
        status = self.lib.ccq_cuda_dequantize(
            layout.gguf_id, pointer, row_bytes, rows, n, ids, n_out, code,
            self.ffi.cast("void *", result.ctypes.data), n, self.ffi.NULL,
        )  # fmt: skip
        assert status == 0
        del keep
        return result

    def encode(
        self,
        layout: Layout,
        weights: npt.NDArray[np.float32],
        importance: npt.NDArray[np.float32] | None = None,
        effort: int = 0,
        coupling: npt.NDArray[np.float32] | None = None,
    ) -> tuple[int, npt.NDArray[np.uint8]]:
        """``ccq_cuda_encode``: its status, and u8 [rows, row bytes]."""
        rows, cols = weights.shape
        out = np.full((rows, cols // layout.block_weights * layout.block_bytes), 0xEE, np.uint8)
        floats = [None if a is None else np.ascontiguousarray(a, np.float32) for a in (weights, importance, coupling)]
        x, w, u = (self.ffi.NULL if a is None else self.ffi.cast("float *", a.ctypes.data) for a in floats)
        values = {
            "type": layout.gguf_id,
            "weights": x,
            "n_rows": rows,
            "n_cols": cols,
            "importance": w,
            "importance_stride": cols if importance is not None and importance.ndim == 2 else 0,
            "effort": effort,
            "coupling": u,
            "blocks": self.ffi.cast("void *", out.ctypes.data),
        }
        status = self.lib.ccq_cuda_encode(self.ffi.new("ccq_cuda_encoding *", values), self.ffi.NULL)
        return status, out

    def product(
        self,
        function: str,
        layout: Layout,
        blocks: npt.NDArray[np.uint8],
        x: npt.NDArray[Any],
        ids: Any = None,
        repeat: int = 1,
        skew: int = 0,
        x_type: int = 0,
    ) -> npt.NDArray[np.float32]:
        """``ccq_cuda_<function>``: f32 [columns, rows]; ``blocks`` [rows, row bytes] or with experts before them."""
        rows, row_bytes = blocks.shape[-2:]
        pointer, keep = self.bytes(blocks, skew)
        x = np.ascontiguousarray(x)
        n_cols = len(x) if ids is None else len(ids)
        out = np.full((n_cols, rows), 12345.0, np.float32)
        values: dict[str, Any] = {
            "type": layout.gguf_id,
            "n": row_bytes // layout.block_bytes * layout.block_weights,
            "blocks": pointer,
            "row_stride": row_bytes,
            "n_rows": rows,
            "repeat": repeat,
            "x": self.ffi.cast("void *", x.ctypes.data),
            "x_type": x_type,
            "x_stride": x.shape[1],
            "n_cols": n_cols,
            "out": self.ffi.cast("float *", out.ctypes.data),
            "out_stride": rows,
        }
        if ids is not None:
            chosen = np.array(ids, np.int32)
            values |= {
                "ids": self.ffi.cast("int32_t *", chosen.ctypes.data),
                "n_experts": blocks.shape[0],
                "expert_stride": rows * row_bytes,
            }
        status = getattr(self.lib, f"ccq_cuda_{function}")(self.ffi.new("ccq_cuda_product *", values), self.ffi.NULL)
        assert status == 0
        del keep
        return out

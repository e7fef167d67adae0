"""A model of 2 GB converts in little memory: nothing of the files stays, mapped or read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ccq_converters.hessian import HessianWriter
from ccq_format.gguf_io import ModelWriter, open_model
from support.big_model import Shape, build

MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
"""Prints the largest resident set of a command in bytes.  A process of its own, because the number that Linux reports
for a child includes its parent's at the time of the fork."""


def peak(*arguments: object) -> int:
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "ccq_converters.cli", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("big")
    yield path
    shutil.rmtree(path)  # 6 GB


@pytest.mark.slow
def test_two_gigabytes(folder: Path) -> None:
    """Most matrices become q8_0, which is quick, some CCQ_T2; all tensors go the same way."""
    model, plain, out = folder / "model", folder / "bf16.gguf", folder / "out.gguf"
    size = build(model, Shape(layers=5))
    assert size > 2 << 30
    options = ["--type", "q8_0", "--tensor-type", r"blk\.[0-4]\.attn_k=ccq_t2", "--effort", "fast", "--resume"]
    options += ["--no-calibration"]
    most = 500e6  # 136 MB measured; 2.3 GB where the input was mapped
    assert peak("hf2gguf", model, "-o", out, *options) < most
    assert out.stat().st_size > 1 << 30
    assert peak("inspect", out) < most
    out.unlink()
    assert peak("hf2gguf", model, "-o", plain, "--type", "bf16") < most
    shutil.rmtree(model)
    assert peak("quantize", plain, "-o", out, *options) < most
    assert peak("dequantize", out, "-o", folder / "back.gguf", "--type", "f16") < most
    assert open_model(folder / "back.gguf").tensor("blk.4.attn_k.weight").shape == (1024, 4096)


@pytest.mark.slow
def test_hessians(folder: Path) -> None:
    """A stack of three matrices with 4096 columns: 8 n^2 bytes for one Hessian, nothing for the others."""
    n, name = 4096, "blk.0.ffn_down_exps.weight"
    rng = np.random.default_rng(5)
    with ModelWriter(folder / "in.gguf", "llama") as writer:
        writer.add_tensor(name, "f32", (3, 4, n))
        writer.begin()
        writer.write(name, rng.standard_normal((3, 4, n), dtype=np.float32))
    x = rng.standard_normal((n // 8, n), dtype=np.float32)
    product = x.T @ x
    with HessianWriter(folder / "h.safetensors", {name: (3, n, n)}, {}) as hessians:
        hessians.begin()
        for matrix in range(3):
            hessians.write(name, product, 1000.0, matrix)
    arguments = ["quantize", folder / "in.gguf", "--type", "ccq_t2", "--effort", "fast", "--no-calibration", "-o"]
    without = peak(*arguments, folder / "a.gguf")
    assert peak(*arguments, folder / "b.gguf", "--hessian", folder / "h.safetensors") < without + 12 * n * n

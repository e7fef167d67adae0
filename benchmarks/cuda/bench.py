"""Check the CUDA kernels against the CPU, then measure them; needs a GPU, torch and ``make cuda``.

First every type's dequantize, vector and matrix products run on small matrices and are compared with the NumPy codec
(bit for bit, or within the bound of backend/cpu/ACTIVATIONS.md), and the encoder of the T types with the CPU's, byte
for byte.  Then per type: matrix-vector as a share of the memory bandwidth that a copy reaches in the same run, and both
kinds of product beside torch's own in f16; and weights encoded per second, copies to and from the GPU included, beside
the CPU's encoder on all its threads.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))

from random_models import random_blocks

import ccq_backend
from ccq_backend import cuda
from ccq_format import codec, errors
from ccq_format.layouts import GROUP, LAYOUTS, Layout

T_LAYOUTS = [layout for layout in LAYOUTS if layout.code.couples]


def check(torch: Any, layout: Layout) -> None:
    """Raise ``ClickException`` where a kernel differs from the codec."""
    rng = np.random.default_rng(1)
    rows, cols = 67, 2048 + layout.block_weights
    b = random_blocks(layout, rows, cols, 0.02, rng)
    on_gpu = torch.from_numpy(b).cuda()
    weights = codec.decode(layout, b)
    if not np.array_equal(cuda.dequantize(layout, on_gpu).cpu().numpy().view(np.uint32), weights.view(np.uint32)):
        raise click.ClickException(f"{layout.name}: dequantize differs")
    for n in (1, 4, 8, 70):
        x = rng.integers(-127, 128, (n, cols)).astype(np.float32)  # integers that 8 bits hold exactly
        x[:, ::GROUP] = 127
        got = cuda.matmul(layout, on_gpu, torch.from_numpy(x).cuda()).cpu().numpy()
        exact = x.astype(float) @ weights.astype(float).T
        bound = np.abs(x).astype(float) @ np.abs(weights).astype(float).T * (cols / GROUP + 8) * 2.0**-24
        if not (np.abs(got - exact) <= bound).all():
            raise click.ClickException(f"{layout.name}: products with {n} columns differ")


def check_encoder(layout: Layout) -> None:
    """Raise ``ClickException`` where the encoder's bytes differ from the CPU's, on more blocks than run at a time."""
    rng = np.random.default_rng(3)
    rows, cols = 256, 4 * layout.block_weights
    x = rng.standard_t(4, (rows, cols)).astype(np.float32)
    x[0] = 0
    x[1] *= np.float32(1e-9)
    x[2] *= np.float32(1e5)
    heavy = np.exp(rng.normal(0, 2, (rows, cols))).astype(np.float32)
    heavy[:, ::16] = 0
    size = layout.block_weights
    couplings = [
        (np.triu(rng.standard_normal((4, size, size)), 1) * strength).astype(np.float32) for strength in (0.1, 2.0)
    ]
    for effort in ccq_backend.EFFORTS:
        for importance in (None, heavy[0], heavy):
            for coupling in (None, *couplings):
                wanted = ccq_backend.encode(layout, x, importance, effort=effort, coupling=coupling)
                if not np.array_equal(cuda.encode(layout, x, importance, effort, coupling), wanted):
                    raise click.ClickException(f"{layout.name}: the encoder differs, effort {effort}")


def encoder_speed(layout: Layout, effort: str, repeats: int = 3) -> dict[str, object]:
    """Weights per second of both encoders, the GPU's median and one run of the CPU's on a part."""
    x = np.random.default_rng(4).standard_normal((2048, 4096), dtype=np.float32)
    coupling = np.zeros((4096 // layout.block_weights, layout.block_weights, layout.block_weights), np.float32)
    coupling += np.triu(np.full(coupling.shape[1:], 0.05, np.float32), 1)

    def speed(call: Callable[[], object], weights: int, times: int) -> float:
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return weights / statistics.median(taken)

    cuda.encode(layout, x[:64], None, effort)  # loads the kernel
    cuda.encode(layout, x[:64], None, effort, coupling)
    gpu = speed(lambda: cuda.encode(layout, x, None, effort), x.size, repeats)
    coupled = speed(lambda: cuda.encode(layout, x, None, effort, coupling), x.size, repeats)
    part = x[:64]
    cpu = speed(lambda: ccq_backend.encode(layout, part, effort=effort), part.size, 1)
    return {"type": layout.name, "effort": effort, "weights_per_s": gpu, "coupled_per_s": coupled, "to_cpu": gpu / cpu}


def seconds(torch: Any, call: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the GPU; the second-level cache is overwritten before each."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return float(statistics.median(times[3:]))


@click.command()
@click.option("--rows", default=8192, show_default=True)
@click.option("--cols", default=8192, show_default=True)
@click.option("--repeats", default=20, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="write the figures here too")
def main(rows: int, cols: int, repeats: int, json_path: Path | None) -> None:
    """Check, measure, print a table."""
    if not cuda.available():
        try:
            cuda.matvec("ccq_t2", None, None)
        except errors.CcqError as error:
            raise click.ClickException(str(error)) from None
    import torch

    for layout in LAYOUTS:
        check(torch, layout)
    for layout in T_LAYOUTS:
        check_encoder(layout)
    click.echo(f"{torch.cuda.get_device_name()}: all types agree with the codec, all encoders with the CPU's")
    source = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(torch, lambda: target.copy_(source), repeats)
    click.echo(f"copy: {bandwidth / 1e9:.0f} GB/s; matrices of {rows} x {cols}")
    rng = np.random.default_rng(2)
    prompt = torch.randn(512, cols, device="cuda", dtype=torch.float16)
    dense = torch.randn(rows, cols, device="cuda", dtype=torch.float16)
    records = []
    for layout in LAYOUTS:
        b = torch.from_numpy(random_blocks(layout, rows, cols, 0.02, rng)).cuda()
        vector = seconds(torch, lambda b=b, k=layout: cuda.matvec(k, b, prompt[:1]), repeats)  # type: ignore[misc]
        matrix = seconds(torch, lambda b=b, k=layout: cuda.matmul(k, b, prompt), repeats)  # type: ignore[misc]
        half = seconds(torch, lambda: prompt[:1] @ dense.T, repeats), seconds(torch, lambda: prompt @ dense.T, repeats)
        records.append(
            {
                "type": layout.name,
                "vector_us": vector * 1e6,
                "share_of_copy": b.numel() / vector / bandwidth,
                "vector_to_f16": half[0] / vector,
                "prompt_us": matrix * 1e6,
                "prompt_to_f16": half[1] / matrix,
            }
        )
        click.echo("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v:10}" for k, v in records[-1].items()))
    encoders = []
    for layout in T_LAYOUTS:
        for effort in ccq_backend.EFFORTS:
            encoders.append(encoder_speed(layout, effort))
            click.echo("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v:8}" for k, v in encoders[-1].items()))
    if json_path:
        result = {
            "device": torch.cuda.get_device_name(),
            "copy_bytes_per_s": bandwidth,
            "types": records,
            "encoders": encoders,
        }
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

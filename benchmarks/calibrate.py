"""Time of ``ccq-convert calibrate MODEL.gguf`` as a ratio to that of ``ccq-convert eval`` on the same windows, the runs
interleaved: importance alone, and with Hessians.

Before anything is timed, the importance is compared with the diagonals of the Hessians, which other code computes.

    python benchmarks/calibrate.py model-f16.gguf --text some.txt
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from ccq_converters import imatrix
from ccq_converters.calibration import CalibrationOptions
from ccq_converters.collect import calibrate_gguf
from ccq_converters.evaluate import evaluate, read_text
from ccq_converters.hessian import Hessians


def check(importance: imatrix.Importance, path: Path) -> None:
    """Raise ``SystemExit`` unless sums of squares and diagonals agree to float32 rounding."""
    hessians = Hessians(path)
    for name, entry in importance.entries.items():
        if name not in hessians or entry.counts.size > 1:
            continue
        product, count = hessians.product(name, 1, entry.sums.size)
        if count != entry.counts[0] or not np.allclose(product.diagonal(), entry.sums, rtol=1e-4):
            raise SystemExit(f"{name}: importance and Hessian differ")


def main() -> None:
    """Check, time, print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    text = read_text(args.text)
    options = CalibrationOptions(ctx=args.ctx, chunks=args.windows, threads=args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hessian.safetensors"

        def with_hessian() -> imatrix.Importance:
            path.unlink(missing_ok=True)
            return calibrate_gguf(args.model, text, options, hessian=path)

        check(with_hessian(), path)
        jobs = {
            "scoring": lambda: evaluate(
                args.model, text, n_ctx=args.ctx, max_windows=args.windows, threads=args.threads
            ),
            "importance": lambda: calibrate_gguf(args.model, text, options),
            "with Hessians": with_hessian,
        }
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                times[name].append(time.perf_counter() - start)
    tokens = args.ctx * args.windows
    for name, seconds in times.items():
        ratio = np.median(np.divide(seconds, times["scoring"]))
        print(f"{name:14} {tokens / np.median(seconds):7.0f} tokens/s  {ratio:.2f}")


if __name__ == "__main__":
    main()

"""The main job on one small model: convert, run in stock llama.cpp, compare.

Converts the trained model in ``examples/manllama-4m`` to f16, q8_0, llama.cpp's own Q2_K and CCQ types, runs every file
in llama.cpp with the CCQ plugin, and prints one table and a few generated lines.  ``make demo`` runs it; by hand::

    python examples/demo.py [--out FOLDER] [--windows N] [--threads N]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import click

import ccq_backend
from ccq_converters import evaluate, hf2gguf, llama
from ccq_converters.console import format_bytes
from ccq_converters.host import cpu_count
from ccq_converters.options import QuantOptions
from ccq_format.errors import CcqError
from ccq_format.gguf_io import open_model

HERE = Path(__file__).resolve().parent
MODEL = HERE / "manllama-4m"
TEXT = HERE / "heldout.txt"
BASE = "f16"
TYPES = ("f16", "q8_0", "q2_k", "ccq_p2_5", "ccq_t2")
PROMPT = "The function returns a pointer to"
N_CTX = 256
N_GENERATED = 48
ROUNDS = 5
"""Times each file generates the same text; the fastest counts, as other work on the machine only slows down."""


def convert(folder: Path, threads: int) -> dict[str, Path]:
    """All files of the comparison, by type; llama.cpp's own Q2_K gets the treatment of our default plan."""
    files = {name: folder / f"manllama-4m-{name}.gguf" for name in TYPES}
    for name, path in files.items():
        start = time.perf_counter()
        if name == "q2_k":
            llama.stock_quantize(files[BASE], path, name, threads=threads)
        else:
            hf2gguf.convert(MODEL, path, QuantOptions(name, threads=threads, overwrite=True))
        click.echo(f"  {path.name}: {format_bytes(path.stat().st_size)} in {time.perf_counter() - start:.1f} s")
    return files


def measure(files: dict[str, Path], windows: int, threads: int) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows of the table and one generated text per file."""
    text = evaluate.read_text(TEXT)
    rows = [("type", "file size", "bits/weight", "perplexity", "KL divergence", "same top", "tokens/s")]
    lines = []
    for name, path in files.items():
        base = None if name == BASE else files[BASE]
        result = evaluate.evaluate(path, text, base_path=base, n_ctx=N_CTX, threads=threads, max_windows=windows)
        with llama.LlamaModel(path, n_ctx=N_CTX, threads=threads) as model:
            runs = [model.generate(PROMPT, N_GENERATED) for _ in range(ROUNDS)]
            generated, speed = runs[0][0], max(speed for _, speed in runs)
        against = ("(base)", "") if result.top1 is None else (f"{result.kld_mean:.5f}", f"{100 * result.top1:.2f} %")
        rows.append(
            (
                name,
                format_bytes(path.stat().st_size),
                f"{open_model(path).file_bpw:.3f}",
                f"{result.ppl:.3f} +/- {result.ppl_stderr:.3f}",
                *against,
                f"{speed:.0f}",
            )
        )
        lines.append(f"{name:>9}: {PROMPT}{' '.join(generated.splitlines())}")
        click.echo(f"  {name}: perplexity {result.ppl:.3f}")
    return rows, lines


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned text, the first one as the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    """Run the whole demonstration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo-out", help="folder for the GGUF files")
    parser.add_argument("--windows", type=int, default=64, help=f"windows of {N_CTX} tokens to score")
    # So small a model gains nothing from a second thread, and threads that wait for each other stall on a busy machine.
    parser.add_argument("--threads", type=int, default=1, help="threads of llama.cpp; 0 = one per CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    threads = args.threads or cpu_count()
    try:
        llama.library()
        ccq_backend.load_plugin()
        click.echo(f"Converting {MODEL.name} ({ccq_backend.isa()} kernels, {cpu_count()} threads)")
        files = convert(args.out, cpu_count())
        click.echo(
            f"Measuring in llama.cpp: {args.windows} windows of {N_CTX} tokens of {TEXT.name}, threads: {threads}"
        )
        rows, lines = measure(files, args.windows, threads)
    except CcqError as error:
        raise SystemExit(f"Error: {error}") from None
    click.echo("\n" + table(rows) + "\n\nGreedy continuations:\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

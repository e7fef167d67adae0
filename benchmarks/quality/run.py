"""Quality of every type on one model, ours and llama.cpp's: files, CSV, plot and tables with one command.

    python benchmarks/quality/run.py MODEL_DIR --text heldout.txt --calibration calibration.txt --csv table.csv

Makes a GGUF file of each type in three settings: without data; with the importance of the input channels; and (ours)
with Hessians for error feedback as well.  All matrices have the one type, embedding and output q8_0; llama.cpp's types
are quantized by llama.cpp itself (the library inside llama-cpp-python), with the same importance file.  Every file runs
in llama.cpp and is compared with the unquantized f32 model: perplexity, KL divergence, agreement on the top token.

Rows that the CSV has already are skipped, so that an interrupted run goes on where it was; ``--only ccq --again``
measures ours anew.  Needs ``pip install '.[llama,calibrate,bench]'``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import click
from measurements import (
    BASE,
    HESSIAN,
    NONE,
    STOCK,
    T_TYPES,
    TARGETS,
    Recipe,
    Row,
    Table,
    embed,
    markdown,
    markdown_comparisons,
    recipes,
    scores,
)

import ccq_backend
from ccq_converters import evaluate, hf2gguf, imatrix, llama
from ccq_converters.base_record import BaseLogits
from ccq_converters.calibrate import calibrate
from ccq_converters.calibration import CalibrationOptions
from ccq_converters.console import format_bytes
from ccq_converters.gguf_sources import sources_of
from ccq_converters.hessian import Hessians
from ccq_converters.options import QuantOptions
from ccq_converters.plan import free_matrices
from ccq_format.errors import CcqError, EvalError, PlanError
from ccq_format.gguf_io import open_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True)
class Settings:
    """The command line."""

    model: Path
    text: Path
    calibration: Path | None
    out: Path
    csv: Path
    plot: Path
    readme: Path | None
    ctx: int
    windows: int | None
    calibration_windows: int
    only: str
    again: bool
    effort: str
    threads: int
    discard: bool


def matrices_of(path: Path) -> frozenset[str]:
    """Names of a model's tensors that are to have the type: all but embedding, output, norms and the like."""
    return frozenset(source.name for source in free_matrices(sources_of(open_model(path)), QuantOptions("q8_0")))


class Bench:
    """Makes what rows need when the first of them needs it, and the rows."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.label = settings.model.resolve().name

    @cached_property
    def base_file(self) -> Path:
        """The unquantized model; f32, so that nothing is rounded."""
        path = self.settings.out / "base-f32.gguf"
        hf2gguf.convert(self.settings.model, path, QuantOptions("f32", overwrite=True))
        return path

    @cached_property
    def base(self) -> BaseLogits | None:
        """The base's predictions, or ``None`` if they would fill more than half of what is free on the disk."""
        s = self.settings
        text = evaluate.read_text(s.text)
        with llama.LlamaModel(self.base_file, n_ctx=s.ctx, threads=1) as model:
            windows = min(len(model.tokenize(text)) // s.ctx, s.windows or 1 << 62)
            needed = 2 * model.n_vocab * windows * (s.ctx - 1 - s.ctx // 2)
        if needed > shutil.disk_usage(s.out).free // 2:
            click.echo(f"The base runs beside every file: a record would take {format_bytes(needed)} of {s.out}")
            return None
        click.echo(f"Running the base model: {windows} windows of {s.ctx} tokens")
        return evaluate.record_base(self.base_file, text, s.out, n_ctx=s.ctx, threads=s.threads, max_windows=s.windows)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """See ``matrices_of``."""
        return matrices_of(self.base_file)

    @cached_property
    def data(self) -> tuple[imatrix.Importance, Hessians]:
        """Importance and Hessians; made again unless they are there, of this text, and newer than it and the model."""
        s = self.settings
        assert s.calibration is not None
        files = importance, products = s.out / "imatrix.gguf", s.out / "hessian.safetensors"
        sources = [s.calibration, *s.model.glob("*")]
        fresh = all(f.exists() for f in files) and min(f.stat().st_mtime for f in files) > max(
            f.stat().st_mtime for f in sources
        )
        if fresh:
            known = imatrix.load(importance)
            fresh = (known.datasets, known.chunk_size) == ([str(s.calibration)], s.ctx)
            fresh = fresh and known.chunk_count == s.calibration_windows
            fresh = fresh and all(entry.gradients is not None for entry in known.entries.values())
        if not fresh:
            click.echo(f"Calibrating: up to {s.calibration_windows} windows of {s.ctx} tokens of {s.calibration.name}")
            options = CalibrationOptions(
                s.ctx, s.calibration_windows, threads=s.threads, overwrite=True, gradients=True
            )
            calibrate(s.model, s.calibration, importance, options, hessian=products)
        return imatrix.load(importance), Hessians(products)

    def make(self, recipe: Recipe, path: Path) -> None:
        """Write the file of ``recipe``."""
        s = self.settings
        importance = None if recipe.setting == NONE else self.data[0]
        if recipe.family == STOCK:
            llama.stock_quantize(self.base_file, path, recipe.name, importance=importance, threads=s.threads)
            return
        options = QuantOptions(
            **recipe.options,
            threads=s.threads,
            effort=s.effort,
            overwrite=True,
            imatrix=importance,
            hessian=self.data[1] if recipe.setting == HESSIAN else None,
        )
        hf2gguf.convert(s.model, path, options)

    def measure(self, recipe: Recipe) -> Iterator[Row]:
        """Make the file of ``recipe`` and yield its row, and that of the base model.  Raises ``PlanError`` if no matrix
        of the model can have the type."""
        s = self.settings
        path = s.out / f"{recipe.name}-{recipe.setting}.gguf"
        _ = self.base_file, recipe.setting == NONE or self.data  # not part of the time
        start = time.process_time()
        self.make(recipe, path)
        seconds = time.process_time() - start
        model = open_model(path)
        tensors = [t for t in model.tensors if t.name in self.matrices]
        weights = sum(t.n_weights for t in tensors)
        others = [t.type_name for t in tensors if t.type_name != recipe.name] if recipe.pure else []
        note = f"{len(others)} of {len(tensors)} matrices are {', '.join(sorted(set(others)))}" if others else ""
        if len(others) == len(tensors):
            raise PlanError(f"left out: no row length of the model fits the type, {note}", file=path)
        if self.base is not None:
            result = evaluate.compare(path, self.base, threads=s.threads)
        else:
            text = evaluate.read_text(s.text)
            result = evaluate.evaluate(
                path, text, base_path=self.base_file, n_ctx=s.ctx, threads=s.threads, max_windows=s.windows
            )
        stock = f"llama-cpp-python {version('llama-cpp-python')}"
        assert result.ppl_base is not None
        yield Row(
            model=self.label,
            setting=recipe.setting,
            type=recipe.name,
            family=recipe.family,
            effort=effort_of(recipe, s),
            matrix_bpw=8 * sum(t.nbytes for t in tensors) / weights,
            file_bpw=model.file_bpw,
            file_bytes=path.stat().st_size,
            **scores(result),
            cpu_seconds=1e6 * seconds / weights,
            made_by=stock if recipe.family == STOCK else f"ccq {version('ccq')}",
            note=note,
        )
        base = open_model(self.base_file)
        yield Row(
            model=self.label,
            setting=NONE,
            type="f32",
            family=BASE,
            effort="",
            matrix_bpw=32.0,
            file_bpw=base.file_bpw,
            file_bytes=self.base_file.stat().st_size,
            scored=result.scored,
            ppl=result.ppl_base,
            ppl_stderr=result.ppl_base_stderr or 0.0,
            kld=0.0,
            kld_stderr=0.0,
            kld_p99=0.0,
            top1=1.0,
            cpu_seconds=0.0,
            made_by=f"ccq {version('ccq')}",
        )
        if s.discard:
            path.unlink()


def effort_of(recipe: Recipe, settings: Settings) -> str:
    """What the effort of a row says: only the T types' encoder has one."""
    return settings.effort if recipe.family in (T_TYPES, TARGETS) else ""


def wanted(settings: Settings, table: Table) -> list[Recipe]:
    """The recipes to measure in this run.  Raises ``EvalError`` if ``--only`` matches none."""
    chosen = [r for r in recipes() if re.search(settings.only, r.key)]
    if not chosen:
        raise EvalError(f"--only '{settings.only}' matches none of {', '.join(r.key for r in recipes())}")
    if settings.calibration is None:
        if all(r.setting != NONE for r in chosen):
            raise EvalError("these files need --calibration, a text that is like the one to score, but another")
        chosen = [r for r in chosen if r.setting == NONE]
        click.echo("No --calibration: only files made without data")

    def done(recipe: Recipe) -> bool:
        row = table.rows.get(recipe.key)
        return row is not None and row.effort == effort_of(recipe, settings)

    return [r for r in chosen if settings.again or not done(r)]


def setup_of(settings: Settings) -> dict[str, object]:
    """How rows are measured: what must be the same for all rows of a table."""
    s = settings
    setup: dict[str, object] = {
        "model": s.model.resolve().name,
        "text": f"{s.text.name}, sha256 {_sha256(s.text)}",
        "context": s.ctx,
        "windows": s.windows or "all",
        "kernels": ccq_backend.isa(),
    }
    if s.calibration is not None:
        setup["calibration"] = f"{s.calibration.name}, sha256 {_sha256(s.calibration)}"
        setup["calibration_windows"] = s.calibration_windows
    return setup


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EvalError(error.strerror or str(error), file=path) from None


def run(settings: Settings) -> None:
    """Measure what is missing, write the CSV after every file, then draw and print."""
    settings.out.mkdir(parents=True, exist_ok=True)
    table = Table(settings.csv)
    todo = wanted(settings, table)
    table.check_setup(setup_of(settings))
    if todo:
        llama.library()
        ccq_backend.load_plugin()
    bench = Bench(settings)
    for number, recipe in enumerate(todo, 1):
        start = time.perf_counter()
        try:
            for row in bench.measure(recipe):
                if row.family != BASE or row.key not in table.rows:
                    table.put(row)
        except PlanError as error:
            click.echo(f"[{number}/{len(todo)}] {recipe.key}: {error}")
            continue
        row = table.rows[recipe.key]
        click.echo(
            f"[{number}/{len(todo)}] {recipe.key}: {row.matrix_bpw:.4g} bits, perplexity {row.ppl:.4f}, "
            f"KL divergence {row.kld:.5f} ({time.perf_counter() - start:.0f} s) {row.note}"
        )
    try:
        import plot
    except ImportError as error:
        click.echo(f"No plot: {error} (pip install '.[bench]')")
    else:
        plot.draw(table.sorted(), settings.plot)
        click.echo(f"Drawn: {settings.plot}")
    comparisons = markdown_comparisons(table.rows)
    if settings.readme is not None:
        embed(settings.readme, settings.csv.stem, comparisons)
    click.echo(f"\n{markdown(table.sorted())}\n\n{comparisons}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLES / "manllama-4m", help="Hugging Face folder")
    parser.add_argument("--text", type=Path, default=EXAMPLES / "heldout.txt", help="UTF-8 text to score")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text for importance and Hessians; none: no such files")
    parser.add_argument("--out", type=Path, default=Path("quality-out"), help="folder for the files  [quality-out]")
    parser.add_argument("--csv", type=Path, help="table to add to  [OUT/quality.csv]")
    parser.add_argument("--plot", type=Path, help="SVG file to draw  [the table's name with .svg]")
    parser.add_argument("--readme", type=Path, help="Markdown file to put the comparisons in, between its two marks")
    parser.add_argument("--ctx", type=int, default=256, help="tokens per window  [256]")
    parser.add_argument("--windows", type=int, help="score only the first windows, half a context each  [all]")
    parser.add_argument("--calibration-windows", type=int, default=256, help="windows of calibration text  [256]")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these of SETTING/TYPE, as imatrix/ccq_t2")
    parser.add_argument("--again", action="store_true", help="also files whose row is there")
    parser.add_argument("--effort", default="default", choices=ccq_backend.EFFORTS, help="of the T types' encoder")
    parser.add_argument("--threads", type=int, default=1, help="0: one per CPU  [1]")
    parser.add_argument("--discard", action="store_true", help="delete each file when it is measured")
    args = vars(parser.parse_args())
    args["csv"] = args["csv"] or args["out"] / "quality.csv"
    args["plot"] = args["plot"] or args["csv"].with_suffix(".svg")
    try:
        run(Settings(**args))
    except re.error as error:
        raise SystemExit(f"Error: --only is no regular expression: {error}") from None
    except CcqError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()

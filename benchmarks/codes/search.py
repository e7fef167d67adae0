"""Search and measure the constants of the trellis codes (types CCQ_T*).

Commands (see README.md for what came out):

``multipliers``  every odd hash multiplier of a type, in stages of fewer candidates on more weights
``final``        the multipliers that ``ccq_format.layouts`` holds, on 2^20 weights of each source
``variants``     other window lengths, level maps and scale encodings, each with the best of a smaller search
``one-bit``      CCQ_T1: a few hundred multipliers, and cycles of 64, 128 and 256 weights

relmse is squared error over signal power.  All samples come from numpy's PCG64 with fixed seeds, so a run repeats
exactly; ``search.c`` is compiled with the system compiler ($CC or cc) into a temporary folder.
"""

from __future__ import annotations

import csv
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from ccq_format.layouts import GROUP, LAYOUTS, TrellisCode  # noqa: E402

Floats = NDArray[np.float32]
TYPES: dict[str, TrellisCode] = {
    x.name.upper(): x.code for x in LAYOUTS if isinstance(x.code, TrellisCode) and x.code.steps == GROUP
}
SOURCES = ("gaussian", "laplace", "student_t5")
WEIGHT = {"gaussian": 0.6, "laplace": 0.2, "student_t5": 0.2}
FIELDS = 1 << 16


@cache
def library(cycle: int = GROUP) -> ctypes.CDLL:
    """``search.c`` as a shared library for tail-biting cycles of so many steps."""
    out = Path(tempfile.mkdtemp(prefix="ccq-search-")) / "search.so"
    flags = ["-O3", "-march=native", f"-DBLOCK={cycle}", "-shared", "-fPIC", "-o", str(out), str(HERE / "search.c")]
    flags.append("-lm")
    subprocess.run([os.environ.get("CC", "cc"), *flags], check=True)
    lib = ctypes.CDLL(str(out))
    pf, pi, pd = (ctypes.POINTER(t) for t in (ctypes.c_float, ctypes.c_int, ctypes.c_double))
    lib.path_error.restype = ctypes.c_double
    lib.path_error.argtypes = [pf, ctypes.c_int, ctypes.c_int, pi, pf, ctypes.c_int64, ctypes.c_float]
    lib.block_errors.restype = ctypes.c_int64
    lib.block_errors.argtypes = [pf, ctypes.c_int, ctypes.c_int, pi, pf, ctypes.c_int64, pf, ctypes.c_int]
    lib.block_errors.argtypes += [ctypes.c_float, ctypes.c_float, ctypes.c_int, ctypes.c_int, ctypes.c_int, pd]
    return lib


def scale_table(mantissa_bits: int) -> Floats:
    """Float32 scales of the bytes 1..255 in ascending order: (2^k + m) * 2^(e - bias), k mantissa bits below e.

    Three is the format's; the biases of the others put weights of unit variance in the middle of the range.
    """
    b, one = np.arange(1, 256), 1 << mantissa_bits
    bias = {2: 41, 3: TrellisCode.scale_exponent_bias, 4: 17}[mantissa_bits]
    return np.ldexp(np.float32(one + b % one), (b // one - bias).astype(np.int32)).astype(np.float32)


@dataclass(frozen=True)
class Map:
    """u -> level, one int8 per window: two bit fields of the 16-bit hash u * M + addend."""

    window_bits: int = TrellisCode.window_bits
    mask: int = TrellisCode.field_mask
    shift: int = TrellisCode.field_shift
    addend: int = 0

    def levels(self, multiplier: int) -> Floats:
        """Float32 level of every window; the offset makes the largest and smallest level symmetric."""
        h = (np.arange(1 << self.window_bits, dtype=np.int64) * multiplier + self.addend) % FIELDS
        return ((h & self.mask) + (h >> self.shift & self.mask) - self.mask).astype(np.float32)

    @property
    def rms(self) -> float:
        """Root mean square level of a uniform hash."""
        return float(np.sqrt(((self.mask + 1) ** 2 - 1) / 6))


@dataclass(frozen=True)
class Code:
    """Everything that ``search.c`` needs besides the multiplier."""

    strides: tuple[int, ...]
    map: Map = field(default_factory=Map)
    mantissa_bits: int = 3
    cycle: int = GROUP

    def path_relmse(self, multiplier: int, x: Floats, gain: float) -> float:
        """relmse of one long path over x with the scale gain * rms(x) / rms(levels): a ranking, not a type."""
        levels, inverse = self.map.levels(multiplier), self.map.rms / gain
        e = library().path_error(
            _f(levels), self.map.window_bits, len(self.strides), self._strides(), _f(x), x.size, inverse
        )
        return float(e / inverse**2 / np.dot(x, x))

    def block_relmse(self, multiplier: int, x: Floats, below: int = 2, above: int = 3, reach: int = 14) -> float:
        """relmse of the whole type: tail-biting blocks with their scale bytes, every scale in reach tried."""
        k = 1 << max(0, self.mantissa_bits - 3)  # scale entries are this much finer than the type's own
        return self.scaled_relmse(multiplier, x, scale_table(self.mantissa_bits), below * k, above * k, reach * k)

    def scaled_relmse(self, multiplier: int, x: Floats, scales: Floats, below: int, above: int, reach: int) -> float:
        """relmse of tail-biting cycles, each with the best of the ascending ``scales`` from ``below`` entries under its
        own size to ``above`` over it, or to ``reach`` until its largest weight fits."""
        levels, e = self.map.levels(multiplier), np.empty(x.size // self.cycle)
        library(self.cycle).block_errors(
            _f(levels),
            self.map.window_bits,
            len(self.strides),
            self._strides(),
            _f(x),
            e.size,
            _f(scales),
            scales.size,
            self.map.rms,
            self.map.mask,
            below,
            above,
            reach,
            e.ctypes.data_as(ctypes.POINTER(ctypes.c_double)),
        )
        return float(e.sum() / np.dot(x.astype(np.float64), x))

    def _strides(self) -> ctypes.Array[ctypes.c_int]:
        return (ctypes.c_int * len(self.strides))(*self.strides)


def _f(a: Floats) -> ctypes._Pointer[ctypes.c_float]:
    return a.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def samples(source: str, n: int, seed: int) -> Floats:
    """n independent weights of unit variance."""
    rng = np.random.default_rng(seed)
    if source == "gaussian":
        x = rng.standard_normal(n)
    elif source == "laplace":
        x = rng.laplace(scale=0.5**0.5, size=n)
    else:
        x = rng.standard_t(5, n) * (3 / 5) ** 0.5
    return x.astype(np.float32)


def octave(x: Floats, seed: int) -> Floats:
    """Blocks of x multiplied by random factors from [1, 2): no scale grid can be tuned to one variance."""
    factor = np.exp2(np.random.default_rng(seed).random(x.size // GROUP)).astype(np.float32)
    return (x.reshape(-1, GROUP) * factor[:, None]).reshape(-1)


def score(relmse: dict[str, float]) -> float:
    """Combined criterion: geometric mean of the sources' relmse, 0.6 Gaussian + 0.2 Laplace + 0.2 Student-t(5)."""
    return float(np.exp(sum(WEIGHT[s] * np.log(relmse[s]) for s in SOURCES)))


def best_gain(code: Code, multipliers: Sequence[int]) -> float:
    """The path gain with the least mean relmse over a few multipliers."""
    x = samples("gaussian", 4096, 1)
    gains = np.arange(0.95, 1.35, 0.04)
    mean = [np.mean([code.path_relmse(m, x, g) for m in multipliers]) for g in gains]
    return float(gains[int(np.argmin(mean))])


def rank(pool: ThreadPoolExecutor, items: Iterable[int], cost: Callable[[int], float]) -> list[tuple[float, int]]:
    """(cost, item), least first."""
    items = list(items)
    return sorted(zip(pool.map(cost, items), items, strict=True))


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file; floats with six significant digits."""
    with path.open("w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(header)
        out.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)


def path_search(
    pool: ThreadPoolExecutor, code: Code, candidates: Sequence[int], stages: Sequence[tuple[int, int]]
) -> list[list[tuple[float, int]]]:
    """Stages of (weights, survivors): rank the survivors of the stage before on fresh Gaussian samples."""
    gain, out = best_gain(code, candidates[5 :: max(1, len(candidates) // 6)][:6]), []
    keep = list(candidates)
    for stage, (n, survivors) in enumerate(stages):
        x = samples("gaussian", n, 100 + stage)
        ranked = rank(pool, keep, partial(code.path_relmse, x=x, gain=gain))
        keep = [m for _, m in ranked[:survivors]]
        out.append(ranked)
    return out


def whole(
    pool: ThreadPoolExecutor, code: Code, multipliers: Sequence[int], n: int, seed: int
) -> list[tuple[float, int, dict[str, float]]]:
    """(score, multiplier, relmse by source) of whole types on n weights per source, least score first."""
    xs = {s: samples(s, n, seed + i) for i, s in enumerate(SOURCES)}
    jobs = [(m, s) for m in multipliers for s in SOURCES]
    got = dict(zip(jobs, pool.map(lambda j: code.block_relmse(j[0], xs[j[1]]), jobs), strict=True))
    by = {m: {s: got[m, s] for s in SOURCES} for m in multipliers}
    return sorted(((score(by[m]), m, by[m]) for m in multipliers), key=lambda r: r[:2])


@click.group()
def main() -> None:
    """Search and measure the constants of the CCQ_T types."""


PATH_STAGES = ((1 << 11, 512), (1 << 14, 64), (1 << 16, 8))
TYPE_STAGES = ((1 << 16, 2, 200), (1 << 20, 1, 300))


def report(name: str, n: int, table: list[tuple[float, int, dict[str, float]]]) -> list[Sequence[object]]:
    """Print a ``whole`` table and return it as CSV rows."""
    for c, m, by in table:
        click.echo(f"{name} type, {n} weights: M {m} score {c:.5f} " + " ".join(f"{s} {by[s]:.5f}" for s in SOURCES))
    return [(f"type {n}", m, *(by[s] for s in SOURCES), c) for c, m, by in table]


@main.command()
@click.option(
    "--type", "names", multiple=True, type=click.Choice(list(TYPES), case_sensitive=False), help="default: all four"
)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", default=HERE / "results", type=click.Path(file_okay=False, path_type=Path), show_default=True)
def multipliers(names: tuple[str, ...], threads: int, out: Path) -> None:
    """Search all odd multipliers below 2^15 (bit 15 of the hash is never used, so M and M + 2^15 are one code)."""
    keep: dict[str, list[int]] = {}
    rows: dict[str, list[Sequence[object]]] = {}
    names, header = names or tuple(TYPES), ["stage", "multiplier", *SOURCES, "score"]
    with ThreadPoolExecutor(threads) as pool:
        for name in names:
            ranks = path_search(pool, Code(TYPES[name].strides), range(1, FIELDS // 2, 2), PATH_STAGES)
            rows[name] = []
            for (n, survivors), ranked in zip(PATH_STAGES, ranks, strict=True):
                median = ranked[len(ranked) // 2][0]
                click.echo(
                    f"{name} path, {n} weights: {len(ranked)} multipliers, best {ranked[0]}, median {median:.5f}"
                )
                rows[name] += [(f"path {n}", m, e, "", "", e) for e, m in ranked[:20]]
                keep[name] = [m for _, m in ranked[:survivors]]
            name_stage(pool, name, 0, keep, rows)
            write(out / f"search_{name.lower()}.csv", header, rows[name])
        for name in names:
            name_stage(pool, name, 1, keep, rows)
            write(out / f"search_{name.lower()}.csv", header, rows[name])
            click.echo(f"{name}: M = {keep[name][0]}")
    click.echo(f"{time.process_time():.0f} CPU seconds")


def name_stage(
    pool: ThreadPoolExecutor, name: str, stage: int, keep: dict[str, list[int]], rows: dict[str, list[Sequence[object]]]
) -> None:
    """One stage of whole-type measurements of the multipliers in ``keep[name]``."""
    n, survivors, seed = TYPE_STAGES[stage]
    table = whole(pool, Code(TYPES[name].strides), keep[name], n, seed)
    keep[name] = [m for _, m, _ in table[:survivors]]
    rows[name] += report(name, n, table)


@main.command()
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out", default=HERE / "results" / "final.csv", type=click.Path(dir_okay=False, path_type=Path), show_default=True
)
def final(threads: int, out: Path) -> None:
    """Whole types with the multipliers of ``ccq_format.layouts``, 2^20 weights per source on fresh seeds."""
    rows: list[Sequence[object]] = []
    with ThreadPoolExecutor(threads) as pool:
        for layout in LAYOUTS:
            code = TYPES.get(layout.name.upper())
            if code is not None:
                ((c, m, by),) = whole(pool, Code(code.strides), [code.multiplier], 1 << 20, 900)
                rows.append((layout.name, m, layout.bpw, *(by[s] for s in SOURCES), c, by["gaussian"] * 4**layout.bpw))
                click.echo(" ".join(map(str, rows[-1])))
    write(out, ["type", "multiplier", "bpw", *SOURCES, "score", "gaussian distance from limit"], rows)


VARIANTS = {
    "format": {},
    "L = 10": {"window_bits": 10},
    "L = 11": {"window_bits": 11},
    "L = 13": {"window_bits": 13},
    "L = 14": {"window_bits": 14},
    "two 6-bit fields": {"mask": 0x3F},
    "two 5-bit fields": {"mask": 0x1F},
    "two 8-bit fields (maddubs saturates)": {"mask": 0xFF},
    "fields 7 bits apart": {"shift": 7},
    "hash + 0x2b5d": {"addend": 0x2B5D},
    "hash + 0x6b43": {"addend": 0x6B43},
}


@main.command()
@click.option(
    "--type",
    "names",
    multiple=True,
    type=click.Choice(list(TYPES), case_sensitive=False),
    default=("CCQ_T2", "CCQ_T3"),
    show_default=True,
)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out",
    default=HERE / "results" / "variants.csv",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default=True,
)
def variants(names: tuple[str, ...], threads: int, out: Path) -> None:
    """Each variant with the best of the same 512 random multipliers, whole types on 2^15 weights per source.

    Scale encodings come last: the format's multiplier, blocks of random variance, only the mantissa differs.
    """
    rows: list[Sequence[object]] = []
    candidates = sorted(
        int(m) for m in np.random.default_rng(7).choice(np.arange(1, FIELDS // 2, 2), 512, replace=False)
    )
    with ThreadPoolExecutor(threads) as pool:
        for name in names:
            strides, base = TYPES[name].strides, 0.0
            for label, change in VARIANTS.items():
                code = Code(strides, Map(**change))
                stages = path_search(pool, code, candidates, ((1 << 11, 48), (1 << 14, 4)))
                c, m, by = whole(pool, code, [m for _, m in stages[-1][:3]], 1 << 15, 500)[0]
                base = base or c
                rows.append((name, label, m, *(by[s] for s in SOURCES), c, f"{100 * (c / base - 1):+.1f} %"))
                click.echo(" ".join(map(str, rows[-1])))
            multiplier, base = TYPES[name].multiplier, 0.0
            xs = {s: octave(samples(s, 1 << 16, 600), 700) for s in SOURCES}
            for bits in (3, 2, 4):
                code = Code(strides, mantissa_bits=bits)
                relmse = pool.map(code.block_relmse, [multiplier] * len(SOURCES), [xs[s] for s in SOURCES])
                by = dict(zip(SOURCES, relmse, strict=True))
                base = base or score(by)
                rows.append(
                    (
                        name,
                        f"scale with {bits} mantissa bits",
                        multiplier,
                        *by.values(),
                        score(by),
                        f"{100 * (score(by) / base - 1):+.1f} %",
                    )
                )
                click.echo(" ".join(map(str, rows[-1])))
    write(out, ["type", "variant", "multiplier", *SOURCES, "score", "against the format"], rows)


CYCLES = (64, 128, 256)
ONE_BIT = 1 << 16
"""Gaussian weights that cycles are compared on."""


@main.command("one-bit")
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out",
    default=HERE / "results" / "one_bit.csv",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default=True,
)
def one_bit(threads: int, out: Path) -> None:
    """CCQ_T1: 256 random multipliers and those of the other types on one path of 2^18 Gaussian weights; then cycles of
    64, 128 and 256 weights, with one scale for all and with one for each, not rounded, of 8 bits."""
    candidates = {int(m) for m in np.random.default_rng(7).choice(np.arange(1, FIELDS // 2, 2), 256, replace=False)}
    multipliers = sorted(candidates | {code.multiplier for code in TYPES.values()})
    rows: list[Sequence[object]] = []
    with ThreadPoolExecutor(threads) as pool:
        (ranked,) = path_search(pool, Code((1,)), multipliers, ((1 << 18, 1),))
    for relmse, multiplier in ranked[:20]:
        rows.append((f"path {1 << 18}", multiplier, relmse, relmse * 4))
    chosen = next(layout.code for layout in LAYOUTS if layout.name == "ccq_t1")
    assert isinstance(chosen, TrellisCode)
    x = samples("gaussian", ONE_BIT, 900)
    for cycle in CYCLES:
        code = Code((1,), cycle=cycle)
        measure = partial(code.scaled_relmse, chosen.multiplier, x)
        gains = (np.arange(0.7, 1.1, 0.03) / code.map.rms).astype(np.float32)
        common = min(measure(gains[i : i + 1], 0, 0, 0) for i in range(len(gains)))
        rows.append((f"cycles of {cycle}, one scale", chosen.multiplier, common, common * 4))
        fine = (np.geomspace(0.5, 2, 71) / code.map.rms).astype(np.float32)  # 2 % apart
        own = measure(fine, 20, 10, 10)
        rows.append((f"cycles of {cycle}, one scale each", chosen.multiplier, own, own * 4 ** (1 + 8 / cycle)))
    for row in rows:
        click.echo(" ".join(map(str, row)))
    write(out, ["what", "multiplier", "gaussian", "gaussian distance from limit"], rows)


if __name__ == "__main__":
    main()

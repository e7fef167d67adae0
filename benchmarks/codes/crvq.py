"""CRVQ's learned codebooks and relaxed channels (arXiv 2412.09282) beside a trellis at about one bit per weight.

    python benchmarks/codes/crvq.py MODEL.gguf HESSIAN.safetensors TENSOR...
    python benchmarks/codes/crvq.py MODEL.gguf HESSIAN.safetensors --write OUT.gguf [--relaxed]

MODEL is an f32, f16 or bf16 file, HESSIAN that of ``ccq-convert calibrate --hessian``.  Prints what the first 16 rows
of each tensor lose, ``tr(E H E^T) / tr(W H W^T)``, and the bits per weight without codebooks and permutations; or
writes the model with all matrices but the embedding as they are decoded from one codebook (``vq``) or, with
``--relaxed``, ``crvq``, for ``ccq-convert eval``.  All codes get the same error feedback (converters/feedback.py),
between groups of 64 columns for the trellis, of 8 for CRVQ, which also weighs the errors inside a group exactly; every
row has one scale, of 16 bits.

    vq           one codebook of 256 vectors of 8, weighted k-means: one byte for 8 weights
    crvq         the 1/32 of the channels that lose most in front, with three more codebooks on what is left
    stride 1     the trellis of CCQ_T1, cycles of 64
    spread       the same with 4 strides of 2 in each cycle, evenly spread
    relaxed      those 4 strides on the 4 channels of each group that matter most, which stand in front
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from ccq_converters.hessian import Hessians
from ccq_format.gguf_io import Model, ModelWriter, open_model
from ccq_format.layouts import GROUP, Layout, TrellisCode, by_name
from ccq_format.trellis import levels, viterbi

F64 = NDArray[np.float64]
VECTOR, ENTRIES = 8, 256
DAMPING, SHRINKAGE = 0.01, 0.125  # as converters/feedback.py


def factors(h: F64) -> tuple[F64, F64]:
    """``U diag(d) U^T = h``, damped; U unit upper triangular."""
    h = h + DAMPING * np.eye(len(h))
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    d = np.diagonal(upper)
    return upper / d, d**2


def feed_back(w: F64, upper: F64, size: int, encode: object) -> F64:
    """Errors of ``w`` encoded ``size`` columns at a time: ``encode(target, first)`` returns the decoded columns."""
    out, target = np.empty_like(w), w.copy()
    for first in range(0, w.shape[1], size):
        stop = first + size
        out[:, first:stop] = encode(target[:, first:stop], first)  # type: ignore[operator]
        target[:, stop:] += (w[:, first:stop] - out[:, first:stop]) @ upper[first:stop, stop:]
    return w - out


# --- CRVQ -------------------------------------------------------------------------------------------------------------


def assign(x: F64, weights: F64, book: F64) -> NDArray[np.int64]:
    """Index of the entry nearest to each vector ``[n, 8]`` in the weighted squared error."""
    step = 1 << 14
    parts = [
        (weights[i : i + step] @ (book**2).T - 2 * (weights[i : i + step] * x[i : i + step]) @ book.T).argmin(axis=1)
        for i in range(0, len(x), step)
    ]
    return np.concatenate(parts)


def k_means(w: F64, column_weights: F64, rng: np.random.Generator, rounds: int = 20) -> F64:
    """A codebook ``[256, 8]`` for rows ``w``; entries that no vector chooses move to where the errors are largest."""
    x = w.reshape(-1, VECTOR)
    weights = np.broadcast_to(column_weights, w.shape).reshape(-1, VECTOR)
    book: F64 = x[rng.choice(len(x), ENTRIES, replace=len(x) < ENTRIES)]
    for _ in range(rounds):
        chosen = assign(x, weights, book)
        sums, mass = np.zeros_like(book), np.zeros_like(book)
        np.add.at(sums, chosen, weights * x)
        np.add.at(mass, chosen, weights)
        book = np.where(mass > 0, sums / np.maximum(mass, 1e-300), book)
        empty = np.flatnonzero(mass.sum(axis=1) == 0)
        worst = np.argsort(-(weights * (x - book[chosen]) ** 2).sum(axis=1))
        book[empty[: len(worst)]] = x[worst[: len(empty)]]
    return book


def crvq(w: F64, h: F64, extra: int, scored: int, learned: int | None = None) -> tuple[F64, float]:
    """Errors of the first ``scored`` rows and bits with ``extra`` more codebooks for the most important channels.
    Codebooks are learned from ``learned`` rows, evenly spread."""
    rng = np.random.default_rng(0)
    scale = np.sqrt((w**2).mean(axis=1, keepdims=True))
    x, order, few = w / scale, np.arange(w.shape[1]), 0
    d = factors(h)[1]
    step = 1 if learned is None else -(-len(x) // learned)
    books = [k_means(x[::step], d, rng)]
    if extra:
        few = round(w.shape[1] / 32 / VECTOR) * VECTOR
        vectors, weights = x.reshape(-1, VECTOR), np.broadcast_to(d, x.shape).reshape(-1, VECTOR)
        rest = (x - books[0][assign(vectors, weights, books[0])].reshape(x.shape)) * scale
        by_loss = np.argsort(-(rest**2).mean(axis=0) * np.diagonal(h), kind="stable")
        order = np.concatenate([by_loss[:few], np.sort(by_loss[few:])])
        x, h = x[:, order], h[np.ix_(order, order)]
        d = factors(h)[1]
        books = [k_means(x[::step], d, rng)]
        vectors, weights = x.reshape(-1, VECTOR), np.broadcast_to(d, x.shape).reshape(-1, VECTOR)
        rest = (x - books[0][assign(vectors, weights, books[0])].reshape(x.shape))[:, :few]
        for _ in range(extra):
            books.append(k_means(rest[::step], d[:few], rng))
            flat = np.broadcast_to(d[:few], rest.shape).reshape(-1, VECTOR)
            rest = rest - books[-1][assign(rest.reshape(-1, VECTOR), flat, books[-1])].reshape(rest.shape)
    upper, d = factors(h)

    def encode(target: F64, first: int) -> F64:
        at = slice(first, first + VECTOR)
        form = (upper[at, at] * d[at]) @ upper[at, at].T

        def nearest(t: F64, book: F64) -> F64:
            found: F64 = book[(((book @ form) * book).sum(axis=1) - 2 * t @ (book @ form).T).argmin(axis=1)]
            return found

        if first >= few:
            return nearest(target, books[0])
        parts: list[F64] = []
        for book in books:
            parts.append(nearest(target - sum(parts, np.zeros_like(target)), book))
        for _ in range(3):
            for i, book in enumerate(books):
                parts[i] = nearest(target - sum(parts) + parts[i], book)
        total: F64 = np.sum(parts, axis=0)
        return total

    error = np.empty_like(x[:scored])
    error[:, order] = feed_back(x[:scored], upper, VECTOR, encode) * scale[:scored]
    return error, 1 + extra * few / w.shape[1] + 16 / w.shape[1]


# --- the trellis ------------------------------------------------------------------------------------------------------


def trellis(w: F64, h: F64, strides: tuple[int, ...], choose: bool) -> tuple[float, float]:
    """Loss and bits of cycles with these strides; with ``choose`` the widest stand at the channels that matter most."""
    code = TrellisCode(strides=strides, multiplier=by_name("ccq_t1").code.multiplier)  # type: ignore[attr-defined]
    layout = replace(by_name("ccq_t1"), code=code, block_weights=GROUP, name=f"strides {strides}")
    order = np.arange(w.shape[1])
    if choose:
        wide = sum(s > 1 for s in strides)
        matters = (np.diagonal(h) * (w**2).mean(axis=0)).reshape(-1, GROUP)
        ranks = np.argsort(-matters, axis=1, kind="stable")
        local = np.concatenate([np.sort(ranks[:, :wide], axis=1), np.sort(ranks[:, wide:], axis=1)], axis=1)
        order = (local + np.arange(len(local))[:, None] * GROUP).reshape(-1)
    w, h = w[:, order], h[np.ix_(order, order)]
    upper, d = factors(h)
    root = np.sqrt(d)
    rms = np.sqrt((root * w**2).sum(axis=1) / root.sum())
    unit = rms / np.sqrt(np.square(levels(layout).astype(float)).mean())
    bits = code.code_bits / GROUP + 16 / w.shape[1]
    return min(
        (loss(feed_back(w, upper, GROUP, TrellisColumns(layout, d, factor * unit)), h), bits)
        for factor in (0.84, 0.92, 1.0)
    )


class TrellisColumns:
    """Encodes 64 columns at given scales of the rows."""

    def __init__(self, layout: Layout, d: F64, scale: F64) -> None:
        self.layout, self.d, self.scale = layout, d, scale

    def __call__(self, target: F64, first: int) -> F64:
        """The decoded columns."""
        cost = np.broadcast_to(self.d[first : first + GROUP], target.shape)
        paths = [
            viterbi(self.layout, target[i : i + 16] / self.scale[i : i + 16, None], cost[i : i + 16])
            for i in range(0, len(target), 16)
        ]
        decoded: F64 = levels(self.layout).astype(float)[np.concatenate(paths)] * self.scale[:, None]
        return decoded


def loss(error: F64, h: F64) -> float:
    """``tr(E H E^T)``."""
    return float(((error @ h) * error).sum())


def crvq_loss(w: F64, h: F64, extra: int, scored: int) -> tuple[float, float]:
    """Loss and bits of :func:`crvq`."""
    error, bits = crvq(w, h, extra, scored)
    return loss(error, h), bits


def hessian(products: Hessians, name: str, n: int) -> F64:
    """A matrix's Hessian with a mean of 1 on the diagonal, shrunk towards it."""
    h = products.product(name, 1, n, 0)[0].astype(float)
    h /= np.diagonal(h).mean()
    return np.asarray((1 - SHRINKAGE) * h + SHRINKAGE * np.diag(np.diagonal(h)), float)


def write(source: Model, products: Hessians, out: Path, extra: int, learned: int) -> None:
    """The model with its matrices, but the embedding, as they are decoded."""
    with ModelWriter(out, "", overwrite=True) as writer:
        writer.copy_metadata(source)
        for tensor in source.tensors:
            writer.add_tensor(tensor.name, tensor.type_name, tensor.shape)
        writer.begin()
        with click.progressbar(source.tensors) as bar:
            for tensor in bar:
                if tensor.name not in products or tensor.name == "token_embd.weight":
                    writer.write(tensor.name, tensor.stored_rows(0, tensor.n_rows))
                    continue
                w = tensor.dequantize().astype(float)
                error, _ = crvq(w, hessian(products, tensor.name, w.shape[1]), extra, len(w), learned)
                dtype = np.float16 if tensor.type_name == "f16" else np.float32
                writer.write(tensor.name, (w - error).astype(dtype).view(np.uint8))


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("hessian_file", metavar="HESSIAN", type=click.Path(exists=True, path_type=Path))
@click.argument("tensors", nargs=-1)
@click.option("--rows", default=16, show_default=True, help="Rows that are encoded.")
@click.option("--learned", default=192, show_default=True, help="Rows that codebooks are learned from.")
@click.option("--write", "out", type=click.Path(path_type=Path), help="Write the whole model instead (f32 or f16).")
@click.option("--relaxed", is_flag=True, help="With --write: more codebooks for the most important channels.")
def main(
    model: Path, hessian_file: Path, tensors: tuple[str, ...], rows: int, learned: int, out: Path | None, relaxed: bool
) -> None:
    """Compare the codes on the first rows of tensors."""
    source, products = open_model(model), Hessians(hessian_file)
    if out is not None:
        write(source, products, out, 3 if relaxed else 0, learned)
    spread = (2, *(1,) * 15) * 4
    for name in tensors:
        all_rows = source.tensor(name).dequantize()[:learned].astype(float)
        w = all_rows[:rows]
        h = hessian(products, name, w.shape[1])
        whole = loss(w, h)
        click.echo(f"{name}  {len(all_rows)} x {w.shape[1]}")
        for label, result in (
            ("vq", partial(crvq_loss, all_rows, h, 0, rows)),
            ("crvq", partial(crvq_loss, all_rows, h, 3, rows)),
            ("stride 1", partial(trellis, w, h, (1,) * GROUP, False)),
            ("spread", partial(trellis, w, h, spread, False)),
            ("relaxed", partial(trellis, w, h, (2,) * 4 + (1,) * 60, True)),
        ):
            lost, bits = result()
            click.echo(f"  {label:10} {bits:.3f} bits  {lost / whole:.4f}  x 4^bits {lost / whole * 4**bits:.3f}")


if __name__ == "__main__":
    main()

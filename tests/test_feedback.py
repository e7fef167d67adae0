"""Error feedback: what it gains, what it must not depend on, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import ccq_backend
from ccq_converters.feedback import encode_with_feedback, factorize
from ccq_converters.hessian import Hessians, HessianWriter
from ccq_converters.options import QuantOptions
from ccq_converters.quantize import quantize
from ccq_format import layouts
from ccq_format.errors import ImportanceError, ShapeError
from ccq_format.gguf_io import ModelWriter, open_model
from support.blocks import levels_and_scales

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

T_TYPES = [layout for layout in layouts.LAYOUTS if isinstance(layout.code, layouts.TrellisCode)]
P_TYPES = [layout for layout in layouts.LAYOUTS if not isinstance(layout.code, layouts.TrellisCode)]


def correlated_hessian(n: int, seed: int = 1) -> F32:
    """X^T X of inputs in which neighbours, and distant columns too, depend on each other."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((4 * n, n // 8)) @ rng.standard_normal((n // 8, n))
    x = common / np.sqrt(n / 8) + 0.5 * rng.standard_normal((4 * n, n))
    x *= np.exp(0.5 * rng.standard_normal(n))
    return (x.T @ x).astype(np.float32)


def gaussian(rows: int, n: int, seed: int = 2) -> F32:
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, n))).astype(np.float32)


def plain(x: F32, layout: layouts.Layout, column_weights: F32) -> NDArray[np.uint8]:
    """The encoder without feedback, in the same weighting."""
    weights = column_weights
    if layout in P_TYPES:
        power = np.square(x, dtype=np.float64).mean(axis=1, keepdims=True)
        weights = layout.code.size_weights(x, power) * column_weights
    return ccq_backend.encode(layout, x * layout.code.gain(layout, None), importance=weights)


def layer_error(x: F32, blocks: NDArray[np.uint8], layout: layouts.Layout, hessian: F32) -> float:
    """tr((W - Q) H (W - Q)^T) relative to tr(W H W^T)."""
    w, h = x.astype(np.float64), hessian.astype(np.float64)
    e = w - ccq_backend.decode(layout, blocks)
    return float(((e @ h) * e).sum() / ((w @ h) * w).sum())


@pytest.mark.parametrize(
    ("layout", "rows", "n", "share"),
    [*((layout, 24, 256, 0.5) for layout in T_TYPES), *((layout, 4, 1024, 0.9) for layout in P_TYPES)],
)
def test_feedback_lowers_the_layer_error(layout: layouts.Layout, rows: int, n: int, share: float) -> None:
    x, hessian = gaussian(rows, n), correlated_hessian(n)
    with_feedback = encode_with_feedback(x, factorize(hessian, layout))
    without = plain(x, layout, np.diagonal(hessian))
    assert layer_error(x, with_feedback, layout, hessian) < share * layer_error(x, without, layout, hessian)


def test_coupling_inside_the_block_lowers_the_error_further() -> None:
    layout = layouts.by_name("ccq_t2")
    x, hessian = gaussian(48, 128), correlated_hessian(128)
    factors = factorize(hessian, layout)
    assert factors.coupling is not None
    between = replace(factors, coupling=np.zeros_like(factors.coupling))
    inside = layer_error(x, encode_with_feedback(x, factors), layout, hessian)
    assert inside < 0.8 * layer_error(x, encode_with_feedback(x, between), layout, hessian)


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("hessian", [np.eye(512), 3 * np.eye(512), np.zeros((512, 512))], ids=["I", "3I", "0"])
def test_independent_inputs_give_the_plain_encoders_bytes(layout: layouts.Layout, hessian: F64) -> None:
    x = gaussian(2, 512)
    blocks = encode_with_feedback(x, factorize(hessian.astype(np.float32), layout))
    assert np.array_equal(blocks, plain(x, layout, np.ones(512, np.float32)))


def test_factors_rebuild_the_damped_hessian() -> None:
    layout, n = layouts.by_name("ccq_t3"), 192
    hessian = correlated_hessian(n).astype(np.float64)
    mean = np.diagonal(hessian).mean()
    factors = factorize(hessian, layout, damping=0.03, shrinkage=0.25)
    assert factors.coupling is not None
    inner = np.zeros((n, n))
    outer = np.eye(n)
    for group in range(3):
        at = slice(64 * group, 64 * group + 64)
        inner[at, at] = np.eye(64) + factors.coupling[group]
        outer[at, at.stop :] = factors.spread[at, at.stop :]
    upper = outer @ inner
    rebuilt = upper @ np.diag(factors.weights.astype(np.float64)) @ upper.T
    damped = (0.75 * hessian + 0.25 * np.diag(np.diagonal(hessian))) / mean + 0.03 * np.eye(n)
    assert np.allclose(rebuilt * (damped[0, 0] / rebuilt[0, 0]), damped, atol=1e-5)


def test_damping_moves_towards_independent_columns() -> None:
    layout, hessian = layouts.by_name("ccq_t2"), correlated_hessian(128)
    sizes = []
    for damping in (0.001, 0.1, 10.0, 1e6):
        factors = factorize(hessian, layout, damping=damping)
        assert factors.coupling is not None
        sizes.append(float(np.abs(factors.spread[:64, 64:]).sum() + np.abs(factors.coupling).sum()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-2


def test_few_inputs_count_less() -> None:
    layout, hessian = layouts.by_name("ccq_t2"), correlated_hessian(128)
    many, few = factorize(hessian, layout, count=1e6), factorize(hessian, layout, count=4)
    assert np.abs(few.spread[:64, 64:]).mean() < 0.5 * np.abs(many.spread[:64, 64:]).mean()


def test_columns_that_never_occur_are_encoded_all_the_same() -> None:
    layout, hessian = layouts.by_name("ccq_t2"), correlated_hessian(128)
    hessian[:, 30:70] = 0
    hessian[30:70] = 0
    x = gaussian(8, 128)
    decoded = ccq_backend.decode(layout, encode_with_feedback(x, factorize(hessian, layout)))
    lost = np.square(x - decoded)[:, 30:70].sum() / np.square(x)[:, 30:70].sum()
    assert lost < 0.5


@pytest.mark.parametrize("name", ["ccq_t2_5", "ccq_p2_5"])
def test_same_bytes_for_any_threads_and_any_split_of_rows(name: str) -> None:
    layout = layouts.by_name(name)
    x, factors = gaussian(40, 512), factorize(correlated_hessian(512), layout)
    whole = encode_with_feedback(x, factors, threads=1)
    assert np.array_equal(whole, encode_with_feedback(x, factors, threads=3))
    parts = [encode_with_feedback(x[a:b], factors, threads=2) for a, b in ((0, 1), (1, 8), (8, 40))]
    assert np.array_equal(whole, np.concatenate(parts))


def _bad(change: str) -> F32:
    hessian = correlated_hessian(64)
    if change == "NaN":
        hessian[3, 5] = np.nan
    elif change == "symmetric":
        hessian[3, 5] += hessian[3, 3]
    elif change == "diagonal":
        hessian[7, 7] = -1
    elif change == "semidefinite":
        hessian[3, 5] = hessian[5, 3] = 3 * (hessian[3, 3] + hessian[5, 5])
    else:
        hessian = hessian[:, :60]
    return hessian


@pytest.mark.parametrize("change", ["NaN", "symmetric", "diagonal", "semidefinite", "shape"])
def test_damaged_hessian(change: str) -> None:
    with pytest.raises(ImportanceError, match=change):
        factorize(_bad(change), layouts.by_name("ccq_t2"))


def counted(x: F32, coupling: F32, layout: layouts.Layout, effort: str, coupled: bool = True) -> F64:
    """What a coupling of one block counts of each row's errors, encoded with it or without."""
    blocks = ccq_backend.encode(layout, x, coupling=coupling if coupled else None, effort=effort)
    error = x.astype(np.float64) - ccq_backend.decode(layout, blocks)
    total: F64 = np.square(error + error @ coupling[0].astype(np.float64)).sum(axis=1)
    return total


def random_coupling(size: float, n: int) -> F32:
    return np.triu(np.random.default_rng(4).normal(0, size, (1, n, n)), 1).astype(np.float32)


@pytest.mark.parametrize("layout", T_TYPES, ids=lambda layout: layout.name)
def test_coupling_lowers_what_it_counts_and_more_so_with_effort(layout: layouts.Layout) -> None:
    x, coupling = gaussian(96, layout.block_weights), random_coupling(0.15, layout.block_weights)
    fast, default, best = (counted(x, coupling, layout, effort).sum() for effort in ("fast", "default", "best"))
    assert best < default < fast < 0.85 * counted(x, coupling, layout, "default", coupled=False).sum()


@pytest.mark.parametrize("effort", list(ccq_backend.EFFORTS))
@pytest.mark.parametrize("size", [10.0, 1e18, 1e30])
def test_large_couplings_never_raise_what_they_count(size: float, effort: str) -> None:
    """Not even where targets and costs leave the search's integers."""
    layout, x, coupling = layouts.by_name("ccq_t2"), gaussian(3, 64), random_coupling(size, 64)
    assert (counted(x, coupling, layout, effort) <= counted(x, coupling, layout, effort, coupled=False)).all()


@pytest.mark.parametrize("layout", T_TYPES, ids=lambda layout: layout.name)
def test_decoded_blocks_are_found_again_at_their_scale(layout: layouts.Layout) -> None:
    blocks = ccq_backend.encode(layout, gaussian(8, layout.block_weights))
    decoded = ccq_backend.decode(layout, blocks)
    scales = np.stack([levels_and_scales(layout, row)[1][:: layout.groups] for row in blocks])
    again = ccq_backend.encode(layout, decoded, scales=scales, coupling=random_coupling(0.1, layout.block_weights))
    assert np.array_equal(ccq_backend.decode(layout, again), decoded)


def test_coupling_is_checked() -> None:
    x = gaussian(2, 64)
    for wrong in (np.eye(64), np.full((64, 64), np.nan), np.tril(np.ones((64, 64)), -1)):
        with pytest.raises(ccq_backend.kernels.errors.BackendError):
            ccq_backend.encode("ccq_t2", x, coupling=wrong[None])
    with pytest.raises(ShapeError):
        ccq_backend.encode("ccq_t2", x, coupling=np.zeros((2, 64, 64)))
    with pytest.raises(ccq_backend.kernels.errors.BackendError):
        ccq_backend.encode("ccq_p2_5", gaussian(1, 256), coupling=np.zeros((1, 256, 256)))


# --- whole files ----------------------------------------------------------------------------------------------------

Q, STACK = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "f32.gguf"
    tensors = {
        Q: gaussian(32, 128),
        STACK: gaussian(48, 64, 3).reshape(2, 24, 64),
        "blk.0.attn_k.weight": gaussian(8, 128),
        "blk.0.attn_output.weight": gaussian(4, 128),
    }
    with ModelWriter(path, "llama") as writer:
        for name, data in tensors.items():
            writer.add_tensor(name, "f32", data.shape)
        writer.begin()
        for name, data in tensors.items():
            writer.write(name, data.reshape(-1, data.shape[-1]).view(np.uint8))
    return path


def write_hessians(path: Path, q: F32, stack: list[F32]) -> Path:
    with HessianWriter(path, {Q: q.shape, STACK: (len(stack), *stack[0].shape)}, {}) as writer:
        writer.begin()
        writer.write(Q, q, 1000.0, 0)
        for matrix, product in enumerate(stack):
            writer.write(STACK, product, 500.0, matrix)
    return path


def test_quantize_uses_the_file(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    q, stack = correlated_hessian(128), [correlated_hessian(64, 5), correlated_hessian(64, 6)]
    path = write_hessians(tmp_path / "h.safetensors", q, stack)
    out = tmp_path / "out.gguf"
    quantize(model, out, QuantOptions("ccq_t2", hessian=Hessians(path)), progress=False)
    layout = layouts.by_name("ccq_t2")
    written = {info.name: np.asarray(info.data()).reshape(info.n_rows, -1) for info in open_model(out).tensors}
    expected = encode_with_feedback(gaussian(32, 128), factorize(q, layout, count=1000.0, depth=1))
    assert np.array_equal(written[Q], expected)
    x = gaussian(48, 64, 3)
    for matrix, product in enumerate(stack):
        rows = slice(24 * matrix, 24 * matrix + 24)
        expected = encode_with_feedback(x[rows], factorize(product, layout, count=500.0, depth=1))
        assert np.array_equal(written[STACK][rows], expected)
    # One without a Hessian of its own has that of the same input, if there is one.
    expected = encode_with_feedback(gaussian(8, 128), factorize(q, layout, count=1000.0, depth=1))
    assert np.array_equal(written["blk.0.attn_k.weight"], expected)
    assert "no Hessian for 1 of 4 tensors: blk.0.attn_output.weight" in caplog.text


def test_another_shape_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    path = write_hessians(tmp_path / "h.safetensors", correlated_hessian(64), [correlated_hessian(64, 5)] * 2)
    options = QuantOptions("ccq_t2", hessian=Hessians(path), dry_run=True)
    with pytest.raises(ImportanceError, match=rf"{Q}.*its Hessian has the shape \[64, 64\], not \[128, 128\]"):
        quantize(model, tmp_path / "out.gguf", options, progress=False)


def test_damaged_file_is_named_with_the_tensor(model: Path, tmp_path: Path) -> None:
    for change in ("NaN", "symmetric", "semidefinite"):
        q = correlated_hessian(128)
        q[:64, :64] = _bad(change)
        path = write_hessians(tmp_path / f"{change}.safetensors", q, [correlated_hessian(64)] * 2)
        out = tmp_path / "out.gguf"
        with pytest.raises(ImportanceError, match=change) as caught:
            quantize(model, out, QuantOptions("ccq_t2", hessian=Hessians(path)), progress=False)
        assert (caught.value.file, caught.value.tensor) == (str(path), Q)
        assert not out.exists()


def test_file_of_another_model(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    with HessianWriter(path, {"blk.9.attn_q.weight": (64, 64)}, {}) as writer:
        writer.begin()
        writer.write("blk.9.attn_q.weight", np.eye(64, dtype=np.float32), 10.0, 0)
    with pytest.raises(ImportanceError, match="another model") as caught:
        quantize(model, tmp_path / "out.gguf", QuantOptions("ccq_t2", hessian=Hessians(path)), progress=False)
    assert caught.value.file == str(path)


def test_gain_follows_the_depth_of_the_model(tmp_path: Path) -> None:
    """4 layers or fewer: 1.4 times the type's; then by the root of their number; P types have none."""
    hessian = correlated_hessian(128)
    layout = layouts.by_name("ccq_t2")
    for depth, strength in ((None, 1.0), (1, 1.4), (4, 1.4), (16, 0.7), (49, 0.4)):
        factors = factorize(hessian, layout, depth=depth)
        np.testing.assert_allclose(factors.gain - 1, strength * (layout.code.gain(layout, factors.weights) - 1), 1e-4)
    assert (factorize(correlated_hessian(512), layouts.by_name("ccq_p2"), depth=4).gain == 1).all()
    path = write_hessians(tmp_path / "h.safetensors", hessian, [correlated_hessian(64, 5), correlated_hessian(64, 6)])
    assert Hessians(path).depth == 1

"""The CUDA kernels, run on a CPU (``support/cuda_harness.py``): all types against the layout table, bit for bit or
within the bound of backend/cpu/ACTIVATIONS.md."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccq_format.layouts import GROUP, LAYOUTS, Layout
from support import cuda_harness
from support.blocks import expected_weights, levels_and_scales, random_blocks, sane_blocks
from support.cuda_harness import Device

pytestmark = pytest.mark.skipif(
    cuda_harness.compiler() is None, reason="no C++ compiler: install one, or name it in CXX"
)
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(cuda_harness.library())


def to_bits(weights: np.ndarray, out: str) -> np.ndarray:
    """Float32 weights as the bits of another type: nearest even, one NaN."""
    bits = weights.view(np.uint32)
    if out == "f32":
        return bits
    nan = np.isnan(weights)
    if out == "f16":
        with np.errstate(over="ignore"):
            half: np.ndarray = weights.astype(np.float16).view(np.uint16)
        return np.where(nan, np.uint16(0x7E00), half)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(nan, np.uint16(0x7FC0), rounded.astype(np.uint16))


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-bit integers [rows, groups, 64] and scales [rows, groups] by backend/cpu/ACTIVATIONS.md."""
    groups = x.astype(np.float32).reshape(len(x), -1, GROUP)
    amax = np.abs(groups).max(axis=-1)
    with np.errstate(all="ignore"):
        inverse = np.where(amax >= np.float32(2.0**-100), np.float32(127) / amax, 0).astype(np.float32)
        q = np.rint((groups * inverse[..., None]).astype(np.float32))
        d = np.where(amax >= np.float32(2.0**-100), amax / np.float32(127), 0).astype(np.float32)
    broken = ~np.isfinite(groups).all(axis=-1)
    q[broken] = 0
    d[broken] = np.nan
    return q, d


def check_product(layout: Layout, blocks: np.ndarray, x: np.ndarray, got: np.ndarray) -> None:
    """``got`` [len(x), rows] against the exact product of the quantized activations, within the derived bound."""
    q, d = quantized(x)
    a = (q.astype(np.float64) * d.astype(np.float64)[..., None]).reshape(len(x), -1)
    n = a.shape[1]
    for r, row in enumerate(blocks):
        v, g = levels_and_scales(layout, row)
        with np.errstate(all="ignore"):
            w = (v * g.astype(np.float64)[:, None]).reshape(-1)
            exact, size = a @ w, np.abs(a) @ np.abs(w)
        finite = np.isfinite(size) & (size < 1e38)
        assert not np.isfinite(got[~np.isfinite(size), r]).any()
        error = np.abs(got[finite, r].astype(float) - exact[finite])
        assert (error <= size[finite] * (n / GROUP + 8) * 2.0**-24 + 1e-36).all()


def activations(rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.standard_normal((rows, cols)) * np.exp(rng.normal(0, 2, (rows, 1)))).astype(np.float32)


@by_layout
@pytest.mark.parametrize("out", ["f32", "f16", "bf16"])
def test_dequantize_is_exact_on_arbitrary_bytes(device: Device, layout: Layout, out: str) -> None:
    rng = np.random.default_rng(1)
    for rows, blocks in ((1, 1), (3, 7), (2, 65)):
        for make in (random_blocks, sane_blocks):
            b = make(layout, rows, blocks, rng)
            want = to_bits(np.stack([expected_weights(layout, row) for row in b]), out)
            assert np.array_equal(device.dequantize(layout, b, out, skew=blocks % 4), want)


@by_layout
def test_get_rows(device: Device, layout: Layout) -> None:
    b = random_blocks(layout, 5, 3, np.random.default_rng(2))
    weights = np.stack([expected_weights(layout, row) for row in b]).view(np.uint32)
    got = device.dequantize(layout, b, "f32", index=[4, 0, 0, -1, 3, 5], skew=1)
    assert np.array_equal(got[[0, 1, 2, 4]], weights[[4, 0, 0, 3]])
    assert (got[[3, 5]] == 0x7FC00000).all()


@by_layout
@pytest.mark.parametrize("cols", range(1, 9))
def test_few_columns(device: Device, layout: Layout, cols: int) -> None:
    rng = np.random.default_rng(cols)
    for blocks in (1, 3, 9):
        rows = int(rng.integers(1, 12))
        for make in (sane_blocks, random_blocks):
            b = make(layout, rows, blocks, rng)
            x = activations(cols, blocks * layout.block_weights, rng)
            check_product(layout, b, x, device.product("mat_vec", layout, b, x, skew=(blocks + cols) % 4))


@by_layout
@pytest.mark.parametrize("cols", [9, 65])
def test_many_columns(device: Device, layout: Layout, cols: int) -> None:
    rng = np.random.default_rng(cols)
    for rows, blocks, make in ((1, 1, sane_blocks), (65, 3, random_blocks)):
        b = make(layout, rows, blocks, rng)
        x = activations(cols, blocks * layout.block_weights, rng)
        check_product(layout, b, x, device.product("mat_mul", layout, b, x, skew=rows % 4))


@by_layout
def test_long_rows(device: Device, layout: Layout) -> None:
    rng = np.random.default_rng(11)
    b = sane_blocks(layout, 5, 8192 // layout.block_weights, rng)
    x = activations(9, 8192, rng)
    check_product(layout, b, x[:1], device.product("mat_vec", layout, b, x[:1]))
    check_product(layout, b, x, device.product("mat_mul", layout, b, x))


def test_a_large_matrix_has_several_rows_a_thread(device: Device) -> None:
    layout, rng = LAYOUTS[1], np.random.default_rng(12)
    b = sane_blocks(layout, 2051, 8192 // 64, rng)
    x = activations(1, 8192, rng)
    got = device.product("mat_vec", layout, b, x)
    some = [0, 1, 2, 3, 1023, 2047, 2048, 2050]
    check_product(layout, b[some], x, got[:, some])
    assert not (got == 12345.0).any()


@by_layout
@pytest.mark.parametrize("function", ["mat_vec", "mat_mul"])
def test_experts(device: Device, layout: Layout, function: str) -> None:
    """Experts without columns, with one and with more than a tile of them; ids that do not exist; shared rows of x."""
    rng = np.random.default_rng(13)
    experts, rows, tokens, k = 5, 3, 48, 2
    b = np.stack([sane_blocks(layout, rows, 2, rng) for _ in range(experts)])
    ids = rng.choice([0, 3] + [2] * 8, tokens * k)
    ids[[5, 17]] = 4
    ids[[0, 40]] = (-1, experts)
    for repeat in (1, k):
        x = activations(tokens * k // repeat, 2 * layout.block_weights, rng)
        got = device.product(function, layout, b, x, ids=ids, repeat=repeat)
        assert np.isnan(got[[0, 40]]).all()
        for e in range(experts):
            (columns,) = np.nonzero(ids == e)
            if columns.size:
                check_product(layout, b[e], x[columns // repeat], got[columns])


@by_layout
def test_broken_inputs_stay_visible(device: Device, layout: Layout) -> None:
    rng = np.random.default_rng(3)
    b = sane_blocks(layout, 2, 2, rng)
    x = activations(9, 2 * layout.block_weights, rng)
    x[1, 5], x[2, 70], x[3, :64] = np.nan, np.inf, 1e-33
    for function, columns in (("mat_vec", 4), ("mat_mul", 9)):
        got = device.product(function, layout, b, x[:columns])
        assert np.isnan(got[1:3]).all()
        check_product(layout, b, x[[0, 3]], got[[0, 3]])
        if layout.name.startswith("ccq_p"):
            broken = b.copy()
            broken[1, 0:2] = (0xC0, 0x7F)  # a super scale that is NaN
            got = device.product(function, layout, broken, x[:columns])
            assert np.isfinite(got[0, 0])
            assert not np.isfinite(got[:, 1]).any()


@pytest.mark.parametrize("function", ["mat_vec", "mat_mul"])
def test_activations_of_other_types(device: Device, function: str) -> None:
    layout, rng = LAYOUTS[1], np.random.default_rng(4)
    b = sane_blocks(layout, 3, 9, rng)
    x = activations(2, 9 * 64, rng).astype(np.float16)
    x[0, :4] = (6e-8, -65504, 0, 3e-6)  # a subnormal number, the largest
    check_product(layout, b, x.astype(np.float32), device.product(function, layout, b, x, x_type=1))
    wide = x.astype(np.float32).view(np.uint32) >> 16 << 16
    got = device.product(function, layout, b, (wide >> 16).astype(np.uint16), x_type=2)
    check_product(layout, b, wide.view(np.float32), got)


def test_refusals(device: Device) -> None:
    lib, ffi = device.lib, device.ffi
    null = ffi.NULL
    some = ffi.new("float[128]")
    good: dict[str, Any] = {
        "type": 36, "n": 64, "blocks": some, "row_stride": 17, "n_rows": 1, "repeat": 1, "x": some, "x_stride": 64,
        "n_cols": 1, "out": some, "out_stride": 1,
    }  # fmt: skip
    for change, status in (
        ({"type": 2}, lib.CCQ_CUDA_ERR_TYPE),
        ({"x_type": 3}, lib.CCQ_CUDA_ERR_TYPE),
        ({"n": 63}, lib.CCQ_CUDA_ERR_ROW_LENGTH),
        ({"n_cols": 9}, lib.CCQ_CUDA_ERR_ARGUMENT),
        ({"row_stride": 16}, lib.CCQ_CUDA_ERR_ARGUMENT),
        ({"x_stride": 65}, lib.CCQ_CUDA_ERR_ARGUMENT),
        ({"x": ffi.cast("char *", some) + 4}, lib.CCQ_CUDA_ERR_ARGUMENT),
        ({"repeat": 0}, lib.CCQ_CUDA_ERR_ARGUMENT),
        ({"ids": ffi.new("int32_t[1]")}, lib.CCQ_CUDA_ERR_ARGUMENT),
        ({"out": null}, lib.CCQ_CUDA_ERR_ARGUMENT),
        ({"n_rows": 0, "out": null}, lib.CCQ_CUDA_OK),
    ):
        assert lib.ccq_cuda_mat_vec(ffi.new("ccq_cuda_product *", good | change), null) == status, change


@by_layout
def test_all_kernels_on_little(device: Device, layout: Layout) -> None:
    """Every kernel once; what also runs under sanitizers in the default suite."""
    rng = np.random.default_rng(14)
    b = random_blocks(layout, 3, 2, rng)
    x = activations(9, 2 * layout.block_weights, rng)
    for out in ("f32", "f16", "bf16"):
        want = to_bits(np.stack([expected_weights(layout, row) for row in b]), out)
        assert np.array_equal(device.dequantize(layout, b, out, index=[2, 0, 1], skew=3), want[[2, 0, 1]])
    for columns in (1, 3, 7):
        check_product(layout, b, x[:columns], device.product("mat_vec", layout, b, x[:columns], skew=columns % 4))
    check_product(layout, b, x, device.product("mat_mul", layout, b, x, skew=2))
    for groups in (40, 136):  # two warps a row, four
        wide = sane_blocks(layout, 2, groups // layout.groups, rng)
        y = activations(1, groups * GROUP, rng)
        check_product(layout, wide, y, device.product("mat_vec", layout, wide, y))
    for function in ("mat_vec", "mat_mul"):
        got = device.product(function, layout, np.stack([b, b]), x[:2], ids=[1, 1, 3, 1], repeat=2)
        check_product(layout, b, x[[0, 0, 1]], got[[0, 1, 3]])


@pytest.mark.parametrize(
    "tests",
    [
        pytest.param("test_all_kernels_on_little", id="some"),
        pytest.param("not sanitizers and not off_by_one", id="all", marks=pytest.mark.slow),
    ],
)
def test_with_sanitizers(tmp_path: Path, tests: str) -> None:
    """The same under AddressSanitizer and UndefinedBehaviorSanitizer; arrays end where a device's words do."""
    cuda_harness.run_sanitized(tmp_path, __file__, tests, ("ccq_cuda.cu",))


def test_an_off_by_one_is_caught(tmp_path: Path) -> None:
    """The harness itself: kernels with one wrong bound or index each fail the comparison above."""
    source = (cuda_harness.CUDA / "kernels.h").read_text(encoding="utf-8")
    layout, rng = LAYOUTS[1], np.random.default_rng(15)
    b = sane_blocks(layout, 5, 3, rng)
    x = activations(2, 3 * 64, rng)
    right = "for (int64_t group = t; group < p.n_groups; group += span)"
    assert source.count(right) == 1
    (tmp_path / "core").symlink_to(cuda_harness.CUDA.parent / "core")
    cuda = tmp_path / "cuda"
    shutil.copytree(cuda_harness.CUDA, cuda)
    (cuda / "kernels.h").write_text(source.replace(right, right.replace("p.n_groups;", "p.n_groups - 1;")))
    wrong = Device(cuda_harness.build(tmp_path / "wrong.so", ("-O0",), cuda, ("ccq_cuda.cu",)))
    with pytest.raises(AssertionError):
        check_product(layout, b, x, wrong.product("mat_vec", layout, b, x))

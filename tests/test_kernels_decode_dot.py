"""Decode, activations, dot products: exact against the layout table, in this process's kernel set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import (
    ACT_BLOCK,
    ACT_MAX,
    F32,
    expected_dot,
    expected_weights,
    levels_and_scales,
    random_blocks,
    same_bits,
    sane_blocks,
)

import ccq_backend
from ccq_format import errors
from ccq_format.layouts import GROUP, LAYOUTS, Layout

ANY_LAYOUT = st.sampled_from(LAYOUTS)
SEED = st.integers(0, 2**32 - 1)
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@given(ANY_LAYOUT, st.integers(1, 9), st.integers(1, 3), SEED)
@settings(max_examples=150, deadline=None)
def test_decode_is_exact_on_arbitrary_bytes(layout: Layout, blocks: int, rows: int, seed: int) -> None:
    b = random_blocks(layout, rows, blocks, np.random.default_rng(seed))
    decoded = ccq_backend.decode(layout, b)
    assert same_bits(decoded, np.stack([expected_weights(layout, row) for row in b]))


@by_layout
def test_decode_every_scale_byte(layout: Layout) -> None:
    rng = np.random.default_rng(7)
    for at in range(layout.offset("codes")):
        b = random_blocks(layout, 1, 256, rng).reshape(256, layout.block_bytes)
        b[:, at] = np.arange(256)
        assert same_bits(ccq_backend.decode(layout, b), np.stack([expected_weights(layout, row) for row in b]))


def activations(rows: int, cols: int, rng: np.random.Generator) -> F32:
    return (rng.standard_normal((rows, cols)) * np.exp(rng.normal(0, 2, (rows, 1)))).astype(np.float32)


@given(st.integers(1, 5), st.integers(1, 4), SEED, st.floats(-90, 120))
@settings(max_examples=100, deadline=None)
def test_activations(groups: int, rows: int, seed: int, exponent: float) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, groups * GROUP)) * 2.0**exponent
    x = x.astype(np.float32)
    a = ccq_backend.quantize_activations(x).view(ACT_BLOCK)
    amax = np.abs(x.reshape(rows, groups, GROUP)).max(axis=-1)
    assert same_bits(a["d"], amax / np.float32(ACT_MAX))
    inverse = np.float32(ACT_MAX) / amax
    assert np.array_equal(a["q"], np.rint(x.reshape(rows, groups, GROUP) * inverse[..., None]))
    assert np.array_equal(a["sum"], a["q"].astype(np.int32).sum(axis=-1))
    assert np.abs(a["q"].astype(int)).max() == ACT_MAX
    error = np.abs(x.reshape(rows, groups, GROUP) - a["d"].astype(float)[..., None] * a["q"])
    assert np.all(error <= a["d"].astype(float)[..., None] * (0.5 + 2.0**-7))


def test_activations_at_the_ends() -> None:
    x = np.zeros((1, 5 * GROUP), np.float32)
    x[0, GROUP] = 2.0**-101
    x[0, 2 * GROUP + 3] = np.inf
    x[0, 3 * GROUP + 63] = np.nan
    x[0, 4 * GROUP : 5 * GROUP] = 3.4e38
    a = ccq_backend.quantize_activations(x).view(ACT_BLOCK)[0]
    assert list(a["d"][:2]) == [0, 0]
    assert np.isnan(a["d"][2:4]).all()
    assert not a["q"][:4].any()
    assert not a["sum"][:4].any()
    assert (a["q"][4] == ACT_MAX).all()


@given(ANY_LAYOUT, st.integers(1, 9), st.integers(1, 19), st.integers(1, 5), SEED, st.booleans())
@settings(max_examples=120, deadline=None)
def test_products_have_the_documented_bits(
    layout: Layout, blocks: int, rows: int, cols: int, seed: int, sane: bool
) -> None:
    rng = np.random.default_rng(seed)
    b = (sane_blocks if sane else random_blocks)(layout, rows, blocks, rng)
    act = ccq_backend.quantize_activations(activations(cols, blocks * layout.block_weights, rng))
    expected = np.array([[expected_dot(layout, row, a) for row in b] for a in act], np.float32)
    nan = np.isnan(expected)
    got = ccq_backend.mul_mat(layout, b, act)
    assert np.array_equal(np.isnan(got), nan)
    assert same_bits(got[~nan], expected[~nan])
    # A result depends on its row and column alone.
    r, c = int(rng.integers(rows)), int(rng.integers(cols))
    alone = ccq_backend.mul_mat(layout, b[r : r + 1], act[c : c + 1])
    pair = np.float32(ccq_backend.vec_dot(layout, b[r : r + 1], act[c : c + 1]))
    if nan[c, r]:
        assert np.isnan(alone[0, 0])
        assert np.isnan(pair)
    else:
        assert same_bits(alone[0, 0], expected[c, r])
        assert same_bits(pair, expected[c, r])


@by_layout
def test_dot_error_is_within_the_derived_bound(layout: Layout) -> None:
    rng = np.random.default_rng(11)
    groups = 64
    b = sane_blocks(layout, 16, groups * GROUP // layout.block_weights, rng)
    x = activations(8, groups * GROUP, rng)
    act = ccq_backend.quantize_activations(x)
    got = ccq_backend.mul_mat(layout, b, act).astype(float)
    d = act.view(ACT_BLOCK)["d"].astype(float)
    q = act.view(ACT_BLOCK)["q"].astype(np.int64)
    nearest = 0.0
    for r, row in enumerate(b):
        v, g = levels_and_scales(layout, row)
        exact = x.astype(float) @ expected_weights(layout, row).astype(float)
        isum = np.abs((v * q).sum(axis=-1))
        rounding = (np.abs(g) * d * np.abs(v).sum(axis=1)).sum(axis=-1) * (0.5 + 2.0**-7)
        summing = (np.abs(g) * d * isum).sum(axis=-1) * (groups / 4 + 7) * 2.0**-24
        error = np.abs(got[:, r] - exact)
        assert np.all(error <= rounding + summing)
        nearest = max(nearest, float((error / (rounding + summing)).max()))
    assert nearest > 1e-4  # the activations really were quantized: the bound is not vacuous


@by_layout
def test_broken_inputs_stay_visible(layout: Layout) -> None:
    rng = np.random.default_rng(3)
    b = sane_blocks(layout, 1, 2, rng)
    x = activations(2, 2 * layout.block_weights, rng)
    x[1, 5] = np.nan
    out = ccq_backend.mul_mat(layout, b, ccq_backend.quantize_activations(x))
    assert np.isfinite(out[0, 0])
    assert np.isnan(out[1, 0])
    if layout.name.startswith("ccq_p"):
        b[0, 0:2] = (0x80, 0x7F)  # an infinite super scale
        assert np.isnan(ccq_backend.vec_dot(layout, b, ccq_backend.quantize_activations(x[:1])))


@by_layout
def test_shapes_are_checked(layout: Layout) -> None:
    with pytest.raises(errors.ShapeError):
        ccq_backend.decode(layout, np.zeros((1, layout.block_bytes + 1), np.uint8))
    with pytest.raises(errors.ShapeError):
        ccq_backend.encode(layout, np.zeros((1, layout.block_weights - 1), np.float32))
    with pytest.raises(errors.ShapeError):
        ccq_backend.quantize_activations(np.zeros((1, 63), np.float32))

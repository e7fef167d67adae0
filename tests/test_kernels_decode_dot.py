"""Decode, activations, products: against the layout table, in this process's kernel set (``test_kernels_isa.py`` runs
this file with every other one)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ccq_backend
from ccq_format import errors
from ccq_format.layouts import GROUP, LAYOUTS, Layout
from support.blocks import (
    F32,
    expected_dots,
    expected_weights,
    random_blocks,
    same_bits,
    sane_blocks,
)

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
    q, d = ccq_backend.read_activations(ccq_backend.quantize_activations(x), groups * GROUP)
    x = x.reshape(rows, groups, GROUP)
    q = q.reshape(x.shape)
    top = np.float32(np.abs(q).max())
    assert top in (127, 127 * 256)  # all of the set's 8 or 16 bits
    amax = np.abs(x).max(axis=-1)
    assert same_bits(d, amax / top)
    assert np.array_equal(q, np.rint(x * (top / amax)[..., None]))
    assert (np.abs(q).max(axis=-1) == top).all()
    error = np.abs(x - d.astype(float)[..., None] * q)
    assert np.all(error <= d.astype(float)[..., None] * (0.5 + 2.0**-7))


def test_activations_at_the_ends() -> None:
    x = np.zeros((1, 5 * GROUP), np.float32)
    x[0, GROUP] = 2.0**-101
    x[0, 2 * GROUP + 3] = np.inf
    x[0, 3 * GROUP + 63] = np.nan
    x[0, 4 * GROUP : 5 * GROUP] = 3.4e38
    q, d = ccq_backend.read_activations(ccq_backend.quantize_activations(x), x.shape[1])
    assert list(d[0, :2]) == [0, 0]
    assert np.isnan(d[0, 2:4]).all()
    assert not q[0, : 4 * GROUP].any()
    assert len(set(q[0, 4 * GROUP :])) == 1
    assert q[0, -1] in (127, 127 * 256)


COLUMNS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 33, 48])


@given(ANY_LAYOUT, st.integers(1, 9), st.integers(1, 70), COLUMNS, SEED, st.booleans())
@settings(max_examples=150, deadline=None)
def test_products_are_within_the_derived_bound(
    layout: Layout, blocks: int, rows: int, cols: int, seed: int, sane: bool
) -> None:
    rng = np.random.default_rng(seed)
    b = (sane_blocks if sane else random_blocks)(layout, rows, blocks, rng)
    act = ccq_backend.quantize_activations(activations(cols, blocks * layout.block_weights, rng))
    exact, bound = expected_dots(layout, b, act)
    got = ccq_backend.mul_mat(layout, b, act)
    size = bound / ((blocks * layout.groups + 8) * 2.0**-24)
    finite = np.isfinite(bound) & (size < 1e38)  # else sums may overflow on the way
    assert not np.isfinite(got[~np.isfinite(bound)]).any()
    assert (np.abs(got.astype(float) - exact)[finite] <= bound[finite] + 1e-36).all()  # products may underflow
    # A result depends on its row and the columns of the call, not on the rows beside it.
    r = int(rng.integers(rows))
    alone = ccq_backend.mul_mat(layout, b[r : r + 1], act)[:, 0]
    assert same_bits(alone[finite[:, r]], got[finite[:, r], r])


@by_layout
@pytest.mark.parametrize("cols", [1, 3, 40])
def test_long_rows(layout: Layout, cols: int) -> None:
    rng = np.random.default_rng(11)
    b = sane_blocks(layout, 40, 8192 // layout.block_weights, rng)
    act = ccq_backend.quantize_activations(activations(cols, 8192, rng))
    exact, bound = expected_dots(layout, b, act)
    error = np.abs(ccq_backend.mul_mat(layout, b, act) - exact)
    assert (error <= bound).all()
    assert (error > 0).any()  # sums really are float32


@by_layout
def test_products_of_activations_that_are_kept_exactly(layout: Layout) -> None:
    """Integers up to 127 times a power of two lose nothing in any set: what is left is the rounding of sums."""
    rng = np.random.default_rng(12)
    n = 2 * 512
    b = sane_blocks(layout, 33, n // layout.block_weights, rng)
    x = rng.integers(-127, 128, (7, n)).astype(np.float32)
    x[:, ::8] = 127
    x *= 2.0 ** rng.integers(-9, 3, (7, 1)).astype(np.float32)
    w = ccq_backend.decode(layout, b).astype(float)
    bound = np.abs(x.astype(float)) @ np.abs(w).T * (n / GROUP + 8) * 2.0**-24
    for cols in (1, 7):
        got = ccq_backend.mul_mat(layout, b, ccq_backend.quantize_activations(x[:cols]))
        assert (np.abs(got - x[:cols].astype(float) @ w.T) <= bound[:cols]).all()


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
        assert not np.isfinite(ccq_backend.mul_mat(layout, b, ccq_backend.quantize_activations(x[:1]))).any()


@by_layout
def test_shapes_are_checked(layout: Layout) -> None:
    with pytest.raises(errors.ShapeError):
        ccq_backend.decode(layout, np.zeros((1, layout.block_bytes + 1), np.uint8))
    with pytest.raises(errors.ShapeError):
        ccq_backend.encode(layout, np.zeros((1, layout.block_weights - 1), np.float32))
    with pytest.raises(errors.ShapeError):
        ccq_backend.quantize_activations(np.zeros((1, 63), np.float32))

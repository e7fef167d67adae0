"""The encoder of the T types: error, exactness at a given scale, importance, threads, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ccq_backend
from ccq_format import errors
from ccq_format.layouts import Layout, TrellisCode
from support.blocks import F32, T_LAYOUTS, U8, levels_and_scales, random_blocks, same_bits

by_layout = pytest.mark.parametrize("layout", T_LAYOUTS, ids=lambda layout: layout.name)
by_effort = pytest.mark.parametrize("effort", list(ccq_backend.EFFORTS))

GAUSSIAN_RELMSE = {
    "fast": {"ccq_t1": 0.2790, "ccq_t1_5": 0.1465, "ccq_t2": 0.0743, "ccq_t2_5": 0.0380, "ccq_t3": 0.0193},
    "default": {"ccq_t1": 0.2780, "ccq_t1_5": 0.1430, "ccq_t2": 0.0722, "ccq_t2_5": 0.0368, "ccq_t3": 0.0186},
    "best": {"ccq_t1": 0.2770, "ccq_t1_5": 0.1415, "ccq_t2": 0.0715, "ccq_t2_5": 0.0365, "ccq_t3": 0.0185},
}
"""Largest squared error over signal power of whole types on unit Gaussian weights, by effort."""


def gaussian_relmse(layout: Layout, effort: str) -> float:
    """That of a type, or without figures of it 1.3 times 4^-rate, the least error that a code of its rate can have."""
    assert isinstance(layout.code, TrellisCode)
    rate = layout.code.code_bits / layout.block_weights
    return GAUSSIAN_RELMSE[effort].get(layout.name, 1.3 * 4.0**-rate)


def relmse(layout: Layout, w: F32, importance: F32 | None = None, effort: str = "default") -> float:
    """Weighted squared error of encoding ``w`` [rows, cols] over its weighted power."""
    decoded = ccq_backend.decode(layout, ccq_backend.encode(layout, w, importance, effort=effort)).astype(float)
    factor = 1.0 if importance is None else importance.astype(float)
    return float((factor * (decoded - w) ** 2).sum() / (factor * w.astype(float) ** 2).sum())


@pytest.mark.slow
@by_layout
def test_gaussian_error_on_a_million_weights(layout: Layout) -> None:
    w = np.random.default_rng(2026).standard_normal((1000, 1024)).astype(np.float32)
    assert relmse(layout, w) <= gaussian_relmse(layout, "default")


@by_effort
@by_layout
def test_gaussian_error_on_a_sample(layout: Layout, effort: str) -> None:
    w = np.random.default_rng(5).standard_normal((32, 1024)).astype(np.float32)
    assert relmse(layout, w, effort=effort) <= gaussian_relmse(layout, effort)


@by_layout
@pytest.mark.parametrize("kind", ["none", "heavy", "channels"])
def test_more_effort_lowers_the_error(layout: Layout, kind: str) -> None:
    rng = np.random.default_rng(14)
    w = rng.standard_t(5, (16, 1024)).astype(np.float32)
    importance = None
    if kind == "heavy":  # most weights far below the average importance, some far above
        importance = np.exp(rng.normal(0, 1.5, w.shape)).astype(np.float32)
    elif kind == "channels":  # above what the costs' 16 bits hold
        importance = np.where(rng.random(w.shape[1]) < 0.02, 5000, 1).astype(np.float32)
    fast, default, best = (relmse(layout, w, importance, effort) for effort in ("fast", "default", "best"))
    assert best < default < fast < 1.25 * default


@by_effort
@by_layout
@pytest.mark.parametrize("name", ["laplace", "student"])
def test_outliers_do_not_saturate(layout: Layout, name: str, effort: str) -> None:
    rng = np.random.default_rng(6)
    size = (32, 1024)
    w = rng.laplace(size=size) if name == "laplace" else rng.standard_t(5, size=size)
    # 1.3 times the Gaussian figure; with scales from the rms alone T3 has more than twice it.
    assert relmse(layout, w.astype(np.float32), effort=effort) <= 1.3 * gaussian_relmse(layout, effort)


@by_layout
def test_error_does_not_depend_on_the_scale_of_the_weights(layout: Layout) -> None:
    w = np.random.default_rng(8).standard_normal((2, 1024)).astype(np.float32)
    blocks = ccq_backend.encode(layout, w)
    for exponent in (-12, -3, 4):
        scaled = ccq_backend.encode(layout, w * np.float32(2.0**exponent)).reshape(-1, layout.block_bytes)
        expected = blocks.reshape(-1, layout.block_bytes).copy()
        expected[:, 0] += np.uint8(8 * exponent % 256)
        assert np.array_equal(scaled, expected)


@by_effort
@by_layout
def test_decoded_blocks_are_found_again_at_their_scale(layout: Layout, effort: str) -> None:
    rng = np.random.default_rng(9)
    b = random_blocks(layout, 4, 600, rng)
    b.reshape(-1, layout.block_bytes)[:256, 0] = np.arange(256)
    decoded = ccq_backend.decode(layout, b)
    scales = np.stack([levels_and_scales(layout, row)[1][:: layout.groups] for row in b])
    again = ccq_backend.encode(layout, decoded, scales=scales, effort=effort)
    assert same_bits(ccq_backend.decode(layout, again), decoded)
    importance = np.exp(rng.normal(0, 2, decoded.shape)).astype(np.float32)
    again = ccq_backend.encode(layout, decoded, importance, scales=scales, effort=effort)
    assert same_bits(ccq_backend.decode(layout, again), decoded)


@by_layout
def test_repetitive_blocks_are_found_again(layout: Layout) -> None:
    patterns = [0x00, 0xFF, 0xAA, 0x55, 0x33, 0x0F, 0x24, 0x92, 0x49, 0x11, 0x77, 0xF0]
    b = np.array([[180] + [p] * (layout.block_bytes - 1) for p in patterns], np.uint8).reshape(1, -1)
    decoded = ccq_backend.decode(layout, b)
    scales = levels_and_scales(layout, b[0])[1][None, :: layout.groups]
    assert same_bits(ccq_backend.decode(layout, ccq_backend.encode(layout, decoded, scales=scales)), decoded)


@given(st.sampled_from(T_LAYOUTS), st.integers(0, 2**32 - 1), st.floats(-40, 40))
@settings(max_examples=25, deadline=None)
def test_importance_matters_only_by_its_ratios(layout: Layout, seed: int, exponent: float) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((2, 128)).astype(np.float32)
    importance = np.exp(rng.normal(0, 1, 128)).astype(np.float32)
    blocks = ccq_backend.encode(layout, w, importance)
    assert np.array_equal(ccq_backend.encode(layout, w, importance * np.float32(2.0 ** int(exponent))), blocks)
    assert np.array_equal(ccq_backend.encode(layout, w, np.broadcast_to(importance, w.shape)), blocks)


@by_layout
def test_importance_lowers_the_weighted_error(layout: Layout) -> None:
    rng = np.random.default_rng(10)
    w = rng.standard_normal((16, 1024)).astype(np.float32)
    importance = np.exp(rng.normal(0, 1.5, w.shape)).astype(np.float32)
    plain = ccq_backend.decode(layout, ccq_backend.encode(layout, w)).astype(float)
    without = float((importance * (plain - w) ** 2).sum() / (importance * w.astype(float) ** 2).sum())
    assert relmse(layout, w, importance) < 0.7 * without


@by_layout
def test_zero_importance_means_ones(layout: Layout) -> None:
    w = np.random.default_rng(12).standard_normal((1, 128)).astype(np.float32)
    importance = np.zeros(128, np.float32)
    assert np.array_equal(ccq_backend.encode(layout, w, importance), ccq_backend.encode(layout, w))


@by_effort
@by_layout
def test_same_bytes_for_any_number_of_threads(layout: Layout, effort: str) -> None:
    rng = np.random.default_rng(13)
    w = rng.standard_t(4, (3, 64 * 40)).astype(np.float32)
    importance = np.exp(rng.normal(0, 1, w.shape[1])).astype(np.float32)
    one = ccq_backend.encode(layout, w, importance, threads=1, effort=effort)
    for threads in (0, 2, 3, 8):
        assert np.array_equal(ccq_backend.encode(layout, w, importance, threads=threads, effort=effort), one)


@by_effort
@by_layout
def test_extreme_weights(layout: Layout, effort: str) -> None:
    w = np.zeros((6, layout.block_weights), np.float32)
    w[1, 5] = 1e-38
    w[2] = 3.4e38
    w[3, ::2], w[3, 1::2] = 1e38, -1e-38
    w[4] = -3810.0  # 127 * 30: the end of the range
    w[5, 0] = 1000.0
    blocks: U8 = ccq_backend.encode(layout, w, effort=effort)
    decoded = ccq_backend.decode(layout, blocks)
    assert not blocks[0].any()
    assert not decoded[0].any()
    assert np.abs(decoded[1]).max() <= 127 * 2.0**-27
    # Not every sequence of extreme levels is a code word, so only sign and size can be asked for; at one bit per weight
    # only on average.
    assert decoded[2].min() > 0 or layout.bpw < 1.5
    assert decoded[2].mean() > (2000 if layout.bpw > 1.5 else 1500)
    assert np.isfinite(decoded).all()
    assert decoded[4].max() < 0 or layout.bpw < 1.5
    assert decoded[4].mean() < -(2000 if layout.bpw > 1.5 else 1500)
    # The scale that fits the block's rms of 125 reaches 127 / 52 of that, 305; T1's of 88, where 127 zeros are at
    # stake, reaches 216.
    assert decoded[5, 0] > (500 if layout.bpw > 1.5 else 216)


@by_layout
def test_refusals(layout: Layout) -> None:
    good = np.ones((2, layout.block_weights), np.float32)
    for value in (np.nan, np.inf, -np.inf):
        bad = good.copy()
        bad[1, 63] = value
        with pytest.raises(errors.WeightsError):
            ccq_backend.encode(layout, bad)
        with pytest.raises(errors.ImportanceError):
            ccq_backend.encode(layout, good, bad)
    with pytest.raises(errors.ImportanceError):
        ccq_backend.encode(layout, good, -good)
    for scale in (0.3, -1.0, 31.0, 2.0**-28, np.nan, np.inf):
        with pytest.raises(errors.BackendError):
            ccq_backend.encode(layout, good, scales=np.full((2, 1), scale, np.float32))
    with pytest.raises(errors.BackendError, match="fast, default, best"):
        ccq_backend.encode(layout, good, effort="slow")
    assert not ccq_backend.encode(layout, good, scales=np.zeros((2, 1), np.float32)).any()


@by_effort
@by_layout
def test_weights_below_the_smallest_scale_become_zero(layout: Layout, effort: str) -> None:
    """The smallest scale times the smallest level would be far larger than such weights."""
    x = np.random.default_rng(3).uniform(-1e-30, 1e-30, (2, 128)).astype(np.float32)
    assert not ccq_backend.encode(layout, x, effort=effort).any()

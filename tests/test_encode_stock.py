"""llama.cpp's types of 4 and 5 bits, as we encode them: what the bytes mean, and what the search finds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import ccq_backend
from ccq_converters.encode import decode_rows, encode_rows
from ccq_converters.feedback import encode_with_feedback, factorize
from ccq_format import stock
from ccq_format.errors import BackendError, ShapeError, WeightsError
from ccq_format.stock import StockType

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LEVELS = {
    "q4_0": np.arange(-8.0, 8),
    "q5_0": np.arange(-16.0, 16),
    "iq4_nl": np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0]),
}
"""Written down again: ``gguf.quants`` decodes the bytes below, and decoded weights must be among these."""

each_type = pytest.mark.parametrize("kind", stock.TYPES, ids=lambda kind: kind.name)


def gaussian(rows: int, n: int, seed: int = 0) -> F32:
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, n))).astype(np.float32)


def scales(kind: StockType, blocks: NDArray[np.uint8]) -> F32:
    """Of every block, float32 ``[rows, blocks]``."""
    each = blocks.reshape(len(blocks), -1, kind.block_bytes)
    return np.ascontiguousarray(each[..., :2]).view("<f2").astype(np.float32)[..., 0]


def rounded(kind: StockType, x: F32, scale: F32) -> F64:
    """The nearest levels of blocks at given scales, float64 like ``x``."""
    values = scale.astype(np.float64)[..., None, None] * LEVELS[kind.name]
    blocks = x.reshape(*scale.shape, 32).astype(np.float64)
    nearest = np.abs(blocks[..., None] - values).argmin(axis=-1)
    return np.take_along_axis(values[..., 0, :], nearest, axis=-1).reshape(x.shape)


@each_type
def test_ids_and_blocks_are_ggufs(kind: StockType) -> None:
    as_type = gguf.GGMLQuantizationType[kind.name.upper()]
    assert (kind.gguf_id, (kind.block_weights, kind.block_bytes)) == (as_type, gguf.GGML_QUANT_SIZES[as_type])
    assert kind.largest == np.abs(LEVELS[kind.name]).max()


@each_type
@pytest.mark.parametrize("effort", ccq_backend.EFFORTS)
def test_every_weight_is_rounded_to_the_nearest_level(kind: StockType, effort: str) -> None:
    x = gaussian(16, 128)
    blocks = ccq_backend.encode(kind, x, effort=effort)
    decoded = decode_rows(kind.name, blocks)
    np.testing.assert_allclose(decoded, rounded(kind, x, scales(kind, blocks)), rtol=1e-6)


@each_type
def test_no_scale_near_the_usual_one_is_better(kind: StockType) -> None:
    """Of the scales that are tried; those between gain less than 2 %."""
    x = gaussian(64, 32)
    weights = np.exp(np.random.default_rng(1).standard_normal((64, 32))).astype(np.float32)
    blocks = ccq_backend.encode(kind, x, importance=weights, effort="best")
    found = (weights * np.square(decode_rows(kind.name, blocks) - x)).sum(axis=1)
    top = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    step = 1 / 64 if kind.name == "q5_0" else 1 / 32
    for end in (LEVELS[kind.name][0], LEVELS[kind.name][-1]):
        for factor in 1 + step * np.arange(-6, 10):
            scale = (top / end * factor).astype(np.float16).astype(np.float32)
            assert (found <= 1.02 * (weights * np.square(rounded(kind, x, scale) - x)).sum(axis=1)).all()


@pytest.mark.parametrize(("kind", "theirs"), [("q4_0", "Q4_0"), ("q5_0", "Q5_0"), ("iq4_nl", "Q4_0")])
def test_less_error_than_rounding_at_the_largest_weights_scale(kind: str, theirs: str) -> None:
    x = gaussian(64, 256)
    weights = np.exp(1.5 * np.random.default_rng(2).standard_normal(256)).astype(np.float32)
    as_type = gguf.GGMLQuantizationType[theirs]
    rest = np.square(gguf.quants.dequantize(gguf.quants.quantize(x, as_type), as_type) - x)
    alike = np.square(decode_rows(kind, encode_rows(kind, x)) - x)
    assert alike.sum() < 0.92 * rest.sum()
    weighted = weights * np.square(decode_rows(kind, encode_rows(kind, x, weights)) - x)
    assert weighted.sum() < 0.8 * (weights * rest).sum()


@each_type
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-14, 10))
def test_what_was_decoded_is_encoded_to_itself(kind: StockType, seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.choice(LEVELS[kind.name], (4, 64)) * 2.0**exponent).astype(np.float32)
    x[:, ::32] = 2.0**exponent * LEVELS[kind.name][0]  # the level that the scale is derived from
    np.testing.assert_array_equal(decode_rows(kind.name, encode_rows(kind.name, x)), x)


@each_type
@given(
    x=hnp.arrays(np.float32, (2, 32), elements=st.floats(-5e5, 5e5, width=32)),
    weights=hnp.arrays(np.float32, (2, 32), elements=st.floats(0, 2.0**60, width=32)),
    effort=st.sampled_from(sorted(ccq_backend.EFFORTS)),
)
def test_any_weights_and_importance(kind: StockType, x: F32, weights: F32, effort: str) -> None:
    """Scales are finite, decoded weights are near, and what counts for nothing does no harm."""
    x = x * np.float32(kind.largest / 8)
    blocks = ccq_backend.encode(kind, x, importance=weights, effort=effort)
    scale = scales(kind, blocks)
    assert np.isfinite(scale).all()
    top = np.abs(x).max(axis=1, keepdims=True)
    decoded = decode_rows(kind.name, blocks)
    assert (np.abs(decoded) <= 1.5 * top + 127 * 2.0**-24).all()


@each_type
def test_bytes_do_not_depend_on_threads_and_rows(kind: StockType) -> None:
    x, weights = gaussian(40, 320), np.exp(gaussian(40, 320, 3) * 20)
    whole = ccq_backend.encode(kind, x, importance=weights, threads=1)
    np.testing.assert_array_equal(whole, ccq_backend.encode(kind, x, importance=weights, threads=3))
    for row in (0, 7, 39):
        one = ccq_backend.encode(kind, x[row : row + 1], importance=weights[row : row + 1])
        np.testing.assert_array_equal(whole[row : row + 1], one)


def sequential(kind: StockType, x: F64, scale: float, weights: F64, coupling: F64) -> tuple[F64, float]:
    """One block rounded weight by weight at a scale, errors passed on, in float64: the weights and what they cost."""
    target, decoded, cost = x.copy(), np.zeros(32), 0.0
    for j in range(32):
        values = scale * LEVELS[kind.name]
        decoded[j] = values[np.abs(values - target[j]).argmin()]
        cost += weights[j] * (target[j] - decoded[j]) ** 2
        target += (x[j] - decoded[j]) * coupling[j]
    return decoded, cost


@each_type
def test_coupled_errors_are_followed(kind: StockType) -> None:
    rng = np.random.default_rng(5)
    x, weights = gaussian(6, 64), np.exp(rng.standard_normal(64)).astype(np.float32)
    coupling = np.triu(0.2 * rng.standard_normal((2, 32, 32)), 1).astype(np.float32)
    blocks = ccq_backend.encode(kind, x, importance=weights, coupling=coupling)
    decoded, scale = decode_rows(kind.name, blocks), scales(kind, blocks)
    alone = decode_rows(kind.name, ccq_backend.encode(kind, x, importance=weights))

    def cost(row: F32, at: int, w: F32) -> float:
        e = (w[at * 32 : at * 32 + 32] - row[at * 32 : at * 32 + 32]).astype(np.float64)
        return float((weights[at * 32 : at * 32 + 32] * (e + e @ coupling[at]) ** 2).sum())

    for row in range(6):
        for at in range(2):
            part = slice(at * 32, at * 32 + 32)
            way, expected = sequential(
                kind, x[row, part].astype(np.float64), float(scale[row, at]), weights[part], coupling[at]
            )
            np.testing.assert_allclose(decoded[row, part], way, rtol=1e-5, atol=1e-7)
            assert cost(decoded[row], at, x[row]) == pytest.approx(expected, rel=1e-3)
    ours = sum(cost(decoded[r], at, x[r]) for r in range(6) for at in range(2))
    assert ours < 0.7 * sum(cost(alone[r], at, x[r]) for r in range(6) for at in range(2))


@each_type
@pytest.mark.parametrize("n", [96, 256])
def test_error_feedback(kind: StockType, n: int) -> None:
    """Rows that are no multiple of 64, too; the error at the outputs falls to less than half."""
    rng = np.random.default_rng(7)
    inputs = rng.standard_normal((1000, n // 4)) @ rng.standard_normal((n // 4, n)) + rng.standard_normal((1000, n))
    hessian = (inputs.T @ inputs).astype(np.float32)
    x, factors = gaussian(24, n), factorize(hessian, kind)
    blocks = encode_with_feedback(x, factors)
    parts = [encode_with_feedback(x[a:b], factors, threads=2) for a, b in ((0, 1), (1, 24))]
    np.testing.assert_array_equal(blocks, np.concatenate(parts))

    def loss(decoded: F32) -> float:
        e = (decoded - x).astype(np.float64)
        return float(((e @ hessian) * e).sum())

    plain = encode_rows(kind.name, x, np.diagonal(hessian).copy())
    assert loss(decode_rows(kind.name, blocks)) < 0.5 * loss(decode_rows(kind.name, plain))


@each_type
def test_bad_arguments(kind: StockType) -> None:
    x = gaussian(2, 64)
    with pytest.raises(ShapeError, match=rf"48 is no multiple of 32, the block of {kind.name}"):
        ccq_backend.encode(kind, x[:, :48])
    with pytest.raises(BackendError):
        ccq_backend.encode(kind, x, scales=np.ones((2, 2), np.float32))
    x[0, 0] = np.inf
    with pytest.raises(WeightsError):
        ccq_backend.encode(kind.name, x)

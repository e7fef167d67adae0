"""Blocks with outliers and weights that are too small: what is found, measured, raised and said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ccq_converters import allocate
from ccq_converters.cli import main
from ccq_converters.encode import decode_rows, encode_rows
from ccq_converters.hessian import HessianWriter
from ccq_converters.options import QuantOptions
from ccq_converters.outliers import A_FIFTH, TOO_SMALL, BlockErrors, block_powers, outlier_powers
from ccq_converters.tensors import TensorSource
from ccq_format.gguf_io import ModelWriter
from support.commands import without_calibration

T_TYPES = ("ccq_t1_5", "ccq_t2", "ccq_t2_5", "ccq_t3")


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def source_of(x: np.ndarray, name: str = "blk.0.ffn_down.weight") -> TensorSource:
    return TensorSource(name, x.shape, lambda start, stop: x.reshape(-1, x.shape[-1])[start:stop], "f32")


def decoded(type_name: str, x: np.ndarray) -> np.ndarray:
    return decode_rows(type_name, encode_rows(type_name, x, None, 1, "fast"))


# --- finding them ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(arrays(np.float32, (2, 128), elements=st.floats(-1e6, 1e6, width=32)))
def test_blocks_by_definition(x: np.ndarray) -> None:
    squares = np.square(x, dtype=np.float64).reshape(4, 64)
    powers, outliers = block_powers(x)
    np.testing.assert_allclose(powers, squares.sum(axis=1), rtol=1e-12)
    lead = squares.max(axis=1) * 2 - squares.sum(axis=1)
    clear = np.abs(lead) > 1e-9 * powers
    np.testing.assert_array_equal(outliers[clear], lead[clear] > 0)
    assert not outliers[powers == 0].any()


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 3))
def test_rows_are_read_in_any_pieces(step: int, seed: int) -> None:
    x = gaussian(7, 128, seed=seed)
    x[3, 5], x[6, 127] = 100, -50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ccq_converters.outliers._CHUNK", step * 128)
        per_row, others = outlier_powers(source_of(x))
    powers, _ = block_powers(x)
    powers = powers.reshape(7, 2)
    assert np.flatnonzero(per_row).tolist() == [3, 6]
    assert per_row[[3, 6]] == pytest.approx([powers[3, 0], powers[6, 1]])
    assert others == pytest.approx(powers.sum() - per_row.sum())


def test_errors_by_definition_and_in_pieces() -> None:
    x = gaussian(6, 192)
    x[2, 70] = 60
    back = decoded("ccq_t2", x)
    whole, pieces = BlockErrors("t", "ccq_t2"), BlockErrors("t", "ccq_t2")
    whole.add(x, back)
    for row in range(6):
        pieces.add(x[row : row + 1], back[row : row + 1])
    errors = np.square(back.astype(np.float64) - x).reshape(-1, 64).sum(axis=1)
    assert whole.outliers == pieces.outliers == 1
    for result in (whole, pieces):
        assert result.error == pytest.approx(errors.sum())
        assert result.outlier_error == pytest.approx(errors[2 * 3 + 1])
        assert result.worst_relative == pytest.approx(errors.max() / np.square(x).reshape(-1, 64).sum(axis=1).mean())
        assert result.suffers  # 60 deviations, and only 17 other blocks
        assert not result.too_small


@pytest.mark.parametrize("type_name", T_TYPES)
def test_what_blocks_with_outliers_lose(type_name: str) -> None:
    """The figures behind ``A_FIFTH``: up to that share of the power no tensor can suffer."""
    plain = gaussian(128, 64)
    usual = np.square(decoded(type_name, plain) - plain).sum() / np.square(plain).sum()
    for k in (8, 12, 20, 50, 200, 1000):
        x = plain.copy()
        x[:, 17] = k
        lost = np.square(decoded(type_name, x) - x, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum()
        assert lost * A_FIFTH < 1.05 * usual
    x[:, 17] = 50
    error = np.square(decoded(type_name, x) - x)
    assert error.sum() > 3 * np.square(np.delete(x, 17, axis=1)).sum()  # the others are lost
    largest = decoded("q8_0", x) - x
    assert np.square(largest).sum() < 0.02 * np.square(np.delete(x, 17, axis=1)).sum()


# --- measuring -------------------------------------------------------------------------------------------------------


def test_a_sample_sees_the_largest_and_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight whose block loses as much as all others: of 8 rows in 512, none by chance would be its."""
    monkeypatch.setattr(allocate, "SAMPLE", 8 * 256)
    x = gaussian(512, 256)
    x[77, 100] = 2000
    rows, times = allocate._sample(source_of(x), 8)
    assert 77 in rows
    assert (np.diff(rows) > 0).all()
    assert len(rows) == 8
    assert times[rows == 77] == 1
    assert times.sum() == 512
    result = allocate.measure(source_of(x), QuantOptions(target_bpw=2.5, threads=1))
    power = np.square(x, dtype=np.float64).sum()
    for name, loss in zip(result.types, result.errors, strict=True):
        error = np.square(decoded(name, x) - x, dtype=np.float64).sum() / power
        assert loss == pytest.approx(error, rel=0.1)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 30), st.integers(1, 40))
def test_samples_stand_for_all_rows(count: int, outliers: int, rows: int) -> None:
    x = gaussian(rows, 64)
    x[np.arange(min(outliers, rows)), 3] = 40 + np.arange(min(outliers, rows))
    count = min(count, rows)
    chosen, times = allocate._sample(source_of(x), count)
    assert len(chosen) == len(times) == count
    assert (np.diff(chosen) > 0).all()
    assert times.sum() == pytest.approx(rows)
    if outliers and count > 1:
        assert min(outliers, rows) - 1 in chosen


# --- raising ---------------------------------------------------------------------------------------------------------


def suffering(rows: int = 64, k: float = 50) -> np.ndarray:
    """One input of 256 with outliers in every row."""
    x = gaussian(rows, 256, seed=3)
    x[:, 9] *= k
    return x


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    with ModelWriter(path, "llama") as writer:
        for name, x in tensors.items():
            writer.add_tensor(name, "f32", x.shape)
        writer.begin()
        for name, x in tensors.items():
            writer.write(name, x)
    return path


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, without_calibration(arguments))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {
        f"blk.{i}.{name}.weight": suffering() if (i, name) == (1, "ffn_up") else gaussian(64, 256, seed=i)
        for i in range(3)
        for name in ("ffn_up", "ffn_gate")
    }
    return write(
        tmp_path / "in.gguf", {**tensors, "token_embd.weight": suffering(), "output.weight": gaussian(64, 256)}
    )


def planned(*arguments: object) -> dict[str, list[str]]:
    lines = run("quantize", *arguments, "--dry-run", "--threads", 1).stdout.splitlines()
    return {line.split()[0]: line.split() for line in lines if ".weight" in line}


def test_mixtures_spare_what_suffers(model: Path) -> None:
    plan = planned(model, "--type", "ccq_t2_m")
    plain = {name: row for name, row in plan.items() if "raised" not in row}
    assert set(plan) - set(plain) == {"blk.1.ffn_up.weight", "token_embd.weight"}
    for name in ("blk.1.ffn_up.weight", "token_embd.weight"):
        (type_name,) = {"iq4_nl", "q5_0", "q8_0"} & set(plan[name])
        x = suffering()
        wished = "ccq_t2" if "ffn_up" in name else "ccq_t2_5"
        _, outliers = block_powers(x)
        errors = {
            t: np.square(decoded(t, x) - x).reshape(-1, 64).sum(axis=1) for t in (*T_TYPES, "iq4_nl", "q5_0", "q8_0")
        }
        limit = 2 * errors[wished][~outliers].sum()
        larger = list(errors)[list(errors).index(wished) :]
        assert type_name == next(t for t in larger if errors[t].sum() <= limit)
    pure, pinned = (
        planned(model, "--type", "ccq_t2"),
        planned(model, "--type", "ccq_t2_m", "--tensor-type", "up=ccq_t2"),
    )
    assert "ccq_t2" in pure["blk.1.ffn_up.weight"]
    assert "ccq_t2" in pinned["blk.1.ffn_up.weight"]


# --- what is said ----------------------------------------------------------------------------------------------------


def test_warnings(model: Path, tmp_path: Path) -> None:
    result = run("quantize", model, "-o", tmp_path / "o.gguf", "--type", "ccq_t2", "--threads", 1)
    (line,) = [line for line in result.stderr.splitlines() if "outliers" in line]
    assert line.startswith("Warning: 1 tensors lose more in blocks with outliers")
    assert "blk.1.ffn_up.weight (ccq_t2, worst block " in line
    result = run("quantize", model, "-o", tmp_path / "m.gguf", "--type", "ccq_t2_m", "--threads", 1)
    assert "outliers" not in result.stderr  # raised


@pytest.mark.parametrize(
    ("type_name", "lost", "kept"),
    [
        ("ccq_t1", 3e-8, 1e-6),
        ("ccq_t2", 3e-8, 1e-6),
        ("q4_0", 2e-8, 1e-6),
        ("q5_0", 5e-8, 1e-6),
        ("iq4_nl", 5e-7, 3e-6),
        ("q8_0", 1e-6, 5e-6),
        ("f16", 5e-9, 1e-6),
    ],
)
def test_weights_that_are_too_small(tmp_path: Path, type_name: str, lost: float, kept: float) -> None:
    source = write(
        tmp_path / "in.gguf",
        {
            "blk.0.ffn_up.weight": np.float32(lost) * gaussian(64, 256),
            "blk.0.ffn_gate.weight": np.float32(kept) * gaussian(64, 256),
            "blk.0.zero.weight": np.zeros((4, 64), "f4"),
        },
    )
    arguments = ["--type", "ccq_t2", "--tensor-type", f"ffn={type_name}", "--force", "--threads", 1]
    result = run("quantize", source, "-o", tmp_path / "o.gguf", *arguments)
    (line,) = [line for line in result.stderr.splitlines() if "too small" in line]
    assert line.startswith("Warning: the weights of 1 tensors are too small for their type")
    assert f"blk.0.ffn_up.weight ({type_name}, 1.00 of its power lost)" in line


def test_rows_that_are_passed_over_count() -> None:
    """A few rows of nothing in a matrix of ordinary ones, each encoded at a time."""
    errors = BlockErrors("t", "q8_0")
    small = np.float32(1e-9) * gaussian(4, 64)
    assert not errors.passes_over(small)
    errors.add(small, np.zeros_like(small))
    assert errors.too_small
    assert errors.passes_over(gaussian(4, 64))
    assert not errors.too_small
    assert errors.weights == 8 * 64


def test_large_errors_of_one_bit_are_not_small_weights() -> None:
    """Skewed importance costs unimportant weights most of their power, at whatever size; outliers are still seen."""
    x = gaussian(16, 256)
    x[:2, 9] = 500
    skewed = np.exp(gaussian(256, seed=1) * 6).astype("f4")
    errors = BlockErrors("t", "ccq_t1")
    errors.add(x, decode_rows("ccq_t1", encode_rows("ccq_t1", x, skewed, 1, "fast")))
    plain = BlockErrors("t", "ccq_t1")
    plain.add(x[2:], decode_rows("ccq_t1", encode_rows("ccq_t1", x[2:], skewed, 1, "fast")))
    assert plain.relative > TOO_SMALL
    assert not plain.too_small
    assert not errors.too_small
    assert errors.suffers


def test_every_tensor_in_the_log(model: Path, tmp_path: Path) -> None:
    """Encoded with feedback or without."""
    name = "blk.0.ffn_up.weight"
    with HessianWriter(tmp_path / "h.safetensors", {name: (256, 256)}, {}) as hessians:
        hessians.begin()
        hessians.write(name, np.eye(256, dtype=np.float32), 100.0)
    arguments = ["quantize", model, "-o", tmp_path / "o.gguf", "--type", "ccq_t2", "--threads", 1]
    result = run("-v", *arguments, "--hessian", tmp_path / "h.safetensors")
    lines = [line for line in result.stderr.splitlines() if "squared error" in line]
    assert len(lines) == 6
    for line in lines:
        tensor, error = line.split(": ")[0], float(line.split("squared error ")[1].split()[0])
        assert not line.startswith("Warning")
        assert 0.06 < error < (0.3 if tensor == "blk.1.ffn_up.weight" else 0.1)
    assert "squared error" not in run(*arguments, "--overwrite").stderr

"""Types allocated by measured loss: the choice itself, the measuring, and whole files."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from ccq_converters import allocate, imatrix
from ccq_converters.allocate import Choices, choose, completed, measure
from ccq_converters.cli import _size, main
from ccq_converters.encode import encode_rows
from ccq_converters.mixtures import LADDER
from ccq_converters.options import QuantOptions
from ccq_converters.target_types import row_bytes
from ccq_converters.tensors import TensorSource
from ccq_format import codec, layouts
from ccq_format.errors import ImportanceError, PlanError, WeightsError
from ccq_format.gguf_io import ModelWriter, open_model
from support.commands import without_calibration

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "manllama-4m"

Curve = tuple[list[int], list[float]]


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Costs that never fall with arbitrary losses, now and then infinite."""
    n = draw(st.integers(1, 4))
    steps = draw(st.lists(st.integers(1, 40) | st.just(0), min_size=n, max_size=n))
    loss = st.floats(0, 100, allow_subnormal=False) | st.integers(0, 5).map(float)
    losses = draw(st.lists(loss, min_size=n, max_size=n))
    if n > 1 and draw(st.integers(0, 9)) == 0:
        losses[draw(st.integers(1, n - 1))] = math.inf
    return list(itertools.accumulate(steps)), losses


def total(columns: Sequence[Sequence[float]], picked: Sequence[int]) -> float:
    return math.fsum(column[i] for column, i in zip(columns, picked, strict=True))


def lagrangian_bound(tensors: Sequence[Curve], budget: int) -> float:
    """The best lower bound ``min_picks sum(loss + slope * cost) - slope * budget`` over all slopes between two points,
    where its maximum lies."""
    slopes = {0.0}
    for costs, losses in tensors:
        for a, b in itertools.combinations(range(len(costs)), 2):
            if math.isfinite(losses[b]) and costs[a] < costs[b]:
                slopes.add(max(0.0, (losses[a] - losses[b]) / (costs[b] - costs[a])))
    return max(
        sum(min(v + s * c for c, v in zip(costs, losses, strict=True)) for costs, losses in tensors) - s * budget
        for s in slopes
    )


@settings(max_examples=200)
@given(tensors=st.lists(curves(), min_size=1, max_size=4), spare=st.integers(0, 160))
def test_the_choice_fits_and_is_within_one_step_of_the_optimum(tensors: list[Curve], spare: int) -> None:
    costs, losses = [c for c, _ in tensors], [v for _, v in tensors]
    budget = sum(c[0] for c in costs) + spare
    picked = choose(costs, losses, budget)
    assert total(costs, picked) <= budget
    found = total(losses, picked)
    fitting = [p for p in itertools.product(*(range(len(c)) for c in costs)) if total(costs, p) <= budget]
    best = min(total(losses, p) for p in fitting)
    assert best <= found
    # What one step on a hull can gain at most is all that the greedy choice can miss.
    largest_step = max(
        (a - b for v in losses for a, b in itertools.permutations([x for x in v if math.isfinite(x)], 2)), default=0.0
    )
    bound = lagrangian_bound(tensors, budget)
    assert bound <= best + 1e-9
    assert found <= bound + max(0.0, largest_step) + 1e-9
    assert found <= total(losses, [0] * len(costs))


@settings(max_examples=200)
@given(tensors=st.lists(curves(), min_size=1, max_size=6), spares=st.lists(st.integers(0, 200), min_size=2, max_size=2))
def test_more_bytes_never_lose_more(tensors: list[Curve], spares: list[int]) -> None:
    costs, losses = [c for c, _ in tensors], [v for _, v in tensors]
    least = sum(c[0] for c in costs)
    small, large = (total(losses, choose(costs, losses, least + spare)) for spare in sorted(spares))
    assert large <= small + 1e-9


def test_a_budget_on_the_hull_is_met_exactly() -> None:
    """Two tensors with the same curve and one worth ten times as much: it gets its steps first."""
    costs, losses = [[10, 20, 30]] * 2, [[1.0, 0.25, 0.0625], [10.0, 2.5, 0.625]]
    assert choose(costs, losses, 20) == [0, 0]
    assert choose(costs, losses, 30) == [0, 1]
    assert choose(costs, losses, 40) == [0, 2]
    assert choose(costs, losses, 50) == [1, 2]
    assert choose(costs, losses, 1000) == [2, 2]
    # A point above the hull is passed over, as is one that loses more for more bytes.
    assert choose([[10, 20, 30]], [[1.0, 0.9, 0.1]], 25) == [0]
    assert choose([[10, 20, 30]], [[1.0, 2.0, math.inf]], 1000) == [0]
    # Of two that cost the same the better one counts, and the first if they are equal.
    assert choose([[10, 20, 20, 30]], [[1.0, 0.4, 0.3, 0.1]], 25) == [2]
    assert choose([[10, 10, 20]], [[1.0, 0.5, 0.5]], 25) == [1]


# --- measuring ------------------------------------------------------------------------------------------------------


def gaussian(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.05)


def source(name: str, x: np.ndarray) -> TensorSource:
    flat = x.reshape(-1, x.shape[-1])
    return TensorSource(name, x.shape, lambda start, stop: flat[start:stop], "f32")


def importance(entries: dict[str, imatrix.Entry], tokens: int = 100) -> imatrix.Importance:
    return imatrix.Importance("data.gguf", entries, ["text"], 1, tokens)


def decoded(name: str, x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    data = encode_rows(name, x, weights, 1, "fast")
    if name.startswith("ccq"):
        return codec.decode(layouts.by_name(name), data)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])


OPTIONS = QuantOptions(target_bpw=2.6, threads=1)


def test_without_data_relative_errors_are_measured() -> None:
    x = gaussian(20, 128)
    choices = measure(source("w", x), OPTIONS)
    assert choices.losses is None
    assert choices.types == LADDER
    assert list(choices.nbytes) == [20 * row_bytes(name, 128) for name in LADDER]
    for name, found in zip(choices.types, choices.errors, strict=True):
        error = decoded(name, x, None) - x
        assert found == pytest.approx(np.square(error, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())
    assert sorted(choices.errors, reverse=True) == list(choices.errors)


@pytest.mark.parametrize("loss", [None, 0.25])
def test_importance_weights_the_errors(loss: float | None) -> None:
    """Each by the sum of its input's squares, so that an expert that was never hit has no part in them."""
    x = gaussian(3, 8, 64)
    hits = np.array([50.0, 0.0, 150.0])
    sums = np.random.default_rng(1).uniform(0.1, 4, (3, 64)).astype(np.float32) * hits[:, None].astype(np.float32)
    data = importance({"e": imatrix.Entry(sums.reshape(-1), hits)})
    data = replace(data, losses={"e": loss} if loss is not None else {})
    choices = measure(source("e", x), QuantOptions(target_bpw=2.6, threads=1, imatrix=data))
    mean = data.for_tensor("e", 3, 64)
    assert mean is not None
    flat = x.reshape(24, 64)
    weights = np.repeat(sums.astype(np.float64), 8, axis=0)
    for name, found in zip(choices.types, choices.errors, strict=True):
        error = np.square(decoded(name, flat, np.repeat(mean, 8, axis=0)) - flat, dtype=np.float64)
        expected = (error * weights).sum() / (np.square(flat, dtype=np.float64) * weights).sum()
        assert found == pytest.approx(expected, rel=1e-5)
    assert choices.losses == (tuple(loss * e for e in choices.errors) if loss is not None else None)


def test_gradients_give_the_expected_divergence() -> None:
    """``1/2 sum_mij G H E^2`` per token; an expert that was never hit loses nothing."""
    x, rng = gaussian(2, 16, 64), np.random.default_rng(2)
    hits = np.array([40.0, 0.0])
    sums = rng.uniform(0.1, 4, (2, 64)).astype(np.float32) * hits[:, None].astype(np.float32)
    gradients = rng.uniform(0, 3, (2, 16)).astype(np.float32) * np.float32([[1], [0]])
    data = importance({"e": imatrix.Entry(sums.reshape(-1), hits, gradients.reshape(-1))})
    choices = measure(source("e", x), QuantOptions(target_bpw=2.6, threads=1, imatrix=data))
    weights = data.for_tensor("e", 2, 64)
    assert weights is not None
    assert choices.losses is not None
    for name, loss in zip(choices.types, choices.losses, strict=True):
        flat = x.reshape(32, 64)
        error = (decoded(name, flat, np.repeat(weights, 16, axis=0)) - flat).reshape(x.shape)[0].astype(np.float64)
        expected = 0.5 * (gradients[0] / 100) @ np.square(error) @ (sums[0] / 40)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_sample_of_rows_stands_for_all(monkeypatch: pytest.MonkeyPatch, with_gradients: bool) -> None:
    x, rng = gaussian(1024, 64), np.random.default_rng(4)
    x[::2] *= 3
    gradients = rng.uniform(0.5, 1.5, 1024).astype(np.float32) if with_gradients else None
    data = importance({"w": imatrix.Entry(rng.uniform(1, 2, 64).astype(np.float32), np.array([100.0]), gradients)})
    options = QuantOptions(target_bpw=2.6, threads=1, imatrix=data)
    loaded: list[int] = []
    flat = source("w", x)
    counting = TensorSource("w", x.shape, lambda a, b: (loaded.append(b - a), flat.load_rows(a, b))[1], "f32")
    full = measure(flat, options)
    monkeypatch.setattr(allocate, "SAMPLE", 128 * 64)
    part = measure(counting, options)
    assert sum(loaded) == 1024 + 128  # one look at all for outliers, then the sample
    # Every other row has nine times the loss: (9 - 1) / (9 + 1) / sqrt(128) = 7 % standard error of the sum.
    np.testing.assert_allclose(part.errors, full.errors, rtol=0.2)
    if with_gradients:
        np.testing.assert_allclose(part.losses or (), full.losses or (), rtol=0.2)


def test_weights_that_no_type_holds() -> None:
    x = gaussian(4, 64)
    assert measure(source("zero", np.zeros((4, 64), np.float32)), OPTIONS).errors == (0.0,) * len(LADDER)
    x[1, 5] = np.nan
    with pytest.raises(WeightsError, match=r"tensor 'w'.*NaN"):
        measure(source("w", x), OPTIONS)
    x[1, 5] = 1e9
    errors = dict(zip(LADDER, measure(source("w", x), OPTIONS).errors, strict=True))
    assert errors["iq4_nl"] == math.inf  # its scale is a float16


def known(name: str, loss: float | None) -> Choices:
    return Choices(source(name, gaussian(2, 64)), ("a", "b"), (1, 2), (0.1, 0.01), loss and (0.1 * loss, 0.01 * loss))


def test_unknown_losses_are_those_of_near_layers() -> None:
    """Linear in the logarithm between two layers, constant beyond them, a mean where there is no such matrix."""
    given = {"blk.2.attn_v.weight": 1.0, "blk.4.attn_v.weight": 16.0, "blk.0.ffn_up.weight": 4.0}
    names = [*given, *(f"blk.{layer}.attn_v.weight" for layer in (0, 3, 9)), "blk.1.ffn_down.weight"]
    found, unit = completed([known(name, given.get(name)) for name in names])
    assert unit == allocate.KL_UNIT
    losses = {choice.source.name: choice.unit_loss for choice in found}
    expected = {**given, "blk.0.attn_v.weight": 1, "blk.3.attn_v.weight": 4, "blk.9.attn_v.weight": 16}
    assert losses == pytest.approx({**expected, "blk.1.ffn_down.weight": 4})
    assert completed([known(name, None) for name in names])[1] == allocate.RELATIVE_UNIT


def test_no_type_is_expected_to_lose_less_than_in_near_layers() -> None:
    """An input that dwarfs all others makes relative errors small, whatever becomes of the rest."""
    known_ones = [known(f"blk.{layer}.ffn_down.weight", 2.0) for layer in (2, 4)]
    odd = known("blk.3.ffn_down.weight", None)
    for errors, expected in (((0.001, 0.0001), (0.2, 0.02)), ((0.4, 0.01), (0.8, 0.02))):
        found, _ = completed([*known_ones, replace(odd, errors=errors)])
        assert found[-1].losses == pytest.approx(expected)


# --- plans and files ------------------------------------------------------------------------------------------------


def run(*args: object) -> Result:
    return CliRunner().invoke(main, without_calibration(args))


TENSORS = {
    "token_embd.weight": gaussian(96, 256),
    "blk.0.attn_norm.weight": np.ones(256, np.float32),
    "blk.0.attn_q.weight": gaussian(256, 256, seed=5),
    "blk.0.attn_v.weight": gaussian(64, 256, seed=6) * 2,
    "blk.0.ffn_up.weight": gaussian(320, 256, seed=7),
    "blk.0.ffn_down.weight": gaussian(256, 320, seed=8),
    "blk.0.odd.weight": gaussian(8, 96, seed=9),
    "output_norm.weight": np.ones(256, np.float32),
    "output.weight": gaussian(96, 256, seed=10),
}
FREE = ("blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "in.gguf"
    with ModelWriter(path, "llama") as out:
        out.gguf.add_custom_alignment(64)
        out.gguf.add_string("general.name", "x" * 1000)
        for name, x in TENSORS.items():
            out.add_tensor(name, "f32", x.shape)
        out.begin()
        for name, x in TENSORS.items():
            out.write(name, x)
    return path


def write_data(path: Path, only: Sequence[str] = FREE, gradients: Sequence[str] = FREE) -> Path:
    """An importance file where attn_v's outputs matter much more than all others."""
    entries = {}
    for name in only:
        rows, columns = TENSORS[name].shape
        scale = 1000 if "attn_v" in name else 1
        found = np.full(rows, scale, np.float32) if name in gradients else None
        entries[name] = imatrix.Entry(np.full(columns, 100, np.float32), np.array([100.0]), found)
    with ModelWriter(path, "", overwrite=True) as out:
        imatrix.fill(out, importance(entries))
    return path


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.type_name for t in open_model(path).tensors}


@pytest.mark.parametrize("bpw", [1.625, 2.6, 3.125, 4.0, 8.5])
def test_target_bpw_is_met_and_used(model: Path, tmp_path: Path, bpw: float) -> None:
    out = tmp_path / "out.gguf"
    result = run("quantize", model, "-o", out, "--target-bpw", bpw, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "fell back" in result.stderr  # blk.0.odd.weight
    types = types_of(out)
    assert (types["token_embd.weight"], types["output.weight"], types["blk.0.odd.weight"]) == ("q8_0", "q8_0", "iq4_nl")
    weights = sum(TENSORS[name].size for name in FREE)
    used = 8 * sum(TENSORS[n].size // TENSORS[n].shape[1] * row_bytes(types[n], TENSORS[n].shape[1]) for n in FREE)
    # What is left over is less than the smallest step of the smallest tensor.
    assert bpw * weights - 1.375 * 64 * 256 <= used <= bpw * weights


def test_one_bit_is_for_plans_with_data(model: Path, tmp_path: Path) -> None:
    """Where matrices have two importances, the less important get ccq_t1 and the others more, on average 1.3 bits."""
    data, out = write_data(tmp_path / "data.gguf"), tmp_path / "out.gguf"
    result = run("quantize", model, "-o", out, "--target-bpw", 1.3, "--imatrix", data, "--threads", 1)
    assert result.exit_code == 0, result.output
    types = types_of(out)
    assert {"ccq_t1"} < {types[name] for name in FREE}
    assert not any(types[name] == "ccq_t1" for name in FREE if "attn_v" in name)
    assert run("quantize", model, "-o", out, "--target-bpw", 1.3, "--overwrite").exit_code == 1


def test_errors_of_one_bit_count_more() -> None:
    x = gaussian(8, 128)
    options = replace(OPTIONS, imatrix=importance({"w": imatrix.Entry(np.ones(128, np.float32), np.ones(1))}))
    choices = measure(source("w", x), options)
    assert choices.types == ("ccq_t1", *LADDER)
    weights = np.ones(128, np.float32)
    error, power = decoded("ccq_t1", x, weights) - x, np.square(x, dtype=np.float64).sum()
    assert choices.errors[0] == pytest.approx(3 * np.square(error, dtype=np.float64).sum() / power)


def test_target_size_holds_for_the_whole_file(model: Path, tmp_path: Path) -> None:
    sizes, totals = [], []
    for target in (75_000, 90_000, 120_000, 200_000, 300_000):
        out = tmp_path / f"{target}.gguf"
        result = run("quantize", model, "-o", out, "--target-size", target, "--threads", 1, "--resume")
        assert result.exit_code == 0, result.output
        sizes.append(out.stat().st_size)
        assert target - 20_000 < sizes[-1] <= target
        types = types_of(out)
        totals.append((LADDER.index(types["token_embd.weight"]), LADDER.index(types["output.weight"])))
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


def test_dry_run_shows_the_losses_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.gguf")
    args = ("quantize", model, "--target-bpw", 2.6, "--imatrix", data, "--threads", 1, "--dry-run")
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [data]
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["tensor", "shape", "from", "type", "bytes", "loss", "why"]
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(TENSORS)]}
    shares = [float(rows[name].split(" %")[0].split()[-1]) for name in FREE]
    assert sum(shares) == pytest.approx(100, abs=0.05)
    assert all("--target-bpw" in rows[name] for name in FREE)
    assert "q8_0" in rows["blk.0.attn_v.weight"]  # worth a thousand times its share
    assert "nats of KL divergence per token" in lines[-2]
    assert re.fullmatch(r"expected time: \d+(\.\d+)? s with 1 thread", lines[-1])
    start = next(i for i, line in enumerate(lines) if line.startswith("--target-size  bits per weight"))
    curve = [line.split() for line in lines[start + 1 : -2]]
    assert len(curve) == 10
    assert [float(row[2]) for row in curve] == sorted((float(row[2]) for row in curve), reverse=True)
    size, bits, loss = curve[4]
    other = run("quantize", model, "--target-size", size, "--imatrix", data, "--threads", 1, "--dry-run").stdout
    last = other.splitlines()[-2]
    assert f"expected loss {loss} nats" in last
    assert float(last.split(" bits per weight")[0].split()[-1]) <= float(bits)
    assert any(line.startswith("q8_0: 3 tensors") for line in lines)
    assert run(*args).stdout == result.stdout
    without = run("quantize", model, "--target-bpw", 2.6, "--threads", 1, "--dry-run").stdout
    assert "mean relative error" in without.splitlines()[-2]


def test_without_gradients_small_matrices_come_first(model: Path) -> None:
    """All matrices are Gaussian and have the same relative errors in each type: size decides between two types."""
    result = run("quantize", model, "--target-bpw", 2.3, "--threads", 1, "--dry-run")
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "ccq_t2_5" in rows["blk.0.attn_v.weight"]
    assert [name for name in FREE if "ccq_t2 " in rows[name]]
    pure = run("quantize", model, "--target-bpw", 2.125, "--threads", 1, "--dry-run").stdout.splitlines()
    rows = {line.split()[0]: line for line in pure}
    assert all("ccq_t2 " in rows[name] for name in FREE)


def test_patterns_pin_tensors(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    args = ("--target-bpw", 2.125, "--tensor-type", r"attn_v|^output\.=f16", "--threads", 1)
    assert run("quantize", model, "-o", out, *args).exit_code == 0
    types = types_of(out)
    assert (types["blk.0.attn_v.weight"], types["output.weight"]) == ("f16", "f16")
    everything = run("quantize", model, "-o", out, "--target-bpw", 3, "--tensor-type", ".=ccq_t2", "--overwrite")
    assert everything.exit_code == 1
    assert "no matrix is left" in everything.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--target-bpw", "1.5"), r"1\.5: in the types that fit them the matrices have 1\.625 to 8\.5 bits"),
        (("--target-bpw", "9"), "1.625"),
        (("--target-bpw", "nan"), "1.625"),
        (("--target-size", "10k"), r"10,000 bytes: with these types the file has \d\d,\d\d\d to \d\d\d,\d\d\d bytes"),
        (("--target-size", "3.5GiB"), "3,758,096,384 bytes: with these types"),
        (("--target-bpw", "2", "--no-fallback"), "tensor 'blk.0.odd.weight'.*no multiple of 64"),
        (("--target-bpw", "2", "--tensor-type", "nothing=f16"), "matches no matrix"),
    ],
)
def test_targets_out_of_reach(model: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    result = run("quantize", model, "-o", tmp_path / "out.gguf", "--threads", 1, *args)
    assert result.exit_code == 1
    assert re.search(message, result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_range_in_the_message_can_be_reached(model: Path, tmp_path: Path) -> None:
    refused = run("quantize", model, "--dry-run", "--target-size", 1).stderr
    low, _, high, _ = refused.split("the file has ")[1].split()
    for limit, step in ((low, -1), (high, 1)):
        size = int(limit.replace(",", ""))
        out = tmp_path / f"{size}.gguf"
        assert run("quantize", model, "-o", out, "--target-size", size, "--threads", 1).exit_code == 0
        # The largest file has no CCQ tensor and not the keys of one, which the plan counts.
        assert size - (0 if step < 0 else 128) <= out.stat().st_size <= size
        assert run("quantize", model, "-o", out, "--target-size", size + step, "--overwrite").exit_code == 1


def test_a_folder_to_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The metadata that hf2gguf makes, tokenizer and all, counts."""
    monkeypatch.setattr(allocate, "SAMPLE", 1 << 12)
    out = tmp_path / "out.gguf"
    result = run("hf2gguf", EXAMPLE, "-o", out, "--target-size", "1.5MB", "--threads", 1, "--effort", "fast")
    assert result.exit_code == 0, result.output
    assert 1_480_000 < out.stat().st_size <= 1_500_000
    types = types_of(out)
    assert types["token_embd.weight"] == "ccq_t3"  # the output matrix, too
    assert "general.file_type" not in open_model(out).metadata


def test_interrupted_while_measuring(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def interrupt(source: TensorSource, options: QuantOptions, types: Sequence[str]) -> allocate.Choices:
        done.append(source.name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return measure(source, options, types)

    monkeypatch.setattr(allocate, "measure", interrupt)
    result = run("quantize", model, "-o", tmp_path / "out.gguf", "--target-size", 100_000, "--threads", 1)
    assert result.exit_code == 130
    assert done == list(FREE[:3])
    assert list(tmp_path.iterdir()) == []


def test_exactly_one_wish(model: Path) -> None:
    for args in ((), ("--type", "t2", "--target-bpw", 2.5), ("--target-size", 70_000, "--target-bpw", 2.5)):
        result = run("quantize", model, "--dry-run", *args)
        assert result.exit_code == 2
        assert "exactly one of --type, --target-bpw and --target-size" in result.stderr
    with pytest.raises(PlanError, match="exactly one"):
        QuantOptions("ccq_t2", target_bpw=2.5)
    with pytest.raises(PlanError, match="exactly one"):
        QuantOptions()


@pytest.mark.parametrize("size", ["", "3.5", "x", "3XB", "-5M", "1e9", "5 5"])
def test_sizes(model: Path, size: str) -> None:
    result = run("quantize", model, "--dry-run", "--target-size", size)
    if size == "3.5":
        assert "--target-size 3 bytes" in result.stderr
    else:
        assert result.exit_code == 2
        assert "is no size" in result.stderr


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1.5kB", 1500), ("1.5KiB", 1536), ("0.001 gb", 10**6), (".5MiB", 1 << 19), ("7", 7), ("7B", 7)],
)
def test_units(text: str, nbytes: int) -> None:
    assert _size(None, None, text) == nbytes  # type: ignore[arg-type]


def test_a_part_of_the_size_in_16_bits(model: Path, tmp_path: Path) -> None:
    weights = sum(x.size for x in TENSORS.values())
    size = str(int(0.3 * 2 * weights))
    results = [run("quantize", model, "--dry-run", "--threads", 1, "--target-size", s) for s in ("30%", size)]
    assert results[0].exit_code == 0, results[0].output
    assert results[0].stdout == results[1].stdout
    assert "no size such as" in run("quantize", model, "--dry-run", "--target-size", "%").stderr


def test_embedding_and_output_are_chosen_by_their_losses(model: Path, tmp_path: Path) -> None:
    vocabulary = ("token_embd.weight", "output.weight")
    entries = {
        name: imatrix.Entry(np.full(TENSORS[name].shape[1], 100, np.float32), np.array([100.0])) for name in FREE
    }
    found = {}
    for dear in vocabulary:
        losses = {name: 10.0 if name == dear else 0.01 for name in (*FREE, *vocabulary)}
        with ModelWriter(tmp_path / "data.gguf", "", overwrite=True) as out:
            imatrix.fill(out, replace(importance(entries), losses=losses))
        args = ("--imatrix", tmp_path / "data.gguf", "--threads", 1, "--overwrite")
        assert run("quantize", model, "-o", tmp_path / "o.gguf", "--target-size", 95_000, *args).exit_code == 0
        assert (tmp_path / "o.gguf").stat().st_size <= 95_000
        found[dear] = types_of(tmp_path / "o.gguf")
    assert found["token_embd.weight"]["token_embd.weight"] == found["output.weight"]["output.weight"] == "q8_0"
    assert found["token_embd.weight"]["output.weight"].startswith("ccq")
    assert found["output.weight"]["token_embd.weight"].startswith("ccq")
    assert run("quantize", model, "-o", tmp_path / "o.gguf", "--target-bpw", 2, *args).exit_code == 0
    assert {types_of(tmp_path / "o.gguf")[name] for name in vocabulary} == {"q8_0"}


@pytest.mark.parametrize("kind", ["t2_m", "p2", "q4_0", "q8_0"])
def test_what_a_type_loses_beside_a_plan_of_its_size(model: Path, tmp_path: Path, kind: str) -> None:
    data = write_data(tmp_path / "data.gguf")
    result = run("quantize", model, "--type", kind, "--imatrix", data, "--threads", 1, "--dry-run")
    assert result.exit_code == 0, result.output
    *_, instead, last, _ = result.stdout.splitlines()
    size, loss = int(instead.split()[1]), float(instead.split()[-1])
    assert loss <= float(last.split("expected loss ")[1].split()[0])
    out = tmp_path / "out.gguf"
    assert run("quantize", model, "-o", out, "--type", kind, "--imatrix", data, "--threads", 1).exit_code == 0
    assert size - 128 <= out.stat().st_size <= size


def test_gradients_of_some_matrices_only(model: Path, tmp_path: Path) -> None:
    """Those of the others follow from the ones that are known."""
    data = write_data(tmp_path / "data.gguf", gradients=FREE[:2])
    result = run("quantize", model, "--dry-run", "--target-bpw", 2.5, "--imatrix", data, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "nats of KL divergence" in result.stdout


def test_importance_of_another_model(model: Path, tmp_path: Path) -> None:
    entry = imatrix.Entry(np.ones(128, np.float32), np.array([1.0]))
    with pytest.raises(ImportanceError, match="another model"):
        measure(
            source("blk.0.attn_q.weight", TENSORS["blk.0.attn_q.weight"]),
            QuantOptions(target_bpw=2.5, imatrix=importance({"blk.0.attn_q.weight": entry})),
        )

"""Models of hundreds of gigabytes: what can be known of them without their weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from giants import GIANTS, tensors, write_skeleton

from ccq_converters import cost
from ccq_converters.cost import expectation
from ccq_converters.options import QuantOptions
from ccq_converters.plan import make_plan
from ccq_converters.tensors import TensorSource

from .test_memory import MEASURE

WEIGHTS = {
    "Kimi-K2": 1026.4e9,
    "DeepSeek-V3": 671.0e9,
    "Qwen3-Coder-480B-A35B": 480.2e9,
    "Llama-3.1-405B": 405.9e9,
    "GLM-4.5": 352.8e9,
    "ERNIE-4.5-300B-A47B": 299.5e9,
    "Qwen3-235B-A22B": 235.1e9,
    "gpt-oss-120b": 116.8e9,
}
"""What the models' cards say, to the digits that they say; without the layers that predict further tokens."""


def test_skeletons_have_the_weights_of_the_published_models() -> None:
    """Counted here from the checkpoints' tensors alone: FP8 scales are no weights, two MXFP4 ones are in a byte."""
    assert WEIGHTS.keys() == GIANTS.keys()
    for name, config in GIANTS.items():
        layers = config["num_hidden_layers"]
        total = 0
        for tensor, dtype, shape in tensors(config):
            found = re.match(r"model\.layers\.(\d+)\.", tensor)
            if tensor.endswith(("_scale_inv", "_scales")) or (found and int(found[1]) >= layers):
                continue
            total += int(np.prod(shape)) * (2 if dtype == "U8" else 1)
        assert total == pytest.approx(WEIGHTS[name], rel=2e-3), name
    assert sum(1 for _ in tensors(GIANTS["DeepSeek-V3"])) == 91991  # as its published index says


def test_a_skeleton_is_planned(tmp_path: Path) -> None:
    """DeepSeek-V3 with four of its layers, by the command."""
    write_skeleton(tmp_path / "m", {**GIANTS["DeepSeek-V3"], "num_hidden_layers": 4, "num_nextn_predict_layers": 0})
    command = [sys.executable, "-m", "ccq_converters.cli", "hf2gguf", str(tmp_path / "m"), "--type", "t2", "--dry-run"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = {line.split()[0]: line for line in out}
    assert "256 x 2048 x 7168" in rows["blk.3.ffn_up_exps.weight"]
    assert re.search(r" fp8 +ccq_t2 +998,244,352 ", rows["blk.3.ffn_up_exps.weight"])
    assert re.search(r" q8_0 .*MLA", rows["blk.0.attn_k_b.weight"])
    assert "bits per weight" in out[-2]
    time, calibration = out[-1].split(", ", 1)
    assert re.fullmatch(r"expected time: [\d.]+ (min|hours|days) with \d+ threads?", time)
    assert calibration == "after calibration; two to three times that if there is room for Hessians"


@pytest.mark.slow
def test_deepseek_v3_in_little_memory(tmp_path: Path) -> None:
    write_skeleton(tmp_path / "m", GIANTS["DeepSeek-V3"])
    command = [sys.executable, "-m", "ccq_converters.cli", "hf2gguf", str(tmp_path / "m"), "--type", "t2", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    assert int(lines[-1]) < 1 << 30  # 230 MB measured
    assert "671,026,419,200 weights" in lines[-3]


def source(name: str, load_rows: object, type_name: str = "f16") -> TensorSource:
    return TensorSource(name, (1 << 20, 4096), load_rows, type_name)  # type: ignore[arg-type]


def test_the_time_to_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights times what the samples cost, encoding shared among threads; what is copied costs nothing."""
    seconds = {"ccq_t2": 1e-6, "ccq_t3": 2e-6}
    monkeypatch.setattr(cost, "_seconds_to_encode", lambda target, effort: seconds[target])
    monkeypatch.setattr(cost, "_seconds_to_read", lambda tensor: {"f16": 1e-8, "fp8": 1e-7}[tensor.source.source_type])
    n = 1 << 32
    none = lambda start, stop: np.zeros((stop - start, 4096), np.float32)  # noqa: E731
    one = [source("blk.0.ffn_up.weight", none)]
    for threads, expected in ((1, 1.01e-6 * n / 60), (4, 0.26e-6 * n / 60)):
        plan = make_plan(one, QuantOptions("t2"))
        line = expectation(plan, QuantOptions("t2", threads=threads))
        assert float(line.split()[2]) == pytest.approx(expected, abs=0.5)
        assert line.endswith(f"min with {threads} thread" + ("s" if threads > 1 else ""))
    two = [*one, source("blk.0.ffn_down.weight", none, "fp8"), source("blk.0.attn_q.weight", none)]
    options = QuantOptions("t2", overrides=[("down", "t3"), ("attn_q", "f16")], threads=2)
    hours = n * (0.5e-6 + 1e-8 + 1e-6 + 1e-7) / 3600
    assert expectation(make_plan(two, options), options) == f"expected time: {hours:.1f} hours with 2 threads"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (75, "75 s"), (100, "1.7 min"), (3000, "50 min"), (6000, "1.7 hours"), (200000, "56 hours"),
     (400000, "4.6 days")],
)  # fmt: skip
def test_times_for_people(seconds: float, text: str) -> None:
    assert cost._for_people(seconds) == text


def test_samples_are_measured() -> None:
    """Not zero, not absurd: a nanosecond to a tenth of a millisecond per weight."""
    for target in ("ccq_t2", "q8_0"):
        assert 1e-10 < cost._seconds_to_encode(target, "fast") < 1e-4

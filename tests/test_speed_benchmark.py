"""benchmarks/speed: the models it makes, what it computes from its measurements, and its tables.  No speeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import agreement
import bench
import numpy as np
import pytest
from click.testing import CliRunner
from processes import STOCK, Worker
from random_models import (
    CCQ_TYPES,
    RECIPE,
    STOCK_TYPES,
    Shape,
    bits_per_weight,
    model_file,
    random_blocks,
    remote_quantizer,
)
from records import Measurement, Spread, line, machine_line, read, summarize
from tables import footer, main, markdown

from ccq_format import codec
from ccq_format.errors import EvalError, TensorTypeError
from ccq_format.gguf_io import open_model
from ccq_format.layouts import LAYOUTS, Layout
from support.blocks import IN_GGML

TINY = Shape("tiny", layers=1, n_embd=512, n_ff=512, heads=8, kv_heads=4, vocab=256)
TINY_MOE = replace(TINY, name="tiny-moe", experts=4, experts_used=2)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    pytest.importorskip("llama_cpp", reason="runs in llama-cpp-python")
    with Worker(STOCK, sys.executable) as running:
        yield running


# --- the models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.name))
def test_random_blocks_are_weights_of_the_asked_size(layout: Layout) -> None:
    blocks = random_blocks(layout, 64, 1024, 0.02, np.random.default_rng(0))
    assert blocks.shape == (64, layout.row_bytes(1024))
    codec.check_blocks(layout, blocks, file="f", tensor="t", first_block=0)
    assert 0.018 < codec.decode(layout, blocks).std() < 0.023


@pytest.mark.parametrize("name", [*(layout.name for layout in IN_GGML), "q2_k", "iq2_s"])
@pytest.mark.parametrize("shape", [TINY, TINY_MOE], ids=lambda shape: str(shape.name))
def test_a_model_is_valid_and_runs(shape: Shape, name: str, worker: Worker, tmp_path: Path) -> None:
    path = model_file(tmp_path, shape, name, remote_quantizer(worker.ask))
    model = open_model(path)
    matrices = dict(shape.matrices())
    assert {t.name: t.shape for t in model.tensors if t.type_name == name} == matrices
    assert {t.type_name for t in model.tensors if t.name not in matrices} == {"q8_0", "f32"}
    assert sum(t.n_weights for t in model.tensors if t.name in matrices) == shape.n_weights
    for tensor in model.tensors:
        tensor.check_blocks()
        assert tensor.bpw == bits_per_weight(tensor.type_name)
    worker.ask("open", name=str(path), path=str(path), threads=1)  # fails unless logits are finite
    for what, tokens in (("prompt", 512), ("generate", 64)):
        reply = worker.ask("measure", name=str(path), threads=1, what=what)
        assert 0 < reply["tokens"] <= tokens
        assert reply["seconds"] > 0


def test_a_file_is_made_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_quantizer(type_id: int, rows: int, columns: int, std: float, seed: int) -> np.ndarray:
        return np.zeros((rows, columns // 32 * 34), np.uint8)

    path = model_file(tmp_path, TINY, "ccq_t2", no_quantizer)
    made = path.stat().st_mtime_ns
    assert model_file(tmp_path, TINY, "ccq_t2", no_quantizer) == path
    assert path.stat().st_mtime_ns == made
    others = {model_file(tmp_path, replace(TINY, kv_heads=8), "ccq_t2", no_quantizer)}
    monkeypatch.setattr("random_models.RECIPE", RECIPE + 1)
    others.add(model_file(tmp_path, TINY, "ccq_t2", no_quantizer))
    assert set(tmp_path.iterdir()) == {path, *others}
    assert len(others) == 2


def test_types_of_a_fork_are_written_by_number(tmp_path: Path) -> None:
    def quantize(type_id: int, rows: int, columns: int, std: float, seed: int) -> np.ndarray:
        row_bytes = {8: columns // 32 * 34, 153: columns // 256 * 68 + 4}[type_id]  # iq2_kt: a scale for every row
        return np.zeros((rows, row_bytes), np.uint8)

    path = model_file(tmp_path, TINY, "iq2_kt", quantize)
    data = sum(np.prod(dims) // 512 * (2 * 68 + 4) for _, dims in TINY.matrices())
    ends = 2 * TINY.vocab * TINY.n_embd // 32 * 34 + 4 * sum(np.prod(dims) for _, dims in TINY.others())
    assert 0 < path.stat().st_size - data - ends < 4096
    with pytest.raises(TensorTypeError, match="153"):
        open_model(path)


def test_kernels_must_agree_with_the_decoded_weights(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in (TINY, TINY_MOE):
        assert 0 < agreement.check(worker, tmp_path, shape, "ccq_t2", 1) <= agreement.BOUND
    monkeypatch.setattr(agreement, "BOUND", 1e-9)
    with pytest.raises(EvalError, match=r"ccq_t2 \(tiny\): logits have a relative error"):
        agreement.check(worker, tmp_path, TINY, "ccq_t2", 1)
    assert {path.suffix for path in tmp_path.iterdir()} == {".gguf"}  # nothing else is left


def test_logits_that_are_no_numbers_do_not_agree(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "relative_errors", lambda a, b: np.full(len(a), np.nan))
    with pytest.raises(EvalError, match="error of nan"):
        agreement.check(worker, tmp_path, TINY, "ccq_t2", 1)


def test_a_worker_says_what_is_wrong(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="refused the model"):
        worker.ask("open", name="x", path=str(tmp_path / "missing.gguf"), threads=1)
    assert worker.ask("hello")["versions"]["llama-cpp-python"]  # and goes on
    with pytest.raises(EvalError, match="no-python: cannot be started"):
        Worker(STOCK, tmp_path / "no-python")
    with pytest.raises(EvalError, match="has ended with status"):
        Worker(STOCK, "/bin/false")
    with pytest.raises(EvalError, match="CCQ_ISA"):
        Worker(STOCK, sys.executable, {"CCQ_ISA": "abacus"})


# --- the numbers ----------------------------------------------------------------------------------------------------


def measured(type: str, seconds: list[float], threads: int = 1, what: str = "prompt") -> list[Measurement]:
    """One measurement of 100 tokens per round."""
    return [Measurement(i, "dense", type, threads, what, 100, s) for i, s in enumerate(seconds)]


def test_ratios_are_within_rounds() -> None:
    # The second round is four times slower for all, and the type twice as fast as its peer in most rounds.
    ours, theirs = measured("ccq_t2", [1.0, 4.0, 2.0]), measured("q2_k", [2.0, 8.0, 2.0])
    a, b = summarize(ours + theirs, "q2_k")
    assert (a.type, a.rounds, a.speed.median) == ("ccq_t2", 3, 50.0)
    assert a.ratio == Spread(2.0, 1.5, 2.0)
    assert b.ratio == Spread(1.0, 1.0, 1.0)
    assert b.speed.median == 50.0


def test_only_the_same_case_and_round_are_compared() -> None:
    ours = measured("ccq_t2", [1.0, 1.0]) + measured("ccq_t2", [1.0], threads=2) + measured("ccq_t2", [1.0], what="gen")
    summaries = summarize(ours + measured("q2_k", [4.0]), "q2_k")  # one round, one thread, prompt
    ratios = {(s.type, s.threads, s.what): s.ratio and s.ratio.median for s in summaries}
    assert ratios == {
        ("ccq_t2", 1, "prompt"): 4.0,
        ("q2_k", 1, "prompt"): 1.0,
        ("ccq_t2", 2, "prompt"): None,
        ("ccq_t2", 1, "gen"): None,
    }


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([4.0, 2.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_every_round_has_everything_in_another_order() -> None:
    orders = [bench.rotated(range(17), number) for number in range(5)]
    assert all(sorted(order) == list(range(17)) for order in orders)
    assert [order[0] for order in orders] == [0, 4, 8, 12, 16]
    assert bench.rotated(["a"], 3) == ["a"]


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bench.Settings] = []
    monkeypatch.setattr(bench, "run", seen.append)

    def settings(*arguments: str) -> bench.Settings:
        result = CliRunner().invoke(bench.main, arguments)
        assert (result.exit_code, result.output) == (0, "")
        return seen.pop()

    plain = settings()
    assert plain.types == (*CCQ_TYPES, *STOCK_TYPES)
    assert plain.command == "python benchmarks/speed/bench.py"
    assert plain.out == plain.cache / "speed.jsonl"
    given = settings("--types", "ccq_t2,ik/iq2_kt", "--ik", "--threads", "1,4", "--out", "somewhere", "--cache=folder")
    assert given.types == ("ccq_t2", "ik/iq2_kt", "q2_k")  # the peer comes along
    assert given.threads == (1, 4)
    assert given.command == "python benchmarks/speed/bench.py --types ccq_t2,ik/iq2_kt --threads 1,4 --ik"
    assert len(settings("--ik").types) == len(plain.types) + 4
    for wrong in (["--types", "ccq_t9"], ["--types", "ik/q2_k"], ["--threads", "1,x"], ["--threads", ""]):
        assert CliRunner().invoke(bench.main, wrong).exit_code == 2
    assert not seen


# --- files and tables -----------------------------------------------------------------------------------------------

MACHINE = {
    "cpu": "A Processor",
    "date": "2026-01-02T03:04+00:00",
    "command": "python benchmarks/speed/bench.py",
    "versions": {"ggml": "1.2", "ccq": "0.1"},
    "busy": False,
    "bits_per_weight": {"ccq_t2": 2.125, "q2_k": 2.625, "ik/q2_k": 2.625},
}


def results(path: Path) -> list[Measurement]:
    """Write a results file; returns its measurements."""
    made = [
        *measured("ccq_t2", [1.0, 2.0, 1.0]),
        *measured("ccq_t2", [12.5] * 3, what="generate"),
        *measured("q2_k", [2.0, 4.0, 2.0]),
        *measured("ik/q2_k", [0.05] * 3),
    ]
    path.write_text("\n".join([machine_line(MACHINE), *map(line, made)]) + "\n")
    return made


TABLE = """\
| dense: tokens/s (ratio to Q2_K) | bits/weight | prompt, 1 thread | generate, 1 thread |
|---|---:|---:|---:|
| **CCQ_T2** | 2.125 | 100 (2.00) | 8 |
| Q2_K | 2.625 | 50 (1.00) |  |
| Q2_K (ik_llama.cpp) | 2.625 | 2000 (40.00) |  |"""

FOOTER = """\
A Processor, 2026-01-02T03:04+00:00; ggml 1.2, ccq 0.1; median of 3 rounds.
`python benchmarks/speed/bench.py`"""


def test_results_survive(tmp_path: Path) -> None:
    made = results(tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl") == (MACHINE, made)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        "no json\n",
        '{"kind": "machine"}\n{"kind": "measurement", "round": 1}\n',
        '{"kind": "measurement"}\n',
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(EvalError, match="is no results file"):
        read(tmp_path / "r.jsonl")
    with pytest.raises(EvalError, match="No such file"):
        read(tmp_path / "missing.jsonl")


def test_markdown(tmp_path: Path) -> None:
    summaries = summarize(results(tmp_path / "r.jsonl"), "q2_k")
    assert markdown(summaries, "q2_k", {"ccq_t2": 2.125, "q2_k": 2.625, "ik/q2_k": 2.625}) == TABLE
    assert footer({**MACHINE, "busy": True}, 5) == FOOTER.replace("3 rounds", "5 rounds, beside a busy loop")


def test_tables_are_printed_or_put_in_a_file(tmp_path: Path) -> None:
    results(tmp_path / "r.jsonl")
    printed = CliRunner().invoke(main, [str(tmp_path / "r.jsonl")])
    assert printed.output == f"{TABLE}\n\n{FOOTER}\n"
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- r -->\nold\n<!-- end of r -->\nbelow\n")
    done = CliRunner().invoke(main, [str(tmp_path / "r.jsonl"), "--embed", str(readme)])
    assert (done.exit_code, done.output) == (0, "")
    assert readme.read_text() == f"above\n<!-- r -->\n\n{TABLE}\n\n{FOOTER}\n\n<!-- end of r -->\nbelow\n"
    readme.write_text("no marks\n")
    failed = CliRunner().invoke(main, [str(tmp_path / "r.jsonl"), "--embed", str(readme)])
    assert failed.exit_code == 1

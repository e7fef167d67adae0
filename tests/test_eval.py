"""``ccq-convert eval``: the numbers of llama-perplexity, from the bundled model and text.

Here the scoring is compared with its definition; ``tests/fork`` compares it with llama-perplexity itself.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ccq_converters import base_record, evaluate, hf2gguf, llama
from ccq_converters.cli import main
from ccq_converters.continuation import continuations
from ccq_converters.conversion import Conversion
from ccq_converters.convert import write_model
from ccq_converters.dequantize import dequantize
from ccq_converters.gguf_sources import sources_of
from ccq_converters.options import QuantOptions
from ccq_converters.quantize import quantize
from ccq_converters.tensors import TensorSource
from ccq_converters.threads import ThreadPool
from ccq_format.errors import EvalError, InputError
from ccq_format.gguf_io import open_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = EXAMPLES / "heldout.txt"

FLOAT32 = 1e-5
"""Relative difference allowed where all arithmetic is float32 and only its order differs: 2^-24 = 6e-8 per operation,
times 100 or so for the sums of a few hundred terms that go through four layers."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model as f32, f16, q8_0 and llama.cpp's own Q2_K (embedding and output q8_0); with BOS; with
    noise for its matrices."""
    folder = tmp_path_factory.mktemp("models")
    out = {name: folder / f"{name}.gguf" for name in ("f32", "f16", "q8_0", "q2_k", "bos", "noise")}
    for name in ("f32", "f16", "q8_0"):
        hf2gguf.convert(EXAMPLES / "manllama-4m", out[name], QuantOptions(name))
    llama.stock_quantize(out["f16"], out["q2_k"], "q2_k")
    model = open_model(out["f32"])
    sources = sources_of(model)
    model.fields.pop("tokenizer.ggml.add_bos_token")
    write_model(
        Conversion(
            out["bos"], model.arch, sources, copy_from=model, set_metadata=lambda writer: writer.add_add_bos_token(True)
        ),
        QuantOptions("f32"),
    )
    noisy = [noise(s) if s.name.startswith("blk.") and len(s.shape) == 2 else s for s in sources]
    write_model(Conversion(out["noise"], model.arch, noisy, copy_from=open_model(out["f32"])), QuantOptions("f16"))
    return out


def noise(source: TensorSource) -> TensorSource:
    """Numbers by chance of the same size."""

    def load_rows(start: int, stop: int) -> np.ndarray:
        x = source.load_rows(start, stop)
        rng = np.random.default_rng([start, *source.name.encode()])
        return x.std() * rng.standard_normal(x.shape, dtype=np.float32)

    return TensorSource(source.name, source.shape, load_rows, "f32")


@pytest.fixture(scope="module")
def text() -> str:
    # All evaluations here run on one thread: ggml's threads spin while they wait, which crawls on a busy machine.
    return evaluate.read_text(TEXT)


def windows_alone(path: Path, tokens: list[int], n_ctx: int, windows: int, bos: bool) -> np.ndarray:
    """Negative log-likelihoods of the tokens that count, one window at a time, a few tokens at a time, in float64."""
    nll = []
    with llama.LlamaModel(path, n_ctx=n_ctx, threads=1, exact=True) as model:
        for window in range(windows):
            model.clear()
            part = tokens[window * n_ctx : (window + 1) * n_ctx]
            given = [model.bos, *part[1:]] if bos else part
            for start in range(0, n_ctx, 50):
                here = range(start, min(start + 50, n_ctx))
                ids = given[here.start : here.stop]
                rows = model.decode(ids, list(here), [0] * len(ids), [True] * len(ids)).astype(np.float64)
                for position, row in zip(here, rows, strict=True):
                    if n_ctx // 2 <= position < n_ctx - 1:
                        nll.append(np.log(np.exp(row).sum()) - row[part[position + 1]])
    return np.array(nll)


@pytest.mark.parametrize(
    ("name", "n_ctx", "windows"),
    [
        ("f32", 256, 9),  # eight windows share a batch
        ("bos", 256, 3),  # the first token of every window replaced by BOS
        ("f32", 100, 20),  # 20 windows share a batch of 2000
        ("f32", 3000, 1),  # a window takes two batches
    ],
)
def test_perplexity_by_definition(files: dict[str, Path], text: str, name: str, n_ctx: int, windows: int) -> None:
    """All in float32 (weights, KV cache, no flash attention), so that no rounding but that depends on the CPU."""
    with llama.LlamaModel(files[name], n_ctx=8, threads=1) as model:
        tokens = model.tokenize(text)
    nll = windows_alone(files[name], tokens, n_ctx, windows, bos=name == "bos")
    result = evaluate.evaluate(files[name], text, n_ctx=n_ctx, max_windows=windows, threads=1, exact=True)
    assert (result.windows, result.scored) == (windows, windows * (n_ctx - 1 - n_ctx // 2))
    assert result.scored == len(nll)
    assert result.ppl == pytest.approx(np.exp(nll.mean()), rel=FLOAT32)
    assert result.ppl_stderr == pytest.approx(result.ppl * nll.std() / np.sqrt(len(nll) - 1), rel=FLOAT32)
    assert result.kld_mean is None
    assert not result.collapsed


@pytest.mark.parametrize("name", ["q8_0", "q2_k"])
def test_divergence_by_definition(files: dict[str, Path], text: str, name: str) -> None:
    """Against sums written out here, over the same logits: the same batches give the same ones."""
    n_ctx, windows = 128, 17  # 16 windows share a batch
    kld, same, nll, base_nll = [], [], [], []
    with (
        llama.LlamaModel(files["f16"], n_ctx=n_ctx, n_seq=16, threads=1) as base,
        llama.LlamaModel(files[name], n_ctx=n_ctx, n_seq=16, threads=1) as ours,
    ):
        tokens = base.tokenize(text)
        for chunk in (range(16), range(16, windows)):
            pairs = zip(*(evaluate.window_logits(model, tokens, chunk) for model in (base, ours)), strict=True)
            for window, pair in zip(chunk, pairs, strict=True):
                for row, rows in enumerate(zip(*pair, strict=True)):
                    p, q = (
                        np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum() for logits in rows
                    )
                    target = tokens[window * n_ctx + n_ctx // 2 + row + 1]
                    kld.append((p * np.log(p / q)).sum())
                    same.append(p.argmax() == q.argmax())
                    nll.append(-np.log(q[target]))
                    base_nll.append(-np.log(p[target]))
    result = evaluate.evaluate(files[name], text, base_path=files["f16"], n_ctx=n_ctx, max_windows=windows, threads=1)
    assert result.scored == len(kld)
    assert result.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-9)
    assert result.ppl_base == pytest.approx(np.exp(np.mean(base_nll)), rel=1e-9)
    assert result.kld_mean == pytest.approx(np.mean(kld), abs=1e-9)
    assert result.kld_p99 == pytest.approx(np.quantile(kld, 0.99), abs=1e-9)
    assert result.kld_stderr == pytest.approx(np.std(kld) / np.sqrt(len(kld) - 1), rel=1e-6)
    assert result.top1 == np.mean(same)
    counts = np.bincount(tokens) / len(tokens)
    frequencies = [counts[tokens[w * n_ctx + n_ctx // 2 + 1 : (w + 1) * n_ctx]] for w in range(windows)]
    assert result.ppl_unigram == pytest.approx(np.exp(-np.log(frequencies).mean()), rel=1e-9)
    assert not result.collapsed
    assert (result.kld_mean < 0.001) == (name == "q8_0")


def test_a_model_does_not_diverge_from_itself(files: dict[str, Path], text: str) -> None:
    result = evaluate.evaluate(files["q2_k"], text, base_path=files["q2_k"], max_windows=2, threads=1)
    assert (result.kld_mean, result.kld_p99, result.top1) == (0.0, 0.0, 1.0)
    assert result.ppl == result.ppl_base
    assert result.ppl_stderr == result.ppl_base_stderr


def test_ccq_file_runs_in_the_plugin(files: dict[str, Path], text: str, tmp_path: Path) -> None:
    """The same weights in CCQ blocks and decoded to f32 differ by the activations' rounding to int8, nothing else: far
    less than the types differ from f16 (divergence 0.14 here)."""
    ccq, plain = tmp_path / "ccq.gguf", tmp_path / "f32.gguf"
    quantize(files["f16"], ccq, QuantOptions("ccq_p2_5"))
    dequantize(ccq, plain, "f32")
    result = evaluate.evaluate(ccq, text, base_path=plain, max_windows=8, threads=1)
    assert result.kld_mean is not None
    assert 0 < result.kld_mean < 1e-3
    assert result.ppl == pytest.approx(result.ppl_base, rel=0.005)


def test_log_softmax_survives_large_logits() -> None:
    rows = np.array([[1e4, 1e4 - 1, -1e4], [-3e38, 0, 3e38]], np.float32)
    logp = evaluate.log_softmax(rows)
    np.testing.assert_allclose(logp[0, :2], -np.log1p(np.exp([-1.0, 1.0])), rtol=1e-12)
    assert np.isfinite(logp).all()


def test_cli(files: dict[str, Path]) -> None:
    command = ["eval", str(files["q8_0"]), "--text", str(TEXT), "--base", str(files["f16"]), "--windows", "2"]
    command += ["--threads", "1"]
    result = CliRunner().invoke(main, [*command, "--json", "--ctx", "64"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"ppl", "ppl_stderr", "kld_mean", "kld_p99", "top1"} <= report.keys()
    assert report["n_ctx"] == 64
    assert report["scored"] == 62
    shown = CliRunner().invoke(main, [*command, "--ctx", "64"]).stdout
    assert f"{report['ppl']:.4f}" in shown
    assert f"{report['kld_mean']:.6f}" in shown
    alone = json.loads(CliRunner().invoke(main, [*command[:4], "--windows", "2", "--threads", "1", "--json"]).stdout)
    assert "kld_mean" not in alone
    assert alone["n_ctx"] == 256


def refused(*args: object) -> str:
    result = CliRunner().invoke(main, ["eval", *map(str, args)])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_what_cannot_be_evaluated(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too little.")
    assert "needs at least 512" in refused(files["f16"], "--text", tmp_path / "short.txt")
    assert "short.bin" in refused(files["f16"], "--text", tmp_path / "short.bin")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9" * 1000)
    assert "no UTF-8" in refused(files["f16"], "--text", tmp_path / "latin1.txt")
    assert "missing.gguf" in refused(tmp_path / "missing.gguf", "--text", TEXT)
    with pytest.raises(EvalError, match="no such file"):
        llama.LlamaModel(tmp_path / "missing.gguf", n_ctx=64)
    with pytest.raises(InputError):
        evaluate.evaluate(tmp_path / "missing.gguf", "text")


def test_llama_cpps_own_reason_is_quoted(files: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(files["f16"])
    write_model(
        Conversion(
            tmp_path / "odd.gguf",
            model.arch,
            [s for s in sources_of(model) if s.name != "blk.1.ffn_up.weight"],
            copy_from=model,
        ),
        QuantOptions("f16"),
    )
    line = refused(tmp_path / "odd.gguf", "--text", TEXT)
    assert "llama.cpp refused the model" in line
    assert "blk.1.ffn_up.weight" in line


def test_only_the_last_newline_of_a_text_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\r\nb\n\n")
    assert evaluate.read_text(path) == "a\r\nb\n"


def test_models_with_different_vocabularies(files: dict[str, Path], tmp_path: Path, text: str) -> None:
    with pytest.raises(EvalError, match="vocabulary differs"):
        evaluate.evaluate(files["f16"], text, base_path=_other_vocabulary(files["f16"], tmp_path), max_windows=1)


def _other_vocabulary(path: Path, folder: Path) -> Path:
    """The same model with two pieces of its vocabulary exchanged."""
    model = open_model(path)
    pieces = model.metadata["tokenizer.ggml.tokens"]
    a, b = pieces.index("▁the"), pieces.index("▁of")
    pieces[a], pieces[b] = pieces[b], pieces[a]
    out = folder / "other.gguf"
    write_model(Conversion(out, model.arch, sources_of(model), copy_from=model), QuantOptions("f16"))
    return out


# --- tokens that are ruled out, and NaN ----------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Tokens whose logits become -inf, by the model's path."""
    hidden: dict[str, list[int]] = {}
    decode = llama.LlamaModel.decode

    def masked(self: llama.LlamaModel, *arguments: list[int]) -> np.ndarray:
        logits = decode(self, *arguments).copy()
        logits[:, hidden.get(self.path, [])] = -np.inf
        return logits

    monkeypatch.setattr(llama.LlamaModel, "decode", masked)
    return hidden


def test_tokens_that_are_masked(files: dict[str, Path], text: str, masks: dict[str, list[int]], tmp_path: Path) -> None:
    ours, base = files["q2_k"], files["f16"]
    text = text[:4000]
    with llama.LlamaModel(base, n_ctx=8, threads=1) as model:
        tokens = model.tokenize(text)
        rare = [t for t in range(model.n_vocab) if t not in tokens][:5]
    common = max(set(tokens), key=tokens.count)

    def run() -> list[evaluate.EvalResult]:
        """Beside the base, and against its record."""
        known = evaluate.record_base(base, text, tmp_path, n_ctx=64, max_windows=2, threads=1)
        return [
            evaluate.evaluate(ours, text, base_path=base, n_ctx=64, max_windows=2, threads=1),
            evaluate.compare(ours, known, threads=1),
        ]

    (plain, _) = run()
    masks.update({str(ours): rare, str(base): rare})
    for result in run():  # the same but for tokens of hardly any probability
        assert result.infinite == 0
        assert result.kld_mean == pytest.approx(plain.kld_mean, rel=0.01)
    masks[str(ours)] = []
    for result in run():  # what only the base rules out
        assert result.infinite == 0
        assert result.kld_mean == pytest.approx(plain.kld_mean, rel=0.01)
    masks.update({str(ours): rare, str(base): []})
    for result in run():
        assert result.infinite == result.scored
        assert result.kld_mean == result.kld_p99 == result.kld_stderr == inf
        assert np.isfinite(result.ppl)
        assert result.as_dict()["kld_mean"] == "Infinity"
        assert f"INFINITE         at {result.scored} tokens" in result.as_text()
        assert not result.collapsed
    masks.update({str(ours): [common], str(base): [common]})
    for result in run():  # a token of the text: perplexities are infinite, the divergence is not
        assert result.ppl == result.ppl_base == result.ppl_stderr == inf
        assert 0 < result.infinite < result.scored
        assert np.isfinite(result.kld_mean)
    alone = evaluate.evaluate(ours, text, n_ctx=64, max_windows=2, threads=1)
    assert (alone.ppl, alone.infinite) == (inf, result.infinite)
    json.dumps(alone.as_dict(), allow_nan=False)


def test_quantiles_beside_infinity() -> None:
    values = np.array([1.0, 3.0, inf])
    assert [evaluate._quantile(values, q) for q in (0, 0.25, 0.5, 0.75, 1)] == [1, 2, 3, inf, inf]
    assert evaluate._quantile(np.array([inf, 1.0, inf]), 0.75) == inf


@settings(deadline=None)
@given(arrays(np.float64, (2, 4), elements=st.floats(-800, 800) | st.just(-np.inf)))
def test_divergences_are_never_nan(logits: np.ndarray) -> None:
    logits[:, 0] = np.where(np.isinf(logits).all(axis=1), 0, logits[:, 0])
    base, logp = (evaluate.log_softmax(row[None]) for row in logits)
    (kld,) = evaluate.divergence(base, logp)
    assert kld >= -1e-12
    assert (kld == inf) == bool(((np.exp(base) > 0) & np.isinf(logp)).any())


def test_nan_is_an_error(files: dict[str, Path], text: str, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    raw = bytearray(files["f32"].read_bytes())
    at = open_model(files["f32"]).tensor("output_norm.weight").offset
    raw[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    for more in ([], ["--base", files["f32"]], ["--generate", 2]):
        line = refused(path, "--text", TEXT, "--windows", 1, "--threads", 1, *more)
        assert line.startswith(f"Error: {path}: ")
        assert "NaN" in line
    assert "nan.gguf" in refused(files["f32"], "--text", TEXT, "--windows", 1, "--threads", 1, "--base", path)
    with pytest.raises(EvalError, match=r"nan\.gguf.*NaN"):
        evaluate.record_base(path, text, tmp_path, max_windows=1, threads=1)


# --- collapse --------------------------------------------------------------------------------------------------------


def result_with(ppl: float, ppl_base: float | None, unigram: float) -> evaluate.EvalResult:
    return evaluate.EvalResult(ppl, 0.1, 256, 1, 127, 0, unigram, ppl_base=ppl_base)


def test_what_counts_as_collapsed() -> None:
    assert not result_with(499, None, 500).collapsed
    assert result_with(500, None, 500).collapsed
    assert not result_with(49, 5, 500).collapsed  # half of the way from 5 to 500
    assert result_with(51, 5, 500).collapsed
    assert not result_with(390, 300, 380).collapsed  # a text that tells the base little, either
    assert result_with(300 * 2.8, 300, 380).collapsed
    assert result_with(inf, 5, 500).collapsed  # too large for a float
    assert not result_with(400, inf, 500).collapsed  # only the base rules out a token of the text
    assert not replace(result_with(inf, 5, 500), infinite=1).collapsed


@pytest.mark.parametrize("with_base", [False, True])
def test_collapse(files: dict[str, Path], with_base: bool) -> None:
    command = ["eval", files["noise"], "--text", TEXT, "--windows", 4, "--threads", 1, "--ctx", 128]
    command += ["--base", files["f16"]] if with_base else []
    (*_, verdict) = CliRunner().invoke(main, [str(a) for a in command]).stdout.splitlines()
    assert verdict.startswith("COLLAPSED")
    assert json.loads(CliRunner().invoke(main, [*map(str, command), "--json"]).stdout)["collapsed"] is True


# --- generation ------------------------------------------------------------------------------------------------------

PROMPT = "The function returns a pointer to"


def greedy(path: Path, n: int) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, and what follows, all in float32."""
    with llama.LlamaModel(path, n_ctx=64, threads=1, exact=True) as model:
        tokens = model.tokenize(PROMPT)
        made: list[int] = []
        while len(made) < n:
            model.clear()
            ids = [*tokens, *made]
            logits = model.decode(
                ids, list(range(len(ids))), [0] * len(ids), [i == len(ids) - 1 for i in range(len(ids))]
            )
            made.append(int(logits[0].argmax()))
        return tokens, made


def test_greedy_by_definition_and_to_the_end(files: dict[str, Path], tmp_path: Path) -> None:
    tokens, made = greedy(files["f32"], 12)
    with llama.LlamaModel(files["f32"], n_ctx=64, threads=1, exact=True) as model:
        assert model.generate(PROMPT, 12)[0] == model.generate(tokens, 12)[0] == model.detokenize(made)
        last = next(i for i in range(2, 12) if made[i] not in made[:i])
        before = model.detokenize(made[:last])
    model = open_model(files["f32"])
    model.fields.pop("tokenizer.ggml.eos_token_id")
    write_model(
        Conversion(
            tmp_path / "eos.gguf",
            model.arch,
            sources_of(open_model(files["f32"])),
            copy_from=model,
            set_metadata=lambda writer: writer.add_eos_token_id(made[last]),
        ),
        QuantOptions("f32"),
    )
    with llama.LlamaModel(tmp_path / "eos.gguf", n_ctx=64, threads=1, exact=True) as ending:
        assert ending.generate(PROMPT, 12)[0] == before


def test_generate_side_by_side(files: dict[str, Path], text: str) -> None:
    command = ["eval", files["noise"], "--text", TEXT, "--windows", 1, "--threads", 1, "--ctx", 64, "--generate", 8]

    def run(*more: object) -> str:
        result = CliRunner().invoke(main, [str(a) for a in (*command, *more)], env={"COLUMNS": "120"})
        assert result.exit_code == 0, result.output
        return result.stdout

    report = json.loads(run("--base", files["f16"], "--json", "--prompt", PROMPT))
    made = {}
    for name in ("noise", "f16"):
        with llama.LlamaModel(files[name], n_ctx=64, threads=1) as model:
            made[name] = model.generate(PROMPT, 8)[0]
    assert report["generated"] == {"prompt": PROMPT, "file": made["noise"], "base": made["f16"]}
    shown = run("--base", files["f16"], "--prompt", PROMPT)
    assert PROMPT in shown
    assert "base: f16.gguf" in shown.replace("\n", " ")
    assert made["f16"].split()[0] in shown
    alone = json.loads(run("--json"))["generated"]
    assert set(alone) == {"prompt", "file"}
    assert len(alone["prompt"]) > 20
    assert text.startswith(alone["prompt"])
    assert continuations(files["noise"], 8, text=text, threads=1).as_dict() == alone
    result = CliRunner().invoke(main, [str(a) for a in (*command[:4], "--prompt", "x")])
    assert result.exit_code == 2


# --- progress and interrupts -----------------------------------------------------------------------------------------


def test_progress_and_interrupt(files: dict[str, Path]) -> None:
    """The bar of a terminal, and Ctrl-C while it moves."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "ccq_converters.cli", "eval", str(files["f32"]), "--text", str(TEXT)]
    child = subprocess.Popen(
        [*command, "--ctx", "1024", "--threads", "1"],  # a minute
        stdout=subprocess.PIPE,
        stderr=end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(end)
    shown = b""
    try:
        while b"%" not in shown:
            shown += os.read(terminal, 4096)
        child.send_signal(signal.SIGINT)
        stdout, _ = child.communicate(timeout=60)
        with suppress(OSError):  # the other end is closed, and all is read
            while True:
                shown += os.read(terminal, 4096)
    finally:
        child.kill()
        os.close(terminal)
    assert child.returncode == 130, shown.decode()
    assert stdout == b""
    assert b" windows" in shown
    assert b"Interrupted" in shown


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts how often llama.cpp asks whether to go on.  Ctrl-C comes when the first number gets to the second, and the
    answer once the main thread knows of it."""
    counted = [0, 0]

    def interrupted(model: llama.LlamaModel) -> bool:
        counted[0] += 1
        if counted[0] == counted[1]:
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 60
            while not vars(model)["interrupted"] and time.monotonic() < deadline:
                time.sleep(0.01)
        return vars(model)["interrupted"]

    def note(model: llama.LlamaModel, value: bool) -> None:
        vars(model)["interrupted"] = value

    monkeypatch.setattr(llama.LlamaModel, "_interrupted", property(interrupted, note), raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield counted
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_a_graph(files: dict[str, Path], text: str, asked: list[int]) -> None:
    with llama.LlamaModel(files["f32"], n_ctx=256, threads=1, interruptible=True) as model:
        tokens = model.tokenize(text)[:256]
        arguments = tokens, list(range(256)), [0] * 256, [True] * 256
        asked[:] = 0, 3
        with pytest.raises(KeyboardInterrupt):
            model.decode(*arguments)
        assert asked[0] == 3  # the rest of the graph was not computed
        model.clear()
        assert model.decode(*arguments).shape == (256, model.n_vocab)


def test_an_interrupt_ends_a_load(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> None:
    library = llama.library()
    load = library.llama_model_load_from_file
    loaded = []

    def recorded(*arguments: Any) -> Any:
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(library, "llama_model_load_from_file", recorded)
    asked[:] = 0, 2
    with pytest.raises(KeyboardInterrupt):
        llama.LlamaModel(files["f32"], n_ctx=64, threads=1)
    assert asked[0] == 2
    assert loaded == [None]
    llama.LlamaModel(files["f32"], n_ctx=64, threads=1).close()
    assert loaded[1] is not None


def test_an_interrupt_behind_the_start_of_a_call(
    files: dict[str, Path], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has the work, and the main thread no future of it."""
    with llama.LlamaModel(files["f32"], n_ctx=64, threads=1) as model:
        library = llama.library()
        decode, submit = library.llama_decode, ThreadPool.submit
        ended = []

        def late(*arguments: Any) -> Any:
            time.sleep(0.1)
            ended.append(decode(*arguments))
            return ended[-1]

        def interrupted(pool: ThreadPool, *arguments: Any) -> Any:
            submit(pool, *arguments)
            monkeypatch.setattr(ThreadPool, "submit", submit)
            raise KeyboardInterrupt

        monkeypatch.setattr(library, "llama_decode", late)
        monkeypatch.setattr(ThreadPool, "submit", interrupted)
        arguments = model.tokenize(text)[:64], list(range(64)), [0] * 64, [True] * 64
        with pytest.raises(KeyboardInterrupt):
            model.decode(*arguments)
        assert ended == [0]
        model.clear()
        assert model.decode(*arguments).shape == (64, model.n_vocab)


# --- the record of a base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [256, 3000])
def test_a_recorded_base_gives_the_same_figures(files: dict[str, Path], text: str, tmp_path: Path, n_ctx: int) -> None:
    windows = 9 if n_ctx == 256 else 1  # more than one batch of parallel windows, or several batches per window
    beside = evaluate.evaluate(
        files["q2_k"], text, base_path=files["q8_0"], n_ctx=n_ctx, max_windows=windows, threads=1
    )
    base = evaluate.record_base(files["q8_0"], text, tmp_path, n_ctx=n_ctx, max_windows=windows, threads=1)
    assert base.scored == beside.scored
    assert base.codes.nbytes == 2 * base.scored * base.codes.shape[2]
    assert not list(tmp_path.iterdir())  # the file has no name
    compared = evaluate.compare(files["q2_k"], base, threads=1)
    bound = base.kld_error(beside.kld_mean)
    assert bound < 0.003 * beside.kld_mean
    assert abs(compared.kld_mean - beside.kld_mean) <= bound
    assert abs(compared.kld_p99 - beside.kld_p99) <= base.kld_error(beside.kld_p99)
    rest = {"kld_mean", "kld_stderr", "kld_p99"}
    assert {k: v for k, v in compared.as_dict().items() if k not in rest} == {
        k: v for k, v in beside.as_dict().items() if k not in rest
    }
    with pytest.raises(EvalError, match="vocabulary differs"):
        evaluate.compare(_other_vocabulary(files["f16"], tmp_path), base)


def record(steps: float) -> base_record.BaseLogits:
    none = np.zeros((1, 1))
    return base_record.BaseLogits(
        "", "", [], 4, False, np.zeros((1, 1, 1), np.uint16), none + steps, none, none.astype(int)
    )


rows = arrays(np.float64, (3, 5), elements=st.floats(-60, 60) | st.just(-np.inf) | st.floats(-1e38, 1e38))


@settings(deadline=None)
@given(rows)
def test_codes_are_half_a_step_off_at_most(logits: np.ndarray) -> None:
    logits[:, 0] = np.where(np.isinf(logits).all(axis=1), 0, logits[:, 0])  # some token is possible
    logp = evaluate.log_softmax(logits)
    codes, steps = base_record.pack(logp)
    assert codes.dtype == np.uint16
    assert steps.max() <= max(1, base_record.DEPTH / 65533)
    back = base_record.unpack(codes, steps)
    depth, recorded = logp.max(axis=1, keepdims=True) - logp, -back
    near = depth <= base_record.DEPTH
    bound = np.broadcast_to(steps[:, None] / 2 * (1 + 1e-9), depth.shape)
    assert (np.abs(depth[near] - recorded[near]) <= bound[near]).all()
    assert (recorded[~near] > base_record.DEPTH).all()
    np.testing.assert_array_equal(np.isinf(recorded), np.exp(logp) == 0)
    np.testing.assert_array_equal(np.exp(evaluate.log_softmax(back)) > 0, np.exp(logp) > 0)


@settings(deadline=None)
@given(
    arrays(np.float64, (2, 6), elements=st.floats(-20, 20)),
    st.floats(1e-6, 0.5),
    arrays(np.float64, 6, elements=st.floats(-1, 1)),
)
def test_the_error_of_a_divergence_has_that_bound(logits: np.ndarray, d: float, errors: np.ndarray) -> None:
    """For errors of any kind and for the worst: those that have the sign of what they multiply in the derivative."""
    logp, logq = evaluate.log_softmax(logits)
    logp, logq = logp[None], logq[None]
    kld = evaluate.divergence(logp, logq)[0]
    worst = np.sign(logp - logq - kld)
    for error in (errors, worst, -worst):
        moved = evaluate.divergence(evaluate.log_softmax(logp + d * error), logq)[0]
        assert abs(moved - kld) <= record(2 * d).kld_error(max(kld, 0)) + 1e-12
        assert abs(moved - kld) <= record(2 * d).kld_error(max(moved, 0)) + 1e-12

"""``ccq-convert eval``: the numbers of llama-perplexity, from the bundled model and text.

The expected perplexities were printed by ``llama-perplexity`` of the pinned llama.cpp (its own build, one thread) for
the f16 file: ``-f examples/heldout.txt -c 256 --chunks 8`` and so on.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ccq_converters import evaluate, hf2gguf, llama
from ccq_converters.cli import main
from ccq_converters.dequantize import dequantize
from ccq_converters.plan import QuantOptions
from ccq_converters.quantize import quantize, sources_of
from ccq_converters.stream import write_model
from ccq_format.errors import EvalError, InputError
from ccq_format.gguf_io import open_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = EXAMPLES / "heldout.txt"

SAME = 2e-4
"""Relative difference allowed to llama-perplexity's figures: other instruction sets sum products in another order, and
the KV cache is f16 (2^-11 relative per stored value).  On the machine that printed the figures all digits agree."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model as f16, q8_0 and llama.cpp's own Q2_K (embedding and output q8_0)."""
    folder = tmp_path_factory.mktemp("models")
    out = {name: folder / f"{name}.gguf" for name in ("f16", "q8_0", "q2_k", "bos")}
    for name in ("f16", "q8_0"):
        hf2gguf.convert(EXAMPLES / "manllama-4m", out[name], QuantOptions(name))
    llama.stock_quantize(out["f16"], out["q2_k"], "q2_k")
    model = open_model(out["f16"])
    model.fields.pop("tokenizer.ggml.add_bos_token")
    write_model(
        out["bos"],
        arch=model.arch,
        copy_from=model,
        set_metadata=lambda writer: writer.add_add_bos_token(True),
        sources=sources_of(model),
        options=QuantOptions("f16"),
    )
    return out


@pytest.fixture(scope="module")
def text() -> str:
    # All evaluations here run on one thread: ggml's threads spin while they wait, which crawls on a busy machine.
    return evaluate.read_text(TEXT)


@pytest.mark.parametrize(
    ("name", "n_ctx", "windows", "ppl", "ppl_stderr"),
    [
        ("f16", 256, 8, 4.3151, 0.30195),
        ("bos", 256, 8, 4.3202, 0.30192),  # the first token of every window replaced by BOS
        ("f16", 100, 20, 7.2247, 0.59074),  # 20 windows share a batch of 2000
        ("f16", 3000, 2, 77.6975, 4.25153),  # a window takes two batches
    ],
)
def test_perplexity_is_that_of_llama_perplexity(
    files: dict[str, Path], text: str, name: str, n_ctx: int, windows: int, ppl: float, ppl_stderr: float
) -> None:
    result = evaluate.evaluate(files[name], text, n_ctx=n_ctx, max_windows=windows, threads=1)
    assert result.ppl == pytest.approx(ppl, rel=SAME)
    assert result.ppl_stderr == pytest.approx(ppl_stderr, rel=5 * SAME)
    assert (result.windows, result.scored) == (windows, windows * (n_ctx - 1 - n_ctx // 2))
    assert result.kld_mean is None


def logits_of_windows(path: Path, text: str, n_ctx: int, windows: int) -> tuple[list[int], list[np.ndarray]]:
    """Tokens, and float64 logits [n_ctx, vocabulary] of each window: one window at a time, on one thread."""
    with llama.LlamaModel(path, n_ctx=n_ctx, threads=1) as model:
        tokens = model.tokenize(text)[: windows * n_ctx]
        out = []
        for window in range(windows):
            model.clear()
            part = tokens[window * n_ctx : (window + 1) * n_ctx]
            rows = model.decode(part, list(range(n_ctx)), [0] * n_ctx, [True] * n_ctx)
            out.append(rows.astype(np.float64))
    return tokens, out


@pytest.mark.parametrize("name", ["q8_0", "q2_k"])
def test_divergence_by_definition(files: dict[str, Path], text: str, name: str) -> None:
    """Against sums written out here, over logits of windows that run alone.  No recorded figures: quantized types have
    other kernels on other CPUs, which differ by more than one would accept here."""
    n_ctx, windows = 128, 3
    tokens, base = logits_of_windows(files["f16"], text, n_ctx, windows)
    _, ours = logits_of_windows(files[name], text, n_ctx, windows)
    kld, same, nll = [], [], []
    for window in range(windows):
        for position in range(n_ctx // 2, n_ctx - 1):
            p, q = (np.exp(rows[window][position] - rows[window][position].max()) for rows in (base, ours))
            p, q = p / p.sum(), q / q.sum()
            kld.append(float((p * np.log(p / q)).sum()))
            same.append(p.argmax() == q.argmax())
            nll.append(-np.log(q[tokens[window * n_ctx + position + 1]]))
    result = evaluate.evaluate(files[name], text, base_path=files["f16"], n_ctx=n_ctx, max_windows=windows, threads=1)
    assert result.scored == len(kld)
    assert result.ppl == pytest.approx(np.exp(np.mean(nll)), rel=SAME)
    assert result.kld_mean == pytest.approx(np.mean(kld), rel=0.01, abs=1e-7)
    assert result.kld_p99 == pytest.approx(np.quantile(kld, 0.99), rel=0.01, abs=1e-6)
    assert result.top1 == pytest.approx(np.mean(same), abs=1.5 / len(same))  # one near-tie
    assert (result.kld_mean < 0.001) == (name == "q8_0")


def test_a_model_does_not_diverge_from_itself(files: dict[str, Path], text: str) -> None:
    result = evaluate.evaluate(files["q2_k"], text, base_path=files["q2_k"], max_windows=2, threads=1)
    assert (result.kld_mean, result.kld_p99, result.top1) == (0.0, 0.0, 1.0)
    assert result.ppl == result.ppl_base
    assert result.ppl_stderr == result.ppl_base_stderr


def test_log_probabilities_by_definition(files: dict[str, Path], text: str) -> None:
    """One window alone, one token at a time, with plain float64 arithmetic: no batching, no parallel sequences."""
    n_ctx = 64
    with llama.LlamaModel(files["q8_0"], n_ctx=n_ctx, threads=1, exact=True) as model:
        tokens = model.tokenize(text)[: 2 * n_ctx]
        nll = []
        for window in range(2):
            model.clear()
            part = tokens[window * n_ctx : (window + 1) * n_ctx]
            for position in range(n_ctx - 1):
                logits = model.decode([part[position]], [position], [0], [True])[0].astype(np.float64)
                if position >= n_ctx // 2:
                    nll.append(np.log(np.exp(logits).sum()) - logits[part[position + 1]])
    result = evaluate.evaluate(files["q8_0"], text, n_ctx=n_ctx, max_windows=2, threads=1, exact=True)
    assert result.scored == len(nll) == 62
    # One token and a batch of 128 take different kernels for q8_0, both with int8 activations.
    assert result.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-3)
    assert result.ppl_stderr == pytest.approx(result.ppl * np.std(nll) / np.sqrt(len(nll) - 1), rel=5e-3)


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
        tmp_path / "odd.gguf",
        arch=model.arch,
        copy_from=model,
        sources=[s for s in sources_of(model) if s.name != "blk.1.ffn_up.weight"],
        options=QuantOptions("f16"),
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
    write_model(out, arch=model.arch, copy_from=model, sources=sources_of(model), options=QuantOptions("f16"))
    return out


@pytest.mark.parametrize("n_ctx", [256, 3000])
def test_a_recorded_base_gives_the_same_figures(files: dict[str, Path], text: str, tmp_path: Path, n_ctx: int) -> None:
    windows = 9 if n_ctx == 256 else 2  # more than one batch of parallel windows, or several batches per window
    beside = evaluate.evaluate(
        files["q2_k"], text, base_path=files["q8_0"], n_ctx=n_ctx, max_windows=windows, threads=1
    )
    base = evaluate.record_base(files["q8_0"], text, tmp_path, n_ctx=n_ctx, max_windows=windows, threads=1)
    assert base.scored == beside.scored
    assert evaluate.compare(files["q2_k"], base, threads=1) == beside
    assert not list(tmp_path.iterdir())  # the file has no name
    with pytest.raises(EvalError, match="vocabulary differs"):
        evaluate.compare(_other_vocabulary(files["f16"], tmp_path), base)

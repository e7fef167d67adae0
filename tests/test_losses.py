"""Losses measured with noise in llama.cpp: the noise is that of a file with these errors, and what is made of it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ccq_converters import imatrix, losses
from ccq_converters.calibration import CalibrationOptions
from ccq_converters.cli import main
from ccq_converters.collect import GraphRun, calibrate_gguf
from ccq_converters.evaluate import log_softmax
from ccq_converters.hf2gguf import convert
from ccq_converters.imatrix import Importance
from ccq_converters.llama import load_plugin_for, stock_quantize
from ccq_converters.losses import measure_losses
from ccq_converters.options import QuantOptions
from ccq_converters.quantize import quantize
from ccq_format.errors import ImportanceError
from ccq_format.gguf_io import ModelWriter, TensorInfo, open_model

from .test_collect import EXAMPLE, HELDOUT, MODELS, WIDE_MOE
from .upstream_diff.models import build

TEXT = HELDOUT.read_text()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, and random ones with an output matrix of their own and with experts."""
    folder = tmp_path_factory.mktemp("models")
    files = {name: folder / f"{name}.gguf" for name in ("bundled", "llama", "experts")}
    for name, case in (("llama", MODELS[0]), ("experts", WIDE_MOE)):
        build(case, folder / name)
        convert(folder / name, files[name], QuantOptions("f32"), progress=False)
    convert(EXAMPLE, files["bundled"], QuantOptions("f32"), progress=False)
    return files


@pytest.fixture(scope="module")
def importance(models: dict[str, Path]) -> dict[str, Importance]:
    options = CalibrationOptions(ctx=64, chunks=8, threads=1, process_output=True)
    return {name: calibrate_gguf(path, TEXT, options) for name, path in models.items()}


def opened(path: Path) -> GraphRun:
    return GraphRun(path, TEXT, CalibrationOptions(ctx=losses.WINDOW, threads=1, exact=True))


def write_with(path: Path, out: Path, name: str, error: np.ndarray) -> None:
    """The model with ``error`` added to one tensor."""
    model = open_model(path)
    with ModelWriter(out, model.arch) as writer:
        writer.copy_metadata(model)
        for tensor in model.tensors:
            writer.add_tensor(tensor.name, "f32", tensor.shape)
        writer.begin()
        for tensor in model.tensors:
            data = tensor.data()
            writer.write(tensor.name, data + error.reshape(data.shape) if tensor.name == name else data)


def errors(noise: losses._Noise, info: TensorInfo) -> np.ndarray:
    """E for a relative error of 1, ``[matrices, rows, width]``."""
    if info.name == "token_embd.weight":
        return noise._rows(np.arange(info.n_rows))[None]
    e = noise._product(np.eye(info.columns, dtype=np.float32)).T[None]
    return e if noise.matrices == 1 else e * noise.signs[:, :, None]


NAMES = {
    "bundled": ("blk.0.attn_k.weight", "blk.2.ffn_down.weight"),
    "llama": ("token_embd.weight", "blk.1.attn_v.weight", "output.weight"),
    "experts": ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"),
}


@pytest.mark.parametrize(("model", "name"), [(model, name) for model, names in NAMES.items() for name in names])
def test_noise_is_that_of_a_file_with_these_errors(
    models: dict[str, Path], importance: dict[str, Importance], tmp_path: Path, model: str, name: str
) -> None:
    info = open_model(models[model]).tensor(name)
    amount = 0.04 if model == "bundled" else 1.0  # random weights hardly predict anything
    with opened(models[model]) as run:
        probe, noise = losses._Probe(run), losses._Noise(run, info, importance[model])
        assert name in probe.names()
        probe.without()
        got = probe._divergence(noise, amount)
        e, clean = errors(noise, info), np.concatenate(probe.clean)
    weights = importance[model].input_weights(name, noise.matrices, info.columns)
    columns = np.ones(info.columns) if weights is None else weights[:, None, :]
    original = info.data().astype(np.float64).reshape(e.shape)
    relative = (np.square(e, dtype=np.float64) * columns).sum() / (np.square(original) * columns).sum()
    assert relative == pytest.approx(1, rel=0.1)
    write_with(models[model], tmp_path / "noisy.gguf", name, amount**0.5 * e)
    with opened(tmp_path / "noisy.gguf") as run:
        run.model.watch = lambda _address, _ask: False
        logp = log_softmax(run.decode(probe.windows, first=losses.WINDOW // 2))
    expected = float((np.exp(clean) * (clean - logp)).sum(axis=1).mean())
    assert expected > 1e-5
    assert got == pytest.approx(expected, rel=0.01)


def test_one_matrix_is_looked_up_and_multiplied(models: dict[str, Path], importance: dict[str, Importance]) -> None:
    """Of a tied embedding noise comes at both places."""
    info = open_model(models["bundled"]).tensor("token_embd.weight")
    with opened(models["bundled"]) as run:
        probe, noise = losses._Probe(run), losses._Noise(run, info, importance["bundled"])
        probe.without()
        both = probe._divergence(noise, 0.01)
        original, parts = losses._name, []
        for place in (run.ggml.get_rows, run.ggml.mul_mat):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(losses, "_name", lambda g, node, op=place: original(g, node) if node.op == op else None)
                parts.append(probe._divergence(noise, 0.01))
    assert min(parts) > 0.1 * both
    assert both == pytest.approx(sum(parts), rel=0.2)


def test_much_noise_is_measured_with_less(models: dict[str, Path], importance: dict[str, Importance]) -> None:
    info = open_model(models["bundled"]).tensor("blk.0.ffn_down.weight")
    with opened(models["bundled"]) as run:
        probe, noise = losses._Probe(run), losses._Noise(run, info, importance["bundled"])
        probe.without()
        expected = probe.loss(noise)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "NOISE", 10.0)
            assert probe._divergence(noise, 10.0) > losses._LARGE
            assert probe.loss(noise) == pytest.approx(expected, rel=0.25)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "_LOGITS", 100 * run.model.n_vocab)
            fewer = losses._Probe(run)
            fewer.without()
            assert sum(map(len, fewer.clean)) <= 100
            assert fewer.loss(noise) == pytest.approx(expected, rel=0.5)


# --- files -----------------------------------------------------------------------------------------------------------


def run(*args: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_losses_in_a_file(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    args = ("calibrate", models["bundled"], "--text", HELDOUT, "-o", out, "--chunks", 4, "--losses", "--threads", 1)
    run(*args)
    found = imatrix.load(out)
    matrices = [t.name for t in open_model(models["bundled"]).tensors if len(t.shape) == 2]
    assert sorted(found.losses) == sorted(matrices)
    assert all(0 < loss < 100 for loss in found.losses.values())
    # A file loses what is expected of it, to half of that or twice.
    file = tmp_path / "t3.gguf"
    args = ("quantize", models["bundled"], "--type", "ccq_t3", "--imatrix", out, "--effort", "fast", "--threads", 1)
    line = run(*args, "--dry-run")
    run(*args, "-o", file)
    expected = float(line.splitlines()[-2].split("expected loss ")[1].split()[0])
    load_plugin_for(file)
    with opened(models["bundled"]) as base, opened(file) as other:
        base.model.watch = other.model.watch = lambda _address, _ask: False
        windows = base.windows[50:54]
        clean, logp = (log_softmax(model.decode(windows)) for model in (base, other))
    divergence = float((np.exp(clean) * (clean - logp)).sum(axis=1).mean())
    assert expected / 2 < divergence < expected * 2


def test_of_deep_models_some_layers_are_measured() -> None:
    names = ["token_embd.weight", *(f"blk.{i}.{kind}.weight" for i in range(80) for kind in "abcdefg"), "output.weight"]
    assert losses._spread(names, 1000) == names
    found = losses._spread(names, 128)
    assert 100 < len(found) <= 128
    layers = sorted({int(name.split(".")[1]) for name in found if name.startswith("blk")})
    assert (layers[0], layers[1], layers[-1]) == (0, 1, 79)
    assert max(np.diff(layers)) <= 6
    assert {"token_embd.weight", "output.weight"} <= set(found)
    assert len(losses._spread(names, 1)) == 2 + 3 * 7  # at least


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_losses_that_are_none(tmp_path: Path, value: float) -> None:
    path = tmp_path / "i.gguf"
    with ModelWriter(path, "") as writer:
        entry = imatrix.Entry(np.ones(4, np.float32), np.ones(1))
        imatrix.fill(writer, Importance("", {"w": entry}, losses={"w": value}))
    with pytest.raises(ImportanceError, match=r"tensor 'w\.loss'"):
        imatrix.load(path)


def test_rows_that_keep_their_bytes_lose_nothing(
    models: dict[str, Path], importance: dict[str, Importance], tmp_path: Path
) -> None:
    """They may be of a type that only llama.cpp encodes."""
    stock_quantize(models["bundled"], tmp_path / "in.gguf", "q4_k")
    names = [t.name for t in open_model(models["bundled"]).tensors if len(t.shape) == 2]
    data = replace(importance["bundled"], losses=dict.fromkeys(names, 0.1))
    options = QuantOptions("q5_0", imatrix=data, dry_run=True)
    plan = quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", options, allow_requantize=True, progress=False)
    found = {t.source.name: (t.type, t.loss) for t in plan.tensors}
    assert found["blk.0.attn_q.weight"] == ("q4_k", 0.0)
    assert plan.loss_unit is not None


def test_an_interrupt_leaves_no_hessians(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are complete before losses are measured, and appear together with these."""

    def interrupted(*_: object, **__: object) -> Importance:
        raise KeyboardInterrupt

    monkeypatch.setattr(losses, "measure_losses", interrupted)
    hessians = tmp_path / "h.safetensors"
    hessians.write_bytes(b"before")
    args = ["calibrate", models["bundled"], "--text", HELDOUT, "-o", tmp_path / "i.gguf", "--hessian", hessians]
    args += ["--chunks", 1, "--ctx", 64, "--losses", "--overwrite", "--threads", 1]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["h.safetensors"]
    assert hessians.read_bytes() == b"before"


def test_a_folder_has_gradients_instead(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["calibrate", str(EXAMPLE), "-o", str(tmp_path / "i.gguf"), "--losses"])
    assert result.exit_code == 1
    assert "--gradients" in result.stderr


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ctrl-C while llama.cpp computes the second tensor's noise."""
    seen: list[str] = []
    original = losses._Noise._product

    def product(self: losses._Noise, x: np.ndarray) -> np.ndarray:
        seen.append(self.name)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # this is llama.cpp's thread; the main one hears of it meanwhile
        return original(self, x)

    monkeypatch.setattr(losses._Noise, "_product", product)
    return seen


def test_an_interrupt(models: dict[str, Path], importance: dict[str, Importance], interrupting: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure_losses(models["bundled"], TEXT, importance["bundled"], threads=1)
    assert len(interrupting) == 2

"""``ccq-convert calibrate`` against a plain forward pass of transformers, and against llama.cpp's llama-imatrix."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ccq_converters import automatic, backward, forward, imatrix
from ccq_converters import calibrate as module
from ccq_converters.arch import family_of
from ccq_converters.calibrate import calibrate, load_windows
from ccq_converters.calibration import CalibrationOptions
from ccq_converters.cli import main
from ccq_converters.collect import calibrate_file
from ccq_converters.hessian import Hessians
from ccq_converters.hf2gguf import convert
from ccq_converters.options import QuantOptions
from ccq_format.errors import EvalError, ImportanceError, ModelError, OutputError
from ccq_format.gguf_io import open_model
from support.commands import unnamed

from .upstream_diff.models import CASES, EXAMPLE, MOE, QWEN_MOE, Case, build, save_bpe

HELDOUT = EXAMPLE.parent / "heldout.txt"
CTX, CHUNKS = 32, 5

MODELS = [
    Case("llama", "llama", {"attention_bias": True, "head_dim": 32}),
    next(case for case in CASES if case.name == "llama3-tied-bf16"),
    Case("qwen3-yarn", "qwen3", {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}}),
    Case("mixtral", "mixtral", {**MOE}, torch.bfloat16),
    Case("qwen3-moe-fused", "qwen3_moe", {**QWEN_MOE, "num_experts": 16, "num_local_experts": 16}, fused=True),
    Case("qwen3-moe-sharded", "qwen3_moe", {**QWEN_MOE}, torch.bfloat16, shards=True),
]  # fmt: skip

NAMES = {
    "self_attn.q_proj": ("attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
    "mlp.gate": ("ffn_gate_inp",),
}
LINEARS = {"self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up"}
LINEARS.update({module: names[0] for module, names in NAMES.items()})


def plain_forward(folder: Path, windows: np.ndarray) -> dict[str, list[np.ndarray]]:
    """The inputs of every matrix in float64, ``[tokens, channels]`` per matrix, by one forward of the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", local_files_only=True
    )
    seen: dict[str, list[np.ndarray]] = {}

    def keep(names: tuple[str, ...], x: torch.Tensor) -> None:
        for name in names:
            seen.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).double().numpy())

    def expert_inputs(layer: int, experts: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, index, _ = args
        width = experts.down_proj.shape[-1]
        for expert in range(len(experts.down_proj)):
            mine = x[(index == expert).any(dim=1)]
            both = mine @ experts.gate_up_proj[expert].T
            keep((f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_up_exps.weight"), mine)
            inner = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
            keep((f"blk.{layer}.ffn_down_exps.weight",), inner)

    for number, layer in enumerate(model.model.layers):
        for name, ours in NAMES.items():
            try:
                part = layer.get_submodule(name)
            except AttributeError:
                continue
            full = tuple(f"blk.{number}.{name}.weight" for name in ours)
            part.register_forward_pre_hook(lambda _m, args, full=full: keep(full, args[0]))
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(lambda m, args, n=number: expert_inputs(n, m, args))
    output = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
    model.lm_head.register_forward_pre_hook(lambda _m, args: keep((output,), args[0]))
    with torch.no_grad():
        model(torch.from_numpy(windows))
    return seen


def plain_gradients(folder: Path, windows: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """By autograd through the whole model at once: sums of the squares of all outputs' gradients ``[matrices, rows]``,
    rows as in transformers, and the gradients of the hidden states that enter each layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", local_files_only=True
    )
    outputs: dict[str, dict[int, torch.Tensor]] = {}
    entering: list[torch.Tensor] = []

    def keep(name: str, y: torch.Tensor, matrix: int = 0) -> torch.Tensor:
        y.retain_grad()
        outputs.setdefault(name, {})[matrix] = y
        return y

    def experts(layer: int, module: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, shares: torch.Tensor):
        out = torch.zeros_like(x)
        for expert, (both, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            tokens, slot = torch.where(index == expert)
            if len(tokens) == 0:
                continue
            w_gate, w_up = both.chunk(2)
            gate = keep(f"blk.{layer}.ffn_gate_exps.weight", x[tokens] @ w_gate.T, expert)
            up = keep(f"blk.{layer}.ffn_up_exps.weight", x[tokens] @ w_up.T, expert)
            y = keep(f"blk.{layer}.ffn_down_exps.weight", (torch.nn.functional.silu(gate) * up) @ down.T, expert)
            out = out.index_add(0, tokens, y * shares[tokens, slot, None])
        return out

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _m, args: (args[0].retain_grad(), entering.append(args[0]), None)[-1])
        for name, ours in LINEARS.items():
            try:
                part = layer.get_submodule(name)
            except AttributeError:
                continue
            full = f"blk.{number}.{ours}.weight"
            part.register_forward_hook(
                lambda _m, _a, y, full=full: (keep(full, y[0] if isinstance(y, tuple) else y), None)[-1]
            )
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.forward = functools.partial(experts, number, layer.mlp.experts)
    logits = model(torch.from_numpy(windows)).logits.reshape(windows.size, -1)
    p = logits.detach().softmax(-1)
    labels = backward.draw(p, torch.from_numpy(np.random.default_rng(backward._SEED).random(windows.size)))
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    sums = {}
    for name, by_matrix in outputs.items():
        moe = "_exps" in name
        matrices = len(model.model.layers[0].mlp.experts.down_proj) if moe else 1
        rows = by_matrix[min(by_matrix)].shape[-1]
        sums[name] = np.zeros((matrices, rows))
        for matrix, y in by_matrix.items():
            sums[name][matrix] = y.grad.reshape(-1, rows).double().square().sum(0)
    p = p.double()  # over all labels instead of the one that was drawn: other labels, and the output's own
    output = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
    sums[output] = ((1 - p) * p**2 + p * (p - 1) ** 2).sum(0)[None].numpy()
    return sums, [x.grad.numpy() for x in entering]


def rows_in_gguf(folder: Path, path: Path) -> dict[str, np.ndarray]:
    """For each query and key matrix, where its rows in the converted model come from."""
    convert(folder, path, QuantOptions("f32"), progress=False)
    converted = open_model(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    out = {}
    for number, layer in enumerate(model.model.layers):
        for name, part in (("attn_q", layer.self_attn.q_proj), ("attn_k", layer.self_attn.k_proj)):
            rows = {row.tobytes(): at for at, row in enumerate(part.weight.detach().numpy())}
            name = f"blk.{number}.{name}.weight"
            out[name] = np.array([rows[row.tobytes()] for row in converted.tensor(name).dequantize()])
    return out


@pytest.mark.parametrize(
    ("case", "in_file"),
    [*((case, False) for case in MODELS), (MODELS[0], True), (MODELS[3], True)],
    ids=lambda value: value.name if isinstance(value, Case) else ("file" if value else "memory"),
)
def test_gradients_are_those_of_the_whole_model(
    case: Case, in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several batches, the last one smaller; hidden states in memory or in a file; and those between layers."""
    folder = small(case, tmp_path / "model")
    monkeypatch.setattr(forward, "BATCH", 2 * CTX)
    monkeypatch.setattr(backward, "_LOGITS", 50_000)
    if in_file:
        monkeypatch.setattr(forward, "IN_MEMORY", 0)
    entering: list[np.ndarray] = []
    original = backward.BackwardPass._layer

    def watched(self: backward.BackwardPass, index: int, advance: object) -> None:
        original(self, index, advance)  # type: ignore[arg-type]
        entering.insert(0, self.forward.hidden.numpy().copy())

    monkeypatch.setattr(backward.BackwardPass, "_layer", watched)
    out = tmp_path / "i.gguf"
    options = CalibrationOptions(ctx=CTX, chunks=CHUNKS, threads=1, process_output=True, gradients=True)
    calibrate(folder, HELDOUT, out, options, progress=False)
    windows = load_windows(folder, family_of(folder), HELDOUT, CTX, CHUNKS)
    expected, expected_entering = plain_gradients(folder, windows)
    order = rows_in_gguf(folder, tmp_path / "model.gguf")
    permuted = case.family in ("llama", "mixtral")
    got = imatrix.load(out)
    assert set(got.entries) == set(expected)
    for ours, theirs in zip(entering, expected_entering, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    for name, sums in expected.items():
        if name in order:
            assert (order[name] != np.arange(sums.shape[1])).any() == permuted
            sums = sums[:, order[name]]
        result = got.output_gradients(name, *sums.shape)
        assert result is not None
        np.testing.assert_allclose(result, sums / windows.size, rtol=1e-4, atol=1e-6 * sums.max() / windows.size)


@pytest.mark.parametrize(
    ("case", "chunks", "within"), [(None, 8, 0.2), (MODELS[3], 16, 0.15)], ids=["bundled", "mixtral"]
)
def test_gradients_predict_the_divergence(case: Case | None, chunks: int, within: float, tmp_path: Path) -> None:
    """Noise on one matrix at a time changes the predictions as ``1/2 sum G H E^2`` says, in nats per token.

    Of the mixture the last layer's: what comes before a router can make it choose other experts; no gradient sees that.
    """
    folder = EXAMPLE if case is None else small(case, tmp_path / "model")
    ctx = 128
    options = CalibrationOptions(ctx=ctx, chunks=chunks, threads=1, process_output=True, gradients=True)
    importance = calibrate(folder, HELDOUT, tmp_path / "i.gguf", options, progress=False)
    windows = torch.from_numpy(load_windows(folder, family_of(folder), HELDOUT, ctx, chunks))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    layers = model.model.layers
    if case is None:
        parts = {
            "blk.1.attn_q.weight": layers[1].self_attn.q_proj.weight,
            "blk.0.attn_output.weight": layers[0].self_attn.o_proj.weight,
            "blk.1.ffn_up.weight": layers[1].mlp.up_proj.weight,
            "blk.3.ffn_down.weight": layers[3].mlp.down_proj.weight,
        }
    else:
        parts = {
            "blk.1.ffn_gate_exps.weight": layers[1].mlp.experts.gate_up_proj[:, :96],
            "blk.1.ffn_down_exps.weight": layers[1].mlp.experts.down_proj,
            "blk.1.ffn_up_exps.weight": layers[1].mlp.experts.gate_up_proj[:, 96:],
            "output.weight": model.lm_head.weight,
        }

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return model(windows).logits.double().log_softmax(-1)

    base = log_probabilities()
    for name, weight in parts.items():
        shape = weight.shape if weight.dim() == 3 else (1, *weight.shape)
        gradients = importance.output_gradients(name, *shape[:2])
        inputs = importance.input_power(name, shape[0], shape[2])
        assert gradients is not None
        assert inputs is not None
        torch.manual_seed(3)
        with torch.no_grad():
            noise = torch.randn(weight.shape) * weight.std() * (0.05 if case is None else 0.01)
            error = noise.square().reshape(shape).numpy()  # as likely in any order of the rows
            weight += noise
            measured = float((base.exp() * (base - log_probabilities())).sum(-1).mean())
            weight -= noise
        predicted = 0.5 * float(np.einsum("mi,mj,mij->", gradients, inputs, error))
        assert abs(measured / predicted - 1) < within, name


def test_labels_are_drawn_with_their_probabilities() -> None:
    p = torch.tensor([0.0, 0.1, 0.0, 0.25, 0.65, 0.0])
    n = 20_000
    uniform = torch.linspace(0, 1, n + 1, dtype=torch.float64)[:-1]
    labels = backward.draw(p.expand(n, -1), uniform)
    np.testing.assert_allclose(torch.bincount(labels, minlength=6) / n, p, atol=1e-4)
    last = backward.draw(p[None], torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert last.tolist() == [4]


def small(case: Case, folder: Path) -> Path:
    build(case, folder)
    return folder


@pytest.mark.parametrize(
    ("case", "in_file"),
    [*((case, False) for case in MODELS), (MODELS[0], True), (MODELS[3], True)],
    ids=lambda value: value.name if isinstance(value, Case) else ("file" if value else "memory"),
)
def test_sums_and_products_are_those_of_a_full_forward(
    case: Case, in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several batches, the last one smaller; hidden states in memory or in a file."""
    folder = small(case, tmp_path / "model")
    monkeypatch.setattr(forward, "BATCH", 2 * CTX)
    if in_file:
        monkeypatch.setattr(forward, "IN_MEMORY", 0)
    out, products = tmp_path / "i.gguf", tmp_path / "h.safetensors"
    options = CalibrationOptions(ctx=CTX, chunks=CHUNKS, threads=1, process_output=True)
    calibrate(folder, HELDOUT, out, options, hessian=products, progress=False)
    windows = load_windows(folder, family_of(folder), HELDOUT, CTX, CHUNKS)
    assert windows.shape == (CHUNKS, CTX)
    expected = plain_forward(folder, windows)
    got, hessians = imatrix.load(out), Hessians(products)
    assert set(got.entries) == set(expected)
    assert (got.chunk_count, got.chunk_size, got.datasets) == (CHUNKS, CTX, [str(HELDOUT)])
    for name, inputs in expected.items():
        entry = got.entries[name]
        assert entry.counts.tolist() == [len(x) for x in inputs]
        sums = np.stack([np.square(x).sum(axis=0) for x in inputs])
        np.testing.assert_allclose(entry.sums.reshape(sums.shape), sums, rtol=1e-4, atol=1e-6 * sums.max())
        if "ffn_gate_inp" in name:
            assert name not in hessians
            continue
        for matrix, x in enumerate(inputs):
            product, count = hessians.product(name, len(inputs), x.shape[1], matrix)
            assert count == len(x)
            exact = x.T @ x
            np.testing.assert_allclose(product, exact, rtol=0, atol=1e-4 * max(1.0, np.abs(exact).max()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.safetensors", "i.gguf", "model"]


def test_an_unhit_expert_is_counted(tmp_path: Path) -> None:
    """The router sees one channel; whatever its sign, two of six experts are never among the best two."""
    config = {**QWEN_MOE, "num_experts": 6, "num_local_experts": 6}
    folder = small(Case("moe", "qwen3_moe", config), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.layers.1.post_attention_layernorm.weight"]
    norm[:] = 0.0
    norm[0] = 1.0
    router = tensors["model.layers.1.mlp.gate.weight"]
    router[:] = 0.0
    router[:, 0] = [5.0, 4.0, 0.5, -0.5, -4.0, -5.0]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run(folder, HELDOUT, tmp_path / "i.gguf", "--chunks", 2, "--gradients")
    assert result.exit_code == 0, result.output
    importance = imatrix.load(tmp_path / "i.gguf")
    for name in ("gate", "up", "down"):
        entry = importance.entries[f"blk.1.ffn_{name}_exps.weight"]
        high, low = entry.counts[0], entry.counts[5]
        assert entry.counts.tolist() == [high, high, 0, 0, low, low]
        assert high + low == 2 * CTX
        got = importance.for_tensor(f"blk.1.ffn_{name}_exps.weight", 6, entry.sums.size // 6)
        assert got is not None
        assert got.min() > 0
        gradients = importance.output_gradients(f"blk.1.ffn_{name}_exps.weight", 6, 64 if name == "down" else 32)
        inputs = importance.input_power(f"blk.1.ffn_{name}_exps.weight", 6, entry.sums.size // 6)
        assert gradients is not None
        assert inputs is not None
        assert (
            (gradients.max(axis=1) > 0).tolist() == (inputs.max(axis=1) > 0).tolist() == [n > 0 for n in entry.counts]
        )
    assert "never hit 6 and hit" in result.stderr


def run(folder: Path, text: Path, out: Path, *more: object) -> Result:
    arguments = ["calibrate", folder, "--text", text, "-o", out, "--ctx", CTX, "--threads", 1, *more]
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_file_fits_the_converted_model(tmp_path: Path) -> None:
    """Names and shapes are those of hf2gguf for a dense model and a mixture of experts: no warning but of experts."""
    for case in (MODELS[0], MODELS[3]):
        folder = tmp_path / case.name
        build(case, folder)
        out = tmp_path / f"{case.name}.gguf"
        importance = calibrate(folder, HELDOUT, out, CalibrationOptions(ctx=CTX, chunks=2), progress=False)
        plan = convert(folder, Path(), QuantOptions("f16", dry_run=True))
        shapes = {t.source.name: t.source for t in plan.tensors}
        for name in importance.entries:
            importance.check(name, shapes[name].matrices, shapes[name].row_len)
        matrices = {n for n, s in shapes.items() if n.startswith("blk.") and len(s.shape) > 1}
        assert set(importance.entries) == matrices


def test_hessians_are_shared_and_checked(tmp_path: Path) -> None:
    folder = small(MODELS[0], tmp_path / "model")
    path = tmp_path / "h.safetensors"
    result = run(folder, HELDOUT, tmp_path / "i.gguf", "--chunks", 2, "--hessian", path)
    assert result.exit_code == 0, result.output
    with safe_open(path, "numpy") as file:  # by the package itself: names, shapes and sharing as documented
        shared = json.loads(file.metadata()["ccq.shared"])
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    assert shared == {
        f"blk.{n}.{name}.weight": f"blk.{n}.{stored}.weight"
        for n in range(2)
        for name, stored in (("attn_k", "attn_q"), ("attn_v", "attn_q"), ("ffn_up", "ffn_gate"))
    }
    assert shapes["blk.1.ffn_down.weight"] == [96, 96]
    assert shapes["blk.1.ffn_down.weight.counts"] == [1]
    hessians = Hessians(path)
    np.testing.assert_array_equal(
        hessians.product("blk.0.attn_k.weight", 1, 64)[0], hessians.product("blk.0.attn_q.weight", 1, 64)[0]
    )
    assert "blk.7.attn_q.weight" not in hessians
    for name, matrices, width, reason in (
        ("blk.7.attn_q.weight", 1, 64, "has no Hessian"),
        ("blk.0.attn_q.weight", 1, 128, r"has the shape \[64, 64\], not \[128, 128\]"),
        ("blk.0.attn_q.weight", 4, 64, r"not \[4, 64, 64\]"),
    ):
        with pytest.raises(ImportanceError, match=reason):
            hessians.product(name, matrices, width)
    tensors = load_file(path)
    tensors["blk.0.attn_q.weight"][3, 3] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors", metadata={"ccq.hessian": "1"})
    with pytest.raises(ImportanceError, match="NaN"):
        Hessians(tmp_path / "nan.safetensors").product("blk.0.attn_q.weight", 1, 64)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-5])
    for other, reason in ((folder / "model.safetensors", "no Hessian file"), (tmp_path / "cut.safetensors", "intact")):
        with pytest.raises(ImportanceError, match=reason):
            Hessians(other)


# --- text -----------------------------------------------------------------------------------------------------------


def test_windows_start_with_bos_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    folder = small(Case("llama", "llama"), tmp_path / "model")
    family = family_of(folder)
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z\n" * 20)
    without = load_windows(folder, family, text, 16, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["add_bos_token"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    bos = load_windows(folder, family, text, 16, None)
    assert (bos[:, 0] == 1).all()
    assert (without[:, 0] != 1).any()
    np.testing.assert_array_equal(bos[0, 1:], without[0, :-1])  # one token later
    assert load_windows(folder, family, text, 16, 3).shape == (3, 16)


def test_byte_level_tokenizers(tmp_path: Path) -> None:
    folder = small(Case("llama", "llama", {"bos_token_id": 1}), tmp_path / "model")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()
    save_bpe(folder, "llama3")
    windows = load_windows(folder, family_of(folder), HELDOUT, CTX, 4)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = tokenizer(HELDOUT.read_text().removesuffix("\n"))["input_ids"][: 4 * CTX]
    expected = np.array(ids).reshape(4, CTX)
    assert expected[0, 0] == 1
    expected[:, 0] = 1
    np.testing.assert_array_equal(windows, expected)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(MODELS[3], tmp_path / "model")
    monkeypatch.setattr(forward, "IN_MEMORY", 0)
    original, seen = forward.ForwardPass._layer, []

    def interrupted(self: forward.ForwardPass, index: int, advance: object) -> None:
        original(self, index, advance)  # type: ignore[arg-type]
        seen.append(unnamed(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(forward.ForwardPass, "_layer", interrupted)
    result = run(folder, HELDOUT, tmp_path / "i.gguf", "--hessian", tmp_path / "h.safetensors")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["Interrupted; no file was written."]
    assert seen == [2]  # the Hessians and the hidden states
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_existing_files_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(MODELS[0], tmp_path / "model")
    out, products = tmp_path / "i.gguf", tmp_path / "h.safetensors"
    monkeypatch.setattr(module, "load_windows", lambda *_: pytest.fail("work has begun"))
    for existing in (out, products):
        existing.write_bytes(b"mine")
        with pytest.raises(OutputError, match="exists already"):
            calibrate(folder, HELDOUT, out, hessian=products)
        assert existing.read_bytes() == b"mine"
        existing.unlink()
    with pytest.raises(OutputError, match="folder does not exist"):
        calibrate(folder, HELDOUT, tmp_path / "nowhere" / "i.gguf")
    with pytest.raises(ImportanceError, match="both"):
        calibrate(folder, HELDOUT, out, hessian=out)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_overwrite(tmp_path: Path) -> None:
    folder = small(MODELS[0], tmp_path / "model")
    (tmp_path / "i.gguf").write_bytes(b"old")
    result = run(folder, HELDOUT, tmp_path / "i.gguf", "--chunks", 2, "--overwrite")
    assert result.exit_code == 0, result.output
    assert imatrix.load(tmp_path / "i.gguf").chunk_count == 2


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run(EXAMPLE, HELDOUT, tmp_path / "i.gguf")
    assert result.exit_code == 1
    assert "needs torch and transformers (pip install 'ccq[calibrate]')" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["olmo2", "mistral3"])
def test_other_families_run_in_llama_cpp(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of the GGUF file, and nothing else is left; torch is not needed."""
    folder, results = tmp_path / "model", tmp_path / "results"
    results.mkdir()
    build(Case("m", family, {"sliding_window": None}, torch.bfloat16), folder)
    convert(folder, tmp_path / "model.gguf", QuantOptions("bf16"), progress=False)
    options = CalibrationOptions(CTX, CHUNKS, threads=1, losses=True)
    expected = calibrate_file(tmp_path / "model.gguf", HELDOUT, tmp_path / "expected.gguf", options, progress=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    out, products = results / "i.gguf", results / "h.safetensors"
    got = calibrate(folder, HELDOUT, out, options, hessian=products, progress=False)
    assert sorted(path.name for path in results.iterdir()) == ["h.safetensors", "i.gguf"]
    assert got.entries.keys() == expected.entries.keys()
    for name, entry in got.entries.items():
        np.testing.assert_array_equal(entry.sums, expected.entries[name].sums)
    assert got.losses == expected.losses
    assert "blk.0.attn_q.weight" in Hessians(products)
    with pytest.raises(OutputError, match="exists"):
        calibrate(folder, HELDOUT, out, options, progress=False)
    with pytest.raises(ModelError, match=r"gradients need torch.*--losses"):
        calibrate(folder, HELDOUT, results / "g.gguf", CalibrationOptions(CTX, gradients=True), progress=False)


def test_folders_too_large_for_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(Case("m", "olmo2", {"num_hidden_layers": 1}), tmp_path / "model")
    monkeypatch.setattr(automatic, "free_memory", lambda: 1 << 20)
    with pytest.raises(EvalError, match=r"1\.00 MiB are free: make a q8_0 file of it"):
        calibrate(tmp_path / "model", HELDOUT, tmp_path / "i.gguf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unusable_input(tmp_path: Path) -> None:
    folder = small(MODELS[0], tmp_path / "model")
    out, text = tmp_path / "i.gguf", tmp_path / "text.txt"
    text.write_text("too short")
    with pytest.raises(ImportanceError, match=r"text\.txt: has \d tokens, one window needs 512"):
        calibrate(folder, text, out)
    text.write_bytes(b"\xff\xff")
    with pytest.raises(EvalError, match="no UTF-8"):
        calibrate(folder, text, out)
    with pytest.raises(ModelError, match="its context is 512 tokens, not 513"):
        calibrate(folder, HELDOUT, out, CalibrationOptions(ctx=513))
    with pytest.raises(ModelError, match="no such folder"):
        calibrate(tmp_path / "nowhere", HELDOUT, out)
    shutil.rmtree(tmp_path / "model")
    build(MODELS[0], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImportanceError, match=r"blk\.1\.ffn_down\.weight'.*not finite"):
        calibrate(folder, HELDOUT, out, CalibrationOptions(ctx=CTX, chunks=2), progress=False)
    assert not out.exists()

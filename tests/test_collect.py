"""``ccq-convert calibrate MODEL.gguf``: the sums that llama.cpp's graph gives, against the torch way, against
llama-imatrix, and against sums written out here."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ccq_converters import collect, graph, imatrix, llama
from ccq_converters.arch import family_of
from ccq_converters.calibrate import calibrate, load_windows
from ccq_converters.calibration import BUNDLED_TEXT, CalibrationOptions
from ccq_converters.cli import main
from ccq_converters.collect import calibrate_gguf
from ccq_converters.dequantize import dequantize
from ccq_converters.hessian import Hessians
from ccq_converters.hf2gguf import convert
from ccq_converters.losses import measure_losses
from ccq_converters.options import QuantOptions
from ccq_format.errors import EvalError, ImportanceError, ModelError, OutputError
from ccq_format.gguf_io import open_model
from support.commands import unnamed

from .upstream_diff.models import CASES, EXAMPLE, FAMILY_CASES, MOE, QWEN_MOE, Case, build

DATA = Path(__file__).parent / "data"
HELDOUT = EXAMPLE.parent / "heldout.txt"
CTX, CHUNKS = 32, 20
"""More than two batches of ``collect.BATCH``, the last one smaller."""

MODELS = [
    Case("llama", "llama", {"attention_bias": True, "head_dim": 32}),
    next(case for case in CASES if case.name == "llama3-tied-bf16"),
    Case("qwen3", "qwen3", {"head_dim": 16}),
    Case("mixtral", "mixtral", {**MOE}),
    Case("qwen3-moe", "qwen3_moe", {**QWEN_MOE, "num_experts": 16, "num_local_experts": 16}),
]
WIDE_MOE = Case("wide", "mixtral", {**MOE, "intermediate_size": 128})
"""All rows are multiples of 64, so that CCQ_T2 fits."""


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model in some types; ``ccq_t2.f32`` is ``ccq_t2`` decoded."""
    folder = tmp_path_factory.mktemp("bundled")
    files = {name: folder / f"{name}.gguf" for name in ("f32", "f16", "bf16", "q8_0", "ccq_t2")}
    for name, path in files.items():
        convert(EXAMPLE, path, QuantOptions(name, effort="fast"), progress=False)
    for name in ("f16", "bf16", "q8_0", "ccq_t2"):
        files[f"{name}.f32"] = folder / f"{name}.f32.gguf"
        dequantize(files[name], files[f"{name}.f32"], "f32")
    return files


@pytest.fixture(scope="module")
def text() -> str:
    return HELDOUT.read_text()


def run(model: Path, out: Path, *more: object, text: Path = HELDOUT) -> Result:
    arguments = ["calibrate", model, "--text", text, "-o", out, "--ctx", CTX, "--threads", 1, *more]
    return CliRunner().invoke(main, [str(a) for a in arguments])


def assert_close(got: imatrix.Importance, expected: imatrix.Importance, rtol: float, atol: float = 1e-6) -> None:
    """Equal names and counts; sums within ``rtol`` of their own and ``atol`` of the largest."""
    assert set(got.entries) == set(expected.entries)
    for name, entry in expected.entries.items():
        assert got.entries[name].counts.tolist() == entry.counts.tolist(), name
        np.testing.assert_allclose(
            got.entries[name].sums, entry.sums, rtol=rtol, atol=atol * entry.sums.max(), err_msg=name
        )


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_equals_the_torch_way(case: Case, tmp_path: Path) -> None:
    """f32 weights, KV cache f32 and no flash attention: nothing but the order of float additions differs."""
    folder, file = tmp_path / "model", tmp_path / "model.gguf"
    build(case, folder)
    convert(folder, file, QuantOptions("f32"), progress=False)
    options = CalibrationOptions(ctx=CTX, chunks=CHUNKS, threads=1, process_output=True, exact=True)
    torch_hessian, our_hessian = tmp_path / "torch.safetensors", tmp_path / "ours.safetensors"
    expected = calibrate(folder, HELDOUT, tmp_path / "i.gguf", options, hessian=torch_hessian, progress=False)
    tokens = load_windows(folder, family_of(folder), HELDOUT, CTX, CHUNKS).reshape(-1).tolist()
    got = calibrate_gguf(file, tokens, options, hessian=our_hessian)
    assert (got.chunk_count, got.chunk_size) == (CHUNKS, CTX)
    assert_close(got, expected, 1e-4)
    ours, theirs = Hessians(our_hessian), Hessians(torch_hessian)
    shapes = {tensor.name: tensor.shape for tensor in open_model(file).tensors}
    for name, entry in expected.entries.items():
        assert (name in ours) == (name in theirs) == ("ffn_gate_inp" not in name)
        if name in ours:
            matrices, width = entry.counts.size, shapes[name][-1]
            for matrix in range(matrices):
                product, count = ours.product(name, matrices, width, matrix)
                wanted, tokens_seen = theirs.product(name, matrices, width, matrix)
                assert count == tokens_seen
                np.testing.assert_allclose(product, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))


def test_equals_llama_imatrix(bundled: dict[str, Path], text: str, tmp_path: Path) -> None:
    """llama-imatrix's own file, made of the f16 model on another CPU.

    There as here what is rounded to f16 on the way moves the sums; how far is measured here, from the same weights in
    float32.  Ours may be as far from theirs as both are from that together, and so may what torch computes.
    """
    result = run(bundled["f16"], tmp_path / "i.gguf", "--ctx", 128, "--chunks", 8)
    assert result.exit_code == 0, result.output
    ours, theirs = imatrix.load(tmp_path / "i.gguf"), imatrix.load(DATA / "manllama-4m.imatrix.gguf")
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    assert ours.datasets == [str(HELDOUT)]
    options = CalibrationOptions(ctx=128, chunks=8, threads=1, exact=True)
    unrounded = calibrate_gguf(bundled["f16.f32"], text, options)
    rounding = max(np.abs(e.sums / unrounded.entries[name].sums - 1).max() for name, e in ours.entries.items())
    assert rounding < 8 * 2**-11  # it is that of f16, and nothing worse
    assert_close(ours, theirs, 2 * rounding, 0)
    torch = calibrate(EXAMPLE, HELDOUT, tmp_path / "t.gguf", CalibrationOptions(ctx=128, chunks=8), progress=False)
    assert (torch.chunk_count, torch.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    assert_close(torch, theirs, 2 * rounding, 0)


@pytest.mark.parametrize(("name", "rtol"), [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.05), ("ccq_t2", 0.05)])
def test_types(bundled: dict[str, Path], text: str, name: str, rtol: float) -> None:
    """A file of another type and its decoded weights differ by the rounding of activations (bf16 and q8_0: 8 bits).

    What is compared is a sum over 640 tokens, and its rounding errors are relative to a token's or block's largest
    channel, so a small channel's may be large: the bound on each is on top of one for the sum over all.
    """
    options = CalibrationOptions(ctx=CTX, chunks=CHUNKS, threads=1)
    got = calibrate_gguf(bundled[name], text, options)
    expected = calibrate_gguf(bundled[f"{name}.f32"], text, options)
    assert_close(got, expected, rtol, rtol)
    for key, entry in expected.entries.items():
        assert got.entries[key].sums.sum() == pytest.approx(entry.sums.sum(), rel=rtol)


def test_ccq_mixture_of_experts(text: str, tmp_path: Path) -> None:
    """Routing may differ where it was close; the inputs of the first layer's experts hardly do."""
    build(WIDE_MOE, tmp_path / "model")
    file, plain = tmp_path / "t2.gguf", tmp_path / "f32.gguf"
    convert(tmp_path / "model", file, QuantOptions("ccq_t2", effort="fast"), progress=False)
    assert open_model(file).tensor("blk.0.ffn_down_exps.weight").type_name == "ccq_t2"
    dequantize(file, plain, "f32")
    options = CalibrationOptions(ctx=CTX, chunks=CHUNKS, threads=1)
    got, expected = (calibrate_gguf(path, text, options) for path in (file, plain))
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        ours, theirs = (result.entries[f"blk.0.{name}.weight"] for result in (got, expected))
        assert ours.counts.sum() == theirs.counts.sum() == 2 * CTX * CHUNKS
        np.testing.assert_allclose(ours.counts, theirs.counts, rtol=0.02)
        np.testing.assert_allclose(ours.sums.sum(), theirs.sums.sum(), rtol=0.02)


@pytest.mark.parametrize("ctx", [24, 512], ids=["many windows", "one window in several batches"])
def test_batches_do_not_matter(bundled: dict[str, Path], text: str, ctx: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CalibrationOptions(ctx=ctx, chunks=2, threads=1, exact=True)
    whole = calibrate_gguf(bundled["f32"], text, options)
    monkeypatch.setattr(collect, "BATCH", 48)
    assert_close(calibrate_gguf(bundled["f32"], text, options), whole, 1e-4)


def test_models_with_states_run_one_window_at_a_time(bundled: dict[str, Path], tmp_path: Path) -> None:
    """Together their windows' states would be mixed up on some CPUs (see ``LlamaModel``)."""
    (case,) = (case for case in FAMILY_CASES if case.name == "qwen3-next")
    build(case, tmp_path / "model")
    path = tmp_path / "q8_0.gguf"
    convert(tmp_path / "model", path, QuantOptions("q8_0"), progress=False)
    for model_path, n_seq in ((path, 1), (bundled["f32"], 4)):
        with llama.LlamaModel(model_path, n_ctx=16, n_seq=4, threads=1) as model:
            assert model.n_seq == n_seq
    tokens = np.random.default_rng(3).integers(3, 380, (4, 16))
    options = CalibrationOptions(ctx=16, threads=1, exact=True)
    whole = calibrate_gguf(path, tokens.reshape(-1).tolist(), options)
    parts = [calibrate_gguf(path, window.tolist(), options) for window in tokens]
    for name, entry in whole.entries.items():
        sums = sum(part.entries[name].sums for part in parts if name in part.entries)
        np.testing.assert_allclose(entry.sums, sums, rtol=1e-5)
    measured = measure_losses(path, np.tile(tokens.reshape(-1), 8).tolist(), whole, threads=1, most=4)
    assert all(loss >= 0 for loss in measured.losses.values())


def test_the_bundled_text(bundled: dict[str, Path], tmp_path: Path) -> None:
    """It is taken where no text is named, and any part of it has prose, code, dialogue and several scripts."""
    out = tmp_path / "i.gguf"
    arguments = ["calibrate", bundled["f16"], "-o", out, "--chunks", 1, "--threads", 1]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert imatrix.load(out).datasets == [str(BUNDLED_TEXT)]
    assert BUNDLED_TEXT.with_name("README.md").is_file()
    text = BUNDLED_TEXT.read_text("utf-8")
    assert len(text.encode()) > 340_000
    for start in range(0, len(text) - 60_000, 60_000):
        part = text[start : start + 60_000]
        for sign in ("CELIA|ORLANDO|ROSALIND|OLIVER", "Assistant: ", "return ", "SQLite", "[\u0370-\ud7ff]{4}"):
            assert re.search(sign, part), (start, sign)


# --- memory, progress -----------------------------------------------------------------------------------------------


def test_passes_give_what_one_gives(text: str, tmp_path: Path) -> None:
    """With little memory the text is run several times, and a stack of experts divided between them."""
    build(WIDE_MOE, tmp_path / "model")
    file = tmp_path / "f32.gguf"
    convert(tmp_path / "model", file, QuantOptions("f32"), progress=False)
    largest = 4 * 128**2
    seen: dict[str, list[tuple[int, int]]] = {}
    results = {}
    for name, memory in (("one", None), ("many", 3 * largest)):
        options = CalibrationOptions(ctx=CTX, chunks=CHUNKS, threads=1, memory=memory)
        steps = seen.setdefault(name, [])
        results[name] = calibrate_gguf(
            file,
            text,
            options,
            hessian=tmp_path / f"{name}.safetensors",
            advance=lambda done, total, steps=steps: steps.append((done, total)),
        )
    assert {total for _, total in seen["one"]} == {CTX * CHUNKS}
    (total,) = {total for _, total in seen["many"]}
    # Two layers of q, o (64 each), 4 experts' gate (64) and down (128), in units of the largest: 2 * (0.5 + 1 + 4).
    assert total >= 4 * CTX * CHUNKS
    assert seen["many"][-1] == (total, total)
    assert [done for done, _ in seen["many"]] == sorted(done for done, _ in seen["many"])
    assert_close(results["many"], results["one"], 0, 0)
    assert (tmp_path / "many.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_too_little_memory(bundled: dict[str, Path], tmp_path: Path) -> None:
    hessian = tmp_path / "h.safetensors"
    result = run(bundled["f32"], tmp_path / "i.gguf", "--hessian", hessian, "--memory", "2MB")
    assert result.exit_code == 1
    assert "'blk.0.ffn_down.weight': the product of its inputs takes 2359296 bytes, more than --memory" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(bundled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while llama.cpp is at work: the graph is left at the next matrix."""
    calls = []
    original = collect._Input.add

    def interrupted(self: collect._Input, *arguments: object) -> None:
        calls.append(unnamed(tmp_path))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # this is llama.cpp's thread; the main one hears of it meanwhile
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(collect._Input, "add", interrupted)
    result = run(bundled["f32"], tmp_path / "i.gguf", "--hessian", tmp_path / "h.safetensors")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["Interrupted; no file was written."]
    assert calls == [1, 1, 1]  # of 16 in each graph; the Hessians are a file without a name
    assert list(tmp_path.iterdir()) == []


def test_what_the_progress_callback_raises_ends_it(bundled: dict[str, Path], text: str) -> None:
    def enough(done: int, total: int) -> None:
        raise TimeoutError(f"{done} of {total}")

    with pytest.raises(TimeoutError, match=f"{collect.BATCH} of {CTX * CHUNKS}"):
        calibrate_gguf(bundled["f32"], text, CalibrationOptions(ctx=CTX, chunks=CHUNKS, threads=1), advance=enough)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_activations_that_are_not_finite(text: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder, file = tmp_path / "model", tmp_path / "f32.gguf"
    build(MODELS[0], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, file, QuantOptions("f32"), progress=False)
    with pytest.raises(ImportanceError, match=r"'blk\.1\.ffn_down\.weight': the model's activations are not finite"):
        calibrate_gguf(file, text, CalibrationOptions(ctx=CTX, chunks=2, threads=1))


def test_unusable_input(bundled: dict[str, Path], text: str, tmp_path: Path) -> None:
    model, out = bundled["f32"], tmp_path / "i.gguf"
    small = CalibrationOptions(ctx=CTX, threads=1)
    with pytest.raises(ImportanceError, match="the text has 3 tokens, one window needs 32"):
        calibrate_gguf(model, [1, 2, 3], small)
    with pytest.raises(ImportanceError, match="the tokens are not below 4096"):
        calibrate_gguf(model, [4096] * 64, small)
    context = open_model(model).metadata["llama.context_length"]
    with pytest.raises(ModelError, match=f"its context is {context} tokens, not {context + 1}"):
        calibrate_gguf(model, text, CalibrationOptions(ctx=context + 1))
    with pytest.raises(ModelError, match="gradients need torch"):
        calibrate_gguf(model, text, CalibrationOptions(gradients=True))
    with pytest.raises(ModelError, match="--memory is for GGUF files"):
        calibrate(EXAMPLE, HELDOUT, out, CalibrationOptions(memory=1))
    (tmp_path / "h.safetensors").write_bytes(b"old")
    with pytest.raises(OutputError):
        calibrate_gguf(model, text, small, hessian=tmp_path / "h.safetensors")
    (tmp_path / "h.safetensors").unlink()
    for arguments, reason in (
        ((tmp_path / "nowhere.gguf", out), "No such file"),
        ((HELDOUT, out), "not b'GGUF'"),
        ((model, out, "--hessian", out), "is to hold both"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert reason in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One field moved, or a function gone: nothing is read by guesswork."""
    library = llama.library().llama_cpp._lib
    graph.Ggml(library)

    class Moved(ctypes.Structure):
        _fields_ = tuple(
            field for name in ("type", "ne", "buffer") for field in graph.Node._fields_ if field[0] == name
        ) + tuple(graph.Node._fields_[3:])

    assert ctypes.sizeof(Moved) == ctypes.sizeof(graph.Node)
    monkeypatch.setattr(graph, "Node", Moved)
    with pytest.raises(EvalError, match="lays out tensors in another way"):
        graph.Ggml(library)
    monkeypatch.undo()
    with pytest.raises(EvalError, match="has no function ggml_init"):
        graph.Ggml(ctypes.CDLL("libc.so.6"))


# --- graphs that our families do not have ---------------------------------------------------------------------------


class Tensors:
    """Tensors in a buffer of ggml's, made by hand."""

    def __init__(self, library: ctypes.CDLL, context: int) -> None:
        self.library, self.context = library, context

    def call(self, name: str, *arguments: object) -> int:
        function = getattr(self.library, f"ggml_{name}")
        function.restype = ctypes.c_void_p
        wrapped = [ctypes.c_void_p(a) if isinstance(a, int) and a > 1 << 31 else a for a in arguments]
        return int(function(*wrapped) or 0)

    def new(self, type: int, *ne: int) -> int:
        dims = [ctypes.c_int64(n) for n in (*ne, 1, 1, 1)[:4]]
        return self.call("new_tensor_4d", self.context, type, *dims)

    def name(self, tensor: int, name: str) -> int:
        return self.call("set_name", tensor, name.encode()) or tensor

    def fill(self, tensor: int, values: np.ndarray) -> None:
        assert graph.Node.from_address(tensor).data
        self.call("backend_tensor_set", tensor, values.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes))


@contextmanager
def tensors() -> Iterator[Tensors]:
    library = llama.library().llama_cpp._lib
    # A handle of its own, so that prototypes set here are not seen elsewhere.
    ggml = graph.Ggml(library)
    context = ggml._call["ggml_init"](graph._InitParams(1 << 20, None, True))
    made = Tensors(ctypes.CDLL(library._name), context)
    yield made
    ggml._call["ggml_free"](context)


def seen_by(name: str, width: int, matrices: int, indirect: bool, node: int) -> collect._Input:
    """What is collected at one node."""
    entry = collect._Input([name], width, matrices, indirect)
    entry.begin((0, matrices))
    with ThreadPoolExecutor(2) as pool:
        watch = collect._Collect(graph.Ggml(llama.library().llama_cpp._lib), False, [entry], pool)
        assert watch(node, True)
        assert not watch(node, False)  # it was the last one
    return entry


F32, F16, I32 = 0, 1, 26
RNG = np.random.default_rng(1)


def allocate(made: Tensors) -> None:
    buffer_type = made.call("backend_cpu_buffer_type")
    assert made.call("backend_alloc_ctx_tensors_from_buft", made.context, buffer_type)


def test_permuted_inputs_of_a_stack() -> None:
    """As in attention with latent keys: one matrix for each head, the heads' inputs lie between each other."""
    heads, tokens, width = 3, 5, 64
    x = RNG.standard_normal((tokens, heads, width)).astype(np.float32)
    with tensors() as made:
        weight = made.name(made.new(F32, width, 7, heads), "blk.0.attn_k_b.weight")
        stored = made.new(F32, width, heads, tokens)
        node = made.call("mul_mat", made.context, weight, made.call("permute", made.context, stored, 0, 2, 1, 3))
        allocate(made)
        made.fill(stored, x)
        entry = seen_by("blk.0.attn_k_b.weight", width, heads, False, node)
    assert entry.counts.tolist() == [tokens] * heads
    for head in range(heads):
        np.testing.assert_allclose(entry.squares[head], np.square(x[:, head]).sum(axis=0), rtol=1e-6)
        np.testing.assert_allclose(entry.product(head), x[:, head].T @ x[:, head], rtol=1e-5, atol=1e-5)
    result = collect._entry("blk.0.attn_k_b.weight", entry, Path())
    assert (result.counts.tolist(), result.sums.size) == ([tokens], heads * width)  # llama-imatrix's form


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_experts_by_their_ids(rows: int) -> None:
    """Slot s of a token reads row s modulo the number of rows; the ids are a view of wider rows."""
    experts, tokens, width, chosen = 6, 5, 64, 4
    x = RNG.standard_normal((tokens, rows, width)).astype(np.float32)
    ids = np.stack([RNG.permutation(experts) for _ in range(tokens)]).astype(np.int32)
    with tensors() as made:
        weight = made.name(made.new(F32, width, 7, experts), "CUDA0#blk.0.ffn_up_exps.weight#0")
        inputs, order = made.new(F32, width, rows, tokens), made.new(I32, experts, tokens)
        top = made.call(
            "view_2d",
            made.context,
            order,
            ctypes.c_int64(chosen),
            ctypes.c_int64(tokens),
            ctypes.c_size_t(4 * experts),
            ctypes.c_size_t(0),
        )
        node = made.call("mul_mat_id", made.context, weight, inputs, top)
        allocate(made)
        made.fill(inputs, x)
        made.fill(order, ids)
        entry = seen_by("blk.0.ffn_up_exps.weight", width, experts, True, node)
        made.fill(order, ids + experts)
        with pytest.raises(ImportanceError, match="experts that are not among its 6"):
            seen_by("blk.0.ffn_up_exps.weight", width, experts, True, node)
    for expert in range(experts):
        given = [x[t, s % rows] for t in range(tokens) for s in range(chosen) if ids[t, s] == expert]
        mine = np.array(given).reshape(-1, width)
        assert entry.counts[expert] == len(mine)
        np.testing.assert_allclose(entry.squares[expert], np.square(mine).sum(axis=0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(entry.product(expert), mine.T @ mine, rtol=1e-5, atol=1e-5)


def test_inputs_of_other_types() -> None:
    for kind, dtype in ((F16, np.float16), (I32, np.int32)):
        x = RNG.integers(-5, 5, (3, 64)).astype(dtype)
        with tensors() as made:
            weight = made.name(made.new(F32, 64, 7), "blk.0.attn_q.weight")
            stored = made.new(kind, 64, 3)
            node = made.call("mul_mat", made.context, weight, stored)
            allocate(made)
            made.fill(stored, x)
            if kind == F16:
                entry = seen_by("blk.0.attn_q.weight", 64, 1, False, node)
                np.testing.assert_array_equal(entry.squares[0], np.square(x.astype(np.float64)).sum(axis=0))
            else:
                with pytest.raises(ImportanceError, match="has inputs i32"):
                    seen_by("blk.0.attn_q.weight", 64, 1, False, node)


def test_who_shares_inputs() -> None:
    """Same tensor, same ids and stacks of the same size; a matrix that is used twice has its inputs to itself."""
    look = collect._FirstLook(SimpleNamespace(), False)  # type: ignore[arg-type]
    uses = {"q": [(1, 0, 1)], "k": [(1, 0, 1)], "gate": [(2, 3, 4)], "up": [(2, 3, 4)], "down": [(2, 4, 4)]}
    look.uses = {**uses, "shared": [(1, 0, 1), (5, 0, 1)], "router": [(2, 0, 1)]}
    look.shapes = {name: (64, uses[0][2], uses[0][1] > 0) for name, uses in look.uses.items()}
    assert [entry.names for entry in look.inputs()] == [["q", "k"], ["gate", "up"], ["down"], ["shared"], ["router"]]


def test_a_matrix_that_is_used_again() -> None:
    """Both of its inputs count, and the graph goes on behind it."""
    x = RNG.standard_normal((2, 3, 64)).astype(np.float32)
    with tensors() as made, ThreadPoolExecutor(2) as pool:
        weight = made.name(made.new(F32, 64, 7), "blk.0.attn_q.weight")
        inputs = [made.new(F32, 64, 3), made.new(F32, 64, 3)]
        nodes = [made.call("mul_mat", made.context, weight, tensor) for tensor in inputs]
        allocate(made)
        ggml = graph.Ggml(llama.library().llama_cpp._lib)
        look = collect._FirstLook(ggml, False)
        for tensor, values, node in zip(inputs, x, nodes, strict=True):
            made.fill(tensor, values)
            assert not look(node, True)
        (entry,) = look.inputs()
        watch = collect._Collect(ggml, False, [entry], pool)
        for node in nodes:
            assert watch(node, True)
            assert watch(node, False)
    assert entry.counts.tolist() == [6]
    np.testing.assert_allclose(entry.squares[0], np.square(x).sum(axis=(0, 1)), rtol=1e-6)


def test_a_follower_with_other_inputs_is_an_error() -> None:
    """Should the graph of a batch differ from the one that was looked at first."""
    with tensors() as made:
        nodes = []
        for name in ("q", "k"):
            weight = made.name(made.new(F32, 64, 7), f"blk.0.attn_{name}.weight")
            nodes.append(made.call("mul_mat", made.context, weight, made.new(F32, 64, 3)))
        entry = collect._Input([f"blk.0.attn_{name}.weight" for name in "qk"], 64, 1, False)
        pool = ThreadPoolExecutor(1)
        watch = collect._Collect(graph.Ggml(llama.library().llama_cpp._lib), False, [entry], pool)
        assert watch(nodes[0], True)
        with pytest.raises(ImportanceError, match=r"'blk.0.attn_k.weight': does not always have the inputs of"):
            watch(nodes[1], True)

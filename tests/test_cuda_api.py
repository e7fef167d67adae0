"""``ccq_backend.cuda`` over the emulated library: arrays, checks, errors; and ``ccq_backend.linear`` on the CPU.

Without a GPU torch has no CUDA tensors, so arrays come through ``__cuda_array_interface__``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_cuda_kernels import activations, check_product

from ccq_backend import cuda
from ccq_backend.linear import CcqLinear, replace_linears
from ccq_converters.cli import main
from ccq_format import errors
from ccq_format.gguf_io import open_model
from ccq_format.layouts import by_name
from support import cuda_harness
from support.blocks import expected_weights, run_python, same_bits, sane_blocks

T2 = by_name("ccq_t2")
MODEL = Path(__file__).resolve().parent.parent / "examples" / "manllama-4m"


class OnDevice:
    """NumPy memory that claims to be a device's; what the emulator takes for one."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "data": (array.ctypes.data, False),
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": array.strides,
            "version": 3,
        }


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ccq_backend.cuda`` takes the emulated library."""
    if cuda_harness.compiler() is None:
        pytest.skip("no C++ compiler: install one, or name it in CXX")
    monkeypatch.setenv("CCQ_CUDA_LIBRARY", str(cuda_harness.library()))


def padded(blocks: np.ndarray) -> np.ndarray:
    """The same blocks in memory that ends with a whole word."""
    room = np.zeros(blocks.size + 8, np.uint8)
    start = -room.ctypes.data % 4
    view = room[start : start + blocks.size].reshape(blocks.shape)
    view[:] = blocks
    return view


def test_operations(device: None) -> None:
    rng = np.random.default_rng(1)
    b = padded(sane_blocks(T2, 5, 3, rng))
    assert cuda.available()
    weights = np.stack([expected_weights(T2, row) for row in b])
    out = np.zeros((5, 192), np.float32)
    cuda.dequantize("ccq_t2", OnDevice(b), out=OnDevice(out))
    assert same_bits(out, weights)
    rows = np.array([3, 1], np.int32)
    half = np.zeros((2, 192), np.float16)
    cuda.dequantize(T2, OnDevice(b), "float16", rows=OnDevice(rows), out=OnDevice(half))
    assert np.array_equal(half, weights[[3, 1]].astype(np.float16))
    for n, function in ((3, cuda.matvec), (3, cuda.matmul), (12, cuda.matmul)):
        x = activations(n, 192, rng)
        wide = np.zeros((n, 8), np.float32)  # results may lie in a larger array
        function(T2, OnDevice(b), OnDevice(x), out=OnDevice(wide[:, 1:6]))
        check_product(T2, b, x, wide[:, 1:6])
        assert not wide[:, [0, 6, 7]].any()


@pytest.mark.parametrize("tokens", [2, 20])
def test_experts(device: None, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    b = padded(np.stack([sane_blocks(T2, 3, 2, rng) for _ in range(4)]))
    ids = rng.integers(0, 3, (tokens, 2)).astype(np.int32)
    for shape in ((tokens, 128), (tokens, 2, 128)):
        x = activations(int(np.prod(shape[:-1])), 128, rng).reshape(shape)
        out = np.zeros((tokens, 2, 3), np.float32)
        cuda.matmul_id(T2, OnDevice(b), OnDevice(x), OnDevice(ids), out=OnDevice(out))
        for t in range(tokens):
            for j in range(2):
                row = x[t] if x.ndim == 2 else x[t, j]
                check_product(T2, b[ids[t, j]], row[None], out[t, j][None])


def test_what_does_not_fit_is_refused(device: None) -> None:
    b, x, out = np.zeros((2, 17), np.uint8), np.zeros((1, 64), np.float32), np.zeros((1, 2), np.float32)

    def call(**change: Any) -> Any:
        arrays = {"blocks": OnDevice(b), "x": OnDevice(x), "out": OnDevice(out)} | change
        return cuda.matvec("ccq_t2", **arrays)

    for change, error, reason in (
        ({"blocks": b.tolist()}, errors.CudaError, "blocks must be a CUDA array"),
        ({"blocks": b}, errors.CudaError, "blocks is on the device 'cpu'"),
        ({"blocks": torch.from_numpy(b)}, errors.CudaError, "blocks is on the device 'cpu'"),
        ({"x": OnDevice(x.astype(np.float64))}, errors.CudaError, "x has dtype <f8"),
        ({"blocks": OnDevice(b[:, :16])}, errors.ShapeError, "16 bytes per row"),
        ({"x": OnDevice(np.zeros((1, 128), np.float32))}, errors.ShapeError, "x has rows of 128"),
        ({"x": OnDevice(np.zeros((9, 64), np.float32))}, errors.ShapeError, "matvec takes up to 8"),
        ({"x": OnDevice(np.zeros(64, np.float32))}, errors.ShapeError, "x must have 2 dimensions"),
        ({"x": OnDevice(np.zeros((64, 2), np.float32).T[:1])}, errors.CudaError, "x is not contiguous"),
        ({"x": OnDevice(np.zeros((1, 66), np.float32)[:, 1:65])}, errors.CudaError, "aligned to 8 bytes"),
        ({"out": OnDevice(np.zeros((2, 1), np.float32))}, errors.ShapeError, "out has shape (2, 1)"),
        ({"out": None}, errors.CudaError, "out must be given"),
    ):
        with pytest.raises(error) as caught:
            call(**change)
        assert reason in caught.value.reason
    with pytest.raises(errors.BackendError):
        cuda.matvec("q2_k", OnDevice(b), OnDevice(x), out=OnDevice(out))
    with pytest.raises(errors.CudaError):
        cuda.dequantize("ccq_t2", OnDevice(b), "float64")


NO_CUDA = """
import numpy as np
import ccq_backend, ccq_backend.cuda as cuda
from ccq_format import errors
assert not cuda.available()
a = np.zeros((2, 17), np.uint8)
for call in (cuda.dequantize, cuda.matvec, cuda.matmul, cuda.matmul_id):
    try:
        call("ccq_t2", *[a] * {"dequantize": 1, "matmul_id": 3}.get(call.__name__, 2))
    except errors.CudaError as e:
        print(e.reason)
import sys
assert "torch" not in sys.modules
print(ccq_backend.decode("ccq_t2", a).shape)
"""


def test_without_the_library() -> None:
    run = run_python(NO_CUDA, CCQ_CUDA_LIBRARY="/nonexistent/libccq_cuda.so")
    reason = "this installation has no CUDA kernels; `make cuda` builds them"
    assert run.stdout.splitlines() == [reason] * 4 + ["(2, 64)"], run.stderr


def test_a_damaged_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libccq_cuda.so"
    path.write_bytes(b"\x7fELF nonsense")
    monkeypatch.setenv("CCQ_CUDA_LIBRARY", str(path))
    with pytest.raises(errors.CudaError, match="cannot be loaded"):
        cuda.matvec("ccq_t2", None, None)


# --- linear layers ----------------------------------------------------------------------------------------------------


def test_linear_on_the_cpu() -> None:
    rng = np.random.default_rng(5)
    b = sane_blocks(T2, 7, 3, rng)
    weights = torch.from_numpy(np.stack([expected_weights(T2, row) for row in b]))
    bias = torch.randn(7)
    linear = CcqLinear("ccq_t2", torch.from_numpy(b), bias)
    x = torch.from_numpy(rng.integers(-127, 128, (2, 3, 192)).astype(np.float32))
    x[..., ::8] = 127  # integers that every kernel set keeps
    want = torch.nn.functional.linear(x.double(), weights.double(), bias.double())
    size = torch.nn.functional.linear(x.double().abs(), weights.double().abs(), bias.double().abs())
    assert ((linear(x) - want).abs() <= size * 13 * 2.0**-24).all()
    assert linear(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert set(linear.state_dict()) == {"blocks", "bias"}
    with pytest.raises(errors.ShapeError):
        linear(x[..., :128])
    with pytest.raises(errors.ShapeError):
        CcqLinear("ccq_t2", torch.zeros(2, 18, dtype=torch.uint8))


def test_a_transformers_model_with_ccq_weights(tmp_path: Path) -> None:
    """All linear layers of the bundled model from a file, against the same weights dequantized into the model."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "t3.gguf"
    arguments = ["hf2gguf", str(MODEL), "-o", str(path), "--type", "ccq_t3", "--effort", "fast", "--no-calibration"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    n_linears = sum(isinstance(m, torch.nn.Linear) for m in plain.modules())
    assert replace_linears(ours, path) == n_linears - (0 if plain.lm_head is None else 1)  # the output is q8_0
    for name, module in ours.named_modules():
        if isinstance(module, CcqLinear):
            rows = [expected_weights(module.layout, row) for row in module.blocks.numpy()]
            plain.get_submodule(name).weight.data = torch.from_numpy(np.stack(rows))
    tokens = torch.arange(3, 99)[None]
    with torch.no_grad():
        a = plain(tokens).logits.log_softmax(-1)
        b = ours(tokens).logits.log_softmax(-1)
        original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(tokens).logits.log_softmax(-1)
    divergence = (a.exp() * (a - b)).sum(-1).mean()
    assert divergence < 0.01
    # Query and key rows are in transformers' order: the encoded model is still the model.
    assert (original.exp() * (original - b)).sum(-1).mean() < 0.1
    with pytest.raises(errors.TensorTypeError, match="no matrix of a CCQ type"):
        CcqLinear.from_file(path, "token_embd.weight")
    with pytest.raises(errors.TensorTypeError, match="no such tensor"):
        CcqLinear.from_file(path, "blk.99.attn_q.weight")
    assert open_model(path).arch == "llama"


@pytest.mark.usefixtures("device")
def test_out_of_experts_is_contiguous() -> None:
    rng = np.random.default_rng(0)
    blocks = OnDevice(rng.integers(0, 256, (3, 4, 34), dtype=np.uint8))
    x, ids = OnDevice(rng.standard_normal((2, 128)).astype(np.float32)), OnDevice(np.array([[0, 1], [2, 0]], np.int32))
    spread, packed = np.zeros((2, 3, 4), np.float32), np.zeros((2, 2, 4), np.float32)
    same = np.lib.stride_tricks.as_strided(packed, (2, 2, 4), (0, 16, 4))
    for out in (spread[:, :2], same):
        with pytest.raises(errors.CudaError, match="out must be contiguous"):
            cuda.matmul_id("ccq_t2", blocks, x, ids, out=OnDevice(out))
    assert not spread.any()
    cuda.matmul_id("ccq_t2", blocks, x, ids, out=OnDevice(packed))

"""The CUDA encoder of the T types, run on a CPU (``support/cuda_harness.py``): the bytes of the CPU's encoder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import ccq_backend
from ccq_backend import cuda
from ccq_converters.cli import main
from ccq_converters.encode import encode_blocks
from ccq_converters.feedback import encode_with_feedback, factorize
from ccq_format import errors
from ccq_format.gguf_io import ModelWriter
from ccq_format.layouts import Layout, by_name
from support import cuda_harness
from support.blocks import F32, T_LAYOUTS, run_python
from support.commands import without_calibration
from support.cuda_harness import Device

pytestmark = pytest.mark.skipif(
    cuda_harness.compiler() is None, reason="no C++ compiler: install one, or name it in CXX"
)
by_layout = pytest.mark.parametrize("layout", T_LAYOUTS, ids=lambda layout: layout.name)
EFFORTS = ccq_backend.EFFORTS
T2 = by_name("ccq_t2")


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(cuda_harness.library())


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ccq_backend.cuda`` takes the emulated library."""
    monkeypatch.setenv("CCQ_CUDA_LIBRARY", str(cuda_harness.library()))


def check(device: Device, layout: Layout, x: F32, importance: Any = None, effort: str = "fast", u: Any = None) -> None:
    status, blocks = device.encode(layout, x, importance, EFFORTS[effort], u)
    assert status == 0
    wanted = ccq_backend.encode(layout, x, importance, effort=effort, coupling=u)
    assert np.array_equal(blocks, wanted)


def student(layout: Layout, blocks: int, seed: int) -> F32:
    return np.random.default_rng(seed).standard_t(4, (blocks, layout.block_weights)).astype(np.float32)


def heavy(shape: tuple[int, ...], seed: int) -> F32:
    """Importances, some of them above what 16-bit costs hold, some zero."""
    rng = np.random.default_rng(seed)
    w = np.exp(rng.normal(0, 2, shape)).astype(np.float32)
    w[rng.random(shape) < 0.05] = 5000
    w[rng.random(shape) < 0.05] = 0
    return w


def coupling(layout: Layout, blocks: int, size: float, seed: int) -> F32:
    n = layout.block_weights
    u = np.random.default_rng(seed).standard_normal((blocks, n, n)) * size
    return np.triu(u, 1).astype(np.float32)


@by_layout
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_same_bytes(device: Device, layout: Layout, effort: str) -> None:
    x = student(layout, 2, 1)
    check(device, layout, x[:1], None, effort)
    check(device, layout, x[1:], heavy((layout.block_weights,), 2), effort)


@by_layout
def test_same_bytes_where_scales_and_seams_are_tried(device: Device, layout: Layout) -> None:
    check(device, layout, student(layout, 1, 3), heavy((1, layout.block_weights), 4), "best")


@by_layout
def test_coupled_errors(device: Device, layout: Layout) -> None:
    """Survivors fewer than there may be, and so many errors that the search without coupling has to help."""
    n = layout.block_weights
    check(device, layout, student(layout, 1, 5), None, "fast", coupling(layout, 1, 0.1, 6))
    x = student(layout, 1, 7).reshape(1, n)
    check(device, layout, x, heavy((n,), 8), "fast", coupling(layout, 1, 2.0, 9))


def test_coupled_errors_with_all_survivors(device: Device) -> None:
    check(device, by_name("ccq_t3"), student(by_name("ccq_t3"), 1, 10), None, "best", coupling(T2, 1, 0.1, 11))


@by_layout
def test_extreme_weights(device: Device, layout: Layout) -> None:
    n = layout.block_weights
    x = np.zeros((6, n), np.float32)
    x[1, 5] = 1e-38
    x[2] = 3e38
    x[3, ::2] = -1e-9
    x[4, 0], x[4, 1:] = 1e5, 1e-6
    x[5] = 127 * 2.0**-4
    check(device, layout, x)


def test_rows_importances_and_couplings_of_several_blocks(device: Device) -> None:
    """Three rows of three blocks, importances by row and by column, a coupling for each block of a row."""
    x = np.random.default_rng(12).standard_normal((3, 192)).astype(np.float32)
    check(device, T2, x, heavy((3, 192), 13))
    check(device, T2, x, heavy((192,), 14))
    check(device, T2, x[:1], None, "fast", coupling(T2, 3, 0.1, 15))


def test_refusals(device: Device) -> None:
    lib = device.lib
    x = student(T2, 1, 16)
    for place, value in ((3, np.nan), (63, np.inf), (0, -np.inf)):
        bad = x.copy()
        bad[0, place] = value
        assert device.encode(T2, bad)[0] == lib.CCQ_CUDA_ERR_WEIGHTS
    for value in (np.nan, np.inf, -1.0):
        w = np.ones(64, np.float32)
        w[7] = value
        assert device.encode(T2, x, w)[0] == lib.CCQ_CUDA_ERR_IMPORTANCE
    for place, value in (((0, 5, 9), np.nan), ((0, 9, 9), 1.0)):
        u = np.zeros((1, 64, 64), np.float32)
        u[place] = value
        assert device.encode(T2, x, None, 1, u)[0] == lib.CCQ_CUDA_ERR_ARGUMENT
    assert device.encode(by_name("ccq_p2"), np.zeros((1, 512), np.float32))[0] == lib.CCQ_CUDA_ERR_TYPE
    assert device.encode(T2, np.zeros((1, 65), np.float32))[0] == lib.CCQ_CUDA_ERR_ROW_LENGTH
    assert device.encode(T2, x, effort=3)[0] == lib.CCQ_CUDA_ERR_ARGUMENT
    assert device.encode(T2, np.zeros((0, 64), np.float32))[0] == lib.CCQ_CUDA_OK


@by_layout
def test_encoder_on_little(device: Device, layout: Layout) -> None:
    """Every kernel once; what also runs under sanitizers in the default suite."""
    check(device, layout, student(layout, 1, 17), heavy((layout.block_weights,), 18))
    if layout.name == "ccq_t2_5":
        check(device, layout, student(layout, 1, 19), None, "fast", coupling(layout, 1, 0.1, 20))


def test_with_sanitizers(tmp_path: Path) -> None:
    """The same under AddressSanitizer and UndefinedBehaviorSanitizer."""
    cuda_harness.run_sanitized(tmp_path, __file__, "test_encoder_on_little", ("encode.cu",))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # A way too few in a step; targets moved from one too late on.
        ("for (int p = 0; p < mine::WAYS; p++) {", "for (int p = 1; p < mine::WAYS; p++) {"),
        ("int j = t + 1 + (int)threadIdx.x % 32;", "int j = t + 2 + (int)threadIdx.x % 32;"),
    ],
)
def test_an_off_by_one_is_caught(tmp_path: Path, right: str, wrong: str) -> None:
    source = (cuda_harness.CUDA / "encode.h").read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "core").symlink_to(cuda_harness.CUDA.parent / "core")
    folder = tmp_path / "cuda"
    shutil.copytree(cuda_harness.CUDA, folder)
    (folder / "encode.h").write_text(source.replace(right, wrong))
    broken = Device(cuda_harness.build(tmp_path / "wrong.so", ("-O0",), folder, ("encode.cu",)))
    with pytest.raises(AssertionError):
        check(broken, T2, student(T2, 1, 21), None, "fast", coupling(T2, 1, 0.3, 22))


# --- Python ----------------------------------------------------------------------------------------------------------


def test_in_python(on_device: None) -> None:
    x = student(T2, 2, 23)
    assert np.array_equal(cuda.encode("ccq_t2", x, effort="fast"), ccq_backend.encode("ccq_t2", x, effort="fast"))
    for change, error in (
        ({"weights": np.zeros((1, 65), np.float32)}, errors.ShapeError),
        ({"weights": np.full((1, 64), np.nan, np.float32)}, errors.WeightsError),
        ({"importance": np.full(64, -1, np.float32)}, errors.ImportanceError),
        ({"importance": np.ones(63, np.float32)}, errors.ImportanceError),
        ({"coupling": np.zeros((1, 64, 63), np.float32)}, errors.ShapeError),
        ({"effort": "most"}, errors.BackendError),
        ({"type": "ccq_p2_5", "weights": np.zeros((1, 256), np.float32)}, errors.BackendError),
    ):
        with pytest.raises(error):
            cuda.encode(**({"type": "ccq_t2", "weights": x} | change))


def test_p_types_stay_on_the_cpu(on_device: None) -> None:
    layout = by_name("ccq_p2_5")
    x = np.random.default_rng(24).standard_normal((1, 256)).astype(np.float32)
    wanted = ccq_backend.encode(layout, x)
    assert np.array_equal(encode_blocks(layout, x, None, 1, "default", "cuda"), wanted)


def test_feedback(on_device: None) -> None:
    rng = np.random.default_rng(25)
    inputs = rng.standard_normal((256, 128)) @ (np.eye(128) + 0.2 * rng.standard_normal((128, 128)))
    factors = factorize(inputs.T @ inputs, T2)
    x = rng.standard_normal((2, 128)).astype(np.float32)
    wanted = encode_with_feedback(x, factors, 1, "fast")
    assert np.array_equal(encode_with_feedback(x, factors, 1, "fast", "cuda"), wanted)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "in.gguf"
    with ModelWriter(path, "llama") as writer:
        writer.gguf.add_uint32("llama.block_count", 1)
        writer.add_tensor("blk.0.attn_q.weight", "f32", (2, 64))
        writer.begin()
        writer.write("blk.0.attn_q.weight", student(T2, 2, 26).view(np.uint8))
    return path


def run(*args: object) -> Any:
    return CliRunner().invoke(main, without_calibration(args))


def test_the_command_writes_the_same_file(on_device: None, model: Path, tmp_path: Path) -> None:
    files = []
    for device in ("cpu", "cuda"):
        files.append(tmp_path / f"{device}.gguf")
        result = run("quantize", model, "-o", files[-1], "--type", "ccq_t2", "--effort", "fast", "--device", device)
        assert result.exit_code == 0, result.output
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_the_library_the_command_says_what_to_do(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = CliRunner(env={"CCQ_CUDA_LIBRARY": "/nonexistent/libccq_cuda.so"}).invoke(
        main, ["quantize", str(model), "-o", str(out), "--type", "ccq_t2", "--device", "cuda"]
    )
    assert result.exit_code == 1
    assert re.search(r"`make cuda` builds them.*without --device cuda the CPU encodes the same bytes", result.stderr)
    assert not out.exists()


def test_importing_needs_no_library() -> None:
    code = (
        "import ccq_backend.cuda as c\ntry: c.encode('ccq_t2', [[0.0] * 64])\nexcept c.errors.CudaError as e: print(e)"
    )
    said = run_python(code, CCQ_CUDA_LIBRARY="/nonexistent/libccq_cuda.so")
    assert "`make cuda` builds them" in said.stdout, said.stderr

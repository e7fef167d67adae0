"""Types that others write: decoded as ggml does, quantized again where that is asked for, kept where that is better."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ccq_converters.cli import main
from ccq_converters.evaluate import evaluate
from ccq_converters.options import QuantOptions
from ccq_converters.plan import make_plan
from ccq_converters.quantize import quantize
from ccq_converters.tensors import TensorSource
from ccq_format.errors import CcqError, ShapeError, TensorTypeError
from ccq_format.gguf_io import ModelWriter, open_model
from support.commands import without_calibration

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="runs in llama-cpp-python")
from support.ggml import ggml_dequantize, ggml_quantize  # noqa: E402

ROOT = Path(__file__).parents[1]
LOSSY = sorted(t.name.lower() for t in gguf.quants._type_traits if gguf.GGML_QUANT_SIZES[t][0] > 1
               and not t.name.startswith("CCQ_") and t.name not in ("Q8_0", "MXFP4", "NVFP4"))  # fmt: skip
"""Everything that gguf decodes, but what may be quantized again freely."""


def gaussian(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.05)


def encoded(name: str, x: np.ndarray) -> np.ndarray:
    """Rows of a type: the weights; or, where ggml takes seconds to build tables, any bytes of which no two make an f16
    that is not finite."""
    if not name.startswith("iq"):
        return ggml_quantize(name, x)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    return np.random.default_rng(1).integers(0, 256, (len(x), x.shape[1] // block * size), np.uint8) & np.uint8(0x3B)


def write(path: Path, **tensors: tuple[str, np.ndarray, tuple[int, ...]]) -> Path:
    """A file of tensors in an FFN of layer 0: type, stored rows, shape."""
    with ModelWriter(path, "llama") as out:
        for name, (kind, _, shape) in tensors.items():
            out.add_tensor(f"blk.0.{name}.weight", kind, shape)
        out.begin()
        for name, (_, rows, _) in tensors.items():
            out.write(f"blk.0.{name}.weight", rows)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, without_calibration(args), catch_exceptions=True)


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LOSSY, "q8_0", "mxfp4", "nvfp4"])
def test_decodes_as_ggml_does(tmp_path: Path, name: str) -> None:
    rows = encoded(name, gaussian(4, 512))
    path = write(tmp_path / "a.gguf", ffn_up=(name, rows, (4, 512)))
    expected = ggml_dequantize(name, rows)
    tensor = open_model(path).tensor("blk.0.ffn_up.weight")
    np.testing.assert_array_equal(tensor.dequantize(), expected)
    ok("dequantize", path, "-o", tmp_path / "b.gguf", "--type", "f32")
    np.testing.assert_array_equal(open_model(tmp_path / "b.gguf").tensors[0].dequantize(), expected)
    assert f" {name} " in ok("inspect", path)


@pytest.mark.parametrize(("name", "block_bytes", "block"), [("q1_0", 18, 128), ("q2_0", 18, 64)])
def test_all_bytes_of_the_newest_types(name: str, block_bytes: int, block: int) -> None:
    rows = np.random.default_rng(4).integers(0, 256, (256, block_bytes), dtype=np.uint8)
    scales = rows[:, :2].copy().view("<f2")
    scales[~np.isfinite(scales)] = 1
    rows[:, :2] = scales.view(np.uint8)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert gguf.GGML_QUANT_SIZES[kind] == (block, block_bytes)
    decoded = gguf.quants.dequantize(rows, kind)
    np.testing.assert_array_equal(decoded, ggml_dequantize(name, rows))
    assert np.signbit(decoded).tobytes() == np.signbit(ggml_dequantize(name, rows)).tobytes()
    with pytest.raises(NotImplementedError, match=f"{name} is encoded by llama-quantize"):
        gguf.quants.quantize(np.zeros((1, block), np.float32), kind)


@pytest.mark.parametrize("name", ["q1_0", "q2_0"])
def test_llama_cpp_runs_the_newest_types(tmp_path: Path, name: str) -> None:
    """The installed one does: the file's predictions are those of its decoded weights."""
    from ccq_converters.hf2gguf import convert

    convert(ROOT / "examples" / "manllama-4m", tmp_path / "f16.gguf", QuantOptions("f16"))
    model = open_model(tmp_path / "f16.gguf")
    kinds = {t.name: name if ".ffn_" in t.name and "norm" not in t.name else t.type_name for t in model.tensors}
    with ModelWriter(tmp_path / "q.gguf", model.arch) as out:
        out.copy_metadata(model)
        for tensor in model.tensors:
            out.add_tensor(tensor.name, kinds[tensor.name], tensor.shape)
        out.begin()
        for tensor in model.tensors:
            stored = kinds[tensor.name] != name
            out.write(tensor.name, tensor.data() if stored else ggml_quantize(name, tensor.dequantize()))
    ok("dequantize", tmp_path / "q.gguf", "-o", tmp_path / "f32.gguf", "--type", "f32")
    text = "The quick brown fox jumps over the lazy dog. " * 20
    result = evaluate(tmp_path / "q.gguf", text, base_path=tmp_path / "f32.gguf", n_ctx=64, threads=1, max_windows=2)
    assert result.kld_mean is not None
    assert result.kld_mean < 0.002  # activations are rounded to 8 bits


def test_earlier_meanings_of_ids_are_named(tmp_path: Path) -> None:
    """Files of PrismML's fork that were published before ggml took the ids."""
    path = tmp_path / "a.gguf"
    for kind, shape, nbytes, meaning in (
        ("q2_0", (32, 256), 32 * 2 * 34, "PrismML's Q2_0 with 128 weights per block"),
        ("nvfp4", (4, 256), 4 * 8 * 6, "PrismML's Q1_0 with 32 weights per block"),
    ):
        write(path, ffn_up=(kind, encoded(kind, gaussian(*shape)), shape), ffn_down=("f32", gaussian(1, 256), (1, 256)))
        data = path.read_bytes()
        at = data.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 16 + 4
        end = -(-nbytes // 32) * 32
        start = len(data) - 1024 - int.from_bytes(data[at : at + 8], "little")
        path.write_bytes(data[:at] + end.to_bytes(8, "little") + data[at + 8 : start] + bytes(end) + data[-1024:])
        with pytest.raises(TensorTypeError, match=f"tensor 'blk.0.ffn_up.weight': takes .* {meaning}"):
            open_model(path)
        path.unlink()


def test_types_of_others_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", ffn_up=("q2_0", encoded("q2_0", gaussian(4, 256)), (4, 256)))
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    for number, reason in ((142, "PQ2_0 of PrismML's llama.cpp"), (143, "PTQ1_0"), (99, "unknown type id 99$")):
        path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(TensorTypeError, match=reason):
            open_model(path)


# --- encoding again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "q8_0"])
def test_published_types_are_sources(tmp_path: Path, name: str) -> None:
    rows = encoded(name, gaussian(4, 512))
    path = write(tmp_path / "a.gguf", ffn_up=(name, rows, (4, 512)))
    plain = write(tmp_path / "f32.gguf", ffn_up=("f32", ggml_dequantize(name, rows), (4, 512)))
    for source in (path, plain):
        ok("quantize", source, "-o", source.with_suffix(".out"), "--type", "ccq_t2")
    assert path.with_suffix(".out").read_bytes() == plain.with_suffix(".out").read_bytes()


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_types_need_a_word(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.gguf", ffn_up=(name, encoded(name, gaussian(4, 512)), (4, 512)))
    result = run("quantize", path, "-o", tmp_path / "b.gguf", "--type", "ccq_t1_5")
    assert result.exit_code == 1
    assert f"{path}: tensor 'blk.0.ffn_up.weight': type {name} cannot be quantized again" in result.stderr
    assert "--allow-requantize" in result.stderr
    ok("quantize", path, "-o", tmp_path / "b.gguf", "--type", "ccq_t1_5", "--allow-requantize")
    kept = 8 * np.divide(*gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][::-1]) <= 1.625
    assert open_model(tmp_path / "b.gguf").tensors[0].type_name == (name if kept else "ccq_t1_5")


def test_ccq_files_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", ffn_up=("f32", gaussian(4, 512), (4, 512)))
    ok("quantize", path, "-o", tmp_path / "t3.gguf", "--type", "ccq_t3")
    ok("quantize", tmp_path / "t3.gguf", "-o", tmp_path / "t2.gguf", "--type", "ccq_t2", "--allow-requantize")
    assert open_model(tmp_path / "t2.gguf").tensors[0].type_name == "ccq_t2"


def source(name: str, type_name: str, *shape: int) -> TensorSource:
    rows = lambda start, stop: np.zeros((stop - start, shape[-1]), np.float32)  # noqa: E731
    return TensorSource(name, shape, rows, type_name, lambda start, stop: np.zeros((stop - start, 1), np.uint8))


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        ("ccq_t2", "mxfp4", "ccq_t2"),
        ("q8_0", "mxfp4", "mxfp4"),
        ("q4_0", "mxfp4", "mxfp4"),
        ("q4_0", "q4_k", "q4_k"),
        ("ccq_t3", "ccq_p2", "ccq_p2"),
        ("q8_0", "q6_k", "q6_k"),
        ("f16", "q6_k", "f16"),
        ("q8_0", "f16", "q8_0"),
        ("ccq_t2", "q2_0", "ccq_t2"),
        ("ccq_t2", "q1_0", "q1_0"),
    ],
)
def test_a_smaller_type_is_kept(kind: str, stored: str, expected: str) -> None:
    model = [source("blk.0.ffn_up.weight", stored, 4, 512), source("blk.0.ffn_down.weight", "f32", 4, 512)]
    plan = make_plan(model, QuantOptions(kind))
    assert [t.type for t in plan.tensors] == [expected, kind]
    pinned = make_plan(model, QuantOptions(kind, overrides=[("ffn_up", "q5_0")]))
    assert pinned.tensors[0].type == "q5_0"


def test_a_smaller_type_is_kept_instead_of_a_fallback() -> None:
    """gpt-oss: rows of 2880 weights, which a P type's blocks do not divide."""
    plan = make_plan([source("blk.0.ffn_up.weight", "mxfp4", 4, 2880)], QuantOptions("ccq_p2"))
    assert [t.type for t in plan.tensors] == ["mxfp4"]


def test_the_embedding_of_a_quantized_file_keeps_its_type(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "a.gguf", "llama") as out:
        out.add_tensor("token_embd.weight", "q6_k", (8, 512))
        out.add_tensor("blk.0.ffn_up.weight", "q4_k", (4, 512))
        out.begin()
        out.write("token_embd.weight", encoded("q6_k", gaussian(8, 512)))
        out.write("blk.0.ffn_up.weight", encoded("q4_k", gaussian(4, 512)))
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", QuantOptions("ccq_t2"), allow_requantize=True)
    before, after = open_model(tmp_path / "a.gguf"), open_model(tmp_path / "b.gguf")
    assert [t.type_name for t in after.tensors] == ["q6_k", "ccq_t2"]
    np.testing.assert_array_equal(before.tensors[0].data(), after.tensors[0].data())


# --- tensors without weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0), (2, 0, 32)])
@pytest.mark.parametrize("kind", ["f32", "q8_0", "i32"])
def test_empty_tensors(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    empty = np.zeros(0, np.uint8)
    path = write(
        tmp_path / "a.gguf",
        ffn_gate=(kind, empty, shape),
        ffn_up=("f32", gaussian(4, 512), (4, 512)),
        ffn_down=(kind, empty, shape),
    )
    assert [t.shape for t in open_model(path).tensors] == [shape, (4, 512), shape]
    assert open_model(path).tensors[0].data().size == 0
    assert "3 tensors, 2,048 weights" in ok("inspect", path)
    ok("quantize", path, "-o", tmp_path / "b.gguf", "--type", "ccq_t2", "--resume")
    assert [t.type_name for t in open_model(tmp_path / "b.gguf").tensors] == [kind, "ccq_t2", kind]
    ok("dequantize", tmp_path / "b.gguf", "-o", tmp_path / "c.gguf", "--type", "f32")
    assert [t.shape for t in open_model(tmp_path / "c.gguf").tensors] == [shape, (4, 512), shape]


def test_empty_ccq_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="positive dimensions"):
        write(tmp_path / "a.gguf", ffn_up=("ccq_t2", np.zeros(0, np.uint8), (0, 64)))
    path = write(tmp_path / "a.gguf", ffn_up=("f32", np.zeros(0, np.uint8), (0, 64)))
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    path.write_bytes(data[:at] + (36).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(CcqError, match="empty dimension"):
        open_model(path)

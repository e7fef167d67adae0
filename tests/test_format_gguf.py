"""Writing and reading GGUF files: every type, gguf's own reader, metadata, and files that are never half there."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

import ccq_format
from ccq_format import codec, gguf_io
from ccq_format.errors import (
    BlockError,
    CcqWarning,
    InputError,
    OutputError,
    PlanError,
    ShapeError,
    TensorTypeError,
    TruncatedError,
)
from ccq_format.gguf_io import ModelWriter, open_model
from ccq_format.layouts import LAYOUTS, by_id, by_name

TYPES = [t.name.lower() for t in GGMLQuantizationType]


def random_rows(type_name: str, rows: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Stored bytes, uint8 ``[rows, row_bytes]``, of a tensor with two blocks (or 64 elements) a row; its columns."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    blocks = 2 if block > 1 else 64
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8), blocks * block


def write_every_type(path: Path) -> dict[str, np.ndarray]:
    stored = {}
    with ModelWriter(path, "llama") as out:
        for at, name in enumerate(TYPES):
            data, columns = random_rows(name, 6, seed=at)
            stored[name] = data
            assert out.add_tensor(f"{name}.weight", name.upper(), (3, 2, columns)) == data.nbytes
        out.begin()
        for name, data in stored.items():
            out.write(f"{name}.weight", data[:1])
            out.write(f"{name}.weight", data[1:].reshape(5, 1, -1))
    return stored


def test_types_are_registered_once() -> None:
    before = list(GGMLQuantizationType)
    ccq_format.register()
    ccq_format.register()
    assert list(GGMLQuantizationType) == before
    for layout in LAYOUTS:
        member = GGMLQuantizationType(layout.gguf_id)
        assert member is GGMLQuantizationType[layout.name.upper()]
        assert member is getattr(GGMLQuantizationType, layout.name.upper())
        assert isinstance(member, GGMLQuantizationType)
        assert layout.gguf_id in list(GGMLQuantizationType)
        assert repr(member) == f"<GGMLQuantizationType.{layout.name.upper()}: {layout.gguf_id}>"
        assert GGML_QUANT_SIZES[member] == (layout.block_weights, layout.block_bytes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType.Q8_0] = (32, 36)", "does not know Q8_0"),
        (
            "constants.GGMLQuantizationType._value2member_map_[36] = constants.GGMLQuantizationType.F32",
            "id 36 is already",
        ),
        ("del quants._type_traits", "no codec registry"),
    ],
)
def test_other_gguf_internals_are_refused(damage: str, message: str) -> None:
    code = (
        f"from gguf import constants, quants\n{damage}\n"
        "try:\n import ccq_format\n"
        "except ImportError as error:\n print(type(error).__name__, error)\n"
        "print([t.name for t in constants.GGMLQuantizationType if t.name.startswith('CCQ')])\n"
    )
    root = Path(ccq_format.__file__).resolve().parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.startswith("GgufPackageError the gguf package")
    assert message in run.stdout
    assert "install gguf==0.19.0" in run.stdout
    assert run.stdout.endswith("[]\n")


def test_round_trip_of_every_type(tmp_path: Path) -> None:
    stored = write_every_type(tmp_path / "a.gguf")
    model = open_model(tmp_path / "a.gguf")
    assert [t.name for t in model.tensors] == [f"{name}.weight" for name in TYPES]
    assert model.arch == "llama"
    assert model.spec_version == "0.1"
    assert model.encoder == f"ccq {ccq_format.__version__}"
    weights = nbytes = 0
    for tensor in model.tensors:
        raw = stored[tensor.type_name]
        assert tensor.shape[:2] == (3, 2)
        assert tensor.n_rows == 6
        assert tensor.row_bytes == raw.shape[1]
        np.testing.assert_array_equal(np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8), raw.reshape(-1))
        block, size = GGML_QUANT_SIZES[tensor.ggml_type]
        assert tensor.bpw == 8 * size / block
        ours = tensor.type_name.startswith("ccq_")
        assert (tensor.layout is not None) == ours
        if ours:
            assert tensor.layout is by_name(tensor.type_name)
            assert tensor.bpw == tensor.layout.bpw
        weights += tensor.n_weights
        nbytes += raw.nbytes
    assert model.file_bpw == 8 * nbytes / weights
    assert model.tensor("ccq_t2.weight").data().shape == (3, 2, 34)
    assert model.tensor("f32.weight").data().dtype == np.float32
    assert model.tensor("f16.weight").data().dtype == np.float16
    assert model.tensor("bf16.weight").data().shape == (3, 2, 128)
    assert model.tensor("i64.weight").data().shape == (3, 2, 64)
    with pytest.raises(KeyError):
        model.tensor("nowhere")
    assert not model.tensor("ccq_t2.weight").data().flags.writeable


def test_gguf_reader_lists_our_files(tmp_path: Path) -> None:
    write_every_type(tmp_path / "a.gguf")
    model = open_model(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert len(reader.tensors) == len(model.tensors)
    for theirs, ours in zip(reader.tensors, model.tensors, strict=True):
        assert theirs.name == ours.name
        assert theirs.tensor_type.name.lower() == ours.type_name
        assert tuple(theirs.shape.tolist())[::-1] == ours.shape
        assert theirs.n_bytes == ours.nbytes
        assert theirs.data_offset == ours.offset
        assert theirs.data.shape == ours.data().shape
        np.testing.assert_array_equal(theirs.data.view(np.uint8), ours.data().view(np.uint8))
        if ours.layout is not None:
            decoded = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            assert decoded.shape == ours.shape
            np.testing.assert_array_equal(decoded.view(np.uint32), ours.dequantize().view(np.uint32))
            with pytest.raises(NotImplementedError, match=r"ccq_backend\.encode"):
                gguf.quants.quantize(decoded, theirs.tensor_type)
    assert reader.fields["ccq.spec_version"].contents() == "0.1"
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == set(model.metadata)


def test_dequantize(tmp_path: Path) -> None:
    stored = write_every_type(tmp_path / "a.gguf")
    for tensor in open_model(tmp_path / "a.gguf").tensors:
        kind = tensor.ggml_type
        if tensor.type_name in (floats := {"f32": "<f4", "f16": "<f2", "f64": "<f8"}):
            with np.errstate(all="ignore"):
                expected = stored[tensor.type_name].view(floats[tensor.type_name]).astype(np.float32)
        elif kind in gguf.quants._type_traits:
            with np.errstate(all="ignore"):
                expected = gguf.quants.dequantize(stored[tensor.type_name], kind)
        else:
            with pytest.raises(TensorTypeError, match=f"no decoder for type {tensor.type_name}"):
                tensor.dequantize()
            continue
        whole = tensor.dequantize()
        assert whole.shape == tensor.shape
        np.testing.assert_array_equal(whole.reshape(6, -1), expected)
        parts = list(tensor.rows(max_weights=2 * tensor.columns + 1))
        assert [first for first, _ in parts] == [0, 2, 4]
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), expected)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    write_every_type(tmp_path / "a.gguf")
    write_every_type(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_file_without_ccq_tensors_has_no_ccq_keys(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "a.gguf", "llama") as out:
        out.add_tensor("a", "f32", (4,))
        out.begin()
        out.write("a", np.arange(4, dtype=np.float32))
    model = open_model(tmp_path / "a.gguf")
    assert model.metadata == {"general.architecture": "llama"}
    assert model.spec_version is None
    np.testing.assert_array_equal(model.tensor("a").data(), np.arange(4, dtype=np.float32))


def test_warning_without_spec_version(tmp_path: Path) -> None:
    data, columns = random_rows("ccq_t2", 2)
    out = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    out.add_tensor("a", data, raw_dtype=GGMLQuantizationType(36))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.warns(CcqWarning, match=r"a\.gguf: has CCQ tensors but no ccq\.spec_version"):
        model = open_model(tmp_path / "a.gguf")
    assert model.tensors[0].shape == (2, columns)
    np.testing.assert_array_equal(model.tensors[0].dequantize(), codec.decode(by_id(36), data))


def test_empty_features_are_allowed(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "a.gguf", "llama") as out:
        out.gguf.add_key_value("ccq.features", [], GGUFValueType.ARRAY, GGUFValueType.STRING)
    assert open_model(tmp_path / "a.gguf").metadata["ccq.features"] == []


def test_check_blocks_names_file_tensor_and_block(tmp_path: Path) -> None:
    layout = by_name("ccq_p2_5")
    data = np.zeros((4, 3 * layout.block_bytes), dtype=np.uint8)
    data[2, layout.block_bytes : layout.block_bytes + 2] = 0xFF
    with ModelWriter(tmp_path / "a.gguf", "llama") as out:
        out.add_tensor("fine", "ccq_p2_5", (1, 768))
        out.add_tensor("broken", "ccq_p2_5", (4, 768))
        out.begin()
        out.write("fine", data[:1])
        out.write("broken", data)
    model = open_model(tmp_path / "a.gguf")
    model.tensor("fine").check_blocks()
    with pytest.raises(BlockError, match=r"a\.gguf: tensor 'broken': super_scale of block 7 is not finite"):
        model.tensor("broken").check_blocks()


# --- metadata ---------------------------------------------------------------------------------------------------------

VALUES = {
    GGUFValueType.UINT8: [0, 255],
    GGUFValueType.INT8: [-128, 127],
    GGUFValueType.UINT16: [0, 65535],
    GGUFValueType.INT16: [-32768, 32767],
    GGUFValueType.UINT32: [0, 2**32 - 1],
    GGUFValueType.INT32: [-(2**31), 2**31 - 1],
    GGUFValueType.FLOAT32: [0.10000000149011612, float("-inf")],
    GGUFValueType.BOOL: [True, False],
    GGUFValueType.STRING: ["", "naïve \U0001f600 \0 end"],
    GGUFValueType.UINT64: [0, 2**64 - 1],
    GGUFValueType.INT64: [-(2**63), 2**63 - 1],
    GGUFValueType.FLOAT64: [0.1, -0.0],
}


def test_metadata_is_copied_byte_for_byte(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    with ModelWriter(first, "llama") as out:
        for kind, values in VALUES.items():
            name = kind.name.lower()
            out.gguf.add_key_value(f"x.{name}", values[1], kind)
            out.gguf.add_key_value(f"x.{name}s", values, GGUFValueType.ARRAY, kind)
            out.gguf.add_key_value(f"x.no_{name}s", [], GGUFValueType.ARRAY, kind)
        out.gguf.add_custom_alignment(128)
        out.add_tensor("a", "f32", (3, 8))
        out.begin()
        out.write("a", np.ones((3, 8), np.float32))
    model = open_model(first)
    for kind, values in VALUES.items():
        name = kind.name.lower()
        assert model.metadata[f"x.{name}"] == values[1]
        assert type(model.metadata[f"x.{name}"]) is type(values[1])
        assert model.metadata[f"x.{name}s"] == values
        assert model.metadata[f"x.no_{name}s"] == []
        assert model.fields[f"x.{name}s"].sub_type is kind
    assert model.alignment == 128
    assert model.tensors[0].offset % 128 == 0
    with ModelWriter(second, "other") as out:
        out.gguf.add_string("x.string", "is replaced")
        out.copy_metadata(model)
        out.add_tensor("a", "f32", (3, 8))
        out.begin()
        out.write("a", model.tensors[0].data())
    assert second.read_bytes() == first.read_bytes()
    reader = gguf.GGUFReader(first)
    assert reader.fields["x.string"].contents() == VALUES[GGUFValueType.STRING][1]
    assert reader.fields["x.int64s"].contents() == VALUES[GGUFValueType.INT64]


def test_copied_metadata_leaves_ccq_keys_behind(tmp_path: Path) -> None:
    write_every_type(tmp_path / "a.gguf")
    model = open_model(tmp_path / "a.gguf")
    with ModelWriter(tmp_path / "b.gguf", model.arch) as out:
        out.copy_metadata(model)
    assert open_model(tmp_path / "b.gguf").metadata == {"general.architecture": "llama"}
    with ModelWriter(tmp_path / "c.gguf", model.arch, encoder="other 1") as out:
        out.copy_metadata(model)
        out.add_tensor("a", "ccq_t3", (1, 64))
        out.begin()
        out.write("a", np.zeros((1, 25), np.uint8))
    assert open_model(tmp_path / "c.gguf").encoder == "other 1"


# --- the writer's promises --------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["declaring", "writing", "complete"])
def test_interrupted_leaves_no_file(tmp_path: Path, error: type[BaseException], when: str) -> None:
    (tmp_path / "old.gguf").write_bytes(b"old")

    def interrupted(path: Path, overwrite: bool) -> None:
        with ModelWriter(path, "llama", overwrite=overwrite) as out:
            out.add_tensor("a", "ccq_t2", (4, 64))
            if when == "declaring":
                raise error
            out.begin()
            out.write("a", np.zeros((2, 17), np.uint8))
            if when == "writing":
                raise error
            out.write("a", np.zeros((2, 17), np.uint8))
            raise error

    with pytest.raises(error):
        interrupted(tmp_path / "new.gguf", False)
    with pytest.raises(error):
        interrupted(tmp_path / "old.gguf", True)
    assert names(tmp_path) == ["old.gguf"]
    assert (tmp_path / "old.gguf").read_bytes() == b"old"


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with ModelWriter(path, "llama") as out:
        assert names(tmp_path) == []
        out.add_tensor("a", "ccq_t2", (4, 64))
        out.begin()
        out.write("a", np.zeros((4, 17), np.uint8))
        assert names(tmp_path) == []  # the file has no name yet
    assert names(tmp_path) == ["a.gguf"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_incomplete_tensor_is_refused(tmp_path: Path) -> None:
    out = ModelWriter(tmp_path / "a.gguf", "llama")
    out.add_tensor("a", "ccq_t2", (4, 64))
    out.begin()
    out.write("a", np.zeros((3, 17), np.uint8))
    with pytest.raises(ValueError, match="tensor 'a' is incomplete"):
        out.close()
    assert names(tmp_path) == []


def test_misuse_is_refused(tmp_path: Path) -> None:
    out = ModelWriter(tmp_path / "a.gguf", "llama")
    with pytest.raises(ValueError, match="needs begin"):
        out.write("a", np.zeros(4, np.float32))
    out.add_tensor("a", "f32", (2, 4))
    out.add_tensor("b", "bf16", (4,))
    for name in ("a", "", "n" * 64):
        with pytest.raises(ValueError, match="used twice, empty, or longer"):
            out.add_tensor(name, "f32", (4,))
    with pytest.raises(PlanError, match=r"a\.gguf: tensor 'c': unknown tensor type 'ccq_t9'"):
        out.add_tensor("c", "ccq_t9", (4,))
    with pytest.raises(ShapeError, match="row length 96 is no multiple of 64, the block of ccq_t2"):
        out.add_tensor("c", "CCQ_T2", (64, 96))
    for shape in ((), (0, 64), (1, 1, 1, 1, 64)):
        with pytest.raises(ShapeError, match="1 to 4 positive dimensions"):
            out.add_tensor("c", "ccq_t2", shape)
    out.begin()
    with pytest.raises(ValueError, match="called already"):
        out.begin()
    with pytest.raises(ValueError, match="before begin"):
        out.add_tensor("c", "f32", (4,))
    with pytest.raises(ValueError, match="'b' is out of order: expected 'a'"):
        out.write("b", np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="data of type float64 for a tensor of type f32"):
        out.write("a", np.zeros((2, 4)))
    with pytest.raises(ValueError, match="36 bytes written, it has 32"):
        out.write("a", np.zeros(9, np.float32))
    out.write("a", np.ones((4, 2), np.float32).T)
    out.write("b", np.full(4, 0x3F80, np.uint16))
    with pytest.raises(ValueError, match="expected None"):
        out.write("b", np.zeros(4, np.uint16))
    out.close()
    out.close()
    out.abort()
    model = open_model(tmp_path / "a.gguf")
    assert model.tensor("b").dequantize().tolist() == [1, 1, 1, 1]


def test_targets_are_checked(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"old\.gguf: exists already"):
        ModelWriter(tmp_path / "old.gguf", "llama")
    with pytest.raises(OutputError, match="its folder does not exist"):
        ModelWriter(tmp_path / "no" / "a.gguf", "llama")
    with pytest.raises(OutputError, match="is a folder"):
        ModelWriter(tmp_path, "llama", overwrite=True)
    with ModelWriter(tmp_path / "old.gguf", "llama", overwrite=True):
        pass
    assert open_model(tmp_path / "old.gguf").tensors == []
    out = ModelWriter(tmp_path / "late.gguf", "llama")
    (tmp_path / "late.gguf").write_bytes(b"someone else's")
    with pytest.raises(OutputError, match="exists already"):
        out.close()
    assert (tmp_path / "late.gguf").read_bytes() == b"someone else's"
    assert names(tmp_path) == ["late.gguf", "old.gguf"]


def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    """32 MiB of tensors in chunks of 256 KiB: writing and reading them stay below 4 MiB."""
    chunk = np.random.default_rng(0).integers(0, 256, (256, 1088 - 1088 % 17), dtype=np.uint8)
    tracemalloc.start()
    try:
        with ModelWriter(tmp_path / "a.gguf", "llama") as out:
            out.add_tensor("a", "ccq_t2", (128 * 256, 64 * 64))
            out.begin()
            for _ in range(128):
                out.write("a", chunk)
        model = open_model(tmp_path / "a.gguf")
        for _, part in model.tensor("a").rows(max_weights=1 << 16):
            assert part.shape == (16, 64 * 64)
            break
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(model.tensor("a").data()[-256:], chunk)


# --- input that is no file --------------------------------------------------------------------------------------------


def test_unreadable_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf: No such file"):
        open_model(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="no regular file"):
        open_model(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):  # and does not wait for a writer
        open_model(tmp_path / "pipe")
    with pytest.raises(InputError, match="null"):
        open_model("a\0b")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    write_every_type(tmp_path / "a.gguf")
    model = open_model(tmp_path / "a.gguf")
    os.truncate(tmp_path / "a.gguf", model.tensors[-1].offset)
    with pytest.raises(TruncatedError, match="has become shorter"):
        model.tensors[-1].data()


def test_version_2_is_read(tmp_path: Path) -> None:
    stored = write_every_type(tmp_path / "a.gguf")
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[4] = 2
    (tmp_path / "b.gguf").write_bytes(data)
    np.testing.assert_array_equal(
        open_model(tmp_path / "b.gguf").tensor("ccq_t3.weight").data().reshape(6, -1), stored["ccq_t3"]
    )


def test_padding_after_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "a.gguf", "llama") as out:
        out.add_tensor("a", "ccq_t2", (1, 64))
        out.begin()
        out.write("a", np.zeros((1, 17), np.uint8))
    size = (tmp_path / "a.gguf").stat().st_size
    os.truncate(tmp_path / "a.gguf", size - 15)
    assert open_model(tmp_path / "a.gguf").tensor("a").nbytes == 17
    os.truncate(tmp_path / "a.gguf", size - 16)
    with pytest.raises(TruncatedError, match="tensor 'a'"):
        gguf_io.open_model(tmp_path / "a.gguf")

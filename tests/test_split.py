"""Models in several files: read, written, resumed, and run in a stock llama.cpp."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ccq_converters import hf2gguf, stream
from ccq_converters.cli import main
from ccq_converters.options import QuantOptions
from ccq_format.errors import CcqError, HeaderError, InputError
from ccq_format.gguf_io import ModelWriter, SplitWriter, open_model, part_path
from ccq_format.output import OutputFile

EXAMPLE = Path(__file__).parents[1] / "examples" / "manllama-4m"
LIMIT = 1_500_000


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=True)


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "f16.gguf"
    hf2gguf.convert(EXAMPLE, path, QuantOptions("f16"))
    return path


@pytest.fixture(scope="module")
def files(f16: Path) -> tuple[Path, list[Path]]:
    """The model, in part CCQ_T2, as one file, and as the parts of which the first is given."""
    options: dict[str, Any] = {"type": "q8_0", "overrides": [(r"attn_[kv]|3\.attn_q", "ccq_t2")], "effort": "fast"}
    from ccq_converters.quantize import quantize

    quantize(f16, f16.with_name("t2.gguf"), QuantOptions(**options))
    quantize(f16, f16.with_name("many.gguf"), QuantOptions(**options, split_max_size=LIMIT))
    return f16.with_name("t2.gguf"), sorted(f16.parent.glob("many-*.gguf"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing --------------------------------------------------------------------------------------------------------


def test_parts_are_what_llama_gguf_split_writes(files: tuple[Path, list[Path]]) -> None:
    one, parts = files
    whole, count = open_model(one), len(parts)
    assert count > 2
    assert [p.name for p in parts] == [f"many-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    seen: list[str] = []
    for number, path in enumerate(parts):
        assert path.stat().st_size <= LIMIT
        reader = gguf.GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items()}
        said = [(values[k], reader.fields[k].types[0].name) for k in ("split.no", "split.count", "split.tensors.count")]
        assert said == [(number, "UINT16"), (count, "UINT16"), (len(whole.tensors), "INT32")]
        assert ("tokenizer.ggml.tokens" in values) == (number == 0)
        assert values["ccq.spec_version"] == whole.spec_version
        seen += [t.name for t in reader.tensors]
    assert seen == [t.name for t in whole.tensors]
    first = open_model(parts[0])
    assert {k: v for k, v in first.metadata.items() if not k.startswith("split.")} == whole.metadata


def test_a_model_that_fits_is_one_file_and_a_large_tensor_has_its_own(tmp_path: Path) -> None:
    for limit, expected in ((10**6, ["o.gguf"]), (4500, [f"o-0000{i}-of-00003.gguf" for i in (1, 2, 3)])):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with SplitWriter(folder / "o.gguf", "llama", limit) as out:
            for i, rows in enumerate((1, 2, 12, 1, 1)):
                out.add_tensor(f"t{i}", "f32", (rows, 256))
            out.begin()
            for i, rows in enumerate((1, 2, 12, 1, 1)):
                out.write(f"t{i}", np.full((rows, 256), i, np.float32))
        assert names(folder) == expected
        model = open_model(folder / names(folder)[0])
        assert [t.dequantize()[0, 0] for t in model.tensors] == [0, 1, 2, 3, 4]


def test_the_alignment_is_that_of_the_source(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "a.gguf", "llama") as out:
        out.gguf.add_custom_alignment(256)
        for i in range(4):
            out.add_tensor(f"t{i}", "f32", (3, 33))
        out.begin()
        for i in range(4):
            out.write(f"t{i}", np.full((3, 33), i, np.float32))
    model = open_model(tmp_path / "a.gguf")
    with SplitWriter(tmp_path / "b.gguf", "llama", 2000) as split:
        split.copy_metadata(model)
        for tensor in model.tensors:
            split.add_tensor(tensor.name, "f32", tensor.shape)
        split.begin()
        for tensor in model.tensors:
            split.write(tensor.name, tensor.dequantize())
    parts = sorted(tmp_path.glob("b-*.gguf"))
    assert len(parts) > 1
    assert {gguf.GGUFReader(path).alignment for path in parts} == {256}
    assert [t.dequantize()[2, 32] for t in open_model(parts[0]).tensors] == [0, 1, 2, 3]


def test_nothing_appears_before_all_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(value: int, fail: bool = False) -> None:
        with SplitWriter(tmp_path / "o.gguf", "llama", 2000, overwrite=True) as out:
            for i in range(4):
                out.add_tensor(f"t{i}", "f32", (1, 256))
            out.begin()
            for i in range(1 if fail else 4):
                out.write(f"t{i}", np.full((1, 256), value, np.float32))

    with pytest.raises(ValueError, match="'t1' is incomplete"):
        write(1, fail=True)
    assert names(tmp_path) == []
    write(1)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(old) == 4
    with pytest.raises(ValueError, match="incomplete"):
        write(2, fail=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    # The first file, which is published last, gets no name: no mixture of old and new files can be opened.
    publish = OutputFile.publish

    def refuse(self: OutputFile) -> None:
        if self.path.name.startswith("o-00001"):
            raise OSError(5, "Input/output error")
        publish(self)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "publish", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            write(3)
    assert names(tmp_path) == []
    write(4)
    assert open_model(part_path(tmp_path / "o.gguf", 0, 4)).tensor("t3").dequantize()[0, 0] == 4


def test_existing_parts_are_kept(f16: Path, tmp_path: Path) -> None:
    ok("quantize", f16, "-o", tmp_path / "o.gguf", "--type", "q8_0", "--split-max-size", "3M")
    before = names(tmp_path)
    assert len(before) == 2
    for part in before:
        for other in before:
            (tmp_path / other).write_text("precious")
            if other != part:
                (tmp_path / other).unlink()
        result = run("quantize", f16, "-o", tmp_path / "o.gguf", "--type", "q8_0", "--split-max-size", "3M")
        assert result.exit_code == 1
        assert "exists already" in result.stderr
        assert names(tmp_path) == [part]


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 20, 37])
def test_an_interrupted_set_goes_on(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    command = ["quantize", f16, "--type", "q8_0", "--split-max-size", "1.5M", "-o"]
    plain, seen = stream.encoded_rows, []

    def encoded_rows(tensor: Any, *more: Any) -> Iterator[Any]:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(tensor.source.name)
        yield from plain(tensor, *more)

    ok(*command, tmp_path / "o.gguf")
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("o-*.gguf")}
    assert len(expected) == 4
    (tmp_path / "again").mkdir()
    command = [*command, tmp_path / "again" / "o.gguf", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(stream, "encoded_rows", encoded_rows)
        result = run(*command)
    assert result.exit_code == 130
    assert f"{stop} of {len(open_model(f16).tensors)} tensors are kept" in result.stderr
    assert all(name.startswith(".o-") for name in names(tmp_path / "again"))
    done, seen, stop = seen, [], -1
    monkeypatch.setattr(stream, "encoded_rows", encoded_rows)
    ok(*command)
    assert not set(done) & set(seen)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == expected


# --- reading --------------------------------------------------------------------------------------------------------


def test_commands_take_the_first_part(files: tuple[Path, list[Path]], tmp_path: Path) -> None:
    one, parts = files
    report = json.loads(ok("inspect", parts[0], "--json"))
    assert report["tensors"] == json.loads(ok("inspect", one, "--json"))["tensors"]
    assert report["files"] == [str(path) for path in parts]
    assert f", {len(parts)} files" in ok("inspect", parts[0])
    for source, out in ((one, "a.gguf"), (parts[0], "b.gguf")):
        ok("dequantize", source, "-o", tmp_path / out, "--type", "f16")
        ok("quantize", tmp_path / out, "-o", tmp_path / f"q-{out}", "--type", "q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    ok("dequantize", one, "-o", tmp_path / "c.gguf", "--type", "f16", "--split-max-size", "3M")
    ok("quantize", part_path(tmp_path / "c.gguf", 0, 3), "-o", tmp_path / "q-c.gguf", "--type", "q8_0")
    assert (tmp_path / "q-a.gguf").read_bytes() == (tmp_path / "q-c.gguf").read_bytes()
    line = run("quantize", parts[0], "-o", parts[1], "--type", "f32", "--overwrite").stderr
    assert "same file" in line


def test_files_of_ggufs_own_writer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 32), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_model(tmp_path / "x-00001-of-00003.gguf")
    assert [t.dequantize()[1, 31] for t in model.tensors] == [0, 1, 2, 3, 4]
    assert [Path(t.file).name[2:7] for t in model.tensors] == ["00001", "00001", "00002", "00002", "00003"]


def small(folder: Path) -> list[Path]:
    """Three parts of a tensor each."""
    with SplitWriter(folder / "o.gguf", "llama", 1000) as out:
        for i in range(3):
            out.add_tensor(f"t{i}", "f32", (1, 256))
        out.begin()
        for i in range(3):
            out.write(f"t{i}", np.zeros((1, 256), np.float32))
    return sorted(folder.iterdir())


def patched(path: Path, key: str, value: int) -> None:
    """Change one of the integers of a part."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    fmt = "<i" if key.endswith("tensors.count") else "<H"
    struct.pack_into(fmt, data, at, value)
    path.write_bytes(data)


def test_what_is_refused(tmp_path: Path) -> None:
    parts = small(tmp_path)

    def refused(kind: type[CcqError], reason: str, path: Path = parts[0]) -> None:
        with pytest.raises(kind, match=reason):
            open_model(path)

    good = [path.read_bytes() for path in parts]
    refused(HeaderError, "part 2 of 3: give the first one, o-00001-of-00003.gguf", parts[1])
    parts[2].unlink()
    refused(InputError, "o-00003-of-00003.gguf: part 3 of 3 is missing")
    parts[2].write_bytes(good[1])
    refused(HeaderError, "part 1 of 3")
    parts[2].write_bytes(good[2])
    patched(parts[2], "split.count", 4)
    refused(HeaderError, "part 2 of 4")
    parts[2].write_bytes(good[2].replace(b"t2", b"t1"))
    refused(HeaderError, "tensor 't1': is in .*o-00002-of-00003.gguf as well")
    parts[2].write_bytes(good[2][:-64])
    refused(CcqError, "o-00003-of-00003.gguf: tensor 't2'")
    parts[2].write_bytes(good[2])
    patched(parts[0], "split.tensors.count", 4)
    refused(HeaderError, "announces 4 tensors; its 3 parts have 3")
    parts[0].write_bytes(good[0])
    (tmp_path / "other.gguf").write_bytes(good[0])
    refused(HeaderError, "the others cannot be found", tmp_path / "other.gguf")
    patched(parts[0], "split.no", 7)
    refused(HeaderError, "part 7 of 3")


# --- running --------------------------------------------------------------------------------------------------------


def test_llama_cpp_runs_the_parts_like_the_one_file(files: tuple[Path, list[Path]]) -> None:
    pytest.importorskip("llama_cpp", reason="runs in llama-cpp-python")
    from ccq_converters.evaluate import evaluate

    text = "It is a well-known fact that a file may be split. " * 40
    results = [evaluate(path, text, n_ctx=64, threads=1, max_windows=2) for path in (files[0], files[1][0])]
    assert results[0] == results[1]


def test_calibration_takes_the_first_part(files: tuple[Path, list[Path]], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="runs in llama-cpp-python")
    (tmp_path / "t.txt").write_text("It is a well-known fact that a file may be split. " * 40)
    for source, out in ((files[0], "a.gguf"), (files[1][0], "b.gguf")):
        ok("calibrate", source, "--text", tmp_path / "t.txt", "-o", tmp_path / out, "--ctx", 64, "--chunks", 2)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()

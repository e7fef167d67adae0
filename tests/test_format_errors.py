"""Malformed files: each is refused for its own reason, whatever bytes change nothing but ``CcqError`` comes out, and
no header makes the reader allocate."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ccq_format import errors
from ccq_format.errors import CcqError, CcqWarning, HeaderError
from ccq_format.gguf_io import ModelWriter, open_model
from ccq_format.layouts import LAYOUTS

INVALID = Path(__file__).resolve().parent.parent / "spec" / "vectors" / "invalid"
INDEX: dict[str, dict[str, str]] = json.loads((INVALID / "index.json").read_text())


def test_vectors_are_up_to_date() -> None:
    run = subprocess.run([sys.executable, INVALID / "make_invalid.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_vectors_cover_every_format_error() -> None:
    in_header = {
        cls.__name__ for cls in errors.FormatError.__subclasses__() if cls is not errors.BlockError
    }  # BlockError is about tensor data
    assert {case["error"] for case in INDEX.values()} == in_header
    assert all((INVALID / name).stat().st_size < 4096 for name in INDEX)
    assert {path.name for path in INVALID.glob("*.gguf")} == set(INDEX)


@pytest.mark.parametrize("name", INDEX)
def test_malformed_file(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CcqError) as caught:
            open_model(INVALID / name)
    assert type(caught.value).__name__ == INDEX[name]["error"]
    assert INDEX[name]["message"] in str(caught.value)
    assert caught.value.file == str(INVALID / name)
    assert str(caught.value).startswith(str(INVALID / name) + ": ")
    assert len(caught.value.reason) < 300


def test_messages_are_fit_for_a_terminal() -> None:
    """Names and values come from files: no escape sequence, no second line, no megabytes."""
    error = CcqError("holds '\x1b[31m' and \ud800,\nand more: " + "\x07" * 10**6, file="f\r", tensor="a\nb" + "x" * 999)
    lines = str(error).split("\n")
    assert [line.isprintable() for line in lines] == [True, True]
    assert lines[0].startswith("f\\r: tensor 'a\\nbxxx")
    assert lines[0].endswith("... (1002 characters)': holds '\\x1b[31m' and \\ud800,")
    assert len(str(error)) < 1500
    assert lines[1].endswith(f"... ({len(error.reason)} characters)")
    assert error.reason.endswith("\x07"), "what programs see is as it is"
    assert errors.readable("blk.0 größe 🦙") == "blk.0 größe 🦙"


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def valid_file(path: Path) -> bytes:
    """A small file with metadata of many kinds, every CCQ type, and f32, f16, bf16 and q8_0 tensors."""
    rng = np.random.default_rng(0)
    with ModelWriter(path, "llama") as out:
        out.gguf.add_name("fuzz")
        out.gguf.add_context_length(256)
        out.gguf.add_custom_alignment(32)
        out.gguf.add_token_list(["a", "bé", "", "\U0001f600"])
        out.gguf.add_token_scores([0.0, -1.5, 2.0, 3.0])
        out.gguf.add_array("x.flags", [True, False])
        out.gguf.add_array("x.numbers", [1, -2, 3])
        shapes = [(layout.name, (2, layout.block_weights), 2 * layout.block_bytes) for layout in LAYOUTS]
        shapes += [("f32", (8,), 32), ("f16", (2, 8), 32), ("bf16", (4, 4), 32), ("q8_0", (2, 64), 136)]
        for at, (kind, shape, _) in enumerate(shapes):
            out.add_tensor(f"t.{at}", kind, shape)
        out.begin()
        for at, (_, _, nbytes) in enumerate(shapes):
            out.write(f"t.{at}", rng.integers(0, 256, nbytes, dtype=np.uint8))
    return path.read_bytes()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder / "mutated.gguf", valid_file(folder / "valid.gguf")


def read_all(path: Path) -> str:
    """Open, check and decode a file; ``CcqError`` may come out, and nothing else.  Returns what happened."""
    caught: CcqError | None = None
    tensor = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CcqWarning)
        try:
            for tensor in open_model(path).tensors:
                tensor.check_blocks()
                for _, part in tensor.rows():
                    assert part.dtype == np.float32
        except CcqError as error:
            caught = error
    if caught is None:
        return "read"
    assert caught.file == str(path)
    assert caught.reason
    assert tensor is None or caught.tensor == tensor.name
    return type(caught).__name__


BOUNDARIES = sorted(
    {
        v + d
        for v in (0, 2**7, 2**8, 2**15, 2**16, 2**20, 2**23, 2**26, 2**31, 2**32, 2**40, 2**62, 2**63)
        for d in (-1, 0, 1)
    }
    - {-1}
    | {4, 5, 31, 32, 33, 36, 37, 38, 2**64 - 1, 2**64 - 32}
)
mutations = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, 2**16), st.integers(0, 255)),
        st.tuples(st.just("flip"), st.integers(0, 2**16), st.integers(0, 7)),
        st.tuples(st.just("u32"), st.integers(0, 2**16), st.sampled_from(BOUNDARIES)),
        st.tuples(st.just("u64"), st.integers(0, 2**16), st.sampled_from(BOUNDARIES)),
        st.tuples(st.just("cut"), st.integers(0, 2**16), st.integers(0, 64)),
        st.tuples(st.just("insert"), st.integers(0, 2**16), st.integers(0, 64)),
        st.tuples(st.just("end"), st.integers(0, 2**16), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, changes: list[tuple[str, int, int]], header: int) -> bytes:
    """Apply changes; positions wrap around the header (where nearly all decisions are) except for 'end'."""
    out = bytearray(data)
    for what, where, value in changes:
        at = where % max(1, min(header, len(out)))
        if what == "byte":
            out[at : at + 1] = bytes([value])
        elif what == "flip" and at < len(out):
            out[at] ^= 1 << value
        elif what == "u32":
            out[at : at + 4] = struct.pack("<I", value % 2**32)
        elif what == "u64":
            out[at : at + 8] = struct.pack("<Q", value % 2**64)
        elif what == "cut":
            del out[at : at + value]
        elif what == "insert":
            out[at:at] = bytes(range(value))
        elif what == "end":
            del out[where % (len(out) + 1) :]
    return bytes(out)


@settings(max_examples=1500, deadline=None)
@given(changes=mutations)
@example(changes=[("u64", 8, 2**63)])
@example(changes=[("u64", 16, 2**64 - 1)])
def test_mutated_files(valid: tuple[Path, bytes], changes: list[tuple[str, int, int]]) -> None:
    path, data = valid
    path.write_bytes(mutate(data, changes, header_bytes(data)))
    read_all(path)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=mutations)
def test_mutated_files_at_length(valid: tuple[Path, bytes], changes: list[tuple[str, int, int]]) -> None:
    path, data = valid
    path.write_bytes(mutate(data, changes, header_bytes(data)))
    read_all(path)


def header_bytes(data: bytes) -> int:
    """Where the last tensor entry ends: behind the name of the last tensor, by 4 + 8 or 16 + 4 + 8 bytes."""
    return data.index(b"t.10") + 4 + 4 + 16 + 4 + 8


@pytest.mark.filterwarnings("ignore::ccq_format.errors.CcqWarning")
@pytest.mark.parametrize(("width", "values"), [(4, (33, 2**31)), (8, (2**23, 2**64 - 8))])
def test_every_header_position(valid: tuple[Path, bytes], width: int, values: tuple[int, ...]) -> None:
    """All header positions, overwritten by the values that counts and lengths break at; memory stays small."""
    path, data = valid
    outcomes = set()
    tracemalloc.start()
    try:
        for at in range(header_bytes(data)):
            for value in values:
                path.write_bytes(data[:at] + value.to_bytes(width, "little") + data[at + width :])
                try:
                    open_model(path)
                    outcomes.add("read")
                except CcqError as error:
                    outcomes.add(type(error).__name__)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    # The positions are varied enough to matter: most of the reader's reasons have come up.
    assert {"read", "NotGgufError", "GgufVersionError", "TruncatedError", "HeaderError", "ShapeError"} <= outcomes
    assert {"TensorTypeError", "AlignmentError"} <= outcomes


@settings(max_examples=300, deadline=None)
@given(tail=st.binary(max_size=300), version=st.sampled_from([2, 3]), counts=st.tuples(*[st.integers(0, 4)] * 2))
def test_random_bytes_behind_a_good_start(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, version: int, counts: tuple[int, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "tail.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, *counts) + tail)
    read_all(path)


def test_huge_sparse_file_costs_no_memory(tmp_path: Path) -> None:
    """A file as large as its header claims must not make the reader allocate what the header claims."""
    key = struct.pack("<Q", 1) + b"a"
    cases = {
        "string": key + struct.pack("<IQ", 8, 2**35),
        "array": key + struct.pack("<IIQ", 9, 0, 2**34),
        "strings": key + struct.pack("<IIQ", 9, 8, 2**31),
        "element": key + struct.pack("<IIQQ", 9, 8, 2, 2**35),
        "key": struct.pack("<Q", 2**35),
    }
    tracemalloc.start()
    try:
        for name, body in cases.items():
            path = tmp_path / name
            path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + body)
            with open(path, "r+b") as stream:
                stream.truncate(2**36)  # sparse: takes no disk
            with pytest.raises(HeaderError, match=r"limit|elements"):
                open_model(path)
            path.unlink()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_tensor_larger_than_memory_is_only_mapped(tmp_path: Path) -> None:
    """64 GiB of zeros, sparse: opening and decoding some rows needs no more than those rows."""
    path = tmp_path / "big.gguf"
    entry = struct.pack("<Q", 1) + b"a" + struct.pack("<I2QIQ", 2, 2**12, 2**25, 36, 0)
    version = struct.pack("<Q", 16) + b"ccq.spec_version" + struct.pack("<IQ", 8, 3) + b"0.1"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + version + entry
    path.write_bytes(head)
    with open(path, "r+b") as stream:
        stream.truncate(-(-len(head) // 32) * 32 + 2**37 // 64 * 17)
    tracemalloc.start()
    try:
        tensor = open_model(path).tensor("a")
        first, part = next(tensor.rows(max_weights=1 << 16))
        assert (first, part.shape) == (0, (16, 2**12))
        assert not part.any()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()

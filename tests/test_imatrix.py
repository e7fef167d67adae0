"""Importance files in both forms, what is refused, and ``--imatrix``."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ccq_converters import imatrix
from ccq_converters.cli import main
from ccq_converters.encode import encode_rows
from ccq_format.errors import CcqError, FormatError, ImportanceError, InputError
from ccq_format.gguf_io import ModelWriter, open_model
from support.commands import without_calibration

from .test_converters_cli import write_gguf

DATA = Path(__file__).parent / "data"
"""``llama-imatrix -m manllama-4m-f16.gguf -f heldout.txt -c 128 -b 128 --chunks 8``, in both output formats."""

ROW = 512
DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
N_EXPERTS = 4
TENSOR_TYPES = gguf.GGMLQuantizationType


def sums_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.5, 100.0, (rows, ROW)).clip(0.01).astype(np.float32)


def write_imatrix(path: Path, tensors: dict[str, np.ndarray], **keys: object) -> Path:
    """A file by gguf's own writer; tensors exactly as given, ``keys`` replace the usual ones (``None``: left out)."""
    writer = gguf.GGUFWriter(path, "")
    kv: dict[str, object] = {"datasets": ["some.txt"], "chunk_count": 3, "chunk_size": 512, **keys}
    writer.add_string("general.type", "imatrix")
    for key, value in kv.items():
        if isinstance(value, list):
            writer.add_array(f"imatrix.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"imatrix.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"imatrix.{key}", value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def usual(counts: tuple[float, ...] = (900.0, 500.0, 7.0, 0.0)) -> dict[str, np.ndarray]:
    expert_sums = sums_of(N_EXPERTS, 1)
    expert_sums[np.array(counts) == 0] = 0
    return {
        f"{DENSE}.in_sum2": sums_of(1)[0],
        f"{DENSE}.counts": np.array([1536], np.float32),
        f"{EXPERTS}.in_sum2": expert_sums,
        f"{EXPERTS}.counts": np.array(counts, np.float32)[:, None],
    }


def binary(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += struct.pack("<i", len(name.encode())) + name.encode()
        out += struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes()
    return out + tail


# --- reading --------------------------------------------------------------------------------------------------------


def test_llama_cpps_own_files() -> None:
    """Both forms of one run: equal means, and the GGUF form's raw values as gguf's reader sees them."""
    new, old = (imatrix.load(DATA / f"manllama-4m.imatrix.{kind}") for kind in ("gguf", "dat"))
    raw = {t.name: t.data for t in gguf.GGUFReader(DATA / "manllama-4m.imatrix.gguf").tensors}
    assert set(new.entries) == set(old.entries)
    assert len(new.entries) == 28
    assert new.datasets == old.datasets == ["heldout.txt"]
    assert (new.chunk_count, new.chunk_size, old.chunk_count) == (8, 128, 8)
    for name, entry in new.entries.items():
        expected = raw[f"{name}.in_sum2"].reshape(-1) / raw[f"{name}.counts"].reshape(-1)
        got = new.for_tensor(name, 1, entry.sums.size)
        assert got is not None
        assert entry.counts.tolist() == [8 * 128]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        np.testing.assert_allclose(old.for_tensor(name, 1, entry.sums.size), expected, rtol=1e-5)


def test_gguf_form_by_definition(tmp_path: Path) -> None:
    tensors = usual()
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors))
    got = importance.for_tensor(DENSE, 1, ROW)
    assert got is not None
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, tensors[f"{DENSE}.in_sum2"] / 1536, rtol=1e-6)
    assert importance.for_tensor("blk.7.attn_q.weight", 1, ROW) is None
    assert (importance.datasets, importance.chunk_count, importance.chunk_size) == (["some.txt"], 3, 512)


def with_gradients(rows: int = 3, counts: tuple[float, ...] = (900.0, 500.0, 136.0, 0.0)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    of_experts = rng.gamma(0.5, 1.0, (N_EXPERTS, rows)).astype(np.float32)
    of_experts[np.array(counts) == 0] = 0
    return {
        **usual(counts),
        f"{DENSE}.out_grad2": rng.gamma(0.5, 1.0, (1, rows + 1)).astype(np.float32),
        f"{EXPERTS}.out_grad2": of_experts,
    }


def test_gradients_by_definition(tmp_path: Path) -> None:
    """Sums over the tokens of an expert, divided by all tokens of the text; inputs by those of the expert."""
    tensors = with_gradients()
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors))
    for name, matrices, rows in ((DENSE, 1, 4), (EXPERTS, N_EXPERTS, 3)):
        got = importance.output_gradients(name, matrices, rows)
        assert got is not None
        assert (got.dtype, got.shape) == (np.float32, (matrices, rows))
        np.testing.assert_allclose(got, tensors[f"{name}.out_grad2"] / (3 * 512), rtol=1e-6)
    got = importance.input_power(EXPERTS, N_EXPERTS, ROW)
    assert got is not None
    np.testing.assert_allclose(got[:3], tensors[f"{EXPERTS}.in_sum2"][:3] / tensors[f"{EXPERTS}.counts"][:3], rtol=1e-6)
    assert not got[3].any()
    assert importance.output_gradients("blk.7.attn_q.weight", 1, 4) is None
    assert importance.input_power("blk.7.attn_q.weight", 1, ROW) is None
    for name, matrices, rows in ((DENSE, 1, 3), (EXPERTS, N_EXPERTS, 4), (EXPERTS, 3, 3)):
        with pytest.raises(ImportanceError, match=f"{name}.*made for another model"):
            importance.output_gradients(name, matrices, rows)
    with pytest.raises(ImportanceError, match="made for another model"):
        importance.input_power(EXPERTS, 3, ROW)
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors, chunk_size=None))
    with pytest.raises(ImportanceError, match="not the number of tokens"):
        importance.output_gradients(DENSE, 1, 4)


def test_files_without_gradients(tmp_path: Path) -> None:
    for kind in ("gguf", "dat"):
        importance = imatrix.load(DATA / f"manllama-4m.imatrix.{kind}")
        name, entry = next(iter(importance.entries.items()))
        assert importance.output_gradients(name, 1, 5) is None
        power = importance.input_power(name, 1, entry.sums.size)
        assert power is not None
        np.testing.assert_allclose(power[0], importance.for_tensor(name, 1, entry.sums.size), rtol=1e-5)
    # One row of sums for all matrices of a stack, and the binary form's mark of an expert without inputs.
    path = tmp_path / "i.dat"
    sums = sums_of(2)
    sums[1] = 4.0
    path.write_bytes(binary({"a": (4, sums[0]), "b": (4, sums.reshape(-1))}))
    importance = imatrix.load(path)
    common, each = importance.input_power("a", 3, ROW), importance.input_power("b", 2, ROW)
    np.testing.assert_allclose(common, np.tile(sums[0] / 4, (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(each, np.stack([sums[0] / 4, np.zeros(ROW)]), rtol=1e-6)


def test_rarely_hit_experts_lean_on_the_others(tmp_path: Path) -> None:
    tensors = usual()
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors))
    got = importance.for_tensor(EXPERTS, N_EXPERTS, ROW)
    assert got is not None
    assert got.shape == (N_EXPERTS, ROW)
    assert got.min() > 0
    sums = tensors[f"{EXPERTS}.in_sum2"].astype(np.float64)
    overall = sums.sum(axis=0) / 1407
    own = sums[:3] / np.array([[900.0], [500.0], [7.0]])

    def shape(x: np.ndarray) -> np.ndarray:
        return x / x.mean()

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(shape(a) - shape(b)).mean())

    np.testing.assert_allclose(got[3], overall, rtol=1e-5)  # never hit: the mean of all
    # Often hit: its own values, with 32 tokens of the mean; hit 7 times: mostly the mean.
    assert distance(got[0], own[0]) < 0.04 * distance(got[0], overall)
    assert distance(got[2], overall) < 0.25 * distance(got[2], own[2])
    for expert in range(3):  # each keeps its own size
        np.testing.assert_allclose(got[expert].mean(), own[expert].mean(), rtol=1e-5)
    assert importance.expert_report({EXPERTS: N_EXPERTS, DENSE: 1}) == (
        f"{tmp_path / 'i.gguf'}: of 4 expert matrices the calibration text never hit 1 and hit 1 with fewer than 32 "
        "tokens; their importance leans on the mean over the layer's experts"
    )
    assert importance.expert_report({DENSE: 1}) is None


def test_all_experts_hit_often_need_no_report(tmp_path: Path) -> None:
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", usual((900, 500, 70, 32))))
    assert importance.expert_report({EXPERTS: N_EXPERTS}) is None


def test_silence_is_never_zero(tmp_path: Path) -> None:
    tensors = usual((5, 0, 0, 0))
    tensors[f"{DENSE}.in_sum2"][:100] = 0  # channels that were silent
    tensors["mute.in_sum2"], tensors["mute.counts"] = np.zeros(ROW, np.float32), np.array([9], np.float32)
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors))
    for name, matrices in ((DENSE, 1), (EXPERTS, N_EXPERTS), ("mute", 1)):
        got = importance.for_tensor(name, matrices, ROW)
        assert got is not None
        assert np.isfinite(got).all()
        assert got.min() > 0
    dense = importance.for_tensor(DENSE, 1, ROW)
    assert dense is not None
    assert dense[:100].max() < 1e-5 * dense.mean()


def test_experts_that_were_never_hit_have_no_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", usual((0, 0, 0, 0))))
    assert list(importance.entries) == [DENSE]
    assert EXPERTS in caplog.text


def test_one_entry_for_all_matrices_of_a_stack(tmp_path: Path) -> None:
    """Without a count, or without values, per matrix, as llama-imatrix writes for stacks that are no experts."""
    stack, common = sums_of(3, 2), sums_of(1, 3)[0]
    tensors = {
        "a.in_sum2": stack.reshape(-1), "a.counts": np.array([10], np.float32),
        "b.in_sum2": common, "b.counts": np.array([10], np.float32),
    }  # fmt: skip
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors))
    np.testing.assert_allclose(importance.for_tensor("b", 3, ROW), common / 10, rtol=1e-6)
    got = importance.for_tensor("a", 3, ROW)
    assert got is not None
    assert got.shape == (3, ROW)
    np.testing.assert_allclose(got.mean(axis=1), stack.mean(axis=1) / 10, rtol=1e-5)


def test_binary_form_by_definition(tmp_path: Path) -> None:
    dense, experts = sums_of(1)[0], sums_of(N_EXPERTS, 1)
    experts[2] = 6.0  # llama.cpp's mark of an expert without inputs: mean square 1 everywhere
    path = tmp_path / "i.dat"
    tail = struct.pack("<ii", 6, 4) + b"text"
    path.write_bytes(binary({DENSE: (5, dense), EXPERTS: (6, experts), "zero": (0, dense)}, tail))
    importance = imatrix.load(path)
    assert (importance.datasets, importance.chunk_count) == (["text"], 6)
    np.testing.assert_allclose(importance.for_tensor(DENSE, 1, ROW), dense / 5, rtol=1e-6)
    np.testing.assert_allclose(importance.for_tensor("zero", 1, ROW), dense, rtol=1e-6)
    got = importance.for_tensor(EXPERTS, N_EXPERTS, ROW)
    assert got is not None
    np.testing.assert_allclose(got[2], experts[[0, 1, 3]].mean(axis=0) / 6, rtol=1e-5)
    report = importance.expert_report({EXPERTS: N_EXPERTS})
    assert report is not None
    assert "of 4 expert matrices the calibration text never hit 1 and" in report
    for end in (b"", tail[:4]):  # both trailing parts are optional
        path.write_bytes(binary({DENSE: (5, dense)}, end))
        assert DENSE in imatrix.load(path)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    before = imatrix.load(write_imatrix(tmp_path / "a.gguf", with_gradients()))
    with ModelWriter(tmp_path / "b.gguf", "") as writer:
        imatrix.fill(writer, before)
    after = imatrix.load(tmp_path / "b.gguf")
    assert (after.datasets, after.chunk_count, after.chunk_size) == (["some.txt"], 3, 512)
    assert set(after.entries) == set(before.entries)
    for name, entry in before.entries.items():
        np.testing.assert_array_equal(after.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(after.entries[name].counts, entry.counts)
        np.testing.assert_array_equal(after.entries[name].gradients, entry.gradients)
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}  # in ggml's order, as llama.cpp writes them
    assert shapes[f"{EXPERTS}.in_sum2"] == [ROW, N_EXPERTS]
    assert shapes[f"{EXPERTS}.counts"] == [1, N_EXPERTS]
    assert shapes[f"{EXPERTS}.out_grad2"] == [3, N_EXPERTS]
    assert {t.tensor_type for t in reader.tensors} == {TENSOR_TYPES.F32}
    field = reader.fields["general.type"]
    assert field.contents() == "imatrix"
    assert not any(key.startswith("ccq.") or key == "general.architecture" for key in reader.fields)


# --- damaged and foreign files --------------------------------------------------------------------------------------


def changed(name: str, index: int, value: float) -> dict[str, np.ndarray]:
    tensors = usual()
    tensors[name].reshape(-1)[index] = value
    return tensors


def without(name: str) -> dict[str, np.ndarray]:
    tensors = usual()
    del tensors[name]
    return tensors


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (without(f"{DENSE}.counts"), f"tensor '{DENSE}': has no tensor '{DENSE}.counts'"),
        (without(f"{EXPERTS}.in_sum2"), f"tensor '{EXPERTS}': has no tensor '{EXPERTS}.in_sum2'"),
        ({**usual(), f"{EXPERTS}.counts": np.ones(3, np.float32)}, "2048 sums do not fit 3 counts"),
        ({**usual(), f"{DENSE}.counts": np.ones(1, np.float16)}, "is f16, not f32"),
        ({**with_gradients(), f"{EXPERTS}.out_grad2": np.ones(6, np.float32)}, "6 outputs do not fit 4 counts"),
        ({**with_gradients(), f"{DENSE}.out_grad2": np.ones(3, np.float16)}, "is f16, not f32"),
        ({**usual(), "x.out_grad2": np.ones(3, np.float32)}, "has no tensor 'x.in_sum2'"),
        ({"token_embd.weight": np.ones((2, 4), np.float32)}, "holds no importance"),
    ],
)
def test_bad_gguf(tmp_path: Path, tensors: dict[str, np.ndarray], reason: str) -> None:
    path = write_imatrix(tmp_path / "i.gguf", tensors)
    with pytest.raises(ImportanceError) as caught:
        imatrix.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("in_sum2", 3, -1), ("in_sum2", 3, np.nan), ("in_sum2", 3, np.inf), ("counts", 0, 0), ("counts", 0, -5),
     ("counts", 0, np.nan), ("counts", 0, np.inf), ("in_sum2", 3, 3e38), ("counts", 0, 1e-38)],
)  # fmt: skip
def test_unusable_numbers_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, index: int, value: float
) -> None:
    """A plain matrix's entry as a whole, in a stack those of one expert, which then counts as never hit."""
    whole = imatrix.load(write_imatrix(tmp_path / "i.gguf", usual()))
    assert not caplog.messages
    dense = imatrix.load(write_imatrix(tmp_path / "i.gguf", changed(f"{DENSE}.{name}", index, value)))
    assert list(dense.entries) == [EXPERTS]
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'i.gguf'}: entries dropped, ")
    assert message.endswith(DENSE)
    caplog.clear()
    stack = imatrix.load(write_imatrix(tmp_path / "i.gguf", changed(f"{EXPERTS}.{name}", index, value)))
    assert list(stack.entries) == list(whole.entries)
    assert f"tensor '{EXPERTS}': numbers of 1 of {N_EXPERTS} matrices dropped" in caplog.text
    assert stack.entries[EXPERTS].hits(N_EXPERTS).tolist() == [0, 500, 7, 0]
    before, after = (one.entries[EXPERTS].sums.reshape(N_EXPERTS, -1) for one in (whole, stack))
    np.testing.assert_array_equal(after[1:], before[1:])
    got = stack.for_tensor(EXPERTS, N_EXPERTS, ROW)
    assert got is not None
    np.testing.assert_allclose(got[0], before[1:].sum(axis=0, dtype=np.float64) / 507, rtol=1e-5)


@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_unusable_gradients_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float) -> None:
    tensors = {**with_gradients(), f"{DENSE}.out_grad2": np.array([1, value, 1], np.float32)}
    importance = imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors))
    assert f"tensor '{DENSE}': gradients dropped" in caplog.text
    assert importance.output_gradients(DENSE, 1, 3) is None
    assert importance.output_gradients(EXPERTS, N_EXPERTS, 3) is not None
    assert importance.for_tensor(DENSE, 1, ROW) is not None


def test_a_file_of_unusable_numbers_is_refused(tmp_path: Path) -> None:
    tensors = {name: np.full_like(array, np.nan) for name, array in usual().items()}
    with pytest.raises(ImportanceError, match=r"i\.gguf: none of its 2 entries has usable numbers"):
        imatrix.load(write_imatrix(tmp_path / "i.gguf", tensors))


@pytest.mark.parametrize("keys", [{"datasets": [1, 2]}, {"datasets": "x"}, {"chunk_count": "many"}])
def test_bad_keys(tmp_path: Path, keys: dict[str, object]) -> None:
    with pytest.raises(ImportanceError, match=f"imatrix.{next(iter(keys))}"):
        imatrix.load(write_imatrix(tmp_path / "i.gguf", usual(), **keys))


def test_truncated_gguf(tmp_path: Path) -> None:
    whole = write_imatrix(tmp_path / "i.gguf", usual()).read_bytes()
    path = tmp_path / "short.gguf"
    for size in [*range(4, 400, 7), *range(400, len(whole) - 64, 997)]:
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"short\.gguf"):
            imatrix.load(path)


def test_truncated_or_lengthened_binary(tmp_path: Path) -> None:
    values = np.arange(1, 9, dtype=np.float32)
    tail = struct.pack("<ii", 6, 4) + b"text"
    whole = binary({"one": (5, values), "two": (6, values)}, tail)
    complete = {len(whole), len(whole) - len(tail), len(whole) - len(tail) + 4}
    path = tmp_path / "i.dat"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size in complete:
            assert set(imatrix.load(path).entries) == {"one", "two"}
        else:
            with pytest.raises(ImportanceError, match=r"i\.dat"):
                imatrix.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ImportanceError, match="1 bytes follow"):
        imatrix.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0\0",
        b"This is a text and no importance file at all.",
        struct.pack("<i", -1),
        struct.pack("<ii", 1, -5),
        struct.pack("<ii", 1, 1 << 30),
        struct.pack("<ii", 1, 2) + b"\xff\xfe" + struct.pack("<iif", 1, 1, 1.0),
        binary({"a": (-1, np.ones(2))}),
        binary({"a": (1, np.ones(0))}),
        binary({"a": (1, np.array([1, np.nan]))}),
        binary({"a": (1, np.array([1, -1.0]))}),
        struct.pack("<i", 2) + 2 * binary({"a": (1, np.ones(2))})[4:],
        binary({"a": (1, np.ones(2))}, struct.pack("<i", -3)),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -4),
    ],
)
def test_bad_binary(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(ImportanceError, match=r"i\.dat"):
        imatrix.load(path)


def test_mutated_files_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    small = {f"a.{kind}": np.ones(n, np.float32) for kind, n in (("in_sum2", 8), ("counts", 1))}
    files = [write_imatrix(tmp_path / "i.gguf", small).read_bytes(), binary({"a": (5, np.ones(8))}, b"\1\0\0\0")]
    path = tmp_path / "mutant"
    refused = 0
    for _ in range(1500):
        data = bytearray(files[rng.integers(2)])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            imatrix.load(path).for_tensor("a", 1, 8)
        except CcqError:
            refused += 1
    assert refused > 300


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.gguf"):
        imatrix.load(tmp_path / "nowhere.gguf")
    with pytest.raises(InputError):
        imatrix.load(tmp_path)


# --- --imatrix ------------------------------------------------------------------------------------------------------


def run(*args: object) -> Result:
    return CliRunner().invoke(main, without_calibration(args))


def refused(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "in.gguf"
    rng = np.random.default_rng(3)

    def gaussian(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    write_gguf(
        path,
        {
            "token_embd.weight": ("f16", gaussian(8, ROW)),
            "blk.0.attn_norm.weight": ("f32", gaussian(ROW)),
            DENSE: ("f32", gaussian(16, ROW)),
            "blk.0.attn_v.weight": ("f32", gaussian(4, ROW)),
            EXPERTS: ("f32", gaussian(N_EXPERTS, 6, ROW)),
        },
    )
    return path


@pytest.mark.parametrize("kind", ["ccq_t2", "ccq_p2_5"])
def test_importance_reaches_the_encoder(model: Path, tmp_path: Path, kind: str) -> None:
    """Every row of a stack with its own expert's importance, plain tensors with theirs or that of the same input."""
    path = write_imatrix(tmp_path / "i.gguf", usual())
    result = run("quantize", model, "-o", tmp_path / "out.gguf", "--type", kind, "--imatrix", path)
    assert result.exit_code == 0, result.output
    importance = imatrix.load(path)
    dense, experts = importance.for_tensor(DENSE, 1, ROW), importance.for_tensor(EXPERTS, N_EXPERTS, ROW)
    assert dense is not None
    assert experts is not None
    source, out = open_model(model), open_model(tmp_path / "out.gguf")

    def stored(name: str) -> np.ndarray:
        info = out.tensor(name)
        return info.data().reshape(info.n_rows, -1)

    x = source.tensor(DENSE).dequantize()
    np.testing.assert_array_equal(stored(DENSE), encode_rows(kind, x, dense))
    assert not np.array_equal(stored(DENSE), encode_rows(kind, x))
    y = source.tensor(EXPERTS).dequantize()
    each = [encode_rows(kind, y[e], experts[e]) for e in range(N_EXPERTS)]
    np.testing.assert_array_equal(stored(EXPERTS), np.concatenate(each))
    v = source.tensor("blk.0.attn_v.weight").dequantize()
    np.testing.assert_array_equal(stored("blk.0.attn_v.weight"), encode_rows(kind, v, dense))
    # And it does what it is for: less error where the inputs are large.
    error = np.square(x - out.tensor(DENSE).dequantize()) @ dense
    plain = run("quantize", model, "-o", tmp_path / "plain.gguf", "--type", kind)
    assert plain.exit_code == 0
    without = np.square(x - open_model(tmp_path / "plain.gguf").tensor(DENSE).dequantize()) @ dense
    assert error.sum() < 0.9 * without.sum()


def test_warnings_and_provenance(model: Path, tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf", usual())
    result = run("quantize", model, "-o", tmp_path / "out.gguf", "--type", "p2", "--imatrix", path)
    assert result.stderr.splitlines() == [
        f"Warning: {path}: no entry for 1 of 3 tensors, which take that of a tensor with the same input: "
        "blk.0.attn_v.weight",
        f"Warning: {path}: of 4 expert matrices the calibration text never hit 1 and hit 1 with fewer than 32 tokens; "
        "their importance leans on the mean over the layer's experts",
    ]
    fields = open_model(tmp_path / "out.gguf").fields
    T = gguf.GGUFValueType
    assert {key: (kv.value, kv.type) for key, kv in fields.items() if key.startswith("quantize.")} == {
        "quantize.imatrix.file": (str(path), T.STRING),
        "quantize.imatrix.dataset": ("some.txt", T.STRING),
        "quantize.imatrix.entries_count": (2, T.UINT32),
        "quantize.imatrix.chunks_count": (3, T.UINT32),
    }
    # A file that notes another importance already gets the new one's notes instead, or keeps its own without one.
    for extra, expected in ((["--imatrix", path], str(path)), ([], "old.gguf")):
        noted = tmp_path / "noted.gguf"
        with ModelWriter(noted, "madeup", overwrite=True) as writer:
            writer.gguf.add_string("quantize.imatrix.file", "old.gguf")
            writer.add_tensor(DENSE, "f32", (2, ROW))
            writer.begin()
            writer.write(DENSE, sums_of(2))
        result = run("quantize", noted, "-o", tmp_path / "again.gguf", "--type", "p2", "--overwrite", *extra)
        assert result.exit_code == 0, result.output
        assert open_model(tmp_path / "again.gguf").metadata["quantize.imatrix.file"] == expected


def test_a_complete_importance_needs_no_warning(model: Path, tmp_path: Path) -> None:
    tensors = usual((900, 500, 70, 32))
    for name, array in list(tensors.items()):
        if name.startswith(DENSE):
            tensors[name.replace("attn_q", "attn_v")] = array
    path = write_imatrix(tmp_path / "i.gguf", tensors)
    result = run("quantize", model, "-o", tmp_path / "out.gguf", "--type", "p2", "--imatrix", path)
    assert result.exit_code == 0
    assert result.stderr == ""


@pytest.mark.parametrize(("kind", "warned"), [("ccq_t2", True), ("ccq_t3", True), ("q4_0", False), ("q8_0", False)])
def test_few_bits_without_data_bring_a_warning(model: Path, tmp_path: Path, kind: str, warned: bool) -> None:
    result = run("quantize", model, "-o", tmp_path / "out.gguf", "--type", kind, "--dry-run")
    assert result.exit_code == 0, result.output
    assert ("under 4 bits per weight without importance data" in result.stderr) == warned


def test_one_bit_without_data_is_refused_unless_forced(model: Path, tmp_path: Path) -> None:
    command = ("quantize", model, "-o", tmp_path / "out.gguf", "--type", "ccq_t1")
    for dry_run in ((), ("--dry-run",)):
        line = refused(*command, *dry_run)
        assert f"tensor '{DENSE}': ccq_t1 is of no use without importance data" in line
    assert not (tmp_path / "out.gguf").exists()
    for enough in ("--force", "--imatrix"):
        data = [write_imatrix(tmp_path / "i.gguf", usual())] if enough == "--imatrix" else []
        result = run(*command, enough, *data, "--overwrite")
        assert result.exit_code == 0, result.output
        assert open_model(tmp_path / "out.gguf").tensor(DENSE).type_name == "ccq_t1"


def test_plain_types_do_not_use_it(model: Path, tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf", usual())
    result = run("quantize", model, "-o", tmp_path / "out.gguf", "--type", "f16", "--imatrix", path)
    assert result.exit_code == 0
    assert result.stderr == f"Warning: {path}: not used, because it helps none of the types that tensors get\n"
    assert not any(key.startswith("quantize.") for key in open_model(tmp_path / "out.gguf").fields)


@pytest.mark.parametrize("dry_run", [True, False])
def test_another_models_file(model: Path, tmp_path: Path, dry_run: bool) -> None:
    def quantize(tensors: dict[str, np.ndarray]) -> str:
        path = write_imatrix(tmp_path / "i.gguf", tensors)
        flags = ["--dry-run"] if dry_run else []
        return refused("quantize", model, "-o", tmp_path / "out.gguf", "--type", "t2", "--imatrix", path, *flags)

    foreign = {name.replace("blk.0", "blk.9"): array for name, array in usual().items()}
    assert "none of its 2 entries names one of the 3 tensors to encode" in quantize(foreign)
    for counts in (N_EXPERTS - 1, 2 * N_EXPERTS):
        sums, n = np.ones((counts, ROW), np.float32), np.ones(counts, np.float32)
        line = quantize({**usual(), f"{EXPERTS}.in_sum2": sums, f"{EXPERTS}.counts": n})
        assert f"tensor '{EXPERTS}': has {counts * ROW} importances and {counts} counts" in line
    line = quantize({**usual(), f"{DENSE}.in_sum2": np.ones(ROW // 2, np.float32)})
    assert f"{tmp_path / 'i.gguf'}: tensor '{DENSE}': has {ROW // 2} importances and 1 counts" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "i.gguf"]


def test_unreadable_file_is_one_line(model: Path, tmp_path: Path) -> None:
    line = refused("quantize", model, "-o", tmp_path / "o.gguf", "--type", "t2", "--imatrix", tmp_path / "none.gguf")
    assert "none.gguf" in line
    line = refused("quantize", model, "-o", tmp_path / "o.gguf", "--type", "t2", "--imatrix", model)
    assert "holds no importance" in line

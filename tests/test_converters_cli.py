"""``ccq-convert`` on small files made here: quantize, inspect, dequantize, errors, interrupts."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ccq_converters.cli import main
from ccq_converters.console import progress_bar
from ccq_converters.target_types import STOCK_TYPES
from ccq_format import codec, layouts
from ccq_format.gguf_io import ModelWriter, open_model
from support.commands import unnamed, without_advice, without_calibration

RNG_SEED = 7
CCQ = [layout.name for layout in layouts.LAYOUTS]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, without_calibration(args))


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: object) -> str:
    """Exit code 1, one line on stderr, nothing on stdout; returns the line."""
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = without_advice(result.stderr).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    return lines[0]


def write_gguf(path: Path, tensors: dict[str, tuple[str, np.ndarray]], arch: str = "madeup") -> None:
    """A file with metadata of every value type; tensors are float32 arrays with a type name, or of their own type."""
    with ModelWriter(path, arch) as out:
        w, T = out.gguf, gguf.GGUFValueType
        for kind, value in {
            T.UINT8: 200, T.INT8: -100, T.UINT16: 60000, T.INT16: -30000, T.UINT32: 4000000000, T.INT32: -2000000000,
            T.UINT64: 1 << 63, T.INT64: -(1 << 62), T.FLOAT32: 0.1, T.FLOAT64: 0.1, T.BOOL: True, T.STRING: "über\n",
        }.items():  # fmt: skip
            w.add_key_value(f"test.{kind.name.lower()}", value, kind)
        w.add_key_value("test.list.i16", [1, -2, 3], T.ARRAY, T.INT16)
        w.add_key_value("test.list.str", ["a", "", "ж"], T.ARRAY, T.STRING)
        w.add_key_value("test.list.f64", [0.1, 1e300], T.ARRAY, T.FLOAT64)
        w.add_key_value("general.file_type", 1, T.UINT32)
        w.add_custom_alignment(64)
        for name, (kind, x) in tensors.items():
            out.add_tensor(name, kind, x.shape)
        out.begin()
        for name, (kind, x) in tensors.items():
            if kind in ("bf16", "q8_0", "q4_0"):
                x = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()]).view(np.uint8)
            out.write(name, x.astype("<f2") if kind == "f16" else x)


def gaussian(*shape: int, seed: int = RNG_SEED) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.05)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "in.gguf"
    write_gguf(
        path,
        {
            "token_embd.weight": ("q8_0", gaussian(40, 512)),
            "blk.0.attn_norm.weight": ("f32", gaussian(512)),
            "blk.0.attn_q.weight": ("f16", gaussian(24, 512)),
            "blk.0.ffn_up.weight": ("bf16", gaussian(8, 320)),
            "blk.0.ffn_down_exps.weight": ("f32", gaussian(3, 4, 512)),
            "blk.0.odd.weight": ("f32", gaussian(5, 30)),
            "blk.0.ffn_gate_tid2eid.weight": ("i32", np.arange(12, dtype=np.int32).reshape(4, 3)),
        },
    )
    return path


def metadata(path: Path) -> dict[str, tuple[object, object, object]]:
    return {
        key: (kv.value, kv.type, kv.sub_type)
        for key, kv in open_model(path).fields.items()
        if not key.startswith("ccq.")
    }


@pytest.mark.parametrize("kind", [*CCQ, *STOCK_TYPES])
def test_quantize_keeps_metadata_and_encodes_every_tensor(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.gguf"
    result = run("quantize", source, "-o", out, "--type", kind.upper(), "--threads", 2, "--force")
    assert result.exit_code == 0, result.output
    assert metadata(out) == metadata(source)
    assert list(metadata(out)) == list(metadata(source))
    before, after = open_model(source), open_model(out)
    assert after.alignment == before.alignment == 64
    assert [(t.name, t.shape) for t in after.tensors] == [(t.name, t.shape) for t in before.tensors]
    assert (after.spec_version is not None) == (kind in CCQ)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.type_name == new.type_name:
            np.testing.assert_array_equal(old.data(), new.data())
            continue
        x = old.dequantize()
        if new.type_name in ("q4_0", "q5_0", "iq4_nl"):
            error = np.square(new.dequantize() - x).mean() / np.square(x).mean()
            assert error < (0.002 if new.type_name == "q5_0" else 0.0075)
        elif new.layout is None:
            expected = gguf.quants.quantize(x, new.ggml_type)
            np.testing.assert_array_equal(np.asarray(expected).view(np.uint8), new.data().view(np.uint8))
        else:
            error = np.square(new.dequantize() - x).mean() / np.square(x).mean()
            assert error < {1.0: 0.4, 1.5: 0.25, 2.0: 0.16, 2.5: 0.16, 3.0: 0.04}[new.layout.bpw * 2 // 1 / 2]
    assert ("fell back" in result.stderr) == (kind not in ("f32", "f16", "bf16"))


def test_ccq_bytes_are_the_encoders_with_our_gain(source: Path, tmp_path: Path) -> None:
    import ccq_backend

    ok("quantize", source, "-o", tmp_path / "a.gguf", "--type", "t2", "--threads", 1)
    ok("quantize", source, "-o", tmp_path / "b.gguf", "--type", "t2", "--threads", 3)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    x = open_model(source).tensor("blk.0.attn_q.weight").dequantize()
    assert layouts.by_name("ccq_t2").code.error_weights(x, None) is None
    stored = open_model(tmp_path / "a.gguf").tensor("blk.0.attn_q.weight").data()
    np.testing.assert_array_equal(stored, ccq_backend.encode("ccq_t2", x * np.float32(1 + 4**-2.125)))


def test_dry_run_prints_the_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    planned = ok("quantize", source, "-o", out, "--type", "t3", "--tensor-type", "attn_q=f16", "--dry-run")
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []
    ok("quantize", source, "-o", out, "--type", "t3", "--tensor-type", "attn_q=f16")
    report = json.loads(ok("inspect", out, "--json"))
    assert f"{report['file_bpw']:.3f} bits per weight" in planned.splitlines()[-2]
    for tensor in report["tensors"]:
        (line,) = [ln for ln in planned.splitlines() if ln.startswith(tensor["name"] + " ")]
        assert f" {tensor['type']} " in line
        assert f" {tensor['bytes']:,} " in line
    again = ok("quantize", source, "--type", "t3", "--tensor-type", "attn_q=f16", "--dry-run")
    assert planned.splitlines()[:-1] == again.splitlines()[:-1]  # the last is the time to expect


def test_no_fallback(source: Path, tmp_path: Path) -> None:
    line = refused("quantize", source, "-o", tmp_path / "o.gguf", "--type", "p2", "--no-fallback")
    assert "'blk.0.ffn_up.weight'" in line
    assert "320 is no multiple of 512" in line
    assert list(tmp_path.iterdir()) == []


def test_override_may_hold_an_equals_sign(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    ok("quantize", source, "-o", out, "--type", "f16", "--tensor-type", r"(?=blk)blk.*attn_q=T2")
    assert open_model(out).tensor("blk.0.attn_q.weight").type_name == "ccq_t2"
    assert run("quantize", source, "-o", out, "--type", "f16", "--tensor-type", "attn_q").exit_code == 2


def test_inspect(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    ok("quantize", source, "-o", out, "--type", "t2_5")
    report = json.loads(ok("inspect", out, "--json"))
    assert report["spec_version"] == "0.1"
    by_name = {t["name"]: t for t in report["tensors"]}
    assert by_name["blk.0.attn_q.weight"] == {
        "name": "blk.0.attn_q.weight", "type": "ccq_t2_5", "shape": [24, 512], "bpw": 2.625, "bytes": 24 * 8 * 21,
    }  # fmt: skip
    total = sum(t["bytes"] for t in report["tensors"])
    weights = sum(int(np.prod(t["shape"])) for t in report["tensors"])
    assert report["file_bpw"] == pytest.approx(8 * total / weights)
    text = ok("inspect", out)
    assert "CCQ spec 0.1" in text
    assert "blk.0.attn_q.weight" in text
    assert f"{report['file_bpw']:.3f}" in text
    assert json.loads(ok("inspect", source, "--json"))["spec_version"] is None


def test_inspect_finds_parameters_that_no_encoder_writes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    ok("quantize", source, "-o", out, "--type", "p2_5")
    tensor = open_model(out).tensor("blk.0.attn_q.weight")
    raw = bytearray(out.read_bytes())
    raw[tensor.offset + 82 : tensor.offset + 84] = struct.pack("<H", 0x7F80)  # the second block's super_scale: infinity
    out.write_bytes(raw)
    line = refused("inspect", out, "--json")
    assert "blk.0.attn_q.weight" in line
    assert str(out) in line


@pytest.mark.parametrize("kind", CCQ)
@pytest.mark.parametrize("target", ["f32", "F16"])
def test_dequantize_writes_the_decoded_weights(source: Path, tmp_path: Path, kind: str, target: str) -> None:
    ccq, plain = tmp_path / "c.gguf", tmp_path / "p.gguf"
    ok("quantize", source, "-o", ccq, "--type", kind, "--force")
    ok("dequantize", ccq, "-o", plain, "--type", target)
    assert not any(key.startswith("ccq.") for key in open_model(plain).metadata)
    assert metadata(plain) == metadata(source)
    for old, new in zip(open_model(ccq).tensors, open_model(plain).tensors, strict=True):
        kept = old.type_name in ("f32", "i32")
        assert new.type_name == (old.type_name if kept else target.lower())
        expected = codec.decode(old.layout, old.data()) if old.layout else old.dequantize() if not kept else old.data()
        np.testing.assert_array_equal(expected.astype(new.data().dtype), new.data())


def test_ccq_input_is_refused_with_advice(source: Path, tmp_path: Path) -> None:
    ccq = tmp_path / "c.gguf"
    ok("quantize", source, "-o", ccq, "--type", "t2")
    line = refused("quantize", ccq, "-o", tmp_path / "o.gguf", "--type", "t3")
    assert "ccq_t2 already" in line
    assert "original" in line


def test_other_quantized_input_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "q4.gguf", {"blk.0.attn_q.weight": ("q4_0", gaussian(2, 64))})
    line = refused("quantize", tmp_path / "q4.gguf", "-o", tmp_path / "o.gguf", "--type", "t2")
    assert "q4_0 cannot be quantized again" in line
    assert "blk.0.attn_q.weight" in line


@pytest.mark.parametrize("target", ["t2", "p2_5", "f32", "f16", "q8_0"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, target: str, bad: float) -> None:
    x = gaussian(4, 512)
    x[2, 100] = bad
    write_gguf(
        tmp_path / "i.gguf", {"blk.0.attn_k.weight": ("f32", gaussian(2, 512)), "blk.0.attn_q.weight": ("f32", x)}
    )
    names = tmp_path / "i.gguf", "-o", tmp_path / "o.gguf"
    commands = [["quantize", *names, "--type", target], ["quantize", *names, "--target-bpw", 3, "--no-calibration"]]
    for command in [*commands, ["dequantize", *names, "--type", "f16"]]:
        line = refused(*command)
        assert f"{tmp_path / 'i.gguf'}: tensor 'blk.0.attn_q.weight': a weight is NaN or infinite" in line
        assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]


def test_existing_output_is_kept_unless_told_otherwise(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    out.write_text("precious")
    for command in ("quantize", "dequantize"):
        assert "exists" in refused(command, source, "-o", out, "--type", "f16")
    assert out.read_text() == "precious"
    ok("quantize", source, "-o", out, "--type", "f16", "--overwrite")
    assert open_model(out).arch == "madeup"
    assert "same file" in refused("quantize", out, "-o", out, "--type", "f32", "--overwrite")
    assert "folder does not exist" in refused("quantize", source, "-o", tmp_path / "x" / "y.gguf", "--type", "f16")


@pytest.mark.parametrize(
    "command", [["inspect"], ["quantize", "--type", "t2", "-o"], ["dequantize", "--type=f32", "-o"]]
)
def test_files_that_are_none_of_ours(tmp_path: Path, command: list[str]) -> None:
    out = [str(tmp_path / "out.gguf")] if command[-1] == "-o" else []
    (tmp_path / "text").write_text("no model at all, but long enough for a header")
    (tmp_path / "empty").touch()
    for name in ("text", "empty", "missing", "."):
        assert str(tmp_path) in refused(*command, *out, tmp_path / name)


def test_usage_errors(source: Path) -> None:
    assert run("quantize", source, "--type", "t2").exit_code == 2  # no -o
    assert "unknown type 'q9'" in refused("quantize", source, "--type", "q9", "--dry-run")
    assert "matches no matrix" in refused(
        "quantize", source, "--type", "t2", "--dry-run", "--tensor-type", "nowhere=f16"
    )
    assert run("dequantize", source, "-o", "x", "--type", "q8_0").exit_code == 2


def test_version_and_plugin_path() -> None:
    import ccq_backend
    import ccq_format

    assert ccq_format.__version__ in ok("--version")
    assert ok("plugin-path").strip() == str(ccq_backend.plugin_path())


def test_missing_spec_version_is_one_line_of_warning(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    ok("quantize", source, "-o", out, "--type", "t2")
    out.write_bytes(out.read_bytes().replace(b"ccq.spec_version", b"xcq.spec_version"))
    result = run("inspect", out)
    assert result.exit_code == 0
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Warning: ")


def test_interrupt_leaves_no_file(tmp_path: Path) -> None:
    # Large enough for a minute of encoding, so that the signal certainly arrives in the middle of it.
    write_gguf(tmp_path / "in.gguf", {f"blk.{i}.attn_q.weight": ("f16", gaussian(2048, 4096)) for i in range(2)})
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "ccq_converters.cli", "quantize", str(tmp_path / "in.gguf"), "--type", "t3"]
    child = subprocess.Popen(
        [*command, "-o", str(out / "o.gguf"), "--no-calibration"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not unnamed(out, child.pid):
            assert child.poll() is None, "encoding ended before it was interrupted"
            assert time.monotonic() < deadline, "encoding never started"
            time.sleep(0.02)
        time.sleep(0.3)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert stdout == b""
    assert without_advice(stderr.decode()) == "Interrupted; no file was written.\n"
    assert list(out.iterdir()) == []


def test_names_on_the_progress_bar_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """``[/x]`` would be an error of the bar's, ``[red]`` be lost."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    with progress_bar(True) as bar:
        assert not bar.disable
        bar.add_task("[/x] [red]")
        assert "[/x] [red]" in "".join(segment.text for segment in bar.console.render(bar.get_renderable()))

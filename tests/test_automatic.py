"""Conversions that calibrate by themselves: the same file as in two steps, what is refused, and what stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ccq_converters import automatic, collect, losses, stream
from ccq_converters.calibration import BUNDLED_TEXT
from ccq_converters.cli import main
from ccq_converters.conversion import Conversion
from ccq_converters.hf2gguf import convert
from ccq_converters.options import QuantOptions
from ccq_format.gguf_io import open_model
from support.commands import unnamed

from .test_collect import EXAMPLE
from .test_converters_cli import gaussian, write_gguf

TOKENS = 1024


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is measured, which takes less time."""
    monkeypatch.setattr(automatic, "TOKENS", TOKENS)
    monkeypatch.setattr(losses, "MOST", 12)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as it is stored."""
    path = tmp_path_factory.mktemp("model") / "bf16.gguf"
    convert(EXAMPLE, path, QuantOptions("bf16"), progress=False)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the output goes, so that everything left there can be seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def ok(*args: object) -> str:
    """Standard error of a command."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stderr


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.type_name, t.stored_rows(0, t.n_rows).tobytes()) for t in open_model(path).tensors}


ONE = ("--threads", 1)
FAST = ("--effort", "fast", *ONE)
TWO_STEPS = {
    "--type q8_0 --tensor-type blk.1=t2 --effort fast": (("--hessian", "h"), ("--hessian", "h")),
    "--type t2 --effort fast --hessian none": ((), ()),
    "--target-size 15% --effort fast --hessian none": (("--losses",), ()),
    "--target-size 15% --effort fast": (("--losses", "--hessian", "h"), ("--hessian", "h")),
}


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        pytest.param(command, settings, marks=pytest.mark.slow if slow else ())
        for command, slow_from in (("quantize", 3), ("hf2gguf", 1))
        for i, settings in enumerate(TWO_STEPS)
        for slow in [i >= slow_from]
    ],
)
def test_one_command_gives_what_two_give(
    stored: Path, folder: Path, tmp_path: Path, command: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = EXAMPLE if command == "hf2gguf" else stored
    stderr = ok(command, source, "-o", folder / "o.gguf", *settings.split(), *ONE)
    assert names(folder) == ["o.gguf"]
    (note,) = [line for line in stderr.splitlines() if line.startswith("Note: calibrated")]
    assert re.search(rf"text that comes with this package: importance of \d+ matrices from {TOKENS} tokens", note)
    assert ("losses of " in note) == ("target" in settings)
    assert ("their Hessians" in note) == ("none" not in settings)
    assert "Warning" not in stderr
    more, given = TWO_STEPS[settings]
    ok("calibrate", stored, "-o", "i.gguf", "--chunks", TOKENS // 512, *more, *ONE)
    if "target" in settings:
        assert (folder / "o.gguf").stat().st_size <= 0.15 * 2 * 4_196_608
    given = ("--imatrix", "i.gguf", *given)
    assert ok(command, source, "-o", "two.gguf", *settings.replace("--hessian none", "").split(), *given, *ONE) == ""
    assert tensors(folder / "o.gguf") == tensors(Path("two.gguf"))
    metadata = open_model(folder / "o.gguf").metadata
    assert metadata["quantize.imatrix.dataset"] == BUNDLED_TEXT.name


@pytest.mark.parametrize(
    ("settings", "calibrates"),
    [
        ("--type t2", True),
        ("--type t3_m", True),
        ("--type p2_5", True),
        ("--type q8_0 --tensor-type blk.1.attn_v=t3", True),
        ("--target-bpw 3", True),
        ("--type q4_0", False),
        ("--type f16", False),
        ("--type t2 --no-calibration", False),
        ("--type t2 --imatrix {data}", False),
        ("--type q4_0 --hessian auto", True),
        ("--type q8_0 --hessian auto", False),
    ],
)
def test_which_conversions_calibrate(stored: Path, folder: Path, settings: str, calibrates: bool) -> None:
    """As a dry run says."""
    data = Path(__file__).parent / "data" / "manllama-4m.imatrix.gguf"
    stderr = ok("quantize", stored, *settings.format(data=data).split(), "--dry-run", *ONE)
    assert ("Note: not calibrated, as this is a dry run" in stderr) == calibrates
    assert ("without importance data" in stderr) == ("--no-calibration" in settings)
    assert names(folder) == []


@pytest.mark.parametrize(("share", "fits"), [(1.01, True), (0.97, False)])
@pytest.mark.parametrize("short_of", ["memory", "disk"])
def test_room_for_hessians(
    stored: Path, folder: Path, tmp_path: Path, short_of: str, share: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is what the file takes; where that does not fit, importance alone is measured, and this is said."""
    ok("calibrate", stored, "-o", tmp_path / "i", "--chunks", 1, "--hessian", tmp_path / "h", *ONE)
    room = int(2 * share * (tmp_path / "h").stat().st_size)
    if short_of == "memory":
        sources = [SimpleNamespace(name="token_embd.weight", rows=4096)]
        model = automatic._to_run(SimpleNamespace(sources=sources), 2 * 4_196_608)
        monkeypatch.setattr(automatic, "free_memory", lambda: room + model)
    else:
        usage = shutil.disk_usage(folder)._replace(free=room)
        monkeypatch.setattr(automatic.shutil, "disk_usage", lambda _: usage)
    stderr = ok("quantize", stored, "-o", folder / "o.gguf", "--type", "q8_0", "--tensor-type", "blk.1.attn_v=t2", *ONE)
    assert ("their Hessians" in stderr) == fits
    assert ("there is no room for its Hessians, " in stderr) != fits


def test_importance_without_losses(stored: Path, folder: Path) -> None:
    """A target adds the losses to somebody's imatrix."""
    data = Path(__file__).parent / "data" / "manllama-4m.imatrix.gguf"
    stderr = ok("quantize", stored, "-o", folder / "o.gguf", "--target-bpw", 2.6, "--imatrix", data, *FAST)
    (note,) = [line for line in stderr.splitlines() if line.startswith("Note: ")]
    assert "package: losses of " in note
    assert open_model(folder / "o.gguf").metadata["quantize.imatrix.file"] == str(data)


def test_without_calibration(stored: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "calibrate_gguf", None)
    stderr = ok(
        "quantize", stored, "-o", folder / "o.gguf", "--type", "t2", "--effort", "fast", "--no-calibration", *ONE
    )
    assert "talk nonsense" in stderr
    result = run("quantize", stored, "-o", folder / "x.gguf", "--type", "t2", "--hessian", "auto", "--no-calibration")
    assert result.exit_code == 2


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["none", "auto", None])
def test_a_resumed_conversion_does_not_calibrate_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, choice: str | None
) -> None:
    feedback = choice != "none"
    settings = ("--type", "q8_0", "--tensor-type", "blk.[12].ffn=t2", *(("--hessian", choice) if choice else ()), *FAST)
    ok("hf2gguf", EXAMPLE, "-o", folder / "whole.gguf", *settings)
    encoded: list[str] = []
    original, calibrate, products = stream.encoded_rows, automatic.calibrate_gguf, automatic._products_bytes

    def interrupted(tensor: Any, options: Any, *more: Any) -> Any:
        if options.imatrix is None:  # the file that llama.cpp runs
            return original(tensor, options, *more)
        encoded.append(tensor.source.name)
        if len(encoded) == 10:
            raise KeyboardInterrupt
        return original(tensor, options, *more)

    monkeypatch.setattr(stream, "encoded_rows", interrupted)
    command = ("hf2gguf", EXAMPLE, "-o", folder / "o.gguf", *settings, "--resume")
    assert run(*command).exit_code == 130
    kept = [".o.gguf.calibration", *([".o.gguf.hessian"] if feedback else []), ".o.gguf.partial"]
    assert names(folder) == [*kept, ".o.gguf.partial.journal", "whole.gguf"]
    monkeypatch.setattr(automatic, "calibrate_gguf", None)
    monkeypatch.setattr(automatic, "_products_bytes", None)  # what an earlier run decided stays
    ok(*command)
    assert len(encoded) == 10 + 38 - 9
    assert names(folder) == ["o.gguf", "whole.gguf"]
    assert (folder / "o.gguf").read_bytes() == (folder / "whole.gguf").read_bytes()
    # What is kept of another model, or damaged, is measured again.
    monkeypatch.setattr(automatic, "calibrate_gguf", calibrate)
    monkeypatch.setattr(automatic, "_products_bytes", products)
    encoded.clear()
    assert run(*command, "--overwrite").exit_code == 130
    for path in (folder / ".o.gguf.partial", folder / ".o.gguf.partial.journal"):
        path.unlink()
    data = (folder / ".o.gguf.calibration").read_bytes()
    (folder / ".o.gguf.calibration").write_bytes(data[: len(data) // 2])
    assert "Note: calibrated" in ok(*command, "--overwrite")
    assert (folder / "o.gguf").read_bytes() == (folder / "whole.gguf").read_bytes()


def test_an_interrupt_behind_a_calibration(stored: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(automatic, "write_model", interrupted)
        result = run(
            "quantize", stored, "-o", folder / "o.gguf", "--type", "t2", "--hessian", "none", "--resume", *FAST
        )
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last == "Interrupted; its calibration is kept; the same command goes on from there."
    assert names(folder) == [".o.gguf.calibration"]
    left = ok("quantize", stored, "-o", folder / "o.gguf", "--type", "q8_0", *FAST)
    assert ".o.gguf.calibration: left as it is; only --resume goes on with it" in left


def test_an_interrupt_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while llama.cpp runs the file that was written for it."""
    seen: list[tuple[list[str], int]] = []
    original = collect._Input.add

    def interrupted(self: collect._Input, *arguments: Any) -> None:
        seen.append((names(folder), unnamed(folder)))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *arguments)

    monkeypatch.setattr(collect._Input, "add", interrupted)
    result = run("hf2gguf", EXAMPLE, "-o", folder / "o.gguf", "--type", "t2", *ONE)
    assert result.exit_code == 130
    assert seen[0] == ([], 2)  # model and Hessians: the files are there, but have no names
    assert (names(folder), unnamed(folder)) == ([], 0)


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", ["hf2gguf", "quantize"])
def test_too_little_memory(stored: Path, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "free_memory", lambda: 20 << 20)
    source = EXAMPLE if command == "hf2gguf" else stored
    line = refused(command, source, "-o", folder / "o.gguf", "--type", "t2")
    assert re.search(r"takes 2\d\.\d+ MiB of memory; 20\.00 MiB are free: .*--imatrix .*q8_0.*--no-calibration", line)
    assert str(source) in line
    assert names(folder) == []


def test_without_llama_cpp(stored: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "find_spec", lambda _name: None)
    line = refused("quantize", stored, "-o", folder / "o.gguf", "--type", "t2")
    assert "pip install '.[llama]'" in line
    assert "--no-calibration" in line


def test_a_model_that_llama_cpp_refuses(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    write_gguf(source, {"blk.0.attn_q.weight": ("f32", gaussian(64, 64))})
    line = refused("quantize", source, "-o", folder / "o.gguf", "--type", "t2")
    assert re.search(rf"{source}: .*refused.*unknown model architecture: 'madeup'.*--no-calibration", line)
    assert names(folder) == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("--target-size 1kB", "with these types the file has"),
        ("--target-size 20% --tensor-type nonsuch=q8_0", "'nonsuch' matches no matrix"),
        ("--target-size 20% --tensor-type attn_q=q9", "unknown type 'q9'"),
        ("--target-bpw 1", r"the matrices have 1\.0625 to 8\.5 bits"),
        ("--type ccq_t2 --split-max-size 0", "files of 0 bytes cannot be written"),
    ],
)
def test_what_no_data_can_mend(
    stored: Path, folder: Path, settings: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "_measured", lambda *_: pytest.fail("calibrates first"))
    assert re.search(why, refused("quantize", stored, "-o", folder / "o.gguf", *settings.split()))
    assert names(folder) == []


def test_a_dry_run_knows_the_types_that_data_will_allow(stored: Path) -> None:
    result = run("quantize", stored, "--target-bpw", "1.3", "--dry-run", *FAST)
    assert result.exit_code == 0, result.output
    assert "ccq_t1 " in result.stdout
    assert "after calibration; two to three times that if there is room for Hessians" in result.stdout


def test_a_kept_calibration_is_that_of_a_target_or_of_none(stored: Path, folder: Path) -> None:
    """For a target embedding and output are measured as well."""
    wanted = automatic._Wanted(importance=False, losses=False, hessians=True)
    conversion = Conversion(folder / "o.gguf", "llama", [], [stored])
    jobs = [
        automatic._Kept(conversion, options, wanted).job(True)
        for options in (QuantOptions("ccq_t2"), QuantOptions(target_size=10**6), QuantOptions(target_size=2 * 10**6))
    ]
    assert jobs[0] != jobs[1] == jobs[2]


def test_an_output_that_exists(stored: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused before the work."""
    (folder / "o.gguf").touch()
    monkeypatch.setattr(automatic, "calibrate_gguf", None)
    assert "exists already" in refused("quantize", stored, "-o", folder / "o.gguf", "--type", "t2")

"""Conversions that are killed, run out of disk, or meet each other and changing inputs: nothing half-written ever has
the final name, no input is harmed, resumed files are the same, and nothing is left over."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ccq_converters.cli import main
from ccq_converters.imatrix import Entry, Importance, fill
from ccq_format.errors import OutputError
from ccq_format.gguf_io import ModelWriter, SplitWriter
from support.commands import without_advice, without_calibration

EXAMPLE = Path(__file__).parents[1] / "examples" / "manllama-4m"
HIDDEN = re.compile(r"\.o.*\.gguf\.[0-9a-f]{8}\.tmp")
KEPT = re.compile(r"\.o.*\.gguf\.partial(\.journal)?")


def words(*args: object) -> list[str]:
    return without_calibration(args)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, words(*args))


def refused(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 1, result.output
    (line,) = without_advice(result.stderr).splitlines()
    return line


def gaussian(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.05)


def write_gguf(path: Path, tensors: int, rows: int, parts: bool = False) -> Path:
    """A model of ``rows`` x 256 matrices."""
    writer = SplitWriter(path, "llama", 1100 * rows) if parts else ModelWriter(path, "llama", overwrite=True)
    with writer as out:
        for i in range(tensors):
            out.add_tensor(f"blk.{i}.ffn_up.weight", "f32", (rows, 256))
        out.begin()
        for i in range(tensors):
            out.write(f"blk.{i}.ffn_up.weight", gaussian(rows, 256, seed=i))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "in.gguf", 4, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the output goes, so that everything left there can be seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quantize(source: Path, folder: Path, *more: object) -> list[str]:
    return words("quantize", source, "-o", folder / "o.gguf", "--type", "ccq_t2", "--threads", 1, *more)


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


@dataclass
class Killer:
    """The program ``support/killable.py``."""

    process: subprocess.Popen[str]

    def __call__(self, arguments: list[str], seconds: float | None = None, hidden: bool = False) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"arguments": arguments, "seconds": seconds, "hidden": hidden}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    program = Path(__file__).parent / "support" / "killable.py"
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield Killer(child)


KILLS = [5, pytest.param(25, marks=pytest.mark.slow)]
"""By ``make test`` and by ``make test-slow``; four ways to convert make it 100."""


def check_kills(killer: Killer, arguments: list[str], folder: Path, kills: int, *, hidden: bool = False) -> None:
    """Kill a conversion at random moments, then let one end."""
    source = contents(folder.parent / "model")
    old = contents(folder)
    assert killer(arguments)["code"] == 0
    new, seconds = contents(folder), killer([*arguments, "--overwrite"])["seconds"]
    moments = random.Random(kills)
    complete = 0
    for _ in range(kills):
        for name, data in old.items():
            (folder / name).write_bytes(data)
        for name in new.keys() - old.keys():
            (folder / name).unlink(missing_ok=True)
        ended = killer(arguments, moments.uniform(0, 1.1 * seconds), hidden)
        assert ended["code"] in (0, -9), ended["errors"]
        left = contents(folder)
        complete += ended["code"] == 0
        visible = {name: data for name, data in left.items() if not HIDDEN.fullmatch(name) and not KEPT.fullmatch(name)}
        if min(new) in visible:  # by which readers find the other parts
            assert visible in (new, old)
        assert all(data in (new.get(name), old.get(name)) for name, data in visible.items())
        if not hidden and "--resume" not in arguments and "--overwrite" not in arguments:
            assert not [name for name in left if HIDDEN.fullmatch(name)]
    assert complete < kills
    ended = killer([*arguments, "--overwrite"], hidden=hidden)
    assert ended["code"] == 0, ended["errors"]
    # A kill right behind a renaming leaves the journal.
    left = {name: data for name, data in contents(folder).items() if not name.endswith(".journal")}
    assert left == new
    assert contents(folder.parent / "model") == source


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("resume", [False, True])
def test_killed(killer: Killer, model: Path, folder: Path, resume: bool, kills: int) -> None:
    source = write_gguf(model / "in.gguf", 8, 64)
    check_kills(killer, quantize(source, folder, *["--resume"] * resume), folder, kills)


@pytest.mark.parametrize("kills", KILLS)
def test_killed_where_files_have_names(killer: Killer, model: Path, folder: Path, kills: int) -> None:
    """The next conversion to the same file removes what is left, and says so."""
    source = write_gguf(model / "in.gguf", 8, 64)
    arguments = quantize(source, folder)
    check_kills(killer, arguments, folder, kills, hidden=True)
    (folder / "o.gguf").unlink()
    seconds = 0.1
    while not contents(folder):  # killed too early
        killer(arguments, seconds, hidden=True)
        seconds += 0.05
    (left,) = contents(folder)
    assert HIDDEN.fullmatch(left)
    ended = killer(arguments)
    assert f"{left}: removed; " in ended["errors"]
    assert list(contents(folder)) == ["o.gguf"]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_replacing_parts(killer: Killer, model: Path, folder: Path, kills: int) -> None:
    """A model of several files over another one."""
    source = write_gguf(model / "in.gguf", 8, 64)
    arguments = quantize(source, folder, "--split-max-size", 10000, "--resume", "--overwrite")
    assert run(*quantize(source, folder, "--split-max-size", 10000, "--effort", "fast")).exit_code == 0
    assert len(contents(folder)) == 4
    check_kills(killer, arguments, folder, kills)


@pytest.mark.slow
def test_killed_while_calibrating(killer: Killer, folder: Path) -> None:
    """The model that is written for llama.cpp, and the Hessians, are files without names."""
    arguments = ["hf2gguf", str(EXAMPLE), "-o", str(folder / "o.gguf"), "--type", "t2", "--hessian", "auto"]
    for seconds in (1.0, 2.0, 4.0, 6.0):
        assert killer(arguments, seconds)["code"] == -9
        assert contents(folder) == {}


# --- the disk ---------------------------------------------------------------------------------------------------------


def convert_in_shell(before: str, arguments: list[str], *wrapper: str) -> tuple[int, str]:
    """Exit status and standard error of a conversion in a shell in which ``before`` ran."""
    command = [
        *wrapper,
        "sh",
        "-c",
        f'{before}\nexec "$@"',
        "sh",
        sys.executable,
        "-m",
        "ccq_converters.cli",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, without_advice(done.stderr)


def test_a_file_that_may_not_grow(source: Path, folder: Path) -> None:
    (folder / "o.gguf").write_bytes(b"old")
    code, errors = convert_in_shell("ulimit -f 16", quantize(source, folder, "--overwrite"))
    assert (code, errors) == (1, f"Error: {folder / 'o.gguf'}: File too large\n")
    assert contents(folder) == {"o.gguf": b"old"}


NAMESPACE = ("unshare", "--map-root-user", "--mount")
"""A process that may mount file systems, which nobody else sees."""

with_mounts = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="needs unshare (util-linux), and a system that lets it mount: root, or user namespaces",
)


@with_mounts
@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk(source: Path, folder: Path, tmp_path: Path, resume: bool) -> None:
    """What is left is seen by a copy, as the file system is gone with the process; afterwards there is room."""
    (tmp_path / "copy").mkdir()
    before = f"""
        mount -t tmpfs -o size=16k none {folder} && touch {folder}/other
        "$@"; code=$?
        cp -a {folder}/. {tmp_path}/copy
        mount -o remount,size=1m {folder}; "$@" || code=none; cp {folder}/o.gguf {tmp_path}/o.gguf
        exit $code"""
    code, errors = convert_in_shell(before, quantize(source, folder, *["--resume"] * resume), *NAMESPACE)
    assert code == 1
    assert errors.splitlines()[-1] == f"Error: {folder / 'o.gguf'}: No space left on device"
    kept = "o.gguf: 2 of 4 tensors are kept; the same command goes on from there"  # the journal takes a page
    assert (kept in errors) == resume
    left = sorted(contents(tmp_path / "copy"))
    assert left == [".o.gguf.partial", ".o.gguf.partial.journal", "other"] if resume else ["other"]
    assert run(*quantize(source, folder)).exit_code == 0
    assert (tmp_path / "o.gguf").read_bytes() == (folder / "o.gguf").read_bytes()


@with_mounts
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_written(source: Path, folder: Path, resume: bool) -> None:
    arguments = quantize(source, folder, *["--resume"] * resume)
    code, errors = convert_in_shell(f"mount --bind -o ro {folder} {folder}", arguments, *NAMESPACE)
    assert (code, errors) == (1, f"Error: {folder / 'o.gguf'}: Read-only file system\n")
    assert contents(folder) == {}


# --- inputs -----------------------------------------------------------------------------------------------------------


def rewritten(path: Path) -> None:
    """In place, with other weights of the same shapes."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def replaced(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    os.utime(new, (1, 1))
    os.replace(new, path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


@pytest.mark.parametrize("command", ["quantize", "dequantize", "hf2gguf"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rewritten, "has changed since it was opened"),
        (replaced, "has changed since it was opened"),
        (truncated, "(has changed since it was opened|has become shorter since it was opened)"),
        (Path.unlink, "No such file or directory"),
    ],
)
def test_an_input_changes(
    source: Path,
    folder: Path,
    tmp_path: Path,
    command: str,
    change: Callable[[Path], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the first tensor is written."""
    arguments: list[object] = [command, source, "--type", "f16"]
    changing = source
    if command == "hf2gguf":
        shutil.copytree(EXAMPLE, tmp_path / "model")
        arguments[1], changing = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    write, calls = ModelWriter.write, []

    def changed(self: ModelWriter, name: str, data: np.ndarray) -> None:
        if not calls:
            change(changing)
        calls.append(name)
        write(self, name, data)

    monkeypatch.setattr(ModelWriter, "write", changed)
    line = refused(*arguments, "-o", folder / "o.gguf")
    assert re.fullmatch(rf"Error: {re.escape(str(changing))}: tensor '[^']+': {reason}", line)
    assert contents(folder) == {}


def test_outputs_that_are_inputs(source: Path, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EXAMPLE, model)
    parts = write_gguf(folder / "o.gguf", 3, 64, parts=True)
    first = folder / "o-00001-of-00003.gguf"
    importance = tmp_path / "i.gguf"
    with ModelWriter(importance, "") as writer:
        fill(writer, Importance("", {"blk.0.ffn_up.weight": Entry(np.ones(256, np.float32), np.ones(1))}))
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "hard.gguf").hardlink_to(source)
    (tmp_path / "text").write_text("text")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments in (
        ["quantize", source, "-o", source, "--type", "q8_0"],
        ["quantize", source, "-o", tmp_path / "link.gguf", "--type", "q8_0"],
        ["quantize", source, "-o", tmp_path / "hard.gguf", "--type", "q8_0", "--resume"],
        ["quantize", first, "-o", folder / "o-00002-of-00003.gguf", "--type", "q8_0"],
        ["quantize", first, "-o", parts, "--type", "f16", "--split-max-size", 35000],
        ["quantize", source, "-o", importance, "--imatrix", importance, "--type", "ccq_t2"],
        ["dequantize", source, "-o", source, "--type", "f16"],
        ["dequantize", first, "-o", parts, "--type", "f16", "--split-max-size", 35000],
        ["hf2gguf", model, "-o", model / "model.safetensors"],
        ["hf2gguf", model, "-o", model / "tokenizer.model"],
        ["calibrate", source, "-o", source],
        ["calibrate", first, "-o", folder / "o-00003-of-00003.gguf"],
        ["calibrate", source, "-o", tmp_path / "new.gguf", "--hessian", source],
        ["calibrate", source, "--text", tmp_path / "text", "-o", tmp_path / "text"],
        ["calibrate", model, "-o", model / "model.safetensors"],
    ):
        assert refused(*arguments, "--overwrite").endswith("input and output are the same file"), arguments
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- two conversions --------------------------------------------------------------------------------------------------


def both(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit statuses and errors of conversions at the same time."""
    children = [
        subprocess.Popen([sys.executable, "-m", "ccq_converters.cli", *c], stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    errors = [without_advice(child.communicate()[1]) for child in children]
    return [(child.returncode, error) for child, error in zip(children, errors, strict=True)]


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["plain", "resume"])
def test_two_conversions(tmp_path: Path, folder: Path, more: list[str]) -> None:
    """To one file: one of them has it, whole, and the other says so."""
    source = write_gguf(tmp_path / "in.gguf", 8, 128)
    results = both(quantize(source, folder, *more), quantize(source, folder, *more))
    assert sorted(code for code, _ in results) == [0, 1]
    (line,) = [errors for code, errors in results if code]
    assert re.search(r"exists already|another process is writing this file", line)
    result = contents(folder)
    (folder / "o.gguf").unlink()
    assert run(*quantize(source, folder)).exit_code == 0
    assert contents(folder) == result


def test_two_conversions_that_replace(tmp_path: Path, folder: Path) -> None:
    """One file by two efforts: the last to end has all of it."""
    source = write_gguf(tmp_path / "in.gguf", 4, 64)
    commands = [quantize(source, folder, "--overwrite", "--effort", effort) for effort in ("fast", "best")]
    wanted = []
    for command in commands:
        assert CliRunner().invoke(main, command).exit_code == 0
        wanted.append(contents(folder))
    assert wanted[0] != wanted[1]
    assert both(*commands) == [(0, ""), (0, "")]
    assert contents(folder) in wanted


def test_parts_of_two_models_are_never_together(folder: Path) -> None:
    """Two writers whose files get their names in turns: one or both raise, and no first part is left of a mixture."""

    def begun(value: float) -> SplitWriter:
        writer = SplitWriter(folder / "o.gguf", "llama", 2000, overwrite=True)
        for i in range(3):
            writer.add_tensor(f"t{i}", "f32", (1, 256))
        writer.begin()
        for i in range(3):
            writer.write(f"t{i}", np.full((1, 256), value, np.float32))
        return writer

    for at in range(3):
        first, second = begun(1), begun(2)
        part = first._parts[at]
        publish = part.publish

        def then_other(publish: Callable[[], None] = publish, second: SplitWriter = second) -> None:
            publish()
            second.close()

        part.publish = then_other  # type: ignore[method-assign]
        with contextlib.suppress(OutputError):
            first.close()
        values = {name: data[-4:] for name, data in contents(folder).items()}
        assert "o-00001-of-00003.gguf" not in values or (len(values) == 3 and len(set(values.values())) == 1)
        for path in folder.iterdir():
            path.unlink()

"""Files that appear when they are complete: with and without a name until then, leftovers of the dead, two writers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ccq_format import output
from ccq_format.errors import CcqWarning, OutputError
from ccq_format.output import OutputFile, Scratch

WRITER = """
import os, signal, sys
from ccq_format import output
output._create_unnamed = lambda folder: None
out = output.OutputFile(sys.argv[1], overwrite=True)
out.open().write(b"half")
out.sync()
print(out.reachable, flush=True)
sys.stdin.read()
out.close()
"""
"""Writes a hidden file, tells its name, and waits for the end of its input before it closes."""


@pytest.fixture(params=["unnamed", "hidden"])
def hidden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether files have hidden names until they are complete."""
    if request.param == "hidden":
        monkeypatch.setattr(output, "_create_unnamed", lambda folder: None)
        return True
    if sys.platform != "linux":
        pytest.skip("only Linux has files without names: run it there")
    return False


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def begun(path: Path, data: bytes = b"new", overwrite: bool = False) -> OutputFile:
    out = OutputFile(path, overwrite=overwrite)
    out.open().write(data)
    return out


def test_appears_when_complete(tmp_path: Path, hidden: bool) -> None:
    with OutputFile(tmp_path / "a") as out:
        assert names(tmp_path) == []
        out.open().write(b"data")
        assert len(names(tmp_path)) == hidden
        out.file.flush()
        assert out.reachable.read_bytes() == b"data"
        out.reachable.write_bytes(b"written by name")  # as llama.cpp does
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"written by name"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_by_an_exception(tmp_path: Path, hidden: bool, error: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail() -> None:
        with OutputFile(tmp_path / "a", overwrite=True) as out:
            out.open().write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_existing_files(tmp_path: Path, hidden: bool) -> None:
    late = begun(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OutputError, match="a: exists already"):
        OutputFile(tmp_path / "a")
    with pytest.raises(OutputError, match="a: exists already"):
        late.close()
    late = begun(tmp_path / "b")
    late.check = lambda: None  # type: ignore[method-assign]  # it appears between the check and the naming
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(OutputError, match="b: exists already"):
        late.close()
    begun(tmp_path / "a", overwrite=True).close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"old"}


def test_where_renaming_always_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems without RENAME_NOREPLACE."""
    import ctypes

    class Libc:
        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(22)
            return -1

    monkeypatch.setattr(output, "_create_unnamed", lambda folder: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    begun(tmp_path / "a").close()
    late = begun(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"old")
    late.check = lambda: None  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="b: exists already"):
        late.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"old"}


def test_two_writers(tmp_path: Path, hidden: bool) -> None:
    first, second, third = (begun(tmp_path / "a", data, overwrite=True) for data in (b"1", b"2", b"3"))
    second.close()
    assert (tmp_path / "a").read_bytes() == b"2"
    first.close()
    assert (tmp_path / "a").read_bytes() == b"1"
    third.abort()
    assert names(tmp_path) == ["a"]


def test_taking_back(tmp_path: Path, hidden: bool) -> None:
    """Only one's own file is removed."""
    first, second = (begun(tmp_path / "a", data, overwrite=True) for data in (b"1", b"2"))
    for out in (first, second):
        out.complete()
        out.publish()
    assert (first.is_published(), second.is_published()) == (False, True)
    first.unpublish()
    assert (tmp_path / "a").read_bytes() == b"2"
    second.unpublish()
    first.abort()
    second.abort()
    assert names(tmp_path) == []


def test_scratch(tmp_path: Path, hidden: bool) -> None:
    """What writes any output closes it, and then it can be read."""
    (tmp_path / "a").write_bytes(b"old")
    with Scratch(tmp_path / "a") as scratch:
        scratch.open().write(b"data")
        scratch.close()
        assert scratch.reachable.read_bytes() == b"data"
        assert len(names(tmp_path)) == 1 + hidden
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_without_proc_files_have_hidden_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_by_descriptor", lambda descriptor: Path(f"/no/proc/{descriptor}"))
    with OutputFile(tmp_path / "a") as out:
        out.open().write(b"data")
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["a"]


def test_what_is_no_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="is no regular file"):
        OutputFile(tmp_path / "pipe", overwrite=True)


# --- leftovers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    children = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(tmp_path / "a")]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_leftovers_of_the_dead_are_removed(tmp_path: Path, writer: Callable[[], subprocess.Popen[str]]) -> None:
    """And those of the living stay: both then close."""
    dead, alive = writer(), writer()
    left = [Path(child.stdout.readline().strip()) for child in (dead, alive) if child.stdout is not None]
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert all(path.read_bytes() == b"half" for path in left)
    with pytest.warns(CcqWarning, match="removed; 4 bytes that a killed process has left") as caught:
        out = begun(tmp_path / "a", overwrite=True)
    assert [str(warning.message).startswith(str(left[0])) for warning in caught] == [True]
    assert names(tmp_path) == [left[1].name]
    out.close()
    assert (tmp_path / "a").read_bytes() == b"new"
    alive.communicate("")
    assert alive.returncode == 0
    assert (tmp_path / "a").read_bytes() == b"half"
    assert names(tmp_path) == ["a"]


def test_killed_between_link_and_renaming(tmp_path: Path) -> None:
    """A file without a name needs one for a moment to replace another."""
    (tmp_path / "a").write_bytes(b"old")
    program = WRITER.replace("output._create_unnamed = lambda folder: None", "").replace(
        "out.close()", "output._rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nout.close()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], input="", text=True)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    with pytest.warns(CcqWarning, match="removed; 4 bytes"):
        begun(tmp_path / "a", overwrite=True).close()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_what_is_no_leftover_stays(tmp_path: Path, hidden: bool) -> None:
    for name in (
        ".a.tmp",
        ".a.0123456.tmp",
        ".a.0123456g.tmp",
        ".a.01234567.tmp~",
        ".b.01234567.tmp",
        "a.01234567.tmp",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".a.00000000.tmp").mkdir()
    (tmp_path / ".a.00000001.tmp").symlink_to(tmp_path / ".a.tmp")
    os.mkfifo(tmp_path / ".a.00000002.tmp")
    before = names(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(tmp_path / "a").close()
    assert names(tmp_path) == sorted([*before, "a"])


def test_a_writer_whose_file_was_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes the hidden file between its creation and the lock: it is made again."""
    monkeypatch.setattr(output, "_create_unnamed", lambda folder: None)
    lock, locks = output._lock, []

    def late(descriptor: int, wait: bool = True) -> bool:
        if not locks:
            (path,) = tmp_path.iterdir()
            path.unlink()
        locks.append(descriptor)
        return lock(descriptor, wait)

    monkeypatch.setattr(output, "_lock", late)
    begun(tmp_path / "a").close()
    assert len(locks) == 2
    assert (tmp_path / "a").read_bytes() == b"new"

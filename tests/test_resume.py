"""``--resume``: an interrupted conversion goes on where it stopped and gives the same file; two jobs never mix."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import ccq_format
from ccq_converters import encode_tensor, stream
from ccq_converters.cli import main
from ccq_converters.hessian import HessianWriter
from ccq_converters.imatrix import Entry, Importance, fill
from ccq_converters.options import QuantOptions
from ccq_converters.resume import job_of
from ccq_format import _writer, output
from ccq_format.gguf_io import ModelWriter
from support.commands import without_advice, without_calibration

EXAMPLE = Path(__file__).parents[1] / "examples" / "manllama-4m"
NORM = "blk.0.attn_norm.weight"
CALLS = {
    "token_embd.weight": 1,
    NORM: 1,
    "blk.0.attn_q.weight": 3,
    "blk.0.ffn_up.weight": 2,
    "blk.0.ffn_down.weight": 4,
}
"""Tensors of the small model in their order, and how many calls of an encoder each takes (see ``calls``)."""
TOTAL = sum(CALLS.values())


def run(*args: object) -> Result:
    return CliRunner().invoke(main, without_calibration(args), catch_exceptions=True)


def gaussian(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.05)


def write_gguf(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    with ModelWriter(path, "llama", overwrite=True) as out:
        for name, shape in shapes.items():
            out.add_tensor(name, "f32", shape)
        out.begin()
        for seed, (name, shape) in enumerate(shapes.items()):
            out.write(name, gaussian(*shape, seed=seed))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = {name: 4 * n for name, n in CALLS.items()}
    write_gguf(tmp_path / "in.gguf", {name: (256,) if name == NORM else (n, 256) for name, n in rows.items()})
    return tmp_path / "in.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the output goes, so that everything left there can be seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


KEPT = [".o.gguf.partial", ".o.gguf.partial.journal"]


class Calls:
    """Counts the calls of the encoders and fails at one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.fail_at: int | None = None
        self.error: Callable[[], BaseException] = RuntimeError

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.count == self.fail_at:
                raise self.error()
            self.count += 1
            return function(*args, **kwargs)

        return counted

    def restart(self, fail_at: int | None = None, error: Callable[[], BaseException] = RuntimeError) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counter = Calls()
    monkeypatch.setattr(encode_tensor, "encode_rows", counter.wrap(encode_tensor.encode_rows))
    monkeypatch.setattr(encode_tensor, "encode_with_feedback", counter.wrap(encode_tensor.encode_with_feedback))
    # Steps of four rows.  The norm is copied, so it is no call; the fixture makes up for it by reading it as one.
    for name in ("_CHUNK_CCQ", "_CHUNK_PLAIN"):
        monkeypatch.setattr(encode_tensor, name, 4 * 256)
    monkeypatch.setattr(encode_tensor, "_ROWS_FEEDBACK", 4)
    plain = stream.encoded_rows

    def encoded_rows(tensor: Any, *more: Any) -> Iterator[Any]:
        if tensor.source.name == NORM:
            counter.wrap(lambda: None)()
        yield from plain(tensor, *more)

    monkeypatch.setattr(stream, "encoded_rows", encoded_rows)
    return counter


def command(source: Path, folder: Path, *more: object) -> list[object]:
    return ["quantize", source, "-o", folder / "o.gguf", "--type", "ccq_t2", "--threads", 1, "--resume", *more]


def whole(source: Path, tmp_path: Path, *more: object) -> bytes:
    """What an uninterrupted conversion gives."""
    out = tmp_path / "whole.gguf"
    result = run("quantize", source, "-o", out, "--type", "ccq_t2", "--threads", 1, "--overwrite", *more)
    assert result.exit_code == 0, result.output
    return out.read_bytes()


def complete_before(call: int) -> tuple[int, int]:
    """Tensors that are complete when call number ``call`` fails, and the calls those took."""
    tensors = at = 0
    for n in CALLS.values():
        if at + n > call:
            break
        tensors, at = tensors + 1, at + n
    return tensors, at


def interrupt(source: Path, folder: Path, calls: Calls, call: int = 8, *more: object) -> dict[str, bytes]:
    """A conversion that fails at a call, by default with four of five tensors complete; what it leaves."""
    calls.restart(call)
    result = run(*command(source, folder, *more))
    assert isinstance(result.exception, RuntimeError)
    calls.restart()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(TOTAL))
def test_goes_on_at_the_first_incomplete_tensor(source: Path, folder: Path, calls: Calls, call: int) -> None:
    expected = whole(source, folder.parent)
    assert calls.count == TOTAL
    interrupt(source, folder, calls, call)
    tensors, spent = complete_before(call)
    assert names(folder) == (KEPT if tensors else [])
    result = run(*command(source, folder))
    assert result.exit_code == 0, result.output
    assert calls.count == TOTAL - spent
    assert names(folder) == ["o.gguf"]
    assert (folder / "o.gguf").read_bytes() == expected


def test_interrupted_again_and_again(source: Path, folder: Path, calls: Calls) -> None:
    expected, runs = whole(source, folder.parent), 0
    while not (folder / "o.gguf").exists():
        calls.restart(max(CALLS.values()))
        run(*command(source, folder, "--threads", 1 + runs))  # the number of threads changes no byte
        runs += 1
        assert runs < 9
    assert runs == 3
    assert (folder / "o.gguf").read_bytes() == expected
    assert names(folder) == ["o.gguf"]


@pytest.mark.parametrize(("call", "feedback"), [(1, False), (3, False), (4, False), (9, False), (4, True), (10, True)])
def test_goes_on_inside_a_tensor(
    source: Path, folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, call: int, feedback: bool
) -> None:
    """Every call encodes 4 rows; with a note after every 4 rows nothing is encoded twice."""
    more: tuple[object, ...] = ()
    if feedback:
        hessian = folder.parent / "h.safetensors"
        shapes = {name: (256, 256) for name in CALLS if name != NORM and name != "token_embd.weight"}
        with HessianWriter(hessian, shapes, {}) as writer:
            writer.begin()
            for seed, name in enumerate(shapes):
                x = gaussian(512, 256, seed=seed)
                writer.write(name, x.T @ x, 512.0)
        more = ("--hessian", hessian)
    expected = whole(source, folder.parent, *more)
    monkeypatch.setattr(_writer, "_CHECKPOINT", 4 * 68)
    interrupt(source, folder, calls, call, *more)
    assert names(folder) == KEPT
    result = run(*command(source, folder, *more))
    assert result.exit_code == 0, result.output
    assert calls.count == TOTAL - call
    assert (folder / "o.gguf").read_bytes() == expected
    assert names(folder) == ["o.gguf"]


def test_a_stack_of_experts(folder: Path, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops in the second matrix, in the middle of it, and says how far it has come."""
    write_gguf(tmp_path / "in.gguf", {"blk.0.ffn_up_exps.weight": (3, 8, 256)})
    expected = whole(tmp_path / "in.gguf", tmp_path)
    monkeypatch.setattr(_writer, "_CHECKPOINT", 4 * 68)
    calls.restart(3, KeyboardInterrupt)
    result = run(*command(tmp_path / "in.gguf", folder))
    assert "0 of 1 tensors and 816 B of the next are kept" in result.stderr
    calls.restart()
    assert run(*command(tmp_path / "in.gguf", folder)).exit_code == 0
    assert calls.count == 3
    assert (folder / "o.gguf").read_bytes() == expected


def test_damage_inside_a_tensor(
    source: Path, folder: Path, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(source, tmp_path)
    monkeypatch.setattr(_writer, "_CHECKPOINT", 4 * 68)
    interrupt(source, folder, calls, 9)
    data = bytearray((folder / KEPT[0]).read_bytes())
    data[-1] ^= 1  # in the last rows of a tensor of which more rows are missing
    (folder / KEPT[0]).write_bytes(data)
    result = run(*command(source, folder))
    assert result.exit_code == 0, result.output
    assert "damaged; what follows its first 4 tensors is encoded again" in result.stderr
    assert calls.count == TOTAL - 8
    assert (folder / "o.gguf").read_bytes() == expected


def test_with_importance_and_feedback(source: Path, folder: Path, calls: Calls, tmp_path: Path) -> None:
    importance = write_importance(tmp_path / "i.gguf")
    hessian = tmp_path / "h.safetensors"
    x = gaussian(512, 256)
    with HessianWriter(hessian, {"blk.0.ffn_down.weight": (256, 256)}, {}) as writer:
        writer.begin()
        writer.write("blk.0.ffn_down.weight", x.T @ x, 512.0)
    more = ("--imatrix", importance, "--hessian", hessian)
    expected = whole(source, tmp_path, *more)
    interrupt(source, folder, calls, 9, *more)
    result = run(*command(source, folder, *more))
    assert result.exit_code == 0, result.output
    assert calls.count == CALLS["blk.0.ffn_down.weight"]
    assert (folder / "o.gguf").read_bytes() == expected


def test_a_model_folder(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_tensor, "_CHUNK_CCQ", 1 << 20)
    monkeypatch.setattr(encode_tensor, "_CHUNK_PLAIN", 1 << 20)
    options = ["--type", "ccq_t2", "--effort", "fast"]
    assert run("hf2gguf", EXAMPLE, "-o", folder / "whole.gguf", *options).exit_code == 0
    all_calls, arguments = calls.count, ["hf2gguf", EXAMPLE, "-o", folder / "o.gguf", *options, "--resume"]
    calls.restart(all_calls // 2)
    assert isinstance(run(*arguments).exception, RuntimeError)
    calls.restart()
    assert run(*arguments).exit_code == 0
    assert calls.count <= all_calls - all_calls // 2
    assert (folder / "o.gguf").read_bytes() == (folder / "whole.gguf").read_bytes()
    assert names(folder) == ["o.gguf", "whole.gguf"]


def test_only_the_renaming_is_left(
    source: Path, folder: Path, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(source, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(output, "_rename", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        result = run(*command(source, folder))
    assert result.exit_code == 1
    assert "5 of 5 tensors are kept" in result.stderr
    calls.restart()
    assert run(*command(source, folder)).exit_code == 0
    assert calls.count == 0
    assert (folder / "o.gguf").read_bytes() == expected
    assert names(folder) == ["o.gguf"]


def test_the_user_learns_how_to_go_on(source: Path, folder: Path, calls: Calls) -> None:
    calls.restart(8, KeyboardInterrupt)
    result = run(*command(source, folder))
    assert result.exit_code == 130
    assert (
        without_advice(result.stderr) == "Interrupted; 4 of 5 tensors are kept; the same command goes on from there.\n"
    )
    calls.restart(2, lambda: OSError(28, "No space left on device"))
    result = run(*command(source, folder))
    assert result.exit_code == 1
    assert without_advice(result.stderr).splitlines() == [
        f"Warning: {folder / 'o.gguf'}: 4 of 5 tensors are kept; the same command goes on from there",
        "Error: [Errno 28] No space left on device",
    ]
    assert names(folder) == KEPT


def test_progress_starts_at_what_is_done(
    source: Path, folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []

    class Bar(contextlib.AbstractContextManager["Bar"]):
        def add_task(self, _: str, *, total: int, completed: int) -> int:
            seen.append([total, completed])
            return 0

        def update(self, task: int, *, description: str) -> None:
            pass

        def advance(self, task: int, weights: int) -> None:
            seen[-1].append(weights)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(stream, "progress_bar", lambda wanted: Bar())
    interrupt(source, folder, calls)
    assert run(*command(source, folder)).exit_code == 0
    weights = [256 * 4 * n for n in CALLS.values()]
    weights[1] = 256
    assert seen[0][:2] == [sum(weights), 0]
    assert sum(seen[0][2:]) == sum(weights[:4]) + 4 * 256  # and one step of the fifth
    assert seen[1][:2] == [sum(weights), sum(weights[:4])]
    assert sum(seen[1][2:]) == weights[4]


# --- other jobs -----------------------------------------------------------------------------------------------------


def write_importance(path: Path, scale: float = 1.0) -> Path:
    sums = (scale + np.arange(256)).astype(np.float32)
    with ModelWriter(path, "", overwrite=True) as writer:
        fill(writer, Importance(str(path), {name: Entry(sums, np.ones(1)) for name in CALLS if "blk" in name}))
    return path


def touched(source: Path) -> None:
    stat = source.stat()
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def other_tensor(source: Path) -> None:
    """Another number of rows, by a file of the same time."""
    stat = source.stat()
    write_gguf(source, {name: (256,) if name == NORM else (4 * n + 4, 256) for name, n in CALLS.items()})
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--effort", "fast"], "--effort was default, is fast"),
        (["--type", "ccq_t2_5"], "--type was ccq_t2, is ccq_t2_5, the list of tensors and types differs"),
        (["--tensor-type", "ffn=q8_0"], '--tensor-type was [], is [["ffn", "q8_0"]], the list of tensors and types'),
        (["--no-fallback"], "--no-fallback was false, is true"),
        ("imatrix", "--imatrix differs;"),
        ("no imatrix", "--imatrix differs, the metadata differs;"),
        (touched, "in.gguf was "),
        (other_tensor, "the list of tensors and types differs"),
        ("version", "encoder was ccq 0.0.0.dev1, is ccq "),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)) if not isinstance(value, list) else "_".join(value),
)
def test_another_job_is_refused(
    source: Path,
    folder: Path,
    calls: Calls,
    tmp_path: Path,
    change: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importance = ["--imatrix", write_importance(tmp_path / "i.gguf")]
    with monkeypatch.context() as patch:
        if change == "version":
            patch.setattr(ccq_format, "__version__", "0.0.0.dev1")
        before = interrupt(source, folder, calls, 8, *importance)
    more: list[object] = [*importance]
    if callable(change):
        change(source)
    elif change == "imatrix":
        write_importance(tmp_path / "i.gguf", 2.0)
    elif change == "no imatrix":
        more = []
    elif isinstance(change, list):
        more += change
    result = run(*command(source, folder, *more))
    assert result.exit_code == 1
    assert calls.count == 0
    (line,) = without_advice(result.stderr).splitlines()
    assert line.startswith(f"Error: {folder / KEPT[0]}: is of another job: ")
    assert message in line
    assert "remove this file to start again" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_option_belongs_to_the_job_or_changes_no_byte(source: Path) -> None:
    """An option added later counts without anybody thinking of it."""
    options = QuantOptions("ccq_t2")
    job, unchanged = job_of(options, [source]), set()
    for field in dataclasses.fields(QuantOptions):
        value = getattr(options, field.name)
        if field.name == "imatrix":
            other: Any = Importance("x", {"a": Entry(np.ones(4, np.float32), np.ones(1))})
        elif field.name == "hessian":
            other = type("", (), {"file": source})()
        elif isinstance(value, bool):
            other = not value
        elif isinstance(value, (int, float)):
            other = value + 1
        else:
            other = [("a", "b")] if isinstance(value, list) else "other"
        changes: dict[str, Any] = {field.name: other}
        if field.name.startswith("target_"):  # instead of a type
            changes = {"type": None, field.name: 10}
        if job_of(dataclasses.replace(options, **changes), [source]) == job:
            unchanged.add(field.name)
    assert unchanged == {"threads", "device", "overwrite", "dry_run", "resume", "calibrate", "feedback", "force"}


def test_the_sources_may_move_but_not_change(source: Path, tmp_path: Path) -> None:
    options, job = QuantOptions("ccq_t2"), job_of(QuantOptions("ccq_t2"), [source])
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / source.name
    shutil.copy2(source, moved)
    assert job_of(options, [moved]) == job
    shutil.copy(source, moved)  # with the time of now
    assert job_of(options, [moved]) != job
    shutil.copy2(source, moved)
    stat = moved.stat()
    with open(moved, "ab") as file:
        file.write(b"x")
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert job_of(options, [moved]) != job


def test_another_process_has_the_file(source: Path, folder: Path, calls: Calls, tmp_path: Path) -> None:
    expected, before = whole(source, tmp_path), interrupt(source, folder, calls)
    with open(folder / KEPT[0], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(*command(source, folder))
        assert result.exit_code == 1
        assert without_advice(result.stderr) == f"Error: {folder / KEPT[0]}: another process is writing this file\n"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run(*command(source, folder)).exit_code == 0
    assert (folder / "o.gguf").read_bytes() == expected


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    def writer() -> ModelWriter:
        out = ModelWriter(tmp_path / "a.gguf", "llama", job={"what": "ever"})
        for name in "ab":
            out.add_tensor(name, "f32", (4,))
        return out

    first, second = writer(), writer()
    first.begin()
    first.write("a", np.ones(4, np.float32))
    with pytest.raises(ccq_format.errors.OutputError, match="another process is writing"):
        second.begin()
    second.abort()
    first.abort()
    assert (first.kept, second.kept) == (1, 0)
    with writer() as third:
        third.begin()
        assert third.completed == 1
        with pytest.raises(ValueError, match="'a' is out of order: expected 'b'"):
            third.write("a", np.ones(4, np.float32))
        third.write("b", np.ones(4, np.float32))
    assert names(tmp_path) == ["a.gguf"]


# --- damage ---------------------------------------------------------------------------------------------------------


def cut(name: str, size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size((folder / name).stat().st_size))


def flip(name: str, at: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[at] ^= 1
        (folder / name).write_bytes(raw)

    return change


DATA, JOURNAL = KEPT
SIZES = [4 * 272, 1024, 12 * 68 + 16, 8 * 68, 16 * 68]
"""Bytes of the tensors (q8_0, f32 and CCQ_T2) with their padding; the first four are complete."""


def append(folder: Path) -> None:
    with open(folder / DATA, "ab") as file:
        file.write(bytes(range(256)) * 5)


@pytest.mark.parametrize(
    ("damage", "left", "warned"),
    [
        (append, 4, False),
        (cut(DATA, lambda size: size), 4, False),
        (cut(DATA, lambda size: size - 1), 3, True),
        (cut(DATA, lambda size: size - SIZES[3]), 3, True),
        (cut(DATA, lambda size: size - SIZES[3] - 1), 2, True),
        (cut(DATA, lambda size: 100), 0, True),
        (cut(DATA, lambda size: 0), 0, False),
        (flip(DATA, 30), 0, True),
        (flip(DATA, -1), 3, True),
        (flip(DATA, -sum(SIZES[:4]) + 5), 0, True),
        (flip(DATA, -sum(SIZES[2:4]) + 5), 2, True),
        (cut(JOURNAL, lambda size: size - 1), 3, False),
        (cut(JOURNAL, lambda size: size - 20), 3, False),
        (flip(JOURNAL, -3), 3, True),
    ],
)
def test_only_what_is_there_is_trusted(
    source: Path, folder: Path, calls: Calls, damage: Callable[[Path], None], left: int, warned: bool
) -> None:
    expected, before = whole(source, folder.parent), interrupt(source, folder, calls)
    complete = expected[: -SIZES[4]]
    assert before[DATA].startswith(complete)
    (folder / DATA).write_bytes(complete)
    damage(folder)
    result = run(*command(source, folder))
    assert result.exit_code == 0, result.output
    assert calls.count == sum(list(CALLS.values())[left:])
    assert (folder / "o.gguf").read_bytes() == expected
    assert ("damaged" in result.stderr) == warned
    assert names(folder) == ["o.gguf"]


def test_torn_journal_grows_again(source: Path, folder: Path, calls: Calls, tmp_path: Path) -> None:
    """What follows the line that a loss of power has torn is found by the run after the next."""
    expected, before = whole(source, tmp_path), interrupt(source, folder, calls)
    cut(JOURNAL, lambda size: size - 1)(folder)
    calls.restart(CALLS["blk.0.ffn_up.weight"] + 1)  # the fourth tensor once more, and a step of the fifth
    assert isinstance(run(*command(source, folder)).exception, RuntimeError)
    assert (folder / JOURNAL).read_bytes() == before[JOURNAL]
    calls.restart()
    assert run(*command(source, folder)).exit_code == 0
    assert calls.count == CALLS["blk.0.ffn_down.weight"]
    assert (folder / "o.gguf").read_bytes() == expected


@pytest.mark.parametrize("text", [None, b"", b"{", b"[1]\n", b'{"ccq_partial": 1, "job": {}}\n', b"\xff\n"])
def test_lost_journal(source: Path, folder: Path, calls: Calls, text: bytes | None) -> None:
    interrupt(source, folder, calls)
    (folder / JOURNAL).unlink()
    if text is not None:
        (folder / JOURNAL).write_bytes(text)
    before = (folder / DATA).read_bytes()
    result = run(*command(source, folder))
    assert result.exit_code == 1
    assert "missing or damaged: remove this file to start again" in result.stderr
    assert (folder / DATA).read_bytes() == before
    (folder / DATA).unlink()
    assert run(*command(source, folder)).exit_code == 0
    assert calls.count == TOTAL
    assert names(folder) == ["o.gguf"]


# --- beside other options -------------------------------------------------------------------------------------------


def test_existing_target(source: Path, folder: Path, calls: Calls, tmp_path: Path) -> None:
    expected, out = whole(source, tmp_path), folder / "o.gguf"
    out.write_text("precious")
    assert "exists already" in run(*command(source, folder)).stderr
    assert names(folder) == ["o.gguf"]
    before = interrupt(source, folder, calls, 8, "--overwrite")
    assert before["o.gguf"] == b"precious"
    assert names(folder) == [*KEPT, "o.gguf"]
    assert "exists already" in run(*command(source, folder)).stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run(*command(source, folder, "--overwrite")).exit_code == 0
    assert out.read_bytes() == expected
    assert names(folder) == ["o.gguf"]


def test_without_resume_it_is_left_alone(source: Path, folder: Path, calls: Calls, tmp_path: Path) -> None:
    expected, before = whole(source, tmp_path), interrupt(source, folder, calls)
    arguments = [a for a in command(source, folder) if a != "--resume"]
    calls.restart(5)
    assert isinstance(run(*arguments).exception, RuntimeError)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    calls.restart()
    result = run(*arguments)
    assert result.exit_code == 0
    assert (
        without_advice(result.stderr) == f"Warning: {folder / KEPT[0]}: left as it is; only --resume goes on with it\n"
    )
    assert calls.count == TOTAL
    assert (folder / "o.gguf").read_bytes() == expected
    assert {name: (folder / name).read_bytes() for name in KEPT} == before


def test_dry_run(source: Path, folder: Path, calls: Calls) -> None:
    before = interrupt(source, folder, calls)
    assert run(*command(source, folder, "--dry-run")).exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_signals(tmp_path: Path, folder: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.gguf"
    write_gguf(source, {f"blk.{i}.attn_q.weight": (64, 4096) for i in range(6)})
    arguments = [str(a) for a in command(source, folder, "--no-calibration")]
    child = subprocess.Popen(
        [sys.executable, "-m", "ccq_converters.cli", *arguments],
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    journal = folder / KEPT[1]
    try:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
            assert child.poll() is None, "encoding ended before it was interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(number)
        _, stderr = child.communicate(timeout=60)
    finally:
        child.kill()
    done = journal.read_bytes().count(b"\n") - 1
    assert 2 <= done < 6
    assert names(folder) == KEPT
    if number == signal.SIGINT:
        assert child.returncode == 130
        # The signal may come when a tensor's line has been written but not yet been counted.
        texts = [
            f"Interrupted; {n} of 6 tensors are kept; the same command goes on from there.\n" for n in (done - 1, done)
        ]
        assert without_advice(stderr.decode()) in texts
    encoded = []
    plain = stream.encoded_rows
    monkeypatch.setattr(stream, "encoded_rows", lambda t, *more: (encoded.append(t.source.name), plain(t, *more))[1])
    assert run(*arguments).exit_code == 0
    assert encoded == [f"blk.{i}.attn_q.weight" for i in range(done, 6)]
    assert (folder / "o.gguf").read_bytes() == whole(source, tmp_path)
    assert names(folder) == ["o.gguf"]

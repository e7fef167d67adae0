"""Run a command in this process and say whether what came of it is fine.

It is if the command succeeded and its output is intact, or if it refused with an error of ours that names a file or a
tensor; if it left no file that has no business there, changed no input, warned of nothing that only a programmer
understands, and wrote nothing that a terminal would take for a command.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click

import ccq_converters
import ccq_format
from ccq_converters import cli, cost
from ccq_format.errors import CcqError, CcqWarning, OutputError, WeightsError
from ccq_format.gguf_io import open_model

from .mutate import Files
from .seeds import seed, write_files
from .targets import Target

MODELS = ("in/model.gguf", "in/model.safetensors")
MAX_MESSAGE = 1500
"""Characters of an error; what a file says has to be cut."""

_PACKAGES = {Path(package.__file__).parent for package in (ccq_converters, ccq_format)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Verdict:
    """``fault`` is ``None`` if all is fine, else what kind of failure it is, the same for all inputs that fail alike;
    ``outcome`` is ``ok`` or the name of the error; ``detail`` is for people."""

    outcome: str
    fault: str | None = None
    detail: str = ""


def judge(target: Target, files: Files, folder: Path) -> Verdict:
    """Run ``target`` on ``files``, in the empty ``folder``, which is emptied again."""
    write_files(files, folder)
    (folder / "tmp").mkdir()
    try:
        with mock.patch.object(tempfile, "tempdir", str(folder / "tmp")), mock.patch.object(cost, "_SAMPLE", 1024):
            outcome, fault, detail = _run(target, folder)
            fault, detail = (fault, detail) if fault is not None else _left(target, files, folder, outcome == "ok")
        return Verdict(outcome, fault, detail.replace(str(folder), "."))
    finally:
        for name in os.listdir(folder):
            shutil.rmtree(folder / name)


def _run(target: Target, folder: Path) -> tuple[str, str | None, str]:
    args = [f"{folder}/{arg}" if arg.startswith(("in/", "out/")) or arg == "in" else arg for arg in target.args]
    with _captured() as (printed, warned):
        try:
            with cli.main.make_context(
                "ccq-convert", args, color=True
            ) as context:  # as on a terminal: nothing is hidden
                cli.main.invoke(context)
        except click.exceptions.Exit as error:
            cause = error.__context__
            if isinstance(cause, CcqError):
                return type(cause).__name__, *_refusal(cause, target)
            return "error", _fault("not an error of ours", cause), _trace(cause)
        except click.ClickException as error:
            return type(error).__name__, None, ""
        except BaseException as error:
            return "error", _fault("traceback", error), _trace(error)
    odd = [warning for warning in warned if not issubclass(warning, CcqWarning)]
    if odd:
        return "ok", f"warning {odd[0].__name__}", printed()
    return "ok", *_readable(printed())


@contextlib.contextmanager
def _captured() -> Iterator[tuple[Any, list[type[Warning]]]]:
    """What the command prints, in an encoding that refuses what no terminal can show, and the kinds of its warnings."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    warned: list[type[Warning]] = []

    def printed() -> str:
        out.flush()
        err.flush()
        return (out.buffer.getvalue() + err.buffer.getvalue()).decode()  # type: ignore[attr-defined]

    def show(message: Warning, category: type[Warning], *_more: Any, **_named: Any) -> None:
        warned.append(category)
        click.echo(str(message), err=True)

    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(cli, "_show_warning", show),
    ):
        yield printed, warned


def _refusal(error: CcqError, target: Target) -> tuple[str | None, str]:
    message = cli._one_line(error)
    if isinstance(error, WeightsError) and not any(name.startswith(target.damaged) for name in MODELS):
        return f"{type(error).__name__} though the weights are intact: {_where(error)}", message
    if isinstance(error, OutputError) and not target.resumes:
        return f"the output cannot be written: {_where(error)}", message
    if error.file is None and error.tensor is None:
        return f"{type(error).__name__} without a place: {_where(error)}", message
    if not error.reason or len(message) > MAX_MESSAGE:
        return f"{type(error).__name__} is too long or empty: {_where(error)}", message[:MAX_MESSAGE]
    return _readable(message)


def _readable(text: str) -> tuple[str | None, str]:
    if any((ord(c) < 32 and c not in "\n\t") or 126 < ord(c) < 160 for c in text):
        return "prints control characters", ascii(text)[:MAX_MESSAGE]
    return None, ""


def _left(target: Target, files: Files, folder: Path, ok: bool) -> tuple[str | None, str]:
    """What is wrong with what the command left."""
    for name, data in files.items():
        if name.startswith("in/") and (folder / name).read_bytes() != data:
            return "an input was changed", name
    if left := os.listdir(folder / "tmp"):
        return "temporary files are left", str(left)
    wanted = {Path(name).name for name in files if name.startswith("out/")} if target.resumes and not ok else set()
    found = {path.name for path in (folder / "out").iterdir()}
    outputs = sorted(name for name in found if name.startswith("out"))
    if (outputs and not ok) or (not ok and not found <= wanted) or (ok and found != set(outputs)):
        return "output files are left", str(sorted(found))
    try:
        for name in outputs[:1]:
            for tensor in open_model(folder / "out" / name).tensors:
                tensor.check_blocks()
    except CcqError as error:
        return "its output is damaged", str(error)
    if ok and target.resumes and (folder / "out/out.gguf").read_bytes() != _unharmed(target):
        return "a resumed output differs", ""
    return None, ""


_OUTPUTS: dict[str, bytes] = {}


def _unharmed(target: Target) -> bytes:
    """What ``target`` makes of its intact seed, begun anew."""
    if target.name not in _OUTPUTS:
        with tempfile.TemporaryDirectory() as name:
            files = {path: data for path, data in seed(target.seed).items() if path.startswith("in/")}
            write_files(files, Path(name))
            _run(target, Path(name))
            _OUTPUTS[target.name] = Path(name, "out/out.gguf").read_bytes()
    return _OUTPUTS[target.name]


def _fault(what: str, error: BaseException | None) -> str:
    return f"{what}: {type(error).__name__} in {_where(error)}"


def _where(error: BaseException | None) -> str:
    """The innermost function of ours that the error came through."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    ours = [f for f in frames if any(package in Path(f.filename).parents for package in _PACKAGES)]
    return f"{Path(ours[-1].filename).name} {ours[-1].name}" if ours else "the command line"


def _trace(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error, limit=-6)) if error is not None else ""

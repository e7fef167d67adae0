"""The unfinished output of a job that can be resumed: which of its bytes are kept, and for whom.

Beside the target ``NAME`` lie two files.  ``.NAME.partial`` holds the bytes written so far.  ``.NAME.partial.journal``
is JSON, a line each: first what the job is (``{"ccq_partial": 1, "job": {...}}``), then every tensor that is complete,
in file order (``{"tensor": name, "crc32": of its bytes and padding}``).  A tensor's line is written after its bytes
have been synced to disk, so what the journal names is there after a loss of power, too; the checksums are compared
nevertheless before anything is built on them.  Whoever writes holds a lock on the first file.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CcqWarning, OutputError

_VERSION = 1
_CHUNK = 1 << 22
_MAX_NAMED = 3
"""How many differences between two jobs a message names."""

DIGEST = "sha256:"
"""What a digest begins with; messages leave such values out."""


def partial_path(target: str | os.PathLike[str]) -> Path:
    """Where the unfinished bytes of ``target`` are kept."""
    target = Path(target)
    return target.with_name(f".{target.name}.partial")


class Partial:
    """The two files of one target.  :meth:`open` first; then :meth:`write` and :meth:`complete` for every tensor that
    is not among the first :attr:`done`; then :meth:`sync`, renaming :attr:`path`, and :meth:`finish`.  :meth:`release`
    instead of the last three keeps the files if they hold a complete tensor."""

    def __init__(self, target: Path, job: Mapping[str, str]) -> None:
        """``job`` maps what the target depends on to its value, both in words for people."""
        self.path = partial_path(target)
        self.done = 0
        self._job = dict(job)
        self._journal_path = self.path.with_name(self.path.name + ".journal")
        self._file: BinaryIO | None = None
        self._journal: BinaryIO | None = None
        self._crc = 0

    def open(self, header: bytes, tensors: Sequence[tuple[str, int]]) -> None:
        """Find out how much is there and stand behind it; ``tensors`` are names and sizes with padding.

        Warns with ``CcqWarning`` if a tensor in the journal does not have its bytes.  Raises ``OutputError`` if another
        process has the file, if it is of another job, or if its journal is lost; the files then stay as they are.
        ``OSError`` if the system refuses.
        """
        file = self._locked()
        try:
            size = os.fstat(file.fileno()).st_size
            job, records = _read_journal(self._journal_path) if size else (None, [])
            if size and job is None:
                raise OutputError(
                    f"{self._journal_path.name}, which tells what is complete, is missing or damaged: "
                    "remove this file to start again",
                    file=self.path,
                )
            if records and job is not None and job != self._job:
                raise OutputError(
                    f"is of another job: {_differences(job, self._job)}; give the first command again, or remove this "
                    "file to start again",
                    file=self.path,
                )
            ends = _verify(file, header, tensors, records)
            if len(ends) - 1 < len(records):
                warnings.warn(
                    f"{self.path}: damaged; {len(records) - len(ends) + 1} of its {len(records)} tensors are encoded "
                    "again",
                    CcqWarning,
                    stacklevel=2,
                )
            # From here on the files are ours to change.
            self._file, self.done = file, len(ends) - 1
        finally:
            if self._file is None:
                file.close()
        if self.done:
            self._journal = open(self._journal_path, "r+b")  # noqa: SIM115 - closed by _close()
            self._journal.truncate(records[self.done - 1][2])
            self._journal.seek(0, os.SEEK_END)
            file.seek(ends[-1])
            file.truncate()
        else:
            file.truncate(0)
            self._journal = open(self._journal_path, "wb")  # noqa: SIM115
            self._note({"ccq_partial": _VERSION, "job": self._job})
            file.seek(0)
            file.write(header)
        self.sync()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the two names
        finally:
            os.close(folder)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes of the current tensor."""
        assert self._file is not None
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)

    def complete(self, name: str) -> None:
        """The tensor ``name`` and its padding have been written."""
        self.sync()
        self._note({"tensor": name, "crc32": self._crc})
        self._crc = 0
        self.done += 1

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """After :attr:`path` has been renamed: remove the journal and give up the lock."""
        with contextlib.suppress(OSError):  # the target is complete, and without the other file this one means nothing
            os.unlink(self._journal_path)
        self._close()

    def release(self) -> None:
        """Give up the lock, keeping the files if a tensor is complete.  Does nothing before :meth:`open`."""
        if self._file is not None and not self.done:
            for path in (self.path, self._journal_path):
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self._close()

    def _close(self) -> None:
        for file in (self._journal, self._file):  # the lock last
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk fails the last flush again
                    file.close()
        self._file = self._journal = None

    def _locked(self) -> BinaryIO:
        import fcntl  # Unix only, as nothing else here is

        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file: BinaryIO = os.fdopen(os.open(self.path, flags, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last owner may have renamed or removed the file between open and lock.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            except BlockingIOError:
                file.close()
                raise OutputError("another process is writing this file", file=self.path) from None
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()

    def _note(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


_Record = tuple[str, int, int]
"""A tensor's name, its checksum, and where its line ends in the journal."""


def _read_journal(path: Path) -> tuple[dict[str, str] | None, list[_Record]]:
    """The job (``None``: no journal) and the tensors, up to the first line that is damaged or torn."""
    records: list[_Record] = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        first = json.loads(lines[0])
        job = first["job"]
        if first["ccq_partial"] != _VERSION or not isinstance(job, dict):
            return None, []
    except (OSError, ValueError, LookupError, TypeError):
        return None, []
    at = len(lines[0])
    for line in lines[1:]:
        at += len(line)
        try:
            entry = json.loads(line)
            record = (str(entry["tensor"]), int(entry["crc32"]), at)
        except (ValueError, LookupError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        records.append(record)
    return job, records


def _verify(file: BinaryIO, header: bytes, tensors: Sequence[tuple[str, int]], records: Sequence[_Record]) -> list[int]:
    """Where the header ends and where each tensor does that is there as the journal says."""
    file.seek(0)
    ends = [len(header)]
    if file.read(len(header)) != header:
        return ends
    for (name, size), (recorded, crc, _) in zip(tensors, records, strict=False):
        found, left = 0, size
        while left and (data := file.read(min(left, _CHUNK))):
            found = zlib.crc32(data, found)
            left -= len(data)
        if left or name != recorded or found != crc:
            break
        ends.append(ends[-1] + size)
    return ends


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    found = []
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if before is None or after is None:
            found.append(f"{key} was {'not ' if before is None else ''}there")
        elif str(before).startswith(DIGEST) or after.startswith(DIGEST):
            found.append(f"{key} differs")
        else:
            found.append(f"{key} was {before}, is {after}")
    more = [f"and {len(found) - _MAX_NAMED} more"] if len(found) > _MAX_NAMED else []
    return ", ".join(found[:_MAX_NAMED] + more)

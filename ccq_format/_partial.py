"""The unfinished output of a job that can be resumed: which of its bytes are kept, and for whom.

Beside the target ``NAME`` lie two files.  ``.NAME.partial`` holds the bytes written so far.  ``.NAME.partial.journal``
is JSON, a line each: first what the job is (``{"ccq_partial": 2, "job": {...}}``), then every tensor that is complete,
in file order (``{"tensor": name, "crc32": of its bytes and padding}``), and of long ones the parts that are
(``{"tensor": name, "bytes": from its start on, "crc32": of these}``).  A line is written after its bytes have been
synced to disk, so what the journal names is there after a loss of power, too; the checksums are compared nevertheless
before anything is built on them.  Whoever writes holds a lock on the first file.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CcqWarning, OutputError
from .output import OutputFile, sync_folder

_VERSION = 2
_CHUNK = 1 << 22
_MAX_NAMED = 3
"""How many differences between two jobs a message names."""

DIGEST = "sha256:"
"""What a digest begins with; messages leave such values out."""


def partial_path(target: str | os.PathLike[str]) -> Path:
    """Where the unfinished bytes of ``target`` are kept."""
    target = Path(target)
    return target.with_name(f".{target.name}.partial")


class Partial(OutputFile):
    """The two files of one target.  :meth:`resume` first, instead of ``open``; then :meth:`write` and :meth:`note` for
    every tensor that is not among the first :attr:`done`, the first of them from byte :attr:`written` on, with
    :meth:`checkpoint` in between where that is worth it; then ``close``.  ``abort`` keeps the files if the journal
    names anything."""

    def __init__(self, target: Path, job: Mapping[str, str], overwrite: bool) -> None:
        """``job`` maps what the target depends on to its value, both in words for people.  Raises ``OutputError`` as
        ``OutputFile`` does."""
        super().__init__(target, overwrite=overwrite)
        self.done = 0
        self.written = 0
        self._job = dict(job)
        self._hidden: Path = partial_path(target)
        self._journal_path = self._hidden.with_name(self._hidden.name + ".journal")
        self._journal: BinaryIO | None = None
        self._crc = 0

    def resume(self, header: bytes, tensors: Sequence[tuple[str, int]], job: Mapping[str, str]) -> None:
        """Find out how much is there and stand behind it; ``tensors`` are names and sizes with padding, ``job`` adds to
        what the target depends on.

        Warns with ``CcqWarning`` if a tensor in the journal does not have its bytes.  Raises ``OutputError`` if another
        process has the file, if it is of another job, or if its journal is lost; the files then stay as they are.  The
        same if the system refuses.
        """
        self._job.update(job)
        self.remove_leftovers()
        with self.errors():
            self._resume(header, tensors)

    def _resume(self, header: bytes, tensors: Sequence[tuple[str, int]]) -> None:
        file = self._locked()
        try:
            size = os.fstat(file.fileno()).st_size
            job, records = _read_journal(self._journal_path) if size else (None, [])
            if size and job is None:
                raise OutputError(
                    f"{self._journal_path.name}, which tells what is complete, is missing or damaged: "
                    "remove this file to start again",
                    file=self._hidden,
                )
            if records and job is not None and job != self._job:
                raise OutputError(
                    f"is of another job: {_differences(job, self._job)}; give the first command again, or remove this "
                    "file to start again",
                    file=self._hidden,
                )
            found = _verify(file, header, tensors, records)
            if found.records < len(records):
                warnings.warn(
                    f"{self._hidden}: damaged; what follows its first {found.done} tensors is encoded again",
                    CcqWarning,
                    stacklevel=3,
                )
            # From here on the files are ours to change.
            self._file, self.done, self.written, self._crc = file, found.done, found.written, found.crc
        finally:
            if self._file is None:
                file.close()
        if found.records:
            self._journal = open(self._journal_path, "r+b")  # noqa: SIM115 - closed by _close()
            self._journal.truncate(records[found.records - 1].end)
            self._journal.seek(0, os.SEEK_END)
            file.seek(found.end)
            file.truncate()
        else:
            file.truncate(0)
            self._journal = open(self._journal_path, "wb")  # noqa: SIM115
            self._note({"ccq_partial": _VERSION, "job": self._job})
            file.seek(0)
            file.write(header)
        self.sync()
        sync_folder(self.path.parent)  # the two names

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes of the current tensor.  Raises ``OutputError``."""
        super().write(data)
        self._crc = zlib.crc32(data, self._crc)

    def note(self, name: str) -> None:
        """The tensor ``name`` and its padding have been written.  Raises ``OutputError``."""
        self.sync()
        self._note({"tensor": name, "crc32": self._crc})
        self._crc = self.written = 0
        self.done += 1

    def checkpoint(self, name: str, written: int) -> None:
        """The first ``written`` bytes of the tensor ``name`` have been written.  Raises
        ``OutputError``."""
        self.sync()
        self._note({"tensor": name, "bytes": written, "crc32": self._crc})
        self.written = written

    def unpublish(self) -> None:
        """Take ``publish`` back, if it has happened and nobody else has replaced the file."""
        if self.is_published():
            with contextlib.suppress(OSError):
                os.replace(self.path, self._hidden)

    def settle(self) -> None:
        """After ``publish``: remove the journal and give up the lock."""
        with contextlib.suppress(OSError):  # the target is complete, and without the other file this one means nothing
            os.unlink(self._journal_path)
        self._release()

    def abort(self) -> None:
        """Give up the lock, keeping the files if the journal names anything.  Does nothing before :meth:`resume` and
        after ``close``."""
        if self._file is not None and not (self.done or self.written):
            for path in (self._hidden, self._journal_path):
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self._release()

    def _release(self) -> None:
        for file in (self._journal, self._file):  # the lock last
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk fails the last flush again
                    file.close()
        self._file = self._journal = None

    def _locked(self) -> BinaryIO:
        import fcntl  # Unix only, as nothing else here is

        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            file: BinaryIO = os.fdopen(os.open(self._hidden, flags, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last owner may have renamed or removed the file between open and lock.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self._hidden)):
                    return file
            except BlockingIOError:
                file.close()
                raise OutputError("another process is writing this file", file=self._hidden) from None
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()

    def _note(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        with self.errors():
            self._journal.write(json.dumps(entry).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())


@dataclass(frozen=True)
class _Record:
    """A line of the journal: a tensor's name, how many of its bytes (``None``: all, with padding), their checksum, and
    where the line ends."""

    tensor: str
    nbytes: int | None
    crc: int
    end: int


@dataclass(frozen=True)
class _Found:
    """How many of the journal's records are true, how many tensors are complete, how many bytes of the next are there
    and their checksum, and where in the file that ends."""

    records: int
    done: int
    written: int
    crc: int
    end: int


def _read_journal(path: Path) -> tuple[dict[str, str] | None, list[_Record]]:
    """The job (``None``: no journal) and the records, up to the first line that is damaged or torn."""
    records: list[_Record] = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        first = json.loads(lines[0])
        job = first["job"]
        if first["ccq_partial"] != _VERSION or not isinstance(job, dict):
            return None, []
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None, []
    at = len(lines[0])
    for line in lines[1:]:
        at += len(line)
        try:
            entry = json.loads(line)
            nbytes = int(entry["bytes"]) if "bytes" in entry else None
            record = _Record(str(entry["tensor"]), nbytes, int(entry["crc32"]), at)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            break
        if not line.endswith(b"\n"):
            break
        records.append(record)
    return job, records


def _verify(file: BinaryIO, header: bytes, tensors: Sequence[tuple[str, int]], records: Sequence[_Record]) -> _Found:
    """What is there as the journal says."""
    file.seek(0)
    found = _Found(0, 0, 0, 0, len(header))
    if file.read(len(header)) != header:
        return found
    for record in records:
        if found.done == len(tensors):
            break
        name, size = tensors[found.done]
        target = size if record.nbytes is None else record.nbytes
        crc, left = found.crc, target - found.written
        while left > 0 and (data := file.read(min(left, _CHUNK))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
        if left or target > size or record.tensor != name or record.crc != crc:
            break
        end = found.end + target - found.written
        if record.nbytes is None:
            found = _Found(found.records + 1, found.done + 1, 0, 0, end)
        else:
            found = _Found(found.records + 1, found.done, target, crc, end)
    return found


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

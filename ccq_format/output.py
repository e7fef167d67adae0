"""Output files that appear under their names only when they are complete.

Until then a file has no name at all (``O_TMPFILE``), so that whatever ends the process, SIGKILL included, leaves
nothing.  Where the file system or the kernel has no such files, it is ``.NAME.xxxxxxxx.tmp`` in the folder of ``NAME``,
and its writer holds a lock (``flock``) on it.  One that nobody holds has been left by a writer that is dead: it is
removed, with a warning, when ``NAME`` is written again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from .errors import CcqWarning, OutputError

__all__ = ["Output", "OutputFile", "Scratch", "Staged", "refuse_inputs"]

_O = TypeVar("_O", bound="Output")


class Output(ABC):
    """What is complete after :meth:`close` and gone after :meth:`abort`.

    As a context manager it closes on success and aborts on any exception, ``KeyboardInterrupt`` included.
    """

    @abstractmethod
    def close(self) -> None:
        """Complete the output under its name."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what is unfinished.  Does nothing after a successful :meth:`close`."""

    def __enter__(self: _O) -> _O:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Staged(Output):
    """An output that is closed in three thirds, so that several can be closed together."""

    @abstractmethod
    def complete(self) -> None:
        """The first third of :meth:`close`: nothing is left to write."""

    @abstractmethod
    def publish(self) -> None:
        """The second third of :meth:`close`: give the output its name."""

    @abstractmethod
    def settle(self) -> None:
        """The last third of :meth:`close`: nothing but the target is left."""

    def close(self) -> None:
        """Complete the output and give it its name.

        Raises ``OutputError`` if the target has appeared meanwhile and ``overwrite`` is false, or the system refuses.
        """
        try:
            self.complete()
            self.publish()
            self.settle()
        finally:
            self.abort()


class OutputFile(Staged):
    """A file to write: :meth:`open`, then fill :attr:`file`, then :meth:`close`::

        with OutputFile("table.csv") as out:
            out.open().write(data)

    Any number of processes may write the same ``path`` at the same time.  Without ``overwrite`` the first to close has
    it, and the others raise; with it the last one has.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Raises ``OutputError`` as :meth:`check` does; no file is created."""
        self.path = Path(path)
        self.overwrite = overwrite
        self._file: BinaryIO | None = None
        self._hidden: Path | None = None
        """Where the file is until it is complete; ``None`` while it has no name."""
        self.check()

    def check(self) -> None:
        """Raises ``OutputError`` if the target is a folder or no file, its folder is missing, or it may not exist."""
        if self.path.is_dir():
            raise OutputError("is a folder", file=self.path)
        if self.path.exists() and not self.path.is_file():  # a device or a pipe, which a file would replace
            raise OutputError("is no regular file", file=self.path)
        if not self.path.parent.is_dir():
            raise OutputError("its folder does not exist", file=self.path)
        if self.path.exists() and not self.overwrite:
            raise OutputError("exists already", file=self.path)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what the system refuses within (disk full, for example) into an ``OutputError``."""
        try:
            yield
        except FileExistsError:
            raise OutputError("exists already", file=self.path) from None
        except OSError as error:
            raise OutputError(error.strerror or str(error), file=self.path) from error

    def open(self) -> BinaryIO:
        """Create the file and return :attr:`file`; remove, with ``CcqWarning``, what dead writers have left.

        Raises ``OutputError`` if the system refuses.
        """
        self.remove_leftovers()
        with self.errors():
            descriptor = _create_unnamed(self.path.parent)
            if descriptor is None:
                descriptor, self._hidden = _create_hidden(self.path)
            self._file = os.fdopen(descriptor, "w+b")
        return self._file

    @property
    def file(self) -> BinaryIO:
        """The open file, to be written in any order, and read."""
        assert self._file is not None, "open() first"
        return self._file

    @property
    def reachable(self) -> Path:
        """Where this process can open the file, to write or read it by name, until it is closed."""
        return self._hidden or _by_descriptor(self.file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        """Write to :attr:`file`.  Raises ``OutputError``."""
        with self.errors():
            self.file.write(data)

    def sync(self) -> None:
        """Wait until everything written is on disk.  Raises ``OutputError``."""
        with self.errors():
            self.file.flush()
            os.fsync(self.file.fileno())

    def complete(self) -> None:
        """See ``Staged``."""
        self.check()
        self.sync()

    def publish(self) -> None:
        """See ``Staged``."""
        with self.errors():
            if self._hidden is None and not self._link(self.path):
                # A link cannot replace a file, but renaming can.
                hidden = _hidden_name(self.path)
                if not self.overwrite or not self._link(hidden):
                    raise FileExistsError
                self._hidden = hidden
            if self._hidden is not None:
                _rename(self._hidden, self.path, self.overwrite)
            sync_folder(self.path.parent)

    def unpublish(self) -> None:
        """Take :meth:`publish` back, if it has happened and nobody else has replaced the file."""
        if self.is_published():
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def is_published(self) -> bool:
        """Whether the file is open and the one that has the name."""
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except (OSError, ValueError):  # ValueError: closed
            return False

    def settle(self) -> None:
        """See ``Staged``."""
        if self._file is not None:
            self._file.close()

    def abort(self) -> None:
        """Remove the file.  Does nothing before :meth:`open` and after :meth:`close`."""
        if self._file is not None:
            if self._hidden is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._hidden)
            with contextlib.suppress(OSError):  # a full disk fails the last flush again
                self._file.close()
            self._file = None

    def remove_leftovers(self) -> None:
        """Remove the hidden files of this target whose writers are dead; warns with ``CcqWarning``."""
        pattern = re.compile(re.escape(f".{self.path.name}.") + r"[0-9a-f]{8}\.tmp")
        with contextlib.suppress(OSError):
            for path in sorted(self.path.parent.iterdir()):
                if pattern.fullmatch(path.name) and (size := _remove_dead(path)) is not None:
                    warnings.warn(
                        f"{path}: removed; {size} bytes that a killed process has left", CcqWarning, stacklevel=3
                    )

    def _link(self, path: Path) -> bool:
        """Give the file, which has no name, this one; false if that exists."""
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # With a folder Python calls linkat, which can follow the link in /proc; without, link, which does not.
            source = _by_descriptor(self.file.fileno())
            os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            return False
        finally:
            os.close(folder)
        return True


class Held(OutputFile):
    """A file that whoever writes it completes and :meth:`release` gives its name, so that it can appear together with
    another.  It is there until the ``with`` block is left, for what reads :attr:`reachable`, and gone then if it was
    not released."""

    def publish(self) -> None:
        """Nothing: see :meth:`release`."""

    def settle(self) -> None:
        """Nothing."""

    def abort(self) -> None:
        """Nothing: the ``with`` block ends the file."""

    def release(self) -> None:
        """Give the file its name.  Raises ``OutputError`` as :meth:`OutputFile.close` does."""
        super().publish()
        super().settle()

    def __exit__(self, *_: object) -> None:
        super().abort()


class Scratch(Held):
    """A temporary file beside ``path`` that never gets a name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ``OutputError`` if there cannot be a file of that name."""
        super().__init__(path, overwrite=True)


def refuse_inputs(outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise ``OutputError`` if an output would replace a file that is read, under whatever name; files that do not
    exist count as none."""
    files = {}
    for path in inputs:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            files[status.st_dev, status.st_ino] = path
    for path in outputs:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in files:
                raise OutputError("input and output are the same file", file=path)


def _by_descriptor(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}")


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _create_unnamed(folder: Path) -> int | None:
    """A locked file without a name; ``None`` where there are none, or where it could not get one."""
    flag = getattr(os, "O_TMPFILE", 0)  # Linux only
    if not flag:
        return None
    try:
        descriptor = os.open(folder, os.O_RDWR | flag, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):  # the file system, or an old kernel
            return None
        raise
    if not _by_descriptor(descriptor).exists():  # /proc is not mounted
        os.close(descriptor)
        return None
    _lock(descriptor)
    return descriptor


def _create_hidden(path: Path) -> tuple[int, Path]:
    """A locked file under a hidden name."""
    while True:
        hidden = _hidden_name(path)
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        _lock(descriptor)
        # Another process may have taken the file for a dead writer's before it was locked.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(hidden)):
                return descriptor, hidden
        os.close(descriptor)


def _lock(descriptor: int, wait: bool = True) -> bool:
    """Lock a file for this process; false if another one has it, or the file system has no locks."""
    import fcntl  # Unix only, as nothing else here is

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_dead(path: Path) -> int | None:
    """Remove a hidden file that no process has locked; its size in bytes, ``None`` if it stays."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        dead = stat.S_ISREG(status.st_mode) and _lock(descriptor, wait=False)
        if dead and os.path.samestat(status, os.lstat(path)):  # else renamed between open and lock
            os.unlink(path)
            return status.st_size
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return None


_RENAME_NOREPLACE = 1
"""Of ``linux/fs.h``."""


def _rename(source: Path, target: Path, overwrite: bool) -> None:
    """Rename a file; raises ``FileExistsError`` if the target exists and ``overwrite`` is false."""
    if not overwrite:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            here = -100  # AT_FDCWD
            if libc.renameat2(here, os.fsencode(source), here, os.fsencode(target), _RENAME_NOREPLACE) == 0:
                return
            error = ctypes.get_errno()
            if error not in (errno.EINVAL, errno.ENOSYS):  # the file system, or an old kernel
                raise OSError(error, os.strerror(error), os.fspath(target))
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

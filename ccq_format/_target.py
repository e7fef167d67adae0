"""An output file that appears under its name only when it is complete."""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType

from .errors import OutputError


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Target(Output):
    """Base of the writers of one file: they fill ``_temporary``, a file in the target's folder, and rename it in
    :meth:`close`."""

    def __init__(self, path: str | os.PathLike[str], overwrite: bool) -> None:
        """Raises ``OutputError`` as :meth:`_check_target` does; no file is created."""
        self.path = Path(path)
        self.overwrite = overwrite
        self._check_target()
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")

    def _check_target(self) -> None:
        """Raises ``OutputError`` if the target is a folder, its folder is missing, or it exists and may not."""
        if self.path.is_dir():
            raise OutputError("is a folder", file=self.path)
        if not self.path.parent.is_dir():
            raise OutputError("its folder does not exist", file=self.path)
        if self.path.exists() and not self.overwrite:
            raise OutputError("exists already", file=self.path)

    def _output_error(self, error: OSError) -> OutputError:
        return OutputError(error.strerror or str(error), file=self.path)

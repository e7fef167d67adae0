"""Input files that are opened several times, and must be the same each time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

CHANGED = "has changed since it was opened"


@dataclass(frozen=True)
class FileState:
    """Size in bytes and time of change in ns, by which a file counts as the same; where it lies may change."""

    size: int
    time: int

    @classmethod
    def of(cls, file: BinaryIO) -> FileState:
        """The state of an open file."""
        status = os.fstat(file.fileno())
        return cls(status.st_size, status.st_mtime_ns)


def read_array(
    path: str | os.PathLike[str], state: FileState, dtype: DTypeLike, count: int, offset: int
) -> NDArray[Any]:
    """``count`` values from byte ``offset``, fewer where the file ends.  Raises ``OSError`` if the system refuses or
    the file has not, or has no longer, the given state."""
    with open(path, "rb", buffering=0) as file:
        values: NDArray[Any] = np.fromfile(file, dtype, count, offset=offset)
        if values.size == count:
            check_unchanged(file, state)
    return values


def check_unchanged(file: BinaryIO, state: FileState) -> None:
    """After reading: raises ``OSError`` if the file has another state."""
    if FileState.of(file) != state:
        raise OSError(CHANGED)

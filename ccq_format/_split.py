"""Models in several files, as llama.cpp's ``llama-gguf-split`` makes them (spec section 4.4).

``NAME-00001-of-00003.gguf`` has all metadata and the first tensors, the others the rest; each says which part it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from ._header import ALIGNMENT_KEY, Header, validate_header
from ._writer import ModelWriter
from .errors import HeaderError, InputError, OutputError, PlanError
from .output import Output

if TYPE_CHECKING:
    from .gguf_io import Model

PART_KEY, COUNT_KEY, TENSORS_KEY = "split.no", "split.count", "split.tensors.count"
MAX_PARTS = (1 << 16) - 1
"""What the keys' uint16 can count."""

_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
_ROOM = 512
"""Bytes that the header of a part has at most beside the metadata that is copied and the list of tensors."""


def part_path(path: str | os.PathLike[str], part: int, count: int) -> Path:
    """The name of one of ``count`` parts (the first is 0) of the model that would else be ``path``."""
    path = Path(path)
    stem = _SUFFIX.sub("", path.name.removesuffix(".gguf"))
    return path.with_name(f"{stem}-{part + 1:05}-of-{count:05}.gguf")


def read_parts(path: str | os.PathLike[str], header: Header) -> list[tuple[str, Header]]:
    """The names and headers of all files of the model whose first file is ``path``; just that one as a rule.

    Raises ``HeaderError`` if the files contradict each other or ``path`` is not the first, ``InputError`` if one is
    missing, and what ``validate_header`` raises.
    """
    name = os.fspath(path)
    count = _number(header, COUNT_KEY, name, 1)
    if count < 2:
        return [(name, header)]
    part = _number(header, PART_KEY, name, -1)
    if not 0 <= part < count <= MAX_PARTS:
        raise HeaderError(f"says that it is part {part} of {count} (from 0 on)", file=name)
    if os.path.basename(name) != part_path(name, part, count).name:
        raise HeaderError(
            f"is part {part + 1} of {count}, but its name does not end with -{part + 1:05}-of-{count:05}.gguf, so the "
            "others cannot be found",
            file=name,
        )
    if part:
        first = part_path(name, 0, count).name
        raise HeaderError(f"is part {part + 1} of {count}: give the first one, {first}", file=name)
    parts = [(name, header)]
    for number in range(1, count):
        other = os.fspath(part_path(name, number, count))
        if not os.path.exists(other):
            raise InputError(f"part {number + 1} of {count} is missing", file=other)
        more = validate_header(other)
        said = _number(more, PART_KEY, other, -1), _number(more, COUNT_KEY, other, count)
        if said != (number, count):
            raise HeaderError(f"says that it is part {said[0]} of {said[1]} (from 0 on)", file=other)
        parts.append((other, more))
    _check_tensors(parts)
    return parts


def _number(header: Header, key: str, file: str, default: int) -> int:
    field = header.fields.get(key)
    if field is None:
        return default
    if not isinstance(field.value, int) or isinstance(field.value, bool):
        raise HeaderError(f"{key} is no integer", file=file)
    return field.value


def _check_tensors(parts: Sequence[tuple[str, Header]]) -> None:
    name, first = parts[0]
    seen: dict[str, str] = {}
    for file, header in parts:
        for tensor in header.tensors:
            if tensor.name in seen:
                raise HeaderError(f"is in {seen[tensor.name]} as well", file=file, tensor=tensor.name)
            seen[tensor.name] = file
    announced = _number(first, TENSORS_KEY, name, len(seen))
    if announced != len(seen):
        raise HeaderError(f"announces {announced} tensors; its {len(parts)} parts have {len(seen)}", file=name)


@dataclass(frozen=True)
class _Declared:
    """A tensor to be written, and the bytes it takes in a file: its data with padding, and its entry in the list."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    padded: int
    entry: int


class SplitWriter(Output):
    """A ``ModelWriter`` whose files have ``max_bytes`` bytes at most, but for one that holds a single larger tensor.

    A model that fits into one file is written as ``path``, others as ``part_path(path, ...)``.  No file appears before
    all are complete, and the first one, by which readers find the others, appears last.  With a ``job`` every part is
    kept and gone on with as a single file is.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        arch: str,
        max_bytes: int,
        *,
        overwrite: bool = False,
        encoder: str | None = None,
        job: Mapping[str, str] | None = None,
    ) -> None:
        """The arguments are those of ``ModelWriter``.  Raises ``OutputError`` and ``PlanError``."""
        if max_bytes < 1:
            raise PlanError(f"files of {max_bytes} bytes cannot be written")
        self.path = Path(path)
        self._arch, self._max_bytes, self._job = arch, max_bytes, job
        self._overwrite, self._encoder = overwrite, encoder
        self._draft = ModelWriter(path, arch, overwrite=True, encoder=encoder)  # collects and checks; is never begun
        self._declared: list[_Declared] = []
        self._parts: list[ModelWriter] = []
        self._current = 0

    @property
    def gguf(self) -> gguf.GGUFWriter:
        """Takes metadata, see ``ModelWriter``."""
        return self._draft.gguf

    @property
    def files(self) -> list[Path]:
        """The files that will appear; known after :meth:`begin`."""
        return [part.path for part in self._parts]

    @property
    def completed(self) -> int:
        """How many tensors, the first ones, are in the files."""
        return sum(part.completed for part in self._parts)

    @property
    def kept(self) -> int:
        """How many tensors an interrupted writer has left for the next one."""
        return sum(part.kept for part in self._parts)

    @property
    def written(self) -> int:
        """See ``ModelWriter.written``."""
        return self._parts[self._current].written if self._parts else 0

    @property
    def kept_bytes(self) -> int:
        """See ``ModelWriter.kept_bytes``."""
        return sum(part.kept_bytes for part in self._parts)

    def copy_metadata(self, model: Model) -> None:
        """See ``ModelWriter.copy_metadata``."""
        self._draft.copy_metadata(model)

    def add_tensor(self, name: str, type_name: str, shape: Sequence[int]) -> int:
        """See ``ModelWriter.add_tensor``."""
        nbytes = self._draft.add_tensor(name, type_name, shape)
        padded = nbytes + -nbytes % self.gguf.data_alignment
        entry = 8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8
        self._declared.append(_Declared(name, type_name, tuple(shape), padded, entry))
        return nbytes

    def begin(self) -> None:
        """Decide which tensor goes into which file, and begin the first one that is not complete."""
        groups = self._groups()
        count = len(groups)
        if count > MAX_PARTS:
            raise PlanError(f"{count} files of {self._max_bytes} bytes; there may be {MAX_PARTS}", file=self.path)
        for number, group in enumerate(groups):
            path = self.path if count == 1 else part_path(self.path, number, count)
            job = self._job if self._job is None or count == 1 else {**self._job, "part": f"{number + 1} of {count}"}
            arch = self._arch if number == 0 else ""
            part = ModelWriter(path, arch, overwrite=self._overwrite, encoder=self._encoder, job=job)
            part.signed = self._draft.signed
            self._fill(part, number, count)
            for tensor in group:
                part.add_tensor(tensor.name, tensor.type_name, tensor.shape)
            self._parts.append(part)
        self._parts[0].begin()
        self._go_on()

    def _groups(self) -> list[list[_Declared]]:
        groups: list[list[_Declared]] = [[]]
        used = self._draft.metadata_bytes() + _ROOM
        for tensor in self._declared:
            if groups[-1] and used + tensor.padded + tensor.entry > self._max_bytes:
                groups.append([])
                used = _ROOM
            groups[-1].append(tensor)
            used += tensor.padded + tensor.entry
        return groups

    def _fill(self, part: ModelWriter, number: int, count: int) -> None:
        """The metadata of a part: of the first all there is, of the others what their own bytes depend on."""
        alignment = self.gguf.data_alignment
        if number == 0:
            part.gguf.kv_data[0].update(self.gguf.kv_data[0])
        elif alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
            part.gguf.add_uint32(ALIGNMENT_KEY, alignment)
        part.gguf.data_alignment = alignment
        if count > 1:
            part.gguf.add_uint16(PART_KEY, number)
            part.gguf.add_uint16(COUNT_KEY, count)
            part.gguf.add_int32(TENSORS_KEY, len(self._declared))

    def _go_on(self) -> None:
        """Begin the next parts, those that are complete already included."""
        while self._parts[self._current].is_complete and self._current + 1 < len(self._parts):
            self._current += 1
            self._parts[self._current].begin()

    def write(self, name: str, data: np.ndarray) -> None:
        """See ``ModelWriter.write``."""
        part = self._parts[self._current]
        part.write(name, data)
        self._go_on()

    def close(self) -> None:
        """Complete all files and give them their names, the first one last.

        Raises what ``ModelWriter.close`` does, and ``OutputError`` if another process writes the same files: no reader
        may find parts of two models together.
        """
        if not self._parts:
            self.begin()
        try:
            for part in self._parts:
                part.complete()
            if len(self._parts) > 1 and self._overwrite:  # no reader may find old and new files together
                self._parts[0].path.unlink(missing_ok=True)
            for part in reversed(self._parts):
                part.publish()
            for part in self._parts if len(self._parts) > 1 else ():
                if not part.is_published():
                    raise OutputError("another process has written this file meanwhile", file=part.path)
            for part in self._parts:
                part.settle()
        except BaseException:
            for part in self._parts:  # the first one first
                part.unpublish()
            raise
        finally:
            self.abort()

    def abort(self) -> None:
        """See ``ModelWriter.abort``."""
        for part in self._parts:
            part.abort()

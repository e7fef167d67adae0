"""Reading and writing GGUF files that hold CCQ tensors.

Reading: :func:`open_model` checks the whole header first (``_header``: bounded reads, no allocation that a header field
can inflate) and then maps or reads the tensor data.  Writing: :class:`ModelWriter` streams tensors into a file that
appears when everything is there (``output``); :class:`SplitWriter` does so with several files.

Shapes are in numpy order everywhere: the last dimension is the row, whose length must be a multiple of the type's
block.  Type names are lower-case: ours (``ccq_t2`` ...) and gguf's (``f32``, ``bf16``, ``q8_0``, ``q2_k`` ...).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType

from . import codec
from ._header import ENCODER_KEY, FEATURES_KEY, SPEC_VERSION_KEY, Header, KeyValue, validate_header
from ._split import SplitWriter, part_path, read_parts
from ._unchanged import FileState, read_array
from ._writer import ModelWriter
from .errors import CcqWarning, InputError, TensorTypeError, TruncatedError
from .layouts import Layout

__all__ = [
    "ENCODER_KEY",
    "FEATURES_KEY",
    "SPEC_VERSION_KEY",
    "Header",
    "KeyValue",
    "Model",
    "ModelWriter",
    "SplitWriter",
    "TensorInfo",
    "open_model",
    "part_path",
    "validate_header",
]

CHUNK_WEIGHTS = 1 << 22
"""Weights that :meth:`TensorInfo.rows` decodes at a time: 16 MiB of float32."""

_TYPED = {
    GGMLQuantizationType.F32: "<f4",
    GGMLQuantizationType.F16: "<f2",
    GGMLQuantizationType.F64: "<f8",
    GGMLQuantizationType.I8: "i1",
    GGMLQuantizationType.I16: "<i2",
    GGMLQuantizationType.I32: "<i4",
    GGMLQuantizationType.I64: "<i8",
}
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.F64)


class _Mapping:
    """The file's bytes, mapped on first use or read piece by piece."""

    def __init__(self, path: str, state: FileState) -> None:
        self.path = path
        self.state = state
        self._bytes: np.ndarray | None = None

    def slice(self, offset: int, nbytes: int, tensor: str) -> np.ndarray:
        """``nbytes`` bytes from ``offset`` as a read-only uint8 array.  Raises InputError, TruncatedError."""
        if self._bytes is None:
            try:
                self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:  # ValueError: the file has become empty
                raise InputError(str(error), file=self.path, tensor=tensor) from error
        part = self._bytes[offset : offset + nbytes]
        if part.size != nbytes:
            raise TruncatedError("the file has become shorter since it was opened", file=self.path, tensor=tensor)
        return part

    def read(self, offset: int, nbytes: int, tensor: str) -> np.ndarray:
        """The same bytes in an array of their own.  Raises InputError, TruncatedError."""
        try:
            part = read_array(self.path, self.state, np.uint8, nbytes, offset)
        except OSError as error:
            raise InputError(error.strerror or str(error), file=self.path, tensor=tensor) from error
        if part.size != nbytes:
            raise TruncatedError("the file has become shorter since it was opened", file=self.path, tensor=tensor)
        return part


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.  ``shape`` is in numpy order, ``offset`` counts bytes from the start of its file."""

    name: str
    type_name: str
    layout: Layout | None
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    _mapping: _Mapping = field(repr=False, compare=False)

    @property
    def file(self) -> str:
        """The file that the tensor is in."""
        return self._mapping.path

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def columns(self) -> int:
        """Row length in elements."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // max(1, self.n_rows)

    @property
    def bpw(self) -> float:
        """Bits per weight; 0 of a tensor without any."""
        return 8 * self.nbytes / max(1, self.n_weights)

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        """The type as gguf's enum member."""
        return GGMLQuantizationType[self.type_name.upper()]

    def data(self) -> np.ndarray:
        """The stored values, mapped from the file and read-only.

        f32, f16, f64 and the integer types: an array of that dtype with the tensor's shape.  Every other type, bf16
        included: uint8 ``[..., row_bytes]``.

        Raises:
            InputError, TruncatedError: the file has changed since it was opened.
        """
        raw = self._mapping.slice(self.offset, self.nbytes, self.name)
        dtype = _TYPED.get(self.ggml_type)
        if dtype is not None:
            return raw.view(dtype).reshape(self.shape)
        return raw.reshape(*self.shape[:-1], self.row_bytes)

    def stored_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows as stored, uint8 ``[stop - start, row_bytes]``; rows count over all leading dimensions.

        Read into memory of their own: pages of a mapped file count as the process's as long as memory is not short,
        2.3 GB after a file of 2.2 GB.

        Raises:
            InputError, TruncatedError: the file has changed since it was opened.
        """
        count = stop - start
        raw = self._mapping.read(self.offset + start * self.row_bytes, count * self.row_bytes, self.name)
        return raw.reshape(count, self.row_bytes)

    def rows(self, max_weights: int = CHUNK_WEIGHTS) -> Iterator[tuple[int, np.ndarray]]:
        """Decode in chunks of whole rows: yields (index of the first row, float32 ``[rows, columns]``).

        Rows count over all leading dimensions.  Each chunk holds ``max_weights`` elements at most, or one row.

        Raises:
            TensorTypeError: the type cannot be decoded to float32 (integers, and types gguf has no decoder for).
        """
        kind = self.ggml_type
        if kind not in _FLOATS and kind not in quants._type_traits:
            raise TensorTypeError(f"no decoder for type {self.type_name}", file=self._mapping.path, tensor=self.name)
        step = max(1, max_weights // max(1, self.columns))
        for first in range(0, self.n_rows, step):
            yield first, self._decode(self.stored_rows(first, min(first + step, self.n_rows)))

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        if self.layout is not None:
            return codec.decode(self.layout, rows)
        with np.errstate(all="ignore"):  # any bit pattern may come: NaN, or values beyond float32
            if self.ggml_type in _FLOATS:
                return rows.view(_TYPED[self.ggml_type]).astype(np.float32)
            return np.asarray(quants.dequantize(rows, self.ggml_type), dtype=np.float32)

    def dequantize(self) -> np.ndarray:
        """The whole tensor as float32 with its shape; see :meth:`rows` for large tensors and for errors."""
        out = np.empty((self.n_rows, self.columns), dtype=np.float32)
        for first, part in self.rows():
            out[first : first + len(part)] = part
        return out.reshape(self.shape)

    def check_blocks(self) -> None:
        """Raise ``BlockError`` if a block of this CCQ tensor holds parameters that no encoder may write."""
        if self.layout is None:
            return
        step = max(1, CHUNK_WEIGHTS // self.columns)
        for first in range(0, self.n_rows, step):
            codec.check_blocks(
                self.layout,
                self.stored_rows(first, min(first + step, self.n_rows)),
                file=self._mapping.path,
                tensor=self.name,
                first_block=first * (self.columns // self.layout.block_weights),
            )


@dataclass(frozen=True)
class Model:
    """An opened file, or several files of one split model: ``path`` is the first of ``files``.

    ``metadata`` maps keys to Python values (int, float, bool, str, or a list of one of them), ``fields`` has the
    GGUF value types with them.  ``spec_version`` and ``encoder`` are ``None`` where the file does not say.
    """

    path: str
    metadata: dict[str, Any]
    fields: dict[str, KeyValue]
    tensors: list[TensorInfo]
    spec_version: str | None
    encoder: str | None
    alignment: int
    files: tuple[str, ...]

    @property
    def arch(self) -> str:
        """``general.architecture``, or an empty string."""
        value = self.metadata.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    @property
    def file_bpw(self) -> float:
        """Bits of all tensors over the number of all weights; 0 for a file without tensors."""
        weights = sum(t.n_weights for t in self.tensors)
        return 8 * sum(t.nbytes for t in self.tensors) / weights if weights else 0.0

    def tensor(self, name: str) -> TensorInfo:
        """The tensor called ``name``.  Raises ``KeyError``."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a GGUF file, checked as section 4 of the spec demands; the first of several files of one model stands for
    all of them.

    Warns with ``CcqWarning`` if the file has CCQ tensors but no ``ccq.spec_version``.

    Raises:
        InputError: a file is missing or cannot be read.
        FormatError: one of its subclasses, naming the file, the tensor and the reason.
    """
    header = validate_header(path)
    name = os.fspath(path)
    parts = read_parts(path, header)
    tensors = []
    for file, part in parts:
        mapping = _Mapping(file, part.state)
        tensors += [
            TensorInfo(t.name, t.type_name, t.layout, t.shape, t.nbytes, t.offset, mapping) for t in part.tensors
        ]
    model = Model(
        path=name,
        metadata={key: kv.value for key, kv in header.fields.items()},
        fields=header.fields,
        tensors=tensors,
        spec_version=header.spec_version,
        encoder=header.encoder,
        alignment=header.alignment,
        files=tuple(file for file, _ in parts),
    )
    if header.spec_version is None and any(t.layout is not None for t in tensors):
        warnings.warn(
            f"{name}: has CCQ tensors but no {SPEC_VERSION_KEY}; reading them by their type ids", CcqWarning, 2
        )
    return model

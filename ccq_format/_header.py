"""Strict check of a GGUF header (spec section 4), before anything else looks at the file.

Every count and length is compared with the bytes that are left in the file before something of that size is read, so
that memory stays proportional to the file, and the limits below bound it where the file itself is large.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ._unchanged import FileState
from .errors import (
    AlignmentError,
    FeatureError,
    GgufVersionError,
    HeaderError,
    InputError,
    NotGgufError,
    OverlapError,
    ShapeError,
    SpecVersionError,
    TensorTypeError,
    TruncatedError,
)
from .layouts import LAYOUTS, SPEC_VERSION, Layout

SPEC_VERSION_KEY = "ccq.spec_version"
FEATURES_KEY = "ccq.features"
ENCODER_KEY = "ccq.encoder"
ALIGNMENT_KEY = "general.alignment"

KNOWN_FEATURES: frozenset[str] = frozenset()
"""Must-understand features that this reader implements."""

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Container versions whose layout is the one read here; llama.cpp accepts the same."""

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_VALUES = 1 << 23
"""Metadata values of one file, array elements counted one by one (the largest vocabularies need about 2**20)."""
MAX_STRING_BYTES = 1 << 26
"""Bytes of one string; a whole ``tokenizer.json`` kept as a value takes about 2**25."""
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 63
"""Bytes of a tensor name: ggml's GGML_MAX_NAME with its terminator."""
MAX_DIMS = 4
_MAX_INT = (1 << 63) - 1

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_FOREIGN_IDS = {142: "PQ2_0 of PrismML's llama.cpp", 143: "PTQ1_0 of PrismML's llama.cpp"}
"""Types of others that are published, and that neither llama.cpp nor this package knows."""
_BY_ID: dict[int, Layout] = {layout.gguf_id: layout for layout in LAYOUTS}


@dataclass(frozen=True)
class KeyValue:
    """One metadata value: int, float, bool or str; or, with type ARRAY, a list of ``sub_type`` values."""

    value: Any
    type: GGUFValueType
    sub_type: GGUFValueType | None = None


@dataclass(frozen=True)
class TensorHeader:
    """One entry of the tensor list.  ``shape`` is in numpy order, ``offset`` counts from the start of the file."""

    name: str
    type_name: str
    layout: Layout | None
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a well-formed file says before its tensor data."""

    version: int
    fields: dict[str, KeyValue]
    tensors: list[TensorHeader]
    alignment: int
    spec_version: str | None
    encoder: str | None
    state: FileState
    """Of the file when the header was read."""


class _Cursor:
    """Reads little-endian values from a file; never more than the file has."""

    def __init__(self, stream: BinaryIO, size: int, path: str) -> None:
        self.stream = stream
        self.size = size
        self.path = path
        self.at = 0
        self.values_left = MAX_VALUES

    @property
    def remaining(self) -> int:
        """Bytes from here to the end of the file."""
        return self.size - self.at

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes.  ``what`` names them in the error."""
        if count > self.remaining:
            raise TruncatedError(
                f"the file ends at byte {self.size}, inside {what} ({count} bytes from byte {self.at})", file=self.path
            )
        data = self.stream.read(count)
        if len(data) != count:
            raise TruncatedError(f"the file became shorter while {what} was read", file=self.path)
        self.at += count
        return data

    def unpack(self, fmt: str, what: str) -> Any:
        """One scalar in ``struct`` notation."""
        return struct.unpack(fmt, self.take(struct.calcsize(fmt), what))[0]

    def spend(self, count: int, what: str) -> None:
        """Count ``count`` metadata values against the limit."""
        if count > self.values_left:
            raise HeaderError(
                f"{what} has {count} elements; metadata may hold {MAX_VALUES} values in all", file=self.path
            )
        self.values_left -= count

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """A length-prefixed UTF-8 string."""
        length = self.unpack("<Q", f"the length of {what}")
        if length > limit:
            raise HeaderError(f"{what} is {length} bytes long; the limit is {limit}", file=self.path)
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise HeaderError(f"{what} is no valid UTF-8 (byte {error.start} of it)", file=self.path) from None

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings: :meth:`string` without its calls, for vocabularies have a million of them."""
        out: list[str] = []
        read, at, size = self.stream.read, self.at, self.size
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            if at + 8 + length > size or length > MAX_STRING_BYTES:
                break
            data = read(length)
            at += 8 + length
            try:
                out.append(data.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise HeaderError(f"{what} is no valid UTF-8 (byte {error.start} of it)", file=self.path) from None
        if len(out) < count:  # come to the same string by the careful way, which names the reason
            self.stream.seek(at)
            self.at = at
            self.string(what)
            raise TruncatedError(f"the file changed while {what} was read", file=self.path)
        self.at = at
        return out

    def value_type(self, what: str) -> GGUFValueType:
        """A value type id."""
        raw = self.unpack("<I", f"the type of {what}")
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise HeaderError(f"{what} has the unknown value type {raw}", file=self.path) from None

    def scalar(self, kind: GGUFValueType, what: str) -> Any:
        """One value that is no array."""
        if kind == GGUFValueType.STRING:
            return self.string(what)
        if kind == GGUFValueType.BOOL:
            return self.booleans(1, what)[0]
        return self.unpack(_SCALARS[kind], what)

    def booleans(self, count: int, what: str) -> list[bool]:
        """``count`` bytes that are 0 or 1."""
        data = self.take(count, what)
        if data.translate(None, b"\0\1"):
            raise HeaderError(f"{what} holds a boolean that is neither 0 nor 1", file=self.path)
        return [byte == 1 for byte in data]

    def value(self, what: str) -> KeyValue:
        """A value with its type before it."""
        kind = self.value_type(what)
        if kind != GGUFValueType.ARRAY:
            self.spend(1, what)
            return KeyValue(self.scalar(kind, what), kind)
        sub_type = self.value_type(f"the elements of {what}")
        if sub_type == GGUFValueType.ARRAY:
            # GGUF's text permits them, llama.cpp refuses the file, gguf-py flattens them: nothing can rely on them.
            raise HeaderError(f"{what} is an array of arrays", file=self.path)
        count = self.unpack("<Q", f"the element count of {what}")
        self.spend(count, what)
        if sub_type == GGUFValueType.BOOL:
            return KeyValue(self.booleans(count, what), kind, sub_type)
        if sub_type == GGUFValueType.STRING:
            return KeyValue(self.strings(count, what), kind, sub_type)
        dtype = np.dtype(_SCALARS[sub_type])
        return KeyValue(np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist(), kind, sub_type)


def validate_header(path: str | os.PathLike[str]) -> Header:
    """Read and check everything in front of the tensor data, and that the data fits the file.

    Raises:
        InputError: the file is missing, no regular file, or cannot be read.
        FormatError: a subclass per reason (``NotGgufError``, ``GgufVersionError``, ``TruncatedError``,
            ``HeaderError``, ``AlignmentError``, ``OverlapError``, ``TensorTypeError``, ``ShapeError``,
            ``SpecVersionError``, ``FeatureError``).
    """
    name = os.fspath(path)
    try:
        regular = stat.S_ISREG(os.stat(name).st_mode)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise InputError(getattr(error, "strerror", None) or str(error), file=name) from error
    if not regular:
        raise InputError("is no regular file", file=name)  # opening a pipe would block
    try:
        with open(name, "rb", buffering=1 << 16) as stream:
            state = FileState.of(stream)
            return _read_header(_Cursor(stream, state.size, name), state)
    except OSError as error:
        raise InputError(error.strerror or str(error), file=name) from error


def _read_header(cursor: _Cursor, state: FileState) -> Header:
    version = _read_version(cursor)
    n_tensors = cursor.unpack("<Q", "the tensor count")
    n_keys = cursor.unpack("<Q", "the key count")
    for count, limit, what in ((n_tensors, MAX_TENSORS, "tensors"), (n_keys, MAX_KEYS, "keys")):
        if count > limit:
            raise HeaderError(f"announces {count} {what}; the limit is {limit}", file=cursor.path)
    fields = _read_fields(cursor, n_keys)
    alignment = _alignment(fields, cursor.path)
    # Before the tensors: a newer version may well have types that are unknown here.
    spec_version = _check_spec_version(fields, cursor.path)
    _check_features(fields, cursor.path)
    encoder = fields.get(ENCODER_KEY)
    if encoder is not None and encoder.type != GGUFValueType.STRING:
        raise HeaderError(f"{ENCODER_KEY} is no string", file=cursor.path)
    entries = [_read_tensor(cursor, index) for index in range(n_tensors)]
    tensors = _place_tensors(cursor, entries, alignment)
    return Header(version, fields, tensors, alignment, spec_version, encoder.value if encoder else None, state)


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.stream.read(len(MAGIC))
    if magic != MAGIC:
        if MAGIC.startswith(magic):
            raise TruncatedError(f"the file ends at byte {len(magic)}, inside the magic", file=cursor.path)
        raise NotGgufError(f"starts with {magic!r}, not {MAGIC!r}", file=cursor.path)
    cursor.at = len(MAGIC)
    version: int = cursor.unpack("<I", "the GGUF version")
    if version in VERSIONS:
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, *VERSIONS):
        raise GgufVersionError(f"is a big-endian GGUF file (version {swapped})", file=cursor.path)
    raise GgufVersionError(f"has GGUF version {version}; versions 2 and 3 are supported", file=cursor.path)


def _read_fields(cursor: _Cursor, count: int) -> dict[str, KeyValue]:
    fields: dict[str, KeyValue] = {}
    for index in range(count):
        key = cursor.string(f"key {index}", MAX_KEY_BYTES)
        if not key:
            raise HeaderError(f"key {index} is empty", file=cursor.path)
        if key in fields:
            raise HeaderError(f"key '{key}' appears twice", file=cursor.path)
        fields[key] = cursor.value(f"the value of '{key}'")
    return fields


def _alignment(fields: dict[str, KeyValue], path: str) -> int:
    field = fields.get(ALIGNMENT_KEY)
    if field is None:
        return 32
    if field.type != GGUFValueType.UINT32:
        raise HeaderError(f"{ALIGNMENT_KEY} is no uint32", file=path)
    alignment: int = field.value
    if alignment < 1 or alignment & (alignment - 1):
        raise AlignmentError(f"{ALIGNMENT_KEY} is {alignment}, which is no power of two", file=path)
    return alignment


def _check_spec_version(fields: dict[str, KeyValue], path: str) -> str | None:
    field = fields.get(SPEC_VERSION_KEY)
    if field is None:
        return None
    match = re.fullmatch(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", str(field.value))
    if field.type != GGUFValueType.STRING or match is None:
        raise SpecVersionError(f"{SPEC_VERSION_KEY} is {field.value!r:.40}, not a string 'MAJOR.MINOR'", file=path)
    needed = (int(match[1]), int(match[2]))
    if needed[0] != SPEC_VERSION[0] or needed > SPEC_VERSION:
        raise SpecVersionError(
            f"needs CCQ specification {field.value}; this reader knows {'{}.{}'.format(*SPEC_VERSION)}", file=path
        )
    return str(field.value)


def _check_features(fields: dict[str, KeyValue], path: str) -> None:
    field = fields.get(FEATURES_KEY)
    if field is None:
        return
    if field.type != GGUFValueType.ARRAY or field.sub_type != GGUFValueType.STRING:
        raise FeatureError(f"{FEATURES_KEY} is no array of strings", file=path)
    unknown = [feature for feature in field.value if feature not in KNOWN_FEATURES]
    if unknown:
        raise FeatureError(f"needs the unknown feature '{unknown[0]:.80}' ({len(unknown)} in all)", file=path)


def _read_tensor(cursor: _Cursor, index: int) -> TensorHeader:
    """One entry of the tensor list; ``offset`` still counts from the start of the data section."""
    path = cursor.path
    name = cursor.string(f"the name of tensor {index}", MAX_NAME_BYTES)
    if not name or "\0" in name:
        raise HeaderError(f"the name of tensor {index} is empty or holds a null character", file=path)
    n_dims = cursor.unpack("<I", f"the dimension count of tensor '{name}'")
    if not 1 <= n_dims <= MAX_DIMS:
        raise ShapeError(f"has {n_dims} dimensions; 1 to {MAX_DIMS} are possible", file=path, tensor=name)
    dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, f"the shape of tensor '{name}'"))
    weights = prod(dims)
    if weights > _MAX_INT:
        raise ShapeError(f"has {weights} elements, more than 64 bits can count: {dims}", file=path, tensor=name)
    kind = _tensor_type(cursor.unpack("<I", f"the type of tensor '{name}'"), path, name)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    type_name = kind.name.lower()
    if weights == 0 and kind in _BY_ID:
        raise ShapeError(f"has an empty dimension: {dims}", file=path, tensor=name)
    if dims[0] % block:
        raise ShapeError(
            f"row length {dims[0]} is no multiple of {block}, the block of {type_name}", file=path, tensor=name
        )
    offset = cursor.unpack("<Q", f"the offset of tensor '{name}'")
    return TensorHeader(name, type_name, _BY_ID.get(kind), dims[::-1], weights // block * block_bytes, offset)


def _tensor_type(raw: int, path: str, tensor: str) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(raw)
    except ValueError:
        name = f" ({_FOREIGN_IDS[raw]})" if raw in _FOREIGN_IDS else ""
        raise TensorTypeError(f"unknown type id {raw}{name}", file=path, tensor=tensor) from None


def _blocks(weights: int, nbytes: int) -> Callable[[int], int]:
    return lambda n: n // weights * nbytes


_OTHER_TYPES: dict[int, tuple[tuple[str, Callable[[int], int]], ...]] = {
    4: (("Q4_2", _blocks(16, 10)),),
    5: (("Q4_3", _blocks(16, 12)),),
    31: (("Q4_0_4_4", _blocks(32, 18)),),
    32: (("Q4_0_4_8", _blocks(32, 18)),),
    33: (("Q4_0_8_8", _blocks(32, 18)),),
    36: (("BitNet's I2_S", lambda n: n // 4 + 32), ("IQ4_NL_4_4", _blocks(32, 18))),
    37: (("BitNet's I8_S", lambda n: n), ("IQ4_NL_4_8", _blocks(32, 18))),
    38: (("BitNet's TL1", lambda n: n // 4 + 32), ("IQ4_NL_8_8", _blocks(32, 18))),
    # Published under these ids before ggml gave them another meaning.
    40: (("PrismML's Q1_0 with 32 weights per block", _blocks(32, 6)),),
    42: (("PrismML's Q2_0 with 128 weights per block", _blocks(128, 34)),),
}
"""What else the ids of the CCQ types (spec section 4.3) and of two of ggml's mean or meant: names, and bytes of n
weights."""


def _place_tensors(cursor: _Cursor, entries: list[TensorHeader], alignment: int) -> list[TensorHeader]:
    """Check names and offsets; returns the entries with absolute offsets.

    llama.cpp demands that tensors lie in the order of the list, each right behind the padded end of the one before.
    That also unmasks files in which an id of ours means another type: its tensors have another size for the same shape.
    """
    path = cursor.path
    base = -(-cursor.at // alignment) * alignment
    seen: set[str] = set()
    expected = 0
    placed: list[TensorHeader] = []
    for i, entry in enumerate(entries):
        if entry.name in seen:
            raise HeaderError("the name appears twice", file=path, tensor=entry.name)
        seen.add(entry.name)
        if entry.offset % alignment:
            raise AlignmentError(
                f"offset {entry.offset} is no multiple of the alignment {alignment}", file=path, tensor=entry.name
            )
        if entry.offset < expected:
            raise OverlapError(
                f"offset {entry.offset} lies inside the tensor before, which ends at {expected}",
                file=path,
                tensor=entry.name,
            )
        behind = entries[i + 1].offset if i + 1 < len(entries) else cursor.size - base
        _refuse_other_type(entry, behind - entry.offset, alignment, path)
        end = base + entry.offset + entry.nbytes
        if end > cursor.size:
            raise TruncatedError(
                f"its data ends at byte {end}, the file at {cursor.size}", file=path, tensor=entry.name
            )
        if entry.offset > expected:
            if placed:
                _refuse_misplaced(placed[-1], entry.offset - (placed[-1].offset - base), path)
            raise HeaderError(f"offset {entry.offset} leaves a gap: expected {expected}", file=path, tensor=entry.name)
        expected = entry.offset + -(-entry.nbytes // alignment) * alignment
        placed.append(
            TensorHeader(entry.name, entry.type_name, entry.layout, entry.shape, entry.nbytes, base + entry.offset)
        )
    extra = cursor.size - (base + expected)
    if placed and extra > 0 and any(entry.layout is not None for entry in placed):
        _refuse_misplaced(placed[-1], cursor.size - placed[-1].offset, path)
        raise HeaderError(f"{extra} bytes follow the last tensor", file=path)
    return placed


def _refuse_other_type(entry: TensorHeader, room: int, alignment: int, path: str) -> None:
    """Raise ``TensorTypeError`` if ``entry``, which has ``room`` bytes in the file, takes as many bytes as another type
    of its id would (spec section 4.3), and not those of its type."""
    gguf_id = GGMLQuantizationType[entry.type_name.upper()]

    def fits(nbytes: int) -> bool:
        return room in (nbytes, -(-nbytes // alignment) * alignment)

    for name, size in _OTHER_TYPES.get(gguf_id, ()):
        if fits(size(prod(entry.shape))) and not fits(entry.nbytes):
            raise TensorTypeError(
                f"takes {room} bytes in the file, as {name} would, and not {entry.nbytes} as {entry.type_name}: "
                f"in this file type id {gguf_id} is {name}",
                file=path,
                tensor=entry.name,
            )


def _refuse_misplaced(entry: TensorHeader, room: int, path: str) -> None:
    """Raise ``TensorTypeError`` if ``entry``, which has ``room`` bytes in the file, is of a CCQ type."""
    if entry.layout is None:
        return
    raise TensorTypeError(
        f"takes {room} bytes in the file, but {entry.nbytes} as {entry.type_name}: "
        f"type id {entry.layout.gguf_id} may mean something else in this file",
        file=path,
        tensor=entry.name,
    )

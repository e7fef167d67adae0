"""Files as trees of plain values (dict, list, str, bytes, int, float, bool, None), and back.

``decode`` takes intact files; ``encode`` takes any tree that mutation makes of them and writes something for it.
"""

from __future__ import annotations

import json
import math
import struct
from math import prod
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_DATA = 1 << 20
"""Bytes of data that are laid out anew where a tree announces other tensors."""


# --- values that fit nothing ----------------------------------------------------------------------------------------


def integer(value: Any) -> int:
    """``value`` as an integer, 0 if it is nothing of the kind."""
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else 0
    return value if isinstance(value, int) else 0


def unsigned(value: Any, size: int) -> bytes:
    """The lowest ``size`` bytes of an integer."""
    return (integer(value) % 256**size).to_bytes(size, "little")


def text(value: Any) -> bytes:
    """``value`` as UTF-8, invalid where it has surrogates."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def _string(value: Any) -> bytes:
    data = text(value)
    return unsigned(len(data), 8) + data


# --- GGUF -----------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, fmt: str) -> Any:
        (value,) = struct.unpack_from("<" + fmt, self.data, self.at)
        self.at += struct.calcsize("<" + fmt)
        return value

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            sub = self.take("I")
            return [sub, [self.value(sub) for _ in range(self.take("Q"))]]
        return self.take(_SCALARS[kind])


def decode_gguf(data: bytes) -> Any:
    """``[version, [[key, type, value] ..], [[name, dimensions, type, offset] ..], data]``; an array is ``[type,
    [value ..]]``, offsets count from the start of the data."""
    reader = _Reader(data)
    reader.at = 4
    version, n_tensors, n_keys = reader.take("I"), reader.take("Q"), reader.take("Q")
    keys = []
    for _ in range(n_keys):
        key, kind = reader.string(), reader.take("I")
        keys.append([key, kind, reader.value(kind)])
    tensors = []
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.take("I")
        tensors.append([name, [reader.take("Q") for _ in range(n_dims)], reader.take("I"), reader.take("Q")])
    start = reader.at + -reader.at % _alignment(keys) if tensors else reader.at
    return [version, keys, tensors, data[start:]]


def encode_gguf(tree: Any, repair: bool) -> bytes:
    """``repair``: the data is cut or filled up so that it is what shapes and types ask for, in that order."""
    version, keys, tensors, data = (*_listed(tree), None, None, None, None)[:4]
    keys, tensors, data = _listed(keys), _listed(tensors), data if isinstance(data, bytes) else text(data)
    alignment = _alignment(keys)
    if repair:
        tensors, data = _laid_out(tensors, data, alignment)
    out = bytearray(b"GGUF" + unsigned(version, 4) + unsigned(len(tensors), 8) + unsigned(len(keys), 8))
    for entry in keys:
        key, kind, value = (*_listed(entry), None, None, None)[:3]
        out += _string(key) + _typed(kind, value)
    for entry in tensors:
        name, dims, kind, offset = (*_listed(entry), None, None, None, None)[:4]
        dims = _listed(dims)
        out += _string(name) + unsigned(len(dims), 4) + b"".join(unsigned(d, 8) for d in dims)
        out += unsigned(kind, 4) + unsigned(offset, 8)
    return bytes(out + b"\0" * (-len(out) % alignment) + data)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _alignment(keys: list[Any]) -> int:
    for entry in keys:
        if isinstance(entry, list) and len(entry) == 3 and entry[0] == "general.alignment":
            value = integer(entry[2])
            return value if 0 < value <= 4096 else 32
    return 32


def _typed(kind: Any, value: Any) -> bytes:
    """A value with its type before it: that of the value where it is none of ``kind``."""
    try:
        return unsigned(kind, 4) + _value(integer(kind), value)
    except (struct.error, ArithmeticError, LookupError, TypeError, ValueError):
        for other, fits in ((7, bool), (11, int), (12, float)):
            if isinstance(value, fits) and not (other == 11 and abs(value) >= 1 << 63):
                return unsigned(other, 4) + _value(other, value)
        if isinstance(value, list):
            return unsigned(_ARRAY, 4) + unsigned(_STRING, 4) + unsigned(len(value), 8) + b"".join(map(_string, value))
        return unsigned(_STRING, 4) + _string(value)


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    if kind == _ARRAY:
        sub, values = value
        return unsigned(sub, 4) + unsigned(len(values), 8) + b"".join(_value(sub, v) for v in values)
    return struct.pack("<" + _SCALARS[kind], value)


def _laid_out(tensors: list[Any], data: bytes, alignment: int) -> tuple[list[Any], bytes]:
    placed, at = [], 0
    for entry in tensors:
        name, dims, kind, _ = (*_listed(entry), None, None, None, None)[:4]
        size = 0
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(integer(kind))]
            size = prod(integer(d) for d in _listed(dims)) // block * block_bytes
        except ValueError:
            pass
        placed.append([name, dims, kind, at])
        at += size + -size % alignment if 0 < size < MAX_DATA else 0
    return placed, _filled(data, min(at, 4 * MAX_DATA))


def _filled(data: bytes, size: int) -> bytes:
    """``data`` cut, or repeated, to ``size`` bytes."""
    return ((data or b"\0") * (size // max(1, len(data)) + 1))[:size]


# --- safetensors ----------------------------------------------------------------------------------------------------

_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BOOL": 8}
_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F4": 4}


def decode_safetensors(data: bytes) -> Any:
    """``[header, data]``."""
    length = int.from_bytes(data[:8], "little")
    return [json.loads(data[8 : 8 + length]), data[8 + length :]]


def encode_safetensors(tree: Any, repair: bool) -> bytes:
    """``repair``: the offsets and the size of the data are what shapes and types ask for."""
    header, data = (*_listed(tree), None, None)[:2]
    data = data if isinstance(data, bytes) else text(data)
    if repair and isinstance(header, dict):
        at = 0
        for name, info in header.items():
            if name != "__metadata__" and isinstance(info, dict):
                count = prod(integer(d) for d in _listed(info.get("shape")))
                size = count * _BITS.get(str(info.get("dtype")), 8) // 8
                size = size if 0 <= size < MAX_DATA else 0
                info["data_offsets"] = [at, at + size]
                at += size
        data = _filled(data, min(at, 4 * MAX_DATA))
    raw = encode_json(header, False)
    return unsigned(len(raw), 8) + raw + data


# --- JSON, one value or one a line ----------------------------------------------------------------------------------


def decode_json(data: bytes) -> Any:
    """The value."""
    return json.loads(data)


def encode_json(tree: Any, _repair: bool) -> bytes:
    """With NaN and infinities as Python's parser takes them, and bytes as text."""
    return json.dumps(tree, default=lambda value: value.decode("latin-1")).encode()


def decode_lines(data: bytes) -> Any:
    """A list of the values."""
    return [json.loads(line) for line in data.splitlines()]


def encode_lines(tree: Any, repair: bool) -> bytes:
    """Each element on a line of its own."""
    return b"".join(encode_json(line, repair) + b"\n" for line in (tree if isinstance(tree, list) else [tree]))


# --- the older importance file --------------------------------------------------------------------------------------


def decode_imatrix(data: bytes) -> Any:
    """``[[[name, chunks, [value ..]] ..], chunks, dataset]``."""
    reader = _Reader(data)
    entries = []
    for _ in range(reader.take("i")):
        name = reader.take(f"{reader.take('i')}s").decode()
        chunks = reader.take("i")
        entries.append([name, chunks, [reader.take("f") for _ in range(reader.take("i"))]])
    return [entries, reader.take("i"), reader.take(f"{reader.take('i')}s").decode()]


def encode_imatrix(tree: Any, _repair: bool) -> bytes:
    """The binary form."""
    entries, chunks, dataset = (*_listed(tree), None, None, None)[:3]
    out = unsigned(len(_listed(entries)), 4)
    for entry in _listed(entries):
        name, n, values = (*_listed(entry), None, None, None)[:3]
        floats = b"".join(_float(value) for value in _listed(values))
        out += unsigned(len(text(name)), 4) + text(name) + unsigned(n, 4) + unsigned(len(floats) // 4, 4) + floats
    return out + unsigned(chunks, 4) + unsigned(len(text(dataset)), 4) + text(dataset)


def _float(value: Any) -> bytes:
    try:
        return struct.pack("<f", value)
    except (struct.error, OverflowError):
        return unsigned(value, 4)


FORMATS = {
    ".gguf": (decode_gguf, encode_gguf),
    ".safetensors": (decode_safetensors, encode_safetensors),
    ".json": (decode_json, encode_json),
    ".journal": (decode_lines, encode_lines),
    ".dat": (decode_imatrix, encode_imatrix),
}
"""How a name ends -> from bytes to a tree, and back."""

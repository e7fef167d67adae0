"""The tensors of a Hugging Face checkpoint in safetensors files, one or sharded, read a few rows at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ccq_format._unchanged import FileState, check_unchanged, read_array
from ccq_format.errors import ModelError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

log = logging.getLogger(__name__)

_STORED: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "U16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
}
"""safetensors dtype -> how the stored values are read."""

_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "U16": "bf16", "F8_E4M3": "f8_e4m3", "F8_E5M2": "f8_e5m2"}
"""safetensors dtype -> our type name, of the types that are weights as they are.  U16 is what Paddle makes of bf16."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.  Raises ``ModelError`` if it is missing or is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("no such file", file=path) from None
    except OSError as error:
        raise ModelError(error.strerror or str(error), file=path) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is no JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise ModelError("is no JSON object", file=path)
    return value


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file: ``shape`` in numpy order, ``offset`` in bytes from the start of the file, which
    must stay in its ``state``."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    state: FileState

    @property
    def row_len(self) -> int:
        """Weights of one row (the last dimension)."""
        return self.shape[-1]

    @property
    def type_name(self) -> str:
        """``f32``, ``f16``, ``bf16``, ``f8_e4m3`` or ``f8_e5m2``.  Raises ``ModelError`` for any other type."""
        try:
            return _FLOATS[self.dtype]
        except KeyError:
            known = ", ".join(_FLOATS)
            raise self.error(f"is stored as {self.dtype}; only {known} can be converted") from None

    def error(self, reason: str) -> ModelError:
        """A ``ModelError`` that names this tensor."""
        return ModelError(reason, file=self.path, tensor=self.name)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start..stop`` of the tensor seen as ``[prod(shape[:-1]), shape[-1]]`` (1-D: one row), as float32.

        Reads nothing but those rows.  Raises ``ModelError`` if the file has become unreadable.
        """
        _ = self.type_name
        return as_float32(self.stored_rows(start, stop), self.dtype)

    def columns(self, start: int, stop: int, first: int, rows: int) -> NDArray[np.float32]:
        """Columns ``start..stop`` of ``rows`` rows from row ``first``, float32 ``[rows, stop - start]``.  Raises
        ``ModelError`` as :meth:`rows` does."""
        _ = self.type_name
        return as_float32(self.stored_columns(start, stop, first, rows), self.dtype)

    def stored_rows(self, start: int, stop: int) -> NDArray[Any]:
        """The same rows as they are stored: bf16 as uint16, 8-bit floats as uint8.  Raises ``ModelError``."""
        dtype = self._dtype()
        count = (stop - start) * self.row_len
        try:
            at = self.offset + start * self.row_len * dtype.itemsize
            raw = read_array(self.path, self.state, dtype, count, at)
        except OSError as error:
            raise self.error(error.strerror or str(error)) from None
        if raw.size != count:
            raise self.error("the file ends inside the tensor")
        return raw.reshape(stop - start, self.row_len)

    def value(self) -> NDArray[Any]:
        """The whole of a small tensor as it is stored, flat.  Raises ``ModelError`` as :meth:`stored_rows` does."""
        flat: NDArray[Any] = replace(self, shape=(prod(self.shape),)).stored_rows(0, 1)[0]
        return flat

    def stored_columns(self, start: int, stop: int, first: int, rows: int) -> NDArray[Any]:
        """Columns ``start..stop`` of ``rows`` rows from row ``first`` as they are stored, ``[rows, stop - start]``.

        Reads little else.  Raises ``ModelError`` as :meth:`stored_rows` does.
        """
        dtype = self._dtype()
        out = np.empty((rows, stop - start), dtype)
        step, size = self.row_len * dtype.itemsize, (stop - start) * dtype.itemsize
        at = self.offset + first * step + start * dtype.itemsize
        try:
            with open(self.path, "rb", buffering=0) as file:
                for row in out.view(np.uint8):
                    if os.preadv(file.fileno(), [row], at) != size:
                        raise self.error("the file ends inside the tensor")
                    at += step
                check_unchanged(file, self.state)
        except OSError as error:
            raise self.error(error.strerror or str(error)) from None
        return out

    def _dtype(self) -> np.dtype[Any]:
        try:
            return np.dtype(_STORED[self.dtype])
        except KeyError:
            raise self.error(f"is stored as {self.dtype}, which is unknown here") from None


def _table(exponent_bits: int, mantissa_bits: int, bias: int) -> NDArray[np.float32]:
    """The values of all 8-bit floats with a sign, IEEE's subnormal numbers, and neither infinities nor NaN."""
    code = np.arange(256)
    mantissa, exponent = code % (1 << mantissa_bits), (code >> mantissa_bits) % (1 << exponent_bits)
    fraction = np.where(exponent > 0, 1.0, 0.0) + mantissa / (1 << mantissa_bits)
    value = np.where(code < 128, 1.0, -1.0) * fraction * 2.0 ** (np.maximum(exponent, 1) - bias)
    table: NDArray[np.float32] = value.astype(np.float32)
    return table


def _tables() -> dict[str, NDArray[np.float32]]:
    """float32 values of the 8-bit types (OCP 8-bit floating point 1.0, OCP microscaling 1.0)."""
    e4m3, e5m2 = _table(4, 3, 7), _table(5, 2, 15)
    e4m3[[0x7F, 0xFF]] = np.nan
    for sign in (0, 128):
        e5m2[sign + 0x7C] = -np.inf if sign else np.inf
        e5m2[sign + 0x7D : sign + 0x80] = np.nan
    e8m0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
    return {"F8_E4M3": e4m3, "F8_E5M2": e5m2, "F8_E8M0": e8m0}


_TABLES = _tables()


def as_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values as :meth:`StoredTensor.stored_rows` returns them for the safetensors type ``dtype``, as float32."""
    if dtype in _TABLES:
        values: NDArray[np.float32] = _TABLES[dtype][stored]
    elif dtype in ("BF16", "U16"):  # the upper half of a float32
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        values = stored.astype(np.float32)
    return values


@dataclass(frozen=True)
class DecodedTensor:
    """A tensor that takes several stored ones, ``parts``, to know: ``load`` returns its rows as ``StoredTensor.rows``
    does.  ``type_name`` names the format; ``raw``, if given, returns the rows' bytes in the GGUF type of that name."""

    name: str
    path: Path
    shape: tuple[int, ...]
    type_name: str
    load: Callable[[int, int], NDArray[np.float32]]
    parts: tuple[str, ...]
    raw: Callable[[int, int], NDArray[np.uint8]] | None = None

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """See ``StoredTensor.rows``."""
        return self.load(start, stop)

    def columns(self, start: int, stop: int, first: int, rows: int) -> NDArray[np.float32]:
        """See ``StoredTensor.columns``."""
        return self.load(first, first + rows)[:, start:stop]


Weights = StoredTensor | DecodedTensor


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, and its metadata.  Raises ``SafetensorError``, ``OSError`` or ``ValueError``."""
    # safetensors itself checks the header: sizes, offsets without gaps or overlaps, and the file's length.
    with safe_open(path, framework="numpy"):
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        state = FileState.of(file)
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    path = Path(path)
    for name, info in header.items():
        offset = 8 + length + info["data_offsets"][0]
        tensors[name] = StoredTensor(name, path, info["dtype"], tuple(info["shape"]), offset, state)
    return tensors, metadata


def _plain_names(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """``tensors`` under the names of a text model with its head.

    A base model (``LlamaModel``) has no ``model.`` in front; a model of several modalities has ``language_model.``
    before that, or behind it.
    """
    if "embed_tokens.weight" in tensors:
        return {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in tensors.items()}
    plain = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("language_model.")
        plain[short.replace("model.language_model.", "model.", 1)] = tensor
    return plain if len(plain) == len(tensors) else tensors


class Checkpoint:
    """All tensors of a model folder, by name.

    As transformers does it, ``model.safetensors`` is taken where there is one, else the shards that the index names;
    without an index, all shards of the folder.  Only the headers are read here.

    Raises ``ModelError`` if the folder holds no safetensors files, a shard is missing or damaged, or the shards and
    their index do not name the same tensors.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.residual_order: list[int] | None = None
        """Where the hidden states are not numbered as the model's author does: channel ``s`` of each group of as many
        is the original's channel ``residual_order[s]`` of that group."""
        self._stored: dict[str, StoredTensor] = {}
        index_path, single = model_dir / INDEX_NAME, model_dir / SINGLE_NAME
        if single.is_file():
            if index_path.is_file():
                log.warning("%s: not read: transformers takes %s, which lies beside it", index_path, SINGLE_NAME)
            self._open_shard(single)
        elif index_path.is_file():
            self._open_index(index_path)
        else:
            files = sorted(p for p in model_dir.glob("model*.safetensors") if p.is_file())
            if not files:
                if (model_dir / "rank0").is_dir():
                    raise ModelError(
                        "is split for tensor parallelism (rank0, ..), which cannot be undone without loss: take the "
                        "TP1 release, which is one set of files",
                        file=model_dir,
                    )
                others = [p.name for suffix in ("*.bin", "*.pdparams") for p in sorted(model_dir.glob(suffix))]
                hint = f" ({others[0]} is no safetensors file: save the model again as safetensors)" if others else ""
                raise ModelError(f"holds no model.safetensors and no {INDEX_NAME}{hint}", file=model_dir)
            for path in files:
                self._open_shard(path)
        self.files = tuple(sorted({tensor.path for tensor in self._stored.values()}))
        self._stored = {
            name: tensor if tensor.name == name else replace(tensor, name=name)
            for name, tensor in _plain_names(self._stored).items()
        }
        self._tensors: dict[str, Weights] = dict(self._stored)

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The tensors as they lie in the files."""
        return self._stored

    def decode(self, tensors: Iterable[DecodedTensor]) -> None:
        """Put ``tensors`` in the place of those that they are made of."""
        for tensor in tensors:
            for part in tensor.parts:
                self._tensors.pop(part, None)
            self._tensors[tensor.name] = tensor

    def drop(self, names: Iterable[str]) -> None:
        """Forget tensors that are no weights."""
        for name in names:
            self._tensors.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[Weights]:
        return iter(self._tensors.values())

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Weights:
        return self._tensors[name]

    def _open_index(self, index_path: Path) -> None:
        weight_map = read_json(index_path).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise ModelError("has no 'weight_map' from tensor names to file names", file=index_path)
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise ModelError(f"names a file outside of the model folder: '{shard}'", file=index_path)
            path = self.model_dir / shard
            try:
                found = path.is_file()
            except OSError as error:  # no name that this system can have
                raise ModelError(f"names a file that cannot be: {error}", file=index_path) from None
            if not found:
                lost = sum(value == shard for value in weight_map.values())
                raise ModelError(f"the shard is missing; the index places {lost} tensors in it", file=path)
            self._open_shard(path)
        for name, shard in weight_map.items():
            if name not in self._stored or self._stored[name].path.name != shard:
                raise ModelError(
                    f"is listed in {INDEX_NAME} but missing in the shard", file=self.model_dir / shard, tensor=name
                )
        for stored in self._stored.values():
            if stored.name not in weight_map:
                raise ModelError(f"is not listed in {INDEX_NAME}", file=stored.path, tensor=stored.name)

    def _open_shard(self, path: Path) -> None:
        try:
            tensors, _ = read_header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"is no intact safetensors file: {error}", file=path) from None
        for name, tensor in tensors.items():
            if name in self._stored:
                raise ModelError(f"is also in {self._stored[name].path.name}", file=path, tensor=name)
            self._stored[name] = tensor

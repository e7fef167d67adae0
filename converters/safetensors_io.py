"""The tensors of a Hugging Face checkpoint in safetensors files, one or sharded, read a few rows at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ccq_format.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F32": ("f32", np.dtype("<f4")),
    "F16": ("f16", np.dtype("<f2")),
    "BF16": ("bf16", np.dtype("<u2")),
}
"""safetensors dtype -> our type name and how the stored bytes are read."""


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
    """One tensor as it lies in a file: ``shape`` in numpy order, ``offset`` in bytes from the start of the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_len(self) -> int:
        """Weights of one row (the last dimension)."""
        return self.shape[-1]

    @property
    def type_name(self) -> str:
        """``f32``, ``f16`` or ``bf16``.  Raises ``ModelError`` for any other type."""
        return self._stored_as()[0]

    def _stored_as(self) -> tuple[str, np.dtype[Any]]:
        try:
            return _DTYPES[self.dtype]
        except KeyError:
            known = ", ".join(_DTYPES)
            raise ModelError(
                f"is stored as {self.dtype}; only {known} can be converted", file=self.path, tensor=self.name
            ) from None

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start..stop`` of the tensor seen as ``[prod(shape[:-1]), shape[-1]]`` (1-D: one row), as float32.

        Reads nothing but those rows.  Raises ``ModelError`` if the file has become unreadable.
        """
        _, dtype = self._stored_as()
        count = (stop - start) * self.row_len
        try:
            raw = np.fromfile(self.path, dtype, count, offset=self.offset + start * self.row_len * dtype.itemsize)
        except OSError as error:
            raise ModelError(error.strerror or str(error), file=self.path, tensor=self.name) from None
        if raw.size != count:
            raise ModelError("the file ends inside the tensor", file=self.path, tensor=self.name)
        if self.dtype == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32).reshape(stop - start, self.row_len)
        return raw.astype(np.float32).reshape(stop - start, self.row_len)


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, and its metadata.  Raises ``SafetensorError``, ``OSError`` or ``ValueError``."""
    # safetensors itself checks the header: sizes, offsets without gaps or overlaps, and the file's length.
    with safe_open(path, framework="numpy"):
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, info in header.items():
        offset = 8 + length + info["data_offsets"][0]
        tensors[name] = StoredTensor(name, Path(path), info["dtype"], tuple(info["shape"]), offset)
    return tensors, metadata


class Checkpoint:
    """All tensors of a model folder, by name.

    Only the headers are read here.  Raises ``ModelError`` if the folder holds no safetensors files, a shard is missing
    or damaged, or the shards and their index do not name the same tensors.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._tensors: dict[str, StoredTensor] = {}
        index_path = model_dir / INDEX_NAME
        if index_path.is_file():
            self._open_index(index_path)
        else:
            files = sorted(p for p in model_dir.glob("model*.safetensors") if p.is_file())
            if not files:
                others = [p.name for p in sorted(model_dir.glob("*.bin"))]
                hint = f" ({others[0]} is no safetensors file: save the model again as safetensors)" if others else ""
                raise ModelError(f"holds no model.safetensors and no {INDEX_NAME}{hint}", file=model_dir)
            for path in files:
                self._open_shard(path)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[StoredTensor]:
        return iter(self._tensors.values())

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
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
            if not path.is_file():
                lost = sum(value == shard for value in weight_map.values())
                raise ModelError(f"the shard is missing; the index places {lost} tensors in it", file=path)
            self._open_shard(path)
        for name, shard in weight_map.items():
            if name not in self._tensors or self._tensors[name].path.name != shard:
                raise ModelError(
                    f"is listed in {INDEX_NAME} but missing in the shard", file=self.model_dir / shard, tensor=name
                )
        for stored in self:
            if stored.name not in weight_map:
                raise ModelError(f"is not listed in {INDEX_NAME}", file=stored.path, tensor=stored.name)

    def _open_shard(self, path: Path) -> None:
        try:
            tensors, _ = read_header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"is no intact safetensors file: {error}", file=path) from None
        for name, tensor in tensors.items():
            if name in self._tensors:
                raise ModelError(f"is also in {self._tensors[name].path.name}", file=path, tensor=name)
            self._tensors[name] = tensor

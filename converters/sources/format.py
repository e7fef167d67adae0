"""What a format of quantized matrices is, and what several of them need: settings, small tables, bit unpacking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ModelError

from ..arch.config import Config
from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
"""The 4-bit floats of OCP microscaling."""


@dataclass(frozen=True)
class Settings:
    """The config's ``quantization_config``, or a part of it."""

    raw: dict[str, Any]
    config: Config

    def error(self, reason: str) -> ModelError:
        """A ``ModelError`` that names the config."""
        return self.config.error(f"'quantization_config': {reason}")

    def require(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` if there is none; ``ModelError`` unless it is one of ``allowed``."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value not in allowed or isinstance(value, bool) != any(value is a for a in allowed if isinstance(a, bool)):
            raise self.error(f"'{key}' is {value!r}; supported: {', '.join(map(repr, allowed))}")
        return value


class Format(Protocol):
    """Finds the matrices of one format in a checkpoint."""

    def __call__(self, settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
        """The matrices, under the names that they have in unquantized checkpoints.

        Raises ``ModelError`` for settings that are not supported and for tensors that are missing or do not fit.
        """


def named(checkpoint: Checkpoint, suffix: str) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors whose names end in ``suffix``, with the rest of the name."""
    for name, tensor in checkpoint.stored.items():
        if name.endswith(suffix):
            yield name.removesuffix(suffix), tensor


def companion(
    checkpoint: Checkpoint,
    tensor: StoredTensor,
    name: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
) -> StoredTensor:
    """The tensor ``name`` that belongs to ``tensor``.  Raises ``ModelError`` if it is missing or not as expected."""
    found = checkpoint.stored.get(name)
    if found is None:
        raise tensor.error(f"its '{name}' is missing")
    _refuse_empty(found)
    if found.dtype not in dtypes:
        raise found.error(f"is stored as {found.dtype}, not as {' or '.join(dtypes)}")
    if shape is not None and found.shape != shape:
        raise found.error(f"has the shape {list(found.shape)}, not {list(shape)}")
    return found


def matrix(tensor: StoredTensor, dtypes: tuple[str, ...], dims: tuple[int, ...] = (2,)) -> StoredTensor:
    """``tensor``, if it is of one of ``dtypes``, has as many dimensions and is not empty.  Raises ``ModelError``."""
    _refuse_empty(tensor)
    if tensor.dtype not in dtypes or len(tensor.shape) not in dims:
        raise tensor.error(f"is {tensor.dtype} {list(tensor.shape)}; expected is a matrix of {' or '.join(dtypes)}")
    return tensor


def _refuse_empty(tensor: StoredTensor) -> None:
    """Raise ``ModelError`` for a tensor without elements, which would be divided by."""
    if 0 in tensor.shape:
        raise tensor.error(f"is empty: {list(tensor.shape)}")


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes ``[..., n]`` as 4-bit codes ``[..., 2 n]``, the low ones first."""
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


def words_to_codes(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """32-bit words ``[..., n]`` as codes ``[..., n * (32 // bits)]``, lowest bits first; left-over bits are unused."""
    shifts = np.arange(0, 32 - bits + 1, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def spread(values: NDArray[Any], size: int, length: int) -> NDArray[Any]:
    """Each of the last axis' values ``size`` times, cut to ``length``."""
    return np.repeat(values, size, axis=-1)[..., :length]

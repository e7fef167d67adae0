"""A model's config.json with checked access: a wrong value is an error that names the key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccq_format.errors import ModelError

from ..safetensors_io import read_json


@dataclass(frozen=True)
class Config:
    """``raw`` is the JSON object, ``file`` where it came from."""

    raw: dict[str, Any]
    file: Path

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read ``path``.  Raises ``ModelError`` if it is missing or no JSON object."""
        return cls(read_json(path), path)

    def error(self, reason: str) -> ModelError:
        """A ``ModelError`` that names this file."""
        return ModelError(reason, file=self.file)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The positive integer under the first of ``keys`` that is present; null counts as absent."""
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise self.error(f"'{key}' must be a positive integer, it is {value!r}")
            return value
        if default is None:
            raise self.error(f"has no '{keys[0]}'")
        return default

    def count(self, key: str) -> int:
        """The number under ``key``, 0 if it is absent or null."""
        value = self.raw.get(key)
        return 0 if value is None or (value == 0 and not isinstance(value, bool)) else self.integer(key)

    def number(self, key: str, default: float) -> float:
        """The positive number under ``key``; null counts as absent."""
        return positive(self.raw.get(key), key, default, self)

    def boolean(self, key: str, default: bool) -> bool:
        """The boolean under ``key``; null counts as absent."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"'{key}' must be true or false, it is {value!r}")
        return value


def positive(value: object, key: str, default: float | None, config: Config) -> float:
    """``value`` as a positive float that float32 can hold, ``default`` if it is null.

    Raises ``ModelError`` naming ``key``.
    """
    if value is None:
        if default is None:
            raise config.error(f"has no '{key}'")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 2e-38 < value < 3e38:
        raise config.error(f"'{key}' must be a positive number, it is {value!r}")
    return float(value)

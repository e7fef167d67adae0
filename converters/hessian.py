"""Hessian files: for every matrix the products ``X^T X`` of its inputs, which error feedback needs.

A safetensors file.  Tensor ``NAME`` (a GGUF name): float32 ``[row_len, row_len]``, summed over all inputs, for a stack
of experts ``[experts, row_len, row_len]``; ``NAME.counts``: float32 ``[1]`` or ``[experts]``, the number of inputs.
Encoding with a Hessian takes ``8 row_len^2`` bytes of memory and a little: 0.72 GB in all at a row length of 8192.
Matrices with the same inputs (query, key and value; gate and up) share one tensor: the metadata entry ``ccq.shared``
is a JSON object from each name to the name that is stored.  ``ccq.hessian`` is the version of this layout, ``1``.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError

from ccq_format.errors import ImportanceError, ModelError
from ccq_format.output import Output, OutputFile

from .safetensors_io import read_header

VERSION = "1"
_COUNTS = ".counts"
_LAYER = re.compile(r"\bblk\.(\d+)\.")
_CHUNK = 1 << 22
"""Values that are read at a time."""


class HessianWriter(Output):
    """Writes matrices in any order, straight to their places in a file that appears at :meth:`close`.

    ``path`` may be an ``OutputFile`` that is not open yet (then ``overwrite`` is its own), ``shapes`` are those of the
    products, ``shared`` maps names to the one stored.  Nothing is created before :meth:`begin`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | OutputFile,
        shapes: Mapping[str, tuple[int, ...]],
        shared: Mapping[str, str],
        *,
        overwrite: bool = False,
    ) -> None:
        """Raises ``OutputError`` if the target exists and ``overwrite`` is false, or its folder is missing."""
        self._output = path if isinstance(path, OutputFile) else OutputFile(path, overwrite=overwrite)
        self._shared = dict(shared)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            self._shapes[name] = tuple(shape)
            self._shapes[name + _COUNTS] = (prod(shape[:-2]),)
        self._offsets: dict[str, int] = {}
        self._missing = set(self._shapes)
        self._begun = False

    def begin(self) -> None:
        """Write the header.  Raises ``OutputError``."""
        header: dict[str, object] = {
            "__metadata__": {"ccq.hessian": VERSION, "ccq.shared": json.dumps(self._shared, sort_keys=True)}
        }
        at = 0
        for name, shape in self._shapes.items():
            end = at + 4 * prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
            self._offsets[name] = at
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}
        self._begun = True
        self._output.open()
        self._output.write(len(text).to_bytes(8, "little") + text)
        with self._output.errors():
            self._output.file.truncate(start + at)

    def write(self, name: str, product: NDArray[np.float32], count: float, matrix: int = 0) -> None:
        """Store the product float32 ``[row_len, row_len]`` of one matrix of a stack.  Raises ``OutputError``."""
        shape = self._shapes[name]
        if not self._begun or product.shape != shape[-2:] or product.dtype != np.float32:
            raise ValueError(f"begin() first, then float32 {shape[-2:]} for {name}, not {product.shape}")
        with self._output.errors():
            file = self._output.file
            file.seek(self._offsets[name] + matrix * product.nbytes)
            file.write(np.ascontiguousarray(product).data)
            file.seek(self._offsets[name + _COUNTS] + 4 * matrix)
            file.write(np.float32(count).tobytes())
        if matrix == prod(shape[:-2]) - 1:
            self._missing -= {name, name + _COUNTS}

    def close(self) -> None:
        """Complete the file.  Raises ``OutputError``, and ``ValueError`` if a product is missing."""
        try:
            if not self._begun or self._missing:
                raise ValueError(f"products are missing: {sorted(self._missing)[:3]}")
            self._output.close()
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what is unfinished.  Does nothing after :meth:`close`."""
        self._output.abort()


class Hessians:
    """A Hessian file, read one matrix at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ``ImportanceError`` if the file cannot be read or is no Hessian file."""
        self.file = os.fspath(path)
        try:
            self._stored, metadata = read_header(self.file)
            shared = json.loads(metadata.get("ccq.shared", "{}"))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ImportanceError(f"is no intact safetensors file: {error}", file=self.file) from None
        names_names = isinstance(shared, dict) and all(isinstance(name, str) for name in shared.values())
        if metadata.get("ccq.hessian") != VERSION or not names_names:
            raise ImportanceError(
                f"is no Hessian file of version {VERSION}: ccq.hessian is {metadata.get('ccq.hessian')!r}",
                file=self.file,
            )
        self._shared = shared
        names = (*self._stored, *shared)
        self.depth = len({match[1] for name in names if (match := _LAYER.search(name))})
        """Number of layers (``blk.N``) that there are Hessians of."""

    def __contains__(self, name: str) -> bool:
        return self._shared.get(name, name) in self._stored

    def fits(self, name: str, n_matrices: int, row_len: int) -> bool:
        """Whether there is a Hessian of that name and of the right shape for :meth:`product`."""
        part = self._stored.get(self._shared.get(name, name))
        return part is not None and part.shape == _shape(n_matrices, row_len)

    def check(self, name: str, n_matrices: int, row_len: int) -> None:
        """Raise ``ImportanceError`` if the file has no Hessian of that name, or one of another shape than
        :meth:`product` needs."""
        stored = self._shared.get(name, name)
        if stored not in self._stored or stored + _COUNTS not in self._stored:
            raise ImportanceError("has no Hessian", file=self.file, tensor=name)
        part, counts = self._stored[stored], self._stored[stored + _COUNTS]
        expected = _shape(n_matrices, row_len)
        if part.shape != expected or counts.shape != (n_matrices,) or {part.dtype, counts.dtype} != {"F32"}:
            raise ImportanceError(
                f"its Hessian has the shape {list(part.shape)}, not {list(expected)}", file=self.file, tensor=name
            )

    def sharing(self, names: Mapping[str, str]) -> Hessians:
        """The same file, in which each key of ``names`` has the Hessian of its value as well."""
        more = copy.copy(self)
        more._shared = {**self._shared, **{name: self._shared.get(other, other) for name, other in names.items()}}
        return more

    def product(
        self, name: str, n_matrices: int, row_len: int, matrix: int = 0, *, dtype: DTypeLike = np.float32
    ) -> tuple[NDArray[Any], float]:
        """``X^T X`` ``[row_len, row_len]`` of one matrix of the tensor ``name``, and the number of inputs.

        The array is the caller's, of type ``dtype``; nothing else of the file stays in memory.

        Raises ``ImportanceError`` if the file has none, or one of another shape or with values that are not finite.
        """
        self.check(name, n_matrices, row_len)
        stored = self._shared.get(name, name)
        part, counts = self._stored[stored], self._stored[stored + _COUNTS]
        product = np.empty((row_len, row_len), dtype)
        step = max(1, _CHUNK // row_len)
        try:
            for start in range(0, row_len, step):
                stop = min(start + step, row_len)
                rows = part.rows(matrix * row_len + start, matrix * row_len + stop)
                if not np.isfinite(rows).all():
                    raise ImportanceError("its Hessian holds NaN or infinity", file=self.file, tensor=name)
                product[start:stop] = rows
            return product, float(counts.rows(0, 1)[0, matrix])
        except ModelError as error:
            raise ImportanceError(error.reason, file=self.file, tensor=name) from None


def _shape(n_matrices: int, row_len: int) -> tuple[int, ...]:
    return (row_len, row_len) if n_matrices == 1 else (n_matrices, row_len, row_len)

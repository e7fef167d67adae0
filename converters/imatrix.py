"""Importance files: llama.cpp's imatrix, the GGUF form and the older binary one, read; the GGUF form written.

An entry belongs to a matrix of the model and says how large its inputs were on a calibration text: per input channel
the sum of squares, and the number of inputs (tokens) summed over.  Stacks of experts have one row of sums and one
count per expert.

The GGUF form (``tools/imatrix/imatrix.cpp`` and ``common/imatrix-loader.cpp`` of the pinned llama.cpp) has two f32
tensors per matrix, ``NAME.in_sum2`` and ``NAME.counts``, and the keys ``general.type`` = ``imatrix``,
``imatrix.datasets``, ``imatrix.chunk_count`` and ``imatrix.chunk_size``.  The binary form, all little-endian: int32
number of entries; per entry int32 length and bytes of the name, int32 n, int32 number of values, as many f32 (mean
square times n); then, optionally, int32 number of chunks, int32 length and bytes of the dataset's name.  It has no
counts per expert: an expert that was never hit has the mean square 1 in every channel.

Files of ``ccq-convert calibrate --gradients`` have a third tensor per matrix, ``NAME.out_grad2``, f32
``[matrices, rows]``: for each of its outputs, rows in the order of the model's GGUF file, the sum over the same tokens
of the squared gradient that ``backward`` defines.  Files of ``ccq-convert calibrate --losses`` have a tensor
``NAME.loss``, f32 ``[1]``, of every matrix or embedding whose loss was measured: nats of KL divergence per token for a
relative squared error of 1 (see ``losses``).  llama.cpp passes over both.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ImportanceError
from ccq_format.gguf_io import ModelWriter, TensorInfo, open_model

log = logging.getLogger(__name__)

_SUMS, _COUNTS, _GRADIENTS, _LOSS = ".in_sum2", ".counts", ".out_grad2", ".loss"

RARE = 32
"""An expert hit by fewer tokens than this counts as rarely hit; also the weight, in tokens, of the mean over all
experts that is blended into each expert's own mean."""

_FLOOR = 1e-6
"""Smallest importance, as a fraction of the tensor's mean: a channel that was silent in the calibration text is not
silent in every text."""

_TINY = 1e-37
"""Keeps every importance a normal float32."""

_HUGE = 1e30
"""A mean square above this is damage: no model's inputs are 1e15, and sums over rows and experts would overflow."""


@dataclass(frozen=True)
class Entry:
    """Sums of squares of a matrix's inputs: float32 ``[matrices * row_len]``, and float64 ``[1]`` or ``[matrices]``
    numbers of inputs; ``gradients``, where they were measured: sums of squares of its outputs' gradients, float32
    ``[matrices * rows]``."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float64]
    gradients: NDArray[np.float32] | None = None

    def hits(self, n_matrices: int) -> NDArray[np.float64]:
        """Inputs of each matrix, float64 ``[n_matrices]``.  One common count is all that there is for some entries;
        there a mean square of exactly 1 in every channel is llama.cpp's mark of an expert without inputs."""
        hits = np.array(np.broadcast_to(self.counts, n_matrices))
        if self.counts.size == 1 and n_matrices > 1 and self.sums.size % n_matrices == 0:
            hits[(self.sums.reshape(n_matrices, -1) == self.counts[0]).all(axis=1)] = 0
        return hits


@dataclass(frozen=True)
class Importance:
    """The contents of an importance file.  ``file`` is its path as given, ``datasets`` the texts it was made of.

    ``losses`` are what errors of a tensor cost where that was measured (``losses``), in nats of KL divergence per token
    and relative squared error; an embedding has such a loss and no entry.

    ``borrowed`` and ``estimated`` name those entries that the file does not have (see ``borrow``), with the tensor that
    each was taken or derived from."""

    file: str
    entries: Mapping[str, Entry]
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    borrowed: Mapping[str, str] = field(default_factory=dict)
    estimated: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def knows_losses(self) -> bool:
        """Whether it tells what errors cost, of some tensors at least."""
        return bool(self.losses) or any(entry.gradients is not None for entry in self.entries.values())

    def check(self, name: str, n_matrices: int, row_len: int) -> None:
        """Raise ``ImportanceError`` if the entry of ``name`` does not fit ``n_matrices`` matrices of ``row_len``
        columns."""
        entry = self.entries[name]
        n = entry.sums.size
        if n not in (row_len, n_matrices * row_len) or entry.counts.size not in (1, n // row_len):
            raise ImportanceError(
                f"has {n} importances and {entry.counts.size} counts, the model's tensor has {n_matrices} x {row_len} "
                "input channels: the file was made for another model",
                file=self.file,
                tensor=name,
            )

    def for_tensor(self, name: str, n_matrices: int, row_len: int) -> NDArray[np.float32] | None:
        """Mean squares of the inputs of the tensor ``name``, a stack of ``n_matrices`` matrices (1: a plain matrix).

        Returns float32 ``[row_len]`` (one set for all matrices) or ``[n_matrices, row_len]``, all positive; ``None``
        if there is no entry.  An expert's mean leans on that of all experts of the layer, brought to its own size, by
        ``RARE`` tokens; one that was never hit has just that mean.

        Raises ``ImportanceError`` if the entry has another shape.
        """
        if name not in self.entries:
            return None
        sums, counts, mean = self._moments(name, n_matrices, row_len)
        if len(sums) > 1:
            overall = sums.sum(axis=0) / max(1.0, float(counts.sum()))
            own = mean.mean(axis=1, keepdims=True)
            size = np.where(own > 0, own / max(float(overall.mean()), 1e-300), 1.0)
            mean = (sums + RARE * size * overall) / (counts + RARE)
        mean = mean.astype(np.float32)  # as llama-quantize has it
        average = mean.mean(axis=1, keepdims=True, dtype=np.float64)
        # Where nothing at all came in, every channel is as good as any other.
        mean = np.where(average > 0, np.maximum(mean, _FLOOR * average), 1.0)
        out = np.clip(mean, _TINY, None).astype(np.float32)
        return out[0] if len(out) == 1 else out

    def input_power(self, name: str, n_matrices: int, row_len: int) -> NDArray[np.float32] | None:
        """Second moments of the inputs of the tensor ``name``: float32 ``[n_matrices, row_len]``, of each matrix the
        mean of ``x_j^2`` over the tokens that it was given (an expert: that were routed to it).  ``None`` if there is
        no entry.

        Other than :meth:`for_tensor` as they were measured, so 0 for an expert that was never hit: with
        :meth:`output_gradients` G, ``1/2 sum_mij G[m, i] * H[m, j] * E[m, i, j]^2`` is the KL divergence, in nats per
        token of the text, to be expected of small errors E of the weights (see ``backward``).

        Raises ``ImportanceError`` if the entry has another shape.
        """
        if name not in self.entries:
            return None
        _, _, mean = self._moments(name, n_matrices, row_len)
        return np.array(np.broadcast_to(mean, (n_matrices, row_len)), np.float32)

    def input_weights(self, name: str, n_matrices: int, row_len: int) -> NDArray[np.float64] | None:
        """What the square of each weight's error counts in the sum of the squared errors of all outputs: the sum over
        the tokens of ``x_j^2``, float64 ``[n_matrices, row_len]``; of an expert those that were routed to it.
        ``None`` if there is no entry.  Raises ``ImportanceError`` if the entry has another shape.
        """
        if name not in self.entries:
            return None
        sums, _, _ = self._moments(name, n_matrices, row_len)
        return np.broadcast_to(sums, (n_matrices, row_len))

    def _moments(
        self, name: str, n_matrices: int, row_len: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """An entry's sums ``[sets, row_len]``, counts ``[sets, 1]`` and means, 0 where the count is."""
        self.check(name, n_matrices, row_len)
        entry = self.entries[name]
        sums = entry.sums.reshape(-1, row_len).astype(np.float64)
        counts = entry.hits(len(sums))[:, None]
        sums[counts[:, 0] == 0] = 0
        return sums, counts, np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)

    def output_gradients(self, name: str, n_matrices: int, rows: int) -> NDArray[np.float32] | None:
        """How much the outputs of the tensor ``name`` matter: float32 ``[n_matrices, rows]``, rows as in the model's
        GGUF file, the sum of ``g_i^2`` divided by the number of all tokens of the text, of which an expert is given
        only some.  ``None`` if the file has none.

        Raises ``ImportanceError`` if there is another number of them.
        """
        entry = self.entries.get(name)
        if entry is None or entry.gradients is None:
            return None
        if entry.gradients.size != n_matrices * rows:
            raise ImportanceError(
                f"has the gradients of {entry.gradients.size} outputs, the model's tensor has {n_matrices} x {rows}: "
                "the file was made for another model",
                file=self.file,
                tensor=name,
            )
        tokens = self.chunk_count * self.chunk_size
        if not tokens:
            raise ImportanceError("has gradients, but not the number of tokens", file=self.file, tensor=name)
        return (entry.gradients.astype(np.float64) / tokens).astype(np.float32).reshape(n_matrices, rows)

    def expert_report(self, tensors: Mapping[str, int]) -> str | None:
        """One line about experts that the calibration text hit rarely or never, ``None`` if there is none.

        ``tensors`` maps names to their number of matrices; those without an entry are passed over.
        """
        never = rarely = total = 0
        for name, n_matrices in tensors.items():
            if n_matrices > 1 and name in self.entries:
                hits = self.entries[name].hits(n_matrices)
                total += n_matrices
                never += int((hits == 0).sum())
                rarely += int(((hits > 0) & (hits < RARE)).sum())
        if not never + rarely:
            return None
        return (
            f"{self.file}: of {total} expert matrices the calibration text never hit {never} and hit {rarely} with "
            f"fewer than {RARE} tokens; their importance leans on the mean over the layer's experts"
        )


def load(path: str | os.PathLike[str]) -> Importance:
    """Read an importance file in either form.

    Entries that hold no numbers of any use (NaN, infinite, negative or far too large, counts of 0) are left out with a
    warning, in stacks those experts alone, which then count as never hit.

    Raises ``InputError`` if it cannot be read, ``FormatError`` (its subclasses) for a damaged GGUF file and
    ``ImportanceError`` for everything else that is no importance, naming the file and the tensor.
    """
    file = os.fspath(path)
    try:
        with open(path, "rb") as stream:
            magic = stream.read(4)
    except OSError:
        magic = b"GGUF"  # open_model words the system's reason
    importance = _load_gguf(file) if magic == b"GGUF" else _load_binary(file)
    entries = {name: _usable(file, name, entry) for name, entry in importance.entries.items()}
    kept = {name: entry for name, entry in entries.items() if entry is not None}
    dropped = [name for name in entries if name not in kept]
    if not kept:
        raise ImportanceError(f"none of its {len(entries)} entries has usable numbers: {_UNUSABLE}", file=file)
    if dropped:
        log.warning("%s: entries dropped, %s: %s", file, _UNUSABLE, ", ".join(dropped))
    return replace(importance, entries=kept)


_UNUSABLE = "as their sums or counts are NaN, infinite, negative or far too large, or their counts 0"


def _usable(file: str, name: str, entry: Entry) -> Entry | None:
    """The entry without the numbers of those of its matrices whose numbers can be none, as if these had had no inputs;
    ``None`` if no matrix is left.  Raises ``ImportanceError`` if the sizes contradict each other."""
    sets = entry.counts.size
    if entry.sums.size == 0 or sets == 0 or entry.sums.size % sets:
        raise ImportanceError(f"{entry.sums.size} sums do not fit {sets} counts", file=file, tensor=name)
    gradients = entry.gradients
    if gradients is not None and (gradients.size == 0 or gradients.size % sets):
        raise ImportanceError(
            f"the gradients of {gradients.size} outputs do not fit {sets} counts", file=file, tensor=name
        )
    # min and max propagate NaN and need no large temporary array.
    sums, counts = entry.sums.reshape(sets, -1), entry.counts
    low, high = sums.min(axis=1), sums.max(axis=1)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        good = (high <= _HUGE * counts) & (low >= 0) & np.isfinite(counts) & (counts >= 0)
    good &= (counts > 0) | (high == 0)
    if not (good & (counts > 0)).any():
        return None
    if gradients is not None and not (np.isfinite(gradients.max()) and gradients.min() >= 0):
        log.warning("%s: tensor '%s': gradients dropped, as some are NaN, infinite or negative", file, name)
        gradients = None
    if good.all():
        return Entry(entry.sums, counts, gradients)
    log.warning(
        "%s: tensor '%s': numbers of %d of %d matrices dropped, %s", file, name, int((~good).sum()), sets, _UNUSABLE
    )
    return Entry(np.where(good[:, None], sums, 0).reshape(-1), np.where(good, counts, 0.0), gradients)


def _load_gguf(file: str) -> Importance:
    model = open_model(file)
    pairs: dict[str, dict[str, NDArray[np.float32]]] = {}
    losses: dict[str, float] = {}
    for tensor in model.tensors:
        if tensor.name.endswith(_LOSS):
            losses[tensor.name.removesuffix(_LOSS)] = _loss(file, tensor)
            continue
        for suffix in (_SUMS, _COUNTS, _GRADIENTS):
            if tensor.name.endswith(suffix) and tensor.name != suffix:
                if tensor.type_name != "f32":
                    raise ImportanceError(f"is {tensor.type_name}, not f32", file=file, tensor=tensor.name)
                pairs.setdefault(tensor.name.removesuffix(suffix), {})[suffix] = tensor.data().reshape(-1)
    if not pairs:
        kind = model.metadata.get("general.type") or model.arch or "GGUF file of an unknown kind"
        raise ImportanceError(f"holds no importance (no tensor NAME{_SUMS}): it is a {kind}", file=file)
    entries = {}
    for name, found in pairs.items():
        for suffix in (_SUMS, _COUNTS):
            if suffix not in found:
                raise ImportanceError(f"has no tensor '{name}{suffix}'", file=file, tensor=name)
        entries[name] = Entry(found[_SUMS], found[_COUNTS].astype(np.float64), found.get(_GRADIENTS))
    datasets = model.metadata.get("imatrix.datasets", [])
    if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets):
        raise ImportanceError("imatrix.datasets is no list of texts", file=file)
    numbers = []
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        value = model.metadata.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise ImportanceError(f"{key} is {value!r}", file=file)
        numbers.append(value)
    chunk_count, chunk_size = numbers
    return Importance(file, entries, datasets, chunk_count, chunk_size, losses)


def _loss(file: str, tensor: TensorInfo) -> float:
    if tensor.type_name != "f32" or tensor.shape != (1,):
        raise ImportanceError(f"is {tensor.type_name} {list(tensor.shape)}, not f32 [1]", file=file, tensor=tensor.name)
    value = float(tensor.data()[0])
    if not 0 <= value < math.inf:
        raise ImportanceError(f"is {value}", file=file, tensor=tensor.name)
    return value


class _Bytes:
    """Bounds-checked reading of the binary form."""

    def __init__(self, file: str) -> None:
        self.file = file
        try:
            self.data = Path(file).read_bytes()
        except OSError as error:
            raise ImportanceError(error.strerror or str(error), file=file) from None
        self.at = 0

    def take(self, count: int, what: str, tensor: str | None = None) -> bytes:
        left = len(self.data) - self.at
        if not 0 <= count <= left:
            raise ImportanceError(
                f"is no importance file, or damaged: {what} would take {count} bytes, {left} are left",
                file=self.file,
                tensor=tensor,
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, what: str, tensor: str | None = None) -> int:
        return int(struct.unpack("<i", self.take(4, what, tensor))[0])

    def text(self, what: str) -> str:
        raw = self.take(self.integer(f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ImportanceError(f"is no importance file, or damaged: {what} is no text", file=self.file) from None


def _load_binary(file: str) -> Importance:
    data = _Bytes(file)
    n_entries = data.integer("the number of entries")
    if n_entries < 1:
        raise ImportanceError(f"is no importance file: {n_entries} entries", file=file)
    entries: dict[str, Entry] = {}
    for index in range(n_entries):
        name = data.text(f"the name of entry {index + 1}")
        if not name or name in entries:
            raise ImportanceError("an entry is there twice or has no name", file=file, tensor=name)
        calls = data.integer("its number of chunks", name)
        count = data.integer("its number of values", name)
        values = np.frombuffer(data.take(4 * count, f"{count} values", name), "<f4")
        if calls < 0 or count < 1:
            raise ImportanceError(f"{count} values of {calls} chunks", file=file, tensor=name)
        # llama.cpp takes the values of an entry without chunks as they are.
        entries[name] = Entry(values.astype(np.float32), np.array([max(1, calls)], np.float64))
    chunks, datasets = 0, []
    if data.at < len(data.data):
        chunks = data.integer("the number of chunks")
        if data.at < len(data.data):
            dataset = data.text("the name of the dataset")
            datasets = [dataset] if dataset else []
    if data.at < len(data.data) or chunks < 0:
        raise ImportanceError(f"{len(data.data) - data.at} bytes follow the last entry, {chunks} chunks", file=file)
    return Importance(file, entries, datasets, chunks)


def fill(writer: ModelWriter, importance: Importance) -> None:
    """Write the entries of ``importance`` as llama.cpp's GGUF form to a writer (made with an empty architecture) that
    has not begun."""
    kv = writer.gguf
    kv.add_string("general.type", "imatrix")
    kv.add_key_value("imatrix.datasets", importance.datasets, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    kv.add_uint32("imatrix.chunk_count", importance.chunk_count)
    kv.add_uint32("imatrix.chunk_size", importance.chunk_size)
    arrays: list[tuple[str, NDArray[Any]]] = []
    for name, entry in sorted(importance.entries.items()):
        sums = entry.sums.reshape(entry.counts.size, -1)
        counts = entry.counts.astype(np.float32)[:, None]
        parts = [(_SUMS, sums), (_COUNTS, counts)]
        if entry.gradients is not None:
            parts.append((_GRADIENTS, entry.gradients.reshape(entry.counts.size, -1)))
        arrays += [(name + suffix, array) for suffix, array in parts]
    arrays += [(name + _LOSS, np.array([loss], np.float32)) for name, loss in sorted(importance.losses.items())]
    for name, array in arrays:
        writer.add_tensor(name, "f32", array.shape)
    writer.begin()
    for name, array in arrays:
        writer.write(name, array)


def provenance(importance: Importance) -> dict[str, str | int]:
    """The keys by which llama-quantize notes the importance it used (``tools/quantize/quantize.cpp``)."""
    keys: dict[str, str | int] = {"quantize.imatrix.file": importance.file}
    if importance.datasets:
        keys["quantize.imatrix.dataset"] = importance.datasets[0]
    own = len(importance.entries) - len(importance.borrowed) - len(importance.estimated)
    keys["quantize.imatrix.entries_count"] = own
    if importance.chunk_count > 0:
        keys["quantize.imatrix.chunks_count"] = importance.chunk_count
    return keys

"""The tensors of a Hugging Face folder, as those of the GGUF file that it becomes: names, shapes, rows.

Which tensor goes where is said in ``arch``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ModelError

from .arch import Family
from .arch.base import Part, Wanted, resolve
from .arch.multimodal import OTHERS
from .safetensors_io import Checkpoint, DecodedTensor, Weights
from .tensors import LoadRows, TensorSource

log = logging.getLogger(__name__)

_T = TypeVar("_T", bound=np.generic)

_COMPARED_ROWS = 1 << 22
"""Weights per step when two tensors are compared."""


def load_sources(family: Family, checkpoint: Checkpoint) -> list[TensorSource]:
    """The tensors of the GGUF file, each with a way to load its rows; nothing but headers is read here, unless the
    output matrix may repeat the embedding.

    Raises ``ModelError`` for a tensor that is missing, unexpected, or of a wrong shape or type.
    """
    stored = frozenset(t.name for t in checkpoint)
    end = family.layers - 1
    last = next(family.spec.layer[0].tensors(family, f"model.layers.{end}", end, stored)).parts[0].name
    if last not in checkpoint:  # also keeps an absurd layer count from filling the memory
        raise ModelError(f"is missing; the config has {family.layers} layers", file=checkpoint.model_dir, tensor=last)
    used = set()
    if repeats_embedding(family, checkpoint):
        log.info("lm_head.weight repeats model.embed_tokens.weight and is left out")
        used.add("lm_head.weight")
        stored -= used
    sources = []
    for name, wanted in resolve(family, stored):
        sources.append(make_source(name, wanted, checkpoint))
        used.update(part.name for part in wanted.parts)
    others = 0
    for tensor in checkpoint:
        if tensor.name in used or family.is_ignored(tensor.name) or _is_empty_bias(tensor, checkpoint):
            continue
        if family.wrapper is not None and OTHERS.match(tensor.name):
            others += 1
            continue
        raise ModelError(
            f"is unexpected: a {family.wrapper or family.architecture} with this config has no such tensor",
            file=tensor.path,
            tensor=tensor.name,
        )
    if others:
        log.info(
            "the text model of a %s is taken; %d tensors for images or sound are left out (llama.cpp's "
            "convert_hf_to_gguf.py --mmproj makes a file of them)",
            family.wrapper,
            others,
        )
    for name, values in family.rope.factors(family.rotary_dim).items():
        sources.append(_constant(name, values))
    return sources


def _is_empty_bias(tensor: Weights, checkpoint: Checkpoint) -> bool:
    """Whether it is the bias of zeros that AutoGPTQ gave to every matrix that it quantized."""
    if not tensor.name.endswith(".bias") or len(tensor.shape) != 1 or not tensor.shape[0]:
        return False
    weight = tensor.name.removesuffix("bias") + "weight"
    quantized = weight in checkpoint and isinstance(checkpoint[weight], DecodedTensor)
    return quantized and not tensor.rows(0, 1).any()


def _constant(name: str, values: NDArray[np.float32]) -> TensorSource:
    """A 1-D tensor that is no part of the checkpoint."""
    return TensorSource(name, values.shape, lambda start, stop: values[None, :][start:stop], "f32")


def repeats_embedding(family: Family, checkpoint: Checkpoint) -> bool:
    """Whether a model with tied embeddings stores the output matrix once more.

    One with other values is kept, with a warning: transformers does not tie it either.
    """
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    if not family.tied or output not in checkpoint or embedding not in checkpoint:
        return False
    a, b = checkpoint[embedding], checkpoint[output]
    equal = a.shape == b.shape and len(a.shape) == 2
    if equal:
        step = max(1, _COMPARED_ROWS // max(1, a.shape[-1]))
        for start in range(0, a.shape[0], step):
            stop = min(a.shape[0], start + step)
            if not np.array_equal(a.rows(start, stop), b.rows(start, stop)):
                equal = False
                break
    if not equal:
        log.warning("%s: lm_head.weight is kept: the config ties it to the embedding, but it differs", b.path)
    return equal


def make_source(name: str, wanted: Wanted, checkpoint: Checkpoint) -> TensorSource:
    """``wanted`` as the tensor ``name``.  Raises ``ModelError`` if a part is missing or of a wrong shape or type."""
    segments: list[_Segment] = []
    for part in wanted.parts:
        if part.name not in checkpoint:
            raise ModelError("is missing", file=checkpoint.model_dir, tensor=part.name)
        tensor = checkpoint[part.name]
        if tensor.shape != part.shape:
            raise ModelError(
                f"has the shape {list(tensor.shape)}, the config asks for {list(part.shape)}",
                file=tensor.path,
                tensor=part.name,
            )
        segments.append(_Segment(tensor, part))
    types = sorted({segment.tensor.type_name for segment in segments})
    load = _stacked([(segment.rows, segment.count) for segment in segments])
    raw = None
    changed = wanted.heads or wanted.shift or wanted.columns is not None or wanted.apply is not None
    if len(types) == 1 and not changed and all(segment.has_raw for segment in segments):
        raw = _stacked([(segment.raw, segment.count) for segment in segments])
    if wanted.heads:
        load = _interleaved(load, wanted.shape, wanted.heads)
    if wanted.columns is not None:
        load = _swapped(load, wanted.shape[-1], *wanted.columns)
    if wanted.apply is not None:
        load = _applied(load, wanted.apply)
    if wanted.shift:
        load = _shifted(load, wanted.shift)
    return TensorSource(name, wanted.shape, load, types[0] if len(types) == 1 else "f32", raw)


@dataclass(frozen=True)
class _Segment:
    """What a part takes of its tensor."""

    tensor: Weights
    part: Part

    @property
    def count(self) -> int:
        return self.part.count

    @property
    def has_raw(self) -> bool:
        """Whether its rows can be had in the bytes of a GGUF type, unchanged."""
        plain = not (self.part.transposed or self.part.of_columns)
        return plain and isinstance(self.tensor, DecodedTensor) and self.tensor.raw is not None

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        part = self.part
        if part.transposed:
            low, high = part.offset + start * part.step, part.offset + (stop - 1) * part.step + 1
            return self.tensor.columns(low, high, part.first, part.rows)[:, :: part.step].T
        if part.of_columns:
            return self.tensor.rows(part.first + start, part.first + stop)[:, part.offset :: part.step]
        return self.tensor.rows(*self._span(start, stop))[:: part.step]

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        assert isinstance(self.tensor, DecodedTensor)
        assert self.tensor.raw is not None
        return self.tensor.raw(*self._span(start, stop))[:: self.part.step]

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        base = self.part.first + self.part.offset
        return base + start * self.part.step, base + (stop - 1) * self.part.step + 1


def _stacked(segments: list[tuple[Callable[[int, int], NDArray[_T]], int]]) -> Callable[[int, int], NDArray[_T]]:
    """Rows of several loaders one below the other: ``(loader, rows)`` each."""

    def load(start: int, stop: int) -> NDArray[_T]:
        parts, at = [], 0
        for rows_of, rows in segments:
            low, high = max(start, at), min(stop, at + rows)
            if low < high:
                parts.append(rows_of(low - at, high - at))
            at += rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return load


def _shifted(load: LoadRows, shift: float) -> LoadRows:
    """Rows with a number added, as the model's own code does it."""
    return lambda start, stop: load(start, stop) + np.float32(shift)


def _applied(load: LoadRows, apply: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> LoadRows:
    return lambda start, stop: apply(load(start, stop))


def _swapped(load: LoadRows, columns: int, outer: int, inner: int) -> LoadRows:
    """Columns seen as ``[outer, inner, ..]``, in the order ``[inner, outer, ..]``."""
    order = np.arange(columns).reshape(outer, inner, -1).swapaxes(0, 1).reshape(-1)
    return lambda start, stop: load(start, stop)[:, order]


def row_order(rows: int, heads: int) -> NDArray[np.int64]:
    """The rows of a query or key matrix in GGUF's order: within each of ``heads`` heads, ``0, d/2, 1, d/2+1 ..``.

    Transformers rotates value i of a head together with value i + d/2, llama.cpp's ``llama`` with its neighbour.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _interleaved(load: LoadRows, shape: tuple[int, ...], heads: int) -> LoadRows:
    """Rows (of a bias: values) in the order of :func:`row_order`."""
    order = row_order(shape[0], heads)

    def load_rows(start: int, stop: int) -> NDArray[np.float32]:
        wanted = order[start:stop]
        low = int(wanted.min())
        return load(low, int(wanted.max()) + 1)[wanted - low]

    def load_values(start: int, stop: int) -> NDArray[np.float32]:
        return load(start, stop)[:, order]

    return load_values if len(shape) == 1 else load_rows

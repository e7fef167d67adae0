"""Widen a model to rows of whole blocks of 256, which llama.cpp's K- and IQ-types need, without changing what it
computes.

With other rows llama-quantize silently takes larger types, so that a file of "Q2_K" has hardly a Q2_K tensor.  At their
own width types are compared on a copy of the model with more channels and heads, whose weights are zero:

- normalizations divide by the root of the mean square over all channels; with ``n`` of ``N`` channels in use their
  weights get the factor ``sqrt(n / N)`` and epsilon ``n / N``;
- Gemma multiplies embeddings by ``sqrt(channels)``: they get ``sqrt(n / N)``, too, and the last normalization, where
  the embedding is the output matrix as well, its reciprocal;
- heads of zeros, as many to a key as the others have, add nothing.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import lcm
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccq_converters import imatrix
from ccq_converters.gguf_sources import decode_rows
from ccq_format.errors import ModelError
from ccq_format.gguf_io import Model, ModelWriter, TensorInfo, open_model

WIDTH = 256
FAMILIES = ("llama", "gemma3")

F32 = NDArray[np.float32]

_HEAD_NORM = re.compile(r"attn_[qk]_norm\.weight$")


class Padding:
    """The dimensions of a model, and what becomes of them.  Raises ``ModelError`` for a family not in ``FAMILIES``."""

    def __init__(self, model: Model) -> None:
        self.model = model
        if model.arch not in FAMILIES:
            raise ModelError(f"cannot be padded: only {', '.join(FAMILIES)} can, not {model.arch}", file=model.path)
        self.channels = self._key("embedding_length")
        self.heads = self._key("attention.head_count")
        self.keys = self._key("attention.head_count_kv")
        self.hidden = self._key("feed_forward_length")
        self.head = self._key("attention.key_length", self.channels // self.heads)
        shared = self.heads // self.keys
        # The fewest keys whose heads fill whole blocks: those of the queries, and so of attention's output.
        step = lcm(WIDTH, self.head * shared) // (self.head * shared)
        self.new_keys = _up(self.keys, step)
        self.new_heads = self.new_keys * shared
        self.new_channels, self.new_hidden = _up(self.channels, WIDTH), _up(self.hidden, WIDTH)
        pairs = {
            (self.channels, self.new_channels),
            (self.hidden, self.new_hidden),
            (self.heads * self.head, self.new_heads * self.head),
            (self.keys * self.head, self.new_keys * self.head),
        }
        self.lengths = dict(pairs)
        """Old and new length of every dimension but the vocabulary's."""
        if len(self.lengths) != len(pairs):
            raise ModelError("cannot be padded: dimensions of different meaning have one length", file=model.path)

    def _key(self, name: str, default: int | None = None) -> int:
        value = self.model.metadata.get(f"{self.model.arch}.{name}", default)
        if not isinstance(value, int):
            raise ModelError(f"has no {self.model.arch}.{name}", file=self.model.path)
        return value

    @property
    def needed(self) -> bool:
        """Whether anything changes."""
        return self.new_channels != self.channels or self.new_hidden != self.hidden or self.new_heads != self.heads

    @property
    def share(self) -> float:
        """Channels in use."""
        return self.channels / self.new_channels

    def tensor(self, info: TensorInfo) -> F32:
        """The tensor, padded and scaled; float32 in numpy order."""
        x = decode_rows(info, 0, info.n_rows).reshape(info.shape)
        padded = np.zeros(self.shape(info), np.float32)
        padded[tuple(slice(n) for n in info.shape)] = x * np.float32(self._factor(info.name))
        return padded

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """The new shape of a tensor."""
        if _HEAD_NORM.search(info.name):
            return info.shape
        if info.name in ("token_embd.weight", "output.weight"):
            return info.shape[0], self.new_channels
        return tuple(self.lengths.get(n, n) for n in info.shape)

    def _factor(self, name: str) -> float:
        if _HEAD_NORM.search(name):
            return 1.0
        if self.model.arch == "gemma3" and name in ("token_embd.weight", "output_norm.weight"):
            return self.share**0.5 if name == "token_embd.weight" else 1.0
        return self.share**0.5 if name.endswith("_norm.weight") else 1.0


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def pad_model(path: Path, out: Path) -> None:
    """Write the padded copy of a GGUF file, in float32.  Raises ``ModelError``, ``OutputError``."""
    model = open_model(path)
    padding = Padding(model)
    arch = model.arch
    with ModelWriter(out, "", overwrite=True) as writer:
        writer.copy_metadata(model)
        keys = {
            "embedding_length": padding.new_channels,
            "feed_forward_length": padding.new_hidden,
            "attention.head_count": padding.new_heads,
            "attention.head_count_kv": padding.new_keys,
            "attention.key_length": padding.head,
            "attention.value_length": padding.head,
        }
        table = writer.gguf.kv_data[0]
        for key, value in keys.items():
            table.pop(f"{arch}.{key}", None)
            writer.gguf.add_uint32(f"{arch}.{key}", value)
        epsilon = f"{arch}.attention.layer_norm_rms_epsilon"
        del table[epsilon]
        writer.gguf.add_float32(epsilon, float(model.metadata[epsilon]) * padding.share)
        for info in model.tensors:
            writer.add_tensor(info.name, "f32", padding.shape(info))
        writer.begin()
        for info in model.tensors:
            writer.write(info.name, padding.tensor(info))


def pad_importance(known: imatrix.Importance, path: Path) -> imatrix.Importance:
    """The importance of the model at ``path`` for its padded copy: zeros for the new inputs."""
    model = open_model(path)
    padding = Padding(model)
    entries = {}
    for info in model.tensors:
        entry = known.entries.get(info.name)
        if entry is None:
            continue
        sums = np.zeros(padding.lengths[info.columns], np.float32)
        sums[: info.columns] = entry.sums
        entries[info.name] = replace(entry, sums=sums, gradients=None)
    return replace(known, entries=entries)

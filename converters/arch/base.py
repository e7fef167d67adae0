"""A model family as data (:class:`Spec`), and bound to one model's configuration (:class:`Family`): its metadata keys,
and its tensors described by name, shape and origin."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ModelError

from .config import Config
from .rope import Rope

log = logging.getLogger(__name__)

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Checkpoint tensors that are no weights: rotary tables and causal masks which older versions of transformers saved.
llama.cpp computes both."""

Flag = bool | str | tuple[str, bool]
"""True, false, or the key of the config that says so (with what its absence means, else false)."""


@dataclass(frozen=True)
class Part:
    """Rows of the checkpoint tensor ``name``, which must have the shape ``shape``, seen as ``[prod(shape[:-1]),
    shape[-1]]``: of ``first .. first + rows`` (``rows`` = 0: all) every ``step``-th from ``offset`` on.
    ``transposed``: of the columns (before ``stop``; 0: all) of these rows, which become rows.  ``of_columns``: of the
    columns, which stay so."""

    name: str
    shape: tuple[int, ...]
    first: int = 0
    rows: int = 0
    step: int = 1
    transposed: bool = False
    of_columns: bool = False
    offset: int = 0
    stop: int = 0

    @property
    def count(self) -> int:
        """Rows that it gives."""
        taken = self.rows or prod(self.shape[:-1])
        if self.of_columns:
            return taken
        return len(range(self.offset, (self.stop or self.shape[-1]) if self.transposed else taken, self.step))


@dataclass(frozen=True)
class Wanted:
    """One tensor of the GGUF file: ``parts`` one below the other, in ``shape``.

    ``hf_name`` is looked up in gguf's tensor name map.  ``heads`` > 0 means that the rows of each of ``heads`` heads
    are reordered from transformers' rotary layout (first half, second half) to llama.cpp's (interleaved).  ``columns``
    ``(a, b)`` means that columns are seen as ``[a, b, ..]`` and stored as ``[b, a, ..]``.  ``shift`` is added to all
    values; ``apply`` computes them of those in the checkpoint.
    """

    hf_name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    heads: int = 0
    shift: float = 0.0
    columns: tuple[int, int] | None = None
    apply: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None


def whole(name: str, *shape: int, heads: int = 0, shift: float = 0.0, stored: str | None = None) -> Wanted:
    """A checkpoint tensor that is taken as it is; ``stored`` if it has another name there than gguf's map knows."""
    return Wanted(name, shape, (Part(stored or name, shape),), heads, shift)


class Block(Protocol):
    """A part of a decoder layer: norm, attention, feed-forward network."""

    def check(self, family: Family) -> None:
        """Raise ``ModelError`` for anything in the configuration that llama.cpp would silently ignore."""

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """Its tensors in the layer ``prefix``; ``stored`` are the names in the checkpoint, which tell its style."""

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """Add its metadata keys."""


@dataclass(frozen=True)
class Require:
    """A key of the config that must have one of the values ``allowed``, and why."""

    key: str
    allowed: tuple[object, ...]
    why: str
    default: object = None

    def check(self, config: Config) -> None:
        """Raise ``ModelError`` if it has another one."""
        value = config.raw.get(self.key)
        value = self.default if value is None else value
        if value not in self.allowed:
            raise config.error(f"'{self.key}' is {value!r}; {self.why}")


@dataclass(frozen=True)
class Sliding:
    """Sliding windows in all layers but each ``every``-th, as llama.cpp has them in an architecture; 0: in none, so
    that a window is worth a warning.  ``default`` is the window if the config does not mention one, ``switch`` a
    boolean of the config that must be true for a window to count."""

    every: int = 0
    default: int | None = None
    switch: str | None = None


@dataclass(frozen=True)
class Spec:
    """What distinguishes a family from others: defaults of its config class, its layers, what llama.cpp cannot do."""

    architecture: str
    """Hugging Face's name."""
    model_arch: gguf.MODEL_ARCH
    layer: tuple[Block, ...]
    rotary_interleaved: bool = False
    """Whether llama.cpp rotates neighbouring values (its ``LLAMA_ROPE_TYPE_NORM``) where transformers has halves."""
    partial_rotary: float | None = None
    """The part of a head that is rotated if the config does not say; ``None``: llama.cpp rotates whole heads."""
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn", "dynamic"})
    rope_layer_type: str | None = None
    """Of RoPE parameters per layer type, the one that the others of the file are for."""
    rope_free: frozenset[str] = frozenset()
    """Options of yarn that llama.cpp reads in this architecture."""
    rope_inexact: frozenset[str] = frozenset()
    """Options of yarn that it does not read, at the price of small differences."""
    theta: float = 10000.0
    rms_eps: float = 1e-6
    layer_norm: bool = False
    """LayerNorm instead of RMSNorm."""
    kv_heads: int | None = None
    """If the config has none: this many; ``None`` = as many as attention heads."""
    head_dim: int | None = None
    """If the config has none; ``None`` = ``hidden / heads``."""
    head_dim_always: bool = False
    """Whether the config class fills in the size of heads: the file names it even if it is ``hidden / heads``."""
    width: str | None = "intermediate_size"
    """The config's key for the width of dense feed-forward networks; ``None``: no layer has one, and the config may
    leave ``intermediate_size`` out."""
    tied: bool = False
    """Whether the output matrix is the embedding if the config does not say."""
    own_output: bool = False
    """Whether llama.cpp needs an output matrix: it does not take the embedding instead."""
    norm_shift: float = 0.0
    """What the norms' code adds to their weights."""
    sliding: Sliding = Sliding()
    activation: tuple[str, ...] = ("silu", "swish")
    activation_key: str = "hidden_act"
    requires: tuple[Require, ...] = ()
    check: Callable[[Family], None] | None = None
    keys: Callable[[Family, gguf.GGUFWriter], None] | None = None
    """Adds further metadata keys."""
    token_ids: Callable[[Family], dict[str, int]] | None = None
    """Special tokens (kind: id) that no file of the model names."""
    pretokenizers: Mapping[str, str] = field(default_factory=dict)
    """Other names for ways of cutting text into words, where llama.cpp has several for one and means the family by
    this: what the name says beyond that, such as whether there is a BOS."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens (kind: text) that no file names as such, for vocabularies that have them."""
    ignored: str | None = None
    """Names (a regular expression) of tensors that llama.cpp has no use for."""
    calibrates: bool = False
    """Whether ``calibrate`` knows how transformers' layers of the family compute."""
    skips_mtp: bool = False
    """Whether layers behind the last one, for the prediction of several tokens, may be there; they are left out."""

    @property
    def base_architecture(self) -> str:
        """The name of the model without its head, such as ``LlamaModel``."""
        return self.architecture.replace("ForCausalLM", "Model")


class Family:
    """A family for one model's configuration; ``wrapper`` is the architecture that the text model is a part of.

    Raises ``ModelError`` on construction for anything in the configuration that llama.cpp would silently ignore.
    """

    def __init__(self, spec: Spec, config: Config, *, wrapper: str | None = None) -> None:
        self.spec, self.config, self.wrapper = spec, config, wrapper
        self.layers = config.integer("num_hidden_layers")
        self.context = config.integer("max_position_embeddings")
        self.hidden = config.integer("hidden_size")
        self.intermediate = config.integer(spec.width) if spec.width is not None else config.count("intermediate_size")
        self.vocab_size = config.integer("vocab_size")
        self.heads = config.integer("num_attention_heads")
        self.kv_heads = config.integer("num_key_value_heads", default=self._default_kv_heads())
        self.norm_eps = config.number("layer_norm_eps" if spec.layer_norm else "rms_norm_eps", spec.rms_eps)
        self.tied = config.boolean("tie_word_embeddings", spec.tied)
        self.head_dim = config.integer("head_dim", default=spec.head_dim or self.hidden // self.heads)
        self.rope = Rope.read(
            config,
            spec.theta,
            self.context,
            spec.partial_rotary,
            layer_type=spec.rope_layer_type,
            free=spec.rope_free,
            inexact=spec.rope_inexact,
        )
        self._check()
        self.write_metadata(gguf.GGUFWriter(None, self.arch_name))  # what cannot be written is known now

    def _default_kv_heads(self) -> int:
        if "num_key_value_heads" not in self.config.raw and self.spec.kv_heads is not None:
            return self.spec.kv_heads
        return self.heads

    def _check(self) -> None:
        config, spec = self.config, self.spec
        Require(
            spec.activation_key, spec.activation, f"llama.cpp computes {spec.activation[0]} here", spec.activation[0]
        ).check(config)
        if self.heads % self.kv_heads:
            raise config.error(f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads")
        if "head_dim" not in config.raw and spec.head_dim is None and self.hidden % self.heads:
            raise config.error(f"'hidden_size' {self.hidden} is no multiple of {self.heads} heads")
        if self.head_dim % 2:
            raise config.error(f"'head_dim' {self.head_dim} is odd, so that it cannot be rotated")
        if self.rope.type not in spec.rope_types:
            raise config.error(f"llama.cpp has no {self.rope.type} RoPE scaling in {self.arch_name} models")
        if spec.own_output and (self.tied or self.headless):
            raise config.error(f"llama.cpp needs an output matrix of its own in {self.arch_name} models")
        for require in spec.requires:
            require.check(config)
        for block in spec.layer:
            block.check(self)
        if spec.check is not None:
            spec.check(self)
        window = self.window()
        if window is not None and window < self.context and not spec.sliding.every:
            log.warning(
                "%s: llama.cpp has no sliding window attention (%d tokens) in %s models: beyond it, results differ "
                "from transformers",
                config.file,
                window,
                self.arch_name,
            )

    def window(self) -> int | None:
        """Tokens of the sliding window, if the model has one."""
        sliding = self.spec.sliding
        if sliding.switch is not None and not self.config.boolean(sliding.switch, False):
            return None
        if self.config.raw.get("use_sliding_window") is False:
            return None
        if "sliding_window" not in self.config.raw:
            return sliding.default
        return None if self.config.raw["sliding_window"] is None else self.config.integer("sliding_window")

    def flag(self, flag: Flag) -> bool:
        """The value of a flag.  Raises ``ModelError`` if the config's is no boolean."""
        if isinstance(flag, bool):
            return flag
        return self.config.boolean(*((flag, False) if isinstance(flag, str) else flag))

    @property
    def architecture(self) -> str:
        """Hugging Face's name."""
        return self.spec.architecture

    @property
    def model_arch(self) -> gguf.MODEL_ARCH:
        """gguf's number of the architecture."""
        return self.spec.model_arch

    @property
    def arch_name(self) -> str:
        """``general.architecture``."""
        return gguf.MODEL_ARCH_NAMES[self.model_arch]

    @property
    def rotary_dim(self) -> int:
        """Values of a head that are rotated."""
        return int(self.head_dim * self.rope.partial)

    # --- tensors ----------------------------------------------------------------------------------------------------

    def wanted(self, stored: frozenset[str]) -> Iterator[Wanted]:
        """All tensors of the model; ``stored`` are the names in the checkpoint, which tell its naming style."""
        yield whole("model.embed_tokens.weight", self.vocab_size, self.hidden)
        for layer in range(self.layers):
            for block in self.spec.layer:
                yield from block.tensors(self, f"model.layers.{layer}", layer, stored)
        yield whole("model.norm.weight", self.hidden, shift=self.spec.norm_shift)
        if "lm_head.weight" in stored or not (self.tied or self.headless):
            yield whole("lm_head.weight", self.vocab_size, self.hidden)

    @property
    def headless(self) -> bool:
        """Whether this is a model without its output matrix, such as an embedding model's base."""
        return bool(self.config.raw["architectures"] == [self.spec.base_architecture])

    # --- metadata ---------------------------------------------------------------------------------------------------

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``{arch}.*`` keys."""
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        if self.intermediate:
            writer.add_feed_forward_length(self.intermediate)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        self.rope.write(writer)
        if self.spec.layer_norm:
            writer.add_layer_norm_eps(self.norm_eps)
        else:
            writer.add_layer_norm_rms_eps(self.norm_eps)
        if self.spec.partial_rotary is not None:
            writer.add_rope_dimension_count(self.rotary_dim)
        self._write_window(writer)
        for block in self.spec.layer:
            block.write(self, writer)
        if self.spec.keys is not None:
            self.spec.keys(self, writer)
        key = f"{self.arch_name}.attention.key_length"
        if key not in writer.kv_data[0] and self._writes_head_dim():
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)

    def _write_window(self, writer: gguf.GGUFWriter) -> None:
        """The window, and which layers have it where that is not llama.cpp's own pattern."""
        every, window = self.spec.sliding.every, self.window()
        if not every or window is None:
            return
        writer.add_sliding_window(window)
        types = self.config.raw.get("layer_types")
        if types is None:
            stated = self.config.integer("sliding_window_pattern", "_sliding_window_pattern", default=every)
            types = ["sliding_attention" if (i + 1) % stated else "full_attention" for i in range(self.layers)]
        if not isinstance(types, list) or len(types) != self.layers:
            raise self.config.error(f"'layer_types' must name {self.layers} layers")
        if any(kind not in ("sliding_attention", "full_attention") for kind in types):
            raise self.config.error(f"'layer_types' has one that is unknown: {sorted(set(map(str, types)))}")
        if "sliding_attention" not in types:
            raise self.config.error("no layer has the sliding window, which llama.cpp needs in this architecture")
        slides = [kind == "sliding_attention" for kind in types]
        if slides != [(i + 1) % every != 0 for i in range(self.layers)]:
            writer.add_sliding_window_pattern(slides)

    def _writes_head_dim(self) -> bool:
        """Whether the head size goes into the file; llama.cpp's default is ``hidden / heads``."""
        stated = self.config.raw.get("head_dim") is not None
        return self.spec.head_dim_always or stated or self.head_dim * self.heads != self.hidden

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint tensor is left out without a word."""
        if name.endswith(IGNORED_SUFFIXES):
            return True
        if self.spec.ignored is not None and re.search(self.spec.ignored, name) is not None:
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", name) if self.spec.skips_mtp else None
        return layer is not None and int(layer[1]) >= self.layers

    def tokenizer_extras(self) -> dict[str, int]:
        """Special tokens (kind: id) that no file of the model names; by default none."""
        return self.spec.token_ids(self) if self.spec.token_ids is not None else {}


def plain_heads(family: Family) -> None:
    """A ``Spec.check``: heads that are together as wide as the hidden states.  Raises ``ModelError``."""
    if family.head_dim * family.heads != family.hidden:
        raise family.config.error(f"llama.cpp needs hidden_size = heads * head_dim in {family.arch_name} models")


def resolve(family: Family, stored: frozenset[str]) -> Iterator[tuple[str, Wanted]]:
    """GGUF names and contents of all tensors, one by one: a wrong shape shows before a count that it contradicts is
    used, such as that of the experts.

    Raises ``ModelError`` if gguf's name map lacks a name.
    """
    names = gguf.get_tensor_name_map(family.model_arch, family.layers)
    for wanted in family.wanted(stored):
        name = names.get_name(wanted.hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError("gguf has no name for it", file=family.config.file, tensor=wanted.hf_name)
        yield name, wanted

"""What the model families share: configuration, metadata keys, and tensors described by name, shape and origin."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import gguf

from ccq_format.errors import ModelError

from .config import Config
from .rope import Rope

log = logging.getLogger(__name__)

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Checkpoint tensors that are no weights: rotary tables and causal masks which older versions of transformers saved.
llama.cpp computes both."""


@dataclass(frozen=True)
class Part:
    """Rows ``first .. first + rows`` of the checkpoint tensor ``name``, seen as ``[prod(shape[:-1]), shape[-1]]``;
    ``rows`` = 0 stands for all of them.  ``shape`` is what the whole checkpoint tensor must have."""

    name: str
    shape: tuple[int, ...]
    first: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Wanted:
    """One tensor of the GGUF file: ``parts`` one below the other, in ``shape``.

    ``hf_name`` is looked up in gguf's tensor name map.  ``heads`` > 0 means that the rows of each of ``heads`` heads
    are reordered from transformers' rotary layout (first half, second half) to llama.cpp's (interleaved).
    """

    hf_name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    heads: int = 0


def whole(name: str, *shape: int, heads: int = 0) -> Wanted:
    """A checkpoint tensor that is taken as it is."""
    return Wanted(name, shape, (Part(name, shape),), heads)


class Family(ABC):
    """Base of the families; an instance stands for one model's configuration.

    Raises ``ModelError`` on construction for anything in the configuration that llama.cpp would silently ignore.
    """

    architecture: ClassVar[str]
    """Hugging Face's name."""
    model_arch: ClassVar[gguf.MODEL_ARCH]
    rotary_interleaved: ClassVar[bool] = False
    """Whether llama.cpp rotates neighbouring values in this architecture (its ``LLAMA_ROPE_TYPE_NORM``)."""
    default_theta: ClassVar[float] = 10000.0
    default_rms_eps: ClassVar[float] = 1e-6
    default_kv_heads: ClassVar[int | None] = None
    """If the config has none: this many; ``None`` = as many as attention heads."""
    default_window: ClassVar[int | None] = None
    """Sliding window if the config does not mention one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.layers = config.integer("num_hidden_layers")
        self.context = config.integer("max_position_embeddings")
        self.hidden = config.integer("hidden_size")
        self.intermediate = config.integer("intermediate_size")
        self.vocab_size = config.integer("vocab_size")
        self.heads = config.integer("num_attention_heads")
        self.kv_heads = config.integer("num_key_value_heads", default=self._default_kv_heads())
        self.rms_eps = config.number("rms_norm_eps", self.default_rms_eps)
        self.tied = config.boolean("tie_word_embeddings", False)
        self.head_dim = config.integer("head_dim", default=self._default_head_dim())
        self.rope = Rope.read(config, self.default_theta, self.context)
        self._check()

    def _default_kv_heads(self) -> int:
        if "num_key_value_heads" not in self.config.raw and self.default_kv_heads is not None:
            return self.default_kv_heads
        return self.heads

    def _default_head_dim(self) -> int:
        return self.hidden // self.heads

    def _check(self) -> None:
        config = self.config
        if config.raw.get("quantization_config"):
            raise config.error("the checkpoint is already quantized ('quantization_config'); take the original weights")
        activation = config.raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise config.error(f"the activation {activation!r} is not supported: llama.cpp computes silu here")
        if self.heads % self.kv_heads:
            raise config.error(f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads")
        if "head_dim" not in config.raw and self.hidden % self.heads:
            raise config.error(f"'hidden_size' {self.hidden} is no multiple of {self.heads} heads")
        if self.head_dim % 2:
            raise config.error(f"'head_dim' {self.head_dim} is odd, so that it cannot be rotated")
        if self.rope.type == "llama3" and self.model_arch != gguf.MODEL_ARCH.LLAMA:
            raise config.error(f"llama.cpp has no llama3 RoPE scaling in {self.arch_name} models")
        window = self._window()
        if window is not None and window < self.context:
            log.warning(
                "%s: llama.cpp has no sliding window attention (%d tokens) in %s models: beyond it, results differ "
                "from transformers",
                config.file,
                window,
                self.arch_name,
            )

    def _window(self) -> int | None:
        if self.config.raw.get("use_sliding_window") is False:
            return None
        if "sliding_window" not in self.config.raw:
            return self.default_window
        if self.config.raw["sliding_window"] is None:
            return None
        return self.config.integer("sliding_window")

    @property
    def arch_name(self) -> str:
        """``general.architecture``."""
        return gguf.MODEL_ARCH_NAMES[self.model_arch]

    # --- tensors ----------------------------------------------------------------------------------------------------

    def wanted(self, stored: frozenset[str]) -> Iterator[Wanted]:
        """All tensors of the model; ``stored`` are the names in the checkpoint, which tell its naming style."""
        yield whole("model.embed_tokens.weight", self.vocab_size, self.hidden)
        for layer in range(self.layers):
            yield from self.layer(f"model.layers.{layer}", stored)
        yield whole("model.norm.weight", self.hidden)
        if not self.tied or "lm_head.weight" in stored:
            yield whole("lm_head.weight", self.vocab_size, self.hidden)

    def layer(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """The tensors of one decoder layer."""
        yield whole(f"{prefix}.input_layernorm.weight", self.hidden)
        yield from self.attention(f"{prefix}.self_attn")
        yield whole(f"{prefix}.post_attention_layernorm.weight", self.hidden)
        yield from self.feed_forward(prefix, stored)

    def attention(self, prefix: str, *, qkv_bias: bool = False, out_bias: bool = False) -> Iterator[Wanted]:
        """Query, key, value and output projections."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, rows, heads in (("q", query, self.heads), ("k", kv, self.kv_heads), ("v", kv, 0)):
            heads = heads if self.rotary_interleaved else 0
            yield whole(f"{prefix}.{name}_proj.weight", rows, self.hidden, heads=heads)
            if qkv_bias:
                yield whole(f"{prefix}.{name}_proj.bias", rows, heads=heads)
        yield whole(f"{prefix}.o_proj.weight", self.hidden, query)
        if out_bias:
            yield whole(f"{prefix}.o_proj.bias", self.hidden)

    @abstractmethod
    def feed_forward(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """The feed-forward tensors of the layer ``prefix``."""

    def dense(self, prefix: str, *, bias: bool = False) -> Iterator[Wanted]:
        """A gated feed-forward network."""
        for name, rows, columns in (
            ("gate", self.intermediate, self.hidden),
            ("up", self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
        ):
            yield whole(f"{prefix}.mlp.{name}_proj.weight", rows, columns)
            if bias:
                yield whole(f"{prefix}.mlp.{name}_proj.bias", rows)

    def experts(
        self, prefix: str, stored: frozenset[str], *, separate: str, names: tuple[str, str, str], count: int, width: int
    ) -> Iterator[Wanted]:
        """Expert matrices, stacked to ``[count, rows, columns]``.

        ``separate`` is the name of one expert's matrix in the style with one tensor per expert, with ``{expert}`` and
        ``{name}`` (from ``names``: gate, up, down).  Transformers 5 can also save its own layout: gate and up fused
        to ``[count, 2 * width, hidden]``, and down, under ``mlp.experts``.
        """
        fused = f"{prefix}.mlp.experts.gate_up_proj"
        down = f"{prefix}.mlp.experts.down_proj"
        shapes = ((width, self.hidden), (width, self.hidden), (self.hidden, width))
        kinds = ("gate_proj", "up_proj", "down_proj")
        for which, (kind, name, shape) in enumerate(zip(kinds, names, shapes, strict=True)):
            if fused not in stored:
                parts = tuple(
                    Part(f"{prefix}.{separate}.weight".format(expert=e, name=name), shape) for e in range(count)
                )
            elif kind == "down_proj":
                parts = (Part(down, (count, *shape)),)
            else:
                whole_shape = (count, 2 * width, self.hidden)
                parts = tuple(Part(fused, whole_shape, (2 * e + which) * width, width) for e in range(count))
            yield Wanted(f"{prefix}.mlp.experts.{kind}.weight", (count, *shape), parts)

    # --- metadata ---------------------------------------------------------------------------------------------------

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``{arch}.*`` keys."""
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.intermediate)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        self.rope.write(writer)
        writer.add_layer_norm_rms_eps(self.rms_eps)
        if self.writes_head_dim():
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)

    def writes_head_dim(self) -> bool:
        """Whether the head size goes into the file; llama.cpp's default is ``hidden / heads``."""
        return self.config.raw.get("head_dim") is not None or self.head_dim * self.heads != self.hidden

    def tokenizer_extras(self) -> dict[str, int]:
        """Special tokens (kind: id) that no file of the model names; by default none."""
        return {}


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

"""Llama 1 to 3 and everything saved as ``LlamaForCausalLM``."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from .base import Family, Wanted

_CODE_LLAMA = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
"""Infilling tokens of CodeLlama; no file of the model names them."""


class Llama(Family):
    """Interleaved rotary layout, optional biases, Llama-3 RoPE scaling."""

    architecture = "LlamaForCausalLM"
    model_arch = gguf.MODEL_ARCH.LLAMA
    rotary_interleaved = True

    def attention(self, prefix: str, *, qkv_bias: bool = False, out_bias: bool = False) -> Iterator[Wanted]:
        """With biases if the config says so."""
        bias = self.config.boolean("attention_bias", False)
        yield from super().attention(prefix, qkv_bias=qkv_bias or bias, out_bias=out_bias or bias)

    def feed_forward(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """Dense, with biases if the config says so."""
        yield from self.dense(prefix, bias=self.config.boolean("mlp_bias", False))

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Adds the vocabulary size and the number of rotated values."""
        super().write_metadata(writer)
        writer.add_vocab_size(self.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)

    def writes_head_dim(self) -> bool:
        """Always: this config class has the field, filled in."""
        return True

    def tokenizer_extras(self) -> dict[str, int]:
        """CodeLlama's, known by its vocabulary size."""
        return _CODE_LLAMA if self.vocab_size == 32016 else {}

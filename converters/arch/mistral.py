"""Mistral in Hugging Face layout: llama.cpp's ``llama`` without biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from .base import Family, Wanted
from .llama import Llama


class Mistral(Llama):
    """As Llama; the config's sliding window is not represented in llama.cpp."""

    architecture = "MistralForCausalLM"
    default_kv_heads = 8
    default_window: ClassVar[int | None] = 4096

    def attention(self, prefix: str, *, qkv_bias: bool = False, out_bias: bool = False) -> Iterator[Wanted]:
        """Never a bias, whatever the config says."""
        yield from Family.attention(self, prefix)

    def feed_forward(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """Dense, never a bias."""
        yield from self.dense(prefix)

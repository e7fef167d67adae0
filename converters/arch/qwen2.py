"""Qwen 2 and 2.5, dense."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from .base import Family, Wanted


class Qwen2(Family):
    """Query, key and value have biases; the head size is always ``hidden / heads``."""

    architecture = "Qwen2ForCausalLM"
    model_arch = gguf.MODEL_ARCH.QWEN2
    default_kv_heads = 32

    def _check(self) -> None:
        super()._check()
        if self.head_dim * self.heads != self.hidden:
            raise self.config.error(f"llama.cpp needs hidden_size = heads * head_dim in {self.arch_name} models")

    def _window(self) -> int | None:
        return super()._window() if self.config.boolean("use_sliding_window", False) else None

    def attention(self, prefix: str, *, qkv_bias: bool = True, out_bias: bool = False) -> Iterator[Wanted]:
        """With biases of query, key and value."""
        yield from super().attention(prefix, qkv_bias=qkv_bias, out_bias=out_bias)

    def feed_forward(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """Dense."""
        yield from self.dense(prefix)

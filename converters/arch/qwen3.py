"""Qwen 3, dense."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from .base import Family, Wanted, whole


class Qwen3(Family):
    """Query and key are normalized per head; the head size is the config's own, and usually there is no bias."""

    architecture = "Qwen3ForCausalLM"
    model_arch = gguf.MODEL_ARCH.QWEN3
    default_kv_heads = 32

    def _default_head_dim(self) -> int:
        return 128

    def _check(self) -> None:
        super()._check()
        if self.config.boolean("attention_bias", False):
            # llama.cpp has no bias of the output projection here, and transformers switches all four together.
            raise self.config.error(f"llama.cpp has no 'attention_bias' in {self.arch_name} models")

    def _window(self) -> int | None:
        return super()._window() if self.config.boolean("use_sliding_window", False) else None

    def attention(self, prefix: str, *, qkv_bias: bool = False, out_bias: bool = False) -> Iterator[Wanted]:
        """With the norms of query and key."""
        yield from super().attention(prefix, qkv_bias=qkv_bias, out_bias=out_bias)
        yield whole(f"{prefix}.q_norm.weight", self.head_dim)
        yield whole(f"{prefix}.k_norm.weight", self.head_dim)

    def feed_forward(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """Dense."""
        yield from self.dense(prefix)

    def writes_head_dim(self) -> bool:
        """Always: this config class has the field, filled in."""
        return True

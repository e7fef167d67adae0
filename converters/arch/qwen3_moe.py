"""Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from .base import Wanted, whole
from .config import Config
from .qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    """Experts named ``mlp.experts.N.gate_proj/up_proj/down_proj`` or fused under ``mlp.experts``."""

    architecture = "Qwen3MoeForCausalLM"
    model_arch = gguf.MODEL_ARCH.QWEN3MOE
    default_kv_heads = 4

    def __init__(self, config: Config) -> None:
        self.n_experts = config.integer("num_experts", "num_local_experts")
        self.n_used = config.integer("num_experts_per_tok")
        self.expert_width = config.integer("moe_intermediate_size")
        if self.n_used > self.n_experts:
            raise config.error(f"{self.n_used} experts per token are more than {self.n_experts} experts")
        if config.raw.get("mlp_only_layers") or config.integer("decoder_sparse_step", default=1) != 1:
            raise config.error("llama.cpp needs experts in every layer of a qwen3moe model")
        if not config.boolean("norm_topk_prob", False):
            raise config.error("llama.cpp always normalizes the router's top weights: 'norm_topk_prob' must be true")
        super().__init__(config)

    def _default_head_dim(self) -> int:
        return self.hidden // self.heads

    def feed_forward(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """Router and stacked experts."""
        yield whole(f"{prefix}.mlp.gate.weight", self.n_experts, self.hidden)
        yield from self.experts(
            prefix,
            stored,
            separate="mlp.experts.{expert}.{name}",
            names=("gate_proj", "up_proj", "down_proj"),
            count=self.n_experts,
            width=self.expert_width,
        )

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Adds the numbers and the width of the experts."""
        super().write_metadata(writer)
        writer.add_expert_count(self.n_experts)
        writer.add_expert_used_count(self.n_used)
        writer.add_expert_feed_forward_length(self.expert_width)

    def writes_head_dim(self) -> bool:
        """Only if the config has it: this config class does not fill it in."""
        return self.config.raw.get("head_dim") is not None or self.head_dim * self.heads != self.hidden

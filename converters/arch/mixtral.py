"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from .base import Wanted, whole
from .config import Config
from .mistral import Mistral


class Mixtral(Mistral):
    """Experts named ``block_sparse_moe.experts.N.w1/w3/w2`` (gate, up, down) or fused under ``mlp.experts``."""

    architecture = "MixtralForCausalLM"
    default_theta = 1e6
    default_rms_eps = 1e-5
    default_window = None

    def __init__(self, config: Config) -> None:
        self.n_experts = config.integer("num_local_experts")
        self.n_used = config.integer("num_experts_per_tok")
        if self.n_used > self.n_experts:
            raise config.error(f"{self.n_used} experts per token are more than {self.n_experts} experts")
        super().__init__(config)

    def feed_forward(self, prefix: str, stored: frozenset[str]) -> Iterator[Wanted]:
        """Router and stacked experts."""
        fused = f"{prefix}.mlp.experts.gate_up_proj" in stored
        yield whole(f"{prefix}.{'mlp' if fused else 'block_sparse_moe'}.gate.weight", self.n_experts, self.hidden)
        yield from self.experts(
            prefix,
            stored,
            separate="block_sparse_moe.experts.{expert}.{name}",
            names=("w1", "w3", "w2"),
            count=self.n_experts,
            width=self.intermediate,
        )

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Adds the numbers of experts."""
        super().write_metadata(writer)
        writer.add_expert_count(self.n_experts)
        writer.add_expert_used_count(self.n_used)

    def writes_head_dim(self) -> bool:
        """Only if the config has it: this config class does not fill it in."""
        return self.config.raw.get("head_dim") is not None or self.head_dim * self.heads != self.hidden

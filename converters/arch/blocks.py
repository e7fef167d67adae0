"""The parts that layers are composed of; what they have in common over families, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import gguf

from .base import Family, Flag, Part, Wanted, whole


@dataclass(frozen=True)
class Norm:
    """A norm of the hidden states."""

    name: str

    def check(self, family: Family) -> None:
        """See ``Block``."""

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        yield whole(f"{prefix}.{self.name}.weight", family.hidden, shift=family.spec.norm_shift)

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """See ``Block``."""


@dataclass(frozen=True)
class Attention:
    """Query, key, value and output projections, ``fused``: the first three in one tensor.

    ``norms`` of query and key are ``"head"`` (the same weights for each head) or ``"all"`` (a weight for each row), if
    ``normed`` says so.  ``sinks``: a learned logit per head that takes attention away.  ``gated``: behind the rows of
    each head's query are as many of a gate for what it attends to.
    """

    bias: Flag = False
    out_bias: Flag = False
    norms: str | None = None
    normed: Flag = True
    sinks: bool = False
    fused: bool = False
    gated: bool = False

    def check(self, family: Family) -> None:
        """See ``Block``."""

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        prefix = f"{prefix}.self_attn"
        query, kv = family.heads * family.head_dim, family.kv_heads * family.head_dim
        if self.fused:
            yield whole(f"{prefix}.qkv_proj.weight", query + 2 * kv, family.hidden)
        else:
            projected = 2 * query if self.gated else query
            for name, rows, heads in (("q", projected, family.heads), ("k", kv, family.kv_heads), ("v", kv, 0)):
                heads = heads if family.spec.rotary_interleaved else 0
                yield whole(f"{prefix}.{name}_proj.weight", rows, family.hidden, heads=heads)
                if family.flag(self.bias):
                    yield whole(f"{prefix}.{name}_proj.bias", rows, heads=heads)
        yield whole(f"{prefix}.o_proj.weight", family.hidden, query)
        if family.flag(self.out_bias):
            yield whole(f"{prefix}.o_proj.bias", family.hidden)
        if self.norms is not None and family.flag(self.normed):
            for name, rows in (("q", query), ("k", kv)):
                size = rows if self.norms == "all" else family.head_dim
                yield whole(f"{prefix}.{name}_norm.weight", size, shift=family.spec.norm_shift)
        if self.sinks:
            yield whole(f"{prefix}.sinks.weight", family.heads, stored=f"{prefix}.sinks")

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """See ``Block``."""


def gated_network(prefix: str, inner: int, hidden: int) -> Iterator[Wanted]:
    """The matrices of a gated feed-forward network of the width ``inner``."""
    for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        yield whole(f"{prefix}.{name}_proj.weight", rows, columns)


@dataclass(frozen=True)
class Dense:
    """A gated feed-forward network, ``fused``: gate and up in one tensor."""

    bias: Flag = False
    fused: bool = False

    def check(self, family: Family) -> None:
        """See ``Block``."""

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        inner, hidden = family.intermediate, family.hidden
        upper = (("gate_up", 2 * inner, hidden),) if self.fused else (("gate", inner, hidden), ("up", inner, hidden))
        for name, rows, columns in (*upper, ("down", hidden, inner)):
            yield whole(f"{prefix}.mlp.{name}_proj.weight", rows, columns)
            if family.flag(self.bias):
                yield whole(f"{prefix}.mlp.{name}_proj.bias", rows)

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """See ``Block``."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts; ``lead`` is the config's key for the number of dense layers before it.

    ``count``, ``used`` and ``width`` are the config's keys for the number of experts, of those that each token takes,
    and for their width; ``shared`` that for the number of experts that every token takes, one tensor of that width in
    all; ``shared_width`` that for the width of one such expert with a gate of its own.  ``selection_bias`` is added to
    the router's scores for the choice only; the checkpoint has it under one of these names.

    Experts are stacked to ``[count, rows, columns]``.  ``separate`` is the name of one expert's matrix in the style
    with one tensor per expert, with ``{expert}`` and ``{name}`` (from ``names``: gate, up, down).  Transformers 5 can
    also save its own layout: gate and up fused to ``[count, 2 * width, hidden]``, and down, under ``mlp.experts``.
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    used: tuple[str, ...] = ("num_experts_per_tok",)
    width: str = "moe_intermediate_size"
    shared: str | None = None
    shared_width: str | None = None
    lead: str | None = None
    router: str = "mlp.gate"
    selection_bias: tuple[str, ...] = ()
    separate: str = "mlp.experts.{expert}.{name}"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    writes_width: bool = True
    dense: Dense = field(default_factory=Dense)

    def number(self, family: Family) -> int:
        """The number of experts."""
        return family.config.integer(*self.count)

    def lead_layers(self, family: Family) -> int:
        """The number of dense layers before the first with experts."""
        if self.lead is None:
            return 0
        return family.config.count(self.lead)

    def check(self, family: Family) -> None:
        """See ``Block``."""
        count, used = self.number(family), family.config.integer(*self.used)
        family.config.integer(self.width)
        if used > count:
            raise family.config.error(f"{used} experts per token are more than {count} experts")

    def tensors(self, family: Family, prefix: str, layer: int, stored: frozenset[str]) -> Iterator[Wanted]:
        """See ``Block``."""
        if layer < self.lead_layers(family):
            yield from self.dense.tensors(family, prefix, layer, stored)
            return
        count, width, hidden = self.number(family), family.config.integer(self.width), family.hidden
        fused = f"{prefix}.mlp.experts.gate_up_proj" in stored
        yield whole(f"{prefix}.{'mlp.gate' if fused else self.router}.weight", count, hidden)
        if self.selection_bias:
            names = [f"{prefix}.{name}" for name in self.selection_bias]
            name = next((name for name in names if name in stored), names[0])
            # One vector, in ERNIE's files a matrix of one row.
            shape = (1, count) if "moe_statics" in name else (count,)
            yield Wanted(f"{prefix}.mlp.gate.e_score_correction.bias", (count,), (Part(name, shape),))
        yield from self._stacks(family, prefix, fused, count, width)
        shared = family.config.count(self.shared) if self.shared is not None else 0
        if shared:
            yield from gated_network(f"{prefix}.mlp.shared_experts", shared * width, hidden)
        if self.shared_width is not None:
            yield from gated_network(f"{prefix}.mlp.shared_expert", family.config.integer(self.shared_width), hidden)
            yield whole(f"{prefix}.mlp.shared_expert_gate.weight", 1, hidden)

    def _stacks(self, family: Family, prefix: str, fused: bool, count: int, width: int) -> Iterator[Wanted]:
        shapes = ((width, family.hidden), (width, family.hidden), (family.hidden, width))
        kinds = ("gate_proj", "up_proj", "down_proj")
        for which, (kind, name, shape) in enumerate(zip(kinds, self.names, shapes, strict=True)):
            if not fused:
                parts = tuple(
                    Part(f"{prefix}.{self.separate}.weight".format(expert=e, name=name), shape) for e in range(count)
                )
            elif kind == "down_proj":
                parts = (Part(f"{prefix}.mlp.experts.down_proj", (count, *shape)),)
            else:
                both, whole_shape = f"{prefix}.mlp.experts.gate_up_proj", (count, 2 * width, family.hidden)
                parts = tuple(Part(both, whole_shape, (2 * e + which) * width, width) for e in range(count))
            yield Wanted(f"{prefix}.mlp.experts.{kind}.weight", (count, *shape), parts)

    def write(self, family: Family, writer: gguf.GGUFWriter) -> None:
        """See ``Block``."""
        config = family.config
        writer.add_expert_count(self.number(family))
        writer.add_expert_used_count(config.integer(*self.used))
        if self.writes_width:
            writer.add_expert_feed_forward_length(config.integer(self.width))
        if self.shared is not None:
            writer.add_expert_shared_count(config.count(self.shared))
        if self.shared_width is not None:
            writer.add_expert_shared_feed_forward_length(config.integer(self.shared_width))
        if self.lead is not None:
            writer.add_leading_dense_block_count(self.lead_layers(family))


def write_routing(family: Family, writer: gguf.GGUFWriter, gating: gguf.ExpertGatingFuncType) -> None:
    """Add the keys of routers as DeepSeek's, whose experts may be in groups."""
    config = family.config
    writer.add_expert_gating_func(gating)
    if config.count("n_group"):
        writer.add_expert_group_count(config.integer("n_group"))
        writer.add_expert_group_used_count(config.integer("topk_group", default=1))
    writer.add_expert_weights_scale(config.number("routed_scaling_factor", 1.0))
    if config.boolean("norm_topk_prob", gating == gguf.ExpertGatingFuncType.SIGMOID):
        writer.add_expert_weights_norm(True)


PRE_NORM = (Norm("input_layernorm"), Norm("post_attention_layernorm"))
"""The usual two: before attention, and before the feed-forward network."""


def decoder(attention: Attention, ffn: Dense | Experts) -> tuple[Norm | Attention | Dense | Experts, ...]:
    """A layer with the usual norms."""
    return PRE_NORM[0], attention, PRE_NORM[1], ffn

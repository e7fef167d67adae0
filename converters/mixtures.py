"""Mixtures: plans that give the matrices that matter most more bits than the others, by rules on their names.

The rules follow ``llama_tensor_get_type`` in llama.cpp's ``src/llama-quant.cpp``, which has them for Q2_K, IQ2_M and
the like; what is a step up here is a step on ``LADDER``.  Attention K is raised, too, by what was measured with
gradients on two Llama models of 4 and 16 million parameters, with two and four query heads to a key.  KL divergence per
weight from equal relative errors, as the mean over the layers and relative to that of FFN gate and up: attention K 4.4
and 8.0, V 3.3 and 6.8, output 2.3 and 2.1, Q 1.0 and 1.0; FFN down 2.4 and 2.1, in the first layer alone 3.6 and 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LADDER = ("ccq_t1_5", "ccq_t2", "ccq_t2_5", "ccq_t3", "iq4_nl", "q5_0", "q8_0")
"""Types by size: 1.625, 2.125, 2.625, 3.125, 4.5, 5.5 and 8.5 bits per weight.  ccq_t1 is not among them: a step up is
not for what has so little (plans by measurement do take it: ``allocate.ladder``)."""


@dataclass(frozen=True)
class Mixture:
    """The type of most matrices, of the token embedding, and of the output matrix (also of an embedding that is the
    output matrix as well)."""

    name: str
    base: str
    embedding: str
    output: str


MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture("ccq_t1_5_m", "ccq_t1_5", "ccq_t2_5", "ccq_t3"),
        Mixture("ccq_t2_m", "ccq_t2", "ccq_t2_5", "ccq_t3"),
        Mixture("ccq_t2_5_m", "ccq_t2_5", "ccq_t3", "iq4_nl"),
        Mixture("ccq_t3_m", "ccq_t3", "ccq_t3", "q5_0"),
    )
}
"""By name.

Embedding and output have about as much to gain per byte as the matrices have from the next type; KL divergence of the
16 M model (2540 tokens) from one of them alone: embedding in T2 0.0121, T2_5 0.0051, T3 0.0027, q4_0 0.0010; output in
T2_5 0.0169, T3 0.0077, q4_0 0.0029, q5_0 0.0008.  Of the 4 M model's embedding, which is its output, too: T3 0.0173,
q4_0 0.0061, q5_0 0.0016 (these two rounded as llama.cpp does; ours lose 11 % less, and iq4_nl 26 % less than q4_0).
"""

_LAYER = re.compile(r"^blk\.(\d+)\.")
_VALUE = re.compile(r"\.attn_(v|qkv|kv_b|v_b)\.weight$")
_KEY = re.compile(r"\.attn_(k|k_b)\.weight$")
_OUT = re.compile(r"\.attn_output\.weight$")
_DOWN = re.compile(r"\.ffn_down(_exps|_shexp)?\.weight$")
_SHARED_EXPERT = re.compile(r"\.ffn_\w+_shexp\.weight$")
_QUERY = re.compile(r"^(blk\.\d+\.attn_)q\.weight$")


class MixtureScheme:
    """A ``schemes.Scheme`` that follows a mixture's rules.

    What is known of the model comes from its tensors alone: the number of layers, of experts, and of query heads that
    share a key (rows of ``attn_q`` per row of ``attn_k``).
    """

    def __init__(self, mixture: Mixture, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """``tensors``: name and shape (numpy order) of all tensors of the model."""
        self.mixture = mixture
        shapes = dict(tensors)
        layers = [int(found[1]) for name in shapes if (found := _LAYER.search(name))]
        self.first_layers = max(1, (max(layers, default=-1) + 1) // 8)
        self.experts = max((s[0] for n, s in shapes.items() if n.endswith("_exps.weight") and len(s) == 3), default=1)
        self.tied = "output.weight" not in shapes
        self.shared_heads = 1
        for name, shape in shapes.items():
            found = _QUERY.search(name)
            key = shapes.get(f"{found[1]}k.weight") if found else None
            if key:
                self.shared_heads = max(self.shared_heads, shape[0] // max(1, key[0]))

    def matrix(self, name: str) -> tuple[str, str]:
        """Type and reason of a matrix."""
        base = LADDER.index(self.mixture.base)
        steps, reason = self._steps(name)
        return LADDER[base + steps], f"{self.mixture.name}{': ' if reason else ''}{reason}"

    def vocabulary(self, name: str) -> tuple[str, str]:
        """Type and reason of a token embedding or output matrix."""
        if name == "output.weight":
            return self.mixture.output, f"{self.mixture.name}: output"
        if name == "token_embd.weight" and self.tied:
            return self.mixture.output, f"{self.mixture.name}: embedding and output"
        return self.mixture.embedding, f"{self.mixture.name}: embedding"

    def _steps(self, name: str) -> tuple[int, str]:
        many = self.experts >= 4
        if _VALUE.search(name):
            return (2, "small attention V") if many or self.shared_heads > 1 else (1, "attention V")
        if _OUT.search(name):
            return (2, "small attention output") if many else (1, "attention output")
        if _KEY.search(name) and (many or self.shared_heads > 1):
            return (2 if many else 1), "small attention K"
        if _SHARED_EXPERT.search(name):
            return 1, "shared expert"
        layer = _LAYER.search(name)
        if _DOWN.search(name) and layer and int(layer[1]) < self.first_layers:
            return 1, "FFN down of the first layers"
        return 0, ""

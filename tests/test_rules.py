"""Which tensors are not left to the type that was asked for."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest

from ccq_converters.imatrix import Entry, Importance
from ccq_converters.mixtures import LADDER, MIXTURES
from ccq_converters.options import QuantOptions
from ccq_converters.plan import free_matrices, make_plan
from ccq_converters.rules import RULES, Fate, mtp_layers, rule_of
from ccq_converters.target_types import bits
from ccq_converters.tensors import TensorSource

ARCHITECTURES = sorted(gguf.MODEL_TENSORS, key=lambda arch: arch.name)


def names_of(arch: gguf.MODEL_ARCH) -> list[str]:
    """The GGUF names of an architecture's tensors, of layer 3."""
    return sorted({gguf.TENSOR_NAMES[t].format(bid=3, xid=1) + ".weight" for t in gguf.MODEL_TENSORS[arch]})


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name.lower())
def test_a_rule_has_decided_on_every_tensor(arch: gguf.MODEL_ARCH) -> None:
    undecided = [name for name in names_of(arch) if rule_of(name) is None]
    assert not undecided, f"{gguf.MODEL_ARCH_NAMES[arch]}: add a rule, with its reason, to converters/rules.py"


def test_every_rule_names_a_tensor_of_llama_cpp_and_gives_a_reason() -> None:
    names = {name for arch in ARCHITECTURES for name in names_of(arch)}
    used = {rule_of(name) for name in [*names, "blk.3.hc_attn_fn.weight", "blk.3.indexer.k_proj.weight"]}  # newer ones
    assert [rule.pattern for rule in RULES if rule not in used] == []
    assert all(rule.reason for rule in RULES)


def source(name: str, *shape: int, type_name: str = "f16") -> TensorSource:
    return TensorSource(name, shape, lambda start, stop: np.zeros((stop - start, shape[-1]), np.float32), type_name)


def types(options: QuantOptions, *sources: TensorSource) -> list[str]:
    return [t.type for t in make_plan(list(sources), options).tensors]


@pytest.mark.parametrize("kind", ["ccq_t1_5", "ccq_t2", "ccq_t2_m", "ccq_t3_m"])
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.ssm_alpha.weight", (32, 2048), "q8_0"),
        ("blk.0.ssm_beta.weight", (32, 2048), "q8_0"),
        ("blk.0.ssm_ba.weight", (64, 2048), "q8_0"),
        ("blk.0.ssm_out.weight", (2048, 4096), "q8_0"),
        ("blk.0.ssm_conv1d.weight", (512, 4), "f16"),
        ("blk.0.attn_k_b.weight", (128, 512, 128), "q8_0"),
        ("blk.0.attn_v_b.weight", (128, 128, 512), "q8_0"),
        ("blk.0.attn_kv_a_mqa.weight", (576, 7168), "q8_0"),
        ("blk.0.attn_sinks.weight", (2, 64), "f32"),
        ("blk.0.hc_attn_fn.weight", (24, 4096), "f16"),
        ("blk.0.ffn_gate_inp.weight", (256, 7168), "f32"),
        ("blk.0.nextn.eh_proj.weight", (256, 512), "q8_0"),
        ("blk.0.nextn.shared_head_head.weight", (1000, 256), "q8_0"),
        ("blk.0.indexer.attn_q_b.weight", (8192, 1536), "q8_0"),
        ("v.blk.3.ffn_up.weight", (4304, 1152), "q8_0"),
        ("v.patch_embd.weight", (1152, 3, 14, 14), "f16"),
        ("mm.0.weight", (4096, 1152), "q8_0"),
        ("mm.model.mlp.2.weight", (4096, 1152), "q8_0"),
        ("a.blk.3.attn_q.weight", (1280, 1280), "q8_0"),
        ("resampler.kv.weight", (4096, 1152), "q8_0"),
        ("per_layer_model_proj.weight", (256, 512), "f16"),
    ],
)  # fmt: skip
def test_what_must_not_go_to_two_bits(name: str, shape: tuple[int, ...], expected: str, kind: str) -> None:
    assert types(QuantOptions(kind), source(name, *shape)) == [expected]
    if expected == "q8_0":
        assert types(QuantOptions("bf16"), source(name, *shape)) == ["bf16"]
    # What the user says by name wins.
    assert types(QuantOptions(kind, overrides=[(re.escape(name), "f16")]), source(name, *shape)) == ["f16"]


def test_a_clip_file_has_nothing_at_two_bits() -> None:
    model = [source(name, 64, 256) for name in names_of(gguf.MODEL_ARCH.MMPROJ)]
    assert set(types(QuantOptions("ccq_t2"), *model)) <= {"f32", "f16", "q8_0"}


@pytest.mark.parametrize("name", ["token_embd", "per_layer_token_embd", "blk.4.nextn.embed_tokens"])
def test_embeddings_have_more_than_two_bits(name: str) -> None:
    for kind in [*LADDER[:4], *MIXTURES]:
        # With an output matrix of its own, or it would count as the output.
        (chosen, _) = types(QuantOptions(kind), source(f"{name}.weight", 1000, 256), source("output.weight", 1000, 256))
        assert chosen == "q8_0" or bits(chosen) > 2.5
        assert kind not in MIXTURES or chosen == MIXTURES[kind].embedding


MTP = [
    source("blk.7.ffn_up.weight", 64, 256),
    source("blk.8.nextn.eh_proj.weight", 64, 256),
    source("blk.8.ffn_up_exps.weight", 4, 64, 256),
    source("blk.8.ffn_down_exps.weight", 4, 64, 256),
    source("blk.80.ffn_up.weight", 64, 256),
]


def importance(*names: str, estimated: bool = False) -> Importance:
    entries = {name: Entry(np.ones(256 * 4, np.float32), np.full(4, 100.0, np.float32)) for name in names}
    return Importance("x.gguf", entries, estimated=dict.fromkeys(names, "near") if estimated else {})


def test_the_block_of_further_tokens_without_data() -> None:
    name = "blk.8.ffn_up_exps.weight"
    assert mtp_layers(s.name for s in MTP) == {"8"}
    assert types(QuantOptions("ccq_t2"), *MTP) == ["ccq_t2", "q8_0", "q5_0", "q5_0", "ccq_t2"]
    assert types(QuantOptions("q8_0"), *MTP) == ["q8_0"] * 5
    assert types(QuantOptions("ccq_t2", imatrix=importance(name)), *MTP)[2:4] == ["ccq_t2", "q5_0"]
    assert types(QuantOptions("ccq_t2", imatrix=importance(name, estimated=True)), *MTP)[2:4] == ["q5_0", "q5_0"]
    free = [s.name for s in free_matrices(MTP, QuantOptions(target_bpw=2.2, imatrix=importance(name)))]
    assert free == ["blk.7.ffn_up.weight", name, "blk.80.ffn_up.weight"]


def test_unknown_matrices_are_named() -> None:
    model = [source("blk.0.ffn_up.weight", 64, 256), source("blk.0.new_kind.weight", 64, 256)]
    plan = make_plan(model, QuantOptions("ccq_t2"))
    assert [t.type for t in plan.tensors] == ["ccq_t2", "ccq_t2"]
    (warning,) = plan.warnings()
    assert "blk.0.new_kind.weight" in warning
    assert make_plan(model, QuantOptions("ccq_t2", overrides=[("new_kind", "q8_0")])).warnings() == []


def test_what_is_no_weight_is_no_product() -> None:
    for name in ("blk.0.ssm_a", "blk.0.attn_conv_base", "blk.0.ffn_up.scale", "blk.0.anything"):
        rule = rule_of(name)
        assert rule is not None
        assert rule.fate in (Fate.KEPT, Fate.F32)

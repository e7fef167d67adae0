"""Which tensor gets which type."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ccq_backend
from ccq_converters.encode import check_weights, encode_rows, rows_of_importance
from ccq_converters.mixtures import LADDER, MIXTURES
from ccq_converters.options import QuantOptions
from ccq_converters.plan import make_plan
from ccq_converters.target_types import COPIED_TYPES, STOCK_TYPES, block, parse_type
from ccq_converters.tensors import TensorSource
from ccq_format import layouts
from ccq_format.errors import ImportanceError, PlanError, WeightsError

TARGETS = [*(layout.name for layout in layouts.LAYOUTS), *STOCK_TYPES]


def source(name: str, *shape: int, type_name: str = "f16") -> TensorSource:
    return TensorSource(name, shape, lambda start, stop: np.zeros((stop - start, shape[-1]), np.float32), type_name)


MODEL = [
    source("token_embd.weight", 1000, 512),
    source("blk.0.attn_norm.weight", 512, type_name="f32"),
    source("blk.0.attn_q.weight", 512, 512),
    source("blk.0.attn_q.bias", 512),
    source("blk.0.ffn_gate_inp.weight", 4, 512),
    source("blk.0.ffn_down_exps.weight", 4, 512, 1024),
    source("blk.0.attn_k_b.weight", 8, 64, 512),
    source("blk.0.ssm_conv1d.weight", 512, 4),
    source("blk.0.ssm_a", 512, 16, type_name="f32"),
    source("blk.0.ffn_gate_tid2eid.weight", 1000, 6, type_name="i32"),
    source("output.weight", 1000, 512),
]


def types(kind: str, overrides: list[tuple[str, str]] | None = None) -> dict[str, str]:
    plan = make_plan(MODEL, QuantOptions(kind, overrides=overrides or []))
    return {t.source.name.replace("blk.0.", "").removesuffix(".weight"): t.type for t in plan.tensors}


def test_default_rules() -> None:
    assert types("ccq_t2") == {
        "token_embd": "q8_0",
        "attn_norm": "f32",
        "attn_q": "ccq_t2",
        "attn_q.bias": "f32",
        "ffn_gate_inp": "f32",
        "ffn_down_exps": "ccq_t2",
        "attn_k_b": "q8_0",
        "ssm_conv1d": "f16",
        "ssm_a": "f32",
        "ffn_gate_tid2eid": "i32",
        "output": "q8_0",
    }


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_float_types_take_embedding_and_output_too(kind: str) -> None:
    chosen = types(kind)
    assert {chosen[n] for n in ("token_embd", "output", "attn_q", "ffn_down_exps", "attn_k_b")} == {kind}
    assert {chosen[n] for n in ("attn_norm", "attn_q.bias", "ffn_gate_inp")} == {"f32"}


def test_type_names_have_any_case_and_no_prefix() -> None:
    assert [parse_type(t) for t in ("CCQ_T2_5", "t2_5", "P2", "F16", " q8_0 ")] == [
        "ccq_t2_5", "ccq_t2_5", "ccq_p2", "f16", "q8_0",
    ]  # fmt: skip
    for bad in ("", "q4_1", "ccq_t4", "crvq_1", "f64"):
        with pytest.raises(PlanError, match="unknown type"):
            parse_type(bad)


def test_first_matching_override_wins_and_is_searched_in_the_name() -> None:
    chosen = types("t2", [("attn", "T3"), (r"attn_q|^output\.", "f16"), ("ffn_gate_inp", "q8_0")])
    assert (chosen["attn_q"], chosen["attn_k_b"], chosen["output"]) == ("ccq_t3", "ccq_t3", "f16")
    assert chosen["ffn_gate_inp"] == "q8_0"
    assert chosen["attn_norm"] == "f32"
    assert chosen["attn_q.bias"] == "f32"


@pytest.mark.parametrize("pattern", ["no_such_tensor", r"attn_norm", r"\.bias$"])
def test_override_that_matches_no_matrix_is_an_error(pattern: str) -> None:
    with pytest.raises(PlanError, match="matches no matrix"):
        types("t2", [("attn_q", "f16"), (pattern, "f16")])


@pytest.mark.parametrize("type_name", ["f64", "i32"])
def test_override_of_what_is_copied_is_an_error(type_name: str) -> None:
    tables = [source("blk.0.attn_q.weight", 64, 512), source("blk.0.table", 64, 512, type_name=type_name)]
    with pytest.raises(PlanError, match="'table' matches no matrix"):
        make_plan(tables, QuantOptions("ccq_t2", overrides=[("attn_q", "f16"), ("table", "f16")]))


def test_bad_overrides() -> None:
    with pytest.raises(PlanError, match="no regular expression"):
        types("t2", [("(", "f16")])
    with pytest.raises(PlanError, match="unknown type"):
        types("t2", [("attn", "q3_k")])


def test_fallback_counts_tensors_and_bytes() -> None:
    model = [
        source("blk.0.ffn_up.weight", 10, 320),
        source("blk.0.ffn_down.weight", 10, 40),
        source("blk.0.attn_q.weight", 10, 256),
        source("token_embd.weight", 10, 40),
    ]
    plan = make_plan(model, QuantOptions("p2_5"))
    assert [t.type for t in plan.tensors] == ["iq4_nl", "f16", "ccq_p2_5", "f16"]
    assert [t.nbytes for t in plan.tensors] == [10 * 320 // 32 * 18, 10 * 40 * 2, 10 * 82, 10 * 40 * 2]
    (warning,) = plan.warnings()
    assert warning.startswith("3 tensors (3.32 KiB)")
    assert "32, 256" in warning
    assert plan.fallback_bytes == 1800 + 800 + 800
    with pytest.raises(PlanError, match=r"ffn_up.*320 is no multiple of 256"):
        make_plan(model, QuantOptions("p2_5", fallback=False))
    assert make_plan(model[2:3], QuantOptions("p2_5", fallback=False)).warnings() == []


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 1100)), min_size=1, max_size=6),
    kind=st.sampled_from(TARGETS),
)
def test_every_plan_fits_and_adds_up(shapes: list[tuple[int, int, int]], kind: str) -> None:
    model = [source(f"blk.{i}.ffn_up_exps.weight", *shape) for i, shape in enumerate(shapes)]
    plan = make_plan(model, QuantOptions(kind))
    for tensor, shape in zip(plan.tensors, shapes, strict=True):
        weights, nbytes = block(tensor.type)
        assert shape[-1] % weights == 0
        assert tensor.nbytes == np.prod(shape) // weights * nbytes
        fits = shape[-1] % block(kind)[0] == 0
        smaller = "ccq_t1_5" if kind == "ccq_t1" and shape[-1] % 64 == 0 else "iq4_nl"
        assert tensor.type == (kind if fits else smaller if shape[-1] % 32 == 0 else "f16")
    assert plan.nbytes == sum(t.nbytes for t in plan.tensors)
    assert plan.file_bpw == pytest.approx(8 * plan.nbytes / sum(np.prod(s) for s in shapes))
    lines = plan.table().splitlines()
    groups = plan.by_type()
    assert len(groups) == len({t.type for t in plan.tensors})
    assert lines[len(model) + 2 :] == [*groups, plan.summary()]
    assert f"{plan.file_bpw:.3f} bits per weight" in lines[-1]
    assert plan.fallback_count == sum(s[-1] % block(kind)[0] != 0 for s in shapes)


LAYERS = 17


def llama(*, experts: int = 0, heads: int = 8, tied: bool = False) -> list[TensorSource]:
    """Tensors of a deep model with 2 key-value heads of 64 channels."""
    out = [source("token_embd.weight", 1000, 512)]
    for i in range(LAYERS):
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (512,), "attn_q": (heads * 64, 512), "attn_k": (128, 512), "attn_v": (128, 512),
            "attn_output": (512, heads * 64),
        }  # fmt: skip
        if experts:
            shapes |= {f"ffn_{m}_exps": (experts, 512, 512) for m in ("gate", "up", "down")}
            shapes |= {"ffn_gate_inp": (experts, 512), "ffn_up_shexp": (512, 512)}
        else:
            shapes |= {f"ffn_{m}": (512, 512) for m in ("gate", "up", "down")}
        out += [source(f"blk.{i}.{name}.weight", *shape) for name, shape in shapes.items()]
    return out if tied else [*out, source("output.weight", 1000, 512)]


def mixture(kind: str, model: list[TensorSource]) -> dict[str, str]:
    return {t.source.name.removesuffix(".weight"): t.type for t in make_plan(model, QuantOptions(kind)).tensors}


def test_mixtures_give_more_to_what_matters() -> None:
    chosen = mixture("T2_M", llama(heads=2))  # as many as there are for keys
    assert (chosen["token_embd"], chosen["output"]) == (MIXTURES["ccq_t2_m"].embedding, MIXTURES["ccq_t2_m"].output)
    for i in range(LAYERS):
        kinds = {name: chosen[f"blk.{i}.{name}"] for name in ("attn_q", "attn_k", "ffn_gate", "ffn_up")}
        assert set(kinds.values()) == {"ccq_t2"}
        assert chosen[f"blk.{i}.attn_v"] == chosen[f"blk.{i}.attn_output"] == "ccq_t2_5"
        assert chosen[f"blk.{i}.ffn_down"] == ("ccq_t2_5" if i < LAYERS // 8 else "ccq_t2")
        assert chosen[f"blk.{i}.attn_norm"] == "f32"


def test_mixtures_look_at_heads_and_experts() -> None:
    chosen = mixture("ccq_t2_m", llama(heads=4))
    assert [chosen[f"blk.3.attn_{m}"] for m in "qkv"] == ["ccq_t2", "ccq_t2_5", "ccq_t3"]
    chosen = mixture("ccq_t2_m", llama(heads=2, experts=8))
    assert {chosen[f"blk.5.attn_{m}"] for m in ("k", "v", "output")} == {"ccq_t3"}
    assert chosen["blk.5.attn_q"] == "ccq_t2"
    assert chosen["blk.5.ffn_up_shexp"] == "ccq_t2_5"
    assert (chosen["blk.0.ffn_down_exps"], chosen["blk.5.ffn_down_exps"]) == ("ccq_t2_5", "ccq_t2")
    assert chosen["blk.5.ffn_gate_inp"] == "f32"


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_mixture_is_between_its_type_and_the_next(kind: str) -> None:
    base = MIXTURES[kind].base
    for model in (llama(), llama(experts=8)):
        plan = make_plan(model, QuantOptions(kind))
        matrices = [t for t in plan.tensors if t.source.name.startswith("blk.") and t.type not in ("f32", "f16")]
        bpw = 8 * sum(t.nbytes for t in matrices) / sum(t.source.n_weights for t in matrices)
        weights, nbytes = block(base)
        above_weights, above_bytes = block(LADDER[LADDER.index(base) + 1])
        assert 8 * nbytes / weights < bpw < 8 * above_bytes / above_weights
        assert all(kind in t.reason for t in matrices)
        assert plan.fallback_count == 0


def test_a_tied_embedding_is_the_output_matrix() -> None:
    for kind, spec in MIXTURES.items():
        assert mixture(kind, llama(tied=True))["token_embd"] == spec.output
        assert LADDER.index(spec.embedding) <= LADDER.index(spec.output)


def test_overrides_and_fallback_in_mixtures() -> None:
    model = [*llama(), source("blk.0.odd.weight", 8, 96)]
    plan = make_plan(model, QuantOptions("t2_m", overrides=[("attn_v|^output", "f16")]))
    chosen = {t.source.name: t.type for t in plan.tensors}
    assert (chosen["blk.3.attn_v.weight"], chosen["output.weight"], chosen["blk.0.odd.weight"]) == (
        "f16",
        "f16",
        "iq4_nl",
    )
    assert plan.fallback_count == 1
    assert "blk.0.odd.weight" in plan.warnings()[-1]


@pytest.mark.parametrize(("kind", "row_len", "expected"), [
    ("ccq_t2", 96, "iq4_nl"), ("ccq_p2", 320, "iq4_nl"), ("ccq_t2", 80, "f16"), ("q4_0", 80, "f16"),
    ("q8_0", 80, "f16"),
])  # fmt: skip
def test_rows_fall_back_to_the_next_type_that_fits(kind: str, row_len: int, expected: str) -> None:
    plan = make_plan([source("blk.0.ffn_up.weight", 4, row_len)], QuantOptions(kind))
    assert plan.tensors[0].type == expected


def test_block_sizes_agree_with_gguf() -> None:
    import gguf

    for name in [*TARGETS, *COPIED_TYPES]:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == block(name)


def test_error_weights_follow_their_formula() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    importance = np.array([4.0, 0.25], np.float32)
    paper, trellis = layouts.by_name("ccq_p2").code, layouts.by_name("ccq_t2").code
    plain = np.sqrt([[12.5 + 9, 12.5 + 16], [0, 0]])
    np.testing.assert_allclose(paper.error_weights(x, None), plain, rtol=1e-6)
    np.testing.assert_allclose(paper.error_weights(x, importance), plain * [2.0, 0.5], rtol=1e-6)
    assert trellis.error_weights(x, None) is None
    np.testing.assert_array_equal(trellis.error_weights(x, importance), importance)


def test_gain_follows_its_formula() -> None:
    layout = layouts.by_name("ccq_t2")
    weights = np.exp(np.random.default_rng(3).normal(0, 2, (3, 128))).astype(np.float32)
    blocks = weights.reshape(3, 2, 64).astype(np.float64)
    mean = np.exp(np.log(blocks).mean(axis=2, keepdims=True))
    expected = 1 + np.minimum(4**-2.125 * (mean / blocks) ** 0.75, 0.25).reshape(weights.shape)
    gain = layout.code.gain(layout, weights)
    np.testing.assert_allclose(gain, expected, rtol=1e-6)
    assert gain.min() < 1.01
    assert gain.max() == 1.25
    np.testing.assert_array_equal(layout.code.gain(layout, weights[1]), gain[1])
    weights[1, :3] = 0
    with_zeros = layout.code.gain(layout, weights)
    assert np.isfinite(with_zeros).all()
    np.testing.assert_array_equal(with_zeros[[0, 2]], gain[[0, 2]])
    np.testing.assert_allclose(layout.code.gain(layout, np.ones(64, np.float32)), layout.code.gain(layout, None)[0])
    paper = layouts.by_name("ccq_p2")
    assert paper.code.gain(paper, weights) == 1


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
def test_decoded_weights_are_as_large_as_the_original_ones(layout: layouts.Layout) -> None:
    """What the gain is for: a code's nearest words are shorter than their targets, by 2 % (T3) to 27 % (T1)."""
    x = np.random.default_rng(5).standard_normal((32, 1024)).astype(np.float32)
    decoded = ccq_backend.decode(layout, encode_rows(layout.name, x))
    slope = float((decoded * x).sum() / np.square(x).sum())
    assert abs(slope - 1) < (0.05 if layout.name.startswith("ccq_t") and layout.bpw > 1.5 else 0.12)


@pytest.mark.parametrize("layout", [x for x in layouts.LAYOUTS if x.code.couples and x.bpw > 1.5], ids=lambda x: x.name)
def test_columns_that_matter_most_are_as_large_as_the_original_ones(layout: layouts.Layout) -> None:
    """One gain for all would make them too large, and those that matter least even smaller than they get anyway."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((256, 256)).astype(np.float32)
    importance = np.exp(rng.normal(0, 1, 256)).astype(np.float32)
    one_gain = ccq_backend.encode(layout, x * layout.code.gain(layout, None), importance=importance)
    order = np.argsort(importance)
    least, most = (
        [
            float((decoded * x)[:, part].sum() / np.square(x[:, part]).sum())
            for decoded in (
                ccq_backend.decode(layout, blocks).reshape(x.shape)
                for blocks in (encode_rows(layout.name, x, importance), one_gain)
            )
        ]
        for part in (order[:64], order[-64:])
    )
    assert abs(most[0] - 1) < 0.02
    assert abs(most[0] - 1) < (most[1] - 1) / 2
    assert least[1] < least[0] < 1


def test_importance_rows_belong_to_their_matrix() -> None:
    table = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    np.testing.assert_array_equal(
        rows_of_importance(table, "t", 12, 2, 3, 9), [[1, 2], [3, 4], [3, 4], [3, 4], [3, 4], [5, 6]]
    )
    np.testing.assert_array_equal(rows_of_importance(table[0], "t", 12, 2, 3, 9), [1, 2])
    for bad in (np.ones(3), np.ones((5, 2)), np.full(2, -1.0), np.full(2, np.nan), np.ones((1, 1, 2))):
        with pytest.raises(ImportanceError, match="tensor 't'"):
            rows_of_importance(bad.astype(np.float32), "t", 12, 2, 0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(bad: float) -> None:
    x = np.zeros((2, 32), np.float32)
    check_weights(x, "ccq_t2", "blk.0.w")
    x[1, 7] = bad
    with pytest.raises(WeightsError, match=r"tensor 'blk.0.w'.*NaN or infinite"):
        check_weights(x, "f32", "blk.0.w")


def test_weights_must_fit_f16() -> None:
    x = np.full((1, 32), -65504.0, np.float32)
    check_weights(x, "f16", "w")
    assert np.isfinite(encode_rows("f16", x).view("<f2")).all()
    with pytest.raises(WeightsError, match="too large for f16"):
        check_weights(x * 2, "f16", "w")
    check_weights(x * 2, "bf16", "w")
    check_weights(x * 126, "q8_0", "w")
    with pytest.raises(WeightsError, match="too large for q8_0"):
        check_weights(x * 128, "q8_0", "w")
    for name, largest in (("q4_0", 8), ("q5_0", 16), ("iq4_nl", 127), ("q8_0", 127)):
        check_weights(x * largest, name, "w")
        scale = encode_rows(name, x * largest)[:, :2].view("<f2")
        assert np.isfinite(scale).all()
        with pytest.raises(WeightsError, match=f"too large for {name}"):
            check_weights(x * (largest + 1), name, "w")


@pytest.mark.parametrize("name", ["ccq_t1", "ccq_t1_5", "ccq_t2", "ccq_t2_5", "ccq_t3"])
def test_weights_must_fit_the_largest_scale(name: str) -> None:
    x = np.full((1, 64), 3810, np.float32)  # 127 * 30
    check_weights(x, name, "w")
    with pytest.raises(WeightsError, match=f"3811 is too large for {name}"):
        check_weights(x + 1, name, "w")

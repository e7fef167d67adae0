"""Importance for matrices without an entry: which tensors share an input, and what a norm's weights tell of others."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import TENSOR_NAMES

from ccq_converters import borrow
from ccq_converters.data import check_importance
from ccq_converters.imatrix import Entry, Importance
from ccq_converters.options import QuantOptions
from ccq_converters.plan import make_plan
from ccq_converters.tensors import TensorSource
from ccq_format.errors import ImportanceError

N = 128


def source(name: str, *shape: int, seed: int = 0) -> TensorSource:
    values = np.random.default_rng(seed).gamma(2.0, 0.5, shape).astype(np.float32).reshape(-1, shape[-1])
    return TensorSource(name, shape, lambda start, stop: values[start:stop], "f32")


def entry(seed: int, sets: int = 1, n: int = N) -> Entry:
    rng = np.random.default_rng(100 + seed)
    return Entry(rng.gamma(0.5, 90.0, sets * n).astype(np.float32), rng.integers(50, 90, sets).astype(np.float64))


def completed(sources: list[TensorSource], entries: dict[str, Entry]) -> Importance:
    return borrow.complete(Importance("i.gguf", entries), sources)


def blk(tensor: str, layer: int = 0) -> str:
    return f"blk.{layer}.{tensor}.weight"


def test_the_table_names_tensors_of_the_format() -> None:
    known = {name.removeprefix("blk.{bid}.").removeprefix("dec.blk.{bid}.") for name in TENSOR_NAMES.values()}
    for group in borrow.INPUTS:
        assert set(group.tensors) <= known | {"indexer.proj", "indexer.attn_k", "indexer.attn_q_b"}
        assert {name for pair in group.norms for name in pair if name} <= known | {"pre_ffw_norm_2"}
    tensors = [tensor for group in borrow.INPUTS for tensor in group.tensors]
    assert len(set(tensors)) == len(tensors)


@pytest.mark.parametrize(
    ("has", "wants"),
    [
        ("attn_q", "attn_k"), ("attn_q", "attn_v"), ("attn_k", "attn_q"), ("attn_qkv", "attn_q"),
        ("attn_q_a", "attn_kv_a_mqa"), ("attn_q", "attn_kv_a_mqa"), ("attn_v", "attn_qkv"),
        ("attn_q_b", "indexer.attn_q_b"),
        ("attn_qkv", "attn_gate"), ("ssm_in", "ssm_ba"), ("ffn_gate", "ffn_up"), ("ffn_up", "ffn_gate"),
        ("ffn_gate_shexp", "ffn_up_shexp"), ("ffn_gate_inp", "ffn_gate_shexp"),
    ],
)  # fmt: skip
def test_the_same_input_has_the_same_importance(has: str, wants: str) -> None:
    importance = completed([source(blk(has), 8, N), source(blk(wants), 4, N)], {blk(has): entry(1)})
    np.testing.assert_array_equal(importance.for_tensor(blk(wants), 1, N), importance.for_tensor(blk(has), 1, N))
    assert (importance.borrowed, importance.estimated) == ({blk(wants): blk(has)}, {})


@pytest.mark.parametrize(
    ("has", "wants"),
    [
        ("attn_q", "attn_output"), ("ffn_gate", "ffn_down"), ("attn_q", "ffn_gate"), ("attn_q_a", "attn_q_b"),
        ("ffn_up_exps", "ffn_down_exps"), ("ffn_gate", "ffn_gate_exps"), ("attn_q", "attn_norm"),
        ("time_mix_key", "time_mix_value"),
    ],
)  # fmt: skip
def test_other_inputs_are_not_taken(has: str, wants: str) -> None:
    importance = completed([source(blk(has), 8, N), source(blk(wants), 4, N)], {blk(has): entry(1)})
    assert importance.entries.keys() == {blk(has)}


def test_experts() -> None:
    """Fused and separate stacks have the same sums expert by expert; a shared expert's are those of all together."""
    stack = entry(1, 3)
    sources = [source(blk("ffn_gate_up_exps"), 3, 8, N), source(blk("ffn_up_shexp"), 8, N)]
    importance = completed(sources, {blk("ffn_up_exps"): stack})
    fused, shared = (importance.entries[s.name] for s in sources)
    np.testing.assert_array_equal(fused.sums, stack.sums)
    np.testing.assert_array_equal(fused.counts, stack.counts)
    np.testing.assert_allclose(shared.sums, stack.sums.reshape(3, N).sum(axis=0), rtol=1e-6)
    assert shared.counts == stack.counts.sum()
    # The other way round all experts have one set of sums; a stack's own kind is preferred to the router.
    plain = entry(2)
    importance = completed(sources[:1], {blk("ffn_up_shexp"): plain})
    got = importance.for_tensor(sources[0].name, 3, N)
    np.testing.assert_array_equal(got, plain.sums / np.float32(plain.counts[0]))
    importance = completed(sources, {blk("ffn_gate_inp"): plain, blk("ffn_gate_exps"): stack})
    assert importance.borrowed == {sources[0].name: blk("ffn_gate_exps"), sources[1].name: blk("ffn_gate_inp")}
    # llama.cpp's older form, in which an expert that was never hit has the mean 1 and no count of its own.
    sums = stack.sums.copy()
    sums[N : 2 * N] = 5.0
    importance = completed(sources, {blk("ffn_up_exps"): Entry(sums, np.array([5.0]))})
    np.testing.assert_allclose(importance.entries[sources[1].name].sums, sums.reshape(3, N)[[0, 2]].sum(axis=0))
    assert importance.entries[sources[1].name].counts == 10


def test_a_router_with_a_norm_of_its_own_lends_nothing() -> None:
    sources = [source(blk("ffn_gate_up_exps"), 3, 8, N), source(blk("pre_ffw_norm_2"), N)]
    assert not completed(sources, {blk("ffn_gate_inp"): entry(1)}).borrowed
    assert completed(sources[:1], {blk("ffn_gate_inp"): entry(1)}).borrowed


def test_a_norms_output_tells_of_others() -> None:
    """Inputs that are equal but for the norms' weights: what is estimated is exactly what was left out."""
    layers, norms = 3, ("attn_norm", "ffn_norm")
    sources = [source(blk(n, i), N, seed=2 * i + j) for i in range(layers) for j, n in enumerate(norms)]
    sources += [source(blk(t, i), 8, N) for i in range(layers) for t in ("attn_q", "ffn_up", "ffn_down")]
    sources += [source("output_norm.weight", N, seed=9), source("output.weight", 50, N)]
    weights = {s.name: s.load_rows(0, 1)[0] for s in sources if "norm" in s.name}
    power = np.random.default_rng(1).gamma(0.3, 1.0, N)

    def behind(norm: str) -> np.ndarray:
        return power * np.square(weights[norm], dtype=np.float64)

    known = {blk("ffn_up", 1): Entry((behind(blk("ffn_norm", 1)) * 70).astype(np.float32), np.array([70.0]))}
    importance = completed(sources, known)
    expected = {blk("attn_q", i): blk("attn_norm", i) for i in range(layers)}
    expected |= {blk("ffn_up", i): blk("ffn_norm", i) for i in (0, 2)} | {"output.weight": "output_norm.weight"}
    assert set(importance.estimated) == set(expected)
    assert not importance.borrowed
    for name, norm in expected.items():
        np.testing.assert_allclose(importance.input_power(name, 1, N)[0], behind(norm), rtol=1e-5)
    # The nearest lends, and of two as near the one of the same layer.
    known |= {blk("attn_q", 2): entry(3)}
    assert completed(sources, known).estimated == {
        blk("attn_q", 0): blk("ffn_up", 1),
        blk("ffn_up", 0): blk("ffn_up", 1),
        blk("attn_q", 1): blk("ffn_up", 1),
        blk("ffn_up", 2): blk("attn_q", 2),
        "output.weight": blk("attn_q", 2),
    }
    # Norms that add a bias are no such factors.
    assert not completed(
        [*sources, source("blk.1.ffn_norm.bias", N)], {k: known[k] for k in (blk("ffn_up", 1),)}
    ).estimated


def test_a_channel_silenced_by_the_other_norm_counts_as_the_mean() -> None:
    norm = np.ones(N, np.float32)
    norm[5] = 0
    sources = [
        TensorSource(blk("attn_norm"), (N,), lambda start, stop: norm[None], "f32"),
        TensorSource(blk("ffn_norm"), (N,), lambda start, stop: np.ones((1, N), np.float32), "f32"),
        source(blk("ffn_up"), 8, N),
    ]
    sums = np.arange(1, N + 1, dtype=np.float32)
    sums[5] = 0
    got = completed(sources, {blk("attn_q"): Entry(sums, np.array([1.0]))}).entries[blk("ffn_up")].sums
    np.testing.assert_allclose(got[5], np.delete(sums, 5).mean(), rtol=1e-6)
    np.testing.assert_array_equal(np.delete(got, 5), np.delete(sums, 5))


@pytest.mark.parametrize(
    ("norms", "used"),
    [
        (("attn_norm", "post_attention_norm"), "post_attention_norm"),  # Qwen3-Next
        (("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), "ffn_norm"),  # Gemma
        (("attn_norm",), "attn_norm"),  # Command R
        (("post_attention_norm", "post_ffw_norm"), None),  # OLMo 2
    ],
)
def test_which_norm_makes_the_input_of_an_ffn(norms: tuple[str, ...], used: str | None) -> None:
    sources = [source(blk(norm), N, seed=i) for i, norm in enumerate(norms)] + [source(blk("ffn_up"), 8, N)]
    importance = completed([*sources, source(blk("attn_norm", 1), N, seed=9)], {blk("attn_q", 1): entry(1)})
    assert (blk("ffn_up") in importance) == (used is not None)
    if used is not None:
        weights = {s.name: s.load_rows(0, 1)[0] for s in [*sources, source(blk("attn_norm", 1), N, seed=9)]}
        ratio = np.square(weights[blk(used)] / weights[blk("attn_norm", 1)])
        expected = entry(1).sums * ratio
        np.testing.assert_allclose(importance.entries[blk("ffn_up")].sums, expected, rtol=1e-5)


def test_blocks_that_predict_more_tokens() -> None:
    """llama.cpp does not run them: what is behind norms comes from the last layer, the rest is named."""
    tensors = ("attn_q", "attn_k", "attn_output", "ffn_up_exps")
    sources = [source(blk(norm, i), N) for i in range(2) for norm in ("attn_norm", "ffn_norm")]
    sources += [source(blk(t, i), *((3, 8, N) if "exps" in t else (8, N))) for i in range(2) for t in tensors]
    sources += [
        source(blk("nextn.eh_proj", 1), 8, 2 * N),
        source("output_norm.weight", N),
        source("output.weight", 9, N),
    ]
    importance = completed(sources, {blk(t, 0): entry(1, 3 if "exps" in t else 1) for t in tensors})
    assert importance.estimated == {
        blk("attn_q", 1): blk("ffn_up_exps", 0),
        blk("attn_k", 1): blk("ffn_up_exps", 0),
        blk("ffn_up_exps", 1): blk("ffn_up_exps", 0),
        "output.weight": blk("ffn_up_exps", 0),
    }


def test_the_tied_embedding_takes_the_outputs() -> None:
    sources = [source("token_embd.weight", 50, N)]
    assert completed(sources, {"output.weight": entry(1)}).borrowed == {"token_embd.weight": "output.weight"}
    assert not completed([*sources, source("output.weight", 50, N)], {"output.weight": entry(1)}).borrowed


def test_every_tensor_without_its_own_entry_is_named(caplog: pytest.LogCaptureFixture) -> None:
    sources = [source(blk("attn_norm", i), N) for i in range(4)]
    sources += [source(blk(t, i), 8, N) for i in range(4) for t in ("attn_q", "attn_k", "attn_output")]
    entries = {blk("attn_q", i): entry(i) for i in (0, 1)} | {blk("attn_output", 3): entry(5)}
    plan = make_plan(sources, QuantOptions("ccq_t2"))
    check_importance(plan, completed(sources, entries))
    assert caplog.messages == [
        "i.gguf: no entry for 2 of 12 tensors, which take that of a tensor with the same input: blk.0-1.attn_k.weight",
        "i.gguf: no entry for 4 of 12 tensors, for which it is estimated from the inputs of near layers: "
        "blk.2-3.attn_q.weight, blk.2-3.attn_k.weight",
        "i.gguf: no importance for 3 of 12 tensors, of which all weights count alike: blk.0-2.attn_output.weight",
    ]
    # Estimates alone do not make a file this model's.
    foreign = completed([*sources, source(blk("attn_norm", 7), N)], {blk("attn_q", 7): entry(1)})
    with pytest.raises(ImportanceError, match="none of its 1 entries names one of the 12 tensors"):
        check_importance(plan, foreign)


def test_another_shape_lends_nothing() -> None:
    sources = [source(blk("attn_q"), 8, N), source(blk("attn_k"), 8, N)]
    for bad in (entry(1, n=N // 2), entry(1, n=2 * N), entry(1, 2)):
        assert not completed(sources[1:], {blk("attn_q"): bad}).borrowed

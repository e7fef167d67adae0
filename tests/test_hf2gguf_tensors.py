"""The lazily read tensors of a plan: rows of any range, small memory, warnings."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ccq_converters.arch.config import Config
from ccq_converters.arch.rope import Rope
from ccq_converters.hf2gguf import convert
from ccq_converters.options import QuantOptions
from ccq_converters.plan import Plan
from ccq_format.gguf_io import open_model

from .upstream_diff.models import (
    DELTA_MOE,
    DELTA_NET,
    ERNIE_MOE,
    EXAMPLE,
    GLM_MOE,
    GPT_OSS,
    GROUPS,
    LATENT,
    LLAMA3_ROPE,
    MOE,
    MROPE,
    QWEN_MOE,
    Case,
    build,
)

DRY = QuantOptions("f32", dry_run=True)


def planned(case: Case, folder: Path) -> tuple[Plan, dict[str, np.ndarray]]:
    build(case, folder)
    plan = convert(folder, folder / "out.gguf", DRY)
    assert not (folder / "out.gguf").exists()
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= {name: t.float().numpy() for name, t in load_file(path).items()}
    return plan, stored


def values_of(plan: Plan, name: str, step: int) -> np.ndarray:
    """The tensor ``name``, loaded ``step`` rows at a time."""
    source = next(t.source for t in plan.tensors if t.source.name == name)
    parts = [source.load_rows(i, min(i + step, source.rows)) for i in range(0, source.rows, step)]
    assert all(part.dtype == np.float32 and part.shape[1] == source.row_len for part in parts)
    return np.concatenate(parts).reshape(source.shape)


@pytest.mark.parametrize("step", [1, 5, 24, 1000])
def test_rotary_order(step: int, tmp_path: Path) -> None:
    """Row 2i of a head comes from row i, row 2i + 1 from row i + d/2; the other projections keep theirs."""
    case = Case("m", "llama", {"num_hidden_layers": 1, "head_dim": 24, "attention_bias": True}, torch.bfloat16)
    plan, stored = planned(case, tmp_path)
    for kind, heads in (("q", 4), ("k", 2)):
        for suffix in ("weight", "bias"):
            hf = stored[f"model.layers.0.self_attn.{kind}_proj.{suffix}"]
            expected = np.empty_like(hf)
            for head in range(heads):
                for i in range(12):
                    expected[head * 24 + 2 * i] = hf[head * 24 + i]
                    expected[head * 24 + 2 * i + 1] = hf[head * 24 + 12 + i]
            np.testing.assert_array_equal(values_of(plan, f"blk.0.attn_{kind}.{suffix}", step), expected)
    np.testing.assert_array_equal(
        values_of(plan, "blk.0.attn_v.weight", step), stored["model.layers.0.self_attn.v_proj.weight"]
    )


@pytest.mark.parametrize("step", [1, 7, 96, 1000])
@pytest.mark.parametrize("fused", [False, True])
def test_stacked_experts(step: int, fused: bool, tmp_path: Path) -> None:
    plan, stored = planned(Case("m", "mixtral", {**MOE, "num_hidden_layers": 1}, fused=fused), tmp_path)
    mlp, moe = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"
    if fused:
        both = stored[f"{mlp}.gate_up_proj"]
        expected = {"gate": both[:, :96], "up": both[:, 96:], "down": stored[f"{mlp}.down_proj"]}
    else:
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        expected = {k: np.stack([stored[f"{moe}.{e}.{w}.weight"] for e in range(4)]) for k, w in names.items()}
    for kind, weights in expected.items():
        np.testing.assert_array_equal(values_of(plan, f"blk.0.ffn_{kind}_exps.weight", step), weights)


MIXTURES = {
    "mixtral": MOE,
    "qwen3_moe": QWEN_MOE,
    "qwen3_next": DELTA_MOE,
    "qwen3_5_moe": {**DELTA_MOE, "rope_parameters": MROPE},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": GLM_MOE,
    "ernie4_5_moe": ERNIE_MOE,
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, **GROUPS},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_both_expert_layouts_give_the_same_file(family: str, tmp_path: Path) -> None:
    files, layouts = [], []
    for fused in (False, True):
        folder = tmp_path / f"{fused}" / "model"
        build(Case("m", family, MIXTURES[family], fused=fused), folder)
        layouts.append(set(load_file(folder / "model.safetensors")))
        convert(folder, tmp_path / f"{fused}.gguf", QuantOptions("f32"), progress=False)
        files.append((tmp_path / f"{fused}.gguf").read_bytes())
    assert layouts[0] != layouts[1]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_values_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    """Subnormal numbers, zeros of both signs and extremes come out of an f32 file as they went in."""
    build(Case("m", "llama", {"num_hidden_layers": 1}, dtype), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    finfo = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, finfo.tiny, finfo.smallest_normal / 4, finfo.max, finfo.min], dtype=dtype)
    tensors["model.norm.weight"][:6] = special
    save_file(tensors, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    got = next(t for t in open_model(tmp_path / "out.gguf").tensors if t.name == "output_norm.weight").data()
    np.testing.assert_array_equal(got[:6].view(np.uint32), special.float().numpy().view(np.uint32))


def test_single_file_beside_an_old_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers, model.safetensors counts, not the shards of an earlier save."""
    build(Case("m", "llama", {"num_hidden_layers": 1}, shards=True), tmp_path / "model")
    build(Case("m", "llama", {"num_hidden_layers": 1, "tie_word_embeddings": True}), tmp_path / "new")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).write_bytes((tmp_path / "new" / name).read_bytes())
    convert(tmp_path / "model", tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    tensors = {t.name: t for t in open_model(tmp_path / "out.gguf").tensors}
    assert "output.weight" not in tensors
    np.testing.assert_array_equal(tensors["token_embd.weight"].data(), stored["model.embed_tokens.weight"].numpy())
    assert "model.safetensors.index.json: not read" in caplog.text


def test_shards_without_an_index_in_a_hub_cache(tmp_path: Path) -> None:
    """A snapshot of the hub's cache is links to files that are named by their hashes."""
    snapshot, blobs = tmp_path / "snapshots" / "0123abcd", tmp_path / "blobs"
    blobs.mkdir()
    build(Case("m", "llama", {"num_hidden_layers": 1}, shards=True), snapshot)
    convert(snapshot, tmp_path / "plain.gguf", QuantOptions("f32"), progress=False)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(Path("../../blobs") / f"{number:064x}")
    convert(snapshot, tmp_path / "linked.gguf", QuantOptions("f32"), progress=False)
    (snapshot / "model.safetensors.index.json").unlink()
    convert(snapshot, tmp_path / "unlisted.gguf", QuantOptions("f32"), progress=False)
    plain = (tmp_path / "plain.gguf").read_bytes()
    assert (tmp_path / "linked.gguf").read_bytes() == plain
    assert (tmp_path / "unlisted.gguf").read_bytes() == plain


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_other_prefixes(prefix: str, tmp_path: Path) -> None:
    """A base model has no head and no ``model.``; models of several modalities have more in front."""
    build(Case("m", "llama", {"num_hidden_layers": 1, "tie_word_embeddings": bool(prefix)}), tmp_path)
    convert(tmp_path, tmp_path / "plain.gguf", QuantOptions("f32"), progress=False)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {prefix + n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}
    save_file(renamed, tmp_path / "model.safetensors")
    if not prefix:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    convert(tmp_path, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    plain = {t.name: t.data() for t in open_model(tmp_path / "plain.gguf").tensors if t.name != "output.weight"}
    found = {t.name: t.data() for t in open_model(tmp_path / "out.gguf").tensors}
    assert found.keys() == plain.keys()
    assert all(np.array_equal(found[name], plain[name]) for name in plain)


def test_the_architecture_as_ernies_own_code_names_it(tmp_path: Path) -> None:
    build(Case("m", "ernie4_5", {"num_hidden_layers": 1, "head_dim": 32}), tmp_path)
    convert(tmp_path, tmp_path / "plain.gguf", QuantOptions("f32"), progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Ernie4_5_ForCausalLM"]}))
    convert(tmp_path, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize(("keys", "values"), [(2, 6), (4, 4)])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_order_of_value_heads(step: int, keys: int, values: int, tmp_path: Path) -> None:
    """llama.cpp repeats all key heads of a linear attention: value head ``v`` of key head ``k`` moves from place ``k *
    ratio + v`` to ``v * keys + k``, in rows, columns and single values alike."""
    config = {**DELTA_NET, "linear_num_key_heads": keys, "linear_num_value_heads": values, "rope_parameters": MROPE}
    plan, stored = planned(Case("m", "qwen3_5", config), tmp_path)
    stored = {name.replace("model.language_model.", "model."): tensor for name, tensor in stored.items()}
    prefix, size, ratio = "model.layers.0.linear_attn", 16, values // keys
    heads = [k * ratio + v for v in range(ratio) for k in range(keys)]
    rows = np.concatenate([np.arange(size) + head * size for head in heads])
    mixed = np.concatenate([np.arange(2 * keys * size), 2 * keys * size + rows])
    for ours, expected in (
        ("attn_qkv.weight", stored[f"{prefix}.in_proj_qkv.weight"][mixed]),
        ("attn_gate.weight", stored[f"{prefix}.in_proj_z.weight"][rows]),
        ("ssm_conv1d.weight", stored[f"{prefix}.conv1d.weight"][mixed, 0]),
        ("ssm_alpha.weight", stored[f"{prefix}.in_proj_a.weight"][heads]),
        ("ssm_beta.weight", stored[f"{prefix}.in_proj_b.weight"][heads]),
        ("ssm_out.weight", stored[f"{prefix}.out_proj.weight"][:, rows]),
        ("ssm_dt.bias", stored[f"{prefix}.dt_bias"][heads]),
        ("ssm_a", -np.exp(stored[f"{prefix}.A_log"][heads].astype(np.float64)).astype(np.float32)),
    ):
        np.testing.assert_array_equal(values_of(plan, f"blk.0.{ours}", step), expected, ours)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """The published layout gives the same weights as transformers' own of the decoded model, and can be kept."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path / "model"
    build(Case("m", "gpt_oss", {**GPT_OSS, "num_hidden_layers": 1}), folder)
    packed = load_file(folder / "model.safetensors")
    decoded = dict(packed)
    rng = torch.Generator().manual_seed(3)
    for name in [name for name in packed if name.endswith("_proj") and ".experts." in name]:
        count, columns, rows = packed.pop(name).shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=rng, dtype=torch.uint8)
        scales = torch.randint(120, 130, (count, rows, columns // 32), generator=rng, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(decoded, folder / "model.safetensors")
    convert(folder, tmp_path / "decoded.gguf", QuantOptions("f32"), progress=False)
    save_file(packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    convert(folder, tmp_path / "packed.gguf", QuantOptions("f32"), progress=False)
    kept = QuantOptions("q8_0", overrides=[("_exps", "mxfp4")])
    convert(folder, tmp_path / "kept.gguf", kept, progress=False)
    expected = {t.name: t for t in open_model(tmp_path / "decoded.gguf").tensors}
    for tensor in open_model(tmp_path / "packed.gguf").tensors:
        np.testing.assert_array_equal(tensor.data(), expected[tensor.name].data(), tensor.name)
    for tensor in open_model(tmp_path / "kept.gguf").tensors:
        if tensor.name.endswith("_exps.weight"):
            assert tensor.type_name == "mxfp4"
            np.testing.assert_array_equal(tensor.dequantize(), expected[tensor.name].data(), tensor.name)


def test_memory(tmp_path: Path) -> None:
    """Four times the embedding costs no more memory: rows are streamed."""
    peaks = []
    for vocab in (1 << 16, 1 << 18):
        folder = tmp_path / str(vocab)
        build(Case("m", "llama", {"num_hidden_layers": 1, "tie_word_embeddings": True}, torch.bfloat16), folder, vocab)
        plan = convert_without_tokens(folder)
        source = next(t.source for t in plan.tensors if t.source.name == "token_embd.weight")
        tracemalloc.start()
        for start in range(0, source.rows, 1 << 14):
            source.load_rows(start, start + (1 << 14))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    chunk = (1 << 14) * 64 * 4
    assert max(peaks) < 4 * chunk


def convert_without_tokens(folder: Path) -> Plan:
    """A dry run with the bundled tokenizer; the tokens it lacks are filled up."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((EXAMPLE / name).read_bytes())
    return convert(folder, folder / "out.gguf", DRY)


def test_llama3_factors() -> None:
    """The three ranges of Llama 3's scaling, against the definition in float64."""
    config = Config({}, Path("config.json"))
    raw = Config({"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}}, config.file)
    got = Rope.read(raw, 10000.0, 131072).frequency_factors(128)
    assert got is not None
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    smooth = (8192 / wavelength - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    expected = np.where(wavelength < 2048, 1.0, np.where(wavelength > 8192, 8.0, between))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert {1.0, 8.0} < set(got.tolist())


@pytest.mark.parametrize(
    ("beside", "within", "expected"), [(64, None, 64), (None, 64, 64), (64, 100, 64), (None, None, 512)]
)
def test_longrope_context(beside: int | None, within: int | None, expected: int) -> None:
    """As transformers' ``Phi3Config`` does it, the number beside the RoPE parameters counts before that within."""
    params = {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}
    raw = {"rope_parameters": {**params, "original_max_position_embeddings": within}}
    config = Config({**raw, "original_max_position_embeddings": beside}, Path("config.json"))
    writer = gguf.GGUFWriter(None, "phi3")
    Rope.read(config, 10000.0, 512).write(writer)
    assert writer.kv_data[0]["phi3.rope.scaling.original_context_length"].value == expected


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"sliding_window": 128}, True),
        ({"sliding_window": 512}, False),
        ({"sliding_window": None}, False),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, True),
    ],
)
def test_warnings(changes: dict[str, object], warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(Case("m", "mistral", {"num_hidden_layers": 1, "sliding_window": None}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    convert(tmp_path, tmp_path / "out.gguf", DRY)
    assert ("differ" in caplog.text) == warns

"""Model folders that cannot be converted: a ModelError that names file, tensor and reason; and no output file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ccq_converters.arch import family_of
from ccq_converters.hf2gguf import convert
from ccq_converters.options import QuantOptions
from ccq_format.errors import ModelError
from ccq_format.gguf_io import open_model

from .upstream_diff.models import (
    FAMILY_CASES,
    LLAMA3_ROPE,
    MOE,
    MULTIMODAL_CASES,
    QWEN_MOE,
    Case,
    auto_class,
    build,
    tiny_config,
)

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One intact model per kind that the tests damage copies of."""
    root = tmp_path_factory.mktemp("originals")
    cases = [
        Case("llama", "llama", {"num_hidden_layers": 1}),
        Case("tied", "llama", {"num_hidden_layers": 1, "tie_word_embeddings": True}),
        Case("sharded", "llama", {"num_hidden_layers": 1}, shards=True),
        Case("mixtral", "mixtral", {**MOE, "num_hidden_layers": 1}),
        Case("qwen2", "qwen2", {"num_hidden_layers": 1}),
        Case("qwen3", "qwen3", {"num_hidden_layers": 1, "head_dim": 16}),
        Case("qwen3_moe", "qwen3_moe", {**QWEN_MOE, "num_hidden_layers": 1}),
    ]
    for case in cases:
        build(case, root / case.name)
    return {case.name: root / case.name for case in cases}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        return Path(shutil.copytree(originals[kind], tmp_path / "model"))

    return make


def fails(folder: Path, *words: str) -> ModelError:
    """Converting raises a ModelError whose message has all ``words``, and leaves nothing behind."""
    out = folder.parent / "out.gguf"
    with pytest.raises(ModelError) as caught:
        convert(folder, out, QuantOptions("f32"), progress=False)
    for word in words:
        assert word in str(caught.value)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]
    return caught.value


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; ``...`` removes one."""
    value = json.loads(path.read_text())
    for key, new in changes.items():
        if new is ...:
            value.pop(key, None)
        else:
            value[key] = new
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (``None``) remove tensors; ``__`` in a keyword stands for a dot."""
    tensors = load_file(path)
    for key, new in changes.items():
        name = key.replace("__", ".")
        if new is None:
            del tensors[name]
        else:
            tensors[name] = new
    save_file(tensors, path)


# --- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "is not supported"]),
        ("llama", {"architectures": ...}, ["'architectures' must name one"]),
        ("llama", {"architectures": []}, ["'architectures' must name one"]),
        ("llama", {"hidden_size": ...}, ["has no 'hidden_size'"]),
        ("llama", {"hidden_size": "64"}, ["'hidden_size' must be a positive integer"]),
        ("llama", {"num_hidden_layers": -1}, ["'num_hidden_layers' must be a positive integer"]),
        ("llama", {"num_hidden_layers": 2}, ["model.layers.1.input_layernorm.weight", "is missing"]),
        ("llama", {"num_hidden_layers": 2_000_000_000}, ["is missing; the config has 2000000000 layers"]),
        ("llama", {"num_attention_heads": 3}, ["heads"]),
        ("llama", {"head_dim": 15}, ["is odd"]),
        ("llama", {"hidden_act": "gelu"}, ["'hidden_act' is 'gelu'"]),
        ("llama", {"rms_norm_eps": "small"}, ["'rms_norm_eps' must be a positive number"]),
        ("llama", {"attention_bias": True}, ["self_attn.q_proj.bias", "is missing"]),
        ("llama", {"quantization_config": {"quant_method": "bitnet"}}, ["'bitnet' is not supported"]),
        ("llama", {"vocab_size": 4097}, ["model.embed_tokens.weight", "[4096, 64]", "[4097, 64]"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            ["no longrope RoPE scaling in llama"],
        ),
        ("llama", {"vocab_size": 2_000_000_000}, ["model.embed_tokens.weight", "[4096, 64]"]),
        ("llama", {"head_dim": 2_000_000_000, "rope_parameters": LLAMA3_ROPE}, ["q_proj.weight", "[64, 64]"]),
        ("mixtral", {"num_local_experts": 2_000_000_000}, ["block_sparse_moe.gate.weight", "[4, 64]"]),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["has no 'factor'"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 1e300}},
            ["'factor' must be a positive"],
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 1e30}},
            ["must be a token count"],
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 16}}, ["'beta_fast' must be 32"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}}, ["truncate"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["per layer type"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["rotates whole heads"]),
        ("mixtral", {"num_experts_per_tok": 5}, ["5 experts per token"]),
        ("mixtral", {"num_local_experts": 5}, ["block_sparse_moe.gate.weight", "[4, 64]", "[5, 64]"]),
        ("mixtral", {"num_local_experts": ...}, ["has no 'num_local_experts'"]),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["no llama3 RoPE scaling in qwen2"]),
        ("qwen2", {"head_dim": 32}, ["hidden_size = heads * head_dim"]),
        ("qwen3", {"attention_bias": True}, ["no 'attention_bias' in qwen3"]),
        ("qwen3_moe", {"norm_topk_prob": False}, ["norm_topk_prob"]),
        ("qwen3_moe", {"mlp_only_layers": [0]}, ["experts in every layer"]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["experts in every layer"]),
    ],
)
def test_config(copy: Callable[[str], Path], kind: str, changes: dict[str, Any], words: list[str]) -> None:
    folder = copy(kind)
    edit_json(folder / "config.json", **changes)
    fails(folder, *words)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 0]}, ["'no_rope_layers' must say the same"]),
        ("smollm3", {"attention_bias": True}, ["no bias in smollm3"]),
        ("granite", {"rope_parameters": LLAMA3_ROPE}, ["no llama3 RoPE scaling in granite"]),
        ("gemma3", {"query_pre_attn_scalar": 64}, ["'query_pre_attn_scalar' is 64"]),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["does not cap the attention"]),
        ("gemma3", {"use_bidirectional_attention": True}, ["causal"]),
        ("phi3", {"head_dim": 32}, ["hidden_size = heads * head_dim"]),
        ("phi3-longrope", {"rope_parameters": YARN}, ["no yarn RoPE scaling in phi3"]),
        ("olmo2", {"tie_word_embeddings": True}, ["output matrix of its own"]),
        ("olmo2", {"architectures": ["Olmo2Model"]}, ["output matrix of its own"]),
        ("olmoe", {"architectures": ["OlmoeModel"]}, ["output matrix of its own"]),
        ("gpt-oss", {"architectures": ["GptOssModel"]}, ["output matrix of its own"]),
        ("olmoe", {"clip_qkv": 8.0}, ["does not clip"]),
        ("olmoe", {"norm_topk_prob": True}, ["does not normalize"]),
        ("olmoe", {"num_key_value_heads": 2}, ["as many key-value heads as heads"]),
        ("glm4", {"rope_parameters": YARN}, ["no yarn RoPE scaling in glm4"]),
        ("glm4-moe", {"hidden_act": "gelu"}, ["'hidden_act' is 'gelu'"]),
        ("cohere2", {"use_qk_norm": True}, ["no norms of query and key"]),
        ("cohere2", {"tie_word_embeddings": False}, ["the embedding as output matrix"]),
        ("cohere2", {"layer_types": ["full_attention"] * 5}, ["no layer has the sliding window"]),
        ("ernie4_5", {"use_bias": True}, ["no bias in ERNIE"]),
        ("ernie4_5-moe", {"moe_layer_interval": 2}, ["'moe_layer_interval' is 2"]),
        ("ernie4_5-moe", {"moe_layer_end_index": 0}, ["'moe_layer_end_index' is 0"]),
        ("gpt-oss", {"swiglu_limit": 8.0}, ["'swiglu_limit' is 8.0"]),
        ("gpt-oss", {"attention_bias": False}, ["needs the biases"]),
        ("deepseek-v2", {"topk_method": "group_limited_greedy"}, ["'topk_method' is 'group_limited_greedy'"]),
        ("deepseek-v2", {"num_hidden_layers": 26}, ["none of 'q_lora_rank' in a model of 26 layers"]),
        ("deepseek-v2-lite", {"num_hidden_layers": 25}, ["one of 'q_lora_rank' in a model of 25 layers"]),
        ("deepseek-v3", {"scoring_func": "softmax"}, ["'scoring_func' is 'softmax'"]),
        ("deepseek-v3", {"rope_interleave": False}, ["'rope_interleave' is False"]),
        ("deepseek-v3", {"moe_layer_freq": 2}, ["'moe_layer_freq' is 2"]),
        ("deepseek-v3", {"rope_parameters": YARN}, ["'mscale' is None", "one number for both"]),
        (
            "deepseek-v3",
            {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
            ["'mscale' is 1.0", "0.7"],
        ),
        (
            "deepseek-v3",
            {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.2}},
            ["no 'attention_factor'"],
        ),
        ("qwen3-next", {"norm_topk_prob": False}, ["always normalizes"]),
        ("qwen3-next", {"layer_types": ["linear_attention", "mamba"] * 2}, ["'layer_types'", "mamba"]),
        ("qwen3-next", {"linear_value_head_dim": 32}, ["'linear_key_head_dim' to be equal"]),
        ("qwen3-next", {"linear_num_value_heads": 3}, ["3 value heads cannot share 2 key heads"]),
        (
            "qwen3_5",
            {"rope_parameters": {"partial_rotary_factor": 0.25, "mrope_section": [4, 0, 0]}},
            ["does not rotate"],
        ),
        ("qwen3_5", {"rope_parameters": {"partial_rotary_factor": 0.25, "mrope_section": [1, 1, 1]}}, ["amount to 4"]),
        ("llama4", {"use_qk_norm": True}, ["'use_qk_norm' must be false"]),
        ("llama4", {"moe_layers": [0, 2]}, ["experts in every layer of 2"]),
        ("llama4", {"max_position_embeddings": 1 << 20, "attention_chunk_size": 4096}, ["chunks of 8192 tokens"]),
        ("qwen2_5-vl", {"text_config": {"model_type": "qwen9"}}, ["the text model 'qwen9'", "is not supported"]),
        ("mistral3-vision", {"text_config": 3}, ["'text_config' must be an object"]),
    ],
)
def test_config_of_the_other_families(case: str, changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """Whatever llama.cpp would ignore in a model is known before anything of its weights is read."""
    found = next(found for found in FAMILY_CASES + MULTIMODAL_CASES if found.name == case)
    config = tiny_config(found)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    family_of(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError) as caught:
        family_of(tmp_path)
    for word in (str(tmp_path / "config.json"), *words):
        assert word in str(caught.value)


def test_config_is_no_json(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "config.json").write_text("{")
    assert fails(folder, "is no JSON").file == str(folder / "config.json")
    (folder / "config.json").write_text("[]")
    fails(folder, "is no JSON object")
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    fails(folder, "is no JSON")
    (folder / "config.json").unlink()
    fails(folder, "no such file")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out.gguf", QuantOptions("f32"))


# --- tensors --------------------------------------------------------------------------------------------------------


def test_missing_tensor(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit_tensors(folder / SHARD, model__layers__0__mlp__up_proj__weight=None)
    error = fails(folder, "is missing")
    assert error.tensor == "model.layers.0.mlp.up_proj.weight"


def test_missing_output(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit_tensors(folder / SHARD, lm_head__weight=None)
    assert fails(folder, "is missing").tensor == "lm_head.weight"


def test_missing_expert(copy: Callable[[str], Path]) -> None:
    folder = copy("mixtral")
    edit_tensors(folder / SHARD, model__layers__0__block_sparse_moe__experts__3__w2__weight=None)
    assert fails(folder, "is missing").tensor == "model.layers.0.block_sparse_moe.experts.3.w2.weight"


def test_extra_tensor(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit_tensors(folder / SHARD, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))
    error = fails(folder, "is unexpected")
    assert error.tensor == "model.layers.0.self_attn.q_proj.bias"
    assert error.file == str(folder / SHARD)


def test_wrong_shape(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit_tensors(folder / SHARD, model__norm__weight=torch.ones(32))
    assert fails(folder, "[32]", "[64]").tensor == "model.norm.weight"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_wrong_dtype(copy: Callable[[str], Path], dtype: torch.dtype) -> None:
    folder = copy("llama")
    edit_tensors(folder / SHARD, model__norm__weight=torch.ones(64).to(dtype))
    assert fails(folder, "only F32, F16, BF16").tensor == "model.norm.weight"


def test_rotary_tables_are_ignored(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit_tensors(folder / SHARD, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    plan = convert(folder, folder.parent / "out.gguf", QuantOptions("f32"), progress=False)
    assert not any("inv_freq" in t.source.name for t in plan.tensors)


# --- safetensors files ----------------------------------------------------------------------------------------------


def test_no_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / SHARD).rename(folder / "pytorch_model.bin")
    fails(folder, "holds no model.safetensors", "pytorch_model.bin is no safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 20000, -1])
def test_truncated(copy: Callable[[str], Path], keep: int) -> None:
    folder = copy("llama")
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:keep])
    assert fails(folder, "is no intact safetensors file").file == str(folder / SHARD)


@pytest.mark.parametrize("start", [b"\xff" * 8, b"\x00" * 8, (10**9).to_bytes(8, "little")])
def test_absurd_header_size(copy: Callable[[str], Path], start: bytes) -> None:
    folder = copy("llama")
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(start + data[8:])
    fails(folder, "is no intact safetensors file")


def test_shorter_while_reading(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    plan = convert(folder, tmp_path / "out.gguf", QuantOptions("f32", dry_run=True))
    last = next(t.source for t in plan.tensors if t.source.name == "output_norm.weight")
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-64])  # the norm is the last tensor
    with pytest.raises(ModelError, match="ends inside the tensor"):
        last.load_rows(0, 1)
    (folder / SHARD).unlink()
    with pytest.raises(ModelError, match="No such file"):
        last.load_rows(0, 1)


def test_missing_shard(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert fails(folder, "the shard is missing").file == str(shard)


def test_index_without_map(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    edit_json(folder / INDEX, weight_map=...)
    fails(folder, INDEX, "has no 'weight_map'")


def test_index_lists_too_much(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={**weight_map, "extra": weight_map["model.norm.weight"]})
    assert fails(folder, "is listed in", "missing in the shard").tensor == "extra"


def test_index_lists_too_little(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = list(weight_map.values())
    name = next(name for name, shard in weight_map.items() if shards.count(shard) > 1)
    del weight_map[name]
    edit_json(folder / INDEX, weight_map=weight_map)
    assert fails(folder, "is not listed in").tensor == name


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../model/x.safetensors", "a/x", ".", "..", ""])
def test_index_leaves_the_folder(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("sharded")
    edit_json(folder / INDEX, weight_map={"model.norm.weight": name})
    fails(folder, f"names a file outside of the model folder: '{name}'")


def test_index_names_links(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """A snapshot in the cache of huggingface_hub: every file is a link to a blob outside of its folder."""
    folder = copy("sharded")
    out, snapshot = tmp_path / "expected", tmp_path / "hub" / "snapshots" / "1"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    convert(folder, out, QuantOptions("f32"), progress=False)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        blob = path.rename(tmp_path / "hub" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    convert(snapshot, tmp_path / "out", QuantOptions("f32"), progress=False)
    assert [(t.name, t.stored_rows(0, t.n_rows).tobytes()) for t in open_model(tmp_path / "out").tensors] == [
        (t.name, t.stored_rows(0, t.n_rows).tobytes()) for t in open_model(out).tensors
    ]


def test_tensor_twice(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / SHARD).rename(folder / "model-1.safetensors")
    shutil.copyfile(folder / "model-1.safetensors", folder / "model-2.safetensors")
    fails(folder, "is also in")


def test_unreadable_model_card(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    fails(folder, "model card")


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("generation_config.json", '{"temperature": "hot"}', "general.sampling.temp"),
        ("generation_config.json", '{"top_k": [1]}', "general.sampling.top_k"),
        ("generation_config.json", '{"top_k": 1e99}', "general.sampling.top_k"),
        ("README.md", "---\nlanguage: [en, 3]\n---\n", "general.languages"),
        ("README.md", "---\nlicense: 3\n---\n", "general.license"),
    ],
)
def test_metadata_of_a_wrong_type(copy: Callable[[str], Path], name: str, content: str, key: str) -> None:
    folder = copy("llama")
    (folder / name).write_text(content)
    fails(folder, key)


# --- tied embeddings ------------------------------------------------------------------------------------------------


def test_tied_output_stored_again(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("tied")
    embedding = load_file(folder / SHARD)["model.embed_tokens.weight"]
    edit_tensors(folder / SHARD, lm_head__weight=embedding.clone())
    convert(folder, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    assert "output.weight" not in {t.name for t in open_model(tmp_path / "out.gguf").tensors}


def test_tied_output_that_differs(
    copy: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("tied")
    other = load_file(folder / SHARD)["model.embed_tokens.weight"].clone()
    other[4095, 63] += 1
    edit_tensors(folder / SHARD, lm_head__weight=other)
    convert(folder, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    stored = {t.name: t for t in open_model(tmp_path / "out.gguf").tensors}
    np.testing.assert_array_equal(stored["output.weight"].data(), other.numpy())
    assert "lm_head.weight is kept" in caplog.text

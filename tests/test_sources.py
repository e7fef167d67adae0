"""Checkpoints that are quantized already: decoded as their own libraries do, rows of any range, and refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file

from ccq_converters.arch.config import Config
from ccq_converters.hf2gguf import convert
from ccq_converters.options import QuantOptions
from ccq_converters.safetensors_io import Checkpoint, DecodedTensor, Weights
from ccq_converters.sources import open_checkpoint
from ccq_format.errors import ModelError

from .test_hf2gguf_logits import TOLERANCE, in_llama_cpp, in_transformers
from .upstream_diff.models import QWEN_MOE, Case, build

Tensors = dict[str, torch.Tensor]


def opened(folder: Path, tensors: Tensors, **settings: Any) -> Checkpoint:
    """A folder with ``tensors`` and that ``quantization_config``."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder, Config({"quantization_config": settings}, folder / "config.json"))


def values(tensor: Weights, step: int = 1000) -> np.ndarray:
    """The whole tensor, ``step`` rows at a time."""
    rows = int(np.prod(tensor.shape[:-1]))
    parts = [tensor.rows(at, min(at + step, rows)) for at in range(0, rows, step)]
    assert all(part.dtype == np.float32 and part.shape[1] == tensor.shape[-1] for part in parts)
    return np.concatenate(parts).reshape(tensor.shape)


def check(checkpoint: Checkpoint, expected: dict[str, np.ndarray]) -> None:
    """The checkpoint has those tensors, bit for bit, however many rows are read at once."""
    assert {tensor.name for tensor in checkpoint} == set(expected)
    for name, wanted in expected.items():
        for step in (1, 3, 7, 1000):
            got = values(checkpoint[name], step)
            assert got.shape == wanted.shape
            np.testing.assert_array_equal(got.view(np.uint32), wanted.astype(np.float32).view(np.uint32), name)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(len(shape) + sum(shape))).to(dtype)


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=rng(high + sum(shape)))


# --- FP8 and int8 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_8_bit_float(dtype: torch.dtype, tmp_path: Path) -> None:
    """Without scales these are plain numbers; NaN and infinities are the encoder's to refuse."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(4, 64)
    save_file({"w": codes}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(values(Checkpoint(tmp_path)["w"]), codes.float().numpy())


def test_paddle_bf16(tmp_path: Path) -> None:
    w = normal(3, 8, dtype=torch.bfloat16)
    save_file({"w": w.view(torch.uint16)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(values(Checkpoint(tmp_path)["w"]), w.float().numpy())


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks(scale_type: torch.dtype, tmp_path: Path) -> None:
    """DeepSeek-V3's: blocks at the edges are cut, as those of its kv_a_proj_with_mqa (576 = 4.5 * 128)."""
    w = normal(37, 40).to(torch.float8_e4m3fn)
    scale = (normal(5, 3).abs() + 0.1).to(scale_type)
    wide = scale.float().repeat_interleave(8, 0)[:37].repeat_interleave(16, 1)[:, :40]
    checkpoint = opened(
        tmp_path,
        {"a.weight": w, "a.weight_scale_inv": scale, "b.weight": normal(4)},
        quant_method="fp8",
        weight_block_size=[8, 16],
    )
    check(checkpoint, {"a.weight": (w.float() * wide).numpy(), "b.weight": normal(4).numpy()})


def test_fp8_like_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    w, scale = normal(32, 48).to(torch.float8_e4m3fn), normal(4, 3).abs()
    theirs = Fp8Dequantize(None)._dequantize_one(w, scale, torch.float32)
    tensors = {"a.weight": w, "a.weight_scale_inv": scale, "a.activation_scale": torch.ones(())}
    checkpoint = opened(tmp_path, tensors, quant_method="fp8", weight_block_size=[8, 16])
    check(checkpoint, {"a.weight": theirs.numpy()})


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_one_scale(shape: tuple[int, ...], tmp_path: Path) -> None:
    w, scale = normal(6, 16).to(torch.float8_e4m3fn), torch.full(shape, 0.37)
    checkpoint = opened(tmp_path, {"a.weight": w, "a.weight_scale_inv": scale}, quant_method="fp8")
    check(checkpoint, {"a.weight": (w.float() * 0.37).numpy()})


def test_fp8_of_autofp8(tmp_path: Path) -> None:
    """A scale per matrix and no ``_inv`` in its name; those of activations are of no use."""
    w = normal(8, 16).to(torch.float8_e4m3fn)
    scales = {"a.weight_scale": torch.tensor(0.37), "a.input_scale": torch.tensor(2.0), "a.kv_scale": torch.tensor(3.0)}
    checkpoint = opened(tmp_path, {"a.weight": w, **scales}, quant_method="fp8", activation_scheme="static")
    check(checkpoint, {"a.weight": w.float().numpy() * np.float32(0.37)})


def test_fp8_stacked_experts(tmp_path: Path) -> None:
    w, scale = normal(3, 12, 16).to(torch.float8_e4m3fn), normal(3, 2, 2).abs()
    wide = scale.repeat_interleave(8, 1)[:, :12].repeat_interleave(8, 2)
    checkpoint = opened(tmp_path, {"e": w, "e_scale_inv": scale}, quant_method="fp8", weight_block_size=[8, 8])
    check(checkpoint, {"e": (w.float() * wide).numpy()})


def test_fbgemm(tmp_path: Path) -> None:
    w, scale = normal(6, 16).to(torch.float8_e4m3fn), normal(6, 1).abs()
    tensors = {"a.weight": w, "a.weight_scale": scale}
    check(opened(tmp_path, tensors, quant_method="fbgemm_fp8"), {"a.weight": (w.float() * scale).numpy()})


# --- 4-bit floats ---------------------------------------------------------------------------------------------------


def test_mxfp4_like_transformers_and_ggml(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = integers(0, 256, 2, 6, 3, 16).to(torch.uint8)
    scales = integers(100, 140, 2, 6, 3).to(torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    checkpoint = opened(tmp_path, {"g_blocks": blocks, "g_scales": scales}, quant_method="mxfp4")
    check(checkpoint, {"g.weight": theirs.numpy()})
    tensor = checkpoint["g.weight"]
    assert isinstance(tensor, DecodedTensor)
    assert tensor.raw is not None
    kept = quants.dequantize(tensor.raw(0, 12), GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(kept, theirs.reshape(12, 96).numpy())


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    codes = integers(0, 256, 5, 16).to(torch.uint8)
    scale, factor = normal(5, 2).abs().to(torch.float8_e4m3fn), torch.tensor(0.013)
    fp4 = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).reshape(5, 32)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.weight_scale_2": factor, "a.input_scale": factor.clone()}
    tensors |= {"b.weight": normal(4, 8).to(torch.float8_e4m3fn), "b.weight_scale": torch.tensor(0.5)}
    expected = fp4 * (scale.float() * factor).repeat_interleave(16, 1)
    check(
        opened(tmp_path, tensors, quant_method="modelopt", quant_algo="NVFP4"),
        {"a.weight": expected.numpy(), "b.weight": (tensors["b.weight"].float() * 0.5).numpy()},
    )


# --- integers in words ----------------------------------------------------------------------------------------------


def packed(codes: np.ndarray, bits: int, dense: bool) -> torch.Tensor:
    """Rows of codes as int32 words, bit by bit."""
    rows, count = codes.shape
    per_word = 32 // bits
    width = -(-count * bits // 32) if dense else -(-count // per_word)
    words = np.zeros((rows, width), np.uint64)
    for i in range(count):
        at = i * bits if dense else i // per_word * 32 + i % per_word * bits
        for bit in range(bits):
            word, shift = divmod(at + bit, 32)
            words[:, word] |= ((codes[:, i].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)) << np.uint64(shift)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def integer_groups(bits: int, group_size: int | None, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group_size}
    weights |= {"strategy": "group" if group_size else "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packed_integers(bits: int, dense: bool, symmetric: bool, tmp_path: Path) -> None:
    rows, columns, group = 9, 64, 16
    codes = integers(0, 1 << bits, rows, columns).numpy()
    zeros = integers(0, 1 << bits, rows, columns // group).numpy()
    scale = normal(rows, columns // group, dtype=torch.bfloat16)
    tensors = {
        "a.weight_packed": packed(codes, bits, dense),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([rows, columns]),
    }
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    else:
        tensors["a.weight_zero_point"] = packed(zeros.T, bits, dense).T
    wide = np.repeat(scale.float().numpy(), group, 1)
    expected = (codes - np.repeat(zeros, group, 1)).astype(np.float32) * wide
    check(opened(tmp_path, tensors, **integer_groups(bits, group, symmetric)), {"a.weight": expected})


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (3, 32), (8, 32), (5, 32), (7, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_like_the_library(bits: int, group: int | None, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="comes with pip install '.[test]'")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = integer_groups(bits, group, symmetric)
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    rows, columns = 24, 96
    groups = columns // group if group else 1
    low, high = -(1 << bits - 1), 1 << bits - 1
    state = {
        "weight": normal(rows, columns),
        "weight_scale": normal(rows, groups).abs() * 2 / high,
        "weight_zero_point": torch.zeros(rows, groups, dtype=torch.int8)
        if symmetric
        else integers(low, high, rows, groups).to(torch.int8),
    }
    stored = PackedQuantizationCompressor.compress(state, scheme)
    theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    checkpoint = opened(tmp_path, {f"a.{name}": tensor for name, tensor in stored.items()}, **settings)
    np.testing.assert_array_equal(values(checkpoint["a.weight"]), theirs.numpy())


def test_nvfp4_like_the_library(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="comes with pip install '.[test]'")
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {
        "weight": normal(8, 64),
        "weight_scale": normal(8, 4).abs() * 40 + 1,
        "weight_global_scale": torch.tensor([93.7]),
    }
    stored = NVFP4PackedCompressor.compress(state, scheme)
    theirs = NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    checkpoint = opened(
        tmp_path,
        {f"a.{name}": tensor for name, tensor in stored.items()},
        quant_method="compressed-tensors",
        format="nvfp4-pack-quantized",
        config_groups=groups,
    )
    # The library computes in bf16.
    np.testing.assert_allclose(values(checkpoint["a.weight"]), theirs.float().numpy(), rtol=2**-8)


@pytest.mark.parametrize("kind", ["channel", "tensor", "block", "int8"])
def test_compressed_8_bits(kind: str, tmp_path: Path) -> None:
    int8 = kind == "int8"
    w = integers(-128, 128, 12, 32).to(torch.int8) if int8 else normal(12, 32).to(torch.float8_e4m3fn)
    scale = {"tensor": normal(1), "block": normal(2, 4)}.get(kind, normal(12, 1)).to(torch.bfloat16)
    wide = scale.float().repeat_interleave(8, 0)[:12].repeat_interleave(8, 1) if kind == "block" else scale.float()
    weights: dict[str, Any] = {"num_bits": 8, "type": "int" if int8 else "float", "strategy": kind}
    if kind == "block":
        weights["block_structure"] = [8, 8]
    codes = w.float()
    tensors = {"a.weight": w, "a.weight_scale": scale, "a.input_scale": torch.ones(1), "a.k_scale": torch.ones(1)}
    if int8:
        tensors["a.weight_zero_point"] = integers(-5, 6, 12, 1).to(torch.int8)
        codes = codes - tensors["a.weight_zero_point"].float()
    checkpoint = opened(
        tmp_path,
        tensors,
        quant_method="compressed-tensors",
        format="int-quantized" if int8 else "float-quantized",
        config_groups={"group_0": {"weights": weights}},
    )
    check(checkpoint, {"a.weight": (codes * wide).numpy()})


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits: int, version: str, act_order: bool, tmp_path: Path) -> None:
    rows, columns, groups = 32, 64, 4
    codes = integers(0, 1 << bits, rows, columns).numpy()
    zeros = integers(1, 1 << bits, rows, groups).numpy()
    scale = normal(groups, rows, dtype=torch.float16)
    index = np.arange(columns) // 16
    if act_order:
        index = np.random.default_rng(0).permutation(index)
    tensors = {
        "a.qweight": packed(codes, bits, True).T,
        "a.qzeros": packed((zeros - (version == "gptq")).T, bits, True),
        "a.scales": scale,
    }
    if act_order:
        tensors["a.g_idx"] = torch.from_numpy(index.astype(np.int32))
    expected = (codes - zeros[:, index]).astype(np.float32) * scale.float().numpy().T[:, index]
    checkpoint = opened(tmp_path, tensors, quant_method="gptq", bits=bits, group_size=16, checkpoint_format=version)
    check(checkpoint, {"a.weight": expected})


def test_awq(tmp_path: Path) -> None:
    rows, columns, groups = 24, 64, 2
    codes, zeros = integers(0, 16, rows, columns).numpy(), integers(0, 16, rows, groups).numpy()
    scale = normal(groups, rows, dtype=torch.float16)

    def words(matrix: np.ndarray) -> torch.Tensor:
        """``[outputs, n]`` as AutoAWQ packs it: nibble i of a word is output 0, 2, 4, 6, 1, 3, 5, 7 of its eight."""
        eights = matrix.T.reshape(matrix.shape[1], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return packed(eights.reshape(matrix.shape[1], -1), 4, True)

    tensors = {"a.qweight": words(codes), "a.qzeros": words(zeros), "a.scales": scale}
    wide = np.repeat(scale.float().numpy().T, 32, 1)
    expected = (codes - np.repeat(zeros, 32, 1)).astype(np.float32) * wide
    checkpoint = opened(tmp_path, tensors, quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True)
    check(checkpoint, {"a.weight": expected})


def test_modelopt_without_a_word_in_the_config(tmp_path: Path) -> None:
    w = normal(8, 16).to(torch.float8_e4m3fn)
    tensors = {"a.weight": w, "a.weight_scale": torch.tensor(0.37), "a.input_scale": torch.tensor(2.0)}
    stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stated))
    check(opened(tmp_path, tensors), {"a.weight": w.float().numpy() * np.float32(0.37)})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_of_autogptq(value: float, tmp_path: Path) -> None:
    """It gave all matrices a bias, which is left out if it is 0 and the model has none."""
    build(Case("m", "llama", {"num_hidden_layers": 1}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    rows, columns = tensors.pop(f"{name}.weight").shape
    tensors |= {
        f"{name}.qweight": integers(-(2**31), 2**31, columns // 8, rows).int(),
        f"{name}.qzeros": integers(-(2**31), 2**31, columns // 32, rows // 8).int(),
        f"{name}.scales": normal(columns // 32, rows, dtype=torch.float16),
        f"{name}.bias": torch.full((rows,), value),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if value:
        with pytest.raises(ModelError, match=r"up_proj\.bias.* is unexpected"):
            convert(tmp_path, tmp_path / "out.gguf", QuantOptions("f32", dry_run=True))
    else:
        plan = convert(tmp_path, tmp_path / "out.gguf", QuantOptions("f32", dry_run=True))
        assert "gptq4" in {tensor.source.source_type for tensor in plan.tensors}
        assert not [tensor for tensor in plan.tensors if tensor.source.name.endswith(".bias")]


# --- what is refused ------------------------------------------------------------------------------------------------

FP8 = {"a.weight": torch.zeros(8, 16, dtype=torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 2)}
GPTQ = {
    "a.qweight": torch.zeros(8, 32, dtype=torch.int32),
    "a.qzeros": torch.zeros(4, 4, dtype=torch.int32),
    "a.scales": torch.ones(4, 32),
}


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        ({"quant_method": "hqq"}, FP8, ["'hqq' is not supported"]),
        ({}, FP8, ["None is not supported"]),
        ({"quant_method": "fp8", "weight_block_size": [8]}, FP8, ["must be two sizes"]),
        ({"quant_method": "fp8", "weight_block_size": [4, 8]}, FP8, ["a.weight_scale_inv", "[1, 2]", "[8, 16]"]),
        (
            {"quant_method": "fp8", "weight_block_size": [8, 8]},
            {"a.weight_scale_inv": torch.ones(1, 2)},
            ["'a.weight' is missing"],
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [8, 8]},
            {**FP8, "b.weight": FP8["a.weight"].clone()},
            ["b.weight", "F8_E4M3", "has no scale"],
        ),
        ({"quant_method": "gptq", "bits": 3}, GPTQ, ["'bits' is 3"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, GPTQ, ["'marlin'"]),
        ({"quant_method": "gptq", "bits": 4}, {**GPTQ, "a.g_idx": torch.full((64,), 4).int()}, ["g_idx", "none of 4"]),
        ({"quant_method": "gptq", "bits": 4}, {**GPTQ, "a.qzeros": torch.zeros(4, 5).int()}, ["qzeros", "[4, 5]"]),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, GPTQ, ["'gemv'"]),
        ({**integer_groups(4, 16), "format": "marlin-24"}, FP8, ["'format' is 'marlin-24'"]),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "mxfp6-pack-quantized"}}},
            FP8,
            ["'format' is 'mxfp6-pack-quantized'"],
        ),
        ({**integer_groups(4, 16), "sparsity_config": {"format": "sparse-24-bitmask"}}, FP8, ["'sparse-24-bitmask'"]),
        ({**integer_groups(4, 16), "transform_config": {"config_groups": {"R4": {}}}}, FP8, ["rotated"]),
        (integer_groups(9, 16), {"a.weight_packed": torch.zeros(2, 4).int()}, ["'num_bits' is 9"]),
        (
            integer_groups(4, 16),
            {"a.weight_packed": torch.zeros(2, 4).int(), "a.weight_shape": torch.tensor([2, 48])},
            ["a.weight_packed", "[2, 4]", "2 x 48"],
        ),
    ],
)
def test_refused(settings: dict[str, Any], tensors: Tensors, words: list[str], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    raw = {"quantization_config": settings or {"bits": 4}}
    with pytest.raises(ModelError) as caught:
        open_checkpoint(tmp_path, Config(raw, tmp_path / "config.json"))
    for word in words:
        assert word in str(caught.value)


# --- the whole way --------------------------------------------------------------------------------------------------


def fp8_model(folder: Path, case: Case) -> Path:
    """``case`` with its projections in FP8, blocks of 32 x 32, as DeepSeek-V3's are; beside it, and returned, the
    folder of the model that they stand for, decoded by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    build(case, folder)
    plain = Path(shutil.copytree(folder, folder.with_name("decoded")))
    tensors = load_file(folder / "model.safetensors")
    decoded = dict(tensors)
    for name, w in list(tensors.items()):
        if name.endswith("_proj.weight"):
            scale = w.unfold(0, 32, 32).unfold(1, 32, 32).abs().amax((2, 3)) / 448
            wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            tensors[name] = (w / wide).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            decoded[name] = Fp8Dequantize(None)._dequantize_one(tensors[name], scale, torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(decoded, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fp8_model_against_transformers(family: str, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 1} if family == "llama" else {**QWEN_MOE, "num_hidden_layers": 1, "head_dim": 16}
    folder = tmp_path / "model"
    plain = fp8_model(folder, Case("m", family, config))
    convert(folder, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    tokens = np.random.default_rng(7).integers(3, 380, 48).tolist()
    ours, theirs = in_llama_cpp(tmp_path / "out.gguf", tokens), in_transformers(plain, tokens)
    assert theirs.std(axis=0).max() > 0.5
    assert np.abs(ours - theirs).max() <= TOLERANCE


def test_plan_names_the_format(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fp8_model(folder, Case("m", "llama", {"num_hidden_layers": 1}))
    plan = convert(folder, tmp_path / "out.gguf", QuantOptions("ccq_t2", dry_run=True))
    types = {t.source.name: t.source.source_type for t in plan.tensors}
    assert types["blk.0.ffn_up.weight"] == "fp8"
    assert types["output.weight"] == "f32"


def test_nan_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fp8_model(folder, Case("m", "llama", {"num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[5, 7] = 0x7F
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Exception, match=r"blk\.0\.ffn_up\.weight.*NaN"):
        convert(folder, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    assert not (tmp_path / "out.gguf").exists()

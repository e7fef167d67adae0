"""Intact inputs of a few kB each, made from a fixed seed: model folders, GGUF files, importance, Hessians, journals.

A seed maps names below the folders ``in/`` and ``out/`` to bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
from gguf import GGMLQuantizationType, quants
from sentencepiece import sentencepiece_model_pb2

import ccq_backend
from ccq_converters import cli
from ccq_converters.arch import FAMILIES, Config, Family
from ccq_converters.hessian import HessianWriter
from ccq_converters.imatrix import Entry, Importance, fill
from ccq_converters.pretokenizer import _NAMES
from ccq_format import layouts
from ccq_format.gguf_io import ModelWriter, SplitWriter

from .mutate import Files

VOCAB = 24
MTIME = 1_000_000_000
"""When inputs were changed last, in seconds: a journal names it."""


def _rng() -> np.random.Generator:
    return np.random.default_rng(5)


# --- model folders --------------------------------------------------------------------------------------------------

_BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 32}
_LONG = {"rope_type": "longrope", "long_factor": [1.5] * 16, "short_factor": [1.0] * 16}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
_LATENT |= {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT |= {"n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {"rope_scaling": _LLAMA3, "attention_bias": True},
    "Mistral": {"head_dim": 32},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32, "rope_scaling": _YARN},
    "Qwen3Moe": {**_MOE, "num_experts": 2, "head_dim": 32},
    "SmolLM3": {"num_hidden_layers": 4},
    "Granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "Gemma3": {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 32, "query_pre_attn_scalar": 32}
    | {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    "Phi3": {"rope_scaling": _LONG, "original_max_position_embeddings": 32},
    "Olmo2": {},
    "Glm4Moe": {**_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "head_dim": 32}
    | {"use_qk_norm": True},
    "Cohere2": {"num_hidden_layers": 4, "sliding_window": 32, "logit_scale": 0.5, "layer_norm_eps": 1e-5}
    | {"tie_word_embeddings": True, "sliding_window_pattern": 4},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0}
    | {"moe_num_shared_experts": 1},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 32, "sliding_window": 32}
    | {"rope_scaling": {**_YARN, "truncate": True}, "num_hidden_layers": 2},
    "DeepseekV3": {**_LATENT, "routed_scaling_factor": 2.5},
}
"""Families -> what their config says beside ``_BASE``."""

_EXPERTS_OF_GPT_OSS = ("gate_up_proj", "down_proj")


def _safetensors(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A file of tensors given as type, shape and bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _bf16(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[str, tuple[int, ...], bytes]:
    values = rng.normal(0, 0.1, shape).astype("<f4")
    return "BF16", shape, (values.view("<u4") >> 16).astype("<u2").tobytes()


def _weights(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors that the family of ``config`` asks for, in bf16."""
    family = Family(FAMILIES[config["architectures"][0]], Config(config, Path("config.json")))
    rng = _rng()
    parts = {part.name: part.shape for wanted in family.wanted(frozenset()) for part in wanted.parts}
    return {name: _bf16(shape, rng) for name, shape in parts.items()}


_LETTERS = "abcdefghijklmno"


def _tokenizer() -> Files:
    """A byte-level BPE tokenizer cut like Qwen 2's, with a chat template, and what may lie beside it."""
    steps = next(steps for steps, names in _NAMES.items() if "qwen2" in names.values())
    regex = steps[0].removeprefix("split ")
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(_LETTERS)}
    vocab |= {"ab": 17, "cd": 18, "abcd": 19}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **special} for i, text in enumerate(("<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [["a", "b"], ["c", "d"], ["ab", "cd"]],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "add_bos_token": True,
        "added_tokens_decoder": {"20": {"content": "<tool>", "special": False}},
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    card = "---\nlicense: mit\nlanguage: [en]\ntags:\n- tiny\nbase_model: a/b\n---\n# A model\n"
    return {
        "in/tokenizer.json": json.dumps(tokenizer).encode(),
        "in/tokenizer_config.json": json.dumps(settings).encode(),
        "in/special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).encode(),
        "in/generation_config.json": json.dumps({"eos_token_id": [1, 0], "temperature": 0.7, "top_k": 20}).encode(),
        "in/README.md": card.encode(),
    }


def _sentencepiece() -> Files:
    """A SentencePiece model, its settings, and added tokens."""
    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = 2
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    for i, piece in enumerate(["<unk>", "<s>", "</s>", "<0x41>", *_LETTERS, "\u2581a"]):
        kind = {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x41>": 6}.get(piece, 1)
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_prefix_space": None,
        "legacy": False,
    }
    return {
        "in/tokenizer.model": proto.SerializeToString(),
        "in/tokenizer_config.json": json.dumps(settings).encode(),
        "in/added_tokens.json": json.dumps({"<extra>": 21}).encode(),
    }


def _metaspace() -> Files:
    """A tokenizer.json with byte fallback, as Llama 2's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3} | {c: i + 4 for i, c in enumerate(_LETTERS)}
    vocab |= {"ab": 19, "\u2581": 20}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    tokenizer = {
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab, "merges": ["a b"]},
    }
    return {
        "in/tokenizer.json": json.dumps(tokenizer).encode(),
        "in/tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}).encode(),
    }


def _folder(config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...], bytes]], tokenizer: Files) -> Files:
    files = {"in/config.json": json.dumps(config).encode(), "in/model.safetensors": _safetensors(tensors)}
    return files | tokenizer


def _family(name: str, tokenizer: Callable[[], Files] = _tokenizer) -> Files:
    suffix = "ForCausalLM"
    config = {**_BASE, "architectures": [name + suffix], **_CONFIGS.get(name, {})}
    return _folder(config, _weights(config), tokenizer())


def _sharded() -> Files:
    """Two files and their index."""
    tensors = _weights(_BASE)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    files = {f"in/{file}": _safetensors({n: tensors[n] for n in part}) for file, part in shards.items()}
    return (
        {"in/config.json": json.dumps(_BASE).encode()}
        | files
        | _tokenizer()
        | {"in/model.safetensors.index.json": json.dumps(index).encode()}
    )


def _quantized(settings: dict[str, Any], parts: Callable[..., dict[str, tuple[str, tuple[int, ...], bytes]]]) -> Files:
    """A llama whose matrices are stored as ``parts(name without .weight, rows, columns, rng)`` says."""
    config = {**_BASE, "quantization_config": settings}
    rng, tensors = _rng(), {}
    for name, tensor in _weights(_BASE).items():
        plain = "proj" not in name
        tensors.update({name: tensor} if plain else parts(name.removesuffix(".weight"), *tensor[1], rng))
    return _folder(config, tensors, _tokenizer())


def _raw(kind: str, shape: tuple[int, ...], size: int, rng: np.random.Generator) -> tuple[str, tuple[int, ...], bytes]:
    """Random codes of ``size`` bytes each, below 128, so that no float is NaN."""
    return kind, shape, rng.integers(0, 120, int(np.prod(shape)) * size, dtype=np.uint8).tobytes()


def _half(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[str, tuple[int, ...], bytes]:
    return "F16", shape, rng.uniform(0.01, 0.1, shape).astype("<f2").tobytes()


def _fp8(name: str, rows: int, columns: int, rng: np.random.Generator) -> Any:
    scale = rng.uniform(0.1, 1, (rows // 32, columns // 32)).astype("<f4")
    return {
        f"{name}.weight": _raw("F8_E4M3", (rows, columns), 1, rng),
        f"{name}.weight_scale_inv": ("F32", scale.shape, scale.tobytes()),
    }


def _gptq(name: str, rows: int, columns: int, rng: np.random.Generator) -> Any:
    return {
        f"{name}.qweight": _raw("I32", (columns // 8, rows), 4, rng),
        f"{name}.qzeros": _raw("I32", (2, rows // 8), 4, rng),
        f"{name}.scales": _half((2, rows), rng),
        f"{name}.g_idx": ("I32", (columns,), (np.arange(columns, dtype="<i4") // (columns // 2)).tobytes()),
    }


def _awq(name: str, rows: int, columns: int, rng: np.random.Generator) -> Any:
    return {
        f"{name}.qweight": _raw("I32", (columns, rows // 8), 4, rng),
        f"{name}.qzeros": _raw("I32", (2, rows // 8), 4, rng),
        f"{name}.scales": _half((2, rows), rng),
    }


def _packed(name: str, rows: int, columns: int, rng: np.random.Generator) -> Any:
    return {
        f"{name}.weight_packed": _raw("I32", (rows, columns // 8), 4, rng),
        f"{name}.weight_shape": ("I64", (2,), np.array([rows, columns], "<i8").tobytes()),
        f"{name}.weight_scale": _half((rows, 2), rng),
        f"{name}.weight_zero_point": _raw("I32", (rows // 8, 2), 4, rng),
    }


def _nvfp4(name: str, rows: int, columns: int, rng: np.random.Generator) -> Any:
    return {
        f"{name}.weight": _raw("U8", (rows, columns // 2), 1, rng),
        f"{name}.weight_scale": _raw("F8_E4M3", (rows, columns // 16), 1, rng),
        f"{name}.weight_scale_2": ("F32", (), struct.pack("<f", 0.01)),
    }


def _mxfp4() -> Files:
    """gpt-oss as it is published."""
    config = {**_BASE, "architectures": ["GptOssForCausalLM"], **_CONFIGS["GptOss"]}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    rng, tensors = _rng(), {}
    for name, tensor in _weights(config).items():
        if not name.endswith(_EXPERTS_OF_GPT_OSS):
            tensors[name] = tensor
            continue
        count, columns, rows = tensor[1]
        tensors[f"{name}_blocks"] = _raw("U8", (count, rows, columns // 32, 16), 1, rng)
        tensors[f"{name}_scales"] = _raw("U8", (count, rows, columns // 32), 1, rng)
    return _folder(config, tensors, _tokenizer())


_PACKED = {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}


# --- GGUF files -----------------------------------------------------------------------------------------------------

_TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "token_embd.weight": ("f16", (VOCAB, 64)),
    "blk.0.attn_norm.weight": ("f32", (64,)),
    "blk.0.attn_q.weight": ("f32", (8, 64)),
    "blk.0.attn_k.weight": ("bf16", (4, 128)),
    "blk.0.attn_v.weight": ("q8_0", (4, 64)),
    "blk.0.ffn_up_exps.weight": ("f16", (2, 4, 64)),
    "blk.0.ffn_down.weight": ("f32", (4, 64)),
    "output.weight": ("f32", (VOCAB, 64)),
}
_OTHERS = {
    "blk.1.ffn_gate.weight": ("mxfp4", (2, 64)),
    "blk.1.ffn_up.weight": ("ccq_t2", (2, 128)),
    "blk.1.ffn_down.weight": ("ccq_p2", (1, 512)),
    "blk.1.attn_k.weight": ("q4_k", (1, 256)),
    "blk.1.attn_v.weight": ("ccq_t1_5", (2, 64)),
    "blk.1.ids": ("i32", (8,)),
}


def _stored(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random weights in the form that ``ModelWriter.write`` takes."""
    values = rng.normal(0, 0.1, shape).astype(np.float32)
    if kind in ("f32", "f16"):
        return values.astype("<f4" if kind == "f32" else "<f2")
    if kind == "i32":
        return np.arange(values.size, dtype=np.int32)
    if kind.startswith("ccq_"):
        return ccq_backend.encode(layouts.by_name(kind), values, threads=1)
    if kind == "q4_k":  # gguf has no encoder for it
        return rng.integers(0, 60, (*shape[:-1], shape[-1] // 256 * 144), dtype=np.uint8)
    return quants.quantize(values, GGMLQuantizationType[kind.upper()])


def _metadata(writer: Any) -> None:
    kv = writer.gguf
    kv.add_uint32("llama.block_count", 2)
    kv.add_float32("llama.rope.freq_base", 1e4)
    kv.add_bool("flag", True)
    kv.add_array("tokenizer.ggml.tokens", ["a", "b"])
    kv.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    kv.add_string("general.name", "tiny")


def _write(writer: ModelWriter | SplitWriter, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    rng = _rng()
    with writer:
        _metadata(writer)
        for name, (kind, shape) in tensors.items():
            writer.add_tensor(name, kind, shape)
        writer.begin()
        for name, (kind, shape) in tensors.items():
            writer.write(name, _stored(kind, shape, rng))


def _collected(folder: Path, below: str = "in") -> Files:
    return {f"{below}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


def _gguf(tensors: dict[str, tuple[str, tuple[int, ...]]], split: int | None = None) -> Files:
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        _write(ModelWriter(path, "llama") if split is None else SplitWriter(path, "llama", split), tensors)
        return _collected(Path(folder))


def _importance(rng: np.random.Generator) -> Importance:
    entries = {}
    for name, (_, shape) in _TENSORS.items():
        if len(shape) > 1 and name != "token_embd.weight":
            matrices = shape[0] if len(shape) == 3 else 1
            sums = rng.uniform(1, 9, matrices * shape[-1]).astype(np.float32)
            gradients = rng.uniform(0, 1, matrices * shape[-2]).astype(np.float32) if "attn_q" in name else None
            entries[name] = Entry(sums, np.full(matrices, 64.0), gradients)
    losses = {"token_embd.weight": 0.1, "output.weight": 0.2, "blk.0.ffn_down.weight": 0.3}
    return Importance("imatrix", entries, ["text"], 4, 16, losses)


def _with_imatrix() -> Files:
    with TemporaryDirectory() as folder:
        with ModelWriter(Path(folder, "imatrix.gguf"), "") as writer:
            fill(writer, _importance(_rng()))
        return _gguf(_TENSORS) | _collected(Path(folder))


def _with_old_imatrix() -> Files:
    from .formats import encode_imatrix

    entries = [[name, 2, (e.sums / 32).tolist()] for name, e in _importance(_rng()).entries.items()]
    return _gguf(_TENSORS) | {"in/imatrix.dat": encode_imatrix([entries, 4, "text"], False)}


def _with_hessian() -> Files:
    names = [n for n, (_, shape) in _TENSORS.items() if "attn_q" in n or "exps" in n]
    shapes = {n: (64, 64) if len(_TENSORS[n][1]) == 2 else (2, 64, 64) for n in names}
    with TemporaryDirectory() as folder:
        with HessianWriter(Path(folder, "hessian.safetensors"), shapes, {"blk.0.ffn_down.weight": names[0]}) as writer:
            writer.begin()
            x = _rng().normal(0, 1, (80, 64)).astype(np.float32)
            for name, shape in shapes.items():
                for matrix in range(shape[0] if len(shape) == 3 else 1):
                    writer.write(name, x.T @ x, 80.0, matrix)
        return _gguf(_TENSORS) | _collected(Path(folder))


def write_files(files: Files, folder: Path) -> None:
    """Put a seed or a mutation of one below ``folder``, always with the same times."""
    for below in ("in", "out"):
        (folder / below).mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        os.utime(folder / name, (MTIME, MTIME))


RESUMED = ("quantize", "in/model.gguf", "-o", "out/out.gguf", "--type", "t2", "--resume", "--no-calibration")
RESUMED += ("--threads", "1")


def _interrupted() -> Files:
    """A model, and what an interrupted conversion of it leaves."""
    files, calls = _gguf(_TENSORS), 0
    encode = ccq_backend.encode

    def interrupted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return encode(*args, **more)

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_files(files, folder)
        args = [str(folder / arg) if arg.startswith(("in/", "out/")) else arg for arg in RESUMED]
        with mock.patch.object(ccq_backend, "encode", interrupted), mock.patch("click.echo"):
            cli.main.main(args, standalone_mode=False)
        return files | _collected(folder / "out", "out")


SEEDS: dict[str, Callable[[], Files]] = {
    **{f"hf-{name}": lambda name=name: _family(name) for name in _CONFIGS},  # type: ignore[misc]
    "hf-sentencepiece": lambda: _family("Mistral", _sentencepiece),
    "hf-metaspace": lambda: _family("Mistral", _metaspace),
    "hf-sharded": _sharded,
    "hf-fp8": lambda: _quantized({"quant_method": "fp8", "weight_block_size": [32, 32]}, _fp8),
    "hf-gptq": lambda: _quantized({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}, _gptq),
    "hf-awq": lambda: _quantized({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, _awq),
    "hf-packed": lambda: _quantized({"quant_method": "compressed-tensors", "config_groups": _PACKED}, _packed),
    "hf-nvfp4": lambda: _quantized({"quant_method": "modelopt", "quant_algo": "NVFP4"}, _nvfp4),
    "hf-mxfp4": _mxfp4,
    "gguf-plain": lambda: _gguf(_TENSORS),
    "gguf-types": lambda: _gguf(_TENSORS | _OTHERS),
    "gguf-split": lambda: _gguf(_TENSORS, 6000),
    "imatrix": _with_imatrix,
    "imatrix-old": _with_old_imatrix,
    "hessian": _with_hessian,
    "journal": _interrupted,
}


@cache
def seed(name: str) -> Files:
    """The intact input of that name."""
    return SEEDS[name]()

"""Whole models in a stock llama.cpp: a file with CCQ tensors against the same file decoded to float32.

What the plugin adds is the rounding of activations to integers, as llama.cpp's own quantized types do.  The KL
divergence to the decoded file must be no larger than that of a Q2_K file (8-bit activations with one scale per 256) to
its own decoded weights, on the same model and text.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from ccq_format import codec, layouts
from support.blocks import IN_GGML

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="runs in llama-cpp-python")
import ccq_backend  # noqa: E402
from ccq_converters.dequantize import dequantize  # noqa: E402

TOKENS = 96
EMB, FF, LAYERS, HEADS, KV_HEADS, VOCAB, EXPERTS = 512, 512, 2, 8, 4, 512, 4

Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]


def shapes(experts: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of llama's architecture; every row is a multiple of every type's block."""
    out: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, EMB), "output_norm": (EMB,), "output": (VOCAB, EMB)}
    for i in range(LAYERS):
        block = {
            "attn_norm": (EMB,),
            "ffn_norm": (EMB,),
            "attn_q": (EMB, EMB),
            "attn_k": (EMB // HEADS * KV_HEADS, EMB),
            "attn_v": (EMB // HEADS * KV_HEADS, EMB),
            "attn_output": (EMB, EMB),
        }
        suffix, lead = ("_exps", (experts,)) if experts else ("", ())
        if experts:
            block["ffn_gate_inp"] = (experts, EMB)
        block |= {f"ffn_{m}{suffix}": (*lead, FF, EMB) for m in ("gate", "up")}
        block[f"ffn_down{suffix}"] = (*lead, EMB, FF)
        out |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    return out


def random_tensors(type: str, experts: int) -> tuple[Tensors, Tensors]:
    """Random blocks of a CCQ type in every matrix but the router, and the same weights decoded."""
    layout, rng = layouts.by_name(type), np.random.default_rng(5)
    kind, f32 = gguf.GGMLQuantizationType(layout.gguf_id), gguf.GGMLQuantizationType.F32
    quantized: Tensors = {}
    decoded: Tensors = {}
    for name, shape in shapes(experts).items():
        if len(shape) == 1 or name.endswith("ffn_gate_inp"):
            data = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * (3 / EMB**0.5)
            quantized[name] = decoded[name] = (data.astype(np.float32), f32)
            continue
        # Activations of ordinary size, logits with a spread of about 3.
        scale = 1.0 if name == "token_embd" else (3.0 if name == "output" else 1.0) / EMB**0.5
        blocks = random_blocks(layout, shape, scale, rng)
        quantized[name] = (blocks, kind)
        decoded[name] = (codec.decode(layout, blocks), f32)
    return quantized, decoded


def random_blocks(layout: layouts.Layout, shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 blocks whose codes are random bytes, with scales that give weights of about that standard deviation."""
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // layout.block_weights, layout.block_bytes), dtype=np.uint8)
    if layout.name == "ccq_p2":
        at = layout.offset("code_scale")
        blocks[..., at : at + 8] = np.array([117.5, 1000.25], "<f4").view(np.uint8)
    if layout.name == "ccq_p2_5":  # local scales of 13 bits: within a factor of two, not mostly groups near zero
        blocks[..., layout.offset("codes") + 19 :: 20] |= 0x10

    def set_exponent(e: int) -> None:
        if isinstance(layout.code, layouts.TrellisCode):
            blocks[..., 0] = (blocks[..., 0] & 7) | (e + layout.code.scale_exponent_bias) << 3
        else:
            blocks[..., :2] = np.array([((e + 127) & 1) << 7, (e + 127) >> 1], np.uint8)  # bf16 2^e

    set_exponent(-10)
    sample = codec.decode(layout, blocks.reshape(-1, layout.block_bytes)[:256])
    set_exponent(-10 + round(np.log2(scale / float(sample.std()))))
    return blocks.reshape(*shape[:-1], -1)


def write_model(path: Path, tensors: Tensors, experts: int) -> Path:
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(1024)
    w.add_embedding_length(EMB)
    w.add_feed_forward_length(FF)
    w.add_block_count(LAYERS)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(EMB // HEADS)
    w.add_vocab_size(VOCAB)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(2)
    w.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [f"t{i}" for i in range(VOCAB - len(pieces))]
    w.add_token_list(pieces)
    w.add_token_scores([0.0] * 3 + [-float(i) for i in range(VOCAB - 3)])
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259))
    if any(kind.name.startswith("CCQ_") for _, kind in tensors.values()):
        w.add_string("ccq.spec_version", "0.1")
    for name, (data, kind) in tensors.items():
        w.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def quantize_q2_k(source: Path, out: Path) -> None:
    """llama.cpp's own Q2_K in every matrix that ours has a CCQ type in, embedding and output too."""
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.pure, params.ftype = 1, True, llama.LLAMA_FTYPE_MOSTLY_Q2_K
    params.output_tensor_type = params.token_embedding_type = llama.GGML_TYPE_Q2_K
    assert llama.llama_model_quantize(bytes(source), bytes(out), params) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Path]]:
    """Files of a model whose matrices are all of one type: ``ccq``, ``q2_k``, and each one's decoded weights."""
    folder = tmp_path_factory.mktemp("models")
    known: dict[tuple[str, str], dict[str, Path]] = {}

    def make(model: str, type: str) -> dict[str, Path]:
        if (model, type) not in known:
            experts = EXPERTS if model == "moe" else 0
            ccq, ccq_f32 = random_tensors(type, experts)
            files = {role: folder / f"{model}-{type}-{role}.gguf" for role in ("ccq", "ccq_f32", "q2_k", "q2_k_f32")}
            write_model(files["ccq"], ccq, experts)
            write_model(files["ccq_f32"], ccq_f32, experts)
            quantize_q2_k(files["ccq_f32"], files["q2_k"])
            dequantize(files["q2_k"], files["q2_k_f32"], "f32")
            known[model, type] = files
        return known[model, type]

    return make


def log_probabilities(path: Path, tokens: list[int], batch: int, threads: int) -> np.ndarray:
    """float64 [len(tokens), vocabulary]: flash attention on, KV cache f16, ``batch`` tokens at a time."""
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, batch, batch
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama.llama_init_from_model(model, params)
    assert context
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    space = llama.llama_batch_init(batch, 0, 1)
    out = []
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        space.n_tokens = len(part)
        for i, token in enumerate(part):
            space.token[i], space.pos[i], space.n_seq_id[i], space.logits[i] = token, start + i, 1, True
            space.seq_id[i][0] = 0
        assert llama.llama_decode(context, space) == 0
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(part), vocabulary)).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        out.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    llama.llama_batch_free(space)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.concatenate(out)


def divergence(base: np.ndarray, other: np.ndarray) -> float:
    """Median over tokens of the KL divergence of two arrays of log-probabilities: where two experts' shares are nearly
    equal, any rounding may choose the other one, and a few such tokens outweigh all others in the mean."""
    return float(np.median((np.exp(base) * (base - other)).sum(-1)))


def random_text() -> list[int]:
    return np.random.default_rng(6).integers(3, VOCAB, TOKENS).tolist()


@pytest.mark.parametrize("type", [layout.name for layout in IN_GGML])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_divergence_from_decoded_weights(models: Callable[[str, str], dict[str, Path]], model: str, type: str) -> None:
    ccq_backend.load_plugin()
    files, tokens = models(model, type), random_text()
    for batch in (1, 32):
        base = {role: log_probabilities(files[role], tokens, batch, 1) for role in ("ccq_f32", "q2_k_f32")}
        stock = divergence(base["q2_k_f32"], log_probabilities(files["q2_k"], tokens, batch, 1))
        for threads in (1, 2):
            ours = divergence(base["ccq_f32"], log_probabilities(files["ccq"], tokens, batch, threads))
            print(f"{model} {type} batch {batch} threads {threads}: KLD {ours:.3e}, Q2_K {stock:.3e}")
            assert 0 < ours <= stock


def test_two_contexts_of_one_model_and_graph_reuse(models: Callable[[str, str], dict[str, Path]]) -> None:
    """Contexts that take turns, each reusing its graph for token after token, say what one alone says."""
    ccq_backend.load_plugin()
    path, tokens = models("moe", "ccq_t2")["ccq"], random_text()[:24]
    alone = log_probabilities(path, tokens, 1, 2)
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_threads = 64, 2
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    contexts = [llama.llama_init_from_model(model, params) for _ in range(3)]
    for i, token in enumerate(tokens):
        for context in contexts:
            batch = llama.llama_batch_get_one((llama.llama_token * 1)(token), 1)
            assert llama.llama_decode(context, batch) == 0
            logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (VOCAB,)).astype(np.float64)
            assert np.allclose(logits - logits.max(), alone[i] - alone[i].max(), rtol=0, atol=1e-9)
    for context in contexts:
        llama.llama_free(context)
    llama.llama_model_free(model)


def test_without_the_plugin_llama_cpp_refuses_the_file(models: Callable[[str, str], dict[str, Path]]) -> None:
    """The text that the README quotes."""
    path = models("dense", "ccq_t2")["ccq"]
    code = (
        "import sys, llama_cpp.llama_cpp as l; l.llama_backend_init();"
        "sys.exit(bool(l.llama_model_load_from_file(sys.argv[1].encode(), l.llama_model_default_params())))"
    )
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert "type 36 (TYPE_IQ4_NL_4_4 REMOVED, use IQ4_NL with runtime repacking)" in child.stderr
    assert "not a multiple of block size (0)" in child.stderr


def test_preloaded_into_python(models: Callable[[str, str], dict[str, Path]]) -> None:
    """LD_PRELOAD finds no ggml when Python starts and keeps quiet; load_plugin works as ever."""
    path = models("dense", "ccq_t3")["ccq"]
    code = (
        "import sys, json, ccq_backend; ccq_backend.load_plugin(); import llama_cpp.llama_cpp as l;"
        "print(json.dumps(bool(l.llama_model_load_from_file(sys.argv[1].encode(), l.llama_model_default_params()))))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, path],
        env={**os.environ, "LD_PRELOAD": str(ccq_backend.plugin_path())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) is True
    assert next(line for line in child.stderr.splitlines() if line.startswith("ccq:")).startswith("ccq: active")


def test_libraries_are_found_by_handle() -> None:
    """What load_plugin relies on: libllama's handle resolves names in the libraries that it depends on."""
    assert ctypes.cast(llama._lib.ggml_backend_load, ctypes.c_void_p).value

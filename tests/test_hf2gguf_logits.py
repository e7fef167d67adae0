"""Our F32 files in a stock llama.cpp against transformers in float32, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ccq_converters.hf2gguf import convert
from ccq_converters.llama import LlamaModel
from ccq_converters.options import QuantOptions

from .upstream_diff.models import CASES, EXAMPLE, EXTRA_CASES, FAMILY_CASES, MULTIMODAL_CASES, Case, auto_class, build

N_TOKENS = 96
"""Longer than the 64 positions of the scaled models' original context."""

TOLERANCE = 1e-3


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Float64 log-softmax over the last axis."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def in_llama_cpp(path: Path, tokens: list[int]) -> np.ndarray:
    """Log-probabilities at all positions, KV cache f32, flash attention off: float64 ``[n, vocab]``."""
    n = len(tokens)
    with LlamaModel(path, n_ctx=128, threads=2, exact=True) as model:
        return log_probabilities(model.decode(tokens, list(range(n)), [0] * n, [True] * n))


def in_transformers(folder: Path, tokens: list[int]) -> np.ndarray:
    """The same by transformers, everything in float32."""
    model = auto_class(transformers.AutoConfig.from_pretrained(folder), whole=False).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return log_probabilities(model(torch.tensor([tokens])).logits[0].numpy())


@pytest.mark.parametrize("case", CASES + FAMILY_CASES + MULTIMODAL_CASES + EXTRA_CASES, ids=lambda case: case.name)
def test_log_probabilities(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(case, folder)
    out = tmp_path / "out.gguf"
    convert(folder, out, QuantOptions("f32"), progress=False)
    tokens = np.random.default_rng(7).integers(3, 380, N_TOKENS).tolist()
    ours, theirs = in_llama_cpp(out, tokens), in_transformers(folder, tokens)
    assert ours.shape == theirs.shape
    # A model whose predictions hardly move would hide a wrong rotation.
    assert theirs.std(axis=0).max() > 0.5
    assert np.abs(ours - theirs).max() <= TOLERANCE


def test_rope_scaling_added_to_a_new_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What model cards ask for, put into a config.json of transformers 5: transformers takes it, with its own theta."""
    folder = tmp_path / "model"
    build(Case("m", "qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    tokens = np.random.default_rng(7).integers(3, 380, N_TOKENS).tolist()
    ours, theirs = in_llama_cpp(tmp_path / "out.gguf", tokens), in_transformers(folder, tokens)
    assert np.abs(ours - theirs).max() <= TOLERANCE
    assert "no longer 1000000.0" in caplog.text


def test_bundled_model(tmp_path: Path) -> None:
    convert(EXAMPLE, tmp_path / "out.gguf", QuantOptions("f32"), progress=False)
    with LlamaModel(tmp_path / "out.gguf", n_ctx=128, exact=True) as model:
        tokens = model.tokenize("The file descriptor is closed when the last reference is dropped.\n\n    close(fd);\n")
    ours, theirs = in_llama_cpp(tmp_path / "out.gguf", tokens), in_transformers(EXAMPLE, tokens)
    assert np.abs(ours - theirs).max() <= TOLERANCE

"""benchmarks/quality/padding.py: a model with more channels and heads computes what the model itself does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import padding
import pytest

from ccq_converters import imatrix
from ccq_converters.hf2gguf import convert
from ccq_converters.llama import LlamaModel
from ccq_converters.options import QuantOptions
from ccq_format.errors import ModelError
from ccq_format.gguf_io import open_model

from .upstream_diff.models import CASES, build

LLAMA = next(case for case in CASES if case.name == "llama-linear-rope")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padding")
    build(LLAMA, folder / "model")
    convert(folder / "model", folder / "model.gguf", QuantOptions("f32"), progress=False)
    return folder / "model.gguf"


def logits(path: Path) -> np.ndarray:
    tokens = np.random.default_rng(7).integers(3, 380, 64).tolist()
    with LlamaModel(path, n_ctx=64, exact=True) as running:
        return running.decode(tokens, list(range(64)), [0] * 64, [True] * 64).copy()


def test_the_padded_model_predicts_the_same(model: Path, tmp_path: Path) -> None:
    padding.pad_model(model, tmp_path / "padded.gguf")
    before, after = open_model(model), open_model(tmp_path / "padded.gguf")
    assert padding.Padding(before).needed
    assert not padding.Padding(after).needed
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    assert all(t.columns % padding.WIDTH == 0 for t in after.tensors if "_norm" not in t.name)
    expected, found = logits(model), logits(tmp_path / "padded.gguf")
    assert expected.std() > 0.5
    assert np.abs(found - expected).max() <= 1e-4


def test_importance_is_padded_with_zeros(model: Path) -> None:
    tensors = {t.name: t for t in open_model(model).tensors if "blk." in t.name and "_norm" not in t.name}
    rng = np.random.default_rng(0)
    entries = {
        name: imatrix.Entry(rng.random(t.columns).astype(np.float32), np.array([8.0])) for name, t in tensors.items()
    }
    padded = padding.pad_importance(imatrix.Importance("f", entries), model)
    assert padded.entries.keys() == entries.keys()
    for name, entry in entries.items():
        sums = padded.entries[name].sums
        assert sums.size % padding.WIDTH == 0
        assert np.array_equal(sums[: entry.sums.size], entry.sums)
        assert not sums[entry.sums.size :].any()


def test_other_families_are_refused(model: Path) -> None:
    opened = open_model(model)
    other = replace(opened, metadata={**opened.metadata, "general.architecture": "qwen3"})
    with pytest.raises(ModelError, match="only llama, gemma3 can, not qwen3"):
        padding.Padding(other)

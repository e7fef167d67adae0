"""llama.cpp's own quantization through its library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ccq_converters import hf2gguf, imatrix, llama
from ccq_converters.options import QuantOptions
from ccq_format.errors import EvalError
from ccq_format.gguf_io import open_model
from support.ggml import ggml_quantize

ROOT = Path(__file__).resolve().parent.parent
IMATRIX = ROOT / "tests" / "data" / "manllama-4m.imatrix.gguf"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "f32.gguf"
    hf2gguf.convert(ROOT / "examples" / "manllama-4m", path, QuantOptions("f32"))
    return path


def types_of(path: Path) -> dict[str, set[str]]:
    """Types of the embedding, of the norms, and of all matrices."""
    found: dict[str, set[str]] = {"embedding": set(), "norm": set(), "matrix": set()}
    for tensor in open_model(path).tensors:
        kind = "embedding" if "token_embd" in tensor.name else "norm" if "norm" in tensor.name else "matrix"
        found[kind].add(tensor.type_name)
    return found


@pytest.mark.parametrize("name", sorted(llama.STOCK_FILE_TYPES))
def test_every_matrix_gets_the_type(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.gguf"
    llama.stock_quantize(source, out, name, importance=imatrix.load(IMATRIX), threads=1)
    assert types_of(out) == {"embedding": {"q8_0"}, "norm": {"f32"}, "matrix": {name}}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("name", "measured"), [("q2_k", False), ("q2_k", True), ("iq2_s", True)])
def test_bytes_and_importance_are_ggmls(source: Path, tmp_path: Path, name: str, measured: bool) -> None:
    out = tmp_path / "out.gguf"
    llama.stock_quantize(source, out, name, importance=imatrix.load(IMATRIX) if measured else None, threads=1)
    stored = open_model(IMATRIX)
    for tensor in ("blk.0.attn_q.weight", "blk.3.ffn_down.weight"):
        mean = None
        if measured:
            sums, count = (stored.tensor(tensor + suffix).data().reshape(-1) for suffix in (".in_sum2", ".counts"))
            mean = (sums / count).astype(np.float32)
        expected = ggml_quantize(name, open_model(source).tensor(tensor).dequantize(), mean)
        np.testing.assert_array_equal(open_model(out).tensor(tensor).data(), expected)


def test_refusals_name_llama_cpps_reason(source: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="requires an imatrix"):
        llama.stock_quantize(source, tmp_path / "out.gguf", "iq2_xs", threads=1)
    importance = imatrix.load(IMATRIX)
    half = {k: imatrix.Entry(e.sums[: e.sums.size // 2], e.counts) for k, e in importance.entries.items()}
    with pytest.raises(EvalError, match="imatrix size"):
        llama.stock_quantize(
            source, tmp_path / "out.gguf", "q2_k", importance=imatrix.Importance("half", half), threads=1
        )
    assert not list(tmp_path.iterdir())

"""The bundled trained model through the plugin: how far rounded activations lead from the weights' own predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

import ccq_backend
from ccq_converters import evaluate, hf2gguf
from ccq_converters.dequantize import dequantize
from ccq_converters.llama import stock_quantize
from ccq_converters.options import QuantOptions

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def divergence_to_own_weights(file: Path) -> float:
    """Mean KL divergence of a file to the same file decoded to float32."""
    decoded = file.with_suffix(".f32.gguf")
    dequantize(file, decoded, "f32")
    text = evaluate.read_text(EXAMPLES / "heldout.txt")
    # One thread: ggml's threads spin while they wait, which crawls on a busy machine.
    result = evaluate.evaluate(file, text, base_path=decoded, n_ctx=256, threads=1, max_windows=4)
    assert result.kld_mean is not None
    return result.kld_mean


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What llama.cpp's own Q2_K, with its int8 activations, costs on the same model and text."""
    folder = tmp_path_factory.mktemp("stock")
    hf2gguf.convert(EXAMPLES / "manllama-4m", folder / "f16.gguf", QuantOptions("f16"))
    stock_quantize(folder / "f16.gguf", folder / "q2_k.gguf", "q2_k")
    return divergence_to_own_weights(folder / "q2_k.gguf")


@pytest.mark.parametrize(
    "options",
    [
        QuantOptions("ccq_p2_5"),
        QuantOptions("ccq_t2"),
        # The embedding is the output matrix as well: looked up and multiplied.
        QuantOptions("ccq_t2_m"),
        QuantOptions("ccq_t2", overrides=[("token_embd", "ccq_t2_5")]),
    ],
    ids=["ccq_p2_5", "ccq_t2", "ccq_t2_m", "ccq_t2 with an embedding in ccq_t2_5"],
)
def test_activations_cost_no_more_than_those_of_q2_k(options: QuantOptions, stock: float, tmp_path: Path) -> None:
    ccq_backend.load_plugin()
    hf2gguf.convert(EXAMPLES / "manllama-4m", tmp_path / "ccq.gguf", options)
    ours = divergence_to_own_weights(tmp_path / "ccq.gguf")
    assert 0 < ours <= stock

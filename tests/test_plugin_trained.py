"""The bundled trained model through the plugin: how far rounded activations lead from the weights' own predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

import ccq_backend
from ccq_converters import evaluate, hf2gguf
from ccq_converters.dequantize import dequantize
from ccq_converters.plan import QuantOptions

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def divergence_to_own_weights(folder: Path, type_name: str) -> float:
    """Mean KL divergence of the bundled model in ``type_name`` to the same file decoded to float32."""
    file, decoded = folder / f"{type_name}.gguf", folder / f"{type_name}-f32.gguf"
    hf2gguf.convert(EXAMPLES / "manllama-4m", file, QuantOptions(type_name))
    dequantize(file, decoded, "f32")
    text = evaluate.read_text(EXAMPLES / "heldout.txt")
    # One thread: ggml's threads spin while they wait, which crawls on a busy machine.
    result = evaluate.evaluate(file, text, base_path=decoded, n_ctx=256, threads=1, max_windows=4)
    assert result.kld_mean is not None
    return result.kld_mean


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What llama.cpp's own Q8_0, with its int8 activations, costs on the same model and text."""
    return divergence_to_own_weights(tmp_path_factory.mktemp("stock"), "q8_0")


@pytest.mark.parametrize("type_name", ["ccq_p2_5", "ccq_t2"])
def test_activations_cost_no_more_than_those_of_q8_0(type_name: str, stock: float, tmp_path: Path) -> None:
    ccq_backend.load_plugin()
    ours = divergence_to_own_weights(tmp_path, type_name)
    assert 0 < ours <= stock

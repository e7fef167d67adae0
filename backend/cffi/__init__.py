"""The CCQ kernels for Python, and the llama.cpp plugin built from them."""

from __future__ import annotations

from .kernels import ACT_BLOCK_BYTES, EFFORTS, decode, encode, isa, isas, mul_mat, quantize_activations, vec_dot
from .plugin import load_plugin, plugin_path

__all__ = [
    "ACT_BLOCK_BYTES",
    "EFFORTS",
    "decode",
    "encode",
    "isa",
    "isas",
    "load_plugin",
    "mul_mat",
    "plugin_path",
    "quantize_activations",
    "vec_dot",
]

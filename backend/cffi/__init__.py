"""The CCQ kernels for Python, and the llama.cpp plugin built from them."""

from __future__ import annotations

from .arguments import EFFORTS
from .kernels import (
    act_bytes,
    decode,
    encode,
    isa,
    isas,
    mul_mat,
    quantize_activations,
    read_activations,
)
from .plugin import load_plugin, plugin_path

__all__ = [
    "EFFORTS",
    "act_bytes",
    "decode",
    "encode",
    "isa",
    "isas",
    "load_plugin",
    "mul_mat",
    "plugin_path",
    "quantize_activations",
    "read_activations",
]

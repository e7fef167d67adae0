"""The CCQ tensor types in Python: layout table, numpy codec, and GGUF reading and writing.

Importing this package adds the CCQ types to the ``gguf`` package, so that ``gguf.GGUFReader`` lists CCQ files and
``gguf.quants.dequantize`` decodes their tensors.
"""

from __future__ import annotations

from ._registry import register

__version__ = "0.1.0"

register()

__all__ = ["__version__", "register"]

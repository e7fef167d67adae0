"""Model families: which Hugging Face architectures can be converted, and how.

One module per family; each names the checkpoint's tensors with their shapes and what is special about the family.
"""

from __future__ import annotations

from pathlib import Path

from ccq_format.errors import ModelError

from .base import Family
from .config import Config
from .llama import Llama
from .mistral import Mistral
from .mixtral import Mixtral
from .qwen2 import Qwen2
from .qwen3 import Qwen3
from .qwen3_moe import Qwen3Moe

FAMILIES: dict[str, type[Family]] = {f.architecture: f for f in (Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3Moe)}
"""Hugging Face architecture name -> family."""


def family_of(model_dir: Path) -> Family:
    """The family of the model in ``model_dir``, by its config.json.

    Raises ``ModelError`` if the config is missing or unusable or the architecture is not supported.
    """
    config = Config.read(model_dir / "config.json")
    names = config.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"'architectures' must name one architecture, it is {names!r}", file=config.file)
    try:
        family = FAMILIES[names[0]]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"the architecture {names[0]} is not supported (supported: {known}); llama.cpp's convert_hf_to_gguf.py "
            "makes a GGUF file that 'ccq-convert quantize' takes",
            file=config.file,
        ) from None
    return family(config)


__all__ = ["FAMILIES", "Config", "Family", "family_of"]

"""Model families: which Hugging Face architectures can be converted, and how.

A family is a ``Spec``: data, composed of the blocks that its layers have in common with others.
"""

from __future__ import annotations

from pathlib import Path

from ccq_format.errors import ModelError

from .base import Family, Spec
from .cohere import COHERE2
from .config import Config
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .ernie import ERNIE4_5, ERNIE4_5_MOE
from .gemma import GEMMA3
from .glm import GLM4, GLM4_MOE
from .gpt_oss import GPT_OSS
from .llama import GRANITE, LLAMA, MISTRAL, MIXTRAL, SMOLLM3
from .llama4 import LLAMA4
from .multimodal import WRAPPERS
from .olmo import OLMO2, OLMOE
from .phi import PHI3
from .qwen import QWEN2, QWEN3, QWEN3_MOE
from .qwen_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT

FAMILIES: dict[str, Spec] = {
    spec.architecture: spec
    for spec in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        LLAMA4,
        SMOLLM3,
        GRANITE,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_5,
        QWEN3_5_MOE,
        GEMMA3,
        PHI3,
        OLMO2,
        OLMOE,
        GLM4,
        GLM4_MOE,
        COHERE2,
        ERNIE4_5,
        ERNIE4_5_MOE,
        GPT_OSS,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
    )
}
"""Hugging Face architecture name -> family."""

_SPECS = FAMILIES | {spec.base_architecture: spec for spec in FAMILIES.values()} | {"Ernie4_5_ForCausalLM": ERNIE4_5}
"""Other names: of models without a head, and of ERNIE 4.5's own code."""


def family_of(model_dir: Path) -> Family:
    """The family of the model in ``model_dir``, by its config.json.

    Raises ``ModelError`` if the config is missing or unusable or the architecture is not supported.
    """
    config = Config.read(model_dir / "config.json")
    names = config.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"'architectures' must name one architecture, it is {names!r}", file=config.file)
    if names[0] in WRAPPERS:
        spec, text = WRAPPERS[names[0]].unwrap(config)
        return Family(spec, text, wrapper=names[0])
    try:
        spec = _SPECS[names[0]]
    except KeyError:
        known = ", ".join(sorted((*FAMILIES, *WRAPPERS)))
        raise ModelError(
            f"the architecture {names[0]} is not supported (supported: {known}); llama.cpp's convert_hf_to_gguf.py "
            "makes a GGUF file that 'ccq-convert quantize' takes",
            file=config.file,
        ) from None
    return Family(spec, config)


__all__ = ["FAMILIES", "Config", "Family", "Spec", "family_of"]

"""Models of several modalities, of which the text model is converted: one of the other families, in ``text_config``.

Where images are seen too, llama.cpp reads them from a second file (``mmproj``), which its own converter makes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gguf

from .base import Family, Spec, plain_heads
from .config import Config
from .gemma import GEMMA3
from .llama import LLAMA, MISTRAL
from .llama4 import LLAMA4
from .qwen import QWEN2
from .qwen_next import QWEN3_5, QWEN3_5_MOE

OTHERS = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|visual|multi_modal_projector|audio_tower|embed_(?:vision|audio))\."
)
"""Names of tensors that are no part of the text model."""


@dataclass(frozen=True)
class Wrapper:
    """``texts``: the families by ``model_type`` of the ``text_config``; ``flat``: older configs have the text model's
    keys beside those of the others."""

    architecture: str
    texts: Mapping[str, Spec]
    flat: bool = False
    tied: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)
    """What the text model's config class fills in: transformers 4 wrote no value of a ``text_config`` that is this."""

    def unwrap(self, config: Config) -> tuple[Spec, Config]:
        """The text model's family and its configuration.

        Raises ``ModelError`` if it has none, or one that is not supported.
        """
        text = config.raw.get("text_config")
        if text is None and self.flat:
            text, spec = config.raw, next(iter(self.texts.values()))
        elif not isinstance(text, dict):
            raise config.error(f"'text_config' must be an object, it is {text!r}")
        else:
            kind = text.get("model_type", next(iter(self.texts)))
            if kind not in self.texts:
                known = ", ".join(self.texts)
                raise config.error(
                    f"the text model {kind!r} in a {self.architecture} is not supported (supported: {known}); use "
                    "llama.cpp's convert_hf_to_gguf.py, then 'ccq-convert quantize'"
                )
            spec = self.texts[kind]
        raw: dict[str, Any] = {**self.defaults, **text, "architectures": [spec.architecture]}
        for key in ("quantization_config", "compression_config", "tie_word_embeddings"):
            if config.raw.get(key) is not None:
                raw[key] = config.raw[key]
        raw.setdefault("tie_word_embeddings", self.tied)
        return spec, Config(raw, config.file)


def _sections(family: Family) -> list[int]:
    return family.rope.sections(family.head_dim // 2)


def _check_sections(family: Family) -> None:
    plain_heads(family)
    _sections(family)


def _write_sections(family: Family, writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_sections(_sections(family))


_QWEN2_VL = replace(
    QWEN2,
    architecture="Qwen2VLForConditionalGeneration",
    model_arch=gguf.MODEL_ARCH.QWEN2VL,
    rope_types=frozenset({"default"}),
    theta=1e6,
    rms_eps=1e-5,
    kv_heads=8,
    check=_check_sections,
    keys=_write_sections,
)
"""Text has the same position in time, height and width, for which its values are rotated as Qwen 2's.  llama.cpp
(ggml 0.25.3) reads no epsilon of the norms for this architecture and takes 0; the published models have 1e-6."""

_MISTRAL3 = replace(MISTRAL, model_arch=gguf.MODEL_ARCH.MISTRAL3)

_GEMMA3_SIZES = {"vocab_size": 262208, "num_attention_heads": 8, "max_position_embeddings": 131072}
_LLAMA_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}

WRAPPERS: dict[str, Wrapper] = {
    wrapper.architecture: wrapper
    for wrapper in (
        Wrapper("Gemma3ForConditionalGeneration", {"gemma3_text": GEMMA3}, tied=True, defaults=_GEMMA3_SIZES),
        Wrapper("Llama4ForConditionalGeneration", {"llama4_text": LLAMA4}),
        Wrapper("Mistral3ForConditionalGeneration", {"mistral": _MISTRAL3}),
        Wrapper("LlavaForConditionalGeneration", {"llama": LLAMA}, defaults=_LLAMA_SIZES),
        Wrapper("Qwen2VLForConditionalGeneration", {"qwen2_vl_text": _QWEN2_VL, "qwen2_vl": _QWEN2_VL}, flat=True),
        Wrapper(
            "Qwen2_5_VLForConditionalGeneration", {"qwen2_5_vl_text": _QWEN2_VL, "qwen2_5_vl": _QWEN2_VL}, flat=True
        ),
        Wrapper("Qwen3_5ForConditionalGeneration", {"qwen3_5_text": QWEN3_5}),
        Wrapper("Qwen3_5MoeForConditionalGeneration", {"qwen3_5_moe_text": QWEN3_5_MOE}),
    )
}
"""By Hugging Face's name."""

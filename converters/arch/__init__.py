"""Model families: which Hugging Face architectures can be converted, and how.

A family is a ``Spec``: data, composed of the blocks that its layers have in common with others.  Every ``Spec`` with a
public name in a module of this package is one.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

from ccq_format.errors import ModelError

from .base import Family, Spec
from .config import Config
from .ernie import ERNIE4_5
from .multimodal import WRAPPERS


def _families() -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for name, spec in vars(import_module(module.name)).items():
            if not isinstance(spec, Spec) or name.startswith("_"):
                continue
            if found.setdefault(spec.architecture, spec) != spec:
                raise ValueError(f"two families for {spec.architecture}")
    return found


FAMILIES = _families()
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

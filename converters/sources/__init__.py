"""Checkpoints whose matrices are quantized already: each format decoded as its own library does, a few rows at a time.

A format is a :class:`Format`; which one a checkpoint has, its config's ``quantization_config`` says.  Products of codes
and scales are computed in float32 and not rounded to the checkpoint's bf16 or f16, as most libraries do in the end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ccq_format.errors import ModelError

from ..arch.config import Config
from ..safetensors_io import Checkpoint, StoredTensor, read_json
from . import awq, compressed, gptq, modelopt, mxfp4, scaled, wint2
from .format import Format, Settings

FORMATS: dict[str, Format] = {
    "fp8": scaled.fp8,
    "fbgemm_fp8": scaled.fbgemm,
    "mxfp4": mxfp4.tensors,
    "compressed-tensors": compressed.tensors,
    "gptq": gptq.tensors,
    "awq": awq.tensors,
    "modelopt": modelopt.tensors,
}
"""``quant_method`` -> format."""

_RUN_TIME = re.compile(
    r"\.(input|output|activation|k|v|q|kv)_scale$|\.(gate_up_proj|down_proj)_activation_scale$|_proj\.[kv]_scale$"
    r"|\.input_(global_scale|zero_point)$|\.self_attn\.[qkv]_zero_point$"
)
"""Scales of activations and of the KV cache: llama.cpp quantizes its own way."""


def open_checkpoint(model_dir: Path, config: Config, k_order: str | None = None) -> Checkpoint:
    """The tensors of ``model_dir``, quantized ones in the form of the matrices that they stand for.

    ``k_order`` is the order of the inputs of wint2 matrices, if it is not to be found out.  Raises ``ModelError`` for a
    format that is unknown or damaged, and as ``Checkpoint`` does.
    """
    checkpoint = Checkpoint(model_dir)
    raw = config.raw.get("quantization_config") or config.raw.get("compression_config") or _of_modelopt(model_dir)
    if raw and not isinstance(raw, dict):
        raise config.error(f"'quantization_config' must be an object, it is {raw!r}")
    if wint2.is_wint2(checkpoint):
        order = wint2.decode(config, checkpoint, k_order)
        checkpoint.residual_order = None if order is None else order.tolist()
        return checkpoint
    if k_order is not None:
        raise ModelError("--k-order: it has no wint2 matrices", file=model_dir)
    if not raw:
        return checkpoint
    settings = Settings(raw, config)
    method = raw.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        known = ", ".join(FORMATS)
        raise config.error(f"the quantization {method!r} is not supported (supported: {known}); take other weights")
    checkpoint.decode(list(FORMATS[method](settings, checkpoint)))
    checkpoint.drop([tensor.name for tensor in checkpoint if _RUN_TIME.search(tensor.name)])
    for tensor in checkpoint:
        if isinstance(tensor, StoredTensor) and tensor.dtype.startswith("F8_"):
            raise tensor.error(f"is stored as {tensor.dtype}, but has no scale")
    return checkpoint


def _of_modelopt(model_dir: Path) -> dict[str, Any] | None:
    """What ModelOpt says of its checkpoints in a file of its own; earlier versions say it nowhere else."""
    path = model_dir / "hf_quant_config.json"
    if not path.is_file():
        return None
    stated = read_json(path).get("quantization")
    if not isinstance(stated, dict):
        raise ModelError("has no object 'quantization'", file=path)
    return {**stated, "quant_method": "modelopt"} if stated.get("quant_algo") else None


__all__ = ["FORMATS", "Format", "Settings", "open_checkpoint"]

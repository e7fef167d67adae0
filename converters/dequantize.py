"""``ccq-convert dequantize``: a plain GGUF file with the exact weights that a CCQ file stands for."""

from __future__ import annotations

import os
from pathlib import Path

from ccq_format.errors import PlanError
from ccq_format.gguf_io import open_model

from .conversion import Conversion
from .gguf_sources import source_of
from .options import QuantOptions
from .plan import Plan, PlannedTensor
from .stream import write_planned
from .target_types import COPIED_TYPES, row_bytes
from .tensors import TensorSource


def dequantize(
    in_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    type_name: str,
    *,
    overwrite: bool = False,
    split_max_size: int | None = None,
    progress: bool = True,
) -> Plan:
    """Decode every quantized tensor of ``in_path`` (CCQ and stock types) to ``type_name``, f32 or f16.

    f32 holds the decoded weights exactly; f16 rounds them to nearest.  1-D tensors and those that are f32 already stay
    as they are in f32, as llama.cpp wants its norms.  The ``ccq.*`` keys are dropped, all others copied.
    ``split_max_size`` is that of ``QuantOptions``.

    Raises ``PlanError`` for another type, ``WeightsError`` if a decoded weight is not finite or too large for f16, and
    what ``open_model`` and ``ModelWriter`` raise.
    """
    target = type_name.lower()
    if target not in ("f32", "f16"):
        raise PlanError(f"cannot dequantize to '{type_name}': choose f32 or f16")
    model = open_model(in_path)
    tensors = [_planned(source_of(info), target) for info in model.tensors]
    plan = Plan(tensors, 0, 0, "")
    options = QuantOptions(target, overwrite=overwrite, split_max_size=split_max_size)
    files = [Path(file) for file in model.files]
    sources = [tensor.source for tensor in tensors]
    conversion = Conversion(Path(out_path), model.arch, sources, files, copy_from=model, progress=progress)
    write_planned(conversion, plan, options)
    return plan


def _planned(source: TensorSource, target: str) -> PlannedTensor:
    kept = source.source_type in COPIED_TYPES or source.source_type == "f32" or len(source.shape) < 2
    chosen = (source.source_type if source.source_type in COPIED_TYPES else "f32") if kept else target
    return PlannedTensor(source, chosen, source.rows * row_bytes(chosen, source.row_len), "dequantize")

"""``ccq-convert quantize``: give the tensors of any GGUF file other types, everything else untouched."""

from __future__ import annotations

import os
from pathlib import Path

from ccq_format.gguf_io import open_model
from ccq_format.output import refuse_inputs

from .automatic import write_calibrated
from .conversion import Conversion
from .gguf_sources import sources_of
from .options import QuantOptions
from .plan import Plan


def quantize(
    in_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    options: QuantOptions,
    progress: bool = True,
    *,
    allow_requantize: bool = False,
) -> Plan:
    """Write the model of ``in_path`` to ``out_path`` with the types of ``make_plan``.

    Any architecture; the source may hold the types of ``SOURCE_TYPES`` and integer tensors, and with
    ``allow_requantize`` every type that can be decoded.  All metadata is copied with its
    exact value types, ``general.file_type`` included: llama.cpp has no number for a CCQ file and would call any other
    value "unknown, may not work", so its "file type" line keeps naming the source's type.

    Raises ``TensorTypeError`` for a source of any other type, and what ``open_model`` and ``write_calibrated`` raise.
    """
    model = open_model(in_path)
    files = [Path(file) for file in model.files]
    if not options.dry_run:
        refuse_inputs([out_path], files)
    sources = sources_of(model, allow_requantize)
    conversion = Conversion(
        Path(out_path), model.arch, sources, files, copy_from=model, runnable=Path(in_path), progress=progress
    )
    return write_calibrated(conversion, options)

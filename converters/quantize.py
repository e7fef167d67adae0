"""``ccq-convert quantize``: give the tensors of any GGUF file other types, everything else untouched."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ModelError, OutputError, TensorTypeError
from ccq_format.gguf_io import Model, TensorInfo, open_model

from .plan import COPIED_TYPES, PLAIN_TYPES, Plan, QuantOptions, TensorSource
from .stream import write_model


def quantize(
    in_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    options: QuantOptions,
    progress: bool = True,
) -> Plan:
    """Write the model of ``in_path`` to ``out_path`` with the types of ``make_plan``.

    Any architecture; the source may hold f32, f16, bf16, q8_0 and integer tensors.  All metadata is copied with its
    exact value types, ``general.file_type`` included: llama.cpp has no number for a CCQ file and would call any other
    value "unknown, may not work", so its "file type" line keeps naming the source's type.

    Raises ``TensorTypeError`` for a source of any other type, ``ModelError`` for one part of a split model, and what
    ``open_model`` and ``write_model`` raise.
    """
    from .automatic import Conversion, calibrated  # which needs this module

    model = open_model(in_path)
    if not options.dry_run and os.path.exists(out_path) and os.path.samefile(in_path, out_path):
        raise OutputError("input and output are the same file", file=out_path)
    refuse_parts(model)
    sources = sources_of(model)
    files = [Path(in_path)]
    conversion = Conversion(
        Path(out_path), model.arch, sources, files, copy_from=model, runnable=files[0], progress=progress
    )
    with calibrated(conversion, options) as options:
        return write_model(
            out_path,
            arch=model.arch,
            sources=sources,
            options=options,
            progress=progress,
            copy_from=model,
            files=files,
        )


def refuse_parts(model: Model) -> None:
    """Raise ``ModelError`` if the file is one part of a model that is split over several."""
    parts = model.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(f"is one of {parts} parts; merge them with llama-gguf-split --merge first", file=model.path)


def sources_of(model: Model) -> list[TensorSource]:
    """The tensors of an opened file.  Raises ``TensorTypeError`` if one has lost too much to be quantized again."""
    for info in model.tensors:
        if info.layout is not None:
            raise TensorTypeError(
                f"is {info.type_name} already; quantize the original model instead", file=model.path, tensor=info.name
            )
        if info.type_name not in PLAIN_TYPES and info.type_name not in COPIED_TYPES:
            raise TensorTypeError(
                f"type {info.type_name} cannot be quantized again; start from an f32, f16, bf16 or q8_0 file",
                file=model.path,
                tensor=info.name,
            )
    return [source_of(info) for info in model.tensors]


def source_of(info: TensorInfo) -> TensorSource:
    """One tensor of an opened file as a source; rows are read from the file as they are needed."""

    def load_rows(start: int, stop: int) -> NDArray[np.float32]:
        return decode_rows(info, start, stop)

    def raw_rows(start: int, stop: int) -> NDArray[np.uint8]:
        return info.stored_rows(start, stop)

    return TensorSource(info.name, info.shape, load_rows, info.type_name, raw_rows)


def decode_rows(info: TensorInfo, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a tensor, float32 ``[stop - start, columns]``, exactly as its type says.

    Raises ``TensorTypeError`` for types that gguf cannot decode.
    """
    stored = info.stored_rows(start, stop)
    if info.layout is not None:
        import ccq_backend

        weights: NDArray[np.float32] = ccq_backend.decode(info.layout, stored)
        return weights
    try:
        with np.errstate(all="ignore"):
            decoded = gguf.quants.dequantize(stored, info.ggml_type) if info.type_name not in _VIEWS else None
    except NotImplementedError:
        raise TensorTypeError(f"no decoder for type {info.type_name}", tensor=info.name) from None
    if decoded is None:
        decoded = stored.view(_VIEWS[info.type_name])
    return np.asarray(decoded, dtype=np.float32).reshape(stop - start, info.columns)


_VIEWS = {"f32": "<f4", "f16": "<f2", "f64": "<f8"}

"""``ccq-convert inspect``: what a GGUF file holds, checked."""

from __future__ import annotations

import os
from typing import Any

from ccq_format.errors import readable
from ccq_format.gguf_io import Model, open_model

from .console import format_bytes


def inspect(path: str | os.PathLike[str]) -> Model:
    """Open a GGUF file and check the parameters of every block of its CCQ tensors.

    Raises ``InputError``, the subclass of ``FormatError`` that says what is wrong, ``BlockError`` among them.
    """
    model = open_model(path)
    for tensor in model.tensors:
        tensor.check_blocks()
    return model


def as_json(model: Model) -> dict[str, Any]:
    """The report for programs; shapes are in numpy order (row length last), sizes in bytes."""
    return {
        "file": model.path,
        "files": list(model.files),
        "architecture": model.arch,
        "spec_version": model.spec_version,
        "encoder": model.encoder,
        "file_bpw": model.file_bpw,
        "tensors": [
            {"name": t.name, "type": t.type_name, "shape": list(t.shape), "bpw": t.bpw, "bytes": t.nbytes}
            for t in model.tensors
        ],
    }


def as_text(model: Model) -> str:
    """The report for people: one line per tensor, then totals by type."""
    lines = [
        f"{model.path}: {readable(model.arch) or 'no architecture'}, CCQ spec {model.spec_version or '-'}"
        + (f", written by {readable(model.encoder)}" if model.encoder else "")
        + (f", {len(model.files)} files" if len(model.files) > 1 else "")
    ]
    rows = [(readable(t.name), t.type_name, " x ".join(map(str, t.shape)), f"{t.bpw:.4g}") for t in model.tensors]
    rows.insert(0, ("tensor", "type", "shape", "bpw"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name in sorted({t.type_name for t in model.tensors}):
        same = [t for t in model.tensors if t.type_name == name]
        lines.append(f"{name}: {len(same)} tensors, {format_bytes(sum(t.nbytes for t in same))}")
    total = sum(t.nbytes for t in model.tensors)
    weights = sum(t.n_weights for t in model.tensors)
    lines.append(
        f"{len(model.tensors)} tensors, {weights:,} weights, {format_bytes(total)}, "
        f"{model.file_bpw:.3f} bits per weight"
    )
    return "\n".join(lines)

"""What the ways to calibrate share: torch on a folder (``calibrate``), llama.cpp on a GGUF file (``collect``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ccq_format.errors import ImportanceError
from ccq_format.output import refuse_inputs

BUNDLED_TEXT = Path(__file__).parent / "data" / "calibration.txt"
"""350 kB of prose, documentation, dialogue, code and 28 languages; any part of it is a mixture.  The README beside it
says what it is made of."""


@dataclass(frozen=True)
class CalibrationOptions:
    """``chunks`` = ``None`` takes all windows of the text; ``threads`` <= 0 means one per CPU; ``process_output`` adds
    the output matrix; ``gradients`` adds the squares of the outputs' gradients, for three to four times the time and 4
    bytes per token, hidden channel and layer (beyond 1 GiB of the disk).

    Of GGUF files only (see ``collect``): ``losses`` are measured as well (see ``losses``); ``memory``, bytes for the
    products, ``None`` half of what is free; ``exact`` sets llama.cpp's KV cache to f32 and its flash attention off."""

    ctx: int = 512
    chunks: int | None = None
    threads: int = 0
    process_output: bool = False
    gradients: bool = False
    overwrite: bool = False
    memory: int | None = None
    losses: bool = False
    exact: bool = False


def check_outputs(out: Path, hessian: Path | None, inputs: Iterable[str | Path]) -> None:
    """Raise ``ImportanceError`` if both results are to be one file, ``OutputError`` if one is a file that is read."""
    if hessian is not None and hessian.absolute() == out.absolute():
        raise ImportanceError("is to hold both the importance and the Hessians", file=out)
    refuse_inputs([out] if hessian is None else [out, hessian], inputs)

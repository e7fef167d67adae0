"""What tests of the commands share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def without_advice(stderr: str) -> str:
    """Standard error without the advice to calibrate, which every file of few bits made without data brings."""
    return "".join(line for line in stderr.splitlines(keepends=True) if "without importance data" not in line)


def without_calibration(args: tuple[object, ...]) -> list[str]:
    """The words of a command, conversions told not to calibrate: random models cannot be run, nor need to be."""
    words = [str(arg) for arg in args]
    return [*words, "--no-calibration"] if {"hf2gguf", "quantize"} & set(words[:2]) else words


def unnamed(folder: Path, process: int | str = "self") -> int:
    """How many files a process has open that never had a name in the folder, or have lost it."""
    found = 0
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            path = os.readlink(link)
            found += path.startswith(f"{folder}/") and path.endswith(" (deleted)")
    return found

"""What tests of the commands share."""

from __future__ import annotations


def without_advice(stderr: str) -> str:
    """Standard error without the advice to calibrate, which every file of few bits made without data brings."""
    return "".join(line for line in stderr.splitlines(keepends=True) if "without importance data" not in line)


def without_calibration(args: tuple[object, ...]) -> list[str]:
    """The words of a command, conversions told not to calibrate: random models cannot be run, nor need to be."""
    words = [str(arg) for arg in args]
    return [*words, "--no-calibration"] if {"hf2gguf", "quantize"} & set(words[:2]) else words

"""What tests of the commands share."""

from __future__ import annotations


def without_advice(stderr: str) -> str:
    """Standard error without the advice to calibrate, which every file of few bits made without data brings."""
    return "".join(line for line in stderr.splitlines(keepends=True) if "without importance data" not in line)

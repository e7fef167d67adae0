"""Runs ``ccq-convert`` many times, each in a fork of its own that is killed after a while.

Reads lines of JSON, ``{"arguments": [...], "seconds": null or a number, "hidden": bool}``, and answers each with one:
``{"code": exit status or -9, "seconds": how long it took, "errors": standard error}``.  ``seconds`` is when SIGKILL
comes; ``hidden`` makes the process write as where no file can be without a name.  Forks save the half second that
starting Python and loading the packages take, so that the moments spread over the work.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from typing import Any

from ccq_converters import cli, dequantize, hf2gguf, quantize  # noqa: F401 - loaded before the forks
from ccq_format import output


def run(arguments: list[str], hidden: bool, errors: int) -> int:
    """In the fork: the exit status."""
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    if hidden:
        output._create_unnamed = lambda folder: None
    try:
        cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def killed_after(arguments: list[str], seconds: float | None, hidden: bool) -> dict[str, Any]:
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        if not (child := os.fork()):
            try:
                os._exit(run(arguments, hidden, errors.fileno()))
            finally:
                os._exit(99)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # it may have ended, but is a process until it is waited for
        _, status = os.waitpid(child, 0)
        taken = time.perf_counter() - start
        errors.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "seconds": taken, "errors": errors.read().decode()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(killed_after(**json.loads(line))), flush=True)

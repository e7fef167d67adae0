"""Worker processes with a time limit: what ends or stops one is known to be the input that it was given."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 20.0
"""What an input of a few kB may take; the slowest take a tenth of a second."""
START_SECONDS = 300.0
INPUTS = 2000
"""Inputs that a process takes before another one takes its place, so that what leaks stays below the limit."""


class Worker:
    """One process of ``fuzz.worker``, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._served = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The verdict.  A process that ended or hung leaves one of its own: without ``target`` and ``kind``, which
        only a request that has them tells."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(SECONDS)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self._process.send_signal(signal.SIGABRT)  # faulthandler says where it is
            return self._dead("takes too long")
        if not line:
            return self._dead("ends the process")
        self._served += 1
        if self._served >= INPUTS:
            self.close()
        verdict: dict[str, Any] = json.loads(line)
        return verdict

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(SECONDS)
            self._forget()

    def _start(self) -> None:
        path = os.pathsep.join([str(TESTS), *(p for p in sys.path if p)])
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        )
        self._served = 0
        try:
            ready = self._line(START_SECONDS)
        except TimeoutError:
            ready = b""
        if not ready:
            raise RuntimeError(f"no worker: {self._dead('does not start')['detail']}")

    def _line(self, seconds: float) -> bytes:
        """A line of its output, nothing if that ends.  Raises ``TimeoutError``."""
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        return self._process.stdout.readline()

    def _dead(self, how: str) -> dict[str, Any]:
        assert self._process is not None
        try:
            _, errors = self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, errors = self._process.communicate()
        code = self._process.returncode
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._forget()
        fault = how if how == "takes too long" else f"{how}: {name}"
        return {"outcome": "error", "fault": fault, "detail": errors.decode(errors="replace")[-4000:]}

    def _forget(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                if stream is not None:
                    stream.close()
        self._process = None

"""The processes of a run: one worker per llama.cpp build, a second build to install, and a busy loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ccq_format.errors import EvalError

STOCK, IK = "llama.cpp", "ik_llama.cpp"
"""Names of the builds, as ``worker.py`` takes them."""

IK_PACKAGE = "ik-llama-cpp-python==0.1.5"

_SCRIPT = Path(__file__).with_name("worker.py")


class Worker:
    """A running ``worker.py``; use it as a context manager."""

    def __init__(
        self, build: str, python: str | os.PathLike[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """``python`` is the interpreter that has the build, ``environment`` is added to this process's.

        Raises ``EvalError`` if it cannot be started, or the build not be used.
        """
        self.build = build
        try:
            self._process = subprocess.Popen(
                [python, _SCRIPT, build],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env={**os.environ, "CCQ_QUIET": "1", **(environment or {})},
            )
        except OSError as error:
            raise EvalError(f"cannot be started: {error.strerror or error}", file=python) from None
        try:
            hello = self.ask("hello")
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = hello["versions"]
        self.system: str = hello["system"]

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """The reply to one request of ``worker.Session``.  Raises ``EvalError`` with the worker's reason."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: there is no reply either
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EvalError(f"the process of {self.build} has ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EvalError(f"{self.build}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Let the process end, after the request it is at; safe to call twice."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        try:
            self._process.communicate(timeout=60)  # closes its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def install_ik(folder: Path) -> Path:
    """The interpreter of a virtual environment with ik_llama.cpp, made in ``folder`` unless it is there.

    Raises ``EvalError`` if it cannot be installed.
    """
    python = folder / "bin" / "python"
    check: list[str | Path] = [python, "-c", "import ik_llama_cpp"]
    steps: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary=:all:", IK_PACKAGE],
        check,
    ]
    if python.exists() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return python
    for step in steps:
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = (result.stderr or result.stdout).strip().splitlines() or ["no reason given"]
            raise EvalError(f"{IK_PACKAGE} cannot be installed: {lines[-1]}")
    return python


@contextmanager
def busy_loop(wanted: bool) -> Iterator[None]:
    """Keep one processor busy, if ``wanted``: what a measurement meets on a machine that has other work."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()

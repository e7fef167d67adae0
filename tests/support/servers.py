"""llama-server as the tests run it, whoever compiled it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serving(command: Sequence[object], log: Path, cwd: Path | None = None) -> Iterator[str]:
    """The address of the server that ``command`` starts, once it is healthy; it writes to ``log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*map(str, command), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("wb") as out,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd) as process,
    ):
        try:
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"{url}/health") as reply:
                        if reply.status == 200:
                            break
                except (urllib.error.URLError, ConnectionError):
                    assert process.poll() is None, log.read_text(errors="replace")[-4000:]
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def post(url: str, **body: object) -> Any:
    """The reply to a request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)

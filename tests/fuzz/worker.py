"""The process that runs commands: a request and a verdict per line, each as JSON.

``{"index": i, "run": r, "kinds": [..]}`` makes an input and judges it, ``{"target": name}`` takes the intact one, or
with ``"folder": path`` that which lies there.  Memory is limited to what some intact inputs take and ``ALLOWANCE``: an
allocation above that is a ``MemoryError``, and so a failure of its input.  An output of more than ``ALLOWANCE`` cannot
be written, which is a failure as well.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from .judge import judge
from .mutate import Files
from .seeds import seed
from .targets import make_input, target_of, targets

ALLOWANCE = 64 << 20
"""Bytes of address space above what the process has after it has run a command of every kind."""


def read_files(folder: Path) -> Files:
    """The files below ``in`` and ``out`` of a folder."""
    paths = [path for below in ("in", "out") for path in (folder / below).glob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def limit() -> None:
    """From here on memory for ``ALLOWANCE`` more, and files that are no larger."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWANCE, used + ALLOWANCE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (ALLOWANCE, ALLOWANCE))


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like a reply
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where fsync costs nothing
    with tempfile.TemporaryDirectory(prefix="ccq-fuzz-", dir=in_memory) as name:
        folder = Path(name)
        for group in targets().values():  # imports, caches, and pools of threads
            judge(group[0], seed(group[0].seed), folder)
        limit()
        print("ready", file=replies)
        for line in sys.stdin:
            request = json.loads(line)
            if "index" in request:
                target, files = make_input(request["index"], request["run"], request["kinds"])
            else:
                target = target_of(request["target"])
                files = read_files(Path(request["folder"])) if "folder" in request else seed(target.seed)
            print(
                json.dumps({"target": target.name, "kind": target.kind, **asdict(judge(target, files, folder))}),
                file=replies,
            )


if __name__ == "__main__":
    main()

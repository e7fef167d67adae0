"""What this machine has."""

from __future__ import annotations

import os
import re
from pathlib import Path


def cpu_count() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """The memory that is free, in bytes; 8 GiB where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 8 << 30
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 8 << 30

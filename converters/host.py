"""What this machine has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_count() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int:
    """The memory that is free, in bytes, to this machine and within the limits of control groups (containers, services,
    batch jobs); 8 GiB where the system does not say.  ``root``: where the system's files are."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return min([int(match[1]) * 1024 if match else 8 << 30, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the memory controllers leave, of this process's group and of those around it.  Files that were read and can
    be dropped count as free, as in MemAvailable."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        second = number == "0" and not controllers
        if not second and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup" if second else "sys/fs/cgroup/memory")
        names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inside = PurePosixPath(group.lstrip("/"))
        for folder in (mount / inside, *(mount / parent for parent in inside.parents)):
            limit, used = (_read(folder / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():  # "max": none
                # In the first version only the total is that of the groups inside as well, as in the second all are.
                cached: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.MULTILINE))
                files = cached.get("total_inactive_file", cached.get("inactive_file", "0"))
                yield max(0, int(limit) - int(used) + int(files))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

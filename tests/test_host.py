"""What this machine has: memory, within the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccq_converters.host import free_memory

MB = 1 << 20


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


SECOND = {
    "proc/self/cgroup": "0::/user.slice/job",
    "sys/fs/cgroup/user.slice/job/memory.max": "max",
    "sys/fs/cgroup/user.slice/job/memory.current": str(60 * MB),
    "sys/fs/cgroup/user.slice/memory.max": str(100 * MB),
    "sys/fs/cgroup/user.slice/memory.current": str(70 * MB),
    "sys/fs/cgroup/user.slice/memory.stat": f"active_file 1\ninactive_file {15 * MB}",
}
FIRST = {
    "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a/b\n1:name=systemd:/a",
    "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": str(1 << 62),
    "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": str(60 * MB),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(100 * MB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(70 * MB),
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {15 * MB}",
}
CONTAINER = {
    "proc/self/cgroup": "0::/",
    "sys/fs/cgroup/memory.max": str(100 * MB),
    "sys/fs/cgroup/memory.current": str(55 * MB),
}


@pytest.mark.parametrize(
    ("files", "free"),
    [({}, 200), ({"proc/self/cgroup": "0::/"}, 200), (SECOND, 45), (FIRST, 45), (CONTAINER, 45)],
    ids=["none", "no limit", "version 2", "version 1", "container"],
)
def test_free_memory(tmp_path: Path, files: dict[str, str], free: int) -> None:
    write(tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {200 * MB // 1024} kB", **files})
    assert free_memory(tmp_path) == free * MB


def test_more_allowed_than_there_is(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": f"MemAvailable: {20 * MB // 1024} kB", **SECOND})
    assert free_memory(tmp_path) == 20 * MB


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == 8 << 30

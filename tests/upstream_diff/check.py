"""Whether the newest llama.cpp still fits (``make upstream-check``).

Fetches the newest source archive of every package of ``fetch.ARCHIVES`` and says what no longer fits: an anchor of
``ccq-convert integrate``, or a struct that ``backend/ggml/host_abi.h`` declares.  Exit code 1 if something does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from upstream_diff.fetch import ARCHIVES, CACHE, fetch

from ccq_converters.integrate import Integration
from ccq_format.errors import IntegrationError

PROJECT = Path(__file__).parents[2]


def misfits(tree: Path) -> list[str]:
    """What does not fit a tree, for people."""
    found = []
    try:
        integration = Integration(tree)
        if integration.cuda_script:
            integration = Integration(tree, cuda=True)
        integration.integrate(dry_run=True)
    except IntegrationError as error:
        return [str(error)]
    if integration.family == "llama.cpp":  # the plugin is for no other
        headers = [PROJECT / "backend/ggml", *(tree / "ggml" / part for part in ("include", "src", "src/ggml-cpu"))]
        command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", *(f"-I{path}" for path in headers)]
        result = subprocess.run([*command, PROJECT / "tests/plugin/abi_check.cpp"], stderr=subprocess.PIPE, text=True)
        found += [line for line in result.stderr.splitlines() if "error:" in line]
    return found


def main() -> int:
    """Check all; returns the exit code."""
    bad = False
    for archive in ARCHIVES.values():
        folder = fetch(archive.package, None, CACHE)
        found = misfits(folder / archive.tree)
        version = folder.name.rpartition("-")[2]
        print(f"{archive.package} {version} (pinned: {archive.version}): {'; '.join(found) or 'fits'}")
        bad = bad or bool(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

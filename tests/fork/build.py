"""Compile the CCQ types into source trees of llama.cpp and of a fork (``make fork``).

Each tree is unpacked from its source archive to ``build/fork/PACKAGE``, integrated with the installed ``ccq-convert``
and compiled there; what is there already is updated.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

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
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
]


@dataclass(frozen=True)
class Kind:
    """A way to compile a tree: its build folder there, CMake's options, and the targets instead of ``TARGETS``; with
    them it is for llama.cpp alone.  ``cuda``: with kernels for NVIDIA GPUs."""

    folder: str
    options: tuple[str, ...]
    targets: tuple[str, ...] = ()
    cuda: bool = False


KINDS = {
    "static": Kind("build", ("-DBUILD_SHARED_LIBS=OFF",)),
    "shared": Kind("build-shared", ("-DBUILD_SHARED_LIBS=ON",)),
    # The CPU backend in variants for many CPUs, one of which is loaded when a program starts.  So a program that is
    # linked to it, such as test-quantize-fns, cannot be built.
    "variants": Kind(
        "build-variants",
        ("-DBUILD_SHARED_LIBS=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON", "-DGGML_NATIVE=OFF"),
        tuple(target for target in TARGETS["llama.cpp"] if target != "test-quantize-fns"),
    ),
    # Runs in qemu-user: static, so that it needs no libraries, and the smallest program that prints a greedy text.
    "aarch64": Kind(
        "build-aarch64",
        (
            "-DBUILD_SHARED_LIBS=OFF",
            "-DGGML_NATIVE=OFF",
            "-DGGML_OPENMP=OFF",  # whose library CMake finds as a shared one
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
            "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",
        ),
        ("llama-simple",),
    ),
    # PTX for all GPUs from Turing on, compiled further on the machine that runs it; CUDAARCHS names others.  Flash
    # attention would be most of what is compiled, and without virtual memory the driver's library need not be there.
    "cuda": Kind(
        "build-cuda",
        (
            "-DBUILD_SHARED_LIBS=OFF",
            "-DGGML_CUDA=ON",
            "-DGGML_CUDA_FA=OFF",
            "-DGGML_CUDA_NO_VMM=ON",
            f"-DCMAKE_CUDA_ARCHITECTURES={os.environ.get('CUDAARCHS', '75-virtual')}",
        ),
        ("llama-completion", "llama-bench", "test-backend-ops"),
        cuda=True,
    ),
}


BUILD_INFO = "common/cmake/build-info-gen-cpp.cmake"
"""A file of ik_llama.cpp that its tools cannot be compiled without, and that the source archive leaves out."""

BUILD_INFO_TEXT = """\
set(BUILD_NUMBER 0)
configure_file(common/build-info.cpp.in common/build-info.cpp @ONLY)
"""


def build(package: str, kind: Kind) -> None:
    """Unpack, integrate and compile one tree."""
    tree = ROOT / package
    if not tree.exists():
        partial = ROOT / f".{package}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source_tree(package), partial)
        if (partial / FAMILIES["ik_llama.cpp"]).is_file() and not (partial / BUILD_INFO).exists():
            (partial / BUILD_INFO).parent.mkdir(exist_ok=True)
            (partial / BUILD_INFO).write_text(BUILD_INFO_TEXT)
        partial.rename(tree)
    if kind.targets and Integration(tree).family != "llama.cpp":
        raise click.ClickException(
            f"{package} can only be compiled as {' or '.join(k for k in KINDS if not KINDS[k].targets)}"
        )
    integration = Integration(tree, cuda=kind.cuda)
    for line in integration.integrate():
        print(line)
    jobs = os.environ.get("JOBS", str(os.cpu_count() or 1))
    folder = tree / kind.folder
    options = [*OPTIONS, *kind.options]
    subprocess.run(["cmake", "-G", "Ninja", "-S", tree, "-B", folder, *options], check=True, stdout=subprocess.DEVNULL)
    targets = kind.targets or TARGETS[integration.family]
    subprocess.run(["cmake", "--build", folder, "-j", jobs, "--target", *targets], check=True)


@click.command(help=__doc__)
@click.option("--kind", type=click.Choice(list(KINDS)), default="static", show_default=True)
@click.argument("packages", nargs=-1, required=True, type=click.Choice(list(ARCHIVES)))
def main(kind: str, packages: tuple[str, ...]) -> None:
    for package in packages:
        build(package, KINDS[kind])


if __name__ == "__main__":
    main()

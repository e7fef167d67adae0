"""Static evidence about the CUDA kernels: registers, local memory and instructions per weight of every kernel.

Compiles ``backend/cuda`` for each architecture, disassembles it and counts the instructions in the main loop of every
kernel: all of them, loads, address arithmetic and scaling included.  With ``--llama`` and ``--ik``, source trees of
llama.cpp and ik_llama.cpp (both come in the source archives of the Python packages ``llama-cpp-python`` and
``ik-llama-cpp-python``), their matrix-vector kernels for one column of 2-bit types are compiled by the same nvcc and
counted in the same way.

This shows what a GPU has to execute, not how long that takes.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

TRELLIS = {  # bits and groups of a block
    (128, 2): "CCQ_T1",
    (96, 1): "CCQ_T1_5",
    (128, 1): "CCQ_T2",
    (160, 1): "CCQ_T2_5",
    (192, 1): "CCQ_T3",
}
PAPER = {"paper_p2": "CCQ_P2", "paper_p2_5": "CCQ_P2_5", "paper_p2_75": "CCQ_P2_75"}


@dataclass(frozen=True)
class Peer:
    """A kernel of another project: where it is, up to where its file is used, and what a pass through its loop does."""

    name: str
    project: str
    source: str
    end: str
    kernel: str
    weights: int  # of one call of its dot product,
    dots: int  # which has this many dp4a


PEERS = (
    Peer(
        "IQ2_XXS",
        "llama",
        "ggml/src/ggml-cuda/mmvq.cu",
        "template<ggml_type type>\nstatic std::pair<dim3, dim3> calc_launch_params",
        "mul_mat_vec_q<GGML_TYPE_IQ2_XXS, 1, false>",
        32,
        8,
    ),
    Peer(
        "Q2_K",
        "llama",
        "ggml/src/ggml-cuda/mmvq.cu",
        "template<ggml_type type>\nstatic std::pair<dim3, dim3> calc_launch_params",
        "mul_mat_vec_q<GGML_TYPE_Q2_K, 1, false>",
        16,
        8,
    ),
    Peer(
        "IQ2_KT",
        "ik",
        "ggml/src/ggml-cuda/template-instances/mmvq-instance-iq2_kt.cu",
        "void mul_mat_vec_iq2_kt_q8_1_cuda",
        "iqk_mul_mat_vec_q<GGML_TYPE_IQ2_KT, VDR_IQ4_KS_Q8_1_MMVQ, vec_dot_iq2_kt_q8_1, 1>",
        32,
        40,
    ),
)

# What ggml's common.cuh names of cuBLAS; no kernel counted here uses it.
CUBLAS = """#pragma once
#include <library_types.h>
typedef struct cublasContext * cublasHandle_t;
typedef int cublasStatus_t;
typedef int cublasMath_t;
typedef int cublasGemmAlgo_t;
typedef int cublasOperation_t;
typedef int cublasComputeType_t;
enum { CUBLAS_STATUS_SUCCESS, CUBLAS_TF32_TENSOR_OP_MATH, CUBLAS_STATUS_NOT_SUPPORTED };
const char * cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasSetMathMode(cublasHandle_t, int);
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t);
"""

Instruction = tuple[int, str, str]


def shell(*args: str) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(args, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(args)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def functions(listing: str) -> dict[str, list[Instruction]]:
    """Kernel -> (address, operation, operands) from ``cuobjdump -sass``."""
    out: dict[str, list[Instruction]] = {}
    name = ""
    for line in listing.splitlines():
        if m := re.match(r"\s*Function : (\S+)", line):
            name = m[1]
            out[name] = []
        elif name and (m := re.match(r"\s*/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line)):
            out[name].append((int(m[1], 16), m[2], m[3]))
    return out


def main_loop(body: list[Instruction]) -> Counter[str]:
    """Operations, without modifiers, of the smallest backward branch's body with the most dot products (or mma)."""
    best: Counter[str] = Counter()
    for at, op, operands in body:
        target = re.search(r"0x([0-9a-f]+)", operands) if op.startswith("BRA") else None
        if target and (start := int(target[1], 16)) < at:
            ops = Counter(o.split(".")[0] for a, o, _ in body if start <= a <= at and o != "NOP")
            if (ops["IDP"] + ops["IMMA"], -ops.total()) > (best["IDP"] + best["IMMA"], -best.total()):
                best = ops
    return best


def usage(log: str) -> dict[str, tuple[int, int]]:
    """Kernel -> registers, bytes of local memory (spills included) from ``ptxas -v``."""
    out: dict[str, tuple[int, int]] = {}
    name, local = "", 0
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            name = m[1]
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            local = sum(map(int, m.groups()))
        elif m := re.search(r"Used (\d+) registers", line):
            out[name] = int(m[1]), local
    return out


def compiled(
    source: Path, arch: str, cuobjdump: str, build: Path, flags: tuple[str, ...]
) -> tuple[dict[str, list[Instruction]], dict[str, tuple[int, int]]]:
    """Disassembly and usage of a source file's kernels."""
    cubin = str(build / "kernels.cubin")
    log = shell(
        "nvcc", f"-arch={arch}", "-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", *flags, str(source), "-o", cubin
    )
    return functions(shell(cuobjdump, "-sass", cubin)), usage(log)


def our_name(kernel: str) -> tuple[str, str, int, int] | None:
    """Kernel, type, columns, rows a thread of one of our products, from its mangled name."""
    kind = next((k for k in ("mat_vec", "mat_mul") if k in kernel), None)
    if kind is None:
        return None
    if m := re.search(r"trellisILi(\d+)ELi(\d+)", kernel):
        name = TRELLIS[int(m[1]), int(m[2])]
    else:
        m = re.search(r"\d(paper_p2(?:_75|_5)?)E", kernel)
        assert m is not None
        name = PAPER[m[1]]
    m = re.search(r"ELi(\d+)ELi(\d+)EEEvNS_7product", kernel)
    return kind, name, int(m[1]) if m else 64, int(m[2]) if m else 1


def rows(arch: str, cuobjdump: str, build: Path, trees: dict[str, Path | None]) -> Iterator[dict[str, object]]:
    """The table's rows for one architecture."""
    bodies: dict[str, list[Instruction]] = {}
    used: dict[str, tuple[int, int]] = {}
    for unit in ("ccq_cuda.cu", "encode.cu"):
        some = compiled(ROOT / "backend" / "cuda" / unit, arch, cuobjdump, build, ("-fmad=false",))
        bodies.update(some[0])
        used.update(some[1])
    for kernel, body in bodies.items():
        registers, local = used[kernel]
        product = our_name(kernel)
        kind = re.match(r"_ZN3ccq\d+([a-z_]+)", kernel)
        row: dict[str, object] = {"arch": arch, "project": "ccq", "registers": registers, "local_bytes": local}
        if product is None:
            code = re.search(r"\dcode_(t\d(?:_5)?)E", kernel)  # of an encoder
            row |= {"kernel": kind[1] if kind else kernel, "type": f"CCQ_{code[1].upper()}" if code else ""}
            yield row | dict.fromkeys(("columns", "rows", "loop", "per_weight", "operations"), "")
            continue
        name, type_name, columns, n_rows = product
        ops = main_loop(body)
        # mat_mul: a pass decodes 2 groups of 64 rows and multiplies both; its inner loop over groups is counted alone.
        weights = 64 * n_rows if name == "mat_vec" else ""
        yield row | {
            "kernel": name,
            "type": type_name,
            "columns": columns,
            "rows": n_rows if name == "mat_vec" else "",
            "loop": ops.total(),
            "per_weight": f"{ops.total() / weights:.2f}" if isinstance(weights, int) else "",
            "operations": " ".join(f"{n}*{op}" for op, n in ops.most_common()),
        }
    for peer in PEERS:
        tree = trees[peer.project]
        if tree is None:
            continue
        file = tree / peer.source
        text = file.read_text(encoding="utf-8")
        text = text[: text.index(peer.end)] + f"\nvoid * counted() {{ return (void *)&{peer.kernel}; }}\n"
        text = re.sub(r'#include "\.\./', '#include "', text)
        source = build / "peer.cu"
        source.write_text(text, encoding="utf-8")
        (build / "cublas_v2.h").write_text(CUBLAS, encoding="utf-8")
        folders = (build, tree / "ggml/src/ggml-cuda", tree / "ggml/src", tree / "ggml/include")
        defines = ("-DGGML_CUDA_FUSION=1", "-DGGML_CUDA_MIN_BATCH_OFFLOAD=32")  # build options of ik_llama.cpp
        flags = (
            "-use_fast_math",
            *defines,
            "-extended-lambda",
            "--expt-relaxed-constexpr",
            "-w",
            *(f"-I{f}" for f in folders),
        )
        bodies, used = compiled(source, arch, cuobjdump, build, flags)
        ((kernel, body),) = ((k, b) for k, b in bodies.items() if "mul_mat_vec_q" in k)
        ops = main_loop(body)
        calls = ops["IDP"] / peer.dots
        registers, local = used[kernel]
        yield {
            "arch": arch,
            "project": {"llama": "llama.cpp", "ik": "ik_llama.cpp"}[peer.project],
            "registers": registers,
            "local_bytes": local,
            "kernel": "mul_mat_vec_q",
            "type": peer.name,
            "columns": 1,
            "rows": "",
            "loop": ops.total(),
            "per_weight": f"{ops.total() / (peer.weights * calls):.2f}" if calls else "",
            "operations": " ".join(f"{n}*{op}" for op, n in ops.most_common()),
        }


@click.command()
@click.option("--arch", "archs", multiple=True, default=("sm_75", "sm_86", "sm_90", "sm_120"), show_default=True)
@click.option("--llama", type=click.Path(exists=True, file_okay=False, path_type=Path), help="source tree of llama.cpp")
@click.option("--ik", type=click.Path(exists=True, file_okay=False, path_type=Path), help="source tree of ik_llama.cpp")
@click.option("--cuobjdump", default=shutil.which("cuobjdump") or "cuobjdump", show_default=True)
@click.option(
    "--out",
    default=HERE / "results" / "instructions.csv",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default=True,
)
def main(archs: tuple[str, ...], llama: Path | None, ik: Path | None, cuobjdump: str, out: Path) -> None:
    """Count, print and write a CSV file."""
    columns = ["arch", "project", "kernel", "type", "columns", "rows", "registers", "local_bytes", "loop", "per_weight"]
    table: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            table += sorted(
                rows(arch, cuobjdump, Path(folder), {"llama": llama, "ik": ik}),
                key=lambda r: [str(r[c]) for c in ("project", "kernel", "type", "columns", "rows")],
            )
    with out.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [*columns, "operations"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        click.echo(
            "  ".join(f"{row[c]!s:>{w}}" for c, w in zip(columns, (6, 12, 14, 10, 4, 4, 4, 4, 5, 6), strict=True))
        )
    if any(r["local_bytes"] for r in table if r["project"] == "ccq"):
        raise click.ClickException("a kernel uses local memory")


if __name__ == "__main__":
    main()

"""Check the extraction candidates of ``extract/`` and count their instructions per 64 weights.

Counted are the instructions between loading the code bytes and 12-bit windows in 16-bit lanes (CUDA: in registers),
from the disassembly of each function.  Loads, stores, constants and register copies are listed apart: constants stay
in registers in a kernel's loop, and the counts of a table operand read from memory stay the same.  Tools that are
missing (aarch64 cross compiler, qemu, nvcc, cuobjdump) leave their rows out, with a note.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from ccq_format.layouts import GROUP, LAYOUTS, TrellisCode  # noqa: E402

CODES = [(x.name, x.code) for x in LAYOUTS if isinstance(x.code, TrellisCode) and x.code.steps == GROUP]

# What follows extraction, per vector of windows: (lanes, instructions), see README.md.
AFTER = {"avx2": (16, 5), "avx512bw": (32, 5), "avx512vbmi": (32, 3), "avx512vbmi2": (32, 3), "neon": (8, 3)}


@dataclass(frozen=True)
class Target:
    """How to build, check and disassemble one source file."""

    source: str
    compiler: str
    flags: tuple[str, ...]
    check_flags: tuple[str, ...]
    objdump: str
    runner: tuple[str, ...] = ()


TARGETS = (
    Target("avx2.c", "cc", ("-mavx2",), ("-mavx2",), "objdump"),
    Target(
        "avx512.c",
        "cc",
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vbmi2"),
        ("-mavx2", "-DEMULATED", "-Wno-psabi"),
        "objdump",
    ),
    Target("neon.c", "aarch64-linux-gnu-gcc", (), ("-static",), "aarch64-linux-gnu-objdump", ("qemu-aarch64",)),
)

# Neither counted as extraction nor a memory access: constants, copies, and what a standalone function adds.
SCALAR = re.compile(
    r"^(ret|vzeroupper|endbr64|nop\w*|mov|movk|movz|movabs|lea|xor|adrp|add|sub|kmov\w|mvni|movi|dup|push|pop)$"
)
COPY = re.compile(r"^(vmov[dq]|vmovdq\w+|vmovap\w|vpbroadcast\w)$")
SASS_OTHER = re.compile(r"^(NOP|BRA|EXIT|MOV|IMAD\.(MOV|WIDE|SHL)|S2U?R|U?LDCU?|LDG|STG)")
MEMORY = re.compile(r"^(ld\w+|st\w+|vbroadcasti\w+)$")


def header() -> str:
    """``codes.h``: the format's constants as C."""
    code, quoted = CODES[0][1], ", ".join(f'"{n.upper()}"' for n, _ in CODES)
    rows = [
        f"#define WINDOW_BITS {code.window_bits}",
        f"#define FIELD_MASK {code.field_mask}",
        *(f"#define MULTIPLIER_{n.removeprefix('ccq_').upper()} {c.multiplier}u" for n, c in CODES),
        f"static const int CODE_BYTES[] = {{{', '.join(str(c.code_bits // 8) for _, c in CODES)}}};",
        f"static const char * const TYPE_NAMES[] = {{{quoted}}};",
        "static const int OFFSETS[][64] = {",
        *(f"    {{{', '.join(map(str, c.offsets))}}}," for _, c in CODES),
        "};",
    ]
    return "\n".join(rows) + "\n"


def shell(*args: str) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(args, check=True, capture_output=True, text=True).stdout


def classify(line: str) -> str:
    """``counted``, ``memory`` or ``other`` for one line ``mnemonic operands`` of an objdump disassembly."""
    op, _, operands = line.partition(" ")
    in_memory = "(" in operands or "[" in operands
    if MEMORY.match(op) or (COPY.match(op) and in_memory):
        return "memory"
    if SCALAR.match(op) or COPY.match(op):
        return "other"
    return "counted"


def functions(listing: str) -> dict[str, list[str]]:
    """Name -> instruction lines of an objdump listing."""
    out: dict[str, list[str]] = {}
    name = ""
    for line in listing.splitlines():
        if m := re.match(r"[0-9a-f]+ <([^>]+)>:", line):
            name = m[1]
            out[name] = []
        elif name and (m := re.match(r"\s+[0-9a-f]+:\s+(\S.*)", line)):
            out[name].append(re.sub(r"\s+", " ", m[1]).strip())
            if out[name][-1].startswith("ret"):
                name = ""  # what follows is padding
    return out


def cpu_rows(target: Target, build: Path) -> list[dict[str, object]]:
    """Check and count one CPU source file."""
    source, base = str(HERE / "extract" / target.source), ("-O3", "-Wall", "-Wextra", f"-I{build}")
    compiler = os.environ.get("CC", "cc") if target.compiler == "cc" else target.compiler
    program, obj = str(build / "check"), str(build / "counted.o")
    shell(compiler, *base, *target.check_flags, source, "-o", program)
    checked = [line.split(",") for line in shell(*target.runner, program).splitlines()]
    shell(compiler, *base, "-fno-tree-vectorize", *target.flags, "-c", source, "-o", obj)
    bodies = functions(shell(target.objdump, "-d", "--no-show-raw-insn", obj))
    rows: list[dict[str, object]] = []
    for name, type_name, blocks, result in checked:
        isa, arrangement = name.split("_")[:2]
        body = bodies[name]
        if any(line.startswith(("j", "b.", "cb", "call", "bl ")) for line in body):
            raise click.ClickException(f"{name} is not straight-line code")
        kinds = Counter(classify(line) for line in body)
        ops = Counter(line.split()[0] for line in body if classify(line) == "counted")
        lanes, each = AFTER[isa]
        extract = kinds["counted"] / int(blocks)
        rows.append(
            {
                "isa": isa,
                "arrangement": arrangement,
                "type": type_name,
                "blocks": blocks,
                "check": result,
                "extract": extract,
                "total": extract + 64 / lanes * each,
                "memory": kinds["memory"] / int(blocks),
                "instructions": " ".join(f"{n}*{op}" for op, n in sorted(ops.items())),
            }
        )
    return rows


def cuda_rows(cuobjdump: str, build: Path) -> list[dict[str, object]]:
    """Check the device functions as host code and count SASS for sm_86 and sm_90, less a kernel that only copies."""
    source, program = str(HERE / "extract" / "cuda.cu"), str(build / "check")
    shell(os.environ.get("CXX", "c++"), "-std=c++17", "-O1", f"-I{build}", "-x", "c++", source, "-o", program)
    checked = {line.split(",")[0]: line.split(",")[1:] for line in shell(program).splitlines()}
    rows: list[dict[str, object]] = []
    for arch in ("sm_86", "sm_90"):
        cubin = str(build / f"{arch}.cubin")
        shell("nvcc", f"-arch={arch}", "-cubin", "-O3", "-std=c++17", f"-I{build}", source, "-o", cubin)
        bodies: dict[str, Counter[str]] = {}
        name = ""
        for line in shell(cuobjdump, "-sass", cubin).splitlines():
            if m := re.match(r"\s*Function : (\w+)", line):
                name = m[1]
                bodies[name] = Counter()
            elif m := re.match(r"\s*/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
                bodies[name][m[1]] += 1
        for counter in bodies.values():  # copies, addresses and memory; padding behind EXIT
            for op in [o for o in counter if SASS_OTHER.match(o)]:
                del counter[op]
        for name, counter in bodies.items():
            if name.startswith("copy"):
                continue
            kind, steps, type_name = name.split("_", 2)
            left = counter - bodies[f"copy_{steps}"] if kind == "windows" else counter - bodies["copy_dot"]
            if kind == "dot":
                left["IDP.4A.S8.S8"] += 8  # the eight dp4a of the baseline are part of the kernel
            per_block = left.total() * 64 // int(steps)
            rows.append(
                {
                    "isa": arch,
                    "arrangement": f"{steps}steps" if kind == "windows" else "16steps-whole",
                    "type": f"CCQ_{type_name}",
                    "blocks": 1,
                    "check": checked[f"windows_{steps}_{type_name}"][2],
                    "extract": per_block if kind == "windows" else "",
                    "total": per_block if kind == "dot" else "",
                    "memory": "",
                    "instructions": " ".join(f"{n}*{op}" for op, n in sorted(left.items())),
                }
            )
    return rows


@click.command()
@click.option(
    "--out",
    default=HERE / "results" / "instructions.csv",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default=True,
)
@click.option(
    "--cuobjdump", default=shutil.which("cuobjdump") or "cuobjdump", show_default=True, help="disassembler of SASS"
)
def main(out: Path, cuobjdump: str) -> None:
    """Check every candidate against the plain loop, count instructions, write a CSV file."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder)
        (build / "codes.h").write_text(header())
        for target in TARGETS:
            needs = [t for t in (target.compiler, target.objdump, *target.runner) if not shutil.which(t)]
            if needs:
                click.echo(f"{target.source}: left out, {', '.join(needs)} not found", err=True)
            else:
                rows += cpu_rows(target, build)
        if shutil.which("nvcc") and shutil.which(cuobjdump):
            rows += cuda_rows(cuobjdump, build)
        else:
            click.echo("cuda.cu: left out, nvcc or cuobjdump not found", err=True)
    with out.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for r in rows:
        counts = f"{r['check']:5} extract {r['extract']!s:6} total {r['total']!s:6} {r['instructions']}"
        click.echo(f"{r['isa']:12} {r['arrangement']:14} {r['type']:9} {counts}")
    if any(r["check"] != "ok" for r in rows):
        raise click.ClickException("a candidate differs from the plain loop")


if __name__ == "__main__":
    main()

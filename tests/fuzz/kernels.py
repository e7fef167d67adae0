"""``kernels.c`` under address and undefined-behaviour sanitizers, with every kernel set that this CPU runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import click

import ccq_backend

HERE = Path(__file__).parent
BATCH = 100
SECONDS = 600


def build(folder: Path) -> Path:
    """Compile into ``folder`` what is not compiled yet; the program.  Raises ``click.ClickException``."""
    if shutil.which("cmake") is None:
        raise click.ClickException("cmake is missing, which compiles the kernels under sanitizers (or say --kernels 0)")
    for command in (["-S", HERE, "-B", folder, "-DCMAKE_BUILD_TYPE=None"], ["--build", folder]):
        result = subprocess.run(["cmake", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise click.ClickException(f"cmake fails:\n{result.stdout}")
    return folder / "fuzz_kernels"


def cases(program: Path, isa: str, first: int, count: int) -> tuple[dict[int, str], str]:
    """What ``kernels.c`` printed for each case, and why it stopped before the last."""
    env = {**os.environ, "CCQ_ISA": isa, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    run = subprocess.run(
        [program, str(first), str(count)], capture_output=True, text=True, env=env, timeout=SECONDS, errors="replace"
    )
    lines = (line.partition(" ") for line in run.stdout.splitlines())
    return {int(number): rest for number, _, rest in lines}, run.stderr if run.returncode else ""


def fuzz(state: Path, count: int, run: int) -> int:
    """The first ``count`` cases of a run with every kernel set, but for those that went well before; how many failed.

    A set must print what the scalar one does: what that is meant to have in common is in the digest.
    """
    program = build(state / "kernels")
    done_file = state / f"kernels-{run}.txt"
    done_before = int(done_file.read_text()) if done_file.exists() else 0
    failed, first = 0, run * 10**9
    sets = [name for name, supported in reversed(ccq_backend.isas()) if supported]
    for start in range(first + done_before, first + count, BATCH):
        size = min(BATCH, first + count - start)
        scalar: dict[int, str] = {}
        for isa in sets:
            done, stopped = cases(program, isa, start, size)
            scalar = scalar or done
            if stopped:
                failed += 1
                click.echo(f"CCQ_ISA={isa} {program} {max(done, default=start - 1) + 1} 1\n{stopped[:6000]}")
            for number in [number for number in done if number in scalar and done[number] != scalar[number]]:
                failed += 1
                click.echo(f"CCQ_ISA={isa} {program} {number} 1: {done[number]}, scalar: {scalar[number]}")
        if not failed:
            done_file.write_text(str(start + size - first))
    click.echo(f"kernels: {max(count, done_before):,} cases with each of {', '.join(sets)}; {failed} went wrong")
    return failed

#!/usr/bin/env python3
"""Run every kernel set, also those that this CPU does not have, and compare what they compute alike, bit for bit.

``kernel_digest.c`` is linked with the library's sources, compiled with the library's flags (its CMake target), checks
products with up to 32 columns against their bound, and prints a digest per type and operation: decoding, encoding
(plain, with importance, with coupled errors, with given scales) and all metrics of the Viterbi search.  It runs

* **natively**: scalar, and every set that this CPU has (AVX2, perhaps more);
* **AVX-512 in Bochs**, with and without VBMI and VNNI.  Bochs emulates CPU models instruction by instruction: a Debian
  kernel boots from an ISO image with the static program as its /init, output comes over the serial port.  The emulated
  CPU runs AVX2 too: if that differs from the native run, the emulator is wrong and not the kernels;
* **aarch64 in qemu-user**, which emulates CPUs without dot products, with them, and with int8 matrix products: another
  compiler back end, another libc, another default NaN.

QEMU's TCG and valgrind are no help with AVX-512, they do not emulate it.  No emulator here knows AMX or AVX-VNNI: those
sets are run only where the CPU has them, and the output says so.  The check fails unless each place ran the sets it
should, to the end, ``avx512`` under that name and from an object whose Viterbi steps use zmm registers, and all digests
are those of the native scalar run.

Nothing is installed and no root is needed: what is built and fetched (26 MB, Debian's kernel for virtual machines) goes
into ``.cache/isa``.  Another bzImage with a serial console and an initramfs will do: ``--kernel``.

Exit codes: 0 all equal; 1 not so; 2 a tool is missing (which one, and its Debian package, is said).
"""

from __future__ import annotations

import os
import platform
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "isa"
ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
TERM_GUI = Path("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so")

# What each target needs: a program or a file, and the Debian package that has it.
TOOLS: dict[str, dict[str | Path, str]] = {
    "native": {"cmake": "cmake", "make": "make", "cc": "gcc", "objdump": "binutils"},
    "avx512": {
        "bochs": "bochs",
        TERM_GUI: "bochs-term",
        BIOS: "bochsbios",
        VGA_BIOS: "bochs",
        "xorriso": "xorriso",
        ISOLINUX: "isolinux",
        LDLINUX: "syslinux-common",
    },
    "aarch64": {"aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross", "qemu-aarch64": "qemu-user"},
}
KERNEL_PACKAGE = "linux-image-cloud-amd64"

# Bochs 2.7 reports the wrong size for the compacted XSAVE area, and with protection keys a wrong offset, on which Linux
# gives up all of AVX: hide XSAVEC, XSAVES and PKU.  With FSRM (fast short copies) the kernel hangs early.  quiet:
# messages of the kernel would fall into the program's lines.  What follows the dashes goes to /init.
EMULATED = ("avx512_vbmi", "avx512", "avx2")
CMDLINE = "console=ttyS0 quiet mitigations=off clearcpuid=xsavec,xsaves,pku,fsrm -- " + " ".join(EMULATED)
BOCHSRC = """\
display_library: term
megs: 256
cpu: model={cpu}, count=1, ips=50000000, reset_on_triple_fault=0
romimage: file={bios}
vgaromimage: file={vga_bios}
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={iso}, status=inserted
boot: cdrom
com1: enabled=1, mode=term, dev={tty}
clock: sync=none, time0=0
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
"""


# The sets that QEMU's aarch64 CPUs run; the last one has all that is emulated.
ARM_SETS = {
    "cortex-a72": {"neon", "scalar"},
    "neoverse-n1": {"neon_dotprod", "neon", "scalar"},
    "max": {"neon_i8mm", "neon_dotprod", "neon", "scalar"},
}


class MissingTool(Exception):
    """The message says what has to be installed first."""


@dataclass
class Run:
    """What one run of kernel_digest printed."""

    place: str
    sets: dict[str, bool] = field(default_factory=dict)  # of the build; whether that CPU runs it
    digests: dict[str, dict[str, str]] = field(default_factory=dict)  # by set, by "type operation"
    complete: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    done: bool = False

    def feed(self, line: str) -> None:
        """Take one line of output; those that are not the program's (boot messages) are passed over."""
        words = line.split()
        if words[:1] == ["sets"]:
            self.sets = {name: value == "1" for name, value in (word.split("=") for word in words[1:])}
        elif words[:1] == ["begin"] and len(words) == 2:
            self.digests[words[1]] = {}
        elif len(words) == 4 and words[0] in self.digests and re.fullmatch("[0-9a-f]{16}", words[3]):
            self.digests[words[0]][f"{words[1]} {words[2]}"] = words[3]
        elif words[:1] == ["end"] and len(words) == 3 and len(self.digests.get(words[1], ())) == int(words[2]):
            self.complete.add(words[1])
            click.echo(f"  {self.place}: {words[1]}, {words[2]} digests")
        elif words[:1] in (["failed"], ["error"]) or "Kernel panic" in line:
            self.errors.append(line.strip())
        elif words[:1] == ["done"]:
            self.done = True

    def problems(self, expected: set[str], reference: dict[str, str]) -> list[str]:
        """Why this run does not pass; empty if it does."""
        found = [f"{self.place}: {error}" for error in self.errors]
        if not self.done:
            found.append(f"{self.place}: the program did not come to its end")
        found += [f"{self.place}: {name} did not run to its end" for name in sorted(expected - self.complete)]
        for name in sorted(self.complete):
            digests = self.digests[name]
            keys = sorted(reference.keys() | digests.keys())
            if wrong := [key for key in keys if digests.get(key) != reference.get(key)]:
                which = ", ".join(wrong[:8])
                found.append(f"{self.place}: {name}: {len(wrong)} of {len(keys)} digests differ: {which}")
        return found


def need(*targets: str) -> None:
    """Raise MissingTool unless everything that the targets need is there."""
    tools = {tool: package for target in targets for tool, package in TOOLS[target].items()}
    missing = [tool for tool in tools if not (tool.exists() if isinstance(tool, Path) else shutil.which(tool))]
    if missing:
        packages = " ".join(sorted({tools[tool] for tool in missing}))
        raise MissingTool(f"{', '.join(map(str, missing))} missing: on Debian, apt-get install {packages}")


def call(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program; its output, or ClickException with it."""
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def build(name: str, *options: str) -> Path:
    """Compile kernel_digest with the library's own CMake target; the path of the program."""
    call("cmake", "-S", HERE, "-B", CACHE / name, "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Release", *options)
    call("cmake", "--build", CACHE / name)
    return CACHE / name / "kernel_digest"


def zmm_instructions(folder: Path) -> dict[str, int]:
    """Instructions with a zmm register, by function, of the object file of the AVX-512 set."""
    text = call("objdump", "-d", folder / "kernels/CMakeFiles/ccq_kernels.dir/avx512/kernels.c.o")
    counts: dict[str, int] = {}
    function = ""
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+ <(\w+)", line):
            function = head[1]
        elif "%zmm" in line:
            counts[function] = counts.get(function, 0) + 1
    return counts


def run_program(place: str, *command: str | Path) -> Run:
    run = Run(place)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    for line in result.stdout.splitlines():
        run.feed(line)
    if result.returncode:
        run.errors.append(f"exit status {result.returncode}")
    return run


def debian_kernel() -> Path:
    """A bzImage from Debian's package, fetched into the cache."""
    found = sorted(CACHE.glob("kernel/boot/vmlinuz-*"))
    if not found:
        folder = CACHE / "kernel"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            names = re.findall(r"Depends: (linux-image-\S+)", call("apt-cache", "depends", KERNEL_PACKAGE))
            call("apt-get", "download", names[0], cwd=folder)
            call("dpkg-deb", "-x", next(folder.glob("*.deb")), folder)
        except (click.ClickException, OSError, IndexError) as e:
            raise MissingTool(f"avx512 needs a kernel: --kernel, or apt must have {KERNEL_PACKAGE} ({e})") from e
        shutil.rmtree(folder / "lib", ignore_errors=True)
        found = sorted(folder.glob("boot/vmlinuz-*"))
    return found[-1]


def cpio(entries: list[tuple[str, int, bytes, tuple[int, int]]]) -> bytes:
    """An initramfs ("newc"): entries are (path, mode, content, (major, minor))."""
    out = b""
    for inode, (path, mode, data, device) in enumerate([*entries, ("TRAILER!!!", 0, b"", (0, 0))], 1):
        name = path.encode() + b"\0"
        numbers = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0]
        out += b"070701" + b"".join(b"%08X" % number for number in numbers) + name
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return out


def boot_image(kernel: Path, program: Path) -> Path:
    """A bootable ISO image with the kernel and an initramfs whose /init is the program."""
    folder = CACHE / "iso"
    folder.mkdir(parents=True, exist_ok=True)
    console = ("dev/console", 0o20600, b"", (5, 1))
    init = ("init", 0o100755, program.read_bytes(), (0, 0))
    (folder / "initrd").write_bytes(cpio([("dev", 0o40755, b"", (0, 0)), console, init]))
    for source, name in ((kernel, "vmlinuz"), (ISOLINUX, "isolinux.bin"), (LDLINUX, "ldlinux.c32")):
        shutil.copyfile(source, folder / name)
    (folder / "isolinux.cfg").write_text(f"default ccq\nlabel ccq\n kernel vmlinuz\n append initrd=initrd {CMDLINE}\n")
    image = CACHE / "boot.iso"
    options = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    call("xorriso", "-as", "mkisofs", "-quiet", "-o", image, *options, folder)
    return image


def lines_until(terminal: int, process: subprocess.Popen[bytes], deadline: float) -> Iterator[str]:
    """Lines from a terminal while the process lives, until the deadline."""
    rest = b""
    while time.monotonic() < deadline and process.poll() is None:
        if select.select([terminal], [], [], 1.0)[0]:
            *whole, rest = (rest + os.read(terminal, 4096)).replace(b"\r", b"").split(b"\n")
            yield from (line.decode("ascii", "replace") for line in whole)


def run_bochs(image: Path, cpu: str, timeout: float) -> Run:
    """Boot the image in Bochs.  Its serial port is a pseudo-terminal: a file would be written in pieces of 4 KB."""
    run = Run(f"Bochs {cpu}")
    controller, terminal = pty.openpty()
    tty, log = os.ttyname(terminal), CACHE / "bochs.log"
    config = BOCHSRC.format(cpu=cpu, bios=BIOS, vga_bios=VGA_BIOS, iso=image, tty=tty, log=log)
    (CACHE / "bochsrc").write_text(config)
    (CACHE / "continue").write_text("c\n")  # Debian's Bochs has its debugger built in, which waits for a command
    command = ["bochs", "-q", "-f", str(CACHE / "bochsrc"), "-rc", str(CACHE / "continue")]
    with open(CACHE / "bochs.out", "wb") as output, open(CACHE / "serial.txt", "w", 1) as serial:
        env = {**os.environ, "TERM": "vt100"}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
        try:
            for line in lines_until(controller, process, time.monotonic() + timeout):
                serial.write(line + "\n")
                run.feed(line)
                if run.done or run.errors:
                    break
            if process.poll() is not None:
                run.errors.append(f"Bochs ended with status {process.returncode}: see {CACHE / 'bochs.out'} and {log}")
        finally:
            process.kill()  # it has no state worth keeping, and its debugger holds up SIGTERM
            process.wait()
            os.close(controller)
            os.close(terminal)
    return run


@click.command(help="Compare what all kernel sets compute, AVX-512 in Bochs and aarch64 in QEMU included.")
@click.option("--target", "targets", multiple=True, type=click.Choice(["avx512", "aarch64"]), help="default: both")
@click.option("--cpu", default="corei7_icelake_u", show_default=True, help="CPU model of Bochs")
@click.option("--kernel", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="a Linux bzImage")
@click.option("--timeout", default=1800.0, show_default=True, help="seconds for the emulated computer")
def main(targets: tuple[str, ...], cpu: str, kernel: Path | None, timeout: float) -> None:
    targets = targets or ("avx512", "aarch64")
    try:
        if platform.machine() != "x86_64":
            raise MissingTool("the native part needs an x86-64 computer: the AVX-512 program is compiled here")
        need("native", *targets)
        bzimage = (kernel or debian_kernel()) if "avx512" in targets else None
    except MissingTool as e:
        click.echo(f"not run: {e}", err=True)
        sys.exit(2)
    program = build("native")
    native = run_program("native", program)
    reference = native.digests.get("scalar", {})
    problems = native.problems({name for name, supported in native.sets.items() if supported} | {"scalar"}, reference)
    if "avx512" in targets and bzimage is not None:
        zmm = zmm_instructions(program.parent)
        click.echo("  zmm instructions: " + ", ".join(f"{name} {n}" for name, n in sorted(zmm.items())))
        problems += [f"avx512: {s} has no zmm" for s in ("step_12", "step_22", "step_23", "step_33") if s not in zmm]
        emulated = run_bochs(boot_image(bzimage, program), cpu, timeout)
        problems += emulated.problems(set(EMULATED), reference)
    if "aarch64" in targets:
        machine = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
        arm = build("aarch64", *machine, "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc")
        for model, sets in ARM_SETS.items():
            run = run_program(f"aarch64 {model}", "qemu-aarch64", "-cpu", model, arm)
            problems += run.problems(sets, reference)
            if run.complete - sets:
                problems.append(f"aarch64 {model}: says that it runs {', '.join(sorted(run.complete - sets))}")
    emulated_sets = set(EMULATED) if "avx512" in targets else set()
    if unchecked := [name for name, supported in native.sets.items() if not supported and name not in emulated_sets]:
        click.echo(f"  not run, this CPU lacks them: {', '.join(unchecked)}")
    for problem in problems:
        click.echo(problem, err=True)
    click.echo("FAILED" if problems else f"all sets agree: {len(reference)} digests each")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

"""Speed of every tensor type in llama.cpp, ours and llama.cpp's own, measured in turns: ``make bench``.

    python benchmarks/speed/bench.py --types ccq_t2,ccq_t3,q2_k,q3_k --out results.jsonl

Makes models of about 500 and 200 million random weights (a dense one and a mixture of experts), one file per type,
checks that the kernels agree with the decoded weights, and keeps all files open in one process per build of llama.cpp.
A round is one measurement of everything: a prompt of 512 tokens in one batch, and 64 tokens one after the other.  Other
work on the machine slows down all types of a round alike, so that the ratios within rounds, of which the median
counts, say more than the speeds.

All types together take 6 GB of disk, as much memory, and some minutes before the first round of the first run.
``tables.py`` makes the Markdown tables of the results.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import agreement
import click
from click.core import ParameterSource
from processes import IK, STOCK, Worker, busy_loop, install_ik
from random_models import (
    CCQ_TYPES,
    DENSE,
    IK_TYPES,
    MOE,
    STOCK_TYPES,
    Shape,
    bits_per_weight,
    model_file,
    remote_quantizer,
)
from records import WHATS, Measurement, line, machine_line, summarize
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tables import PEER, columns, three_digits

from ccq_format.errors import CcqError, EvalError

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "bench"

IK_PREFIX = "ik/"
IK_NAMES = tuple(IK_PREFIX + name for name in ("q2_k", *IK_TYPES))
NAMES = (*CCQ_TYPES, *STOCK_TYPES, *IK_NAMES)
SHAPES = {"dense": (DENSE,), "moe": (MOE,), "both": (DENSE, MOE)}

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The command line."""

    types: tuple[str, ...]
    threads: tuple[int, ...]
    shapes: tuple[Shape, ...]
    peer: str
    rounds: int
    budget: float
    out: Path
    cache: Path
    python: str
    isa: str | None
    ik: bool
    ik_python: str | None
    busy: bool
    command: str


@dataclass(frozen=True)
class Case:
    """One model of one type with a number of threads."""

    model: str
    type: str
    threads: int


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The items in the order of round ``number``: it begins a fifth of them later than the round before, so that the
    five rounds that there are at least have each of them early and late."""
    start = number * -(-len(items) // 5) % len(items)
    return [*items[start:], *items[:start]]


class Bench:
    """A run: the workers, and the models they have open."""

    def __init__(self, settings: Settings, stack: ExitStack, console: Console) -> None:
        """Starts the workers.  Raises ``EvalError`` if stock llama.cpp cannot be used; does without ik_llama.cpp."""
        self.settings = settings
        self.console = console
        environment = {} if settings.isa is None else {"CCQ_ISA": settings.isa}
        self.workers = {STOCK: stack.enter_context(Worker(STOCK, settings.python, environment))}
        self.types = settings.types
        if settings.ik:
            try:
                python = settings.ik_python or install_ik(settings.cache / "ik-venv")
                self.workers[IK] = stack.enter_context(Worker(IK, python))
            except EvalError as error:
                console.print(f"Going on without ik_llama.cpp: {error}", highlight=False)
                self.types = tuple(name for name in self.types if name not in IK_NAMES)
        self.files: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, dict[str, float]] = {}

    def worker(self, name: str) -> Worker:
        """The process that runs a type."""
        return self.workers[IK if name in IK_NAMES else STOCK]

    def check(self) -> None:
        """Compare every CCQ type's logits with those of the decoded weights.  Raises ``EvalError``."""
        s = self.settings
        for shape in s.shapes:
            errors = self.errors.setdefault(shape.name, {})
            for name in (name for name in self.types if name in CCQ_TYPES):
                with self.console.status(f"Checking {name}, {shape.name}"):
                    errors[name] = agreement.check(self.workers[STOCK], s.cache, shape, name, max(s.threads))
            if errors:
                worst = max(errors, key=lambda name: errors[name])
                self.console.print(
                    f"{shape.name}: logits agree with the decoded weights, relative error {errors[worst]:.1g} at most "
                    f"({worst}; bound {agreement.BOUND})",
                    highlight=False,
                )

    def open(self) -> None:
        """Make the files that are missing, and open all."""
        s = self.settings
        for shape in s.shapes:
            files = self.files.setdefault(shape.name, {})
            for name in self.types:
                with self.console.status(f"Opening {name}, {shape.name}"):
                    worker, type_name = self.worker(name), name.removeprefix(IK_PREFIX)
                    maker = worker if type_name in IK_TYPES else self.workers[STOCK]
                    path = model_file(s.cache, shape, type_name, remote_quantizer(maker.ask))
                    key = f"{shape.name}/{name}"
                    opened = worker.ask("open", name=key, path=str(path), threads=max(s.threads))
                    files[name] = {"bytes": path.stat().st_size, "buffers": opened["buffers"]}

    def machine(self) -> dict[str, Any]:
        """What the first line of the results says."""
        return {
            "date": datetime.now().astimezone().isoformat(timespec="minutes"),
            "command": self.settings.command,
            "cpu": cpu_model(),
            "cpus": os.cpu_count(),
            "kernels": self.workers[STOCK].versions.get("ccq kernels"),
            "versions": {name: value for w in self.workers.values() for name, value in w.versions.items()},
            "system": {build: w.system for build, w in self.workers.items()},
            "busy": self.settings.busy,
            "bits_per_weight": {name: bits_per_weight(name.removeprefix(IK_PREFIX)) for name in self.types},
            "relative_errors": self.errors,
            "files": self.files,
        }

    def measure(self) -> Iterator[Measurement]:
        """Rounds until the time is up."""
        s = self.settings
        cases = [Case(shape.name, name, threads) for shape in s.shapes for threads in s.threads for name in self.types]
        shown = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        start, number, last = time.monotonic(), 0, 0.0
        with Progress(*shown, console=self.console, transient=True) as progress:
            task = progress.add_task("")
            while number < s.rounds or time.monotonic() - start + last <= 60 * s.budget:
                began = time.monotonic()
                for i, case in enumerate(rotated(cases, number), 1):
                    progress.update(task, description=f"Round {number + 1}: {i} of {len(cases)}, {case.type}")
                    for what in WHATS:
                        request = {"name": f"{case.model}/{case.type}", "threads": case.threads, "what": what}
                        reply = self.worker(case.type).ask("measure", **request)
                        yield Measurement(
                            number, case.model, case.type, case.threads, what, reply["tokens"], reply["seconds"]
                        )
                number, last = number + 1, time.monotonic() - began
        self.console.print(f"Rounds: {number}, in {time.monotonic() - start:.0f} s", highlight=False)


def cpu_model() -> str:
    """The processor's name as Linux gives it."""
    try:
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown processor"


def print_summary(console: Console, measurements: Sequence[Measurement], peer: str) -> None:
    """One table per model: median tokens per second and the ratio to the peer, and under them the quartiles."""
    summaries = summarize(measurements, peer)
    for model in dict.fromkeys(s.model for s in summaries):
        rows = [s for s in summaries if s.model == model]
        heads = columns(rows)
        table = Table(title=f"{model}: tokens/s and ratio to {peer}, quartiles of {rows[0].rounds} rounds")
        table.add_column("type")
        for what, threads in heads:
            table.add_column(f"{what}\n{threads} thread{'s' if threads > 1 else ''}", justify="right")
        for name in dict.fromkeys(s.type for s in rows):
            cells = {}
            for s in (s for s in rows if s.type == name):
                ratio = f" ({s.ratio.median:.2f})" if s.ratio is not None else ""
                spread = f"{three_digits(s.speed.low)} to {three_digits(s.speed.high)}"
                cells[s.what, s.threads] = f"{three_digits(s.speed.median)}{ratio}\n{spread}"
            table.add_row(name, *(cells.get(head, "") for head in heads))
        console.print(table)


def run(settings: Settings) -> None:
    """Check, measure, record and print.  Raises ``CcqError``."""
    console = Console()
    with ExitStack() as stack:
        bench = Bench(settings, stack, console)
        for worker in bench.workers.values():
            versions = ", ".join(f"{name} {value}" for name, value in worker.versions.items())
            console.print(f"{worker.build}: {versions}", highlight=False)
        settings.cache.mkdir(parents=True, exist_ok=True)
        bench.check()
        bench.open()
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        measurements = []
        with settings.out.open("w", encoding="utf-8") as file, busy_loop(settings.busy):
            file.write(machine_line(bench.machine()) + "\n")
            for measurement in bench.measure():
                file.write(line(measurement) + "\n")
                file.flush()
                measurements.append(measurement)
    print_summary(console, measurements, settings.peer)
    console.print(f"Results: {settings.out}", highlight=False)


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    names = None if value is None else tuple(dict.fromkeys(value.lower().split(",")))
    for name in names or ():
        if name not in NAMES:
            raise click.BadParameter(f"'{name}' is none of {', '.join(NAMES)}")
    return names


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    numbers = tuple(dict.fromkeys(int(part) if part.isdecimal() else 0 for part in value.split(",")))
    if 0 in numbers:
        raise click.BadParameter(f"'{value}' is no list of positive numbers, as 1,2")
    return numbers


def command_line(context: click.Context) -> str:
    """The command that was given, without what only means something on this machine: files, folders, interpreters."""
    words = ["python", "benchmarks/speed/bench.py"]
    for option in context.command.params:
        assert option.name is not None
        given = context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if not given or option.name in ("out", "cache", "python", "ik_python"):
            continue
        value = context.params[option.name]
        if isinstance(value, bool):
            words.append((option.opts if value else option.secondary_opts)[0])
        else:
            words += [option.opts[0], ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


@click.command(help=(__doc__ or "").partition(":")[0] + ".")
@click.option("--types", callback=_names, help="Types to measure, separated by commas.  [default: all]")
@click.option("--threads", default="1,2", show_default=True, callback=_numbers, help="Numbers of threads.")
@click.option("--model", type=click.Choice([*SHAPES]), default="both", show_default=True, help="Models to measure.")
@click.option("--peer", type=click.Choice(NAMES), default=PEER, show_default=True, help="Type that ratios are to.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds at least.")
@click.option("--budget", type=click.FloatRange(0), default=12, show_default=True, help="Minutes that rounds may fill.")
@click.option("--out", type=click.Path(path_type=Path), help="File for the results.  [default: CACHE/speed.jsonl]")
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, help="Folder for models.  [.cache/bench]")
@click.option("--python", default=sys.executable, help="Interpreter with ccq and another llama.cpp.  [this one]")
@click.option("--isa", help="Kernel set, as CCQ_ISA.")
@click.option("--ik/--no-ik", help="Measure ik_llama.cpp as well; installed in CACHE.  [default: no]")
@click.option("--ik-python", help="Interpreter that has ik_llama_cpp, instead of the installed one.")
@click.option("--busy", is_flag=True, help="Beside a process that keeps one processor busy.")
@click.pass_context
def main(
    context: click.Context, /, model: str, out: Path | None, types: tuple[str, ...] | None, **options: Any
) -> None:
    """Parse the command line and run."""
    wanted = types or tuple(name for name in NAMES if options["ik"] or name not in IK_NAMES)
    wanted = tuple(dict.fromkeys((*wanted, options["peer"])))
    if not options["ik"] and any(name in IK_NAMES for name in wanted):
        raise click.UsageError("types of ik_llama.cpp need --ik")
    try:
        out = out or options["cache"] / "speed.jsonl"
        run(Settings(types=wanted, shapes=SHAPES[model], out=out, command=command_line(context), **options))
    except CcqError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()

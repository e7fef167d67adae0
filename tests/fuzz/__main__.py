"""``python -m fuzz``: see the package."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from . import corpus, kernels
from .minimise import minimise
from .mutate import Files
from .pool import Worker
from .seeds import seed, write_files
from .targets import Target, make_input, targets

BATCH = 200
"""Inputs between two notes of what is done."""


class Run:
    """A run that goes on where it was interrupted: its state is a file, written after each batch."""

    def __init__(self, run: int, kinds: tuple[str, ...], folder: Path, workers: int) -> None:
        self.run, self.kinds = run, kinds
        self._path = folder / f"run-{run}{''.join('-' + kind.replace(' ', '') for kind in kinds)}.json"
        state = json.loads(self._path.read_text()) if self._path.exists() else {"next": 0, "counts": {}, "faults": {}}
        self.next: int = state["next"]
        self.counts = Counter[str](state["counts"])
        self.faults: dict[str, list[int]] = state["faults"]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._workers = [Worker() for _ in range(workers)]
        self._checker = Worker()
        for worker in self._workers:
            self._idle.put(worker)

    def recheck(self) -> None:
        """Forget the faults of before that are mended."""
        for fault, indices in list(self.faults.items()):
            if self._ask(indices[0])["fault"] != fault:
                click.echo(f"mended: {fault}")
                del self.faults[fault]

    def go(self, count: int) -> None:
        """Judge inputs until ``count`` of the run are done."""
        with ThreadPoolExecutor(len(self._workers)) as pool:
            while self.next < count:
                indices = range(self.next, min(self.next + BATCH, count))
                for index, verdict in zip(indices, pool.map(self._ask, indices), strict=True):
                    self._count(index, verdict)
                self.next = indices.stop
                self._save()
                click.echo(f"\r{self.next:,} of {count:,}", nl=False, err=True)
            click.echo(err=True)

    def close(self) -> None:
        """End the processes."""
        for worker in (*self._workers, self._checker):
            worker.close()

    def _ask(self, index: int) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            return worker.ask({"index": index, "run": self.run, "kinds": self.kinds})
        finally:
            self._idle.put(worker)

    def _count(self, index: int, verdict: dict[str, Any]) -> None:
        target, files = None, None
        if "kind" not in verdict:
            target, files = make_input(index, self.run, self.kinds)
            verdict = {"kind": target.kind, **verdict}
        self.counts[f"{verdict['kind']}: {verdict['outcome']}"] += 1
        if verdict["fault"] is None:
            return
        seen = self.faults.setdefault(verdict["fault"], [])
        seen.append(index)
        if len(seen) == 1:
            target, files = make_input(index, self.run, self.kinds)
            self._keep(index, target, files, verdict)

    def _keep(self, index: int, target: Target, files: Files, verdict: dict[str, Any]) -> None:
        click.echo(f"\ninput {index}, {target.name}: {verdict['fault']}\n{verdict['detail']}")
        with TemporaryDirectory() as name:
            fault = check(self._checker, target, files, Path(name))
            if fault != verdict["fault"]:
                click.echo(f"alone it is: {fault}")
            if fault is not None:

                def fails(candidate: Files) -> bool:
                    return check(self._checker, target, candidate, Path(name)) == fault

                files = minimise(files, seed(target.seed), fails)
        if fault is not None:
            click.echo(f"kept as {corpus.save(target, files, fault)}")

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        state = {"next": self.next, "counts": self.counts, "faults": self.faults}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._path)

    def table(self) -> Table:
        """Inputs by kind and outcome."""
        shown = Table("input", "judged", "ok", "refused", "by error")
        for kind in targets():
            of_kind = {k.split(": ")[1]: n for k, n in self.counts.items() if k.split(": ")[0] == kind}
            total, ok = sum(of_kind.values()), of_kind.pop("ok", 0)
            failed = of_kind.pop("error", 0)
            errors = ", ".join(f"{name} {n}" for name, n in sorted(of_kind.items(), key=lambda item: -item[1]))
            shown.add_row(kind, f"{total:,}", f"{ok:,}", f"{total - ok - failed:,}", errors)
        shown.add_row("all", f"{sum(self.counts.values()):,}")
        return shown


def check(worker: Worker, target: Target, files: Files, folder: Path) -> str | None:
    """What is wrong with ``files``, which are put into ``folder``."""
    for below in ("in", "out"):
        for path in (folder / below).glob("*"):
            path.unlink()
    write_files(files, folder)
    fault: str | None = worker.ask({"target": target.name, "folder": str(folder)})["fault"]
    return fault


@click.command()
@click.option("--count", default=4000, show_default=True, help="Mutated inputs, counted from the start of the run.")
@click.option("--seed", "run", default=0, show_default=True, help="Number of the run: the same inputs every time.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(targets())), help="Only these inputs.  [all]")
@click.option("--workers", default=len(os.sched_getaffinity(0)), help="Processes.  [one per CPU]")
@click.option("--kernels", "cases", default=500, show_default=True, help="Cases for each kernel set, under sanitizers.")
@click.option("--state", type=click.Path(path_type=Path), default=Path(".cache/fuzz"), show_default=True)
def main(count: int, run: int, kinds: tuple[str, ...], workers: int, cases: int, state: Path) -> None:
    """Damage small inputs and run them through the commands; then run the C kernels under sanitizers.

    A repeated command goes on where the last one stopped.  What fails is made small and kept in tests/fuzz/corpus.
    """
    start = time.monotonic()
    session = Run(run, kinds, state, workers)
    first = session.next
    try:
        session.recheck()
        session.go(count)
    finally:
        session.close()
        Console(width=150).print(session.table())
    for fault, indices in session.faults.items():
        click.echo(f"{len(indices)} inputs, such as {indices[0]}: {fault}")
    click.echo(
        f"{session.next - first:,} inputs in {time.monotonic() - start:.0f} s; {session.next:,} of the run in all"
    )
    failed = kernels.fuzz(state, cases, run) if cases else 0
    sys.exit(1 if session.faults or failed else 0)


if __name__ == "__main__":
    main()

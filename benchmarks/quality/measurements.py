"""The quality table: which files are made, the CSV they are recorded in, and what is read from it."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ccq_converters.evaluate import EvalResult
from ccq_format.errors import EvalError, OutputError

NONE, IMATRIX, HESSIAN = SETTINGS = ("none", "imatrix", "hessian")
"""What the encoder was given: nothing, the importance of the input channels, or that and Hessians."""

T_TYPES, TARGETS, P_TYPES, STOCK, BASE = FAMILIES = ("ccq-t", "ccq-target", "ccq-p", "llama.cpp", "base")

DATA_FREE = ("q2_k", "q3_k", "q4_k", "q4_0", "q8_0", "iq3_s", "iq4_xs")
"""The types that llama.cpp quantizes without importance."""

WITH_DATA = (
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k", "iq4_xs", "q4_k", "q4_0"),
)


@dataclass(frozen=True)
class Recipe:
    """One file to make.  ``options`` are arguments of ``QuantOptions`` (ours only); ``pure`` files have all matrices
    in the type ``name``."""

    name: str
    family: str
    setting: str
    options: dict[str, Any] = field(default_factory=dict)
    pure: bool = True

    @property
    def key(self) -> str:
        """``SETTING/TYPE``: what ``--only`` searches, and no two recipes share."""
        return f"{self.setting}/{self.name}"


def recipes() -> Iterator[Recipe]:
    """All files of the table, llama.cpp's first because they take seconds."""
    yield from (Recipe(name, STOCK, NONE) for name in DATA_FREE)
    yield from (Recipe(name, STOCK, IMATRIX) for name in WITH_DATA)
    for setting in SETTINGS:
        for name in ("p2", "p2_5", "p2_75"):
            yield Recipe(f"ccq_{name}", P_TYPES, setting, {"type": f"ccq_{name}"})
        one_bit = () if setting == NONE else ("t1",)  # of no use without data
        for name in (*one_bit, "t1_5", "t2", "t2_5", "t3"):
            yield Recipe(f"ccq_{name}", T_TYPES, setting, {"type": f"ccq_{name}"})
    for setting in (IMATRIX, HESSIAN):  # types by measured loss: the importance file has gradients
        for bpw in (1.8, 2.1, 2.6, 3.1):
            yield Recipe(f"ccq_bpw_{bpw}", TARGETS, setting, {"target_bpw": bpw}, pure=False)


@dataclass(frozen=True)
class Row:
    """One measured file.

    Bits per weight are those of the file, read back: of its matrices without embedding and output (``matrix_bpw``) and
    of all its tensors.  ``ppl`` and ``kld`` are perplexity and mean KL divergence in nats from the unquantized model
    over ``scored`` tokens, with standard errors; ``top1`` the share of them where both rank the same token first;
    ``cpu_seconds`` processor time of making the file per million weights.  ``note`` says what is wrong with the row.
    """

    model: str
    setting: str
    type: str
    family: str
    effort: str
    matrix_bpw: float
    file_bpw: float
    file_bytes: int
    scored: int
    ppl: float
    ppl_stderr: float
    kld: float
    kld_stderr: float
    kld_p99: float
    top1: float
    cpu_seconds: float
    made_by: str
    note: str = ""

    @property
    def key(self) -> str:
        """As ``Recipe.key``."""
        return f"{self.setting}/{self.type}"


def scores(result: EvalResult) -> dict[str, Any]:
    """What a row takes from a comparison with the base model, as its fields."""
    assert result.kld_mean is not None
    return {
        "scored": result.scored,
        "ppl": result.ppl,
        "ppl_stderr": result.ppl_stderr,
        "kld": result.kld_mean,
        "kld_stderr": result.kld_stderr or 0.0,
        "kld_p99": result.kld_p99 or 0.0,
        "top1": result.top1 or 0.0,
    }


_DIGITS = {"matrix_bpw": 5, "file_bpw": 5, "ppl": 5, "ppl_stderr": 5, "top1": 5, "cpu_seconds": 3}
"""Decimal places in the CSV; the divergences get six significant digits."""


def _cell(name: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.{_DIGITS[name]}f}" if name in _DIGITS else f"{value:.6g}"
    return str(value)


class Table:
    """The CSV file and, beside it, a JSON file of the same name that says how its rows were measured.

    Every :meth:`put` replaces the CSV at once, so that an interrupted run keeps what it has and two runs can share it.
    """

    def __init__(self, path: Path) -> None:
        """Reads the rows there are.  Raises ``EvalError`` if the file is not such a table."""
        self.path = path
        self.rows = self._read()

    def _read(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Row)}
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [
                    Row(**{name: kind(cells[name]) for name, kind in kinds.items()})
                    for cells in csv.DictReader(file, strict=True)
                ]
            return {row.key: row for row in sorted(rows, key=_order)}
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise EvalError(f"is no quality table: {error!r}", file=self.path) from None

    @property
    def setup_path(self) -> Path:
        """The JSON file."""
        return self.path.with_suffix(".json")

    def check_setup(self, setup: dict[str, object]) -> None:
        """Keep ``setup`` beside the rows, or raise ``EvalError`` if they were measured in another way.  What one of the
        two does not mention (the calibration, in a run that uses none) may differ."""
        known: dict[str, object] = {}
        if self.rows and self.setup_path.exists():
            known = json.loads(self.setup_path.read_text(encoding="utf-8"))
        for name, value in setup.items():
            if known.get(name, value) != value:
                raise EvalError(
                    f"its rows have another {name} ({known[name]}, not {value}); name another file or delete this one",
                    file=self.path,
                )
        replace_file(self.setup_path, json.dumps({**known, **setup}, indent=1) + "\n")

    def put(self, row: Row) -> None:
        """Add or replace a row in the file as it is now.  Raises ``OutputError``, ``EvalError``."""
        with _locked(self.path.parent):
            self.rows = {**self._read(), row.key: row}
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow([f.name for f in fields(Row)])
            writer.writerows([_cell(f.name, getattr(row, f.name)) for f in fields(Row)] for row in self.sorted())
            replace_file(self.path, text.getvalue())

    def sorted(self) -> list[Row]:
        """By setting, then size."""
        return sorted(self.rows.values(), key=_order)


def _order(row: Row) -> tuple[int, float, str]:
    return SETTINGS.index(row.setting), row.matrix_bpw, row.type


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other runs that use the folder waiting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Write a file under another name, then rename it.  Raises ``OutputError``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(error.strerror or str(error), file=path) from None


@dataclass(frozen=True)
class Comparison:
    """A file of ours (``SETTING/TYPE``) that is to have at most ``goal`` times the KL divergence of llama.cpp's."""

    ours: str
    theirs: str
    goal: float = 1.0


COMPARISONS = (
    Comparison("none/ccq_t2", "none/q2_k"),
    Comparison("imatrix/ccq_t1_5", "imatrix/iq1_m"),
    Comparison("imatrix/ccq_t2", "imatrix/iq2_xs"),
    Comparison("imatrix/ccq_t2", "imatrix/q2_k"),
    Comparison("imatrix/ccq_t2_5", "imatrix/iq2_s", 0.75),
    Comparison("imatrix/ccq_t3", "imatrix/q3_k"),
    Comparison("imatrix/ccq_t3", "imatrix/iq3_s"),
    Comparison("imatrix/ccq_bpw_2.6", "imatrix/ccq_t2_5"),
    Comparison("hessian/ccq_t2", "imatrix/iq2_s"),
    Comparison("hessian/ccq_t2_5", "imatrix/iq3_xxs"),
)


def markdown(rows: Iterable[Row]) -> str:
    """All rows, with those of our types in bold."""
    lines = [
        "| type | data | bits/weight | file | perplexity | KL divergence | same top |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = f"**{row.type.upper()}**" if row.family in (T_TYPES, P_TYPES) else row.type.upper()
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"| {name}{note} | {row.setting} | {row.matrix_bpw:.4g} | {row.file_bpw:.3f} "
            f"| {row.ppl:.4f} ± {row.ppl_stderr:.4f} | {row.kld:.5f} ± {row.kld_stderr:.5f} | {100 * row.top1:.2f} % |"
        )
    return "\n".join(lines)


def markdown_comparisons(rows: dict[str, Row]) -> str:
    """The comparisons of which both files are there and as asked."""
    lines = [
        "| ours | bits/weight | llama.cpp's | bits/weight | perplexity | KL divergence, ratio | aim | |",
        "|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for comparison in COMPARISONS:
        a, b = rows.get(comparison.ours), rows.get(comparison.theirs)
        if a is None or b is None or a.note or b.note:
            continue
        ratio = a.kld / b.kld
        met = "met" if ratio <= comparison.goal and a.ppl <= b.ppl else "missed"
        lines.append(
            f"| {a.type.upper()}, {a.setting} | {a.matrix_bpw:.4g} | {b.type.upper()}, {b.setting} "
            f"| {b.matrix_bpw:.4g} | {a.ppl:.4f} / {b.ppl:.4f} | {ratio:.3f} | {comparison.goal:g} | {met} |"
        )
    return "\n".join(lines)


def embed(path: Path, name: str, content: str) -> None:
    """Replace what is between the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a Markdown file.  Raises
    ``EvalError`` if they are not there, ``OutputError``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(str(error), file=path) from None
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise EvalError(f"has no lines '{begin.strip()}' and '{end.strip()}'", file=path)
    replace_file(path, f"{before}{begin}\n{content}\n\n{end}{after}")


def frontier(points: Iterable[Row]) -> list[Row]:
    """The rows that no smaller or equally large one of ``points`` matches in KL divergence, by file size."""
    best: list[Row] = []
    for row in sorted(points, key=lambda r: (r.file_bpw, r.kld)):
        if not best or row.kld < best[-1].kld:
            best.append(row)
    return best

"""The table of benchmarks/quality: what is kept, replaced and refused, and what is read from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from measurements import (
    COMPARISONS,
    HESSIAN,
    IMATRIX,
    NONE,
    STOCK,
    T_TYPES,
    TARGETS,
    Row,
    Table,
    embed,
    frontier,
    markdown,
    markdown_comparisons,
    recipes,
)

from ccq_converters.llama import STOCK_FILE_TYPES
from ccq_converters.options import QuantOptions
from ccq_converters.target_types import parse_type
from ccq_format.errors import EvalError

ROOT = Path(__file__).resolve().parent.parent


def row(name: str, setting: str = IMATRIX, *, bpw: float = 2.125, kld: float = 0.05, note: str = "") -> Row:
    return Row(
        model="m",
        setting=setting,
        type=name,
        family=T_TYPES if name.startswith("ccq") else STOCK,
        effort="default" if name.startswith("ccq") else "",
        matrix_bpw=bpw,
        file_bpw=bpw + 1,
        file_bytes=1000,
        scored=40005,
        ppl=5.12345,
        ppl_stderr=0.01234,
        kld=kld,
        kld_stderr=0.000123,
        kld_p99=0.5,
        top1=0.875,
        cpu_seconds=0.125,
        made_by="someone 1.0, and more",
        note=note,
    )


def test_rows_survive_and_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = Table(path)
    rows = [row("ccq_t2"), row("q2_k", bpw=2.625, note='2 of 3 "odd"'), row("q2_k", NONE, bpw=2.625)]
    for r in rows:
        table.put(r)
    assert list(Table(path).rows.values()) == [rows[2], rows[0], rows[1]]  # by setting, then size
    table.put(replace(rows[0], kld=0.04))
    assert Table(path).rows["imatrix/ccq_t2"].kld == 0.04
    assert len(path.read_text().splitlines()) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_share_a_table(tmp_path: Path) -> None:
    one, other = Table(tmp_path / "t.csv"), Table(tmp_path / "t.csv")
    one.put(row("ccq_t2"))
    other.put(row("ccq_t3"))
    assert set(Table(tmp_path / "t.csv").rows) == {"imatrix/ccq_t2", "imatrix/ccq_t3"} == set(other.rows)


def test_rows_of_one_table_are_measured_alike(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv")
    table.check_setup({"text": "a", "windows": 5})  # no row yet: anything goes
    table.check_setup({"text": "b", "windows": 5})
    table.put(row("ccq_t2", NONE))
    table.check_setup({"text": "b", "windows": 5, "calibration": "c"})
    table.check_setup({"text": "b", "windows": 5})
    with pytest.raises(EvalError, match=r"another calibration \(c, not d\)"):
        Table(tmp_path / "t.csv").check_setup({"text": "b", "windows": 5, "calibration": "d"})
    with pytest.raises(EvalError, match="another windows"):
        table.check_setup({"text": "b", "windows": "all"})


@pytest.mark.parametrize("content", ["model,setting\nm,none\n", "a b c\n1\n", "\xff\xfe"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(EvalError, match=r"t\.csv: is no quality table"):
        Table(path)


def test_comparisons() -> None:
    rows = [
        row("ccq_t2", kld=0.04),
        row("ccq_bpw_2.6", bpw=2.6, kld=0.015),
        row("iq2_xs", bpw=2.3125, kld=0.05),
        row("q2_k", bpw=2.625, kld=0.03),
        row("ccq_t2_5", bpw=2.625, kld=0.02),
        row("iq2_s", bpw=2.5625, kld=0.025),
        row("ccq_t1_5", bpw=1.625),
        row("iq1_m", bpw=1.75, note="2 of 8 matrices are iq4_nl"),
    ]
    lines = markdown_comparisons({r.key: r for r in rows}).splitlines()[2:]
    assert len(lines) == 4  # what is missing or not as asked is left out
    by_types = {(cells[1].strip(), cells[3].strip()): cells for cells in (line.split("|") for line in lines)}
    met = {key: (cells[6].strip(), cells[8].strip()) for key, cells in by_types.items()}
    assert met["CCQ_T2, imatrix", "IQ2_XS, imatrix"] == ("0.800", "met")
    assert met["CCQ_T2, imatrix", "Q2_K, imatrix"] == ("1.333", "missed")
    assert met["CCQ_T2_5, imatrix", "IQ2_S, imatrix"] == ("0.800", "missed")  # the aim is 0.75
    assert "2 of 8 matrices" in markdown(rows)


def test_embedding_in_a_readme(tmp_path: Path) -> None:
    path = tmp_path / "r.md"
    path.write_text("before\n<!-- quality-m -->\nold\n<!-- end of quality-m -->\nafter\n")
    embed(path, "quality-m", "| new |")
    embed(path, "quality-m", "| newer |")
    assert path.read_text() == ("before\n<!-- quality-m -->\n\n| newer |\n\n<!-- end of quality-m -->\nafter\n")
    with pytest.raises(EvalError, match="has no lines '<!-- quality-x -->'"):
        embed(path, "quality-x", "")


def test_readme_shows_the_table() -> None:
    """``run.py --readme docs/quality.md`` has been run since the table changed."""
    rows = Table(ROOT / "benchmarks" / "results" / "quality-manllama-16m.csv").rows
    assert rows
    assert f"\n{markdown_comparisons(rows)}\n" in (ROOT / "docs/quality.md").read_text(encoding="utf-8")


def test_frontier() -> None:
    a, b, c = row("a", bpw=2, kld=0.5), row("b", bpw=2.5, kld=0.6), row("c", bpw=3, kld=0.1)
    d = row("d", bpw=3, kld=0.2)
    assert frontier([d, c, b, a]) == [a, c]
    assert frontier([]) == []


def test_every_recipe_can_be_made_and_compared() -> None:
    made = {r.key: r for r in recipes()}
    assert len(made) == len(list(recipes()))
    for recipe in made.values():
        if recipe.family == STOCK:
            assert recipe.name in STOCK_FILE_TYPES
            assert recipe.setting != HESSIAN
        elif recipe.family == TARGETS:
            assert not recipe.pure
            assert QuantOptions(**recipe.options).target_bpw == float(recipe.name.removeprefix("ccq_bpw_"))
        else:
            assert parse_type(QuantOptions(**recipe.options).type) == recipe.name
    assert {key for c in COMPARISONS for key in (c.ours, c.theirs)} <= set(made)

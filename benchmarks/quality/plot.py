"""KL divergence against file size, one curve per family and setting, as an SVG file."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from measurements import HESSIAN, IMATRIX, NONE, P_TYPES, STOCK, T_TYPES, TARGETS, Row, frontier, replace_file

STYLES = {
    T_TYPES: ("#0b62c4", "o", "CCQ T"),
    TARGETS: ("#7a2bbf", "D", "CCQ T, types by measured loss"),
    P_TYPES: ("#1a8a4b", "s", "CCQ P"),
    STOCK: ("#c4460b", "^", "llama.cpp"),
}
"""Colour, marker and name of each family."""

LINES = {NONE: (":", "no data"), IMATRIX: ("-", "importance"), HESSIAN: ("--", "importance and Hessians")}
"""Line style and name of each setting."""

LARGEST = 5.0
"""Bits per weight of the matrices up to which types are drawn."""


def draw(rows: list[Row], path: Path) -> None:
    """Draw the rows as asked for (no note) to the SVG file ``path``.

    Each curve follows the types that no smaller one of its family and setting matches; the others are points beside
    it.  White background, text as outlines: looks the same everywhere.
    """
    rows = [row for row in rows if not row.note and row.family in STYLES and row.matrix_bpw <= LARGEST]
    if not rows:
        return
    figure = Figure(figsize=(9, 6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for family, (colour, marker, family_name) in STYLES.items():
        for setting, (line, setting_name) in LINES.items():
            points = [row for row in rows if (row.family, row.setting) == (family, setting)]
            if not points:
                continue
            best = frontier(points)
            axes.plot([row.file_bpw for row in best], [row.kld for row in best], line, color=colour, linewidth=1.3)
            axes.plot(
                [row.file_bpw for row in points],
                [row.kld for row in points],
                linestyle="none",
                marker=marker,
                markersize=4.5,
                color=colour,
                markerfacecolor="white" if setting == NONE else colour,
            )
            axes.plot(
                [], [], line, color=colour, marker=marker, markersize=4.5, linewidth=1.3,
                markerfacecolor="white" if setting == NONE else colour, label=f"{family_name}, {setting_name}",
            )  # fmt: skip
    for row in _labelled([row for row in rows if row.family != TARGETS]):
        ours = row.family != STOCK
        axes.annotate(
            row.type.removeprefix("ccq_").upper(),
            (row.file_bpw, row.kld),
            xytext=(-5, -5) if ours else (5, 5),
            textcoords="offset points",
            ha="right" if ours else "left",
            va="top" if ours else "bottom",
            fontsize=7.5,
            color=STYLES[row.family][0],
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("bits per weight of the file (embedding and output q8_0)")
    axes.set_ylabel("mean KL divergence from the f32 model, nats per token")
    axes.set_title(f"{rows[0].model}, {rows[0].scored:,} tokens", fontsize=10)
    axes.grid(which="both", color="#e4e4e4", linewidth=0.6)
    axes.legend(fontsize=8)
    svg = io.StringIO()
    # A fixed salt and no date: the same rows give the same file.
    with mpl.rc_context({"svg.hashsalt": "quality"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    replace_file(path, svg.getvalue())


def _labelled(rows: list[Row]) -> list[Row]:
    """One row per type to carry its name: our best one, llama.cpp's with importance where there is one."""
    chosen: dict[str, Row] = {}
    for row in rows:
        known = chosen.get(row.type)
        if known is None or (row.setting == IMATRIX if row.family == STOCK else row.kld < known.kld):
            chosen[row.type] = row
    return list(chosen.values())

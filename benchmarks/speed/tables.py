"""The Markdown tables of a speed benchmark's results: ``python benchmarks/speed/tables.py RESULTS.jsonl``.

With ``--embed README.md`` they replace what is between the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of
that file, where NAME is the name of the results file without its suffix.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from records import Summary, read, summarize

from ccq_format.errors import CcqError

# ``embed`` is shared with the tables of the quality benchmark, whose folder is no package either.
sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))
from measurements import embed

PEER = "q2_k"


def display_name(type_name: str) -> str:
    """``q2_k`` as ``Q2_K``, ``ik/q2_k`` as ``Q2_K (ik_llama.cpp)``; ours in bold."""
    name = type_name.removeprefix("ik/").upper()
    if type_name.startswith("ik/"):
        return f"{name} (ik_llama.cpp)"
    return f"**{name}**" if type_name.startswith("ccq_") else name


def three_digits(value: float) -> str:
    """A number with three significant digits, more before the point if it has them."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def columns(summaries: Iterable[Summary]) -> list[tuple[str, int]]:
    """What was timed with how many threads, in the order of measurement."""
    return list(dict.fromkeys((s.what, s.threads) for s in summaries))


def markdown(summaries: Iterable[Summary], peer: str, bits: Mapping[str, float]) -> str:
    """One table per model: tokens per second, median of the rounds, and the ratio to the peer in parentheses.

    ``bits`` has the bits per weight of the types.
    """
    parts = []
    summaries = list(summaries)
    for model in dict.fromkeys(s.model for s in summaries):
        rows = [s for s in summaries if s.model == model]
        heads = columns(rows)
        titles = [f"{what}, {threads} thread{'s' if threads > 1 else ''}" for what, threads in heads]
        lines = [
            f"| {model}: tokens/s (ratio to {peer.upper()}) | bits/weight | {' | '.join(titles)} |",
            f"|---|---:|{'---:|' * len(titles)}",
        ]
        for name in dict.fromkeys(s.type for s in rows):
            cells = {(s.what, s.threads): _cell(s) for s in rows if s.type == name}
            values = " | ".join(cells.get(head, "") for head in heads)
            size = f"{bits[name]:.4g}" if name in bits else ""
            lines.append(f"| {display_name(name)} | {size} | {values} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(summary: Summary) -> str:
    ratio = f" ({summary.ratio.median:.2f})" if summary.ratio is not None else ""
    return three_digits(summary.speed.median) + ratio


def footer(machine: Mapping[str, Any], rounds: int) -> str:
    """The lines under the tables: what was measured where, and with which command."""
    versions = ", ".join(f"{name} {value}" for name, value in machine.get("versions", {}).items())
    busy = ", beside a busy loop" if machine.get("busy") else ""
    made = f"{machine.get('cpu')}, {machine.get('date')}; {versions}; median of {rounds} rounds{busy}."
    return f"{made}\n`{machine.get('command')}`"


@click.command()
@click.argument("results", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--peer", default=PEER, show_default=True, help="Type that ratios are to.")
@click.option("--embed", "readme", type=click.Path(path_type=Path), help="Markdown file to put the tables in.")
def main(results: Path, peer: str, readme: Path | None) -> None:
    """Print the tables of RESULTS as Markdown, or put them in a file."""
    try:
        machine, measurements = read(results)
        summaries = summarize(measurements, peer)
        tables = markdown(summaries, peer, machine.get("bits_per_weight", {}))
        text = f"{tables}\n\n{footer(machine, min((s.rounds for s in summaries), default=0))}"
        if readme is not None:
            embed(readme, results.stem, text)
        else:
            click.echo(text)
    except CcqError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()

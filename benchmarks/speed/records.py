"""What a run records, and what is read from it: speeds, and ratios to a peer that was measured in the same rounds.

A results file has one JSON object a line: the machine (``kind`` is ``machine``) and then every measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ccq_format.errors import EvalError

PROMPT, GENERATE = WHATS = ("prompt", "generate")
"""What is timed: the tokens of a prompt in one batch, or tokens one after the other."""


@dataclass(frozen=True)
class Measurement:
    """One timing.  ``type`` is the tensor type of the model's matrices, with the build's prefix if that is not stock
    llama.cpp (``ik/q2_k``)."""

    round: int
    model: str
    type: str
    threads: int
    what: str
    tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def case(self) -> tuple[str, int, str]:
        """What must be equal for a ratio of two types."""
        return self.model, self.threads, self.what


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one number per round; with less than three rounds the quartiles are the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ``ValueError`` if there is no value."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values")
        if len(ordered) < 3:
            return cls(median(ordered), ordered[0], ordered[-1])
        low, middle, high = quantiles(ordered, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(frozen=True)
class Summary:
    """All rounds of one type in one case.

    ``ratio`` is the speed over the peer's in the same round, the median of that over the rounds: what slows down a
    whole round does not count.  ``None`` where the peer was not measured.
    """

    model: str
    type: str
    threads: int
    what: str
    rounds: int
    speed: Spread
    ratio: Spread | None


def summarize(measurements: Iterable[Measurement], peer: str) -> list[Summary]:
    """One summary per type and case, in the order of their first measurements."""
    speeds: dict[tuple[str, int, str], dict[str, dict[int, float]]] = {}
    for m in measurements:
        speeds.setdefault(m.case, {}).setdefault(m.type, {})[m.round] = m.speed
    out = []
    for (model, threads, what), types in speeds.items():
        peers = types.get(peer, {})
        for name, by_round in types.items():
            ratios = [speed / peers[number] for number, speed in by_round.items() if number in peers]
            ratio = Spread.of(ratios) if ratios else None
            out.append(Summary(model, name, threads, what, len(by_round), Spread.of(by_round.values()), ratio))
    return out


def line(measurement: Measurement) -> str:
    """A measurement as a line of a results file."""
    return json.dumps({"kind": "measurement", **asdict(measurement)})


def machine_line(machine: Mapping[str, Any]) -> str:
    """The first line of a results file."""
    return json.dumps({"kind": "machine", **machine})


def read(path: Path) -> tuple[dict[str, Any], list[Measurement]]:
    """The machine and the measurements of a results file.  Raises ``EvalError`` if it is no such file."""
    try:
        first, *rest = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        if first.pop("kind") != "machine":
            raise ValueError("the first line does not describe the machine")
        measurements = [Measurement(**record) for record in rest if record.pop("kind") == "measurement"]
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(str(error), file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"is no results file of the speed benchmark: {error!r}", file=path) from None
    return first, measurements

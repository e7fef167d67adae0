"""How long a conversion will take: what encoding and decoding cost, measured on samples on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from .data import lacks_data
from .encode import encodable, encode_rows
from .host import cpu_count
from .options import QuantOptions
from .plan import Plan, PlannedTensor

_SAMPLE = 1 << 15
"""Weights that are encoded to measure a type: a tenth of a second for the slowest."""

_READ = 1 << 20
"""Weights that are read to measure a source's type, in whole rows."""


def expectation(plan: Plan, options: QuantOptions) -> str:
    """One line for people: how long the plan's conversion will take with ``options.threads``.

    Our encoders share their work among all threads; everything else has one.  Reading is measured where the
    files are cached or have holes, as well as where they are not: a slow disk comes on top.
    """
    threads = options.threads if options.threads > 0 else cpu_count()
    encoded = [t for t in plan.tensors if t.source.n_weights and t.type != t.source.source_type]
    seconds = 0.0
    for target, weights in _weights(encoded, lambda t: t.type).items():
        shared = threads if encodable(target) is not None else 1
        seconds += weights * _seconds_to_encode(target, options.effort) / shared
    for kind, weights in _weights(encoded, lambda t: t.source.source_type).items():
        largest = max((t for t in encoded if t.source.source_type == kind), key=lambda t: t.source.n_weights)
        seconds += weights * _seconds_to_read(largest)
    line = f"expected time: {_for_people(seconds)} with {threads} thread{'s' if threads > 1 else ''}"
    if options.device != "cpu":
        line += " and no GPU"
    if options.hessian is not None:
        line += ", two to three times that with the Hessian"
    elif options.calibrate and (options.type is None or lacks_data(plan)):
        line += ", after calibration; two to three times that if there is room for Hessians"
    return line


def _weights(tensors: list[PlannedTensor], key: Callable[[PlannedTensor], str]) -> Counter[str]:
    count: Counter[str] = Counter()
    for tensor in tensors:
        count[key(tensor)] += tensor.source.n_weights
    return count


def _seconds_to_encode(target: str, effort: str) -> float:
    """Per weight, on one thread."""
    x = np.random.default_rng(0).standard_normal((_SAMPLE // 1024, 1024), dtype=np.float32)
    return _shortest(lambda: encode_rows(target, x, None, 1, effort)) / x.size


def _seconds_to_read(tensor: PlannedTensor) -> float:
    """Per weight: reading and decoding rows of a tensor."""
    source = tensor.source
    rows = min(source.rows, max(1, _READ // source.row_len))
    return _shortest(lambda: source.load_rows(0, rows)) / (rows * source.row_len)


def _shortest(call: Callable[[], object]) -> float:
    """CPU seconds of the shorter of two calls."""
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def _for_people(seconds: float) -> str:
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (72 * 3600, "hours", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{0 if seconds / size >= 10 or size == 1 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"

"""``--target-bpw`` and ``--target-size``: types for every matrix by what they cost and what they are measured to lose.

Of every matrix that the plan is free to choose for a sample of rows is encoded in each type of ``LADDER``.  The loss of
an encoding with errors ``E`` (``[out, in]``) is

- with gradients in the importance file ``1/2 sum_ij G_i H_j E_ij^2``, the expected KL divergence in nats per token to
  second order, where ``H_j`` is the mean square of input j and ``G_i`` that of the gradient at output i (see
  ``backward``);
- without them the relative squared error, times what :data:`SIZE_POWER` tells of how much a matrix matters.

Losses of different matrices add up: the divergence is linear in the errors as long as it is small (Malinovskii et al.,
arXiv 2411.17525).  What remains is to choose a type for each so that the sum is smallest within the bytes there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts
from ccq_format.errors import PlanError, WeightsError

from .encode import check_weights, encode_rows
from .imatrix import Importance
from .mixtures import LADDER, MIXTURES, Mixture, MixtureScheme
from .plan import (
    Plan,
    Pure,
    QuantOptions,
    Scheme,
    TensorSource,
    block,
    free_matrices,
    is_ccq,
    make_plan,
    row_bytes,
)

SAMPLE = 1 << 17
"""Weights per matrix or stack, at most (but one row), that are encoded to measure its losses."""

SIZE_POWER = 0.75
"""Without gradients, how a matrix's share in the sum of relative errors grows with its size (that of one expert).

KL divergence from relative errors, measured with gradients, goes with the power 0.4 to 0.7 of the size on average of
two models' layers, but differs by a factor of ten between layers.  Of that no plan knows anything without gradients: at
2.625 bits a power of 1/2 made it worse than one type for all (4 M Llama, 5080 tokens: 0.0406 instead of 0.0391), where
3/4 still chooses one type for all and prefers small matrices only at sizes between two types."""

KL_UNIT, RELATIVE_UNIT = "nats of KL divergence per token", "(mean relative error)"

_BASE = "ccq_t2"
"""Stands for all T types where only the block size matters."""


def _bpw(type_name: str) -> float:
    weights, nbytes = block(type_name)
    return 8 * nbytes / weights


_LEVELS = (
    ("q8_0", "q8_0", 5.5),
    ("q5_0", "q8_0", 4.5),
    ("q4_0", "q5_0", 3.5),
    *((mixture.embedding, mixture.output, _bpw(mixture.base)) for mixture in reversed(MIXTURES.values())),
)
"""Types of embedding and output under ``--target-size``, and the bits per weight that the other matrices need to have
on average before they are given."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """What one tensor can be: types by size, bytes of the tensor in each, and the loss measured."""

    source: TensorSource
    types: tuple[str, ...]
    nbytes: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Overhead:
    """What a file holds beside tensor data: ``header`` bytes before it, and padding of each tensor to ``alignment``."""

    header: int
    alignment: int

    def padded(self, nbytes: int) -> int:
        """Bytes that a tensor takes in the file."""
        return nbytes + -nbytes % self.alignment


@dataclass(frozen=True)
class _Allocated:
    """A ``Scheme`` with a type per matrix, and another scheme's types for embedding and output."""

    types: dict[str, str]
    others: Scheme
    reason: str

    def matrix(self, name: str) -> tuple[str, str]:
        return self.types.get(name, _BASE), self.reason  # one whose rows do not fit falls back

    def vocabulary(self, name: str) -> tuple[str, str]:
        return self.others.vocabulary(name)


# --- the choice -----------------------------------------------------------------------------------------------------


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For every tensor the index of one of its types, such that the costs add up to ``budget`` at most.

    ``costs[t]`` is increasing; a loss that is not finite rules its type out, unless it is the first.  Every tensor
    starts with its cheapest type.  Steps along the lower convex hull of its (cost, loss) points are taken in the order
    of what they gain per byte as long as they fit, which is optimal (a Lagrange multiplier's solution) up to the first
    that does not; smaller ones fill what is left then.  The sum of losses is above the optimum by less than the gain of
    that first step, and never rises with the budget.  Equal gains are taken in the order of the tensors.

    The caller sees to it that the cheapest types fit.
    """
    hulls = [_hull(c, v) for c, v in zip(costs, losses, strict=True)]
    picked = [0] * len(hulls)
    left = budget - sum(c[0] for c in costs)
    queue: list[tuple[float, int]] = []

    def offer(t: int) -> None:
        at, hull = picked[t], hulls[t]
        if at + 1 < len(hull):
            here, there = hull[at], hull[at + 1]
            heapq.heappush(queue, ((losses[t][there] - losses[t][here]) / (costs[t][there] - costs[t][here]), t))

    for t in range(len(hulls)):
        offer(t)
    while queue:
        _, t = heapq.heappop(queue)
        step = costs[t][hulls[t][picked[t] + 1]] - costs[t][hulls[t][picked[t]]]
        if step <= left:
            left -= step
            picked[t] += 1
            offer(t)
    return [hull[at] for hull, at in zip(hulls, picked, strict=True)]


def _hull(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Indices of the points on the lower convex hull, from the cheapest on, each with a smaller loss than the last."""
    hull = [0]
    for i in range(1, len(costs)):
        if not losses[i] < losses[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (losses[b] - losses[a]) * (costs[i] - costs[b]) < (losses[i] - losses[b]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(source: TensorSource, options: QuantOptions) -> Choices:
    """The types of ``LADDER`` that fit the rows of ``source``, and their losses on a sample of its rows.

    Raises ``WeightsError`` and ``ImportanceError``, naming the tensor.
    """
    types = tuple(name for name in LADDER if source.row_len % block(name)[0] == 0)
    per_matrix = source.rows // source.matrices
    count = min(source.rows, max(1, SAMPLE // source.row_len))
    rows = _spread(source.rows, count)
    x = source.load_rows(0, source.rows) if count == source.rows else _rows(source, rows)
    check_weights(x, "f32", source.name)
    matrix = rows // per_matrix
    importance = None
    if options.imatrix is not None:
        importance = options.imatrix.for_tensor(source.name, source.matrices, source.row_len)
        if importance is not None and importance.ndim == 2:
            importance = importance[matrix]
    gradients = _gradients(source, options.imatrix)
    if gradients is not None:
        power, each = gradients
        # Gradients and inputs are known of all rows, errors of some: the sample counts by its share of their product.
        share = each * np.repeat(power.mean(axis=1), per_matrix)
        columns, weights = power[matrix], each[rows]
        scale = 0.5 * float(share.sum()) * _reciprocal(float(share[rows].sum()))
    else:
        columns, weights = np.ones_like(x, np.float64), np.ones(count)
        scale = _reciprocal(float(np.square(x, dtype=np.float64).sum()))
    losses = []
    for name in types:
        try:
            check_weights(x, name, source.name)
        except WeightsError:  # too large for its scales
            losses.append(inf)
            continue
        error = _decoded(name, encode_rows(name, x, importance, options.threads, "fast")) - x
        losses.append(scale * float(weights @ np.einsum("rj,rj->r", np.square(error, dtype=np.float64), columns)))
    nbytes = tuple(source.rows * row_bytes(name, source.row_len) for name in types)
    return Choices(source, types, nbytes, tuple(losses))


def _gradients(source: TensorSource, file: Importance | None) -> tuple[F64, F64] | None:
    """Mean squares of inputs ``[matrices, row_len]`` and of gradients ``[rows]``, if they are known."""
    if file is None:
        return None
    gradients = file.output_gradients(source.name, source.matrices, source.rows // source.matrices)
    power = file.input_power(source.name, source.matrices, source.row_len)
    if gradients is None or power is None:
        return None
    return power.astype(np.float64), gradients.astype(np.float64).reshape(-1)


def _spread(n: int, count: int) -> NDArray[np.int64]:
    """``count`` of the numbers below ``n``, increasing: one of each ``count``-th part, by chance but always the same.

    An even step would meet only some of the rows that repeat with a head's size or come in pairs (rotary embedding).
    """
    bounds = np.arange(count + 1, dtype=np.int64) * n // count
    places = np.random.default_rng(0).random(count) * np.diff(bounds)
    return bounds[:-1] + places.astype(np.int64)


def _rows(source: TensorSource, rows: NDArray[np.int64]) -> F32:
    return np.concatenate([source.load_rows(int(row), int(row) + 1) for row in rows])


def _reciprocal(value: float) -> float:
    return 1 / value if value > 0 else 0.0


def _decoded(name: str, blocks: NDArray[np.uint8]) -> F32:
    if is_ccq(name):
        import ccq_backend  # plain conversions need no compiled kernels

        weights: F32 = ccq_backend.decode(layouts.by_name(name), blocks)
        return weights
    return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]), np.float32)


# --- the plan -------------------------------------------------------------------------------------------------------


def allocate(
    sources: list[TensorSource],
    options: QuantOptions,
    overhead: Overhead | None,
    advance: Callable[[str], None] | None = None,
) -> Plan:
    """The plan for ``options.target_bpw`` or ``options.target_size``.

    ``target_bpw`` is the average over the matrices that the plan is free to choose for: not the embedding, the output
    (q8_0, as in the plans of one type) or tensors that ``options.overrides`` name.  ``target_size`` is the file's size,
    ``overhead`` included; embedding and output, whose loss is not measured, have the types of the largest mixture whose
    base type the other matrices reach on average, or larger ones from 3.5 bits on.  Error feedback is not part of the
    measurement.  ``advance`` is called with each tensor's name before it is measured.

    Raises ``PlanError`` if the target is beyond what the types can give, and what :func:`measure` and
    :func:`plan.make_plan` raise.
    """
    make_plan(sources, options, Pure(_BASE))  # refuses what cannot be planned before anything is measured
    free = [source for source in free_matrices(sources, options) if source.row_len % block(_BASE)[0] == 0]
    if not free:
        raise PlanError("no matrix is left to allocate types to")
    unit = _unit(free, options.imatrix)
    pad = 1
    others: Scheme = Pure(_BASE)
    if options.target_size is None:
        budget = _bpw_budget(options, free)
    else:
        assert overhead is not None
        others, budget = _size_budget(options, sources, free, overhead)
        pad = overhead.alignment
    choices = []
    for source in free:
        if advance is not None:
            advance(source.name)
        choices.append(measure(source, options))
    if unit == RELATIVE_UNIT:
        choices = _by_size(choices)
    costs = [[nbytes + -nbytes % pad for nbytes in choice.nbytes] for choice in choices]
    picked = choose(costs, [choice.losses for choice in choices], budget)
    chosen = {choice.source.name: (choice, i) for choice, i in zip(choices, picked, strict=True)}
    types = {name: choice.types[i] for name, (choice, i) in chosen.items()}
    losses = {name: choice.losses[i] for name, (choice, i) in chosen.items()}
    return make_plan(sources, options, _Allocated(types, others, _wish(options)), losses, unit)


def _unit(free: list[TensorSource], file: Importance | None) -> str:
    """The unit of the losses.  Raises ``PlanError`` where they would have several."""
    if file is None:
        return RELATIVE_UNIT
    without = [s.name for s in free if s.name not in file or file.entries[s.name].gradients is None]
    if not without:
        return KL_UNIT
    if len(without) == len(free):
        return RELATIVE_UNIT
    raise PlanError(
        f"{file.file} has gradients of other matrices but not of this one, so their losses cannot be compared; give it "
        "a type with --tensor-type, or use an importance file without gradients",
        tensor=without[0],
    )


def _by_size(choices: list[Choices]) -> list[Choices]:
    """Relative errors as parts of their mean, weighted by :data:`SIZE_POWER`."""
    sizes = [(choice.source.n_weights / choice.source.matrices) ** SIZE_POWER for choice in choices]
    return [
        replace(choice, losses=tuple(loss * size / sum(sizes) for loss in choice.losses))
        for choice, size in zip(choices, sizes, strict=True)
    ]


def _wish(options: QuantOptions) -> str:
    return "--target-bpw" if options.target_bpw is not None else "--target-size"


def _bpw_budget(options: QuantOptions, free: list[TensorSource]) -> int:
    assert options.target_bpw is not None
    weights = sum(s.n_weights for s in free)
    low, high = _bpw(LADDER[0]), _bpw(LADDER[-1])
    if not low <= options.target_bpw <= high:
        raise PlanError(
            f"--target-bpw {options.target_bpw:g}: the types have {low:g} ({LADDER[0]}) to {high:g} ({LADDER[-1]}) "
            "bits per weight"
        )
    return int(options.target_bpw * weights / 8)


def _size_budget(
    options: QuantOptions, sources: list[TensorSource], free: list[TensorSource], overhead: Overhead
) -> tuple[Scheme, int]:
    """What decides embedding and output, and the bytes that are left to ``free``."""
    assert options.target_size is not None
    names = {s.name for s in free}
    low = sum(
        min(overhead.padded(s.rows * row_bytes(name, s.row_len)) for name in LADDER if s.row_len % block(name)[0] == 0)
        for s in free
    )
    high = sum(overhead.padded(s.rows * row_bytes(LADDER[-1], s.row_len)) for s in free)
    levels = []
    for embedding, output, bpw in _LEVELS:
        scheme = MixtureScheme(Mixture("--target-size", _BASE, embedding, output), [(s.name, s.shape) for s in sources])
        tensors = make_plan(sources, options, scheme).tensors
        fixed = overhead.header + sum(overhead.padded(t.nbytes) for t in tensors if t.source.name not in names)
        levels.append((scheme, fixed, max(low, bpw * sum(s.n_weights for s in free) / 8)))
    smallest, largest = levels[-1][1] + low, levels[0][1] + high
    if not smallest <= options.target_size <= largest:
        raise PlanError(
            f"--target-size {options.target_size:,} bytes: with these types the file has {smallest:,} to {largest:,} "
            "bytes"
        )
    return next(
        (scheme, options.target_size - fixed) for scheme, fixed, least in levels if fixed + least <= options.target_size
    )

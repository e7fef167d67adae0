"""``--target-bpw`` and ``--target-size``: types for every matrix by what they cost and what they lose, measured.

Of every matrix that the plan may choose for a sample of rows is encoded in each type of :func:`ladder`.  The relative
squared error, inputs weighted by their mean squares where the importance file knows them, times the loss of a relative
error of 1 is what the type is expected to lose, in nats of KL divergence per token.  The latter follows from the
importance file, if that has

- gradients: the loss of an error ``E`` (``[out, in]``) is ``1/2 sum_ij G_i H_j E_ij^2`` to second order, where ``H_j``
  is the mean square of input j and ``G_i`` that of the gradient at output i (see ``backward``);
- losses measured with noise in llama.cpp (see ``losses``), those of embedding and output included;
- either of other matrices only: it is that of the same matrix in near layers;
- neither: unknown.  :data:`SIZE_POWER` tells a little of how much a matrix matters.

Losses of different matrices add up: the divergence is linear in the errors as long as it is small (Malinovskii et al.,
arXiv 2411.17525).  What remains is to choose a type for each so that the sum is smallest within the bytes there are.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum, inf, log, log10

import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts
from ccq_format.errors import PlanError, WeightsError

from .encode import check_weights, decode_rows, encode_rows
from .imatrix import Importance
from .mixtures import LADDER, MIXTURES, Mixture, MixtureScheme
from .options import QuantOptions
from .outliers import A_FIFTH, block_powers, outlier_powers
from .plan import Plan, free_matrices, make_plan
from .schemes import Pure, Scheme, scheme_of
from .target_types import block, is_ccq, row_bytes
from .tensors import TensorSource

SAMPLE = 1 << 17
"""Weights per matrix or stack, at most (but one row), that are encoded to measure its losses."""

SIZE_POWER = 0.75
"""Without gradients, how a matrix's share in the sum of relative errors grows with its size (that of one expert).

KL divergence from relative errors, measured with gradients, goes with the power 0.4 to 0.7 of the size on average of
two models' layers, but differs by a factor of ten between layers.  Of that no plan knows anything without gradients: at
2.625 bits a power of 1/2 made it worse than one type for all (4 M Llama, 5080 tokens: 0.0406 instead of 0.0391), where
3/4 still chooses one type for all and prefers small matrices only at sizes between two types."""

_UNIT = "a relative error of 1"

KL_UNIT, RELATIVE_UNIT = "nats of KL divergence per token", "(mean relative error)"

ONE_BIT = "ccq_t1"

ONE_BIT_COST = 3.0
"""What the errors of one bit count for: more than their size says, as all large ones.

KL divergence of plans of the 4 M Llama with Hessians (32 windows of 512, effort fast, 4080 tokens scored), by what
those errors count for; ccq_t1 alone has 0.879:

=====  =====  =====  =====  ================
bits   1      2      3      without the type
=====  =====  =====  =====  ================
1.3    0.462  0.476  0.486
1.625  0.295  0.292  0.290  0.367
1.8    0.231  0.226  0.240  0.239
2.125  0.151  0.140  0.132  0.131
=====  =====  =====  =====  ================
"""

_BASE = "ccq_t2"
"""Stands for all T types where only the block size matters."""


def _bpw(type_name: str) -> float:
    weights, nbytes = block(type_name)
    return 8 * nbytes / weights


_LEVELS = (
    ("q8_0", "q8_0", 5.5),
    ("q5_0", "q8_0", 4.5),
    ("iq4_nl", "q5_0", 3.5),
    # Those of the smallest mixture are for all that is smaller, too.
    *((m.embedding, m.output, _bpw(m.base) if i else 0.0) for i, m in reversed([*enumerate(MIXTURES.values())])),
)
"""Types of embedding and output under ``--target-size``, and the bits per weight that the other matrices need to have
on average before they are given."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """What one tensor can be: types by size, bytes of the tensor in each, the relative squared error measured (of one
    bit: what it counts for, see :data:`ONE_BIT_COST`), and the loss, if it is known what an error costs."""

    source: TensorSource
    types: tuple[str, ...]
    nbytes: tuple[int, ...]
    errors: tuple[float, ...]
    losses: tuple[float, ...] | None = None

    @property
    def unit_loss(self) -> float | None:
        """The loss of a relative error of 1, if it is known."""
        pairs = zip(self.errors, self.losses or (), strict=False)
        return next((loss / error for error, loss in pairs if 0 < error < inf), None)

    def scaled(self, loss: float) -> Choices:
        """The same with losses that follow from that of a relative error of 1."""
        return replace(self, losses=tuple(error * loss for error in self.errors))


@dataclass(frozen=True)
class Overhead:
    """What a file holds beside tensor data: ``header`` bytes before it, and padding of each tensor to ``alignment``."""

    header: int
    alignment: int

    def padded(self, nbytes: int) -> int:
        """Bytes that a tensor takes in the file."""
        return nbytes + -nbytes % self.alignment

    def file_size(self, plan: Plan) -> int:
        """Bytes of the file of a plan."""
        return self.header + sum(self.padded(tensor.nbytes) for tensor in plan.tensors)


@dataclass(frozen=True)
class _Allocated:
    """A ``Scheme`` with a type per matrix, and another scheme's types for embedding and output."""

    types: dict[str, str]
    others: Scheme
    reason: str

    def matrix(self, name: str) -> tuple[str, str]:
        return self.types.get(name, _BASE), self.reason  # one whose rows do not fit falls back

    def vocabulary(self, name: str) -> tuple[str, str]:
        return (self.types[name], self.reason) if name in self.types else self.others.vocabulary(name)


# --- the choice -----------------------------------------------------------------------------------------------------


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For every tensor the index of one of its types, such that the costs add up to ``budget`` at most.

    ``costs[t]`` never falls; a loss that is not finite rules its type out, unless it is the first.  Every tensor
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
        if costs[i] == costs[hull[-1]]:
            hull.pop()
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (losses[b] - losses[a]) * (costs[i] - costs[b]) < (losses[i] - losses[b]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


# --- measuring ------------------------------------------------------------------------------------------------------


def ladder(options: QuantOptions) -> tuple[str, ...]:
    """The types that a plan chooses among, by size: ``LADDER``, and below it, if there is importance data or will be,
    ccq_t1.

    As one type for all matrices ccq_t1 leaves little of most models; in a plan it is for those that matter least.
    """
    return (ONE_BIT, *LADDER) if options.imatrix is not None or options.calibrate else LADDER


def measure(source: TensorSource, options: QuantOptions, types: Sequence[str] | None = None) -> Choices:
    """Those of ``types`` (those of :func:`ladder`) that fit the rows of ``source``, and what they lose on a sample of
    its rows.

    Raises ``WeightsError`` and ``ImportanceError``, naming the tensor.
    """
    types = tuple(name for name in types or ladder(options) if source.row_len % block(name)[0] == 0)
    per_matrix = source.rows // source.matrices
    rows, times, x, importance = _sampled(source, options)
    matrix = rows // per_matrix
    columns = np.ones_like(x, np.float64)
    if options.imatrix is not None:
        weights = options.imatrix.input_weights(source.name, source.matrices, source.row_len)
        columns = columns if weights is None else weights[matrix]
    columns = columns * times[:, None]
    gradients = _gradients(source, options.imatrix)
    loss = None if options.imatrix is None else options.imatrix.losses.get(source.name)
    errors, losses = [], []
    scale = _reciprocal(float(np.einsum("rj,rj->", np.square(x, dtype=np.float64), columns)))
    for name in types:
        try:
            check_weights(x, name, source.name)
        except WeightsError:  # too large for its scales
            errors.append(inf)
            losses.append(inf)
            continue
        error = np.square(
            decode_rows(name, encode_rows(name, x, importance, options.threads, "fast")) - x, dtype=np.float64
        )
        if name == ONE_BIT:
            error *= ONE_BIT_COST
        errors.append(scale * float(np.einsum("rj,rj->", error, columns)))
        if gradients is not None:
            losses.append(gradients(rows, times, error))
        elif loss is not None:
            losses.append(loss * errors[-1])
    nbytes = tuple(source.rows * row_bytes(name, source.row_len) for name in types)
    return Choices(source, types, nbytes, tuple(errors), tuple(losses) if len(losses) == len(types) else None)


def _gradients(source: TensorSource, file: Importance | None) -> Callable[[NDArray[np.int64], F64, F64], float] | None:
    """What gives the loss from some rows, how many each stands for and their squared errors, if gradients are known."""
    if file is None:
        return None
    per_matrix = source.rows // source.matrices
    gradients = file.output_gradients(source.name, source.matrices, per_matrix)
    power = file.input_power(source.name, source.matrices, source.row_len)
    if gradients is None or power is None:
        return None
    each, columns = gradients.astype(np.float64).reshape(-1), power.astype(np.float64)
    # Gradients and inputs are known of all rows, errors of some: the sample counts by its share of their product.
    share = each * np.repeat(columns.mean(axis=1), per_matrix)

    def loss(rows: NDArray[np.int64], times: F64, error: F64) -> float:
        scale = 0.5 * float(share.sum()) * _reciprocal(float(share[rows] @ times))
        return scale * float((each[rows] * times) @ np.einsum("rj,rj->r", error, columns[rows // per_matrix]))

    return loss


def _sampled(source: TensorSource, options: QuantOptions) -> tuple[NDArray[np.int64], F64, F32, F32 | None]:
    """Rows of a tensor, how many each stands for, their weights, and their importances ``[row_len]`` or
    ``[rows, row_len]``, if there are any."""
    count = min(source.rows, max(1, SAMPLE // source.row_len))
    rows, times = _sample(source, count)
    x = source.load_rows(0, source.rows) if count == source.rows else _rows(source, rows)
    check_weights(x, "f32", source.name)
    importance = None
    if options.imatrix is not None:
        importance = options.imatrix.for_tensor(source.name, source.matrices, source.row_len)
        if importance is not None and importance.ndim == 2:
            importance = importance[rows // (source.rows // source.matrices)]
    return rows, times, x, importance


def _sample(source: TensorSource, count: int) -> tuple[NDArray[np.int64], F64]:
    """``count`` rows, increasing, and how many each stands for.

    Outliers are rare, and one may cost more than all else (see ``outliers``): the rows with the largest, up to half of
    the sample, are in it for themselves, the others stand for what remains."""
    if count == source.rows:
        return np.arange(count), np.ones(count)
    powers, _ = outlier_powers(source)
    most = np.argsort(-powers, kind="stable")[: min(count // 2, np.count_nonzero(powers))]
    others = np.setdiff1d(np.arange(source.rows), most)
    chosen = others[_spread(len(others), count - len(most))]
    rows = np.concatenate([most, chosen])
    times = np.repeat([1.0, len(others) / len(chosen)], [len(most), len(chosen)])
    order = np.argsort(rows)
    return rows[order], times[order]


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


# --- outliers in mixtures -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spared:
    """Another scheme with larger types for some tensors."""

    scheme: Scheme
    types: dict[str, str]

    def matrix(self, name: str) -> tuple[str, str]:
        return self._raised(name, self.scheme.matrix(name))

    def vocabulary(self, name: str) -> tuple[str, str]:
        return self._raised(name, self.scheme.vocabulary(name))

    def _raised(self, name: str, choice: tuple[str, str]) -> tuple[str, str]:
        return (self.types[name], f"{choice[1]}, raised for outliers") if name in self.types else choice


def spare(plan: Plan, options: QuantOptions, advance: Callable[[str], None] | None = None) -> Plan:
    """The plan of a mixture with the next larger type of ``LADDER`` that ends it for every tensor that suffers from
    outliers (see ``outliers``): that loses no more than its other blocks do twice.

    Tensors that ``options.overrides`` name stay as they are.  ``advance`` is called with each name before it is looked
    at.  Raises ``WeightsError`` and ``ImportanceError``, naming the tensor.
    """
    assert options.type is not None
    types = {}
    for tensor in plan.tensors:
        if advance is not None and len(tensor.source.shape) > 1:
            advance(tensor.source.name)
        if tensor.type in LADDER and is_ccq(tensor.type) and not tensor.reason.startswith("--tensor-type"):
            types[tensor.source.name] = _sparing(tensor.source, tensor.type, options)
    raised = {t.source.name: types[t.source.name] for t in plan.tensors if types.get(t.source.name, t.type) != t.type}
    if not raised:
        return plan
    sources = [tensor.source for tensor in plan.tensors]
    return make_plan(sources, options, _Spared(scheme_of(options.type, sources), raised))


def _sparing(source: TensorSource, type_name: str, options: QuantOptions) -> str:
    """The smallest type from ``type_name`` on in which blocks with outliers lose no more than the others in that."""
    powers, others = outlier_powers(source)
    if powers.sum() <= A_FIFTH * others:
        return type_name
    _, times, x, importance = _sampled(source, options)
    _, outliers = block_powers(x)
    each = np.repeat(times, source.row_len // layouts.GROUP)
    limit = None
    for name in LADDER[LADDER.index(type_name) :]:
        try:
            check_weights(x, name, source.name)
        except WeightsError:  # too large for its scales
            continue
        error = (decode_rows(name, encode_rows(name, x, importance, options.threads, "fast")) - x).reshape(
            len(each), -1
        )
        lost = each * np.einsum("bi,bi->b", error, error, dtype=np.float64)
        if limit is None:
            limit = 2 * lost[~outliers].sum()
        if lost.sum() <= limit:
            return name
    return LADDER[-1]


# --- what is not known ----------------------------------------------------------------------------------------------

_LAYER = re.compile(r"^(.*\bblk\.)(\d+)(\..*)$")


def completed(choices: Sequence[Choices]) -> tuple[list[Choices], str]:
    """The choices, all with losses, and the unit of these.

    Where some are known, the loss of a relative error of 1 of the others is interpolated between the nearest layers'
    same matrix, its logarithm linear in the layer; a matrix that no other layer has takes the geometric mean of all
    that are known.  No type is expected to lose less than there: where a few inputs of one layer are thousands of times
    as large as all others, as with the first token in FFN down, relative errors are next to nothing, and not the harm
    (SmolLM2-135M, layer 11: CCQ_T1_5 has a relative error of 0.0003, and 0.009 nats of KL divergence).
    """
    known = {c.source.name: loss for c in choices if (loss := c.unit_loss) is not None and loss > 0}
    if not known:
        if all(choice.losses is not None for choice in choices):
            return list(choices), KL_UNIT
        return _by_size(choices), RELATIVE_UNIT
    mean = fsum(map(log, known.values())) / len(known)
    layers: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for choice in choices:
        role, layer = role_of(choice.source.name)
        if choice.source.name in known:
            layers.setdefault((role, _UNIT), []).append((layer or 0, log(known[choice.source.name])))
            for name, loss in zip(choice.types, choice.losses or (), strict=True):
                if 0 < loss < inf:
                    layers.setdefault((role, name), []).append((layer or 0, log(loss)))

    def near(name: str, what: str, default: float) -> float:
        role, layer = role_of(name)
        points = sorted(layers.get((role, what), [(0, default)]))
        return float(np.exp(np.interp(layer or 0, [at for at, _ in points], [value for _, value in points])))

    def filled(choice: Choices) -> Choices:
        name = choice.source.name
        own = choice.scaled(near(name, _UNIT, mean)).losses or ()
        losses = (max(loss, near(name, what, -inf)) for what, loss in zip(choice.types, own, strict=True))
        return replace(choice, losses=tuple(losses))

    return [c if c.losses is not None else filled(c) for c in choices], KL_UNIT


def role_of(name: str) -> tuple[str, int | None]:
    """A tensor's name without the number of its layer, and that number."""
    match = _LAYER.match(name)
    return (match[1] + match[3], int(match[2])) if match else (name, None)


def _by_size(choices: Sequence[Choices]) -> list[Choices]:
    """Relative errors as parts of their mean, weighted by :data:`SIZE_POWER`."""
    sizes = [(choice.source.n_weights / choice.source.matrices) ** SIZE_POWER for choice in choices]
    return [choice.scaled(size / sum(sizes)) for choice, size in zip(choices, sizes, strict=True)]


# --- the plan -------------------------------------------------------------------------------------------------------


def allocate(
    sources: list[TensorSource],
    options: QuantOptions,
    overhead: Overhead,
    advance: Callable[[str], None] | None = None,
) -> Plan:
    """The plan for ``options.target_bpw`` or ``options.target_size``, with a curve of other sizes if
    ``options.dry_run``.

    ``target_bpw`` is the average over the matrices that the plan is free to choose for: not the embedding, the output
    (q8_0, as in the plans of one type) or tensors that ``options.overrides`` name.  ``target_size`` is the file's size,
    ``overhead`` included.  There embedding and output are chosen for like the others if their losses are known
    (``Importance.losses``); else they have the types of the largest mixture whose base type the other matrices reach on
    average, or larger ones from 3.5 bits on.  Error feedback is not part of the measurement.  ``advance`` is called
    with each tensor's name before it is measured.

    Raises ``PlanError`` if the target is beyond what the types can give, and what :func:`measure` and
    :func:`plan.make_plan` raise.
    """
    budgets = _budgets(sources, options, choosable(sources, options), overhead)
    choices, unit = completed(list(_measured(budgets.free, options, advance)))
    plan = _plan(budgets, choices, unit, options.target_size)
    if not options.dry_run:
        return plan
    return replace(plan, curve=[(size, _plan(budgets, choices, unit, size).loss) for size in budgets.sizes()])


def check_target(sources: list[TensorSource], options: QuantOptions, overhead: Overhead) -> None:
    """Raise the ``PlanError`` that :func:`allocate` would, before there are the data that it is to have."""
    learned = {source.name for source in sources} if options.target_bpw is None else set()
    _budgets(sources, options, choosable(sources, options, learned), overhead)


def _budgets(
    sources: list[TensorSource], options: QuantOptions, free: list[TensorSource], overhead: Overhead
) -> _Budgets:
    make_plan(sources, options, Pure(_BASE))  # refuses what cannot be planned before anything is measured
    if not free:
        raise PlanError("no matrix is left to allocate types to")
    budgets = _Budgets(sources, options, free, overhead)
    budgets.check()
    return budgets


def compared(
    plan: Plan,
    sources: list[TensorSource],
    options: QuantOptions,
    overhead: Overhead,
    advance: Callable[[str], None] | None = None,
) -> Plan:
    """A plan by names with its expected loss, and with that of a plan for the same size.  Raises what :func:`measure`
    does."""
    types = {tensor.source.name: tensor.type for tensor in plan.tensors}
    # Rows that keep their bytes lose nothing, and may be of a type that nothing here encodes.
    chosen = choosable(sources, options)
    losses = {s.name: 0.0 for s in chosen if types[s.name] == s.source_type}
    free = [s for s in chosen if s.name not in losses]
    ladders = [sorted({*ladder(options), types[s.name]}, key=lambda name: (_bpw(name), name)) for s in free]
    choices, unit = completed(list(_measured(free, options, advance, ladders)))
    losses |= {c.source.name: (c.losses or ())[c.types.index(types[c.source.name])] for c in choices}
    tensors = [replace(t, loss=losses.get(t.source.name)) for t in plan.tensors]
    costs = [[overhead.padded(nbytes) for nbytes in choice.nbytes] for choice in choices]
    columns = [choice.losses or () for choice in choices]
    budget = sum(cost[c.types.index(types[c.source.name])] for cost, c in zip(costs, choices, strict=True))
    best = sum(column[i] for column, i in zip(columns, choose(costs, columns, budget), strict=True))
    return replace(plan, tensors=tensors, loss_unit=unit, instead=(overhead.file_size(plan), best))


def choosable(sources: list[TensorSource], options: QuantOptions, learned: Collection[str] = ()) -> list[TensorSource]:
    """The tensors that a target chooses types for; ``learned``: those whose losses will be known."""
    known: Collection[str] = learned
    if options.imatrix is not None and options.target_bpw is None:
        known = {*learned, *options.imatrix.losses}
    return [
        source for source in free_matrices(sources, options, vocabulary=known) if source.row_len % block(_BASE)[0] == 0
    ]


def _measured(
    free: list[TensorSource],
    options: QuantOptions,
    advance: Callable[[str], None] | None,
    ladders: Sequence[Sequence[str]] | None = None,
) -> Iterator[Choices]:
    for source, types in zip(free, ladders or [ladder(options)] * len(free), strict=True):
        if advance is not None:
            advance(source.name)
        yield measure(source, options, types)


def _plan(budgets: _Budgets, choices: list[Choices], unit: str, size: int | None) -> Plan:
    """The plan for ``options.target_bpw`` or, if given, for a file of ``size`` bytes."""
    others, budget = budgets(size)
    pad = 1 if size is None else budgets.overhead.alignment
    costs = [[nbytes + -nbytes % pad for nbytes in choice.nbytes] for choice in choices]
    columns = [choice.losses or () for choice in choices]
    picked = choose(costs, columns, budget)
    types = {choice.source.name: choice.types[i] for choice, i in zip(choices, picked, strict=True)}
    losses = {choice.source.name: column[i] for choice, column, i in zip(choices, columns, picked, strict=True)}
    options = budgets.options
    wish = "--target-bpw" if options.target_bpw is not None else "--target-size"
    return make_plan(budgets.sources, options, _Allocated(types, others, wish), losses, unit)


@dataclass(frozen=True)
class _Budgets:
    """How many bytes a target leaves to the tensors ``free``, and what decides embedding and output if these are not
    among them."""

    sources: list[TensorSource]
    options: QuantOptions
    free: list[TensorSource]
    overhead: Overhead

    def check(self) -> None:
        """Raise ``PlanError`` if the target is beyond what the types can give."""
        bpw, size = self.options.target_bpw, self.options.target_size
        if bpw is not None:
            low, high = 8 * sum(map(self._smallest, self.free)) / sum(s.n_weights for s in self.free), _bpw(LADDER[-1])
            if not low <= bpw <= high:
                raise PlanError(
                    f"--target-bpw {bpw:g}: in the types that fit them the matrices have {low:g} to {high:g} bits per "
                    "weight"
                )
        if size is not None:
            smallest, largest = self.limits()
            if not smallest <= size <= largest:
                raise PlanError(
                    f"--target-size {size:,} bytes: with these types the file has {smallest:,} to {largest:,} bytes"
                )

    def __call__(self, size: int | None) -> tuple[Scheme, int]:
        """For a file of ``size`` bytes, or for the bits per weight that the options say."""
        if size is None:
            assert self.options.target_bpw is not None
            return Pure(_BASE), int(self.options.target_bpw * sum(s.n_weights for s in self.free) / 8)
        return next((scheme, size - fixed) for scheme, fixed, least in self._levels if fixed + least <= size)

    def limits(self) -> tuple[int, int]:
        """Bytes of the smallest and the largest file."""
        (_, most, _), (_, least, _) = self._levels[0], self._levels[-1]
        return least + self._least, most + self._most

    def sizes(self, count: int = 10) -> list[int]:
        """Bytes of ``count`` files, from about the smallest to about the largest, each larger by the same factor, with
        four digits that are not 0."""
        low, high = self.limits()
        sizes = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
        units = [10 ** max(0, int(log10(size)) - 3) for size in sizes]
        inner = [round(size / unit) * unit for size, unit in zip(sizes[1:-1], units[1:-1], strict=True)]
        return [-(-low // units[0]) * units[0], *inner, high // units[-1] * units[-1]]

    def _smallest(self, source: TensorSource) -> int:
        """Bytes of a tensor in the smallest type that it can have."""
        fitting = (name for name in ladder(self.options) if source.row_len % block(name)[0] == 0)
        return min(source.rows * row_bytes(name, source.row_len) for name in fitting)

    @cached_property
    def _least(self) -> int:
        return sum(self.overhead.padded(self._smallest(s)) for s in self.free)

    @cached_property
    def _most(self) -> int:
        return sum(self.overhead.padded(s.rows * row_bytes(LADDER[-1], s.row_len)) for s in self.free)

    @cached_property
    def _levels(self) -> list[tuple[Scheme, int, float]]:
        """Types of embedding and output, the bytes of all that is not free, and the least that is left to the free."""
        names = {s.name for s in self.free}
        shapes = [(s.name, s.shape) for s in self.sources]
        low, weights = self._least, sum(s.n_weights for s in self.free)
        levels: list[tuple[Scheme, int, float]] = []
        for embedding, output, bpw in _LEVELS:
            scheme = MixtureScheme(Mixture("--target-size", _BASE, embedding, output), shapes)
            tensors = make_plan(self.sources, self.options, scheme).tensors
            fixed = self.overhead.header + sum(
                self.overhead.padded(t.nbytes) for t in tensors if t.source.name not in names
            )
            levels.append((scheme, fixed, max(low, bpw * weights / 8)))
        return levels

"""Which tensor gets which type: the plan that every conversion follows and that ``--dry-run`` prints."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from ccq_format.errors import PlanError, readable

from .console import format_bytes
from .encode import encodable
from .options import QuantOptions
from .rules import MTP_BLOCK, NOT_A_PRODUCT, UNMEASURED, Fate, in_layers, mtp_layers, rule_of
from .schemes import Keep, Pure, Scheme, scheme_of
from .target_types import COPIED_TYPES, FLOAT_TYPES, bits, block, fallback, is_ccq, is_quantized, parse_type, row_bytes
from .tensors import EXPERTS, TensorSource


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor with its target type, its bytes in the file, the rule that chose the type, and where that was measured
    the loss expected of its encoding."""

    source: TensorSource
    type: str
    nbytes: int
    reason: str
    loss: float | None = None

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of the source, unchanged."""
        return self.source.raw_rows is not None and self.type == self.source.source_type

    @property
    def searched(self) -> bool:
        """Whether an encoder of ours searches for a small error, which importance and Hessians help."""
        return encodable(self.type) is not None and not self.copied


@dataclass(frozen=True)
class Plan:
    """All tensors of the output in file order, with totals.

    ``curve``: bytes of other files, and what they are expected to lose; ``instead``: bytes of this file, and what one
    with types by loss would lose in them."""

    tensors: list[PlannedTensor]
    fallback_count: int
    fallback_bytes: int
    fallback_block: str
    loss_unit: str | None = None
    unknown: tuple[str, ...] = ()
    """Matrices that no rule of ``rules`` names."""
    curve: Sequence[tuple[int, float]] = ()
    instead: tuple[int, float] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (padding and metadata not counted)."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(t.source.n_weights for t in self.tensors)

    @property
    def file_bpw(self) -> float:
        """Bits per weight of the file: all tensor bytes over all weights, as llama.cpp prints it on loading."""
        return 8 * self.nbytes / max(1, self.n_weights)

    @property
    def loss(self) -> float:
        """The expected loss of all tensors together, in ``loss_unit``."""
        return sum(t.loss or 0.0 for t in self.tensors)

    def warnings(self) -> list[str]:
        """A line each: how many tensors and bytes fell back to another type, and which matrices no rule names."""
        lines = [self._fallback()] if self.fallback_count else []
        if self.unknown:
            more = "" if len(self.unknown) == 1 else f" and {len(self.unknown) - 1} more"
            lines.append(
                f"no rule names {self.unknown[0]}{more}: treated like attention and feed-forward matrices; "
                "--tensor-type gives another type"
            )
        return lines

    def _fallback(self) -> str:
        plural = "tensor" if self.fallback_count == 1 else "tensors"
        return (
            f"{self.fallback_count} {plural} ({format_bytes(self.fallback_bytes)}) fell back to another type because "
            f"the row length is no multiple of the block{self.fallback_block}"
        )

    def table(self) -> str:
        """The plan as plain text: one line per tensor, with its share of the expected loss where that was measured,
        then one line per type, then the totals."""
        total = self.loss
        head = ["tensor", "shape", "from", "type", "bytes"]
        rows = [[*head, "loss", "why"] if total else [*head, "why"]]
        for t in self.tensors:
            shape = " x ".join(map(str, t.source.shape))
            share = [f"{100 * t.loss / total:.2f} %" if t.loss is not None else ""] if total else []
            rows.append(
                [readable(t.source.name), shape, t.source.source_type, t.type, f"{t.nbytes:,}", *share, t.reason]
            )
        last = len(rows[0]) - 1
        widths = [max(len(row[i]) for row in rows) for i in range(last)]
        lines = []
        for row in rows:
            cells = [
                f"{cell:<{w}}" if i < 4 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row[:last], widths, strict=True))
            ]
            lines.append("  ".join([*cells, row[last]]))
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, *self.by_type(), *self._curve(), self.summary()])

    def _curve(self) -> list[str]:
        """What other files are expected to lose, one line each."""
        lines = [f"--target-size  bits per weight  expected loss, {self.loss_unit}"] if self.curve else []
        for nbytes, loss in self.curve:
            lines.append(f"{nbytes / 1e6:>11.7g}MB  {8 * nbytes / max(1, self.n_weights):>15.3f}  {loss:.4g}")
        if self.instead is not None:
            lines.append(
                f"--target-size {self.instead[0]} instead, of the same size: expected loss {self.instead[1]:.4g}"
            )
        return lines

    def by_type(self) -> list[str]:
        """One line per type, the type with the most weights first."""
        groups: dict[str, list[PlannedTensor]] = {}
        for t in self.tensors:
            groups.setdefault(t.type, []).append(t)
        lines = []
        for name, group in sorted(groups.items(), key=lambda item: -sum(t.source.n_weights for t in item[1])):
            weights, nbytes = sum(t.source.n_weights for t in group), sum(t.nbytes for t in group)
            plural = "tensor" if len(group) == 1 else "tensors"
            lines.append(f"{name}: {len(group)} {plural}, {weights:,} weights, {format_bytes(nbytes)}")
        return lines

    def summary(self) -> str:
        """The totals as one line."""
        return (
            f"{len(self.tensors)} tensors, {self.n_weights:,} weights, {format_bytes(self.nbytes)}, "
            f"{self.file_bpw:.3f} bits per weight{self._expectation()}"
        )

    def _expectation(self) -> str:
        if self.loss_unit is None:
            return ""
        return f", expected loss {self.loss:.4g} {self.loss_unit}"


def make_plan(
    sources: list[TensorSource],
    options: QuantOptions,
    scheme: Scheme | None = None,
    losses: Mapping[str, float] | None = None,
    loss_unit: str | None = None,
) -> Plan:
    """Choose a type for every tensor.

    1-D tensors are f32.  For the others (2-D, or 3-D stacks of experts) the table in ``rules`` says which have a type
    of their own; for the rest ``scheme`` chooses, by default that of ``options.type``; a float type in ``options.type``
    takes all that a matrix product reads.  Rows that are stored quantized in no more bits than that keep their bytes:
    another type would only add to what they have lost.  ``options.overrides`` win over these rules for tensors of two
    or more dimensions.  A row length that is no multiple of the chosen type's block falls back to ccq_t1_5 (from
    ccq_t1) or the smallest stock type above its size that fits (see :func:`fallback`).  ``losses`` by tensor name, and
    their unit, are noted in the plan.

    Raises ``PlanError`` for an unknown type, a bad or unmatched pattern, or a fallback where none is allowed.
    """
    if scheme is None:
        if options.type is None:
            raise ValueError("types have to be allocated first")
        scheme = scheme_of(options.type, sources)
    chooser = _Chooser(sources, options)
    planned: list[PlannedTensor] = []
    fallen: list[PlannedTensor] = []
    blocks: set[int] = set()
    for source in sources:
        target, reason = chooser.choose(source, scheme)
        pinned = reason.startswith("--tensor-type")
        if not pinned and _is_better(source, target):
            target, reason = source.source_type, f"as it is stored: no larger than {target}"
        weights, _ = block(target)
        misfit = source.row_len % weights != 0
        if misfit:
            if not options.fallback:
                raise PlanError(
                    f"row length {source.row_len} is no multiple of {weights}, the block of {target}",
                    tensor=source.name,
                )
            blocks.add(weights)
            reason = f"row length {source.row_len} does not fit {target} ({weights})"
            target = fallback(target, source.row_len)
            if not pinned and _is_better(source, target):
                target = source.source_type
        loss = losses.get(source.name) if losses is not None else None
        tensor = PlannedTensor(source, target, source.rows * row_bytes(target, source.row_len), reason, loss)
        planned.append(tensor)
        if misfit:
            fallen.append(tensor)
    sizes = f" ({', '.join(map(str, sorted(blocks)))})" if blocks else ""
    return Plan(planned, len(fallen), sum(t.nbytes for t in fallen), sizes, loss_unit, tuple(chooser.unknown))


def _is_better(source: TensorSource, target: str) -> bool:
    """Whether the stored rows of a quantized source are no larger than in ``target``, which is quantized, too."""
    stored = source.source_type
    if source.raw_rows is None or not is_quantized(stored) or not is_quantized(target) or stored == target:
        return False
    return bits(stored) <= bits(target)


@dataclass(frozen=True)
class _Free:
    """Marks what is a scheme's choice: matrices, and embedding and output if their names are among ``names``."""

    names: Container[str]

    def matrix(self, name: str) -> tuple[str, str]:
        return "free", ""

    def vocabulary(self, name: str) -> tuple[str, str]:
        return ("free" if name in self.names else "q8_0"), ""


def free_matrices(
    sources: list[TensorSource], options: QuantOptions, vocabulary: Container[str] = ()
) -> list[TensorSource]:
    """The matrices whose type is the scheme's choice, embedding and output if ``vocabulary`` names them.  Raises
    ``PlanError`` as :func:`make_plan` does for patterns."""
    chooser = _Chooser(sources, options)
    return [source for source in sources if chooser.choose(source, _Free(vocabulary))[0] == "free"]


def _overrides(sources: list[TensorSource], options: QuantOptions) -> list[tuple[re.Pattern[str], str]]:
    overrides = [(_compile(pattern), parse_type(target)) for pattern, target in options.overrides]
    for pattern, _ in overrides:
        # Those of COPIED_TYPES stay what they are.
        if not any(len(s.shape) > 1 and s.source_type not in COPIED_TYPES and pattern.search(s.name) for s in sources):
            raise PlanError(f"--tensor-type '{pattern.pattern}' matches no matrix of the model")
    return overrides


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PlanError(f"--tensor-type '{pattern}' is no regular expression: {error}") from None


class _Chooser:
    """The types of one model's tensors before any fallback; ``unknown`` collects what no rule names."""

    def __init__(self, sources: list[TensorSource], options: QuantOptions) -> None:
        self.options = options
        self.overrides = _overrides(sources, options)
        self.mtp = mtp_layers(source.name for source in sources)
        self.unknown: list[str] = []

    def choose(self, source: TensorSource, scheme: Scheme) -> tuple[str, str]:
        """Type and reason."""
        name = source.name
        if source.source_type in COPIED_TYPES:
            return source.source_type, "no weights: copied"
        if source.n_weights == 0:
            return source.source_type, "empty: copied"
        if len(source.shape) < 2:
            return "f32", "1-D"
        for pattern, target in self.overrides:
            if pattern.search(name):
                return target, f"--tensor-type {pattern.pattern}"
        rule = rule_of(name)
        fate = rule.fate if rule is not None else Fate.FREE
        reason = rule.reason if rule is not None else ""
        if fate is Fate.F32:
            return "f32", reason
        if len(source.shape) > 3 and fate is not Fate.KEPT:
            fate, reason = Fate.KEPT, NOT_A_PRODUCT.reason
        if fate is Fate.KEPT:
            stored = source.source_type
            as_stored = stored in ("f32", "f16") or (is_quantized(stored) and source.raw_rows is not None)
            return stored if as_stored else "f32", reason
        if isinstance(scheme, Keep) or (isinstance(scheme, Pure) and scheme.type in FLOAT_TYPES):
            return scheme.matrix(name)
        if fate is Fate.VOCABULARY:
            return scheme.vocabulary(name)
        if fate is Fate.Q8_0:
            return "q8_0", reason
        if len(source.shape) == 3 and not EXPERTS.search(name):
            return "q8_0", "3-D, no expert stack"
        target, why = scheme.matrix(name)
        if rule is None and is_ccq(target):
            self.unknown.append(name)
        if in_layers(name, self.mtp):
            fate, reason = MTP_BLOCK.fate, MTP_BLOCK.reason
        if fate is Fate.MEASURED and not self._measured(name) and (target == "free" or bits(target) < bits(UNMEASURED)):
            return UNMEASURED, f"no data of this {reason}"
        return target, why

    def _measured(self, name: str) -> bool:
        """Whether importance or a Hessian says anything about this very tensor."""
        imatrix, hessian = self.options.imatrix, self.options.hessian
        return (imatrix is not None and name in imatrix and name not in imatrix.estimated) or (
            hessian is not None and name in hessian
        )

"""Which tensor gets which type: the plan that every conversion follows and that ``--dry-run`` prints.

Types are lower-case names throughout: a CCQ type of ``ccq_format.layouts`` or one of ``STOCK_TYPES``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts
from ccq_format.errors import PlanError

from .hessian import Hessians
from .imatrix import Importance
from .mixtures import MIXTURES, MixtureScheme

PLAIN_TYPES: dict[str, tuple[int, int]] = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34)}
"""The stock types that are sources and targets: weights per block, bytes per block."""

STOCK_TYPES: dict[str, tuple[int, int]] = {**PLAIN_TYPES, "q4_0": (32, 18), "q5_0": (32, 22), "mxfp4": (32, 17)}
"""All stock types that we write; mxfp4 keeps what gpt-oss is published in.  Of the small ones gguf can quantize, q4_0
and q5_0 are a step above CCQ_T3 and leave less error than q4_1 and q5_1, which are larger (Gaussian weights, relative
squared error: q4_0 0.0074, q4_1 0.0061, q5_0 0.0018, q5_1 0.0014)."""

FLOAT_TYPES = ("f32", "f16", "bf16")

COPIED_TYPES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "f64": 8}
"""Types that are no weights (token tables and the like): copied as they are; bytes per element."""

VOCABULARY = re.compile(r"^(token_embd|output|per_layer_token_embd)\.weight$")

SMALL = re.compile(
    r"_norm\.weight$|ffn_gate_inp|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|^position_embd|^token_types"
    r"|ssm_conv1d|shortconv\.conv|indexer\.[kq]_proj|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)"
    r"|attn_rel_b|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger|rvq\.codebook"
    r"|mm\.a\.code_embd"
)
"""Tensors of two or more dimensions that llama.cpp itself never quantizes (``tensor_allows_quantization`` in
``src/llama-quant.cpp``): norms, routers, and small weights that other operations than a matrix product read."""

SMALLER_BLOCKS = {"ccq_t1": "ccq_t1_5"}
"""What a row falls back to before q8_0 if it is no multiple of the type's block: the next larger type of its kind."""

EXPERTS = re.compile(r"_(ch)?exps\.weight$")

LoadRows = Callable[[int, int], NDArray[np.float32]]
RawRows = Callable[[int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class TensorSource:
    """One tensor to convert.

    ``name`` is its GGUF name and ``shape`` its shape in numpy order (row length last).  Rows are the tensor reshaped
    to ``[prod(shape[:-1]), shape[-1]]`` (a 1-D tensor is one row): ``load_rows(start, stop)`` returns them as float32
    ``[stop - start, row_len]``, ``raw_rows(start, stop)``, if given, their stored bytes as uint8
    ``[stop - start, row_bytes]`` in type ``source_type`` (a lower-case type name), little-endian as in GGUF.  The
    bytes are copied unchanged where the target type is ``source_type``.
    """

    name: str
    shape: tuple[int, ...]
    load_rows: LoadRows
    source_type: str
    raw_rows: RawRows | None = None

    @property
    def row_len(self) -> int:
        """Weights per row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows, expert matrices stacked."""
        return prod(self.shape[:-1])

    @property
    def matrices(self) -> int:
        """Matrices stacked in the tensor."""
        return prod(self.shape[:-2])

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class QuantOptions:
    """What the user asked for.

    ``type`` is a type or a mixture (``mixtures.MIXTURES``); ``None`` where types are to be allocated to an average of
    ``target_bpw`` bits per weight or a file of ``target_size`` bytes (see ``allocate``); exactly one of the three.
    ``overrides`` are ``(regular expression, type)`` pairs on GGUF names, first match wins; ``imatrix`` weights the
    errors of the CCQ types; matrices with a Hessian are encoded with error feedback instead; ``threads`` <= 0 means one
    per CPU; ``effort`` is how far the T types' encoder searches (``ccq_backend.EFFORTS``); ``force`` takes types that
    make no sense without importance data all the same; ``resume`` keeps what an interrupted conversion has encoded, and
    goes on there.  ``resume.job_of`` must know which fields change no byte.
    """

    type: str | None = None
    overrides: list[tuple[str, str]] = field(default_factory=list)
    threads: int = 0
    effort: str = "default"
    fallback: bool = True
    overwrite: bool = False
    dry_run: bool = False
    resume: bool = False
    force: bool = False
    imatrix: Importance | None = None
    hessian: Hessians | None = None
    target_bpw: float | None = None
    target_size: int | None = None

    def __post_init__(self) -> None:
        if sum(wish is not None for wish in (self.type, self.target_bpw, self.target_size)) != 1:
            raise PlanError("give exactly one of --type, --target-bpw and --target-size")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor with its target type, its bytes in the file, the rule that chose the type, and where that was measured
    the loss expected of its encoding."""

    source: TensorSource
    type: str
    nbytes: int
    reason: str
    loss: float | None = None


class Scheme(Protocol):
    """What types a plan gives to the tensors that it is free to choose for."""

    def matrix(self, name: str) -> tuple[str, str]:
        """Type and reason of a matrix or a stack of experts."""

    def vocabulary(self, name: str) -> tuple[str, str]:
        """Type and reason of a token embedding or output matrix."""


@dataclass(frozen=True)
class Pure:
    """One type for all matrices; embedding and output are q8_0."""

    type: str

    def matrix(self, name: str) -> tuple[str, str]:
        """See ``Scheme``."""
        return self.type, "--type"

    def vocabulary(self, name: str) -> tuple[str, str]:
        """See ``Scheme``."""
        return "q8_0", "embedding or output"


@dataclass(frozen=True)
class Plan:
    """All tensors of the output in file order, with totals."""

    tensors: list[PlannedTensor]
    fallback_count: int
    fallback_bytes: int
    fallback_block: str
    loss_unit: str | None = None

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

    def warning(self) -> str | None:
        """One line that counts tensors and bytes that fell back to another type, or ``None``."""
        if not self.fallback_count:
            return None
        plural = "tensor" if self.fallback_count == 1 else "tensors"
        return (
            f"{self.fallback_count} {plural} ({format_bytes(self.fallback_bytes)}) fell back to another type because "
            f"the row length is no multiple of the block{self.fallback_block}"
        )

    def table(self) -> str:
        """The plan as plain text: one line per tensor, with its share of the expected loss where that was measured,
        then one line per type, then the totals."""
        total = sum(t.loss or 0.0 for t in self.tensors)
        head = ["tensor", "shape", "from", "type", "bytes"]
        rows = [[*head, "loss", "why"] if total else [*head, "why"]]
        for t in self.tensors:
            shape = " x ".join(map(str, t.source.shape))
            share = [f"{100 * t.loss / total:.2f} %" if t.loss is not None else ""] if total else []
            rows.append([t.source.name, shape, t.source.source_type, t.type, f"{t.nbytes:,}", *share, t.reason])
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
        return "\n".join([*lines, *self.by_type(), self.summary()])

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
        return f", expected loss {sum(t.loss or 0.0 for t in self.tensors):.4g} {self.loss_unit}"


def parse_type(text: str) -> str:
    """The canonical (lower-case) name of a target type; ``T2`` is short for ``ccq_t2``.

    Raises ``PlanError`` for an unknown name.
    """
    name = text.strip().lower()
    if name in STOCK_TYPES:
        return name
    for candidate in (name, f"ccq_{name}"):
        try:
            return layouts.by_name(candidate).name
        except KeyError:
            continue
    known = ", ".join([*(layout.name for layout in layouts.LAYOUTS), *MIXTURES, *STOCK_TYPES])
    raise PlanError(f"unknown type '{text}'; known types: {known}")


def is_ccq(type_name: str) -> bool:
    """Whether a canonical type name is a CCQ type."""
    return type_name not in STOCK_TYPES and type_name not in COPIED_TYPES


def block(type_name: str) -> tuple[int, int]:
    """Weights and bytes of one block of a canonical type name."""
    if type_name in STOCK_TYPES:
        return STOCK_TYPES[type_name]
    if type_name in COPIED_TYPES:
        return 1, COPIED_TYPES[type_name]
    layout = layouts.by_name(type_name)
    return layout.block_weights, layout.block_bytes


def row_bytes(type_name: str, row_len: int) -> int:
    """Bytes of a row of ``row_len`` weights, which must be whole blocks."""
    weights, nbytes = block(type_name)
    return row_len // weights * nbytes


def cpu_count() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def format_bytes(n: int) -> str:
    """A byte count for people: ``1.5 MiB``."""
    value, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{n} B" if unit == "B" else f"{value:.2f} {unit}"


def make_plan(
    sources: list[TensorSource],
    options: QuantOptions,
    scheme: Scheme | None = None,
    losses: Mapping[str, float] | None = None,
    loss_unit: str | None = None,
) -> Plan:
    """Choose a type for every tensor.

    1-D tensors, norms, routers and what no matrix product reads stay f32 or f16; for token embedding and output, and
    for every other matrix (2-D, or a 3-D stack of experts, its name ending in ``.weight``) ``scheme`` chooses, by
    default that of ``options.type``; a float type in ``options.type`` takes them all.
    ``options.overrides`` win over these rules for tensors of two or more dimensions.  A row length that is no multiple
    of the chosen type's block falls back to q8_0, then f16; from ccq_t1 to ccq_t1_5 first.  ``losses`` by tensor name,
    and their unit, are noted in the plan.

    Raises ``PlanError`` for an unknown type, a bad or unmatched pattern, or a fallback where none is allowed.
    """
    if scheme is None:
        if options.type is None:
            raise ValueError("types have to be allocated first")
        scheme = scheme_of(options.type, sources)
    overrides = _overrides(sources, options)
    planned: list[PlannedTensor] = []
    fallen: list[PlannedTensor] = []
    blocks: set[int] = set()
    for source in sources:
        target, reason = _choose(source, scheme, overrides)
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
            others = [SMALLER_BLOCKS[target]] if target in SMALLER_BLOCKS else []
            fitting = (other for other in [*others, "q8_0"] if source.row_len % block(other)[0] == 0)
            target = next(fitting, "f16")
        loss = losses.get(source.name) if losses is not None else None
        tensor = PlannedTensor(source, target, source.rows * row_bytes(target, source.row_len), reason, loss)
        planned.append(tensor)
        if misfit:
            fallen.append(tensor)
    sizes = f" ({', '.join(map(str, sorted(blocks)))})" if blocks else ""
    return Plan(planned, len(fallen), sum(t.nbytes for t in fallen), sizes, loss_unit)


def scheme_of(name: str, sources: list[TensorSource]) -> Scheme:
    """The scheme of a type or a mixture; ``T2_M`` is short for ``ccq_t2_m``.  Raises ``PlanError`` if there is none."""
    lower = name.strip().lower()
    for candidate in (lower, f"ccq_{lower}"):
        if candidate in MIXTURES:
            return MixtureScheme(MIXTURES[candidate], [(s.name, s.shape) for s in sources])
    return Pure(parse_type(name))


def free_matrices(sources: list[TensorSource], options: QuantOptions) -> list[TensorSource]:
    """The matrices whose type is the scheme's choice.  Raises ``PlanError`` as :func:`make_plan` does for patterns."""
    overrides = _overrides(sources, options)
    return [source for source in sources if _choose(source, Pure("free"), overrides)[0] == "free"]


def _overrides(sources: list[TensorSource], options: QuantOptions) -> list[tuple[re.Pattern[str], str]]:
    overrides = [(_compile(pattern), parse_type(target)) for pattern, target in options.overrides]
    for pattern, _ in overrides:
        if not any(len(s.shape) > 1 and pattern.search(s.name) for s in sources):
            raise PlanError(f"--tensor-type '{pattern.pattern}' matches no matrix of the model")
    return overrides


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PlanError(f"--tensor-type '{pattern}' is no regular expression: {error}") from None


def _choose(source: TensorSource, scheme: Scheme, overrides: list[tuple[re.Pattern[str], str]]) -> tuple[str, str]:
    """Type and reason before any fallback."""
    if source.source_type in COPIED_TYPES:
        return source.source_type, "no weights: copied"
    if len(source.shape) < 2:
        return "f32", "1-D"
    for pattern, target in overrides:
        if pattern.search(source.name):
            return target, f"--tensor-type {pattern.pattern}"
    if source.name.endswith("_norm.weight") or "ffn_gate_inp" in source.name:
        return "f32", "norm or router"
    if SMALL.search(source.name) or not source.name.endswith(".weight") or len(source.shape) > 3:
        # Operations other than a matrix product read these, and some (convolutions) insist on the type they have.
        kept = source.source_type if source.source_type in ("f32", "f16") else "f32"
        return kept, "not a matrix product"
    if isinstance(scheme, Pure) and scheme.type in FLOAT_TYPES:
        return scheme.type, "--type"
    if VOCABULARY.search(source.name):
        return scheme.vocabulary(source.name)
    if len(source.shape) == 3 and not EXPERTS.search(source.name):
        return "q8_0", "3-D, no expert stack"
    return scheme.matrix(source.name)

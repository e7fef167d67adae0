"""Which tensor gets which type: the plan that every conversion follows and that ``--dry-run`` prints.

Types are lower-case names throughout: a CCQ type of ``ccq_format.layouts`` or ``f32``, ``f16``, ``bf16``, ``q8_0``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from ccq_format import layouts
from ccq_format.errors import PlanError

from .hessian import Hessians
from .imatrix import Importance

PLAIN_TYPES: dict[str, tuple[int, int]] = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34)}
"""The stock types we write: weights per block, bytes per block."""

FLOAT_TYPES = ("f32", "f16", "bf16")

COPIED_TYPES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "f64": 8}
"""Types that are no weights (token tables and the like): copied as they are; bytes per element."""

_EMBEDDINGS = re.compile(r"^(token_embd|output|per_layer_token_embd)\.weight$")

_SMALL = re.compile(
    r"_norm\.weight$|ffn_gate_inp|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|^position_embd|^token_types"
    r"|ssm_conv1d|shortconv\.conv|indexer\.[kq]_proj|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)"
    r"|attn_rel_b|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger|rvq\.codebook"
    r"|mm\.a\.code_embd"
)
"""Tensors of two or more dimensions that llama.cpp itself never quantizes (``tensor_allows_quantization`` in
``src/llama-quant.cpp``): norms, routers, and small weights that other operations than a matrix product read."""

_EXPERTS = re.compile(r"_(ch)?exps\.weight$")

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

    ``overrides`` are ``(regular expression, type)`` pairs on GGUF names, first match wins; ``imatrix`` weights the
    errors of the CCQ types; matrices with a Hessian are encoded with error feedback instead; ``threads`` <= 0 means
    one per CPU; ``effort`` is how far the T types' encoder searches (``ccq_backend.EFFORTS``); ``resume`` keeps what an
    interrupted conversion has encoded, and goes on there.  ``resume.job_of`` must know which fields change no byte.
    """

    type: str
    overrides: list[tuple[str, str]] = field(default_factory=list)
    threads: int = 0
    effort: str = "default"
    fallback: bool = True
    overwrite: bool = False
    dry_run: bool = False
    resume: bool = False
    imatrix: Importance | None = None
    hessian: Hessians | None = None


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor with its target type, its bytes in the file and the rule that chose the type."""

    source: TensorSource
    type: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """All tensors of the output in file order, with totals."""

    tensors: list[PlannedTensor]
    fallback_count: int
    fallback_bytes: int
    fallback_block: str

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
        """The plan as plain text: one line per tensor, then the totals."""
        rows = [("tensor", "shape", "from", "type", "bytes", "why")]
        for t in self.tensors:
            shape = " x ".join(map(str, t.source.shape))
            rows.append((t.source.name, shape, t.source.source_type, t.type, f"{t.nbytes:,}", t.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for row in rows:
            cells = [f"{cell:<{w}}" for cell, w in zip(row[:4], widths[:4], strict=True)]
            cells.append(f"{row[4]:>{widths[4]}}")
            lines.append("  ".join([*cells, row[5]]))
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The totals as one line."""
        return (
            f"{len(self.tensors)} tensors, {self.n_weights:,} weights, {format_bytes(self.nbytes)}, "
            f"{self.file_bpw:.3f} bits per weight"
        )


def parse_type(text: str) -> str:
    """The canonical (lower-case) name of a target type; ``T2`` is short for ``ccq_t2``.

    Raises ``PlanError`` for an unknown name.
    """
    name = text.strip().lower()
    if name in PLAIN_TYPES:
        return name
    for candidate in (name, f"ccq_{name}"):
        try:
            return layouts.by_name(candidate).name
        except KeyError:
            continue
    known = ", ".join([*(layout.name for layout in layouts.LAYOUTS), *PLAIN_TYPES])
    raise PlanError(f"unknown type '{text}'; known types: {known}")


def is_ccq(type_name: str) -> bool:
    """Whether a canonical type name is a CCQ type."""
    return type_name not in PLAIN_TYPES and type_name not in COPIED_TYPES


def block(type_name: str) -> tuple[int, int]:
    """Weights and bytes of one block of a canonical type name."""
    if type_name in PLAIN_TYPES:
        return PLAIN_TYPES[type_name]
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


def make_plan(sources: list[TensorSource], options: QuantOptions) -> Plan:
    """Choose a type for every tensor.

    1-D tensors, norms and routers stay f32; token embedding and output become q8_0, every other matrix (2-D, or a 3-D
    stack of experts, its name ending in ``.weight``) ``options.type``.  With ``options.type`` f32, f16 or bf16 the
    embedding and output take that type, too.  ``options.overrides`` win over these rules for tensors of two or more
    dimensions.  A row length that is no multiple of the chosen type's block falls back to q8_0, then f16.

    Raises ``PlanError`` for an unknown type, a bad or unmatched pattern, or a fallback where none is allowed.
    """
    base = parse_type(options.type)
    overrides = [(_compile(pattern), parse_type(target)) for pattern, target in options.overrides]
    for pattern, _ in overrides:
        if not any(len(s.shape) > 1 and pattern.search(s.name) for s in sources):
            raise PlanError(f"--tensor-type '{pattern.pattern}' matches no matrix of the model")

    planned: list[PlannedTensor] = []
    fallen: list[PlannedTensor] = []
    blocks: set[int] = set()
    for source in sources:
        target, reason = _choose(source, base, overrides)
        weights, _ = block(target)
        if source.row_len % weights:
            if not options.fallback:
                raise PlanError(
                    f"row length {source.row_len} is no multiple of {weights}, the block of {target}",
                    tensor=source.name,
                )
            blocks.add(weights)
            fitting = "q8_0" if source.row_len % PLAIN_TYPES["q8_0"][0] == 0 else "f16"
            reason = f"row length {source.row_len} does not fit {target} ({weights})"
            target = fitting
            fallen.append(PlannedTensor(source, target, source.rows * row_bytes(target, source.row_len), reason))
        planned.append(PlannedTensor(source, target, source.rows * row_bytes(target, source.row_len), reason))
    sizes = f" ({', '.join(map(str, sorted(blocks)))})" if blocks else ""
    return Plan(planned, len(fallen), sum(t.nbytes for t in fallen), sizes)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PlanError(f"--tensor-type '{pattern}' is no regular expression: {error}") from None


def _choose(source: TensorSource, base: str, overrides: list[tuple[re.Pattern[str], str]]) -> tuple[str, str]:
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
    if _SMALL.search(source.name) or not source.name.endswith(".weight") or len(source.shape) > 3:
        # Operations other than a matrix product read these, and some (convolutions) insist on the type they have.
        kept = source.source_type if source.source_type in ("f32", "f16") else "f32"
        return kept, "not a matrix product"
    if base in FLOAT_TYPES:
        return base, "--type"
    if _EMBEDDINGS.search(source.name):
        return "q8_0", "embedding or output"
    if len(source.shape) == 3 and not _EXPERTS.search(source.name):
        return "q8_0", "3-D, no expert stack"
    return base, "--type"

"""Write a model tensor by tensor: load, encode and write a few rows at a time, so that memory stays small."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ccq_format import layouts
from ccq_format._partial import partial_path
from ccq_format.errors import CcqError, ImportanceError, PlanError
from ccq_format.gguf_io import Model, ModelWriter, SplitWriter

from . import borrow
from .allocate import Overhead, allocate, compared, spare
from .encode import check_weights, encode_rows, on_gpu, rows_of_importance
from .feedback import Factors, encode_with_feedback, factorize
from .hessian import Hessians
from .imatrix import Importance, provenance
from .mixtures import MixtureScheme
from .outliers import BlockErrors, Report
from .plan import (
    Plan,
    PlannedTensor,
    QuantOptions,
    TensorSource,
    cpu_count,
    format_bytes,
    is_ccq,
    make_plan,
    scheme_of,
)
from .resume import job_of
from .rules import is_vocabulary

log = logging.getLogger(__name__)

Writer: TypeAlias = "ModelWriter | SplitWriter"

_CHUNK_CCQ = 1 << 16
"""Weights per step and thread of a CCQ encoder: about half a second, so that Ctrl-C and the progress bar feel alive."""

_CHUNK_GPU = 1 << 24
"""Weights per step of a GPU's encoder, which needs many at a time."""

_ROWS_FEEDBACK = 512
"""Rows per step with error feedback, which encodes them one block of columns at a time."""

_ROWS_FEEDBACK_GPU = 2048

_CHUNK_PLAIN = 1 << 22
"""Weights per step of the other types (16 MiB of float32)."""


def write_model(
    out_path: str | os.PathLike[str],
    *,
    arch: str,
    set_metadata: Callable[[gguf.GGUFWriter], None] | None = None,
    sources: list[TensorSource],
    options: QuantOptions,
    progress: bool = True,
    copy_from: Model | None = None,
    files: Sequence[Path] = (),
) -> Plan:
    """Plan, encode and write a whole GGUF file; with ``options.dry_run`` only plan.

    ``arch`` is ``general.architecture``; all other keys are those of the file ``copy_from``, then those that
    ``set_metadata`` adds to the writer it is given.  The file appears under ``out_path`` only when it is complete; an
    exception or an interrupt leaves none, but with ``options.resume`` what the next call goes on with; ``files`` are
    then the files that the sources are read from.  A progress bar goes to stderr if ``progress`` and if that is a
    terminal.

    Raises ``PlanError``, ``WeightsError`` and ``ImportanceError`` (naming the tensor) and ``OutputError``.
    """
    options = _sized(options, sources)
    if options.imatrix is not None:
        options = replace(options, imatrix=borrow.complete(options.imatrix, sources))
    if options.hessian is not None:
        options = replace(options, hessian=borrow.complete_hessians(options.hessian, sources))
    losses_known = options.imatrix is not None and options.imatrix.knows_losses
    if options.type is not None and not (options.dry_run and losses_known):
        plan = make_plan(sources, options)
        if isinstance(scheme_of(options.type, sources), MixtureScheme):
            plan = _spared(plan, options, progress)
    else:
        plan = _measured_plan(arch, set_metadata, sources, options, progress, copy_from)
    for warning in plan.warnings():
        log.warning(warning)
    if options.imatrix is not None:
        check_importance(plan, options.imatrix)
    elif options.hessian is None and not (options.calibrate and options.dry_run):
        refuse_without_data(plan, options.force)
        warn_without_data(plan)
    if options.hessian is not None:
        check_hessians(plan, options.hessian)
    if options.dry_run:
        return plan
    write_planned(
        out_path,
        plan,
        arch=arch,
        options=options,
        set_metadata=set_metadata,
        progress=progress,
        copy_from=copy_from,
        files=files,
    )
    return plan


def _sized(options: QuantOptions, sources: list[TensorSource]) -> QuantOptions:
    """The options with a size in bytes instead of a part of the model's size in 16 bits."""
    if options.target_ratio is None:
        return options
    size = int(options.target_ratio * 2 * sum(source.n_weights for source in sources))
    return replace(options, target_size=size, target_ratio=None)


NEEDS_DATA = 4.0
"""Bits per weight below which a type needs to know which inputs matter.

Without that SmolLM2-135M in CCQ_T2 has a KL divergence from itself of 6.0 and talks nonsense; with importance 0.98
(``calibrate --chunks 64`` on the bundled text; 16 windows of 512, technical English).  A few input
channels of real models carry most of the signal, and errors that count alike waste the bits on the others."""


def lacks_data(plan: Plan) -> list[PlannedTensor]:
    """The matrices that get fewer than ``NEEDS_DATA`` bits per weight: they need to know which inputs matter."""
    return [t for t in plan.tensors if _wants_data(t) and 8 * t.nbytes < NEEDS_DATA * t.source.n_weights]


USELESS_WITHOUT_DATA = 1.5
"""Bits per weight below which no model says anything without such data; see ``NEEDS_DATA``."""


def refuse_without_data(plan: Plan, force: bool) -> None:
    """Raise ``PlanError`` if a matrix gets fewer than ``USELESS_WITHOUT_DATA`` bits per weight, unless ``force``."""
    for t in plan.tensors:
        if not force and _wants_data(t) and 8 * t.nbytes < USELESS_WITHOUT_DATA * t.source.n_weights:
            raise PlanError(
                f"{t.type} is of no use without importance data: run `ccq-convert calibrate` first and give its files "
                "with --imatrix and --hessian (or insist with --force)",
                tensor=t.source.name,
            )


def warn_without_data(plan: Plan) -> None:
    """Warn, in one line, of matrices that lack data."""
    few = lacks_data(plan)
    if few:
        log.warning(
            "%d matrices get under %g bits per weight without importance data: at 2 bits most models then talk "
            "nonsense, at 3 they lose far more than they need to; run `ccq-convert calibrate` first and give its file "
            "with --imatrix",
            len(few),
            NEEDS_DATA,
        )


def check_importance(plan: Plan, importance: Importance) -> None:
    """Match an importance file with the tensors that get a CCQ type.  Warns, a line each, of those that take another
    tensor's importance, of those for which it is estimated, of those without any, and of experts hit rarely.

    Raises ``ImportanceError`` if no tensor has an entry of its own or of a tensor with the same input, or if an entry
    has another shape than its tensor.
    """
    tied = all(t.source.name != "output.weight" for t in plan.tensors)
    wanted = {t.source.name: t.source for t in plan.tensors if _wants_data(t) or _is_output(t, tied)}
    found = {name: source.matrices for name, source in wanted.items() if name in importance}
    if not wanted:
        log.warning("%s: not used, because no tensor gets a CCQ type", importance.file)
        return
    if all(name in importance.estimated for name in found):
        raise ImportanceError(
            f"none of its {len(importance.entries) - len(importance.estimated)} entries names one of the {len(wanted)} "
            f"tensors to encode (such as '{next(iter(wanted))}'): it belongs to another model",
            file=importance.file,
        )
    for name, matrices in found.items():
        importance.check(name, matrices, wanted[name].row_len)
    for names, what in (
        ([n for n in found if n in importance.borrowed], "no entry for %d of %d tensors, which take that of a tensor "
         "with the same input: %s"),
        ([n for n in found if n in importance.estimated], "no entry for %d of %d tensors, for which it is estimated "
         "from the inputs of near layers: %s"),
        ([n for n in wanted if n not in found], "no importance for %d of %d tensors, of which all weights count "
         "alike: %s"),
    ):  # fmt: skip
        if names:
            log.warning(f"%s: {what}", importance.file, len(names), len(wanted), borrow.summary(names))
    report = importance.expert_report(found)
    if report:
        log.warning(report)


def _wants_data(tensor: PlannedTensor) -> bool:
    """Whether a tensor needs data to be encoded well: not an embedding, whose rows are looked up, nor the output
    matrix, which is left out of the data by default."""
    return is_ccq(tensor.type) and not tensor.copied and not is_vocabulary(tensor.source.name)


def _is_output(tensor: PlannedTensor, tied: bool) -> bool:
    """Whether a tensor is the output matrix, in a CCQ type."""
    return is_ccq(tensor.type) and tensor.source.name == ("token_embd.weight" if tied else "output.weight")


def check_hessians(plan: Plan, hessians: Hessians) -> None:
    """Match a Hessian file with the tensors that get a CCQ type: warn of those without a Hessian (one line).

    Raises ``ImportanceError`` if no tensor has one.
    """
    wanted = [t.source.name for t in plan.tensors if _wants_data(t)]
    missing = [name for name in wanted if name not in hessians]
    if not wanted:
        log.warning("%s: not used, because no tensor gets a CCQ type", hessians.file)
    elif len(missing) == len(wanted):
        raise ImportanceError(
            f"has no Hessian of any of the {len(wanted)} tensors to encode (such as '{wanted[0]}'): it belongs to "
            "another model",
            file=hessians.file,
        )
    elif missing:
        log.warning(
            "%s: no Hessian for %d of %d tensors: %s", hessians.file, len(missing), len(wanted), borrow.summary(missing)
        )


def write_planned(
    out_path: str | os.PathLike[str],
    plan: Plan,
    *,
    arch: str,
    options: QuantOptions,
    set_metadata: Callable[[gguf.GGUFWriter], None] | None = None,
    progress: bool = True,
    copy_from: Model | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Write what ``plan`` says; the arguments are those of :func:`write_model`."""
    job = None
    if options.resume:
        job = job_of(options, files)
    elif partial_path(out_path).exists():
        log.warning("%s: left as it is; only --resume goes on with it", partial_path(out_path))
    writer: Writer = ModelWriter(out_path, arch, overwrite=options.overwrite, job=job)
    if options.split_max_size is not None:
        writer = SplitWriter(out_path, arch, options.split_max_size, overwrite=options.overwrite, job=job)
    try:
        with writer:
            _declare(writer, plan, options, set_metadata, copy_from)
            _write_tensors(writer, plan, options, progress)
    except BaseException as error:
        if writer.kept or writer.kept_bytes:
            part = f" and {format_bytes(writer.kept_bytes)} of the next" if writer.kept_bytes else ""
            kept = f"{writer.kept} of {len(plan.tensors)} tensors{part} are kept; the same command goes on from there"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            log.warning("%s: %s", out_path, kept)
        raise


def _write_tensors(writer: Writer, plan: Plan, options: QuantOptions, progress: bool) -> None:
    writer.begin()
    done, left = plan.tensors[: writer.completed], plan.tensors[writer.completed :]
    # An interrupted job may have stopped inside a tensor, behind whole rows of it.
    start = writer.written * left[0].source.rows // left[0].nbytes if writer.written else 0
    kept = sum(t.source.n_weights for t in done) + (start * left[0].source.row_len if start else 0)
    report = Report()
    with progress_bar(progress) as bar:
        task = bar.add_task("", total=plan.n_weights, completed=kept)
        for tensor in left:
            bar.update(task, description=tensor.source.name)
            errors = BlockErrors(tensor.source.name, tensor.type)
            for data, weights in encoded_rows(tensor, options, errors, start):
                writer.write(tensor.source.name, data)
                bar.advance(task, weights)
            report.add(errors)
            start = 0
    report.finish()


def _declare(
    writer: Writer,
    plan: Plan,
    options: QuantOptions,
    set_metadata: Callable[[gguf.GGUFWriter], None] | None,
    copy_from: Model | None,
) -> None:
    """Give the writer its metadata and tensors."""
    if copy_from is not None:
        writer.copy_metadata(copy_from)
    if set_metadata is not None:
        set_metadata(writer.gguf)
    if options.imatrix is not None and any(is_ccq(t.type) and not t.copied for t in plan.tensors):
        _note_importance(writer.gguf, options.imatrix)
    for tensor in plan.tensors:
        writer.add_tensor(tensor.source.name, tensor.type, tensor.source.shape)


def _measured_plan(
    arch: str,
    set_metadata: Callable[[gguf.GGUFWriter], None] | None,
    sources: list[TensorSource],
    options: QuantOptions,
    progress: bool,
    copy_from: Model | None,
) -> Plan:
    """The plan for a target, or what a plan by names is expected to lose, with a progress bar."""
    # The header has the same size whichever T types the tensors have: write it and look.
    like = make_plan(sources, replace(options, type=options.type or "ccq_t2", target_size=None, target_bpw=None))
    with tempfile.TemporaryDirectory() as folder:
        writer = ModelWriter(os.path.join(folder, "header.gguf"), arch)
        try:
            _declare(writer, like, options, set_metadata, copy_from)
            writer.begin()
        finally:
            writer.abort()
    overhead = Overhead(writer.header_bytes, writer.gguf.data_alignment)
    with progress_bar(progress) as bar:
        task = bar.add_task("", total=sum(len(s.shape) > 1 for s in sources))

        def advance(name: str) -> None:
            bar.update(task, description=f"measuring {name}", advance=1)

        if options.type is not None:
            return compared(like, sources, options, overhead, advance)
        return allocate(sources, options, overhead, advance)


def _spared(plan: Plan, options: QuantOptions, progress: bool) -> Plan:
    """``allocate.spare`` with a progress bar."""
    with progress_bar(progress) as bar:
        task = bar.add_task("", total=sum(len(t.source.shape) > 1 for t in plan.tensors))
        return spare(plan, options, lambda name: bar.update(task, description=f"looking at {name}", advance=1))


def _note_importance(writer: gguf.GGUFWriter, importance: Importance) -> None:
    for key in [key for key in writer.kv_data[0] if key.startswith("quantize.imatrix.")]:
        del writer.kv_data[0][key]  # of the file copied from
    for key, value in provenance(importance).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)


def progress_bar(wanted: bool) -> Progress:
    """A progress bar on stderr that goes away when it is done, or nothing at all where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (wanted and console.is_terminal),
    )


def encoded_rows(
    tensor: PlannedTensor, options: QuantOptions, errors: BlockErrors | None = None, first: int = 0
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The tensor in its target type from row ``first`` on, a few rows at a time: (uint8 ``[rows, row_bytes]``, number
    of weights).

    ``errors``, if given, is told what they are decoded to if that is a CCQ type.

    Raises ``WeightsError`` and ``ImportanceError``.
    """
    source = tensor.source
    if source.n_weights == 0:
        yield np.empty(0, np.uint8), 0
        return
    importance = None
    if options.imatrix is not None and is_ccq(tensor.type):
        importance = options.imatrix.for_tensor(source.name, source.matrices, source.row_len)
    threads = options.threads if options.threads > 0 else cpu_count()
    searched = is_ccq(tensor.type) and not tensor.copied
    at_once = _CHUNK_GPU if on_gpu(tensor.type, options.device) else _CHUNK_CCQ * threads
    step = max(1, (at_once if searched else _CHUNK_PLAIN) // source.row_len)
    if options.hessian is not None and searched and source.name in options.hessian:
        yield from _rows_with_feedback(tensor, options.hessian, threads, options, errors, first)
        return
    copied = source.raw_rows if tensor.copied else None
    for start in range(first, source.rows, step):
        stop = min(start + step, source.rows)
        weights = (stop - start) * source.row_len
        if copied is not None:
            if tensor.type in ("f32", "f16", "bf16", "q8_0"):
                check_weights(source.load_rows(start, stop), tensor.type, source.name)
            yield copied(start, stop), weights
            continue
        x = source.load_rows(start, stop)
        check_weights(x, tensor.type, source.name)
        part = None
        if importance is not None:
            part = rows_of_importance(importance, source.name, source.rows, source.row_len, start, stop)
        try:
            blocks = encode_rows(tensor.type, x, part, threads, options.effort, options.device)
        except CcqError as error:
            if error.tensor is not None:
                raise
            raise type(error)(error.reason, tensor=source.name) from error
        _note_errors(errors, x, blocks)
        yield blocks, weights


def _note_errors(errors: BlockErrors | None, x: NDArray[np.float32], blocks: NDArray[np.uint8]) -> None:
    if errors is not None and is_ccq(errors.type):
        import ccq_backend  # plain conversions need no compiled kernels

        errors.add(x, ccq_backend.decode(layouts.by_name(errors.type), blocks))


def _rows_with_feedback(
    tensor: PlannedTensor,
    hessians: Hessians,
    threads: int,
    options: QuantOptions,
    errors: BlockErrors | None,
    first: int,
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """``encoded_rows`` of a matrix, or a stack of them, that has a Hessian."""
    source = tensor.source
    per_matrix = source.rows // source.matrices
    step = _ROWS_FEEDBACK_GPU if on_gpu(tensor.type, options.device) else _ROWS_FEEDBACK
    for matrix in range(first // per_matrix, source.matrices):
        factors = _factors(tensor, hessians, matrix)
        end = (matrix + 1) * per_matrix
        for start in range(max(first, matrix * per_matrix), end, step):
            stop = min(start + step, end)
            x = source.load_rows(start, stop)
            check_weights(x, tensor.type, source.name)
            blocks = encode_with_feedback(x, factors, threads, options.effort, options.device)
            _note_errors(errors, x, blocks)
            yield blocks, (stop - start) * source.row_len
        del factors  # before the next ones are computed


def _factors(tensor: PlannedTensor, hessians: Hessians, matrix: int) -> Factors:
    source = tensor.source
    # In float64 from the start, and in place: 8 n^2 bytes are all that a row length of n needs.
    product, count = hessians.product(source.name, source.matrices, source.row_len, matrix, dtype=np.float64)
    try:
        layout = layouts.by_name(tensor.type)
        return factorize(product, layout, count=count, depth=hessians.depth, overwrite=True)
    except ImportanceError as error:
        raise ImportanceError(error.reason, file=hessians.file, tensor=source.name) from error

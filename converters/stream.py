"""Write a model tensor by tensor, a few rows at a time, so that memory stays small."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeAlias

import gguf

from ccq_format._partial import partial_path
from ccq_format.gguf_io import ModelWriter, SplitWriter
from ccq_format.output import OutputFile, refuse_inputs

from .console import format_bytes, progress_bar
from .conversion import Conversion
from .encode_tensor import encoded_rows
from .imatrix import Importance, provenance
from .options import QuantOptions
from .outliers import BlockErrors, Report
from .plan import Plan
from .resume import job_of

log = logging.getLogger(__name__)

Writer: TypeAlias = "ModelWriter | SplitWriter"


def write_planned(conversion: Conversion, plan: Plan, options: QuantOptions) -> None:
    """Encode and write what ``plan`` says.

    The file appears only when it is complete; an exception or an interrupt leaves none, but with ``options.resume``
    what the next call goes on with.  Raises ``WeightsError`` and ``ImportanceError`` (naming the tensor) and
    ``OutputError``.
    """
    out, arch = conversion.out, conversion.arch
    job = job_of(options, conversion.files) if options.resume else None
    if options.split_max_size is None or isinstance(out, OutputFile):
        writer: Writer = ModelWriter(out, arch, overwrite=options.overwrite, job=job)
    else:
        writer = SplitWriter(out, arch, options.split_max_size, overwrite=options.overwrite, job=job)
    if job is None and not isinstance(out, OutputFile):
        warn_of_kept(partial_path(writer.path))
    try:
        with conversion.naming_source(), writer:
            declare(writer, conversion, plan, options)
            writer.begin()
            refuse_inputs(writer.files, [*conversion.files, *data_files(options)])
            _write_tensors(writer, plan, options, conversion.progress)
    except BaseException as error:
        if writer.kept or writer.kept_bytes:
            part = f" and {format_bytes(writer.kept_bytes)} of the next" if writer.kept_bytes else ""
            done = f"{writer.kept} of {len(plan.tensors)} tensors{part} are kept; the same command goes on from there"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(done) from None
            log.warning("%s: %s", writer.path, done)
        raise


def warn_of_kept(*paths: Path) -> None:
    """What an interrupted conversion has kept there, and this one does not go on with."""
    for path in paths:
        if path.exists():
            log.warning("%s: left as it is; only --resume goes on with it", path)


def data_files(options: QuantOptions) -> list[str]:
    """The importance and Hessian files of a conversion."""
    return [data.file for data in (options.imatrix, options.hessian) if data is not None]


def declare(writer: Writer, conversion: Conversion, plan: Plan, options: QuantOptions) -> None:
    """Give the writer its metadata and tensors."""
    if conversion.copy_from is not None:
        writer.copy_metadata(conversion.copy_from)
    if conversion.set_metadata is not None:
        conversion.set_metadata(writer.gguf)
    if options.imatrix is not None and any(tensor.searched for tensor in plan.tensors):
        _note_importance(writer.gguf, options.imatrix)
    for tensor in plan.tensors:
        writer.add_tensor(tensor.source.name, tensor.type, tensor.source.shape)


def _note_importance(writer: gguf.GGUFWriter, importance: Importance) -> None:
    for key in [key for key in writer.kv_data[0] if key.startswith("quantize.imatrix.")]:
        del writer.kv_data[0][key]  # of the file copied from
    for key, value in provenance(importance).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)


def _write_tensors(writer: Writer, plan: Plan, options: QuantOptions, progress: bool) -> None:
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

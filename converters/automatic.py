"""Calibration that a conversion does by itself: no file of few bits without data that says which weights matter.

A conversion without ``--imatrix`` and ``--hessian`` to types under ``data.NEEDS_DATA`` bits first runs the model in
llama.cpp on the text that comes with the package and collects importance, and Hessians if there is room for them; one
to a target without losses measures these as well.  A model that is no GGUF file yet is first written as one, in the
types that it has, beside the output, and removed again.  With ``resume`` the result is kept beside the unfinished
output, for the run that goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ccq_format import __version__
from ccq_format.errors import CcqError, EvalError
from ccq_format.gguf_io import ModelWriter, SplitWriter, open_model
from ccq_format.output import OutputFile, Scratch, refuse_inputs

from . import imatrix
from .borrow import input_of
from .calibration import BUNDLED_TEXT, CalibrationOptions
from .collect import BATCH, calibrate_file, calibrate_gguf
from .console import format_bytes, progress_bar
from .conversion import Conversion
from .convert import check_target, write_model
from .data import lacks_data, wants_data
from .evaluate import read_text
from .hessian import Hessians
from .host import free_memory
from .imatrix import Importance
from .losses import measure_losses
from .options import QuantOptions
from .plan import Plan, make_plan
from .resume import job_of
from .rules import is_vocabulary, never_quantized
from .schemes import Keep
from .stream import data_files, warn_of_kept, write_planned
from .target_types import STOCK_TYPES
from .tensors import TensorSource

log = logging.getLogger(__name__)

TOKENS = 1 << 14
"""Tokens that importance is collected on."""

WINDOW = 512
"""Tokens per window, unless the model's context is shorter."""

_JOB = "calibration.job"
"""Key of a kept calibration: what it was made of."""

_OTHERWISE = (
    "give importance from elsewhere with --imatrix ('ccq-convert calibrate' of a smaller q8_0 file of the model, or "
    "llama-imatrix), or convert without any (--no-calibration)"
)

_WOULD = (
    "not calibrated, as this is a dry run: the conversion would first measure on a text which weights matter "
    "('ccq-convert calibrate --losses' measures it for dry runs as well, with --imatrix)"
)


_CALIBRATED = "its calibration is kept; the same command goes on from there"


def write_calibrated(conversion: Conversion, options: QuantOptions) -> Plan:
    """Plan and write the file, with the data that :func:`calibrated` adds.  Raises what that and
    ``convert.write_model`` do."""
    if not options.dry_run:
        refuse_inputs([conversion.path], [*conversion.files, *data_files(options)])
        if not options.resume:
            warn_of_kept(*kept_paths(conversion.path))
    with calibrated(conversion, options) as options:
        return write_model(conversion, options)


@contextmanager
def calibrated(conversion: Conversion, options: QuantOptions) -> Iterator[QuantOptions]:
    """The options with the data that they lack: importance, for targets losses, Hessians (``options.feedback``).

    Nothing is done unless ``options.calibrate``, nor if ``options.dry_run``, which only says so.  Raises ``EvalError``
    if the model cannot be run: packages or memory are missing, or llama.cpp refuses it; and what
    ``convert.write_model`` and ``collect.calibrate_gguf`` raise.
    """
    wanted = _wanted(conversion.sources, options)
    if not options.calibrate or wanted == _Wanted(False, False, False):
        yield options
        return
    if options.dry_run:
        log.info("%s", _WOULD)
        yield options
        return
    _refuse(conversion, options)
    if options.resume:
        kept = _Kept(conversion, options, wanted)
        if (found := kept.load(options)) is None:
            kept.wanted = wanted = _with_hessians(conversion, options, wanted)
            kept.save(_measured(conversion, options, wanted, kept.hessians))
            found = kept.load(options)
            assert found is not None
        try:
            yield found
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(str(interrupt) or _CALIBRATED) from None
        kept.remove()
        return
    wanted = _with_hessians(conversion, options, wanted)
    with Scratch(conversion.path) as hessians:
        data = _measured(conversion, options, wanted, hessians)
        products = Hessians(hessians.reachable) if wanted.hessians else options.hessian
        yield replace(options, imatrix=data, hessian=products)


def _refuse(conversion: Conversion, options: QuantOptions) -> None:
    """Before the work, what would be refused after it: the output, a target that no plan reaches."""
    OutputFile(conversion.path, overwrite=options.overwrite)
    if options.split_max_size is not None:
        SplitWriter(conversion.path, conversion.arch, options.split_max_size, overwrite=options.overwrite)
    if options.type is None:
        check_target(conversion, options)


@dataclass(frozen=True)
class _Wanted:
    """What is to be measured; ``hessians``: ``None`` if there is room for them."""

    importance: bool
    losses: bool
    hessians: bool | None


def _wanted(sources: list[TensorSource], options: QuantOptions) -> _Wanted:
    data, asked = options.imatrix, bool(options.feedback) and options.hessian is None
    if options.type is not None:
        plan = make_plan(sources, options)
        asked = asked and any(map(wants_data, plan.tensors))
        without = data is None and (asked or options.hessian is None)
        importance, losses = without and (asked or bool(lacks_data(plan))), False
    else:
        importance, losses = data is None, data is None or not data.knows_losses
    might = options.feedback is None and importance and options.hessian is None
    return _Wanted(importance, losses, asked or (None if might else False))


def _with_hessians(conversion: Conversion, options: QuantOptions, wanted: _Wanted) -> _Wanted:
    """``wanted`` with a decision on Hessians: all products have to fit beside the model, half of the free memory being
    theirs (``collect``), and into half of what is free on the disk."""
    if wanted.hessians is not None:
        return wanted
    needed = _products_bytes(conversion.sources, vocabulary=options.type is None)
    beside = free_memory() - _to_run(conversion, 2 * sum(source.n_weights for source in conversion.sources))
    room = min(beside, shutil.disk_usage(conversion.path.parent).free) // 2
    if needed > room > 0:  # else the model itself does not fit, which is an error
        log.info(
            "without error feedback: there is no room for its Hessians, %s (--hessian auto collects them in parts, on "
            "disk)",
            format_bytes(needed),
        )
    return replace(wanted, hessians=needed <= room)


def _products_bytes(sources: list[TensorSource], vocabulary: bool) -> int:
    """About what the products of all inputs take, in bytes; ``vocabulary``: of embedding and output, too."""
    sizes: dict[object, int] = {}
    for source in sources:
        if len(source.shape) < 2 or never_quantized(source.name) or (is_vocabulary(source.name) and not vocabulary):
            continue
        size = 4 * source.matrices * source.row_len**2
        sizes[input_of(source.name)] = max(size, sizes.get(input_of(source.name), 0))
    return sum(sizes.values())


def calibrate_as_gguf(
    conversion: Conversion,
    text_path: Path,
    options: CalibrationOptions,
    hessian: Path | None,
) -> Importance:
    """What ``collect.calibrate_file`` does, of a model that is no GGUF file yet; ``conversion.path`` is the importance
    file.  Raises what that and :func:`runnable` do."""
    OutputFile(conversion.path, overwrite=options.overwrite)  # refuses a target before the work
    if find_spec("llama_cpp") is None:
        raise EvalError("calibration needs llama-cpp-python (pip install '.[llama]')", file=conversion.source)
    with runnable(conversion, "make a q8_0 file of it (hf2gguf --type q8_0), and calibrate that") as path:
        return calibrate_file(path, text_path, conversion.path, options, hessian=hessian, progress=conversion.progress)


def _measured(
    conversion: Conversion, options: QuantOptions, wanted: _Wanted, hessians: Path | OutputFile
) -> Importance:
    if find_spec("llama_cpp") is None:
        raise EvalError(f"calibration needs llama-cpp-python (pip install '.[llama]'); or {_OTHERWISE}")
    text = read_text(BUNDLED_TEXT)
    data = options.imatrix
    with runnable(conversion, _OTHERWISE) as path, progress_bar(conversion.progress) as bar:
        window = _window(path)
        # The output matrix may get few bits, unless types are asked for.
        settings = CalibrationOptions(
            window, TOKENS // window, options.threads, process_output=options.type is None, overwrite=True
        )
        task = bar.add_task("calibrating", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            if wanted.importance or wanted.hessians or data is None:
                found = calibrate_gguf(
                    path,
                    text,
                    settings,
                    file="automatic calibration",
                    datasets=[BUNDLED_TEXT.name],
                    hessian=hessians if wanted.hessians else None,
                    advance=advance,
                )
                data = data or found
            if wanted.losses:
                bar.update(task, description="measuring losses", completed=0, total=None)
                data = measure_losses(path, text, data, threads=options.threads, advance=advance)
        except EvalError as error:
            raise EvalError(f"calibration: {error.reason}; {_OTHERWISE}", file=conversion.source) from error
    tokens = settings.ctx * (settings.chunks or 0)
    what = [f"importance of {len(data.entries)} matrices from {tokens} tokens"] if wanted.importance else []
    what += ["their Hessians"] if wanted.hessians else []
    what += [f"losses of {len(data.losses)} tensors"] if wanted.losses else []
    log.info(
        "calibrated on the text that comes with this package: %s ('ccq-convert calibrate' does it on yours, and makes "
        "files to keep and give with --imatrix and --hessian)",
        ", ".join(what),
    )
    return data


@contextmanager
def runnable(conversion: Conversion, otherwise: str) -> Iterator[Path]:
    """A GGUF file of the model in the types that it has, removed afterwards if it had to be written.

    Raises ``EvalError`` if it does not fit into the memory that is free, and says what to do ``otherwise``; and what
    ``stream.write_planned`` raises.
    """
    if conversion.runnable is not None:
        _check_memory(conversion, sum(t.nbytes for t in open_model(conversion.runnable).tensors), otherwise)
        yield conversion.runnable
        return
    options = QuantOptions("bf16")
    plan = make_plan(conversion.sources, options, _AsStored({s.name: s.source_type for s in conversion.sources}))
    _check_memory(conversion, plan.nbytes, otherwise)
    with Scratch(conversion.path) as file:
        write_planned(replace(conversion, out=file, files=()), plan, options)
        yield file.reachable


@dataclass(frozen=True)
class _AsStored(Keep):
    """Keeps the types that GGUF has, and f32 in half the size."""

    def matrix(self, name: str) -> tuple[str, str]:
        """See ``schemes.Scheme``."""
        stored = self.types[name]
        return (stored if stored in STOCK_TYPES and stored != "f32" else "bf16"), "as stored"

    vocabulary = matrix


def _to_run(conversion: Conversion, nbytes: int) -> int:
    """The memory that llama.cpp takes for a model of ``nbytes``."""
    vocabulary = next((s.rows for s in conversion.sources if s.name == "token_embd.weight"), 0)
    return nbytes + 8 * BATCH * vocabulary


def _check_memory(conversion: Conversion, nbytes: int, otherwise: str) -> None:
    needed, free = _to_run(conversion, nbytes), free_memory()
    if needed > free:
        raise EvalError(
            f"calibration would run this model in llama.cpp, which takes {format_bytes(needed)} of memory; "
            f"{format_bytes(free)} are free: {otherwise}",
            file=conversion.source,
        )


def _window(path: Path) -> int:
    """The tokens of a window."""
    model = open_model(path)
    context = model.metadata.get(f"{model.arch}.context_length")
    return min(WINDOW, context) if isinstance(context, int) and context > 1 else WINDOW


def kept_paths(path: Path) -> tuple[Path, Path]:
    """Where a conversion to ``path`` that can be resumed keeps importance and Hessians."""
    return path.with_name(f".{path.name}.calibration"), path.with_name(f".{path.name}.hessian")


class _Kept:
    """The calibration of a conversion that can be resumed: ``.NAME.calibration`` and, with Hessians, ``.NAME.hessian``
    beside the output ``NAME``."""

    def __init__(self, conversion: Conversion, options: QuantOptions, wanted: _Wanted) -> None:
        self.path, self.hessians = kept_paths(conversion.path)
        self.wanted = wanted
        whole = job_of(options, conversion.files)
        self._job = {key: whole[key] for key in ("--imatrix", *(file.name for file in conversion.files))}
        # A target has embedding and output measured, too; another version may measure otherwise.
        self._job |= {"target": json.dumps(options.type is None), "ccq": __version__}

    def job(self, hessians: bool | None) -> str:
        """What tells this calibration from others; ``hessians``: with them."""
        return json.dumps({**self._job, "wanted": asdict(replace(self.wanted, hessians=hessians))}, sort_keys=True)

    def load(self, options: QuantOptions) -> QuantOptions | None:
        """The options with what an earlier run has kept; ``None`` if that is nothing, of another job or damaged.  Where
        there was to be room for Hessians, it is the earlier run that decided."""
        try:
            job = open_model(self.path).metadata.get(_JOB)
            wanted = self.wanted.hessians
            with_hessians = job == self.job(True) if wanted is None else wanted
            if job != self.job(with_hessians):
                return None
            data = replace(imatrix.load(self.path), file="automatic calibration")
            return replace(options, imatrix=data, hessian=Hessians(self.hessians) if with_hessians else options.hessian)
        except CcqError:
            return None

    def save(self, data: Importance) -> None:
        """Write the file; the Hessians are there.  Raises ``OutputError``."""
        with ModelWriter(self.path, "", overwrite=True) as writer:
            writer.gguf.add_string(_JOB, self.job(self.wanted.hessians))
            imatrix.fill(writer, data)

    def remove(self) -> None:
        """The conversion is complete."""
        for path in (self.path, self.hessians):
            path.unlink(missing_ok=True)

"""One conversion, from what is asked for to the file: complete the data, make and check the plan, write the file."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

from ccq_format.gguf_io import ModelWriter

from . import allocate, borrow
from .allocate import Overhead, compared, spare
from .console import progress_bar
from .conversion import Conversion
from .data import check_hessians, check_importance, refuse_without_data, warn_without_data
from .mixtures import MixtureScheme
from .options import QuantOptions
from .plan import Plan, make_plan
from .schemes import scheme_of
from .stream import declare, write_planned
from .tensors import TensorSource

log = logging.getLogger(__name__)


def write_model(conversion: Conversion, options: QuantOptions) -> Plan:
    """Plan, encode and write a whole GGUF file; with ``options.dry_run`` only plan.

    Raises ``PlanError``, and what ``stream.write_planned`` does.
    """
    options = _completed(conversion.sources, options)
    with conversion.naming_source():
        plan = _planned(conversion, options)
    for warning in plan.warnings():
        log.warning(warning)
    _check_data(plan, options)
    if not options.dry_run:
        write_planned(conversion, plan, options)
    return plan


def _completed(sources: list[TensorSource], options: QuantOptions) -> QuantOptions:
    """The options with a size in bytes instead of a part of the model's size in 16 bits, and with data of all tensors
    that can borrow them."""
    if options.target_ratio is not None:
        size = int(options.target_ratio * 2 * sum(source.n_weights for source in sources))
        options = replace(options, target_size=size, target_ratio=None)
    if options.imatrix is not None:
        options = replace(options, imatrix=borrow.complete(options.imatrix, sources))
    if options.hessian is not None:
        options = replace(options, hessian=borrow.complete_hessians(options.hessian, sources))
    return options


def _planned(conversion: Conversion, options: QuantOptions) -> Plan:
    """The plan, with its expected loss where that is to be shown, or decides."""
    sources = conversion.sources
    losses_known = options.imatrix is not None and options.imatrix.knows_losses
    if options.type is None or (options.dry_run and losses_known):
        return _measured(conversion, options)
    plan = make_plan(sources, options)
    return _spared(conversion, plan, options) if isinstance(scheme_of(options.type, sources), MixtureScheme) else plan


def _measured(conversion: Conversion, options: QuantOptions) -> Plan:
    """The plan for a target, or what a plan by names is expected to lose, with a progress bar."""
    sources = conversion.sources
    like = _like(sources, options)
    overhead = _overhead(conversion, like, options)
    with progress_bar(conversion.progress) as bar:
        task = bar.add_task("", total=sum(len(s.shape) > 1 for s in sources))

        def advance(name: str) -> None:
            bar.update(task, description=f"measuring {name}", advance=1)

        if options.type is not None:
            return compared(like, sources, options, overhead, advance)
        return allocate.allocate(sources, options, overhead, advance)


def check_target(conversion: Conversion, options: QuantOptions) -> None:
    """Raise the ``PlanError`` that a target will meet, before what takes long."""
    options = _completed(conversion.sources, options)
    overhead = _overhead(conversion, _like(conversion.sources, options), options)
    allocate.check_target(conversion.sources, options, overhead)


def _like(sources: list[TensorSource], options: QuantOptions) -> Plan:
    """A plan whose file has a header of the right size, which is the same whichever T types the tensors have."""
    return make_plan(sources, replace(options, type=options.type or "ccq_t2", target_size=None, target_bpw=None))


def _overhead(conversion: Conversion, like: Plan, options: QuantOptions) -> Overhead:
    """The header, written to look at its size."""
    with tempfile.TemporaryDirectory() as folder:
        writer = ModelWriter(Path(folder) / "header.gguf", conversion.arch)
        try:
            declare(writer, conversion, like, options)
            writer.begin()
        finally:
            writer.abort()
    return Overhead(writer.header_bytes, writer.gguf.data_alignment)


def _spared(conversion: Conversion, plan: Plan, options: QuantOptions) -> Plan:
    """``allocate.spare`` with a progress bar."""
    with progress_bar(conversion.progress) as bar:
        task = bar.add_task("", total=sum(len(t.source.shape) > 1 for t in plan.tensors))
        return spare(plan, options, lambda name: bar.update(task, description=f"looking at {name}", advance=1))


def _check_data(plan: Plan, options: QuantOptions) -> None:
    """Whether the data fit the plan, and the plan the data; see ``data``."""
    if options.imatrix is not None:
        check_importance(plan, options.imatrix)
    elif options.hessian is None and not (options.calibrate and options.dry_run):
        refuse_without_data(plan, options.force)
        warn_without_data(plan)
    if options.hessian is not None:
        check_hessians(plan, options.hessian)

"""Whether the data at hand (importance, Hessians) fit what is to be encoded, and what lacks them."""

from __future__ import annotations

import logging

from ccq_format.errors import ImportanceError, PlanError

from . import borrow
from .encode import encodable
from .hessian import Hessians
from .imatrix import Importance
from .plan import Plan, PlannedTensor
from .rules import is_vocabulary

log = logging.getLogger(__name__)

NEEDS_DATA = 4.0
"""Bits per weight below which a type needs to know which inputs matter.

Without that SmolLM2-135M in CCQ_T2 has a KL divergence from itself of 6.0 and talks nonsense; with importance 0.98
(``calibrate --chunks 64`` on the bundled text; 16 windows of 512, technical English).  A few input
channels of real models carry most of the signal, and errors that count alike waste the bits on the others."""


def lacks_data(plan: Plan) -> list[PlannedTensor]:
    """The matrices that get fewer than ``NEEDS_DATA`` bits per weight: they need to know which inputs matter."""
    return [t for t in plan.tensors if wants_data(t) and 8 * t.nbytes < NEEDS_DATA * t.source.n_weights]


USELESS_WITHOUT_DATA = 1.5
"""Bits per weight below which no model says anything without such data; see ``NEEDS_DATA``."""


def refuse_without_data(plan: Plan, force: bool) -> None:
    """Raise ``PlanError`` if a matrix gets fewer than ``USELESS_WITHOUT_DATA`` bits per weight, unless ``force``."""
    for t in plan.tensors:
        if not force and wants_data(t) and 8 * t.nbytes < USELESS_WITHOUT_DATA * t.source.n_weights:
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
    """Match an importance file with the tensors whose types it helps.  Warns, a line each, of those that take another
    tensor's importance, of those for which it is estimated, of those without any, and of experts hit rarely.

    Raises ``ImportanceError`` if no tensor has an entry of its own or of a tensor with the same input, or if an entry
    has another shape than its tensor.
    """
    tied = all(t.source.name != "output.weight" for t in plan.tensors)
    wanted = {t.source.name: t.source for t in plan.tensors if wants_data(t) or _is_output(t, tied)}
    found = {name: source.matrices for name, source in wanted.items() if name in importance}
    if not wanted:
        log.warning("%s: not used, because it helps none of the types that tensors get", importance.file)
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


def wants_data(tensor: PlannedTensor) -> bool:
    """Whether a tensor is encoded better with data: not an embedding, whose rows are looked up, nor the output matrix,
    which is left out of the data by default."""
    return tensor.searched and not is_vocabulary(tensor.source.name)


def _is_output(tensor: PlannedTensor, tied: bool) -> bool:
    """Whether a tensor is the output matrix, in a type that data helps."""
    return encodable(tensor.type) is not None and tensor.source.name == (
        "token_embd.weight" if tied else "output.weight"
    )


def check_hessians(plan: Plan, hessians: Hessians) -> None:
    """Match a Hessian file with the tensors whose types it helps: warn of those without a Hessian (one line).

    Raises ``ImportanceError`` if no tensor has one, or one has another shape.
    """
    wanted = [t.source for t in plan.tensors if wants_data(t)]
    missing = [source.name for source in wanted if source.name not in hessians]
    for source in wanted:
        if source.name in hessians:
            hessians.check(source.name, source.matrices, source.row_len)
    if not wanted:
        log.warning("%s: not used, because it helps none of the types that tensors get", hessians.file)
    elif len(missing) == len(wanted):
        raise ImportanceError(
            f"has no Hessian of any of the {len(wanted)} tensors to encode (such as '{wanted[0].name}'): it belongs to "
            "another model",
            file=hessians.file,
        )
    elif missing:
        log.warning(
            "%s: no Hessian for %d of %d tensors: %s", hessians.file, len(missing), len(wanted), borrow.summary(missing)
        )

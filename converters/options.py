"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from ccq_format.errors import PlanError

from .hessian import Hessians
from .imatrix import Importance


@dataclass(frozen=True)
class QuantOptions:
    """What the user asked for.

    ``type`` is a type, a mixture (``mixtures.MIXTURES``) or ``KEEP``; ``None`` where types are to be allocated to an
    average of ``target_bpw`` bits per weight or a file of ``target_size`` bytes, or ``target_ratio`` times what all
    weights take in 16 bits (see ``allocate``); exactly one of the four.
    ``overrides`` are ``(regular expression, type)`` pairs on GGUF names, first match wins; ``imatrix`` weights the
    errors of the CCQ types; matrices with a Hessian are encoded with error feedback instead; ``threads`` <= 0 means
    one per CPU; ``effort`` is how far the T types' encoder searches (``ccq_backend.EFFORTS``); ``calibrate`` lets
    ``automatic`` measure the data that few bits need and that are not given, with ``feedback`` Hessians as well;
    ``force`` takes types that make no sense without importance data all the same; ``resume`` keeps what an interrupted
    conversion has encoded, and goes on there; no file of the output is larger than ``split_max_size`` bytes (see
    ``ccq_format.gguf_io.SplitWriter``); ``k_order`` is the order of the inputs of wint2 matrices
    (``sources.wint2.ORDERS``, ``None`` = find out).  ``resume.job_of`` must know which fields change no byte.
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
    target_ratio: float | None = None
    calibrate: bool = False
    feedback: bool = False
    split_max_size: int | None = None
    k_order: str | None = None

    def __post_init__(self) -> None:
        wishes = (self.type, self.target_bpw, self.target_size, self.target_ratio)
        if sum(wish is not None for wish in wishes) != 1:
            raise PlanError("give exactly one of --type, --target-bpw and --target-size")

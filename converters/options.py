"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from ccq_format.errors import PlanError

from .hessian import Hessians
from .imatrix import Importance


@dataclass(frozen=True)
class QuantOptions:
    """What the user asked for: exactly one of ``type`` and the three targets, and how.

    ``resume.job_of`` must know which fields change no byte.
    """

    type: str | None = None
    """A type, a mixture (``mixtures.MIXTURES``) or ``KEEP``."""
    overrides: list[tuple[str, str]] = field(default_factory=list)
    """``(regular expression, type)`` on GGUF names; the first match wins."""
    threads: int = 0
    """<= 0: one per CPU."""
    effort: str = "default"
    """How far the encoder searches (``ccq_backend.EFFORTS``)."""
    device: str = "cpu"
    """Where it does, ``"cpu"`` or ``"cuda"``."""
    fallback: bool = True
    """Whether rows that are no whole blocks get another type, instead of an error."""
    overwrite: bool = False
    dry_run: bool = False
    resume: bool = False
    """Keep what an interrupted conversion has encoded, and go on there."""
    force: bool = False
    """Take types that make no sense without importance data all the same."""
    imatrix: Importance | None = None
    """Weights the errors of the types that are searched (``encode.encodable``)."""
    hessian: Hessians | None = None
    """Its matrices are encoded with error feedback."""
    target_bpw: float | None = None
    """Bits per weight on average; this and the next two: see ``allocate``."""
    target_size: int | None = None
    """Bytes of the file."""
    target_ratio: float | None = None
    """The same, as a part of what all weights take in 16 bits."""
    calibrate: bool = False
    """Let ``automatic`` measure the data that few bits need and that are not given,"""
    feedback: bool | None = None
    """Hessians as well; ``None``: if importance is to be measured anyway, and memory and disk have room for them."""
    split_max_size: int | None = None
    """No file of the output is larger than that, in bytes (``ccq_format.gguf_io.SplitWriter``)."""
    k_order: str | None = None
    """The order of the inputs of wint2 matrices (``sources.wint2.ORDERS``); ``None``: find out."""

    def __post_init__(self) -> None:
        wishes = (self.type, self.target_bpw, self.target_size, self.target_ratio)
        if sum(wish is not None for wish in wishes) != 1:
            raise PlanError("give exactly one of --type, --target-bpw and --target-size")

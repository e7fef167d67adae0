"""Schemes: what types a plan gives to the tensors that it is free to choose for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ccq_format.errors import PlanError

from .mixtures import MIXTURES, MixtureScheme
from .target_types import KEEP, parse_type
from .tensors import TensorSource


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
class Keep:
    """The type that every matrix has already, by tensor name."""

    types: Mapping[str, str]

    def matrix(self, name: str) -> tuple[str, str]:
        """See ``Scheme``.  Raises ``PlanError`` if it is none that a file can have."""
        try:
            return parse_type(self.types[name]), "--type keep"
        except PlanError:
            raise PlanError(f"is {self.types[name]}, which cannot be kept; choose a type", tensor=name) from None

    def vocabulary(self, name: str) -> tuple[str, str]:
        """See ``Scheme``."""
        return self.matrix(name)


def scheme_of(name: str, sources: list[TensorSource]) -> Scheme:
    """The scheme of a type, a mixture or ``KEEP``; ``T2_M`` is short for ``ccq_t2_m``.

    Raises ``PlanError`` if there is none.
    """
    lower = name.strip().lower()
    for candidate in (lower, f"ccq_{lower}"):
        if candidate in MIXTURES:
            return MixtureScheme(MIXTURES[candidate], [(s.name, s.shape) for s in sources])
    if lower == KEEP:
        return Keep({s.name: s.source_type for s in sources})
    return Pure(parse_type(name))

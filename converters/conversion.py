"""What is converted, and to where: one record that every step of a conversion is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf

from ccq_format.errors import WeightsError
from ccq_format.gguf_io import Model
from ccq_format.output import OutputFile

from .tensors import TensorSource


@dataclass(frozen=True)
class Conversion:
    """A model, and the file that it is to become.

    ``arch`` is ``general.architecture``; all other keys are those of the file ``copy_from``, then those that
    ``set_metadata`` adds to the writer it is given.  ``out`` may be an ``OutputFile`` that is not open yet.  ``files``
    are those that the sources are read from, ``runnable`` is the GGUF file that holds the model, if there is one.
    Progress bars go to stderr if ``progress`` and if that is a terminal.
    """

    out: Path | OutputFile
    arch: str
    sources: list[TensorSource]
    files: Sequence[Path] = ()
    set_metadata: Callable[[gguf.GGUFWriter], None] | None = None
    copy_from: Model | None = None
    runnable: Path | None = None
    progress: bool = True

    @property
    def path(self) -> Path:
        """Where the file appears."""
        return self.out.path if isinstance(self.out, OutputFile) else self.out

    @property
    def source(self) -> Path | None:
        """What errors name: the GGUF file, or the folder."""
        if self.copy_from is not None:
            return Path(self.copy_from.files[0])
        return self.runnable or (self.files[0].parent if self.files else None)

    @contextmanager
    def naming_source(self) -> Iterator[None]:
        """Adds :attr:`source` to a ``WeightsError``: who finds a weight that cannot be has seen rows only."""
        try:
            yield
        except WeightsError as error:
            if error.file is not None:
                raise
            raise WeightsError(error.reason, file=self.source, tensor=error.tensor) from None

"""One exception per reason.  Every message names the file, the tensor where there is one, and the reason."""

from __future__ import annotations

import os

MAX_NAME = 200
MAX_REASON = 1000
"""Characters that a message has of a tensor's name and of a reason: damaged files may hold text of any length."""


def readable(text: str, limit: int = MAX_REASON, keep: str = "") -> str:
    """``text``, which may come from anywhere, for a terminal or a log: what is no printable character, but for those of
    ``keep``, is escaped, and what goes beyond ``limit`` characters is cut."""
    shown = "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown if max(len(text), len(shown)) <= limit else f"{shown[:limit]}... ({len(text)} characters)"


class CcqError(Exception):
    """Base of all errors that CCQ raises on purpose.

    ``file`` and ``tensor`` say where (``None`` where it does not apply), ``reason`` what is wrong; the message has them
    as :func:`readable` text.
    """

    def __init__(self, reason: str, *, file: str | os.PathLike[str] | None = None, tensor: str | None = None) -> None:
        self.reason = reason
        self.file = os.fspath(file) if file is not None else None
        self.tensor = tensor
        where = [readable(self.file)] if self.file else []
        if tensor is not None:
            where.append(f"tensor '{readable(tensor, MAX_NAME)}'")
        super().__init__(": ".join([*where, readable(reason, keep="\n")]))


# --- the container (spec section 4) ---------------------------------------------------------------------------------


class InputError(CcqError):
    """The file cannot be read at all: it is missing, no regular file, or the system refuses."""


class FormatError(CcqError):
    """The file is no well-formed CCQ/GGUF file; the base of the errors below."""


class NotGgufError(FormatError):
    """The file does not start with the GGUF magic."""


class GgufVersionError(FormatError):
    """The GGUF container version (or byte order) is not supported."""


class TruncatedError(FormatError):
    """The file ends before something that its header announces."""


class HeaderError(FormatError):
    """The header contradicts itself: absurd counts or sizes, bad value types, invalid text, duplicate names."""


class AlignmentError(FormatError):
    """The alignment is no power of two, or a tensor's offset does not respect it."""


class OverlapError(FormatError):
    """Two tensors share bytes."""


class TensorTypeError(FormatError):
    """A tensor has a type id that is unknown, reserved, or means something older here than a CCQ type."""


class ShapeError(FormatError):
    """A tensor's shape does not fit its type: the row length is no multiple of the block, or it is empty."""


class SpecVersionError(FormatError):
    """The file needs a CCQ specification version that this reader does not know."""


class FeatureError(FormatError):
    """The file lists a must-understand feature that this reader does not know."""


class BlockError(FormatError):
    """A block holds parameters that no encoder may write (for example a super scale that is not finite)."""


# --- encoding and conversion ----------------------------------------------------------------------------------------


class WeightsError(CcqError):
    """A weight is NaN or infinite."""


class ImportanceError(CcqError):
    """An importance is negative, NaN or infinite, or its shape does not fit the weights; an importance or Hessian file
    is damaged or belongs to another model; or none can be computed."""


class ModelError(CcqError):
    """The model directory cannot be converted: files missing or contradictory, an unsupported architecture."""


class PlanError(CcqError):
    """The requested types cannot be applied: unknown name, bad pattern, or a row that does not fit and no fallback."""


class OutputError(CcqError):
    """The output cannot be written: it exists, or its folder is missing."""


# --- the kernels and llama.cpp --------------------------------------------------------------------------------------


class BackendError(CcqError):
    """The native kernels refused: unknown or unsupported ``CCQ_ISA``, out of memory, an argument that does not fit."""


class CudaError(CcqError):
    """The CUDA kernels cannot run: not built, no device, an array elsewhere or of another kind, or CUDA refused."""


class PluginError(CcqError):
    """llama.cpp in this process cannot take the plugin; the reason is the plugin's own."""


class IntegrationError(CcqError):
    """A llama.cpp source tree cannot be edited: it is of an unknown kind, half edited, or an anchor is not found."""


class EvalError(CcqError):
    """An evaluation cannot run: too little text, or llama.cpp refused the model."""


# --- the packages around us -----------------------------------------------------------------------------------------


class GgufPackageError(CcqError, ImportError):
    """The installed ``gguf`` package is not built like the pinned one, so the CCQ types cannot be added to it."""


class CcqWarning(UserWarning):
    """Something odd that does not stop the work, for example a file with CCQ tensors but without ``ccq.*`` keys."""

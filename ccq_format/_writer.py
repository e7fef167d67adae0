"""Streaming GGUF writer; public as ``ccq_format.gguf_io.ModelWriter``."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_writer import WriterState

from ._header import ALIGNMENT_KEY, ENCODER_KEY, MAX_NAME_BYTES, SPEC_VERSION_KEY
from ._partial import DIGEST, Partial
from .errors import AlignmentError, PlanError, ShapeError
from .layouts import LAYOUTS, SPEC_VERSION
from .output import OutputFile, Staged

if TYPE_CHECKING:
    from .gguf_io import Model

_OURS = {layout.gguf_id for layout in LAYOUTS}
_NATIVE = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.BF16: np.uint16,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}


_CHECKPOINT = 1 << 25
"""Bytes of one tensor after which a job notes that it has come so far: a few minutes of one core's encoding, of a stack
of experts that takes hours."""

MAX_ALIGNMENT = 1 << 21
"""Of files that are copied: the largest usual page.  A file of 100 bytes may say 2^31."""

_DIGESTED = ("the metadata", "the list of tensors and types")
"""The parts of the header that must not have changed between two runs of a job."""


class _GgufWriter(gguf.GGUFWriter):
    """gguf's writer, able to write empty arrays too: a copied file must keep those it has."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype == GGUFValueType.ARRAY and sub_type is not None and len(val) == 0:
            packed = self._pack("I", sub_type) + self._pack("Q", 0)
            return self._pack("I", vtype) + packed if add_vtype else packed
        return super()._pack_val(val, vtype, add_vtype, sub_type)


class ModelWriter(Staged):
    """Writes one GGUF file, holding no more than the chunk being written.

    Order of calls: metadata (through :attr:`gguf` and :meth:`copy_metadata`) and :meth:`add_tensor` for every tensor,
    then :meth:`begin`, then :meth:`write` for every tensor (empty ones, too) in the order of their declaration.
    Leaving the ``with`` block completes the file: data is synced to disk, and the file gets its name (see ``output``).
    Leaving it by any exception (``KeyboardInterrupt`` included) leaves the target as it was, and nothing else::

        with ModelWriter("out.gguf", "llama") as out:
            out.gguf.add_block_count(2)
            out.add_tensor("blk.0.ffn_up.weight", "ccq_t2", (1024, 256))
            out.begin()
            for rows in chunks:                      # uint8 [n, 68]
                out.write("blk.0.ffn_up.weight", rows)

    With a ``job`` an interrupted writer keeps what is complete, beside the target, and the next one with the same job,
    metadata and tensors goes on there: after :meth:`begin` the first :attr:`completed` tensors are to be left out, and
    the first :attr:`written` bytes, whole chunks, of the next.

    A file with a CCQ tensor gets ``ccq.spec_version`` and ``ccq.encoder``; ``ccq.features`` is left out because no
    feature is in use.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | OutputFile,
        arch: str,
        *,
        overwrite: bool = False,
        encoder: str | None = None,
        job: Mapping[str, str] | None = None,
    ) -> None:
        """``path`` may be an ``OutputFile`` that is not open yet (then ``overwrite`` is its own).  ``arch`` becomes
        ``general.architecture`` (an empty string leaves the key out); ``encoder`` is the value of ``ccq.encoder``, by
        default this package's name and version; ``job`` is everything else that the tensors' bytes depend on, as names
        and values for people.  No file is created before :meth:`begin`.

        Raises:
            OutputError: the target exists and ``overwrite`` is false, it is a folder, or its folder is missing.
        """
        from . import __version__

        self._partial: Partial | None = None
        if isinstance(path, OutputFile):
            self._output = path
        elif job is None:
            self._output = OutputFile(path, overwrite=overwrite)
        else:
            self._output = self._partial = Partial(Path(path), job, overwrite)
        self.path = self._output.path
        self.encoder = encoder if encoder is not None else f"ccq {__version__}"
        self.gguf: gguf.GGUFWriter = _GgufWriter(None, arch)
        """Takes metadata: every ``add_*`` call of ``gguf.GGUFWriter``.  Leave tensors and files to this class."""
        self.header_bytes = 0
        """Bytes before the first tensor, padding included; known after :meth:`begin`."""
        self._sizes: dict[str, tuple[GGMLQuantizationType, int]] = {}
        self._order: list[str] = []
        self._current = 0
        self._written = 0
        self._state = "declaring"
        self.signed = False
        """Whether the ``ccq.*`` keys are written: as soon as a CCQ tensor is declared."""

    @property
    def files(self) -> list[Path]:
        """The file that will appear."""
        return [self.path]

    @property
    def completed(self) -> int:
        """How many tensors, the first ones, are in the file."""
        return self._current

    @property
    def written(self) -> int:
        """How many bytes of the tensor behind those are in the file."""
        return self._written

    @property
    def kept_bytes(self) -> int:
        """How many bytes of a tensor that is not complete an interrupted writer has left for the next one."""
        return self._partial.written if self._partial is not None and self._state == "aborted" else 0

    @property
    def is_complete(self) -> bool:
        """Whether all tensors are in the file."""
        return self._current == len(self._order)

    @property
    def kept(self) -> int:
        """How many tensors an interrupted writer has left for the next one."""
        return self._partial.done if self._partial is not None and self._state == "aborted" else 0

    # --- declaring --------------------------------------------------------------------------------------------------

    def copy_metadata(self, model: Model) -> None:
        """Take over all keys of ``model`` with their exact value types and order, but not ``ccq.*`` and ``split.*``:
        these say how *that* file was written.  A key that was set before is replaced.  The alignment is taken over.

        Raises ``AlignmentError`` if that is absurd, so that padding would be all there is."""
        target = self.gguf.kv_data[0]
        for key, kv in model.fields.items():
            if key.startswith(("ccq.", "split.")):
                continue
            target.pop(key, None)
            self.gguf.add_key_value(key, kv.value, kv.type, kv.sub_type)
        if ALIGNMENT_KEY in model.fields:
            if model.alignment > MAX_ALIGNMENT:
                raise AlignmentError(f"{ALIGNMENT_KEY} is {model.alignment}, too much for a copy", file=model.path)
            self.gguf.data_alignment = model.alignment

    def add_tensor(self, name: str, type_name: str, shape: Sequence[int]) -> int:
        """Declare a tensor; ``shape`` is in numpy order (the last dimension is the row).  Returns its size in bytes.

        Raises:
            PlanError: unknown type name.
            ShapeError: the row length is no multiple of the type's block, or the shape is too long, or that of a
                CCQ tensor without weights.
            ValueError: the name is used twice or longer than 63 bytes, or :meth:`begin` was called already.
        """
        if self._state != "declaring":
            raise ValueError("tensors must be declared before begin()")
        if name in self._sizes or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"tensor name {name!r} is used twice, empty, or longer than {MAX_NAME_BYTES} bytes")
        try:
            kind = GGMLQuantizationType[type_name.upper()]
        except KeyError:
            raise PlanError(f"unknown tensor type '{type_name}'", file=self.path, tensor=name) from None
        shape = tuple(int(n) for n in shape)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not 1 <= len(shape) <= 4 or min(shape) < (1 if kind in _OURS else 0):
            raise ShapeError(f"shape {shape} must have 1 to 4 positive dimensions", file=self.path, tensor=name)
        if shape[-1] % block:
            raise ShapeError(
                f"row length {shape[-1]} is no multiple of {block}, the block of {type_name.lower()}",
                file=self.path,
                tensor=name,
            )
        nbytes = prod(shape) // block * block_bytes
        self.gguf.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        self._sizes[name] = (kind, nbytes)
        self._order.append(name)
        self.signed |= kind in _OURS
        return nbytes

    # --- writing ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write header, metadata and tensor list to the temporary file, or find them in what an earlier writer left.

        Raises:
            OutputError: the system refuses; what was left is of another job, damaged, or in use.
            ValueError: :meth:`begin` was called already.
        """
        if self._state != "declaring":
            raise ValueError("begin() was called already")
        if self.signed:
            self.gguf.add_string(SPEC_VERSION_KEY, "{}.{}".format(*SPEC_VERSION))
            self.gguf.add_string(ENCODER_KEY, self.encoder)
        self._state = "writing"
        metadata, tensors = self._header()
        header = metadata + tensors
        header += self._padding(len(header))
        self.header_bytes = len(header)
        if self._partial is not None:
            digests = (DIGEST + hashlib.sha256(part).hexdigest() for part in (metadata, tensors))
            sizes = [(name, size + len(self._padding(size))) for name, (_, size) in self._sizes.items()]
            job = {"encoder": self.encoder, **dict(zip(_DIGESTED, digests, strict=True))}
            self._partial.resume(header, sizes, job)
            self._current, self._written = self._partial.done, self._partial.written
        else:
            self._output.open()
            self._output.write(header)

    def write(self, name: str, data: np.ndarray) -> None:
        """Append ``data`` to tensor ``name``: its stored bytes, or a chunk of whole rows of them.

        ``data`` is uint8 in the type's encoding, or an array of the tensor's own dtype (float32 for f32, float16 for
        f16, uint16 for bf16, ...).  A tensor must be complete before the next one starts.

        Raises:
            OutputError: the system refuses (disk full, for example).
            ValueError: wrong order, dtype, or more bytes than the tensor has.
        """
        if self._state != "writing":
            raise ValueError("write() needs begin() first and an open writer")
        expected = self._order[self._current] if self._current < len(self._order) else None
        if name != expected:
            raise ValueError(f"tensor '{name}' is out of order: expected {expected!r}")
        kind, nbytes = self._sizes[name]
        if data.dtype != np.uint8 and data.dtype != _NATIVE.get(kind):
            raise ValueError(f"tensor '{name}': data of type {data.dtype} for a tensor of type {kind.name.lower()}")
        if self._written + data.nbytes > nbytes:
            raise ValueError(f"tensor '{name}': {self._written + data.nbytes} bytes written, it has {nbytes}")
        self._output.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._written += data.nbytes
        if self._partial is not None and self._partial.written + _CHECKPOINT <= self._written < nbytes:
            self._partial.checkpoint(name, self._written)
        if self._written == nbytes:
            self._output.write(self._padding(nbytes))
            if self._partial is not None:
                self._partial.note(name)
            self._current += 1
            self._written = 0

    def close(self) -> None:
        """Complete the file: sync it, and give it its name.

        Raises:
            OutputError: the target has appeared meanwhile and ``overwrite`` is false, or the system refuses.
            ValueError: a tensor is incomplete.
        """
        if self._state in ("closed", "aborted"):
            return
        super().close()

    def complete(self) -> None:
        """See ``Staged``; checks that nothing is missing."""
        if self._state == "declaring":
            self.begin()
        if not self.is_complete:
            raise ValueError(f"tensor '{self._order[self._current]}' is incomplete")
        self._output.complete()

    def publish(self) -> None:
        """See ``Staged``."""
        self._output.publish()

    def unpublish(self) -> None:
        """Take :meth:`publish` back, if it has happened."""
        self._output.unpublish()

    def is_published(self) -> bool:
        """Whether the file is the one that has the name."""
        return self._output.is_published()

    def settle(self) -> None:
        """See ``Staged``."""
        self._state = "closed"
        self._output.settle()

    def abort(self) -> None:
        """Give up: remove the file, or with a job leave it to the next writer if something is complete.  Does nothing
        after a successful :meth:`close`."""
        if self._state in ("closed", "aborted"):
            return
        self._state = "aborted"
        self._output.abort()

    def metadata_bytes(self) -> int:
        """Bytes that counts and metadata take, as far as they are declared."""
        return len(self._header()[0])

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _header(self) -> tuple[bytes, bytes]:
        """The bytes before the padding: the counts with the metadata, and the list of tensors."""
        buffer = io.BytesIO()
        self.gguf.fout = cast(Any, [buffer])
        self.gguf.state = WriterState.EMPTY
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        at = buffer.tell()
        self.gguf.write_ti_data_to_file()
        self.gguf.fout = None
        return buffer.getvalue()[:at], buffer.getvalue()[at:]

    def _padding(self, size: int) -> bytes:
        """What follows ``size`` bytes up to the next multiple of the alignment."""
        return bytes(-size % self.gguf.data_alignment)

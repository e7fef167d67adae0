"""A Hugging Face model folder becomes a GGUF file: names, shapes, tensor transforms, metadata, tokenizer.

Which tensors there are is ``folder_sources``'s affair, what becomes of them ``automatic``'s and ``convert``'s.
"""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np

from ccq_format.errors import ModelError
from ccq_format.output import refuse_inputs

from .arch import Family, family_of
from .automatic import write_calibrated
from .conversion import Conversion
from .folder_sources import load_sources
from .options import QuantOptions
from .plan import Plan
from .sources import open_checkpoint
from .tensors import TensorSource
from .vocab import Vocab, load_vocab

log = logging.getLogger(__name__)

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "iq4_nl": gguf.LlamaFileType.MOSTLY_IQ4_NL,
}
"""``general.file_type``; there is no number for a CCQ file, and llama.cpp then counts the tensors' types itself."""


def convert(model_dir: Path, out: Path, options: QuantOptions, *, progress: bool = True) -> Plan:
    """Convert the model in ``model_dir`` to the GGUF file ``out``; with ``options.dry_run`` only plan.

    Raises ``ModelError`` if the folder cannot be converted (files missing or damaged, architecture or tokenizer not
    supported, tensors missing, unexpected or of a wrong shape), and what ``write_calibrated`` raises.
    """
    model_dir = Path(model_dir)
    conversion = conversion_of(model_dir, out, options.type, options.k_order, progress=progress)
    if not options.dry_run:
        refuse_inputs([out], (path for path in model_dir.iterdir() if path.suffix != ".gguf"))  # tokenizers, ...
    return write_calibrated(conversion, options)


def conversion_of(
    model_dir: Path, out: Path, type_name: str | None, k_order: str | None = None, *, progress: bool = True
) -> Conversion:
    """What is to be written to convert the folder ``model_dir``; ``type_name`` goes into the metadata.

    Raises ``ModelError`` as :func:`convert` does.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ModelError("no such folder", file=model_dir)
    family = family_of(model_dir)
    # The tensors' shapes come first: they vouch for the sizes in the config before anything is built by them.
    checkpoint = open_checkpoint(model_dir, family.config, k_order)
    sources = load_sources(family, checkpoint)
    vocab = load_vocab(model_dir, family.vocab_size)
    vocab.specialize(family.spec.pretokenizers, family.spec.special_tokens)

    def set_metadata(writer: gguf.GGUFWriter) -> None:
        write_metadata(writer, model_dir, family, vocab, sources, type_name)
        if checkpoint.residual_order is not None:
            writer.add_array(f"{family.arch_name}.residual_order", checkpoint.residual_order)

    files = [model_dir / "config.json", *checkpoint.files]
    return Conversion(Path(out), family.arch_name, sources, files, set_metadata, progress=progress)


def write_metadata(
    writer: gguf.GGUFWriter,
    model_dir: Path,
    family: Family,
    vocab: Vocab,
    sources: list[TensorSource],
    type_name: str | None,
) -> None:
    """Add all keys but ``general.architecture``.  Raises ``ModelError`` for an unreadable model card."""
    writer.add_type(gguf.GGUFType.MODEL)
    _model_card(model_dir, family.arch_name, sources).set_gguf_meta_model(writer)
    for key, value in writer.kv_data[0].items():
        if not _storable(value.value, value.type):
            raise ModelError(f"{key} would be {value.value!r}: see the model card and the configs", file=model_dir)
    family.write_metadata(writer)
    file_type = _FILE_TYPES.get(type_name.strip().lower()) if type_name is not None else None
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocab.write(writer)
    for kind, token in family.tokenizer_extras().items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)


def _storable(value: object, kind: gguf.GGUFValueType) -> bool:
    """Whether a value can be written as ``kind``.  Model cards are free text: a temperature may be a string there."""
    if kind == gguf.GGUFValueType.ARRAY:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if kind == gguf.GGUFValueType.STRING:
        return isinstance(value, str)
    if kind == gguf.GGUFValueType.FLOAT32:
        return isinstance(value, (int, float)) and abs(value) < 3e38
    return isinstance(value, int) and abs(value) < 2**31


def _model_card(model_dir: Path, arch: str, sources: list[TensorSource]) -> gguf.Metadata:
    """Name, licence, size label and the like, from the model card, the configs and the folder's name."""
    total, shared, expert, count = _scratch(arch, sources).get_total_parameter_count()
    folder = model_dir if model_dir.name not in ("", "..") else model_dir.resolve()
    try:
        metadata = gguf.Metadata.load(None, folder, None, total)
    except Exception as error:  # a YAML parser and other people's heuristics: any kind of error
        raise ModelError(f"its model card or generation config cannot be read: {error}", file=model_dir) from error
    if metadata.name is None:
        metadata.name = folder.name
    if metadata.size_label is None and total > 0:
        metadata.size_label = gguf.size_label(total, shared, expert, count)
    return metadata


def _scratch(arch: str, sources: list[TensorSource]) -> gguf.GGUFWriter:
    """A writer that is never written, for gguf's own parameter count."""
    writer = gguf.GGUFWriter(None, arch)
    for source in sources:
        writer.add_tensor_info(source.name, source.shape, np.dtype(np.float32), 4 * source.n_weights)
    return writer

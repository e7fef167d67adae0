"""A Hugging Face model folder becomes a GGUF file: names, shapes, tensor transforms, metadata, tokenizer.

What goes where is decided here and in ``arch``; types, encoding and writing are ``plan``'s and ``stream``'s.
"""

from __future__ import annotations

import logging
from math import prod
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ModelError

from .arch import Family, family_of
from .arch.base import IGNORED_SUFFIXES, Wanted, resolve
from .plan import LoadRows, Plan, QuantOptions, TensorSource
from .safetensors_io import Checkpoint, StoredTensor
from .stream import write_model
from .vocab import Vocab, load_vocab

log = logging.getLogger(__name__)

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
"""``general.file_type``; there is no number for a CCQ file, and llama.cpp then counts the tensors' types itself."""

_COMPARED_ROWS = 1 << 22
"""Weights per step when two tensors are compared."""


def convert(model_dir: Path, out: Path, options: QuantOptions, *, progress: bool = True) -> Plan:
    """Convert the model in ``model_dir`` to the GGUF file ``out``; with ``options.dry_run`` only plan.

    Raises ``ModelError`` if the folder cannot be converted (files missing or damaged, architecture or tokenizer not
    supported, tensors missing, unexpected or of a wrong shape), and what ``stream.write_model`` raises.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ModelError("no such folder", file=model_dir)
    family = family_of(model_dir)
    # The tensors' shapes come first: they vouch for the sizes in the config before anything is built by them.
    checkpoint = Checkpoint(model_dir)
    sources = load_sources(family, checkpoint)
    vocab = load_vocab(model_dir, family.vocab_size)

    def set_metadata(writer: gguf.GGUFWriter) -> None:
        write_metadata(writer, model_dir, family, vocab, sources, options.type)

    return write_model(
        out,
        arch=family.arch_name,
        set_metadata=set_metadata,
        sources=sources,
        options=options,
        progress=progress,
        files=[model_dir / "config.json", *sorted({tensor.path for tensor in checkpoint})],
    )


# --- tensors --------------------------------------------------------------------------------------------------------


def load_sources(family: Family, checkpoint: Checkpoint) -> list[TensorSource]:
    """The tensors of the GGUF file, each with a way to load its rows; nothing but headers is read here, unless the
    output matrix may repeat the embedding.

    Raises ``ModelError`` for a tensor that is missing, unexpected, or of a wrong shape or type.
    """
    last = f"model.layers.{family.layers - 1}.input_layernorm.weight"
    if last not in checkpoint:  # also keeps an absurd layer count from filling the memory
        raise ModelError(f"is missing; the config has {family.layers} layers", file=checkpoint.model_dir, tensor=last)
    stored = frozenset(t.name for t in checkpoint)
    used = set()
    if repeats_embedding(family, checkpoint):
        log.info("lm_head.weight repeats model.embed_tokens.weight and is left out")
        used.add("lm_head.weight")
        stored -= used
    sources = []
    for name, wanted in resolve(family, stored):
        sources.append(make_source(name, wanted, checkpoint))
        used.update(part.name for part in wanted.parts)
    for tensor in checkpoint:
        if tensor.name not in used and not tensor.name.endswith(IGNORED_SUFFIXES):
            raise ModelError(
                f"is unexpected: a {family.architecture} with this config has no such tensor",
                file=tensor.path,
                tensor=tensor.name,
            )
    factors = family.rope.frequency_factors(family.head_dim)
    if factors is not None:
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        sources.append(TensorSource(name, factors.shape, lambda start, stop: factors[None, :][start:stop], "f32"))
    return sources


def repeats_embedding(family: Family, checkpoint: Checkpoint) -> bool:
    """Whether a model with tied embeddings stores the output matrix once more.

    One with other values is kept, with a warning: transformers does not tie it either.
    """
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    if not family.tied or output not in checkpoint or embedding not in checkpoint:
        return False
    a, b = checkpoint[embedding], checkpoint[output]
    equal = a.shape == b.shape and len(a.shape) == 2
    if equal:
        step = max(1, _COMPARED_ROWS // max(1, a.row_len))
        for start in range(0, a.shape[0], step):
            stop = min(a.shape[0], start + step)
            if not np.array_equal(a.rows(start, stop), b.rows(start, stop)):
                equal = False
                break
    if not equal:
        log.warning("%s: lm_head.weight is kept: the config ties it to the embedding, but it differs", b.path)
    return equal


def make_source(name: str, wanted: Wanted, checkpoint: Checkpoint) -> TensorSource:
    """``wanted`` as the tensor ``name``.  Raises ``ModelError`` if a part is missing or of a wrong shape or type."""
    segments: list[tuple[StoredTensor, int, int]] = []
    for part in wanted.parts:
        if part.name not in checkpoint:
            raise ModelError("is missing", file=checkpoint.model_dir, tensor=part.name)
        tensor = checkpoint[part.name]
        if tensor.shape != part.shape:
            raise ModelError(
                f"has the shape {list(tensor.shape)}, the config asks for {list(part.shape)}",
                file=tensor.path,
                tensor=part.name,
            )
        segments.append((tensor, part.first, part.rows or prod(part.shape[:-1])))
    types = sorted({tensor.type_name for tensor, _, _ in segments})
    load = _stacked(segments)
    if wanted.heads:
        load = _interleaved(load, wanted.shape, wanted.heads)
    return TensorSource(name, wanted.shape, load, types[0] if len(types) == 1 else "f32")


def _stacked(segments: list[tuple[StoredTensor, int, int]]) -> LoadRows:
    """Rows of several tensors one below the other: ``(tensor, first row, rows)`` each."""

    def load(start: int, stop: int) -> NDArray[np.float32]:
        parts, at = [], 0
        for tensor, first, rows in segments:
            low, high = max(start, at), min(stop, at + rows)
            if low < high:
                parts.append(tensor.rows(first + low - at, first + high - at))
            at += rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return load


def row_order(rows: int, heads: int) -> NDArray[np.int64]:
    """The rows of a query or key matrix in GGUF's order: within each of ``heads`` heads, ``0, d/2, 1, d/2+1 ..``.

    Transformers rotates value i of a head together with value i + d/2, llama.cpp's ``llama`` with its neighbour.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _interleaved(load: LoadRows, shape: tuple[int, ...], heads: int) -> LoadRows:
    """Rows (of a bias: values) in the order of :func:`row_order`."""
    order = row_order(shape[0], heads)

    def load_rows(start: int, stop: int) -> NDArray[np.float32]:
        wanted = order[start:stop]
        low = int(wanted.min())
        return load(low, int(wanted.max()) + 1)[wanted - low]

    def load_values(start: int, stop: int) -> NDArray[np.float32]:
        return load(start, stop)[:, order]

    return load_values if len(shape) == 1 else load_rows


# --- metadata -------------------------------------------------------------------------------------------------------


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

"""``ccq-convert calibrate``: run a model over a text and sum up how large the inputs of every matrix are; on request
also how much their outputs matter to the model's predictions.

The text is cut into windows as llama.cpp's ``llama-imatrix`` does it: tokenized once, windows of ``ctx`` tokens that do
not overlap, a last incomplete one dropped, the first token of each replaced by BOS where the tokenizer adds one.  The
passes through the model are those of ``forward`` and ``backward``, their temporary files beside the output.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ImportanceError, ModelError
from ccq_format.gguf_io import ModelWriter

from . import imatrix
from .arch import Family, family_of
from .automatic import calibrate_as_gguf
from .backward import BackwardPass
from .calibration import CalibrationOptions, check_outputs
from .console import progress_bar
from .evaluate import read_text
from .folder_sources import load_sources
from .forward import Collector, ForwardPass, model_tensors, product_shapes
from .hessian import HessianWriter
from .hf2gguf import conversion_of
from .host import cpu_count
from .sources import open_checkpoint
from .target_types import KEEP
from .vocab import load_vocab

log = logging.getLogger(__name__)


def calibrate(
    model_dir: Path,
    text_path: Path,
    out: Path,
    options: CalibrationOptions | None = None,
    *,
    hessian: Path | None = None,
    progress: bool = True,
) -> imatrix.Importance:
    """Write the importance file ``out`` and, if a path is given, the Hessian file ``hessian`` (see there).

    A family whose layers are not known here is converted to a GGUF file beside ``out`` for the time, and run in
    llama.cpp (see ``collect``).

    The files appear when everything is done; an exception or an interrupt leaves neither.  Raises ``ModelError`` if
    the model cannot be loaded or a package is missing, ``EvalError`` for an unreadable text, ``ImportanceError`` if
    it is too short or activations are not finite, and ``OutputError``.
    """
    options = options or CalibrationOptions()
    if not model_dir.is_dir():
        raise ModelError("no such folder", file=model_dir)
    check_outputs(out, hessian, [*model_dir.iterdir(), text_path])
    family = family_of(model_dir)
    if not family.spec.calibrates or family.wrapper is not None:
        if options.gradients:
            raise ModelError(
                f"gradients need torch, which knows no layers of {family.wrapper or family.architecture} here; losses "
                "(--losses) do as well",
                file=family.config.file,
            )
        log.info("%s: is run in llama.cpp, as the GGUF file that hf2gguf makes of it", model_dir)
        return calibrate_as_gguf(conversion_of(model_dir, out, KEEP, progress=progress), text_path, options, hessian)
    if options.memory is not None:
        raise ModelError("a folder's layers come one at a time; --memory is for GGUF files", file=model_dir)
    if options.losses:
        raise ModelError("losses are measured of GGUF files; of a folder there are --gradients", file=model_dir)
    torch, transformers = _packages(model_dir)
    if options.ctx > family.context:
        raise ModelError(f"its context is {family.context} tokens, not {options.ctx}", file=family.config.file)
    checkpoint = open_checkpoint(model_dir, family.config)
    load_sources(family, checkpoint)  # refuses whatever hf2gguf refuses
    tensors = model_tensors(family, checkpoint)
    shapes, shared = product_shapes(family, tensors, options.process_output)
    with ExitStack() as stack, torch.no_grad():
        # Both check their targets before hours of work; nothing is created yet.
        writer = stack.enter_context(ModelWriter(out, "", overwrite=options.overwrite))
        products = None
        if hessian is not None:
            products = stack.enter_context(HessianWriter(hessian, shapes, shared, overwrite=options.overwrite))
            products.begin()
        windows = load_windows(model_dir, family, text_path, options.ctx, options.chunks)
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(options.threads if options.threads > 0 else cpu_count())
        collector = Collector(products)
        run = ForwardPass(
            model_dir, family, tensors, windows, collector, out.parent, transformers, keep=options.gradients
        )
        _run(run, options, progress)
        entries = {
            name: imatrix.Entry(squares, collector.counts[name], collector.gradients.get(name))
            for name, squares in collector.squares.items()
        }
        result = imatrix.Importance(str(out), entries, [str(text_path)], len(windows), options.ctx)
        imatrix.fill(writer, result)
    return result


def _run(forward: ForwardPass, options: CalibrationOptions, progress: bool) -> None:
    half_layers = 2 * forward.windows.size * forward.family.layers
    with progress_bar(progress) as bar:
        task = bar.add_task("embedding", total=half_layers * (3 if options.gradients else 1))
        forward(options.process_output, lambda text, done: bar.update(task, description=text, advance=done))
        if options.gradients:
            backward = BackwardPass(forward)
            backward(options.process_output, lambda text, done: bar.update(task, description=text, advance=2 * done))


def _packages(model_dir: Path) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ModelError(
            f"calibration needs torch and transformers (pip install 'ccq[calibrate]'): {error}", file=model_dir
        ) from None
    return torch, transformers


# --- text -----------------------------------------------------------------------------------------------------------


def load_windows(model_dir: Path, family: Family, text_path: Path, ctx: int, chunks: int | None) -> NDArray[np.int64]:
    """Token ids of the text, int64 ``[windows, ctx]``.  Raises ``EvalError``, ``ModelError``, ``ImportanceError``."""
    text = read_text(text_path)
    vocab = load_vocab(model_dir, family.vocab_size)
    bos = vocab.special.special_token_ids.get("bos")
    adds = vocab.special.add_special_token.get("bos", vocab.model == "llama")
    ids = _tokenize(model_dir, text)
    if adds and bos is not None:
        ids = [bos, *ids]
    count = len(ids) // ctx
    if count == 0:
        raise ImportanceError(f"has {len(ids)} tokens, one window needs {ctx}", file=text_path)
    count = min(count, chunks) if chunks is not None else count
    windows = np.array(ids[: count * ctx], np.int64).reshape(count, ctx)
    if windows.max() >= family.vocab_size:
        raise ModelError(f"its tokenizer gives token {windows.max()} of {family.vocab_size}", file=model_dir)
    if adds and bos is not None:
        windows[:, 0] = bos
    return windows


def _tokenize(model_dir: Path, text: str) -> list[int]:
    """Tokens without any added at the ends, by ``tokenizer.model`` if there is one, as in ``load_vocab``."""
    path = model_dir / "tokenizer.model"
    if path.is_file():
        from sentencepiece import SentencePieceProcessor

        return list(SentencePieceProcessor(model_file=str(path)).encode(text))
    from tokenizers import Tokenizer  # a dependency of transformers

    path = model_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more specific
        raise ModelError(f"is no tokenizer: {error}", file=path) from None
    return list(tokenizer.encode(text, add_special_tokens=False).ids)

"""``ccq-convert calibrate``: run a model over a text and sum up how large the inputs of every matrix are.

The text is cut into windows as llama.cpp's ``llama-imatrix`` does it: tokenized once, windows of ``ctx`` tokens that do
not overlap, a last incomplete one dropped, the first token of each replaced by BOS where the tokenizer adds one.  All
windows go through one decoder layer before the next layer is loaded, so that one layer's weights (of a mixture of
experts: its attention and one expert) and the hidden states of all tokens are in memory; large hidden states live in
an unnamed temporary file beside the output.  Everything is computed in float32, sums in float64.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ImportanceError, ModelError
from ccq_format.gguf_io import ModelWriter

from . import imatrix
from .arch import Family, family_of
from .arch.base import resolve
from .evaluate import read_text
from .hessian import HessianWriter
from .hf2gguf import load_sources, make_source
from .plan import TensorSource, cpu_count
from .safetensors_io import Checkpoint
from .stream import progress_bar
from .vocab import load_vocab

if TYPE_CHECKING:
    import torch

_BATCH = 4096
"""Tokens per step of the forward pass."""

_IN_MEMORY = 1 << 30
"""Bytes of hidden states above which they live in a temporary file."""

_DENSE_INPUTS = (
    ("self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.o_proj", ("self_attn.o_proj",)),
    ("mlp.gate_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down_proj", ("mlp.down_proj",)),
)
"""Modules of a decoder layer whose inputs are watched, and the matrices that read the same input."""

_ROUTER = "mlp.gate"
_EXPERTS = "mlp.experts."


@dataclass(frozen=True)
class CalibrationOptions:
    """``chunks`` = ``None`` takes all windows of the text; ``threads`` <= 0 means one per CPU; ``process_output`` adds
    the output matrix."""

    ctx: int = 512
    chunks: int | None = None
    threads: int = 0
    process_output: bool = False
    overwrite: bool = False


class _Sums:
    """Sum of squares, and on request the product ``X^T X``, of one input of ``width`` channels."""

    def __init__(self, width: int, product: bool) -> None:
        import torch

        self.squares = torch.zeros(width, dtype=torch.float64)
        self.product = torch.zeros(width, width) if product else None
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """``x``: float32 ``[..., width]``."""
        x = x.reshape(-1, x.shape[-1])
        self.squares += x.square().sum(0).double()
        if self.product is not None:
            self.product.addmm_(x.T, x)
        self.count += len(x)


class _Collector:
    """Takes finished sums: keeps the squares, streams the products out."""

    def __init__(self, hessian: HessianWriter | None) -> None:
        self.hessian = hessian
        self.squares: dict[str, NDArray[np.float32]] = {}
        self.counts: dict[str, NDArray[np.float64]] = {}

    def new(self, width: int, product: bool = True) -> _Sums:
        return _Sums(width, product and self.hessian is not None)

    def done(self, names: tuple[str, ...], sums: _Sums, matrices: int = 1, matrix: int = 0) -> None:
        """Store the sums of one matrix under all ``names`` that share the input.  Raises ``ImportanceError``."""
        squares = sums.squares.numpy()
        if not (np.isfinite(squares).all() and squares.max() < np.finfo(np.float32).max):
            raise ImportanceError("the model's activations are not finite", tensor=names[0])
        for name in names:
            if name not in self.squares:
                self.squares[name] = np.zeros(matrices * len(squares), np.float32)
                self.counts[name] = np.zeros(matrices)
            self.squares[name].reshape(matrices, -1)[matrix] = squares
            self.counts[name][matrix] = sums.count
        if self.hessian is not None and sums.product is not None:
            self.hessian.write(names[0], sums.product.numpy(), sums.count, matrix)


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

    The files appear when everything is done; an exception or an interrupt leaves neither.  Raises ``ModelError`` if
    the model cannot be loaded or a package is missing, ``EvalError`` for an unreadable text, ``ImportanceError`` if
    it is too short or activations are not finite, and ``OutputError``.
    """
    options = options or CalibrationOptions()
    torch, transformers = _packages(model_dir)
    if not model_dir.is_dir():
        raise ModelError("no such folder", file=model_dir)
    family = family_of(model_dir)
    if options.ctx > family.context:
        raise ModelError(f"its context is {family.context} tokens, not {options.ctx}", file=family.config.file)
    checkpoint = Checkpoint(model_dir)
    load_sources(family, checkpoint)  # refuses whatever hf2gguf refuses
    tensors = _tensors(family, checkpoint)
    shapes, shared = _products(family, tensors, options.process_output)
    with ExitStack() as stack, torch.inference_mode():
        # Both check their targets before hours of work; nothing is created yet.
        writer = stack.enter_context(ModelWriter(out, "", overwrite=options.overwrite))
        products = None
        if hessian is not None:
            if hessian.absolute() == out.absolute():
                raise ImportanceError("is to hold both the importance and the Hessians", file=out)
            products = stack.enter_context(HessianWriter(hessian, shapes, shared, overwrite=options.overwrite))
            products.begin()
        windows = load_windows(model_dir, family, text_path, options.ctx, options.chunks)
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(options.threads if options.threads > 0 else cpu_count())
        run = _Run(model_dir, family, tensors, windows, _Collector(products), out.parent, transformers)
        run(options.process_output, progress)
        entries = {
            name: imatrix.Entry(squares, run.collector.counts[name]) for name, squares in run.collector.squares.items()
        }
        result = imatrix.Importance(str(out), entries, [str(text_path)], len(windows), options.ctx)
        imatrix.fill(writer, result)
    return result


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


def load_windows(
    model_dir: Path, family: Family, text_path: Path, ctx: int, chunks: int | None
) -> NDArray[np.int64]:
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


# --- tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A checkpoint tensor: its GGUF name, and its rows in transformers' order."""

    gguf_name: str
    source: TensorSource


def _tensors(family: Family, checkpoint: Checkpoint) -> dict[str, _Tensor]:
    """The model's tensors by their names in transformers' modules."""
    out = {}
    for name, wanted in resolve(family, frozenset(t.name for t in checkpoint)):
        module = wanted.hf_name.replace(".block_sparse_moe.", ".mlp.")
        out[module] = _Tensor(name, make_source(name, replace(wanted, heads=0), checkpoint))
    return out


def _inputs(tensors: dict[str, _Tensor], layer: int) -> Iterator[tuple[str, tuple[str, ...], TensorSource]]:
    """Module, GGUF names that share its input, and a tensor that reads it, for the dense inputs of a layer."""
    for module, members in _DENSE_INPUTS:
        prefix = f"model.layers.{layer}."
        if f"{prefix}{module}.weight" in tensors:
            names = tuple(tensors[f"{prefix}{member}.weight"].gguf_name for member in members)
            yield module, names, tensors[f"{prefix}{module}.weight"].source


def _expert_names(tensors: dict[str, _Tensor], layer: int) -> tuple[_Tensor, _Tensor, _Tensor] | None:
    """Gate, up and down of a layer's experts."""
    prefix = f"model.layers.{layer}.{_EXPERTS}"
    if f"{prefix}gate_proj.weight" not in tensors:
        return None
    gate, up, down = (tensors[f"{prefix}{kind}_proj.weight"] for kind in ("gate", "up", "down"))
    return gate, up, down


def _output(tensors: dict[str, _Tensor]) -> _Tensor:
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


def _products(
    family: Family, tensors: dict[str, _Tensor], output: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of all Hessians, in the order in which they are computed, and which names share one."""
    shapes: dict[str, tuple[int, ...]] = {}
    shared: dict[str, str] = {}
    for layer in range(family.layers):
        for _, names, source in _inputs(tensors, layer):
            shapes[names[0]] = (source.row_len, source.row_len)
            shared.update({name: names[0] for name in names[1:]})
        experts = _expert_names(tensors, layer)
        if experts is not None:
            for tensor in (experts[0], experts[2]):
                n, width = tensor.source.matrices, tensor.source.row_len
                shapes[tensor.gguf_name] = (n, width, width)
            shared[experts[1].gguf_name] = experts[0].gguf_name
    if output:
        tensor = _output(tensors)
        shapes[tensor.gguf_name] = (tensor.source.row_len, tensor.source.row_len)
    return shapes, shared


def _load(source: TensorSource, matrix: int | None = None) -> torch.Tensor:
    """A whole tensor, or one matrix of a stack, float32."""
    import torch

    if matrix is None:
        return torch.from_numpy(source.load_rows(0, source.rows).reshape(source.shape))
    rows = source.shape[-2]
    return torch.from_numpy(source.load_rows(matrix * rows, (matrix + 1) * rows))


# --- the forward pass -----------------------------------------------------------------------------------------------


class _Run:
    """One pass of all windows through the model.

    transformers' modules are built without memory (device ``meta``); a layer gets its weights for its turn.
    """

    def __init__(
        self,
        model_dir: Path,
        family: Family,
        tensors: dict[str, _Tensor],
        windows: NDArray[np.int64],
        collector: _Collector,
        folder: Path,
        transformers: Any,
    ) -> None:
        import torch

        self.family, self.tensors, self.windows, self.collector = family, tensors, windows, collector
        self.folder = folder
        self.model_dir = model_dir
        try:
            config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
            config.dtype = torch.float32
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
            self.model = model.eval().model
            self.rotary = type(self.model.rotary_emb)(config=config)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
            raise ModelError(f"transformers cannot build the model: {error}", file=model_dir) from error

    def __call__(self, output: bool, progress: bool) -> None:
        """Run; the sums go to the collector."""
        import torch

        n, ctx = self.windows.shape
        self.step = max(1, _BATCH // ctx)
        self.hidden = self._states()
        with progress_bar(progress) as bar:
            task = bar.add_task("embedding", total=2 * n * ctx * self.family.layers)

            def advance(tokens: int) -> None:
                bar.advance(task, tokens)

            self._embed()
            positions = torch.arange(ctx)[None]
            self.position_embeddings = self.rotary(torch.zeros(1, dtype=torch.float32), positions)
            for layer in range(self.family.layers):
                bar.update(task, description=f"layer {layer + 1} of {self.family.layers}")
                self._layer(layer, advance)
            if output:
                self._output_matrix()

    def _states(self) -> torch.Tensor:
        """Hidden states of all tokens, float32 ``[windows, ctx, hidden]``, in memory or in an unnamed file."""
        import torch

        shape = (*self.windows.shape, self.family.hidden)
        nbytes = 4 * int(np.prod(shape))
        if nbytes <= _IN_MEMORY:
            return torch.zeros(shape)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            os.truncate(file.fileno(), nbytes)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))

    def _batches(self) -> Iterator[torch.Tensor]:
        """Views of the hidden states, a few windows at a time."""
        for start in range(0, len(self.windows), self.step):
            yield self.hidden[start : start + self.step]

    def _embed(self) -> None:
        import torch

        source = self.tensors["model.embed_tokens.weight"].source
        flat, ids = self.hidden.reshape(-1, self.family.hidden), self.windows.reshape(-1)
        rows = _BATCH
        for start in range(0, source.rows, rows):
            stop = min(source.rows, start + rows)
            (at,) = np.nonzero((ids >= start) & (ids < stop))
            if len(at):
                table = torch.from_numpy(source.load_rows(start, stop))
                flat[torch.from_numpy(at)] = table[torch.from_numpy(ids[at] - start)]

    def _layer(self, index: int, advance: Callable[[int], None]) -> None:
        """All windows through decoder layer ``index``: attention, then the feed-forward network."""
        layer = self._loaded(index)
        sums: dict[str, tuple[tuple[str, ...], _Sums]] = {}
        handles = []
        for module, names, source in _inputs(self.tensors, index):
            sums[module] = names, self.collector.new(source.row_len)
            handles.append(
                layer.get_submodule(module).register_forward_pre_hook(
                    lambda _module, args, total=sums[module][1]: total.add(args[0])
                )
            )
        for x in self._batches():
            x += layer.self_attn(
                hidden_states=layer.input_layernorm(x),
                position_embeddings=self.position_embeddings,
                attention_mask=None,
            )[0]
            advance(x.shape[0] * x.shape[1])
        experts = _expert_names(self.tensors, index)
        if experts is not None:
            self._experts(layer, index, experts, advance)
        else:
            for x in self._batches():
                x += layer.mlp(layer.post_attention_layernorm(x))
                advance(x.shape[0] * x.shape[1])
        for handle in handles:
            handle.remove()
        for names, total in sums.values():
            self.collector.done(names, total)
        self.model.layers[index] = None

    def _loaded(self, index: int) -> Any:
        """Decoder layer ``index`` with its weights, except those of experts.  Raises ``ModelError``."""
        layer, prefix = self.model.layers[index], f"model.layers.{index}."
        weights = {
            name.removeprefix(prefix): _load(tensor.source)
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and _EXPERTS not in name
        }
        missing, unexpected = layer.load_state_dict(weights, strict=False, assign=True)
        odd = [name for name in missing if not name.startswith(_EXPERTS)] + unexpected
        if odd:
            raise ModelError(f"transformers' model and the checkpoint differ in {prefix}{odd[0]}", file=self.model_dir)
        return layer

    def _experts(
        self, layer: Any, index: int, experts: tuple[_Tensor, _Tensor, _Tensor], advance: Callable[[int], None]
    ) -> None:
        """The mixture of experts: all tokens are routed first, then one expert after the other is loaded."""
        import torch
        from torch.nn.functional import linear

        router = self.tensors[f"model.layers.{index}.{_ROUTER}.weight"]
        routed = self.collector.new(self.family.hidden, product=False)
        inputs = self._states()
        chosen, shares = [], []
        for start, x in zip(range(0, len(self.windows), self.step), self._batches(), strict=True):
            normed = layer.post_attention_layernorm(x)
            inputs[start : start + len(x)] = normed
            routed.add(normed)
            _, share, expert = layer.mlp.gate(normed)
            chosen.append(expert)
            shares.append(share)
        self.collector.done((router.gguf_name,), routed)
        flat, hidden = inputs.reshape(-1, self.family.hidden), self.hidden.reshape(-1, self.family.hidden)
        chosen_experts, share_of = torch.cat(chosen), torch.cat(shares)
        gate, up, down = experts
        n = gate.source.matrices
        for expert in range(n):
            first = self.collector.new(gate.source.row_len)
            second = self.collector.new(down.source.row_len)
            tokens, slot = torch.where(chosen_experts == expert)
            if len(tokens):
                w_gate, w_up, w_down = (_load(tensor.source, expert) for tensor in experts)
            for start in range(0, len(tokens), _BATCH):
                at = tokens[start : start + _BATCH]
                x = flat[at]
                first.add(x)
                inner = layer.mlp.experts.act_fn(linear(x, w_gate)) * linear(x, w_up)
                second.add(inner)
                share = share_of[at, slot[start : start + _BATCH], None]
                hidden.index_add_(0, at, linear(inner, w_down) * share)
            advance(len(flat) * (expert + 1) // n - len(flat) * expert // n)
            self.collector.done((gate.gguf_name, up.gguf_name), first, n, expert)
            self.collector.done((down.gguf_name,), second, n, expert)

    def _output_matrix(self) -> None:
        tensor = _output(self.tensors)
        norm = self.model.norm
        norm.load_state_dict({"weight": _load(self.tensors["model.norm.weight"].source)}, assign=True)
        total = self.collector.new(tensor.source.row_len)
        for x in self._batches():
            total.add(norm(x))
        self.collector.done((tensor.gguf_name,), total)

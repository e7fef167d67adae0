"""One pass of a text through a Hugging Face model, streamed: a layer's weights are in memory for its turn only.

All windows go through one decoder layer before the next layer is loaded, so that one layer's weights (of a mixture of
experts: its attention and one expert) and the hidden states of all tokens are in memory; large hidden states live in
an unnamed temporary file.  Everything is computed in float32, sums in float64.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ImportanceError, ModelError

from .arch import Family
from .arch.base import resolve
from .folder_sources import make_source, row_order
from .hessian import HessianWriter
from .safetensors_io import Checkpoint
from .tensors import TensorSource

if TYPE_CHECKING:
    import torch

BATCH = 4096
"""Tokens per step."""

IN_MEMORY = 1 << 30
"""Bytes of hidden states above which they live in a temporary file."""

_DENSE_INPUTS = (
    ("self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.o_proj", ("self_attn.o_proj",)),
    ("mlp.gate_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down_proj", ("mlp.down_proj",)),
)
"""Modules of a decoder layer whose inputs are watched, and the matrices that read the same input."""

ROUTER = "mlp.gate"
EXPERTS = "mlp.experts."


class Sums:
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

    def add_gradients_of(self, output: torch.Tensor) -> None:
        """Once autograd has it, add the gradient of ``output``, float32 ``[..., width]``."""
        output.register_hook(self.add)  # type: ignore[no-untyped-call]


class Collector:
    """Takes finished sums: keeps the squares (of inputs, and of the gradients of outputs), streams the products out."""

    def __init__(self, hessian: HessianWriter | None) -> None:
        self.hessian = hessian
        self.squares: dict[str, NDArray[np.float32]] = {}
        self.counts: dict[str, NDArray[np.float64]] = {}
        self.gradients: dict[str, NDArray[np.float32]] = {}

    def new(self, width: int, product: bool = True) -> Sums:
        return Sums(width, product and self.hessian is not None)

    def done(self, names: tuple[str, ...], sums: Sums, matrices: int = 1, matrix: int = 0) -> None:
        """Store the sums of one matrix under all ``names`` that share the input.  Raises ``ImportanceError``."""
        squares = _finite(sums, names[0], "activations")
        for name in names:
            if name not in self.squares:
                self.squares[name] = np.zeros(matrices * len(squares), np.float32)
                self.counts[name] = np.zeros(matrices)
            self.squares[name].reshape(matrices, -1)[matrix] = squares
            self.counts[name][matrix] = sums.count
        if self.hessian is not None and sums.product is not None:
            self.hessian.write(names[0], sums.product.numpy(), sums.count, matrix)

    def done_gradient(self, tensor: ModelTensor, sums: Sums, matrix: int = 0) -> None:
        """Store the sums of one matrix's output gradients, in GGUF's order of rows.  Raises ``ImportanceError``."""
        squares = _finite(sums, tensor.gguf_name, "gradients")
        if tensor.heads:
            squares = squares[row_order(len(squares), tensor.heads)]
        if tensor.gguf_name not in self.gradients:
            self.gradients[tensor.gguf_name] = np.zeros(tensor.source.rows, np.float32)
        self.gradients[tensor.gguf_name].reshape(tensor.source.matrices, -1)[matrix] = squares


def _finite(sums: Sums, name: str, what: str) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = sums.squares.numpy()
    if not (np.isfinite(squares).all() and squares.max() < np.finfo(np.float32).max):
        raise ImportanceError(f"the model's {what} are not finite", tensor=name)
    return squares


# --- tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTensor:
    """A checkpoint tensor: its GGUF name, its rows in transformers' order, and the number of heads whose rows GGUF
    has in another order (0: the same order; see ``hf2gguf.row_order``)."""

    gguf_name: str
    source: TensorSource
    heads: int = 0


def model_tensors(family: Family, checkpoint: Checkpoint) -> dict[str, ModelTensor]:
    """The model's tensors by their names in transformers' modules."""
    out = {}
    for name, wanted in resolve(family, frozenset(t.name for t in checkpoint)):
        module = wanted.hf_name.replace(".block_sparse_moe.", ".mlp.")
        out[module] = ModelTensor(name, make_source(name, replace(wanted, heads=0), checkpoint), wanted.heads)
    return out


def dense_inputs(tensors: dict[str, ModelTensor], layer: int) -> Iterator[tuple[str, tuple[str, ...], TensorSource]]:
    """Module, GGUF names that share its input, and a tensor that reads it, for the dense inputs of a layer."""
    for module, members in _DENSE_INPUTS:
        prefix = f"model.layers.{layer}."
        if f"{prefix}{module}.weight" in tensors:
            names = tuple(tensors[f"{prefix}{member}.weight"].gguf_name for member in members)
            yield module, names, tensors[f"{prefix}{module}.weight"].source


Experts = tuple[ModelTensor, ModelTensor, ModelTensor]
"""Gate, up and down of a layer's experts."""


def expert_tensors(tensors: dict[str, ModelTensor], layer: int) -> Experts | None:
    """The experts of a layer that has some."""
    prefix = f"model.layers.{layer}.{EXPERTS}"
    if f"{prefix}gate_proj.weight" not in tensors:
        return None
    gate, up, down = (tensors[f"{prefix}{kind}_proj.weight"] for kind in ("gate", "up", "down"))
    return gate, up, down


def output_tensor(tensors: dict[str, ModelTensor]) -> ModelTensor:
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


def product_shapes(
    family: Family, tensors: dict[str, ModelTensor], output: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of all Hessians, in the order in which they are computed, and which names share one."""
    shapes: dict[str, tuple[int, ...]] = {}
    shared: dict[str, str] = {}
    for layer in range(family.layers):
        for _, names, source in dense_inputs(tensors, layer):
            shapes[names[0]] = (source.row_len, source.row_len)
            shared.update(dict.fromkeys(names[1:], names[0]))
        experts = expert_tensors(tensors, layer)
        if experts is not None:
            for tensor in (experts[0], experts[2]):
                n, width = tensor.source.matrices, tensor.source.row_len
                shapes[tensor.gguf_name] = (n, width, width)
            shared[experts[1].gguf_name] = experts[0].gguf_name
    if output:
        tensor = output_tensor(tensors)
        shapes[tensor.gguf_name] = (tensor.source.row_len, tensor.source.row_len)
    return shapes, shared


def load_weights(source: TensorSource, matrix: int | None = None) -> torch.Tensor:
    """A whole tensor, or one matrix of a stack, float32."""
    import torch

    if matrix is None:
        return torch.from_numpy(source.load_rows(0, source.rows).reshape(source.shape))
    rows = source.shape[-2]
    return torch.from_numpy(source.load_rows(matrix * rows, (matrix + 1) * rows))


# --- the forward pass -----------------------------------------------------------------------------------------------


class ForwardPass:
    """One pass of all windows through the model.

    transformers' modules are built without memory (device ``meta``); a layer gets its weights for its turn.  ``hidden``
    holds the hidden states float32 ``[windows, ctx, hidden]``; with ``keep``, ``kept`` those that enter each layer,
    ``[layers, windows, ctx, hidden]``.
    """

    def __init__(
        self,
        model_dir: Path,
        family: Family,
        tensors: dict[str, ModelTensor],
        windows: NDArray[np.int64],
        collector: Collector,
        folder: Path,
        transformers: Any,
        *,
        keep: bool = False,
    ) -> None:
        """``folder`` gets the unnamed temporary files.  Raises ``ModelError`` if transformers lacks the model."""
        import torch

        self.family, self.tensors, self.windows, self.collector = family, tensors, windows, collector
        self.folder = folder
        self.model_dir = model_dir
        try:
            config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
            config.dtype = torch.float32
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(
                    config, attn_implementation="sdpa", trust_remote_code=False
                )
            self.model = model.eval().requires_grad_(False).model
            self.rotary = type(self.model.rotary_emb)(config=config)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
            raise ModelError(f"transformers cannot build the model: {error}", file=model_dir) from error
        ctx = windows.shape[1]
        self.step = max(1, BATCH // ctx)
        self.position_embeddings = self.rotary(torch.zeros(1, dtype=torch.float32), torch.arange(ctx)[None])
        self.hidden = self.states()
        self.kept = self.states(family.layers) if keep else None

    def __call__(self, output: bool, advance: Callable[[str, int], None]) -> None:
        """Run; the sums go to the collector.  ``advance`` is told what is done and takes half tokens of a layer."""
        self._embed()
        for layer in range(self.family.layers):
            if self.kept is not None:
                self.kept[layer] = self.hidden
            text = f"layer {layer + 1} of {self.family.layers}"
            self._layer(layer, partial(advance, text))
        if output:
            self._output_matrix()

    def states(self, copies: int = 0) -> torch.Tensor:
        """Zeros for hidden states of all tokens, float32 ``[windows, ctx, hidden]`` (``copies``: as many of them), in
        memory or in an unnamed file.  Raises ``OSError`` if the disk has no room."""
        import torch

        shape = (*((copies,) if copies else ()), *self.windows.shape, self.family.hidden)
        nbytes = 4 * int(np.prod(shape))
        if nbytes <= IN_MEMORY:
            return torch.zeros(shape)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a SIGBUS later
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                os.truncate(file.fileno(), nbytes)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))

    def spans(self) -> Iterator[slice]:
        """Windows, a few at a time."""
        for start in range(0, len(self.windows), self.step):
            yield slice(start, min(start + self.step, len(self.windows)))

    def _batches(self) -> Iterator[torch.Tensor]:
        """Views of the hidden states, a few windows at a time."""
        for span in self.spans():
            yield self.hidden[span]

    def _embed(self) -> None:
        import torch

        source = self.tensors["model.embed_tokens.weight"].source
        flat, ids = self.hidden.reshape(-1, self.family.hidden), self.windows.reshape(-1)
        rows = BATCH
        for start in range(0, source.rows, rows):
            stop = min(source.rows, start + rows)
            (at,) = np.nonzero((ids >= start) & (ids < stop))
            if len(at):
                table = torch.from_numpy(source.load_rows(start, stop))
                flat[torch.from_numpy(at)] = table[torch.from_numpy(ids[at] - start)]

    def attention(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """What the attention of ``layer`` adds to its hidden states ``[windows, ctx, hidden]``."""
        added: torch.Tensor = layer.self_attn(
            hidden_states=layer.input_layernorm(x),
            position_embeddings=self.position_embeddings,
            attention_mask=None,
        )[0]
        return added

    def _layer(self, index: int, advance: Callable[[int], None]) -> None:
        """All windows through decoder layer ``index``: attention, then the feed-forward network."""
        layer = self.loaded(index)
        sums: dict[str, tuple[tuple[str, ...], Sums]] = {}
        handles = []
        for module, names, source in dense_inputs(self.tensors, index):
            sums[module] = names, self.collector.new(source.row_len)
            handles.append(
                layer.get_submodule(module).register_forward_pre_hook(
                    lambda _module, args, total=sums[module][1]: total.add(args[0])
                )
            )
        for x in self._batches():
            x += self.attention(layer, x)
            advance(x.shape[0] * x.shape[1])
        experts = expert_tensors(self.tensors, index)
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
        layer.to("meta")

    def loaded(self, index: int) -> Any:
        """Decoder layer ``index`` with its weights, except those of experts; ``.to("meta")`` frees them again.  Raises
        ``ModelError``."""
        layer, prefix = self.model.layers[index], f"model.layers.{index}."
        weights = {
            name.removeprefix(prefix): load_weights(tensor.source)
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and EXPERTS not in name
        }
        missing, unexpected = layer.load_state_dict(weights, strict=False, assign=True)
        odd = [name for name in missing if not name.startswith(EXPERTS)] + unexpected
        if odd:
            raise ModelError(f"transformers' model and the checkpoint differ in {prefix}{odd[0]}", file=self.model_dir)
        return layer

    def routed(self, layer: Any, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the hidden states between attention and experts: the experts' inputs, of the size of ``hidden``, and for
        each token the chosen experts and their shares, ``[tokens, chosen]``.  ``batches`` go with ``spans()``."""
        import torch

        inputs = self.states()
        chosen, shares = [], []
        for span, x in zip(self.spans(), batches, strict=True):
            inputs[span] = layer.post_attention_layernorm(x)
            _, share, expert = layer.mlp.gate(inputs[span])
            chosen.append(expert)
            shares.append(share)
        return inputs, torch.cat(chosen), torch.cat(shares)

    def _experts(self, layer: Any, index: int, experts: Experts, advance: Callable[[int], None]) -> None:
        """The mixture of experts: all tokens are routed first, then one expert after the other is loaded."""
        import torch
        from torch.nn.functional import linear

        inputs, chosen, share_of = self.routed(layer, self._batches())
        total = self.collector.new(self.family.hidden, product=False)
        for span in self.spans():
            total.add(inputs[span])
        self.collector.done((self.tensors[f"model.layers.{index}.{ROUTER}.weight"].gguf_name,), total)
        flat, hidden = inputs.reshape(-1, self.family.hidden), self.hidden.reshape(-1, self.family.hidden)
        gate, up, down = experts
        n = gate.source.matrices
        for expert in range(n):
            first = self.collector.new(gate.source.row_len)
            second = self.collector.new(down.source.row_len)
            tokens, slot = torch.where(chosen == expert)
            if len(tokens):
                w_gate, w_up, w_down = (load_weights(tensor.source, expert) for tensor in experts)
            for start in range(0, len(tokens), BATCH):
                at = tokens[start : start + BATCH]
                x = flat[at]
                first.add(x)
                inner = layer.mlp.experts.act_fn(linear(x, w_gate)) * linear(x, w_up)
                second.add(inner)
                share = share_of[at, slot[start : start + BATCH], None]
                hidden.index_add_(0, at, linear(inner, w_down) * share)
            advance(len(flat) * (expert + 1) // n - len(flat) * expert // n)
            self.collector.done((gate.gguf_name, up.gguf_name), first, n, expert)
            self.collector.done((down.gguf_name,), second, n, expert)

    def final_norm(self) -> Any:
        """The norm after the last layer, with its weights."""
        norm = self.model.norm
        norm.load_state_dict({"weight": load_weights(self.tensors["model.norm.weight"].source)}, assign=True)
        return norm

    def _output_matrix(self) -> None:
        tensor, norm = output_tensor(self.tensors), self.final_norm()
        total = self.collector.new(tensor.source.row_len)
        for x in self._batches():
            total.add(norm(x))
        self.collector.done((tensor.gguf_name,), total)

"""Linear layers of torch whose weights stay in CCQ blocks: on a CUDA device they run ``ccq_backend.cuda.matmul``, on
the CPU the kernels of ``ccq_backend``.  Needs torch.
"""

from __future__ import annotations

import os

import gguf
import numpy as np
import torch

from ccq_format import errors, gguf_io, layouts

from . import cuda, kernels

__all__ = ["CcqLinear", "replace_linears"]


class CcqLinear(torch.nn.Module):
    """``y = x W^T + b`` with W in CCQ blocks; for inference, without gradients.

    Buffers: ``blocks`` u8 [out_features, row bytes], ``bias`` [out_features] or ``None``; ``to(device)`` moves them.
    x is f32, f16 or bf16 [..., in_features], y has its dtype.  Activations are rounded to integers first (8 bits on a
    GPU, 8 or 16 on a CPU: backend/cpu/ACTIVATIONS.md).  Raises ``ShapeError``; on a GPU ``CudaError``.
    """

    blocks: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, type: str | layouts.Layout, blocks: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.layout = type if isinstance(type, layouts.Layout) else layouts.by_name(type)
        if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % self.layout.block_bytes:
            raise errors.ShapeError(f"blocks must be u8 [rows, n * {self.layout.block_bytes}] for {self.layout.name}")
        self.out_features = blocks.shape[0]
        self.in_features = blocks.shape[1] // self.layout.block_bytes * self.layout.block_weights
        if bias is not None and bias.shape != (self.out_features,):
            raise errors.ShapeError(f"bias has shape {tuple(bias.shape)}, not {(self.out_features,)}")
        self.register_buffer("blocks", blocks.contiguous())
        self.register_buffer("bias", bias)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], tensor: str, bias: torch.Tensor | None = None, heads: int = 0
    ) -> CcqLinear:
        """The matrix ``tensor`` of a CCQ file.

        ``heads`` > 0 undoes the order that GGUF files of the llama architecture give the rows of query and key heads
        (transformers rotates halves of a head, llama.cpp neighbours).  Raises ``FormatError``, ``InputError``,
        ``ShapeError``; ``TensorTypeError`` if the file has no such matrix or it is of no CCQ type.
        """
        return cls._from_model(gguf_io.open_model(path), tensor, bias, heads)

    @classmethod
    def _from_model(cls, model: gguf_io.Model, tensor: str, bias: torch.Tensor | None, heads: int) -> CcqLinear:
        try:
            info = model.tensor(tensor)
        except KeyError:
            raise errors.TensorTypeError("the file has no such tensor", file=model.path, tensor=tensor) from None
        if info.layout is None or len(info.shape) != 2:
            what = f"{info.type_name} {list(info.shape)}"
            raise errors.TensorTypeError(f"{what} is no matrix of a CCQ type", file=model.path, tensor=tensor)
        rows = info.stored_rows(0, info.n_rows)
        if heads:
            if info.n_rows % (2 * heads):
                reason = f"{info.n_rows} rows are no {heads} heads of even size"
                raise errors.ShapeError(reason, file=model.path, tensor=tensor)
            rows = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        return cls(info.layout, torch.from_numpy(np.array(rows)), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f32, f16 or bf16 [..., in_features] to [..., out_features] of the same dtype."""
        if x.shape[-1] != self.in_features:
            raise errors.ShapeError(f"x has rows of {x.shape[-1]}, the weights of {self.in_features}")
        rows = x.detach().reshape(-1, self.in_features)
        if x.device.type == "cuda":
            y = cuda.matmul(self.layout, self.blocks, rows.contiguous())
        else:
            act = kernels.quantize_activations(rows.float().numpy())
            y = torch.from_numpy(kernels.mul_mat(self.layout, self.blocks.numpy(), act))
        out: torch.Tensor = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.layout.name}, in_features={self.in_features}, out_features={self.out_features}"


def replace_linears(model: torch.nn.Module, path: str | os.PathLike[str]) -> int:
    """Put a ``CcqLinear`` in place of every ``torch.nn.Linear`` of a transformers model whose matrix is of a CCQ type
    in the GGUF file ``path`` of that model; biases stay the module's own.  Returns how many.

    Names are found by gguf's own map.  Raises what ``CcqLinear.from_file`` raises, and ``ModelError`` if gguf does not
    know the file's architecture or a shape is not the module's.
    """
    file = gguf_io.open_model(path)
    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch), None)
    if arch is None:
        raise errors.ModelError(f"gguf knows no architecture '{file.arch}'", file=path)
    names = gguf.get_tensor_name_map(arch, int(file.metadata[f"{file.arch}.block_count"]))
    stored = {t.name: t for t in file.tensors}
    count = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        tensor = stored.get(f"{names.get_name(name)}.weight")
        if tensor is None or tensor.layout is None:
            continue
        heads = 0
        if file.arch == "llama" and name.endswith(("q_proj", "k_proj")):
            key = "head_count" if name.endswith("q_proj") else "head_count_kv"
            heads = int(file.metadata[f"llama.attention.{key}"])
        linear = CcqLinear._from_model(file, tensor.name, module.bias, heads)
        if (linear.out_features, linear.in_features) != (module.out_features, module.in_features):
            shape = [module.out_features, module.in_features]
            raise errors.ModelError(f"is {list(tensor.shape)}, {name} {shape}", file=path, tensor=tensor.name)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, linear.to(module.weight.device))
        count += 1
    return count

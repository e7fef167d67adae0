"""How much the outputs of every matrix matter to the model's predictions, by a streamed backward pass.

With y = W x and an error E of the weights, the KL divergence of the model's predictions from the original ones is to
second order ``1/2 E_tokens[(g^T E x)^2]``, g being the gradient of the log-likelihood of a label that is drawn from
the model's own prediction (the Fisher information; Amari, Neural Computation 10, 1998).  Every position of a window
predicts such a label and g at one position collects what it does to all later ones.  Taking the channels as
independent, that is ``1/2 sum_ij G_i H_j E_ij^2`` per token, with G the mean of ``g_i^2`` and H that of ``x_j^2``.

Measured: 21 matrices of a 4 M Llama, each alone in CCQ_T2, lose from 0.00005 to 0.011 nats per token, 0.81 to 1.51
times what that says (geometric mean 1.03; 4096 tokens, the same for both), all 28 together 0.0776 (1.08 times).  The
most is attention V's, whose errors at several positions add up: products of two positions are left out.  Nor does any
gradient see that errors can make a router choose other experts: before the last router of a random mixture with 4
experts, noise of 1 % cost 4.5 times as much.

The hidden states that enter each layer are kept from the forward pass; from the last layer to the first, a layer is
loaded again (its experts one by one), computed again for a few windows at a time, and differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .forward import BATCH, ROUTER, Experts, ForwardPass, ModelTensor, Sums, expert_tensors, load_weights, output_tensor

if TYPE_CHECKING:
    import torch

_LOGITS = 1 << 24
"""Logits per step: 64 MiB of float32."""

_SEED = 1


class BackwardPass:
    """One pass back through the model after ``forward``, which was made with ``keep``; its ``hidden`` becomes the
    gradient, of the loss summed over a window's positions, with respect to the same hidden states."""

    def __init__(self, forward: ForwardPass) -> None:
        self.forward = forward
        self.collector = forward.collector
        self.tensors = forward.tensors

    def __call__(self, output: bool, advance: Callable[[str, int], None]) -> None:
        """Run; the sums go to the collector.  ``output`` and ``advance`` as in the forward pass."""
        self._loss(output)
        layers = self.forward.family.layers
        for index in reversed(range(layers)):
            text = f"gradients of layer {index + 1} of {layers}"
            self._layer(index, partial(advance, text))

    def _loss(self, output: bool) -> None:
        """Draw the labels, and go from the loss back to the last layer's hidden states.

        The sums of the output matrix itself need no labels: the mean of ``g_i^2`` over them is ``p_i (1 - p_i)``.
        """
        import torch

        tensor, norm = output_tensor(self.tensors), self.forward.final_norm()
        weights = load_weights(tensor.source)
        hidden = self.forward.hidden.reshape(-1, self.forward.family.hidden)
        uniform = torch.from_numpy(np.random.default_rng(_SEED).random(len(hidden)))
        total = self.collector.new(len(weights), product=False)
        step = min(BATCH, max(1, _LOGITS // len(weights)))
        for start in range(0, len(hidden), step):
            part = hidden[start : start + step]
            with torch.enable_grad():
                x = part.clone().requires_grad_()
                normed = norm(x)
            p = torch.softmax(normed.detach() @ weights.T, dim=-1)
            total.squares += (p * (1 - p)).sum(0).double()
            total.count += len(p)
            # g is p without the label's 1.
            p[torch.arange(len(p)), draw(p, uniform[start : start + step])] -= 1
            (gradient,) = torch.autograd.grad(normed, x, p @ weights)
            part.copy_(gradient)
        if output:
            self.collector.done_gradient(tensor, total)

    def _layer(self, index: int, advance: Callable[[int], None]) -> None:
        """The gradients of layer ``index``: of its matrices' outputs, and of the hidden states that enter it."""
        layer = self.forward.loaded(index)
        sums, handles = [], []
        for module, tensor in self._linears(index):
            total = self.collector.new(tensor.source.rows, product=False)
            sums.append((tensor, total))
            handles.append(layer.get_submodule(module).register_forward_hook(_watching(total)))
        experts = expert_tensors(self.tensors, index)
        if experts is not None:
            self._experts(layer, index, experts, advance)
        else:
            self._dense(layer, index, advance)
        for handle in handles:
            handle.remove()
        for tensor, total in sums:
            self.collector.done_gradient(tensor, total)
        layer.to("meta")

    def _linears(self, index: int) -> Iterator[tuple[str, ModelTensor]]:
        """Modules of a layer that are a product with one matrix."""
        prefix, suffix = f"model.layers.{index}.", ".weight"
        for name, tensor in self.tensors.items():
            module = name.removeprefix(prefix).removesuffix(suffix)
            if name == f"{prefix}{module}{suffix}" and len(tensor.source.shape) == 2 and module != ROUTER:
                yield module, tensor

    def _entering(self, index: int, span: slice) -> torch.Tensor:
        """Copy of the hidden states that enter layer ``index``, of some windows."""
        assert self.forward.kept is not None
        return self.forward.kept[index][span].clone()

    def _dense(self, layer: Any, index: int, advance: Callable[[int], None]) -> None:
        import torch

        for span in self.forward.spans():
            upstream = self.forward.hidden[span]
            with torch.enable_grad():
                x = self._entering(index, span).requires_grad_()
                between = x + self.forward.attention(layer, x)
                y = between + layer.mlp(layer.post_attention_layernorm(between))
            (gradient,) = torch.autograd.grad(y, x, upstream.clone())
            upstream.copy_(gradient)
            advance(2 * x.shape[0] * x.shape[1])

    def _experts(self, layer: Any, index: int, experts: Experts, advance: Callable[[int], None]) -> None:
        """A layer with a mixture of experts: first back through one expert after the other, to their inputs and the
        shares they had; with these, back through router, norm and attention."""
        import torch

        def between() -> Iterator[torch.Tensor]:
            for span in self.forward.spans():
                x = self._entering(index, span)
                yield x + self.forward.attention(layer, x)

        inputs, chosen, share_of = self.forward.routed(layer, between())
        of_inputs, of_shares = self.forward.states(), torch.zeros_like(share_of)
        width, n = self.forward.family.hidden, experts[0].source.matrices
        tokens = len(chosen)
        for expert in range(n):
            self._expert(
                layer.mlp.experts.act_fn,
                expert,
                experts,
                torch.where(chosen == expert),
                *(inputs.reshape(-1, width), share_of, self.forward.hidden.reshape(-1, width)),
                *(of_inputs.reshape(-1, width), of_shares),
            )
            advance(tokens * (expert + 1) // n - tokens * expert // n)
        router = self.tensors[f"model.layers.{index}.{ROUTER}.weight"]
        total = self.collector.new(n, product=False)
        first = 0
        for span in self.forward.spans():
            upstream = self.forward.hidden[span]
            with torch.enable_grad():
                x = self._entering(index, span).requires_grad_()
                y = x + self.forward.attention(layer, x)
                normed = layer.post_attention_layernorm(y)
                logits, shares, _ = layer.mlp.gate(normed)
                total.add_gradients_of(logits)
            count = len(shares)
            last = first + count
            (gradient,) = torch.autograd.grad(
                (y, normed, shares), x, (upstream.clone(), of_inputs[span], of_shares[first:last])
            )
            upstream.copy_(gradient)
            first = last
            advance(count)
        self.collector.done_gradient(router, total)

    def _expert(
        self,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        expert: int,
        experts: Experts,
        where: tuple[torch.Tensor, ...],
        inputs: torch.Tensor,
        share_of: torch.Tensor,
        upstream: torch.Tensor,
        of_inputs: torch.Tensor,
        of_shares: torch.Tensor,
    ) -> None:
        """Back through one expert, at the (token, slot) pairs ``where`` it was chosen: from ``upstream`` to
        ``of_inputs``, both ``[tokens, hidden]``, and ``of_shares``, ``[tokens, chosen]``."""
        import torch
        from torch.nn.functional import linear

        totals = [self.collector.new(tensor.source.shape[-2], product=False) for tensor in experts]
        tokens, slots = where
        if len(tokens):
            w_gate, w_up, w_down = (load_weights(tensor.source, expert) for tensor in experts)
        for start in range(0, len(tokens), BATCH):
            at, slot = tokens[start : start + BATCH], slots[start : start + BATCH]
            with torch.enable_grad():
                x = inputs[at].requires_grad_()
                gate, up = linear(x, w_gate), linear(x, w_up)
                y = linear(act_fn(gate) * up, w_down)
            of_shares[at, slot] = (upstream[at] * y.detach()).sum(-1)
            of_y = upstream[at] * share_of[at, slot, None]
            of_x, *of_both = torch.autograd.grad(y, (x, gate, up), of_y)
            of_inputs.index_add_(0, at, of_x)
            for total, gradient in zip(totals, (*of_both, of_y), strict=True):
                total.add(gradient)
        for tensor, total in zip(experts, totals, strict=True):
            self.collector.done_gradient(tensor, total, expert)


def draw(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One label, int64 ``[tokens]``, for each row of the probabilities ``p``, float32 ``[tokens, labels]``.

    ``uniform``: float64 ``[tokens]`` of [0, 1); the label is the first up to which the probabilities add up to more.
    """
    import torch

    sums = p.double().cumsum(-1)
    labels = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)
    return labels[:, 0].clamp_(max=p.shape[-1] - 1)


def _watching(total: Sums) -> Callable[[Any, Any, torch.Tensor], None]:
    """A forward hook that adds the gradient of a module's output to ``total`` once it is there."""

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            total.add_gradients_of(output)

    return hook

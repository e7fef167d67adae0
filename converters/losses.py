"""How much errors of every matrix matter to a model's predictions, measured in llama.cpp with noise.

One matrix at a time is given errors, and the KL divergence of the predictions from those without is measured on a few
hundred tokens.  The graph's evaluation callback does it: it adds ``E x`` to the product ``W x``, E being random with
the distribution that the errors of an encoded matrix have: Gaussian numbers times the size of their row and a power of
their column's importance.  What has to be known of W is that size; nothing is encoded, and no file is written.
Embeddings get their noise where rows are looked up (GET_ROWS), one that is the output matrix as well at both places.
All experts of a stack share one E, with signs of their own.

Measured on SmolLM2-135M, the 35 matrices of five layers, each alone with the errors of CCQ_T2: what that costs on
1024 tokens of other text differs from what noise on 256 tokens predicts by a factor of 1.7 (standard deviation of the
logarithm 0.54), from what gradients of 16 k tokens predict by 1.8 (0.58), and from one factor for all matrices by 3.4
(1.24).  Where all positions of a window count it is 0.67, the true errors on the same 512 tokens giving 0.58, and noise
that is independent from token to token, without E, 0.74.

For small errors the divergence is linear in their squares (see ``allocate``), so one number per tensor says what every
type loses: the divergence over the relative squared error of the outputs, ``sum S_j E_ij^2 / sum S_j W_ij^2`` with S
the sums of an importance file (without an entry: all alike).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import ImportanceError
from ccq_format.gguf_io import TensorInfo, open_model

from .allocate import role_of
from .calibration import CalibrationOptions
from .collect import BATCH, Advance, GraphRun, name_of, weight_of
from .evaluate import log_softmax
from .gguf_sources import decode_rows
from .graph import Ggml, Node
from .imatrix import Importance
from .llama import load_plugin_for
from .rules import is_vocabulary, never_quantized
from .tensors import EXPERTS

WINDOW = 64
"""Tokens per window; ``BATCH // WINDOW`` windows, spread over the text, are what the divergence is measured on, in the
second half of each: before, attention is to too few tokens."""

MOST = 128
"""Tensors that are measured, about; of deep models some layers are left out (``allocate.completed`` interpolates)."""

NOISE = 0.04
"""Relative squared error that a tensor is given: about that of 2.5 bits per weight."""

_LARGE = 0.3
"""Nats per token beyond which the divergence may not be linear any more: it is measured again with less noise."""

_AGAIN = 0.05
"""The divergence aimed at then."""

_SHAPE = -3 / 8
"""Errors of an encoded column go with this power of its importance: half of its loss's (``TrellisCode.gain``)."""

_LOGITS = 1 << 26
"""Log-probabilities that are kept: 256 MiB."""

_ROWS = 16
_PANEL = 1 << 20
"""Weights of E that one thread makes at a time."""

_CHUNK = 1 << 22
_EXPERTS = 8
"""Experts of a stack that are looked at, at most, for the sizes of weights."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def measure_losses(
    model_path: Path,
    text: str | Sequence[int],
    importance: Importance,
    *,
    threads: int = 0,
    most: int = MOST,
    advance: Advance | None = None,
) -> Importance:
    """``importance`` with the losses of a GGUF model's matrices, embedding and output, measured on parts of a text.

    ``advance`` is told how many tensors are done, and how many there are.  An interrupt ends it at the next tensor.
    Raises what ``collect.calibrate_gguf`` does.
    """
    load_plugin_for(model_path)
    tensors = {tensor.name: tensor for tensor in open_model(model_path).tensors}
    with GraphRun(model_path, text, CalibrationOptions(ctx=WINDOW, threads=threads)) as run:
        probe = _Probe(run)
        names = _spread([name for name in probe.names() if name in tensors and _may_be_chosen(tensors[name])], most)
        probe.without()
        losses = {}
        for name in names:
            losses[name] = probe.loss(_Noise(run, tensors[name], importance))
            if advance is not None:
                advance(len(losses), len(names))
    return replace(importance, losses=losses)


def _may_be_chosen(tensor: TensorInfo) -> bool:
    """Whether a plan may choose a type for a tensor."""
    return not never_quantized(tensor.name) and (len(tensor.shape) == 2 or bool(EXPERTS.search(tensor.name)))


def _spread(names: Iterable[str], most: int) -> list[str]:
    """Those names that are not of a layer, those of the first two layers and the last, and of others every n-th, n
    being the smallest number that leaves ``most``."""
    names = list(names)
    layers = [layer for _, layer in map(role_of, names) if layer is not None]
    last = max(layers, default=0)

    def every(n: int) -> list[str]:
        return [name for name in names if (layer := role_of(name)[1]) in (None, 0, 1, last) or not (layer or 0) % n]

    return next((found for n in range(1, last + 1) if len(found := every(n)) <= most), every(last + 1))


class _Probe:
    """Some windows of a text, and what the model predicts on them without noise."""

    def __init__(self, run: GraphRun) -> None:
        self.run = run
        count = min(BATCH // WINDOW, len(run.windows))
        self.windows = run.windows[np.linspace(0, len(run.windows) - 1, count).astype(int)]
        self.step = -(-self.windows.size // 2 * run.model.n_vocab // _LOGITS)
        self.clean: list[F32] = []

    def names(self) -> list[str]:
        """The weights in the graph, in its order."""
        found: dict[str, None] = {}

        def look(address: int, _ask: bool) -> bool:
            name = _name(self.run.ggml, Node.from_address(address))
            if name is not None:
                found[name] = None
            return False

        self.run.model.watch = look
        self.run.decode(self.windows[:1])
        return list(found)

    def without(self) -> None:
        """Run without noise; to be called before :meth:`loss`."""
        self.run.model.watch = lambda _address, _ask: False
        self.clean = [log_softmax(logits).astype(np.float32) for logits in self._logits()]

    def loss(self, noise: _Noise) -> float:
        """Divergence per relative squared error of a tensor."""
        divergence = self._divergence(noise, NOISE)
        if not divergence <= _LARGE:
            amount = NOISE * min(0.1, _AGAIN / divergence)
            return self._divergence(noise, amount) / amount
        return divergence / NOISE

    def _divergence(self, noise: _Noise, amount: float) -> float:
        noise.amount = amount
        self.run.model.watch = noise

        def sum_of(pair: tuple[F32, F32]) -> float:
            clean, logits = pair
            return float((np.exp(clean) * (clean - log_softmax(logits))).sum())

        sums = list(self.run.pool.map(sum_of, zip(self.clean, self._logits(), strict=True)))
        mean = sum(sums) / sum(map(len, self.clean))
        if not np.isfinite(mean):
            raise ImportanceError("the model's predictions are not finite", file=self.run.path, tensor=noise.name)
        return max(0.0, mean)

    def _logits(self) -> list[F32]:
        """Logits of the scored tokens, a few at a time."""
        found: list[F32] = []
        together = self.run.model.n_seq
        for first in range(0, len(self.windows), together):
            self.run.model.clear()
            logits = self.run.decode(self.windows[first : first + together], first=WINDOW // 2)[:: self.step]
            if together < len(self.windows):
                logits = logits.copy()  # the next call overwrites them
            found += [logits[start : start + _ROWS] for start in range(0, len(logits), _ROWS)]
        return found


class _Noise:
    """The ``watch`` that adds noise to what comes of one tensor, ``amount`` being its relative squared error."""

    def __init__(self, run: GraphRun, info: TensorInfo, importance: Importance) -> None:
        self.run = run
        self.name = info.name
        self.amount = 0.0
        self.matrices = info.n_rows // info.shape[-2]
        rows, width = info.shape[-2], info.columns
        shape: F64 = np.ones(width)
        weights = importance.input_weights(info.name, self.matrices, width)
        if weights is None:
            weights = np.ones((self.matrices, width))
        else:
            each = importance.for_tensor(info.name, self.matrices, width)
            assert each is not None
            shape = each.reshape(-1, width).mean(axis=0, dtype=np.float64) ** _SHAPE
        # The sizes of rows, and what the noise has to be multiplied with for a relative error of 1.
        squares, power, noise = np.zeros(rows), 0.0, 0.0
        chosen = np.unique(np.linspace(0, self.matrices - 1, _EXPERTS).astype(int))
        step = max(1, _CHUNK // width)
        for matrix in chosen:
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                part = decode_rows(info, matrix * rows + start, matrix * rows + stop)
                part = np.square(part, dtype=np.float64)
                means = part.mean(axis=1)
                squares[start:stop] += means
                power += float((part @ weights[matrix]).sum())
                noise += float(means.sum() * (weights[matrix] @ np.square(shape)))
        scale = (power / noise) ** 0.5 if noise > 0 else 0.0
        self.rows = (scale * np.sqrt(squares / len(chosen))).astype(np.float32)
        self.columns = shape.astype(np.float32)
        self.signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (self.matrices, rows))

    def __call__(self, address: int, ask: bool) -> bool:
        node, ggml = Node.from_address(address), self.run.ggml
        if _name(ggml, node) != self.name:
            return False
        if not ask:
            y, second = ggml.values(address), ggml.values(node.src[1])
            if y is None or second is None:
                raise ImportanceError("has inputs of an unknown type", file=self.run.path, tensor=self.name)
            if node.op == ggml.get_rows:
                noise = self._rows(second.reshape(-1)).reshape(y.shape)
            else:
                noise = self._product(second).reshape(*second.shape[:3], -1)
                if node.op == ggml.mul_mat_id:
                    ids = ggml.values(node.src[2])
                    assert ids is not None
                    noise = noise * self.signs[ids.reshape(y.shape[:3])]
            ggml.replace(address, y + self.amount**0.5 * noise)
        return True

    def _product(self, x: NDArray[np.floating]) -> F32:
        """``E x``: float32 ``[vectors, rows]``."""
        vectors = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1]) * self.columns
        step = max(1, _PANEL // len(self.columns))

        def panel(start: int) -> F32:
            rows = self.rows[start : start + step]
            e = np.random.default_rng([1, start]).standard_normal((len(rows), len(self.columns)), dtype=np.float32)
            return np.asarray(vectors @ e.T, np.float32) * rows

        return np.concatenate(list(self.run.pool.map(panel, range(0, len(self.rows), step))), axis=1)

    def _rows(self, ids: NDArray[np.integer]) -> F32:
        """Rows of E: float32 ``[ids, width]``."""
        e = [np.random.default_rng([2, int(i)]).standard_normal(len(self.columns), dtype=np.float32) for i in ids]
        return np.stack(e) * self.columns * self.rows[ids, None]


def _name(ggml: Ggml, node: Node) -> str | None:
    """The weight whose product or looked-up rows a node is, ``None`` if it is neither."""
    if node.op == ggml.get_rows:
        name = name_of(Node.from_address(node.src[0]))
        return name if is_vocabulary(name) else None
    found = weight_of(ggml, node)
    return found[0] if found else None

"""Perplexity and KL divergence in stock llama.cpp, with the numbers of its own ``llama-perplexity``.

Followed exactly (``tools/perplexity/perplexity.cpp`` of the pinned llama.cpp): one trailing newline of the text is
dropped; the text is tokenized once, with the special tokens the vocabulary asks for; windows of ``n_ctx`` tokens do
not overlap and a last, incomplete one is dropped; the first token of a window is replaced by BOS where the vocabulary
adds one; the predictions made at positions ``n_ctx // 2 .. n_ctx - 2`` count; batches of 2048 tokens (several windows
as parallel sequences) in micro-batches of 512.  Standard errors are ``sqrt(variance / (count - 1))``, that of the
perplexity multiplied by it.

``llama-perplexity --kl-divergence`` compares with log-probabilities that it has rounded to 16 bits, evenly over at
most 16 nats below each position's maximum.  Here the base model runs beside the other one and nothing is rounded;
the two mean divergences agree to about the square of that step (2.4e-4 nats) plus the mass 16 nats below the maximum.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import exp, sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import EvalError

from .llama import _N_BATCH, LlamaModel, load_plugin_for

_ROWS = 16
"""Positions whose log-probabilities are held in float64 at a time: few enough for the cache, which takes 5 instead of 9
seconds for 40,000 positions of a vocabulary of 4096."""

WindowLogits = Callable[[range], Iterator[NDArray[np.float32]]]
"""The logits that count of each window of a range, as :func:`window_logits` gives them."""


@dataclass(frozen=True)
class EvalResult:
    """What ``evaluate`` measures; the divergences are ``None`` without a base model.

    ``ppl`` and ``ppl_base`` are perplexities, ``kld_*`` Kullback-Leibler divergences of the file from the base in
    nats per token, ``top1`` the share of positions where both models rank the same token first, ``*_stderr`` standard
    errors.
    """

    ppl: float
    ppl_stderr: float
    n_ctx: int
    windows: int
    scored: int
    ppl_base: float | None = None
    ppl_base_stderr: float | None = None
    kld_mean: float | None = None
    kld_stderr: float | None = None
    kld_p99: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        """The fields as plain values, those without a value left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def as_text(self) -> str:
        """The result for people."""
        lines = [
            f"perplexity       {self.ppl:.4f} +/- {self.ppl_stderr:.4f}"
            f"  ({self.scored} tokens in {self.windows} windows of {self.n_ctx})"
        ]
        if self.kld_mean is not None:
            lines += [
                f"  of the base    {self.ppl_base:.4f} +/- {self.ppl_base_stderr:.4f}",
                f"KL divergence    {self.kld_mean:.6f} +/- {self.kld_stderr:.6f}  (99th percentile {self.kld_p99:.5f})",
                f"same top token   {100 * (self.top1 or 0):.2f} +/- {100 * (self.top1_stderr or 0):.2f} %",
            ]
        return "\n".join(lines)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file without its last newline.  Raises ``EvalError``."""
    try:
        # Bytes first: universal newlines would change the text.
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise EvalError(error.strerror or str(error), file=path) from None
    except UnicodeDecodeError as error:
        raise EvalError(f"no UTF-8 text: {error}", file=path) from None
    return text.removesuffix("\n")


def evaluate(
    model_path: str | os.PathLike[str],
    text: str,
    *,
    base_path: str | os.PathLike[str] | None = None,
    n_ctx: int = 256,
    threads: int = 0,
    max_windows: int | None = None,
    exact: bool = False,
) -> EvalResult:
    """Perplexity of a GGUF file on ``text`` and, with ``base_path``, its divergence from that model.

    ``threads`` <= 0 means one per CPU; ``max_windows`` limits the number of windows (``--chunks`` of
    llama-perplexity).  ``exact`` sets KV cache f32 and flash attention off, for comparisons with other programs.

    Raises ``EvalError`` if the text is too short or llama.cpp refuses a model, ``PluginError`` if a CCQ file is given
    and llama.cpp cannot take the plugin.
    """
    paths = [model_path] if base_path is None else [model_path, base_path]
    with ExitStack() as stack:
        models = _open(stack, paths, n_ctx, threads, exact)
        tokens, windows = _windows(models[0], text, max_windows)
        _same_vocabulary(models[0], text, models[-1].n_vocab, models[-1].tokenize(text), paths[-1])
        return _score(_streams(models, tokens), tokens, n_ctx, windows, models[0].n_seq)


@dataclass(frozen=True)
class BaseLogits:
    """A base model's logits at every scored position of a text, to compare any number of files with.

    ``logits`` is float32 ``[windows, n_ctx - 1 - n_ctx // 2, n_vocab]``, mapped from a file; ``tokens`` are those of
    ``text``, and ``exact`` is as for :func:`evaluate`.
    """

    path: str
    text: str
    tokens: list[int]
    n_ctx: int
    exact: bool
    logits: NDArray[np.float32]

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return int(self.logits.shape[0] * self.logits.shape[1])


def record_base(
    base_path: str | os.PathLike[str],
    text: str,
    folder: str | os.PathLike[str],
    *,
    n_ctx: int = 256,
    threads: int = 0,
    max_windows: int | None = None,
    exact: bool = False,
) -> BaseLogits:
    """Run a base model once.  Its logits take ``4 * n_vocab`` bytes per scored position of an unnamed file in
    ``folder``, which goes with the result.

    The other arguments and errors are those of :func:`evaluate`; ``OSError`` if the disk is full.
    """
    with ExitStack() as stack:
        (model,) = _open(stack, [base_path], n_ctx, threads, exact)
        tokens, windows = _windows(model, text, max_windows)
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        for start in range(0, windows, model.n_seq):
            for logits in window_logits(model, tokens, range(start, min(start + model.n_seq, windows))):
                file.write(np.ascontiguousarray(logits).data)
        file.flush()
        shape = (windows, n_ctx - 1 - n_ctx // 2, model.n_vocab)
        recorded = np.memmap(file, np.float32, "r", shape=shape)  # outlives the file object
        return BaseLogits(os.fspath(base_path), text, tokens, n_ctx, exact, recorded)


def compare(model_path: str | os.PathLike[str], base: BaseLogits, *, threads: int = 0) -> EvalResult:
    """What :func:`evaluate` gives for a file and the base model on the recorded text, to the last digit."""
    with ExitStack() as stack:
        models = _open(stack, [model_path], base.n_ctx, threads, base.exact)
        _same_vocabulary(models[0], base.text, base.logits.shape[2], base.tokens, base.path)
        streams = [*_streams(models, base.tokens), lambda windows: (base.logits[i] for i in windows)]
        return _score(streams, base.tokens, base.n_ctx, len(base.logits), models[0].n_seq)


def _open(
    stack: ExitStack, paths: list[str | os.PathLike[str]], n_ctx: int, threads: int, exact: bool
) -> list[LlamaModel]:
    """The models, closed with ``stack``."""
    if n_ctx < 4:
        raise EvalError(f"a context of {n_ctx} tokens leaves nothing to score")
    load_plugin_for(*paths)
    n_seq = max(1, _N_BATCH // n_ctx)
    return [
        stack.enter_context(LlamaModel(path, n_ctx=n_ctx, n_seq=n_seq, threads=threads, exact=exact)) for path in paths
    ]


def _windows(model: LlamaModel, text: str, max_windows: int | None) -> tuple[list[int], int]:
    """The tokens of the text and the number of windows to score.  Raises ``EvalError`` if there are too few."""
    tokens = model.tokenize(text)
    n_ctx = model.n_ctx
    if len(tokens) < 2 * n_ctx:
        raise EvalError(
            f"the text has {len(tokens)} tokens; a context of {n_ctx} needs at least {2 * n_ctx}", file=model.path
        )
    if model.adds_eos:
        raise EvalError("the vocabulary appends EOS to every text: perplexity is not defined", file=model.path)
    windows = len(tokens) // n_ctx
    return tokens, windows if max_windows is None else min(windows, max_windows)


def _same_vocabulary(
    model: LlamaModel, text: str, n_vocab: int, tokens: list[int], base_path: str | os.PathLike[str]
) -> None:
    if model.n_vocab != n_vocab or model.tokenize(text) != tokens:
        raise EvalError(f"the vocabulary differs from that of {os.fspath(base_path)}", file=model.path)


def _streams(models: list[LlamaModel], tokens: list[int]) -> list[WindowLogits]:
    return [partial(window_logits, model, tokens) for model in models]


def _score(streams: list[WindowLogits], tokens: list[int], n_ctx: int, windows: int, step: int) -> EvalResult:
    """Score ``windows`` windows, ``step`` at a time, of the model ``streams[0]`` and, if there are two, the base."""
    first = n_ctx // 2
    nll: list[list[NDArray[np.float64]]] = [[] for _ in streams]
    kld: list[NDArray[np.float64]] = []
    same_top = 0
    for start in range(0, windows, step):
        chunk = range(start, min(start + step, windows))
        for window, *logits in zip(chunk, *(stream(chunk) for stream in streams), strict=True):
            targets = np.array(tokens[window * n_ctx + first + 1 : (window + 1) * n_ctx])
            for low in range(0, len(targets), _ROWS):
                part = slice(low, min(low + _ROWS, len(targets)))
                at = np.arange(part.stop - part.start), targets[part]
                logp = [log_softmax(rows[part]) for rows in logits]
                for values, lp in zip(nll, logp, strict=True):
                    values.append(-lp[at])
                if len(streams) == 2:
                    kld.append((np.exp(logp[1]) * (logp[1] - logp[0])).sum(axis=1))
                    same_top += int((logits[0][part].argmax(axis=1) == logits[1][part].argmax(axis=1)).sum())
    ppl, ppl_stderr = _perplexity(np.concatenate(nll[0]))
    scored = windows * (n_ctx - 1 - first)
    if len(streams) == 1:
        return EvalResult(ppl, ppl_stderr, n_ctx, windows, scored)
    base, base_stderr = _perplexity(np.concatenate(nll[1]))
    divergence = np.concatenate(kld)
    top1 = same_top / scored
    return EvalResult(
        ppl,
        ppl_stderr,
        n_ctx,
        windows,
        scored,
        ppl_base=base,
        ppl_base_stderr=base_stderr,
        kld_mean=float(divergence.mean()),
        kld_stderr=_stderr(divergence),
        kld_p99=float(np.quantile(divergence, 0.99)),
        top1=top1,
        top1_stderr=sqrt(top1 * (1 - top1) / max(1, scored - 1)),
    )


def window_logits(model: LlamaModel, tokens: list[int], windows: range) -> Iterator[NDArray[np.float32]]:
    """The logits that count, one float32 ``[n_ctx - 1 - n_ctx // 2, n_vocab]`` per window, valid until the next call.

    All ``windows`` (at most ``model.n_seq``) run as parallel sequences.
    """
    n_ctx, first = model.n_ctx, model.n_ctx // 2
    model.clear()
    parts: list[NDArray[np.float32]] = []
    step = min(model.n_batch, n_ctx)
    for low in range(0, n_ctx, step):
        positions = range(low, min(low + step, n_ctx))
        ids: list[int] = []
        for window in windows:
            here = tokens[window * n_ctx + positions.start : window * n_ctx + positions.stop]
            if low == 0 and model.adds_bos:
                here[0] = model.bos
            ids += here
        n = len(windows)
        sequences = [seq for seq in range(n) for _ in positions]
        logits = model.decode(ids, list(positions) * n, sequences, [pos >= first for pos in positions] * n)
        # With several batches per window there is one window at a time; the next batch overwrites these logits.
        parts.append(logits if step == n_ctx else logits.copy())
    scores = parts[0] if len(parts) == 1 else np.concatenate(parts)
    for i in range(len(windows)):
        yield scores[i * (n_ctx - first) : (i + 1) * (n_ctx - first) - 1]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities, float64 ``[rows, n_vocab]``, of float32 logits of that shape."""
    shifted: NDArray[np.float64] = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _stderr(values: NDArray[np.float64]) -> float:
    return float(sqrt(values.var() / max(1, len(values) - 1)))


def _perplexity(nll: NDArray[np.float64]) -> tuple[float, float]:
    """Perplexity and its standard error from negative log-likelihoods."""
    ppl = exp(nll.mean())
    return ppl, ppl * _stderr(nll)

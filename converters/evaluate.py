"""Perplexity and KL divergence in stock llama.cpp, with the numbers of its own ``llama-perplexity``.

Followed exactly (``tools/perplexity/perplexity.cpp`` of the pinned llama.cpp): one trailing newline of the text is
dropped; the text is tokenized once, with the special tokens the vocabulary asks for; windows of ``n_ctx`` tokens do
not overlap and a last, incomplete one is dropped; the first token of a window is replaced by BOS where the vocabulary
adds one; the predictions made at positions ``n_ctx // 2 .. n_ctx - 2`` count; batches of 2048 tokens (several windows
as parallel sequences) in micro-batches of 512.  Standard errors are ``sqrt(variance / (count - 1))``, that of the
perplexity multiplied by it.

``llama-perplexity --kl-divergence`` compares with log-probabilities that it has rounded to 16 bits, evenly over at
most 16 nats below each position's maximum.  :func:`evaluate` runs the base model beside the other one and rounds
nothing; ``BaseLogits`` is a record of 16 bits as well, and says what its rounding can do to a divergence.

A token of probability 0 (a logit of -inf, as masks leave it) adds nothing to a divergence if that is the base's, and
makes it infinite if only the file rules it out; so does a token of the text that the file rules out to its perplexity.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import exp, inf, log, sqrt
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import EvalError

from .base_record import BaseLogits, Packed, Recorder, pack
from .console import progress_bar
from .host import cpu_count
from .llama import _N_BATCH, LlamaModel, load_plugin_for
from .threads import ThreadPool

_CELLS = 1 << 16
"""Log-probabilities that a thread holds in float64 at a time: few enough for its cache, which takes 5 instead of 9
seconds for 40,000 positions of a vocabulary of 4096.  At least those of one position."""

F64 = NDArray[np.float64]

Rows = tuple[F64, F64, NDArray[np.int64]]
"""Predictions at some positions: all log-probabilities ``[positions, n_vocab]``, those of the text's tokens, and the
most probable tokens."""

Predict = Callable[[slice, NDArray[np.int64]], Rows]
"""The predictions of a window: takes some of the positions that count, and the text's tokens there.  Valid until those
of the next window are asked for."""


@dataclass(frozen=True)
class EvalResult:
    """What ``evaluate`` measures; what needs a base model is ``None`` without one.

    ``ppl`` and ``ppl_base`` are perplexities, ``kld_*`` Kullback-Leibler divergences of the file from the base in
    nats per token, ``top1`` the share of positions where both models rank the same token first, ``*_stderr`` standard
    errors.  ``infinite`` is the number of scored positions where the file rules out (probability 0) the text's token,
    or one that the base does not, which makes perplexity or divergence infinite.

    ``ppl_unigram`` is the perplexity of the scored tokens under their frequencies in the whole text: of the best guess
    that knows no context, made with the text at hand.
    """

    ppl: float
    ppl_stderr: float
    n_ctx: int
    windows: int
    scored: int
    infinite: int
    ppl_unigram: float
    ppl_base: float | None = None
    ppl_base_stderr: float | None = None
    kld_mean: float | None = None
    kld_stderr: float | None = None
    kld_p99: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None

    @property
    def collapsed(self) -> bool:
        """Whether the file has lost so much that it writes gibberish.

        With a base: if its log-perplexity is at least half of the way from the base's to that of the frequencies, so
        that half of what the context tells the base about the next token is lost, and at least 1 nat above the base's.
        Without one: if the frequencies predict the text as well.  Never if something is ``infinite``: then one token
        may be all that is wrong.

        Measured on SmolLM2-135M with types of 2 and 3 bits and with noise on its matrices (two texts, 1020 tokens of
        each): what keeps 0.94, 0.89, 0.82 or 0.68 of that knowledge (KL divergence 0.22, 0.5, 0.8 and 1.2) goes on in
        sentences, if poor ones; with 0.60 and 0.55 (1.9 and 1.7) they fall apart, and from 0.33 on (2.5) nothing but
        digits and fragments comes.  Without importance data CCQ_T2 keeps less than nothing (8.7).
        """
        if self.infinite:
            return False
        if self.ppl_base is None or self.ppl_base == inf:
            return self.ppl >= self.ppl_unigram
        known = log(self.ppl_unigram / self.ppl_base)
        return self.ppl >= self.ppl_base * exp(max(1.0, known / 2))

    def as_dict(self) -> dict[str, float | int | str]:
        """The fields as plain values for JSON, those without a value left out, and ``collapsed``.  JSON has no
        infinity: the string ``"Infinity"`` stands for it, which ``float`` reads."""
        values = {key: value for key, value in asdict(self).items() if value is not None} | {
            "collapsed": self.collapsed
        }
        return {key: "Infinity" if value == inf else value for key, value in values.items()}

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
        if self.infinite:
            which = "the text or the base has" if self.kld_mean is not None else "the text has"
            lines.append(f"INFINITE         at {self.infinite} tokens the file gives probability 0 to what {which}")
        if self.collapsed:
            why = "half of what the context tells the base is lost, or more"
            if self.ppl >= self.ppl_unigram:
                why = f"no better than guessing: the frequencies of the tokens have perplexity {self.ppl_unigram:.4g}"
                why += "" if self.ppl_base is not None else "; or the text does not suit the model"
            lines.append(f"COLLAPSED        {why}")
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
    progress: bool = True,
) -> EvalResult:
    """Perplexity of a GGUF file on ``text`` and, with ``base_path``, its divergence from that model.

    ``threads`` <= 0 means one per CPU; ``max_windows`` limits the number of windows (``--chunks`` of
    llama-perplexity).  ``exact`` sets KV cache f32 and flash attention off, for comparisons with other programs.  A
    progress bar goes to stderr if ``progress`` and if that is a terminal.

    Raises ``EvalError`` if the text is too short, llama.cpp refuses a model or a model computes NaN, ``PluginError`` if
    a CCQ file is given and llama.cpp cannot take the plugin.
    """
    paths = [model_path] if base_path is None else [model_path, base_path]
    with ExitStack() as stack:
        models = _open(stack, paths, n_ctx, threads, exact)
        tokens, count = _windows(models[0], text, max_windows)
        _same_vocabulary(models[0], text, models[-1].n_vocab, models[-1].tokenize(text), paths[-1])
        streams = [_predictions(model, tokens, count) for model in models]
        return _score(streams, tokens, n_ctx, count, models[0].n_vocab, threads, progress)


def record_base(
    base_path: str | os.PathLike[str],
    text: str,
    folder: str | os.PathLike[str],
    *,
    n_ctx: int = 256,
    threads: int = 0,
    max_windows: int | None = None,
    exact: bool = False,
    progress: bool = True,
) -> BaseLogits:
    """Run a base model once.  The record takes ``2 * n_vocab`` bytes per scored position of an unnamed file in
    ``folder``, which goes with the result.

    The other arguments and errors are those of :func:`evaluate`; ``OSError`` if the disk is full.
    """
    with ExitStack() as stack:
        (model,) = _open(stack, [base_path], n_ctx, threads, exact)
        tokens, count = _windows(model, text, max_windows)
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        pool = stack.enter_context(_pool(threads))
        recorder = Recorder(file)
        for window, predict in _with_progress(_predictions(model, tokens, count), count, progress):
            record = partial(_record, predict, _targets(tokens, n_ctx, window))
            for part in pool.map(record, _parts(n_ctx, model.n_vocab)):
                recorder.add(part)
        whole = recorder.finish(count, model.n_vocab)
        return BaseLogits(os.fspath(base_path), text, tokens, n_ctx, exact, *whole)


def compare(
    model_path: str | os.PathLike[str], base: BaseLogits, *, threads: int = 0, progress: bool = True
) -> EvalResult:
    """What :func:`evaluate` gives for a file and the base model on the recorded text; divergences within
    :meth:`BaseLogits.kld_error`, all else to the last digit."""
    with ExitStack() as stack:
        models = _open(stack, [model_path], base.n_ctx, threads, base.exact)
        _same_vocabulary(models[0], base.text, base.codes.shape[2], base.tokens, base.path)
        count = len(base.codes)
        streams = [_predictions(models[0], base.tokens, count), _recorded(base)]
        return _score(streams, base.tokens, base.n_ctx, count, models[0].n_vocab, threads, progress)


def _open(
    stack: ExitStack, paths: list[str | os.PathLike[str]], n_ctx: int, threads: int, exact: bool
) -> list[LlamaModel]:
    """The models, closed with ``stack``."""
    if n_ctx < 4:
        raise EvalError(f"a context of {n_ctx} tokens leaves nothing to score")
    load_plugin_for(*paths)
    n_seq = max(1, _N_BATCH // n_ctx)
    return [
        stack.enter_context(
            LlamaModel(path, n_ctx=n_ctx, n_seq=n_seq, threads=threads, exact=exact, interruptible=True)
        )
        for path in paths
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


def _targets(tokens: list[int], n_ctx: int, window: int) -> NDArray[np.int64]:
    """The tokens of the text at the positions of a window that count."""
    return np.array(tokens[window * n_ctx + n_ctx // 2 + 1 : (window + 1) * n_ctx])


def _parts(n_ctx: int, n_vocab: int) -> list[slice]:
    """The positions of a window that count, as many at a time as :data:`_CELLS` allows."""
    count, rows = n_ctx - 1 - n_ctx // 2, max(1, _CELLS // n_vocab)
    return [slice(low, min(low + rows, count)) for low in range(0, count, rows)]


def _record(predict: Predict, targets: NDArray[np.int64], part: slice) -> Packed:
    logp, at_targets, tops = predict(part, targets[part])
    return Packed(*pack(logp), at_targets, tops)


def _pool(threads: int) -> ThreadPool:
    """Threads for what NumPy does with log-probabilities, which in a model of few weights and a large vocabulary takes
    longer than the model."""
    return ThreadPool(threads if threads > 0 else cpu_count())


def _predictions(model: LlamaModel, tokens: list[int], count: int) -> Iterator[Predict]:
    """The predictions of a model in the first ``count`` windows.  They raise ``EvalError`` if a logit is NaN."""
    for start in range(0, count, model.n_seq):
        for logits in window_logits(model, tokens, range(start, min(start + model.n_seq, count))):
            yield partial(_predict, model.path, logits)


def _predict(path: str, logits: NDArray[np.float32], part: slice, targets: NDArray[np.int64]) -> Rows:
    logp = log_softmax(logits[part])
    at_targets = logp[np.arange(len(targets)), targets]
    if np.isnan(at_targets).any():  # then the whole row is
        raise EvalError("the model computes logits that are NaN or infinite", file=path)
    return logp, at_targets, logits[part].argmax(axis=1)


def _recorded(base: BaseLogits) -> Iterator[Predict]:
    """The predictions of the recorded model in its windows."""
    for window in range(len(base.codes)):

        def predict(part: slice, _targets: NDArray[np.int64], window: int = window) -> Rows:
            return log_softmax(base.logits(window, part)), base.targets[window, part], base.tops[window, part]

        yield predict


_T = TypeVar("_T")


def _with_progress(windows: Iterable[_T], count: int, wanted: bool) -> Iterator[tuple[int, _T]]:
    """Number the windows, with a progress bar."""
    with progress_bar(wanted) as bar:
        task = bar.add_task(f"{count} windows", total=count)
        for window, item in enumerate(windows):
            yield window, item
            bar.advance(task)


def _score(
    streams: list[Iterator[Predict]],
    tokens: list[int],
    n_ctx: int,
    count: int,
    n_vocab: int,
    threads: int,
    progress: bool,
) -> EvalResult:
    """Score ``count`` windows of the model ``streams[0]`` and, if there are two, the base."""
    nll: list[list[F64]] = [[] for _ in streams]
    kld: list[F64] = []
    scored: list[NDArray[np.int64]] = []
    same_top = 0
    with _pool(threads) as pool:
        for window, predictions in _with_progress(zip(*streams, strict=True), count, progress):
            scored.append(_targets(tokens, n_ctx, window))
            score = partial(_score_part, predictions, scored[-1])
            for at_targets, divergences, same in pool.map(score, _parts(n_ctx, n_vocab)):
                for values, logp in zip(nll, at_targets, strict=True):
                    values.append(-logp)
                if divergences is not None:
                    kld.append(divergences)
                same_top += same
    ours = np.concatenate(nll[0])
    unigram = _perplexity(_unigram(tokens, np.concatenate(scored)))[0]
    result = EvalResult(*_perplexity(ours), n_ctx, count, ours.size, int(np.isinf(ours).sum()), unigram)
    if len(streams) == 1:
        return result
    base, base_stderr = _perplexity(np.concatenate(nll[1]))
    all_kld = np.concatenate(kld)
    top1 = same_top / ours.size
    return replace(
        result,
        infinite=int((np.isinf(ours) | np.isinf(all_kld)).sum()),
        ppl_base=base,
        ppl_base_stderr=base_stderr,
        kld_mean=float(all_kld.mean()),
        kld_stderr=_stderr(all_kld),
        kld_p99=_quantile(all_kld, 0.99),
        top1=top1,
        top1_stderr=sqrt(top1 * (1 - top1) / max(1, ours.size - 1)),
    )


def _score_part(
    predictions: Sequence[Predict], targets: NDArray[np.int64], part: slice
) -> tuple[list[F64], F64 | None, int]:
    """Of some positions of a window: by model log-probabilities of the text's tokens; with a base, divergences, and how
    often both rank the same token first."""
    rows = [predict(part, targets[part]) for predict in predictions]
    at_targets = [row[1] for row in rows]
    if len(rows) == 1:
        return at_targets, None, 0
    (logp, _, top), (base_logp, _, base_top) = rows
    return at_targets, divergence(base_logp, logp), int((top == base_top).sum())


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


def log_softmax(logits: NDArray[np.floating]) -> F64:
    """Natural logarithms of the probabilities, float64 ``[rows, n_vocab]``, of logits of that shape.  A row with NaN or
    infinity, or without any token but of -inf, gives NaN; a logit of -inf beside others is a probability of 0."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted -= shifted.max(axis=1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def divergence(base: F64, logp: F64) -> F64:
    """Kullback-Leibler divergences in nats, float64 ``[rows]``, from log-probabilities ``[rows, n_vocab]``: infinite
    where ``logp`` is -inf for a token to which ``base`` gives a probability."""
    p = np.exp(base)
    rows: F64 = (p * np.subtract(base, logp, where=p > 0, out=np.zeros_like(p))).sum(axis=1)
    return rows


def _unigram(tokens: list[int], scored: NDArray[np.int64]) -> F64:
    """Negative log-likelihoods of tokens under their frequencies in the whole text."""
    counts = np.bincount(tokens)
    nll: F64 = -np.log(counts[scored] / len(tokens))
    return nll


def _quantile(values: F64, q: float) -> float:
    """Interpolated between neighbours, as NumPy does where both are finite."""
    at = q * (len(values) - 1)
    low = int(at)
    pair = [low, min(low + 1, len(values) - 1)]
    lower, upper = np.partition(values, pair)[pair]
    return float(lower if at == low or lower == upper else lower + (upper - lower) * (at - low))


def _stderr(values: F64) -> float:
    return float(sqrt(values.var() / max(1, len(values) - 1))) if np.isfinite(values).all() else inf


def _perplexity(nll: F64) -> tuple[float, float]:
    """Perplexity and its standard error from negative log-likelihoods."""
    with np.errstate(over="ignore"):
        ppl = float(np.exp(nll.mean()))
    return ppl, ppl * _stderr(nll)

"""A thin layer over the low-level API of llama-cpp-python: load a model in stock llama.cpp, tokenize, decode, quantize.

``llama_cpp`` is imported only when a model is opened: it is an optional dependency, and importing it maps its
libraries into the process.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ccq_format.errors import EvalError
from ccq_format.gguf_io import open_model
from ccq_format.output import OutputFile

from .host import cpu_count
from .imatrix import Importance
from .threads import ThreadPool

log = logging.getLogger(__name__)

_N_BATCH = 2048
_N_UBATCH = 512
"""Batch sizes of llama.cpp's command-line tools (``common_params``); results depend on them in the last digits."""

_LOG_LEVEL_ERROR = 4
"""``GGML_LOG_LEVEL_ERROR``; llama-cpp-python's own table of levels is that of an older ggml."""

STOCK_FILE_TYPES = {
    "q2_k": "Q2_K",
    "q3_k": "Q3_K_S",
    "q4_k": "Q4_K_S",
    "q5_k": "Q5_K_S",
    "q6_k": "Q6_K",
    "iq1_s": "IQ1_S",
    "iq1_m": "IQ1_M",
    "iq2_xxs": "IQ2_XXS",
    "iq2_xs": "IQ2_XS",
    "iq2_s": "IQ2_M",
    "iq3_xxs": "IQ3_XXS",
    "iq3_s": "IQ3_S",
    "iq4_xs": "IQ4_XS",
    "iq4_nl": "IQ4_NL",
    "q4_0": "Q4_0",
    "q5_0": "Q5_0",
    "q8_0": "Q8_0",
}
"""The ``llama_ftype`` whose default type each type is (``llama_ftype_get_default_type``): the mixture IQ2_S is mostly
IQ2_XS, and IQ2_M is the one built on IQ2_S."""

_PATIENCE = 0.1
"""Seconds of one wait for llama.cpp: a signal that comes right before it is only seen behind it."""

_T = TypeVar("_T")

Watch = Callable[[int, bool], bool]
"""See ``LlamaModel``."""

_error_lines: list[str] = []
_callback: Any = None


def library() -> Any:
    """The ``llama_cpp`` module, its log output collected instead of printed.

    Raises ``EvalError`` if llama-cpp-python is not installed.
    """
    global _callback
    try:
        import llama_cpp
    except ImportError as error:
        raise EvalError(f"llama-cpp-python is needed to run a model, and it cannot be imported: {error}") from None
    if _callback is None:
        llama_cpp.llama_backend_init()
        _callback = llama_cpp.llama_log_callback(_collect)
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    return llama_cpp


def _collect(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    log.debug("%s", line)
    if level == _LOG_LEVEL_ERROR and line:
        _error_lines.append(line)
        del _error_lines[:-20]


def _reasons() -> str:
    """What llama.cpp said of a refusal."""
    return "; ".join(_error_lines) or "no reason given"


def load_plugin_for(*paths: str | os.PathLike[str]) -> None:
    """Load the CCQ plugin into this process's llama.cpp if one of the GGUF files holds CCQ tensors.

    Must come before any model is opened.  Raises ``PluginError`` where llama.cpp cannot take the plugin, and
    ``InputError`` or ``FormatError`` for a file that cannot be read.
    """
    if any(tensor.layout is not None for path in paths for tensor in open_model(path).tensors):
        library()
        import ccq_backend

        ccq_backend.load_plugin()


def stock_quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type_name: str,
    *,
    importance: Importance | None = None,
    threads: int = 0,
    mixture: bool = False,
) -> None:
    """llama.cpp's own quantization of a GGUF file with the treatment of our pure plans: embedding and output q8_0, all
    other matrices ``type_name``, one of ``STOCK_FILE_TYPES`` (``llama-quantize --pure``).  With ``mixture`` it is a
    file type such as ``q4_k_m`` instead, of which llama.cpp chooses the tensors' types.

    ``importance`` is handed over as llama-quantize does it: sums over counts, 1 for an expert without inputs.  A row
    length that does not fit the type gets another one, as llama.cpp's rules say: read the file's types back.
    ``threads`` <= 0 means one per CPU.  Replaces ``out``, which appears only when it is complete.

    Raises ``EvalError`` with llama.cpp's reason if it refuses, for example the IQ1 and IQ2 types without importance.
    """
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.nthread = threads if threads > 0 else cpu_count()
    file_type = type_name.upper() if mixture else STOCK_FILE_TYPES[type_name]
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    if not mixture:
        params.output_tensor_type = params.token_embedding_type = lib.GGML_TYPE_Q8_0
        params.pure = True
    means: list[tuple[bytes, NDArray[np.float32]]] = []
    if importance is not None:
        for name, entry in importance.entries.items():
            sums, counts = entry.sums.reshape(entry.counts.size, -1), entry.counts.astype(np.float32)[:, None]
            means.append((name.encode(), np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)))
        # An entry without a name ends the list.
        data = (lib.llama_model_imatrix_data * (len(means) + 1))()
        for slot, (tensor, values) in zip(data, means, strict=False):
            slot.name, slot.size = tensor, values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = data
    _error_lines.clear()
    with OutputFile(out, overwrite=True) as output:
        output.open()
        with ThreadPool(1) as apart:  # from llama.cpp's messages: they would take an interrupt, see LlamaModel
            call = apart.submit(lib.llama_model_quantize, os.fsencode(source), os.fsencode(output.reachable), params)
            failed = call.result()
        if failed:
            reason = _error_lines[-1] if _error_lines else "no reason given"
            raise EvalError(f"llama.cpp could not quantize the model to {type_name}: {reason}", file=source)


class LlamaModel:
    """A model with one context in llama.cpp; use it as a context manager.

    ``n_ctx`` is the context length of each of ``n_seq`` parallel sequences; a model with recurrent states gets one.
    All other settings are the defaults of llama.cpp's command-line tools: KV cache f16, flash attention where
    supported.  ``exact`` sets KV cache f32 and flash attention off instead.

    ``watch``, if given, is the graph's evaluation callback: called with the address of each node and ``True``, it says
    whether to stop there; stopped, it is called with ``False``, the node and its sources being computed, and says
    whether to go on with the graph.  What it raises comes out of :meth:`decode`.  It may be replaced at any time.

    llama.cpp runs in a thread of its own: waiting for that can be interrupted, and the Python that llama.cpp calls back
    never is, where ctypes would swallow the interrupt.  Ctrl-C ends a load early, and with ``interruptible`` also
    :meth:`decode` within a node of the graph; for many tokens at a time: asking costs some microseconds per node.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int,
        n_seq: int = 1,
        threads: int = 0,
        exact: bool = False,
        n_batch: int = _N_BATCH,
        watch: Watch | None = None,
        interruptible: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.watch = watch
        self._raised: BaseException | None = None
        self._interrupted = False
        self._lib = library()
        self._ctx: Any = None
        self._model: Any = None
        self._batch: Any = None
        if not os.path.isfile(path):
            raise EvalError("no such file", file=path)
        self._runner = ThreadPool(1)
        try:
            self._open(n_ctx, n_seq, threads, exact, n_batch, interruptible)
        except BaseException:
            self.close()
            raise

    def _open(self, n_ctx: int, n_seq: int, threads: int, exact: bool, n_batch: int, interruptible: bool) -> None:
        """The model and its context."""
        lib = self._lib
        _error_lines.clear()
        settings = lib.llama_model_default_params()
        settings.progress_callback = lib.llama_progress_callback(lambda _share, _data: not self._interrupted)
        raw_path = self.path.encode()

        def load() -> None:  # what it made must be known even where no one waits for it any more
            self._model = lib.llama_model_load_from_file(raw_path, settings)

        self._run(load)
        if not self._model:
            raise EvalError(f"llama.cpp refused the model: {_reasons()}", file=self.path)
        if lib.llama_model_is_hybrid(self._model) or lib.llama_model_is_recurrent(self._model):
            # ggml 0.25 on a CPU with AMX mixes up states of sequences that are decoded together where their matrices
            # are q8_0 or q4_0: logits of Qwen3.5 are off by 12, or NaN.
            n_seq = 1
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_seq_max = n_seq
        params.n_batch = self.n_batch = min(n_batch, n_ctx * n_seq)
        params.n_ubatch = _N_UBATCH
        params.n_threads = params.n_threads_batch = threads if threads > 0 else cpu_count()
        params.no_perf = True
        if exact:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self.watch is not None:
            self._on_node = params.cb_eval = lib.ggml_backend_sched_eval_callback(self._visit)
        if interruptible:
            self._abort = params.abort_callback = lib.ggml_abort_callback(lambda _data: self._interrupted)

        def start() -> None:
            self._ctx = lib.llama_init_from_model(self._model, params)

        self._run(start)
        if not self._ctx:
            raise EvalError(f"llama.cpp made no context: {_reasons()}", file=self.path)
        self._batch = lib.llama_batch_init(self.n_batch, 0, 1)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_ctx, self.n_seq = n_ctx, n_seq
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(self._vocab))
        self.adds_eos = bool(lib.llama_vocab_get_add_eos(self._vocab))
        self.bos = int(lib.llama_vocab_bos(self._vocab))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(self._model))

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context, once nothing runs in it any more; safe to call twice."""
        try:
            self._runner.shutdown()
        finally:
            if self._batch is not None:
                self._lib.llama_batch_free(self._batch)
            if self._ctx:
                self._lib.llama_free(self._ctx)
            if self._model:
                self._lib.llama_model_free(self._model)
            self._batch = self._ctx = self._model = None

    def _visit(self, node: int, ask: bool, _user_data: object) -> bool:
        """What llama.cpp calls; ctypes would swallow an exception."""
        try:
            if self._raised is None and self.watch is not None:
                return self.watch(node, ask)
        except BaseException as error:
            self._raised = error
        return ask and self._raised is not None  # the shortest way out of the graph

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens in the text itself are not recognized."""
        raw = text.encode()
        room = len(raw) + 8
        tokens = (self._lib.llama_token * room)()
        n = self._lib.llama_tokenize(self._vocab, raw, len(raw), tokens, room, add_special, False)
        if n < 0:
            raise EvalError("the text cannot be tokenized", file=self.path)
        return list(tokens[:n])

    def detokenize(self, tokens: list[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        ids = (self._lib.llama_token * len(tokens))(*tokens)
        room = 64 + 32 * len(tokens)
        text = ctypes.create_string_buffer(room)
        n = self._lib.llama_detokenize(self._vocab, ids, len(tokens), text, room, False, False)
        return text.raw[: max(0, n)].decode("utf-8", "replace")

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), True)

    def decode(
        self, tokens: list[int], positions: list[int], sequences: list[int], outputs: list[bool]
    ) -> NDArray[np.float32]:
        """Run at most ``n_batch`` tokens; returns float32 ``[sum(outputs), n_vocab]``, valid until the next call."""
        if len(tokens) > self.n_batch:
            raise EvalError(f"{len(tokens)} tokens exceed the batch of {self.n_batch}", file=self.path)
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = positions[i]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequences[i]
            batch.logits[i] = outputs[i]
        self._raised = None
        status = self._run(self._lib.llama_decode, self._ctx, batch)
        if self._raised is not None:
            raise self._raised
        if status:
            why = "; ".join(_error_lines[-3:])
            raise EvalError(f"llama.cpp failed to decode (status {status}){': ' + why if why else ''}", file=self.path)
        n_out = sum(outputs)
        if not n_out:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._ctx), (n_out, self.n_vocab))

    def _run(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """A call into llama.cpp, in the thread for it; whatever ends the wait ends the call, too."""
        self._interrupted = False
        try:
            run = self._runner.submit(call, *arguments)
            while not run.done():
                wait([run], _PATIENCE)
            return run.result()
        except BaseException:
            self._interrupted = True
            # The thread may have the call though submit gave no future of it: an interrupt can come between the two.
            idle = threading.Event()
            while not idle.is_set():
                with suppress(KeyboardInterrupt):  # a second one must not free what still runs
                    self._runner.submit(idle.set)
                    idle.wait()
            raise

    def generate(self, prompt: str | list[int], n_tokens: int) -> tuple[str, float]:
        """Continue ``prompt`` (text or tokens) greedily by ``n_tokens``, or fewer if the model ends the text; returns
        the new text and tokens per second at batch size 1.  Raises ``EvalError`` if a logit is NaN."""
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        self.clear()
        n = len(tokens)
        logits = self.decode(tokens, list(range(n)), [0] * n, [False] * (n - 1) + [True])
        made: list[int] = []
        steps, start = 0, time.perf_counter()
        while True:
            best = int(logits[0].argmax())  # of NaN, if there is one
            if np.isnan(logits[0, best]):
                raise EvalError("the model computes logits that are NaN", file=self.path)
            if self._lib.llama_vocab_is_eog(self._vocab, best):
                break
            made.append(best)
            if len(made) == n_tokens:
                break
            logits = self.decode([best], [n + steps], [0], [True])
            steps += 1
        return self.detokenize(made), steps / (time.perf_counter() - start)

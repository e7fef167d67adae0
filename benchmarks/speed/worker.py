"""One build of llama.cpp in a process of its own: reads requests and writes replies, one JSON object a line each.

Started by ``processes.Worker`` with the interpreter that has the build, so nothing is imported here but NumPy, the
build's Python binding and, in stock llama.cpp, ``ccq_backend``.  A request is ``{"do": NAME, ...}`` with the arguments
of the method of that name; the reply is what the method returns, or ``{"error": TEXT}``.  It ends with its input.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONTEXT = 1024
PROMPT = 512
"""Tokens of the batch that is timed as ``prompt``: llama.cpp's default micro-batch."""
GENERATED = 64
STARTED = 8
"""Tokens in front of the generated ones."""
PATIENCE = 10.0
"""Seconds after which no further token is generated.  Where the processors have other work, threads wait for each other
all the time: two can be fifty times slower than one."""

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Build:
    """What both bindings share: ``api`` has the calls that take structs, ``lib`` is the same library for all others."""

    binding = ""
    package = ""

    def __init__(self) -> None:
        self.api: Any = import_module(self.binding)
        self.lib = ctypes.CDLL(self.api._lib._name)
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        for name, result, arguments in (
            ("llama_set_n_threads", None, (pointer, number, number)),
            ("llama_synchronize", None, (pointer,)),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (pointer, number)),
            ("llama_print_system_info", ctypes.c_char_p, ()),
            ("ggml_row_size", ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)),
            ("ggml_quantize_chunk", ctypes.c_size_t, (ctypes.c_int, *[pointer] * 2, *[ctypes.c_int64] * 3, pointer)),
        ):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.log: list[str] = []
        self._callback = _LOG(lambda level, text, data: self.log.append(text.decode("utf-8", "replace").strip()))
        self.lib.llama_log_set(self._callback, None)
        self.api.llama_backend_init()

    def versions(self) -> dict[str, str]:
        """The versions of all that is measured."""
        return {self.package: version(self.package)}

    def load(self, path: str) -> tuple[Any, int]:
        """The model in the file and its number of tokens.  Raises ``RuntimeError`` if llama.cpp refuses it."""
        self.log.clear()
        model = self.api.llama_model_load_from_file(os.fsencode(path), self.api.llama_model_default_params())
        if not model:
            raise RuntimeError(f"{path}: llama.cpp refused the model: {'; '.join(self.log[-3:])}")
        return model, int(self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model)))

    def start(self, model: Any, threads: int, *, exact: bool = False) -> Any:
        """A context; ``exact`` keeps keys and values in float32 and switches flash attention off."""
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, PROMPT, PROMPT
        params.n_threads = params.n_threads_batch = threads
        if exact:
            self.be_exact(params)
        context = self.api.llama_init_from_model(model, params)
        if not context:
            raise RuntimeError(f"llama.cpp made no context: {'; '.join(self.log[-3:])}")
        return context

    def be_exact(self, params: Any) -> None:
        """What ``exact`` means for the parameters of a context."""
        raise NotImplementedError

    def clear(self, context: Any) -> None:
        """Forget all tokens."""
        raise NotImplementedError

    def free(self, model: Any, context: Any) -> None:
        """Release both."""
        raise NotImplementedError


class LlamaCpp(Build):
    """llama-cpp-python, with the CCQ plugin loaded."""

    binding, package = "llama_cpp.llama_cpp", "llama-cpp-python"

    def __init__(self) -> None:
        super().__init__()
        self.ccq = import_module("ccq_backend")
        self.ccq.load_plugin()

    def versions(self) -> dict[str, str]:
        self.lib.ggml_version.restype = ctypes.c_char_p
        ours = {"ggml": self.lib.ggml_version().decode(), "ccq": version("ccq"), "ccq kernels": self.ccq.isa()}
        return super().versions() | ours

    def be_exact(self, params: Any) -> None:
        params.type_k = params.type_v = self.api.GGML_TYPE_F32
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED

    def clear(self, context: Any) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)

    def free(self, model: Any, context: Any) -> None:
        self.api.llama_free(context)
        self.api.llama_model_free(model)


class IkLlamaCpp(Build):
    """ik_llama.cpp through ik-llama-cpp-python, with all defaults of its own."""

    binding, package = "ik_llama_cpp._ctypes_api", "ik-llama-cpp-python"

    def clear(self, context: Any) -> None:
        self.api.llama_kv_cache_clear(context)

    def free(self, model: Any, context: Any) -> None:
        self.api.llama_free(context)
        self.api.llama_free_model(model)


BUILDS: dict[str, Callable[[], Build]] = {"llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlamaCpp}


class Session:
    """The requests.  Models stay open, each with one context, from ``open`` to the end of the process."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.models: dict[str, tuple[Any, int]] = {}
        self.batch = build.api.llama_batch_init(PROMPT, 0, 1)

    def hello(self) -> dict[str, Any]:
        """Versions, and llama.cpp's own line about the instructions it was compiled for."""
        self.build.log.clear()
        return {"versions": self.build.versions(), "system": self.build.lib.llama_print_system_info().decode().strip()}

    def rows(self, type_id: int, count: int, columns: int, std: float, seed: int) -> dict[str, Any]:
        """Gaussian rows of that standard deviation, quantized by this build with importance 1 for every column."""
        lib = self.build.lib
        weights = np.random.default_rng(seed).standard_normal((count, columns), dtype=np.float32) * np.float32(std)
        importance = np.ones(columns, np.float32)
        out = np.zeros((count, lib.ggml_row_size(type_id, columns)), np.uint8)
        data = (weights.ctypes.data, out.ctypes.data)
        lib.ggml_quantize_chunk(type_id, *data, 0, count, columns, importance.ctypes.data)
        return {"rows": base64.b64encode(out.tobytes()).decode()}

    def open(self, name: str, path: str, threads: int) -> dict[str, Any]:
        """Open a model and run it once, which also reads all of the file.

        Returns MiB by kind of buffer: what llama.cpp has repacked counts in both.  Raises ``ArithmeticError`` if a
        logit is not finite.
        """
        model, n_vocab = self.build.load(path)
        pattern = re.compile(r"(\w+)(?: model)? buffer size = +([\d.]+) MiB")
        buffers = {m[1]: float(m[2]) for line in self.build.log if "tensors:" in line and (m := pattern.search(line))}
        self.models[name] = self.build.start(model, threads), n_vocab
        for tokens, position in ((PROMPT, 0), (1, PROMPT)):
            self._decode(name, tokens, position)
            if not np.isfinite(self._logits(self.models[name][0], tokens - 1, n_vocab)).all():
                raise ArithmeticError(f"{path}: logits are not finite")
        return {"buffers": buffers}

    def logits(self, path: str, batch: int, single: int, threads: int) -> dict[str, Any]:
        """Logits of ``batch`` tokens in one batch and ``single`` more, one after the other, float32 in base64."""
        model, n_vocab = self.build.load(path)
        context = self.build.start(model, threads, exact=True)
        self._fill(n_vocab, batch, 0, all_outputs=True)
        self._run(context)
        parts = [self._logits(context, i, n_vocab) for i in range(batch)]
        for position in range(batch, batch + single):
            self._fill(n_vocab, 1, position)
            self._run(context)
            parts.append(self._logits(context, 0, n_vocab))
        self.build.free(model, context)
        return {"logits": base64.b64encode(np.stack(parts).tobytes()).decode(), "n_vocab": n_vocab}

    def measure(self, name: str, threads: int, what: str) -> dict[str, Any]:
        """Time one prompt, or the tokens generated after a short one; returns ``tokens`` and ``seconds``."""
        context, _ = self.models[name]
        self.build.lib.llama_set_n_threads(context, threads, threads)
        self.build.clear(context)
        if what == "prompt":
            return {"tokens": PROMPT, "seconds": self._decode(name, PROMPT, 0)}
        self._decode(name, STARTED, 0)
        tokens, seconds = 0, 0.0
        while tokens < GENERATED and seconds < PATIENCE:
            seconds += self._decode(name, 1, STARTED + tokens)
            tokens += 1
        return {"tokens": tokens, "seconds": seconds}

    def _decode(self, name: str, tokens: int, position: int) -> float:
        """Run tokens from a position on; returns the seconds it takes."""
        context, n_vocab = self.models[name]
        self._fill(n_vocab, tokens, position)
        start = time.perf_counter()
        self._run(context)
        return time.perf_counter() - start

    def _fill(self, n_vocab: int, tokens: int, position: int, *, all_outputs: bool = False) -> None:
        """Put tokens into the batch; logits are made for the last one, or for all."""
        batch = self.batch
        batch.n_tokens = tokens
        for i in range(tokens):
            # Any sequence does that repeats no token within a prompt, so that those of a batch differ.
            batch.token[i] = ((position + i) * 37 + 11) % n_vocab
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_outputs or i == tokens - 1

    def _run(self, context: Any) -> None:
        status = self.build.api.llama_decode(context, self.batch)
        self.build.lib.llama_synchronize(context)
        if status:
            raise RuntimeError(f"llama.cpp failed to decode (status {status}): {'; '.join(self.build.log[-3:])}")

    def _logits(self, context: Any, i: int, n_vocab: int) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(self.build.lib.llama_get_logits_ith(context, i), (n_vocab,)).copy()


def main() -> None:
    """Answer requests until there are no more."""
    # Libraries may print to standard output: what they say goes to standard error, replies to where it went before.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks is interrupted, and then there is no more input
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            session = session or Session(BUILDS[sys.argv[1]]())
            reply = getattr(session, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": str(error) or repr(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

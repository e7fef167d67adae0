"""Before anything is timed: do the kernels compute what the file says?

A copy of the model cut down to one layer runs in llama.cpp twice, as it is and with its weights decoded to float32 by
the NumPy codec, and the logits are compared.  Products round activations to 8 or 16 bits, so they differ a little.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from processes import Worker
from random_models import Shape, model_file, remote_quantizer

from ccq_converters.dequantize import dequantize
from ccq_format.errors import EvalError

BOUND = 0.05
"""Largest relative error of logits.  With 8-bit activations ours have 0.007 to 0.024 on these models, llama.cpp's q8_0
and q2_k 0.010 and 0.014; with 16 bits it is 0.0001.  One wrong row in 64 of a matrix would make 0.12."""

BATCH, SINGLE = 48, 3
"""Tokens of a prompt, which products with many columns see, and after it, which those with one column see."""


def relative_errors(logits: NDArray[np.float32], exact: NDArray[np.float32]) -> NDArray[np.float64]:
    """Norm of the error over the norm of ``exact``, for every token: both ``[tokens, n_vocab]``.  NaN stays NaN."""
    error = np.linalg.norm(logits.astype(float) - exact, axis=1)
    return np.asarray(error / np.linalg.norm(exact.astype(float), axis=1))


def check(worker: Worker, cache: Path, shape: Shape, type_name: str, threads: int) -> float:
    """The relative error of a type's logits: the 90th percentile of the prompt, or the median of what follows it.

    Not the maxima, because where two experts are nearly tied the smallest difference chooses the other one.
    Raises ``EvalError`` with the type's name if the error is beyond ``BOUND``.
    """
    small = replace(shape, name=f"{shape.name}-check", layers=1, ends="f32")
    path = model_file(cache, small, type_name, remote_quantizer(worker.ask))
    with TemporaryDirectory(dir=cache) as folder:
        decoded = Path(folder) / "decoded.gguf"
        dequantize(path, decoded, "f32", progress=False)
        errors = relative_errors(*(_logits(worker, file, threads) for file in (path, decoded)))
    error = float(np.max([np.quantile(errors[:BATCH], 0.9), np.median(errors[BATCH:])]))
    if not error <= BOUND:  # NaN is beyond it as well
        raise EvalError(f"{type_name} ({shape.name}): logits have a relative error of {error:.2g}, not {BOUND} at most")
    return error


def _logits(worker: Worker, path: Path, threads: int) -> NDArray[np.float32]:
    reply = worker.ask("logits", path=str(path), batch=BATCH, single=SINGLE, threads=threads)
    return np.frombuffer(base64.b64decode(reply["logits"]), np.float32).reshape(BATCH + SINGLE, reply["n_vocab"])

"""A base model's predictions on a text in two bytes per logit, to compare any number of files with."""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, sqrt
from typing import IO

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
U16 = NDArray[np.uint16]

DEPTH = 40.0
"""Nats below the largest logit of a row down to which a difference is kept.

Tokens below that have a probability of less than ``n_vocab * e^-40`` together, 1.1e-12 if there are 2^18 of them.  What
they add to a divergence is lost: less than 2e-9 nats as long as the file's own log-probabilities of them are above
-1000."""

_FAR = 65534
_NEVER = 65535
"""The codes of tokens further down, and of those without probability; the others count steps from the largest logit."""

_FAR_LOGIT = -700.0
"""Stands for a logit far down: a probability that changes no sum, but is not 0, so that a file which rules the token
out has an infinite divergence here, too."""


@dataclass(frozen=True)
class BaseLogits:
    """What a base model predicts at every scored position of a text.

    ``codes`` is uint16 ``[windows, positions, n_vocab]``, mapped from a file without a name: how many ``steps``
    (float64 ``[windows, positions]``, in nats) a logit is below the row's largest one, to the nearest.  The
    log-probabilities of the text's tokens, ``targets`` (float64), and the most probable tokens, ``tops`` (int64), both
    ``[windows, positions]``, are exact: so are perplexity and agreement on the top token.  ``tokens`` are those of
    ``text``; ``path``, ``n_ctx`` and ``exact`` are as for ``evaluate.evaluate``.
    """

    path: str
    text: str
    tokens: list[int]
    n_ctx: int
    exact: bool
    codes: U16
    steps: F64
    targets: F64
    tops: NDArray[np.int64]

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return self.steps.size

    def logits(self, window: int, positions: slice) -> F64:
        """Logits of some positions of a window, float64 ``[positions, n_vocab]``; the largest of each row is 0."""
        return unpack(self.codes[window, positions], self.steps[window, positions])

    def kld_error(self, kld: float) -> float:
        """By how many nats the rounding of the codes can change a mean divergence D of ``kld`` nats at most.

        Every logit is off by ``d``, half of its row's step, or less.  Let the logits go from the true ones to the
        recorded ones on a straight line, in unit time.  With p the base's probabilities on the way, q the file's,
        r = log(p / q) and D = E_p[r], the divergence changes with speed ``D' = cov_p(d_i, r_i)``, d_i being the error
        of logit i, so ``|D'| <= d E_p|r - D|``.  Now ``E_p|r - D| = 2 E_p[max(0, D - r)] <= 2 D + 2 E_p[max(0, -r)]``,
        and since ``log x <= x - 1``, ``E_p[max(0, -r)] <= sum max(0, q - p)``, the total variation distance, which
        Pinsker's inequality bounds by ``sqrt(D / 2)``.  Thus ``|D'| <= d (2 D + sqrt(2 D))``, that is
        ``|u'| <= d (u + 1/sqrt(2))`` for ``u = sqrt(D)``, and over the whole way

            ``|u_recorded - u_true| <= (e^d - 1) (u + 1/sqrt(2))``

        with either of them as u on the right.  For D itself that is ``d (2 D + sqrt(2 D)) + d^2 / 2`` but for terms of
        higher order: a concave function of D, so it holds for means over positions as well, with the largest d.

        Errors of both signs cancel: what is seen is a hundred times smaller.  :data:`DEPTH` limits d to 3.1e-4.
        """
        growth = expm1(float(self.steps.max()) / 2)
        root = sqrt(kld)
        return (root + growth * (root + sqrt(0.5))) ** 2 - kld


@dataclass(frozen=True)
class Packed:
    """Some positions of a record; the fields are those of :class:`BaseLogits`, ``steps`` float64 ``[positions]``."""

    codes: U16
    steps: F64
    targets: F64
    tops: NDArray[np.int64]


class Recorder:
    """Collects the predictions of windows, in their order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rows: list[tuple[F64, F64, NDArray[np.int64]]] = []

    def add(self, part: Packed) -> None:
        """The next positions."""
        self._file.write(part.codes.data)
        self._rows.append((part.steps, part.targets, part.tops))

    def finish(self, windows: int, n_vocab: int) -> tuple[U16, F64, F64, NDArray[np.int64]]:
        """``codes``, ``steps``, ``targets`` and ``tops`` of :class:`BaseLogits`."""
        self._file.flush()
        steps, targets, tops = (np.concatenate(part).reshape(windows, -1) for part in zip(*self._rows, strict=True))
        # Mapped memory outlives the file object.
        return np.memmap(self._file, np.uint16, "r", shape=(*steps.shape, n_vocab)), steps, targets, tops


def pack(logp: F64) -> tuple[U16, F64]:
    """Codes (uint16) and steps (float64 ``[rows]``) of log-probabilities ``[rows, n_vocab]``, as in
    :class:`BaseLogits`."""
    depth = logp.max(axis=1, keepdims=True) - logp
    near = depth <= DEPTH
    steps = depth.max(axis=1, keepdims=True, where=near, initial=0.0) / (_FAR - 1)
    steps[steps == 0] = 1.0  # nothing but tokens as probable as the first
    codes = np.where(near, np.rint(depth / steps), np.where(np.exp(logp) > 0, _FAR, _NEVER))
    return codes.astype(np.uint16), steps[:, 0]


def unpack(codes: U16, steps: F64) -> F64:
    """The logits of :func:`pack`'s codes, float64 of their shape."""
    logits: F64 = codes * -steps[:, None]
    logits[codes == _FAR] = _FAR_LOGIT
    logits[codes == _NEVER] = -np.inf
    return logits

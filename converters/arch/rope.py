"""Rotary position embeddings: the config's parameters, their GGUF keys, Llama-3's frequency factors.

Transformers 5 writes ``rope_parameters``; before, there were ``rope_theta`` and ``rope_scaling``.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from .config import Config, positive

log = logging.getLogger(__name__)

_YARN_FIXED = {
    "beta_fast": 32,
    "beta_slow": 1,
    "extrapolation_factor": 1,
    "truncate": True,
    "mscale": 0,
    "mscale_all_dim": 0,
}
"""Options of yarn with the one value each that llama.cpp computes with; it reads the keys of the first two in other
architectures only."""


@dataclass(frozen=True)
class Rope:
    """``type`` is one of default, linear, yarn, llama3, dynamic; ``params`` the config's own dictionary."""

    type: str
    theta: float
    params: dict[str, Any]
    config: Config
    context: int

    @classmethod
    def read(cls, config: Config, default_theta: float, context: int) -> Rope:
        """Read either style from ``config``.  Raises ``ModelError`` for a type or option llama.cpp cannot do."""
        raw = config.raw
        params = raw.get("rope_parameters")
        if params is None:
            params = raw.get("rope_scaling")
        if params is None:
            params = {}
        if not isinstance(params, dict):
            raise config.error(f"the RoPE parameters must be an object, they are {params!r}")
        if any(isinstance(value, dict) for value in params.values()):
            raise config.error("RoPE parameters per layer type are not supported")
        kind = params.get("rope_type") or params.get("type") or "default"
        if kind not in ("default", "linear", "yarn", "llama3", "dynamic"):
            raise config.error(f"the RoPE type {kind!r} is not supported")
        theta = params.get("rope_theta")
        theta = positive(raw.get("rope_theta") if theta is None else theta, "rope_theta", default_theta, config)
        partial = params.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise config.error(f"'partial_rotary_factor' {partial!r} is not supported: the family rotates whole heads")
        rope = cls(kind, theta, params, config, context)
        if kind == "dynamic":
            log.warning(
                "%s: dynamic RoPE scaling is not represented in GGUF: beyond %d tokens results differ",
                config.file,
                context,
            )
        elif kind != "default":
            rope._positive("factor")
        if kind == "yarn":
            for key, value in _YARN_FIXED.items():
                if params.get(key) not in (None, value):
                    raise config.error(f"yarn's '{key}' must be {value!r}: llama.cpp has no other in these models")
        return rope

    def _positive(self, key: str, default: float | None = None) -> float:
        return positive(self.params.get(key), key, default, self.config)

    def _original_context(self, default: int) -> int:
        value = self.params.get("original_max_position_embeddings")
        if value is None:
            return self.config.integer("original_max_position_embeddings", default=default)
        if not 1 <= positive(value, "original_max_position_embeddings", None, self.config) < 2**31:
            raise self.config.error(f"'original_max_position_embeddings' must be a token count, it is {value!r}")
        return int(value)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``{arch}.rope.*`` keys."""
        if self.type == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self._positive("factor"))
        elif self.type == "yarn":
            factor = self._positive("factor")
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(factor)
            writer.add_rope_scaling_orig_ctx_len(self._original_context(self.context))
            if self.params.get("extrapolation_factor") is not None:
                writer.add_rope_scaling_yarn_ext_factor(self._positive("extrapolation_factor"))
            if self.params.get("attention_factor") is not None:
                attention = self._positive("attention_factor")
                writer.add_rope_scaling_yarn_attn_factor(attention)
                # llama.cpp computes its own factor from the scale and multiplies it by this key; the one above it
                # overwrites (llama_context's constructor).
                own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
                if not math.isclose(attention, own, rel_tol=1e-6):
                    writer.add_rope_scaling_attn_factors(attention / own)
            if self.params.get("beta_fast") is not None:
                writer.add_rope_scaling_yarn_beta_fast(self._positive("beta_fast"))
            if self.params.get("beta_slow") is not None:
                writer.add_rope_scaling_yarn_beta_slow(self._positive("beta_slow"))
        writer.add_rope_freq_base(self.theta)

    def frequency_factors(self, head_dim: int) -> NDArray[np.float32] | None:
        """Llama-3's divisors of the rotary frequencies, float32 ``[head_dim / 2]``; ``None`` for other types.

        Wavelengths below ``original / high_freq_factor`` keep their frequency, those above ``original /
        low_freq_factor`` are divided by ``factor``, those between are interpolated.
        """
        if self.type != "llama3":
            return None
        factor = np.float32(self._positive("factor"))
        low = self._positive("low_freq_factor", 1.0)
        high = self._positive("high_freq_factor", 4.0)
        original = self._original_context(8192)
        if high <= low:
            raise self.config.error("'high_freq_factor' must be greater than 'low_freq_factor'")
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequency = np.float32(1) / np.power(np.float32(self.theta), exponent)
        wavelength = np.float32(2 * math.pi) / frequency
        smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
        between = np.float32(1) / ((np.float32(1) - smooth) / factor + smooth)
        factors = np.where(wavelength > original / low, factor, between)
        return np.where(wavelength < original / high, np.float32(1), factors).astype(np.float32)

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
    partial: float = 1.0

    @classmethod
    def read(
        cls,
        config: Config,
        default_theta: float,
        context: int,
        partial: float | None = None,
        *,
        layer_type: str | None = None,
        theta_key: str = "rope_theta",
        free: frozenset[str] = frozenset(),
        inexact: frozenset[str] = frozenset(),
    ) -> Rope:
        """Read either style from ``config``.

        ``partial`` is the part of a head that is rotated if the config does not say, ``None`` for families that rotate
        whole heads; ``layer_type`` the type of layers in families with parameters for each; ``theta_key`` where the
        base frequency is beside the parameters; ``free`` are options of yarn that llama.cpp reads, ``inexact`` those
        whose other values are worth a warning only.

        Raises ``ModelError`` for a type or option llama.cpp cannot do.
        """
        raw = config.raw
        params = _parameters(config, default_theta, layer_type)
        if any(isinstance(value, dict) for value in params.values()):
            raise config.error("RoPE parameters per layer type are not supported")
        kind = params.get("rope_type") or params.get("type") or "default"
        # The first name of longrope; and text has one position for all sections.
        kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
        if kind not in ("default", "linear", "yarn", "llama3", "dynamic", "longrope"):
            raise config.error(f"the RoPE type {kind!r} is not supported")
        theta = params.get("rope_theta")
        theta = positive(raw.get(theta_key) if theta is None else theta, theta_key, default_theta, config)
        rotated = params.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial is None and rotated not in (None, 1, 1.0):
            raise config.error(f"'partial_rotary_factor' {rotated!r} is not supported: the family rotates whole heads")
        rotated = positive(rotated, "partial_rotary_factor", partial or 1.0, config)
        if rotated > 1:
            raise config.error(f"'partial_rotary_factor' is {rotated}, more than 1")
        rope = cls(kind, theta, params, config, context, rotated)
        if kind == "dynamic":
            log.warning(
                "%s: dynamic RoPE scaling is not represented in GGUF: beyond %d tokens results differ",
                config.file,
                context,
            )
        elif kind == "longrope":
            rope.long_factors(2)
        elif kind != "default":
            rope._positive("factor")
        if kind == "yarn":
            for key, value in _YARN_FIXED.items():
                if key in free or params.get(key) in (None, value):
                    continue
                if key in inexact:
                    log.warning(
                        "%s: yarn's '%s' is %r; llama.cpp's is %r, with small differences",
                        config.file,
                        key,
                        params[key],
                        value,
                    )
                else:
                    raise config.error(f"yarn's '{key}' must be {value!r}: llama.cpp has no other in these models")
        return rope

    def _positive(self, key: str, default: float | None = None) -> float:
        return positive(self.params.get(key), key, default, self.config)

    def _original_context(self, default: int) -> int:
        value = self.params.get("original_max_position_embeddings")
        beside = self.config.raw.get("original_max_position_embeddings") is not None
        if value is None or (beside and self.type == "longrope"):  # for which transformers prefers it
            return self.config.integer("original_max_position_embeddings", default=default)
        if not 1 <= positive(value, "original_max_position_embeddings", None, self.config) < 2**31:
            raise self.config.error(f"'original_max_position_embeddings' must be a token count, it is {value!r}")
        return int(value)

    def sections(self, pairs: int, default: list[int] | None = None) -> list[int]:
        """How many of ``pairs`` rotated pairs are for time, height and width (M-RoPE), and llama.cpp's fourth number.

        Raises ``ModelError`` unless these are three numbers that amount to ``pairs``: llama.cpp rotates no others.
        """
        sizes = self.params.get("mrope_section", default)
        if not isinstance(sizes, list) or len(sizes) != 3 or not all(type(size) is int and size >= 0 for size in sizes):
            raise self.config.error(f"'mrope_section' must be three numbers, it is {sizes!r}")
        if sum(sizes) != pairs:
            raise self.config.error(f"'mrope_section' {sizes!r} must amount to {pairs}, the pairs that are rotated")
        return [*sizes, 0]

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``{arch}.rope.*`` keys."""
        if self.type == "longrope":
            original = self._original_context(self.context)
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(original)
            scale = self.context / original
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(self._positive("attention_factor", factor))
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

    def long_factors(self, rotary_dim: int) -> dict[str, NDArray[np.float32]]:
        """longrope's divisors of the rotary frequencies for long and for short contexts, by gguf's tensor names.

        Raises ``ModelError`` unless there are ``rotary_dim / 2`` numbers of each.
        """
        found = {}
        for key, tensor in (
            ("long_factor", gguf.MODEL_TENSOR.ROPE_FACTORS_LONG),
            ("short_factor", gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT),
        ):
            values = self.params.get(key)
            if not isinstance(values, list) or (rotary_dim > 2 and len(values) != rotary_dim // 2):
                raise self.config.error(f"longrope's '{key}' must be {rotary_dim // 2} numbers, it is {values!r}")
            numbers = [positive(value, key, None, self.config) for value in values]
            found[gguf.TENSOR_NAMES[tensor] + ".weight"] = np.array(numbers, np.float32)
        return found

    def factors(self, rotary_dim: int) -> dict[str, NDArray[np.float32]]:
        """Tensors of divisors of the rotary frequencies, float32 ``[rotary_dim / 2]`` each, by their GGUF names."""
        if self.type == "longrope":
            return self.long_factors(rotary_dim)
        found = self.frequency_factors(rotary_dim)
        return {} if found is None else {gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight": found}

    def frequency_factors(self, head_dim: int) -> NDArray[np.float32] | None:
        """Llama-3's divisors of the rotary frequencies, float32 ``[head_dim / 2]``; ``None`` for other types.

        Wavelengths below ``original / high_freq_factor`` keep their frequency, those above ``original /
        low_freq_factor`` are divided by ``factor``, those between are interpolated; in Llama 4 the two are one.
        """
        if self.type != "llama3":
            return None
        factor = np.float32(self._positive("factor"))
        low = self._positive("low_freq_factor", 1.0)
        high = self._positive("high_freq_factor", 4.0)
        original = self._original_context(8192)
        if high < low:
            raise self.config.error("'high_freq_factor' must not be less than 'low_freq_factor'")
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        with np.errstate(all="ignore"):  # between is for some only
            frequency = np.float32(1) / np.power(np.float32(self.theta), exponent)
            wavelength = np.float32(2 * math.pi) / frequency
            smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
            between = np.float32(1) / ((np.float32(1) - smooth) / factor + smooth)
            factors = np.where(wavelength > original / low, factor, between)
            factors = np.where(wavelength < original / high, np.float32(1), factors).astype(np.float32)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise self.config.error("the parameters of llama3's RoPE are too large or too small to compute with")
        return factors


def _parameters(config: Config, default_theta: float, layer_type: str | None) -> dict[str, Any]:
    """The config's RoPE parameters.

    A ``rope_scaling`` that is not empty replaces ``rope_parameters`` altogether, as in transformers 5: the base
    frequency in the latter is lost with it, unless ``rope_theta`` stands beside them.  Where there are parameters per
    layer type it is for those of full attention, and adds to them.

    Raises ``ModelError`` if one of them is no object.
    """
    new, old = (config.raw.get(key) for key in ("rope_parameters", "rope_scaling"))
    for params in (new, old):
        if params is not None and not isinstance(params, dict):
            raise config.error(f"the RoPE parameters must be an object, they are {params!r}")
    new, old = new or {}, old or {}
    if layer_type is not None:
        if any(isinstance(value, dict) or value is None for value in new.values()):
            new = new.get(layer_type) or {}
        return {**new, **old} if layer_type == "full_attention" else new
    if new and old and new != old:
        theta = old.get("rope_theta", config.raw.get("rope_theta", default_theta))
        log.warning(
            "%s: 'rope_scaling' replaces 'rope_parameters', as in transformers: the base frequency is %s%s",
            config.file,
            theta,
            "" if new.get("rope_theta", theta) == theta else f", no longer {new['rope_theta']}",
        )
    return old or new

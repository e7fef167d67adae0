"""NVIDIA's ModelOpt: NVFP4 (4-bit floats, an FP8 scale for each 16, one float for all), and FP8 with one scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..safetensors_io import Checkpoint, DecodedTensor, StoredTensor, as_float32
from .format import E2M1, Settings, companion, matrix, named, nibbles, spread
from .scaled import scaled_tensor

GROUP = 16


def tensors(settings: Settings, checkpoint: Checkpoint) -> Iterator[DecodedTensor]:
    """See ``Format``."""
    for name, scale in named(checkpoint, ".weight_scale"):
        weight = companion(checkpoint, scale, f"{name}.weight", ("U8", "F8_E4M3"))
        if weight.dtype == "F8_E4M3":
            yield scaled_tensor(weight, scale, None)
        else:
            factor = companion(checkpoint, weight, f"{name}.weight_scale_2", ("F32",))
            yield nvfp4_tensor(weight.name, weight, scale, factor, divide=False)


def nvfp4_tensor(
    name: str, codes: StoredTensor, scale: StoredTensor, factor: StoredTensor, *, divide: bool
) -> DecodedTensor:
    """``codes`` U8 ``[rows, columns / 2]``, low nibbles first, times ``scale`` E4M3 ``[rows, columns / 16]``, times the
    one float of ``factor`` (``divide``: through it).  Raises ``ModelError``."""
    matrix(codes, ("U8",))
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    if scale.shape != (rows, columns // GROUP) or columns % GROUP or scale.dtype != "F8_E4M3":
        raise scale.error(f"is {scale.dtype} {list(scale.shape)}, not F8_E4M3 {[rows, columns // GROUP]}")
    factor_value = factor.value().astype(np.float32).reshape(-1)
    if factor_value.size != 1:
        raise factor.error(f"has the shape {list(factor.shape)}, not one value")

    def load(start: int, stop: int) -> NDArray[np.float32]:
        local = as_float32(scale.stored_rows(start, stop), "F8_E4M3")
        local = local / factor_value if divide else local * factor_value
        values: NDArray[np.float32] = E2M1[nibbles(codes.stored_rows(start, stop))]
        values *= spread(local, GROUP, columns)
        return values

    return DecodedTensor(name, codes.path, (rows, columns), "nvfp4", load, (codes.name, scale.name, factor.name))

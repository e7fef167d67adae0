"""The commands that mutated inputs go through."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .mutate import Files, mutate
from .seeds import RESUMED, SEEDS, seed

_HF = [name for name in SEEDS if name.startswith("hf-")]
_DECODED = ("hf-fp8", "hf-gptq", "hf-awq", "hf-packed", "hf-nvfp4")  # of types that no GGUF file holds
_OUT = ("-o", "out/out.gguf")
_CONVERT = (*_OUT, "--no-calibration", "--threads", "1")


@dataclass(frozen=True)
class Target:
    """A command (paths are below the folder of the input), the seed it reads, and the files of it that are damaged:
    those whose names start with ``damaged``."""

    kind: str
    seed: str
    args: tuple[str, ...]
    damaged: str = ""

    @property
    def name(self) -> str:
        """What tells it from all others."""
        return " ".join((self.seed, *self.args))

    @property
    def resumes(self) -> bool:
        """Whether what it leaves on failure is what a later run goes on with."""
        return "--resume" in self.args


def _targets() -> list[Target]:
    model, first = "in/model.gguf", next(name for name in seed("gguf-split") if "00001-of" in name)
    convert = ("quantize", model, *_CONVERT)
    found = [
        Target("inspect", "gguf-types", ("inspect", model)),
        Target("inspect", "gguf-types", ("inspect", "--json", model)),
        Target("quantize", "gguf-plain", (*convert, "--type", "t2")),
        Target("quantize", "gguf-plain", (*convert, "--type", "t1_5_m", "--force")),
        Target("quantize", "gguf-plain", (*convert, "--type", "t2", "--dry-run")),
        Target("quantize", "gguf-types", (*convert, "--type", "t3", "--allow-requantize")),
        Target(
            "quantize", "gguf-types", (*convert, "--type", "q4_0", "--allow-requantize", "--split-max-size", "6000")
        ),
        Target("dequantize", "gguf-types", ("dequantize", model, *_OUT, "--type", "f32")),
        Target("dequantize", "gguf-types", ("dequantize", model, *_OUT, "--type", "f16")),
        Target("split", "gguf-split", ("inspect", first)),
        Target("split", "gguf-split", ("dequantize", first, *_OUT, "--type", "f32", "--split-max-size", "8k")),
        Target("split", "gguf-split", ("quantize", first, *_CONVERT, "--type", "t2_5")),
        Target("imatrix", "imatrix", (*convert, "--type", "t2", "--imatrix", "in/imatrix.gguf"), "in/im"),
        Target("imatrix", "imatrix", (*convert, "--target-bpw", "4", "--imatrix", "in/imatrix.gguf"), "in/im"),
        Target("imatrix, old form", "imatrix-old", (*convert, "--type", "t2", "--imatrix", "in/imatrix.dat"), "in/im"),
        Target("hessian", "hessian", (*convert, "--type", "t2", "--hessian", "in/hessian.safetensors"), "in/h"),
        Target("journal", "journal", RESUMED, "out/"),
    ]
    for name in _HF:
        command = ("hf2gguf", "in", *_CONVERT)
        found.append(Target("hf2gguf --dry-run", name, (*command, "--type", "t2", "--dry-run")))
        found.append(Target("hf2gguf", name, (*command, "--type", "t2", "--effort", "fast")))
        found.append(Target("hf2gguf", name, (*command, "--type", "f16" if name in _DECODED else "keep")))
    return found


@cache
def targets() -> dict[str, list[Target]]:
    """All of them by kind."""
    kinds: dict[str, list[Target]] = {}
    for target in _targets():
        kinds.setdefault(target.kind, []).append(target)
    return kinds


def target_of(name: str) -> Target:
    """The target of that name.  Raises ``KeyError``."""
    return {target.name: target for group in targets().values() for target in group}[name]


@cache
def _donors() -> dict[str, list[bytes]]:
    """All files of all seeds by their names."""
    found: dict[str, list[bytes]] = {}
    for name in SEEDS:
        for path, data in seed(name).items():
            found.setdefault(path.rsplit("/", 1)[-1], []).append(data)
    return found


def make_input(index: int, run: int, kinds: Sequence[str] = ()) -> tuple[Target, Files]:
    """Input number ``index`` of the run with the seed ``run``; ``kinds`` restrict it to some."""
    rng = random.Random(f"{run} {index}")
    target = rng.choice(targets()[rng.choice(list(kinds or targets()))])
    files = seed(target.seed)
    names = [name for name in files if name.startswith(target.damaged)]
    return target, mutate(files, names, rng, _donors())

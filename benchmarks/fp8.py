"""What converting an FP8 checkpoint costs beside the same weights in bf16: time and memory, interleaved.

    python benchmarks/fp8.py --layers 2 --rounds 3

Makes a llama with random weights twice, in DeepSeek-V3's block-scaled FP8 and in bf16, which holds the same numbers:
codes have four significant bits, and scales are powers of two.  Both are converted with ``hf2gguf``; the files must be
equal, byte by byte, before anything is said of speed.  Needs ``pip install '.[calibrate]'`` (for torch).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ccq_format.gguf_io import open_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "manllama-4m"
BLOCK = 128

MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(status)
"""
"""Prints a command's seconds of CPU time and largest resident set in KiB."""


def fp8_values() -> NDArray[np.float32]:
    """What the 256 codes of E4M3 (fn) stand for."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    return np.where(code < 128, size, -size).astype(np.float32)


def as_bf16(x: NDArray[np.float32]) -> torch.Tensor:
    """The same numbers."""
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    rounded = tensor.to(torch.bfloat16)
    assert torch.equal(rounded.float(), tensor)
    return rounded


def build(folder: Path, layers: int, hidden: int, intermediate: int) -> int:
    """The folders ``fp8`` and ``bf16``; returns the number of weights."""
    rng, values = np.random.default_rng(0), fp8_values()
    vocab, heads = 4096, hidden // 128
    config = json.loads((EXAMPLE / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 128}
    config |= {"vocab_size": vocab, "tie_word_embeddings": False}
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden)}
    shapes |= {"self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    stored: dict[str, dict[str, torch.Tensor]] = {"fp8": {}, "bf16": {}}

    def both(name: str, x: NDArray[np.float32]) -> None:
        for tensors in stored.values():
            tensors[name] = as_bf16(x)

    # Exponents around a mean; 127 would be NaN.
    bell = np.clip(np.rint(96 + 8 * rng.standard_normal(1 << 20)), 0, 126).astype(np.uint8)
    bell[::2] |= 128
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            codes = np.resize(bell, rows * columns).reshape(rows, columns)
            codes = np.roll(codes, int(rng.integers(1 << 16)))
            scale = (2.0 ** rng.integers(-9, -6, (rows // BLOCK, columns // BLOCK))).astype(np.float32)
            full = f"model.layers.{layer}.{name}.weight"
            stored["fp8"][full] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            stored["fp8"][f"{full}_scale_inv"] = torch.from_numpy(scale)
            decoded = values[codes] * scale.repeat(BLOCK, 0).repeat(BLOCK, 1)
            stored["bf16"][full] = as_bf16(decoded)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            both(f"model.layers.{layer}.{norm}.weight", np.ones(hidden, np.float32))
    both("model.norm.weight", np.ones(hidden, np.float32))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        both(name, values[np.resize(bell, vocab * hidden)].reshape(vocab, hidden))
    for kind, tensors in stored.items():
        (folder / kind).mkdir()
        for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(EXAMPLE / file, folder / kind)
        quantized = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
        whole = config | ({"quantization_config": quantized} if kind == "fp8" else {})
        (folder / kind / "config.json").write_text(json.dumps(whole))
        save_file(tensors, folder / kind / "model.safetensors", {"format": "pt"})
    return sum(rows * columns for rows, columns in shapes.values()) * layers


@dataclass(frozen=True)
class Cost:
    """Of one conversion: seconds of the clock and of all CPUs, MB of memory."""

    seconds: float
    cpu: float
    megabytes: float


def convert(model: Path, out: Path, options: list[str]) -> Cost:
    """What ``ccq-convert hf2gguf`` takes."""
    command = [sys.executable, "-m", "ccq_converters.cli", "hf2gguf", str(model), "-o", str(out), *options]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    cpu, kib = done.stdout.splitlines()[-1].split()
    return Cost(seconds, float(cpu), int(kib) / 1000)


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same tensors."""
    pairs = zip(open_model(one).tensors, open_model(other).tensors, strict=True)
    return all(
        a.name == b.name and a.type_name == b.type_name and np.array_equal(a.data(), b.data(), equal_nan=True)
        for a, b in pairs
    )


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--layers", type=int, default=2, show_default=True)
@click.option("--hidden", type=int, default=2048, show_default=True)
@click.option("--intermediate", type=int, default=7168, show_default=True)
@click.option("--type", "type_name", default="ccq_t2", show_default=True)
@click.option("--effort", default="fast", show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
def main(layers: int, hidden: int, intermediate: int, type_name: str, effort: str, rounds: int) -> None:
    options = ["--type", type_name, "--effort", effort, "--no-calibration", "--overwrite"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = build(folder, layers, hidden, intermediate)
        results: dict[str, list[Cost]] = {"bf16": [], "fp8": []}
        for _ in range(rounds):
            for kind, found in results.items():
                found.append(convert(folder / kind, folder / f"{kind}.gguf", options))
            if not same(folder / "bf16.gguf", folder / "fp8.gguf"):
                raise SystemExit("the two files differ")
    pairs = list(zip(results["fp8"], results["bf16"], strict=True))
    for kind, found in results.items():
        seconds, cpu = median(c.seconds for c in found), median(c.cpu for c in found)
        memory = max(c.megabytes for c in found)
        click.echo(
            f"{kind}: {weights / 1e6:.0f} M weights in {seconds:.1f} s, CPU {cpu:.1f} s, {memory:.0f} MB of memory"
        )
    clock, cpu = (median(getattr(a, of) / getattr(b, of) for a, b in pairs) for of in ("seconds", "cpu"))
    memory = max(c.megabytes for c in results["fp8"]) / max(c.megabytes for c in results["bf16"])
    click.echo(
        f"fp8 over bf16: time {clock:.2f}, CPU {cpu:.2f} (medians of {rounds} rounds), memory {memory:.2f}; equal files"
    )


if __name__ == "__main__":
    main()

"""The bytes that conversions write, as digests: a restructuring of the code, another CPU or another number of threads
must not change one.

``python -m tests.test_bytes`` rewrites the digests, for a change of the encoder or of the plans, which says so in its
commit.  Left out is what linear algebra or a model's run decides, which may differ by a rounding between CPUs:
Hessians, calibration, allocation.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from ccq_converters import imatrix
from ccq_converters.cli import main
from ccq_converters.mixtures import MIXTURES
from ccq_converters.target_types import STOCK_TYPES
from ccq_format.gguf_io import ModelWriter, open_model
from ccq_format.layouts import LAYOUTS

DIGESTS = Path(__file__).resolve().with_name("data") / "bytes.json"
EXAMPLE = Path(__file__).resolve().parents[1] / "examples/manllama-4m"

COLUMNS, EXPERTS = 512, 3
SHAPES = {
    "token_embd.weight": (40, COLUMNS),
    "output.weight": (40, COLUMNS),
    "blk.0.attn_q.weight": (24, COLUMNS),
    "blk.0.attn_v.weight": (8, COLUMNS),
    "blk.0.attn_norm.weight": (COLUMNS,),
    "blk.0.ffn_gate_inp.weight": (EXPERTS, COLUMNS),
    "blk.0.ffn_down_exps.weight": (EXPERTS, 6, COLUMNS),
    "blk.1.attn_q.weight": (5, 576),  # rows that not every block divides
    "blk.1.ffn_up.weight": (7, 160),
}
SOURCES = ("f32", "f16", "bf16", "q8_0", "mxfp4")


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bell-shaped, from integers alone: the same for every NumPy and on every CPU."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))).view(np.uint16).reshape(-1, 4)
    return ((raw.astype(np.int64).sum(axis=1) - 2 * 65535) / 2**20).astype(np.float32).reshape(shape)


def make_model(path: Path, kind: str) -> Path:
    """A file of ``SHAPES`` whose matrices have one type, where their rows are whole blocks of it."""
    block = {"q8_0": 32, "mxfp4": 32}.get(kind, 1)
    types = {n: kind if len(s) > 1 and s[-1] % block == 0 else "f32" for n, s in SHAPES.items()}
    with ModelWriter(path, "llama") as out:
        for name, shape in SHAPES.items():
            out.add_tensor(name, types[name], shape)
        out.begin()
        for name, shape in SHAPES.items():
            x = weights(name, shape)
            as_type = gguf.GGMLQuantizationType[types[name].upper()]
            out.write(name, x if types[name] == "f32" else gguf.quants.quantize(x, as_type).view(np.uint8))
    return path


def make_importance(path: Path) -> Path:
    """Importance over three orders of magnitude, of experts with counts; none of the embedding."""
    entries = {}
    for name, shape in SHAPES.items():
        if len(shape) > 1 and name != "token_embd.weight":
            matrices = EXPERTS if len(shape) == 3 else 1
            counts = np.array([512.0, 3.0, 40.0][:matrices])
            sums = 2.0 ** np.rint(40 * weights(f"importance of {name}", (matrices, shape[-1]))) * counts[:, None]
            entries[name] = imatrix.Entry(sums.astype(np.float32).reshape(-1), counts)
    with ModelWriter(path, "") as writer:
        imatrix.fill(writer, imatrix.Importance(str(path), entries, ["made up"], 1, 512))
    return path


def commands() -> Iterator[tuple[str, list[object]]]:
    """By name, the commands, without their output.  Files are in the current folder: output names its importance."""
    models = {kind: make_model(Path(f"{kind}.gguf"), kind) for kind in SOURCES}
    data = ["--imatrix", make_importance(Path("imatrix.gguf"))]
    for kind in (*(layout.name for layout in LAYOUTS), *MIXTURES, *STOCK_TYPES, "keep"):
        force = ["--force"] if kind == "ccq_t1" else []
        yield f"f32 to {kind}", ["quantize", models["f32"], "--type", kind, "--no-calibration", *force]
        yield f"f32 to {kind}, importance", ["quantize", models["f32"], "--type", kind, *data]
    for effort in ("fast", "best"):
        yield f"f32 to ccq_t2, {effort}", ["quantize", models["f32"], "--type", "ccq_t2", *data, "--effort", effort]
    pinned = ["--tensor-type", "attn_q=ccq_t3", "--tensor-type", "output=q4_0"]
    yield "f32 to ccq_t2, pinned", ["quantize", models["f32"], "--type", "ccq_t2", *data, *pinned]
    for kind in SOURCES[1:]:
        for target in ("ccq_t2", "ccq_p2_5", "q8_0", "keep"):
            yield f"{kind} to {target}", ["quantize", models[kind], "--type", target, *data]
    for target in ("keep", "f16"):
        yield f"folder to {target}", ["hf2gguf", EXAMPLE, "--type", target]


def digest(path: Path) -> str:
    """Of all keys but the encoder's version, and of all tensors with name, type, shape and bytes."""
    model = open_model(path)
    keys = {key: value for key, value in model.metadata.items() if key != "ccq.encoder"}
    whole = hashlib.sha256(repr(sorted(keys.items())).encode())
    for tensor in model.tensors:
        whole.update(repr((tensor.name, tensor.type_name, tensor.shape)).encode())
        whole.update(tensor.stored_rows(0, tensor.n_rows).tobytes())
    return whole.hexdigest()


def digests() -> dict[str, str]:
    """By name of a command."""
    out, found = Path("out.gguf"), {}
    for name, words in commands():
        command = [str(word) for word in (*words, "-o", out, "--overwrite")]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, f"{name}: {result.output}"
        found[name] = digest(out)
    return found


def test_every_conversion_writes_the_bytes_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, wanted = digests(), json.loads(DIGESTS.read_text())
    assert [name for name in wanted if found.get(name) != wanted[name]] == []
    assert list(found) == list(wanted)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        DIGESTS.write_text(json.dumps(digests(), indent=1) + "\n")

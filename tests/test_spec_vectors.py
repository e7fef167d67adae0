"""Golden vectors, and random blocks: reference, numpy and native decoders give the same float32 bits."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ccq_backend
from ccq_format import codec, layouts
from ccq_format.errors import BlockError
from ccq_format.layouts import LAYOUTS, Layout, PaperCode, TrellisCode

SPEC = Path(__file__).resolve().parent.parent / "spec"
V0 = SPEC / "vectors" / "v0"


def load(path: Path) -> ModuleType:
    """A script of ``spec/`` as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


ref = load(SPEC / "reference" / "ccq_reference.py")
make_vectors = load(SPEC / "vectors" / "make_vectors.py")

Decoder = Callable[[Layout, bytes], np.ndarray]


def by_reference(layout: Layout, data: bytes) -> np.ndarray:
    """Weights of whole blocks as uint32 bit patterns."""
    return np.array(ref.decode(layout.name, data), dtype=np.uint32)


def by_numpy(layout: Layout, data: bytes) -> np.ndarray:
    """The same from ``ccq_format``."""
    weights = codec.decode(layout, np.frombuffer(data, np.uint8))
    assert weights.dtype == np.float32
    return np.ascontiguousarray(weights).reshape(-1).view(np.uint32)


def by_backend(layout: Layout, data: bytes) -> np.ndarray:
    """The same from ``ccq_backend`` with the kernel set in use."""
    weights = ccq_backend.decode(layout.name, np.frombuffer(data, np.uint8)[None])
    assert weights.dtype == np.float32
    return np.ascontiguousarray(weights).reshape(-1).view(np.uint32)


DECODERS: dict[str, Decoder] = {"reference": by_reference, "numpy": by_numpy, "backend": by_backend}
PRODUCTION = {name: DECODERS[name] for name in ("numpy", "backend")}
FILES = sorted(V0.rglob("*.json"))
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
each_production = pytest.mark.parametrize("decoder", PRODUCTION)


def assert_bits(layout: Layout, data: bytes, got: np.ndarray, want: np.ndarray, who: str) -> None:
    """Equal bit patterns, or a failure that shows the first difference and its block."""
    assert got.shape == want.shape, who
    bad = np.flatnonzero(got != want)
    if bad.size:
        first = int(bad[0])
        block, weight = divmod(first, layout.block_weights)
        raw = data[block * layout.block_bytes : (block + 1) * layout.block_bytes]
        pytest.fail(
            f"{who}, {layout.name}: {bad.size} weights differ; the first is weight {weight} of block {raw.hex()}: "
            f"got {int(got[first]):08x}, want {int(want[first]):08x}"
        )


def read(path: Path) -> tuple[Layout, dict[str, Any], bytes, np.ndarray]:
    """Layout, content, bytes of all blocks, and bit patterns of all weights of a vector file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    layout = layouts.by_name(content["type"])
    blocks = [bytes.fromhex(case["block"]) for case in content["cases"]]
    weights = b"".join(bytes.fromhex(case["weights"]) for case in content["cases"])
    assert all(len(b) == layout.block_bytes for b in blocks)
    return layout, content, b"".join(blocks), np.frombuffer(weights, ">u4").astype(np.uint32)


# --- vectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
@pytest.mark.parametrize("decoder", DECODERS)
def test_vectors(path: Path, decoder: str) -> None:
    layout, _, data, want = read(path)
    assert want.size == len(data) // layout.block_bytes * layout.block_weights
    assert_bits(layout, data, DECODERS[decoder](layout, data), want, decoder)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_validity_of_vectors(path: Path) -> None:
    layout, content, _, _ = read(path)
    for case in content["cases"]:
        block = bytes.fromhex(case["block"])
        assert ref.is_valid(layout.name, block) == case["valid"]
        blocks = np.frombuffer(block, np.uint8)[None]
        if case["valid"]:
            codec.check_blocks(layout, blocks)
        else:
            with pytest.raises(BlockError):
                codec.check_blocks(layout, blocks)


def test_vectors_are_complete_and_reproducible() -> None:
    assert {p.parent.name for p in FILES} == {layout.name for layout in LAYOUTS}
    assert make_vectors.main(check=True) == 0
    assert sum(p.stat().st_size for p in FILES) < 137_500 * len(LAYOUTS)


@each_layout
def test_vectors_reach_every_code(layout: Layout) -> None:
    """Every window value (T), code byte (P2, P2_75) or value of each field of a code word (P2_5)."""
    seen: set[Any] = set()
    code = layout.code
    for path in (V0 / layout.name).glob("every-*.json"):
        _, _, data, _ = read(path)
        for at in range(0, len(data), layout.block_bytes):
            block = data[at : at + layout.block_bytes]
            codes = block[layout.offset("codes") :]
            if isinstance(code, TrellisCode):
                string = int.from_bytes(codes, "little")
                doubled = string | string << code.code_bits
                seen |= {doubled >> o & (1 << code.window_bits) - 1 for o in code.offsets}
            elif code.word_bits == 8:
                per_group = len(codes) // layout.groups
                seen |= {c for i, c in enumerate(codes) if layout.name == "ccq_p2" or i % per_group != per_group - 1}
            else:
                words = struct.unpack(f"<{len(codes) // 2}H", codes)
                seen |= {(s, w >> s & code.mask) for i, w in enumerate(words) if i % 10 != 9 for s in code.shifts}
    if isinstance(code, TrellisCode):
        assert seen == set(range(1 << code.window_bits))
    elif code.word_bits == 8:
        assert seen == set(range(256))
    else:
        assert seen == {(s, v) for s in code.shifts for v in range(8)}


def test_rounding_vectors_tell_a_fused_decoder_apart() -> None:
    """Some state in state-rounding.json would be another one with a fused multiply-add (rule P2)."""
    _, _, data, _ = read(V0 / "ccq_p2" / "state-rounding.json")
    differing = 0
    for at in range(0, len(data), 142):
        scale, zp = struct.unpack_from("<ff", data, at + 2)
        for c in set(data[at + 14 : at + 142]):
            exact = Fraction(c) * Fraction(scale) + Fraction(zp)
            fused = float(np.float32(np.float32(float(exact)) + np.float32(0.5)))
            differing += math.floor(fused) != ref.p2_state(c, scale, zp)
    assert differing >= 3


# --- random blocks --------------------------------------------------------------------------------------------------

SPECIAL_F32 = [0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x3F000000, 0x3EFFFFFF, 0x4B000001, 0xCF000000, 0x4F000000]
SPECIAL_F32 += [0xCF000001, 0x4EFFFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF]
f32_bits = st.one_of(
    st.sampled_from(SPECIAL_F32),
    st.integers(0, 2**32 - 1),
    st.floats(-70000, 70000, width=32).map(lambda x: struct.unpack("<I", struct.pack("<f", x))[0]),
)
bf16_bits = st.one_of(st.integers(0, 2**16 - 1), f32_bits.map(lambda bits: bits >> 16))


@st.composite
def blocks_of(draw: st.DrawFn, layout: Layout) -> bytes:
    """One block: random bytes, with parameters that favour the edges of float32."""
    codes = draw(st.binary(min_size=layout.block_bytes, max_size=layout.block_bytes))
    block = bytearray(codes)
    for field in layout.fields:
        at = layout.offset(field.name)
        if field.dtype == "bf16":
            block[at : at + 2] = draw(bf16_bits).to_bytes(2, "little")
        elif field.dtype == "f32":
            block[at : at + 4] = draw(f32_bits).to_bytes(4, "little")
    return bytes(block)


@each_layout
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_blocks(layout: Layout, data: st.DataObject) -> None:
    block = data.draw(blocks_of(layout))
    want = by_reference(layout, block)
    for name, decode in PRODUCTION.items():
        assert_bits(layout, block, decode(layout, block), want, name)
    try:
        codec.check_blocks(layout, np.frombuffer(block, np.uint8)[None])
        valid = True
    except BlockError:
        valid = False
    assert valid == ref.is_valid(layout.name, block)


@each_layout
def test_many_random_blocks(layout: Layout) -> None:
    """Uniform bytes, many blocks in one call: finds mistakes in block addressing and in vectorized tails."""
    for count in (1, 2, 3, 7, 64):
        data = np.random.default_rng(count).bytes(count * layout.block_bytes)
        want = by_reference(layout, data)
        for name, decode in PRODUCTION.items():
            assert_bits(layout, data, decode(layout, data), want, name)


@pytest.mark.parametrize("layout", [t for t in LAYOUTS if isinstance(t.code, TrellisCode)], ids=lambda t: t.name)
def test_every_scale_byte(layout: Layout) -> None:
    codes = np.random.default_rng(5).bytes(layout.block_bytes - 1)
    data = b"".join(bytes([b]) + codes for b in range(256))
    want = by_reference(layout, data)
    for name, decode in PRODUCTION.items():
        assert_bits(layout, data, decode(layout, data), want, name)
    # against the rule itself, in exact arithmetic: the weights are rational numbers with small numerators
    code = layout.code
    assert isinstance(code, TrellisCode)
    unit = np.array(ref.decode(layout.name, bytes([code.scale_exponent_bias * 8]) + codes), np.uint32)
    levels = unit.view(np.float32).astype(np.float64) / 8
    assert np.array_equal(levels, np.round(levels))
    assert np.abs(levels).max() <= 127
    for b in range(1, 256):
        scale = math.ldexp(8 + b % 8, b // 8 - code.scale_exponent_bias)
        got = want[b * layout.block_weights : (b + 1) * layout.block_weights].view(np.float32).astype(np.float64)
        assert np.array_equal(got, levels * scale)


@pytest.mark.parametrize("isa", [name for name, supported in ccq_backend.isas() if supported])
def test_every_kernel_set(isa: str) -> None:
    """All vectors, in a process that is forced to this kernel set."""
    program = (
        "import sys, json, numpy as np, ccq_backend, pathlib\n"
        "assert ccq_backend.isa() == sys.argv[1]\n"
        "for path in sorted(pathlib.Path(sys.argv[2]).rglob('*.json')):\n"
        "    content = json.loads(path.read_text())\n"
        "    for case in content['cases']:\n"
        "        block = np.frombuffer(bytes.fromhex(case['block']), np.uint8)[None]\n"
        "        got = ccq_backend.decode(content['type'], block).view(np.uint32).reshape(-1)\n"
        "        want = np.frombuffer(bytes.fromhex(case['weights']), '>u4')\n"
        "        assert np.array_equal(got, want), (path, case['block'])\n"
        "print('ok')\n"
    )
    environment = dict(os.environ, CCQ_ISA=isa)
    command = [sys.executable, "-c", program, isa, str(V0)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


# --- the reference's own parts --------------------------------------------------------------------------------------


@each_layout
def test_reference_constants_equal_the_table(layout: Layout) -> None:
    assert ref.BLOCKS[layout.name] == (layout.gguf_id, layout.block_weights, layout.block_bytes)
    assert ref.BLOCKS.keys() == {t.name for t in LAYOUTS}
    if isinstance(layout.code, PaperCode):
        assert ref.P_TYPES[layout.name][1] == layout.groups
        return
    code = layout.code
    got = (ref.STRIDES, ref.CODE_BITS, ref.MULTIPLIER)
    assert tuple(t[layout.name] for t in got) == (code.strides, code.code_bits, code.multiplier)
    assert (code.window_bits, code.scale_exponent_bias) == (ref.WINDOW_BITS, ref.SCALE_BIAS)


@settings(max_examples=1000, deadline=None)
@given(f32_bits, f32_bits)
def test_reference_arithmetic_is_float32(a_bits: int, b_bits: int) -> None:
    """Its sums and products equal those of numpy's float32, that is of the machine, with every special case."""
    a, b = (np.array(bits, np.uint32).view(np.float32)[()] for bits in (a_bits, b_bits))
    with np.errstate(all="ignore"):
        for ours, theirs in ((ref.add, a + b), (ref.mul, a * b)):
            want = ref.NAN_BITS if np.isnan(theirs) else int(theirs.view(np.uint32))
            assert ref.bits(ours(float(a), float(b))) == want


@settings(max_examples=1000, deadline=None)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_reference_sums_are_rounded_once(a: float, b: float) -> None:
    """The proof in the reference, checked: rounding the exact sum gives what rounding twice gives."""
    exact = Fraction(a) + Fraction(b)
    got = ref.add(a, b)
    if math.isinf(got):
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    value = np.float32(got)
    with np.errstate(over="ignore"):
        below, above = (float(np.nextafter(value, np.float32(d))) for d in (-np.inf, np.inf))
    error = abs(Fraction(got) - exact)
    for neighbour in (below, above):
        if math.isfinite(neighbour):
            other = abs(Fraction(neighbour) - exact)
            assert error < other or (error == other and int(value.view(np.uint32)) % 2 == 0)


def test_reference_program() -> None:
    path = V0 / "ccq_t2" / "random.json"
    _, _, data, want = read(path)
    command = [sys.executable, str(SPEC / "reference" / "ccq_reference.py")]
    done = subprocess.run([*command, "CCQ_T2"], input=data, capture_output=True, check=False)
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [int(bits, 16) for bits, _ in lines] == want.tolist()
    values = np.array([float(value) for _, value in lines], np.float32)
    assert np.array_equal(values.view(np.uint32), want)

    for arguments, status, words in (
        (["ccq_t2"], 1, b"no whole number"),
        (["q8_0"], 1, b"unknown type"),
        ([], 2, b"usage"),
    ):
        done = subprocess.run([*command, *arguments], input=b"12345", capture_output=True, check=False)
        assert done.returncode == status
        assert words in done.stderr
        assert b"Traceback" not in done.stderr

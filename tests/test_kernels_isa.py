"""Kernel sets: the table, ``CCQ_ISA``, and equal results from all of them where results must be equal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import ccq_backend
from ccq_format.layouts import LAYOUTS
from support.blocks import run_python

CPU = Path(__file__).parents[1] / "backend/cpu"
SUPPORTED = [name for name, supported in ccq_backend.isas() if supported]

# What all kernel sets compute alike, on data from one seed, as one digest per type and operation.
DIGESTS = """
import hashlib, json, sys
import numpy as np
import ccq_backend
from ccq_format.layouts import GROUP, LAYOUTS, TrellisCode
from support.blocks import random_blocks, sane_blocks

def digest(a):
    return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()

out = {"isa": ccq_backend.isa()}
for layout in LAYOUTS:
    rng = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 21)
    for blocks in (1, 2, 3, 4, 7, 9):
        b = np.concatenate([sane_blocks(layout, 6, blocks, rng), random_blocks(layout, 13, blocks, rng)])
        out[f"{layout.name} {blocks} decode"] = digest(ccq_backend.decode(layout, b))
    w = rng.standard_t(4, (3, 2 * layout.block_weights)).astype(np.float32)
    importance = np.exp(rng.normal(0, 1, w.shape)).astype(np.float32)
    out[layout.name + " encode"] = digest(ccq_backend.encode(layout, w))
    out[layout.name + " encode weighted"] = digest(ccq_backend.encode(layout, w, importance))
    if isinstance(layout.code, TrellisCode):
        for effort in ("fast", "best"):
            out[layout.name + " encode " + effort] = digest(ccq_backend.encode(layout, w, importance, effort=effort))
        importance[:, ::17] *= 10000
        out[layout.name + " encode channels"] = digest(ccq_backend.encode(layout, w * np.float32(1e-3), importance))
        scales = np.full((3, 2), 2.0**-6, np.float32)
        out[layout.name + " encode scaled"] = digest(ccq_backend.encode(layout, w, scales=scales))
        size = layout.block_weights
        coupling = np.triu(rng.normal(0, 0.2, (2, size, size)), 1)
        out[layout.name + " encode coupled"] = digest(ccq_backend.encode(layout, w, importance, coupling=coupling))
print(json.dumps(out))
"""


def test_the_table() -> None:
    names = [name for name, _ in ccq_backend.isas()]
    assert names[-1] == "scalar"
    assert SUPPORTED[-1] == "scalar"
    assert len(set(names)) == len(names)
    sources = "".join(path.read_text() for path in CPU.glob("*/kernels*.c"))
    assert {f"ccq_kernels_{name}" for name in names} <= set(re.findall(r"#define CCQ_SET (\w+)", sources))


def test_the_best_supported_set_is_the_default() -> None:
    run = run_python("import ccq_backend; print(ccq_backend.isa())", CCQ_ISA="")
    assert run.stdout.strip() == SUPPORTED[0]


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_forced_set_is_the_one_that_runs(name: str) -> None:
    run = run_python("import ccq_backend; print(ccq_backend.isa())", CCQ_ISA=name)
    assert run.stdout.strip() == name


EVERY_CALL = """
import numpy as np
import ccq_backend
from ccq_format import errors
calls = [
    lambda: ccq_backend.isa(),
    lambda: ccq_backend.decode("ccq_t2", np.zeros((1, 17), np.uint8)),
    lambda: ccq_backend.encode("ccq_t2", np.zeros((1, 64), np.float32)),
    lambda: ccq_backend.quantize_activations(np.zeros((1, 64), np.float32)),
    lambda: ccq_backend.act_bytes(64),
    lambda: ccq_backend.mul_mat("ccq_t2", np.zeros((1, 17), np.uint8), np.zeros((1, 128), np.uint8)),
]
for call in calls:
    try:
        call()
    except errors.BackendError as e:
        print(e.reason)
"""


def test_an_unknown_set_is_an_error_everywhere() -> None:
    run = run_python(EVERY_CALL, CCQ_ISA="sse9")
    assert run.stdout.splitlines() == ["CCQ_ISA names no kernel set of this build"] * 6, run.stderr


@pytest.mark.skipif(len(SUPPORTED) == len(ccq_backend.isas()), reason="this CPU runs every set of the build")
def test_an_unsupported_set_is_an_error_everywhere() -> None:
    name = next(name for name, supported in ccq_backend.isas() if not supported)
    run = run_python(EVERY_CALL, CCQ_ISA=name)
    assert run.stdout.splitlines() == ["CCQ_ISA names a kernel set that this CPU cannot run"] * 6, run.stderr


@pytest.mark.parametrize("name", SUPPORTED[1:])
def test_decode_and_products_of_the_other_sets(name: str) -> None:
    """The default set's tests run in this process; here, with all others."""
    file = Path(__file__).with_name("test_kernels_decode_dot.py")
    code = f"import pytest, sys; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', {str(file)!r}]))"
    run = run_python(code, CCQ_ISA=name)
    assert run.returncode == 0, run.stdout[-3000:]


def test_all_supported_sets_agree_bit_for_bit() -> None:
    results = {}
    for name in SUPPORTED:
        run = run_python(DIGESTS, CCQ_ISA=name)
        assert run.returncode == 0, run.stderr
        results[name] = json.loads(run.stdout)
        assert results[name].pop("isa") == name
    reference = results["scalar"]
    assert len(reference) >= len(LAYOUTS) * 8
    for name, result in results.items():
        assert {k for k in reference if result[k] != reference[k]} == set(), name


# Blocks that end where a page ends that is followed by none: who reads beyond them ends the process.
AT_THE_END_OF_MEMORY = """
import ctypes, mmap
import numpy as np
import ccq_backend
from ccq_format.layouts import LAYOUTS

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(start + 2 * page), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
rng = np.random.default_rng(1)
for layout in LAYOUTS:
    for blocks in (1, 2, 3):
        act = ccq_backend.quantize_activations(np.ones((17, blocks * layout.block_weights), np.float32))
        for rows in (1, 2, 3, 16, 17):
            size = rows * blocks * layout.block_bytes
            if size > 2 * page:
                continue
            at_end = np.frombuffer(memory, np.uint8, size, 2 * page - size).reshape(rows, -1)
            at_end[:] = rng.integers(0, 256, at_end.shape, dtype=np.uint8)
            elsewhere = at_end.copy()
            for got, wanted in [
                (ccq_backend.decode(layout, at_end), ccq_backend.decode(layout, elsewhere)),
                *((ccq_backend.mul_mat(layout, b[0], act[:n]), ccq_backend.mul_mat(layout, b[1], act[:n]))
                  for b in [(at_end, elsewhere)] for n in (1, 2, 3, 4, 5, 17)),
            ]:
                assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))
print("read")
"""


@pytest.mark.parametrize("name", SUPPORTED)
def test_nothing_behind_the_blocks_is_read(name: str) -> None:
    run = run_python(AT_THE_END_OF_MEMORY, CCQ_ISA=name)
    assert run.stdout == "read\n", f"exit code {run.returncode}: {run.stderr[-2000:]}"

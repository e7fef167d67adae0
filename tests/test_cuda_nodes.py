"""ggml's nodes on a GPU (``backend/fork/cuda``), run on a CPU: how strides, batches, broadcasting and experts become
launches.  ``test_cuda_kernels.py`` is about the kernels themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cffi import FFI
from test_cuda_kernels import activations, check_product, to_bits

from ccq_format.layouts import Layout, by_name
from support import cuda_harness
from support.blocks import IN_GGML, expected_weights, random_blocks, sane_blocks

pytestmark = pytest.mark.skipif(
    cuda_harness.compiler() is None, reason="no C++ compiler: install one, or name it in CXX"
)
by_layout = pytest.mark.parametrize("layout", IN_GGML, ids=lambda layout: layout.name)
UNIT = str(cuda_harness.EMULATOR / "nodes.cpp")
TYPES = {"f32": 0, "f16": 1, "i32": 26, "bf16": 30}
"""ggml's numbers."""


class Tensor:
    """A tensor as ggml describes it: ``ne`` elements and ``nb`` bytes from one to the next, innermost first."""

    def __init__(self, type_number: int, ne: Sequence[int], nb: Sequence[int], array: np.ndarray) -> None:
        self.type, self.array = type_number, array
        self.ne, self.nb = [*ne, *[1] * (4 - len(ne))], list(nb)
        while len(self.nb) < 4:
            self.nb.append(self.nb[-1] * self.ne[len(self.nb) - 1])


def plain(array: np.ndarray, type_name: str = "f32") -> Tensor:
    """A NumPy array, or a view of one, as it lies in memory; its last dimension is ggml's first."""
    return Tensor(TYPES[type_name], array.shape[::-1], array.strides[::-1], array)


def matrix(layout: Layout, blocks: np.ndarray) -> Tensor:
    """Blocks, u8 [..., rows, row bytes], or a view of some."""
    n = blocks.shape[-1] // layout.block_bytes * layout.block_weights
    assert blocks.strides[-1] == 1
    nb = [layout.block_bytes, *blocks.strides[-2::-1]]
    return Tensor(layout.gguf_id, [n, *blocks.shape[-2::-1]], nb, blocks)


class Device:
    """The emulated GPU."""

    def __init__(self) -> None:
        self.ffi = FFI()
        self.ffi.cdef(
            "typedef struct { int32_t type; int64_t ne[4]; uint64_t nb[4]; void * data; } description;"
            "int32_t run_node(int32_t op, const description * out, const description * in, int32_t n_in);"
            "int32_t op_class(const char * name);"
        )
        self.lib: Any = self.ffi.dlopen(str(cuda_harness.library((UNIT,))))

    def describe(self, target: Any, t: Tensor) -> None:
        target.type, target.ne, target.nb = t.type, t.ne, t.nb
        target.data = self.ffi.cast("void *", t.array.ctypes.data)

    def run(self, op: str, out: Tensor, *sources: Tensor) -> int:
        described = self.ffi.new("description[]", 1 + len(sources))
        for target, t in zip(described, (out, *sources), strict=True):
            self.describe(target, t)
        code = self.lib.op_class(op.encode())
        assert code >= 0
        status: int = self.lib.run_node(code, described, described + 1, len(sources))
        return status

    def result(self, op: str, shape: Sequence[int], *sources: Tensor, type_name: str = "f32") -> np.ndarray:
        """What a node that must run makes; floats of 16 bits as their bits."""
        out = np.full(shape, 12345, np.float32 if type_name == "f32" else np.uint16)
        assert self.run(op, plain(out, type_name), *sources) == 0
        return out


@pytest.fixture(scope="module")
def device() -> Device:
    return Device()


def check_mul_mat(device: Device, layout: Layout, w: np.ndarray, x: np.ndarray) -> None:
    """``w`` u8 [w3, w2, rows, row bytes] and ``x`` f32 [x3, x2, columns, n], views or not."""
    rows = w.shape[2]
    got = device.result("mul_mat", (*x.shape[:3], rows), matrix(layout, w), plain(x))
    for i3 in range(x.shape[0]):
        for i2 in range(x.shape[1]):
            matching = w[i3 * w.shape[0] // x.shape[0], i2 * w.shape[1] // x.shape[1]]
            check_product(layout, np.ascontiguousarray(matching), np.ascontiguousarray(x[i3, i2]), got[i3, i2])


def some_blocks(
    layout: Layout, shape: tuple[int, ...], blocks: int, rng: np.random.Generator, sane: bool = True
) -> np.ndarray:
    """Blocks, u8 [*shape, blocks * block_bytes], in memory that ends with the word of the last byte, as a device's."""
    made = (sane_blocks if sane else random_blocks)(layout, int(np.prod(shape)), blocks, rng)
    room = np.zeros((made.size + 3) // 4 * 4, np.uint8)
    room[: made.size] = made.reshape(-1)
    return room[: made.size].reshape(*shape, -1)


def some_floats(shape: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
    return activations(int(np.prod(shape)), n, rng).reshape(*shape, n)


# --- MUL_MAT


@by_layout
def test_columns(device: Device, layout: Layout) -> None:
    rng = np.random.default_rng(1)
    w = some_blocks(layout, (1, 1, 5), 2, rng)
    for columns in range(1, 10):
        check_mul_mat(device, layout, w, some_floats((1, 1, columns), 2 * layout.block_weights, rng))


@by_layout
@pytest.mark.parametrize("columns", [1, 3, 9])
def test_batches(device: Device, layout: Layout, columns: int) -> None:
    """As many matrices as there are batches; matrices that serve several; one for all, which makes one product."""
    rng = np.random.default_rng(columns)
    n = layout.block_weights
    for matrices, batches in (((2, 1), (2, 1)), ((1, 2), (3, 4)), ((1, 1), (2, 3)), ((2, 2), (2, 2))):
        check_mul_mat(
            device, layout, some_blocks(layout, (*matrices, 3), 1, rng), some_floats((*batches, columns), n, rng)
        )


@pytest.mark.parametrize("name", ["ccq_t1", "ccq_t2", "ccq_p2_5"])
@pytest.mark.parametrize("columns", [1, 2, 9])
def test_strides(device: Device, name: str, columns: int) -> None:
    """Views: rows, columns and matrices with gaps between them, in another order, and beginning anywhere."""
    layout = by_name(name)
    rng = np.random.default_rng(columns)
    n = layout.block_weights
    w = some_blocks(layout, (2, 3, 7), 4, rng)
    x = some_floats((2, 3, columns + 3), 3 * n, rng)
    one = w[:1, :1, 1:6, layout.block_bytes : 2 * layout.block_bytes]  # a column of blocks
    check_mul_mat(device, layout, one, x[:, :, 2 : 2 + columns, n : 2 * n])
    check_mul_mat(device, layout, one, x[:, :1, :columns, :n])  # evenly spaced but for the last dimension
    check_mul_mat(device, layout, one, x[:1, :, :columns, :n])
    check_mul_mat(device, layout, one, x[:, :, ::2, 1 : 1 + n])
    check_mul_mat(device, layout, w[:, 1:, 2:], np.tile(x, (1, 1, 1, 2))[:, 1:, :columns, : 4 * n])
    swapped = some_floats((2, columns, 3), 4 * n, rng).transpose(0, 2, 1, 3)
    check_mul_mat(device, layout, w.transpose(0, 2, 1, 3)[:, :3], swapped)
    check_mul_mat(device, layout, w[:, :, ::2], some_floats((2, 3, columns), 4 * n, rng))


def test_a_stride_that_no_dimension_of_one_has_counts(device: Device) -> None:
    """nb[2] means nothing where ne[2] is 1, and nb[3] = nb[2] then no even spacing."""
    layout, rng = by_name("ccq_t2"), np.random.default_rng(2)
    w = some_blocks(layout, (1, 1, 3), 1, rng)
    x = some_floats((4, 3), 64, rng)
    nb = [4, 64 * 4, 4 * 3 * 64 * 4 // 2, 4 * 3 * 64 * 4 // 2]
    out = device.result("mul_mat", (2, 1, 3, 3), matrix(layout, w), Tensor(0, [64, 3, 1, 2], nb, x))
    for batch in range(2):
        check_product(layout, w[0, 0], x[2 * batch], out[batch, 0])


# --- MUL_MAT_ID


def check_experts(device: Device, layout: Layout, w: np.ndarray, x: np.ndarray, ids: np.ndarray) -> None:
    """``w`` u8 [experts, rows, row bytes], ``x`` f32 [tokens, experts used or 1, n], ``ids`` i32 [tokens, used]."""
    experts, rows, _ = w.shape
    tokens, used = ids.shape
    got = device.result("mul_mat_id", (tokens, used, rows), matrix(layout, w), plain(x), plain(ids, "i32"))
    inputs = np.broadcast_to(x, (tokens, used, x.shape[2]))
    for expert in range(experts):
        chosen = ids == expert
        if chosen.any():
            check_product(layout, np.ascontiguousarray(w[expert]), inputs[chosen], got[chosen])
    assert np.isnan(got[(ids < 0) | (ids >= experts)]).all()


@by_layout
def test_experts(device: Device, layout: Layout) -> None:
    """One and several tokens, on both sides of where tiles begin to be used; experts that nobody wants; ids that are
    the first of longer rows, as the order of all experts is; an id that no expert has."""
    rng = np.random.default_rng(3)
    experts, used, n = 6, 2, layout.block_weights
    w = some_blocks(layout, (experts, 3), 1, rng)
    for tokens in (1, 3, 8, 9, 41):
        order = np.stack([rng.permutation([0, 1, 3, 5]) for _ in range(tokens)]).astype(np.int32)
        for shared in (False, True):
            x = some_floats((tokens, 1 if shared else used), n, rng)
            check_experts(device, layout, w, x, order[:, :used])
            check_experts(device, layout, w, x, np.ascontiguousarray(order[:, :used]))
    bad = order[:, :used].copy()
    bad[0, 0], bad[-1, 1] = -1, experts
    check_experts(device, layout, w, x, bad)


@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_strides_of_experts(device: Device, tokens: int) -> None:
    layout, rng = by_name("ccq_t3"), np.random.default_rng(tokens)
    w = some_blocks(layout, (5, 6), 3, rng)
    x = some_floats((tokens, 4), 3 * 64, rng)
    ids = rng.integers(0, 4, (tokens, 4)).astype(np.int32)
    check_experts(device, layout, w[1:, 1:5], x, ids)  # matrices with gaps between them
    check_experts(device, layout, w[:, ::2, 25:50], x[:, :, 64:128], ids)  # and rows
    check_experts(device, layout, w, x[:, 2:3], ids)  # tokens' rows far from each other
    check_experts(device, layout, w, x[:, :1], ids[:, 1:2])  # one expert for each


def test_many_experts_and_tiles(device: Device) -> None:
    """More than a tile of columns for one, tiles for many."""
    layout, rng = by_name("ccq_t1_5"), np.random.default_rng(4)
    w = some_blocks(layout, (40, 2), 1, rng)
    ids = np.where(rng.random((75, 3)) < 0.5, 7, rng.integers(0, 40, (75, 3))).astype(np.int32)
    check_experts(device, layout, w, some_floats((75, 1), 64, rng), ids)


# --- GET_ROWS and CPY


@by_layout
def test_get_rows(device: Device, layout: Layout) -> None:
    """Index dimensions choose their matrices; indices with gaps between them; one outside."""
    rng = np.random.default_rng(5)
    w = some_blocks(layout, (2, 3, 5), 2, rng, sane=False)
    n = 2 * layout.block_weights
    weights = np.stack([expected_weights(layout, row) for row in w.reshape(30, -1)]).reshape(2, 3, 5, n)
    rows = rng.integers(0, 5, (2, 3, 6)).astype(np.int32)
    for index, blocks in ((rows, w), (rows[:, :, 1:4], w), (rows[:, 1:, :1], w[:, :2]), (rows[:1, :1], w[1:, 1:2])):
        got = device.result("get_rows", (*index.shape, n), matrix(layout, blocks), plain(index, "i32"))
        offset = (0, 0) if blocks.shape[0] == 2 else (1, 1)
        for i2 in range(index.shape[0]):
            for i1 in range(index.shape[1]):
                want = weights[i2 + offset[0], i1 + offset[1]][index[i2, i1]]
                assert np.array_equal(to_bits(got[i2, i1], "f32"), to_bits(want, "f32"))
    outside = np.array([4, 5, -1], np.int32).reshape(1, 1, 3)
    got = device.result("get_rows", (1, 1, 3, n), matrix(layout, w[:1, :1, :, :]), plain(outside, "i32"))
    assert np.array_equal(to_bits(got[0, 0, 0], "f32"), to_bits(weights[0, 0, 4], "f32"))
    assert np.isnan(got[0, 0, 1:]).all()


def test_more_rows_than_a_grid_has(device: Device) -> None:
    layout, rng = by_name("ccq_t2"), np.random.default_rng(6)
    w = some_blocks(layout, (3,), 1, rng, sane=False)
    weights = to_bits(np.stack([expected_weights(layout, row) for row in w]), "f32")
    rows = rng.integers(0, 3, 65537).astype(np.int32)
    got = device.result("get_rows", (65537, 64), matrix(layout, w), plain(rows, "i32"))
    assert np.array_equal(to_bits(got[-3:], "f32"), weights[rows[-3:]])
    assert np.array_equal(to_bits(got[:2], "f32"), weights[rows[:2]])


@by_layout
@pytest.mark.parametrize("out", ["f32", "f16", "bf16"])
def test_copy(device: Device, layout: Layout, out: str) -> None:
    rng = np.random.default_rng(7)
    w = some_blocks(layout, (2, 3, 2), 2, rng, sane=False)
    for blocks in (w, w[:, ::2, 1:, layout.block_bytes :]):
        flat = np.ascontiguousarray(blocks).reshape(-1, blocks.shape[-1])
        want = to_bits(np.stack([expected_weights(layout, row) for row in flat]), out)
        shape = (*blocks.shape[:3], want.shape[1])
        got = device.result("copy", shape, matrix(layout, blocks), plain(np.zeros(shape, np.float32)), type_name=out)
        assert np.array_equal(got.reshape(want.shape).view(want.dtype), want)


# --- what a GPU cannot run


def test_refusals(device: Device) -> None:
    """Types, strides and counts that no launch is for; nothing is run."""
    layout, rng = by_name("ccq_t2"), np.random.default_rng(8)
    w = matrix(layout, some_blocks(layout, (1, 3), 1, rng))
    x, x16 = plain(np.ones((9, 64), np.float32)), plain(np.ones((9, 64), np.float16), "f16")
    out = plain(np.zeros((9, 3), np.float32))
    assert device.run("mul_mat", out, w, x) == 0
    assert device.run("mul_mat", out, w, x16) == 1
    assert device.run("mul_mat", out, x, w) == 1
    assert device.run("mul_mat", plain(np.zeros((9, 3), np.float16), "f16"), w, x) == 1
    assert device.run("mul_mat", plain(np.zeros((9, 6), np.float32)[:, :3]), w, x) == 1
    assert device.run("mul_mat", out, w, plain(np.ones((64, 9), np.float32).T)) == 1
    transposed = Tensor(w.type, [3, 64], [17, 17], w.array)
    transposed.nb[0] = 51
    assert device.run("mul_mat", out, transposed, x) == 1
    assert device.run("mul_mat", out, w) == 1
    huge = Tensor(0, [64, 1 << 23], [4, 256], x.array)
    assert device.run("mul_mat", Tensor(0, [3, 1 << 23], [4, 12], out.array), w, huge) == 1
    ids = plain(np.zeros((9, 4), np.int32), "i32")
    x3 = plain(np.ones((9, 4, 64), np.float32))
    result = plain(np.zeros((9, 4, 3), np.float32))
    assert device.run("mul_mat_id", result, w, x3, ids) == 0
    assert device.run("mul_mat_id", result, w, x3, plain(np.zeros((9, 4), np.float32))) == 1
    assert device.run("mul_mat_id", result, w, plain(np.ones((9, 2, 64), np.float32)), ids) == 1
    assert device.run("mul_mat_id", result, w, plain(np.ones((9, 8, 64), np.float32)[:, :4]), ids) == 1
    assert device.run("get_rows", out, w, plain(np.zeros(9, np.float32))) == 1
    assert device.run("copy", plain(np.zeros((64, 3), np.float32)), w, plain(np.zeros((64, 3), np.float32))) == 1
    assert device.run("other", out, w, x) == 1
    assert device.run("view", out, w) == 0


def test_nothing_to_compute(device: Device) -> None:
    layout = by_name("ccq_t2")
    w = matrix(layout, np.zeros((1, 3, 17), np.uint8))
    x = Tensor(0, [64, 0], [4, 256, 0, 0], np.zeros(1, np.float32))
    assert device.run("mul_mat", Tensor(0, [3, 0], [4, 12, 0, 0], np.zeros(1, np.float32)), w, x) == 0


@pytest.mark.parametrize("name", ["ccq_t2", "ccq_p2_5"])
def test_all_paths_on_little(device: Device, name: str) -> None:
    """What also runs under sanitizers: scratch memory of each path and layout, and the last bytes of every tensor."""
    layout, rng = by_name(name), np.random.default_rng(9)
    n = layout.block_weights
    w = some_blocks(layout, (2, 2, 3), 1, rng)
    for columns in (1, 3, 9):
        check_mul_mat(device, layout, w, some_floats((2, 2, columns), n, rng))
        check_mul_mat(device, layout, w[:1, :1], some_floats((1, 3, columns), n, rng))
    for tokens in (2, 9):
        order = np.stack([rng.permutation(2) for _ in range(tokens)]).astype(np.int32)
        check_experts(device, layout, w[1], some_floats((tokens, 1), n, rng), order[:, :1])
        check_experts(device, layout, w[1], some_floats((tokens, 2), n, rng), order)
    device.result("get_rows", (2, 2, 1, n), matrix(layout, w), plain(np.full((2, 2, 1), 2, np.int32), "i32"))
    device.result("copy", (2, 2, 3, n), matrix(layout, w), plain(np.zeros((2, 2, 3, n), np.float32)))


def test_with_sanitizers(tmp_path: Path) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer: scratch memory has no byte to spare."""
    cuda_harness.run_sanitized(tmp_path, __file__, "test_all_paths_on_little", (UNIT,))

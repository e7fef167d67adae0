"""Every op that the plugin runs, alone, through ggml's public API: a stock CPU backend, graphs built by ctypes.

The bound of a dot product is that of ``backend/cpu/ACTIVATIONS.md``.  GET_ROWS and CPY must give the decoder's bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from ccq_format import codec, layouts
from support.blocks import IN_GGML

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="runs in llama-cpp-python")
import ccq_backend  # noqa: E402

F32, Q8_0, F16, I32 = 0, 8, 1, 26
P, I64 = ctypes.c_void_p, ctypes.c_int64
ACT_MAX = int(ccq_backend.read_activations(ccq_backend.quantize_activations([[1.0] * 64]), 64)[0].max())
"""The largest magnitude of an activation's integer in the kernel set in use."""
TYPES = [layout.name for layout in IN_GGML]


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (P, [InitParams]),
    "ggml_free": (None, [P]),
    "ggml_new_tensor": (P, [P, ctypes.c_int, ctypes.c_int, P]),
    "ggml_mul_mat": (P, [P, P, P]),
    "ggml_mul_mat_id": (P, [P, P, P, P]),
    "ggml_get_rows": (P, [P, P, P]),
    "ggml_set_rows": (P, [P, P, P, P]),
    "ggml_add": (P, [P, P, P]),
    "ggml_mul": (P, [P, P, P]),
    "ggml_out_prod": (P, [P, P, P]),
    "ggml_cpy": (P, [P, P, P]),
    "ggml_cont": (P, [P, P]),
    "ggml_permute": (P, [P, P, *[ctypes.c_int] * 4]),
    "ggml_view_2d": (P, [P, P, I64, I64, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_view_4d": (P, [P, P, *[I64] * 4, *[ctypes.c_size_t] * 4]),
    "ggml_scale": (P, [P, P, ctypes.c_float]),
    "ggml_scale_inplace": (P, [P, P, ctypes.c_float]),
    "ggml_new_graph": (P, [P]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_get_data": (P, [P]),
    "ggml_nbytes": (ctypes.c_size_t, [P]),
    "ggml_graph_n_nodes": (ctypes.c_int, [P]),
    "ggml_backend_dev_by_type": (P, [ctypes.c_int]),
    "ggml_backend_dev_init": (P, [P, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [P, P]),
    "ggml_backend_free": (None, [P]),
    "ggml_backend_alloc_ctx_tensors": (P, [P, P]),
    "ggml_backend_buffer_free": (None, [P]),
    "ggml_backend_graph_compute": (ctypes.c_int, [P, P]),
    "ggml_backend_graph_plan_create": (P, [P, P]),
    "ggml_backend_graph_plan_compute": (ctypes.c_int, [P, P]),
    "ggml_backend_graph_plan_free": (None, [P, P]),
    "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, ctypes.c_int]),
    "ggml_backend_cpu_set_abort_callback": (None, [P, P, P]),
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, P, P, I64, I64, I64, P]),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
}


class Ggml:
    """ggml's functions with their signatures, resolved as libllama resolves them."""

    def __init__(self) -> None:
        ccq_backend.load_plugin()
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(llama._lib, name)
            # A private prototype: the handle's own attributes are shared with llama_cpp.
            prototype = ctypes.CFUNCTYPE(result, *arguments)
            setattr(self, name.removeprefix("ggml_"), prototype(ctypes.cast(function, P).value))


@pytest.fixture(scope="module")
def ggml() -> Any:
    return Ggml()


class Session:
    """A context, a CPU backend and, once allocated, a buffer."""

    def __init__(self, ggml: Any, threads: int = 1, stock: bool = False) -> None:
        self.ggml = ggml
        self.ctx = ggml.init(InitParams(8 << 20, None, True))
        device = ggml.backend_dev_by_type(0)
        # ggml_backend_cpu_init goes past the device and so past the hooks: the stock code with our table rows.
        self.backend = ggml.backend_cpu_init() if stock else ggml.backend_dev_init(device, None)
        self.threads(threads)
        self.buffer = None

    def threads(self, n: int) -> None:
        self.ggml.backend_cpu_set_n_threads(self.backend, n)

    def tensor(self, type: int, *ne: int) -> Any:
        return self.ggml.new_tensor(self.ctx, type, len(ne), (I64 * len(ne))(*ne))

    def graph(self, *nodes: Any) -> Any:
        graph = self.ggml.new_graph(self.ctx)
        for node in nodes:
            self.ggml.build_forward_expand(graph, node)
        return graph

    def allocate(self) -> None:
        self.buffer = self.ggml.backend_alloc_ctx_tensors(self.ctx, self.backend)
        assert self.buffer

    def put(self, tensor: Any, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array)
        assert self.ggml.nbytes(tensor) == data.nbytes
        ctypes.memmove(self.ggml.get_data(tensor), data.ctypes.data, data.nbytes)

    def get(self, tensor: Any, *shape: int) -> np.ndarray:
        out = np.empty(shape, np.float32)
        assert self.ggml.nbytes(tensor) == out.nbytes
        ctypes.memmove(out.ctypes.data, self.ggml.get_data(tensor), out.nbytes)
        return out

    def compute(self, graph: Any) -> int:
        return self.ggml.backend_graph_compute(self.backend, graph)

    def close(self) -> None:
        if self.buffer:
            self.ggml.backend_buffer_free(self.buffer)
        self.ggml.backend_free(self.backend)
        self.ggml.free(self.ctx)


@pytest.fixture
def session(ggml: Any) -> Iterator[Callable[..., Session]]:
    made: list[Session] = []

    def make(threads: int = 1, stock: bool = False) -> Session:
        made.append(Session(ggml, threads, stock))
        return made[-1]

    yield make
    for s in made:
        s.close()


def random_blocks(name: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """u8 [rows, row_bytes]: any bytes, but with finite parameters of ordinary size."""
    layout = layouts.by_name(name)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // layout.block_weights, layout.block_bytes), dtype=np.uint8)
    if isinstance(layout.code, layouts.TrellisCode):
        blocks[..., 0] = rng.integers(18 * 8, 23 * 8, blocks.shape[:2])
    else:
        blocks[..., :2] = np.array([0, 0x3C], np.uint8)  # bf16 2^-7
    if name == "ccq_p2":
        at = layout.offset("code_scale")
        blocks[..., at : at + 8] = np.array([117.5, 1000.25], "<f4").view(np.uint8)
    return blocks.reshape(rows, -1)


def decoded(name: str, blocks: np.ndarray) -> np.ndarray:
    """float32 [rows, columns], by the numpy decoder."""
    layout = layouts.by_name(name)
    return codec.decode(layout, blocks).reshape(blocks.shape[0], -1)


def bound(w: np.ndarray, x: np.ndarray, stock: bool = False) -> np.ndarray:
    """Largest error of ``x @ w.T`` [columns, rows]: that of ACTIVATIONS.md, or for ``stock`` that of Q8_0."""
    group = 32 if stock else 64
    wg = np.abs(w.astype(np.float64)).reshape(len(w), -1, group)
    xg = np.abs(x.astype(np.float64)).reshape(len(x), -1, group)
    top, weights = xg.max(-1), wg.sum(-1).T
    if stock:  # the scale is kept as a half: off by 2^-11 of itself (or 2^-25), and so is every product
        half_step, additions = top / 127 * (0.5 + 2.0**-12) + top * 2.0**-11 + 127 * 2.0**-25, len(weights) + 40
    else:
        half_step, additions = top / ACT_MAX * (0.5 + 2.0**-7), len(weights) + 9  # one for rounding w itself
    return half_step @ weights + additions * 2.0**-24 * (top @ weights)


def assert_within(got: np.ndarray, w: np.ndarray, x: np.ndarray, stock: bool = False) -> None:
    error = np.abs(got - x.astype(np.float64) @ w.astype(np.float64).T)
    limit = bound(w, x, stock)
    assert (error <= limit).all(), f"{(error / limit).max():.3f} times the bound"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 1), (2, 32), (3, 7), (2, 512)])
def test_mul_mat(session: Callable[..., Session], name: str, threads: int, batch: int) -> None:
    layout, n, rows = layouts.by_name(name), 1024, 75
    s = session(threads)
    blocks = random_blocks(name, rows, n, seed=batch)
    x = np.random.default_rng(1).standard_normal((batch, n)).astype(np.float32) * np.exp(
        np.random.default_rng(2).standard_normal((batch, 1))
    ).astype(np.float32)
    w_tensor, x_tensor = s.tensor(layout.gguf_id, n, rows), s.tensor(F32, n, batch)
    out = s.ggml.mul_mat(s.ctx, w_tensor, x_tensor)
    graph = s.graph(out)
    s.allocate()
    s.put(w_tensor, blocks)
    s.put(x_tensor, x)
    assert s.compute(graph) == 0
    first = s.get(out, batch, rows)
    assert_within(first, decoded(name, blocks), x)
    s.threads(threads + 1)  # the same graph again, with other threads: the same bits
    assert s.compute(graph) == 0
    assert (s.get(out, batch, rows) == first).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_products_of_activations_that_are_kept_exactly(session: Callable[..., Session], name: str, tokens: int) -> None:
    """Integers up to 127 times a power of two lose nothing: the products are right to float32 rounding."""
    layout, n, rows, experts = layouts.by_name(name), 1024, 33, 4
    s = session(2)
    w_tensor, x_tensor = s.tensor(layout.gguf_id, n, rows, experts), s.tensor(F32, n, 1, tokens)
    ids_tensor = s.tensor(I32, 2, tokens)
    one = s.ggml.view_2d(s.ctx, w_tensor, n, rows, layout.row_bytes(n), 0)
    all_tokens = s.ggml.view_2d(s.ctx, x_tensor, n, tokens, 4 * n, 0)
    dense = s.ggml.mul_mat(s.ctx, one, all_tokens)
    chosen = s.ggml.mul_mat_id(s.ctx, w_tensor, x_tensor, ids_tensor)
    graph = s.graph(dense, chosen)
    s.allocate()
    rng = np.random.default_rng(20)
    x = rng.integers(-127, 128, (tokens, n)).astype(np.float32)
    x[:, ::8] = 127
    x *= 2.0 ** rng.integers(-9, 3, (tokens, 1)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:2] for _ in range(tokens)]).astype(np.int32)
    blocks = random_blocks(name, rows * experts, n, seed=21)
    s.put(w_tensor, blocks)
    s.put(x_tensor, x)
    s.put(ids_tensor, ids)
    assert s.compute(graph) == 0
    w = decoded(name, blocks).reshape(experts, rows, n).astype(np.float64)
    for got, used in ((s.get(dense, tokens, rows), w[:1].repeat(tokens, 0)),
                      (s.get(chosen, tokens, 2, rows)[:, 1], w[ids[:, 1]])):  # fmt: skip
        error = np.abs(got - np.einsum("trn,tn->tr", used, x))
        assert (error <= (n // 64 + 9) * 2.0**-24 * np.einsum("trn,tn->tr", np.abs(used), np.abs(x))).all()


@pytest.mark.parametrize("name", ["ccq_t2", "ccq_t1_5", "ccq_p2"])
@pytest.mark.parametrize(("r2", "r3", "threads"), [(1, 1, 2), (3, 1, 1), (3, 2, 2), (1, 2, 2)])
def test_mul_mat_broadcast_and_strided(
    session: Callable[..., Session], name: str, r2: int, r3: int, threads: int
) -> None:
    """Weights shared by several matrices, and activations that lie in memory with gaps and permuted dimensions."""
    layout, n, rows, columns, m2, m3 = layouts.by_name(name), 512, 21, 5, 2, 2
    s = session(threads)
    w_tensor = s.tensor(layout.gguf_id, n, rows, m2, m3)
    wide = s.tensor(F32, n + 64, m2 * r2, columns, m3 * r3)  # dims 1 and 2 swapped, rows with a tail
    nb = 4 * (n + 64)
    whole = s.ggml.view_4d(s.ctx, wide, n, m2 * r2, columns, m3 * r3, nb, nb * m2 * r2, nb * m2 * r2 * columns, 4 * 32)
    view = s.ggml.permute(s.ctx, whole, 0, 2, 1, 3)
    out = s.ggml.mul_mat(s.ctx, w_tensor, view)
    graph = s.graph(out)
    s.allocate()
    blocks = random_blocks(name, rows * m2 * m3, n, seed=3)
    x = np.random.default_rng(4).standard_normal((m3 * r3, columns, m2 * r2, n + 64)).astype(np.float32)
    s.put(w_tensor, blocks)
    s.put(wide, x)
    assert s.compute(graph) == 0
    got = s.get(out, m3 * r3, m2 * r2, columns, rows)
    w = decoded(name, blocks).reshape(m3, m2, rows, n)
    for i3, i2 in product(range(m3 * r3), range(m2 * r2)):
        assert_within(got[i3, i2], w[i3 // r3, i2 // r2], x[i3, :, i2, 32 : 32 + n])


@pytest.mark.parametrize("name", ["ccq_t2_5", "ccq_p2_5"])
def test_mul_mat_transposed_activations(session: Callable[..., Session], name: str) -> None:
    """A source whose values are not adjacent: stock code refuses it, the plugin gathers."""
    layout, n, rows, columns = layouts.by_name(name), 512, 9, 4
    s = session(2)
    w_tensor, across = s.tensor(layout.gguf_id, n, rows), s.tensor(F32, columns, n)
    out = s.ggml.mul_mat(s.ctx, w_tensor, s.ggml.permute(s.ctx, across, 1, 0, 2, 3))
    graph = s.graph(out)
    s.allocate()
    blocks = random_blocks(name, rows, n, seed=5)
    x = np.random.default_rng(6).standard_normal((n, columns)).astype(np.float32)
    s.put(w_tensor, blocks)
    s.put(across, x)
    assert s.compute(graph) == 0
    assert_within(s.get(out, columns, rows), decoded(name, blocks), np.ascontiguousarray(x.T))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("threads", "tokens", "used", "per_slot"),
    [(1, 1, 2, False), (2, 1, 3, True), (2, 32, 2, False), (3, 33, 2, True), (2, 400, 2, False)],
)
def test_mul_mat_id(
    session: Callable[..., Session], name: str, threads: int, tokens: int, used: int, per_slot: bool
) -> None:
    """Experts: one that no token chose, one with more tokens than are multiplied at once, ids inside a wider tensor."""
    layout, n, rows, experts = layouts.by_name(name), 512, 70, 6
    s = session(threads)
    w_tensor = s.tensor(layout.gguf_id, n, rows, experts)
    x_tensor = s.tensor(F32, n, used if per_slot else 1, tokens)
    sorted_ids = s.tensor(I32, experts, tokens)  # as llama.cpp: the first `used` of every token's ranking
    ids_tensor = s.ggml.view_2d(s.ctx, sorted_ids, used, tokens, 4 * experts, 0)
    out = s.ggml.mul_mat_id(s.ctx, w_tensor, x_tensor, ids_tensor)
    graph = s.graph(out)
    s.allocate()
    rng = np.random.default_rng(7)
    blocks = random_blocks(name, rows * experts, n, seed=8)
    x = rng.standard_normal((tokens, used if per_slot else 1, n)).astype(np.float32)
    ids = np.stack([np.concatenate([[1], rng.permutation([0, 2, 4, 5]), [3]]) for _ in range(tokens)]).astype(np.int32)
    s.put(w_tensor, blocks)
    s.put(x_tensor, x)
    s.put(sorted_ids, ids)
    assert s.compute(graph) == 0
    got = s.get(out, tokens, used, rows)
    w = decoded(name, blocks).reshape(experts, rows, n)
    for slot in range(used):
        for expert in range(experts):
            chosen = np.flatnonzero(ids[:, slot] == expert)
            if len(chosen):
                assert_within(got[chosen, slot], w[expert], x[chosen, slot if per_slot else 0])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_get_rows(session: Callable[..., Session], name: str, threads: int) -> None:
    layout, n, rows, matrices = layouts.by_name(name), 1536, 11, 3
    s = session(threads)
    w_tensor, ids_tensor = s.tensor(layout.gguf_id, n, rows, matrices), s.tensor(I32, 4, matrices)
    out = s.ggml.get_rows(s.ctx, w_tensor, ids_tensor)
    graph = s.graph(out)
    s.allocate()
    blocks = random_blocks(name, rows * matrices, n, seed=9)
    ids = np.array([[0, 10, 3, 3], [5, 5, 0, 1], [10, 9, 8, 7]], np.int32)
    s.put(w_tensor, blocks)
    s.put(ids_tensor, ids)
    assert s.compute(graph) == 0
    w = decoded(name, blocks).reshape(matrices, rows, n)
    expected = np.stack([w[m, ids[m]] for m in range(matrices)])
    assert s.get(out, matrices, 4, n).tobytes() == expected.tobytes()


def test_arbitrary_bytes_give_the_decoders_bits(session: Callable[..., Session]) -> None:
    """Blocks with NaN and infinite parameters: GET_ROWS gives what the specification says, NaN for NaN."""
    for name in TYPES:
        layout, n, rows = layouts.by_name(name), 512, 64
        s = session()
        w_tensor, ids_tensor = s.tensor(layout.gguf_id, n, rows), s.tensor(I32, rows)
        out = s.ggml.get_rows(s.ctx, w_tensor, ids_tensor)
        graph = s.graph(out)
        s.allocate()
        row_bytes = layout.row_bytes(n)
        blocks = np.random.default_rng(10).integers(0, 256, (rows, row_bytes), dtype=np.uint8)
        blocks[:, 1] |= 0x7F  # in the P types the sign-and-exponent byte of super_scale
        blocks[::2, 0] |= 0x80
        s.put(w_tensor, blocks)
        s.put(ids_tensor, np.arange(rows, dtype=np.int32))
        assert s.compute(graph) == 0
        assert s.get(out, rows, n).tobytes() == decoded(name, blocks).tobytes(), name


@pytest.mark.parametrize("name", TYPES)
def test_stock_code_without_hooks(session: Callable[..., Session], name: str) -> None:
    """The table rows alone: a backend made past the device runs MUL_MAT and MUL_MAT_ID through Q8_0 activations."""
    layout, n, rows, batch = layouts.by_name(name), 1536, 40, 5
    s = session(2, stock=True)
    w_tensor, x_tensor = s.tensor(layout.gguf_id, n, rows, 2), s.tensor(F32, n, batch, 2)
    tokens, ids_tensor = s.tensor(F32, n, 1, 2 * batch), s.tensor(I32, 1, 2 * batch)
    out = s.ggml.mul_mat(s.ctx, w_tensor, x_tensor)
    chosen = s.ggml.mul_mat_id(s.ctx, w_tensor, tokens, ids_tensor)
    graph = s.graph(out, chosen)
    s.allocate()
    blocks = random_blocks(name, 2 * rows, n, seed=11)
    x = np.random.default_rng(12).standard_normal((2, batch, n)).astype(np.float32)
    s.put(w_tensor, blocks)
    s.put(x_tensor, x)
    s.put(tokens, x)
    s.put(ids_tensor, np.repeat([0, 1], batch).astype(np.int32))
    assert s.compute(graph) == 0
    w = decoded(name, blocks).reshape(2, rows, n)
    for got in (s.get(out, 2, batch, rows), s.get(chosen, 2, batch, rows)):
        for m in range(2):
            assert_within(got[m], w[m], x[m], stock=True)


def test_cpy_to_float(session: Callable[..., Session]) -> None:
    for name in TYPES:
        layout, n, rows = layouts.by_name(name), 1024, 6
        s = session(2)
        w_tensor, flat = s.tensor(layout.gguf_id, n, rows), s.tensor(F32, n, rows)
        out = s.ggml.cpy(s.ctx, w_tensor, flat)
        graph = s.graph(out)
        s.allocate()
        blocks = random_blocks(name, rows, n, seed=13)
        s.put(w_tensor, blocks)
        assert s.ggml.backend_dev_supports_op(s.ggml.backend_dev_by_type(0), out)
        assert s.compute(graph) == 0
        assert s.get(flat, rows, n).tobytes() == decoded(name, blocks).tobytes(), name


@pytest.mark.parametrize("name", TYPES)
def test_supports_op_says_no_where_stock_code_would_abort(session: Callable[..., Session], name: str) -> None:
    layout, n = layouts.by_name(name), 512
    s = session()
    ggml, ctx = s.ggml, s.ctx
    device = ggml.backend_dev_by_type(0)
    ours, floats, halves = s.tensor(layout.gguf_id, n, 4), s.tensor(F32, n, 4), s.tensor(F16, n, 4)
    experts, ids, rows = s.tensor(layout.gguf_id, n, 4, 2), s.tensor(I32, 1, 4), s.tensor(I32, 3)
    tokens, q8 = s.tensor(F32, n, 1, 4), s.tensor(Q8_0, n, 4)
    yes = {
        "mul_mat": ggml.mul_mat(ctx, ours, floats),
        "mul_mat q8_0": ggml.mul_mat(ctx, ours, q8),
        "mul_mat_id": ggml.mul_mat_id(ctx, experts, tokens, ids),
        "get_rows": ggml.get_rows(ctx, ours, rows),
        "view": ggml.view_2d(ctx, ours, n, 2, layout.row_bytes(n), 0),
        "permute": ggml.permute(ctx, ours, 0, 2, 1, 3),
        "a norm's weights": ggml.mul(ctx, floats, floats),
    }
    no = {
        "mul_mat f16": ggml.mul_mat(ctx, ours, halves),
        "src1 ours": ggml.mul_mat(ctx, floats, ours),
        "add": ggml.add(ctx, ours, floats),
        "mul, second source": ggml.mul(ctx, floats, ours),
        "out_prod": ggml.out_prod(ctx, ours, floats),
        "cpy into ours": ggml.cpy(ctx, floats, ours),
        "cpy to f16": ggml.cpy(ctx, ours, halves),
        "cont": ggml.cont(ctx, ours),
        "scale": ggml.scale(ctx, ours, 2.0),
        "set_rows": ggml.set_rows(ctx, ours, floats, s.tensor(27, 4)),
    }
    assert {k: ggml.backend_dev_supports_op(device, v) for k, v in yes.items()} == dict.fromkeys(yes, True)
    assert {k: ggml.backend_dev_supports_op(device, v) for k, v in no.items()} == dict.fromkeys(no, False)


def test_shared_activations_are_quantized_again_after_a_write(session: Callable[..., Session]) -> None:
    """Two products of one tensor share its quantized form, unless a node in between writes to its memory."""
    layout, n, rows, batch = layouts.by_name("ccq_t2"), 256, 16, 3
    s = session(2)
    a_tensor, b_tensor = s.tensor(layout.gguf_id, n, rows), s.tensor(layout.gguf_id, n, rows)
    x_tensor = s.tensor(F32, n, batch)
    first = s.ggml.mul_mat(s.ctx, a_tensor, x_tensor)
    shared = s.ggml.mul_mat(s.ctx, b_tensor, x_tensor)
    halved = s.ggml.scale_inplace(s.ctx, x_tensor, 0.25)
    after = s.ggml.mul_mat(s.ctx, b_tensor, halved)
    graph = s.graph(first, shared, after)
    s.allocate()
    a, b = random_blocks("ccq_t2", rows, n, seed=14), random_blocks("ccq_t2", rows, n, seed=15)
    x = np.random.default_rng(16).standard_normal((batch, n)).astype(np.float32)
    s.put(a_tensor, a)
    s.put(b_tensor, b)
    s.put(x_tensor, x)
    assert s.compute(graph) == 0
    assert_within(s.get(first, batch, rows), decoded("ccq_t2", a), x)
    assert_within(s.get(shared, batch, rows), decoded("ccq_t2", b), x)
    assert_within(s.get(after, batch, rows), decoded("ccq_t2", b), x * np.float32(0.25))


def test_a_product_without_rows_prepares_nothing(session: Callable[..., Session]) -> None:
    """ggml skips it, and with it what was to quantize the activations for those behind."""
    rng = np.random.default_rng(4)
    s = session(1)
    others, x = s.tensor(F32, 1024, 4), s.tensor(F32, 1024, 4)
    type_id = layouts.by_name("ccq_t2").gguf_id
    w, none = s.tensor(type_id, 1024, 64), s.tensor(type_id, 1024, 0)
    before, behind, alone = (s.ggml.mul_mat(s.ctx, w, y) for y in (others, x, x))
    graphs = s.graph(before), s.graph(s.ggml.mul_mat(s.ctx, none, x), behind), s.graph(alone)
    s.allocate()
    blocks = rng.integers(0, 256, (64, 16, 17), dtype=np.uint8)
    blocks[..., 0] = 160
    s.put(w, blocks)
    for y in (others, x):
        s.put(y, rng.standard_normal((4, 1024)).astype(np.float32))
    assert [s.compute(graph) for graph in graphs] == [0, 0, 0]
    assert np.array_equal(s.get(behind, 4, 64), s.get(alone, 4, 64))


def test_graph_plans(session: Callable[..., Session]) -> None:
    """ggml's other way to run a graph: planned once, computed often, beside ordinary graphs of the same backend."""
    layout, n, rows = layouts.by_name("ccq_t3"), 256, 8
    s = session(2)
    w_tensor, ids_tensor, x_tensor = s.tensor(layout.gguf_id, n, rows), s.tensor(I32, 2), s.tensor(F32, n, 1)
    picked, out = s.ggml.get_rows(s.ctx, w_tensor, ids_tensor), s.ggml.mul_mat(s.ctx, w_tensor, x_tensor)
    planned, other = s.graph(picked, out), s.graph(s.ggml.get_rows(s.ctx, w_tensor, ids_tensor))
    s.allocate()
    blocks = random_blocks("ccq_t3", rows, n, seed=17)
    x = np.random.default_rng(18).standard_normal((1, n)).astype(np.float32)
    s.put(w_tensor, blocks)
    s.put(x_tensor, x)
    w = decoded("ccq_t3", blocks)
    plan = s.ggml.backend_graph_plan_create(s.backend, planned)
    for ids in ([1, 7], [0, 0]):
        s.put(ids_tensor, np.array(ids, np.int32))
        assert s.compute(other) == 0
        assert s.ggml.backend_graph_plan_compute(s.backend, plan) == 0
        assert s.get(picked, 2, n).tobytes() == w[ids].tobytes()
        assert_within(s.get(out, 1, rows), w, x)
    s.ggml.backend_graph_plan_free(s.backend, plan)


def test_bad_indices_fail_the_graph(session: Callable[..., Session], capfd: pytest.CaptureFixture[str]) -> None:
    layout, n = layouts.by_name("ccq_t2"), 256
    s = session(2)
    w_tensor, rows = s.tensor(layout.gguf_id, n, 8, 2), s.tensor(I32, 2, 2)
    ids, x_tensor = s.tensor(I32, 1, 3), s.tensor(F32, n, 1, 3)
    picks, experts = (
        s.graph(s.ggml.get_rows(s.ctx, w_tensor, rows)),
        s.graph(s.ggml.mul_mat_id(s.ctx, w_tensor, x_tensor, ids)),
    )
    s.allocate()
    for bad, status in ((8, -1), (-1, -1), (7, 0)):
        s.put(rows, np.array([[0, 1], [bad, 2]], np.int32))
        assert s.compute(picks) == status
    for bad, status in ((2, -1), (-1, -1), (1, 0)):
        s.put(ids, np.array([[0], [bad], [1]], np.int32))
        assert s.compute(experts) == status
    assert "out of range" in capfd.readouterr().err


def test_backends_side_by_side(session: Callable[..., Session]) -> None:
    """Two backends computing at the same time keep their workspaces apart."""
    from concurrent.futures import ThreadPoolExecutor

    layout, n, rows = layouts.by_name("ccq_t2"), 1024, 256
    blocks = random_blocks("ccq_t2", rows, n, seed=19)
    w = decoded("ccq_t2", blocks)

    def work(seed: int) -> None:
        s = session(1)
        x = np.random.default_rng(seed).standard_normal((4, n)).astype(np.float32)
        w_tensor, x_tensor = s.tensor(layout.gguf_id, n, rows), s.tensor(F32, n, 4)
        out = s.ggml.mul_mat(s.ctx, w_tensor, x_tensor)
        graph = s.graph(out)
        s.allocate()
        s.put(w_tensor, blocks)
        s.put(x_tensor, x)
        for _ in range(200):
            assert s.compute(graph) == 0
        assert_within(s.get(out, 4, rows), w, x)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_abort_callback_is_the_stock_one(session: Callable[..., Session]) -> None:
    """An abort asked for by the caller stops a rewritten graph as it stops any other."""
    layout, n = layouts.by_name("ccq_t2"), 256
    s = session(1)
    w_tensor, x_tensor = s.tensor(layout.gguf_id, n, 8), s.tensor(F32, n, 1)
    graph = s.graph(s.ggml.mul_mat(s.ctx, w_tensor, x_tensor), s.ggml.mul_mat(s.ctx, w_tensor, x_tensor))
    s.allocate()
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, P)(lambda data: True)
    s.ggml.backend_cpu_set_abort_callback(s.backend, ctypes.cast(callback, P), None)
    assert s.compute(graph) == 1  # GGML_STATUS_ABORTED
    s.ggml.backend_cpu_set_abort_callback(s.backend, None, None)
    assert s.compute(graph) == 0

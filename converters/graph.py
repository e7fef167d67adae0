"""Look at the nodes of a graph while llama.cpp evaluates it, or change them (``cb_eval`` of ``llama_context_params``).

ggml has no functions that return an op, a shape, strides or sources, so these are read from ``struct ggml_tensor``.
It is declared here as in ggml 0.25 to 0.27 (llama-cpp-python 0.3.36 has 0.25.3), and nothing is believed because it is
written here: :class:`Ggml` builds a few tensors through the public functions and refuses a library that lays them out
differently.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ccq_format.errors import EvalError

_MAX_SRC = 10
_MEMORY = 1 << 16


class Node(ctypes.Structure):
    """``struct ggml_tensor``: a tensor of a graph.  ``ne`` are its dimensions, the innermost first, and ``nb`` their
    strides in bytes."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The ggml that ``library``, the handle of libllama, uses.  ``mul_mat``, ``mul_mat_id`` and ``get_rows`` are its op
    numbers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises ``EvalError`` if this ggml lacks a function or lays out tensors in another way."""
        pointer, number = ctypes.c_void_p, ctypes.c_int
        signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "ggml_init": (pointer, (_InitParams,)),
            "ggml_free": (None, (pointer,)),
            "ggml_tensor_overhead": (ctypes.c_size_t, ()),
            "ggml_new_tensor_4d": (pointer, (pointer, number, *[ctypes.c_int64] * 4)),
            "ggml_permute": (pointer, (pointer, pointer, *[number] * 4)),
            "ggml_set_name": (pointer, (pointer, ctypes.c_char_p)),
            "ggml_mul_mat": (pointer, (pointer,) * 3),
            "ggml_mul_mat_id": (pointer, (pointer,) * 4),
            "ggml_get_rows": (pointer, (pointer,) * 3),
            "ggml_op_name": (ctypes.c_char_p, (number,)),
            "ggml_type_name": (ctypes.c_char_p, (number,)),
            "ggml_nbytes": (ctypes.c_size_t, (pointer,)),
            "ggml_backend_buffer_is_host": (ctypes.c_bool, (pointer,)),
            "ggml_backend_tensor_get": (None, (pointer, pointer, ctypes.c_size_t, ctypes.c_size_t)),
            "ggml_backend_tensor_set": (None, (pointer, pointer, ctypes.c_size_t, ctypes.c_size_t)),
        }
        self._call: dict[str, Any] = {}
        for name, (result, arguments) in signatures.items():
            try:
                # A prototype of our own: attributes of the shared handle belong to llama_cpp.
                self._call[name] = ctypes.CFUNCTYPE(result, *arguments)((name, library))
            except AttributeError:
                raise EvalError(f"this llama.cpp has no function {name}") from None
        self.mul_mat, self.mul_mat_id, self.get_rows = self._check_layout()

    def _check_layout(self) -> tuple[int, int, int]:
        """Op numbers of MUL_MAT, MUL_MAT_ID and GET_ROWS, after every field that is read was seen to be right."""
        call = self._call
        f32, i32 = (self._type_number(name) for name in ("f32", "i32"))
        context = call["ggml_init"](_InitParams(_MEMORY, None, True))
        if not context:
            raise EvalError("ggml_init failed")
        try:

            def new(type: int, *ne: int) -> int:
                return int(call["ggml_new_tensor_4d"](context, type, *ne))

            w, x = new(f32, 128, 6, 4, 2), new(f32, 128, 3, 4, 2)
            experts, tokens, ids = new(f32, 128, 6, 4, 1), new(f32, 128, 1, 5, 1), new(i32, 2, 5, 1, 1)
            call["ggml_set_name"](w, b"ccq check")
            permuted = Node.from_address(call["ggml_permute"](context, x, 0, 2, 1, 3))
            product = Node.from_address(call["ggml_mul_mat"](context, w, x))
            chosen = Node.from_address(call["ggml_mul_mat_id"](context, experts, tokens, ids))
            places = new(i32, 5, 1, 1, 1)
            rows = Node.from_address(call["ggml_get_rows"](context, new(f32, 128, 6, 1, 1), places))
            weight = Node.from_address(w)
            # An object's header of 32 bytes comes before each tensor (struct ggml_object).
            good = (
                call["ggml_tensor_overhead"]() == 32 + ctypes.sizeof(Node)
                and (list(weight.ne), list(weight.nb)) == ([128, 6, 4, 2], [4, 512, 3072, 12288])
                and (weight.name, weight.type, weight.buffer, weight.data) == (b"ccq check", f32, None, None)
                and (list(permuted.ne), list(permuted.nb)) == ([128, 4, 3, 2], [4, 1536, 512, 6144])
                and (permuted.view_src, permuted.view_offs, permuted.src[0]) == (x, 0, x)
                and (product.src[0], product.src[1], product.src[2]) == (w, x, None)
                and (chosen.src[0], chosen.src[1], chosen.src[2]) == (experts, tokens, ids)
                and call["ggml_op_name"](weight.op) == b"NONE"
                and call["ggml_op_name"](product.op) == b"MUL_MAT"
                and call["ggml_op_name"](chosen.op) == b"MUL_MAT_ID"
                and call["ggml_op_name"](rows.op) == b"GET_ROWS"
                and (rows.src[1], list(rows.ne)) == (places, [128, 5, 1, 1])
            )
            if not good:
                raise EvalError("this llama.cpp lays out tensors in another way than ggml 0.25 to 0.27")
            return product.op, chosen.op, rows.op
        finally:
            call["ggml_free"](context)

    def _type_number(self, name: str) -> int:
        for number in range(64):
            if self.type_name(number) == name:
                return number
        raise EvalError(f"this llama.cpp has no type {name}")

    def type_name(self, number: int) -> str:
        """Name of a ``ggml_type``, in lower case; ``""`` for none."""
        name: bytes | None = self._call["ggml_type_name"](number)
        return (name or b"").decode().lower()

    def values(self, address: int) -> NDArray[Any] | None:
        """The values of a computed tensor: an array of its four dimensions, the innermost last, any strides.

        float32, float16 or int32; ``None`` for other types.  It may lie in ggml's own memory, which is used again as
        soon as the evaluation goes on.
        """
        node = Node.from_address(address)
        dtype = {"f32": np.float32, "f16": np.float16, "i32": np.int32}.get(self.type_name(node.type))
        if dtype is None:
            return None
        nbytes = int(self._call["ggml_nbytes"](address))  # from the first value to the last, gaps included
        if self._call["ggml_backend_buffer_is_host"](node.buffer):
            memory = (ctypes.c_uint8 * nbytes).from_address(node.data)
        else:
            memory = (ctypes.c_uint8 * nbytes)()
            self._call["ggml_backend_tensor_get"](address, memory, 0, nbytes)
        flat: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype)
        return as_strided(flat, tuple(node.ne)[::-1], tuple(node.nb)[::-1], writeable=False)

    def replace(self, address: int, values: NDArray[np.float32]) -> None:
        """Give a computed float32 tensor without gaps other values, of the shape that :meth:`values` has."""
        node = Node.from_address(address)
        nbytes = int(self._call["ggml_nbytes"](address))
        data = np.ascontiguousarray(values, np.float32)
        if self.type_name(node.type) != "f32" or data.nbytes != nbytes or data.shape != tuple(node.ne)[::-1]:
            raise EvalError(f"a tensor of {list(node.ne)} cannot take values of the shape {data.shape}")
        self._call["ggml_backend_tensor_set"](address, data.ctypes.data, 0, nbytes)

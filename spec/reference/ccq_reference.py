"""Reference decoder of the CCQ tensor types: sections 5, 6 and 8 of ``spec/ccq.md`` as a program.

It is written for reading next to the specification, in its order; each comment that starts with ``# >`` is a sentence
of the specification, word for word, and the code under it is that sentence.  Only the standard library is used and
nothing of the rest of the project: the constants below are typed by hand, so that a mistake in the project's own table
cannot agree with itself.  Speed is no aim.

A weight is returned as its float32 bit pattern, an ``int`` from 0 to 0xFFFFFFFF: bits are what the specification fixes,
and a list of floats could hide the sign of a zero or the payload of a NaN.

    python ccq_reference.py TYPE < blocks.bin       # one weight a line: bits in hexadecimal, value in decimal
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable

# --- section 2: float32 arithmetic ----------------------------------------------------------------------------------
#
# Python has binary64 only.  A float32 is held in a Python float; an operation is done in binary64 and its result then
# rounded to float32.  Rounding twice could differ from rounding once; here it cannot:
#
# * a * b: the significands have 24 bits each, so the exact product has at most 48, fewer than the 53 of binary64, and
#   its exponent (between 2^-298 and 2^256) is far inside binary64's range.  The binary64 product is exact; only the
#   second rounding, to float32 (subnormal results included), rounds.
# * a + b with |a| >= |b| > 0 and 2^e <= |a| < 2^(e+1).  Both are multiples of 2^-149, so nothing underflows.  If the
#   exact sum has at most 53 significant bits, it is exact in binary64, as above.  Otherwise its lowest bit, 2^l, is at
#   or above the lowest bit of b and at least 53 places below its highest, which is at most 2^(e+1): l <= e - 52.  b has
#   24 bits from there on, so |b| < 2^(l+24) <= 2^(e-28).  The points where rounding to float32 changes its mind, midway
#   between a and its neighbours, are at least 2^(e-25) away from a.  a - 2^(e-28) and a + 2^(e-28) are binary64
#   numbers, and rounding is monotone, so the binary64 sum lies between them, as the exact sum does: both round to a.
#
# This is the known result that double rounding is innocuous for + - * / if the wide format has at least 2 p + 2 bits
# (S. Figueroa, 1995): p = 24, and 53 >= 50.

NAN_BITS = 0x7FC00000


def f32(x: float) -> float:
    """``x`` rounded to float32, to nearest, ties to even; magnitudes beyond the largest float32 become infinite."""
    if math.isnan(x) or math.isinf(x):
        return x
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:  # how struct says that the nearest float32 is infinite
        return math.copysign(math.inf, x)
    return rounded


def mul(a: float, b: float) -> float:
    """float32 product.  Python's binary64 * never raises: 0 * inf is NaN."""
    return f32(a * b)


def add(a: float, b: float) -> float:
    """float32 sum."""
    return f32(a + b)


def bits(x: float) -> int:
    """Bit pattern of a float32 value; every NaN is the one of section 2."""
    # > NaN, where a decoder returns one, is the quiet NaN with the bits 0x7FC00000.
    if math.isnan(x):
        return NAN_BITS
    pattern: int = struct.unpack("<I", struct.pack("<f", x))[0]
    return pattern


def read_f32(data: bytes, at: int) -> float:
    """The float32 at byte ``at``."""
    value: float = struct.unpack_from("<f", data, at)[0]
    return value


def read_bf16(data: bytes, at: int) -> float:
    """The bfloat16 at byte ``at``."""
    # > bfloat16: the upper 16 bits of a float32 whose lower 16 bits are zero; converting it to float32 is exact.
    return read_f32(b"\0\0" + data[at : at + 2], 0)


def read_u16(data: bytes, at: int) -> int:
    """The uint16 at byte ``at``."""
    return data[at] | data[at + 1] << 8


# --- section 5: T types ---------------------------------------------------------------------------------------------

STRIDES = {"ccq_t1": (1,), "ccq_t1_5": (1, 2), "ccq_t2": (2,), "ccq_t2_5": (2, 3), "ccq_t3": (3,)}
STEPS = {"ccq_t1": 128, "ccq_t1_5": 64, "ccq_t2": 64, "ccq_t2_5": 64, "ccq_t3": 64}
CODE_BITS = {"ccq_t1": 128, "ccq_t1_5": 96, "ccq_t2": 128, "ccq_t2_5": 160, "ccq_t3": 192}  # n
MULTIPLIER = {"ccq_t1": 22219, "ccq_t1_5": 22219, "ccq_t2": 17177, "ccq_t2_5": 14633, "ccq_t3": 17993}  # M
WINDOW_BITS = 12  # L
SCALE_BIAS = 30  # K


def windows(name: str, codes: bytes) -> list[int]:
    """The window values u_t of one block's code bytes."""
    n = CODE_BITS[name]

    # > Bit k of the bit string is bit (k mod 8) of code byte floor(k / 8); bit indices are taken modulo n, the number
    # > of code bits, so that the string is a cycle.
    def bit(k: int) -> int:
        k %= n
        return codes[k // 8] >> (k % 8) & 1

    # > The window of weight t starts at bit o_t, where o_0 = 0 and o_(t+1) = o_t + stride_t; stride_t is the entry of
    # > the list of strides at index t modulo the length of the list.
    starts, o = [], 0
    for t in range(STEPS[name]):
        starts.append(o)
        o += STRIDES[name][t % len(STRIDES[name])]

    # > The value of the window is u_t, the sum of bit (o_t + i) times 2^i for i from 0 to L - 1.
    return [sum(bit(o + i) << i for i in range(WINDOW_BITS)) for o in starts]


def trellis_hash(name: str, u: int) -> int:
    """Hash of a window value."""
    # > The hash is h_t = (u_t * M) mod 2^16.
    return u * MULTIPLIER[name] % 65536


def level(h: int) -> int:
    """Level of a hash."""
    # > The level is v_t = (h_t & 127) + ((h_t >> 8) & 127) - 127, an integer from -127 to 127.
    return (h & 127) + (h >> 8 & 127) - 127


def trellis_scale(b: int) -> float:
    """Value of a scale byte."""
    # > The scale byte b says: if b is 0, the scale is 0 and every weight of the block is +0; otherwise the scale is
    # > (8 + (b & 7)) * 2^((b >> 3) - K).
    return 0.0 if b == 0 else math.ldexp(8 + (b & 7), (b >> 3) - SCALE_BIAS)


def decode_trellis(name: str, block: bytes) -> list[int]:
    """All weights of one block of a T type."""
    if block[0] == 0:
        return [0] * STEPS[name]
    scale = trellis_scale(block[0])
    # > Weight t of the block is scale * float32(v_t), which is exact in float32; a level of 0 gives +0.
    return [bits(mul(scale, float(level(trellis_hash(name, u))))) for u in windows(name, block[1:])]


# --- section 6: P types ---------------------------------------------------------------------------------------------


def p2_state(c: int, code_scale: float, code_zp: float) -> int:
    """State of a code byte of CCQ_P2."""
    # > The state of a `CCQ_P2` code byte c is found in float32: s = floor((float32(c) * code_scale + code_zp) + 0.5),
    # > where the multiplication and each addition is one operation.
    s = add(add(mul(float(c), code_scale), code_zp), 0.5)
    # > If s is NaN, below -2^31, or 2^31 or above, the state is 0; otherwise it is s as an int32.
    if math.isnan(s) or math.isinf(s):
        return 0
    state = math.floor(s)
    return state if -(2**31) <= state < 2**31 else 0


def p2_group(block: bytes, g: int) -> tuple[int, list[int]]:
    """Local scale and 64 integers of group ``g`` of a CCQ_P2 block."""
    code_scale, code_zp = read_f32(block, 2), read_f32(block, 6)
    scales, codes = block[10:14], block[14:142]
    # > In `CCQ_P2`, group g takes code bytes 16 * g to 16 * g + 15; its byte j holds weights 4 * j to 4 * j + 3.
    integers = []
    for c in codes[16 * g : 16 * g + 16]:
        state = p2_state(c, code_scale, code_zp)
        # > The integer of weight i of a code word is ((state >> shift_i) & mask) - zero point; for `CCQ_P2_5` and
        # > `CCQ_P2_75` the state is the code word itself.
        integers += [(state >> shift & 0x3F) - 32 for shift in (9, 6, 3, 0)]
    # > The local scale of group g is a nibble of `scales` byte floor(g / 2): the HIGH nibble (bits 4 to 7) if g is
    # > even, the LOW nibble if g is odd.
    pair = scales[g // 2]
    return (pair >> 4 if g % 2 == 0 else pair & 15), integers


def p2_5_group(block: bytes, g: int) -> tuple[int, list[int]]:
    """Local scale and 64 integers of group ``g`` of a CCQ_P2_5 block."""
    # > In `CCQ_P2_5`, group g takes code words 10 * g to 10 * g + 9; its word j, for j from 0 to 8, holds weights 7 * j
    # > to 7 * j + 6.
    words = [read_u16(block, 2 + 2 * (10 * g + j)) for j in range(10)]
    integers = [(word >> shift & 7) - 4 for word in words[:9] for shift in (13, 11, 9, 6, 4, 2, 0)]
    # > Word 9 holds weight 63 in bits 13 to 15 and the local scale in bits 0 to 12.
    field, local = words[9] >> 13, words[9] & 0x1FFF
    # > The integer of their weight 63 is its field minus the zero point.
    return local, [*integers, field - 4]


def p2_75_group(block: bytes, g: int) -> tuple[int, list[int]]:
    """Local scale and 64 integers of group ``g`` of a CCQ_P2_75 block."""
    # > In `CCQ_P2_75`, group g takes code bytes 22 * g to 22 * g + 21; its byte j, for j from 0 to 20, holds weights
    # > 3 * j to 3 * j + 2.
    codes = block[2 + 22 * g : 2 + 22 * g + 22]
    integers = [(c >> shift & 15) - 8 for c in codes[:21] for shift in (4, 2, 0)]
    # > Byte 21 holds weight 63 in its high nibble (bits 4 to 7) and the local scale in its low nibble.
    field, local = codes[21] >> 4, codes[21] & 15
    return local, [*integers, field - 8]


Group = Callable[[bytes, int], tuple[int, list[int]]]
P_TYPES: dict[str, tuple[Group, int]] = {
    "ccq_p2": (p2_group, 8),
    "ccq_p2_5": (p2_5_group, 4),
    "ccq_p2_75": (p2_75_group, 4),
}


def decode_paper(name: str, block: bytes) -> list[int]:
    """All weights of one block of a P type."""
    group, groups = P_TYPES[name]
    super_scale = read_bf16(block, 0)
    weights: list[int] = []
    for g in range(groups):
        local, integers = group(block, g)
        # > The scale of a group is float32(local scale) * super_scale, one float32 multiplication.
        scale = mul(float(local), super_scale)
        # > If the scale of the group is not finite, every weight of the group is the NaN 0x7FC00000; otherwise the
        # > weight is float32(integer) * scale, one float32 multiplication.
        if math.isfinite(scale):
            weights += [bits(mul(float(i), scale)) for i in integers]
        else:
            weights += [NAN_BITS] * 64
    return weights


# --- sections 3 and 8 -----------------------------------------------------------------------------------------------

BLOCKS = {  # name: GGUF id, weights and bytes of a block
    "ccq_t1": (33, 128, 17),
    "ccq_t1_5": (32, 64, 13),
    "ccq_t2": (36, 64, 17),
    "ccq_t2_5": (37, 64, 21),
    "ccq_t3": (38, 64, 25),
    "ccq_p2": (4, 512, 142),
    "ccq_p2_5": (5, 256, 82),
    "ccq_p2_75": (31, 256, 90),
}


def decode(name: str, data: bytes) -> list[int]:
    """Weights of a whole number of blocks of type ``name``, as float32 bit patterns.

    Raises ``ValueError`` for an unknown type or a number of bytes that is no multiple of its block.
    """
    if name not in BLOCKS:
        raise ValueError(f"unknown type {name!r}; types: {', '.join(BLOCKS)}")
    size = BLOCKS[name][2]
    if len(data) % size:
        raise ValueError(f"{len(data)} bytes are no whole number of {name} blocks of {size} bytes")
    one = decode_paper if name in P_TYPES else decode_trellis
    return [w for at in range(0, len(data), size) for w in one(name, data[at : at + size])]


def is_valid(name: str, block: bytes) -> bool:
    """Whether a block is valid."""
    if name not in P_TYPES:
        return True
    # > A block is invalid if `super_scale`, `code_scale` or `code_zp` is NaN or infinite, or if the scale of one of its
    # > groups (P6) is; blocks of T types are always valid.
    group, groups = P_TYPES[name]
    super_scale = read_bf16(block, 0)
    values = [super_scale, *(mul(float(group(block, g)[0]), super_scale) for g in range(groups))]
    if name == "ccq_p2":
        values += [read_f32(block, 2), read_f32(block, 6)]
    return all(map(math.isfinite, values))


def main(arguments: list[str]) -> int:
    """Decode standard input to text; the exit status."""
    if len(arguments) != 1:
        print(f"usage: ccq_reference.py TYPE < blocks.bin\ntypes: {' '.join(BLOCKS)}", file=sys.stderr)
        return 2
    try:
        weights = decode(arguments[0].lower(), sys.stdin.buffer.read())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for w in weights:
        print(f"{w:08x} {read_f32(struct.pack('<I', w), 0)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

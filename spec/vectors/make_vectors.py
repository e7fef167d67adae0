"""Make the golden vectors in ``v0/`` and the worked examples of ``../ccq.md``, with the reference decoder.

``python spec/vectors/make_vectors.py`` writes them, ``--check`` writes nothing and fails if a file differs.  Everything
is deterministic: "random" bytes are SHAKE-256 of a label.  The format of the files is in ``README.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPEC = HERE.parent / "ccq.md"
sys.path.insert(0, str(HERE.parent / "reference"))

import ccq_reference as ref  # noqa: E402

T_TYPES = tuple(ref.STRIDES)
P_TYPES = tuple(ref.P_TYPES)

BF16_MAX = 0x7F7F
ODD_SUPER_SCALES = (0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF)
"""Infinities, quiet and signalling NaNs of both signs."""


def noise(label: str, count: int) -> bytes:
    """``count`` bytes that depend on nothing but ``label``."""
    return hashlib.shake_256(f"ccq vectors 0: {label}".encode()).digest(count)


def f32_bytes(x: float | int) -> bytes:
    """A float32 from its value (float) or its bits (int)."""
    return struct.pack("<I", x) if isinstance(x, int) else struct.pack("<f", x)


# --- T types --------------------------------------------------------------------------------------------------------


def t_block(name: str, scale: int, codes: int | bytes) -> bytes:
    """A block from its scale byte and its bit string (as an integer or as bytes)."""
    size = ref.CODE_BITS[name] // 8
    return bytes([scale]) + (codes if isinstance(codes, bytes) else codes.to_bytes(size, "little"))


def t_random(name: str, label: str, scale: int) -> bytes:
    """A block of random code bytes."""
    return t_block(name, scale, noise(f"{name} {label}", ref.CODE_BITS[name] // 8))


def t_every_window(name: str) -> list[bytes]:
    """Blocks that hold every window value at least once, found greedily; scale bytes run through all exponents."""
    n, strides = ref.CODE_BITS[name], ref.STRIDES[name]
    missing = set(range(2**ref.WINDOW_BITS))
    blocks: list[bytes] = []
    while missing:
        string = u = min(missing)
        at, t = 0, 0
        while at + strides[t % len(strides)] + ref.WINDOW_BITS <= n:
            step = strides[t % len(strides)]
            # The next window keeps the upper bits of this one; prefer new bits that make a missing value.
            choices = [u >> step | new << (ref.WINDOW_BITS - step) for new in range(2**step)]
            fresh = [c for c in choices if c in missing]
            u = fresh[0] if fresh else choices[noise(f"{name} {len(blocks)} {t}", 1)[0] % len(choices)]
            missing.discard(u)
            at, t = at + step, t + 1
            string |= u << at
        blocks.append(t_block(name, 1 + len(blocks) * 83 % 255, string))
        missing -= set(ref.windows(name, blocks[-1][1:]))
    return blocks


def t_vectors(name: str) -> Iterator[tuple[str, str, list[bytes]]]:
    """(rule, note, blocks) of a T type."""
    n = ref.CODE_BITS[name]
    ones = (1 << n) - 1
    yield (
        "scale-zero",
        "T6: scale byte 0 makes every weight +0, whatever the code bytes",
        [t_block(name, 0, 0), t_block(name, 0, ones), t_random(name, "zero", 0)],
    )
    every = [*range(1, 16), *range(16, 240, 16 if name == "ccq_t2" else 80), *range(240, 256)]
    yield "scale-bytes", "T6: smallest, largest and other scales", [t_random(name, f"scale {b}", b) for b in every]
    ends = [*range(16), *range(n - 12, n)]
    yield (
        "one-bit",
        "T1 to T3: one bit set, near both ends of the cycle; shows bit order, every stride phase and the wrap-around",
        [t_block(name, 0xF0, 1 << k) for k in ends],
    )
    yield (
        "one-zero",
        "T1 to T3: all bits set but one; the last windows take their upper bits from the start of the string",
        [t_block(name, 0xE8, ones ^ 1 << k) for k in (0, 5, 11, n - 1, n - 6, n - 11)],
    )
    yield "every-window", "T3 to T5: every value of the window", t_every_window(name)
    random = [noise(f"{name} random {i}", 1 + n // 8) for i in range(16)]
    yield "random", "random bytes", random


# --- P types --------------------------------------------------------------------------------------------------------


def p_body(name: str, label: str, local: int | None = None) -> bytes:
    """Random bytes of everything behind the super scale (and P2's affine map); all local scales ``local`` if given."""
    if name == "ccq_p2":
        scales = noise(f"{label} scales", 4) if local is None else bytes([local * 17]) * 4
        return scales + noise(f"{label} codes", 128)
    size = 80 if name == "ccq_p2_5" else 88
    body = bytearray(noise(f"{name} {label}", size))
    for g in range(4):
        if local is not None and name == "ccq_p2_5":
            at = 20 * g + 18
            body[at : at + 2] = ((body[at + 1] & 0xE0) << 8 | local).to_bytes(2, "little")
        elif local is not None:
            at = 22 * g + 21
            body[at] = body[at] & 0xF0 | local
    return bytes(body)


def p_block(name: str, super_scale: int, body: bytes, affine: tuple[float | int, float | int] = (128.5, 0.25)) -> bytes:
    """A block from the bits of its super scale and its body; ``affine`` is P2's code_scale and code_zp."""
    middle = f32_bytes(affine[0]) + f32_bytes(affine[1]) if name == "ccq_p2" else b""
    return super_scale.to_bytes(2, "little") + middle + body


def p_every_code(name: str) -> list[bytes]:
    """Blocks with every value of a code byte (P2, P2_75), or of every field of a code word (P2_5)."""
    if name == "ccq_p2":
        return [
            p_block(name, 0x3C23, b"\x5a\xa5\x1f\xf1" + bytes(range(128 * half, 128 * half + 128))) for half in (0, 1)
        ]
    if name == "ccq_p2_5":
        # 7 windows of 3 bits and the edges of the 13-bit local scale: one word per value and a few mixed ones
        words = [v << s & 0xFFFF for s in (13, 11, 9, 6, 4, 2, 0) for v in range(8)] + [0xFFFF, 0x5555, 0xAAAA, 0x1FFF]
        locals_ = [0x2001, 0x5FFF, 0x9000, 0xE0AB, 0x0002, 0x7FFE, 0xBFFF, 0xCFFF]
        out = []
        for half in (0, 1):
            body = b""
            for g in range(4):
                row = [words[(9 * (4 * half + g) + j) % len(words)] for j in range(9)] + [locals_[4 * half + g]]
                body += struct.pack("<10H", *row)
            out.append(p_block(name, 0x3A83, body))
        return out
    codes = bytes(range(256)) + bytes(80)
    out = []
    for i in range(4):
        body = b""
        for g in range(4):
            at = 21 * (4 * i + g)
            body += codes[at : at + 21] + bytes([17 * (4 * i + g)])
        out.append(p_block(name, 0x3C23, body))
    return out


def p2_rounding_cases(codes: bytes) -> list[tuple[float | int, float | int]]:
    """Affine maps where a fused multiply-add would give one of ``codes`` another state."""
    found: list[tuple[float | int, float | int]] = []
    for i in range(4000):
        raw = struct.unpack("<II", noise(f"rounding {i}", 8))
        # code_scale in [64, 256), code_zp in [-512, 512): the range of real parameters
        scale = ref.f32(64 + raw[0] / 2**32 * 192)
        zp = ref.f32((raw[1] / 2**31 - 1) * 512)
        for c in codes:
            fused = ref.f32(float(Fraction(c) * Fraction(scale) + Fraction(zp)))
            if math.floor(ref.add(fused, 0.5)) != ref.p2_state(c, scale, zp):
                found.append((scale, zp))
                break
        if len(found) == 3:
            return found
    raise SystemExit("no affine map found where rounding shows")


def p2_vectors() -> Iterator[tuple[str, str, list[bytes]]]:
    """(rule, note, blocks) that only P2 has."""

    ends = bytes.fromhex("7fc19e35") + bytes(range(64)) + bytes(range(192, 256))  # the code bytes 0 to 63, 192 to 255

    def block(*affine: float | int) -> bytes:
        return p_block("ccq_p2", 0x3C23, ends, (affine[0], affine[1]))

    yield (
        "nibble-order",
        "P1: the HIGH nibble of a `scales` byte belongs to the even group",
        [p_block("ccq_p2", 0x3F80, bytes.fromhex("12345678") + noise("nibbles", 128))],
    )
    inf, quiet, signalling = 0x7F800000, 0x7FC00000, 0x7F800001
    odd = [(inf, 0.0), (-1 & 0xFFFFFFFF, 1.0), (1.0, inf), (1.0, 0xFF800000), (2.0, quiet), (signalling, signalling)]
    odd += [(inf, 0xFF800000), (3e38, 3e38), (-3e38, 1.0)]
    yield "state-nonfinite", "P2: s NaN or infinite gives state 0", [block(*a) for a in odd]
    edges: list[tuple[float | int, float | int]] = [
        (1.0, -1.0),  # -1, 0, 1 ...
        (1.0, -32768.0),
        (128.0, 32767.0),  # above 15 bits
        (0.0, -2147483648.0),  # the least int32
        (0.0, -2147483904.0),  # the next float32 below it
        (0.0, 2147483520.0),  # the largest float32 below 2^31
        (0.0, 2147483648.0),
        (-16843010.0, 2147483520.0),  # all of int32, from the top downwards
        (16843010.0, -2147483648.0),
        (-123.25, 8191.5),
    ]
    yield (
        "state-range",
        "P2: states that are negative or beyond 15 bits, and both ends of int32",
        [block(*a) for a in edges],
    )
    ties: list[tuple[float | int, float | int]] = [
        (0.5, 0.0),  # every other value ends in .5
        (0.5, -63.75),
        (0.0, 0x3EFFFFFF),  # the largest float32 below 0.5: the sum with 0.5 rounds to 1
        (0.0, 0xBEFFFFFF),
        (0.0, -0.5),
        (0x80000000, 0x80000000),  # minus zeros
        (1.0, 8388609.0),  # from 2^23 on, adding 0.5 is a tie and goes to even
        (1.0, -8388609.0),
        (1.0, 4194304.5),
        (0x00000001, 0x00000001),  # subnormal
    ]
    yield (
        "state-rounding",
        "P2: each operation is rounded to float32, ties to even; no operation is fused or moved",
        [block(*a) for a in [*ties, *p2_rounding_cases(ends[4:])]],
    )


def p_vectors(name: str) -> Iterator[tuple[str, str, list[bytes]]]:
    """(rule, note, blocks) of a P type."""
    top = {"ccq_p2": 15, "ccq_p2_5": 8191, "ccq_p2_75": 15}[name]
    yield "every-code", "P1 to P5: every value of a code byte or of a code word's fields", p_every_code(name)
    yield (
        "super-scale-nonfinite",
        "P7: a NaN or infinite super scale makes every weight NaN, with a local scale of 0 too",
        [p_block(name, s, p_body(name, "odd", i % 2)) for i, s in enumerate(ODD_SUPER_SCALES)],
    )
    yield (
        "overflow",
        "P6, P7: the largest super scale; local scale 1 overflows in the weight, larger ones in the group's scale",
        [
            p_block(name, BF16_MAX, p_body(name, "overflow", 1)),
            p_block(name, BF16_MAX, p_body(name, "overflow", 2)),
            p_block(name, 0x8000 | BF16_MAX, p_body(name, "overflow")),
            p_block(name, 0x7D00, p_body(name, "overflow")),
        ],
    )
    yield (
        "zero-scale",
        "P6, P7: the signs of zeros",
        [
            p_block(name, s, p_body(name, "zero", local))
            for s, local in ((0x3F80, 0), (0xBF80, 0), (0x0000, top), (0x8000, top), (0xBF80, 1))
        ],
    )
    yield (
        "subnormal",
        "section 2: subnormal super scales are not flushed to zero, nor are subnormal weights",
        [p_block(name, s, p_body(name, "subnormal", local)) for s in (0x0001, 0x807F, 0x0080) for local in (1, top)],
    )
    if name == "ccq_p2":
        yield from p2_vectors()
    sound = [p_block(name, s, p_body(name, f"sound {s}")) for s in (0x3A83, 0xBB12, 0x3C7F)]
    yield "random", "random code bytes under sound parameters", sound
    wild = [noise(f"{name} wild {i}", ref.BLOCKS[name][2]) for i in range(4)]
    yield "random-bytes", "random bytes everywhere", wild


# --- files ----------------------------------------------------------------------------------------------------------


def render(name: str, rule: str, note: str, blocks: list[bytes]) -> str:
    """Text of one vector file."""
    head = {"type": name, "spec_version": "0.1", "rule": rule, "note": note}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    cases = []
    for block in blocks:
        weights = "".join(f"{w:08x}" for w in ref.decode(name, block))
        valid = json.dumps(ref.is_valid(name, block))
        cases.append(f'  {{"block": "{block.hex()}", "valid": {valid},\n   "weights": "{weights}"}}')
    return "{\n" + "\n".join(lines) + '\n "cases": [\n' + ",\n".join(cases) + "\n ]\n}\n"


def vector_files() -> dict[Path, str]:
    """Path and text of every vector file."""
    out = {}
    for name in (*T_TYPES, *P_TYPES):
        for rule, note, blocks in t_vectors(name) if name in T_TYPES else p_vectors(name):
            out[HERE / "v0" / name / f"{rule}.json"] = render(name, rule, note, blocks)
    return out


# --- worked examples ------------------------------------------------------------------------------------------------


def _hex_lines(data: bytes) -> str:
    return "\n".join(data[i : i + 16].hex(" ") for i in range(0, len(data), 16))


def _value(pattern: int) -> str:
    return repr(ref.read_f32(struct.pack("<I", pattern), 0))


def example_t2() -> str:
    """The worked example of CCQ_T2."""
    name = "ccq_t2"
    block = t_random(name, "example", 0xAB)
    weights, us = ref.decode(name, block), ref.windows(name, block[1:])
    hashes = [ref.trellis_hash(name, u) for u in us]
    b = block[0]
    text = [
        f"A block of `CCQ_T2` ({len(block)} bytes):",
        f"```\n{_hex_lines(block)}\n```",
        f"The scale byte is 0x{b:02x}: the scale is (8 + {b & 7}) * 2^({b >> 3} - {ref.SCALE_BIAS}) = "
        f"{ref.trellis_scale(b)!r}. Some windows; from t = 59 on they run past the end of the string into its start:",
    ]
    rows = ["| t | o_t | u_t | h_t | v_t | weight (bits) | weight |", "|---|---|---|---|---|---|---|"]
    for t in (0, 1, 2, 3, 31, 58, 59, 60, 61, 62, 63):
        h = hashes[t]
        w = weights[t]
        rows.append(f"| {t} | {2 * t} | 0x{us[t]:03x} | 0x{h:04x} | {ref.level(h)} | 0x{w:08x} | {_value(w)} |")
    levels = [ref.level(h) for h in hashes]
    lines = "\n".join(" ".join(f"{v:4d}" for v in levels[i : i + 16]) for i in range(0, 64, 16))
    return "\n\n".join([*text, "\n".join(rows), "All levels:", f"```\n{lines}\n```"])


def example_p2_5() -> str:
    """The worked example of CCQ_P2_5."""
    name = "ccq_p2_5"
    block = p_block(name, 0x3A83, p_body(name, "example", 37))
    weights = ref.decode(name, block)
    local, integers = ref.p2_5_group(block, 0)
    super_scale = ref.read_bf16(block, 0)
    scale = ref.mul(float(local), super_scale)
    word0, word9 = ref.read_u16(block, 2), ref.read_u16(block, 20)
    text = [
        f"A block of `CCQ_P2_5` ({len(block)} bytes):",
        f"```\n{_hex_lines(block)}\n```",
        f"The super scale is 0x{ref.read_u16(block, 0):04x}, that is {super_scale!r}. Group 0: word 9 is "
        f"0x{word9:04x}, so the local scale is {local}, the integer of weight 63 is {integers[63]}, and the scale of "
        f"the group is {local} * {super_scale!r} = {scale!r} (0x{ref.bits(scale):08x}). Word 0 is 0x{word0:04x}:",
    ]
    rows = ["| weight | shift | field | integer | weight (bits) | weight |", "|---|---|---|---|---|---|"]
    for i, shift in enumerate((13, 11, 9, 6, 4, 2, 0)):
        rows.append(
            f"| {i} | {shift} | {word0 >> shift & 7} | {integers[i]} | 0x{weights[i]:08x} | {_value(weights[i])} |"
        )
    lines = "\n".join(" ".join(f"{v:3d}" for v in integers[i : i + 16]) for i in range(0, 64, 16))
    return "\n\n".join([*text, "\n".join(rows), "All integers of group 0:", f"```\n{lines}\n```"])


EXAMPLES: dict[str, Callable[[], str]] = {"ccq_t2": example_t2, "ccq_p2_5": example_p2_5}


def spec_text(text: str) -> str:
    """``ccq.md`` with its worked examples made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- worked example: {match[1]} -->\n{EXAMPLES[match[1]]()}\n<!-- end example -->"

    return re.sub(r"<!-- worked example: (\w+) -->\n.*?<!-- end example -->", fill, text, flags=re.DOTALL)


def main(check: bool) -> int:
    """Write or check all files; the exit status."""
    wanted = vector_files() | {SPEC: spec_text(SPEC.read_text(encoding="utf-8"))}
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    extra = sorted(set((HERE / "v0").rglob("*.json")) - set(wanted))
    for path in [*stale, *extra]:
        if not check and path in extra:
            path.unlink()
        elif not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        print(f"{path.relative_to(HERE.parent)}: {'out of date' if check else 'written'}")
    return 1 if check and (stale or extra) else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))

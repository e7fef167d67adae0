"""Damage to files: to their trees where there is a format for them, to their bytes anywhere."""

from __future__ import annotations

import ast
import copy
import random
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ccq_converters

from .formats import FORMATS

Files = dict[str, bytes]

INTEGERS = [0, 1, -1, 2, 3, 7, 31, 63, 64, 65, 127, 128, 255, 256, 1000, 32767, 65535, 65536, 1 << 20, (1 << 31) - 1]
INTEGERS += [1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 31), -(1 << 63)]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-38, 1e30, 3.4e38, 1e39, -1e39, 1e308, 5e-324]
FLOATS += [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "\0",
    "a",
    "\n",
    "a\0b",
    "..",
    "../../x",
    "/dev/null",
    "\x1b[31m",
    "\ud800",
    "\u2581",
    "🦙",
    "x" * 300,
]
TEXTS += [
    "x" * 5000,
    "%s%n",
    "{0}",
    "0",
    "1e999",
    "null",
    "<s>",
    "F32",
    "BF16",
    "F8_E4M3",
    "I64",
    "(",
    "[a-",
    "__class__",
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": {}}, [[[[[[[[]]]]]]]]]


@cache
def words() -> list[str]:
    """The texts that the product itself knows: keys, names and kinds are the ways into its branches."""
    found: set[str] = set()
    for path in Path(ccq_converters.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update([node.value] if re.fullmatch(r"[\w.<>|{}*-]{2,40}", node.value) else [])
    return sorted(found)


def value(rng: random.Random) -> Any:
    """A value that programs stumble over."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(INTEGERS),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(TEXTS),
        lambda: copy.deepcopy(rng.choice(OTHERS)),
        lambda: rng.choice(words()),
        lambda: rng.randrange(-5, 300),
        lambda: 10 ** rng.randrange(5, 400),
    ]
    return rng.choice(kinds)()


# --- trees ----------------------------------------------------------------------------------------------------------


def mutate_tree(tree: Any, rng: random.Random, donors: Sequence[Any] = ()) -> Any:
    """``tree``, which is changed in place, with one to four changes; ``donors`` are trees to take parts from."""
    root = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if not root:  # the change before has removed all
            break
        parent, key = _place(root, rng)
        _change(parent, key, rng, root if not donors or rng.random() < 0.5 else [rng.choice(donors)])
    return root[0] if root else None


def _place(root: list[Any], rng: random.Random) -> tuple[Any, Any]:
    """A container and a key or index in it, at any depth."""
    parent: Any = root
    key: Any = 0
    while True:
        inner = parent[key]
        if not isinstance(inner, (dict, list)) or not inner or (parent is not root and rng.random() < 0.2):
            return parent, key
        parent = inner
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = rng.choices(keys, [_weight(parent[k]) for k in keys])[0]


def _weight(value: Any) -> float:
    """How often a value is chosen among its neighbours: large ones have more that can break."""
    return 1.0 + len(value).bit_length() / 2 if isinstance(value, (dict, list)) else 1.0


def _change(parent: Any, key: Any, rng: random.Random, donor: list[Any]) -> None:
    old = parent[key]
    change = rng.randrange(9)
    if change <= 2 and not isinstance(old, (dict, list)):
        parent[key] = _tweaked(old, rng)
    elif change <= 3:
        parent[key] = value(rng)
    elif change == 4:
        del parent[key]
    elif change == 5:
        source, at = _place(donor, rng)
        _insert(parent, rng, at if isinstance(at, str) else key, copy.deepcopy(source[at]))
    elif change == 6:
        source, at = _place(donor, rng)
        parent[key] = copy.deepcopy(source[at])
    elif change == 7:
        _insert(parent, rng, rng.choice(words()), value(rng))
    else:
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], old


def _insert(parent: Any, rng: random.Random, key: Any, new: Any) -> None:
    if isinstance(parent, dict):
        parent[key] = new
    else:
        parent.insert(rng.randrange(len(parent) + 1), new)


def _tweaked(old: Any, rng: random.Random) -> Any:
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int):
        return rng.choice([old + 1, old - 1, old * 2, old // 2, -old, old + 64, old * 1000, old % 1000 + 0.5, hex(old)])
    if isinstance(old, float):
        return rng.choice([*FLOATS, old * 2, -old, int(old) if abs(old) < 1e9 else 0, old * 1e30, old * 1e-30])
    if isinstance(old, bytes):
        return mutate_bytes(old, rng)
    assert isinstance(old, str)
    at = rng.randrange(len(old) + 1)
    return rng.choice(
        [old[:at], old[:at] + rng.choice(TEXTS) + old[at:], old + "x", old.upper(), old[1:], rng.choice(words())]
    )


# --- bytes ----------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes, more often at the start, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        limit = len(out) if rng.random() < 0.5 else min(len(out), 1024)
        at, size = rng.randrange(limit + 1), rng.choice((1, 2, 4, 8, 16, rng.randrange(1, 200)))
        change = rng.randrange(9)
        if change <= 1:
            width = rng.choice((1, 2, 4, 4, 8, 8))
            out[at : at + width] = (rng.choice(INTEGERS) % 256**width).to_bytes(width, "little")
        elif change == 2 and out:
            at %= len(out)
            out[at] ^= 1 << rng.randrange(8)
        elif change == 3:
            at -= at % 4
            out[at : at + 4] = struct.pack("<f", rng.choice([f for f in FLOATS if not 3.5e38 < abs(f) < 1e400]))
        elif change == 4:
            del out[at : at + size]
        elif change == 5:
            out[at:at] = out[at : at + size]
        elif change == 6:
            out[at:at] = rng.choice((b"\0", b"\xff", b"[", b'"', b"{", b"9", b"\xc3\x28")) * rng.choice((1, size, 5000))
        elif change == 7:
            del out[at:]
        else:
            out[at : at + size] = rng.randbytes(size)
    return bytes(out)


# --- files ----------------------------------------------------------------------------------------------------------


def mutate(files: Files, names: Sequence[str], rng: random.Random, donors: Mapping[str, Sequence[bytes]]) -> Files:
    """A copy of ``files`` in which one or two of ``names`` are damaged; ``donors`` are other files by how they end."""
    out = dict(files)
    for name in dict.fromkeys(rng.choice(names) for _ in range(rng.choice((1, 1, 1, 2)))):
        chance = rng.random()
        if chance < 0.02:
            del out[name]
        elif chance < 0.03:
            out[name] = rng.choice([b"", out[rng.choice(sorted(out))]])
        else:
            out[name] = _mutated(name, files[name], rng, donors)
    return out


def _mutated(name: str, data: bytes, rng: random.Random, donors: Mapping[str, Sequence[bytes]]) -> bytes:
    suffix = name[name.rfind(".") :]
    if suffix not in FORMATS or rng.random() < 0.25:
        return mutate_bytes(data, rng)
    decode, encode = FORMATS[suffix]
    others = donors.get(name.rsplit("/", 1)[-1], ())
    tree = mutate_tree(decode(data), rng, [decode(rng.choice(others))] if others else ())
    out: bytes = encode(tree, rng.random() < 0.7)
    return mutate_bytes(out, rng) if rng.random() < 0.1 else out

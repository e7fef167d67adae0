"""SentencePiece tokenizers: our files in llama.cpp give SentencePiece's own ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as spm

from ccq_converters.hf2gguf import convert
from ccq_converters.llama import LlamaModel
from ccq_converters.options import QuantOptions
from ccq_converters.vocab import load_vocab
from ccq_format.errors import ModelError

from .upstream_diff.models import EXAMPLE, GEMMA3, Case, build

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "The file is closed.\nThe next line.\n\nA paragraph.\n\n\n\n",
    "\n",
    "\n\n \n",
    "tabs\tand\t\tmore\t\n\tindent",
    "  two spaces,   three,    four,          ten",
    "trailing spaces   ",
    " \n  \n   \n",
    "🚀 🦙🦙 👩‍👩‍👧‍👦 emoji 😶‍🌫️",
    "日本語のテキスト, русский, Ελληνικά, العربية",
    "\u2581 the SentencePiece space itself \u2581\u2581",
    "byte fallback: \x00\x01\x7f \u200b \ufeff \U0010fffd",
    'for (int i = 0; i < n; i++) {\n    printf("%d\\n", i);\n}\r\n',
    "<s> </s> <unk> <0x41> in the text are no special tokens",
    "x" * 300 + " " * 50 + "\n" * 20,
]


def proto() -> spm.ModelProto:
    model = spm.ModelProto()
    model.ParseFromString((EXAMPLE / "tokenizer.model").read_bytes())
    return model


def ids_of(folder: Path, out: Path, texts: list[str]) -> list[list[int]]:
    """llama.cpp's ids on the converted model."""
    convert(folder, out, QuantOptions("f32"), progress=False)
    with LlamaModel(out, n_ctx=64) as model:
        return [model.tokenize(text, add_special=False) for text in texts]


def test_bundled_tokenizer(tmp_path: Path) -> None:
    processor = SentencePieceProcessor(model_file=str(EXAMPLE / "tokenizer.model"))
    expected = processor.encode(TEXTS)
    assert any(processor.is_byte(i) for ids in expected for i in ids)
    assert ids_of(EXAMPLE, tmp_path / "out.gguf", TEXTS) == expected


@pytest.mark.parametrize("prefix", [True, False])
def test_dummy_prefix_from_the_normalizer(prefix: bool, tmp_path: Path) -> None:
    """Without a word in tokenizer_config.json, the model's normalizer decides about a leading space."""
    folder = tmp_path / "model"
    build(Case("m", "llama", {"num_hidden_layers": 1}), folder)
    model = proto()
    model.normalizer_spec.add_dummy_prefix = prefix
    for piece in model.pieces:
        # A user-defined newline: llama.cpp puts the prefix after it, too, SentencePiece does not.
        if piece.type == spm.ModelProto.SentencePiece.USER_DEFINED:
            piece.type = spm.ModelProto.SentencePiece.NORMAL
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text("{}")
    expected = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(TEXTS)
    assert ids_of(folder, tmp_path / "out.gguf", TEXTS) == expected
    vocab = load_vocab(folder, 4096)
    assert vocab.add_space_prefix is (None if prefix else False)


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("llama", True), ("llama", False), ("mistral", True), ("mistral", False), ("gemma3_text", False)],
)
def test_saved_again_without_the_model(family: str, prefix: bool, tmp_path: Path) -> None:
    """What transformers 5 makes of it, a tokenizer.json alone, gives the ids of the SentencePiece model all the same:
    also where transformers itself no longer does, behind spaces at the start.  How it writes that depends on the
    family."""
    import transformers

    folder = tmp_path / "model"
    build(Case("m", family, GEMMA3 if family == "gemma3_text" else {"num_hidden_layers": 1}), folder, 4096)
    model = proto()
    model.normalizer_spec.add_dummy_prefix = prefix
    for piece in model.pieces:
        if piece.type == spm.ModelProto.SentencePiece.USER_DEFINED:
            piece.type = spm.ModelProto.SentencePiece.NORMAL
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": prefix, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    assert ids_of(folder, tmp_path / "out.gguf", TEXTS) == expected


def test_added_tokens_and_padding(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto().SerializeToString())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 4096, "<far>": 5000}))
    decoder = {
        "1": {"content": "<s>", "special": True},
        "4097": {"content": "<|im_end|>", "special": False},
        "4098": {"content": "a\u2581b", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    vocab = load_vocab(tmp_path, 4104)
    assert len(vocab.tokens) == len(vocab.types) == len(vocab.scores or []) == 4104
    assert vocab.tokens[4096:4100] == ["<tool>", "<|im_end|>", "a b", "[PAD4099]"]
    assert vocab.types[4096:4100] == [4, 3, 4, 5]
    assert vocab.types[:4] == [2, 3, 3, 4]
    assert vocab.types[4] == 6
    assert vocab.tokens[3] == "\n"


def test_fewer_embeddings_than_pieces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto().SerializeToString())
    assert len(load_vocab(tmp_path, 4000).tokens) == 4000
    assert "96 pieces have no embedding" in caplog.text


def test_normalization_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = proto()
    model.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    load_vocab(tmp_path, 4096)
    assert "normalization" in caplog.text


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f"])
def test_damaged(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelError, match="is no SentencePiece model"):
        load_vocab(tmp_path, 4096)


def test_unigram(tmp_path: Path) -> None:
    model = proto()
    model.trainer_spec.model_type = spm.TrainerSpec.UNIGRAM
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="is a UNIGRAM model"):
        load_vocab(tmp_path, 4096)


def test_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer.model and no tokenizer.json"):
        load_vocab(tmp_path, 4096)


@pytest.mark.parametrize("content", ['{"<a>": -1}', '{"<a>": "x"}', "[1]", "{"])
def test_malformed_added_tokens(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto().SerializeToString())
    (tmp_path / "added_tokens.json").write_text(content)
    with pytest.raises(ModelError, match=r"added_tokens.json"):
        load_vocab(tmp_path, 4096)

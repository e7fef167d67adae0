"""Tokenizer files rebuilt from the vocabularies that come with llama.cpp's sources (``models/ggml-vocab-*.gguf``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from ccq_converters.pretokenizer import DEEPSEEK_LLM
from ccq_format.gguf_io import open_model

from .models import LLAMA3_REGEX, QWEN2_REGEX

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (int(t) for t in gguf.TokenType)
SPACE = "\u2581"

REGEXES: dict[str, tuple[str, ...]] = {
    "llama-bpe": (LLAMA3_REGEX,),
    "qwen2": (QWEN2_REGEX,),
    "qwen35": (
        QWEN2_REGEX.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"),
    ),
    "deepseek-llm": DEEPSEEK_LLM,
}
NFC = {"qwen2", "qwen35", "command-r"}
DIGITS = {"command-r", "refact", "starcoder", "deepseek-llm"}


class Vocabulary:
    """The tokenizer keys of one ``ggml-vocab-NAME.gguf``, and the token ids its test texts must give."""

    def __init__(self, tree: Path, name: str) -> None:
        path = tree / "models" / f"ggml-vocab-{name}.gguf"
        self.keys: dict[str, Any] = {key: field.value for key, field in open_model(path).fields.items()}
        self.name = name
        self.tokens: list[str] = self.keys["tokenizer.ggml.tokens"]
        self.types: list[int] = self.keys["tokenizer.ggml.token_type"]
        texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
        assert texts.pop() == ""
        lines = path.with_suffix(".gguf.out").read_text().splitlines()
        self.expected = [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]

    def _token(self, kind: str) -> str | None:
        token = self.keys.get(f"tokenizer.ggml.{kind}_token_id")
        return None if token is None else self.tokens[token]

    def _added(self) -> list[dict[str, Any]]:
        return [
            {
                "id": i,
                "content": token,
                "special": kind == CONTROL,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]

    def _write_config(self, folder: Path, **more: Any) -> None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self._token("bos"), **more}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": self._token("eos")}))

    def save_byte_level(self, folder: Path) -> None:
        """As the tokenizer.json of a byte-level BPE model."""
        bos = self._token("bos")
        template = None
        if self.name == "llama-bpe" and bos is not None:
            ids = {"id": bos, "ids": [self.tokens.index(bos)], "tokens": [bos]}
            first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
            pair = [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
            template = {
                "type": "TemplateProcessing",
                "single": [first, text],
                "pair": pair,
                "special_tokens": {bos: ids},
            }
        regexes = REGEXES.get(self.name, ())
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not regexes}
        steps: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in regexes
        ]
        if self.name in DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        steps.append(byte_level)
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "normalizer": {"type": "NFC"} if self.name in NFC else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": template,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.name == "llama-bpe",
                "vocab": {t: i for i, (t, k) in enumerate(zip(self.tokens, self.types, strict=True)) if k == NORMAL},
                "merges": self.keys["tokenizer.ggml.merges"],
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        self._write_config(folder)

    def save_sentencepiece(self, folder: Path) -> None:
        """As a tokenizer.model with the settings of Llama 2's."""
        from sentencepiece import sentencepiece_model_pb2 as spm

        proto = spm.ModelProto()
        scores = self.keys["tokenizer.ggml.scores"]
        for token, score, kind in zip(self.tokens, scores, self.types, strict=True):
            proto.pieces.add(piece=token, score=score, type=kind)
        proto.trainer_spec.model_type = spm.TrainerSpec.BPE
        proto.trainer_spec.byte_fallback = True
        proto.trainer_spec.vocab_size = len(self.tokens)
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = True
        proto.normalizer_spec.remove_extra_whitespaces = False
        proto.normalizer_spec.escape_whitespaces = True
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
        self._write_config(folder, tokenizer_class="LlamaTokenizer", unk_token=self.tokens[0])

    def save_sentencepiece_json(self, folder: Path) -> None:
        """As the tokenizer.json that transformers makes of Llama 2's tokenizer.model: merges by the scores."""
        ids = {t: i for i, t in enumerate(self.tokens)}
        scores = self.keys["tokenizer.ggml.scores"]
        merges = []
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == NORMAL:
                splits = [(token[:at], token[at:]) for at in range(1, len(token))]
                pairs = [(left, right) for left, right in splits if left in ids and right in ids]
                merges += [(scores[i], *pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
        merges.sort(key=lambda merge: -merge[0])
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        special = [
            {
                "id": i,
                "content": self.tokens[i],
                "special": True,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
            for i in range(3)
        ]
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self.tokens[0],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": ids,
                "merges": [f"{left} {right}" for _, left, right in merges],
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        self._write_config(folder, unk_token=self.tokens[0])

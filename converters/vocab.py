"""Tokenizers: SentencePiece ``tokenizer.model`` and BPE ``tokenizer.json`` as GGUF's tokenizer keys.

llama.cpp has two tokenizers that matter here.  ``llama`` merges like SentencePiece's BPE: best score first.  ``gpt2``
is byte-level BPE: text is cut by a regular expression that ``tokenizer.ggml.pre`` names (see ``pretokenizer``), then
merged by a list.  Special tokens, merges and the chat template are read by gguf's ``SpecialVocab``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from ccq_format.errors import ModelError

from .pretokenizer import ADDS_BOS, JOINS_DIGITS, first_unmerged, pretokenizer_name
from .safetensors_io import read_json

log = logging.getLogger(__name__)

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ADDED_SCORE = -1000.0
_PAD_SCORE = -10000.0
_SPM_BPE = 2
"""``TrainerSpec.ModelType.BPE``."""
_SPM_USER_DEFINED = 4
"""``ModelProto.SentencePiece.Type.USER_DEFINED``; all types have the values of ``gguf.TokenType``."""


@dataclass
class Vocab:
    """A tokenizer as GGUF stores it.  ``None`` stands for a key that is left to llama.cpp's default."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    special: gguf.SpecialVocab
    add_space_prefix: bool | None = None

    def specialize(self, names: Mapping[str, str], special: Mapping[str, str]) -> None:
        """Take the name that a family has for the pre-tokenizer, and its special tokens (kind: text)."""
        self.pre = names.get(self.pre, self.pre)
        for kind, text in special.items():
            if text in self.tokens:
                self.special.special_token_ids[kind] = self.tokens.index(text)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``tokenizer.*`` keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        self.special.add_to_gguf(writer, quiet=True)


def load_vocab(model_dir: Path, vocab_size: int) -> Vocab:
    """The tokenizer in ``model_dir``: ``tokenizer.model`` if there is one, else ``tokenizer.json``.

    ``vocab_size`` is the number of embedding rows; missing tokens are filled up with unused ones.  Raises
    ``ModelError`` for a missing or damaged file and for anything that llama.cpp would tokenize differently.
    """
    model_path, json_path = model_dir / "tokenizer.model", model_dir / "tokenizer.json"
    config_path = model_dir / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    tokenizer = read_json(json_path) if json_path.is_file() else None
    if model_path.is_file():
        vocab = _sentencepiece(model_path, config, vocab_size)
        _settle_bos(vocab, json_path, tokenizer, config)
        return _checked(model_path, vocab)
    if tokenizer is None:
        raise ModelError("holds no tokenizer.model and no tokenizer.json", file=model_dir)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise ModelError(f"only BPE tokenizers can be converted, this is {kind!r}", file=json_path)
    if model.get("type", "BPE") != "BPE":
        raise ModelError(f"only BPE tokenizers can be converted, this is {model['type']!r}", file=json_path)
    load = _sentencepiece_json if model.get("byte_fallback") else _byte_level
    vocab = load(json_path, tokenizer, config, vocab_size)
    _settle_bos(vocab, json_path, tokenizer, config)
    return _checked(json_path, vocab)


def _settle_bos(vocab: Vocab, path: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any]) -> None:
    """Say that no BOS goes before the text where llama.cpp would add one and transformers does not.

    With a tokenizer.json (at ``path``), its post-processor adds what is added.  transformers 5 says it nowhere else;
    an ``add_bos_token`` of older files still counts.
    """
    if tokenizer is None:
        return
    front, stated = _in_front(tokenizer), config.get("add_bos_token")
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    adds = len(front) == 1 and (bos is None or front[0] in (None, bos))
    if adds and front[0] in vocab.tokens:
        vocab.special.special_token_ids.setdefault("bos", vocab.tokens.index(front[0]))
    if front and not adds:
        log.warning(
            "%s: transformers puts %s in front of a text; llama.cpp leaves that to the chat template",
            path,
            " ".join(map(str, front)),
        )
    if isinstance(stated, bool):
        if stated != adds:
            log.warning(
                "%s: adds %s BOS; taken is 'add_bos_token' in tokenizer_config.json", path, "a" if adds else "no"
            )
    elif not adds and (vocab.model == "llama" or vocab.pre in ADDS_BOS):
        vocab.special.add_special_token["bos"] = False


def _in_front(tokenizer: dict[str, Any]) -> list[str | None]:
    """The special tokens that the post-processor of a tokenizer.json puts before the text; ``None`` for BOS."""
    front: list[str | None] = []
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            return [None]
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        for part in single if isinstance(single, list) else []:
            special = part.get("SpecialToken") if isinstance(part, dict) else None
            if not isinstance(special, dict):
                break
            front.append(str(special.get("id")))
    return front


def _checked(path: Path, vocab: Vocab) -> Vocab:
    """``vocab``, if all its texts can be written: JSON may hold halves of surrogate pairs, UTF-8 may not.  Chat
    templates are a text, or a list of those with names, which gguf takes as they come."""
    templates = vocab.special.chat_template
    named = isinstance(templates, list) and all(isinstance(template, dict) for template in templates)
    if not (templates is None or isinstance(templates, str) or named):
        raise ModelError(
            f"'chat_template' is neither a text nor a list of templates: {str(templates)[:80]!r}", file=path
        )
    for text in (*vocab.tokens, *vocab.special.merges, str(vocab.special.chat_template)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ModelError(f"holds a text that is no Unicode: {text[:80]!r}", file=path) from None
    return vocab


def _special(model_dir: Path, **options: Any) -> gguf.SpecialVocab:
    try:
        return gguf.SpecialVocab(model_dir, **options)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise ModelError(f"its special tokens cannot be read: {error!r}", file=model_dir) from error


def _looks_special(token: str) -> bool:
    """Whether an added token is a control token although its file does not say so (seen in real models)."""
    return token in ("<pad>", "<mask>") or bool(re.fullmatch(r"<\|.*\|>|<｜.*｜>|<unused.*>", token, re.DOTALL))


@dataclass(frozen=True)
class _Added:
    content: str
    special: bool


def _added_tokens(path: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any]) -> dict[int, _Added]:
    """Added tokens by id: those of tokenizer.json, then those of tokenizer_config.json."""
    entries: list[tuple[Any, Any]] = []
    if tokenizer is not None:
        listed = tokenizer.get("added_tokens") or []
        if not isinstance(listed, list):
            raise ModelError(f"'added_tokens' must be a list, it is {listed!r}", file=path)
        entries += [(e.get("id") if isinstance(e, dict) else None, e) for e in listed]
    decoder = config.get("added_tokens_decoder") or {}
    if isinstance(decoder, dict):
        entries += list(decoder.items())
    out: dict[int, _Added] = {}
    for key, entry in entries:
        try:
            token, content = int(key), entry["content"]
        except (TypeError, ValueError, KeyError, OverflowError):
            raise ModelError(f"has a malformed added token: {key!r}: {entry!r}", file=path) from None
        if not isinstance(content, str) or token < 0:
            raise ModelError(f"has a malformed added token: {key!r}: {entry!r}", file=path)
        if token in out and out[token].content != content:
            raise ModelError(
                f"token {token} is {out[token].content!r} here and {content!r} in tokenizer_config.json", file=path
            )
        out.setdefault(token, _Added(content, bool(entry.get("special"))))
    return out


def _apply_added(
    path: Path, added: dict[int, _Added], tokens: list[str], types: list[int], scores: list[float] | None
) -> None:
    """Overwrite tokens by the added ones.  Ids without an embedding row are left out, with a warning."""
    for token, entry in sorted(added.items()):
        if token >= len(tokens):
            log.warning("%s: token %d %r is left out: there are %d embeddings", path, token, entry.content, len(tokens))
            continue
        control = entry.special or _looks_special(entry.content)
        # llama.cpp matches user-defined tokens in the text as it is, before spaces are escaped.
        tokens[token] = entry.content if control else entry.content.replace(_SPACE, " ")
        types[token] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        if scores is not None:
            scores[token] = _ADDED_SCORE


def _prefix_setting(path: Path, config: dict[str, Any]) -> bool | None:
    value = config.get("add_prefix_space")
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"'add_prefix_space' must be true or false, it is {value!r}", file=path)
    return value


# --- SentencePiece --------------------------------------------------------------------------------------------------


def _sentencepiece(path: Path, config: dict[str, Any], vocab_size: int) -> Vocab:
    # The generated protobuf module gives what the processor hides: user-defined pieces and the normalizer.
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    spm: Any = sentencepiece_model_pb2
    proto = spm.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"is no SentencePiece model: {error}", file=path) from None
    except OSError as error:
        raise ModelError(error.strerror or str(error), file=path) from None
    if not proto.pieces:
        raise ModelError("is no SentencePiece model: it has no pieces", file=path)
    if proto.trainer_spec.model_type != _SPM_BPE:
        kind = spm.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
        raise ModelError(f"is a {kind} model; llama.cpp tokenizes by SentencePiece's BPE only", file=path)
    normalizer = proto.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        log.warning("%s: its text normalization (%s) is not represented in GGUF", path, normalizer.name)

    if len(proto.pieces) > vocab_size:
        log.warning("%s: %d pieces have no embedding and are left out", path, len(proto.pieces) - vocab_size)
    tokens, types = _unused(vocab_size)
    scores = [_PAD_SCORE] * vocab_size
    for token, piece in enumerate(proto.pieces[:vocab_size]):
        if not isinstance(piece.piece, str):  # protobuf gives bytes that are no UTF-8 as they are
            raise ModelError(f"piece {token} is no Unicode: {piece.piece[:80]!r}", file=path)
        user = piece.type == _SPM_USER_DEFINED
        tokens[token] = piece.piece.replace(_SPACE, " ") if user else piece.piece
        scores[token], types[token] = piece.score, piece.type
    added_path = path.parent / "added_tokens.json"
    if added_path.is_file():
        added = {}
        for content, token in read_json(added_path).items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ModelError(f"token {content!r} has the id {token!r}", file=added_path)
            added[token] = _Added(content, False)
        _apply_added(added_path, added, tokens, types, scores)
    _apply_added(path.parent / "tokenizer_config.json", _added_tokens(path, None, config), tokens, types, scores)

    prefix = _prefix_setting(path.parent / "tokenizer_config.json", config)
    if prefix is None and not normalizer.add_dummy_prefix:
        prefix = False
    return Vocab("llama", "default", tokens, types, scores, _special(path.parent, n_vocab=vocab_size), prefix)


def _unused(vocab_size: int) -> tuple[list[str], list[int]]:
    return [f"[PAD{i}]" for i in range(vocab_size)], [int(TokenType.UNUSED)] * vocab_size


def _base_vocab(path: Path, model: dict[str, Any], vocab_size: int) -> dict[str, int]:
    vocab: dict[str, int] = model["vocab"]
    ids = set()
    for text, token in vocab.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0 or token in ids:
            raise ModelError(f"token {text!r} has the id {token!r}", file=path)
        if token >= vocab_size:
            raise ModelError(f"token {text!r} has the id {token}, but there are {vocab_size} embeddings", file=path)
        ids.add(token)
    return vocab


def _merge_pairs(path: Path, model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    merges = model.get("merges") or []
    if not isinstance(merges, list) or len({isinstance(merge, str) for merge in merges}) > 1:
        raise ModelError("'merges' must be a list of texts, or of pairs", file=path)
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) for p in parts):
            raise ModelError(f"has a malformed merge: {merge!r}", file=path)
        pairs.append((parts[0], parts[1]))
    if not pairs:
        raise ModelError("has no merges", file=path)
    return pairs


def _sentencepiece_json(path: Path, tokenizer: dict[str, Any], config: dict[str, Any], vocab_size: int) -> Vocab:
    """A SentencePiece BPE model saved as tokenizer.json: its scores are the order of its merges."""
    scheme = _prepend_scheme(path, tokenizer)
    model = tokenizer["model"]
    tokens, types = _unused(vocab_size)
    scores = [_PAD_SCORE] * vocab_size
    vocab = _base_vocab(path, model, vocab_size)
    for text, token in vocab.items():
        tokens[token], scores[token] = text, 0.0
        types[token] = TokenType.BYTE if _BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL
    if isinstance(unknown := model.get("unk_token"), str) and unknown in vocab:
        types[vocab[unknown]] = TokenType.UNKNOWN
    for rank, (left, right) in reversed(list(enumerate(_merge_pairs(path, model)))):
        if left + right in vocab:
            scores[vocab[left + right]] = float(-rank)
    added = _added_tokens(path, tokenizer, config)
    added = {token: entry for token, entry in added.items() if entry.content != unknown}
    _apply_added(path, added, tokens, types, scores)
    setting = _prefix_setting(path.parent / "tokenizer_config.json", config)
    prefix = scheme != "never" if setting is None else setting
    in_text = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED]
    if prefix and scheme == "first" and in_text:
        raise ModelError(
            f"puts a space before the text, but none behind added tokens such as {in_text[0]!r}; llama.cpp puts one "
            "there, too",
            file=path,
        )
    special = _special(path.parent, n_vocab=vocab_size)
    return Vocab("llama", "default", tokens, types, scores, special, None if prefix else False)


def _prepend_scheme(path: Path, tokenizer: dict[str, Any]) -> str:
    """When text gets a leading space, by the tokenizer's normalizer or pre-tokenizer: ``"always"``, that is behind
    every added token, too, ``"first"``, at the start only, or ``"never"``.

    The Metaspace step adds none to text that starts with a space, unless a step before it has doubled that one;
    SentencePiece, and llama.cpp with it, always do.

    Raises ``ModelError`` if these do anything but replace spaces by the SentencePiece space.
    """
    scheme, replaces, doubles = "never", False, False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            scheme = "always"
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == _SPACE:
            replaces = True
        elif step == {"type": "Replace", "pattern": {"Regex": rf"\A{_SPACE}"}, "content": 2 * _SPACE}:
            doubles = True
        else:
            raise ModelError(f"its normalizer is unknown to llama.cpp: {step!r}", file=path)
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if replaces and step.get("type") == "Split" and step.get("pattern") == {"String": " "}:
            continue  # Gemma's: the normalizer has left no space to cut at
        if step.get("type") != "Metaspace" or step.get("replacement") != _SPACE or step.get("split"):
            raise ModelError(f"its pre-tokenizer is unknown to llama.cpp: {step!r}", file=path)
        replaces = True
        if scheme == "never":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if doubles and scheme == "never":
        raise ModelError("doubles a space before the text, which llama.cpp does not", file=path)
    if not replaces:
        raise ModelError("has byte fallback but does not replace spaces as SentencePiece does", file=path)
    return str(scheme)


def _steps(spec: Any, key: str) -> list[dict[str, Any]]:
    """The flattened steps of a normalizer or pre-tokenizer."""
    if spec is None:
        return []
    if not isinstance(spec, dict):
        return [{"type": repr(spec)}]
    if spec.get("type") == "Sequence":
        inner = spec.get(key) or []
        return [step for one in (inner if isinstance(inner, list) else [inner]) for step in _steps(one, key)]
    return [spec]


# --- byte-level BPE -------------------------------------------------------------------------------------------------


def _byte_level(path: Path, tokenizer: dict[str, Any], config: dict[str, Any], vocab_size: int) -> Vocab:
    model = tokenizer["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ModelError(f"the BPE option '{key}' is unknown to llama.cpp", file=path)
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        # llama.cpp does not normalize for these; NFC leaves ordinary text alone, and Qwen's files all have it.
        if step.get("type") != "NFC":
            raise ModelError(f"its normalizer is unknown to llama.cpp: {step!r}", file=path)
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prefix = _prefix_setting(path.parent / "tokenizer_config.json", config)
    if prefix or any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        raise ModelError("puts a space before the text, which llama.cpp's byte-level BPE does not", file=path)
    vocab, merges = _base_vocab(path, model, vocab_size), _merge_pairs(path, model)
    added = _added_tokens(path, tokenizer, config)
    apart = {entry.content for entry in added.values()}

    def unmerged() -> str | None:
        return first_unmerged((text for text in vocab if text not in apart), merges)

    pre = pretokenizer_name(steps, bool(model.get("ignore_merges")), path, unmerged)
    if pre in JOINS_DIGITS and (number := next((t for t in vocab if t.isdigit() and len(t) > 1), None)) is not None:
        raise ModelError(
            f"cuts numbers into digits and has the token {number!r}; llama.cpp does not cut them", file=path
        )
    tokens, types = _unused(vocab_size)
    for text, token in vocab.items():
        tokens[token], types[token] = text, TokenType.NORMAL
    for token, entry in added.items():
        if token >= vocab_size:
            raise ModelError(
                f"token {entry.content!r} has the id {token}, but there are {vocab_size} embeddings", file=path
            )
    _apply_added(path, added, tokens, types, None)
    special = _special(path.parent, load_merges=True, n_vocab=vocab_size)
    return Vocab("gpt2", pre, tokens, types, None, special, prefix)

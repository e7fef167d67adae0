"""tokenizer.json files: byte-level BPE and SentencePiece-like BPE in llama.cpp against the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ccq_converters.hf2gguf import convert
from ccq_converters.llama import LlamaModel
from ccq_converters.options import QuantOptions
from ccq_converters.pretokenizer import DEEPSEEK_LLM, first_unmerged, pretokenizer_name
from ccq_converters.vocab import load_vocab
from ccq_format.errors import ModelError
from ccq_format.gguf_io import open_model

from .upstream_diff.models import (
    GLM_MOE,
    LLAMA3_REGEX,
    LLAMA4,
    QWEN2_REGEX,
    TRAINING_TEXT,
    Case,
    bpe_tokenizer,
    build,
    save_bpe,
)

TEXTS = [
    "",
    " ",
    "Hello World, it's 12345 o'clock; we'LL see.",
    "   indented\n\n\n  text \t\t tabs \n",
    "🚀 🦙 emoji 😶‍🌫️ Grüße, русский, 日本語 ① ½",
    "<tool> is user-defined, <|end|> is not matched",
    "1 22 333 4444 55555 3.14",
    "trailing   ",
    "\r\n\r\nint main(void) { return 0; }\n",
]


def llama_cpp_ids(folder: Path, out: Path, texts: list[str], **options: Any) -> list[list[int]]:
    convert(folder, out, QuantOptions("f32"), progress=False)
    with LlamaModel(out, n_ctx=64) as model:
        return [model.tokenize(text, **options) for text in texts]


def encode(tokenizer: Tokenizer, text: str, **options: Any) -> list[int]:
    """The library's ids with control tokens in the text taken as text, which ``LlamaModel.tokenize`` does."""
    return list(tokenizer.encode(text, **options).ids)


@pytest.mark.parametrize("style", ["llama3", "qwen2"])
def test_byte_level(style: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    family = "llama" if style == "llama3" else "qwen2"
    tokenizer = bpe_tokenizer(style)
    size = tokenizer.get_vocab_size() + 5
    build(Case("m", family, {"num_hidden_layers": 1}), folder, size)
    save_bpe(folder, style)
    texts = [text for text in TEXTS if "<|end|>" not in text] + ["<tool> is user-defined"]
    got = llama_cpp_ids(folder, tmp_path / "out.gguf", texts, add_special=False)
    assert got == [encode(tokenizer, text, add_special_tokens=False) for text in texts]
    with LlamaModel(tmp_path / "out.gguf", n_ctx=64) as model:
        assert [model.tokenize(text) for text in texts] == [encode(tokenizer, text) for text in texts]

    keys = {key: field.value for key, field in open_model(tmp_path / "out.gguf").fields.items()}
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == ("llama-bpe" if style == "llama3" else "qwen2")
    assert keys["tokenizer.ggml.bos_token_id"] == 1
    assert keys["tokenizer.ggml.eos_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is (style == "llama3")
    assert "<|begin|>" in keys["tokenizer.chat_template"]
    assert keys["tokenizer.ggml.tokens"][-5:] == [f"[PAD{i}]" for i in range(size - 5, size)]
    assert keys["tokenizer.ggml.token_type"][-6:] == [4, 5, 5, 5, 5, 5]


def test_llama3_without_template_adds_no_bos(tmp_path: Path) -> None:
    """llama.cpp would add one by the name of the pre-tokenizer; the file says that it must not."""
    folder = tmp_path / "model"
    build(Case("m", "llama", {"num_hidden_layers": 1}), folder, bpe_tokenizer("llama3").get_vocab_size())
    save_bpe(folder, "llama3")
    edit(folder, post_processor=None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert llama_cpp_ids(folder, tmp_path / "out.gguf", ["Hello"]) == [encode(tokenizer, "Hello")]


@pytest.mark.parametrize("scheme", ["first", "never"])
@pytest.mark.parametrize("with_normalizer", [True, False])
def test_sentencepiece_like(scheme: str, with_normalizer: bool, tmp_path: Path) -> None:
    """BPE with byte fallback and no tokenizer.model: scores come from the order of the merges."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    spec["pre_tokenizer"] = None
    for left, right in (("z", "x"), ("q", "z")):  # the order decides about "qzx"
        spec["model"]["vocab"][left + right] = len(spec["model"]["vocab"])
        spec["model"]["merges"].append([left, right])
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if with_normalizer:
        steps = [normalizers.Replace(" ", "\u2581")]
        if scheme == "first":
            steps.insert(0, normalizers.Prepend("\u2581"))
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    folder = tmp_path / "model"
    build(Case("m", "mistral", {"num_hidden_layers": 1}), folder, tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    texts = [*(text for text in TEXTS if "<" not in text), "qzx"]
    if scheme == "first" and not with_normalizer:
        # This step adds no second space, SentencePiece and llama.cpp do.
        texts = [text for text in texts if not text.startswith(" ")]
    got = llama_cpp_ids(folder, tmp_path / "out.gguf", texts, add_special=False)
    assert got == [encode(tokenizer, text, add_special_tokens=False) for text in texts]
    assert max(len(ids) for ids in got) > 5


@pytest.mark.parametrize(
    ("scheme", "special", "config", "fits"),
    [
        ("first", False, {}, False),
        ("first", True, {}, True),
        ("first", False, {"add_prefix_space": False}, True),
        ("always", False, {}, True),
        ("never", False, {}, True),
    ],
)
def test_space_behind_added_tokens(
    scheme: str, special: bool, config: dict[str, bool], fits: bool, tmp_path: Path
) -> None:
    """llama.cpp puts one behind every token that it finds in a text, if it puts one in front of the text."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "ab"]
    tokenizer = {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False},
        "added_tokens": [{"id": len(pieces), "content": "<tool>", "special": special}],
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": ["a b"],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if fits:
        assert load_vocab(tmp_path, 300).tokens[len(pieces)] == "<tool>"
    else:
        with pytest.raises(ModelError, match=r"tokenizer\.json.*puts a space before the text.*'<tool>'"):
            load_vocab(tmp_path, 300)


def test_doubled_space_without_one_before_the_text(tmp_path: Path) -> None:
    """transformers 5 doubles a space at the start where its next step would put one before the text; alone, it would
    mean something that llama.cpp cannot do."""
    save_bpe(tmp_path, "qwen2")
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    double = {"type": "Replace", "pattern": {"Regex": "\\A\u2581"}, "content": "\u2581\u2581"}
    edit(tmp_path, normalizer={"type": "Sequence", "normalizers": [space, double]}, pre_tokenizer=None)
    edit(tmp_path, model__byte_fallback=True)
    with pytest.raises(ModelError, match="doubles a space before the text"):
        load_vocab(tmp_path, 500)


def test_additional_chat_templates(tmp_path: Path) -> None:
    """Files of their own, as transformers 5 saves them."""
    import transformers

    (tmp_path / "model").mkdir()
    save_bpe(tmp_path / "model", "llama3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").is_file()
    template = load_vocab(tmp_path / "saved", 500).special.chat_template
    assert template == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("keep_model", [True, False])
def test_bos_of_a_saved_tokenizer(adds: bool, keep_model: bool, tmp_path: Path) -> None:
    """transformers 5 says in tokenizer.json's post-processor only whether a BOS goes before the text."""
    import transformers

    folder = tmp_path / "model"
    build(Case("m", "llama", {"num_hidden_layers": 1}), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, add_bos_token=adds)
    if not keep_model:
        (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder)
    assert "add_bos_token" not in json.loads((folder / "tokenizer_config.json").read_text())
    again = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = again("A file.").input_ids
    assert (expected[0] == 1) == adds
    assert llama_cpp_ids(folder, tmp_path / "out.gguf", ["A file."]) == [expected]


# --- the name of the pre-tokenizer ----------------------------------------------------------------------------------


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("regexes", [(GPT4O,), DEEPSEEK3], ids=["gpt-4o", "deepseek-v3"])
def test_cut_alike(regexes: tuple[str, ...], ignore_merges: bool, tmp_path: Path) -> None:
    """With ``ignore_merges``, too, as transformers writes it for tiktoken's vocabularies: all tokens can be merged."""
    folder = tmp_path / "model"
    build(Case("m", "qwen2", {"num_hidden_layers": 1}), folder, bpe_tokenizer("qwen2").get_vocab_size())
    save_bpe(folder, "qwen2")
    steps = [*map(split, regexes), BYTES]
    edit(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": steps}, model__ignore_merges=ignore_merges)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [text for text in TEXTS if "<|end|>" not in text] + ["camelCaseWORDS", "日本語テキスト123漢字 (x)"]
    got = llama_cpp_ids(folder, tmp_path / "out.gguf", texts, add_special=False)
    assert got == [encode(tokenizer, text, add_special_tokens=False) for text in texts]


@pytest.mark.parametrize(
    ("family", "config", "steps", "ignore_merges", "front", "name"),
    [
        ("glm4", {}, [split(LLAMA3_REGEX), BYTES], True, ["[gMASK]", "<sop>"], "glm4"),
        ("glm4", {}, [split(LLAMA3_REGEX), BYTES], False, [], "chatglm-bpe"),
        ("glm4_moe", {"head_dim": 16, **GLM_MOE}, [split(LLAMA3_REGEX), BYTES], True, [], "glm4"),
        ("cohere2", {"num_hidden_layers": 4}, [DIGITS, GPT2], False, ["<|begin|>"], "command-r"),
        ("llama4", {**LLAMA4, "num_local_experts": 4}, [split(GPT4O), BYTES], False, ["<|begin|>"], "llama4"),
    ],
)
def test_names_of_a_family(
    family: str,
    config: dict[str, Any],
    steps: list[dict[str, Any]],
    ignore_merges: bool,
    front: list[str],
    name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """llama.cpp knows some ways to cut under several names, which differ in what goes in front of a text."""
    folder = tmp_path / "model"
    tokenizer = bpe_tokenizer("qwen2")
    size = tokenizer.get_vocab_size()
    added = ["[gMASK]", "<sop>", "<|user|>", "<|endoftext|>", "<|observation|>"]
    build(Case("m", family, config), folder, size + len(added))
    save_bpe(folder, "qwen2")
    spec = json.loads((folder / "tokenizer.json").read_text())
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": size + i, "content": text, **entry} for i, text in enumerate(added)]
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    single = [*({"SpecialToken": {"id": text, "type_id": 0}} for text in front), sequence]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in front},
    }
    spec["model"]["ignore_merges"] = ignore_merges
    spec |= {"post_processor": template, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    bos = {"bos_token": "<|begin|>"} if name in ("command-r", "llama4") else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **bos}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [text for text in TEXTS if text and "<|end|>" not in text]
    got = llama_cpp_ids(folder, tmp_path / "out.gguf", texts)
    assert got == [encode(tokenizer, text, add_special_tokens=len(front) == 1) for text in texts]
    assert ("leaves that to the chat template" in caplog.text) == (len(front) > 1)
    keys = {key: field.value for key, field in open_model(tmp_path / "out.gguf").fields.items()}
    assert keys["tokenizer.ggml.pre"] == name
    if not bos:
        assert keys["tokenizer.ggml.eot_token_id"] == ids["<|user|>"]
        assert keys["tokenizer.ggml.unknown_token_id"] == ids["<|endoftext|>"]
        assert keys["tokenizer.ggml.bos_token_id"] == ids["[gMASK]" if family == "glm4_moe" else "<|endoftext|>"]


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([split(LLAMA3_REGEX), BYTES], True, "llama-bpe"),
        ([split(LLAMA3_REGEX), BYTES], False, "smaug-bpe"),
        ([split(LLAMA3_REGEX, "Removed", True), BYTES], True, "llama-bpe"),
        ([split(LLAMA3_REGEX.replace(r"\r\n", "\r\n")), BYTES], True, "llama-bpe"),
        ([split(QWEN2_REGEX), BYTES], False, "qwen2"),
        ([split(TEKKEN), BYTES], True, "tekken"),
        ([split(GPT4O), BYTES], False, "gpt-4o"),
        ([*map(split, DEEPSEEK3), BYTES], False, "deepseek-v3"),
        ([*map(split, DEEPSEEK_LLM), DIGITS, BYTES], False, "deepseek-llm"),
        ([DIGITS, GPT2], False, "smollm"),
        ([GPT2], False, "gpt-2"),
    ],
)
def test_known_pretokenizers(steps: list[dict[str, Any]], ignore_merges: bool, name: str) -> None:
    assert pretokenizer_name(steps, ignore_merges, Path("tokenizer.json"), lambda: "a token") == name


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "reason"),
    [
        ([], False, "no name in llama.cpp is known for its pre-tokenizer: none"),
        ([BYTES], False, "no name"),
        ([split(LLAMA3_REGEX)], True, "no name"),
        ([split(LLAMA3_REGEX.replace("{1,3}", "{1,2}")), BYTES], True, "no name"),
        ([split(LLAMA3_REGEX, "Removed", False), BYTES], True, "no name"),
        ([split(LLAMA3_REGEX, "MergedWithPrevious"), BYTES], True, "no name"),
        ([split(LLAMA3_REGEX), GPT2], True, "no name"),
        ([{"type": "Whitespace"}], False, "no name"),
        ([{"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"}, BYTES], False, "no name"),
        ([split(QWEN2_REGEX), BYTES], True, "is qwen2, but 'ignore_merges' is true, .* do not lead to 'a token'"),
        ([split(TEKKEN), BYTES], False, "is tekken, but 'ignore_merges' is false"),
        ([split(DEEPSEEK3[0], "Removed", True), *map(split, DEEPSEEK3[1:]), BYTES], False, "no name"),
        ([*map(split, DEEPSEEK3[1:]), BYTES], False, "no name"),
    ],
)
def test_unknown_pretokenizers(steps: list[dict[str, Any]], ignore_merges: bool, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        pretokenizer_name(steps, ignore_merges, Path("tokenizer.json"), lambda: "a token")


def test_first_unmerged() -> None:
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("d", "d"), ("dd", "d")]
    assert first_unmerged(["a", "bc", "ab", "dd", "ddd", ""], merges) is None
    assert first_unmerged(["a", "abc", "e"], merges) == "abc"
    assert first_unmerged(["xy"], merges) == "xy"


def test_digits_that_llama_cpp_joins(tmp_path: Path) -> None:
    """Its deepseek-llm leaves numbers in one piece, the model does not: no matter if no token has two digits."""
    save_bpe(tmp_path, "qwen2")
    steps = [*map(split, DEEPSEEK_LLM), DIGITS, BYTES]
    edit(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert load_vocab(tmp_path, 500).pre == "deepseek-llm"
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    edit(tmp_path, model__vocab={**model["vocab"], "12": 450})
    with pytest.raises(ModelError, match="has the token '12'"):
        load_vocab(tmp_path, 500)


# --- damaged and unsupported files ----------------------------------------------------------------------------------


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    save_bpe(tmp_path, "qwen2")
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of tokenizer.json; ``model__x`` is key x of the model."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        target = spec["model"] if key.startswith("model__") else spec
        target[key.removeprefix("model__")] = value
    path.write_text(json.dumps(spec), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "only BPE tokenizers"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "only BPE tokenizers"),
        ({"model": None}, "only BPE tokenizers"),
        ({"model__merges": []}, "has no merges"),
        ({"model__merges": ["a"]}, "malformed merge"),
        ({"model__merges": [["a", "b", "c"]]}, "malformed merge"),
        ({"model__vocab": {"a": 0, "b": 0}}, "token 'b' has the id 0"),
        ({"model__vocab": {"a": "0"}}, "token 'a' has the id '0'"),
        ({"model__vocab": {"a": 10**9}}, "but there are 500 embeddings"),
        ({"model__continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
        ({"model__end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is unknown"),
        ({"pre_tokenizer": None}, "no name in llama.cpp"),
        ({"pre_tokenizer": {**GPT2, "add_prefix_space": True}}, "puts a space before the text"),
        ({"added_tokens": [{"id": 600, "content": "<x>"}]}, "but there are 500 embeddings"),
        ({"added_tokens": [{"content": "<x>"}]}, "malformed added token"),
        ({"added_tokens": ["<x>"]}, "malformed added token"),
        ({"model__byte_fallback": True}, "unknown to llama.cpp"),
        ({"normalizer": "NFC"}, "normalizer is unknown"),
        ({"added_tokens": [{"id": 0, "content": "\ud83d"}]}, "no Unicode"),
    ],
)
def test_unusable(qwen: Path, changes: dict[str, Any], reason: str) -> None:
    edit(qwen, **changes)
    with pytest.raises(ModelError, match=reason):
        load_vocab(qwen, 500)


def test_config_contradicts(qwen: Path) -> None:
    config = {"added_tokens_decoder": {"0": {"content": "<other>", "special": True}}}
    (qwen / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="token 0 is"):
        load_vocab(qwen, 500)


def test_prefix_space_in_the_config(qwen: Path) -> None:
    (qwen / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(ModelError, match="puts a space before the text"):
        load_vocab(qwen, 500)


def test_chat_template_file(qwen: Path) -> None:
    config = json.loads((qwen / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (qwen / "tokenizer_config.json").write_text(json.dumps(config))
    (qwen / "chat_template.jinja").write_text("{{ messages }}")
    assert load_vocab(qwen, 500).special.chat_template == "{{ messages }}"


def test_is_no_json(qwen: Path) -> None:
    (qwen / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer.json: is no JSON"):
        load_vocab(qwen, 500)


def test_regex_of_the_library_is_recognized() -> None:
    """What the library writes for these expressions is what we compare with."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(LLAMA3_REGEX), "removed", invert=True)
    step = json.loads(tokenizer.to_str())["pre_tokenizer"]
    assert pretokenizer_name([step, BYTES], True, Path("tokenizer.json"), lambda: None) == "llama-bpe"

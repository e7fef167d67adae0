"""The name that llama.cpp has for a tokenizer's way of cutting text into words (``tokenizer.ggml.pre``).

llama.cpp keeps a list of names with a regular expression and merge rules each (``llama_vocab::impl::load`` and
``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp``).  Its converter finds the name by hashing the tokens of a test string;
here it follows from the pre-tokenizer itself, so that models with an own vocabulary are recognized, too.  Of several
names for one way of cutting the first is taken here, and a family's own later (``arch.Spec.pretokenizers``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from ccq_format.errors import ModelError

JOINS_DIGITS = frozenset({"deepseek-llm"})
"""Names for which llama.cpp has all digits of a number in one word where the model has each in its own: the same as
long as no token has two."""

ADDS_BOS = frozenset({"llama-bpe", "tekken"})
"""Names for which llama.cpp puts a BOS before the text unless the file says otherwise."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_THREE_DIGITS = r"\p{N}{1,3}"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ"
    "Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
)
"""What DeepSeek LLM's and V2's tokenizers cut at, one after the other, before single digits."""
_WITH_GAPS = frozenset({_THREE_DIGITS, _CJK, *DEEPSEEK_LLM})
"""Expressions that do not match all text; what is between their matches is a word, too."""

_NAMES: dict[tuple[str, ...], dict[bool, str]] = {
    # Steps -> whether the model ignores merges -> name.  smaug-bpe is llama-bpe without that.
    (f"split {_LLAMA3}", "bytes"): {True: "llama-bpe", False: "smaug-bpe"},
    (f"split {_QWEN2}", "bytes"): {False: "qwen2"},
    (f"split {_QWEN35}", "bytes"): {False: "qwen35"},
    (f"split {_SEED_CODER}", "bytes"): {False: "seed-coder"},
    (f"split {_TEKKEN}", "bytes"): {True: "tekken"},
    (f"split {_GPT4O}", "bytes"): {False: "gpt-4o"},
    (f"split {_THREE_DIGITS}", f"split {_CJK}", f"split {_DEEPSEEK3}", "bytes"): {False: "deepseek-v3"},
    (*(f"split {regex}" for regex in DEEPSEEK_LLM), "digits", "bytes"): {False: "deepseek-llm"},
    ("digits", "gpt2"): {False: "smollm"},
    ("gpt2",): {False: "gpt-2"},
}


def pretokenizer_name(
    steps: list[dict[str, Any]], ignore_merges: bool, path: Path, unmerged: Callable[[], str | None]
) -> str:
    """The name for the flattened pre-tokenizer ``steps`` of the tokenizer.json at ``path``.

    ``unmerged`` finds a token that merging does not lead to (:func:`first_unmerged`); without one it is all the same
    whether a word that is a token is merged or taken as it is.  Transformers writes ``ignore_merges`` into all that it
    converts from tiktoken.

    Raises ``ModelError`` if llama.cpp has none, or not together with the model's ``ignore_merges``.
    """
    described = tuple(_describe(step) for step in steps)
    names = _NAMES.get(described)
    if names is None:
        shown = "; ".join(described) or "none"
        raise ModelError(f"no name in llama.cpp is known for its pre-tokenizer: {shown}", file=path)
    if ignore_merges not in names:
        name, token = next(iter(names.values())), unmerged()
        if token is not None:
            raise ModelError(
                f"its pre-tokenizer is {name}, but 'ignore_merges' is {str(ignore_merges).lower()}, and the merges do "
                f"not lead to {token!r}",
                file=path,
            )
        return name
    return names[ignore_merges]


def first_unmerged(tokens: Iterable[str], merges: list[tuple[str, str]]) -> str | None:
    """The first of ``tokens`` whose characters the ``merges``, best first, do not put together to it."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(merges)))
            if best not in ranks:
                return token
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
    return None


def _describe(step: dict[str, Any]) -> str:
    """A step as text; two steps that cut alike read alike."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return "gpt2" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and isinstance(step.get("pattern"), dict):
        pattern = step["pattern"].get("Regex")
        # The other expressions match any text without a gap, so that keeping the matches and dropping what is between
        # them is the same as cutting at them.
        how = step.get("behavior"), bool(step.get("invert"))
        keeps = how == ("Isolated", False) or (how == ("Removed", True) and pattern not in _WITH_GAPS)
        if isinstance(pattern, str) and keeps:
            return "split " + pattern.replace("\r", r"\r").replace("\n", r"\n")
    return repr(step)

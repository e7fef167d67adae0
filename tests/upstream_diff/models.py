"""Tiny random models of every family with real tokenizers, as Hugging Face folders, for the converter's tests."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

EXAMPLE = Path(__file__).parents[2] / "examples" / "manllama-4m"

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_REGEX = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2_REGEX = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL

TRAINING_TEXT = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; it reads the manual page of ls(1) instead.\n",
    "int main(void) {\n    return 0;\n}\n\n\n   \t  indented    text, runs of spaces",
    "Grüße aus München, Ελληνικά, русский текст, 日本語, 🚀🦙 emoji!",
] * 4


@dataclass(frozen=True)
class Case:
    """One tiny model: ``config`` goes to the config class of ``family``; the rest says how it is saved."""

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shards: bool = False
    fused: bool = False
    old_config: bool = False


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
VISION |= {"num_hidden_layers": 1}
LLAMA4_VISION = {**VISION, "intermediate_size": 128, "vision_output_dim": 32}
LLAMA4_VISION |= {"projector_input_dim": 32, "projector_output_dim": 32}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}


def with_vision(config: Callable[..., Any], vision: dict[str, Any], text_type: str | None = None) -> Callable[..., Any]:
    """The config class of a model of several modalities, called with the keys of its text model."""

    def make(**text: Any) -> Any:
        tied = text.get("tie_word_embeddings", False)
        text_config = text if text_type is None else {"model_type": text_type, **text}
        return config(text_config=text_config, vision_config=vision, tie_word_embeddings=tied)

    return make


CONFIG_CLASSES: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "smollm3": transformers.SmolLM3Config,
    "granite": transformers.GraniteConfig,
    "gemma3_text": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "olmo2": transformers.Olmo2Config,
    "olmoe": transformers.OlmoeConfig,
    "glm4": transformers.Glm4Config,
    "glm4_moe": transformers.Glm4MoeConfig,
    "cohere2": transformers.Cohere2Config,
    "ernie4_5": transformers.Ernie4_5Config,
    "ernie4_5_moe": transformers.Ernie4_5_MoeConfig,
    "gpt_oss": transformers.GptOssConfig,
    "deepseek_v2": transformers.DeepseekV2Config,
    "deepseek_v3": transformers.DeepseekV3Config,
    "qwen3_next": transformers.Qwen3NextConfig,
    "qwen3_5": transformers.Qwen3_5TextConfig,
    "qwen3_5_moe": transformers.Qwen3_5MoeTextConfig,
    "llama4": transformers.Llama4TextConfig,
    "gemma3": with_vision(transformers.Gemma3Config, VISION),
    "llama4_vl": with_vision(transformers.Llama4Config, LLAMA4_VISION),
    "mistral3": with_vision(transformers.Mistral3Config, {"model_type": "pixtral", **VISION}, "mistral"),
    "llava": with_vision(transformers.LlavaConfig, {"model_type": "clip_vision_model", **VISION}, "llama"),
    "qwen2_5_vl": with_vision(transformers.Qwen2_5_VLConfig, QWEN_VISION),
    "qwen2_vl": with_vision(
        transformers.Qwen2VLConfig, {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    ),
    "qwen3_5_vl": with_vision(transformers.Qwen3_5Config, QWEN_VISION),
}
SHIFTED = ("gemma3_text", "gemma3", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_vl")
"""Families whose norms multiply by 1 + weight."""

SPM_FAMILIES = ("llama", "mistral", "mixtral")

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 20000.0}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {**MOE, "moe_intermediate_size": 32, "norm_topk_prob": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

CASES = [
    Case("llama-biases-head-dim", "llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    Case("llama3-tied-bf16", "llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}, torch.bfloat16),
    Case("llama3-rope-old-config", "llama", {"rope_parameters": LLAMA3_ROPE}, old_config=True),
    Case("llama-linear-rope", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    Case("llama-yarn", "llama", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    Case("mistral-sharded", "mistral", {"sliding_window": None, "head_dim": 24}, shards=True),
    Case("mixtral", "mixtral", {**MOE}, torch.bfloat16),
    Case("mixtral-fused", "mixtral", {**MOE, "head_dim": 32}, fused=True),
    Case("qwen2", "qwen2", {}, torch.float16),
    Case("qwen2-tied-old-config", "qwen2", {"tie_word_embeddings": True}, old_config=True),
    Case("qwen3-tied", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    Case("qwen3-yarn", "qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "rope_theta": 1e6}}),
    Case("qwen3-moe", "qwen3_moe", {**QWEN_MOE, "head_dim": 32}, torch.bfloat16, shards=True),
    Case("qwen3-moe-fused", "qwen3_moe", {**QWEN_MOE}, fused=True),
]
ERNIE_MOE = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 48,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "tie_word_embeddings": False,
}
GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "head_dim": 32,
}
LATENT = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"}
LATENT_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}
DELTA_NET = {
    "rms_norm_eps": 1e-6,  # as in the real ones: llama.cpp also normalizes heads with it, transformers with 1e-6
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
DELTA_MOE = {**DELTA_NET, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA_MOE |= {"shared_expert_intermediate_size": 48}
MROPE = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
GEMMA3 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 32,
    "rope_parameters": GEMMA_ROPE,
}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 32}
LLAMA4 = {"num_hidden_layers": 5, "head_dim": 16, "intermediate_size_mlp": 80, "intermediate_size": 48}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
FAMILY_CASES = [
    Case("smollm3", "smollm3", {"num_hidden_layers": 5}),
    Case(
        "granite",
        "granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    Case("gemma3", "gemma3_text", {**GEMMA3}),
    Case("phi3", "phi3", {}),
    Case(
        "phi3-longrope",
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **LONGROPE,
                "long_factor": [1 + 0.5 * i for i in range(8)],
                "short_factor": [1 + 0.1 * i for i in range(8)],
            },
        },
    ),
    Case("olmo2", "olmo2", {}),
    Case("olmoe", "olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    Case("glm4", "glm4", {"head_dim": 32}),
    Case("glm4-moe", "glm4_moe", {**GLM_MOE, "use_qk_norm": True, "attention_bias": True}),
    Case("cohere2", "cohere2", {"num_hidden_layers": 5, "sliding_window": 32, "logit_scale": 0.5, "rotary_pct": 1.0}),
    Case("ernie4_5", "ernie4_5", {"head_dim": 32}),
    Case("ernie4_5-moe", "ernie4_5_moe", {**ERNIE_MOE}),
    Case("ernie4_5-moe-fused", "ernie4_5_moe", {**ERNIE_MOE, "moe_num_shared_experts": 0}, fused=True),
    Case("gpt-oss", "gpt_oss", {**GPT_OSS, "rope_parameters": {**YARN, "truncate": True}}),
    Case("deepseek-v2", "deepseek_v2", {**LATENT, "scoring_func": "softmax"}),
    Case(
        "deepseek-v2-lite",
        "deepseek_v2",
        {
            **LATENT,
            "scoring_func": "softmax",
            "num_hidden_layers": 26,
            "first_k_dense_replace": 25,
            "q_lora_rank": None,
            "rope_parameters": LATENT_YARN,
        },
    ),
    Case("deepseek-v3", "deepseek_v3", {**LATENT, **GROUPS}, torch.bfloat16),
    Case("qwen3-next", "qwen3_next", {**DELTA_MOE}),
    Case("qwen3-next-fused", "qwen3_next", {**DELTA_MOE, "linear_num_value_heads": 6}, fused=True),
    Case("qwen3_5", "qwen3_5", {**DELTA_NET, "rope_parameters": MROPE, "tie_word_embeddings": True}),
    Case(
        "qwen3_5-equal-heads",
        "qwen3_5",
        {
            **DELTA_NET,
            "linear_num_key_heads": 4,
            "layer_types": ["full_attention", *["linear_attention"] * 3],
            "rope_parameters": MROPE,
        },
        torch.bfloat16,
    ),
    Case("qwen3_5-moe", "qwen3_5_moe", {**DELTA_MOE, "linear_num_value_heads": 6, "rope_parameters": MROPE}),
    Case(
        "llama4", "llama4", {**LLAMA4, "num_local_experts": 128, "use_qk_norm": False, "interleave_moe_layer_step": 2}
    ),
    Case(
        "llama4-rope-of-scout",
        "llama4",
        {**LLAMA4, "num_local_experts": 4, "rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
    ),
    Case("deepseek-v3-yarn", "deepseek_v3", {**LATENT, **GROUPS, "rope_parameters": LATENT_YARN}),
]
"""The other families, one or two cases each."""

QWEN_VL = {
    "rms_norm_eps": 1e-7,  # small: llama.cpp reads none for qwen2vl and computes with 0
    "rope_parameters": {**DEFAULT_ROPE, "mrope_section": [2, 3, 3]},
}
MULTIMODAL_CASES = [
    Case("gemma3-vision", "gemma3", {**GEMMA3, "tie_word_embeddings": True}),
    Case("llama4-vision", "llama4_vl", {**LLAMA4, "num_local_experts": 4}),
    Case("mistral3-vision", "mistral3", {"head_dim": 24, "sliding_window": None}, torch.bfloat16),
    Case("llava", "llava"),
    Case("qwen2-vl", "qwen2_vl", {**QWEN_VL}),
    Case("qwen2_5-vl", "qwen2_5_vl", {**QWEN_VL, "tie_word_embeddings": True}),
    Case("qwen3_5-vision", "qwen3_5_vl", {**DELTA_NET, "rope_parameters": MROPE}),
]
"""Models with a vision tower, of which the text model is taken."""

EXTRA_CASES = [
    Case("llama-yarn-attention-factor", "llama", {"rope_parameters": {**YARN, "attention_factor": 1.4}}),
    Case("llama-mha-default", "llama", {"num_key_value_heads": 4}),
]
"""Where we leave upstream on purpose, or have nothing to compare: see ``test_upstream``."""


def tiny_config(case: Case, vocab_size: int | None = None) -> Any:
    """The configuration of ``case``; ``vocab_size`` is that of its tokenizer unless it is given."""
    spm = case.family in SPM_FAMILIES
    return CONFIG_CLASSES[case.family](
        **{
            "vocab_size": vocab_size or (4096 if spm else bpe_tokenizer("qwen2").get_vocab_size() + 3),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1 if spm else None,
            "eos_token_id": 2 if spm else 0,
            "pad_token_id": None,
            "rope_parameters": dict(DEFAULT_ROPE),
            **copy.deepcopy(case.config),  # config classes write into their arguments
        }
    )


def build(case: Case, folder: Path, vocab_size: int | None = None) -> None:
    """Save ``case`` with seeded random weights to ``folder``, without a tokenizer if ``vocab_size`` is given."""
    config = tiny_config(case, vocab_size)
    torch.manual_seed(1)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Large enough that attention is far from uniform and that every norm and bias counts.
            scale = 0.3 if name.endswith(("norm.weight", ".bias")) else 2.0 / weight.shape[-1] ** 0.5
            weight.normal_(0.0, scale)
            shifted = case.family in SHIFTED and not name.endswith("linear_attn.norm.weight")  # their code adds the 1
            if name.endswith("norm.weight") and not shifted:
                weight.add_(1.0)
            elif name.endswith("post_feedforward_layernorm.weight"):
                weight.sub_(0.9)  # ggml's GELU is a table of half-precision numbers: its part must be small
    model.to(case.dtype).save_pretrained(
        folder, max_shard_size="60KB" if case.shards else "1GB", save_original_format=not case.fused
    )
    if case.old_config:
        make_config_old(folder)
    if vocab_size is None:
        if case.family in SPM_FAMILIES:
            copy_sentencepiece(folder)
        else:
            save_bpe(folder, "qwen2")


def auto_class(config: Any, *, whole: bool = True) -> Any:
    """What loads a model that predicts text, all of it if ``whole``."""
    # transformers 5.24 cannot run all of a Llama 4 on text: its outputs lack a field.
    whole = hasattr(config, "vision_config") and (whole or config.model_type != "llama4")
    return transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM


def make_config_old(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    for key in ("head_dim", "layer_types"):
        config.pop(key, None)
    path.write_text(json.dumps(config))


def copy_sentencepiece(folder: Path) -> None:
    """Put the bundled SentencePiece tokenizer (4096 pieces) into ``folder``."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)


@cache
def bpe_tokenizer(style: str) -> Tokenizer:
    """A small byte-level BPE tokenizer cut like Llama 3's (``llama3``) or Qwen's (``qwen2``)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    regex = Regex(LLAMA3_REGEX if style == "llama3" else QWEN2_REGEX)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(regex, "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    if style == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 1)]
        )
    return tokenizer


def save_bpe(folder: Path, style: str) -> None:
    """Put :func:`bpe_tokenizer` with its tokenizer_config.json and a chat template into ``folder``."""
    bpe_tokenizer(style).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}",
    }
    if style == "qwen2":
        config |= {"add_bos_token": False, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

"""Which tensors are left to the type that was asked for, and which must not go to 2 bits: one table, with reasons.

A matrix may be small and read by every token (a bottleneck), may be summed up over the whole sequence (a state), may
choose instead of compute (a router), or may be one that no calibration text reaches.  Its error then costs more than
the bytes that a smaller type saves.  Names are those of llama.cpp (``LLM_TENSOR_NAMES`` in ``src/llama-arch.cpp``,
``TENSOR_NAMES`` in gguf's ``constants.py``); the tests hold the table against both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """What a rule says about the type of a tensor of two or more dimensions."""

    FREE = "free"
    """The type that was asked for."""

    VOCABULARY = "vocabulary"
    """A row per token: what the type or mixture gives to embedding and output."""

    MEASURED = "measured"
    """Free with importance or a Hessian of its own, at least :data:`UNMEASURED` without."""

    Q8_0 = "q8_0"
    """q8_0, or the float type that was asked for."""

    KEPT = "kept"
    """f32 or f16 as it is stored, f32 otherwise: read by other operations than a matrix product, of which some
    (convolutions) insist on the type they have; or too small to be worth a thought."""

    F32 = "f32"
    """f32."""


UNMEASURED = "q5_0"
"""The least type of a matrix that no data says anything about where others have data."""


@dataclass(frozen=True)
class Rule:
    """``pattern`` must match a whole tensor name, without the layer in front of it and ``.weight`` behind."""

    fate: Fate
    pattern: str
    reason: str


_ENCODER = r"(?:v|a|mm|resampler)\."

RULES: tuple[Rule, ...] = (
    # llama.cpp loads norms and routers as f32, whatever the file has.
    Rule(
        Fate.F32,
        r"(?:.*[._]|nextn\.[eh])?(?:norm|norm\d|norm_\d|norm_(?:exps|embd|conv|key|query|pre|mid|kv)|ln|ln\d|ln_\w+|ls\d|bn)"
        r"|.*_norm\..*|a\.conv1d\.\d+\.norm",
        "norm",
    ),
    Rule(Fate.F32, r"ffn_gate_inp(?:_shexp)?|exp_probs_b(?:_vl)?", "router: chooses the experts"),
    Rule(Fate.F32, r"attn_sinks", "attention sink: one logit per head in every softmax"),
    Rule(
        Fate.KEPT,
        r"(?:output_|nextn\.)?hc_\w+|(?:attn|ffn|output)_res_score|hrm\.z_l_init",
        "hyper-connection: mixes the residual streams, of which everything after it is made",
    ),
    # Projectors and encoders of images and sound.
    Rule(
        Fate.KEPT,
        _ENCODER + r".*(?:conv|embd|pos|query|peg|sam|patch|rel_|rvq|scale|std_|image_(?:begin|end|newline)|[be]oi"
        r"|seperator).*",
        "no matrix product of an encoder",
    ),
    Rule(
        Fate.Q8_0,
        _ENCODER + r".*",
        "encoder or projector of images or sound: small, shared by all that follows, and no text calibrates it",
    ),
    Rule(
        Fate.MEASURED,
        r"vis_(?:attn_qkv|attn_output|gate|up|down)",
        "expert of image tokens, which a calibration text does not have",
    ),
    # A row per token.
    Rule(
        Fate.VOCABULARY,
        r"token_embd|output|per_layer_token_embd|nextn\.embed_tokens",
        "looked up or scored row by row: a rare token has no other chance",
    ),
    Rule(
        Fate.KEPT,
        r"position_embd|token_types|attn_rot_embd|rope_\w+|altup_\w+|laurel_\w+|per_layer_model_proj|masked_embd_\w+"
        r"|attn_rel_b|cross_attn_rel_b|d2t|ffn_gate_tid2eid|ffn\.act|ffn|layer_output_scale",
        "small, or no matrix product",
    ),
    Rule(
        Fate.Q8_0,
        r"inp_gate|proj|ple_(?:key|value)",
        "gate and projection of the per-layer embeddings: few rows that every channel goes through",
    ),
    # Prediction of further tokens, and draft models.
    Rule(
        Fate.Q8_0,
        r"nextn\.(?:eh_proj|shared_head_head|pre_projection|post_projection)|fc|markov_w[12]|conf_proj|selector_\w+"
        r"|(?:attn|ffn)_conv_proj",
        "joins a draft to the model: its drafts are useless if they are not accepted",
    ),
    Rule(Fate.Q8_0, r"cls(?:\.output)?|dense_[23]|decision\.\w+", "head of a classifier or embedding model"),
    # Attention.
    Rule(
        Fate.Q8_0,
        r"attn_(?:k_b|v_b|kv_b|kv_a_mqa|kv|compressor_(?:kv|gate))",
        "MLA: all heads' keys and values pass through these few channels",
    ),
    Rule(
        Fate.KEPT,
        r"indexer\.[kq]_proj|(?:attn|indexer)_compressor_ape",
        "small; llama.cpp never quantizes it",
    ),
    Rule(
        Fate.Q8_0,
        r"indexer\.(?:attn_k|attn_q_b|proj)|indexer_compressor_(?:kv|gate)|indexer\.kpool_\w+",
        "indexer: chooses the tokens that attention sees",
    ),
    Rule(
        Fate.FREE,
        r"(?:cross_)?attn_(?:q|k|v|o|qkv|output|gate|q_a|q_b|output_a|output_b)",
        "attention",
    ),
    # Feed-forward networks and experts.
    Rule(
        Fate.Q8_0,
        r"ffn_(?:latent|routed)_(?:down|up)",
        "bottleneck in front of and behind all experts of a layer",
    ),
    Rule(
        Fate.FREE,
        r"ffn_(?:gate|up|down|gate_up)(?:_exps|_chexps|_shexp|\.\d+)?",
        "feed-forward network or experts",
    ),
    # State-space models, linear attention, convolutions.
    Rule(
        Fate.KEPT,
        r"ssm_(?:conv1d\w*|a|d)|shortconv\.conv|ple_conv1d|(?:attn|ffn)_conv_base",
        "convolution or decay",
    ),
    Rule(
        Fate.Q8_0,
        r"ssm_(?:alpha|beta|ba|dt|x|g|[fg]_[ab])",
        "gate of a state: few rows, and their errors add up over the sequence",
    ),
    Rule(Fate.Q8_0, r"ssm_out", "output of a state: what it carries of the whole sequence passes here"),
    Rule(Fate.FREE, r"ssm_in|shortconv\.(?:in|out)_proj", "input of a state, or projection around a convolution"),
    Rule(
        Fate.KEPT,
        r"time_mix_(?:first|[wva][012]|g[12]|decay|decay_w[12]|lerp_\w+|k_[ka]|r_k|ln)|channel_mix_lerp_\w",
        "small weights of RWKV, no matrix product",
    ),
    Rule(
        Fate.FREE,
        r"time_mix_(?:key|value|receptance|gate|output)|channel_mix_(?:key|value|receptance)",
        "RWKV's matrices",
    ),
    # Decoders of sound.
    Rule(Fate.KEPT, r"conv1d|convnext\.\d+\.(?:dw|gamma)|posnet\.\d+\.\w+", "convolution"),
    Rule(Fate.FREE, r"convnext\.\d+\.pw[12]", "feed-forward network"),
)
"""The first rule that matches a name decides."""

_COMPILED = [(re.compile(rule.pattern), rule) for rule in RULES]
_LAYER = re.compile(r"^(?:(?:enc|dec)\.)?blk\.\d+\.")
_MTP = re.compile(r"^blk\.(\d+)\.nextn\.")
_OF_LAYER = re.compile(r"^blk\.(\d+)\.")

NOT_A_PRODUCT = Rule(Fate.KEPT, "", "not a matrix product")
MTP_BLOCK = Rule(Fate.MEASURED, "", "block that predicts further tokens, which llama.cpp's calibration does not run")


def rule_of(name: str) -> Rule | None:
    """The rule of a tensor of two or more dimensions by its GGUF name; ``None`` where none has been made.

    What is no ``.weight`` is no matrix of a product.
    """
    stem = _LAYER.sub("", name)
    weight = stem.endswith(".weight")
    stem = stem.removesuffix(".weight")
    for pattern, rule in _COMPILED:
        if pattern.fullmatch(stem):
            return rule if weight or rule.fate in (Fate.F32, Fate.KEPT) else NOT_A_PRODUCT
    return None if weight else NOT_A_PRODUCT


def mtp_layers(names: Iterable[str]) -> frozenset[str]:
    """Numbers of the layers that predict further tokens: those with a tensor ``nextn``."""
    return frozenset(found[1] for name in names if (found := _MTP.search(name)))


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row per token: an embedding or the output matrix."""
    rule = rule_of(name)
    return rule is not None and rule.fate is Fate.VOCABULARY


def never_quantized(name: str) -> bool:
    """Whether a tensor of that name stays a float."""
    rule = rule_of(name)
    return rule is not None and rule.fate in (Fate.F32, Fate.KEPT)


def in_layers(name: str, layers: frozenset[str]) -> bool:
    """Whether a tensor is of one of these layers."""
    found = _OF_LAYER.search(name)
    return found is not None and found[1] in layers

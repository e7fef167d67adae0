"""Importance for matrices that an importance file has no entry for: that of another tensor with the same input.

An entry is missing where the file was made from one with other names (query, key and value fused or not; experts' gate
and up fused or not), where llama.cpp does not run the matrix (blocks that predict more tokens), or where the numbers
were unusable.  Two ways to have it all the same:

1. Another matrix is multiplied with the same vectors (:data:`INPUTS`).  Its importance is exactly the missing one.
2. The input is the output of an RMS norm: normalized vectors times the norm's weights.  The squares of those vectors
   hardly change from one norm on the residual stream to the next, so that the entry of the nearest one (of two as near
   that of the same layer), times the ratio of the squared norm weights, will do.

Missing Hessians are had in the first way only.

Measured on SmolLM2-135M, each input's mean squares H taken for unknown: the error ``sum_j H_j e_j^2`` of noise shaped
by an estimate (power 3/4, the same product of all ``e_j`` in each 64), over that of equal noise, geometric mean of the
layers and worst layer.

===========================  ============  ============  =============  =============
input of                     the own H     way 2         without ratio  another layer
===========================  ============  ============  =============  =============
attention                    0.29, 0.45    0.30, 0.45    4.9, 1900      0.35, 2.6
FFN                          0.63, 0.84    0.64, 0.96    0.70, 2.1      0.88, 540
attention output             0.72                                       1.11
FFN down                     0.39                                       1.15
output (one)                 0.22          0.30
===========================  ============  ============  =============  =============

Attention output and FFN down, whose channels are each layer's own, have nothing from other layers.

The names are those of ``gguf.constants.TENSOR_NAMES``; what multiplies what is from llama.cpp's ``src/models``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .hessian import Hessians
from .imatrix import Entry, Importance
from .tensors import TensorSource

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Input:
    """Matrices of a layer that are multiplied with the same vectors, and the norms that may make those: of the names
    in ``norms``, the first that the layer has and whose ``unless`` it has not.  ``half`` says where in its layer that
    is: 0 attention, 1 FFN, 2 after both."""

    tensors: tuple[str, ...]
    norms: tuple[tuple[str, str | None], ...] = ()
    half: int = 0


_FFN_NORMS = (
    ("ffn_norm", None),
    # Where a layer norms what FFN gives, this one norms what attention gives (OLMo 2), else it is FFN's (Qwen3-Next).
    ("post_attention_norm", "post_ffw_norm"),
    # Attention and FFN side by side (Command R), or layers of one part only (Nemotron-H).
    ("attn_norm", "post_ffw_norm"),
)

INPUTS = (
    # Attention and its relatives: MLA's first projections, output gates, the indexer of sparse attention, linear
    # attention, the state space half of a hybrid layer, short convolutions.
    Input(
        (
            *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_kv_a_mqa", "attn_gate", "indexer.attn_k"),
            *("indexer.proj", "ssm_in", "ssm_ba", "ssm_alpha", "ssm_beta", "ssm_f_a", "ssm_g_a", "shortconv.in_proj"),
        ),
        (("attn_norm_2", None), ("attn_norm", None)),
    ),
    Input(("attn_q_b", "indexer.attn_q_b")),  # MLA's latent query
    Input(("cross_attn_k", "cross_attn_v")),  # what an encoder gave
    Input(("ffn_gate", "ffn_up"), _FFN_NORMS, 1),
    # Experts share their input with the shared expert and the router; each expert is given a part of it.
    Input(
        (
            *("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_gate_chexps", "ffn_up_chexps"),
            *("ffn_gate_shexp", "ffn_up_shexp", "ffn_latent_down", "ffn_gate_inp", "ffn_gate_inp_shexp"),
        ),
        (("pre_ffw_norm_2", None), ("ffn_norm_exps", None), *_FFN_NORMS),
        1,
    ),
    Input(("vis_gate", "vis_up")),
    Input(("nextn.shared_head_head",), (("nextn.shared_head_norm", None),), 2),
)
"""Which tensors of a layer (names without ``blk.N.`` and ``.weight``) have the same input."""

_ROUTER = re.compile(r"^ffn_gate_inp")
_STACK = re.compile(r"_(ch)?exps$")
_OUTPUT = Input(("output", "token_embd"), (("output_norm", None),))
"""The end of the residual stream; an embedding only where it is the output matrix as well."""

_OF = {tensor: group for group in INPUTS for tensor in group.tensors}
_LAYERED = re.compile(r"^(?P<stream>.*blk\.)(?P<layer>\d+)\.(?P<tensor>.+)\.weight$")


def input_of(name: str) -> object:
    """What the input of a matrix is known by: equal for two of one layer that are multiplied with the same vectors."""
    match = _LAYERED.match(name)
    group = _OF.get(match["tensor"]) if match else None
    return (match["stream"], match["layer"], group) if match and group else name


@dataclass(frozen=True)
class _Place:
    """An input of the model: the layer's prefix (``blk.3.``), which of its inputs, and where on which residual stream
    that is taken."""

    prefix: str
    group: Input
    stream: str
    position: int


def complete(importance: Importance, sources: Sequence[TensorSource]) -> Importance:
    """``importance`` with entries for those matrices of the model that have none and for which one can be had, noted in
    ``borrowed`` (way 1) and ``estimated`` (way 2).  ``sources`` are all tensors of the model, norms included."""
    model = _Model(sources, importance)
    found: dict[str, Entry] = {}
    borrowed: dict[str, str] = {}
    estimated: dict[str, str] = {}
    for source in sources:
        place = model.place(source.name) if source.name not in importance else None
        if place is None:
            continue
        if (same := model.same_input(source, place)) is not None:
            borrowed[source.name], found[source.name] = same
        elif (near := model.nearby(source, place)) is not None:
            estimated[source.name], found[source.name] = near
    if not found:
        return importance
    return replace(importance, entries={**importance.entries, **found}, borrowed=borrowed, estimated=estimated)


def complete_hessians(hessians: Hessians, sources: Sequence[TensorSource]) -> Hessians:
    """``hessians`` with those of tensors with the same input for matrices that have none."""
    model = _Model(sources)
    shared: dict[str, str] = {}
    for source in sources:
        place = model.place(source.name) if source.name not in hessians else None
        if place is None:
            continue
        for name in model.members(place, source.name):
            if hessians.fits(name, source.matrices, source.row_len):
                shared[source.name] = name
                break
    return hessians.sharing(shared) if shared else hessians


class _Model:
    """Where a model's tensors have their inputs from, and the entries of an importance file."""

    def __init__(self, sources: Sequence[TensorSource], importance: Importance | None = None) -> None:
        self.entries = importance.entries if importance is not None else {}
        self.sources = {source.name: source for source in sources}
        self.layers = 1 + max(
            (int(m["layer"]) for n in self.sources if (m := _LAYERED.match(n)) and not self._predicts(m)), default=-1
        )
        places = {place for name in self.entries if (place := self.place(name))}
        self.known = sorted(places, key=lambda place: (place.position, place.prefix))

    def _predicts(self, match: re.Match[str]) -> bool:
        """Whether a layer is one that predicts further tokens, after the end of the residual stream."""
        prefix = f"{match['stream']}{match['layer']}."
        return f"{prefix}nextn.eh_proj.weight" in self.sources

    def place(self, name: str) -> _Place | None:
        """Where the input of a matrix is taken, ``None`` where that is not known."""
        match = _LAYERED.match(name)
        if match is None:
            role = name.removesuffix(".weight")
            tied = "output.weight" not in self.sources
            if role == "output" or (role == "token_embd" and tied):
                return _Place("", _OUTPUT, "blk.", 2 * self.layers)
            return None
        tensor, stream, layer = match["tensor"], match["stream"], int(match["layer"])
        group = _OF.get(tensor)
        if group is None:
            return None
        return _Place(f"{stream}{layer}.", group, stream, 2 * layer + group.half)

    def same_input(self, source: TensorSource, place: _Place) -> tuple[str, Entry] | None:
        """Name of another tensor with the same input, and its entry."""
        for name in self.members(place, source.name):
            entry = self.entries.get(name)
            sets = _sets(name, entry, source.row_len) if entry is not None else None
            if sets is not None:
                return name, _fitted(*sets, source.matrices)
        return None

    def nearby(self, source: TensorSource, place: _Place) -> tuple[str, Entry] | None:
        """Name of a tensor whose input is another norm's output, and its entry brought to this norm's weights."""
        norm = self._norm(place, source.row_len)
        if norm is None:
            return None
        near = [p for p in self.known if p.stream == place.stream and p != place]
        for other in sorted(near, key=lambda p: (abs(p.position - place.position), p.prefix != place.prefix)):
            theirs = self._norm(other, source.row_len)
            if theirs is None or ((norm[1] or theirs[1]) and norm[0] != theirs[0]):
                continue  # A norm that adds something has no outputs in proportion to its weights.
            for name in self.members(other):
                entry = self.entries.get(name)
                sets = _sets(name, entry, source.row_len) if entry is not None else None
                if sets is not None:
                    sums, counts = (part.sum(axis=0, keepdims=True) for part in sets)
                    return name, _fitted(_rescaled(sums, theirs[2], norm[2]), counts, 1)
        return None

    def members(self, place: _Place, name: str | None = None) -> list[str]:
        """Tensors with the input at ``place``; for an expert stack ``name`` stacks first, for others the others."""
        names = [f"{place.prefix}{tensor}.weight" for tensor in place.group.tensors]
        if f"{place.prefix}pre_ffw_norm_2.weight" in self.sources:
            names = [n for n in names if not _ROUTER.match(_role(n))]  # Gemma 4's router has a norm of its own.
        stack = name is not None and bool(_STACK.search(_role(name)))
        return sorted((n for n in names if n != name), key=lambda n: bool(_STACK.search(_role(n))) != stack)

    def _norm(self, place: _Place, row_len: int) -> tuple[str, bool, F64] | None:
        """Name of the norm whose output is taken at ``place``, whether it has a bias, and its squared weights."""
        for norm, unless in place.group.norms:
            name = f"{place.prefix}{norm}"
            source = self.sources.get(f"{name}.weight")
            if source is None or source.n_weights != row_len:
                continue
            if unless is None or f"{place.prefix}{unless}.weight" not in self.sources:
                weights = source.load_rows(0, source.rows).astype(np.float64).reshape(-1)
                return name, f"{name}.bias" in self.sources, np.square(weights)
        return None


def _role(name: str) -> str:
    match = _LAYERED.match(name)
    return match["tensor"] if match else name.removesuffix(".weight")


def _sets(name: str, entry: Entry, row_len: int) -> tuple[F64, F64] | None:
    """Sums ``[sets, row_len]`` and counts ``[sets, 1]`` of an entry, ``None`` if it has not that row length."""
    n_sets, rest = divmod(entry.sums.size, row_len)
    if rest or entry.counts.size not in (1, n_sets) or (n_sets > 1 and not _STACK.search(_role(name))):
        return None
    sums, counts = entry.sums.reshape(n_sets, row_len).astype(np.float64), entry.hits(n_sets)[:, None]
    return np.where(counts > 0, sums, 0.0), counts


def _fitted(sums: F64, counts: F64, matrices: int) -> Entry:
    """An entry for ``matrices`` matrices: each expert's own set where there are as many, else one for all."""
    if len(sums) != matrices:
        sums, counts = sums.sum(axis=0, keepdims=True), counts.sum(axis=0, keepdims=True)
    return Entry(sums.reshape(-1).astype(np.float32), counts.reshape(-1))


def _rescaled(sums: F64, theirs: F64, ours: F64) -> F64:
    """Sums of squares behind one norm brought to another's squared weights.  A channel that the first norm has silenced
    counts as the mean of the others."""
    heard = theirs > 0
    normalized = np.divide(sums, theirs, out=np.zeros_like(sums), where=heard)
    if heard.any():
        normalized[:, ~heard] = normalized[:, heard].mean()
    scaled: F64 = normalized * ours
    return scaled


def summary(names: Iterable[str]) -> str:
    """Names for people, layers drawn together: ``blk.0-2,5.attn_q.weight, output.weight``."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = _LAYERED.match(name)
        key = f"{match['stream']}{{}}.{match['tensor']}.weight" if match else name
        groups.setdefault(key, []).extend([int(match["layer"])] if match else [])
    return ", ".join(key.format(_ranges(layers)) if layers else key for key, layers in groups.items())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

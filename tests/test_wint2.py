"""ERNIE 4.5's 2-bit release: checkpoints in its layout become GGUF files with the same weights, and run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import ccq_backend
from ccq_converters.cli import main
from ccq_converters.dequantize import dequantize
from ccq_converters.hf2gguf import convert
from ccq_converters.options import QuantOptions
from ccq_converters.sources import wint2
from ccq_format import codec, layouts
from ccq_format.errors import CcqError, PlanError
from ccq_format.gguf_io import Model, open_model
from support.commands import without_advice
from support.ernie_wint2 import Release, bf16, make, natural, pack_wint4, pack_wint8

from .test_hf2gguf_logits import TOLERANCE, in_llama_cpp, in_transformers
from .upstream_diff.models import Case, build

SHARD = "model.safetensors"
TOKENS = np.random.default_rng(7).integers(3, 500, 48).tolist()
KEPT = {"attn_q": "q8_0", "ffn_down": "q8_0", "token_embd": "bf16", "output": "bf16", "ffn_gate_inp": "f32"}


@pytest.fixture(scope="module")
def releases() -> dict[str, Release]:
    """One in each order of the inputs."""
    return {order: make(order) for order in wint2.ORDERS}


@pytest.fixture(scope="module")
def folders(releases: dict[str, Release], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The releases, saved; and imported, beside them, as ``ORDER.gguf``."""
    root = tmp_path_factory.mktemp("releases")
    for order, release in releases.items():
        convert(release.save(root / order), root / f"{order}.gguf", QuantOptions("keep"), progress=False)
    return {order: root / order for order in releases}


def renumbered(name: str, x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A tensor of the original model (gguf's name) as the file has it whose hidden states, and inner channels of wint2
    experts, have the order ``order``."""

    def moved(axis: int) -> np.ndarray:
        return np.moveaxis(wint2.reordered(np.moveaxis(x, axis, -1), order), -1, axis)

    kind = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    if kind in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_gate_inp", "token_embd", "output"):
        return moved(-1)
    if kind in ("attn_output", "ffn_down"):
        return moved(-2)
    if kind.endswith("_norm"):
        return moved(-1)
    if kind == "ffn_down_exps":
        x = moved(-2)
        return moved(-1) if name.startswith("blk.2.") else x
    if kind in ("ffn_gate_exps", "ffn_up_exps"):
        x = moved(-1)
        return moved(-2) if name.startswith("blk.2.") else x
    assert kind == "exp_probs_b"
    return x


def expected(release: Release) -> dict[str, np.ndarray]:
    """The generator's weights under gguf's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.ERNIE4_5_MOE, 3)
    out: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, w in release.weights.items():
        if ".experts." in name:
            head, tail = name.split(".experts.")
            stacks.setdefault(f"{head}.experts.{tail.split('.', 1)[1]}", []).append(w)
        elif name.endswith("e_score_correction_bias"):
            out[f"blk.{name.split('.')[2]}.exp_probs_b.bias"] = w[0]
        else:
            out[names.get_name(name, (".weight",))] = w
    return out | {names.get_name(name, (".weight",)): np.stack(ws) for name, ws in stacks.items()}


def assert_weights(model: Model, release: Release, tied: bool = False) -> None:
    """Bit for bit the generator's, after the renumbering that the file's key names."""
    key = model.fields.get("ernie4_5-moe.residual_order")
    order = np.arange(64) if key is None else np.array(key.value)
    wanted = expected(release)
    if tied:
        del wanted["output.weight"]
    assert {t.name for t in model.tensors} == set(wanted)
    for tensor in model.tensors:
        w = renumbered(tensor.name, wanted[tensor.name], order)
        np.testing.assert_array_equal(tensor.dequantize().view(np.uint32), w.view(np.uint32), tensor.name)


@pytest.mark.parametrize(
    ("order", "settings"),
    [
        ("natural", {"u16": True}),
        ("natural", {"u16": False, "f32_scales": True, "tied": True}),
        ("shuffled", {"u16": False}),
        ("shuffled", {"u16": True, "f32_scales": True, "tied": True}),
    ],
)
def test_weights_bit_for_bit(
    releases: dict[str, Release], order: str, settings: dict[str, bool], tmp_path: Path
) -> None:
    folder = releases[order].save(tmp_path / "model", **settings)
    convert(folder, tmp_path / "out.gguf", QuantOptions("keep"), progress=False)
    model = open_model(tmp_path / "out.gguf")
    assert_weights(model, releases[order], settings.get("tied", False))
    if order == "shuffled":
        assert list(model.fields["ernie4_5-moe.residual_order"].value)[:8] == [0, 1, 8, 9, 16, 17, 24, 25]


def test_types_and_bytes(folders: dict[str, Path], releases: dict[str, Release]) -> None:
    model = open_model(folders["natural"].with_suffix(".gguf"))
    for tensor in model.tensors:
        kind = tensor.name.split(".")[-2]
        expert = "q4_0" if tensor.name.startswith("blk.1.") else "ccq_p2"
        assert tensor.type_name == (expert if kind.endswith("_exps") else KEPT.get(kind, tensor.type_name))
    up = next(t for t in model.tensors if t.name == "blk.2.ffn_up_exps.weight")
    blocks = up.data().reshape(3, 512, 2, 142)
    files = releases["natural"].files
    for e, n, b in ((0, 0, 0), (1, 77, 1), (2, 511, 1)):
        prefix, row = f"ernie.layers.2.mlp.experts.{e}.up_gate_proj", 512 + n
        block = blocks[e, n, b]
        np.testing.assert_array_equal(block[14:], files[f"{prefix}.quant_weight"][128 * b : 128 * b + 128, row])
        np.testing.assert_array_equal(block[10:14], files[f"{prefix}.weight_scale"][4 * b : 4 * b + 4, row])
        np.testing.assert_array_equal(block[2:6].view("<f4")[0], files[f"{prefix}.code_scale"][row])
        np.testing.assert_array_equal(block[6:10].view("<f4")[0], files[f"{prefix}.code_zp"][row])
        upper = np.ascontiguousarray(files[f"{prefix}.super_scales"][row : row + 1]).view(np.uint16)[1]
        assert block[:2].view("<u2")[0] == upper


def test_logits(releases: dict[str, Release], folders: dict[str, Path], tmp_path: Path) -> None:
    """The decoded import against transformers and against llama.cpp on the original order; then the import itself,
    whose products llama.cpp computes with activations in 8 bits."""
    plain = releases["shuffled"].save_plain(tmp_path / "plain")
    convert(plain, tmp_path / "plain.gguf", QuantOptions("f32"), progress=False)
    imported = folders["shuffled"].with_suffix(".gguf")
    dequantize(imported, tmp_path / "decoded.gguf", "f32", progress=False)
    theirs, original, decoded = (
        in_transformers(plain, TOKENS),
        in_llama_cpp(tmp_path / "plain.gguf", TOKENS),
        in_llama_cpp(tmp_path / "decoded.gguf", TOKENS),
    )
    assert theirs.std(axis=0).max() > 0.5
    assert np.abs(decoded - original).max() <= TOLERANCE
    assert np.abs(decoded - theirs).max() <= TOLERANCE
    ccq_backend.load_plugin()
    # The same weights in Q8_0, whose products llama.cpp computes likewise.
    convert(plain, tmp_path / "q8_0.gguf", QuantOptions("q8_0"), progress=False)
    ours, stock = (
        np.median((np.exp(decoded) * (decoded - in_llama_cpp(path, TOKENS))).sum(-1))
        for path in (imported, tmp_path / "q8_0.gguf")
    )
    print(f"KL divergence of the import {ours:.2e}, of Q8_0 {stock:.2e}")
    assert 0 < ours <= 2 * stock


# --- packing --------------------------------------------------------------------------------------------------------

UNPACK = {8: wint2.unpack_wint8, 4: wint2.unpack_wint4}


def packed_codes(bits: int) -> np.ndarray:
    """What tests/data/weight-quantize.npz holds as PaddlePaddle 3.3.1 packs it (:func:`by_paddle`): int64 [16, 64]."""
    n, k = np.indices((16, 64))
    largest = (1 << bits - 1) - 1
    codes = (37 * k + 101 * n + k * k // 7 + k // 64) % (2 * largest + 1) - largest
    codes[range(16), range(16)] = largest  # every scale is 1
    return codes


def by_paddle(w: np.ndarray, bits: int, arch: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and scales of ``[N, K]`` by PaddlePaddle's CPU kernel."""
    paddle = pytest.importorskip("paddle", reason="the oracle of wint8 and wint4: pip install paddlepaddle==3.3.1")
    x = paddle.to_tensor(np.ascontiguousarray(w.T, np.float32)).cast("bfloat16")
    q, scale = paddle.nn.quant.weight_quantize(x, algo=f"weight_only_int{bits}", arch=arch)
    return q.numpy().view(np.uint8), scale.cast("float32").numpy()


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_paddles(bits: int) -> None:
    stored = np.load(Path(__file__).parent / "data" / "weight-quantize.npz")[f"wint{bits}"]
    np.testing.assert_array_equal(UNPACK[bits](stored, 64), packed_codes(bits))
    pack = {8: pack_wint8, 4: pack_wint4}[bits]
    np.testing.assert_array_equal(pack(packed_codes(bits)).view(np.uint8), stored)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90])
@pytest.mark.parametrize("bits", [8, 4])
def test_packing_against_paddle(bits: int, arch: int) -> None:
    stored = np.load(Path(__file__).parent / "data" / "weight-quantize.npz")[f"wint{bits}"]
    np.testing.assert_array_equal(by_paddle(packed_codes(bits), bits, arch)[0], stored)
    w = bf16(np.random.default_rng(arch).standard_normal((64, 1024)))
    data, scale = by_paddle(w, bits, arch)
    error = np.abs(UNPACK[bits](data, 1024) * scale[:, None] - w)
    assert (error <= 0.51 * scale[:, None]).all()


def test_the_shuffle() -> None:
    np.testing.assert_array_equal(natural(wint2.SHUFFLED), np.arange(64))
    assert wint2.SHUFFLED[:16].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41, 48, 49, 56, 57]


# --- the order of the inputs ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make_copy(order: str = "shuffled") -> Path:
        return Path(shutil.copytree(folders[order], tmp_path / "model"))

    return make_copy


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save the checkpoint's tensors again after ``change``."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SHARD)


def fails(folder: Path, *words: str, options: QuantOptions | None = None) -> CcqError:
    """Importing raises an error with all ``words``, and leaves nothing behind."""
    with pytest.raises(CcqError) as caught:
        convert(folder, folder.parent / "out.gguf", options or QuantOptions("keep"), progress=False)
    for word in words:
        assert word in str(caught.value)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    return caught.value


def test_order_that_cannot_be_told(copy: Callable[[str], Path]) -> None:
    def scramble(tensors: dict[str, torch.Tensor]) -> None:
        rng = np.random.default_rng(0)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8 and name.endswith(".quant_weight"):
                at = rng.permuted(np.arange(len(tensor)).reshape(-1, 16), axis=1).reshape(-1)
                tensors[name] = tensor[torch.from_numpy(at)]

    folder = copy("shuffled")
    edit(folder, scramble)
    fails(folder, str(folder), "cannot be told", "norm gains", "--k-order")
    for order in wint2.ORDERS:
        options = QuantOptions("keep", k_order=order, overwrite=True)
        convert(folder, folder.parent / "out.gguf", options, progress=False)
        known = "ernie4_5-moe.residual_order" in open_model(folder.parent / "out.gguf").fields
        assert known == (order == "shuffled")


def test_order_that_is_contradictory(copy: Callable[[str], Path]) -> None:
    def shuffle_norm(tensors: dict[str, torch.Tensor]) -> None:
        name = "ernie.layers.2.post_attention_layernorm.weight"
        order = torch.from_numpy(np.argsort(wint2.reordered(np.arange(1024), wint2.SHUFFLED)))
        tensors[name] = tensors[name].view(torch.int16)[order].view(torch.uint16)

    folder = copy("natural")
    edit(folder, shuffle_norm)
    fails(folder, "is contradictory", "norm gains", "gate and up against down", "the layer before", "--k-order")


def test_order_of_another_checkpoint(tmp_path: Path) -> None:
    build(Case("m", "llama", {"num_hidden_layers": 1}), tmp_path / "model")
    fails(tmp_path / "model", "--k-order", "no wint2", options=QuantOptions("keep", k_order="natural"))


# --- what is refused ------------------------------------------------------------------------------------------------

EXPERT = "ernie.layers.2.mlp.experts.1"
DENSE = "ernie.layers.0.self_attn.o_proj"
WINT4 = "ernie.layers.1.mlp.experts.2.down_proj"


def u16(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.bfloat16).view(torch.uint16)


def put(name: str, value: torch.Tensor | float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Set the sixth element of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        bits = torch.int16 if tensors[name].dtype == torch.uint16 else tensors[name].dtype
        new = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        tensors[name].view(bits)[5] = new.view(bits)

    return change


def replace(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, new(tensors[name]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{EXPERT}.down_proj.quant_weight"), [f"{EXPERT}.down_proj.quant_weight", "is missing"]),
        (lambda t: t.pop(f"{EXPERT}.up_gate_proj.code_zp"), [f"{EXPERT}.up_gate_proj.code_zp", "is missing"]),
        (lambda t: t.pop(f"{WINT4}.weight_scale"), [f"{WINT4}.weight_scale", "is missing"]),
        (lambda t: t.pop(f"{DENSE}.quant_weight"), [f"{DENSE}.quant_weight", "is missing"]),
        (replace(f"{EXPERT}.up_gate_proj.quant_weight", lambda t: t[:, :-64]), ["[256, 960]", "[256, 1024]"]),
        (replace(f"{EXPERT}.up_gate_proj.weight_scale", lambda t: t.T), ["[1024, 8]", "[8, 1024]"]),
        (replace(f"{WINT4}.quant_weight", lambda t: t[:-2]), [f"{WINT4}.quant_weight", "[510, 512]", "[512, 512]"]),
        (replace(f"{DENSE}.quant_weight", lambda t: t[:960]), [f"{DENSE}.quant_weight", "[960, 1024]"]),
        (replace("ernie.layers.1.mlp.gate.weight", lambda t: t.T), ["mlp.gate.weight", "[3, 1024]", "[1024, 3]"]),
        (replace("lm_head.weight", lambda t: t[:, :-1]), ["lm_head.weight", "[1024, 511]"]),
        (
            replace(f"{EXPERT}.down_proj.super_scales", lambda t: t.view(torch.bfloat16).half()),
            [f"{EXPERT}.down_proj.super_scales", "is stored as F16, not as BF16 or U16"],
        ),
        (replace(f"{EXPERT}.down_proj.code_scale", lambda t: t.double()), ["code_scale", "is stored as F64"]),
        (replace(f"{WINT4}.weight_scale", lambda t: t.float()), [f"{WINT4}.weight_scale", "is stored as F32, not as"]),
        (put(f"{EXPERT}.down_proj.super_scales", u16(float("nan"))), ["down_proj", "super_scale", "not finite"]),
        (put(f"{EXPERT}.up_gate_proj.code_zp", float("inf")), ["up_gate_proj", "code_zp", "not finite"]),
        (put(f"{EXPERT}.up_gate_proj.code_scale", float("nan")), ["up_gate_proj", "code_scale", "not finite"]),
        (put(f"{DENSE}.weight_scale", u16(2.0**-25)), [f"{DENSE}.weight_scale", "2.98023e-08", "q8_0"]),
        (put(f"{WINT4}.weight_scale", u16(2.0**17)), [f"{WINT4}.weight_scale", "131072", "q4_0"]),
        (put(f"{WINT4}.weight_scale", u16(float("nan"))), [f"{WINT4}.weight_scale", "nan", "q4_0"]),
        (
            lambda t: t.update({"ernie.layers.0.self_attn.qkv_proj.bias": torch.zeros(4)}),
            ["ernie.layers.0.self_attn.qkv_proj.bias", "is unexpected"],
        ),
    ],
)
def test_tensors(
    change: Callable[[dict[str, torch.Tensor]], object], words: list[str], copy: Callable[[str], Path]
) -> None:
    folder = copy()
    edit(folder, change)
    fails(folder, *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("moe_layer_interval", 2, ["'moe_layer_interval' is 2"]),
        ("moe_layer_end_index", 1, ["'moe_layer_end_index' is 1"]),
        ("moe_num_experts", 4, ["ernie.layers.1.mlp.gate.weight", "[1024, 3]", "[1024, 4]"]),
        ("num_hidden_layers", 2_000_000_000, ["is missing", "2000000000 layers"]),
        ("moe_intermediate_size", 1024, ["ernie.layers.2.mlp.experts.0.up_gate_proj.quant_weight", "[256, 1024]"]),
        ("quantization_config", {"dense_quant_type": "wint4"}, ["'dense_quant_type' is 'wint4'"]),
        ("quantization_config", {"moe_quant_type": "wint2"}, ["'moe_quant_type' is 'wint2'"]),
        ("quantization_config", {"is_permuted": False}, ["'is_permuted' is False"]),
        ("quantization_config", "wint2", ["must be an object"]),
    ],
)
def test_config(key: str, value: object, words: list[str], copy: Callable[[str], Path]) -> None:
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    fails(folder, *words)


class Exploding:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("name", ["model_state.pdparams", "pytorch_model.bin"])
def test_pickles_are_not_opened(name: str, copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = copy()
    torch.save(Exploding(), folder / name)
    convert(folder, folder.parent / "out.gguf", QuantOptions("keep"), progress=False)
    assert (f"{name}: not read: a Python pickle" in caplog.text) == (name == "model_state.pdparams")
    (folder.parent / "out.gguf").unlink()
    (folder / SHARD).unlink()
    fails(folder, "holds no model.safetensors", f"{name} is no safetensors file")


def test_ranks(copy: Callable[[str], Path]) -> None:
    folder = copy()
    for rank in ("rank0", "rank1"):
        (folder / rank).mkdir()
    (folder / SHARD).rename(folder / "rank0" / SHARD)
    fails(folder, "is split for tensor parallelism", "take the TP1 release")


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(copy: Callable[[str], Path], releases: dict[str, Release]) -> None:
    folder = copy()
    out = folder.parent / "out.gguf"
    result = CliRunner().invoke(main, ["hf2gguf", str(folder), "-o", str(out)])
    assert result.exit_code == 0
    (note,) = result.stderr.splitlines()
    assert note.startswith("Note: ")
    assert "wint2 inputs are shuffled" in note
    assert_weights(open_model(out), releases["shuffled"])
    inspected = CliRunner().invoke(main, ["inspect", str(out)])
    assert inspected.exit_code == 0
    assert "ccq_p2" in inspected.stdout
    result = CliRunner().invoke(main, ["hf2gguf", str(folder), "--dry-run", "--type", "ccq_t2"])
    assert result.exit_code == 0
    assert "ccq_p2  ccq_t2" in result.stdout
    assert "Warning" not in without_advice(result.stderr)


def test_others_are_encoded_from_what_it_stands_for(folders: dict[str, Path], releases: dict[str, Release]) -> None:
    out = folders["shuffled"].with_name("mixed.gguf")
    options = QuantOptions("keep", overrides=[("blk.2.ffn_up", "q8_0"), ("blk.1.ffn_up", "ccq_t2")], effort="fast")
    convert(folders["shuffled"], out, options, progress=False)
    tensors = {t.name: t for t in open_model(out).tensors}
    order = wint2.SHUFFLED
    wanted = renumbered("blk.2.ffn_up_exps.weight", expected(releases["shuffled"])["blk.2.ffn_up_exps.weight"], order)
    got = tensors["blk.2.ffn_up_exps.weight"]
    assert got.type_name == "q8_0"
    assert np.square(got.dequantize() - wanted).mean() < 1e-4 * np.square(wanted).mean()
    assert tensors["blk.1.ffn_up_exps.weight"].type_name == "ccq_t2"
    assert tensors["blk.2.ffn_down_exps.weight"].type_name == "ccq_p2"


def test_keep(tmp_path: Path) -> None:
    build(Case("m", "llama", {"num_hidden_layers": 1}, torch.bfloat16), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out.gguf", QuantOptions("keep"), progress=False)
    assert {t.type_name for t in open_model(tmp_path / "out.gguf").tensors if len(t.shape) > 1} == {"bf16"}


def test_keep_what_no_file_can_have(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(Case("m", "llama", {"num_hidden_layers": 1}), folder)
    tensors = load_file(folder / SHARD)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}, folder / SHARD
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(PlanError, match=r"blk\.0\.ffn_up\.weight.*is fp8, which cannot be kept"):
        convert(folder, tmp_path / "out.gguf", QuantOptions("keep"), progress=False)


# --- the released kernel --------------------------------------------------------------------------------------------


def test_fused_states() -> None:
    """What spec section 6 says of a kernel that computes ``floor(fma(c, code_scale, code_zp + 0.5))``."""
    rng = np.random.default_rng(0)
    rows = 4_000
    blocks = rng.integers(0, 256, (rows, 142), dtype=np.uint8)
    code_scale = rng.uniform(95, 128, rows).astype(np.float32)
    code_zp = rng.uniform(0, 4000, rows).astype(np.float32)
    blocks[:, :2] = np.array([0x3F80], "<u2").view(np.uint8)
    blocks[:, 2:6], blocks[:, 6:10] = code_scale.view(np.uint8).reshape(-1, 4), code_zp.view(np.uint8).reshape(-1, 4)
    w = codec.decode(layouts.by_name("ccq_p2"), blocks).reshape(rows, 128, 4)
    # The product of a byte and a float32 is exact in float64, and so is the sum here: one rounding, then floor.
    half = (code_zp + np.float32(0.5)).astype(np.float64)
    exact = blocks[:, 14:].astype(np.float64) * code_scale[:, None].astype(np.float64) + half[:, None]
    fused = np.floor(exact.astype(np.float32)).astype(np.int64)
    local = np.repeat(np.stack((blocks[:, 10:14] >> 4, blocks[:, 10:14] & 15), -1).reshape(rows, 8), 16, 1)
    kernel = ((((fused[:, :, None] >> np.array([9, 6, 3, 0])) & 63) - 32) * local[:, :, None]).astype(np.float32)
    differ = (w != kernel).any(-1)[local > 0]
    loss = np.square(w - kernel, dtype=np.float64).sum() / np.square(w, dtype=np.float64).sum()
    rounding = np.square(w * rng.uniform(-(2.0**-9), 2.0**-9, w.shape)).sum() / np.square(w).sum()
    print(f"{differ.mean():.2e} of the codes differ, by {loss:.1e} of the signal; bf16 {rounding:.1e}")
    assert 1e-4 < differ.mean() < 1e-3
    assert loss < 1e-4

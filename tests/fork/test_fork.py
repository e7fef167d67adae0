"""The trees that ``make fork`` has compiled, each by name, against the plugin, the converter and the reference."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ccq_converters import hf2gguf, imatrix
from ccq_converters.conversion import Conversion
from ccq_converters.convert import write_model as write_file
from ccq_converters.dequantize import dequantize
from ccq_converters.gguf_sources import sources_of
from ccq_converters.inspect import inspect
from ccq_converters.integrate import FAMILIES
from ccq_converters.options import QuantOptions
from ccq_converters.quantize import quantize
from ccq_format import stock
from ccq_format.errors import TensorTypeError
from ccq_format.gguf_io import ModelWriter, open_model
from ccq_format.layouts import LAYOUTS
from support.servers import post, serving

from ..test_plugin_models import EXPERTS, VOCAB, random_tensors, write_model
from .build import KINDS

pytestmark = pytest.mark.fork

ROOT = Path(__file__).parents[2]
BUILT = Path(os.environ.get("CCQ_FORK_TREES", ROOT / "build/fork"))
TEXT = ROOT / "examples/heldout.txt"
TYPES = [layout.name for layout in LAYOUTS]
MIXTURES = ["ccq_t1_5_m", "ccq_t2_m", "ccq_t2_5_m", "ccq_t3_m"]
PROGRAMS = ("llama-quantize", "llama-simple", "test-backend-ops")
NAMES = {
    f"{path.name}-{name}": (path, kind)
    for path in sorted(BUILT.glob("*"))
    for name, kind in KINDS.items()
    if any((path / kind.folder / "bin" / program).is_file() for program in PROGRAMS)
}
ARM = [name for name, (_, kind) in NAMES.items() if kind is KINDS["aarch64"]]
CUDA = [name for name, (_, kind) in NAMES.items() if kind is KINDS["cuda"]]
CPUS = ["cortex-a72", "neoverse-n1", "max"]
"""Without dot products, with them, and with int8 matrix products."""


def each(names: list[str], command: str) -> list[Any]:
    """Parameters of a fixture, or one that skips and says what makes the tests run."""
    skip = pytest.mark.skip(reason=f"no tree is compiled: {command}")
    return names or [pytest.param("none", marks=skip)]


class Tree:
    """A compiled tree."""

    def __init__(self, name: str) -> None:
        self.folder, self.kind = NAMES[name]
        self.build = self.folder / self.kind.folder
        self.ik = (self.folder / FAMILIES["ik_llama.cpp"]).is_file()
        self.cli = "llama-cli" if self.ik else "llama-completion"
        self.emulator: list[str] = []
        self.cwd: Path | None = None
        """Where programs run: some write a log there."""

    def run(self, program: str, *args: object, code: int | None = 0) -> str:
        """Output of one of the tree's programs, both streams."""
        command = [*self.emulator, self.build / "bin" / program, *map(str, args)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, cwd=self.cwd)
        said = result.stdout.decode(errors="replace")
        assert code is None or result.returncode == code, said[-4000:]
        return said

    def quantize(self, source: Path, out: Path, type_name: str, *options: object) -> Path:
        self.run("llama-quantize", *options, source, out, type_name.upper(), 2)
        return out


@pytest.fixture(params=each([name for name in NAMES if name not in ARM + CUDA], "make fork"), scope="module")
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(request.param)
    tree.cwd = tmp_path_factory.mktemp("cwd")
    return tree


@pytest.fixture(params=each(ARM, "make fork KIND=aarch64"), scope="module")
def arm(request: pytest.FixtureRequest) -> Tree:
    """A tree that was compiled for aarch64, which runs in QEMU's user mode."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64 (Debian: qemu-user)")
    return Tree(request.param)


@pytest.fixture(params=each(CUDA, "make fork KIND=cuda"), scope="module")
def cuda(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree that was compiled with kernels for NVIDIA GPUs."""
    tree = Tree(request.param)
    tree.cwd = tmp_path_factory.mktemp("cwd")
    return tree


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in f16."""
    out = tmp_path_factory.mktemp("source") / "f16.gguf"
    hf2gguf.convert(ROOT / "examples/manllama-4m", out, QuantOptions("f16"), progress=False)
    return out


@pytest.fixture(scope="module")
def wide(source: Path) -> Path:
    """A random model in f32, with rows that are long enough for CCQ_P2."""
    return write_model(source.with_name("wide.gguf"), random_tensors("ccq_t3", 0)[1], 0)


@pytest.fixture(scope="module")
def untied(source: Path) -> Path:
    """The bundled model with an output matrix of its own: mixtures give the embedding another type than that."""
    model, out = open_model(source), source.with_name("untied.gguf")
    tensors = {t.name: t for t in model.tensors} | {"output.weight": model.tensor("token_embd.weight")}
    with ModelWriter(out, "") as writer:
        writer.copy_metadata(model)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.type_name, tensor.shape)
        writer.begin()
        for name, tensor in tensors.items():
            writer.write(name, tensor.stored_rows(0, tensor.n_rows))
    return out


def make_importance(source: Path) -> Path:
    """Made up, over three orders of magnitude, some channels silent."""
    rng = np.random.default_rng(7)
    entries = {}
    for tensor in open_model(source).tensors:
        if len(tensor.shape) == 2:
            sums = (10 ** rng.uniform(0, 3, tensor.columns)).astype(np.float32)
            sums[rng.integers(0, len(sums), 3)] = 0
            entries[tensor.name] = imatrix.Entry(sums, np.array([512.0]))
        elif len(tensor.shape) == 3:
            counts = np.array([512.0, 3.0, 0.0, *([40.0] * (tensor.shape[0] - 3))])
            sums = 10 ** rng.uniform(0, 3, (len(counts), tensor.columns)) * counts[:, None]
            entries[tensor.name] = imatrix.Entry(sums.astype(np.float32).reshape(-1), counts)
    out = source.with_suffix(".imatrix.gguf")
    with ModelWriter(out, "") as writer:
        imatrix.fill(writer, imatrix.Importance(str(out), entries, ["made up"], 1, 512))
    return out


def binary_importance(path: Path) -> Path:
    """The same importance in llama-imatrix's older form, the only one that ik_llama.cpp reads."""
    entries = imatrix.load(path).entries
    raw = struct.pack("<i", len(entries))
    for name, entry in entries.items():
        means = entry.sums / np.float32(entry.counts[0])
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, means.size) + means.tobytes()
    out = path.with_suffix(".dat")
    out.write_bytes(raw)
    return out


class Models(dict[str, tuple[Path, Path, Path]]):
    """By type or mixture: a model, made-up importance, and what ccq-convert makes of them when it is first asked for.
    The bundled model, with "untied" behind the name that; for CCQ_P2, which its rows are too short for, the random
    one."""

    def __init__(self, source: Path, wide: Path, untied: Path) -> None:
        self.source, self.wide, self.untied = source, wide, untied

    def __missing__(self, name: str) -> tuple[Path, Path, Path]:
        type_name, _, untied = name.partition(" ")
        original = self.wide if type_name == "ccq_p2" else self.untied if untied else self.source
        importance = original.with_suffix(".imatrix.gguf")
        if not importance.exists():
            make_importance(original)
        made = self.source.with_name(f"{name}.gguf")
        quantize(original, made, QuantOptions(type_name, imatrix=imatrix.load(importance)), progress=False)
        self[name] = (original, importance, made)
        return self[name]

    def to_run(self, name: str) -> Path:
        """A file: that of a type or mixture; or TYPE-dense or TYPE-moe, a random model all matrices of which are of
        that type, the embedding too."""
        type_name, _, random = name.partition("-")
        if not random:
            return self[name][2]
        path = self.source.with_name(f"{name}.gguf")
        experts = EXPERTS if random == "moe" else 0
        return path if path.exists() else write_model(path, random_tensors(type_name, experts)[0], experts)


@pytest.fixture(scope="module")
def models(source: Path, wide: Path, untied: Path) -> Models:
    return Models(source, wide, untied)


def data(tree: Tree, path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor; not the bytes of llama.cpp's types that we encode in another way."""
    own = [kind.name for kind in stock.TYPES]
    return {
        t.name: (t.type_name, t.shape, b"" if t.type_name in own else t.stored_rows(0, t.n_rows).tobytes())
        for t in open_model(path).tensors
    }


# --- files


@pytest.mark.parametrize("name", TYPES + MIXTURES + [f"{name} untied" for name in MIXTURES])
def test_llama_quantize_writes_the_same_bytes(tree: Tree, name: str, models: Models, tmp_path: Path) -> None:
    original, importance, ours = models[name]
    if tree.ik:
        importance = binary_importance(importance)
    made = tree.quantize(original, tmp_path / "theirs.gguf", name.split()[0], "--imatrix", importance)
    assert data(tree, made) == data(tree, ours)
    model = inspect(made)
    assert model.spec_version == "0.1"
    assert model.encoder is not None
    assert "llama-quantize" in model.encoder
    assert 900 <= model.metadata["general.file_type"] < 1000


def test_rows_that_fit_no_block(tree: Tree, source: Path, tmp_path: Path) -> None:
    """CCQ_P2 has blocks of 512 weights, the bundled model most rows of 256."""
    quantize(source, tmp_path / "ours.gguf", QuantOptions("ccq_p2"), progress=False)
    ours = data(tree, tmp_path / "ours.gguf")
    assert "iq4_nl" in {type_name for type_name, _, _ in ours.values()}
    assert data(tree, tree.quantize(source, tmp_path / "theirs.gguf", "ccq_p2")) == ours


@pytest.mark.parametrize("name", ["ccq_t2", "ccq_p2_75", "ccq_t2_m"])
def test_llama_quantize_without_importance(tree: Tree, name: str, source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "ours.gguf", QuantOptions(name), progress=False)
    assert data(tree, tree.quantize(source, tmp_path / "theirs.gguf", name)) == data(tree, tmp_path / "ours.gguf")


@pytest.mark.parametrize("name", ["ccq_t2", "ccq_p2_5", "ccq_t2_m"])
def test_llama_quantize_of_experts(tree: Tree, name: str, tmp_path: Path) -> None:
    """Importance of experts leans on that of the layer: of a rarely hit one much, of one never hit altogether."""
    if tree.ik:
        pytest.skip(
            "ik_llama.cpp's llama-quantize has no counts of tokens by expert; runs with the other trees of make fork"
        )
    original = write_model(tmp_path / "moe.gguf", random_tensors("ccq_t3", EXPERTS)[1], EXPERTS)
    importance = make_importance(original)
    quantize(original, tmp_path / "ours.gguf", QuantOptions(name, imatrix=imatrix.load(importance)), progress=False)
    made = tree.quantize(original, tmp_path / "theirs.gguf", name, "--imatrix", importance)
    assert data(tree, made) == data(tree, tmp_path / "ours.gguf")


def test_llama_quantize_with_types_by_name(tree: Tree, source: Path, tmp_path: Path) -> None:
    rules = [("ffn_down", "ccq_t3"), ("attn_v", "q4_0")]
    quantize(source, tmp_path / "ours.gguf", QuantOptions("ccq_t2", overrides=rules), progress=False)
    option = "--custom-q" if tree.ik else "--tensor-type"
    options: list[str] = []
    for pattern, target in rules:
        options += [option, f"{pattern}={target}"]
    made = tree.quantize(source, tmp_path / "theirs.gguf", "ccq_t2", *options)
    assert data(tree, made) == data(tree, tmp_path / "ours.gguf")


def test_check_tensors(tree: Tree, models: Models, tmp_path: Path) -> None:
    good = models["ccq_p2_5"][2]
    run = ("--check-tensors", "-p", "x", "-n", "1", *(() if tree.ik else ("-no-cnv",)))
    tree.run(tree.cli, "-m", good, *run)
    tensor = next(t for t in open_model(good).tensors if t.type_name == "ccq_p2_5")
    bad = tmp_path / "bad.gguf"
    shutil.copyfile(good, bad)
    with open(bad, "r+b") as file:
        file.seek(tensor.offset + 3 * 82)
        file.write(b"\xc0\x7f")  # super scale of block 3: NaN
    said = tree.run(tree.cli, "-m", bad, *run, code=None)
    assert "a parameter of block 3 is not finite" in said
    assert f"tensor '{tensor.name}' has invalid data" in said


# --- logits


PLUGIN = """
import sys
import numpy as np
from ccq_converters.llama import LlamaModel, load_plugin_for
load_plugin_for(sys.argv[1])
with LlamaModel(sys.argv[1], n_ctx=256, threads=1) as model:
    tokens = [int(t) for t in sys.stdin.read().split()]
    n = len(tokens)
    np.save(sys.argv[2], model.decode(tokens, list(range(n)), [0] * n, [True] * n))
"""


TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, VOCAB, 96)]


def plugin_logits(model: Path) -> np.ndarray:
    """float32 [tokens, vocabulary] in llama-cpp-python, with the plugin, on one thread."""
    file = model.with_suffix(".npy")
    if not file.exists():
        command = [sys.executable, "-c", PLUGIN, str(model), str(file)]
        subprocess.run(command, input=" ".join(map(str, TOKENS)), text=True, check=True, stderr=subprocess.DEVNULL)
    logits: np.ndarray = np.load(file)
    return logits


def linked(tree: Tree, name: str, folder: Path) -> Path:
    """A program of this folder, linked to the tree's libraries."""
    names = [f"lib{name}" for name in ("llama", "ggml", "ggml-cpu", "ggml-base")]
    libraries = [p for name in names for p in tree.build.rglob(f"{name}.a")]
    libraries += [p for name in names for p in (tree.build / "bin").glob(f"{name}.so")]
    options = [f"-I{tree.folder / 'include'}", f"-I{tree.folder / 'ggml/include'}", f"-Wl,-rpath,{tree.build / 'bin'}"]
    if "-DGGML_BACKEND_DL=ON" in tree.kind.options:
        options.append(f'-DBACKENDS="{tree.build / "bin"}"')
    options += ["-DNO_CONV_2D"] * tree.ik
    compiler, source = os.environ.get("CXX", "c++"), Path(__file__).with_name(f"{name}.cpp")
    command = [compiler, "-std=c++17", "-O1", *options, source, "-o", folder / name]
    subprocess.run([*command, *libraries, "-fopenmp", "-pthread", "-ldl"], check=True)
    return folder / name


@pytest.fixture(scope="module")
def program(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(tree, "logits", tmp_path_factory.mktemp("program"))


def test_ops_that_take_the_whole_work_buffer(tree: Tree, tmp_path: Path) -> None:
    """Products with the same activations quantize them once; what was kept must not be used behind such an op."""
    between = linked(tree, "between", tmp_path)
    results = [subprocess.run([between, str(op)], capture_output=True, check=True).stdout for op in range(4 - tree.ik)]
    values = np.frombuffer(results[0], np.float32)
    assert values.size == 4 * 64
    assert np.isfinite(values).all()
    assert values.std() > 1
    assert results[1:] == results[:1] * (len(results) - 1)


def logits(program: Path, model: Path, like: np.ndarray, threads: int = 1) -> np.ndarray:
    command = [program, model, "256", str(threads)]
    result = subprocess.run(command, input=" ".join(map(str, TOKENS)).encode(), stdout=subprocess.PIPE, check=True)
    return np.frombuffer(result.stdout, np.float32).reshape(like.shape)


@pytest.mark.parametrize("name", [*TYPES, "ccq_t2_m", *(f"{t}-{kind}" for t in TYPES for kind in ("dense", "moe"))])
def test_logits_are_the_plugins(tree: Tree, program: Path, name: str, models: Models) -> None:
    """Bit by bit in llama.cpp.  ik_llama.cpp orders its floats otherwise, weighs experts otherwise, and rounds the
    activations of q8_0 in its own way: it may differ as much as it does for the same weights in q8_0."""
    model = models.to_run(name)
    wanted = plugin_logits(model)
    made = logits(program, model, wanted)
    if not tree.ik:
        assert np.array_equal(made, wanted)
        assert np.array_equal(logits(program, model, wanted, threads=2), wanted)
        return
    decoded, stock = model.with_suffix(".f32.gguf"), model.with_suffix(".q8_0.gguf")
    dequantize(model, decoded, "f32", overwrite=True)
    quantize(decoded, stock, QuantOptions("q8_0", overwrite=True), progress=False)
    usual = np.abs(logits(program, stock, wanted) - plugin_logits(stock)).mean()
    assert np.abs(made - wanted).mean() <= 1.1 * usual


PROMPT = "NAME\n       ls - list"


def plugin_text(model: Path) -> str:
    """24 tokens after PROMPT, greedily, in llama-cpp-python with the plugin."""
    code = (
        "import sys; from ccq_converters.llama import LlamaModel, load_plugin_for; load_plugin_for(sys.argv[1])\n"
        "with LlamaModel(sys.argv[1], n_ctx=128, threads=1) as m: print(m.generate(sys.argv[2], 24)[0], end='')"
    )
    command = [sys.executable, "-c", code, str(model), PROMPT]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


CLEAR_PROMPT = "The file is opened with the"
"""How this goes on is clear for a few tokens, to a small model of few bits, too."""

CLEAR = """
import sys
import numpy as np
from ccq_converters.llama import LlamaModel, load_plugin_for
load_plugin_for(sys.argv[1])
with LlamaModel(sys.argv[1], n_ctx=128, threads=1) as model:
    tokens = model.tokenize(sys.argv[2])
    n = begin = len(tokens)
    while n < begin + 24:
        model.clear()
        logits = model.decode(tokens, list(range(n)), [0] * n, [False] * (n - 1) + [True])[0]
        second, first = np.sort(logits)[-2:]
        if first - second <= float(sys.argv[3]):
            break
        tokens.append(int(logits.argmax()))
        n += 1
    print(n - begin, model.detokenize(tokens[begin:]), end="")
"""


def clear_text(model: Path, margin: float) -> tuple[int, str]:
    """Number and text of the tokens after CLEAR_PROMPT, up to the first whose logit is not ahead by ``margin``."""
    command = [sys.executable, "-c", CLEAR, str(model), CLEAR_PROMPT, str(margin)]
    count, _, text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.partition(" ")
    return int(count), text


@pytest.mark.parametrize("name", ["ccq_t2", "ccq_t3_m"])
def test_greedy_text(tree: Tree, program: Path, name: str, models: Models) -> None:
    """In ik_llama.cpp as far as no two tokens are closer than its floats, in another order, may change."""
    model = models[name][2]
    options = ("--temp", "0", "-n", "24", "-t", "1", "--no-warmup")
    if not tree.ik:
        # llama-completion loses the end of its output in one run of 60, with whatever model.
        text = plugin_text(model)
        assert any(text in tree.run(tree.cli, "-m", model, "-p", PROMPT, *options, "-no-cnv") for _ in range(3))
        return
    wanted = plugin_logits(model)
    count, text = clear_text(model, 2 * float(np.abs(logits(program, model, wanted) - wanted).max()))
    assert count >= 5
    assert CLEAR_PROMPT + text in tree.run(tree.cli, "-m", model, "-p", CLEAR_PROMPT, *options)


@pytest.mark.parametrize("cpu", CPUS)
def test_greedy_text_on_aarch64(arm: Tree, cpu: str, models: Models) -> None:
    arm.emulator = ["qemu-aarch64", "-cpu", cpu]
    for name in ("ccq_t2", "ccq_t3_m", "ccq_p2_5"):
        model = models[name][2]
        assert plugin_text(model) in arm.run("llama-simple", "-m", model, "-n", "24", PROMPT)


@pytest.mark.parametrize("name", ["ccq_t2", "ccq_t3_m", "ccq_p2_5"])
def test_greedy_text_of_a_cuda_build_on_the_cpu(cuda: Tree, name: str, models: Models) -> None:
    """Where there is no GPU, and where it is not to be used."""
    model = models[name][2]
    options = ("--temp", "0", "-n", "24", "-t", "1", "--no-warmup", "-no-cnv")
    assert plugin_text(model) in cuda.run(cuda.cli, "-m", model, "-p", PROMPT, *options, "--device", "none")
    if not devices(cuda):
        assert plugin_text(model) in cuda.run(cuda.cli, "-m", model, "-p", PROMPT, *options, "-ngl", 99)


def devices(tree: Tree) -> list[str]:
    """GPUs that the tree's programs see."""
    return re.findall(r"^ +(CUDA\d+):", tree.run(tree.cli, "--list-devices"), re.MULTILINE)


def test_ops_on_a_gpu_are_those_of_the_cpu(cuda: Tree) -> None:
    found = devices(cuda)
    if not found:
        pytest.skip("no NVIDIA GPU; runs on a machine that has one, after make fork KIND=cuda")
    said = cuda.run("test-backend-ops", "-b", found[0], "-p", "ccq")
    for op in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY"):
        for name in TYPES:
            assert re.search(rf"{op}\(type\w*={name},.*OK", said), f"{op} of {name} was not run"


@pytest.fixture(scope="module")
def with_bos(source: Path) -> Path:
    """The bundled model, but that llama.cpp puts BOS before every text."""
    model = open_model(source)
    model.fields.pop("tokenizer.ggml.add_bos_token")
    out = source.with_name("bos.gguf")
    write_file(
        Conversion(
            out,
            model.arch,
            sources_of(model),
            copy_from=model,
            set_metadata=lambda writer: writer.add_add_bos_token(True),
        ),
        QuantOptions("f16"),
    )
    return out


@pytest.mark.parametrize(
    ("name", "n_ctx", "windows"),
    [
        ("ccq_t2", 256, 8),
        ("ccq_p2_5", 256, 8),
        ("f16", 256, 8),
        ("bos", 256, 8),  # the first token of every window replaced by BOS
        ("f16", 100, 20),  # 20 windows share a batch of 2000
        ("f16", 3000, 2),  # a window takes two batches
    ],
)
def test_perplexity_is_that_of_eval(
    tree: Tree,
    models: Models,
    source: Path,
    with_bos: Path,
    name: str,
    n_ctx: int,
    windows: int,
) -> None:
    if tree.ik and n_ctx == 100:
        pytest.skip("ik_llama.cpp aborts in its flash attention: GGML_ASSERT(S > 0)")
    path = {"f16": source, "bos": with_bos}.get(name) or models[name][2]
    match = None
    for _ in range(8):  # on a busy machine llama.cpp often ends before its logging thread has written the last lines
        said = tree.run("llama-perplexity", "-m", path, "-f", TEXT, "-c", n_ctx, "--chunks", windows, "-t", 1)
        if match := re.search(r"Final estimate: PPL.* = ([\d.]+) \+/- ([\d.]+)", said):
            break
    assert match
    script = (
        "import sys; from ccq_converters.evaluate import *\n"
        "path, text, n_ctx, windows = sys.argv[1:]\n"
        "r = evaluate(path, read_text(text), n_ctx=int(n_ctx), max_windows=int(windows), threads=1)\n"
        "print(f'{r.ppl:.4f} {r.ppl_stderr:.5f}')"
    )
    command = [sys.executable, "-c", script, *map(str, (path, TEXT, n_ctx, windows))]
    ours = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    if tree.ik:
        assert float(match[1]) == pytest.approx(float(ours[0]), rel=2e-3)
    else:
        assert [match[1], match[2]] == ours


# --- programs


def test_quantize_fns(tree: Tree) -> None:
    if tree.ik:
        pytest.skip("ik_llama.cpp has no target for it; runs with the other trees of make fork")
    if tree.kind is KINDS["variants"]:
        pytest.skip(
            "linked to the CPU backend, which is loaded at run time here; runs with the other kinds of make fork"
        )
    said = tree.run("test-quantize-fns", "-v")
    for name in TYPES:
        assert re.search(rf"^{name} absolute quantization error: +ok", said, re.MULTILINE)
        assert re.search(rf"^{name} dot product error: +ok", said, re.MULTILINE)


def test_bench(tree: Tree, source: Path, tmp_path: Path) -> None:
    model = tree.quantize(source, tmp_path / "theirs.gguf", "ccq_t2_m")
    said = tree.run("llama-bench", "-m", model, "-p", 32, "-n", 4, "-r", 1, "-t", 1)
    assert "CCQ_T2_M" in said


def chat(url: str, text: str) -> Any:
    messages = [{"role": "user", "content": text}]
    return post(f"{url}/v1/chat/completions", messages=messages, max_tokens=16, temperature=0)


def test_server_answers_one_and_four_at_once(tree: Tree, models: Models, tmp_path: Path) -> None:
    command = [tree.build / "bin/llama-server", "-m", models["ccq_t2_m"][2], "-np", 4, "-c", 1024, "-t", 2]
    command += ["--chat-template", "chatml"]
    if tree.ik:
        # Its flash attention aborts at prompts of several slots in one batch, whatever the type: GGML_ASSERT(S > 0).
        command += ["--flash-attn", "off"]
    with serving(command, tmp_path / "log", tree.cwd) as url:
        first = chat(url, "What does ls do?")
        assert first["usage"]["completion_tokens"] > 0
        assert first["choices"][0]["message"]["content"]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: chat(url, f"What does tool {i} do?"), range(4)))
        assert all(answer["usage"]["completion_tokens"] > 0 for answer in answers)


# --- ids that the fork uses itself


def test_files_with_the_forks_own_types_still_load(tree: Tree, source: Path, tmp_path: Path) -> None:
    """Type id 36 in a file without ccq.spec_version is BitNet's I2_S there: two bits per weight, then one scale."""
    if not tree.ik:
        pytest.skip(
            "llama.cpp gives none of our ids to a type of its own; runs after make fork TREE=ik-llama-cpp-python"
        )
    path = tmp_path / "i2_s.gguf"
    model = open_model(source)
    writer = gguf.GGUFWriter(path, "llama")
    reader = gguf.GGUFReader(source)
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        writer.add_key_value(key, entry.contents(), entry.types[0], entry.types[1] if len(entry.types) > 1 else None)
    rng = np.random.default_rng(1)
    codes: dict[str, np.ndarray] = {}
    for tensor in model.tensors:
        if tensor.type_name == "f16" and tensor.name.startswith("blk."):
            n = tensor.n_weights
            codes[tensor.name] = rng.integers(0, 256, n // 4, dtype=np.uint8) & 0xAA  # 0 or 2: -1 and 1
            raw = np.concatenate([codes[tensor.name], np.float32([0.5]).view(np.uint8), np.zeros(28, np.uint8)])
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), raw.nbytes, raw_dtype=36)  # type: ignore[arg-type]
            writer.tensors[-1][tensor.name].tensor = raw
        else:
            writer.add_tensor(tensor.name, tensor.data())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TensorTypeError, match="type id 36 is BitNet's I2_S"):
        open_model(path)
    out = tmp_path / "q8_0.gguf"
    tree.run("llama-quantize", "--allow-requantize", path, out, "Q8_0", 2)
    for tensor in open_model(out).tensors:
        if tensor.name in codes:
            values = gguf.quants.dequantize(tensor.stored_rows(0, tensor.n_rows), tensor.ggml_type)
            assert np.allclose(np.abs(values), 0.5, rtol=1e-3)

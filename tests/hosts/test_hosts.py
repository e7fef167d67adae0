"""The plugin in other people's llama.cpp (``make test-hosts``): Debian's newest, with each of its CPU backends that
this machine runs, the newest build on the package index, the release of llama-cpp-python before the pinned one, and
a fork that must be left alone.

What they write is compared with what the llama.cpp writes that the rest of the tests use.  Each test that meets a host
prints which (``-rP`` shows it).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import ccq_backend
from ccq_converters import hf2gguf
from ccq_converters.options import QuantOptions
from support.servers import post, serving

from . import roots

pytestmark = pytest.mark.hosts

EXAMPLE = Path(__file__).parents[2] / "examples/manllama-4m"
PROMPT = "NAME\n       ls - list"
N = 24
BACKENDS = "usr/lib/x86_64-linux-gnu/ggml/backends0"
VARIANTS = [
    *("x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell", "alderlake", "skylakex", "cannonlake"),
    *("cascadelake", "icelake", "cooperlake", "zen4", "sapphirerapids"),
]
"""Debian's CPU backends; the best that the CPU runs is loaded."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model in types that the plugin serves, and in q8_0."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("ccq_t2", "ccq_t3_m", "ccq_p2_5", "q8_0"):
        options = QuantOptions(kind, effort="fast")
        hf2gguf.convert(EXAMPLE, folder / f"{kind}.gguf", options, progress=False)
    return folder


@pytest.fixture(scope="module")
def text(models: Path) -> str:
    """What the tests' own llama.cpp writes after ``PROMPT``, greedily, with the plugin."""
    code = (
        "import sys; from ccq_converters.llama import LlamaModel, load_plugin_for; load_plugin_for(sys.argv[1])\n"
        f"with LlamaModel(sys.argv[1], n_ctx=128, threads=1) as m: print(m.generate({PROMPT!r}, {N})[0], end='')"
    )
    command = [sys.executable, "-c", code, str(models / "ccq_t2.gguf")]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.rstrip()


@pytest.fixture(scope="module")
def debian() -> Path:
    try:
        return roots.debian()
    except roots.Unavailable as error:
        pytest.skip(str(error))


def in_debian(root: Path, models: Path, *binds: tuple[str, Path], **environment: str) -> list[str]:
    """The words before a command in Debian's root, with the plugin preloaded."""
    places = {roots.MODELS: models, "/plugin": ccq_backend.plugin_path().parent, **dict(binds)}
    plugin = f"/plugin/{ccq_backend.plugin_path().name}"
    return roots.sandbox(root, places, {"LD_PRELOAD": plugin, **environment})


def active(said: str) -> re.Match[str]:
    """The plugin's line."""
    match = re.search(r"^ccq: active in ggml (\S+) \(kernels: (\w+)\)$", said, re.MULTILINE)
    assert match, said[-3000:]
    return match


GREEDY = ("-p", PROMPT, "-n", str(N), "--temp", "0", "-no-cnv", "-t", "1", "--no-warmup")


# --- Debian ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, debian: Path, tmp_path: Path) -> tuple[str, Path]:
    """One of the CPU backends, and a folder that holds no other.  Skips where the CPU does not run it."""
    name: str = request.param
    library = f"/{BACKENDS}/libggml-cpu-{name}.so"
    if not (debian / library[1:]).exists():
        pytest.skip(f"Debian's package has no {name} any more: take it out of VARIANTS")
    score = f"import ctypes; print(ctypes.CDLL({library!r}).ggml_backend_score())"
    done = roots.run([*roots.sandbox(debian, {}, {}), "/usr/bin/python3", "-c", score])
    assert done.returncode == 0, done.stdout
    if int(done.stdout) == 0:
        pytest.skip(f"this CPU does not run {name}; one that does is needed")
    for file in (debian / BACKENDS).iterdir():
        if not file.name.startswith("libggml-cpu-") or file.name == f"libggml-cpu-{name}.so":
            shutil.copy(file, tmp_path)
    return name, tmp_path


def test_debian_with_every_cpu_backend(debian: Path, models: Path, text: str, variant: tuple[str, Path]) -> None:
    """One backend at a time, as if it were the best one."""
    name, folder = variant
    command = in_debian(debian, models, (f"/{BACKENDS}", folder))
    for _ in range(5):
        done = roots.run([*command, "/usr/bin/llama-completion", "-m", f"{roots.MODELS}/ccq_t2.gguf", *GREEDY])
        assert done.returncode == 0, done.stdout[-3000:]
        if PROMPT + text in done.stdout:
            break
        # Without a plugin, too, one run in 30 ends before the thread that prints has printed all: within a character.
        assert (PROMPT + text).startswith(done.stdout[done.stdout.rfind(PROMPT) :].rstrip("\ufffd \n"))
    print(f"Debian, {name}: {active(done.stdout)[0]}")
    assert PROMPT + text in done.stdout


@pytest.mark.parametrize("kind", ["ccq_t3_m", "ccq_p2_5"])
def test_debian_runs_other_types(debian: Path, models: Path, kind: str) -> None:
    command = [*in_debian(debian, models), "/usr/bin/llama-completion", "-m", f"{roots.MODELS}/{kind}.gguf", *GREEDY]
    done = roots.run(command)
    active(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert PROMPT in done.stdout


def test_debian_bench(debian: Path, models: Path) -> None:
    words = ["-m", f"{roots.MODELS}/ccq_t2.gguf", "-p", 32, "-n", 4, "-r", 1, "-t", 1, "-o", "json"]
    done = roots.run([*in_debian(debian, models), "/usr/bin/llama-bench", *words])
    active(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count('"avg_ts"') == 2


# --- Debian's server -------------------------------------------------------------------------------------------------


def server(root: Path, models: Path, log: Path, *options: object, parallel: int = 4) -> AbstractContextManager[str]:
    """Debian's, by its address."""
    words = ["/usr/bin/llama-server", "-np", parallel, "-c", 1024, "-t", 2, "--no-webui", *options]
    return serving([*in_debian(root, models), *words], log)


def test_debian_server(debian: Path, models: Path, text: str, tmp_path: Path) -> None:
    """A completion, a chat, four at once, and a prompt that is taken from the cache."""
    log = tmp_path / "log"
    with server(debian, models, log, "-m", f"{roots.MODELS}/ccq_t2.gguf", "--chat-template", "chatml") as url:
        asked = {"prompt": PROMPT, "n_predict": N, "temperature": 0, "cache_prompt": True, "id_slot": 0}
        first = post(f"{url}/completion", **asked)
        assert first["content"].rstrip() == text
        again = post(f"{url}/completion", **asked)
        assert again["content"] == first["content"]
        assert again["timings"]["cache_n"] > 0
        chat = {"messages": [{"role": "user", "content": "What does ls do?"}], "max_tokens": 8}
        assert post(f"{url}/v1/chat/completions", **chat)["usage"]["completion_tokens"] > 0
        with ThreadPoolExecutor(4) as pool:
            replies = pool.map(lambda i: post(f"{url}/completion", prompt=f"tool {i}", n_predict=8), range(4))
        assert all(reply["tokens_predicted"] > 0 for reply in replies)
    active(log.read_text(errors="replace"))


def test_debian_server_embeddings(debian: Path, models: Path, tmp_path: Path) -> None:
    options = ("-m", f"{roots.MODELS}/ccq_t2.gguf", "--embeddings", "--pooling", "mean")
    with server(debian, models, tmp_path / "log", *options) as url:
        (reply,) = post(f"{url}/v1/embeddings", input=["list files"])["data"]
    assert len(reply["embedding"]) == 256
    assert any(reply["embedding"])


def test_debian_server_with_a_draft(debian: Path, models: Path, text: str, tmp_path: Path) -> None:
    """Speculative decoding: model and draft are files of ours."""
    options = ("-m", f"{roots.MODELS}/ccq_t2.gguf", "--model-draft", f"{roots.MODELS}/ccq_t3_m.gguf")
    options += ("--spec-type", "draft-simple")
    with server(debian, models, tmp_path / "log", *options, parallel=1) as url:
        reply = post(f"{url}/completion", prompt=PROMPT, n_predict=N, temperature=0)
    assert reply["content"].rstrip() == text
    assert reply["timings"]["draft_n"] > 0


def test_debian_server_as_a_router(debian: Path, models: Path, text: str, tmp_path: Path) -> None:
    """Without a model it starts one server per model that is asked for; they inherit the plugin."""
    with server(debian, models, tmp_path / "log", "--models-dir", roots.MODELS, parallel=1) as url:
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            names = [entry["id"] for entry in json.load(reply)["data"]]
        (name,) = [name for name in names if "ccq_t2" in name]
        answer = post(f"{url}/v1/completions", model=name, prompt=PROMPT, max_tokens=N, temperature=0)
    assert answer["choices"][0]["text"].rstrip() == text


# --- the package index -----------------------------------------------------------------------------------------------

SYNC = """
import ctypes, sys
from llama_cpp_py_sync import Llama
plugin = sys.argv[4].encode()
ctypes.CDLL("/wheel/llama_cpp_py_sync/libllama.so").ggml_backend_load(plugin)  # what ccq_backend.load_plugin does
with Llama(sys.argv[1], n_ctx=128, n_threads=1) as model:
    print(model.generate(sys.argv[2], max_tokens=int(sys.argv[3]), temperature=0), end="")
"""


def test_the_newest_prebuilt_wheel(debian: Path, models: Path, text: str) -> None:
    """llama-cpp-py-sync follows llama.cpp by the week; its libraries need a newer C library than its tag says."""
    try:
        folder = roots.wheel("llama-cpp-py-sync")
    except roots.Unavailable as error:
        pytest.skip(str(error))
    blas = ":".join(f"/usr/lib/x86_64-linux-gnu/{name}" for name in ("blas", "lapack"))  # as alternatives would have it
    command = in_debian(debian, models, ("/wheel", folder), PYTHONPATH="/wheel", LD_LIBRARY_PATH=blas)
    plugin = f"/plugin/{ccq_backend.plugin_path().name}"
    words = ["/usr/bin/python3", "-c", SYNC, f"{roots.MODELS}/ccq_t2.gguf", PROMPT, N, plugin]
    done = roots.run([*command, *words])
    (info,) = folder.glob("*.dist-info")
    print(f"{info.name.removesuffix('.dist-info')}: {active(done.stdout)[0]}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert text in done.stdout


def test_ik_llama_cpp_is_left_alone(models: Path, tmp_path: Path) -> None:
    """A fork with other structures: it refuses our files as ever, and does with its own what it does without us."""
    try:
        folder = roots.wheel("ik-llama-cpp-python", "0.1.5")
    except roots.Unavailable as error:
        pytest.skip(str(error))
    program = folder / "ik_llama_cpp/bin/llama-quantize"
    program.chmod(0o755)
    libraries = ":".join(sorted({str(path.parent) for path in folder.rglob("*.so*")}))
    plain = {**roots.environment_without_preload(), "LD_LIBRARY_PATH": libraries}
    preloaded = {**plain, "LD_PRELOAD": str(ccq_backend.plugin_path())}

    def quantized(kind: str, out: Path, environment: dict[str, str]) -> tuple[int, str]:
        words = [program, "--allow-requantize", models / f"{kind}.gguf", out, "Q4_0", 1]
        done = roots.run(words, cwd=tmp_path, env=environment)
        return done.returncode, done.stdout

    for environment in (plain, preloaded):
        code, said = quantized("ccq_t2", tmp_path / "out.gguf", environment)
        assert code > 0  # refused, and no crash
        assert "ccq: active" not in said
    files = [tmp_path / "without.gguf", tmp_path / "with.gguf"]
    for file, environment in zip(files, (plain, preloaded), strict=True):
        code, said = quantized("q8_0", file, environment)
        assert code == 0, said[-3000:]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("version", [None, "0.3.35"])
def test_llama_cpp_python(models: Path, text: str, version: str | None) -> None:
    """The one that the rest of the tests run in, and the release before it."""
    environment = dict(os.environ)
    if version is not None:
        try:
            folder = roots.installed("llama-cpp-python", version)
        except roots.Unavailable as error:
            pytest.skip(str(error))
        environment["PYTHONPATH"] = f"{folder}:{environment.get('PYTHONPATH', '')}"
    code = (
        "import sys, llama_cpp; from ccq_converters.llama import LlamaModel, load_plugin_for\n"
        "load_plugin_for(sys.argv[1]); print('version', llama_cpp.__version__)\n"
        "with LlamaModel(sys.argv[1], n_ctx=128, threads=1) as m: print(m.generate(sys.argv[2], int(sys.argv[3]))[0])"
    )
    done = roots.run([sys.executable, "-c", code, models / "ccq_t2.gguf", PROMPT, N], env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert text in done.stdout
    found = re.search(r"^version (.*)$", done.stdout, re.MULTILINE)
    assert found
    assert version in (None, found[1])
    print(f"llama-cpp-python {found[1]}: {active(done.stdout)[0]}")

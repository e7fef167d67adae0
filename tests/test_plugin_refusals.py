"""Hosts that the plugin must leave alone: one line that says why, no byte changed, the process as healthy as before.

Every case is a process of its own: a plugin that is active stays so for good.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="runs in llama-cpp-python")
import ccq_backend  # noqa: E402

HERE = Path(__file__).parent
BACKEND = HERE.parent / "backend"
PLUGIN = ccq_backend.plugin_path()
CC, CXX = os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")

# Runs in the child: `table()` is every byte that the plugin may write in the ggml that libllama uses.
PRELUDE = """
import ctypes, os, sys
import llama_cpp.llama_cpp as llama

def address(name, library=llama._lib):
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value

def call(name, result, *arguments, library=llama._lib):
    types = [ctypes.c_char_p if isinstance(a, bytes) else ctypes.c_int if isinstance(a, int) else ctypes.c_void_p
             for a in arguments]
    return ctypes.CFUNCTYPE(result, *types)(address(name, library))(*arguments)

def table(library=llama._lib):
    rows = call("ggml_get_type_traits", ctypes.c_void_p, 0, library=library)
    rows_cpu = call("ggml_get_type_traits_cpu", ctypes.c_void_p, 0)
    device = call("ggml_backend_dev_by_type", ctypes.c_void_p, 0)
    return ctypes.string_at(rows, 43 * 56) + ctypes.string_at(rows_cpu, 43 * 32) + ctypes.string_at(device, 17 * 8)

def load(path, library=llama._lib):
    return call("ggml_backend_load", ctypes.c_void_p, os.fsencode(path), library=library)

def name(id, library=llama._lib):
    return call("ggml_type_name", ctypes.c_char_p, id, library=library)

before = table()
plugin = sys.argv[1]
lib = os.path.join(os.path.dirname(llama.__file__), "lib")
"""


def run(code: str, plugin: Path | str = PLUGIN, **env: str) -> list[str]:
    """Run ``code`` after PRELUDE in a fresh interpreter; the plugin's own lines on standard error."""
    child = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(plugin)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return [line for line in child.stderr.splitlines() if line.startswith("ccq:")]


def compile(compiler: str, *arguments: str | Path) -> None:
    subprocess.run([compiler, *map(str, arguments)], check=True, timeout=300)


def load_in_fake(library: Path) -> tuple[int, str]:
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).ggml_backend_load(sys.argv[2].encode()))"
    child = subprocess.run(
        [sys.executable, "-c", code, str(library), str(PLUGIN)], capture_output=True, text=True, timeout=60
    )
    return child.returncode, child.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-DAPI_VERSION=1"], "backend API version is 1, not 2 or 3"),
        (["-DAPI_VERSION=4"], "backend API version is 4, not 2 or 3"),
        (["-DWIDE_ROWS"], "laid out differently (stride of type_traits)"),
        (["-DWIDE_CPU_ROWS"], "laid out differently (stride of type_traits_cpu)"),
        (["-DODD_BLOCK"], "laid out differently (type q4_0)"),
        (["-DUSED_ROW=36"], "uses type id 36 (q9_9) itself"),
        (["-DUSED_ROW=4"], "uses type id 4 (q9_9) itself"),
        (["-DNO_CPU_DEVICE"], "has no CPU device"),
    ],
)
def test_foreign_ggml(tmp_path: Path, options: list[str], reason: str) -> None:
    fake = tmp_path / "libggml-fake.so"
    compile(CC, "-shared", "-fPIC", "-w", *options, HERE / "plugin/fake_host.c", "-o", fake, "-ldl")
    status, err = load_in_fake(fake)
    assert status == 0, err
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ccq: not active, nothing patched: ")
    assert reason in lines[0]
    assert "source integration" in lines[0]


def test_fake_host_passes_the_table_checks_when_nothing_is_wrong(tmp_path: Path) -> None:
    """The cases above are refused for their one fault: without it the plugin goes on to build a tensor."""
    fake = tmp_path / "libggml-fake.so"
    compile(CC, "-shared", "-fPIC", "-w", HERE / "plugin/fake_host.c", "-o", fake, "-ldl")
    status, err = load_in_fake(fake)
    assert status != 0
    assert "the plugin called ggml_init" in err


def test_statically_linked_host(tmp_path: Path) -> None:
    program = tmp_path / "static-host"
    compile(CC, "-w", "-DPROGRAM", HERE / "plugin/fake_host.c", "-o", program, "-ldl")
    child = subprocess.run([program, PLUGIN], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert child.stderr.count("\n") == 1
    assert "ggml is linked into this program statically and exports no symbols" in child.stderr
    # Preloaded into it, the plugin finds no ggml to speak of and keeps quiet; loading it is refused as before.
    again = subprocess.run(
        [program, PLUGIN], capture_output=True, text=True, timeout=60, env={**os.environ, "LD_PRELOAD": str(PLUGIN)}
    )
    assert (again.returncode, again.stderr) == (0, child.stderr)


def test_preloaded_into_a_linked_tool(tmp_path: Path) -> None:
    """LD_PRELOAD activates the plugin before main; without it, or with CCQ_ISA wrong, the tool is as it was."""
    folder = Path(llama.__file__).parent / "lib"
    tool = tmp_path / "tool"
    libraries = [f"-l:libggml{part}.so.0" for part in ("", "-base", "-cpu")]
    compile(
        CC, HERE / "plugin/linked_host.c", "-o", tool, f"-L{folder}", "-Wl,--no-as-needed", *libraries,
        f"-Wl,-rpath,{folder}",
    )  # fmt: skip

    def output(**env: str) -> tuple[str, str]:
        child = subprocess.run(
            [tool], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=True
        )
        return child.stdout.strip(), child.stderr.strip()

    assert output()[0].startswith("TYPE_IQ4_NL_4_4 REMOVED")
    name, line = output(LD_PRELOAD=str(PLUGIN))
    assert name == "ccq_t2"
    assert line.startswith("ccq: active in ggml ")
    assert "\n" not in line
    name, line = output(LD_PRELOAD=str(PLUGIN), CCQ_ISA="z80")
    assert name.startswith("TYPE_IQ4_NL_4_4 REMOVED")
    assert line.startswith("ccq: not active, nothing patched: CCQ_ISA")
    # Other programs that inherit the variable hear nothing of it.
    shell = subprocess.run(["sh", "-c", "true"], env={**os.environ, "LD_PRELOAD": str(PLUGIN)}, capture_output=True)
    assert (shell.returncode, shell.stdout, shell.stderr) == (0, b"", b"")


def test_preloaded_where_backends_are_loaded_later(tmp_path: Path) -> None:
    """A build that loads its backends at run time has no CPU device yet: it is told where to find the plugin."""
    fake, tool = tmp_path / "libggml-fake.so", tmp_path / "tool"
    compile(CC, "-shared", "-fPIC", "-w", "-DNO_CPU_DEVICE", HERE / "plugin/fake_host.c", "-o", fake, "-ldl")
    (tmp_path / "tool.c").write_text(
        '#include <stdio.h>\n#include <stdlib.h>\nint main(void) { puts(getenv("GGML_BACKEND_PATH")); return 0; }\n'
    )
    compile(CC, tmp_path / "tool.c", "-o", tool, "-Wl,--no-as-needed", fake, f"-Wl,-rpath,{tmp_path}")
    env = {k: v for k, v in os.environ.items() if k != "GGML_BACKEND_PATH"} | {"LD_PRELOAD": str(PLUGIN)}
    for extra, expected in (({}, str(PLUGIN)), ({"GGML_BACKEND_PATH": "/other.so"}, "/other.so")):
        child = subprocess.run([tool], env=env | extra, capture_output=True, text=True, timeout=60, check=True)
        assert (child.stdout.strip(), child.stderr) == (expected, "")


def test_not_called_by_a_ggml() -> None:
    """Whoever calls ggml_backend_init otherwise is not the copy that will run the model."""
    lines = run("""
        assert not ctypes.CDLL(plugin).ggml_backend_init()
        assert table() == before
    """)
    assert len(lines) == 1
    assert "not loaded through ggml_backend_load" in lines[0]


def test_active_and_loaded_twice() -> None:
    lines = run("""
        entry = load(plugin)
        assert entry and load(plugin) == entry
        assert table() != before and name(36) == b"ccq_t2"
        assert ctypes.string_at(call("ggml_backend_reg_name", ctypes.c_void_p, ctypes.c_void_p(entry))) == b"CCQ"
    """)
    assert len(lines) == 1
    assert lines[0].startswith("ccq: active in ggml ")
    assert run("assert load(plugin)", CCQ_QUIET="1") == []


def test_only_the_eight_rows_and_two_hooks_change() -> None:
    run("""
        assert load(plugin)
        after = table()
        changed = {i // 56 for i in range(43 * 56) if before[i] != after[i]}
        cpu = {i // 32 for i in range(43 * 32) if before[43 * 56 + i] != after[43 * 56 + i]}
        hooks = {i // 8 for i in range(17 * 8) if before[43 * 88 + i] != after[43 * 88 + i]}
        assert changed == cpu == {4, 5, 31, 32, 33, 36, 37, 38}, (changed, cpu)
        assert hooks == {5, 9}, hooks
        tables = [call(f, ctypes.c_void_p, 36) for f in ("ggml_get_type_traits", "ggml_get_type_traits_cpu")]
        for line in open("/proc/self/maps"):
            begin, end = (int(a, 16) for a in line.split()[0].split("-"))
            if any(begin <= at < end for at in tables):
                assert " r--p " in line, line
    """)


def test_load_plugin_reports_the_reason() -> None:
    lines = run(
        """
        import ccq_backend
        from ccq_format.errors import PluginError
        for attempt in range(2):
            try:
                ccq_backend.load_plugin()
            except PluginError as error:
                assert "CCQ_ISA names no kernel set" in str(error), error
            else:
                sys.exit("not refused")
        assert table() == before
        """,
        CCQ_ISA="z80",
    )
    assert len(lines) == 2


def test_row_in_use_in_the_real_ggml() -> None:
    lines = run("""
        row = call("ggml_get_type_traits", ctypes.c_void_p, 37)
        page = row & ~4095
        mprotect = ctypes.CDLL(None).mprotect
        assert mprotect(ctypes.c_void_p(page), ctypes.c_size_t(8192), 3) == 0
        ctypes.c_int64.from_address(row + 8).value = 32
        before = table()
        assert not load(plugin)
        assert table() == before
    """)
    assert len(lines) == 1
    assert "uses type id 37 (TYPE_IQ4_NL_4_8 REMOVED" in lines[0]


def test_second_copy_of_the_plugin(tmp_path: Path) -> None:
    other = tmp_path / "libggml-ccq-copy.so"
    shutil.copy(PLUGIN, other)
    lines = run(f"""
        assert load(plugin)
        before = table()
        assert not load({str(other)!r})
        assert table() == before
    """)
    assert len(lines) == 2
    assert "another copy of this plugin is active" in lines[1]


def test_two_copies_of_ggml_mapped() -> None:
    """Opening a library under another of its names maps it again: the copy that libllama uses is the one patched."""
    run("""
        copy = ctypes.CDLL(os.path.join(lib, "libggml-base.so"))
        assert address("ggml_get_type_traits", copy) != address("ggml_get_type_traits")
        untouched = table(copy)[:43 * 56]
        import ccq_backend
        ccq_backend.load_plugin()
        assert name(36) == b"ccq_t2"
        assert table(copy)[:43 * 56] == untouched and b"REMOVED" in name(36, copy)
    """)


def test_two_copies_with_one_in_the_global_scope() -> None:
    """What a symbol means then depends on who asks: refused."""
    lines = run("""
        ctypes.CDLL(os.path.join(lib, "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        assert not load(plugin)
        assert table() == before
    """)
    assert len(lines) == 1
    assert "several copies of ggml are mixed" in lines[0]


def test_libllama_uses_another_copy(tmp_path: Path) -> None:
    """A complete second ggml, with names of its own, that no libllama resolves to."""
    lines = run(f"""
        import shutil, re
        folder = {str(tmp_path)!r}
        for stem in ("base", "cpu", ""):
            old = "libggml" + ("-" + stem if stem else "") + ".so.0"
            data = open(os.path.join(lib, old), "rb").read()
            # Another soname for it and for what it needs, of the same length, so that nothing is shared.
            data = data.replace(b"libggml-base.so.0", b"libggmX-base.so.0").replace(
                b"libggml-cpu.so.0", b"libggmX-cpu.so.0").replace(b"libggml.so.0", b"libggmX.so.0")
            open(os.path.join(folder, old.replace("ggml", "ggmX", 1)), "wb").write(data)
        other = ctypes.CDLL(os.path.join(folder, "libggmX.so.0"))
        assert address("ggml_get_type_traits", other) != address("ggml_get_type_traits")
        untouched = table(other)[:43 * 56]
        assert not load(plugin, library=other)
        assert table() == before and table(other)[:43 * 56] == untouched
        assert load(plugin)
        assert name(36) == b"ccq_t2" and b"REMOVED" in name(36, other)
        assert not load(plugin, library=other)
    """)
    assert len(lines) == 3
    assert "libllama in this process uses another copy of ggml" in lines[0]
    assert "active in ggml" in lines[1]
    assert "it is active in another copy of ggml" in lines[2]


@pytest.fixture(scope="module")
def faulty_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's own sources with kernels that can be made to err (scalar ones, built without optimization)."""
    folder = tmp_path_factory.mktemp("faulty")
    kernels = [*sorted((BACKEND / "cpu").glob("*.c")), BACKEND / "cpu/scalar/kernels.c"]
    sources = [*kernels, HERE / "plugin/faulty_kernels.c"]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.parent.name}-{source.stem}.o")
        compile(CC, "-c", "-O1", "-fPIC", "-w", "-ffp-contract=off", f"-I{BACKEND}/include", source, "-o", objects[-1])
    plugin = folder / "libggml-ccq-faulty.so"
    wraps = [f"-Wl,--wrap=ccq_{f}" for f in ("mul_mat", "decode", "quantize_activations")]
    compile(
        CXX, "-std=c++17", "-shared", "-fPIC", "-w", "-fvisibility=hidden", *wraps, "-Wl,-z,nodelete",
        f"-Wl,--version-script={BACKEND}/ggml/exports.map", *sorted((BACKEND / "ggml").glob("*.cpp")), *objects,
        "-o", plugin, "-ldl", "-lpthread", "-lm",
    )  # fmt: skip
    return plugin


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("product", "self-test of MUL_MAT on ccq_"),
        ("rows", "self-test of GET_ROWS on ccq_"),
        ("memory", "the self-test's graph failed"),
    ],
)
def test_failed_self_test_undoes_everything(faulty_plugin: Path, fault: str, reason: str) -> None:
    lines = run(
        """
        assert not load(plugin)
        assert table() == before and b"REMOVED" in name(36)
        os.environ["CCQ_FAULT"] = ""
        ctypes.CDLL(None).setenv(b"CCQ_FAULT", b"", 1)
        assert load(plugin)  # healthy again, and so accepted
        """,
        plugin=faulty_plugin,
        CCQ_FAULT=fault,
    )
    refusal = [line for line in lines if "not active" in line]
    assert len(refusal) == 1
    assert reason in refusal[0]
    assert lines[-1].startswith("ccq: active in ggml ")


@pytest.mark.upstream
def test_declared_structs_match_the_pinned_sources() -> None:
    """Every offset, size and constant of host_abi.h against ggml's own headers."""
    from upstream_diff.fetch import source_tree

    ggml = source_tree() / "ggml"
    includes = [f"-I{p}" for p in (BACKEND / "ggml", ggml / "include", ggml / "src", ggml / "src/ggml-cpu")]
    compile(CXX, "-std=c++17", *includes, "-fsyntax-only", HERE / "plugin/abi_check.cpp")

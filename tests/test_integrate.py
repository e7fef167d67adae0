"""``ccq-convert integrate``: what it changes, what it refuses, and that it can be undone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ccq_converters import integrate
from ccq_converters.cli import main
from ccq_converters.integrate import FAMILIES, FOLDER, RECORD, Integration, parse
from ccq_format.errors import IntegrationError
from ccq_format.layouts import LAYOUTS

from .upstream_diff.fetch import ARCHIVES, source_tree

SCRIPTS = {
    family: integrate.expand((integrate.source_folder() / "fork/edits" / f"{family}.edits").read_text())
    for family in FAMILIES
}
CUDA_SCRIPT = integrate.expand((integrate.source_folder() / "fork/edits/llama.cpp.cuda.edits").read_text())
each_family = pytest.mark.parametrize("family", FAMILIES)
each_variant = pytest.mark.parametrize(
    ("family", "options"), [(family, ()) for family in FAMILIES] + [("llama.cpp", ("--cuda",))]
)


def edits_of(family: str, options: tuple[str, ...] = ()) -> list[integrate.FileEdits]:
    """What a family's tree gets with these options."""
    return parse(SCRIPTS[family] + (CUDA_SCRIPT if "--cuda" in options else ""), family)


def make_tree(folder: Path, family: str, newline: str = "\n") -> Path:
    """A tree in which every anchor of the family's scripts occurs once, among other lines."""
    for at, file in enumerate(edits_of(family, ("--cuda",) if family == "llama.cpp" else ())):
        lines = [f"// file {at}"]
        for number, edit in enumerate(file.edits):
            lines += [*edit.anchors[0].lines, "", f"// {number}: not an anchor, é\x0c"]
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(line + newline for line in lines).encode())
    mark = folder / FAMILIES[family]
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("\n")
    return folder


def contents(tree: Path) -> dict[str, str]:
    """Hashes of all files."""
    return {
        p.relative_to(tree).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in tree.rglob("*")
        if p.is_file()
    }


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["integrate", *map(str, args)])
    return result.exit_code, result.output


# --- the scripts


@each_family
def test_scripts_insert_few_lines_and_name_all_types(family: str) -> None:
    files = {file.path: [line for edit in file.edits for line in edit.text] for file in parse(SCRIPTS[family], family)}
    assert sum(map(len, files.values())) < 200
    ids = dict(re.findall(r"GGML_TYPE_(CCQ_\w+)\s*= (\d+),", "\n".join(files["ggml/include/ggml.h"])))
    assert ids.keys() == {layout.name.upper() for layout in LAYOUTS}
    if family == "llama.cpp":  # numbered as in files; and so in gguf-py
        assert ids == {layout.name.upper(): str(layout.gguf_id) for layout in LAYOUTS}
        python = "\n".join(files["gguf-py/gguf/constants.py"])
        assert dict(re.findall(r"^    (CCQ_\w+)\s*= (\d+)$", python, re.MULTILINE)) == ids
        sizes = re.findall(r"GGMLQuantizationType\.(CCQ_\w+):\s*\((\d+), (\d+)\)", python)
        assert {(name, int(n), int(size)) for name, n, size in sizes} == {
            (layout.name.upper(), layout.block_weights, layout.block_bytes) for layout in LAYOUTS
        }


def test_the_cuda_script_inserts_few_lines_in_files_of_its_own() -> None:
    edits = parse(CUDA_SCRIPT, "llama.cpp")
    assert sum(len(edit.text) for file in edits for edit in file.edits) < 50
    assert not {file.path for file in edits} & {file.path for file in edits_of("llama.cpp")}


@each_variant
def test_own_files_include_what_is_there(family: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """Our own headers, by relative paths, or ggml's; and no kernels for GPUs unless they are wanted."""
    tree = make_tree(tmp_path, family)
    run(tree, *options)
    here = [p for p in (tree / FOLDER).rglob("*") if p.suffix in (".c", ".cpp", ".cu", ".h")]
    assert any("cuda" in p.relative_to(tree).parts for p in here) == bool(options)
    for path in here:
        for name in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
            of_others = name in ("ggml.h", "ggml-cpu.h", "gguf.h", "llama.h", "emulator.h")
            assert of_others or any((folder / name).is_file() for folder in (path.parent, tree / FOLDER / "include"))


@pytest.mark.parametrize(
    ("line", "message"),
    [("|early", "line 1"), ("+early", "line 1"), ("file a b", "line 1"), ("file a\nnonsense", "line 2")],
)
def test_a_bad_script_is_refused(line: str, message: str) -> None:
    with pytest.raises(IntegrationError, match=message):
        parse(line, "x")


# --- integrate, check, revert


@each_variant
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_integrate_check_revert(family: str, options: tuple[str, ...], newline: str, tmp_path: Path) -> None:
    tree = make_tree(tmp_path, family, newline)
    before = contents(tree)
    assert run(tree, "--check") == (1, f"{tree}: {family}, without CCQ\n")
    code, planned = run(tree, *options, "--dry-run")
    assert code == 0
    assert contents(tree) == before
    assert run(tree, *options) == (0, planned)
    after = contents(tree)
    edited = [file.path for file in edits_of(family, options)]
    assert {path for path in before if before[path] != after[path]} == set(edited)
    assert all(path.startswith(FOLDER) for path in after.keys() - before.keys())
    for path in edited:
        lines = (tree / path).read_bytes().split(b"\n")
        assert {line.endswith(b"\r") for line in lines[:-1]} == {newline == "\r\n"}
    code, said = run(tree, "--check")
    assert code == 0
    assert f"with CCQ {'and its CUDA kernels ' if options else ''}of ccq" in said
    assert run(tree) == run(tree, *options) == (0, "nothing to do\n")
    assert contents(tree) == after
    assert run(tree, "--revert", "--dry-run")[0] == 0
    assert contents(tree) == after
    assert run(tree, "--revert")[0] == 0
    assert contents(tree) == before
    assert not (tree / FOLDER).exists()
    assert run(tree, "--revert") == (0, "nothing to do\n")


def test_other_changes_in_the_tree_survive(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "llama.cpp")
    Integration(tree).integrate()
    for path in ("ggml/src/ggml.c", "include/llama.h"):
        with open(tree / path, "a") as out:
            out.write("/* mine */\n")
    changed = contents(make_tree(tmp_path / "other", "llama.cpp"))
    assert Integration(tree).integrate() == []
    Integration(tree).revert()
    text = (tree / "ggml/src/ggml.c").read_text()
    assert text.endswith("/* mine */\n")
    (tree / "ggml/src/ggml.c").write_text(text.removesuffix("/* mine */\n"))
    assert contents(tree)["ggml/src/ggml.c"] == changed["ggml/src/ggml.c"]


def test_revert_after_upstream_has_changed_an_anchor(tmp_path: Path) -> None:
    """As after a git pull that merged."""
    tree = make_tree(tmp_path, "llama.cpp")
    header = tree / "ggml/include/ggml.h"
    anchor, changed = b"GGML_TYPE_MXFP4   = 39, // MXFP4 (1 block)", b"GGML_TYPE_MXFP4   = 39, // changed"
    pulled = header.read_bytes().replace(anchor, changed)
    Integration(tree).integrate()
    header.write_bytes(header.read_bytes().replace(anchor, changed))
    refused(tree, "half of an integration; ccq-convert integrate --revert")
    assert run(tree, "--revert")[0] == 0
    assert header.read_bytes() == pulled


def test_an_earlier_version_is_updated_and_can_be_reverted(tmp_path: Path) -> None:
    """The tree's record tells what the earlier version inserted, which this one would not."""
    tree = make_tree(tmp_path / "tree", "llama.cpp")
    before = contents(tree)
    old = tmp_path / "old"
    shutil.copytree(integrate.source_folder(), old)
    script = old / "fork/edits/llama.cpp.edits"
    script.write_text(script.read_text().replace("+add_subdirectory(ggml-ccq)\n", "+add_subdirectory(ggml-ccq OLD)\n"))
    (old / "core/gone.h").write_text("/* no longer there */\n")
    Integration(tree, old).integrate()
    state = Integration(tree).state()
    assert not state.current
    assert state.outdated == ["core/gone.h", RECORD]
    assert "this version has 2 other files" in run(tree, "--check")[1]
    assert Integration(tree).integrate()
    assert Integration(tree).state().current
    assert "OLD" not in (tree / "ggml/src/CMakeLists.txt").read_text()
    assert not (tree / FOLDER / "core/gone.h").exists()
    Integration(tree, old).revert()
    assert contents(tree) == before


def test_cuda_comes_later_stays_and_goes_with_the_rest(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", "llama.cpp")
    before = contents(tree)
    Integration(tree).integrate()
    without = contents(tree)
    assert "cuda" not in json.loads((tree / FOLDER / RECORD).read_text())
    code, said = run(tree, "--check", "--cuda")
    assert code == 1
    assert "with CCQ of ccq" in said
    assert "other files" in said
    assert run(tree, "--cuda")[0] == 0
    assert run(tree, "--check")[0] == run(tree, "--check", "--cuda")[0] == 0
    with_cuda = contents(tree)
    changed = {path for path in without if without[path] != with_cuda[path]}
    assert changed == {file.path for file in parse(CUDA_SCRIPT, "llama.cpp")} | {f"{FOLDER}/{RECORD}"}
    direct = make_tree(tmp_path / "direct", "llama.cpp")
    Integration(direct, cuda=True).integrate()
    assert contents(direct) == with_cuda
    # an update, by a later version, without being told again
    old = tmp_path / "old"
    shutil.copytree(integrate.source_folder(), old)
    (old / "cuda/launch.h").write_text("/* earlier */\n")
    Integration(tree).revert()
    assert contents(tree) == before
    Integration(tree, old, cuda=True).integrate()
    assert Integration(tree).state().outdated == ["cuda/launch.h"]
    assert run(tree)[0] == 0
    assert contents(tree) == with_cuda
    assert run(tree, "--revert")[0] == 0
    assert contents(tree) == before


# --- refusals: nothing is changed


def refused(tree: Path, message: str, *options: str) -> None:
    before = contents(tree)
    code, said = run(tree, *options)
    assert code == 1, said
    assert " ".join(message.split()) in said
    assert contents(tree) == before


def test_no_tree(tmp_path: Path) -> None:
    refused(tmp_path, "is no source tree of llama.cpp: it has no ggml/src/ggml-cpu/ggml-cpu.c")


def test_cuda_in_a_family_that_has_no_such_kernels(tmp_path: Path) -> None:
    refused(make_tree(tmp_path, "ik_llama.cpp"), "is ik_llama.cpp, whose CUDA backend ccq has no kernels for", "--cuda")


@each_variant
def test_a_missing_anchor_is_named(family: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """Every one of them, one after the other."""
    tree = make_tree(tmp_path, family)
    for file in edits_of(family, options):
        path = tree / file.path
        good = path.read_bytes()
        for edit in file.edits:
            anchor = edit.anchors[0]
            wanted = "".join(f"{line}\n" for line in anchor.lines).encode()
            for bad, times in ((good.replace(wanted, b"", 1), good.count(wanted) - 1), (good + wanted, 2)):
                path.write_bytes(bad)
                if times != 1:  # an anchor may also be the beginning of a longer one
                    refused(tree, f"{path}: the anchor {anchor} occurs {times} times", *options)
        path.write_bytes(good)
    assert run(tree, *options)[0] == 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "llama.cpp")
    (tree / "src/llama-quant.cpp").unlink()
    refused(tree, "the tree has no src/llama-quant.cpp")
    make_tree(tree, "llama.cpp")
    (tree / "tests/test-quantize-fns.cpp").unlink()  # release archives leave tests out
    (tree / "ggml/src/ggml-cuda/ggml-cuda.cu").unlink()
    refused(tree, "the tree has no ggml/src/ggml-cuda/ggml-cuda.cu", "--cuda")
    assert run(tree)[0] == 0
    assert run(tree, "--check")[0] == 0
    assert run(tree, "--revert")[0] == 0


def test_half_edited_trees(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", "llama.cpp")
    clean = contents(tree)
    header = tree / "ggml/include/ggml.h"
    original = header.read_bytes()
    Integration(tree).integrate()
    edited = header.read_bytes()
    header.write_bytes(original)
    for options in ((), ("--check",)):
        refused(tree, f"{header}: the lines at the anchor 'GGML_TYPE_MXFP4   = 39, // MXFP4 (1 block)' are", *options)
    header.write_bytes(edited.replace(b"GGML_TYPE_CCQ_T2    = 36", b"GGML_TYPE_CCQ_T2    = 46"))
    for options in ((), ("--check",), ("--revert",)):
        refused(tree, f"{header}: line ", *options)
        refused(tree, "names CCQ but is no line that ccq inserts", *options)
    header.write_bytes(original)
    assert run(tree, "--revert")[0] == 0  # what is left of it
    assert contents(tree) == clean


def test_a_line_of_ours_was_deleted(tmp_path: Path) -> None:
    """The way out that the error names is one."""
    tree = make_tree(tmp_path / "tree", "llama.cpp")
    clean = contents(tree)
    header = tree / "ggml/include/ggml.h"
    original = header.read_bytes()
    Integration(tree).integrate()
    lines = header.read_bytes().splitlines(keepends=True)
    header.write_bytes(b"".join(line for line in lines if b"GGML_TYPE_CCQ_T2 " not in line))
    for options in ((), ("--check",), ("--revert",)):
        refused(tree, "restore this file from upstream", *options)
    header.write_bytes(original)
    assert run(tree, "--revert")[0] == 0
    assert contents(tree) == clean


def test_edits_without_the_folder(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "llama.cpp")
    clean = contents(tree)
    for cuda in (False, True):
        Integration(tree, cuda=cuda).integrate()
        shutil.rmtree(tree / FOLDER)
        refused(tree, f"but no {FOLDER}: half of an integration")
        assert run(tree, "--revert")[0] == 0
        assert contents(tree) == clean


def test_edits_for_cuda_without_the_rest(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "llama.cpp")
    clean = contents(tree)
    source = tree / "ggml/src/ggml-cuda/ggml-cuda.cu"
    Integration(tree, cuda=True).integrate()
    edited = source.read_bytes()
    Integration(tree).revert()
    source.write_bytes(edited)
    for options in ((), ("--cuda",), ("--check",)):
        refused(tree, f"but no {FOLDER}: half of an integration", *options)
    assert run(tree, "--revert")[0] == 0
    assert contents(tree) == clean


def test_the_folder_without_its_record_or_with_a_damaged_one(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "llama.cpp")
    clean = contents(tree)
    Integration(tree).integrate()
    record = tree / FOLDER / RECORD
    good = record.read_text()
    outside = json.dumps(json.loads(good) | {"files": ["../../../../x"]})
    for bad in ("{", json.dumps({"version": "1"}), outside):
        record.write_text(bad)
        for options in ((), ("--check",), ("--revert",)):
            refused(tree, f"{record}: is damaged", *options)
            refused(tree, f"remove the folder {FOLDER}, then ccq-convert integrate --revert", *options)
    record.write_text(json.dumps(json.loads(good) | {"script": "file ../x"}))
    refused(tree, "line 1 is no line of an edit script")
    record.unlink()
    refused(tree, f"{FOLDER} is there without {RECORD}: half of an integration; remove the folder {FOLDER}, then")
    record.write_text(good)
    (tree / FOLDER / "notes.txt").write_text("mine\n")
    refused(tree, f"{FOLDER} holds files that are not ours: notes.txt", "--revert")
    shutil.rmtree(tree / FOLDER)
    assert run(tree, "--revert")[0] == 0
    assert contents(tree) == clean


def test_check_and_revert_exclude_each_other(tmp_path: Path) -> None:
    assert run(tmp_path, "--check", "--revert")[0] == 2


def test_a_killed_process_leaves_what_can_be_reverted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree(tmp_path, "llama.cpp")
    clean = contents(tree)
    real = integrate._write
    for writes, cuda in itertools.product((1, 20, len(Integration(tree).files) + 5), (False, True)):
        left = [writes]

        def failing(path: Path, data: bytes, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] >= 0:
                real(path, data)
            else:
                os._exit(9)

        monkeypatch.setattr(integrate, "_write", failing)
        pid = os.fork()
        if pid == 0:
            Integration(tree, cuda=cuda).integrate()
        assert os.waitpid(pid, 0)[1] != 0
        monkeypatch.undo()
        refused(tree, "half of an integration; ccq-convert integrate --revert")
        assert run(tree, "--revert")[0] == 0
        assert contents(tree) == clean


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.booleans())
def test_a_failure_in_the_middle_is_undone(tmp_path_factory: pytest.TempPathFactory, writes: int, revert: bool) -> None:
    """A full disk, or Ctrl-C, at any file."""
    tree = make_tree(tmp_path_factory.mktemp("tree"), "llama.cpp")
    if revert:
        Integration(tree).integrate()
    before = contents(tree)
    left = [writes]
    real = integrate._write

    def failing(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        real(path, data)

    patch = pytest.MonkeyPatch()
    patch.setattr(integrate, "_write", failing)
    try:
        if revert:
            Integration(tree).revert()
        else:
            Integration(tree).integrate()
    except KeyboardInterrupt:
        assert contents(tree) == before
    else:
        assert left[0] >= 0
        assert contents(tree) != before
    finally:
        patch.undo()


# --- the real trees


@pytest.mark.parametrize(
    "package",
    [
        # One of each family is fetched by `make test`, too.
        pytest.param(
            package, marks=() if package in ("llama-cpp-python", "ik-llama-cpp-python") else pytest.mark.upstream
        )
        for package in ARCHIVES
    ],
)
def test_real_trees(package: str, tmp_path: Path) -> None:
    """The files that are edited, of the pinned source archives."""
    source = source_tree(package)
    family = Integration(source).family
    options = ("--cuda",) if family == "llama.cpp" else ()
    tree = tmp_path / "tree"
    for path in [FAMILIES[family], *(file.path for file in edits_of(family, options))]:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, tree / path)
    before = contents(tree)
    for chosen in {(), options}:
        assert run(tree, *chosen)[0] == 0
        assert run(tree, "--check", *chosen)[0] == 0
        assert run(tree) == (0, "nothing to do\n")
        assert run(tree, "--revert")[0] == 0
        assert contents(tree) == before

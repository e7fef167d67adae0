"""``ccq-convert integrate``: put the CCQ types into a source tree of llama.cpp or of a fork, or take them out again.

What is inserted where is data: an edit script per family of trees (``_EDITS`` in the installed sources), and another
for the kernels for NVIDIA GPUs.  A line of a script is one of::

    # a comment; empty lines mean nothing
    file PATH [optional]    the file that the following edits are for; "optional": a tree may lack it
    after | before          an edit begins: insert behind or in front of the anchor
    or after | or before    the same edit with another anchor, for trees in which the first is not found
    |TEXT                   a line of the anchor; the whole anchor must occur exactly once in the file
    +TEXT                   a line to insert
    t+TEXT                  a line to insert for every type; {NAME} and the like are replaced (``_of_types``)
    m+TEXT                  the same for every mixture (``_of_mixtures``)

Only whole lines are inserted, and they are all that is removed again, so that reverting restores every byte, whatever
else was changed in the tree meanwhile.  All other code is in one folder of the tree, ``FOLDER``.  It holds a record
(``RECORD``) with the script, so that a later version can revert or update what this one did.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import ccq_format
from ccq_format.errors import IntegrationError
from ccq_format.layouts import LAYOUTS, by_name
from ccq_format.output import OutputFile

from .mixtures import LADDER, MIXTURES
from .target_types import SMALLER_BLOCKS, fallback

FOLDER = "ggml/src/ggml-ccq"
"""Where our own files go."""

RECORD = "integration.json"

_EDITS = "fork/edits"

_FILE_TYPE, _MIXTURE = 900, 950
"""What is added to the id of a type for its number among llama.cpp's file types (llama_ftype), and to that of a
mixture's most frequent type."""

_CODES = {"trellis": "trellis code", "paper": "code of arXiv 2507.07145"}

_WITHOUT_RECORD = f"remove the folder {FOLDER}, then ccq-convert integrate --revert takes our lines out of the tree"
"""What to do where the record cannot be used: the lines of this version are known without it."""

FAMILIES = {"ik_llama.cpp": "ggml/src/iqk/iqk_mul_mat.cpp", "llama.cpp": "ggml/src/ggml-cpu/ggml-cpu.c"}
"""Families of trees, each with a file that tells it from those below."""

_PLUGIN_SOURCES = ("nodes.cpp", "nodes.h", "ops.cpp", "ops.h", "types.cpp", "types.h")
"""The files of the plugin that the integration shares."""

_CUDA_SOURCES = ("blocks.h", "ccq_cuda.h", "device.h", "host.h", "kernels.h", "launch.h")
"""The files of the CUDA library that the integration shares, with ``--cuda``."""

_CUDA_GLUE = "fork/cuda"
"""The sources that only ``--cuda`` puts into a tree."""


@dataclass(frozen=True)
class Anchor:
    """Lines of a file that an edit is ``after`` or before."""

    after: bool
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"'{self.lines[0].strip()}'" + (f" and {len(self.lines) - 1} lines more" if self.lines[1:] else "")


@dataclass
class Edit:
    """Lines to insert at the first anchor that is found."""

    anchors: list[Anchor]
    text: list[str] = field(default_factory=list)


@dataclass
class FileEdits:
    """The edits of one file."""

    path: str
    optional: bool
    edits: list[Edit] = field(default_factory=list)


def _of_types() -> list[dict[str, object]]:
    """What lines for every type can name."""
    return [
        {
            "NAME": layout.name.upper(),
            "id": layout.gguf_id,
            "index": index,
            "ftype": _FILE_TYPE + layout.gguf_id,
            "weights": layout.block_weights,
            "bytes": layout.block_bytes,
            "bpw": layout.bpw,
            "code": _CODES[layout.code.family],
            # of test-quantize-fns
            "total_error": ["BINARY", "TERNARY", "2BITS", "3BITS"][sum(layout.bpw > limit for limit in (1.5, 2, 2.6))],
            "dot_error": "BINARY" if layout.bpw < 1.5 else "LOWBIT",
        }
        for index, layout in enumerate(LAYOUTS)
    ]


def _of_mixtures() -> list[dict[str, object]]:
    """What lines for every mixture can name."""
    return [
        {
            "NAME": mixture.name.upper(),
            "BASE": mixture.base.upper(),
            "ftype": _MIXTURE + by_name(mixture.base).gguf_id,
        }
        for mixture in MIXTURES.values()
    ]


def expand(script: str) -> str:
    """A script with its lines for every type and mixture written out."""
    kinds = {"t+": _of_types(), "m+": _of_mixtures()}
    lines = []
    for line in script.splitlines():
        values = kinds.get(line[:2])
        lines += [line] if values is None else ["+" + line[2:].format(**value) for value in values]
    return "".join(f"{line}\n" for line in lines)


def _plans() -> str:
    """The header that tells llama-quantize of mixtures and of types that others fall back to."""
    ladder = ", ".join(f"GGML_TYPE_{name.upper()}" for name in LADDER)
    mixtures = [
        f"X({m.name.removeprefix('ccq_').upper()}, {', '.join(t.upper() for t in (m.base, m.embedding, m.output))})"
        for m in MIXTURES.values()
    ]
    smaller = [f"X({name.upper()}, {smaller.upper()})" for name, (smaller,) in SMALLER_BLOCKS.items()]
    return "\n".join(
        [
            "// Made from ccq_converters.mixtures and .target_types.",
            "#pragma once",
            f"#define LLAMA_CCQ_LADDER {ladder}",
            "// what rows get that are no whole blocks: the smallest of llama.cpp's types that is larger than ours",
            f"#define LLAMA_CCQ_FALLBACK GGML_TYPE_{fallback('ccq_t3', 32).upper()}",
            "// X(STEM, type of most matrices, of the token embedding, of the output)",
            "#define LLAMA_CCQ_MIXTURES(X) " + " ".join(mixtures),
            "// X(type, type of the same kind with smaller blocks)",
            "#define LLAMA_CCQ_SMALLER(X) " + " ".join(smaller),
            "",
        ]
    )


def parse(script: str, name: str) -> list[FileEdits]:
    """Read an edit script (expanded).  Raises ``IntegrationError`` with the line that is none."""
    files: list[FileEdits] = []
    for number, line in enumerate(script.splitlines(), 1):
        words = line.split()
        edits = files[-1].edits if files else []
        if not words or line.startswith("#"):
            continue
        if words[0] == "file" and words[2:] in ([], ["optional"]) and _is_inside(words[1:2]):
            files.append(FileEdits(words[1], bool(words[2:])))
        elif words in (["after"], ["before"]) and files:
            edits.append(Edit([Anchor(words == ["after"], ())]))
        elif words in (["or", "after"], ["or", "before"]) and edits:
            edits[-1].anchors.append(Anchor(words[1] == "after", ()))
        elif line[0] == "|" and edits:
            last = edits[-1].anchors[-1]
            edits[-1].anchors[-1] = Anchor(last.after, (*last.lines, line[1:]))
        elif line[0] == "+" and edits:
            edits[-1].text.append(line[1:])
        else:
            raise IntegrationError(f"line {number} is no line of an edit script: '{line}'", file=name)
    return files


def _is_inside(paths: list[str]) -> bool:
    """True if there are paths and all are below the folder that they are relative to: a record may come with a tree."""
    return bool(paths) and all(not PurePosixPath(p).is_absolute() and ".." not in PurePosixPath(p).parts for p in paths)


class _Text:
    """A file as lines; what is inserted takes the line ends that the file has."""

    def __init__(self, data: bytes) -> None:
        self.lines = data.decode("utf-8", "surrogateescape").splitlines(keepends=True)
        self.newline = "\r\n" if self.lines and self.lines[0].endswith("\r\n") else "\n"

    def data(self) -> bytes:
        return "".join(self.lines).encode("utf-8", "surrogateescape")

    def find(self, wanted: tuple[str, ...]) -> list[int]:
        """Where these lines begin."""
        ended = [line + self.newline for line in wanted]
        n = len(ended)
        return [i for i in range(len(self.lines) - n + 1) if self.lines[i : i + n] == ended]

    def mention(self) -> int | None:
        """The first line, counted from 1, that names CCQ."""
        return next((i for i, line in enumerate(self.lines, 1) if re.search("ccq", line, re.IGNORECASE)), None)


def _refuse_mention(text: _Text, path: Path) -> None:
    """Raise ``IntegrationError`` if a line names CCQ: our own have been removed."""
    line = text.mention()
    if line is not None:
        raise IntegrationError(
            f"line {line} names CCQ but is no line that ccq inserts: half of an integration, or changed by hand; "
            "restore this file from upstream (all our lines in it may go), then ccq-convert integrate --revert removes "
            "the rest",
            file=path,
        )


def _apply(text: _Text, edits: list[Edit], path: str) -> None:
    """Insert all edits.  Raises ``IntegrationError`` naming the anchor that does not occur exactly once."""
    places: list[tuple[int, list[str]]] = []
    for edit in edits:
        found = [(anchor, text.find(anchor.lines)) for anchor in edit.anchors]
        match = next(((anchor, at[0]) for anchor, at in found if len(at) == 1), None)
        if match is None:
            anchor, at = found[0]
            raise IntegrationError(
                f"the anchor {anchor} occurs {len(at)} times, not once: this tree is none that ccq "
                f"{ccq_format.__version__} knows",
                file=path,
            )
        anchor, at_line = match
        places.append((at_line + (len(anchor.lines) if anchor.after else 0), edit.text))
    for at_line, lines in sorted(places, key=lambda place: place[0], reverse=True):
        text.lines[at_line:at_line] = [line + text.newline for line in lines]


def _undo(text: _Text, edits: list[Edit], moved: bool = False) -> list[Edit]:
    """Remove the edits that are there; returns those that are not.  With ``moved`` also those that are there once, but
    no longer at their anchor, because upstream has changed it."""
    missing = []
    for edit in edits:
        inserted = tuple(edit.text)
        places = []
        for anchor in edit.anchors:
            at = text.find((*anchor.lines, *inserted) if anchor.after else (*inserted, *anchor.lines))
            places += [i + (len(anchor.lines) if anchor.after else 0) for i in at]
        if not places and moved:
            places = text.find(inserted)
        if len(places) == 1:
            del text.lines[places[0] : places[0] + len(inserted)]
        else:
            missing.append(edit)
    return missing


@dataclass(frozen=True)
class Record:
    """What an integration notes in its folder: the version of ccq, its script, its own files in the folder, and whether
    the kernels for NVIDIA GPUs are among them."""

    version: str
    script: str
    files: list[str]
    cuda: bool


@dataclass
class State:
    """What was found in a tree.

    ``family`` is a key of ``FAMILIES``; ``version`` that of the integration in the tree, ``None`` if there is none;
    ``cuda`` whether it has the kernels for NVIDIA GPUs; ``outdated`` our own files that differ from those of this
    version, with these kernels if they are wanted.
    """

    tree: Path
    family: str
    version: str | None
    cuda: bool
    outdated: list[str]

    def as_text(self) -> str:
        """One line for people."""
        if self.version is None:
            return f"{self.tree}: {self.family}, without CCQ"
        kernels = "and its CUDA kernels " if self.cuda else ""
        found = f"{self.tree}: {self.family} with CCQ {kernels}of ccq {self.version}"
        if self.outdated:
            return (
                f"{found}; this version has {len(self.outdated)} "
                f"other files ({', '.join(self.outdated[:3])}{', ...' if self.outdated[3:] else ''})"
            )
        return found

    @property
    def current(self) -> bool:
        """The tree is integrated, with just this version's files."""
        return self.version is not None and not self.outdated


class Integration:
    """One tree, and what this version of CCQ puts into it: with ``cuda``, or if the tree has them already, the kernels
    for NVIDIA GPUs too.

    Raises ``IntegrationError`` if the tree is of no known family, or of one that there are no such kernels for, or our
    folder in it is damaged.
    """

    def __init__(self, tree: str | os.PathLike[str], sources: Path | None = None, cuda: bool = False) -> None:
        self.tree = Path(tree)
        self.sources = sources if sources is not None else source_folder()
        self.family = self._family()
        self.script = expand((self.sources / _EDITS / f"{self.family}.edits").read_text())
        cuda_script = self.sources / _EDITS / f"{self.family}.cuda.edits"
        self.cuda_script = expand(cuda_script.read_text()) if cuda_script.is_file() else ""
        self.folder = self.tree / FOLDER
        self.old = self._record()
        self.cuda = cuda or (self.old is not None and self.old.cuda)
        if self.cuda:
            if not self.cuda_script:
                raise IntegrationError(f"is {self.family}, whose CUDA backend ccq has no kernels for", file=self.tree)
            self.script += self.cuda_script
        self.files = self._own_files()

    def _family(self) -> str:
        for family, path in FAMILIES.items():
            if (self.tree / path).is_file():
                return family
        raise IntegrationError(f"is no source tree of llama.cpp: it has no {FAMILIES['llama.cpp']}", file=self.tree)

    def _record(self) -> Record | None:
        path = self.folder / RECORD
        if not path.is_file():
            if self.folder.exists():
                raise IntegrationError(
                    f"{FOLDER} is there without {RECORD}: half of an integration; {_WITHOUT_RECORD}", file=self.tree
                )
            return None
        try:
            record = json.loads(path.read_text())
            files = list(map(str, record["files"]))
            found = Record(str(record["version"]), str(record["script"]), files, bool(record.get("cuda", False)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrationError(f"is damaged: {error}; {_WITHOUT_RECORD}", file=path) from None
        if not _is_inside(found.files):
            raise IntegrationError(f"is damaged: a file lies outside; {_WITHOUT_RECORD}", file=path)
        return found

    def _own_files(self) -> dict[str, bytes]:
        """Our own files by their path in the folder, the record among them."""
        wanted = [p for top in ("include", "core", "cpu", "fork") for p in sorted((self.sources / top).rglob("*"))]
        wanted += [self.sources / "ggml" / name for name in _PLUGIN_SOURCES]
        if self.cuda:
            wanted += [self.sources / "cuda" / name for name in _CUDA_SOURCES]
        files = {
            p.relative_to(self.sources).as_posix(): p.read_bytes()
            for p in wanted
            if p.is_file() and p.suffix in (".c", ".cpp", ".cu", ".h", ".inl", ".txt", ".cmake")
        }
        if not self.cuda:
            files = {name: data for name, data in files.items() if not name.startswith(f"{_CUDA_GLUE}/")}
        files["CMakeLists.txt"] = files.pop("fork/CMakeLists.txt")
        files["ggml/host_abi.h"] = files.pop("fork/host_abi.h")
        files["fork/plans.h"] = _plans().encode()
        files["fork/version.h"] = f'#define CCQ_VERSION "{ccq_format.__version__}"\n'.encode()
        record = {
            "version": ccq_format.__version__,
            "family": self.family,
            **({"cuda": True} if self.cuda else {}),
            "files": sorted(files),
            "script": self.script,
        }
        # First, so that half of an integration has it, should the power fail.
        return {RECORD: (json.dumps(record, indent=1) + "\n").encode(), **files}

    # --- what is there

    def _there(self) -> list[FileEdits]:
        """The edits that should be in the tree, or, without a record, all that could be left of an integration."""
        if self.old is not None:
            return parse(self.old.script, self.family)
        return parse(self.script, self.family) + ([] if self.cuda else self._only_cuda())

    def _only_cuda(self) -> list[FileEdits]:
        """The edits for ``--cuda``, in files that have no others; nothing is amiss where there are none."""
        return [replace(file, optional=True) for file in parse(self.cuda_script, self.family)]

    def _clean(self) -> tuple[dict[str, bytes], dict[str, bytes], list[tuple[str, Edit]]]:
        """The edited files as they are and without the edits, and the edits that are not where they should be."""
        now, clean, missing = {}, {}, []
        for file in self._there():
            path = self.tree / file.path
            if not path.is_file():
                if file.optional:
                    continue
                raise IntegrationError(f"the tree has no {file.path}", file=self.tree)
            now[file.path] = path.read_bytes()
            text = _Text(now[file.path])
            missing += [(file.path, edit) for edit in _undo(_Text(now[file.path]), file.edits)]
            _undo(text, file.edits, moved=True)
            _refuse_mention(text, path)
            clean[file.path] = text.data()
        if self.old is not None and not self.old.cuda:
            for file in self._only_cuda():
                if (self.tree / file.path).is_file():
                    _refuse_mention(_Text((self.tree / file.path).read_bytes()), self.tree / file.path)
        return now, clean, missing

    def state(self) -> State:
        """Look at the tree.  Raises ``IntegrationError`` if it is half edited."""
        self._require_whole()
        if self.old is None:
            return State(self.tree, self.family, None, False, [])
        names = sorted({*self.files, *self.old.files})
        outdated = [name for name in names if self._on_disk(name) != self.files.get(name)]
        return State(self.tree, self.family, self.old.version, self.old.cuda, outdated)

    def _on_disk(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def _require_whole(self) -> None:
        now, _, missing = self._clean()
        total = sum(len(f.edits) for f in self._there() if f.path in now)
        if self.old is not None and missing:
            path, edit = missing[0]
            raise IntegrationError(
                f"the lines at the anchor {edit.anchors[0]} are missing, others are there: half of an integration; "
                "ccq-convert integrate --revert removes the rest",
                file=self.tree / path,
            )
        if self.old is None and len(missing) != total:
            raise IntegrationError(
                f"holds {total - len(missing)} of our edits, but no {FOLDER}: half of an integration; "
                "ccq-convert integrate --revert removes them",
                file=self.tree,
            )

    # --- changes

    def integrate(self, dry_run: bool = False) -> list[str]:
        """Put this version's CCQ into the tree, in place of an earlier version's.  Returns what was changed, for
        people; nothing if all is there.  Raises ``IntegrationError`` before anything is changed."""
        if self.state().current:
            return []
        now, clean, _ = self._clean()
        wanted = {f"{FOLDER}/{name}": data for name, data in self.files.items()} | clean
        report = []
        for file in parse(self.script, self.family):
            if file.path not in now and not (self.tree / file.path).is_file():
                if file.optional:
                    continue
                raise IntegrationError(f"the tree has no {file.path}", file=self.tree)
            before = clean.get(file.path, None) or (self.tree / file.path).read_bytes()
            text = _Text(before)
            _apply(text, file.edits, str(self.tree / file.path))
            wanted[file.path] = text.data()
            if _undo(text, file.edits) or text.data() != before:
                raise IntegrationError("the edits cannot be undone; this is a bug of ccq", file=self.tree / file.path)
            report.append(f"{file.path}: {sum(len(e.text) for e in file.edits)} lines")
        gone = [f"{FOLDER}/{name}" for name in (self.old.files if self.old else []) if name not in self.files]
        report.append(f"{FOLDER}: {len(self.files)} files")
        if not dry_run:
            self._change({p: d for p, d in wanted.items() if not self._is(p, d)}, gone)
        return report

    def revert(self, dry_run: bool = False) -> list[str]:
        """Take CCQ out of the tree, half of an integration too.  Returns what was changed, for people.  Raises
        ``IntegrationError`` before anything is changed if our lines were changed by hand or our folder holds more."""
        now, clean, _ = self._clean()
        ours = {*(self.old.files if self.old else []), RECORD}
        there = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if not p.is_dir()]
        foreign = sorted(set(there) - ours)
        if foreign:
            raise IntegrationError(f"{FOLDER} holds files that are not ours: {', '.join(foreign)}", file=self.tree)
        changed = {path: data for path, data in clean.items() if data != now[path]}
        report = [f"{path}: as it was" for path in changed] + ([f"{FOLDER}: removed"] if there else [])
        if not dry_run:
            self._change(changed, [f"{FOLDER}/{name}" for name in sorted(there, key=lambda name: name == RECORD)])
        return report

    def _is(self, path: str, data: bytes) -> bool:
        there = self.tree / path
        return there.is_file() and there.read_bytes() == data

    def _change(self, wanted: dict[str, bytes], gone: list[str]) -> None:
        """Write and remove files; what was done is undone if one of them cannot be, or at Ctrl-C."""
        before: dict[str, bytes | None] = {
            p: (self.tree / p).read_bytes() if (self.tree / p).is_file() else None for p in (*wanted, *gone)
        }
        done: list[str] = []
        try:
            for path, data in wanted.items():
                done.append(path)
                _write(self.tree / path, data)
            for path in gone:
                done.append(path)
                (self.tree / path).unlink(missing_ok=True)
        except BaseException:
            for path in reversed(done):
                old = before[path]
                if old is None:
                    (self.tree / path).unlink(missing_ok=True)
                else:
                    _write(self.tree / path, old)
            raise
        finally:
            _remove_empty_folders(self.folder)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with OutputFile(path, overwrite=True) as out:
        out.open().write(data)
        if path.exists():
            os.fchmod(out.file.fileno(), path.stat().st_mode & 0o7777)


def _remove_empty_folders(folder: Path) -> None:
    """Remove ``folder`` and the folders in it that hold no file."""
    for root, _, _ in sorted(os.walk(folder), key=lambda entry: len(entry[0]), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(root)


def source_folder() -> Path:
    """The installed sources.  Raises ``IntegrationError`` if the package was installed without them."""
    import ccq_backend

    folder = Path(ccq_backend.__file__).with_name("source")
    if not (folder / _EDITS).is_dir():
        raise IntegrationError("the sources are not installed", file=folder)
    return folder

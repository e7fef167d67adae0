"""Inputs that once failed: a folder each, with ``case.json`` (the target, what was wrong), the files that differ from
those of the target's seed, and the names of those that are missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .mutate import Files
from .seeds import seed
from .targets import Target, target_of
from .worker import read_files

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Case:
    """An input and the command that it goes through."""

    name: str
    target: Target
    files: Files


def cases(folder: Path = CORPUS) -> Iterator[Case]:
    """All of a corpus."""
    for path in sorted(folder.glob("*/case.json")):
        said = json.loads(path.read_text(encoding="utf-8"))
        target = target_of(said["target"])
        kept = {name: data for name, data in seed(target.seed).items() if name not in said["missing"]}
        yield Case(path.parent.name, target, kept | read_files(path.parent))


def save(target: Target, files: Files, fault: str, folder: Path = CORPUS) -> Path:
    """Keep an input, under a name made of what is wrong with it; returns its folder."""
    intact = seed(target.seed)
    name = re.sub(r"[^a-z0-9]+", "-", f"{target.seed} {fault}".lower()).strip("-")[:90]
    path = folder / name
    for other in range(2, 100):
        if not path.exists():
            break
        path = folder / f"{name}-{other}"
    path.mkdir(parents=True)
    missing = sorted(name for name in intact if name not in files)
    said = {"target": target.name, "fault": fault, "missing": missing}
    (path / "case.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    for file, data in files.items():
        if data != intact.get(file):
            (path / file).parent.mkdir(exist_ok=True)
            (path / file).write_bytes(data)
    return path

"""Check what ``python -m build`` made: ``check_package.py DIST [PYTHON...]``.

The source archive has all that is compiled and installed, its documents, and nothing else.  The wheel says that it runs
on every Python from 3.10 on, and does: it is installed into a new environment of every PYTHON that is given, by default
this one, and encodes and decodes there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = {"CHANGELOG.md", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "SECURITY.md", "pyproject.toml"}
FOLDERS = {"backend", "ccq_format", "converters", "docs"}

SMOKE = """
import sys, ccq_backend, numpy as np
from ccq_format.layouts import LAYOUTS
layout = next(l for l in LAYOUTS if l.name == "ccq_t2")
x = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
back = ccq_backend.decode(layout, ccq_backend.encode(layout, x))
assert np.square(back - x).mean() < 0.1 * np.square(x).mean()
assert ccq_backend.plugin_path().is_file()
print(sys.version, ccq_backend._ccq.__file__)
"""


def check_source(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = TOP | {name for name in tracked if name.split("/", 1)[0] in FOLDERS}
    if names != wanted:
        sys.exit(f"{path}: lacks {sorted(wanted - names)}, has {sorted(names - wanted)}")
    print(f"{path}: {len(names)} files")


def check_wheel(path: Path) -> None:
    if not re.fullmatch(r"ccq-[\d.]+-cp310-abi3-(linux|manylinux\w*)_\w+\.whl", path.name):
        sys.exit(f"{path}: is not for every Python from 3.10 on")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    for needed in ("License-Expression: MIT", "License-File: LICENSE"):
        if needed not in metadata.splitlines():
            sys.exit(f"{path}: its metadata lacks {needed}")
    folders = {name.split("/", 1)[0] for name in names}
    if {name for name in folders if not name.endswith(".dist-info")} != {"ccq_backend", "ccq_converters", "ccq_format"}:
        sys.exit(f"{path}: installs {sorted(folders)}")
    print(f"{path}: {len(names)} files")


if __name__ == "__main__":
    (source,) = Path(sys.argv[1]).glob("*.tar.gz")
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    check_source(source)
    check_wheel(wheel)
    for python in sys.argv[2:] or [sys.executable]:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([python, "-m", "venv", folder], check=True)
            install = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*install, str(wheel.resolve())], check=True)
            subprocess.run([f"{folder}/bin/python", "-c", SMOKE], check=True, cwd=folder)

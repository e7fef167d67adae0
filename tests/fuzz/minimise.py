"""Make a failing input small: fewer damaged files, fewer JSON values, fewer bytes, as long as it fails alike."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from .mutate import Files

_T = TypeVar("_T")
MAX_TRIALS = 300


class _Trials:
    """Counts what is tried; when that is enough, nothing more fails alike."""

    def __init__(self, fails: Callable[[Files], bool]) -> None:
        self._fails, self.left = fails, MAX_TRIALS

    def __call__(self, files: Files) -> bool:
        self.left -= 1
        return self.left >= 0 and self._fails(files)


def minimise(files: Files, intact: Files, fails: Callable[[Files], bool]) -> Files:
    """The smallest variant of ``files`` that is found for which ``fails`` still holds."""
    trial = _Trials(fails)
    for name in sorted({*files, *intact}):
        if files.get(name) != intact.get(name):
            candidate = {k: v for k, v in files.items() if k != name}
            candidate |= {name: intact[name]} if name in intact else {}
            files = candidate if trial(candidate) else files
    for name in [name for name in files if files[name] != intact.get(name)]:
        fewer = _fewer_values if name.endswith(".json") else _fewer_bytes
        files = fewer(files, name, trial)
    return files


def _fewer_bytes(files: Files, name: str, fails: Callable[[Files], bool]) -> Files:
    shrunk = ddmin(list(files[name]), lambda part: fails({**files, name: bytes(part)}))
    return {**files, name: bytes(shrunk)}


def ddmin(items: Sequence[_T], fails: Callable[[Sequence[_T]], bool]) -> Sequence[_T]:
    """Zeller's and Hildebrandt's delta debugging: parts are left out, ever smaller ones, while ``fails`` holds."""
    parts = 2
    while len(items) > 1 and parts <= 64:
        size = -(-len(items) // parts)
        for at in range(0, len(items), size):
            rest = [*items[:at], *items[at + size :]]
            if fails(rest):
                items, parts = rest, max(parts - 1, 2)
                break
        else:
            parts *= 2
    return items


def _fewer_values(files: Files, name: str, fails: Callable[[Files], bool]) -> Files:
    try:
        tree = json.loads(files[name])
    except ValueError:
        return files
    found = True
    while found:
        found = False
        for path in list(_paths(tree)):
            smaller = copy.deepcopy(tree)
            parent = smaller
            for key in path[:-1]:
                parent = parent[key]
            del parent[path[-1]]
            candidate = {**files, name: json.dumps(smaller).encode()}
            if fails(candidate):
                tree, files, found = smaller, candidate, True
                break
    return files


def _paths(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values, outer ones first."""
    places = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    yield from ((*above, key) for key in places)
    for key in places:
        yield from _paths(tree[key], (*above, key))

"""``make fuzz``: what once failed stays fixed, intact inputs pass, and the fuzzer sees what it is there to see."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz import pool
from fuzz.corpus import Case, cases, save
from fuzz.formats import FORMATS
from fuzz.judge import judge
from fuzz.minimise import minimise
from fuzz.mutate import mutate_tree
from fuzz.seeds import SEEDS, seed
from fuzz.targets import Target, make_input, targets

from ccq_converters import convert, inspect
from ccq_converters.conversion import Conversion
from ccq_format.errors import ModelError

ALL = [target for group in targets().values() for target in group]


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_what_failed_once(case: Case, tmp_path: Path) -> None:
    verdict = judge(case.target, case.files, tmp_path)
    assert verdict.fault is None, verdict.detail


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_intact_inputs(target: Target, tmp_path: Path) -> None:
    """Else nothing behind the first check would be tried."""
    verdict = judge(target, seed(target.seed), tmp_path)
    assert (verdict.outcome, verdict.fault) == ("ok", None), verdict.detail


@pytest.mark.parametrize("name", SEEDS)
def test_trees_and_back(name: str) -> None:
    for file, data in seed(name).items():
        suffix = file[file.rfind(".") :]
        if suffix in FORMATS:
            decode, encode = FORMATS[suffix]
            assert decode(encode(decode(data), False)) == decode(data)
            assert decode(encode(decode(data), True)) == decode(data), "there is nothing to repair"


def test_inputs_are_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from fuzz.targets import make_input\n"
        "inputs = [make_input(i, 7) for i in range(300)]\n"
        "print(hashlib.sha256(repr([(t.name, sorted(f.items())) for t, f in inputs]).encode()).hexdigest())"
    )
    path = os.pathsep.join([str(pool.TESTS), *(p for p in sys.path if p)])
    digests = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": h}
        )
        for h in ("1", "2")
    }
    assert len(digests) == 1


def test_mutated_inputs_differ_from_intact_ones() -> None:
    made = [make_input(index, 0) for index in range(200)]
    assert {target.kind for target, _ in made} == set(targets())
    assert sum(files != seed(target.seed) for target, files in made) > 190


def test_a_change_may_remove_everything() -> None:
    """And others may be to follow."""
    left = [mutate_tree({"a": 1}, random.Random(index)) for index in range(3000)]
    assert None in left


# --- what the judge sees --------------------------------------------------------------------------------------------

INSPECT = targets()["inspect"][0]
QUANTIZE = targets()["quantize"][0]


def _raise(error: BaseException) -> Callable[..., Any]:
    def call(*_args: Any, **_more: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (KeyError("x"), "traceback: KeyError"),
        (MemoryError(), "traceback: MemoryError"),
        (OSError(5, "broken"), "not an error of ours: OSError"),
        (ModelError("is bad"), "ModelError without a place"),
        (ModelError("", file="x"), "ModelError is too long or empty"),
        (ModelError("is bad", file="x"), None),
    ],
    ids=str,
)
def test_errors(error: BaseException, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "open_model", _raise(error))
    verdict = judge(INSPECT, seed(INSPECT.seed), tmp_path)
    assert verdict.fault is None if fault is None else (verdict.fault or "").startswith(fault)
    assert not list(tmp_path.iterdir())


def test_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "as_text", lambda _model: "\x1b[31m")
    assert judge(INSPECT, seed(INSPECT.seed), tmp_path).fault == "prints control characters"


def test_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = convert.write_planned

    def write(conversion: Conversion, *args: Any) -> None:
        plain(conversion, *args)
        conversion.out.with_name(".forgotten").touch()

    monkeypatch.setattr(convert, "write_planned", write)
    assert judge(QUANTIZE, seed(QUANTIZE.seed), tmp_path).fault == "output files are left"


def test_damaged_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = convert.write_planned

    def write(conversion: Conversion, *args: Any) -> None:
        plain(conversion, *args)
        os.truncate(conversion.out, 100)

    monkeypatch.setattr(convert, "write_planned", write)
    assert judge(QUANTIZE, seed(QUANTIZE.seed), tmp_path).fault == "its output is damaged"


def test_processes_that_end_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pool.Worker()
    request = {"target": INSPECT.name}
    try:
        assert worker.ask(request)["outcome"] == "ok"
        assert worker._process is not None
        worker._process.send_signal(signal.SIGKILL)
        worker._process.wait()
        assert worker.ask(request)["fault"] == "ends the process: SIGKILL"
        assert worker.ask(request)["outcome"] == "ok"
        monkeypatch.setattr(pool, "SECONDS", 0.5)
        worker._process.send_signal(signal.SIGSTOP)
        assert worker.ask(request)["fault"] == "takes too long"
    finally:
        worker.close()


def test_memory_is_limited() -> None:
    code = "import sys\nfrom fuzz import worker\nworker.limit()\nbytearray(int(sys.argv[1]) * worker.ALLOWANCE // 2)"
    path = os.pathsep.join([str(pool.TESTS), *(p for p in sys.path if p)])
    for halves, error in ((1, ""), (3, "MemoryError")):
        run = [sys.executable, "-c", code, str(halves)]
        result = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert result.stderr.strip().rpartition("\n")[2] == error


# --- minimising -----------------------------------------------------------------------------------------------------


def test_minimise_bytes_and_values() -> None:
    intact = {"a.bin": b"x" * 100, "b.json": b"{}", "c.json": b"[]"}
    files = {"a.bin": bytes(range(200)), "b.json": b'{"k": [1, {"bad": 2, "other": 3}], "l": 4}', "c.json": b"[5]"}

    def fails(candidate: dict[str, bytes]) -> bool:
        return b"\x33" in candidate["a.bin"] and b"bad" in candidate["b.json"]

    assert minimise(files, intact, fails) == {"a.bin": b"\x33", "b.json": b'{"k": [{"bad": 2}]}', "c.json": b"[]"}


def test_a_saved_case_is_found_again(tmp_path: Path) -> None:
    target = next(t for t in ALL if t.seed == "hf-sharded")
    files = {name: data for name, data in seed(target.seed).items() if name != "in/README.md"}
    files["in/config.json"] = b"?"
    save(target, files, "some fault", tmp_path)
    save(target, files, "some fault", tmp_path)
    found = list(cases(tmp_path))
    assert [case.name for case in found] == ["hf-sharded-some-fault", "hf-sharded-some-fault-2"]
    assert all(case.target == target and case.files == files for case in found)

"""What a conversion that can be resumed is: everything that the bytes of its tensors depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path

from ccq_format._partial import DIGEST
from ccq_format.errors import InputError

from .imatrix import Importance
from .options import QuantOptions

_CHANGE_NOTHING = frozenset({"threads", "device", "overwrite", "dry_run", "resume", "calibrate", "feedback", "force"})
"""Fields of ``QuantOptions`` that no byte of the output depends on."""

_NAMES = {"overrides": "--tensor-type", "fallback": "--no-fallback"}


def job_of(options: QuantOptions, files: Sequence[Path]) -> dict[str, str]:
    """Names and values of all that must be the same in the run that goes on: options, and what is read.

    ``files`` are those the weights come from.  They and the Hessians, which may be many GB, count as the same as long
    as size and time of change are; the importance is compared by its values.

    Raises ``InputError`` if a file cannot be read, ``TypeError`` for an option whose value has no JSON form.
    """
    job = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in _CHANGE_NOTHING:
            continue
        name = _NAMES.get(field.name, "--" + field.name.replace("_", "-"))
        if field.name == "hessian":
            job[name] = "none" if value is None else _state(value.file)
        elif field.name == "imatrix":
            job[name] = "none" if value is None else _digest(value)
        elif field.name == "fallback":
            job[name] = json.dumps(not value)
        else:
            job[name] = value if isinstance(value, str) else json.dumps(value)
    for path in files:
        job[path.name] = _state(path)
    return job


def _state(path: str | os.PathLike[str]) -> str:
    """Size and time of change; where the file lies may change."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise InputError(error.strerror or str(error), file=path) from None
    seconds, rest = divmod(stat.st_mtime_ns, 10**9)
    return f"{stat.st_size} bytes of {datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"


def _digest(importance: Importance) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(importance.entries.items()):
        digest.update(json.dumps([name, entry.sums.size, entry.counts.size]).encode())
        digest.update(entry.sums.astype("<f4").tobytes())
        digest.update(entry.counts.astype("<f8").tobytes())
    return DIGEST + digest.hexdigest()

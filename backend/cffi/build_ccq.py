"""Emit the C source of the cffi extension ``ccq_backend._ccq``; CMake runs ``python build_ccq.py OUT.c``.

The declarations are read from ``backend/include/ccq.h`` itself, so that the interface is written down once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cdef import declarations  # type: ignore[import-not-found]  # beside this script

from cffi import FFI

HEADER = Path(__file__).resolve().parent.parent / "include" / "ccq.h"


def main(out: str) -> None:
    """Write the extension's C source to ``out``."""
    ffi = FFI()
    ffi.cdef(declarations(HEADER.read_text(encoding="utf-8")))
    ffi.set_source("ccq_backend._ccq", '#include "ccq.h"')
    ffi.emit_c_code(out)


if __name__ == "__main__":
    main(sys.argv[1])

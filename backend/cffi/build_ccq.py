"""Emit the C source of the cffi extension ``ccq_backend._ccq``; CMake runs ``python build_ccq.py OUT.c``.

The declarations are read from ``backend/include/ccq.h`` itself, so that the interface is written down once.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).resolve().parent.parent / "include" / "ccq.h"


def declarations(header: str) -> str:
    """The part of ``ccq.h`` that cffi's parser takes: integer constants, types and prototypes."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r'extern "C" \{', "", text)
    text = re.sub(r"#ifdef __cplusplus\s*\}?\s*#endif", "", text)
    lines = [ln for ln in text.splitlines() if not ln.startswith("#") or re.match(r"#define \w+ \d+\s*$", ln)]
    return "\n".join(lines)


def main(out: str) -> None:
    """Write the extension's C source to ``out``."""
    ffi = FFI()
    ffi.cdef(declarations(HEADER.read_text(encoding="utf-8")))
    ffi.set_source("ccq_backend._ccq", '#include "ccq.h"')
    ffi.emit_c_code(out)


if __name__ == "__main__":
    main(sys.argv[1])

"""What cffi's parser takes of a C header, so that an interface is written down once."""

from __future__ import annotations

import re


def declarations(header: str) -> str:
    """The integer constants, types and prototypes in the text of a header."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r'extern "C" \{', "", text)
    text = re.sub(r"#ifdef __cplusplus\s*\}?\s*#endif", "", text)
    lines = [ln for ln in text.splitlines() if not ln.startswith("#") or re.match(r"#define \w+ \d+\s*$", ln)]
    return "\n".join(lines)

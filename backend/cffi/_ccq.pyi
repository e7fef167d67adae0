from typing import Any

# cffi's own stubs know neither numpy's buffers nor the fields of a C struct.
ffi: Any
lib: Any

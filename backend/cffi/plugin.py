"""Loads the llama.cpp plugin into the llama.cpp of a Python binding."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from ccq_format.errors import PluginError

_LIBRARY = "libggml-ccq.so"
_lock = threading.Lock()
_active: set[int] = set()
"""Handles of the libraries whose llama.cpp has the plugin."""

_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda _level, _text, _data: None)
"""A log callback of ggml's that is never freed: after an interrupt ggml may still have it."""


def plugin_path() -> Path:
    """The plugin's shared library.  Raises ``PluginError`` if this installation has none."""
    path = Path(__file__).with_name(_LIBRARY)
    if not path.is_file():
        raise PluginError("the plugin is not installed (it is built on Linux only)", file=path)
    return path


def load_plugin(library: ctypes.CDLL | None = None) -> None:
    """Make a llama.cpp in this process run CCQ types; call it before the first model is loaded.  Later calls do
    nothing.

    ``library`` is the binding's libllama or libggml, opened by the path that the binding itself uses; by default that
    of llama-cpp-python.  The plugin prints one line to standard error when it becomes active (``CCQ_QUIET=1`` silences
    it).  Raises ``PluginError`` with the plugin's own reason if this llama.cpp cannot take it; nothing is changed then.
    """
    with _lock:
        if library is None:
            library = _llama_cpp_python()
        if library._handle not in _active:
            _load(library, plugin_path())
            _active.add(library._handle)


def _llama_cpp_python() -> ctypes.CDLL:
    try:
        import llama_cpp.llama_cpp as llama
    except ImportError as error:
        raise PluginError(f"llama-cpp-python cannot be imported: {error}") from error
    library: ctypes.CDLL = llama._lib
    return library


def _load(library: ctypes.CDLL, path: Path) -> None:
    # The handle of libllama resolves names in the libraries that libllama itself uses.  Opening libggml by a path
    # could map a second copy, and the plugin would then be loaded into one that no model ever sees.
    try:
        backend_load = library.ggml_backend_load
    except AttributeError:
        raise PluginError("this llama.cpp has no ggml_backend_load") from None
    backend_load.argtypes = [ctypes.c_char_p]
    backend_load.restype = ctypes.c_void_p
    with _ggml_log_silenced(library):
        loaded = backend_load(os.fsencode(path))
    if not loaded:
        raise PluginError(_reason(path), file=path)


@contextlib.contextmanager
def _ggml_log_silenced(library: ctypes.CDLL) -> Iterator[None]:
    """Keep ggml's own lines about loading out of the way: the plugin's one line, or the exception, says it."""
    try:
        get, put = library.ggml_log_get, library.ggml_log_set
    except AttributeError:
        yield
        return
    callback, user_data = ctypes.c_void_p(), ctypes.c_void_p()
    get(ctypes.byref(callback), ctypes.byref(user_data))
    try:
        put(_SILENT, None)
        yield
    finally:
        put(callback, user_data)


def _reason(path: Path) -> str:
    """What the plugin said, or the loader if it could not even be opened."""
    try:
        plugin = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        return f"the plugin cannot be loaded: {error}"
    plugin.ccq_plugin_error.restype = ctypes.c_char_p
    return plugin.ccq_plugin_error().decode() or "ggml rejected the plugin"

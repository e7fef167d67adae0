"""What a model, and its base beside it, write on their own: where a collapse is seen first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from .llama import LlamaModel, load_plugin_for

_PROMPT_TOKENS = 32
_PROMPT_CHARACTERS = 1000
"""Of a text that is no prompt, what makes one: so many tokens of so many characters."""


@dataclass(frozen=True)
class Continuations:
    """A prompt and what follows it, greedily; ``base`` is ``None`` without a base model."""

    prompt: str
    file: str
    base: str | None = None

    def as_dict(self) -> dict[str, str]:
        """The texts by name, without what is not there."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def table(self, file: Path, base: Path | None) -> Table:
        """The texts side by side, the base's first, under the names of the files."""
        table = Table(title=Text(self.prompt, "italic"), title_justify="left", show_lines=False)
        if base is not None and self.base is not None:
            table.add_column(Text(f"base: {base.name}"), ratio=1, overflow="fold")
        table.add_column(Text(file.name), ratio=1, overflow="fold")
        # As `Text`, in which brackets and control characters mean nothing.
        table.add_row(*(Text(text) for text in (self.base, self.file) if text is not None))
        return table


def continuations(
    model_path: str | os.PathLike[str],
    n_tokens: int,
    *,
    prompt: str | None = None,
    text: str = "",
    base_path: str | os.PathLike[str] | None = None,
    threads: int = 0,
) -> Continuations:
    """Let a GGUF file, and ``base_path``, continue ``prompt`` or the beginning of ``text`` by ``n_tokens`` tokens, or
    fewer if they end it: always the most probable one.  ``threads`` <= 0 means one per CPU.

    Raises ``EvalError`` if llama.cpp refuses a model or the logits are NaN, ``PluginError`` as ``evaluate.evaluate``.
    """
    paths = [model_path] if base_path is None else [model_path, base_path]
    load_plugin_for(*paths)
    return Continuations(*_continued(paths, n_tokens, prompt, text, threads))


def _continued(
    paths: list[str | os.PathLike[str]], n_tokens: int, prompt: str | None, text: str, threads: int
) -> Iterator[str]:
    """The prompt, then what each model makes of it."""
    given = text[:_PROMPT_CHARACTERS] if prompt is None else prompt
    room = n_tokens + (_PROMPT_TOKENS if prompt is None else len(given.encode()) + 8)
    for path in paths:
        with LlamaModel(path, n_ctx=room, threads=threads) as model:
            tokens = model.tokenize(given)
            if prompt is None:
                tokens = tokens[:_PROMPT_TOKENS]
            if path is paths[0]:
                yield model.detokenize(tokens) if prompt is None else prompt
            yield model.generate(tokens, n_tokens)[0]

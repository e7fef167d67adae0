"""What comes with a model is data: no code of it runs.  And nothing outside of the command line but what the README
names changes what is done."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ccq_converters.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "manllama-4m"


class Exploding:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was opened",)


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    """Modules that the config names for transformers' trust_remote_code, and pickles under all their usual names."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(EXAMPLE, model)
    code = f"open({str(ran)!r}, 'w')\nraise SystemExit('code of the model was run')\n"
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    }
    (model / "config.json").write_text(json.dumps(config))
    for name in ("evil.py", "tokenization_evil.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (model / name).write_text(code)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "consolidated.00.pth"):
        torch.save(Exploding(), model / name)
    (tmp_path / "text").write_text("some words to run the model on, a few dozen of them, " * 8)
    for arguments in (
        ["hf2gguf", model, "-o", tmp_path / "o.gguf", "--type", "q8_0"],
        ["calibrate", model, "--text", tmp_path / "text", "-o", tmp_path / "i.gguf", "--ctx", "32", "--chunks", "1"],
    ):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], input="y\n")
        assert result.exit_code == 0, result.output
    assert not ran.exists()


SOURCES = [
    path
    for folder in ("backend", "ccq_format", "converters")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".c", ".cpp", ".h", ".inl", ".cu"}
]


def test_the_readme_names_the_environment_variables() -> None:
    read = r"""(?:getenv\(|os\.environ\b(?:\.get\(|\[)?|os\.getenv\()\s*["']?(\w*)"""
    found = {match[1] for path in SOURCES for match in re.finditer(read, path.read_text())}
    table = re.search(r"\| environment variable \|.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert table is not None
    assert found == set(re.findall(r"^\| `(\w+)` \|", table[0], re.MULTILINE))

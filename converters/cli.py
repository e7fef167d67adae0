"""The ``ccq-convert`` command."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import click

import ccq_format
from ccq_format.errors import CcqError, readable
from ccq_format.layouts import LAYOUTS

from . import hessian as hessians
from . import imatrix as importance
from .encode import require_device
from .mixtures import MIXTURES
from .options import QuantOptions
from .plan import Plan
from .target_types import KEEP

_F = TypeVar("_F", bound=Callable[..., Any])

MAX_NOTE = 2000
"""Characters of a line on stderr: some of what it says comes from files."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class _Group(click.Group):
    """Turns every error that CCQ raises on purpose into one line and exit code 1, and Ctrl-C into one line and 130."""

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _show_warning
            handler = _LogHandler()
            logger = logging.getLogger(__package__)
            level = logger.level
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG if ctx.params.get("verbose") else logging.INFO)
            try:
                return super().invoke(ctx)
            except CcqError as error:
                click.echo(f"Error: {_one_line(error)}", err=True)
                ctx.exit(1)
            except BrokenPipeError:
                raise
            except OSError as error:
                # What the system refused on the way (disk, permissions, a vanished file) needs no traceback either.
                click.echo(f"Error: {_one_line(error)}", err=True)
                ctx.exit(1)
            except KeyboardInterrupt as interrupt:
                kept = str(interrupt)  # of a conversion that can be resumed
                click.echo(f"Interrupted; {kept or 'no file was written'}.", err=True)
                ctx.exit(INTERRUPTED)
            finally:
                logger.removeHandler(handler)
                logger.setLevel(level)


class _LogHandler(logging.Handler):
    """What the converters note and warn of, a line each on stderr; with -v also what they tell of each tensor."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        kind = {logging.DEBUG: "", logging.INFO: "Note: "}.get(record.levelno, "Warning: ")
        click.echo(f"{kind}{readable(record.getMessage(), MAX_NOTE)}", err=True)


def _show_warning(message: Warning | str, *_details: Any, **_more: Any) -> None:
    click.echo(f"Warning: {_one_line(message)}", err=True)


def _one_line(message: object) -> str:
    return readable(" ".join(str(message).split()), MAX_NOTE)


def _overrides(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """Split ``REGEX=TYPE`` at the last ``=``, because no type has one in its name."""
    pairs = []
    for value in values:
        pattern, _, target = value.rpartition("=")
        if not pattern or not target:
            raise click.BadParameter(f"'{value}' is not of the form REGEX=TYPE")
        pairs.append((pattern, target))
    return pairs


_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)


_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%")


def _size_or_ratio(ctx: click.Context, param: click.Parameter, value: str | None) -> int | float | None:
    """Bytes as an int, or ``25%`` as the float 0.25."""
    match = _PERCENT.fullmatch(value.strip()) if value is not None else None
    return float(match[1]) / 100 if match else _size(ctx, param, value)


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Bytes of ``3.5GB`` (10^9), ``3.5G`` (the same), ``3GiB`` (2^30) or a plain number."""
    if value is None:
        return None
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise click.BadParameter(f"'{value}' is no size such as 3.5GB, 3GiB or 700M")
    number, unit, binary = match.groups()
    factor = (1024 if binary else 1000) ** ("kmgt".index(unit.lower()) + 1) if unit else 1
    return int(Decimal(number) * factor)


_split_option = click.option(
    "--split-max-size",
    metavar="SIZE",
    callback=_size,
    help="Write several files of at most SIZE bytes (such as 50G), as llama-gguf-split names them: "
    "OUTPUT-00001-of-0000N.gguf. llama.cpp loads them by the first.",
)


def _quant_options(command: _F) -> _F:
    """The options that hf2gguf and quantize share."""
    options = [
        click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write."),
        click.option(
            "--type",
            "type_name",
            metavar="TYPE",
            help=f"Type of the matrices: {', '.join(layout.name for layout in LAYOUTS)} (the "
            "prefix may be left out), f32, f16, bf16, q8_0, q5_0, iq4_nl, q4_0 or mxfp4; embedding and output become "
            f"q8_0, or f32, f16 or bf16 like the others. Or a mixture: {', '.join(MIXTURES)} give "
            "the matrices that matter most a larger type, and embedding and output smaller ones. Or keep: all "
            "matrices stay as they are.",
        ),
        click.option(
            "--target-size",
            metavar="SIZE",
            callback=_size_or_ratio,
            help="Instead of --type: types for all matrices, embedding and output that lose as little as possible in a "
            "file of at most SIZE bytes (such as 3.5GB, 3GiB, 700M), or of a part (such as 20%) of what all weights "
            "take in 16 bits. What a type loses is measured on a part of each matrix, how much that matters in the "
            "model.",
        ),
        click.option(
            "--target-bpw",
            type=float,
            metavar="X",
            help="Instead of --type: the same for X bits per weight on average, embedding and output (q8_0) not "
            "counted.",
        ),
        click.option(
            "--tensor-type",
            "overrides",
            metavar="REGEX=TYPE",
            callback=_overrides,
            multiple=True,
            help="Another type for the tensors whose GGUF name the pattern is found in; the first that matches wins.",
        ),
        click.option(
            "--imatrix",
            type=click.Path(path_type=Path),
            help="Importance file that weights the errors of the CCQ types, q4_0, q5_0 and iq4_nl: from 'ccq-convert "
            "calibrate' or llama.cpp's llama-imatrix (GGUF or the older binary form).  [measured on a text if a type "
            "has under 4 bits]",
        ),
        click.option(
            "--hessian",
            metavar="FILE|auto|none",
            help="Hessian file of 'ccq-convert calibrate --hessian': its matrices are encoded with error feedback, "
            "which takes two to three times as long and loses much less. 'auto' makes one beside the output, and "
            "removes it.  [auto where importance is measured and memory has room for all products; else none]",
        ),
        click.option(
            "--no-calibration",
            is_flag=True,
            help="Measure nothing that is not given: at 2 bits most models then talk nonsense.",
        ),
        click.option(
            "--effort",
            type=click.Choice(["fast", "default", "best"], case_sensitive=False),
            default="default",
            show_default=True,
            help="How far the encoder of the T types searches: fast takes less than half the time for 3 % more error.",
        ),
        click.option(
            "--device",
            type=click.Choice(["cpu", "cuda"], case_sensitive=False),
            default="cpu",
            show_default=True,
            help="What encodes the T types; cuda: an NVIDIA GPU, after `make cuda`, to the same bytes.",
        ),
        click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0 = one per CPU.  [0]"),
        _split_option,
        click.option("--dry-run", is_flag=True, help="Only print the plan, its size and the time to expect."),
        click.option("--no-fallback", is_flag=True, help="Fail where a row does not fit a type's block."),
        click.option("--force", is_flag=True, help="Encode to ccq_t1 without importance data, too."),
        click.option("--overwrite", is_flag=True, help="Replace an existing file."),
        click.option(
            "--resume",
            is_flag=True,
            help="Keep what is encoded if the conversion is interrupted, and go on there when the command is repeated.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _options(
    output: Path | None,
    type_name: str | None,
    target_bpw: float | None,
    target_size: int | float | None,
    overrides: list[tuple[str, str]],
    imatrix: Path | None,
    hessian: str | None,
    threads: int,
    effort: str,
    device: str,
    split_max_size: int | None,
    k_order: str | None = None,
    **flags: bool,
) -> tuple[Path, QuantOptions]:
    if output is None and not flags["dry_run"]:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if sum(wish is not None for wish in (type_name, target_bpw, target_size)) != 1:
        raise click.UsageError("Give exactly one of --type, --target-bpw and --target-size.")
    require_device(device)
    feedback = {"auto": True, "none": False}.get(hessian) if hessian is not None else None
    if feedback and flags["no_calibration"]:
        raise click.UsageError("--hessian auto is a calibration, which --no-calibration excludes.")
    options = QuantOptions(
        type_name,
        target_bpw=target_bpw,
        target_size=target_size if isinstance(target_size, int) else None,
        target_ratio=target_size if isinstance(target_size, float) else None,
        imatrix=importance.load(imatrix) if imatrix is not None else None,
        hessian=hessians.Hessians(hessian) if hessian is not None and feedback is None else None,
        overrides=overrides,
        threads=threads,
        effort=effort,
        device=device,
        split_max_size=split_max_size,
        fallback=not flags["no_fallback"],
        force=flags["force"],
        overwrite=flags["overwrite"],
        dry_run=flags["dry_run"],
        resume=flags["resume"],
        calibrate=not flags["no_calibration"],
        feedback=feedback,
        k_order=k_order,
    )
    return output or Path(), options


def _report(plan: Plan, out: Path, options: QuantOptions) -> None:
    if options.dry_run:
        from .cost import expectation

        click.echo(plan.table())
        click.echo(expectation(plan, options))
    else:
        click.echo(f"{out}: {plan.summary()}")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(ccq_format.__version__, prog_name="ccq-convert")
@click.option("-v", "--verbose", is_flag=True, help="Also say what is done, such as the error of every tensor.")
def main(verbose: bool) -> None:
    """Convert models to CCQ, look into CCQ files, and measure them in stock llama.cpp."""


@main.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@_quant_options
@click.option(
    "--k-order",
    type=click.Choice(["natural", "shuffled"]),
    help="Order of the inputs of ERNIE's wint2 matrices, natural before July 2025, shuffled since.  [found out]",
)
def hf2gguf(model_dir: Path, k_order: str | None, **settings: Any) -> None:
    """Convert a Hugging Face model folder (safetensors) to a GGUF file.

    Without --type, --target-bpw and --target-size all matrices stay as they are (--type keep).
    """
    from . import hf2gguf as converter

    if all(settings[wish] is None for wish in ("type_name", "target_bpw", "target_size")):
        settings["type_name"] = KEEP
    out, options = _options(**settings, k_order=k_order)
    _report(converter.convert(model_dir, out, options), out, options)


@main.command()
@click.argument("in_file", metavar="IN.gguf", type=click.Path(path_type=Path))
@_quant_options
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Also take tensors that are quantized to a small type already, as Q4_K: what they have lost stays lost.",
)
def quantize(in_file: Path, allow_requantize: bool, **settings: Any) -> None:
    """Give the tensors of a GGUF file (f32, f16, bf16, q8_0, mxfp4, nvfp4; any architecture) other types.

    What is quantized already and no larger than the type that it would get keeps its bytes.
    """
    from . import quantize as quantizer

    out, options = _options(**settings)
    plan = quantizer.quantize(in_file, out, options, allow_requantize=allow_requantize)
    _report(plan, out, options)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="UTF-8 text to run the model on.  [one that comes with this package: prose, code, dialogue, 28 languages]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Importance file to write (GGUF).")
@click.option("--ctx", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--chunks", type=click.IntRange(min=1), help="Use only the first windows.  [all]")
@click.option(
    "--hessian",
    type=click.Path(path_type=Path),
    help="Also write the inputs' products X^T X for error feedback (safetensors): per matrix input, and per expert, "
    "4 * row length^2 bytes.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    callback=_size,
    help="In llama.cpp only: memory for the products of --hessian (such as 8G). The text is run as often as it takes "
    "to compute all of them in parts of that size.  [half of what is free]",
)
@click.option("--process-output", is_flag=True, help="Include the output matrix.")
@click.option(
    "--gradients",
    is_flag=True,
    help="By torch only: also measure how much the outputs of each matrix matter to the model's predictions: takes "
    "three to four times as long, and 4 bytes of memory or disk per token, hidden channel and layer.",
)
@click.option(
    "--losses",
    is_flag=True,
    help="In llama.cpp only: also measure with noise how much each matrix, the embedding and the output matter to "
    "the model's predictions, for --target-size and --target-bpw. Implies --process-output.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0 = one per CPU.  [0]")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
def calibrate(model: Path, text: Path | None, output: Path, hessian: Path | None, **settings: Any) -> None:
    """Measure how much each input channel of a model's matrices matters on a text.

    MODEL is a GGUF file of any architecture and type, CCQ types included, which llama.cpp runs; or a Hugging Face model
    folder. Those of llama, mistral, mixtral, qwen2, qwen3 and qwen3_moe are run by torch and transformers one layer at
    a time, those of other families in llama.cpp, as a GGUF file that is removed again. The result is an importance file
    for --imatrix, which llama.cpp's llama-quantize reads as well.
    """
    from .calibrate import calibrate as calibrate_folder
    from .calibration import BUNDLED_TEXT, CalibrationOptions
    from .collect import calibrate_file

    run = calibrate_folder if model.is_dir() else calibrate_file
    result = run(model, text or BUNDLED_TEXT, output, CalibrationOptions(**settings), hessian=hessian)
    report = result.expert_report({name: entry.counts.size for name, entry in result.entries.items()})
    if report:
        click.echo(f"Warning: {report}", err=True)
    click.echo(f"{output}: {len(result.entries)} matrices, {result.chunk_count} windows of {result.chunk_size} tokens")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """Check a GGUF file, the parameters of its CCQ blocks included, and list its tensors."""
    from . import inspect as inspector

    model = inspector.inspect(file)
    click.echo(json.dumps(inspector.as_json(model), indent=1) if as_json else inspector.as_text(model))


@main.command()
@click.argument("in_file", metavar="IN.gguf", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option(
    "--type", "type_name", type=click.Choice(["f32", "f16"], case_sensitive=False), required=True, help="Target type."
)
@_split_option
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def dequantize(in_file: Path, output: Path, type_name: str, split_max_size: int | None, overwrite: bool) -> None:
    """Write the exact decoded weights as a plain GGUF file that any llama.cpp reads."""
    from . import dequantize as dequantizer

    plan = dequantizer.dequantize(in_file, output, type_name, overwrite=overwrite, split_max_size=split_max_size)
    click.echo(f"{output}: {plan.summary()}")


@main.command("plugin-path")
def plugin_path() -> None:
    """Print the path of libggml-ccq.so, the plugin for llama.cpp."""
    import ccq_backend

    click.echo(str(ccq_backend.plugin_path()))


@main.command()
@click.argument("tree", type=click.Path(path_type=Path))
@click.option(
    "--check",
    is_flag=True,
    help="Only say whether the tree is integrated; exit code 1 if it is not, or not with this version.",
)
@click.option("--revert", is_flag=True, help="Take CCQ out of the tree again; restores every byte.")
@click.option(
    "--cuda", is_flag=True, help="Also the kernels for NVIDIA GPUs; a tree that has them keeps them without it."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be changed.")
@click.pass_context
def integrate(ctx: click.Context, tree: Path, check: bool, revert: bool, cuda: bool, dry_run: bool) -> None:
    """Put the CCQ types into a source tree of llama.cpp or ik_llama.cpp, to be compiled in.

    Our own files go into one folder of the tree, and a few lines into its files. Repeating it changes nothing, or
    updates what an earlier version did. A tree that is not known, or half edited, is refused and left as it is.
    """
    from .integrate import Integration

    if check and revert:
        raise click.UsageError("--check and --revert exclude each other.")
    integration = Integration(tree, cuda=cuda)
    if check:
        state = integration.state()
        click.echo(state.as_text())
        ctx.exit(0 if state.current else 1)
    changed = integration.revert(dry_run) if revert else integration.integrate(dry_run)
    for line in changed or ["nothing to do"]:
        click.echo(line)


@main.command("eval")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), required=True, help="UTF-8 text to score.")
@click.option("--base", type=click.Path(path_type=Path), help="Model to compare with (KL divergence, top-1).")
@click.option("--ctx", type=click.IntRange(min=4), default=256, show_default=True, help="Tokens per window.")
@click.option("--windows", type=click.IntRange(min=1), help="Score only the first windows.  [all]")
@click.option(
    "--generate",
    type=click.IntRange(min=1),
    metavar="N",
    help="First print how the file, and the base beside it, go on from a prompt, by N tokens, the most probable ones.",
)
@click.option("--prompt", help="What --generate starts from.  [the beginning of the text]")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0 = one per CPU.  [0]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    file: Path,
    text: Path,
    base: Path | None,
    ctx: int,
    windows: int | None,
    generate: int | None,
    prompt: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Perplexity, and KL divergence from a base model, measured in stock llama.cpp as llama-perplexity does.

    Says so if the file has collapsed, that is, writes gibberish: if its predictions are no better than frequencies of
    tokens or, with --base, if half of what the context tells the base is lost.
    """
    from rich.console import Console

    from . import evaluate as evaluator
    from .continuation import continuations

    if prompt is not None and generate is None:
        raise click.UsageError("--prompt is for --generate.")
    content = evaluator.read_text(text)
    report: dict[str, Any] = {}
    if generate is not None:
        made = continuations(file, generate, prompt=prompt, text=content, base_path=base, threads=threads)
        report["generated"] = made.as_dict()
        if not as_json:
            Console().print(made.table(file, base))
    result = evaluator.evaluate(file, content, base_path=base, n_ctx=ctx, threads=threads, max_windows=windows)
    click.echo(json.dumps(result.as_dict() | report, indent=1) if as_json else result.as_text())


if __name__ == "__main__":
    sys.exit(main())

"""Calibrate any model that llama.cpp runs, from its GGUF file: no Hugging Face folder, no torch.

llama.cpp evaluates the text in windows as ``calibrate`` says, and asks at every node of its graph whether we want to
look (``cb_eval``).  We stop at the products with a weight, MUL_MAT and MUL_MAT_ID, and sum up their inputs.  Those of
matrices that read the same tensor (q, k and v; gate and up) are summed up once; the inputs of an expert are those that
the router's ids send to it.  Nothing behind the last matrix of interest is computed: no logits, in general.

The sums are those of llama.cpp's ``llama-imatrix`` (``tools/imatrix/imatrix.cpp`` of the pinned llama.cpp), which also
names and shapes them, with these differences: matrices outside of the blocks count as well, the output matrix under
the name that it has in the file; inputs of fewer than 16 tokens are not left out; sums are float64 over at most 512
tokens at a time, not float32 over all.

The products ``X^T X`` of all matrices may need more memory than there is: then the text is run several times, each time
for the next matrices of the graph that fit, and no further than these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ccq_format.errors import ImportanceError, ModelError
from ccq_format.gguf_io import ModelWriter, open_model
from ccq_format.output import Held, OutputFile

from . import imatrix
from .calibration import CalibrationOptions, check_outputs
from .console import progress_bar
from .evaluate import read_text
from .graph import Ggml, Node
from .hessian import HessianWriter
from .host import cpu_count, free_memory
from .llama import LlamaModel, library, load_plugin_for
from .rules import is_vocabulary, never_quantized
from .threads import ThreadPool

BATCH = 512
"""Tokens that llama.cpp evaluates at a time; its logits buffer has room for as many, whether they are computed or
not."""

_PANEL = 512
"""Columns of a product that one thread computes at a time."""

_FIRST_LOOK = 32
"""Tokens of the evaluation that only finds out which matrices there are."""

_SCHEDULER_COPY = re.compile(r"^[^#]*#([^#]*)#?.*$")
"""``CUDA0#blk.0.attn_k.weight#0``: a weight that llama.cpp's scheduler copied to a device."""

F32 = NDArray[np.float32]

Advance = Callable[[int, int], None]
"""Told after every batch how many tokens are done and how many there are, all passes counted.  What it raises ends the
calibration."""


@dataclass
class _Input:
    """A tensor of the graph that the matrices ``names`` read, and its sums.

    Each is a stack of ``matrices`` with rows of ``width``, ``indirect`` if ids choose among them (MUL_MAT_ID).
    ``squares``: float64 ``[matrices, width]``; ``counts``, of inputs: int64 ``[matrices]``; ``products``: float32
    ``[stop - start, width, width]`` of the matrices ``span`` = (start, stop).  ``summed``: squares and counts are
    complete.  ``address`` is that of the tensor in the graph that is evaluated.  ``repeated``: the graph has several
    such tensors, and one matrix that reads all of them (shared layers).
    """

    names: list[str]
    width: int
    matrices: int
    indirect: bool
    repeated: bool = False
    span: tuple[int, int] = (0, 0)
    address: int = 0
    summed: bool = False
    squares: NDArray[np.float64] = field(init=False)
    counts: NDArray[np.int64] = field(init=False)
    products: F32 = field(init=False)

    def __post_init__(self) -> None:
        self.squares = np.zeros((self.matrices, self.width))
        self.counts = np.zeros(self.matrices, np.int64)
        self.begin((0, 0))

    def begin(self, span: tuple[int, int]) -> None:
        """Make room for the products of the matrices from ``span[0]`` to ``span[1]``, and for no others."""
        self.span = span
        self.products = np.zeros((span[1] - span[0], self.width, self.width), np.float32)

    @property
    def stored(self) -> list[str]:
        """The names that get a Hessian: not those of routers and the like, which are never quantized."""
        return [name for name in self.names if not never_quantized(name)]

    def add(self, x: F32, matrix: NDArray[np.integer[Any]] | None, pool: ThreadPool) -> None:
        """Add inputs float32 ``[rows, width]``, given to the matrices ``matrix`` ``[rows, n]`` (``None``: there is but
        one).  Raises ``ImportanceError`` if one is not finite."""
        if matrix is None:
            shares = np.ones((1, len(x)), np.float32)
        else:
            shares = np.zeros((self.matrices, len(x)), np.float32)
            np.add.at(shares, (matrix, np.arange(len(x))[:, None]), 1)
        panels = [slice(start, start + _PANEL) for start in range(0, self.width, _PANEL)]

        def square(panel: slice) -> F32:
            with np.errstate(over="ignore", invalid="ignore"):
                return shares @ np.square(x[:, panel])

        def multiply(task: tuple[F32, F32, slice]) -> None:
            product, rows, panel = task
            product[panel, panel.start :] += rows[:, panel].T @ rows[:, panel.start :]

        squares = np.concatenate(list(pool.map(square, panels)), axis=1)
        if not np.isfinite(squares).all():
            raise ImportanceError("the model's activations are not finite", tensor=self.names[0])
        if not self.summed:
            self.squares += squares
            self.counts += shares.sum(axis=1, dtype=np.int64)
        tasks = []
        for index, product in enumerate(self.products, self.span[0]):
            rows = x if matrix is None else np.repeat(x, shares[index].astype(np.int64), axis=0)
            if len(rows):
                tasks += [(product, rows, panel) for panel in panels]
        list(pool.map(multiply, tasks))

    def product(self, index: int) -> F32:
        """The whole of one of ``products``, of which only the part right of the diagonal's panels was computed."""
        product: F32 = self.products[index]
        for start in range(0, self.width, _PANEL):
            stop = start + _PANEL
            product[stop:, start:stop] = product[start:stop, stop:].T
        return product


def weight_of(ggml: Ggml, node: Node) -> tuple[str, Node] | None:
    """Name and tensor of the weight that a product in the graph multiplies with."""
    if node.op not in (ggml.mul_mat, ggml.mul_mat_id):
        return None
    weight = Node.from_address(node.src[0])
    name = name_of(weight)
    return (name, weight) if name.endswith(".weight") else None


def name_of(weight: Node) -> str:
    """A weight's name in the file."""
    name = weight.name.decode("utf-8", "replace")
    match = _SCHEDULER_COPY.match(name)
    return match[1] if match else name


class _Watch:
    """What is seen at the nodes of the graph; the two passes differ in what they do with it."""

    def __init__(self, ggml: Ggml, process_output: bool) -> None:
        self.ggml = ggml
        self.process_output = process_output

    def weight(self, node: Node) -> tuple[str, Node] | None:
        """What :func:`weight_of` gives, if it is of interest."""
        found = weight_of(self.ggml, node)
        return None if found and is_vocabulary(found[0]) and not self.process_output else found


class _FirstLook(_Watch):
    """Finds the matrices and their inputs, in the order of the graph, without stopping anywhere."""

    def __init__(self, ggml: Ggml, process_output: bool) -> None:
        super().__init__(ggml, process_output)
        self.uses: dict[str, list[tuple[int, ...]]] = {}
        self.shapes: dict[str, tuple[int, int, bool]] = {}

    def __call__(self, address: int, _ask: bool) -> bool:
        node = Node.from_address(address)
        found = self.weight(node)
        if found:
            name, weight = found
            indirect = node.op == self.ggml.mul_mat_id
            self.shapes[name] = weight.ne[0], weight.ne[2] * weight.ne[3], indirect
            self.uses.setdefault(name, []).append((node.src[1], node.src[2] or 0, weight.ne[2] * weight.ne[3]))
        return False

    def inputs(self) -> list[_Input]:
        """A matrix that is used several times in the graph shares its inputs with no other."""
        out: dict[object, _Input] = {}
        for name, uses in self.uses.items():
            repeated = len(uses) > 1
            key: object = name if repeated else uses[0]
            out.setdefault(key, _Input([], *self.shapes[name], repeated)).names.append(name)
        return list(out.values())


class _Collect(_Watch):
    """Sums up the inputs ``wanted`` and ends the graph behind the last of them."""

    def __init__(self, ggml: Ggml, process_output: bool, wanted: list[_Input], pool: ThreadPool) -> None:
        super().__init__(ggml, process_output)
        self.pool = pool
        self.by_name = {name: entry for entry in wanted for name in entry.names}
        # Of a matrix that is used again it is not known where the last time is.
        self.last = None if any(entry.repeated for entry in wanted) else wanted[-1]

    def __call__(self, address: int, ask: bool) -> bool:
        node = Node.from_address(address)
        found = self.weight(node)
        if not found or found[0] not in self.by_name:
            return False
        name, weight = found
        entry = self.by_name[name]
        if ask:
            if name == entry.names[0]:
                entry.address = node.src[1]
                return True
            if entry.address != node.src[1]:
                raise ImportanceError(f"does not always have the inputs of '{entry.names[0]}'", tensor=name)
            return False
        entry.add(*self._rows(name, entry, node, weight), self.pool)
        return entry is not self.last

    def _rows(self, name: str, entry: _Input, node: Node, weight: Node) -> tuple[F32, NDArray[np.integer[Any]] | None]:
        """The inputs of a product, float32 ``[rows, width]``, and for each row the matrices that it is given to."""
        x = self.ggml.values(node.src[1])
        if x is None or x.dtype == np.int32 or x.shape[3] != entry.width:
            kind = self.ggml.type_name(Node.from_address(node.src[1]).type)
            raise ImportanceError(f"has inputs {kind}, which calibration cannot read", tensor=name)
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, entry.width)
        if entry.indirect:
            # x [1, tokens, 1 or chosen, width], ids [1, 1, tokens, chosen]; ggml's rule is row = slot modulo rows
            ids = self.ggml.values(node.src[2])
            n_tokens, n_rows = x.shape[1:3]
            if ids is None or x.shape[0] != 1 or ids.shape[2] != n_tokens or ids.shape[3] % n_rows:
                raise ImportanceError("has experts in an unknown form", tensor=name)
            chosen = ids[0, 0].reshape(n_tokens, -1, n_rows).swapaxes(1, 2).reshape(n_tokens * n_rows, -1)
            if chosen.min() < 0 or chosen.max() >= entry.matrices:
                raise ImportanceError(f"is given experts that are not among its {entry.matrices}", tensor=name)
            return rows, chosen
        if entry.matrices == 1:
            return rows, None
        # A stack of matrices, each with inputs of its own (attention with latent keys): broadcast as ggml does.
        outer, inner = np.arange(x.shape[0])[:, None] % weight.ne[3], np.arange(x.shape[1])[None] % weight.ne[2]
        return rows, np.repeat((outer * weight.ne[2] + inner).reshape(-1), x.shape[2])[:, None]


def calibrate_gguf(
    model_path: Path,
    text: str | Sequence[int],
    options: CalibrationOptions | None = None,
    *,
    file: str = "",
    datasets: Sequence[str] = (),
    hessian: Path | OutputFile | None = None,
    advance: Advance | None = None,
) -> imatrix.Importance:
    """The importance of the input channels of all matrices of a GGUF model, measured on a text or on tokens.

    Nothing is written but, if given, the Hessian file ``hessian``, as ``HessianWriter`` does.
    ``file`` and ``datasets`` are what the result is to say of itself.  Text is tokenized as for llama.cpp's tools, with
    the special tokens at its ends that the vocabulary asks for; tokens are taken as they are.  Either way the first of
    each window becomes BOS where the vocabulary adds one.  An interrupt ends the calibration at the next matrix.

    Raises ``ModelError`` for options that do not fit the model, ``EvalError`` if llama.cpp refuses it, ``PluginError``
    if it has CCQ types and llama.cpp cannot take the plugin, ``ImportanceError`` if the text is too short, activations
    are not finite or the memory is too small for one product, and ``OutputError``.
    """
    options = options or CalibrationOptions()
    if options.gradients:
        raise ModelError("gradients need torch and the model's Hugging Face folder", file=model_path)
    load_plugin_for(model_path)
    with ExitStack() as stack:
        run = stack.enter_context(_Calibration(model_path, text, options))
        inputs = run.first_look()
        passes: list[_Pass] = [[(entry, (0, 0)) for entry in inputs]]
        writer = None
        if hessian is not None:
            passes = list(_passes(inputs, options.memory or free_memory() // 2))
            writer = stack.enter_context(HessianWriter(hessian, *_product_shapes(inputs), overwrite=options.overwrite))
            writer.begin()
        run.collect(passes, writer, advance)
        entries = {name: _entry(name, entry, model_path) for entry in inputs for name in entry.names}
        return imatrix.Importance(file, entries, list(datasets), len(run.windows), options.ctx)


def calibrate_file(
    model_path: Path,
    text_path: Path,
    out: Path,
    options: CalibrationOptions | None = None,
    *,
    hessian: Path | None = None,
    progress: bool = True,
) -> imatrix.Importance:
    """What ``calibrate.calibrate`` does, of a GGUF file: arguments, files and errors are the same."""
    options = options or CalibrationOptions()
    if options.losses:
        options = replace(options, process_output=True)  # it may get few bits then
    check_outputs(out, hessian, [*open_model(model_path).files, text_path])
    text = read_text(text_path)
    with ExitStack() as stack:
        writer = stack.enter_context(ModelWriter(out, "", overwrite=options.overwrite))
        products = None if hessian is None else stack.enter_context(Held(hessian, overwrite=options.overwrite))
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task("calibrating", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = calibrate_gguf(
            model_path,
            text,
            options,
            file=str(out),
            datasets=[str(text_path)],
            hessian=products,
            advance=advance,
        )
        if options.losses:
            from .losses import measure_losses  # which needs this module

            bar.update(task, description="measuring losses", completed=0, total=None)
            result = measure_losses(model_path, text, result, threads=options.threads, advance=advance)
        imatrix.fill(writer, result)
        if products is not None:
            products.release()
    return result


_Pass = list[tuple[_Input, tuple[int, int]]]
"""Inputs in the order of the graph, and of which of its matrices (from, to) a pass computes the products."""


_Run = TypeVar("_Run", bound="GraphRun")


class GraphRun:
    """A model in llama.cpp, the windows of a text, and the threads that evaluate them and that look at the graph.

    The sums are divided between threads of our own, NumPy's BLAS using one in each: its own threads go on spinning
    after a product, which on a machine without spare cores slowed llama.cpp down to a third.
    """

    def __init__(self, path: Path, text: str | Sequence[int], options: CalibrationOptions):
        self.options = options
        self.path = path
        with ExitStack() as stack:
            self.model = stack.enter_context(
                LlamaModel(
                    path,
                    n_ctx=options.ctx,
                    n_seq=max(1, BATCH // options.ctx),
                    threads=options.threads,
                    exact=options.exact,
                    n_batch=BATCH,
                    watch=_leave,
                    interruptible=True,
                )
            )
            stack.enter_context(threadpool_limits(1, user_api="blas"))
            self.pool = stack.enter_context(ThreadPool(options.threads if options.threads > 0 else cpu_count()))
            if options.ctx > self.model.n_ctx_train:
                raise ModelError(f"its context is {self.model.n_ctx_train} tokens, not {options.ctx}", file=path)
            self.ggml = Ggml(library().llama_cpp._lib)
            self.windows = self._windows(text)
            self._open = stack.pop_all()

    def __enter__(self: _Run) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, once nothing runs in it any more."""
        self._open.close()

    def _windows(self, text: str | Sequence[int]) -> NDArray[np.int64]:
        """Token ids int64 ``[windows, ctx]``.  Raises ``ImportanceError``."""
        model, ctx = self.model, self.options.ctx
        ids = np.array(model.tokenize(text) if isinstance(text, str) else text, np.int64)
        count = len(ids) // ctx
        if count == 0:
            raise ImportanceError(f"the text has {len(ids)} tokens, one window needs {ctx}", file=model.path)
        if ids.min() < 0 or ids.max() >= model.n_vocab:
            raise ImportanceError(f"the tokens are not below {model.n_vocab}, the vocabulary's size", file=model.path)
        count = min(count, self.options.chunks or count)
        windows = ids[: count * ctx].reshape(count, ctx)
        if model.adds_bos:
            windows[:, 0] = model.bos
        return windows

    def decode(self, tokens: NDArray[np.int64], low: int = 0, first: int = 0) -> NDArray[np.float32]:
        """Evaluate the same positions, ``low`` being the first, of some windows, ``[windows, positions]``: the logits
        of those from the ``first`` on, of one window after the other, valid until the next call.

        If that is not 0, llama.cpp leaves the others out of its last layer as soon as it can.
        """
        count, length = tokens.shape
        sequences = np.repeat(np.arange(count), length).tolist()
        positions = list(range(low, low + length)) * count
        outputs = [position >= first for position in positions]
        return self.model.decode(tokens.reshape(-1).tolist(), positions, sequences, outputs)


class _Calibration(GraphRun):
    """The passes of a calibration."""

    def first_look(self) -> list[_Input]:
        """The inputs of all matrices, in the order of the graph."""
        look = _FirstLook(self.ggml, self.options.process_output)
        self.model.watch = look
        self.decode(self.windows[:1, :_FIRST_LOOK], 0)
        inputs = look.inputs()
        if not inputs:
            raise ImportanceError("llama.cpp's graph has no product with a weight", file=self.model.path)
        return inputs

    def collect(self, passes: list[_Pass], writer: HessianWriter | None, advance: Advance | None) -> None:
        """Run the text once for each pass; what that computes goes into its inputs, the products to ``writer``."""
        total, done = len(passes) * self.windows.size, 0
        for part in passes:
            for entry, span in part:
                entry.begin(span)
            wanted = [entry for entry, _ in part]
            self.model.watch = _Collect(self.ggml, self.options.process_output, wanted, self.pool)
            for start in range(0, len(self.windows), self.model.n_seq):
                windows = self.windows[start : start + self.model.n_seq]
                self.model.clear()
                for low in range(0, self.options.ctx, BATCH):
                    batch = windows[:, low : low + BATCH]
                    self.decode(batch, low)
                    done += batch.size
                    if advance is not None:
                        advance(done, total)
            for entry, span in part:
                entry.summed = True
                if writer is not None:
                    for matrix in range(*span):
                        product = entry.product(matrix - span[0])
                        writer.write(entry.stored[0], product, int(entry.counts[matrix]), matrix)
                entry.begin((0, 0))


def _leave(_node: int, ask: bool) -> bool:
    """The ``watch`` that ends a graph at once."""
    return ask


def _entry(name: str, entry: _Input, path: Path) -> imatrix.Entry:
    if not entry.counts.any():
        raise ImportanceError("llama.cpp never evaluated it", file=path, tensor=name)
    if entry.squares.max() > np.finfo(np.float32).max:
        raise ImportanceError("the model's activations are too large", file=path, tensor=name)
    # A stack that is no mixture of experts gives each of its matrices all tokens: one count, as llama.cpp writes it.
    counts = entry.counts if entry.indirect else entry.counts[:1]
    return imatrix.Entry(entry.squares.astype(np.float32).reshape(-1), counts.astype(np.float64))


def _product_shapes(inputs: list[_Input]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of all Hessians, and which names share one, as ``HessianWriter`` wants them."""
    shapes: dict[str, tuple[int, ...]] = {}
    shared: dict[str, str] = {}
    for entry in inputs:
        if entry.stored:
            first, *others = entry.stored
            square = (entry.width, entry.width)
            shapes[first] = (entry.matrices, *square) if entry.matrices > 1 else square
            shared.update(dict.fromkeys(others, first))
    return shapes, shared


def _passes(inputs: list[_Input], memory: int) -> Iterator[_Pass]:
    """Consecutive parts of the graph whose products fit into ``memory`` bytes.  Raises ``ImportanceError``."""
    part: _Pass = []
    room = memory
    for entry in inputs:
        size = 4 * entry.width**2
        if not entry.stored:
            part.append((entry, (0, 0)))
            continue
        done = 0
        while done < entry.matrices:
            if size > room:
                if size > memory:
                    raise ImportanceError(
                        f"the product of its inputs takes {size} bytes, more than --memory allows ({memory})",
                        tensor=entry.names[0],
                    )
                yield part
                part, room = [], memory
            stop = min(entry.matrices, done + room // size)
            part.append((entry, (done, stop)))
            room -= (stop - done) * size
            done = stop
    if part:
        yield part

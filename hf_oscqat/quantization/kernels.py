"""Run an elementwise function over a tensor in one pass over memory.

Quantization is a dozen cheap operations on every value, and eager torch reads and writes memory once for each of them.
A function is therefore written once, in plain torch operations, and run here in the best way there is:

- compiled by torch's own compiler, to C++ on a CPU and to Triton on a GPU, once per function and kind of tensor;
- where there is no compiler, on a CPU, in chunks that stay in its cache from the first operation to the last;
- as it is: small tensors, float64, and wherever somebody else traces (torch.compile, torch.export, torch.func).

All of them compute the same values; sums differ in the order of their terms. The environment variable
`OSCQAT_FUSED_KERNELS=0` keeps torch's compiler out.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SMALL = 2**10
"""Values below which, on a CPU, a call of a compiled kernel costs as much as a dozen operations do."""
CHUNK = 2**17
"""Values of a chunk for each thread: temporaries fit into the cache, and starting an operation counts for little."""
MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
"""What is at work where `make_fx` traces with values."""
MAX_CALLS = 2**12
"""Kinds of calls that are remembered."""
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., tuple[Tensor, ...]]
"""`function(tensors, parameters, bounds, axis, *static)`: tensors of one shape (or None), parameters with one value or
one per channel along `axis` (or None), numbers. Returns first what is shaped like the tensors, then sums over
whatever one value of a parameter was used for. It may also write into the tensors. One that returns something shaped
like the tensors also takes `out`, for the first of its results; see `_in_chunks`."""


def one_pass(
    function: Function,
    tensors: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    bounds: tuple[float, ...],
    *,
    axis: int = 0,
    static: tuple[Any, ...] = (),
    shaped: int = 1,
    in_place: bool = False,
    memory: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run a `Function`. There is no gradient: call it without gradients, as in the methods of an autograd function.

    Args:
        function: defined at the top level of a module.
        tensors: of one shape and device; the first decides how it is run.
        parameters: `(1,)`, or `(channels,)` along `axis`.
        bounds: numbers that the function takes; other numbers need no other kernel.
        axis: channel dimension.
        static: further arguments, hashable; other ones need another kernel.
        shaped: how many outputs are shaped like the tensors; the others are sums.
        in_place: whether the function writes into the tensors.
        memory: a tensor that nobody needs any more, for a compiled kernel to write an output to; see `_lent`.

    Returns:
        What the function returns.
    """
    first = tensors[0]
    assert first is not None
    if is_traced(first):  # asked first: a question about the size would tie a traced graph to it
        return function(tensors, parameters, bounds, axis, *static)
    is_small = first.is_cpu and first.numel() < SMALL
    kind = None
    if _enabled and not is_small and first.dtype in FUSED_DTYPES:
        kind = _kind_of_call((function, static, axis, shaped), tensors, parameters)
        call = _calls.get(kind)
        if call is not None:
            return call(tensors, parameters, bounds, memory)
    layout = None if is_small else _layout(first)
    # What is written to must not be a copy in another layout.
    copies = (
        in_place
        and layout is not None
        and not all(t is None or t.is_contiguous(memory_format=layout) for t in tensors)
    )
    if layout is None or copies:
        return function(tensors, parameters, bounds, axis, *static)
    per_channel = any(p is not None and p.numel() > 1 for p in parameters)
    if not _fit(first, tensors, parameters, axis if per_channel else None):
        return function(tensors, parameters, bounds, axis, *static)  # which says what is wrong
    views = [None if t is None else _view(t, layout, axis if per_channel else None) for t in tensors]
    outputs = None
    if is_compiled(first):
        outputs, launch = _compiled(function, static, views, parameters, bounds, per_channel)
        if launch is not None and all(t is None or t.is_contiguous(memory_format=layout) for t in tensors):
            seen = views[0]
            assert seen is not None
            if len(_calls) >= MAX_CALLS:
                _calls.clear()
            # Strides as the other ways give them, because torch chooses a convolution's layout by them.
            stride = _unview(seen, first.shape, layout).stride()
            seen_stride = None if all(map(_is_own, static)) else seen.stride()
            _calls[kind] = _Call(launch, seen.shape, seen_stride, first.shape, stride, first.device, shaped)
    if outputs is None and first.is_cpu and not per_channel and first.numel() > chunk_size():
        outputs = _in_chunks(function, static, views, parameters, bounds, shaped)
    if outputs is None:
        return function(tensors, parameters, bounds, axis, *static)
    return (*(_unview(output, first.shape, layout) for output in outputs[:shaped]), *outputs[shaped:])


def is_compiled(x: Tensor) -> bool:
    """Whether functions over large tensors like `x` are run by compiled kernels, as far as is known yet."""
    return _enabled and x.device.type not in _without_compiler and x.dtype in FUSED_DTYPES


def is_traced(x: Tensor) -> bool:
    """Whether `x` is a stand-in that somebody traces with, and not values in memory."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or in_transform()
        or torch.jit.is_tracing()
        or torch._C._get_dispatch_mode(MAKE_FX) is not None
    )


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


# --- One shape for all: values in a row, or in rows per channel ---


def _fit(
    first: Tensor, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor | None], axis: int | None
) -> bool:
    """Whether all have the sizes, the device and the values that kernels, which see addresses, take for granted."""
    sizes = (1,) if axis is None else (1, first.shape[axis])
    return all(
        t is None or (t.shape == first.shape and t.device == first.device and not _is_lazy(t)) for t in tensors
    ) and all(p is None or (p.numel() in sizes and p.device == first.device and not _is_lazy(p)) for p in parameters)


def _is_lazy(x: Tensor) -> bool:
    """Whether memory does not hold the values of `x`, which torch negates, or makes of nothing, when they are read."""
    return x.is_neg() or x._is_zerotensor()


def _layout(x: Tensor) -> torch.memory_format | None:
    if x.dtype not in FUSED_DTYPES or x.device.type not in ("cpu", "cuda") or x.numel() == 0:
        return None
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else None


def _view(x: Tensor, layout: torch.memory_format, axis: int | None) -> Tensor:
    """See a dense tensor as `[values]` in the order of memory; with an axis, as `[outer, channels, inner]`."""
    if not x.is_contiguous(memory_format=layout):
        x = x.contiguous(memory_format=layout)
    if layout is torch.channels_last:
        x = x.permute(0, 2, 3, 1)
        axis = None if axis is None else (0, 3, 1, 2)[axis]
    return x.view(-1) if axis is None else x.view(x.shape[:axis].numel(), x.shape[axis], -1)


def _unview(x: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    if layout is torch.contiguous_format:
        return x.view(shape)
    n, c, h, w = shape
    return x.view(n, h, w, c).permute(0, 3, 1, 2)


# --- Compiled ---

_kernels: dict[Any, "_Kernel"] = {}
_calls: dict[Any, "_Call"] = {}
_without_compiler: set[str] = set()
_enabled = os.environ.get("OSCQAT_FUSED_KERNELS", "1") != "0"


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Let torch's compiler in, or keep it out, for a while; the environment variable decides otherwise."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def _compiled(
    function: Function,
    static: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    bounds: tuple[float, ...],
    per_channel: bool,
) -> tuple[tuple[Tensor, ...] | None, "_Launch | None"]:
    """Run the compiled function; None if it cannot be compiled, which is said once. Also return how to launch it."""
    first = tensors[0]
    assert first is not None
    device = first.device
    rows = [None if p is None else _row(p) for p in parameters]
    arguments = [*tensors, *rows, _on_device(bounds, device)]
    kinds = (
        *[None if a is None else a.dtype for a in arguments],
        *[None if p is None else p.numel() > 1 for p in rows],
    )
    key = (function, static, kinds, per_channel, device, torch.is_inference_mode_enabled())
    kernel = _kernels.get(key)
    if kernel is None:
        kernel = _kernels[key] = _Kernel(function, static, len(tensors), int(per_channel))
    shape_class = _shape_class(first.shape)
    launch = kernel.launches.get(shape_class)
    if launch is not None:
        return launch(arguments, first.shape), launch
    from torch._dynamo import exc  # most of a second at first, which those who never train need not spend

    try:
        if shape_class is not None:
            # Compiled for sizes of ours: the compiler orders sums by the first size that it sees, and the bits of a
            # result must not depend on what a process has computed before.
            kernel(_examples(arguments, shape_class, len(tensors)))
            launch = kernel.launches.get(shape_class)
        if launch is None:
            return kernel(arguments), kernel.launches.get(shape_class)
        return launch(arguments, first.shape), launch
    except exc.FailOnRecompileLimitHit:
        return None, None  # too many kinds of shapes for one kernel; the others go on
    except exc.TorchDynamoException as error:
        _without_compiler.add(device.type)
        _calls.clear()
        logger.warning(
            "quantization goes on without compiled kernels, which makes training slower: install %s, or set "
            "OSCQAT_FUSED_KERNELS=0 to be told no more. torch.compile said: %s",
            "a C++ compiler" if device.type == "cpu" else "Triton",
            " ".join(str(error).split("\n\n")[0].split()),  # what failed, and why; then come hints
        )
        return None, None


def _is_own(value: object) -> bool:
    """Whether the class of something is Python's or this package's.

    A gradient estimator of somebody else may hand tensors to operators that torch's compiler calls as they are, and
    which look at a tensor's shape; what is written here becomes loops over memory.
    """
    return type(value).__module__.partition(".")[0] in ("builtins", __name__.partition(".")[0])


def _kind_of_call(
    what: tuple[Any, ...], tensors: Sequence[Tensor | None], parameters: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Everything that decides how `one_pass` makes a call, but for contents."""
    return (
        *what,
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
        *[None if t is None else (t.dtype, t.device, t.shape, t.stride(), _is_lazy(t)) for t in tensors],
        *[None if p is None else (p.dtype, p.device, p.shape, _is_lazy(p)) for p in parameters],
    )


def _row(parameter: Tensor) -> Tensor:
    return parameter if parameter.ndim == 1 and parameter.is_contiguous() else parameter.reshape(-1).contiguous()


ShapeClass = tuple[int, ...]
"""What a kernel for any shape still depends on: which sizes are 1, which are equal, and for how many threads."""


def _shape_class(shape: torch.Size) -> ShapeClass | None:
    """The class of a shape; None where its values need 64 bits to count."""
    if shape.numel() >= 2**31:
        return None
    # Of a row only the length is left, and one of a single value is no row.
    if len(shape) == 1:
        return None if shape[0] == 1 else (torch.get_num_threads(),)
    return (torch.get_num_threads(), *[-1 if size == 1 else shape.index(size) for size in shape])


def _examples(arguments: Sequence[Tensor | None], shape_class: ShapeClass, num_tensors: int) -> list[Tensor | None]:
    """Arguments like these, of a size that depends on the class of the shape alone."""
    sizes = (96, 128, 160)
    shape = tuple(1 if place < 0 else sizes[place] for place in shape_class[1:]) or (2**16,)
    examples: list[Tensor | None] = []
    for i, argument in enumerate(arguments):
        if argument is None or i == len(arguments) - 1:
            examples.append(argument)
        elif i < num_tensors:
            examples.append(torch.zeros(shape, dtype=argument.dtype, device=argument.device))
        else:
            count = argument.numel() if argument.numel() == 1 else shape[1]
            examples.append(torch.ones(count, dtype=argument.dtype, device=argument.device))
    return examples


class _Launch:
    """What torch's compiler made for one class of shapes, called directly.

    Before each call torch.compile checks everything that a graph could depend on and passes through layers of its own,
    which takes 20 us, and twice that in a training step, where they have been pushed out of the cache: several times
    as long as a kernel takes for most weights. What a graph of `one_pass` can depend on is in the keys of `_kernels`
    and `_Kernel.launches`, so nothing is left to check.

    Args:
        run: takes a list of tensors and sizes, and returns tensors.
        order: where to find each: an argument's index, or -1 - the dimension for a size.
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[Tensor]], order: list[int]) -> None:
        self.run = run
        self.order = order

    def __call__(self, arguments: Sequence[Tensor | None], shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Run the kernel.

        Args:
            arguments: dense tensors with their values in the same order, rows of parameters, bounds.
            shape: of the tensors as the kernel sees them.
        """
        return tuple(self.run([arguments[i] if i >= 0 else shape[-1 - i] for i in self.order]))


class _Call(NamedTuple):
    """One kind of call, which `one_pass` makes anew without asking again what there is to know about its arguments.

    Attributes:
        launch: of the kernel.
        seen_shape: of the tensors as the kernel sees them; see `_view`.
        seen_stride: the same; None where the kernel goes through memory from where a tensor begins.
        shape: of the tensors as they are.
        stride: of the outputs that are shaped like them.
        device: where they are.
        shaped: see `one_pass`.
    """

    launch: _Launch
    seen_shape: Sequence[int]
    seen_stride: Sequence[int] | None
    shape: Sequence[int]
    stride: Sequence[int]
    device: torch.device
    shaped: int

    def __call__(
        self,
        tensors: Sequence[Tensor | None],
        parameters: Sequence[Tensor | None],
        bounds: tuple[float, ...],
        memory: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.seen_stride is not None:
            tensors = [None if t is None else t.as_strided(self.seen_shape, self.seen_stride) for t in tensors]
        rows = [None if p is None else _row(p) for p in parameters]
        arguments = (*tensors, *rows, _on_device(bounds, self.device))
        if memory is not None and _is_like(memory, self.shape, self.stride):
            outputs = _lend(memory, lambda: self.launch(arguments, self.seen_shape))
        else:
            outputs = self.launch(arguments, self.seen_shape)
        of_tensors = [output.as_strided(self.shape, self.stride) for output in outputs[: self.shaped]]
        return (*of_tensors, *outputs[self.shaped :])


# --- Memory of a compiled kernel's outputs ---


class _Lent(threading.local):
    """Memory that the kernel which this thread runs may take for an output."""

    memory: Tensor | None = None


_lent = _Lent()


def _lend(memory: Tensor, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Run a kernel that may write an output to a dense tensor, which is lost."""
    _lent.memory = memory
    try:
        return run()
    finally:
        _lent.memory = None


def _is_like(memory: Tensor, shape: Sequence[int], stride: Sequence[int]) -> bool:
    return memory.shape == shape and memory.stride() == stride and not _is_lazy(memory)


def _allocate(
    new_memory: Callable[..., Tensor], size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Memory for a row of values: what was lent, where it fits, or else new."""
    memory = _lent.memory
    if memory is None or memory.dtype is not dtype or size != (memory.numel(),) or stride != (1,):
        return new_memory(size, stride, dtype)
    _lent.memory = None
    return memory.as_strided(size, stride)


def _let_allocate(run: Any) -> None:
    """Let what the compiler wrote for a CPU take its memory from `_allocate`.

    Told to write into an argument, the compiler makes two loops of one. Where it names things otherwise than we know,
    all memory is new.
    """
    names = getattr(getattr(run, "current_callable", None), "__globals__", {})
    new_memory = names.get("empty_strided_cpu")
    if new_memory is not None and not isinstance(new_memory, functools.partial):
        names["empty_strided_cpu"] = functools.partial(_allocate, new_memory)


class _Kernel:
    """One function compiled for tensors of some kind and any shape."""

    def __init__(self, function: Function, static: tuple[Any, ...], num_tensors: int, axis: int) -> None:
        def kernel(*arguments: Any) -> tuple[Tensor, ...]:
            return function(arguments[:num_tensors], arguments[num_tensors:-1], arguments[-1], axis, *static)

        # Dynamo gives up on a code object that it had to compile too often, so each kernel gets one of its own.
        code = kernel.__code__.replace(co_name=f"{function.__name__}_{len(_kernels)}")
        own = FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
        self.compiled = torch.compile(own, dynamic=True, fullgraph=True, backend=self._compile)
        self.launches: dict[ShapeClass | None, _Launch] = {}
        self._calls: list[tuple[Any, list[Any], Sequence[Tensor]]] = []

    def __call__(self, arguments: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Run it, compiling it if need be, and remember how the next call gets around torch.compile."""
        self._calls = []
        # With `data` nothing is a view to torch, whose compiler would make a kernel for each shape of what it views.
        arguments = [None if a is None else a.detach().data for a in arguments]
        # Numbers in `static` are to be constants of the kernel; made dynamic, they would be arguments of it.
        with torch._dynamo.config.patch(specialize_float=True):
            outputs = self.compiled(*arguments)
        calls, self._calls = self._calls, []
        first = arguments[0]
        assert first is not None
        shape_class = _shape_class(first.shape)
        if shape_class is not None and len(calls) == 1:
            run, inputs, results = calls[0]
            order = _order(inputs, arguments, first.shape)
            if order is not None and len(results) == len(outputs) and all(map(_is_same, results, outputs)):
                self.launches[shape_class] = _Launch(run, order)
        return outputs

    def _compile(self, graph: Any, example_inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx

        # What comes from this cache is not shown to `inner_compile`; the kernels themselves have one of their own.
        # Division is to round as in eager mode, which Triton's does not by default: packing rounds in eager mode.
        # Sizes are not asserted in each call: they are in the keys, and tensors come in the shape that they have.
        options = {"eager_numerics.division_rounding": True, "size_asserts": False}
        with config.patch(enable_autograd_cache=False), inductor.patch(options):
            return compile_fx(graph, example_inputs, inner_compile=self._record)

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        run = compile_fx_inner(*args, **kwargs)
        _let_allocate(run)

        def recorded(inputs: list[Any]) -> Sequence[Tensor]:
            kept = list(inputs)  # it empties the list that it is given
            outputs = run(inputs)
            self._calls.append((run, kept, outputs))
            return outputs

        recorded._boxed_call = True  # type: ignore[attr-defined]
        return recorded


def _order(inputs: list[Any], arguments: Sequence[Tensor | None], shape: torch.Size) -> list[int] | None:
    """Where each input of a compiled graph is found among the arguments; None if one is not, or in two places."""
    order = []
    for value in inputs:
        if isinstance(value, Tensor):
            found = [i for i, a in enumerate(arguments) if a is not None and _is_same(a, value)]
            if len(found) != 1:
                return None
            order.append(found[0])
        elif value in shape:
            order.append(-1 - shape.index(value))
        else:
            return None
    return order


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype


@functools.lru_cache(maxsize=MAX_CALLS)
def _on_device(bounds: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as a tensor, because a kernel is compiled anew for other numbers, and not for other contents."""
    with torch.inference_mode(False):
        # Filled there, because a copy from the host would wait for the device, and an annealed threshold is a new one
        # at each step.
        return torch.stack([torch.full((), bound, dtype=torch.float32, device=device) for bound in bounds])


# --- In chunks ---


def chunk_size() -> int:
    """How many values to take at a time, with what is done to them in several operations."""
    return CHUNK * torch.get_num_threads()


def cache_sized_parts(x: Tensor) -> Sequence[Tensor]:
    """Views of all values of a tensor, to be written to in turn; small ones, where a dense tensor is large."""
    layout = _layout(x)
    return (x,) if layout is None or x.numel() <= chunk_size() else _view(x, layout, None).split(chunk_size())


def _in_chunks(
    function: Function,
    static: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    bounds: tuple[float, ...],
    shaped: int,
) -> tuple[Tensor, ...]:
    first = tensors[0]
    assert first is not None
    # New memory costs more than an operation in the cache. So the first result is computed where it is to be, unless
    # it has to be computed in another dtype.
    writes = shaped > 0 and all(t is None or t.dtype == torch.float32 for t in (first, *parameters))
    outputs = [torch.empty_like(first)] if writes else []
    sums: Sequence[Tensor] = ()
    chunk = chunk_size()
    for start in range(0, first.numel(), chunk):
        end = start + chunk
        parts = [None if t is None else t[start:end] for t in tensors]
        out = {"out": outputs[0][start:end]} if writes else {}
        results = function(parts, parameters, bounds, 0, *static, **out)
        outputs += [torch.empty(first.shape, dtype=r.dtype) for r in results[len(outputs) : shaped]]
        for output, result in zip(outputs, results[:shaped], strict=True):
            if result is not out.get("out"):
                output[start:end] = result
        sums = results[shaped:] if start == 0 else [a + b for a, b in zip(sums, results[shaped:], strict=True)]
    return (*outputs, *sums)

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SMALL = 2**14
"""Values below which, on a CPU, a call of a compiled kernel costs more than a dozen operations do."""
CHUNK = 2**15
"""Values of a chunk for each thread: no operation of torch gives one fewer, and its temporaries fit into the cache."""
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., tuple[Tensor, ...]]
"""`function(tensors, parameters, bounds, axis, *static)`: tensors of one shape (or None), parameters with one value or
one per channel along `axis` (or None), numbers. Returns first what is shaped like the tensors, then sums over
whatever one value of a parameter was used for. It may also write into the tensors."""


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
    small: float = 1.0,
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
        small: values below which it is run as it is on a CPU, in units of `SMALL`; measured.

    Returns:
        What the function returns.
    """
    first = tensors[0]
    assert first is not None
    is_small = first.numel() < small * SMALL and first.device.type == "cpu"
    layout = None if is_small or is_traced(first) else _layout(first)
    # What is written to must not be a copy in another layout.
    copies = (
        in_place
        and layout is not None
        and not all(t is None or t.is_contiguous(memory_format=layout) for t in tensors)
    )
    if layout is None or copies:
        return function(tensors, parameters, bounds, axis, *static)
    per_channel = any(p is not None and p.numel() > 1 for p in parameters)
    views = [None if t is None else _view(t, layout, axis if per_channel else None) for t in tensors]
    outputs = None
    if _enabled and first.device.type not in _without_compiler:
        outputs = _compiled(function, static, views, parameters, bounds, per_channel)
    if outputs is None and first.device.type == "cpu" and not per_channel:
        outputs = _in_chunks(function, static, views, parameters, bounds, shaped)
    if outputs is None:
        return function(tensors, parameters, bounds, axis, *static)
    return (*(_unview(output, first.shape, layout) for output in outputs[:shaped]), *outputs[shaped:])


def is_traced(x: Tensor) -> bool:
    """Whether `x` is a stand-in that somebody traces with, and not values in memory."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or in_transform()
        or torch.jit.is_tracing()
    )


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


# --- One shape for all: values in a row, or in rows per channel ---


def _layout(x: Tensor) -> torch.memory_format | None:
    if x.dtype not in FUSED_DTYPES or x.device.type not in ("cpu", "cuda"):
        return None
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else None


def _view(x: Tensor, layout: torch.memory_format, axis: int | None) -> Tensor:
    """See a dense tensor as `[values]` in the order of memory; with an axis, as `[outer, channels, inner]`."""
    x = x.detach().contiguous(memory_format=layout)
    if layout is torch.channels_last:
        x = x.permute(0, 2, 3, 1)
        axis = None if axis is None else (0, 3, 1, 2)[axis]
    # With `data` it is no view to torch, whose compiler would make a kernel for each shape of what it is a view of.
    return (x.view(-1) if axis is None else x.view(x.shape[:axis].numel(), x.shape[axis], -1)).data


def _unview(x: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    if layout is torch.contiguous_format:
        return x.view(shape)
    n, c, h, w = shape
    return x.view(n, h, w, c).permute(0, 3, 1, 2)


# --- Compiled ---

_kernels: dict[Any, Any] = {}
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
) -> tuple[Tensor, ...] | None:
    """Run the compiled function; None if it cannot be compiled, which is said once."""
    first = tensors[0]
    assert first is not None
    arguments = (*tensors, *[None if p is None else p.detach() for p in parameters], _on_device(bounds, first.device))
    kinds = tuple([None if a is None else a.dtype for a in arguments])
    key = (function, static, kinds, per_channel, first.device.type, torch.is_inference_mode_enabled())
    from torch._dynamo import exc  # most of a second at first, which those who never train need not spend

    if key not in _kernels:
        _kernels[key] = _compile(function, static, len(tensors), int(per_channel))
    try:
        return _kernels[key](*arguments)
    except exc.FailOnRecompileLimitHit:
        return None  # too many kinds of shapes for one kernel; the others go on
    except exc.TorchDynamoException as error:
        _without_compiler.add(first.device.type)
        logger.warning(
            "quantization goes on without compiled kernels, which makes training slower: install %s, or set "
            "OSCQAT_FUSED_KERNELS=0 to be told no more. torch.compile said: %s",
            "a C++ compiler" if first.device.type == "cpu" else "Triton",
            str(error).strip().partition("\n")[0],
        )
        return None


def _compile(function: Function, static: tuple[Any, ...], num_tensors: int, axis: int) -> Any:
    def kernel(*arguments: Any) -> tuple[Tensor, ...]:
        return function(arguments[:num_tensors], arguments[num_tensors:-1], arguments[-1], axis, *static)

    # Dynamo gives up on a code object that it had to compile too often, so each kernel gets one of its own.
    code = kernel.__code__.replace(co_name=f"{function.__name__}_{len(_kernels)}")
    own = FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


@functools.lru_cache(maxsize=256)
def _on_device(bounds: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as a tensor, because a kernel is compiled anew for other numbers, and not for other contents."""
    with torch.inference_mode(False):
        # Filled there, because a copy from the host would wait for the device, and an annealed threshold is a new one
        # at each step.
        return torch.stack([torch.full((), bound, dtype=torch.float32, device=device) for bound in bounds])


# --- In chunks ---


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
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    chunk = CHUNK * torch.get_num_threads()
    for start in range(0, first.numel(), chunk):
        end = start + chunk
        parts = [None if t is None else t[start:end] for t in tensors]
        results = function(parts, parameters, bounds, 0, *static)
        if start == 0:
            outputs = [torch.empty(first.shape, dtype=r.dtype, device=r.device) for r in results[:shaped]]
            sums = list(results[shaped:])
        else:
            sums = [total + part for total, part in zip(sums, results[shaped:], strict=True)]
        for output, result in zip(outputs, results[:shaped], strict=True):
            output[start:end] = result
    return (*outputs, *sums)

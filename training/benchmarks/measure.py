"""Time, memory and bandwidth of training steps; knows nothing of quantization.

Other programs disturb a clock. So everything that is compared is measured in turns, one step each per repeat, and
compared within the repeat: what slows down a whole repeat cancels out.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise repeated measurements.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("got no measurements, expected at least one")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(times: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as long one thing takes as another: the spread of the ratios within each repeat.

    Args:
        times: seconds of each repeat.
        base: seconds of the other thing in the same repeats.

    Raises:
        ValueError: if there are not as many of both.
    """
    return spread([t / b for t, b in zip(times, base, strict=True)])


def overhead(times: Sequence[float], base: Sequence[float]) -> Spread:
    """How many seconds longer one thing takes than another: the spread of the differences within each repeat.

    Args:
        times: seconds of each repeat.
        base: seconds of the other thing in the same repeats.

    Raises:
        ValueError: if there are not as many of both.
    """
    return spread([t - b for t, b in zip(times, base, strict=True)])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time several things side by side.

    Args:
        steps: by name, what to time.
        repeats: how often; each starts with another one of them.
        device: what they run on.

    Returns:
        By name, seconds of each repeat.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % max(1, len(names))
        for name in names[first:] + names[:first]:
            times[name].append(timed(steps[name], device))
    return times


class Memory(NamedTuple):
    """Bytes above what is held before a call.

    Attributes:
        peak: most at any one time.
        left: what is still held at its end, while its result is.
    """

    peak: int
    left: int


def memory_of(call: Callable[[], object], device: torch.device) -> Memory:
    """Measure what a call allocates; take it outside of any timing, after a warm-up.

    On CUDA the caching allocator keeps count. On a CPU torch's profiler records each allocation and release of
    torch's allocator, and the running sum of both is the level. That misses what libraries such as oneDNN allocate
    by themselves; unlike the resident size of the process, it does not depend on what earlier steps left behind.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        gc.collect()
        left = torch.cuda.memory_allocated(device)
        del result
        return Memory(peak - before, left - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
        gc.collect()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    level = top = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        top = max(top, level)
    return Memory(top, level)


def bytes_kept_for_backward(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that a forward leaves behind for its backward.

    That is what it allocates and does not release, without the loss. Parameters, buffers and the images do not count,
    for they are there before. `saved_tensors_hooks` would not do: of nested hooks the innermost alone is called, so
    what a library packs with hooks of its own would be missed, and so would what it keeps in `ctx` or a closure.

    Args:
        forward: computation of the loss.
        device: where.
    """
    nbytes = 0

    def keep() -> Tensor:
        nonlocal nbytes
        loss = forward()
        nbytes = loss.untyped_storage().nbytes()
        return loss

    return memory_of(keep, device).left - nbytes

"""Peak memory of `benchmarks.overhead`, counted alike on both devices: bytes in tensors, of one case alone."""

from collections.abc import Callable, Mapping
import gc
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Called = TypeVar("Called", bound=Callable[[], None])


def build_and_weigh(
    builders: Mapping[str, Callable[[], Called]], device: torch.device
) -> tuple[dict[str, Called], dict[str, int], dict[str, str]]:
    """Build every case, call it once, and weigh a second call.

    Args:
        builders: name -> what builds the case and returns what is to be timed.
        device: where it runs.

    Returns:
        The built cases; the largest number of bytes that each has in tensors during the second call, itself included
        and the cases before it not; and why a case is missing. On CUDA that is what PyTorch's allocator hands out. On
        the CPU it is added up from the profiler's record of every allocation and release, which does not know the
        scratch memory inside libraries (oneDNN, OpenMP).
    """
    if device.type == "cuda":
        return _on_cuda(builders, device)
    built, peaks = _on_cpu(builders)
    return built, peaks, {}


def _on_cuda(
    builders: Mapping[str, Callable[[], Called]], device: torch.device
) -> tuple[dict[str, Called], dict[str, int], dict[str, str]]:
    built, peaks, missing = {}, {}, {}
    next(iter(builders.values()))()()  # libraries take their lasting workspaces in the first call: no case's own
    for name, build in builders.items():
        gc.collect()  # what other cases left in cycles
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        case = None
        try:
            case = build()
            case()  # the optimisers make their state in the first step
            gc.collect()
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            case()
            torch.cuda.synchronize(device)
        except torch.cuda.OutOfMemoryError:
            missing[name] = "out of memory"
            continue
        built[name], peaks[name] = case, torch.cuda.max_memory_allocated(device) - before
    return built, peaks, missing


def _on_cpu(builders: Mapping[str, Callable[[], Called]]) -> tuple[dict[str, Called], dict[str, int]]:
    built = {}
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for place, (name, build) in enumerate(builders.items()):
            with record_function(f"build {place}"):
                built[name] = build()
                built[name]()
                gc.collect()
            with record_function(f"weigh {place}"):
                built[name]()
    spans, sizes = _spans(profiler), _sizes(profiler)
    peaks = {}
    for place, name in enumerate(builders):
        before = _at(sizes, spans[f"build {place}"][0])
        peaks[name] = _peak(sizes, *spans[f"weigh {place}"]) - before
    return built, peaks


def _spans(profiler: profile) -> dict[str, tuple[int, int]]:
    """Start and end of every named part, in nanoseconds."""
    return {
        event.name(): (event.start_ns(), event.end_ns())
        for event in _events(profiler)
        if event.name().startswith(("build ", "weigh "))
    }


def _sizes(profiler: profile) -> list[tuple[int, int]]:
    """Time in nanoseconds, and bytes in tensors of the CPU from then on; what is older than the record is not known."""
    changes = [
        (event.start_ns(), event.nbytes())
        for event in _events(profiler)
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    total, sizes = 0, []
    for when, change in sorted(changes, key=lambda one: one[0]):
        total += change
        sizes.append((when, total))
    return sizes


def _events(profiler: profile) -> list:
    inner = profiler.profiler
    if inner is None or inner.kineto_results is None:
        raise RuntimeError("the profiler has no record; expected one after its end")
    return inner.kineto_results.events()


def _at(sizes: list[tuple[int, int]], when: int) -> int:
    return next((size for time, size in reversed(sizes) if time <= when), 0)


def _peak(sizes: list[tuple[int, int]], start: int, end: int) -> int:
    return max([_at(sizes, start), *(size for time, size in sizes if start <= time <= end)])

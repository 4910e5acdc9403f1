"""Compiles the launches of Triton's kernels for a GPU that is not there: ``python -m tests.compiled_kernels cuda 90``.

Prints a JSON list with, for each kernel and problem, what the compiler says: registers, bytes of local memory (spills),
shared memory. The launches are the real ones, made by the code under test on tensors that nobody fills: only the last
step, running the compiled kernel, is left out. Needs a process of its own, without TRITON_INTERPRET.
"""

from collections.abc import Callable
from contextlib import nullcontext
import json
from pathlib import Path
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rlp.kernels import ops
from rlp.kernels.problem import Problem, Upstream, sort_by_class

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Offline:
    """What Triton asks its driver for while it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Any number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any number."""
        return 0


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of local and shared memory, of a compiled kernel."""
    found = {"shared": int(kernel.metadata.shared), "warps": int(kernel.metadata.num_warps)}
    if "cubin" not in kernel.asm:  # AMD: its assembler writes them down in the text
        names = {"registers": r"\.vgpr_count:\s*(\d+)", "local": r"\.private_segment_fixed_size:\s*(\d+)"}
        return found | {name: int(re.findall(pattern, kernel.asm["amdgcn"])[0]) for name, pattern in names.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout))
    return found | {"registers": int(numbers["REG"]), "local": int(numbers["STACK"]) + int(numbers["LOCAL"])}


def launches_of(call: Callable[[], object]) -> list[tuple[str, Any]]:
    """Names and compiled kernels of what `call` would launch."""
    found = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return found


def problem_of(
    batch: int, heads: int, n: int, dim: int, classes: int | None, dtype: torch.dtype, entropy: bool = False
) -> Problem:
    """A problem whose tensors have shapes, and memory that nobody touches."""
    own = (heads,) if classes is None else (heads, classes)
    target = torch.zeros(batch, heads, dtype=torch.int64)
    order = None if classes is None else sort_by_class(torch.arange(batch) % classes, classes)
    return Problem(
        torch.empty(batch, dim, dtype=dtype), torch.empty(*own, n, dim, dtype=dtype), torch.empty(*own, n, dtype=dtype),
        target, order, dtype, entropy, True, True, 2**28, True,
    )  # fmt: skip


def through_path(path: str, problem: Problem) -> None:
    """Forward and backward."""
    module = ops.path_named(path)
    stats, kept = module.forward(problem)
    arriving = torch.zeros(problem.batch, problem.heads)
    upstream = Upstream(arriving[0], arriving, arriving, arriving, arriving if problem.entropy else None)
    module.backward(problem, stats, kept, upstream)


def through_rows(batch: int, heads: int, n: int, dtype: torch.dtype, entropy: bool = False) -> None:
    """The row kernels, without the products around them."""
    from rlp.kernels import softmax_triton

    logits, target = (
        torch.empty(batch, heads * n, dtype=dtype).unflatten(1, (heads, n)),
        torch.zeros(batch, heads).long(),
    )
    stats = softmax_triton.statistics(logits, target, entropy)
    arriving = torch.zeros(batch, heads)
    upstream = Upstream(None, arriving, arriving, arriving, arriving if entropy else None)
    softmax_triton.gradients(logits, target, stats, upstream, n, True, True)
    if heads == 1:
        softmax_triton.replace_by_residual(logits, target)


def problems(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The benchmark's cases (docs/kernels.md)."""
    return {
        "draws of 10 labels": lambda: through_rows(512, 8, 10, dtype),
        "E": lambda: through_rows(4096, 64, 100, dtype),
        "E with entropy": lambda: through_rows(4096, 64, 100, dtype, entropy=True),
        "C": lambda: through_rows(1024, 1, 100_000, dtype),
        "A": lambda: through_path("tiny", problem_of(1024, 1, 10, 256, 100, dtype)),
        "A, draws": lambda: through_path("tiny", problem_of(512, 8, 10, 256, None, dtype)),
        "tiny at its largest n": lambda: through_path("tiny", problem_of(512, 1, 64, 512, None, dtype, entropy=True)),
        "B": lambda: through_path("grouped", problem_of(1024, 1, 1000, 512, 100, dtype)),
        "D": lambda: through_path("grouped", problem_of(1024, 1, 1000, 768, 1000, dtype)),
        "D with entropy": lambda: through_path("grouped", problem_of(1024, 1, 1000, 768, 1000, dtype, entropy=True)),
    }


def main(backend: str, architecture: str) -> None:
    """Compile everything and print the report."""
    target = GPUTarget(
        backend, int(architecture) if architecture.isdigit() else architecture, 64 if backend == "hip" else 32
    )
    driver.set_active(Offline(target))  # pyright: ignore[reportArgumentType]
    torch.cuda.device_of = lambda tensor: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    report = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, call in problems(dtype).items():
            for kernel_name, kernel in launches_of(call):
                report.append({"problem": name, "dtype": str(dtype), "kernel": kernel_name, **resources(kernel)})
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])

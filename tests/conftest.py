"""What all tests share: one CPU thread, GPU tests only where there is a GPU, missing optional packages by name."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
import os
from pathlib import Path
import signal

# Before torch is imported, and inherited by the processes that tests start: two workers on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter, which must be chosen before its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

OPTIONAL = ("fastargs", "ffcv", "hypothesis", "matplotlib", "PIL", "sklearn", "timm", "tqdm", "triton", "yaml")
"""Without one of these a file that imports it at its top is left out, and named in the summary."""

if find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples every time; `--hypothesis-profile default` looks for new ones.
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")


def pytest_configure() -> None:
    """One thread, also for tests that run in this process; and Ctrl-C works, which a shell turns off in its jobs."""
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start would inherit the refusal


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what carries the mark `gpu` where torch has none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def missing_packages(path: Path) -> list[str]:
    """The optional packages that a file of this folder imports at its top, itself or through a helper beside it."""
    names = set(_top_imports(path))
    for helper in names & {file.stem for file in path.parent.glob("*.py")}:
        names.update(_top_imports(path.parent / f"{helper}.py"))
    return [name for name in OPTIONAL if name in names and find_spec(name) is None]


def _top_imports(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.removeprefix("tests.").split(".")[0]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the test files that cannot be imported here."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and missing_packages(collection_path) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which files were left out and for want of what."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if missing := missing_packages(path):
            terminalreporter.write_line(f"left out: tests/{path.name} needs {', '.join(missing)}")

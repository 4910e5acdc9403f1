"""The rules of docs/design.md about what may import what, held against the sources; and no machine's paths in files."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports go from a later level to an earlier one, or stay within a level.
LEVELS = (
    (
        "rlp.errors",
        "rlp.files",
        "rlp.philox",
        "rlp.labels",
        "rlp.config",
        "rlp.config_files",
        "rlp.config_keys",
        "rlp.schema",
        "rlp.seeding",
        "rlp.distributed",
        "rlp.intervals",
        "rlp.kernels.reference",
    ),
    ("rlp.kernels",),
    ("rlp.losses", "rlp.data", "rlp.optim", "rlp.meters", "rlp.checkpoint", "rlp.progress", "rlp.runlog"),
    ("rlp.models",),
    (
        "rlp.runfolder",
        "rlp.headplan",
        "rlp.low_rank",
        "rlp.regularisers",
        "rlp.stopping",
        "rlp.evaluate",
        "rlp.trainer",
        "rlp.build",
    ),
    ("rlp.measure",),
    ("rlp.report",),
    ("rlp.reproduce",),
    ("rlp.sweep",),
    ("train_rlp", "data_prep", "benchmarks", "examples", "tests"),
)
FACADE = "rlp"  # the package's own file gathers the public names

# Heavy or rare packages -> the only places that may import them, anywhere in their text.
KEEPERS = {
    "ffcv": ("benchmarks",),  # the loaders use its library alone
    "numba": ("rlp.data.compiled", "rlp.data.decode"),
    "triton": ("rlp.kernels",),
    "fastargs": ("rlp.config",),
    "timm": ("rlp.models.backbone",),
    "torchvision": ("rlp.models.backbone", "benchmarks"),
    "matplotlib": (
        "rlp.report",
        "rlp.reproduce.figure",
        "rlp.sweep.figure",
        "rlp.measure.compare_figure",
        "scripts",
        "benchmarks",
    ),
    "tensorboard": ("rlp.runlog",),
    "cv2": ("benchmarks",),
    "optuna": ("rlp.sweep",),
    "pyarrow": ("data_prep.parquet", "rlp.measure.scores", "rlp.report.page_scores"),
    "pandas": ("rlp.measure.scores",),
}
# Packages that `import rlp` and its rooms must do without, and the modules that exist for one of them.
BLOCKED = (
    "ffcv",
    "pyarrow",
    "pandas",
    "numba",
    "triton",
    "fastargs",
    "timm",
    "torchvision",
    "matplotlib",
    "tensorboard",
    "yaml",
    "cv2",
    "optuna",
)
BOUND = (
    "rlp.data.compiled",
    "rlp.data.decode",
    "rlp.data.native",
    "rlp.data.ffcv_loader",
    "rlp.config_files",
    "rlp.kernels.triton_math",
    "rlp.kernels.softmax_triton",
    "rlp.kernels.tiny",
    "rlp.kernels.grouped",
    "rlp.kernels.grouped_kernels",
    "rlp.kernels.row_sparse_kernels",
)


def sources(root: Path) -> dict[str, str]:
    """Module name -> text of every Python file of the product: rlp, data_prep and the scripts on top."""
    files = [
        *root.glob("*.py"),
        *root.glob("rlp/**/*.py"),
        *root.glob("data_prep/**/*.py"),
        *root.glob("benchmarks/*.py"),
    ]
    names = (file.relative_to(root).with_suffix("").as_posix().replace("/", ".") for file in files)
    return {name.removesuffix(".__init__"): file.read_text("utf-8") for name, file in zip(names, files, strict=True)}


def imported(text: str, top_only: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a source imports; `from a import b` gives both `a` and `a.b`."""
    tree = ast.parse(text)
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, places: tuple[str, ...]) -> bool:
    """Whether the module is one of the places or lies in one."""
    return any(module == place or module.startswith(place + ".") for place in places)


def level_of(module: str) -> int | None:
    """Index into LEVELS of the longest name that holds the module."""
    matches = [(len(name), level) for level, names in enumerate(LEVELS) for name in names if within(module, (name,))]
    return max(matches)[1] if matches else None


def upward_imports(texts: Mapping[str, str]) -> list[str]:
    """Every import of a later level, every relative import, and every module without a level."""
    faults = []
    for module, text in texts.items():
        if module == FACADE:
            continue
        mine = level_of(module)
        if mine is None:
            faults.append(f"{module} has no level: enter it in LEVELS")
            continue
        for name in imported(text):
            if name.startswith("."):
                faults.append(f"{module} imports relatively")
            theirs = level_of(name)
            if theirs is not None and theirs > mine:
                faults.append(f"{module} imports {name}, which lies above it")
    return faults


def cycles(texts: Mapping[str, str]) -> list[str]:
    """Modules that, through imports at the top of files, import themselves."""
    edges = {
        module: {name for name in imported(text, top_only=True) if name in texts and name not in (module, FACADE)}
        for module, text in texts.items()
    }
    while free := [module for module, names in edges.items() if not names & edges.keys()]:
        for module in free:
            del edges[module]
    return sorted(edges)


def strays(texts: Mapping[str, str]) -> list[str]:
    """Imports of a kept package outside of its keepers."""
    return [
        f"{module} imports {name}"
        for module, text in texts.items()
        for name in imported(text)
        if name.split(".")[0] in KEEPERS and not within(module, KEEPERS[name.split(".")[0]])
    ]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return sources(ROOT)


def test_imports_point_one_way(texts: dict[str, str]) -> None:
    assert upward_imports(texts) == []
    assert cycles(texts) == []


def test_rare_packages_stay_where_they_belong(texts: dict[str, str]) -> None:
    assert strays(texts) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("rlp.labels", "from rlp.trainer import Trainer"),
        ("rlp.losses", "def f():\n    import rlp.models.heads"),
        ("rlp.models.heads", "from rlp import report"),
        ("rlp.trainer", "from rlp.report.table import summary_table"),
        ("rlp.errors", "from rlp.kernels.fused import run"),
        ("rlp.data.batch", "from . import beton"),
        ("rlp.novelty", "import math"),
    ],
)
def test_an_upward_import_is_found(module: str, text: str) -> None:
    assert upward_imports({module: text})


def test_downward_imports_are_fine() -> None:
    assert upward_imports({"rlp.report.figures": "from rlp import labels\nimport rlp.models, numpy"}) == []
    assert upward_imports({"rlp.kernels.fused": "from rlp.kernels.reference import statistics"}) == []


def test_a_cycle_is_found() -> None:
    ring = {"rlp.philox": "import rlp.labels", "rlp.labels": "from rlp import errors, seeding"}
    ring["rlp.seeding"] = "from rlp.philox import random_bits"
    ring["rlp.errors"] = "import math"
    assert cycles(ring) == ["rlp.labels", "rlp.philox", "rlp.seeding"]
    lazy = ring | {"rlp.philox": "def f():\n    import rlp.labels"}
    assert cycles(lazy) == []


@pytest.mark.parametrize("package", KEEPERS)
def test_a_stray_import_is_found(package: str) -> None:
    lazy = f"def f():\n    from {package}.part import thing"
    assert strays({"rlp.data.resident": lazy})
    assert not strays({KEEPERS[package][0]: lazy})


IMPORT_WITHOUT = """
import importlib, sys
for name in {blocked!r}:
    sys.modules[name] = None  # import raises ModuleNotFoundError
for module in {modules!r}:
    importlib.import_module(module)
import rlp
assert all(hasattr(rlp, name) for name in rlp.__all__)
"""


def test_the_package_imports_without_the_optional_ones(texts: dict[str, str]) -> None:
    modules = [name for name in texts if within(name, ("rlp",)) and name not in BOUND]
    program = IMPORT_WITHOUT.format(blocked=BLOCKED, modules=modules)
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_blocked_package_is_really_missing(tmp_path: Path) -> None:
    (tmp_path / "eager.py").write_text("import yaml\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + IMPORT_WITHOUT.format(
        blocked=BLOCKED, modules=["eager"]
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "import of yaml halted" in finished.stderr


def test_the_training_script_is_short() -> None:
    assert len((ROOT / "train_rlp.py").read_text("utf-8").splitlines()) < 120


# Folders of somebody's machine, spelt so that this file has none of them.
MACHINE_PATH = re.compile(r"""(?<![\w./:-])/(?:home|root|work|Users|mnt|scratch)(?=/\w)""")


def machine_paths(text: str) -> list[str]:
    """Absolute paths below a home, work or mount folder."""
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def tracked_files() -> list[Path]:
    """The files under version control; all of the known folders where git does not say (an unpacked archive)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = ("rlp", "data_prep", "tests", "benchmarks", "configs", "docs", "scripts", "examples")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_no_file_names_a_machine() -> None:
    found = {}
    for path in tracked_files():
        try:
            lines = machine_paths(path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue  # a figure
        if lines:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found == {}


@pytest.mark.parametrize("folder", ["home", "root", "work", "Users"])
def test_a_machine_path_is_found(folder: str) -> None:
    planted = "/".join(["", folder, "someone", "data.beton"])
    assert machine_paths(f'path = "{planted}"') == [f'path = "{planted}"']
    assert machine_paths(f"see https://example.org{planted}, a{planted} and .{planted}") == []

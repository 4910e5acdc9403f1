"""The example in examples/ runs, and the README shows the same six lines."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_loop_of_your_own_reads_random_labels() -> None:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("own_loop", ROOT / "examples" / "own_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.main(epochs=3)
    lines = [line.split() for line in table.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in ("1", "3")] == [["1", "256"], ["3", "256"]] * 2
    assert "10 random labels, 8 draws" in table


def test_the_readme_shows_the_examples_calls() -> None:
    example = (ROOT / "examples" / "own_loop.py").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for call in (
        "rlp.attach(model, taps=",
        "heads.loss(",
        "[*model.parameters(), *heads.parameters()]",
        "heads.summary()",
    ):
        assert call in example, call
        assert call in readme, call

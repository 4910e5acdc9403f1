"""Every path of the random-label loss against the oracle, in float64 on ragged shapes."""

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch

from tests.loss_cases import assert_same, by_path, by_reference, check_path, full_float32, random_case

SHARED = ("whole", "by_rows", "by_columns")


@pytest.mark.parametrize("path", SHARED)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 21),
    heads=st.integers(1, 4),
    n=st.integers(2, 37),
    dim=st.integers(1, 19),
    own_features=st.booleans(),
    has_bias=st.booleans(),
    entropy=st.booleans(),
    fit_to_features=st.booleans(),
    budget=st.sampled_from([1, 300, 2000, 2**28]),
    routes=st.sampled_from(["wx", "w", "x", ""]),
)
def test_shared_heads(path, seed, batch, heads, n, dim, budget, routes, **options) -> None:
    options["entropy"] = options["entropy"] and path != "by_rows"
    case = random_case(seed, batch, heads, n, dim, **options)
    if case.fit_to_features and routes == "x":
        routes = "wx"
    assert_same(by_path(case, path, False, budget, routes), by_reference(case, routes))


EVERY = [(path, triton) for path in SHARED for triton in (False, True)]
EVERY += [("by_class", False), ("grouped", True), ("tiny", True)]


@pytest.mark.parametrize(("path", "triton"), EVERY)
def test_ragged_problems(path: str, triton: bool) -> None:
    """The checks with which `test_mutations` finds planted faults."""
    if triton:
        pytest.importorskip("triton")
    check_path(path, triton)


@pytest.mark.gpu
@pytest.mark.parametrize(("path", "triton"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_problems_on_a_gpu(path: str, triton: bool, dtype: torch.dtype) -> None:
    if triton:
        pytest.importorskip("triton")
    with full_float32():
        check_path(path, triton, "cuda", dtype)

"""The random-label loss: checks what it is given, picks the path, calls the operator."""

from importlib.util import find_spec

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.kernels import ops, reference
from rlp.kernels.problem import ClassOrder, sort_by_class
from rlp.kernels.reference import RandomLabelLoss

HAS_TRITON = find_spec("triton") is not None
IMPLS = ("auto", "reference", "eager", "triton")
MEMORY_BUDGET = 256 * 2**20
"""Bytes."""
FEW_HEADS = 4
"""Up to so many heads the path `by_rows` may keep ``q W`` [B, H, D] for the backward pass."""
ENOUGH_ROWS = 1024
"""With fewer rows in a chunk, reading and writing the sum of the weight gradient would outweigh the products."""
TINY_LABELS, TINY_PRODUCT = 64, 2**24
"""The path `tiny` serves up to so many labels, and multiplications B·H·n·D: it reads the weight once for each row."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random_label_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Tensor | ClassOrder | None = None,
    *,
    entropy: bool = False,
    fit_to_features: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    impl: str = "auto",
) -> RandomLabelLoss:
    """Fit loss and statistics of many linear heads in one operation, each with its own route for gradients.

    ``fit[h]`` is the mean over the batch of ``-log p`` of head h at its random label; its gradient reaches weight and
    bias only. The statistics (:class:`rlp.kernels.reference.Statistics`, from which :mod:`rlp.losses` makes every
    penalty and accuracy) have gradients that reach the features only. Under autocast the products are computed in its
    type, sums and statistics in float32; all is float64 where the inputs are. Deterministic.

    Args:
        x: features ``[B, D]``, shared by the heads, or ``[B, H, D]``, one row for each; any strides.
        weight: ``[H, n, D]``, n >= 2; with `classes` ``[H, C, n, D]``, heads of its own for each class.
        bias: ``[H, n]`` (``[H, C, n]``), or None.
        target: int64 ``[B, H]``, random labels in [0, n).
        classes: int64 ``[B]`` in [0, C), or its `ClassOrder`, which the taps of one step can share.
        entropy: also the statistic ``entropy_rest``.
        fit_to_features: let the fit loss reach the features too, as an ordinary loss does.
        memory_budget: bytes that temporary matrices of logits and their gradients may take, where heads are shared.
        impl: ``auto`` (Triton's kernels on a GPU, else PyTorch), ``reference`` (plain autograd), ``eager`` or
            ``triton``.

    Returns:
        ``fit [H]`` and statistics ``[B, H]``, float32 or float64.

    Raises:
        UserError: shapes, types or devices do not fit together, or the implementation cannot be had.

    Labels and classes out of range are an error on the CPU; on a GPU and in compiled code nobody looks, and the loss
    is not finite. Of an empty batch the fit loss is NaN, as a mean over nothing is, and its gradients are 0. There are
    no second derivatives, except with ``reference``.
    """
    check_arguments(x, weight, bias, target, classes, memory_budget, impl)
    dtype = product_dtype(x, weight)
    if impl == "reference":
        given = classes.classes if isinstance(classes, ClassOrder) else classes
        with torch.autocast(x.device.type, enabled=False):
            return reference.random_label_loss(
                x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), target, given, entropy,
                fit_to_features,
            )  # fmt: skip
    triton = uses_triton(impl, x, dtype)
    grad = torch.is_grad_enabled()
    need_weight = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    need_features = grad and x.requires_grad
    path = _choose_path(
        x, weight, classes is not None, dtype, triton, entropy, need_weight, need_features, memory_budget
    )
    order = sort_by_class(classes, weight.shape[1]) if isinstance(classes, Tensor) else classes
    fit, stats = ops.random_label_loss(
        x, weight, bias, target, [] if order is None else list(order), path, fit_to_features,
        dtype, entropy, need_weight, need_features, memory_budget, triton,
    )  # fmt: skip
    return RandomLabelLoss(fit, stats)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What the products are computed in: autocast's type on a GPU, else the wider of the inputs'.

    On the CPU at least float32, for half precision is many times slower there.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if dtype == torch.float64:
        return dtype
    if x.device.type == "cpu":
        return torch.float32
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else dtype


def _choose_path(
    x: Tensor,
    weight: Tensor,
    by_class: bool,
    dtype: torch.dtype,
    triton: bool,
    entropy: bool,
    need_weight: bool,
    need_features: bool,
    budget: int,
) -> str:
    """One of `ops.PATHS`, from shapes alone."""
    batch, heads, n, dim = len(x), weight.shape[0], weight.shape[-2], weight.shape[-1]
    if triton and n <= TINY_LABELS and batch * heads * n * dim <= TINY_PRODUCT:
        return "tiny"
    if by_class:
        return "grouped" if triton else "by_class"
    in_products = triton and (need_weight or need_features)  # else logits are float32 at least
    row = n * (dtype.itemsize if in_products else max(4, dtype.itemsize))
    if (1 + need_weight + need_features) * batch * heads * row <= budget:
        return "whole"
    can_keep = heads <= FEW_HEADS and not entropy and (need_weight or need_features)
    return "by_rows" if can_keep and budget // row >= min(batch, ENOUGH_ROWS) else "by_columns"


def uses_triton(impl: str, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether an implementation means Triton's kernels for features `x` and products in `dtype`."""
    return impl == "triton" or (impl == "auto" and x.is_cuda and dtype != torch.float64 and HAS_TRITON)


def check_impl(impl: str) -> None:
    """Raise a UserError unless `impl` is one of `IMPLS` and can be had."""
    if impl not in IMPLS:
        raise UserError(f"impl is '{impl}'; expected one of {', '.join(IMPLS)}")
    if impl == "triton" and not HAS_TRITON:
        raise UserError("impl is 'triton', but Triton is not installed; expected pip install triton, or impl 'auto'")


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Tensor | ClassOrder | None,
    memory_budget: int,
    impl: str,
) -> None:
    """Raise a UserError unless the arguments of `random_label_loss` fit together."""
    given = classes.classes if isinstance(classes, ClassOrder) else classes
    dims = "[H, n, D]" if given is None else "[H, C, n, D]"
    if weight.dim() != (3 if given is None else 4):
        raise UserError(f"weight has the shape {[*weight.shape]}; expected {dims}")
    heads, n, dim = weight.shape[0], weight.shape[-2], weight.shape[-1]
    if n < 2:
        raise UserError(f"weight has {n} random label for a head; expected at least 2")
    if tuple(x.shape[1:]) not in ((dim,), (heads, dim)):
        raise UserError(f"x has the shape {[*x.shape]}; expected [B, {dim}] or [B, {heads}, {dim}], as the weight has")
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"target": (target, (len(x), heads))}
    if bias is not None:
        expected["bias"] = (bias, tuple(weight.shape[:-1]))
    if given is not None:
        expected["classes"] = (given, (len(x),))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} has the shape {[*tensor.shape]}; expected {[*shape]}")
        if tensor.device != x.device:
            raise UserError(f"{name} is on {tensor.device}, x on {x.device}; expected one device")
        if name != "bias" and tensor.dtype != torch.int64:
            raise UserError(f"{name} is {tensor.dtype}; expected int64")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise UserError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")
    if weight.device != x.device:
        raise UserError(f"weight is on {weight.device}, x on {x.device}; expected one device")
    check_impl(impl)
    if memory_budget < 1:
        raise UserError(f"memory_budget is {memory_budget}; expected a number of bytes above 0")
    if isinstance(classes, ClassOrder) and len(classes.offsets) != weight.shape[1] + 1:
        raise UserError(f"classes were sorted for {len(classes.offsets) - 1} classes; the weight has {weight.shape[1]}")
    check_range(target, n, "target", "random labels")
    if given is not None:
        check_range(given, weight.shape[1], "classes", "class ids")


def check_range(ids: Tensor, count: int, name: str, what: str) -> None:
    """Raise a UserError unless int64 `ids` lie in [0, count); on a GPU, where the host would wait, nobody looks."""
    if not ids.is_cpu or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = ids.aminmax()
    try:
        # Unlike `if` this asks for no value in Python, as no step may.
        torch._assert_async((low >= 0) & (high < count))  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        wrong = int(low) if low < 0 else int(high)
        raise UserError(f"{name} holds {wrong}; expected {what} in [0, {count})") from None

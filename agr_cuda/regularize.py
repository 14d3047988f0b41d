"""AGR for any optimizer: regularize gradients in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import backends, reference
from .native import native
from .state import check_no_overlap
from .tensors import is_dense, is_plain


def regularize_gradients_(parameters: Tensor | Iterable[Tensor]) -> None:
    r"""Replace the gradient of each parameter by its regularized gradient (arXiv 2407.16944), in place.

    .. math:: g_i \leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right)

    The sum is over one tensor. Call it like torch.nn.utils.clip_grad_norm_, and after that, before another optimizer's
    step; the optimizers of this package do this themselves. An all-zero gradient stays 0; one of one element becomes 0.

    Args:
        parameters: a parameter or an iterable of parameters of any shape. Those without a gradient are skipped.

    Raises:
        RuntimeError: for sparse, expanded or overlapping gradients, before any gradient has changed.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    # Each gradient is regularized once, even if its parameter is given twice.
    gradients = {
        id(p.grad): (p.grad, f"the gradient of parameter {i}") for i, p in enumerate(parameters) if p.grad is not None
    }
    for gradient, _ in gradients.values():
        if gradient.layout != torch.strided:
            raise RuntimeError(f"a gradient is {gradient.layout}; regularize_gradients_ takes dense gradients")
        strides = zip(gradient.shape, gradient.stride(), strict=True)
        if gradient.numel() > 0 and any(size > 1 and stride == 0 for size, stride in strides):
            raise RuntimeError("a gradient is expanded: its elements share memory, so that they cannot be changed")
    on_cpu: list[Tensor] = []
    others: list[Tensor] = []
    dense: list[tuple[Tensor, str, str]] = []
    for gradient, name in gradients.values():
        taken = "cpu" in backends.available_backends() and backends.why_not("cpu", gradient) is None
        (on_cpu if taken and is_dense(gradient) else others).append(gradient)
        if is_plain(gradient) and is_dense(gradient):
            dense.append((gradient, "", name))
    check_no_overlap(dense)
    if on_cpu:
        native().regularize(on_cpu, torch.get_num_threads())
        torch.autograd.graph.increment_version(on_cpu)
    reference.regularize(others)

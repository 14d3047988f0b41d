"""AGR for any optimizer: regularizes gradients in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import backends, reference
from .binding import is_dense
from .native import native


def regularize_gradients_(parameters: Tensor | Iterable[Tensor]) -> None:
    r"""Replace the gradient of each parameter by its regularized gradient, in place, one tensor at a time.

    .. math:: g_i \leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right)

    (arXiv 2407.16944.) Call it like torch.nn.utils.clip_grad_norm_, and after it, before any optimizer's step. The
    optimizers of this package do it within their step. All-zero gradients stay zero; one of one element becomes 0.

    Args:
        parameters: a parameter or an iterable of them. Those without a gradient are passed over.

    Raises:
        RuntimeError: for sparse gradients, before any gradient has changed.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    # Each gradient once, though parameters may be given twice.
    gradients = {id(p.grad): p.grad for p in parameters if p.grad is not None}
    for gradient in gradients.values():
        if gradient.layout != torch.strided:
            raise RuntimeError(f"a gradient is {gradient.layout}; regularize_gradients_ takes dense gradients")
        if any(size > 1 and stride == 0 for size, stride in zip(gradient.shape, gradient.stride(), strict=True)):
            raise RuntimeError("a gradient is expanded: its elements share memory, so that they cannot be changed")
    on_cpu: list[Tensor] = []
    others: list[Tensor] = []
    for gradient in gradients.values():
        taken = "cpu" in backends.available_backends() and backends.why_not("cpu", gradient) is None
        (on_cpu if taken and is_dense(gradient) else others).append(gradient)
    if on_cpu:
        native().regularize(on_cpu, torch.get_num_threads())
        torch.autograd.graph.increment_version(on_cpu)
    reference.regularize(others)

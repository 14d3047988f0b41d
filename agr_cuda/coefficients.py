"""What AGR does to gradients, in numbers to look at during training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sharding import check_whole
from .tensors import is_distributed


class Coefficients(NamedTuple):
    r"""The AGR coefficients $a_i = |g_i| / S$ of one gradient, summed up."""

    abs_sum: float
    r"""$S = \sum_j |g_j|$."""
    largest: float
    r"""$\max_i a_i$: by how much AGR shortens the largest element, from 1/n to 1. The element of a tensor of one has 1,
    and never trains."""
    mean: float
    """$1/n$, the mean over all n elements, since coefficients sum to one; 0 for a gradient of zeros."""
    removed: float
    r"""$\sum_i a_i^2$: the share of the abs-sum that AGR takes away, which is the mean weighted by $|g_i|$. Its inverse
    is the effective number of elements."""


@torch.no_grad()
def coefficients(parameters: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Coefficients]:
    r"""Return how strongly AGR acts on each gradient: abs-sum, largest and mean coefficient of each tensor.

    $$ a_i = |g_i| / S \qquad S = \textstyle\sum_j |g_j| \qquad \psi(g)_i = g_i (1 - a_i) $$

    Call it between `backward()` and `zero_grad()`, as often as a log wants it: it reads all gradients, in a few
    operations for each, and the host waits for their devices. It changes nothing. Gradient scaling and clipping change
    the abs-sum, and none of the coefficients:

        for name, found in agr_cuda.coefficients(model).items():
            writer.add_scalar(f"agr/{name}", found.removed, step)

    Args:
        parameters: a model, or named parameters, or parameters, which are then named by their position: "0", "1", ...
            Sharded ones (DTensor) are taken as whole tensors, so that all processes must call this together.

    Returns:
        A dictionary with a `Coefficients` for each parameter that has a gradient. Those of an all-zero gradient are 0;
        those of a gradient with infinity or NaN are NaN.

    Raises:
        TypeError: for what is no parameter.
        RuntimeError: for a sparse gradient, and for flat parameters of FSDP1, which know of no whole tensors.
    """
    names, counts, numbers = [], [], []
    for name, parameter in _named(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            raise RuntimeError(f"the gradient of {name} is {gradient.layout}; it must be dense (torch.strided)")
        check_whole(name, parameter, "coefficients")
        names.append(name)
        counts.append(gradient.numel())
        numbers.append(_measure(gradient))
    return dict(zip(names, map(_coefficients, counts, _to_host(numbers)), strict=True))


def _named(parameters: Any) -> Iterable[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        return parameters.named_parameters()
    found = []
    for i, item in enumerate([parameters] if isinstance(parameters, Tensor) else parameters):
        name, parameter = item if isinstance(item, tuple) else (str(i), item)
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise TypeError(f"parameter {i} is {item!r}; it must be a tensor, or a pair of a name and a tensor")
        found.append((name, parameter))
    return found


def _measure(gradient: Tensor) -> Tensor:
    """Return the abs-sum, the largest absolute value and the L2 norm."""
    # float16's sums overflow, and so do float32's of squares.
    wide = torch.float32 if gradient.device.type == "mps" else torch.float64
    wide = wide.to_complex() if gradient.is_complex() else wide
    orders = (1, torch.inf, 2) if gradient.numel() else (1, 2, 2)  # nothing has no largest element
    found = [torch.linalg.vector_norm(gradient, order, dtype=wide) for order in orders]
    if is_distributed(gradient):
        found = [x.full_tensor() for x in found]
    return torch.stack(found)


def _to_host(numbers: list[Tensor]) -> list[list[float]]:
    """Return numbers from all devices, by one transfer from each."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(numbers):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    rows: dict[int, list[float]] = {}
    for indices in kinds.values():
        rows |= zip(indices, torch.stack([numbers[i] for i in indices]).tolist(), strict=True)
    return [rows[i] for i in range(len(numbers))]


def _coefficients(count: int, numbers: list[float]) -> Coefficients:
    abs_sum, largest, norm = numbers
    if abs_sum == 0:
        return Coefficients(0.0, 0.0, 0.0, 0.0)
    mean = 1 / count if abs_sum < torch.inf else torch.nan
    return Coefficients(abs_sum, largest / abs_sum, mean, (norm / abs_sum) ** 2)

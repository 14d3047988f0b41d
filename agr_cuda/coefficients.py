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
            Sharded ones (DTensor) are gathered, one after the other, so that all processes must call this together.

    Returns:
        A dictionary with a `Coefficients` for each parameter that has a gradient. Those of an all-zero gradient are 0;
        those of a gradient with infinity or NaN are NaN.

    Raises:
        TypeError: for what is no parameter.
        ValueError: if two parameters have the same name.
        RuntimeError: for a sparse gradient or one on the meta device, and for flat parameters of FSDP1, which know of
            no whole tensors.
    """
    names, counts, numbers = [], [], []
    for name, parameter in _named(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            raise RuntimeError(f"the gradient of {name} is {gradient.layout}; it must be dense (torch.strided)")
        if gradient.is_meta:
            raise RuntimeError(f"the gradient of {name} is on the meta device, and has no elements")
        check_whole(name, parameter, "coefficients")
        if name in names:
            raise ValueError(f"there are two parameters of the name {name!r}")
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
    """Return the largest absolute value, and in units of it, the abs-sum and the L2 norm."""
    if is_distributed(gradient):
        # Whatever its placements. A part may be empty, and has no largest element.
        whole: Any = gradient
        gradient = whole.full_tensor()
    on_mps = gradient.device.type == "mps"
    if gradient.element_size() == 1:
        gradient = gradient.float()  # no operation takes 8-bit floating point
    wide = torch.float32 if on_mps else torch.float64
    magnitude = gradient.abs()
    largest = magnitude.max() if gradient.numel() else magnitude.new_zeros(())
    # Squares, and sums of large numbers, could exceed their type, as well as vanish.
    magnitude = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32)) / torch.where(largest > 0, largest, 1)
    return torch.stack([largest.to(wide), magnitude.sum(dtype=wide), torch.linalg.vector_norm(magnitude, dtype=wide)])


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
    largest, ratio, norm = numbers
    if largest == 0:
        return Coefficients(0.0, 0.0, 0.0, 0.0)
    if not largest < torch.inf:
        return Coefficients(largest, torch.nan, torch.nan, torch.nan)
    return Coefficients(largest * ratio, 1 / ratio, 1 / count, (norm / ratio) ** 2)

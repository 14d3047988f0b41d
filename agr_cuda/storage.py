"""How the reference backend reads and writes a parameter's numbers: masters, codes of 8 bits, rounding at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .quantization import dequantize
from .rounding import random_bits, round_stochastically
from .state import quantized_like
from .tensors import Binding, is_wrapper, state_like

#: The elements that are rounded at a time. Random numbers take dozens of bytes an element while they are made.
_CHUNK = 1 << 20


def read_numbers(binding: Binding) -> list[Tensor]:
    """Return what a step reads: the master, or a parameter without one, and its averages as numbers."""
    averages: Sequence[Tensor] = binding.averages
    if binding.precision.quantized:
        coded = zip(averages, binding.scales, binding.average_specs, strict=True)
        averages = [dequantize(codes, scales, spec.signed) for codes, scales, spec in coded]
    return [binding.parameter if binding.master is None else binding.master, *averages]


def write_numbers(
    binding: Binding, stored: Sequence[Tensor], values: Sequence[Tensor], step: Tensor | float, seed: int
) -> None:
    """Store what a step has computed.

    Args:
        binding: the parameter.
        stored: the tensors that `read_numbers` returned.
        values: their new values, in the type of the arithmetic.
        step: the number of the step, from 1.
        seed: the group's `rounding_seed`.
    """
    for array, (x, value) in enumerate(zip(stored, values, strict=True)):
        if array > 0 and binding.precision.quantized:
            made = quantized_like(binding.parameter, value, binding.average_specs[array - 1])
            for key, new in made.items():
                binding.state[key].copy_(new)
        elif binding.precision.stochastic and x.dtype == torch.bfloat16:
            x.copy_(_rounded(binding, value, array, step, seed))
        else:
            x.copy_(value)
    if binding.master is not None:
        binding.parameter.copy_(binding.master)


def _rounded(binding: Binding, values: Tensor, array: int, step: Tensor | float, seed: int) -> Tensor:
    """Return new values of a parameter or an average, rounded to bfloat16 at random.

    Of a DTensor, each rank rounds the part that it has, as that part of the whole tensor would be rounded.
    """
    # In the arithmetic of a 0-d parameter, options that are float64 tensors have made its values float64.
    flat: list[Any] = [x.reshape(-1) for x in (element_indices(binding.owner), values.float())]
    chunks = [x.split(_CHUNK) for x in flat]
    parts = [
        round_stochastically(x, random_bits(elements, seed=seed, step=step, index=binding.sequence, array=array))
        for elements, x in zip(*chunks, strict=True)
    ]
    return torch.cat(parts).view(values.shape)


def element_indices(parameter: Tensor) -> Tensor:
    """Return the index of every element in the order of memory; of a DTensor's local elements, in the whole tensor."""
    along: list[Any] = []
    for dim, stride in enumerate(state_like(parameter).stride()):
        positions = torch.arange(parameter.shape[dim], device=parameter.device) * stride
        # Expanded without memory, so that cutting a DTensor's part out takes no more than that part.
        along.append(positions.view([-1 if i == dim else 1 for i in range(parameter.dim())]).expand(parameter.shape))
    if is_wrapper(parameter):
        from torch.distributed.tensor import distribute_tensor

        whole: Any = parameter
        cut = [distribute_tensor(x, whole.device_mesh, whole.placements, src_data_rank=None) for x in along]
        along = [x.to_local() for x in cut]
    return sum(along, torch.zeros((), dtype=torch.int64, device=parameter.device))

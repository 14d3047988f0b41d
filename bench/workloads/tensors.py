"""The parameters and gradients that the contenders of a model set share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from bench.workloads.shapes import Shape

SHARED_COPIES = 3  # the parameters and two sets of gradients, in tensors of the model's size

# Standard deviation of the gradients. float16 gets the larger ones of a scaled loss: the square of 1e-3 would
# vanish in its second moments.
GRADIENT_SCALE = {torch.float16: 1.0}
DEFAULT_GRADIENT_SCALE = 1e-3
PARAMETER_SCALE = 0.02


class Workload:
    """Parameters (normal, deviation 0.02) with two sets of gradients (normal, deviation 1e-3) taken in turn.

    Training hands an optimizer new gradients at new addresses at every step, so rounds alternate between two
    sets: nobody gains from having seen a gradient's address the round before, and Adan's gradient difference
    is not zero.
    """

    def __init__(self, shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)
        gradient_scale = GRADIENT_SCALE.get(dtype, DEFAULT_GRADIENT_SCALE)

        shapes = tuple(shapes)

        def normal(scale: float) -> list[torch.Tensor]:
            draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
            return [draw(shape).mul_(scale) for shape in shapes]

        self.parameters = [torch.nn.Parameter(tensor) for tensor in normal(PARAMETER_SCALE)]
        self._gradient_sets = (normal(gradient_scale), normal(gradient_scale))
        self.turn(0)

    def turn(self, number: int) -> None:
        """Give the parameters the gradients of round `number`."""
        self.gradients = self._gradient_sets[number % 2]
        self.lend(self.gradients)

    def lend(self, gradients: list[torch.Tensor]) -> None:
        """Make these the parameters' gradients."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def finite(self) -> bool:
        """Whether every parameter is finite still."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)


class PrivateGradients:
    """Gradients of one contender that writes them: lent before its step, restored and taken back after it.

    Both happen outside the clock. Restoring after every step keeps the values at their size: AGR applied to
    the same gradients over and over would shrink them, by about exp(-steps / elements), down to denormals.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._own = [gradient.clone() for gradient in workload.gradients]

    def lend(self) -> None:
        """Make the private gradients the parameters'."""
        self._workload.lend(self._own)

    def take_back(self) -> None:
        """Restore the private values from the shared gradients, and give the parameters those again."""
        torch._foreach_copy_(self._own, self._workload.gradients)
        self._workload.lend(self._workload.gradients)

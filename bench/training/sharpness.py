"""How sharp a minimum is: the largest eigenvalue of the loss's Hessian, and the loss of perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ITERATIONS = 20
PRECISION = 0.01  # relative change of the eigenvalue at which the iteration ends
DIRECTIONS = 3

Loss = Callable[[], Tensor]


def largest_eigenvalue(loss: Loss, parameters: Sequence[nn.Parameter], seed: int = 0) -> float:
    """Return the Hessian's eigenvalue of the largest magnitude, by power iteration on Hessian-vector products.

    Args:
        loss: computes the loss of the parameters as they are.
        parameters: the Hessian is of all of them together.
        seed: of the first vector.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    eigenvalue = 0.0
    # The other kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
        for _ in range(ITERATIONS):
            norm = torch.linalg.vector_norm(torch.stack([v.norm() for v in vector])).clamp_min(1e-30)
            vector = [v / norm for v in vector]
            product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
            before, eigenvalue = eigenvalue, sum((v * h).sum().item() for v, h in zip(vector, product, strict=True))
            if abs(eigenvalue - before) <= PRECISION * abs(eigenvalue):
                break
            vector = list(product)
    return eigenvalue


@torch.no_grad()
def perturbed_increase(loss: Loss, parameters: Sequence[nn.Parameter], size: float, seed: int = 0) -> float:
    """Return how much the loss increases where every tensor is moved by `size` times its norm, in random directions.

    The mean over DIRECTIONS. Relative to the tensor's norm, since layers before a normalization can be scaled without
    a change of what the model does. The parameters are as before afterwards, to the bit.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [p.detach().clone() for p in parameters]
    here, total = loss().item(), 0.0
    for _ in range(DIRECTIONS):
        for p, k in zip(parameters, kept, strict=True):
            direction = torch.randn(p.shape, generator=generator).to(p)
            p.copy_(k + size * k.norm() * direction / direction.norm())
        total += loss().item() - here
    for p, k in zip(parameters, kept, strict=True):
        p.copy_(k)
    return total / DIRECTIONS

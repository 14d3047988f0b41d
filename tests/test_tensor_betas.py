"""betas given as tensors, of one element and whatever shape, are the numbers that they hold, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Method, all_params, assert_parameters_close, copies, give_gradients, parameters, run, snapshot

import agr_cuda

SHAPES = [(2, 2, 2), (2, 3), (31,)]
BETAS = {"AdamW": (0.8, 0.95), "Adan": (0.9, 0.8, 0.95)}


SHAPES_OF_BETAS = [(), (1,), (1, 1, 1)]
LRS = [0.01, torch.tensor(0.01), torch.tensor([[0.01]])]


def same_as_numbers(
    method: Method, params: list[torch.Tensor], shape: tuple[int, ...], lr: Any, **options: Any
) -> None:
    betas = tuple(torch.full(shape, beta, dtype=torch.float64) for beta in BETAS[method.name])
    optimizer = method.ours(params, lr=lr, betas=betas, **options)
    twin = method.ours(copies(params), lr=0.01, betas=BETAS[method.name], **options)
    run(optimizer, 3)
    run(twin, 3)
    assert_parameters_close(params, all_params(twin))


@pytest.mark.parametrize("shape", SHAPES_OF_BETAS, ids=str)
@pytest.mark.parametrize("lr", LRS, ids=str)
def test_they_are_numbers(shape: tuple[int, ...], lr: Any, method: Method, backend, device, generator) -> None:
    same_as_numbers(method, parameters(generator, SHAPES, device=device), shape, lr, backend=backend)


@pytest.mark.parametrize("shape", SHAPES_OF_BETAS, ids=str)
@pytest.mark.parametrize("lr", LRS, ids=str)
def test_they_are_numbers_of_foreach_operations(shape: tuple[int, ...], lr: Any, method: Method, generator) -> None:
    same_as_numbers(method, parameters(generator, SHAPES), shape, lr, foreach=True)


def test_what_becomes_no_number_is_refused_before_anything_moves(method: Method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    run(optimizer, 1)
    give_gradients(params, generator)
    unchanged = snapshot(optimizer)
    optimizer.param_groups[1]["betas"] = tuple(torch.full((2,), beta) for beta in BETAS[method.name])
    with pytest.raises(ValueError, match=r"betas\[0\] is a tensor of shape \(2,\)"):
        optimizer.step()
    optimizer.param_groups[1]["betas"] = optimizer.param_groups[0]["betas"]
    unchanged()


def test_a_step_is_differentiable_by_them(generator) -> None:
    """Where it is differentiable, as torch.optim.AdamW's is."""
    grads = []
    for cls in (torch.optim.AdamW, agr_cuda.AdamW):
        p = torch.linspace(1.0, 2.0, 5, dtype=torch.float64).requires_grad_()
        betas = tuple(torch.tensor(beta, dtype=torch.float64, requires_grad=True) for beta in (0.8, 0.95))
        moved = p * 1.0
        options = {} if cls is torch.optim.AdamW else {"agr": False}
        optimizer = cls([moved], lr=0.1, betas=betas, differentiable=True, **options)
        for k in range(2):
            moved.grad = (p * (k + 1)).square()
            optimizer.step()
        moved.sum().backward()
        grads.append([p.grad, *(beta.grad for beta in betas)])
    for mine, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)

"""max_grad_norm clips as its model does (clip_grad_norm_ for AdamW, sail-sg's code for Adan), and tells the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import takes
from helpers import ADAMW, Method, all_params, assert_parameters_close, copies, give_gradients, parameters, run
from torch.utils._python_dispatch import TorchDispatchMode

import agr_cuda

SHAPES = [(31,), (8, 6), (0,), (1,)]


def norm_of(params: list[torch.Tensor]) -> float:
    return torch.cat([p.grad.detach().double().cpu().view(-1) for p in params]).norm().item()


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1.0])
def test_adamws_eps_is_not_the_norms(eps: float, backend, device, generator) -> None:
    """A gradient that does not exceed the limit is not changed, whatever eps is."""
    params = parameters(generator, SHAPES[:2], device=device)
    options = {"eps": eps, "backend": backend, "agr": False}
    clipped, plain = ADAMW.ours(params, max_grad_norm=1.01, **options), ADAMW.ours(copies(params), **options)
    for step in range(3):
        for optimizer in (clipped, plain):
            ps = all_params(optimizer)
            give_gradients(ps, torch.Generator().manual_seed(step), step)
            norm = norm_of(ps)
            for p in ps:
                p.grad.div_(norm)
            optimizer.step()
    assert_parameters_close(params, all_params(plain))


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_adamw_clips_as_clip_grad_norm_does(eps: float, backend, device, generator) -> None:
    """Its 1e-6 is seen where the norm is as small."""
    params = parameters(generator, SHAPES[:2], torch.float64, device)
    ours = ADAMW.ours(params, max_grad_norm=1e-7, eps=eps, agr=False, backend=backend)
    theirs = torch.optim.AdamW(copies(params), eps=eps)
    for step in range(3):
        for optimizer in (ours, theirs):
            ps = all_params(optimizer)
            give_gradients(ps, torch.Generator().manual_seed(step), step)
            for p in ps:
                p.grad.mul_(1e-6)
        torch.nn.utils.clip_grad_norm_(all_params(theirs), 1e-7)
        ours.step()
        theirs.step()
    assert_parameters_close(params, all_params(theirs), 1e-9)
    for p, q in zip(params, all_params(theirs), strict=True):
        assert_parameters_close([ours.state[p]["exp_avg"]], [theirs.state[q]["exp_avg"]], 1e-9)


def test_adan_clips_with_its_first_groups_eps(backend, device, generator) -> None:
    params = parameters(generator, SHAPES[:2], torch.float64, device)
    groups = [{"params": params[:1], "eps": 3.0}, {"params": params[1:], "eps": 1e-8}]
    optimizer = agr_cuda.Adan(groups, max_grad_norm=1.0, agr=False, backend=backend)
    give_gradients(params, generator)
    optimizer.step()
    c = 1.0 / (norm_of(params) + 3.0)
    assert_parameters_close([optimizer.state[p]["neg_pre_grad"] for p in params], [-c * p.grad for p in params], 1e-9)


# What it found.


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_the_norm_of_the_last_step_can_be_read(
    max_grad_norm: float, method: Method, backend, float_dtype, device, generator
) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer = method.ours(params, max_grad_norm=max_grad_norm, backend=backend)
    assert optimizer.grad_norm is None
    found = []
    for step in range(3):
        give_gradients(params, generator, step)
        optimizer.step()
        found.append((optimizer.grad_norm, norm_of(params)))
    for norm, expected in found:  # that of a step stays what it was
        assert (norm.dtype, norm.shape, norm.device.type) == (torch.float64, (), device.type)
        assert norm.item() == pytest.approx(expected, rel=1e-6)


def test_there_is_none_without_clipping(method: Method, backend, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES, device=device), max_grad_norm=1.0, backend=backend)
    run(optimizer, 1)
    assert optimizer.grad_norm is not None
    optimizer.max_grad_norm = None
    run(optimizer, 1)
    assert optimizer.grad_norm is None


def test_it_is_the_norm_of_unscaled_gradients(method: Method, backend, device, generator) -> None:
    """With fused=True the scaler leaves them scaled."""
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, max_grad_norm=0.5, backend=backend)
    give_gradients(params, generator)
    expected = norm_of(params)
    for p in params:
        p.grad.mul_(1024.0)
    optimizer.grad_scale = torch.full((), 1024.0, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-6)


def test_it_is_of_all_launches_together(method: Method, device_types, generator) -> None:
    params = [p for dtype in device_types for p in parameters(generator, SHAPES, dtype)]
    params += parameters(generator, [(5,)], torch.complex64)
    optimizer = method.ours(params, max_grad_norm=0.5)
    give_gradients(params, generator)
    optimizer.step()
    squares = sum(p.grad.detach().abs().double().square().sum().item() for p in params)
    assert optimizer.grad_norm.item() == pytest.approx(squares**0.5, rel=1e-6)


@pytest.fixture
def device_types() -> list[torch.dtype]:
    return [d for d in (torch.float32, torch.bfloat16, torch.float64) if takes("cpu", d)]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: asking a tensor for its number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_norm(method: Method, generator) -> None:
    """Of the reference, whose parameters may be anywhere. (Adan's count is a number; AdamW's is on the device.)"""
    optimizer = method.ours(parameters(generator, SHAPES), max_grad_norm=0.5, backend="reference", capturable=True)
    run(optimizer, 1)
    give_gradients(all_params(optimizer), generator)
    with Waits() as waits:
        optimizer.step()
        norm = optimizer.grad_norm
    assert waits.count == 0
    assert norm is not None


def test_the_norm_is_plain_where_gradients_are_differentiable(generator) -> None:
    p = torch.ones(5).requires_grad_()
    moved = p * 1.0
    optimizer = agr_cuda.AdamW([moved], max_grad_norm=0.5, differentiable=True)
    moved.grad = p * 2.0
    optimizer.step()
    assert not optimizer.grad_norm.requires_grad


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(bad: float, method: Method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, max_grad_norm=0.5, backend=backend)
    give_gradients(params, generator)
    params[0].grad[3] = bad
    optimizer.step()
    norm: Any = optimizer.grad_norm
    assert norm.item() == bad or norm.isnan()

"""GradScaler: gradients are unscaled before the norm and psi, and steps with infinities are skipped."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ADAMW,
    Method,
    all_params,
    assert_parameters_close,
    copies,
    give_gradients,
    parameters,
    same_bits,
)

SMALL = [(7,), (64, 33), (31,)]


def scaled_run(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, unscale: bool) -> list[float]:
    """Five steps on scaled gradients, the third with an infinity. Returns the scale before each."""
    scales = []
    for step in range(5):
        give_gradients(all_params(optimizer), torch.Generator().manual_seed(step), step)
        scales.append(scaler.get_scale())
        scaler.scale(torch.ones((), device=all_params(optimizer)[0].device))
        for p in all_params(optimizer):
            p.grad.mul_(scales[-1])
        if step == 2:
            all_params(optimizer)[-1].grad.view(-1)[5] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return scales


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_grad_scaler(unscale: bool, max_grad_norm: float | None, method: Method, backend, device, generator) -> None:
    """A step with an infinity is skipped whole and not counted; the others are as if never scaled."""
    options = {"max_grad_norm": max_grad_norm, "lr": 1e-2, "backend": backend}
    params = parameters(generator, SMALL, device=device)
    scaled, unscaled = method.ours(params, **options), method.ours(copies(params), **options)
    scales = scaled_run(scaled, torch.amp.GradScaler(device.type, init_scale=1024.0), unscale)
    assert scales == [1024.0, 1024.0, 1024.0, 512.0, 512.0]
    for step in (0, 1, 3, 4):
        give_gradients(all_params(unscaled), torch.Generator().manual_seed(step), step)
        unscaled.step()
    assert_parameters_close(all_params(scaled), all_params(unscaled))
    if method is ADAMW:
        assert all(float(scaled.state[p]["step"]) == 4 for p in params)
    else:
        assert int(scaled.param_groups[0]["step"]) == 4


def test_the_first_step_may_be_skipped_by_grad_scaler(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    twins = copies(params)
    optimizer = method.ours(params, backend=backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    for infinite in (True, False):
        give_gradients(params, torch.Generator().manual_seed(0))
        scale = scaler.get_scale()
        scaler.scale(torch.ones((), device=device))
        for p in params:
            p.grad.mul_(scale)
        if infinite:
            params[0].grad[0] = -torch.inf
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))
    other = method.ours(twins, backend=backend)
    give_gradients(twins, torch.Generator().manual_seed(0))
    other.step()
    assert_parameters_close(params, twins)

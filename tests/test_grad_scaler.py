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


def settings(backend: str) -> list[bool]:
    """What `fused` may be: True leaves scale and infinities to the step, and is not for the reference."""
    return [False] if backend == "reference" else [False, True]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_grad_scaler(unscale: bool, max_grad_norm: float | None, method: Method, backend, device, generator) -> None:
    """A step with an infinity is skipped whole and not counted; the others are as if never scaled."""
    for fused in settings(backend):
        options = {"max_grad_norm": max_grad_norm, "lr": 1e-2, "backend": backend, "fused": fused}
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


def test_gradients_may_be_clipped_between_unscaling_and_the_step(method: Method, backend, device, generator) -> None:
    """As Lightning and accelerate do it, with clip_grad_norm_."""
    for fused in settings(backend):
        params = parameters(generator, SMALL, device=device)
        scaled, plain = (method.ours(ps, backend=backend, fused=fused) for ps in (params, copies(params)))
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        for step in range(3):
            give_gradients(params, torch.Generator().manual_seed(step), step)
            give_gradients(all_params(plain), torch.Generator().manual_seed(step), step)
            scaler.scale(torch.ones((), device=device))
            for p in params:
                p.grad.mul_(1024.0)
            scaler.unscale_(scaled)
            for optimizer in (scaled, plain):
                torch.nn.utils.clip_grad_norm_(all_params(optimizer), 0.5)
            scaler.step(scaled)
            scaler.update()
            plain.step()
        assert_parameters_close(params, all_params(plain))


def test_a_skipped_step_is_not_called_unless_it_is_fused(method: Method, backend, device, generator) -> None:
    """Which is how programs learn of it, so as not to move a schedule on."""
    for fused in settings(backend):
        params = parameters(generator, SMALL, device=device)
        optimizer = method.ours(params, backend=backend, fused=fused)
        before = [p.detach().clone() for p in params]
        called: list[int] = []
        step = optimizer.step
        optimizer.step = lambda *args, step=step, called=called, **kw: (called.append(1), step(*args, **kw))[1]
        give_gradients(params, generator)
        params[0].grad[0] = torch.inf
        scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
        scaler.scale(torch.ones((), device=device))
        scaler.step(optimizer)
        scaler.update()
        assert len(called) == fused
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))


def test_gradients_are_left_as_the_scaler_made_them(method: Method, backend, device, generator) -> None:
    """The step writes none: unscaled by the scaler itself, or with fused=True scaled as they were."""
    for fused in settings(backend):
        params = parameters(generator, SMALL, device=device)
        optimizer = method.ours(params, backend=backend, fused=fused)
        give_gradients(params, generator)
        given = [p.grad.clone() for p in params]
        for p in params:
            p.grad.mul_(1024.0)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        scaler.scale(torch.ones((), device=device))
        scaler.step(optimizer)
        for p, g in zip(params, given, strict=True):
            assert same_bits(p.grad, g * 1024.0 if fused else g)


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

"""Where float32 ends: sizes beside which others vanish, squares that overflow, and denormal numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import large_size
from helpers import (
    ADAMW,
    METHODS,
    Method,
    same_bits,
    to_numpy,
)


def step_on(optimizer: torch.optim.Optimizer, p: torch.Tensor, gradient: torch.Tensor) -> None:
    p.grad = gradient.to(p)
    optimizer.step()


# Denormal numbers.


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def flushes(request: pytest.FixtureRequest) -> Iterator[bool]:
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot flush denormals")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_threads_flush_denormals_if_their_caller_does(method: Method, flushes: bool, threads: None) -> None:
    """The same bits with any number of threads, and those of the mode that is set."""
    g = 1e-20 * torch.randn(large_size("cpu") // 4, generator=torch.Generator().manual_seed(1))

    def after_steps(count: int) -> list[torch.Tensor]:
        torch.set_num_threads(count)
        p = torch.zeros_like(g, requires_grad=True)
        optimizer = method.ours([p], lr=1e-2, eps=1e-30, backend="cpu")
        for k in range(2):
            p.grad = g * (k + 1)
            optimizer.step()
        return [p.detach(), *(optimizer.state[p][name] for name in method.states)]

    once = after_steps(1)
    assert once[method.states.index("exp_avg_sq") + 1].any() != flushes  # denormal, all of them
    for count in (2, 4, 1, 4):
        assert all(same_bits(x, y) for x, y in zip(after_steps(count), once, strict=True)), f"{count} threads"


@pytest.mark.parametrize("scale", [1e-30, 3e37])
def test_psi_needs_no_denormal_numbers(scale: float, flushes: bool, generator) -> None:
    """Of large gradients, 1 / S would be one."""
    g = scale * (torch.rand(5, generator=generator) + 0.5)
    p = torch.zeros(5, requires_grad=True)
    p.grad = g
    optimizer = ADAMW.ours([p], betas=(0.0, 0.0), lr=0.0, backend="cpu")
    optimizer.step()
    exact = to_numpy(g) * (1 - np.abs(to_numpy(g)) / np.abs(to_numpy(g)).sum())
    assert to_numpy(optimizer.state[p]["exp_avg"]) == pytest.approx(exact, rel=1e-6, abs=0)


def test_halves_need_no_denormal_numbers(flushes: bool) -> None:
    """The smallest of them are ordinary float32."""
    p = torch.zeros(37, dtype=torch.float16, requires_grad=True)
    optimizer = ADAMW.ours([p], betas=(0.0, 0.0), lr=0.0, agr=False, backend="cpu")
    gradient = torch.arange(37) * 2.0**-24
    step_on(optimizer, p, gradient)
    assert optimizer.state[p]["exp_avg"].equal(gradient.half())

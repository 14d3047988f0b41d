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


# Averages without a memory.


def test_without_memory_the_average_is_the_gradient(method, backend, float_dtype, device) -> None:
    """However large the gradient before it was: their difference knows nothing of the smaller one."""
    p = torch.zeros(5, dtype=float_dtype, device=device, requires_grad=True)
    betas = (0.0,) * (2 if method is ADAMW else 3)
    optimizer = method.ours([p], betas=betas, agr=False, backend=backend)
    small = 2.0**-60 if float_dtype is torch.float64 else 2.0**-20
    for size in (1024.0, small, -1024.0, 3 * small):
        step_on(optimizer, p, torch.full_like(p, size))
        assert optimizer.state[p]["exp_avg"].eq(size).all()


def test_without_memory_every_step_of_adamw_is_lr_long(backend, float_dtype, device) -> None:
    p = torch.zeros(5, dtype=float_dtype, device=device, requires_grad=True)
    options = {"lr": 0.25, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    optimizer = ADAMW.ours([p], agr=False, backend=backend, **options)
    # float16 has to have their squares.
    for k, size in enumerate((100.0, 0.01) if float_dtype is torch.float16 else (1e4, 1e-8)):
        step_on(optimizer, p, torch.full_like(p, size))
        torch.testing.assert_close(p.detach(), torch.full_like(p, -0.25 * (k + 1)), rtol=1e-3, atol=0)


# Squares.


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
def test_a_square_may_be_too_large_where_its_share_is_not(options: dict, method, backend, float_dtype, device) -> None:
    """(1 - b) g^2 can be represented, g^2 cannot; the element trains on when the gradient is ordinary again."""
    if float_dtype is torch.float16:
        pytest.skip("its largest square is no large float32")
    p = torch.zeros(4, dtype=float_dtype, device=device, requires_grad=True)
    # For a second state that holds nothing but this square, and a denominator that is its root.
    betas = (0.9, 0.999) if method is ADAMW else (0.98, 0.92, 0.99)
    chosen = {**options, "backend": None if options else backend}
    optimizer = method.ours([p], lr=0.25, betas=betas, weight_decay=0.0, agr=False, **chosen)
    huge = 2.0**513 if float_dtype is torch.float64 else 2.0**66
    gradient = torch.ones_like(p)
    gradient[2] = -huge
    step_on(optimizer, p, gradient)
    square = optimizer.state[p]["exp_avg_sq"]
    precision = torch.finfo(float_dtype).eps
    assert square[2].item() == pytest.approx((1 - betas[-1]) * huge * huge, rel=max(precision, 1e-6))
    assert p.tolist() == pytest.approx([-0.25, -0.25, 0.25, -0.25], rel=max(precision, 1e-6))
    for _ in range(3):
        step_on(optimizer, p, torch.ones_like(p))
    assert p.isfinite().all()
    assert square.isfinite().all()
    assert square[2] > 0.9 * (1 - betas[-1]) * huge * huge


def test_a_step_whose_parts_are_denormal(method, backend, device) -> None:
    """lr m is denormal, m / D is not: the step has all of its bits."""
    p = torch.zeros(3, device=device, requires_grad=True)
    optimizer = method.ours([p], lr=2e-7, eps=1e-15, weight_decay=0.0, agr=False, backend=backend)
    g = torch.tensor([1e-34, 3e-34, -7e-35], device=device)
    step_on(optimizer, p, g)
    # Nothing is left of the square: eps divides.
    assert to_numpy(p) == pytest.approx(-2e-7 * to_numpy(g) / 1e-15, rel=1e-6, abs=0)


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

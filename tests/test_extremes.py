"""Where float32 ends: sizes beside which others vanish, squares that overflow, and denormal numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import device_of, large_size
from helpers import (
    ADAMW,
    ADAN,
    METHODS,
    Method,
    oracle_for,
    oracle_gradients,
    pairs,
    relative_error,
    same_bits,
    to_numpy,
)

TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64, torch.bfloat16)}

# On a CPU averages that have faded are swept away, by the kernels and by the reference in its two forms.
SWEEPERS: list[dict[str, Any]] = [{"backend": "cpu"}, {"backend": "reference"}, {"foreach": True}]
EVERY = 25  # steps between sweeps


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


@pytest.mark.parametrize("wide", TINY, ids=str)  # float16's largest square is no large float32
@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
def test_a_square_may_be_too_large_where_its_share_is_not(options: dict, wide, method, backend, device) -> None:
    """(1 - b) g^2 can be represented, g^2 cannot; the element trains on when the gradient is ordinary again."""
    p = torch.zeros(4, dtype=wide, device=device, requires_grad=True)
    # For a second state that holds nothing but this square, and a denominator that is its root.
    betas = (0.9, 0.999) if method is ADAMW else (0.98, 0.92, 0.99)
    chosen = {**options, "backend": None if options else backend}
    optimizer = method.ours([p], lr=0.25, betas=betas, weight_decay=0.0, agr=False, **chosen)
    huge = 2.0**513 if wide is torch.float64 else 2.0**66
    gradient = torch.ones_like(p)
    gradient[2] = -huge
    step_on(optimizer, p, gradient)
    square = optimizer.state[p]["exp_avg_sq"]
    precision = torch.finfo(wide).eps
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


FORMS: list[dict[str, Any]] = [{}, {"foreach": True}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_a_quotient_may_be_infinite_where_the_step_is_not(lr: float, form: dict, method, backend, device) -> None:
    """And with a learning rate of 0 nothing moves, whatever it is 0 times of."""
    p = torch.ones(4, device=device, requires_grad=True)
    betas = (0.9, 0.0) if method is ADAMW else (0.9, 0.5, 0.0)
    asked = {**form, "backend": None if form else backend}
    optimizer = method.ours([p], lr=lr, betas=betas, eps=1e-30, weight_decay=0.0, agr=False, **asked)
    for size in (1e10, 0.0, 0.0):  # the third with no difference to the second
        step_on(optimizer, p, torch.full_like(p, size))
    if lr == 0.0:
        assert p.eq(1).all()
    else:
        assert p.isfinite().all()
        assert p.abs().gt(1e35).all()


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_the_average_is_as_accurate_as_torchs(beta1: float, backend, device, generator) -> None:
    """Rounded at the size of the difference, not at its own."""
    p = torch.zeros(2000, device=device, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    ours = ADAMW.ours([p], betas=(beta1, 0.999), agr=False, backend=backend)
    theirs = torch.optim.AdamW([q], betas=(beta1, 0.999))
    exact = np.zeros(2000)
    for _ in range(100):
        g = torch.randn(2000, generator=generator) + 1
        exact = exact + (1 - beta1) * (g.double().numpy() - exact)
        step_on(ours, p, g)
        step_on(theirs, q, g)

    def error(optimizer: Any, parameter: torch.Tensor) -> float:
        return float(np.sqrt(np.mean((to_numpy(optimizer.state[parameter]["exp_avg"]) - exact) ** 2)))

    assert error(ours, p) <= 1.1 * error(theirs, q)


# Denormal numbers.


def at_step(method: Method, state: dict[str, list[float]], t: int, dtype: torch.dtype, **options: Any) -> tuple:
    """A parameter of ones whose next step is step `t`, with this state, and its optimizer."""
    p = torch.ones(len(next(iter(state.values()))), dtype=dtype).requires_grad_()
    optimizer = method.ours([p], agr=False, weight_decay=0.0, **options)
    step_on(optimizer, p, torch.zeros_like(p))
    with torch.no_grad():
        p.fill_(1)
        for name, values in state.items():
            optimizer.state[p][name].copy_(torch.tensor(values, dtype=torch.float64))
    if method is ADAMW:
        optimizer.state[p]["step"].fill_(t - 1)
    else:
        optimizer.param_groups[0]["step"] = t - 1
    return p, optimizer


@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("options", SWEEPERS, ids=str)
@pytest.mark.parametrize(("method", "amsgrad"), [(ADAMW, False), (ADAMW, True), (ADAN, False)], ids=str)
def test_averages_of_a_forgotten_element_end_at_zero(
    method: Method, amsgrad: bool, options: dict, dtype: torch.dtype
) -> None:
    """They would stay at a few units of the smallest number, with which CPUs are slow."""
    if amsgrad:
        options = {**options, "amsgrad": True}
    names = [*method.states[: 3 if method is ADAN else 2], *(["max_exp_avg_sq"] if amsgrad else [])]
    elements = 41  # vectors, and a few elements more
    smallest = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    p, optimizer = at_step(method, {name: [4 * smallest] * elements for name in names}, 1234, dtype, **options)
    for _ in range(EVERY):
        step_on(optimizer, p, torch.zeros_like(p))
    assert all(not optimizer.state[p][name].any() for name in names)
    assert p.eq(1).all()


@pytest.mark.parametrize("options", SWEEPERS, ids=str)
def test_nothing_is_swept_away_that_matters(options: dict, method) -> None:
    t = 100 * EVERY
    tiny = TINY[torch.float32]
    denormal, ordinary = tiny / 4, 1e-20
    # Of the gradient, its average, the average of squares: whether each of these averages stays.
    cases = [
        (0.0, denormal, denormal, False, False),
        (0.0, -denormal, denormal, False, False),
        (0.0, 0.0, denormal, False, False),
        (0.0, denormal, 1.0, False, True),
        (0.0, denormal, math.inf, False, True),
        (0.0, denormal, math.nan, False, True),
        (denormal, denormal, denormal, True, True),  # a gradient that is denormal all the time
        (0.0, ordinary, denormal, True, True),  # it divides
        (0.0, math.nan, denormal, True, True),
        (0.0, math.inf, denormal, True, True),
        (math.nan, denormal, denormal, True, True),
    ]
    gradients, averages, squares, average_stays, square_stays = map(list, zip(*cases, strict=True))
    first, second = "exp_avg", "exp_avg_sq"
    p, optimizer = at_step(method, {first: averages, second: squares}, t, torch.float32, **options)
    step_on(optimizer, p, torch.tensor(gradients))
    state = optimizer.state[p]
    assert state[first].ne(0).tolist() == average_stays
    assert state[second].ne(0).tolist() == square_stays
    # With an eps of which a denormal square has a larger root, it stays: 0 would divide, or next to it.
    for eps in (0.0, 1e-30):
        p, optimizer = at_step(method, {first: averages, second: squares}, t, torch.float32, eps=eps, **options)
        step_on(optimizer, p, torch.tensor(gradients))
        assert optimizer.state[p][first].ne(0).tolist() == average_stays
        assert optimizer.state[p][second].ne(0).all()


@pytest.mark.parametrize("options", SWEEPERS, ids=str)
def test_adan_forgets_differences_apart(options: dict) -> None:
    state = {"exp_avg": [1e-20, 1e-40], "exp_avg_diff": [1e-40, 1e-20], "exp_avg_sq": [1e-40, 1e-40]}
    p, optimizer = at_step(ADAN, state, EVERY, torch.float32, **options)
    step_on(optimizer, p, torch.zeros_like(p))
    assert optimizer.state[p]["exp_avg"].ne(0).tolist() == [True, False]
    assert optimizer.state[p]["exp_avg_diff"].ne(0).tolist() == [False, True]
    assert optimizer.state[p]["exp_avg_sq"].ne(0).all()


@pytest.mark.parametrize("options", SWEEPERS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-15])
def test_a_gradient_that_comes_back_moves_the_parameter_as_ever(size: float, options: dict, method) -> None:
    """After so many zeros that every average was swept away. Beside the equations, which know no smallest number."""
    p = torch.ones(19, requires_grad=True)
    betas = (0.5, 0.6) if method is ADAMW else (0.6, 0.5, 0.7)
    optimizer = method.ours([p], lr=1e-2, betas=betas, weight_decay=0.0, agr=False, **options)
    expected = oracle_for(method, optimizer)
    zeros = 400
    for k in (*range(4), *[None] * zeros, *range(4)):
        step_on(optimizer, p, torch.zeros(19) if k is None else size * (torch.linspace(-1, 1, 19) + 0.3 * k))
        expected.step(oracle_gradients([p]))
        if k is None and optimizer.state[p]["exp_avg"].eq(0).all():
            zeros = 0
    assert zeros == 0, "the averages were never swept away"
    for label, x, y in pairs(optimizer, expected):
        assert relative_error(x, y) <= 1e-6, label


# Where a processor cannot flush them, there is one mode.
@pytest.fixture(params=[False, True] if torch.set_flush_denormal(False) else [False], ids="flushes={}".format)
def flushes(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.set_flush_denormal(request.param)
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


@pytest.mark.parametrize("native", ["cpu", "cuda"])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 5, 4096])
def test_an_abs_sum_may_exceed_float32(native: str, wide: torch.dtype, size: int) -> None:
    p = torch.zeros(size, dtype=wide, device=device_of(native), requires_grad=True)
    optimizer = ADAMW.ours([p], betas=(0.0, 0.0), lr=0.0, backend=native)
    step_on(optimizer, p, torch.full_like(p, 1e38))
    expected = 1e38 * (1 - 1 / size)
    found = to_numpy(optimizer.state[p]["exp_avg"].double())
    assert found == pytest.approx(np.full(size, expected), rel=0.01 if wide is torch.bfloat16 else 1e-6)


def test_halves_need_no_denormal_numbers(flushes: bool) -> None:
    """The smallest of them are ordinary float32."""
    p = torch.zeros(37, dtype=torch.float16, requires_grad=True)
    optimizer = ADAMW.ours([p], betas=(0.0, 0.0), lr=0.0, agr=False, backend="cpu")
    gradient = torch.arange(37) * 2.0**-24
    step_on(optimizer, p, gradient)
    assert optimizer.state[p]["exp_avg"].equal(gradient.half())

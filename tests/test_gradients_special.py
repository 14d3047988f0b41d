"""What psi does to zeros, single elements, infinities, NaN and extreme scales; step() only reads p.grad."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import takes
from helpers import (
    ADAMW,
    SHAPES,
    Method,
    all_params,
    copies,
    give_gradients,
    oracle_for,
    oracle_gradients,
    pairs,
    parameters,
    relative_error,
    run,
    same_bits,
    to_numpy,
)

ONE_ELEMENT = "one|single|1 element"


def regularized(g: torch.Tensor, method: Method, backend: str, **options: Any) -> torch.Tensor:
    """psi(g) as the optimizer computes it: what its first step leaves in a running average, scaled back."""
    p = torch.zeros_like(g).requires_grad_()
    p.grad = g
    zeros = (0.0,) * (2 if method is ADAMW else 3)
    optimizer = method.ours([p], lr=0.0, betas=zeros, backend=backend, **options)
    optimizer.step()
    return optimizer.state[p]["exp_avg"]


# Zero.


@pytest.mark.parametrize("agr", [True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_zero_gradients_leave_parameters_to_weight_decay(
    agr: bool, max_grad_norm: float | None, method, backend, float_dtype, device, generator
) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    before = copies(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    method.ours(params, weight_decay=0.0, agr=agr, max_grad_norm=max_grad_norm, backend=backend).step()
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    decaying = method.ours(params, lr=0.5, weight_decay=0.5, agr=agr, max_grad_norm=max_grad_norm, backend=backend)
    decaying.step()
    kept = 0.75 if method is ADAMW else 1 / 1.25
    for p, q in zip(params, before, strict=True):
        assert relative_error(p, kept * to_numpy(q)) <= torch.finfo(float_dtype).eps
        assert all(not decaying.state[p][key].any() for key in method.states)


def test_a_zero_tensor_among_others_moves_only_by_its_averages(method, backend, device, generator) -> None:
    """A zero gradient is not a missing one: the averages decay and go on moving the parameter."""
    params = parameters(generator, [(31,), (64, 33)], device=device)
    optimizer = method.ours(params, backend=backend)
    expected = oracle_for(method, optimizer)
    for step in range(4):
        give_gradients(params, generator, step)
        if step >= 2:
            params[0].grad.zero_()
        optimizer.step()
        expected.step(oracle_gradients(params))
    for label, x, y in pairs(optimizer, expected):
        assert relative_error(x, y) <= 1e-6, label


# One element.


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("max_grad_norm", [None, 0.01, 1e9])
@pytest.mark.parametrize("value", [3.7, -0.1, 1e-3])
def test_one_element_is_regularized_to_zero(
    value: float, max_grad_norm: float | None, shape: tuple, method, backend, float_dtype, device
) -> None:
    p = torch.full(shape, 0.625, dtype=float_dtype, device=device, requires_grad=True)
    optimizer = method.ours([p], weight_decay=0.0, max_grad_norm=max_grad_norm, backend=backend)
    for scale in (1.0, -3.0, 0.7):
        p.grad = torch.full_like(p, value * scale)
        optimizer.step()
        assert p.item() == 0.625
        assert all(optimizer.state[p][key].item() == 0 for key in method.states)


def warned(optimizer: torch.optim.Optimizer, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, steps)
    return [str(w.message) for w in caught if "agr=False" in str(w.message)]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_element_is_warned_of_once_with_place_and_cure(shape: tuple, method, backend, device, generator) -> None:
    params = parameters(generator, [(7,), (31,), (5, 3), shape], device=device)
    optimizer = method.ours([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    messages = warned(optimizer, 1)
    assert len(messages) == 1
    assert re.search(ONE_ELEMENT, messages[0])
    assert {"1", "2"} <= set(re.findall(r"\d+", messages[0])), "it is parameter 2 of group 1"
    assert warned(optimizer, 3) == []


@pytest.mark.parametrize("groups", [
    [{"shapes": [(), (1,), (7,)], "agr": False}],
    [{"shapes": [(7,), (0,)], "agr": True}, {"shapes": [(1,)], "agr": False}],
])  # fmt: skip
def test_no_warning_where_agr_is_off_or_tensors_are_larger(groups: list, method, backend, device, generator) -> None:
    made = [{"params": parameters(generator, g["shapes"], device=device), "agr": g["agr"]} for g in groups]
    assert warned(method.ours(made, backend=backend), 2) == []


def test_agr_off_lets_one_element_train(method, backend, device) -> None:
    p = torch.ones((), device=device, requires_grad=True)
    optimizer = method.ours([{"params": [p], "agr": False}], lr=0.1, weight_decay=0.0, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == pytest.approx(0.9)


# Scale and sign.


@pytest.mark.parametrize("c", [2.0**-20, 0.5, 3.0, 2.0**20])
def test_psi_is_homogeneous_and_odd(c: float, method, backend, device, generator) -> None:
    g = torch.randn(501, generator=generator).to(device)
    once = regularized(g, method, backend)
    torch.testing.assert_close(regularized(c * g, method, backend), c * once, rtol=2e-6, atol=0)
    assert same_bits(regularized(-g, method, backend), -once)
    assert same_bits(regularized(g, method, backend, maximize=True), -once)


@pytest.mark.parametrize("scale", [1e-42, 1e-39, 1e-37, 1e-30, 1e-20, 1e20, 1e30, 1e35])
def test_psi_holds_to_the_ends_of_the_range(scale: float, method, backend, device, generator) -> None:
    """Also where 1/S would overflow (tiny gradients), as the division |g|/S does not."""
    g = (torch.rand(5, generator=generator) + 0.5).mul(scale).to(device)
    exact = to_numpy(g) * (1 - np.abs(to_numpy(g)) / np.abs(to_numpy(g)).sum())
    unit = max(np.abs(exact).max() * 2e-6, 3e-45)  # a few units in the last place, or two of the smallest subnormal
    assert np.abs(to_numpy(regularized(g, method, backend)) - exact).max() <= unit


def test_psi_of_tiny_and_huge_together(method, backend, device) -> None:
    """One element that is nearly all of S is regularized nearly to zero; the rest hardly at all."""
    g = torch.tensor([1e-3, 1e6, -1e-3, 1.0], device=device)
    exact = to_numpy(g) * (1 - np.abs(to_numpy(g)) / np.abs(to_numpy(g)).sum())
    psi = to_numpy(regularized(g, method, backend))
    np.testing.assert_allclose(psi[[0, 2, 3]], exact[[0, 2, 3]], rtol=1e-6)
    assert abs(psi[1] - exact[1]) <= 1e6 * 1.2e-7


# Infinities and NaN.

SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def kind(x: np.ndarray) -> np.ndarray:
    """0 finite, 1 inf, -1 -inf, 2 NaN."""
    return np.where(np.isnan(x), 2, np.where(np.isinf(x), np.sign(x), 0))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("options", [{}, {"agr": False}, {"maximize": True}, {"extra": True}], ids=str)
@pytest.mark.parametrize("values", [["inf"], ["-inf"], ["nan"], ["inf", "nan"], ["inf", "-inf"]], ids="&".join)
def test_inf_and_nan_spread_as_the_formula_says(
    values: list, options: dict, max_grad_norm: float | None, method, backend, device, generator
) -> None:
    """Through the step that has them and two ordinary ones after it, in every parameter and state."""
    if "extra" in options:
        options = {"amsgrad": True} if method is ADAMW else {"no_prox": True}
    params = parameters(generator, [(7,), (31,), (1,), (1009,)], device=device)
    optimizer = method.ours(params, max_grad_norm=max_grad_norm, backend=backend, **options)
    expected = oracle_for(method, optimizer, max_grad_norm)
    for step in range(4):
        give_gradients(params, generator, step)
        if step == 1:
            for place, value in enumerate(values):
                params[1].grad[5 * place] = SPECIAL[value]
                params[3].grad[500 * place + 7] = SPECIAL[value]
        optimizer.step()
        expected.step(oracle_gradients(params))
        for label, x, y in pairs(optimizer, expected):
            wrong = np.flatnonzero(kind(to_numpy(x)) != kind(y))
            assert wrong.size == 0, f"step {step}, {label}: {to_numpy(x).flat[wrong[0]]} for {y.flat[wrong[0]]}"


@pytest.mark.parametrize("value", SPECIAL)
def test_inf_and_nan_in_the_first_gradient(value: str, method, backend, float_dtype, device, generator) -> None:
    params = parameters(generator, [(31,), (1,), (64, 33)], float_dtype, device)
    optimizer = method.ours(params, eps=1e-3, backend=backend)
    expected = oracle_for(method, optimizer)
    give_gradients(params, generator)
    for p in params:
        p.grad.view(-1)[0] = SPECIAL[value]
    optimizer.step()
    expected.step(oracle_gradients(params))
    for label, x, y in pairs(optimizer, expected):
        assert (kind(to_numpy(x)) == kind(y)).all(), label


def test_one_bad_tensor_without_clipping_spoils_no_other(method, backend, device, generator) -> None:
    params = parameters(generator, [(31,), (64, 33)], device=device)
    optimizer = method.ours(params, backend=backend)
    give_gradients(params, generator)
    params[0].grad[3] = math.nan
    optimizer.step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


# Reading only.


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"foreach": True}, {"capturable": True}], ids=str)
def test_step_never_writes_the_gradients(
    options: dict, max_grad_norm: float | None, method, backend, float_dtype, device, generator
) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    give_gradients(params, generator)
    before = [(p.grad, p.grad.data_ptr(), p.grad._version, p.grad.clone()) for p in params]
    chosen = None if options.get("foreach") else backend
    optimizer = method.ours(params, max_grad_norm=max_grad_norm, backend=chosen, **options)
    optimizer.step()
    optimizer.step()
    for p, (grad, address, version, value) in zip(params, before, strict=True):
        assert p.grad is grad
        assert p.grad.data_ptr() == address
        assert p.grad._version == version
        assert same_bits(p.grad, value)


def test_step_never_writes_complex_gradients(method, generator) -> None:
    params = parameters(generator, [(7,), (64, 33)], torch.complex64)
    give_gradients(params, generator)
    before = [p.grad.clone() for p in params]
    method.ours(params, max_grad_norm=0.01).step()
    assert all(same_bits(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_agr_does_not_vanish_in_16_bits(low: torch.dtype, method, backend, device) -> None:
    """a = 1/100 in each element, so 99/100 of the gradient is left, of which 16-bit sums lose track."""
    assert takes(backend, low)
    g = torch.full((100,), 1.0, dtype=low, device=device)
    assert regularized(g, method, backend).eq(torch.tensor(0.99, dtype=low)).all()


def test_no_gradients_at_all_is_no_step_for_the_parameters(method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, max_grad_norm=1.0, backend=backend)
    before = method.ours(copies(params), backend=backend)
    optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(all_params(optimizer), all_params(before), strict=True))
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("others", [999, 20_479])
def test_what_the_others_leave_to_an_element_that_outweighs_them(others: int, method, backend, device) -> None:
    """1 - |g| / S is their small sum: neither rounding S may lose it, nor adding them to what has the large one.

    The reference, which adds as PyTorch does, in float32, has some of it.
    """
    g = torch.full((others + 1,), 1e-9, device=device)
    g[0] = 1.0
    p = torch.zeros_like(g).requires_grad_()
    p.grad = g
    optimizer = method.ours([p], betas=(0.0, 0.9) if method.name == "AdamW" else (0.0, 0.9, 0.9), backend=backend)
    optimizer.step()
    exact = g.double()
    left = float(exact[1:].sum() / exact.sum())
    assert optimizer.state[p]["exp_avg"][0].item() == pytest.approx(left, rel=0.3 if backend == "reference" else 1e-5)

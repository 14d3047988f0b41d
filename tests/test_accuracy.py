"""After 20 steps, parameters and every state are the float64 oracle's: to 1e-6 in float32, 1e-13 in float64 (for each
tensor max |x - y| / max |y|), and within rounding of the stored type in bfloat16 and float16.

Where an interpreter runs kernels, most options are followed for 5 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import interpreted_by_python, large_size, takes
from helpers import (
    ADAMW,
    ADAN,
    METHODS,
    SHAPES,
    STEPS,
    Method,
    all_params,
    assert_close,
    copies,
    follow,
    give_gradients,
    gradient,
    oracle_for,
    oracle_gradients,
    parameters,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

OPTIONS: list[tuple[Method, dict[str, Any]]] = [
    *((method, options) for method in METHODS for options in (
        {},
        {"agr": False},
        {"maximize": True},
        {"lr": 0.0},
        {"lr": 3e-2},
        {"weight_decay": 0.0},
        {"weight_decay": 0.3},
        {"eps": 1e-3},
        {"eps": 1.0},
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 1e9},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": None},
        {"capturable": True},
    )),
    (ADAMW, {"amsgrad": True}),
    (ADAMW, {"amsgrad": True, "agr": False, "maximize": True}),
    (ADAMW, {"betas": (0.0, 0.999)}),
    (ADAMW, {"betas": (0.0, 0.0)}),
    (ADAMW, {"betas": (0.9, 0.5)}),
    (ADAMW, {"betas": (0.5, 0.95)}),
    (ADAMW, {"amsgrad": True, "max_grad_norm": 1.0, "weight_decay": 0.0}),
    (ADAN, {"no_prox": True}),
    (ADAN, {"no_prox": True, "weight_decay": 0.3}),
    (ADAN, {"weight_decay": 0.3, "agr": False, "maximize": True}),
    (ADAN, {"betas": (0.0, 0.92, 0.99)}),
    (ADAN, {"betas": (0.98, 0.0, 0.99)}),
    (ADAN, {"betas": (0.0, 0.0, 0.0)}),
    (ADAN, {"betas": (0.98, 0.92, 0.5)}),
    (ADAN, {"no_prox": True, "max_grad_norm": 1.0, "weight_decay": 0.02}),
]  # fmt: skip


def name(case: Any) -> str:
    return case.name if isinstance(case, Method) else ",".join(f"{k}={v}" for k, v in case.items()) or "defaults"


def sixteen_bit(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """In 16 bits the default eps, being tiny, lets the update of elements whose squared gradients underflow
    hang on single rounded bits, and a small lr moves nothing. So both are larger unless they are tested."""
    if dtype in (torch.bfloat16, torch.float16):
        return {"lr": 1e-2, "eps": 1e-3, **options}
    return options


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=name)
def test_each_option_in_turn(method: Method, options: dict, backend, float_dtype, device, generator) -> None:
    params = parameters(generator, dtype=float_dtype, device=device)
    optimizer = method.ours(params, backend=backend, **sixteen_bit(options, float_dtype))
    steps = 5 if options and interpreted_by_python(backend) else STEPS
    follow(method, optimizer, generator, options.get("max_grad_norm"), steps)


def test_groups_may_differ_in_everything(method, backend, float_dtype, device, generator) -> None:
    own = [
        {"lr": 1e-2, "weight_decay": 0.1, "agr": False},
        {"eps": 1e-2, "maximize": True},
        {"betas": (0.8, 0.9, 0.95)[: 2 if method is ADAMW else 3], "lr": 2e-3},
        {"amsgrad": True} if method is ADAMW else {"no_prox": True, "weight_decay": 0.05},
    ]
    groups = [{"params": parameters(generator, SHAPES[i:], float_dtype, device), **g} for i, g in enumerate(own)]
    optimizer = method.ours(groups, max_grad_norm=2.0, backend=backend, **sixteen_bit({}, float_dtype))
    follow(method, optimizer, generator, 2.0)


def test_dtypes_may_be_mixed(method, backend, device, generator) -> None:
    kinds = [d for d in (torch.float32, torch.bfloat16, torch.float64, torch.float16) if takes(backend, d)]
    params = [p for dtype in kinds for p in parameters(generator, [(31,), (64, 33), (1009,)], dtype, device)]
    optimizer = method.ours(params, lr=1e-2, eps=1e-3, backend=backend)
    follow(method, optimizer, generator)


def test_complex_parameters(method, device, generator) -> None:
    """psi acts on the complex modulus; afterwards real and imaginary parts are separate numbers."""
    amsgrad = {"amsgrad": True} if method is ADAMW else {}
    groups = [
        {"params": parameters(generator, [(7,), (), (64, 33), (0,)], torch.complex64, device), **amsgrad},
        {"params": parameters(generator, [(5, 3), (31,)], torch.complex128, device), "maximize": True},
        {"params": parameters(generator, [(7,), (1,)], torch.complex128, device), "agr": False},
        {"params": parameters(generator, [(31,)], torch.float32, device)},
    ]
    follow(method, method.ours(groups), generator)


def test_complex_gradients_are_clipped_by_the_norm_of_their_moduli(method, device, generator) -> None:
    params = parameters(generator, [(7,), (64, 33)], torch.complex128, device)
    follow(method, method.ours(params, max_grad_norm=0.7), generator, 0.7)


def test_a_large_tensor_among_small_ones(method, backend, device, generator) -> None:
    params = parameters(generator, [(31,), (large_size(backend),), (64, 33)], device=device)
    follow(method, method.ours(params, backend=backend), generator)


def test_abs_sum_beyond_the_range_of_half(method, backend, device, generator) -> None:
    """In float16 the abs-sum of this tensor, and the sum of its squares, would be infinite."""
    params = parameters(generator, [(150_001,)], torch.float16, device)
    optimizer = method.ours(params, lr=1e-2, eps=1e-3, max_grad_norm=100.0, backend=backend)
    follow(method, optimizer, generator, 100.0, 5 if interpreted_by_python(backend) else STEPS)


def test_first_step_is_large_in_a_constant_gradient(method, backend, float_dtype, device) -> None:
    """By hand: every element of psi is g (1 - 1/n), and divided by its own size it moves p by lr."""
    p = torch.zeros(8, dtype=float_dtype, device=device, requires_grad=True)
    p.grad = torch.full_like(p, 4.0)
    optimizer = method.ours([p], lr=0.25, weight_decay=0.0, eps=0.0, backend=backend)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.25), rtol=1e-6, atol=0)
    kept = (1 - optimizer.defaults["betas"][0]) * 3.5
    expected = torch.full_like(p, kept)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected, rtol=torch.finfo(float_dtype).eps, atol=0)


# Mixtures.

beta = st.floats(0.0, 0.999, allow_subnormal=False)
# Of the squares. Near 0 the denominator would be the last gradient alone, or for Adan a difference that may
# nearly cancel; what is divided by that has no accuracy to speak of, however it is computed.
last_beta = st.floats(0.5, 0.999)


@st.composite
def groups_of(draw: st.DrawFn, method: Method, kinds: list[torch.dtype]) -> list[dict[str, Any]]:
    def group() -> dict[str, Any]:
        options: dict[str, Any] = {
            "lr": draw(st.floats(1e-5, 1e-2)),
            "betas": (*(draw(beta) for _ in range(1 if method is ADAMW else 2)), draw(last_beta)),
            "eps": draw(st.sampled_from([1e-8, 1e-6, 1e-2])),
            "weight_decay": draw(st.sampled_from([0.0, 1e-2, 0.5])),
            "agr": draw(st.booleans()),
            "maximize": draw(st.booleans()),
            "capturable": draw(st.booleans()),
        }
        options["amsgrad" if method is ADAMW else "no_prox"] = draw(st.booleans())
        # Clipping makes the gradients of one element alike, and their difference, which Adan averages, nothing.
        shapes = [s for s in SHAPES[:-1] if options["agr"] or s not in ((), (1,))]
        shapes = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=4))
        return {"shapes": shapes, "dtype": draw(st.sampled_from(kinds)), **options}

    return [group() for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.parametrize("method", METHODS, ids=str)
@settings(
    max_examples=25, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_any_mixture_of_groups(method: Method, backend: str, device: torch.device, data: st.DataObject) -> None:
    kinds = [d for d in (torch.float32, torch.float64) if takes(backend, d)]
    max_grad_norm = data.draw(st.sampled_from([None, 0.1, 3.0, 1e6]))
    if max_grad_norm:  # a norm in part of float32 gradients need be no more exact than those
        kinds = [data.draw(st.sampled_from(kinds))]
    drawn = data.draw(groups_of(method, kinds))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    absent = data.draw(st.sets(st.integers(0, 11), max_size=3))  # of these parameters every second gradient is None
    groups = [dict(g, params=parameters(generator, g.pop("shapes"), g.pop("dtype"), device)) for g in drawn]
    optimizer = method.ours(groups, max_grad_norm=max_grad_norm, backend=backend)
    expected = oracle_for(method, optimizer, max_grad_norm)
    params = all_params(optimizer)
    for step in range(5 if interpreted_by_python(backend) else STEPS):
        for index, p in enumerate(params):
            p.grad = None if index in absent and step % 2 else gradient(p, generator, step)
        optimizer.step()
        expected.step(oracle_gradients(params))
    assert_close(optimizer, expected)


def test_many_small_tensors_and_their_copies_agree(method, backend, device, generator) -> None:
    """A tensor's result does not depend on which others share the step: S is each tensor's own."""
    count = 60 if interpreted_by_python(backend) else 300
    params = parameters(generator, [(1 + k % 67,) for k in range(count)], device=device)
    alone = copies(params)
    together = method.ours(params, backend=backend)
    single = [method.ours([p], backend=backend) for p in alone]
    for step in range(3):
        give_gradients(params, generator, step)
        for p, q, one in zip(params, alone, single, strict=True):
            q.grad = p.grad.clone()
            one.step()
        together.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)

"""regularize_gradients_ turns each p.grad into psi(p.grad), in place: AGR for any other optimizer."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from conftest import COMPLEX, FLOATS
from helpers import (
    SHAPES,
    assert_parameters_close,
    copies,
    give_gradients,
    parameters,
    relative_error,
    same_bits,
    to_numpy,
)

import agr_cuda
from agr_cuda import regularize_gradients_

TOLERANCE = {
    torch.float32: 2e-7, torch.complex64: 3e-7, torch.float64: 1e-15, torch.complex128: 1e-15,
}  # fmt: skip


def assert_regularized(p: torch.Tensor, before: torch.Tensor) -> None:
    exact = oracle.psi(to_numpy(before))
    if before.dtype in TOLERANCE:
        assert relative_error(p.grad, oracle.as_real(exact)) <= TOLERANCE[before.dtype]
    else:
        rounded = oracle.round_to(exact, str(before.dtype)[6:])
        off = to_numpy(p.grad) != rounded
        assert off.mean() <= 0.01 if off.size >= 100 else off.sum() <= 1
        np.testing.assert_allclose(to_numpy(p.grad), rounded, rtol=torch.finfo(before.dtype).eps, atol=6e-8)


def test_gradients_that_share_memory_are_refused_by_name(generator) -> None:
    """Two threads would regularize it at once."""
    params = parameters(generator, [(600,), (5,), (401,)])
    memory = torch.randn(1000, generator=generator)
    params[0].grad, params[1].grad, params[2].grad = memory[:600], torch.ones(5), memory[599:]
    before = memory.clone()
    with pytest.raises(RuntimeError, match="the gradient of parameter 0 and the gradient of parameter 2 share memory"):
        regularize_gradients_(params)
    assert same_bits(memory, before)
    assert same_bits(params[1].grad, torch.ones(5))
    params[2].grad = None
    params[2].data = params[2].data[1:]
    params[2].grad = memory[600:]  # a neighbour
    regularize_gradients_(params)
    assert relative_error(params[2].grad, oracle.psi(to_numpy(before[600:]))) <= 2e-7


@pytest.mark.parametrize("kind", FLOATS + COMPLEX, ids=str)
def test_it_is_psi_of_each_tensor(kind: torch.dtype, generator) -> None:
    params = parameters(generator, [s for s in SHAPES if s != (0,)], kind)
    give_gradients(params, generator)
    before = [p.grad.clone() for p in params]
    regularize_gradients_(params)
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_abs_sum_is_taken_in_float32(low: torch.dtype, generator) -> None:
    """300,000 elements of about 50: their abs-sum is beyond float16, and stops growing in bfloat16."""
    p = torch.zeros(300_000, dtype=low, requires_grad=True)
    p.grad = torch.randn(300_000, generator=generator).mul(50).to(low)
    p.grad[0] = 60_000.0
    before = p.grad.clone()
    regularize_gradients_(p)
    assert_regularized(p, before)
    assert p.grad[0] < 60_000.0


def test_in_place(generator) -> None:
    params = parameters(generator)
    values = copies(params)
    give_gradients(params, generator)
    before = [(p.grad, p.grad.data_ptr()) for p in params]
    regularize_gradients_(params)
    for p, (grad, address), value in zip(params, before, values, strict=True):
        assert p.grad is grad
        assert p.grad.data_ptr() == address
        assert same_bits(p, value), "the parameter itself is left alone"


def test_takes_a_tensor_a_list_or_a_generator(generator) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    for given in (model.parameters, lambda: list(model.parameters()), lambda: tuple(model.parameters())):
        give_gradients(model.parameters(), generator)
        before = [p.grad.clone() for p in model.parameters()]
        regularize_gradients_(given())
        for p, g in zip(model.parameters(), before, strict=True):
            assert_regularized(p, g)
    weight = model[0].weight
    give_gradients([weight], generator)
    before = weight.grad.clone()
    regularize_gradients_(weight)
    assert_regularized(weight, before)


def test_each_tensor_has_its_own_sum(generator) -> None:
    params = parameters(generator, [(7,), (31,), (64, 33)])
    give_gradients(params, generator)
    alone = copies(params)
    for p, q in zip(params, alone, strict=True):
        q.grad = p.grad.clone()
        regularize_gradients_(q)
    regularize_gradients_(params)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(params, alone, strict=True))


def test_parameters_without_gradients_are_passed_over(generator) -> None:
    params = parameters(generator, [(7,), (31,), (5,)])
    params[0].grad = torch.ones(7)
    params[2].grad = torch.zeros(5)
    regularize_gradients_(params)
    assert params[1].grad is None
    torch.testing.assert_close(params[0].grad, torch.full((7,), 6 / 7))
    assert not params[2].grad.any(), "S = 0 gives 0"
    regularize_gradients_([])
    regularize_gradients_(params[1])


def test_a_parameter_given_twice_is_regularized_once(generator) -> None:
    params = parameters(generator, [(7,), (31,)])
    give_gradients(params, generator)
    before = [p.grad.clone() for p in params]
    regularize_gradients_([params[0], params[1], params[0]])
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g)


def test_layouts(generator) -> None:
    """The gaps between the elements of a gradient that is not dense are left alone."""
    image = torch.zeros(2, 3, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    image.grad = torch.randn(2, 3, 5, 4, generator=generator).to(memory_format=torch.channels_last)
    turned = torch.zeros(6, 9, requires_grad=True)
    turned.grad = torch.randn(9, 6, generator=generator).t()
    storage = torch.randn(10, 12, generator=generator)
    surroundings = storage.clone()
    cut = torch.zeros(10, 4, requires_grad=True)
    cut.grad = storage[:, 1::3]
    params = [image, turned, cut]
    before = [p.grad.clone() for p in params]
    strides = [p.grad.stride() for p in params]
    regularize_gradients_(params)
    for p, g, stride in zip(params, before, strides, strict=True):
        assert_regularized(p, g)
        assert p.grad.stride() == stride
    surroundings[:, 1::3] = cut.grad
    assert torch.equal(storage, surroundings)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_sparse_gradients_are_refused_before_any_is_written(place: int, generator) -> None:
    params = parameters(generator, [(7,), (31,), (5, 3)])
    give_gradients(params, generator)
    params[place].grad = params[place].grad.to_sparse()
    before = [p.grad.to_dense().clone() for p in params]
    with pytest.raises(RuntimeError, match="sparse"):
        regularize_gradients_(params)
    assert all(torch.equal(p.grad.to_dense(), g) for p, g in zip(params, before, strict=True))


def test_a_generator_with_a_sparse_gradient_at_its_end(generator) -> None:
    params = parameters(generator, [(7,), (31,)])
    give_gradients(params, generator)
    params[-1].grad = params[-1].grad.to_sparse()
    before = params[0].grad.clone()
    with pytest.raises(RuntimeError, match="sparse"):
        regularize_gradients_(p for p in params)
    assert torch.equal(params[0].grad, before)


def test_inf_and_nan_spread(generator) -> None:
    inf, nan = (torch.zeros(5, requires_grad=True) for _ in range(2))
    inf.grad = torch.tensor([1.0, torch.inf, -2.0, 0.0, 3.0])
    nan.grad = torch.tensor([1.0, torch.nan, -2.0, 0.0, 3.0])
    regularize_gradients_([inf, nan])
    expected = torch.tensor([1.0, torch.nan, -2.0, 0.0, 3.0])
    torch.testing.assert_close(inf.grad, expected, equal_nan=True, rtol=0, atol=0)
    assert nan.grad.isnan().all()


def test_no_graph_is_recorded(generator) -> None:
    p = torch.ones(5, requires_grad=True)
    (p**3).sum().backward(create_graph=True)
    p.grad = p.grad.detach()
    regularize_gradients_(p)
    assert p.grad.grad_fn is None
    assert not p.grad.requires_grad


def test_then_torchs_fused_adamw_is_ours(backend, device, generator) -> None:
    params = parameters(generator, device=device)
    other = copies(params)
    ours = agr_cuda.AdamW(params, lr=1e-2, backend=backend)
    theirs = torch.optim.AdamW(other, lr=1e-2, fused=True)
    for step in range(10):
        give_gradients(params, generator, step)
        for p, q in zip(params, other, strict=True):
            q.grad = p.grad.clone()
        regularize_gradients_(other)
        ours.step()
        theirs.step()
    assert_parameters_close(params, other, 2e-6)


def test_with_sgd(generator) -> None:
    p = torch.zeros(4, requires_grad=True)
    p.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    regularize_gradients_(p)
    torch.optim.SGD([p], lr=1.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.9, 1.6, -2.1, 2.4]))

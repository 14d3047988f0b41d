"""regularize_gradients_ turns each p.grad into psi(p.grad), in place: AGR for any other optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import COMPLEX, FLOATS, device_of, dtypes_of, large_size
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


def assert_regularized(p: torch.Tensor, before: torch.Tensor, factor: float = 1.0) -> None:
    exact = oracle.psi(factor * to_numpy(before))
    if before.dtype in TOLERANCE:
        assert relative_error(p.grad, oracle.as_real(exact)) <= TOLERANCE[before.dtype]
    else:
        rounded = oracle.round_to(exact, str(before.dtype)[6:])
        off = to_numpy(p.grad) != rounded
        if off.size > 0:
            assert off.mean() <= 0.02 if off.size >= 100 else off.sum() <= 1
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
    params = parameters(generator, SHAPES, kind)
    give_gradients(params, generator)
    before = [p.grad.clone() for p in params]
    assert regularize_gradients_(params) is None
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g)


def all_of(backend: str, generator: torch.Generator, device: torch.device, shapes: Any = SHAPES) -> list[torch.Tensor]:
    """Parameters of all types that a backend takes, mixed, with gradients."""
    params = [p for kind in dtypes_of(backend) for p in parameters(generator, shapes, kind, device)]
    params = params[::2] + params[1::2]
    give_gradients(params, generator)
    return params


def test_every_backend_and_type_in_one_call(backend, device, generator) -> None:
    params = all_of(backend, generator, device)
    before = [p.grad.clone() for p in params]
    regularize_gradients_(params, backend=backend)
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g)


@pytest.mark.parametrize("offset", [1, 3])
def test_gradients_anywhere_in_memory(offset: int, backend, device, generator) -> None:
    """Kernels access 16 bytes at a time where addresses allow it, and must see where they do not."""
    for kind in (torch.float32, torch.bfloat16):
        sizes = [1, 2, 33, 1000, 2051]
        memory = torch.randn(sum(sizes) + 8, generator=generator).to(device=device, dtype=kind)
        surroundings = memory.clone()
        params, at = [], offset
        for size in sizes:
            params.append(torch.zeros(size, dtype=kind, device=device, requires_grad=True))
            params[-1].grad = memory[at : at + size]
            at += size
        regularize_gradients_(params, backend=backend)
        for p in params:
            begin = p.grad.storage_offset()
            assert_regularized(p, surroundings[begin : begin + p.numel()])
        assert same_bits(memory[:offset], surroundings[:offset])
        assert same_bits(memory[at:], surroundings[at:])


def test_of_many_chunks(backend, device, generator) -> None:
    params = parameters(generator, [(large_size(backend),), (5,)], device=device)
    give_gradients(params, generator)
    before = [p.grad.clone() for p in params]
    norm = regularize_gradients_(params, max_norm=torch.inf, backend=backend)
    assert float(norm) == pytest.approx(exact_norm(before), rel=1e-6)
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g)


@pytest.mark.parametrize("max_norm", [None, 0.5], ids=str)
def test_the_bits_are_those_of_the_optimizers(max_norm: float | None, backend, float_dtype, device, generator) -> None:
    """With a beta1 of 0, the first average is the gradient that AdamW makes of p.grad."""
    params = parameters(generator, [*SHAPES, (40_000,)], float_dtype, device)
    give_gradients(params, generator)
    other = copies(params)
    for p, q in zip(params, other, strict=True):
        q.grad = p.grad.clone()
    optimizer = agr_cuda.AdamW(other, betas=(0.0, 0.999), max_grad_norm=max_norm, backend=backend)
    optimizer.step()
    norm = regularize_gradients_(params, max_norm=max_norm, backend=backend)
    for p, q in zip(params, other, strict=True):
        assert same_bits(p.grad, optimizer.state[q]["exp_avg"])
    if max_norm is not None:
        assert same_bits(norm, optimizer.grad_norm.to(device))


# Clipping.


def exact_norm(gradients: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.abs(to_numpy(g)) ** 2) for g in gradients)))


def clipped(norm: float, max_norm: float) -> float:
    return min(1.0, max_norm / (norm + 1e-6))


@pytest.mark.parametrize("max_norm", [0.3, 1e6, 0.0, torch.inf])
def test_clipping(max_norm: float, backend, device, generator) -> None:
    """By one norm of all gradients, of whatever type, taken before AGR."""
    params = all_of(backend, generator, device, [(7,), (64, 33), (), (0,)])
    params.insert(2, torch.ones(3, device=device, requires_grad=True))  # has no gradient
    before = [p.grad.clone() for p in params if p.grad is not None]
    norm = regularize_gradients_(params, max_norm=max_norm, backend=backend)
    exact = exact_norm(before)
    assert (norm.shape, norm.dtype, norm.device) == ((), torch.float64, params[0].grad.device)
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    for p, g in zip([p for p in params if p.grad is not None], before, strict=True):
        assert_regularized(p, g, clipped(float(norm), max_norm))


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_clipping_within_one_launch(max_norm: float, backend, dtype, device, generator) -> None:
    params = parameters(generator, SHAPES, dtype, device)
    for step in range(3):
        give_gradients(params, generator, step)
        before = [p.grad.clone() for p in params]
        norm = regularize_gradients_(params, max_norm=max_norm, backend=backend)
        exact = exact_norm(before)
        assert float(norm) == pytest.approx(exact, rel=1e-6)
        for p, g in zip(params, before, strict=True):
            assert_regularized(p, g, clipped(float(norm), max_norm))


def test_the_norm_is_that_of_clip_grad_norm(generator) -> None:
    params = parameters(generator)
    give_gradients(params, generator)
    expected = torch.nn.utils.get_total_norm([p.grad for p in params])
    assert float(regularize_gradients_(params, max_norm=1.0)) == pytest.approx(float(expected), rel=1e-6)


def test_a_norm_is_returned_anew(backend, device, generator) -> None:
    """A program may keep those of many calls."""
    params = parameters(generator, [(64, 33), (7,)], device=device)
    kept, exact = [], []
    for step in range(3):
        give_gradients(params, generator, step)
        exact.append(exact_norm([p.grad for p in params]))
        kept.append(regularize_gradients_(params, max_norm=1.0, backend=backend))
    assert [float(norm) for norm in kept] == pytest.approx(exact, rel=1e-6)


def test_the_norm_of_nothing() -> None:
    p = torch.ones(3, requires_grad=True)
    for params in ([], [p], p):
        norm = regularize_gradients_(params, max_norm=1.0)
        assert (float(norm), norm.dtype, norm.shape) == (0.0, torch.float64, ())
        assert regularize_gradients_(params) is None


def test_clipping_gradients_of_every_kind_at_once(generator) -> None:
    """Some are regularized by native code, the others by operations."""
    whole, double, turned, pairs = parameters(generator, [(31,), (64, 33), (6, 9), (5,)])
    give_gradients([whole, turned], generator)
    double = double.detach().double().requires_grad_()
    double.grad = torch.randn(64, 66, dtype=torch.float64, generator=generator)[:, ::2]  # with gaps
    pairs = pairs.detach().to(torch.complex64).requires_grad_()
    pairs.grad = torch.complex(*torch.randn(2, 5, generator=generator))
    params = [pairs, whole, double, turned]
    before = [p.grad.clone() for p in params]
    norm = regularize_gradients_(params, max_norm=0.5)
    assert float(norm) == pytest.approx(exact_norm(before), rel=1e-6)
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g, clipped(float(norm), 0.5))


def test_a_norm_that_is_not_finite(backend, device) -> None:
    for value in (torch.inf, torch.nan):
        p = torch.zeros(3, device=device, requires_grad=True)
        p.grad = torch.tensor([1.0, value, 2.0], device=device)
        norm = regularize_gradients_(p, max_norm=1.0, backend=backend)
        assert same_bits(norm.abs(), torch.tensor(value, dtype=torch.float64))
        assert p.grad[1].isnan()


# Mixed precision.


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_gradient_scale(as_tensor: bool, max_norm: float | None, backend, device, generator) -> None:
    params = all_of(backend, generator, device, [(7,), (64, 33), ()])
    before = [p.grad.clone() for p in params]
    scale = torch.full((1,), 8.0, device=device) if as_tensor else 8
    norm = regularize_gradients_(params, max_norm=max_norm, grad_scale=scale, backend=backend)
    factor = 1.0
    if max_norm is not None:
        assert float(norm) == pytest.approx(exact_norm(before) / 8, rel=1e-6)
        factor = clipped(float(norm), max_norm)
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g, factor / 8)


@pytest.mark.parametrize("max_norm", [None, 0.5], ids=str)
def test_where_infinities_were_found_nothing_changes(max_norm: float | None, backend, device, generator) -> None:
    params = all_of(backend, generator, device, [(7,), (64, 33), ()])
    before = [p.grad.clone() for p in params]
    for flag in (torch.ones((), device=device), torch.tensor([True], device=device)):
        norm = regularize_gradients_(params, max_norm=max_norm, found_inf=flag, backend=backend)
        assert all(same_bits(p.grad, g) for p, g in zip(params, before, strict=True))
        assert norm is None if max_norm is None else norm.isnan() and norm.shape == ()
    norm = regularize_gradients_(params, max_norm=max_norm, found_inf=torch.zeros((), device=device), backend=backend)
    factor = 1.0 if max_norm is None else clipped(float(norm), max_norm)
    for p, g in zip(params, before, strict=True):
        assert_regularized(p, g, factor)
    assert norm is None or float(norm) == pytest.approx(exact_norm(before), rel=1e-6)


@pytest.mark.parametrize("overflows", [False, True])
def test_with_torchs_grad_scaler(overflows: bool, generator) -> None:
    """As it is documented: unscale first, as for clip_grad_norm_."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    before = p.detach().clone()
    optimizer = torch.optim.SGD([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    target = torch.tensor([1.0, 2.0, torch.inf if overflows else -3.0])
    scaler.scale((p * target).sum()).backward()
    scaler.unscale_(optimizer)
    norm = regularize_gradients_([p], max_norm=2.0)
    scaler.step(optimizer)
    scaler.update()
    if overflows:
        assert same_bits(p.detach(), before)
        assert scaler.get_scale() == 2.0
    else:
        exact = oracle.psi(to_numpy(target) * clipped(14**0.5, 2.0))
        np.testing.assert_allclose(to_numpy(before - p), exact, rtol=1e-6)
        assert float(norm) == pytest.approx(14**0.5)


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_norm": -1.0}, ValueError, "max_norm is -1.0; it must be at least 0"),
        ({"max_norm": float("nan")}, ValueError, "max_norm is nan; it must be at least 0"),
        ({"max_norm": "1"}, TypeError, "max_norm is '1'; it must be a number"),
        ({"max_norm": True}, TypeError, "max_norm is True; it must be a number"),
        ({"max_norm": torch.ones(2)}, ValueError, r"max_norm is a tensor of shape \(2,\); it must have 1 element"),
        ({"grad_scale": 0.0}, ValueError, "grad_scale is 0.0; it must be greater than 0"),
        ({"grad_scale": -2}, ValueError, "grad_scale is -2; it must be greater than 0"),
        ({"grad_scale": "2"}, TypeError, "grad_scale is '2'; it must be a number"),
        ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale is a tensor of shape \(2,\); it must have 1 element"),
        ({"found_inf": True}, TypeError, "found_inf is True; it must be a tensor of one element or None"),
        ({"found_inf": torch.ones(0)}, ValueError, r"found_inf is a tensor of shape \(0,\); it must have 1 element"),
        ({"found_inf": torch.ones(1) * 1j}, TypeError, "found_inf is a torch.complex64 tensor; it must be real"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; it must be None or one of "),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    with pytest.raises(error, match=message):
        regularize_gradients_([p], **options)
    assert p.grad.eq(1).all()


@pytest.mark.parametrize("choosy", [b for b in agr_cuda.available_backends() if b != "reference"])
def test_a_backend_that_does_not_take_a_gradient(choosy: str, generator) -> None:
    device = device_of(choosy)
    params = parameters(generator, [(7,), (6, 9)], device=device)
    give_gradients(params, generator)
    params[1].grad = torch.randn(6, 18, generator=generator).to(device)[:, ::2]
    before = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match=f"backend='{choosy}' does not take the gradient of parameter 1: "):
        regularize_gradients_(params, backend=choosy)
    assert all(same_bits(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_abs_sum_is_taken_in_float32(low: torch.dtype, backend, device, generator) -> None:
    """100,000 elements of about 50 or more: their abs-sum is beyond float16, and stops growing in bfloat16."""
    count = min(300_000, large_size(backend))
    p = torch.zeros(count, dtype=low, device=device, requires_grad=True)
    p.grad = torch.randn(count, generator=generator).mul(50).to(device=device, dtype=low)
    p.grad[0] = 60_000.0
    before = p.grad.clone()
    regularize_gradients_(p, backend=backend)
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


def test_inf_and_nan_spread(backend, device) -> None:
    inf, nan = (torch.zeros(5, device=device, requires_grad=True) for _ in range(2))
    inf.grad = torch.tensor([1.0, torch.inf, -2.0, 0.0, 3.0], device=device)
    nan.grad = torch.tensor([1.0, torch.nan, -2.0, 0.0, 3.0], device=device)
    regularize_gradients_([inf, nan], backend=backend)
    expected = torch.tensor([1.0, torch.nan, -2.0, 0.0, 3.0], device=device)
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

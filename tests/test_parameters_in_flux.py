"""Parameters as models treat them between steps: laid out, moved, resized, frozen, cast, shared, wrapped."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from helpers import (
    ADAMW,
    SHAPES,
    all_params,
    assert_close,
    assert_parameters_close,
    assert_same_bits,
    copies,
    give_gradients,
    gradient,
    oracle_for,
    oracle_gradients,
    parameters,
    run,
    same_bits,
    snapshot,
)
from torch import Tensor

import agr_cuda

SMALL = [(7,), (64, 33), (31,)]


# Layouts.


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 3).contiguous().transpose(0, 3)


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), 7.0, dtype=x.dtype, device=x.device)
    wide[..., 1::3] = x
    return wide[..., 1::3]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


LAYOUTS = [contiguous, channels_last, transposed, sliced]


@pytest.mark.parametrize("of_g", [*LAYOUTS, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_p", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_parameter_and_gradient(of_p: Any, of_g: Any, method, backend, device, generator) -> None:
    """Whatever the strides, element i of the gradient meets element i of the parameter.

    A backend need not take a parameter with gaps; backend=None then finds one that does.
    """
    p = of_p(torch.randn(4, 3, 5, 6, generator=generator).to(device)).requires_grad_()
    strides = p.stride()
    optimizer = method.ours([p], backend=None if of_p is sliced else backend)
    expected = oracle_for(method, optimizer)
    for of_this in (of_g, contiguous, of_g):
        p.grad = of_this(torch.randn(4, 3, 5, 6, generator=generator).to(device))
        optimizer.step()
        expected.step(oracle_gradients([p]))
    assert_close(optimizer, expected)
    assert p.stride() == strides


def test_the_gaps_of_a_sliced_parameter_are_left_alone(method, device, generator) -> None:
    whole = torch.randn(6, 8, generator=generator).to(device)
    before = whole.clone()
    p = whole[1:5, ::2].requires_grad_()
    run(method.ours([p], lr=0.1), 3)
    assert not torch.equal(whole[1:5, ::2], before[1:5, ::2])
    whole[1:5, ::2] = before[1:5, ::2]
    assert torch.equal(whole, before)


def test_a_backend_takes_a_sliced_parameter_or_refuses_it_unharmed(method, backend, device, generator) -> None:
    """Asked for by name, it hands the parameter to no other: it steps rightly, or refuses and changes nothing."""
    dense = parameters(generator, [(7,)], device=device)[0]
    whole = torch.randn(6, 8, generator=generator).to(device)
    p = whole[:, ::2].requires_grad_()
    optimizer = method.ours([dense, p], backend=backend)
    expected = oracle_for(method, optimizer)
    give_gradients([dense, p], generator)
    unchanged = snapshot(optimizer)
    try:
        optimizer.step()
    except RuntimeError:
        unchanged()
    else:
        expected.step(oracle_gradients([dense, p]))
        assert_close(optimizer, expected)


def test_an_expanded_parameter_is_refused_as_torch_refuses_it(method, backend, device, generator) -> None:
    """Its elements share memory, so there is no value that each could have."""
    good = parameters(generator, [(7,)], device=device)[0]
    shared = torch.ones(1, device=device).expand(5).requires_grad_()
    optimizer = method.ours([good, shared], backend=backend)
    give_gradients([good, shared], generator)
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError):
        optimizer.step()
    unchanged()


def test_states_may_have_another_layout_than_their_parameter(method, backend, device, generator) -> None:
    """A checkpoint may hold contiguous states of a parameter that is channels_last."""
    p = channels_last(torch.randn(4, 3, 5, 6, generator=generator).to(device)).requires_grad_()
    optimizer, plain = method.ours([p], backend=backend), method.ours(copies([p]), backend=backend)
    run(optimizer, 2)
    run(plain, 2)
    for key in method.states:
        optimizer.state[p][key] = optimizer.state[p][key].contiguous()
    run(optimizer, range(2, 4))
    run(plain, range(2, 4))
    assert_parameters_close([p], all_params(plain))


# Gradients that come and go, memory that moves.


def test_gradients_appear_and_vanish(method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, max_grad_norm=2.0, backend=backend)
    expected = oracle_for(method, optimizer, 2.0)
    for step in range(12):
        for index, p in enumerate(params):
            p.grad = gradient(p, generator, step) if (step + index) % 3 else None
        optimizer.step()
        expected.step(oracle_gradients(params))
    assert_close(optimizer, expected)


def test_memory_may_move_between_steps(method, backend, device, generator) -> None:
    """p.data = ... points the parameter elsewhere; the states stay, and the old memory is left alone."""
    params = parameters(generator, SMALL, device=device)
    optimizer, still = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    left_behind = []
    for step in range(5):
        for p in params:
            old = p.data
            p.data = old.clone()
            left_behind.append((old, old.clone()))
        run(optimizer, [step])
        run(still, [step])
    assert_same_bits(optimizer, still)
    assert all(torch.equal(old, value) for old, value in left_behind)


def test_states_may_be_replaced_between_steps(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    optimizer, still = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    for step in range(4):
        run(optimizer, [step])
        run(still, [step])
        for p in params:
            for key in method.states:
                optimizer.state[p][key] = optimizer.state[p][key].clone()
    assert_same_bits(optimizer, still)


def test_a_state_dict_loaded_between_steps_takes_effect(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, backend=backend)
    run(optimizer, 2)
    other = method.ours(copies(params), lr=0.05, backend=backend)
    run(other, 3, seed=9)
    with torch.no_grad():
        for p, q in zip(params, all_params(other), strict=True):
            p.copy_(q)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    run(other, range(3, 6))
    run(optimizer, range(3, 6))
    assert_same_bits(optimizer, other)


def test_a_parameter_resized_before_its_first_step(method, backend, device, generator) -> None:
    p = torch.zeros(3, device=device, requires_grad=True)
    optimizer = method.ours([p], backend=backend)
    p.data = torch.ones(4, 5, device=device)
    expected = oracle_for(method, optimizer)
    for step in range(2):
        p.grad = gradient(p, generator, step)
        optimizer.step()
        expected.step(oracle_gradients([p]))
    assert_close(optimizer, expected)


def test_a_parameter_resized_with_its_state_cleared(method, backend, device, generator) -> None:
    p, q = parameters(generator, [(31,), (7,)], device=device)
    optimizer = method.ours([{"params": [p]}, {"params": [q]}], backend=backend)
    run(optimizer, 2)
    p.data = torch.ones(40, device=device)
    del optimizer.state[p]
    run(optimizer, 1)
    assert all(optimizer.state[p][key].shape == (40,) for key in method.states)
    assert method is not ADAMW or float(optimizer.state[p]["step"]) == 1


# Frozen, cast and shared.


def test_frozen_parameters_stay(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    params[1].requires_grad_(False)
    before = params[1].clone()
    optimizer = method.ours(params, backend=backend)
    for step in range(3):
        for p in (params[0], params[2]):
            p.grad = gradient(p, generator, step)
        optimizer.step()
    assert same_bits(params[1], before)
    assert not optimizer.state.get(params[1])


def test_requires_grad_toggled_as_in_torch(backend, device, generator) -> None:
    """torch steps whatever has a gradient, frozen since or not."""
    params = parameters(generator, SMALL, device=device)
    ours = agr_cuda.AdamW(params, agr=False, backend=backend)
    theirs = torch.optim.AdamW(copies(params))
    for step in range(6):
        for optimizer in (ours, theirs):
            all_params(optimizer)[1].requires_grad_(step % 2 == 0)
            run(optimizer, [step])
    assert_parameters_close(params, all_params(theirs))


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_model_cast_after_the_optimizer_was_made(to: torch.dtype, method, backend, device) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Linear(10, 3)).to(device)
    optimizer = method.ours(model.parameters(), lr=1e-2, eps=1e-3, backend=backend)
    model.to(to)
    expected = oracle_for(method, optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        give_gradients(model.parameters(), generator, step)
        optimizer.step()
        expected.step(oracle_gradients(model.parameters()))
    assert_close(optimizer, expected)
    assert all(optimizer.state[p][key].dtype == to for p in model.parameters() for key in method.states)


class Wrapped(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("kind", ["Parameter", "subclass", "parameter of a subclass", "buffer-like"])
def test_tensor_subclasses(kind: str, method, backend, device, generator) -> None:
    value = torch.randn(64, 33, generator=generator).to(device)
    p = {
        "Parameter": lambda: torch.nn.Parameter(value.clone()),
        "subclass": lambda: value.clone().as_subclass(Wrapped).requires_grad_(),
        "parameter of a subclass": lambda: torch.nn.Parameter(value.clone().as_subclass(Wrapped)),
        "buffer-like": lambda: torch.nn.Buffer(value.clone()),
    }[kind]()
    wrapped, plain = method.ours([p], backend=backend), method.ours([value.requires_grad_()], backend=backend)
    run(wrapped, 3)
    run(plain, 3)
    assert_same_bits(wrapped, plain)


def test_two_optimizers_in_two_threads(method, backend, device, generator) -> None:
    made = [method.ours(parameters(generator, SHAPES, device=device), backend=backend) for _ in range(2)]
    alone = [method.ours(copies(all_params(optimizer)), backend=backend) for optimizer in made]
    for seed, optimizer in enumerate(alone):
        run(optimizer, 15, seed=seed)
    failures: list[BaseException] = []

    def work(optimizer: torch.optim.Optimizer, seed: int) -> None:
        try:
            run(optimizer, 15, seed=seed)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(optimizer, seed)) for seed, optimizer in enumerate(made)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for together, before in zip(made, alone, strict=True):
        assert_same_bits(together, before)


def test_a_model_learns(method, backend, device) -> None:
    """The whole of it: a small regression is fitted."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)).to(device)
    x = torch.randn(128, 8, device=device)
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], dim=1)
    optimizer = method.ours(model.parameters(), lr=1e-2, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(150):
        optimizer.step(closure)
    assert closure().item() < 0.05 * first

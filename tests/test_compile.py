"""torch.compile of a function that steps: one graph break, and nothing of the optimizer's is traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Method, all_params, assert_same_bits, copies, give_gradients, parameters
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import agr_cuda

SHAPES = [(31,), (8, 6), (5,)]


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def stepping(optimizer: torch.optim.Optimizer, scale: torch.Tensor, counter: CompileCounter) -> Any:
    """A compiled function with something to compile before the step and after it."""

    def train(x: torch.Tensor) -> torch.Tensor:
        y = x * scale
        optimizer.step()
        return y + 1

    return torch.compile(train, backend=counter)


@pytest.mark.parametrize("count", [1, 30])
def test_it_breaks_the_graph_once_however_many_tensors_there_are(count: int, method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, [(7,)] * count))
    give_gradients(all_params(optimizer), generator)
    counter = CompileCounter()
    stepping(optimizer, torch.ones(3), counter)(torch.ones(3))
    assert counter.frame_count == 2  # before and after
    assert sum(counters["graph_break"].values()) == 1
    assert counters["frames"]["total"] == 2


def test_nothing_is_compiled_again(method: Method, backend, device, generator) -> None:
    """When gradients, the step count or numbers change, come or go; and the result is the same as without."""
    params = parameters(generator, SHAPES, device=device)
    compiled, plain = (method.ours(ps, backend=backend) for ps in (params, copies(params)))
    counter = CompileCounter()
    train = stepping(compiled, torch.ones(3), counter)
    frames = []
    for step in range(6):
        for optimizer in (compiled, plain):
            give_gradients(all_params(optimizer), torch.Generator().manual_seed(step), step)
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            if step == 3:
                all_params(optimizer)[1].grad = None
        train(torch.ones(3))
        plain.step()
        frames.append(counter.frame_count)
    assert frames == [2] * 6
    assert_same_bits(compiled, plain)


def test_a_scheduler_and_hooks_do_not_change_that(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES))
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    counter = CompileCounter()
    train = stepping(optimizer, torch.ones(3), counter)
    for step in range(3):
        give_gradients(all_params(optimizer), generator, step)
        train(torch.ones(3))
        scheduler.step()
    assert len(called) == 3
    first = counter.frame_count
    train(torch.ones(3))
    assert counter.frame_count == first


def test_regularizing_gradients_is_passed_by(generator) -> None:
    """One graph break in the function that calls it, and one in itself; nothing of what it calls is traced."""
    params = parameters(generator, [(7,)] * 30)
    give_gradients(params, generator)
    agr_cuda.regularize_gradients_(params)

    def train(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        agr_cuda.regularize_gradients_(params, max_norm=1.0)
        return y + 1

    counter = CompileCounter()
    compiled = torch.compile(train, backend=counter)
    for _ in range(3):
        give_gradients(params, generator)
        compiled(torch.ones(3))
        assert counter.frame_count == 2  # before and after
        assert sum(counters["graph_break"].values()) == 2
        assert counters["frames"]["total"] <= 4

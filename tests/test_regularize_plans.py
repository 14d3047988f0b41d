"""What regularize_gradients_ keeps from call to call: launches, for whichever gradients there are, and nothing else."""

from __future__ import annotations

import threading
import weakref

import oracle
import pytest
import torch
from conftest import device_of
from helpers import (
    assert_child_ends_well,
    copies,
    give_gradients,
    gradient,
    parameters,
    relative_error,
    same_bits,
    to_numpy,
)
from test_cuda_launches import Operations
from torch import Tensor

import agr_cuda
from agr_cuda import gradient_plan, launch, plan_cache, regularize, regularize_gradients_

SMALL = [(7,), (64, 33), (31,), (), (0,)]
ON_DEVICES = [b for b in ("cuda", "triton") if b in agr_cuda.available_backends()]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> plan_cache.PlanCache:
    """A cache of its own for each test."""
    own = plan_cache.PlanCache()
    monkeypatch.setattr(regularize, "_cache", own)
    return own


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[gradient_plan.GradientPlan]:
    """Every plan that is made during the test."""
    plans = []

    class Noted(gradient_plan.GradientPlan):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            plans.append(self)

    monkeypatch.setattr(regularize, "GradientPlan", Noted)
    return plans


def alone(params: list[Tensor], backend: str, max_norm: float | None = None) -> list[Tensor | None]:
    """The gradients as a plan made for exactly them leaves them."""
    twins = copies(params)
    for p, q in zip(params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    regularize_gradients_(twins, max_norm=max_norm, backend=backend)
    return [q.grad for q in twins]


def assert_as_alone(params: list[Tensor], backend: str, max_norm: float | None = None) -> None:
    expected = alone(params, backend, max_norm)
    regularize_gradients_(params, max_norm=max_norm, backend=backend)
    for p, g in zip(params, expected, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or same_bits(p.grad, g)


# Plans that fit.


def test_new_gradients_need_no_new_plan(backend, device, made, generator) -> None:
    """Not even transposed ones, nor those of another shape: numbers of elements are what counts."""
    params = parameters(generator, SMALL, device=device)
    for step in range(3):
        give_gradients(params, generator, step)
        if step == 2:
            params[1].grad = torch.randn(33, 64, generator=generator).to(device).t()
        regularize_gradients_(params, backend=backend)
    assert len(made) == 1


def test_gradients_come_and_go(backend, device, made, generator) -> None:
    params = parameters(generator, [*SMALL, (100,)], device=device)
    patterns = [(0, 1), (2, 3), (0, 1), (1, 3), (0, 1, 2, 3, 4, 5), (1, 5), (), (0, 4), (0, 1, 2, 3, 4, 5)]
    for max_norm in (None, 0.5):
        made.clear()
        for step, pattern in enumerate(patterns):
            for i, p in enumerate(params):
                p.grad = gradient(p, generator, step) if i in pattern else None
            assert_as_alone(params, backend, max_norm)
        # Besides the plans of twins, one for each of: (0, 1), with (2, 3), and with 4 and 5.
        assert len(made) == len(patterns) + 3


@pytest.mark.parametrize("change", ["size", "type", "layout", "class", "negative"])
def test_gradients_that_no_longer_fit(change: str, backend, device, generator) -> None:
    params = parameters(generator, [(7,), (64, 33), (31,)], device=device)
    give_gradients(params, generator)
    regularize_gradients_(params, backend=backend)
    give_gradients(params, generator, 1)
    p = params[1]
    if change == "size":
        p.data = p.data[:9]
        p.grad = torch.randn(9, 33, generator=generator).to(device)
    elif change == "type":
        p.data = p.data.double()
        p.grad = torch.randn(64, 33, generator=generator).to(device).double()
    elif change == "class":
        p.grad = torch.nn.Parameter(p.grad)
    elif change == "layout":
        p.grad = torch.randn(64, 99, generator=generator).to(device)[:, ::3]
    else:
        p.grad = torch._neg_view(p.grad)
    if change in ("layout", "negative") and backend != "reference":
        before = [q.grad.clone() for q in params]
        with pytest.raises(RuntimeError, match="does not take the gradient of parameter 1"):
            regularize_gradients_(params, backend=backend)
        assert all(torch.equal(q.grad, g) for q, g in zip(params, before, strict=True))
        backend = None
    before = [q.grad.clone() for q in params]
    regularize_gradients_(params, backend=backend)
    for q, g in zip(params, before, strict=True):
        bound = 1e-15 if g.dtype == torch.float64 else 2e-7
        assert relative_error(q.grad, oracle.psi(to_numpy(g))) <= bound
    give_gradients(params, generator, 2)
    assert_as_alone(params, backend)


def test_errors_of_a_call_that_had_a_plan(backend, device, generator) -> None:
    params = parameters(generator, [(7,), (64, 33), (31,)], device=device)
    give_gradients(params, generator)
    regularize_gradients_(params, backend=backend)
    memory = torch.randn(37, generator=generator).to(device)
    wrong = {
        "share memory": [(0, memory[:7]), (2, memory[6:])],
        "torch.sparse_coo": [(1, torch.ones(64, 33, device=device).to_sparse())],
        "expanded": [(1, torch.ones(33, device=device).expand(64, 33))],
    }
    for message, gradients in wrong.items():
        give_gradients(params, generator)
        for i, g in gradients:
            params[i].grad = g
        before = [p.grad.to_dense().clone() for p in params]
        with pytest.raises(RuntimeError, match=message):
            regularize_gradients_(params, backend=backend)
        assert all(torch.equal(p.grad.to_dense(), g) for p, g in zip(params, before, strict=True))
    give_gradients(params, generator)
    assert_as_alone(params, backend)


def test_a_gradient_that_two_parameters_share_is_regularized_once(backend, device, made, generator) -> None:
    params = parameters(generator, [(7,), (7,), (5,)], device=device)
    for step in range(3):
        give_gradients(params, generator, step)
        expected = alone(params[1:], backend)
        params[0].grad = params[1].grad
        made.clear()
        regularize_gradients_(params, backend=backend)
        assert len(made) == (step == 0)
        assert [same_bits(p.grad, g) for p, g in zip(params[1:], expected, strict=True)] == [True, True]
    give_gradients(params, generator)  # no longer
    assert_as_alone(params, backend)
    params[2].grad, params[1].grad = None, None
    assert_as_alone(params, backend)


# What is kept.


def test_neither_parameters_nor_gradients_are_kept_alive(backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    give_gradients(params, generator)
    params.append(torch.zeros(3, dtype=torch.complex64, device=device, requires_grad=True))
    params[-1].grad = torch.ones_like(params[-1])
    regularize_gradients_(params, max_norm=1.0, backend=None if backend != "reference" else backend)
    regularize_gradients_(params[:-1], max_norm=1.0, backend=backend)
    watched = [weakref.ref(x) for p in params for x in (p, p.grad)]
    del params
    assert [x() for x in watched] == [None] * len(watched)


def test_tensors_can_be_swapped_afterwards(backend, device, generator) -> None:
    """torch.utils.swap_tensors refuses tensors to which anything has a weak reference."""
    params = parameters(generator, [(7,), (7,)], device=device)
    give_gradients(params, generator)
    regularize_gradients_(params, backend=backend)
    one, other = (p.grad for p in params)
    params[0].grad = params[1].grad = None
    torch.utils.swap_tensors(params[0], params[1])
    torch.utils.swap_tensors(one, other)
    params[0].grad, params[1].grad = one, other
    assert_as_alone(params, backend)


def test_the_cache_is_bounded(cache, monkeypatch, made, generator) -> None:
    monkeypatch.setattr(plan_cache, "MAX_TENSORS", 10)
    models = [parameters(generator, [(5,)] * 4) for _ in range(4)]
    for params in (*models, models[3], models[2], models[0]):
        give_gradients(params, generator)
        assert_as = alone(params, "cpu")
        regularize_gradients_(params)
        assert all(same_bits(p.grad, g) for p, g in zip(params, assert_as, strict=True))
        assert cache._tensors == sum(plan.tensors for plan in cache._plans.values()) <= 10
    large = parameters(generator, [(5,)] * 11)
    give_gradients(large, generator)
    regularize_gradients_(large)
    assert [plan.tensors for plan in cache._plans.values()] == [11]


@pytest.mark.parametrize("on_device", ON_DEVICES)
def test_memory_on_devices_is_bounded(on_device: str, cache, monkeypatch, generator) -> None:
    models = [parameters(generator, [(50,)] * 4, device=device_of(on_device)) for _ in range(4)]
    for params in models:
        give_gradients(params, generator)
        regularize_gradients_(params, backend=on_device)
    (one, *_) = cache._plans.values()
    assert one.device_bytes > 0
    assert cache._device_bytes == 4 * one.device_bytes
    monkeypatch.setattr(plan_cache, "MAX_DEVICE_BYTES", int(2.5 * one.device_bytes))
    last = parameters(generator, [(50,)] * 4, device=device_of(on_device))
    give_gradients(last, generator)
    regularize_gradients_(last, backend=on_device)
    assert (len(cache._plans), cache._device_bytes) == (2, 2 * one.device_bytes)


def test_version_counters_are_raised(backend, device, generator) -> None:
    """Autograd then notices that what a backward pass needs was overwritten."""
    params = parameters(generator, [(7,), (31,)], device=device)
    for _ in range(2):
        give_gradients(params, generator)
        before = [p._version for p in params]
        regularize_gradients_(params, backend=backend)
        assert all(p.grad._version > 0 for p in params)
        assert [p._version for p in params] == before
    p = params[0]
    p.grad = (p**2).sum().mul(1).detach().expand(7).clone().requires_grad_()
    out = (p.grad**2).sum()
    regularize_gradients_(p, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# Threads and processes.


@pytest.mark.parametrize("shared", [False, True])
def test_threads_at_once(shared: bool, backend, device, threads, monkeypatch, generator) -> None:
    """Each with a plan of its own or, as if their parameters had the same identities, all with one."""
    torch.set_num_threads(2)
    models = [parameters(generator, [(7,), (64, 33), (4097,)], device=device) for _ in range(4)]
    drawn = [[[gradient(p, generator, step) for p in params] for step in range(4)] for params in models]
    expected = []
    for params, steps in zip(models, drawn, strict=True):
        for grads in steps:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            expected.append(alone(params, backend, 0.5))
    results: dict[tuple[int, int], list[Tensor]] = {}
    begin = threading.Barrier(len(models))

    def work(number: int) -> None:
        begin.wait()
        for step, grads in enumerate(drawn[number]):
            params = models[number]
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            regularize_gradients_(params, max_norm=0.5, backend=backend)
            results[number, step] = [p.grad for p in params]

    if shared:
        monkeypatch.setattr(regularize, "id", lambda tensor: 0, raising=False)
    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for (number, step), grads in results.items():
        for g, other in zip(grads, expected[len(drawn[0]) * number + step], strict=True):
            assert same_bits(g, other)
    assert len(results) == 16


@pytest.mark.parametrize("on_cpu", ["cpu", "reference"])  # no GPU's context outlives a fork
def test_a_child_forked_in_the_midst_of_a_call(on_cpu: str, cache, generator) -> None:
    params = parameters(generator, [(64, 33), (31,)])
    give_gradients(params, generator)
    regularize_gradients_(params, backend=on_cpu)
    (plan,) = cache._plans.values()
    assert_child_ends_well([plan.lock, cache._lock], regularize_again, params, on_cpu)


def regularize_again(params: list[Tensor], backend: str) -> None:
    torch.set_num_threads(1)  # PyTorch's own threads are not there any more
    give_gradients(params, torch.Generator().manual_seed(3))
    assert_as_alone(params, backend)


# Graphs. Without a GPU, a launch is told that it is captured.


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list whose element says whether a graph is captured."""
    now = [False]
    monkeypatch.setattr(launch.DeviceLaunch, "capturing", lambda self: now[0])
    monkeypatch.setattr(gradient_plan, "capturing_on", lambda device: now[0])
    return now


@pytest.mark.parametrize("on_device", ON_DEVICES)
def test_a_captured_launch_is_the_graphs_alone(on_device: str, capture, cache, made, generator) -> None:
    params = parameters(generator, SMALL, device=device_of(on_device))
    give_gradients(params, generator)
    capture[0] = True
    before = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match="call it once before, outside of the capture"):
        regularize_gradients_(params, backend=on_device)
    assert all(same_bits(p.grad, g) for p, g in zip(params, before, strict=True))

    def call(captured: bool, max_norm: float | None = None) -> list[gradient_plan.GradientPlan]:
        """Call it, and return the plans made for that."""
        capture[0] = False
        give_gradients(params, generator)
        expected = alone(params, on_device, max_norm)
        made.clear()
        capture[0] = captured
        regularize_gradients_(params, max_norm=max_norm, backend=on_device)
        capture[0] = False
        assert all(same_bits(p.grad, g) for p, g in zip(params, expected, strict=True))
        return list(made)

    (warm,) = call(False)
    assert call(True) == []
    assert warm.captured
    assert warm not in cache._plans.values()
    assert call(True) == [], "a graph may have several calls, and there may be several graphs"
    (eager,) = call(False)
    assert not eager.captured
    assert call(False) == call(True) == []
    assert not eager.captured
    with pytest.raises(RuntimeError, match="call it once before"):
        call(True, max_norm=1.0)  # of another plan
    capture[0] = False
    call(False, max_norm=1.0)
    assert call(True, max_norm=1.0) == []
    assert warm in cache._captured.values()
    assert len(cache._captured) == 2


@pytest.mark.parametrize("on_device", ON_DEVICES)
def test_a_launch_that_another_thread_captures_meanwhile_is_left_to_its_graph(
    on_device: str, cache, made, generator
) -> None:
    params = parameters(generator, SMALL, device=device_of(on_device))
    give_gradients(params, generator)
    regularize_gradients_(params, backend=on_device)
    made[0].captured = True  # after an ordinary call has found it, and before it has got the lock
    give_gradients(params, generator)
    regularize_gradients_(params, backend=on_device)
    assert len(made) == 2
    assert list(cache._plans.values()) == made[1:]


@pytest.mark.parametrize("on_device", ON_DEVICES)
def test_a_captured_launch_that_no_longer_fits_stays(on_device: str, capture, cache, generator) -> None:
    """Its graph may still be replayed."""
    params = parameters(generator, [(5,), (6,)], device=device_of(on_device))
    plans = []
    for missing in (True, False):
        give_gradients(params, generator)
        params[1].grad = None if missing else params[1].grad
        regularize_gradients_(params, backend=on_device)
        capture[0] = True
        regularize_gradients_(params, backend=on_device)
        capture[0] = False
        plans += [plan for plan in cache._captured.values() if plan not in plans]
    assert len(plans) == 2
    assert cache._outdated == plans[:1]
    assert list(cache._captured.values()) == plans[1:]


# Launches.


def test_a_call_is_one_launch_and_nothing_else(generator) -> None:
    device = device_of("cuda")
    flags = {"grad_scale": torch.full((), 8.0, device=device), "found_inf": torch.zeros((), device=device)}
    for count, uploads in ((20, 0), (1000, 2)):
        params = parameters(generator, [(3 + i % 60,) for i in range(count)], device=device)
        for options in ({}, flags):
            give_gradients(params, generator)
            regularize_gradients_(params, backend="cuda", **options)
            (launched,) = regularize._cache.get((False, "cuda", *map(id, params)))[0]._device_launches
            for new_gradients in (False, True):
                if new_gradients:
                    give_gradients(params, generator)
                before = launched._executor.launches
                with Operations() as operations:
                    regularize_gradients_(params, backend="cuda", **options)
                after = launched._executor.launches
                assert operations.names == []
                assert (after[0] - before[0], after[1] - before[1]) == (1, uploads * new_gradients)
    norm = regularize_gradients_(params, backend="cuda", max_norm=1.0)
    (launched,) = regularize._cache.get((True, "cuda", *map(id, params)))[0]._device_launches
    before = launched._executor.launches
    with Operations() as operations:
        norm = regularize_gradients_(params, backend="cuda", max_norm=1.0)
    assert norm.isfinite()
    assert operations.names == ["aten.sqrt.default"]
    assert launched._executor.launches[0] - before[0] == 1

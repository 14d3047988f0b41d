"""What users of torch.optim expect of any optimizer: closures, hooks, schedulers, groups, copies."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import numpy as np
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
    oracle_for,
    oracle_gradients,
    oracle_parameter,
    parameters,
    run,
    same_bits,
)
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import agr_cuda

SMALL = [(7,), (64, 33), (31,)]


def signature(function: Any) -> dict[str, tuple[Any, bool]]:
    """Of each argument: its default, and whether it may be given by place."""
    arguments = list(inspect.signature(function).parameters.items())[1:]
    return {name: (p.default, p.kind is p.POSITIONAL_OR_KEYWORD) for name, p in arguments}


def test_arguments_and_their_defaults() -> None:
    adamw, adan = signature(agr_cuda.AdamW), signature(agr_cuda.Adan)
    precision = {
        "state_dtype": (None, False), "master_weights": (False, False), "stochastic_rounding": (False, False),
        "rounding_seed": (0, False),
    }  # fmt: skip
    assert adamw == precision | {
        "lr": (1e-3, True), "betas": ((0.9, 0.999), True), "eps": (1e-8, True), "weight_decay": (1e-2, True),
        "amsgrad": (False, True), "agr": (True, False), "max_grad_norm": (None, False),
        "maximize": (False, False), "foreach": (None, False), "capturable": (False, False),
        "differentiable": (False, False), "fused": (None, False), "backend": (None, False),
    }  # fmt: skip
    assert adan == precision | {
        "lr": (1e-3, True), "betas": ((0.98, 0.92, 0.99), True), "eps": (1e-8, True),
        "weight_decay": (0.0, True), "max_grad_norm": (0.0, True), "no_prox": (False, True),
        "foreach": (None, True), "fused": (None, True), "agr": (True, False), "maximize": (False, False),
        "capturable": (False, False), "backend": (None, False),
    }  # fmt: skip
    assert list(adamw)[:5] == ["lr", "betas", "eps", "weight_decay", "amsgrad"]
    assert list(adan)[:8] == [
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "max_grad_norm",
        "no_prox",
        "foreach",
        "fused",
    ]


def test_it_is_an_optimizer(method, generator) -> None:
    optimizer = method.ours(parameters(generator, SMALL))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert method.name in repr(optimizer)
    give_gradients(all_params(optimizer), generator)
    assert optimizer.step() is None
    optimizer.zero_grad()
    assert all(p.grad is None for p in all_params(optimizer))


def test_backends_are_named_with_the_preferred_first() -> None:
    names = agr_cuda.available_backends()
    assert isinstance(names, list)
    assert names[-1] == "reference"
    assert len(set(names)) == len(names)
    assert set(names) <= {"cuda", "triton", "cpu", "reference"}


def test_a_closure_is_called_once_with_gradients_on(method, backend, device) -> None:
    p = torch.tensor([3.0, -1.0, 2.0], device=device, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer = method.ours([p], backend=backend)
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == 14.0
    other = method.ours([q], backend=backend)
    q.grad = 2 * q.detach()
    other.step()
    assert same_bits(p, q)


def test_hooks_run_around_the_step(method, backend, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SMALL, device=device), backend=backend)
    seen: list[tuple[str, Tensor]] = []
    first = all_params(optimizer)[0]
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", first.detach().clone())))
    handle = optimizer.register_step_post_hook(lambda *_: seen.append(("after", first.detach().clone())))
    run(optimizer, 1)
    assert [name for name, _ in seen] == ["before", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[1][1], first)
    handle.remove()
    run(optimizer, 1)
    assert len(seen) == 3


def test_a_subclass_with_a_step_of_its_own_has_hooks_once(method, generator) -> None:
    class Own(method.ours):
        def step(self, closure=None):
            return super().step(closure)

    seen = []
    optimizer = Own(parameters(generator, SMALL))
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(optimizer, 2)
    assert seen == ["before", "after"] * 2


def test_a_wrapped_step_has_hooks_once(method, generator, monkeypatch) -> None:
    """Where functools.wraps has copied the mark by which torch.optim.Optimizer knows a step that has its hooks."""

    class Own(method.ours):
        @functools.wraps(method.ours.step)
        def step(self, closure=None):
            return super().step(closure)

    seen: list[str] = []
    optimizer = Own(parameters(generator, SMALL))
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    run(optimizer, 1)
    assert seen == ["before"]

    original = method.ours.step
    timed = functools.wraps(original)(lambda self, *args, **kwargs: original(self, *args, **kwargs))
    monkeypatch.setattr(method.ours, "step", timed)
    optimizer = method.ours(parameters(generator, SMALL))
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    run(optimizer, 1)
    assert seen == ["before"] * 2


def test_hooks_of_all_optimizers_run(method, generator) -> None:
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    optimizer = method.ours(parameters(generator, SMALL))
    run(optimizer, 1)
    for handle in handles:
        handle.remove()
    run(optimizer, 1)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("hooked", [False, True])
def test_the_warning_of_one_element_points_at_the_caller(hooked, method) -> None:
    optimizer = method.ours([torch.ones(1, requires_grad=True)])
    if hooked:
        optimizer.register_step_pre_hook(lambda *_: None)
    give_gradients(all_params(optimizer), torch.Generator())
    with pytest.warns(UserWarning, match=r"group 0, parameter 0\. Put such parameters .* agr=False") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_a_profiler_sees_the_step(method, generator) -> None:
    optimizer = method.ours(parameters(generator, SMALL))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, 1)
    assert [e.count for e in profile.key_averages() if e.key == f"Optimizer.step#{method}.step"] == [1]


SCHEDULERS = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=12),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=True),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_are_followed(scheduler: str, method, backend, device, generator) -> None:
    """The oracle is given lr and betas as they stand before each step; OneCycleLR and CyclicLR move both."""
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours([{"params": params[:1]}, {"params": params[1:], "lr": 5e-3}], backend=backend)
    schedule = SCHEDULERS[scheduler](optimizer)
    expected = oracle_for(method, optimizer)
    rates, betas = set(), set()
    for step in range(11):
        give_gradients(params, generator, step)
        for group, ours in zip(expected.groups, optimizer.param_groups, strict=True):
            group.options |= {"lr": ours["lr"], "betas": tuple(ours["betas"])}
        rates.add(optimizer.param_groups[0]["lr"])
        betas.add(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        expected.step(oracle_gradients(params))
        schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
    assert len(rates) > 3
    assert (len(betas) > 3) == ("Cyc" in scheduler)
    assert_close(optimizer, expected)


def test_schedulers_fill_a_tensor_lr(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    lr = torch.tensor(1e-2)
    one, other = (
        method.ours(params, lr=lr, backend=backend),
        method.ours(copies(params), lr=1e-2, backend=backend),
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (one, other)]
    for step in range(4):
        run(one, [step])
        run(other, [step])
        for schedule in schedules:
            schedule.step()
    assert isinstance(one.param_groups[0]["lr"], Tensor)
    assert_parameters_close(all_params(one), all_params(other))


def test_a_group_added_in_mid_run(method, backend, device, generator) -> None:
    params, added = (parameters(generator, SMALL, device=device) for _ in range(2))
    optimizer = method.ours(params, lr=2e-3, max_grad_norm=3.0, backend=backend)
    expected = oracle_for(method, optimizer, 3.0)
    for step in range(6):
        if step == 3:
            own = {"lr": 1e-2, "agr": False}
            optimizer.add_param_group({"params": added, **own})
            expected.add_group({"params": [oracle_parameter(p) for p in added], **own})
        give_gradients(all_params(optimizer), generator, step)
        optimizer.step()
        expected.step(oracle_gradients(all_params(optimizer)))
    assert_close(optimizer, expected)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_identically(how: str, after: int, method, backend, device, generator) -> None:
    """max_grad_norm and backend, which are in no group, go with them."""
    optimizer = method.ours(parameters(generator, SMALL, device=device), max_grad_norm=0.1, backend=backend)
    run(optimizer, after)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert not {p.data_ptr() for p in all_params(twin)} & {p.data_ptr() for p in all_params(optimizer)}
    run(optimizer, range(after, after + 3))
    run(twin, range(after, after + 3))
    assert_same_bits(twin, optimizer)
    unclipped = method.ours(copies(all_params(twin)), backend=backend)
    run(unclipped, 1)
    assert not same_bits(unclipped.state[all_params(unclipped)[0]]["exp_avg"],
                         twin.state[all_params(twin)[0]]["exp_avg"])  # fmt: skip


def test_a_copied_model_and_optimizer_stay_together(method, backend, device) -> None:
    model = torch.nn.Linear(5, 3).to(device)
    both = (model, method.ours(model.parameters(), backend=backend))
    run(both[1], 2)
    twin_model, twin = copy.deepcopy(both)
    run(both[1], range(2, 4))
    run(twin, range(2, 4))
    assert all(same_bits(p, q) for p, q in zip(twin_model.parameters(), model.parameters(), strict=True))


def test_named_parameters(method, backend, device) -> None:
    model = torch.nn.Linear(5, 3).to(device)
    optimizer = method.ours(model.named_parameters(), backend=backend)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    run(optimizer, 2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_capturable_works_everywhere(method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    one = method.ours(params, capturable=True, backend=backend)
    other = method.ours(copies(params), backend=backend)
    run(one, 5)
    run(other, 5)
    assert_parameters_close(all_params(one), all_params(other))
    if method is ADAMW:
        assert all(one.state[p]["step"].device == p.device for p in params)


def test_foreach_asks_for_the_reference_backend(method, generator) -> None:
    """Which takes everything: complex parameters and such as have gaps, beside ordinary ones."""
    params = [*parameters(generator, SHAPES), *parameters(generator, [(7,)], torch.complex64)]
    params.append(torch.randn(6, 8, generator=generator)[:, ::2].requires_grad_())
    one, other = method.ours(params, foreach=True), method.ours(copies(params), backend="reference")
    run(one, 4)
    run(other, 4)
    assert_parameters_close(params, all_params(other))


def test_numbers_of_numpy_are_numbers(method, backend, device, generator) -> None:
    params = parameters(generator, device=device)
    one = method.ours(params, lr=np.float32(0.25), eps=np.float64(1e-8), backend=backend)
    other = method.ours(copies(params), lr=0.25, backend=backend)
    run(one, 2)
    run(other, 2)
    assert_same_bits(one, other)

"""capturable=True keeps step counts where the parameters are and changes no result; a learning rate in a tensor is read
anew at each step. (That a CUDA graph can then be captured is tested in test_gpu.)"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from helpers import (
    ADAMW,
    ADAN,
    SHAPES,
    Method,
    all_params,
    assert_close,
    assert_parameters_close,
    assert_same_bits,
    copies,
    give_gradients,
    gradient,
    oracle_for,
    oracle_gradients,
    oracle_parameter,
    parameters,
    run,
    same_bits,
)
from torch import Tensor

import agr_cuda

SMALL = [(7,), (64, 33), (31,)]


def steps_taken(optimizer: torch.optim.Optimizer) -> set[int]:
    if isinstance(optimizer, agr_cuda.Adan):
        return {int(group["step"]) for group in optimizer.param_groups}
    return {int(optimizer.state[p]["step"]) for p in all_params(optimizer)}


def assert_counts_are_in_place(optimizer: torch.optim.Optimizer) -> None:
    """Beside the parameters where capturable, as in torch; and in a state_dict Adan's are ints, as in sail-sg/Adan."""
    for group, saved in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        if isinstance(optimizer, agr_cuda.Adan):
            assert type(saved["step"]) is int
            if isinstance(group["step"], Tensor):
                assert group["step"].shape == ()
                assert not group["capturable"] or group["step"].device == group["params"][0].device
            else:
                assert type(group["step"]) is int
            continue
        for p in group["params"]:
            step = optimizer.state[p]["step"]
            assert (step.shape, step.dtype) == ((), torch.float32)
            assert step.device.type == (p.device.type if group["capturable"] else "cpu")


def sixteen_bit(dtype: torch.dtype) -> dict[str, float]:
    """What makes accuracy in 16 bits a fair question: see test_accuracy."""
    return {"lr": 1e-2, "eps": 1e-3} if dtype in (torch.bfloat16, torch.float16) else {}


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def follow(
    optimizer: torch.optim.Optimizer, expected: Any, steps: range, before: Callable[[int], None] | None = None
) -> None:
    """Steps beside the oracle, which is told each group's lr and betas as they are at the step."""
    params = all_params(optimizer)
    for step in steps:
        if before:
            before(step)
        give_gradients(params, torch.Generator().manual_seed(step), step)
        for theirs, ours in zip(expected.groups, optimizer.param_groups, strict=True):
            theirs.options |= {"lr": float(ours["lr"]), "betas": tuple(ours["betas"])}
        optimizer.step()
        expected.step(oracle_gradients(params))


# Step counts.


@pytest.mark.parametrize("capturable", [True, False])
def test_where_step_counts_are(capturable: bool, method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, capturable=capturable, backend=backend)
    run(optimizer, 3)
    assert_counts_are_in_place(optimizer)
    assert steps_taken(optimizer) == {3}
    saved = optimizer.state_dict()
    run(optimizer, 1)
    if method is ADAN:
        assert saved["param_groups"][0]["step"] == 3
        assert optimizer.state_dict()["param_groups"][0]["step"] == 4


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "maximize": True}, {"extra": True}], ids=str)
def test_results_are_the_same(options: dict, method, backend, float_dtype, device, generator) -> None:
    """Gradients come and go, so that the step counts of AdamW's parameters differ."""
    if "extra" in options:
        options = {"amsgrad": True} if method is ADAMW else {"no_prox": True, "weight_decay": 0.1}
    params = parameters(generator, SHAPES, float_dtype, device)
    options = {"backend": backend, **sixteen_bit(float_dtype), **options}
    capturable, plain = method.ours(params, capturable=True, **options), method.ours(copies(params), **options)
    expected = oracle_for(method, capturable, options.get("max_grad_norm"))
    for step in range(10):
        for index, (p, q) in enumerate(zip(params, all_params(plain), strict=True)):
            p.grad = gradient(p, generator, step) if (step + index) % 4 else None
            q.grad = None if p.grad is None else p.grad.clone()
        capturable.step()
        plain.step()
        expected.step(oracle_gradients(params))
    assert_close(capturable, expected)
    if float_dtype in (torch.float32, torch.float64):
        assert_parameters_close(params, all_params(plain))


def test_groups_may_mix_it(method, backend, float_dtype, device, generator) -> None:
    own = [{"capturable": True, "lr": 1e-2}, {"capturable": False}, {"capturable": True, "agr": False, "eps": 1e-2}]
    groups = [{"params": parameters(generator, SHAPES[i:], float_dtype, device), **g} for i, g in enumerate(own)]
    optimizer = method.ours(groups, max_grad_norm=2.0, backend=backend, **sixteen_bit(float_dtype))
    expected = oracle_for(method, optimizer, 2.0)
    follow(optimizer, expected, range(8))
    assert_close(optimizer, expected)
    assert_counts_are_in_place(optimizer)


@pytest.mark.parametrize("first", [True, False])
def test_the_flag_may_change_in_a_run(first: bool, method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, capturable=first, backend=backend)
    expected = oracle_for(method, optimizer)

    def toggle(step: int) -> None:
        optimizer.param_groups[0]["capturable"] = first if step // 3 % 2 == 0 else not first

    follow(optimizer, expected, range(9), toggle)
    assert_close(optimizer, expected)


@pytest.mark.parametrize("added", [True, False, None])
@pytest.mark.parametrize("capturable", [True, False])
def test_a_group_added_in_mid_run(capturable: bool, added: bool | None, method, backend, device, generator) -> None:
    """Its steps are counted from then on; None: it takes the optimizer's default."""
    params, late = (parameters(generator, SMALL, device=device) for _ in range(2))
    optimizer = method.ours(params, capturable=capturable, max_grad_norm=3.0, backend=backend)
    expected = oracle_for(method, optimizer, 3.0)
    follow(optimizer, expected, range(3))
    own = {"weight_decay": 0.1, "agr": False}
    optimizer.add_param_group({"params": late, **own, **({} if added is None else {"capturable": added})})
    expected.add_group({"params": [oracle_parameter(p) for p in late], **own})
    follow(optimizer, expected, range(3, 7))
    assert_close(optimizer, expected)
    assert_counts_are_in_place(optimizer)


def test_looking_at_the_state_dict_changes_nothing(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    watched, alone = (method.ours(x, capturable=True, backend=backend) for x in (params, copies(params)))
    for step in range(5):
        watched.state_dict()
        run(watched, [step])
        run(alone, [step])
    assert_same_bits(watched, alone)
    assert steps_taken(watched) == steps_taken(alone) == {5}


# Learning rates in tensors.


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize(("shape", "lr_dtype"), [((), torch.float32), ((1,), torch.float32), ((), torch.float64)])
def test_lr_in_a_tensor_is_read_at_each_step(
    shape: tuple, lr_dtype: torch.dtype, capturable: bool, method, backend, float_dtype, device, generator
) -> None:
    """And only read."""
    params = parameters(generator, SMALL, float_dtype, device)
    lr = torch.full(shape, 2e-2, dtype=lr_dtype, device=device)
    options = {**sixteen_bit(float_dtype), "lr": lr}
    optimizer = method.ours(params, capturable=capturable, backend=backend, **options)
    expected = oracle_for(method, optimizer)
    mine = torch.full(shape, 2e-2, dtype=lr_dtype, device=device)

    def change(step: int) -> None:
        for x in (lr, mine):
            x.mul_((0.5, 0.9, 3.0)[step % 3])

    follow(optimizer, expected, range(8), change)
    assert_close(optimizer, expected)
    assert optimizer.param_groups[0]["lr"] is lr
    assert same_bits(lr, mine)


@pytest.mark.parametrize("capturable", [True, False])
def test_lr_in_a_tensor_on_the_cpu(capturable: bool, method, backend, device, generator) -> None:
    """Where torch.tensor(1e-3) puts it."""
    lr = torch.tensor(1e-2)
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, lr=lr, capturable=capturable, backend=backend)
    expected = oracle_for(method, optimizer)
    follow(optimizer, expected, range(5), lambda step: lr.mul_(0.7))
    assert_close(optimizer, expected)


SCHEDULERS = {
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
}


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_that_fills_it_is_followed(
    scheduler: str, capturable: bool, method, backend, device, generator
) -> None:
    params = parameters(generator, SMALL, device=device)
    lr, other = torch.tensor(1e-2, device=device), torch.tensor(3e-3, device=device)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": other}]
    optimizer = method.ours(groups, lr=lr, capturable=capturable, backend=backend)
    expected = oracle_for(method, optimizer)
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = set()
    for step in range(6):
        rates.add(float(optimizer.param_groups[0]["lr"]))
        follow(optimizer, expected, range(step, step + 1))
        schedule.step()
    assert len(rates) == 6
    assert all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    assert_close(optimizer, expected)


@pytest.mark.parametrize("capturable", [True, False])
def test_lr_may_be_shared_and_replaced(capturable: bool, method, backend, device, generator) -> None:
    """One tensor of two groups, another tensor, a number, and a tensor again."""
    params = parameters(generator, SMALL, device=device)
    lr = torch.tensor(1e-2, device=device)
    groups = [{"params": params[:1], "lr": lr}, {"params": params[1:], "lr": lr}]
    optimizer = method.ours(groups, capturable=capturable, backend=backend)
    expected = oracle_for(method, optimizer)

    def change(step: int) -> None:
        if step == 2:
            optimizer.param_groups[0]["lr"] = torch.tensor(3e-3, dtype=torch.float64, device=device)
        elif step == 4:
            optimizer.param_groups[0]["lr"] = 2e-2
        elif step == 6:
            optimizer.param_groups[0]["lr"] = torch.tensor([5e-3], device=device)
        lr.mul_(0.8)

    follow(optimizer, expected, range(8), change)
    assert_close(optimizer, expected)


@pytest.mark.parametrize("capturable", [True, False])
def test_lr_filled_with_zero_stops_the_parameters(capturable: bool, method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    lr = torch.tensor(1e-2, device=device)
    optimizer = method.ours(params, lr=lr, capturable=capturable, backend=backend)
    run(optimizer, 2)
    lr.zero_()
    before = copies(params)
    run(optimizer, range(2, 4))
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    assert steps_taken(optimizer) == {4}


# Checkpoints and copies.


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("then", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_checkpoints_go_between(made: bool, then: bool, keep: bool, method, backend, device, generator) -> None:
    """As in torch, the flag comes with the checkpoint, unless it is changed there (`keep`)."""
    params = parameters(generator, SHAPES, device=device)
    options = {"max_grad_norm": 0.5, "backend": backend}
    first = method.ours(params, capturable=made, **options)
    expected = oracle_for(method, first, 0.5)
    follow(first, expected, range(4))
    saved = through_a_file(first.state_dict())
    if keep:
        saved["param_groups"][0]["capturable"] = then
    second = method.ours(copies(params), capturable=then, **options)
    second.load_state_dict(saved)
    assert second.param_groups[0]["capturable"] is (then if keep else made)
    assert steps_taken(second) == {4}
    follow(second, expected, range(4, 9))
    assert_close(second, expected)
    assert_counts_are_in_place(second)


def test_an_own_checkpoint_loaded_back(method, backend, device, generator) -> None:
    """In the midst of a run, into the optimizer that made it: it repeats itself bit for bit."""
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, lr=torch.tensor(1e-2, device=device), capturable=True, backend=backend)
    run(optimizer, 3)
    saved, start = through_a_file(optimizer.state_dict()), copies(params)
    run(optimizer, range(3, 7))
    end = copies(params)
    with torch.no_grad():
        for p, q in zip(params, start, strict=True):
            p.copy_(q)
    optimizer.load_state_dict(saved)
    assert steps_taken(optimizer) == {3}
    run(optimizer, range(3, 7))
    assert all(same_bits(p, q) for p, q in zip(params, end, strict=True))
    assert steps_taken(optimizer) == {7}


def test_torchs_adamw_loads_a_capturable_run(backend, device, generator) -> None:
    """torch refuses to step with capturable=True on a CPU, so there the checkpoint is told otherwise."""
    params = parameters(generator, SHAPES, device=device)
    ours = agr_cuda.AdamW(params, agr=False, capturable=True, backend=backend)
    run(ours, 4)
    saved = through_a_file(ours.state_dict())
    saved["param_groups"][0]["capturable"] = device.type != "cpu"
    theirs = torch.optim.AdamW(copies(params))
    theirs.load_state_dict(saved)
    run(ours, range(4, 8))
    run(theirs, range(4, 8))
    assert_parameters_close(params, all_params(theirs), 2e-6)
    assert steps_taken(theirs) == {8}


@pytest.mark.parametrize("capturable", [True, False])
def test_a_checkpoint_in_sails_form(capturable: bool, backend, device, generator) -> None:
    """Without the option, which sail-sg/Adan does not have, and with the count in the group, where it is an int."""
    params = parameters(generator, SHAPES, device=device)
    first = agr_cuda.Adan(params, capturable=True, backend=backend)
    expected = oracle_for(ADAN, first)
    follow(first, expected, range(4))
    saved = through_a_file(first.state_dict())
    own = {"lr", "betas", "eps", "weight_decay", "no_prox", "foreach", "fused", "step", "params"}
    saved["param_groups"] = [{key: x for key, x in group.items() if key in own} for group in saved["param_groups"]]
    assert saved["param_groups"][0]["step"] == 4
    second = agr_cuda.Adan(copies(params), capturable=capturable, backend=backend)
    second.load_state_dict(saved)
    follow(second, expected, range(4, 8))
    assert_close(second, expected)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_identically_and_apart(how: str, after: int, method, backend, device, generator) -> None:
    groups = [
        {"params": parameters(generator, SMALL, device=device)},
        {"params": parameters(generator, SMALL, device=device), "capturable": False},
    ]
    lr = torch.tensor(1e-2, device=device)
    optimizer = method.ours(groups, lr=lr, max_grad_norm=0.1, capturable=True, backend=backend)
    run(optimizer, after)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert [group["capturable"] for group in twin.param_groups] == [True, False]
    run(optimizer, range(after, after + 3))
    assert steps_taken(optimizer) == {after + 3}
    run(twin, range(after, after + 2))
    assert steps_taken(twin) == {after + 2}
    assert steps_taken(optimizer) == {after + 3}
    run(twin, range(after + 2, after + 3))
    assert_same_bits(twin, optimizer)
    lr.zero_()
    assert float(twin.param_groups[0]["lr"]) > 0


# restart_opt().


def test_restart_opt_starts_afresh(backend, float_dtype, device, generator) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer = agr_cuda.Adan(params, lr=1e-2, capturable=True, backend=backend)
    run(optimizer, 4)
    optimizer.restart_opt()
    assert steps_taken(optimizer) == {0}
    assert type(optimizer.state_dict()["param_groups"][0]["step"]) is int
    fresh = agr_cuda.Adan(copies(params), lr=1e-2, capturable=True, backend=backend)
    run(optimizer, 3, seed=8)
    run(fresh, 3, seed=8)
    assert_same_bits(optimizer, fresh)
    assert_counts_are_in_place(optimizer)


def test_restart_opt_in_the_midst_of_mixed_groups(backend, device, generator) -> None:
    made = [parameters(generator, SMALL, device=device) for _ in range(2)]
    groups = [{"params": made[0], "capturable": True}, {"params": made[1], "capturable": False}]
    optimizer = agr_cuda.Adan(groups, backend=backend)
    expected = oracle_for(ADAN, optimizer)
    assert isinstance(expected, oracle.Adan)

    def restart(step: int) -> None:
        if step in (3, 5):
            optimizer.restart_opt()
            expected.restart()

    follow(optimizer, expected, range(8), restart)
    assert_close(optimizer, expected)


def test_restart_opt_before_the_first_step_changes_nothing(backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    optimizer, plain = (agr_cuda.Adan(x, capturable=True, backend=backend) for x in (params, copies(params)))
    optimizer.restart_opt()
    run(optimizer, 3)
    run(plain, 3)
    assert_same_bits(optimizer, plain)


def test_a_late_parameter_starts_with_no_difference(method: Method, backend, device, generator) -> None:
    """Adan's d is 0 on a parameter's own first step, and AdamW counts that parameter's own steps."""
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, capturable=True, backend=backend)
    expected = oracle_for(method, optimizer)
    for step in range(8):
        give_gradients(params, generator, step)
        if step < 4:
            params[3].grad = None
        optimizer.step()
        expected.step(oracle_gradients(params))
    assert_close(optimizer, expected)


@pytest.mark.parametrize("how", ["capturable", "found_inf"])
def test_groups_of_different_types_are_all_counted(how: str, backend, device, generator) -> None:
    """Whichever of several launches has their tensors, and if none has any more, since they have no gradients."""
    kinds = [torch.float32, torch.bfloat16, torch.float32]
    groups = [{"params": parameters(generator, [(5,), (31,)], dtype, device)} for dtype in kinds]
    optimizer = agr_cuda.Adan(groups, backend=backend, capturable=how == "capturable")
    if how == "found_inf":
        optimizer.found_inf = torch.zeros((), device=device)
    run(optimizer, 1)
    for p in groups[2]["params"]:
        p.grad = None
    for step in range(2):
        for group in optimizer.param_groups[:2]:
            give_gradients(group["params"], generator, step)
        optimizer.step()
    assert [int(group["step"]) for group in optimizer.param_groups] == [3, 3, 3]


def test_a_count_on_a_device_goes_on_where_no_device_counts(backend, device, generator) -> None:
    """Adan's group changes to a backend that counts on the host: no step is lost."""
    params = parameters(generator, SMALL, device=device)
    ours = agr_cuda.Adan(params, capturable=True, backend=backend)
    run(ours, 2)
    ours.backend = "reference"
    run(ours, range(2, 5))
    assert int(ours.param_groups[0]["step"]) == 5

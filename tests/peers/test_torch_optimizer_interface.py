"""Around the step, ours does what torch.optim.AdamW does: hooks, checkpoints and names, schedulers, averaged models.

What is not about AdamW's numbers is asked of Adan too, with torch.optim.AdamW as the example.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ADAMW,
    Method,
    all_params,
    assert_like,
    assert_same_bits,
    copies,
    give_gradients,
    parameters,
    run,
)
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import agr_cuda

SMALL = [(7,), (64, 33)]
BACKENDS = [None, "cpu", "reference"]
THEIRS = torch.optim.AdamW


def ours(params: Any, **options: Any) -> agr_cuda.AdamW:
    return agr_cuda.AdamW(params, agr=False, **options)


def small(optimizer_class: Callable[..., Any], **options: Any) -> Any:
    return optimizer_class(parameters(torch.Generator().manual_seed(3), SMALL, torch.float64), **options)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Hooks of a step.


def hooks_of_a_step(optimizer_class: Callable[..., Any]) -> list[str]:
    events: list[str] = []

    def note(event: str) -> Callable[..., None]:
        return lambda *_: events.append(event)

    optimizer = small(optimizer_class)
    optimizer.register_step_post_hook(note("post"))
    optimizer.register_step_pre_hook(note("pre"))
    with contextlib.ExitStack() as everywhere:  # a handle takes its hook away at the end
        everywhere.enter_context(register_optimizer_step_post_hook(note("post, of all optimizers")))
        everywhere.enter_context(register_optimizer_step_pre_hook(note("pre, of all optimizers")))
        with optimizer.register_step_pre_hook(note("second pre")):
            optimizer.register_step_post_hook(note("second post"))
            give_gradients(all_params(optimizer), torch.Generator())
            optimizer.step(lambda: events.append("closure") or 1.0)
        optimizer.step()
    optimizer.step()
    return events


def test_hooks_of_a_step_run_in_torchs_order(method: Method) -> None:
    assert hooks_of_a_step(method.ours) == hooks_of_a_step(THEIRS)


@pytest.mark.parametrize("replaced", [lambda o: ((o, lambda: 7.0), {}), lambda o: ((o,), {"closure": lambda: 7.0})])
def test_a_hook_before_a_step_may_replace_its_arguments(replaced: Callable[[Any], Any], method: Method) -> None:
    optimizer = small(method.ours)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: replaced(o))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.extend([*args[1:], *kwargs.values()]))
    assert optimizer.step(lambda: 3.0) == 7.0
    assert [closure() for closure in seen] == [7.0]


def test_a_hook_before_a_step_that_returns_something_else_is_an_error(method: Method) -> None:
    optimizer = small(method.ours)
    optimizer.register_step_pre_hook(lambda *_: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


# Hooks of checkpoints.


def shape_of(checkpoint: Any) -> Any:
    """What a hook sees of a checkpoint: the parameters that have a state, and options in its groups that all have."""
    known = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "foreach"}
    return sorted(checkpoint["state"]), [sorted(known & group.keys()) for group in checkpoint["param_groups"]]


def hooks_of_state_dict(optimizer_class: Callable[..., Any]) -> list[Any]:
    optimizer = small(optimizer_class)
    run(optimizer, 1)
    events: list[Any] = []

    def before(name: str) -> Callable[..., None]:
        return lambda o: events.append((name, o is optimizer))

    def after(name: str) -> Callable[..., Any]:
        def hook(o: Any, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
            events.append((name, o is optimizer, shape_of(checkpoint), checkpoint.get("from")))
            return {**checkpoint, "from": name} if name != "silent post" else None

        return hook

    optimizer.register_state_dict_pre_hook(before("pre"))
    optimizer.register_state_dict_pre_hook(before("second pre"))
    optimizer.register_state_dict_pre_hook(before("prepended pre"), prepend=True)
    optimizer.register_state_dict_post_hook(after("post"))
    optimizer.register_state_dict_post_hook(after("silent post"))
    handle = optimizer.register_state_dict_post_hook(after("prepended post"), prepend=True)
    checkpoint = optimizer.state_dict()
    events.append((shape_of(checkpoint), checkpoint["from"]))
    handle.remove()
    optimizer.state_dict()
    return events


def test_hooks_of_state_dict_run_in_torchs_order_and_may_replace_it(method: Method) -> None:
    assert hooks_of_state_dict(method.ours) == hooks_of_state_dict(THEIRS)


def test_the_last_hook_of_state_dict_has_the_last_word(method: Method) -> None:
    optimizer = small(method.ours)
    run(optimizer, 1)
    seen, replacement = [], {"nothing": "that an optimizer knows"}
    optimizer.register_state_dict_post_hook(lambda o, checkpoint: seen.append(copy.deepcopy(checkpoint)))
    finished = optimizer.state_dict()
    assert seen[0]["param_groups"] == finished["param_groups"]
    assert {k: v.keys() for k, v in seen[0]["state"].items()} == {k: v.keys() for k, v in finished["state"].items()}
    optimizer.register_state_dict_post_hook(lambda o, checkpoint: replacement)
    assert optimizer.state_dict() is replacement


def hooks_of_load_state_dict(optimizer_class: Callable[..., Any]) -> list[Any]:
    first, optimizer = small(optimizer_class, lr=0.5), small(optimizer_class, lr=0.25)
    run(first, 1)
    given = first.state_dict()
    given["param_groups"][0].pop("lr")
    events: list[Any] = []

    def before(name: str, lr: float) -> Callable[..., Any]:
        def hook(o: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
            group = checkpoint["param_groups"][0]
            events.append((name, checkpoint is given, checkpoint["state"] is given["state"], group.get("lr"),
                           group is given["param_groups"][0], o.param_groups[0]["lr"]))  # fmt: skip
            return {**checkpoint, "param_groups": [{**group, "lr": lr}]}

        return hook

    def after(name: str) -> Callable[..., None]:
        return lambda o: events.append((name, o.param_groups[0]["lr"], len(o.state)))

    optimizer.register_load_state_dict_pre_hook(before("pre", 1.0))
    optimizer.register_load_state_dict_pre_hook(before("second pre", 2.0))
    optimizer.register_load_state_dict_pre_hook(before("prepended pre", 4.0), prepend=True)
    optimizer.register_load_state_dict_post_hook(after("post"))
    optimizer.register_load_state_dict_post_hook(after("second post"))
    optimizer.register_load_state_dict_post_hook(after("prepended post"), prepend=True)
    optimizer.load_state_dict(given)
    events.append(optimizer.param_groups[0]["lr"])
    events.append(sorted(given["param_groups"][0].keys() & {"lr", "eps", "params"}))
    return events


def test_hooks_of_load_state_dict_see_what_was_given_in_torchs_order(method: Method) -> None:
    assert hooks_of_load_state_dict(method.ours) == hooks_of_load_state_dict(THEIRS)


def test_a_hook_before_loading_may_translate_another_format(method: Method) -> None:
    first, second = small(method.ours), small(method.ours)
    run(first, 2)
    second.register_load_state_dict_pre_hook(lambda o, saved: saved["optimizer"])
    second.load_state_dict({"optimizer": copy.deepcopy(first.state_dict()), "epoch": 3})
    with torch.no_grad():
        for p, q in zip(all_params(second), all_params(first), strict=True):
            p.copy_(q)
    run(first, [2])
    run(second, [2])
    assert_same_bits(second, first)


# Checkpoints.


@pytest.mark.parametrize(
    "flags", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True, "maximize": True}], ids=str
)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("lr", [2e-3, torch.tensor(2e-3)], ids=["float", "tensor"])
def test_a_checkpoint_is_torchs_to_the_last_key(flags: dict, named: bool, lr: Any) -> None:
    """So that whatever reads torch.optim.AdamW's reads ours, and whatever compares the two finds no difference."""
    model = torch.nn.Linear(5, 3)
    options = {**flags, "lr": lr if not flags.get("foreach") else 2e-3}
    made = []
    for optimizer_class, of in ((ours, model), (THEIRS, copy.deepcopy(model))):
        optimizer = optimizer_class(of.named_parameters() if named else of.parameters(), **options)
        run(optimizer, 2)
        made.append(optimizer.state_dict())
    mine, theirs = made
    assert mine.keys() == theirs.keys()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert mine["state"][index].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(mine["state"][index][key], value, rtol=1e-6, atol=1e-9)


def test_a_checkpoint_refers_to_the_state_as_torchs_does(method: Method) -> None:
    optimizer = small(method.ours)
    run(optimizer, 2)
    saved = optimizer.state_dict()["state"]
    for index, p in enumerate(all_params(optimizer)):
        assert all(saved[index][key] is optimizer.state[p][key] for key in method.states)


@pytest.mark.parametrize("asked", BACKENDS, ids=str)
def test_a_step_count_of_shape_1_stays_one(asked: str | None) -> None:
    """Some programs keep it so in their checkpoints."""
    mine, theirs = small(ours, backend=asked), small(THEIRS)
    for optimizer in (mine, theirs):
        run(optimizer, 2)
        checkpoint = copy.deepcopy(optimizer.state_dict())
        for state in checkpoint["state"].values():
            state["step"] = state["step"].reshape(1)
        optimizer.load_state_dict(checkpoint)
        run(optimizer, [2])
        assert {optimizer.state[p]["step"].shape for p in all_params(optimizer)} == {torch.Size([1])}
    assert_like(mine, theirs)


NAMED = [(7, "weight"), (5, "bias")]


def with_names(optimizer_class: Callable[..., Any], names: list[str] | None) -> Any:
    """An optimizer of two parameters, that differ in size, in the order of the names; or without names."""
    sizes = {name: size for size, name in NAMED}
    params = {name: torch.full((sizes[name],), 0.5, dtype=torch.float64, requires_grad=True) for name in names or sizes}
    return optimizer_class(params.items() if names else params.values())


@pytest.mark.parametrize("saved_names", [None, ["weight", "bias"]], ids=["unnamed", "named"])
@pytest.mark.parametrize("names", [None, ["weight", "bias"]], ids=["unnamed", "named"])
def test_names_come_and_go_with_checkpoints_as_in_torch(saved_names: Any, names: Any, method: Method) -> None:
    kept = []
    for optimizer_class in (method.ours, THEIRS):
        saving, loading = with_names(optimizer_class, saved_names), with_names(optimizer_class, names)
        run(saving, 2)
        loading.load_state_dict(through_a_file(saving.state_dict()))
        run(loading, 1)
        kept.append(
            [group.get("param_names") for group in (loading.param_groups[0], *loading.state_dict()["param_groups"])]
        )
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("saving", "loading"), [(THEIRS, ours), (ours, THEIRS), (ours, ours)])
def test_a_hook_may_put_the_state_in_the_order_of_the_names(saving: Any, loading: Any) -> None:
    """Between torch and ours as between two of torch's."""
    saved = with_names(saving, ["weight", "bias"])
    run(saved, 3)
    loaded = with_names(loading, ["bias", "weight"])

    def by_name(optimizer: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
        theirs = checkpoint["param_groups"][0]["param_names"]
        order = [theirs.index(name) for name in optimizer.param_groups[0]["param_names"]]
        state = {new: checkpoint["state"][old] for new, old in enumerate(order)}
        groups = [{**checkpoint["param_groups"][0], "param_names": [theirs[old] for old in order]}]
        return {"state": state, "param_groups": groups}

    loaded.register_load_state_dict_pre_hook(by_name)
    loaded.load_state_dict(saved.state_dict())
    by_size = {p.numel(): saved.state[p] for p in all_params(saved)}
    for p in all_params(loaded):
        assert all(torch.equal(value, by_size[p.numel()][key]) for key, value in loaded.state[p].items())
    give_gradients(all_params(loaded), torch.Generator())
    loaded.step()
    assert [float(loaded.state[p]["step"]) for p in all_params(loaded)] == [4.0, 4.0]


def test_a_copy_has_every_public_attribute(method: Method) -> None:
    optimizer = small(method.ours, max_grad_norm=2.0, backend="reference")
    run(optimizer, 1)
    twin = copy.deepcopy(optimizer)

    def public(o: Any) -> set[str]:
        return {name for name in dir(o) if not name.startswith("_")}

    assert public(twin) == public(optimizer)
    of_the_last_step = {"backends", "grad_norm"}
    for name in public(optimizer) - {"param_groups", "state"} - of_the_last_step:
        value = getattr(optimizer, name)
        assert callable(value) or getattr(twin, name) == value, name


def test_loading_and_copying_add_no_option(method: Method) -> None:
    optimizer = small(method.ours)
    options, defaults = optimizer.param_groups[0].keys(), optimizer.defaults.keys()
    loaded = small(method.ours)
    loaded.load_state_dict(optimizer.state_dict())
    for each in (loaded, copy.deepcopy(optimizer)):
        assert each.param_groups[0].keys() == options
        assert each.defaults.keys() == defaults


@pytest.mark.parametrize("fused", [None, False, True])
def test_it_takes_the_gradient_scalers_scale_where_torch_does(fused: bool | None, method: Method) -> None:
    """torch.amp.GradScaler asks for the attribute, and hands scaled gradients on where there is one."""
    mine, theirs = (hasattr(small(each, fused=fused), "_step_supports_amp_scaling") for each in (method.ours, THEIRS))
    assert mine == theirs


def test_another_default_type_of_numbers_changes_nothing(method: Method) -> None:
    """torch keeps step counts in it; checkpoints with such counts load."""
    torch.set_default_dtype(torch.float64)
    try:
        mine, theirs = small(method.ours), small(THEIRS)
        run(mine, 3)
        run(theirs, 3)
        saved = copy.deepcopy(theirs.state_dict())
        if method is ADAMW:
            loaded = ours(copies(all_params(theirs)))
            loaded.load_state_dict(saved)
            run(theirs, [3])
            run(loaded, [3])
            assert_like(loaded, theirs)
    finally:
        torch.set_default_dtype(torch.float32)
    plain = small(method.ours)
    run(plain, 3)
    assert all(torch.equal(p, q) for p, q in zip(all_params(mine), all_params(plain), strict=True))


# Gradients.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_zeroed_as_torch_does(set_to_none: bool, method: Method) -> None:
    optimizer = small(method.ours)
    run(optimizer, 2)
    given = [p.grad for p in all_params(optimizer)]
    optimizer.zero_grad(set_to_none=set_to_none)
    for p, g in zip(all_params(optimizer), given, strict=True):
        assert p.grad is None if set_to_none else (p.grad is g and not g.any())


def test_gradients_that_are_zeroed_in_place_go_on_as_torchs(generator) -> None:
    params = parameters(generator, SMALL, torch.float64)
    mine, theirs = ours(params), THEIRS(copies(params))
    for step in range(6):
        for optimizer in (mine, theirs):
            if step % 2:
                optimizer.zero_grad(set_to_none=False)
                optimizer.step()
            else:
                run(optimizer, [step])
    assert_like(mine, theirs)


def test_one_optimizer_a_parameter_may_step_within_backward(generator) -> None:
    """Hooks after the accumulation of a gradient, so that no two gradients have to be there at a time."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3)).double()
    twin = copy.deepcopy(model)
    for each, optimizer_class in ((model, ours), (twin, THEIRS)):
        for p in each.parameters():
            optimizer = optimizer_class([p], lr=1e-2)

            def step(p: Tensor, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(step)
    for _ in range(5):
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        for each in (model, twin):
            each(x).square().sum().backward()
            assert all(p.grad is None for p in each.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_compiled_step_is_the_step(method: Method) -> None:
    compiled, plain = small(method.ours), small(method.ours)
    step = torch.compile(compiled.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(3):
            for optimizer, make_step in ((compiled, step), (plain, plain.step)):
                give_gradients(all_params(optimizer), torch.Generator().manual_seed(k), k)
                make_step()
    assert_same_bits(compiled, plain)


# Schedulers.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.1),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.75),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=7, power=2.0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.05, 0.01], total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=6),
}


def make_scheduled(name: str, optimizer_class: Callable[..., Any], tensor: bool, **options: Any) -> tuple[Any, Any]:
    """An optimizer of two groups, and its scheduler."""
    params = parameters(torch.Generator().manual_seed(3), [(31,), (7,), (64, 33)], torch.float64)
    rates = [torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in (2e-2, 5e-3)]
    groups = [{"params": params[:1], "lr": rates[0]}, {"params": params[1:], "lr": rates[1]}]
    optimizer = optimizer_class(groups, **options)
    return optimizer, SCHEDULERS[name](optimizer)


def train(optimizer: Any, scheduler: Any, steps: range) -> list[float]:
    rates = []
    for step in steps:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        run(optimizer, [step])
        scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # with which SequentialLR steps its parts
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("asked", BACKENDS, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_lead_where_they_lead_torch(name: str, asked: str | None, tensor: bool) -> None:
    mine, theirs = make_scheduled(name, ours, tensor, backend=asked), make_scheduled(name, THEIRS, tensor)
    rates = train(*mine, range(9))
    assert rates == train(*theirs, range(9))
    assert len(set(rates)) > 2
    assert isinstance(mine[0].param_groups[0]["lr"], Tensor) == tensor
    assert_like(mine[0], theirs[0])


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "LambdaLR"])  # its functions are not saved
def test_a_scheduled_run_resumes_where_it_stopped(name: str, tensor: bool, method: Method) -> None:
    steady = make_scheduled(name, method.ours, tensor)
    train(*steady, range(9))
    stopped = make_scheduled(name, method.ours, tensor)
    train(*stopped, range(5))
    resumed = make_scheduled(name, method.ours, tensor)
    with torch.no_grad():
        for p, q in zip(all_params(resumed[0]), all_params(stopped[0]), strict=True):
            p.copy_(q)
    for fresh, old in zip(resumed, stopped, strict=True):
        fresh.load_state_dict(copy.deepcopy(old.state_dict()))
    train(*resumed, range(5, 9))
    assert_same_bits(resumed[0], steady[0])


@pytest.mark.parametrize("right", [True, False])
def test_a_scheduler_knows_whether_a_step_came_before(right: bool, method: Method) -> None:
    """It watches over the optimizer's step, and warns of a wrong order."""
    optimizer = small(method.ours)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if right:
            run(optimizer, 1)
        scheduler.step()
    assert any("before `optimizer.step()`" in str(each.message) for each in caught) != right


# Averaged models.


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.75)], ids=["equal", "exponential"])
@pytest.mark.parametrize("asked", BACKENDS, ids=str)
def test_averaged_models_are_torchs(average: Any, asked: str | None, generator) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    models = [model, copy.deepcopy(model)]
    optimizers = [ours(models[0].parameters(), lr=1e-2, backend=asked), THEIRS(models[1].parameters(), lr=1e-2)]
    averaged = [AveragedModel(each, multi_avg_fn=average) for each in models]
    for step in range(8):
        x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        for each, optimizer, mean in zip(models, optimizers, averaged, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
            if step >= 3:
                mean.update_parameters(each)
    for p, q, start in zip(averaged[0].parameters(), averaged[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)
        assert not torch.equal(p, start)

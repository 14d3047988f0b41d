"""Input that one might give to AdamW by mistake, or in hope, and what comes of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optimizer_db
import torch
from torch import Tensor

Make = Callable[[type[torch.optim.Optimizer]], torch.optim.Optimizer]
Meddle = Callable[[torch.optim.Optimizer], Any]
Case = tuple[Make, Meddle | None]

STEPS = 3  # the change comes after the first


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def with_options(**options: Any) -> Case:
    return lambda optimizer: optimizer([leaf(2, 3)], **options), None


def with_parameters(make: Callable[[], Any], **options: Any) -> Case:
    return lambda optimizer: optimizer(make(), **options), None


def then(meddle: Meddle, **options: Any) -> Case:
    """Something done to an optimizer that has made a step."""
    return lambda optimizer: optimizer([leaf(2, 3)], **options), meddle


def set_option(**options: Any) -> Case:
    return then(lambda optimizer: optimizer.param_groups[0].update(options))


def load(change: Callable[[dict[str, Any]], Any]) -> Case:
    """The loading of its own checkpoint, changed."""

    def meddle(optimizer: torch.optim.Optimizer) -> None:
        checkpoint = optimizer.state_dict()
        checkpoint = {"state": {k: dict(v) for k, v in checkpoint["state"].items()},
                      "param_groups": [dict(group) for group in checkpoint["param_groups"]]}  # fmt: skip
        change(checkpoint)
        optimizer.load_state_dict(checkpoint)

    return then(meddle)


def load_group(without: str = "", **options: Any) -> Case:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["param_groups"][0].update(options)
        checkpoint["param_groups"][0].pop(without, None)

    return load(change)


def load_state(without: str = "", **state: Any) -> Case:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state"][0].update(state)
        checkpoint["state"][0].pop(without, None)

    return load(change)


def first(optimizer: torch.optim.Optimizer) -> Tensor:
    return optimizer.param_groups[0]["params"][0]


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return optimizer.state[first(optimizer)]


def give_gradient(p: Any) -> None:
    if isinstance(p, Tensor) and p.layout == torch.strided and p.grad is None and p.dtype.is_floating_point:
        p.grad = torch.linspace(-0.5, 1.0, p.numel(), dtype=p.dtype).reshape(p.shape)


def add(**group: Any) -> Case:
    return then(lambda optimizer: optimizer.add_param_group({"params": [leaf(4)], **group}))


def same_parameter_twice() -> list[dict[str, Any]]:
    p = leaf(2)
    return [{"params": [p]}, {"params": [p]}]


def sparse_gradient(optimizer: torch.optim.Optimizer) -> None:
    first(optimizer).grad = torch.ones(2, 3, dtype=torch.float64).to_sparse()


def complex_with_gradient() -> list[Tensor]:
    p = leaf(3, dtype=torch.complex64)
    p.grad = torch.ones_like(p)
    return [p]


OURS: dict[str, Case] = {
    # Numbers.
    "lr is negative": with_options(lr=-1.0),
    "lr is NaN": with_options(lr=math.nan),
    "lr is infinite": with_options(lr=math.inf),
    "lr is None": with_options(lr=None),
    "lr is a string": with_options(lr="0.1"),
    "lr is a list": with_options(lr=[0.1]),
    "lr is True": with_options(lr=True),
    "lr is an integer": with_options(lr=1),
    "lr is NumPy's": with_options(lr=np.float32(0.125)),
    "lr is a tensor of integers": with_options(lr=torch.tensor(1)),
    "lr is a tensor that is negative": with_options(lr=torch.tensor(-1.0)),
    "lr is a tensor of shape (1,)": with_options(lr=torch.tensor([0.125])),
    "lr is a tensor of no elements": with_options(lr=torch.empty(0)),
    "lr is a tensor that requires a gradient": with_options(lr=torch.tensor(0.125, requires_grad=True)),
    "eps is negative": with_options(eps=-1e-8),
    "eps is NaN": with_options(eps=math.nan),
    "eps is infinite": with_options(eps=math.inf),
    "eps is None": with_options(eps=None),
    "eps is True": with_options(eps=True),
    "eps is zero": with_options(eps=0),
    "eps is a tensor": with_options(eps=torch.tensor(0.125)),
    "weight_decay is NaN": with_options(weight_decay=math.nan),
    "weight_decay is infinite": with_options(weight_decay=math.inf),
    "weight_decay is None": with_options(weight_decay=None),
    "weight_decay is True": with_options(weight_decay=True),
    "weight_decay is a tensor": with_options(weight_decay=torch.tensor(0.125)),
    "weight_decay is a list": with_options(weight_decay=[0.1]),
    # Betas.
    "betas are one": with_options(betas=(0.9,)),
    "betas are three": with_options(betas=(0.9, 0.99, 0.999)),
    "betas are none": with_options(betas=()),
    "betas is None": with_options(betas=None),
    "betas is a number": with_options(betas=0.9),
    "betas is a string": with_options(betas="ab"),
    "betas is a list": with_options(betas=[0.5, 0.75]),
    "betas is a tensor": with_options(betas=torch.tensor([0.5, 0.75])),
    "betas is an iterator": with_options(betas=iter((0.5, 0.75))),
    "betas are NaN": with_options(betas=(math.nan, 0.5)),
    "betas are negative": with_options(betas=(0.9, -0.5)),
    "betas are both one": with_options(betas=(1.0, 1.0)),
    "betas are True and False": with_options(betas=(False, False)),
    "betas are integers": with_options(betas=(0, 0)),
    "betas are an integer and a float": with_options(betas=(0, 0.75)),
    "betas are NumPy's": with_options(betas=(np.float32(0.5), np.float32(0.75))),
    "betas are None": with_options(betas=(None, None)),
    "betas are tensors": with_options(betas=(torch.tensor(0.5), torch.tensor(0.75))),
    "betas are tensors of shape (1,)": with_options(betas=(torch.tensor([0.5]), torch.tensor([0.75]))),
    "betas are tensors of shape (1, 1, 1)": with_options(betas=(torch.tensor([[[0.5]]]), torch.tensor([[[0.75]]]))),
    "betas are tensors of two elements": with_options(betas=(torch.tensor([0.5, 0.6]), torch.tensor([0.75, 0.8]))),
    "betas are tensors out of range": with_options(betas=(torch.tensor(0.5), torch.tensor(1.5))),
    # Flags.
    "amsgrad is a string": with_options(amsgrad="yes"),
    "maximize is a string": with_options(maximize="yes"),
    "foreach is a string": with_options(foreach="yes"),
    "fused is a string": with_options(fused="yes"),
    "capturable is a string": with_options(capturable="yes"),
    "differentiable is a string": with_options(differentiable="yes"),
    "capturable on the CPU": with_options(capturable=True),
    "capturable and fused on the CPU": with_options(capturable=True, fused=True),
    "differentiable, and a parameter that requires a gradient": with_options(differentiable=True),
    "differentiable and foreach": with_parameters(
        lambda: [leaf(2, 3).detach()], differentiable=True, foreach=True
    ),
    "an option that there is not": with_options(momentum=0.9),
    "decoupled_weight_decay": with_options(decoupled_weight_decay=True),
    # Parameters.
    "no parameters": with_parameters(list),
    "one tensor": with_parameters(lambda: leaf(2)),
    "one parameter": with_parameters(lambda: torch.nn.Parameter(torch.ones(2))),
    "None": with_parameters(lambda: None),
    "numbers": with_parameters(lambda: [1.0]),
    "a string": with_parameters(lambda: "ab"),
    "a set": with_parameters(lambda: {leaf(2), leaf(2)}),
    "a generator": with_parameters(lambda: (leaf(n) for n in (2, 3))),
    "a dictionary of parameters": with_parameters(lambda: {"a": leaf(2)}),
    "a result of an operation": with_parameters(lambda: [leaf(2) * 2]),
    "a tensor that requires no gradient, and has one": with_parameters(lambda: [torch.ones(3)]),
    "a tensor of integers": with_parameters(lambda: [torch.ones(3, dtype=torch.int64)]),
    "a sparse parameter": with_parameters(lambda: [torch.ones(3).to_sparse().requires_grad_()]),
    "an expanded parameter": with_parameters(lambda: [torch.ones(1).expand(3).requires_grad_()]),
    "a complex parameter, fused": with_parameters(complex_with_gradient, fused=True),
    "a group without parameters": with_parameters(lambda: [{"lr": 0.1}]),
    "a group of no parameters": with_parameters(lambda: [{"params": []}]),
    "a group of a set": with_parameters(lambda: [{"params": {leaf(2)}}]),
    "a group of one tensor": with_parameters(lambda: [{"params": leaf(2)}]),
    "a group with an option that there is not": with_parameters(lambda: [{"params": [leaf(2)], "momentum": 0.9}]),
    "a group with a negative lr": with_parameters(lambda: [{"params": [leaf(2)], "lr": -1.0}]),
    "a group with betas out of range": with_parameters(lambda: [{"params": [leaf(2)], "betas": (0.9, 1.5)}]),
    "a group with a negative eps": with_parameters(lambda: [{"params": [leaf(2)], "eps": -1.0}]),
    "a group with a negative weight_decay": with_parameters(lambda: [{"params": [leaf(2)], "weight_decay": -1.0}]),
    "a parameter in two groups": with_parameters(same_parameter_twice),
    "two parameters of one name": with_parameters(lambda: [("a", leaf(2)), ("a", leaf(3))]),
    "a name without a parameter": with_parameters(lambda: [("a", None)]),
    # Groups that come later.
    "a later group": add(lr=0.5),
    "a later group that is a list": then(lambda optimizer: optimizer.add_param_group([leaf(2)])),
    "a later group of a parameter that is there": then(
        lambda optimizer: optimizer.add_param_group({"params": [first(optimizer)]})
    ),
    "a later group with names, where others have none": add(params=[("a", leaf(4))]),
    "a later group with a negative lr": add(lr=-1.0),
    # Numbers that come later.
    "lr becomes negative": set_option(lr=-1.0),
    "lr becomes NaN": set_option(lr=math.nan),
    "lr becomes None": set_option(lr=None),
    "lr becomes a tensor": set_option(lr=torch.tensor(0.5)),
    "lr becomes a tensor of two elements": set_option(lr=torch.tensor([0.5, 0.6])),
    "betas become one": set_option(betas=(0.9,)),
    "betas become three": set_option(betas=(0.9, 0.9, 0.9)),
    "beta1 becomes 1": set_option(betas=(1.0, 0.9)),
    "beta2 becomes 1.5": set_option(betas=(0.5, 1.5)),
    "betas become integers": set_option(betas=(0, 0)),
    "eps becomes negative": set_option(eps=-1e-8),
    "weight_decay becomes negative": set_option(weight_decay=-1.0),
    "amsgrad comes later": set_option(amsgrad=True),
    "lr vanishes": then(lambda optimizer: optimizer.param_groups[0].pop("lr")),
    # Gradients.
    "a sparse gradient": then(sparse_gradient),
    "a gradient of another shape": then(lambda optimizer: setattr(first(optimizer), "grad", leaf(7))),
    "a gradient of another type": then(lambda optimizer: setattr(first(optimizer), "grad", torch.ones(2, 3))),
    "a gradient elsewhere": then(
        lambda optimizer: setattr(first(optimizer), "grad", torch.ones(2, 3, dtype=torch.float64, device="meta"))
    ),
    "an expanded gradient": then(
        lambda optimizer: setattr(first(optimizer), "grad", torch.ones(1, 1, dtype=torch.float64).expand(2, 3))
    ),
    # State.
    "the state of a parameter vanishes": then(lambda optimizer: optimizer.state.clear()),
    "exp_avg vanishes": then(lambda optimizer: state(optimizer).pop("exp_avg")),
    "step vanishes": then(lambda optimizer: state(optimizer).pop("step")),
    "exp_avg is of another shape": then(lambda optimizer: state(optimizer).update(exp_avg=torch.ones(7))),
    "exp_avg is of another type": then(lambda optimizer: state(optimizer).update(exp_avg=torch.ones(2, 3))),
    "exp_avg is None": then(lambda optimizer: state(optimizer).update(exp_avg=None)),
    "exp_avg is a number": then(lambda optimizer: state(optimizer).update(exp_avg=0.5)),
    "step is of shape (1,)": then(lambda optimizer: state(optimizer).update(step=torch.ones(1))),
    "step is of shape (2,)": then(lambda optimizer: state(optimizer).update(step=torch.ones(2))),
    "step is a number": then(lambda optimizer: state(optimizer).update(step=1)),
    "step is in float64": then(lambda optimizer: state(optimizer).update(step=torch.ones((), dtype=torch.float64))),
    "state of which we know nothing": then(lambda optimizer: state(optimizer).update(momentum=torch.ones(1))),
    # Checkpoints.
    "a checkpoint": load(lambda checkpoint: None),
    "a checkpoint without state": load(lambda checkpoint: checkpoint.pop("state")),
    "a checkpoint without groups": load(lambda checkpoint: checkpoint.pop("param_groups")),
    "a checkpoint of no groups": load(lambda checkpoint: checkpoint["param_groups"].clear()),
    "a checkpoint of more groups": load(lambda checkpoint: checkpoint["param_groups"].append({"params": [1]})),
    "a checkpoint of more parameters": load_group(params=[0, 1]),
    "a checkpoint whose group lacks its parameters": load_group(without="params"),
    "a checkpoint whose group lacks lr": load_group(without="lr"),
    "a checkpoint whose group lacks betas": load_group(without="betas"),
    "a checkpoint whose group lacks amsgrad": load_group(without="amsgrad"),
    "a checkpoint with a negative lr": load_group(lr=-1.0),
    "a checkpoint with an option that there is not": load_group(momentum=0.9),
    "a checkpoint with names": load_group(param_names=["a"]),
    "a checkpoint with betas in a list": load_group(betas=[0.5, 0.75]),
    "a checkpoint that lacks exp_avg_sq": load_state(without="exp_avg_sq"),
    "a checkpoint that lacks step": load_state(without="step"),
    "a checkpoint of another shape": load_state(exp_avg=torch.ones(7)),
    "a checkpoint with the state of a parameter more": load(
        lambda checkpoint: checkpoint["state"].update({7: {"step": torch.ones(())}})
    ),
    # The rest.
    "a closure that cannot be called": then(lambda optimizer: optimizer.step(1.0)),
    "an unknown argument of step": then(lambda optimizer: optimizer.step(loss=1.0)),
}  # fmt: skip


def of_torch(case: Any) -> Case:
    given = case.optimizer_error_input
    params = given.params
    return lambda optimizer: optimizer([leaf(2, 3)] if params is None else params, **given.kwargs), None


CASES = {**{name: of_torch(case) for name, case in optimizer_db.error_inputs().items()}, **OURS}


def attempt(optimizer_class: Any, case: Case) -> tuple[str, list[Tensor]]:
    """Say what comes of a case: the error, and when, or a warning, or else "taken"; and the parameters then."""
    make, meddle = case
    when, params = "when made", []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer = make(optimizer_class)
            for turn in range(STEPS):
                if turn == 1 and meddle is not None:
                    when = "at the change"
                    meddle(optimizer)
                when = "at a step"
                params = [p for group in optimizer.param_groups for p in group["params"]]
                for p in params:
                    give_gradient(p)
                optimizer.step()
        except Exception as error:
            return f"{type(error).__name__} {when}", params
    return f"taken, with a {caught[0].category.__name__}" if caught else "taken", params

"""Bad input is refused with an error that names the value and what is allowed, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ADAMW, ADAN, METHODS, Method, give_gradients, parameters, run, snapshot

import agr_cuda

SHAPES = [(7,), (64, 33), (31,)]

VALUES: list[tuple[Method, dict[str, Any], list[str]]] = [
    *((method, options, named) for method in METHODS for options, named in (
        ({"lr": -1e-3}, ["lr|learning rate", "-0.001"]),
        ({"lr": math.nan}, ["lr|learning rate", "nan"]),
        ({"lr": torch.tensor(-0.5)}, ["lr|learning rate", "-0.5"]),
        ({"lr": torch.tensor([0.1, 0.2])}, ["lr|learning rate"]),
        ({"eps": -1e-8}, ["eps", "-1e-08"]),
        ({"eps": math.nan}, ["eps", "nan"]),
        ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
        ({"weight_decay": math.nan}, ["weight_decay", "nan"]),
    )),
    (ADAMW, {"betas": (1.0, 0.999)}, ["betas?", r"1\.0"]),
    (ADAMW, {"betas": (0.9, -0.5)}, ["betas?", r"-0\.5"]),
    (ADAMW, {"betas": (0.9, 1.5)}, ["betas?", r"1\.5"]),
    (ADAMW, {"betas": (math.nan, 0.5)}, ["betas?", "nan"]),
    (ADAMW, {"betas": (0.9,)}, ["betas", r"0\.9"]),
    (ADAMW, {"betas": (0.98, 0.92, 0.99)}, ["betas", r"0\.92"]),
    (ADAN, {"betas": (1.0, 0.92, 0.99)}, ["betas?", r"1\.0"]),
    (ADAN, {"betas": (0.98, -0.5, 0.99)}, ["betas?", r"-0\.5"]),
    (ADAN, {"betas": (0.98, 0.92, 1.0)}, ["betas?", r"1\.0"]),
    (ADAN, {"betas": (0.98, 0.92, math.nan)}, ["betas?", "nan"]),
    (ADAN, {"betas": (0.9, 0.999)}, ["betas", r"0\.999"]),
]  # fmt: skip

FOR_ALL: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_grad_norm": -1.0}, ["max_grad_norm", r"-1\.0"]),
    ({"max_grad_norm": math.nan}, ["max_grad_norm", "nan"]),
]


def name(case: Any) -> str:
    return str(case) if isinstance(case, (Method, dict)) else ""


def naming(*wanted: str) -> str:
    """A pattern for a message that has each of these in it, in any order."""
    return "(?is)" + "".join(f"(?=.*(?:{pattern}))" for pattern in wanted)


@pytest.mark.parametrize(("method", "options", "named"), VALUES, ids=name)
def test_values_are_refused_by_the_constructor(method: Method, options: dict, named: list, generator) -> None:
    with pytest.raises(ValueError, match=naming(*named)):
        method.ours(parameters(generator, SHAPES), **options)


@pytest.mark.parametrize(("method", "options", "named"), VALUES, ids=name)
def test_values_are_refused_in_a_group(method: Method, options: dict, named: list, generator) -> None:
    params = parameters(generator, SHAPES)
    with pytest.raises(ValueError, match=naming(*named)):
        method.ours([{"params": params[:2]}, {"params": params[2:], **options}])


@pytest.mark.parametrize(("method", "options", "named"), VALUES, ids=name)
def test_values_are_refused_in_a_group_added_later(method: Method, options: dict, named: list, generator) -> None:
    params = parameters(generator, SHAPES)
    optimizer = method.ours(params[:2])
    run(optimizer, 2)
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=naming(*named)):
        optimizer.add_param_group({"params": params[2:], **options})
    unchanged()


@pytest.mark.parametrize(("options", "named"), FOR_ALL, ids=name)
def test_max_grad_norm_is_refused(options: dict, named: list, method, generator) -> None:
    with pytest.raises(ValueError, match=naming(*named)):
        method.ours(parameters(generator, SHAPES), **options)


@pytest.mark.parametrize("option", [{"max_grad_norm": 2.0}, {"backend": "reference"}], ids=str)
def test_what_is_the_optimizers_cannot_differ_in_a_group(option: dict, method, generator) -> None:
    """max_grad_norm and backend are of the whole optimizer."""
    params = parameters(generator, SHAPES)
    given = {"max_grad_norm": 1.0}
    with pytest.raises((ValueError, RuntimeError), match=next(iter(option))):
        method.ours([{"params": params[:2]}, {"params": params[2:], **option}], **given)
    optimizer = method.ours(params[:2], **given)
    run(optimizer, 1)
    unchanged = snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=next(iter(option))):
        optimizer.add_param_group({"params": params[2:], **option})
    unchanged()


def test_boundary_values_are_allowed(method, backend, device, generator) -> None:
    betas = (0.0,) * (2 if method is ADAMW else 3)
    params = parameters(generator, SHAPES, device=device)
    run(method.ours(params, lr=0.0, betas=betas, weight_decay=0.0, max_grad_norm=0.0, backend=backend), 1)
    run(method.ours(params, eps=0.0, backend=backend), 1)
    assert all(p.isfinite().all() for p in params)


# Flags that contradict each other.

CONTRADICTIONS: list[tuple[Method, dict[str, Any]]] = [
    *((method, options) for method in METHODS for options in (
        {"fused": True, "foreach": True},
        {"fused": True, "backend": "reference"},
    )),
    (ADAMW, {"fused": True, "differentiable": True}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), CONTRADICTIONS, ids=name)
def test_contradictions_are_refused(method: Method, options: dict, generator) -> None:
    params = parameters(generator, SHAPES)
    give_gradients(params, generator)
    before = [p.detach().clone() for p in params]
    with pytest.raises((RuntimeError, ValueError), match="fused"):
        method.ours(params, **options).step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_fused_refuses_what_only_the_reference_does(method, generator) -> None:
    params = [*parameters(generator, SHAPES), *parameters(generator, [(7,)], torch.complex64)]
    give_gradients(params, generator)
    before = [p.detach().clone() for p in params]
    with pytest.raises((RuntimeError, ValueError), match="fused"):
        method.ours(params, fused=True).step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# Backends that are not there.


@pytest.mark.parametrize("missing", ["cuda", "triton", "cpu"])
def test_a_missing_backend_is_refused_with_the_reason(missing: str, method, generator, monkeypatch) -> None:
    of_others = agr_cuda.backends.why_missing
    monkeypatch.setattr(
        agr_cuda.backends,
        "why_missing",
        lambda name: "it was left out: build it" if name == missing else of_others(name),
    )
    params = parameters(generator, SHAPES)
    give_gradients(params, generator)
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        RuntimeError, match=rf"backend='{missing}' is not there: it was left out: build it\. There are '"
    ):
        method.ours(params, backend=missing).step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_an_unknown_backend_is_refused_with_the_choices(method, generator) -> None:
    with pytest.raises((RuntimeError, ValueError), match=naming("abacus", *agr_cuda.available_backends())):
        method.ours(parameters(generator, SHAPES), backend="abacus")


# Faults found at the step: the last parameter has one, the others, before it, must not have moved.


def sparse_gradient(optimizer: torch.optim.Optimizer, p: torch.Tensor, key: str) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def state_of_another_shape(optimizer: torch.optim.Optimizer, p: torch.Tensor, key: str) -> None:
    optimizer.state[p][key] = torch.zeros(3, device=p.device)


def state_elsewhere(optimizer: torch.optim.Optimizer, p: torch.Tensor, key: str) -> None:
    optimizer.state[p][key] = optimizer.state[p][key].to("meta")


def resized_under_its_state(optimizer: torch.optim.Optimizer, p: torch.Tensor, key: str) -> None:
    p.data = torch.zeros(5, 5, device=p.device)
    p.grad = torch.ones_like(p)


FAULTS: list[tuple[Callable[..., None], type[Exception] | tuple[type[Exception], ...], str]] = [
    (sparse_gradient, RuntimeError, "sparse"),
    (state_of_another_shape, (RuntimeError, ValueError), r"shape|size"),
    (state_elsewhere, RuntimeError, r"meta|device"),
    (resized_under_its_state, (RuntimeError, ValueError), r"shape|size"),
]


@pytest.mark.parametrize(("fault", "error", "named"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_fault_in_the_last_parameter_leaves_all_as_they_were(
    fault: Callable,
    error: Any,
    named: str,
    which: int,
    max_grad_norm: float | None,
    method,
    backend,
    device,
    generator,
) -> None:
    params = parameters(generator, [*SHAPES, (4, 6)], device=device)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    optimizer = method.ours(groups, max_grad_norm=max_grad_norm, backend=backend)
    run(optimizer, 2)
    give_gradients(params, generator)
    fault(optimizer, params[-1], method.states[which])
    unchanged = snapshot(optimizer)
    with pytest.raises(error, match=naming(named)):
        optimizer.step()
    unchanged()


def test_a_sparse_gradient_in_the_first_step_leaves_no_state(method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, backend=backend)
    give_gradients(params, generator)
    params[-1].grad = torch.ones_like(params[-1]).to_sparse()
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    unchanged()
    give_gradients(params, generator)
    optimizer.step()
    assert method is ADAN or all(float(optimizer.state[p]["step"]) == 1 for p in params)


def test_a_wrong_number_of_betas_set_later_changes_nothing(method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
    run(optimizer, 1)
    give_gradients(params, generator)
    optimizer.param_groups[1]["betas"] = (0.9, 0.9, 0.9, 0.9)
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=naming("beta|unpack")):
        optimizer.step()
    unchanged()


def test_a_failing_closure_changes_nothing(method, backend, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES, device=device), backend=backend)
    run(optimizer, 2)
    unchanged = snapshot(optimizer)

    def closure() -> float:
        raise KeyError("data ran out")

    with pytest.raises(KeyError, match="data ran out"):
        optimizer.step(closure)
    unchanged()


def test_what_torch_refuses_is_refused(method) -> None:
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="empty"):
        method.ours([])
    with pytest.raises(TypeError):
        method.ours(p)
    with pytest.raises(TypeError):
        method.ours([1.0])
    with pytest.raises(ValueError, match="non-leaf"):
        method.ours([p * 2])
    with pytest.raises(ValueError, match="more than one"):
        method.ours([{"params": [p]}, {"params": [p]}])


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", None), ("lr", "0.1"), ("eps", None), ("weight_decay", [0.1]), ("max_grad_norm", (1.0,))],
)
def test_what_is_no_number_is_refused_by_name(method, option, value) -> None:
    with pytest.raises(TypeError, match=f"{option} is .*must be a number"):
        method.ours([torch.nn.Parameter(torch.ones(3))], **{option: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("asked", [None, "reference"])
def test_gradients_that_would_lose_something_are_refused(
    dtype: torch.dtype, asked: str | None, method: Method, generator
) -> None:
    """Any type of gradient can be given to a parameter whose grad_dtype is None."""
    params = parameters(generator, SHAPES)
    optimizer = method.ours(params, backend=asked)
    give_gradients(params, generator)
    params[1].grad_dtype = None
    params[1].grad = torch.ones_like(params[1], dtype=dtype)
    unchanged = snapshot(optimizer)
    message = rf"gradient of group 0, parameter 1 is {dtype}; it must be real floating-point numbers"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    unchanged()

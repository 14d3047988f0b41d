"""grad_scale and found_inf, which torch.amp.GradScaler hands to an optimizer: the step divides the gradients by the
one, without writing them, and does nothing at all, not even count, where the other says so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import oracle
import pytest
import torch
from conftest import takes
from helpers import (
    ADAMW,
    ADAN,
    all_params,
    assert_close,
    assert_parameters_close,
    assert_same_bits,
    copies,
    give_gradients,
    oracle_for,
    oracle_gradients,
    oracle_parameter,
    pairs,
    parameters,
    relative_error,
    run,
    same_bits,
)
from torch import Tensor

import agr_cuda

SHAPES = [(), (7,), (0,), (64, 33), (1009,)]
SMALL = [(7,), (64, 33), (31,)]
SCALES = (1000.1, 3.7, 1024.0, 0.3)  # in float16, gradients times these are still finite


# A run is written as a word: in a step "+" both attributes are set, in "-" an infinity was found, "." is ordinary.


def amp_step(optimizer: torch.optim.Optimizer, grad_scale: Any, found_inf: Any) -> None:
    """A step as GradScaler makes it: the attributes are there for the step alone."""
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def scale_gradients(params: Sequence[Tensor], scale: Tensor) -> None:
    """As the backward pass of a loss times `scale` leaves them."""
    for p in params:
        if p.grad is not None:
            p.grad.mul_(scale.item())


def spoil(params: Sequence[Tensor], step: int) -> None:
    """An infinity or a NaN in the largest gradient; the others stay finite."""
    largest = max((p.grad for p in params if p.grad is not None), key=torch.numel)
    largest.view(-1)[step % largest.numel()] = (torch.inf, torch.nan, -torch.inf)[step % 3]


def take_step(optimizer: torch.optim.Optimizer, kind: str, step: int, expected: Any = None) -> None:
    """Step `step` of a run, on the gradients that are there, and the oracle's if there is one."""
    params = all_params(optimizer)
    if kind == ".":
        optimizer.step()
        if expected:
            expected.step(oracle_gradients(params))
        return
    device = params[0].device
    scale = torch.tensor(SCALES[step % len(SCALES)], device=device)
    scale_gradients(params, scale)
    if kind == "-":
        spoil(params, step)
    amp_step(optimizer, scale, torch.tensor(float(kind == "-"), device=device))
    if expected and kind == "+":
        expected.step(unscaled(oracle_gradients(params), scale))


def unscaled(grads: list[Any], scale: Tensor) -> list[Any]:
    return [None if g is None else g / scale.item() for g in grads]


def amp_run(optimizer: torch.optim.Optimizer, kinds: str, expected: Any = None, first: int = 0, late: int = 0) -> None:
    """Steps first, first + 1, ... on gradients that depend on the step alone. Parameter 1 has none before `late`."""
    params = all_params(optimizer)
    for step, kind in enumerate(kinds, start=first):
        give_gradients(params, torch.Generator().manual_seed(step), step)
        if step < late:
            params[1].grad = None
        take_step(optimizer, kind, step, expected)


def sixteen_bit(dtype: torch.dtype) -> dict[str, float]:
    """What makes accuracy in 16 bits a fair question: see test_accuracy."""
    return {"lr": 1e-2, "eps": 1e-3} if dtype in (torch.bfloat16, torch.float16) else {}


def values(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a skipped step must leave alone, copied: parameters, states and step counts."""
    kept = {}
    for index, group in enumerate(optimizer.param_groups):
        kept[f"steps of group {index}"] = torch.tensor(int(group.get("step", 0)))
        for place, p in enumerate(group["params"]):
            kept[f"group {index}, parameter {place}"] = p.detach().clone()
            for key, x in optimizer.state.get(p, {}).items():
                kept[f"group {index}, parameter {place}, {key}"] = torch.as_tensor(x).detach().clone()
    return kept


def assert_unchanged(optimizer: torch.optim.Optimizer, before: dict[str, Tensor]) -> None:
    now = values(optimizer)
    assert now.keys() == before.keys()
    for label, x in before.items():
        assert same_bits(now[label], x), f"{label} changed"


def steps_taken(optimizer: torch.optim.Optimizer) -> set[int]:
    if isinstance(optimizer, agr_cuda.Adan):
        return {int(group["step"]) for group in optimizer.param_groups}
    return {int(optimizer.state[p]["step"]) for p in all_params(optimizer)}


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Beside the oracle.


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("copied", ["made", "deepcopy", "pickle"])
def test_it_says_so_where_torchs_optimizers_do(copied: str, fused: bool | None, method, generator) -> None:
    """Of instances made with fused=True: the scaler then leaves unscaling and skipping to the step."""
    optimizer = method.ours(parameters(generator, SMALL), fused=fused)
    theirs = torch.optim.AdamW(parameters(generator, SMALL), fused=fused)
    if copied != "made":
        optimizer = copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    says = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert says is bool(fused)
    assert says == getattr(theirs, "_step_supports_amp_scaling", False)
    assert not hasattr(type(optimizer), "_step_supports_amp_scaling")


@pytest.mark.parametrize(("kinds", "options"), [
    ("++---+++--", {}),
    ("--+.-+..-+", {"capturable": True, "max_grad_norm": 0.5, "maximize": True}),
])  # fmt: skip
def test_ten_steps_are_the_oracles(kinds: str, options: dict, method, backend, float_dtype, device, generator) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer = method.ours(params, backend=backend, **sixteen_bit(float_dtype), **options)
    expected = oracle_for(method, optimizer, options.get("max_grad_norm"))
    amp_run(optimizer, kinds, expected)
    assert_close(optimizer, expected)


def test_groups_may_differ_in_everything(method, backend, float_dtype, device, generator) -> None:
    own = [
        {"lr": 1e-2, "weight_decay": 0.1, "agr": False},
        {"eps": 1e-2, "maximize": True},
        {"betas": (0.8, 0.9, 0.95)[: 2 if method is ADAMW else 3], "lr": 2e-3, "capturable": True},
        {"amsgrad": True} if method is ADAMW else {"no_prox": True, "weight_decay": 0.05},
    ]
    groups = [{"params": parameters(generator, SMALL[i % 3 :], float_dtype, device), **g} for i, g in enumerate(own)]
    optimizer = method.ours(groups, max_grad_norm=2.0, backend=backend, **sixteen_bit(float_dtype))
    expected = oracle_for(method, optimizer, 2.0)
    amp_run(optimizer, "-++--.+-++", expected)
    assert_close(optimizer, expected)


def test_dtypes_may_be_mixed(method, backend, device, generator) -> None:
    kinds = [d for d in (torch.float32, torch.bfloat16, torch.float64, torch.float16) if takes(backend, d)]
    params = [p for dtype in kinds for p in parameters(generator, [(31,), (64, 33), (1009,)], dtype, device)]
    optimizer = method.ours(params, lr=1e-2, eps=1e-3, backend=backend)
    expected = oracle_for(method, optimizer)
    amp_run(optimizer, "-+--+.+-++", expected)
    assert_close(optimizer, expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_16_bit_parameters_may_have_float32_gradients(
    low: torch.dtype, max_grad_norm: float | None, method, backend, device, generator
) -> None:
    """As those of a model cast after its backward pass. A backend asked for by name steps rightly or refuses."""
    params = parameters(generator, SMALL, device=device)
    give_gradients(params, generator)
    for p in params:
        p.data = p.data.to(low)
    optimizer = method.ours(params, max_grad_norm=max_grad_norm, backend=backend, **sixteen_bit(low))
    expected = oracle_for(method, optimizer, max_grad_norm)
    before = values(optimizer)
    for step, kind in enumerate("+--+-.++"):
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        try:
            take_step(optimizer, kind, step, expected)
        except RuntimeError:
            assert step == 0
            assert_unchanged(optimizer, before)
            return
    assert all(p.grad.dtype == torch.float32 for p in params)
    assert_close(optimizer, expected)


def test_complex_parameters(method, device, generator) -> None:
    params = parameters(generator, [(7,), (64, 33)], torch.complex64, device)
    optimizer = method.ours(params, max_grad_norm=2.0)
    expected = oracle_for(method, optimizer, 2.0)
    amp_run(optimizer, "-+--+.+", expected)
    assert_close(optimizer, expected)


def test_a_tensor_of_many_chunks(method, backend, device, generator) -> None:
    params = parameters(generator, [(31,), (100_003,), (64, 33)], device=device)
    optimizer = method.ours(params, max_grad_norm=10.0, backend=backend)
    expected = oracle_for(method, optimizer, 10.0)
    amp_run(optimizer, "-+-+", expected)
    assert_close(optimizer, expected)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("scale", [2.0**-20, 1 / 3, 3.7, 65536.0, 2.0**100], ids=lambda scale: f"{scale:.3g}")
def test_any_scale(scale: float, max_grad_norm: float | None, method, backend, device, generator) -> None:
    """psi(c g) = c psi(g), and the norm is that of the unscaled gradients. In float32 the square of the largest
    scale's gradients would be infinite."""
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, max_grad_norm=max_grad_norm, backend=backend)
    expected = oracle_for(method, optimizer, max_grad_norm)
    grad_scale, found_inf = torch.tensor(scale, device=device), torch.zeros((), device=device)
    for step in range(3):
        give_gradients(params, generator, step)
        scale_gradients(params, grad_scale)
        amp_step(optimizer, grad_scale, found_inf)
        expected.step(unscaled(oracle_gradients(params), grad_scale))
    assert_close(optimizer, expected)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_unscaling_commutes_with_psi(max_grad_norm: float | None, method, backend, device, generator) -> None:
    """A step on scaled gradients is the step on the gradients themselves."""
    params = parameters(generator, SHAPES, device=device)
    options = {"max_grad_norm": max_grad_norm, "backend": backend}
    scaled, plain = method.ours(params, **options), method.ours(copies(params), **options)
    amp_run(scaled, "++++++")
    amp_run(plain, "......")
    assert_parameters_close(params, all_params(plain))


def test_it_is_torchs_fused_adamw_without_agr(backend, device, generator) -> None:
    dtype = torch.float64 if takes(backend, torch.float64) else torch.float32
    params = parameters(generator, SHAPES, dtype, device)
    ours = agr_cuda.AdamW(params, agr=False, amsgrad=True, backend=backend)
    theirs = torch.optim.AdamW(copies(params), fused=True, amsgrad=True)
    amp_run(ours, "--++-+.-++")
    amp_run(theirs, "--++-+.-++")
    assert_parameters_close(params, all_params(theirs))
    for p, q in zip(params, all_params(theirs), strict=True):
        assert float(ours.state[p]["step"]) == float(theirs.state[q]["step"]) == 6
        for key in (*ADAMW.states, "max_exp_avg_sq"):
            assert_parameters_close([ours.state[p][key]], [theirs.state[q][key]])


# Skipping.


@pytest.mark.parametrize(("scaled", "max_grad_norm", "found"), [(True, None, 1.0), (False, 0.5, 2.0)])
def test_a_skipped_step_changes_nothing(
    scaled: bool, max_grad_norm: float | None, found: float, method, backend, float_dtype, device, generator
) -> None:
    """Nor the parameters whose gradients are finite. Infinities on two devices add up to 2."""
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer = method.ours(params, max_grad_norm=max_grad_norm, lr=0.1, backend=backend)
    amp_run(optimizer, "++")
    before = values(optimizer)
    grad_scale = torch.tensor(8.0, device=device) if scaled else None
    for step in range(3):
        give_gradients(params, generator, step)
        spoil(params, step)
        amp_step(optimizer, grad_scale, torch.tensor(found, device=device))
        assert_unchanged(optimizer, before)
    assert steps_taken(optimizer) == {2}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01, "maximize": True}, {"capturable": True}], ids=str)
def test_gradients_are_never_written(options: dict, method, backend, float_dtype, device, generator) -> None:
    """Not in steps that are taken, nor in others. (torch's fused optimizers leave unscaled gradients behind.)"""
    params = parameters(generator, SHAPES, float_dtype, device)
    give_gradients(params, generator)
    spoil(params, 0)
    before = [(p.grad, p.grad.data_ptr(), p.grad._version, p.grad.clone()) for p in params]
    optimizer = method.ours(params, backend=backend, **options)
    for found in (0.0, 1.0, 0.0):
        amp_step(optimizer, torch.tensor(3.0, device=device), torch.tensor(found, device=device))
    for p, (grad, address, version, value) in zip(params, before, strict=True):
        assert p.grad is grad
        assert (p.grad.data_ptr(), p.grad._version) == (address, version)
        assert same_bits(p.grad, value)


def test_the_attributes_are_never_written(method, backend, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SMALL, device=device), backend=backend)
    for found in (0.0, 1.0):
        given = torch.tensor(3.0, device=device), torch.tensor(found, device=device)
        give_gradients(all_params(optimizer), generator)
        amp_step(optimizer, *given)
        assert [x.item() for x in given] == [3.0, found]


def test_skipped_first_steps_are_as_if_never_made(method, backend, float_dtype, device, generator) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer, twin = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    amp_run(optimizer, "---")
    for p, q in zip(params, all_params(twin), strict=True):
        assert same_bits(p, q)
        state = optimizer.state.get(p, {})
        assert not any(bool(torch.as_tensor(state[key]).any()) for key in ("step", *method.states[:-1]) if key in state)
    amp_run(optimizer, "+++", first=3)
    amp_run(twin, "+++", first=3)
    assert steps_taken(optimizer) == {3}
    assert_same_bits(optimizer, twin)


def test_skipped_steps_between_others_are_as_if_never_made(method, backend, float_dtype, device, generator) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer, twin = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    amp_run(optimizer, "+--+-+-")
    for step in (0, 3, 5):
        amp_run(twin, "+", first=step)
    assert_same_bits(optimizer, twin)


@pytest.mark.parametrize("kinds", ["+++-++", "+++---+-++", "-+---+", ".+.--.++", "..-.-+"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_late_parameters_first_step_is_its_first_that_is_taken(
    capturable: bool, kinds: str, method, backend, device, generator
) -> None:
    """Its first gradient comes at t = 4, in most of these with an infinity: the difference is still 0 at the next."""
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, lr=1e-2, capturable=capturable, backend=backend)
    expected = oracle_for(method, optimizer)
    amp_run(optimizer, kinds, expected, late=3)
    assert_close(optimizer, expected)


def test_a_gradient_that_was_skipped_and_then_missing(method, backend, device, generator) -> None:
    """Parameter 0 has its first gradient in a step that is skipped, none in one that is taken, and then another."""
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, backend=backend)
    expected = oracle_for(method, optimizer)
    for step, kind in enumerate("+-+-.++"):
        give_gradients(params, torch.Generator().manual_seed(step), step)
        if step in (0, 2, 4):
            params[0].grad = None
        take_step(optimizer, kind, step, expected)
    assert_close(optimizer, expected)


def test_a_group_added_before_a_step_that_is_skipped(method, backend, device, generator) -> None:
    params, added = (parameters(generator, SMALL, device=device) for _ in range(2))
    optimizer = method.ours(params, max_grad_norm=3.0, backend=backend)
    expected = oracle_for(method, optimizer, 3.0)
    amp_run(optimizer, "++", expected)
    own = {"lr": 1e-2, "agr": False}
    optimizer.add_param_group({"params": added, **own})
    expected.add_group({"params": [oracle_parameter(p) for p in added], **own})
    amp_run(optimizer, "--+-+.+", expected, first=2)
    assert_close(optimizer, expected)


def test_restart_opt_between_them(backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = agr_cuda.Adan(params, backend=backend)
    expected = oracle_for(ADAN, optimizer)
    amp_run(optimizer, "-++-", expected)
    optimizer.restart_opt()
    expected.restart()
    assert steps_taken(optimizer) == {0}
    amp_run(optimizer, "--+-+", expected, first=4)
    assert_close(optimizer, expected)


def test_a_skipped_step_without_gradients_is_not_counted(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, backend=backend)
    amp_run(optimizer, "++")
    before = values(optimizer)
    optimizer.zero_grad()
    amp_step(optimizer, torch.tensor(2.0, device=device), torch.tensor(1.0, device=device))
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_found_inf_decides_and_not_the_gradients(value: float, method, backend, device, generator) -> None:
    """What found_inf does not speak of spreads as in any step: an infinity becomes a NaN, a NaN is then in all."""
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, backend=backend)
    give_gradients(params, generator)
    params[1].grad[5, 5] = value
    amp_step(optimizer, torch.tensor(2.0, device=device), torch.tensor(0.0, device=device))
    assert params[1][5, 5].isnan()
    assert params[1].isnan().sum() == (params[1].numel() if value != value else 1)
    assert params[0].isfinite().all()
    assert params[2].isfinite().all()


# What the attributes may be.

FORMS = {
    "one element": lambda x: torch.tensor([x]),
    "float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "one element of float64": lambda x: torch.tensor([x], dtype=torch.float64),
    "float16": lambda x: torch.tensor(x, dtype=torch.float16),
}


@pytest.mark.parametrize("place", ["with the parameters", "cpu"])
@pytest.mark.parametrize("form", [*FORMS, "bool", "int32"])
def test_forms_of_the_attributes(form: str, place: str, method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, backend=backend)
    expected = oracle_for(method, optimizer)
    there = "cpu" if place == "cpu" else device
    scale = FORMS.get(form, torch.tensor)(20.3).to(there)
    for step, found in enumerate([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]):
        found_inf = FORMS[form](found) if form in FORMS else torch.tensor(found).to(getattr(torch, form))
        give_gradients(params, generator, step)
        scale_gradients(params, scale)
        amp_step(optimizer, scale, found_inf.to(there))
        if not found:
            expected.step(unscaled(oracle_gradients(params), scale))
    assert_close(optimizer, expected)


@pytest.mark.parametrize("absent", ["grad_scale", "found_inf", "both"])
@pytest.mark.parametrize("how", ["None", "not there"])
def test_either_attribute_may_be_absent(absent: str, how: str, method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours(params, backend=backend)
    expected = oracle_for(method, optimizer)
    given = {"grad_scale": torch.tensor(20.3, device=device), "found_inf": torch.zeros((), device=device)}
    for name in list(given) if absent == "both" else [absent]:
        given[name] = None
    scale = given["grad_scale"]
    for name, value in given.items():
        if value is not None or how == "None":
            setattr(optimizer, name, value)
    for step in range(3):
        give_gradients(params, generator, step)
        if scale is not None:
            scale_gradients(params, scale)
        optimizer.step()
        grads = oracle_gradients(params)
        expected.step(grads if scale is None else unscaled(grads, scale))
    assert_close(optimizer, expected)


# Through GradScaler itself.


def unscaling(optimizer: Any) -> Any:
    """Have the scaler leave scale and infinities to the step, as it does if the optimizer is made with fused=True."""
    optimizer._step_supports_amp_scaling = True
    return optimizer


def scaler_steps(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, kinds: str, unscale: bool
) -> Iterator[tuple[str, list[Any]]]:
    """Steps under a scaler. Yields each one's kind and the gradients in float64, unscaled."""
    params = all_params(optimizer)
    for step, kind in enumerate(kinds):
        give_gradients(params, torch.Generator().manual_seed(step), step)
        scale = scaler.scale(torch.ones((), device=params[0].device))
        scale_gradients(params, scale)
        if kind == "-":
            spoil(params, step)
        if unscale:
            scaler.unscale_(optimizer)
            scale.fill_(1.0)
        yield kind, unscaled(oracle_gradients(params), scale)
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scaler.update()


@pytest.mark.parametrize(("unscale", "max_grad_norm"), [(False, 0.5), (True, None)])
def test_through_grad_scaler(
    unscale: bool, max_grad_norm: float | None, method, backend, float_dtype, device, generator
) -> None:
    """The scale changes on the way, by factors that are no powers of two. GradScaler refuses to unscale float16
    itself, and leaves it to an optimizer that can."""
    unscale = unscale and float_dtype != torch.float16
    params = parameters(generator, SHAPES, float_dtype, device)
    options = {"max_grad_norm": max_grad_norm, "backend": backend, **sixteen_bit(float_dtype)}
    optimizer = unscaling(method.ours(params, **options))
    expected = oracle_for(method, optimizer, max_grad_norm)
    scaler = torch.amp.GradScaler(
        device.type, init_scale=100.0, growth_factor=1.7, backoff_factor=0.3, growth_interval=2
    )
    for kind, grads in scaler_steps(optimizer, scaler, "-++---++++", unscale):
        if kind == "+":
            expected.step(grads)
    assert scaler.get_scale() == pytest.approx(100 * 0.3**4 * 1.7**3, rel=1e-5)
    assert_close(optimizer, expected)


def test_two_optimizers_of_one_scaler_skip_each_for_itself(method, backend, device, generator) -> None:
    both = [unscaling(method.ours(parameters(generator, SMALL, device=device), backend=backend)) for _ in range(2)]
    expected = [oracle_for(method, optimizer) for optimizer in both]
    scaler = torch.amp.GradScaler(device.type, init_scale=1000.0)
    for step, bad in enumerate([0, None, 1, 0, None]):
        scale = scaler.scale(torch.ones((), device=device))
        for index, optimizer in enumerate(both):
            give_gradients(all_params(optimizer), generator, step)
            scale_gradients(all_params(optimizer), scale)
            if index == bad:
                spoil(all_params(optimizer), step)
            else:
                expected[index].step(unscaled(oracle_gradients(all_params(optimizer)), scale))
        for optimizer in both:
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 125.0
    for optimizer, other in zip(both, expected, strict=True):
        assert_close(optimizer, other)


def test_float16_learns_though_its_first_gradients_overflow(method, backend, device, generator) -> None:
    """The whole of it: a scale far too large falls until the gradients are finite, and then the loss does."""
    target = torch.randn(100, generator=generator).to(device)
    p = torch.zeros(100, dtype=torch.float16, device=device, requires_grad=True)
    optimizer = unscaling(method.ours([p], lr=0.1, weight_decay=0.0, eps=1e-4, backend=backend))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (p.float() - target).square().sum()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    skipped = losses.count(losses[0]) - 1  # p is zero until the first step that is taken
    assert scaler.get_scale() == 2.0 ** (24 - skipped)
    assert 5 < skipped < 15
    assert steps_taken(optimizer) == {60 - skipped}
    assert losses[-1] < 0.1 * losses[0]


def test_grad_scaler_with_no_gradients_at_all(method, backend, device, generator) -> None:
    """Then its found_inf is the number 0, of type int."""
    params = parameters(generator, SMALL, device=device)
    optimizer, twins = unscaling(method.ours(params, backend=backend)), copies(params)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))
    scaler.step(optimizer)
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))
    assert not any(optimizer.state.values())


def test_a_disabled_scaler_makes_ordinary_steps(method, backend, device, generator) -> None:
    params = parameters(generator, SMALL, device=device)
    optimizer, twin = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    for step in range(3):
        give_gradients(params, torch.Generator().manual_seed(step), step)
        scaler.step(optimizer)
        scaler.update()
    amp_run(twin, "...")
    assert_same_bits(optimizer, twin)


# Checkpoints.


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kinds", ["-", "+", "-+--+", "+.-", ".+-."])
def test_step_counts_in_a_checkpoint(kinds: str, capturable: bool, method, backend, device, generator) -> None:
    """Adan's is a plain int, as in checkpoints of sail-sg/Adan; AdamW's are tensors, as in torch's. Neither follows
    the steps that come after."""
    params = parameters(generator, SMALL, device=device)
    optimizer = method.ours(params, capturable=capturable, backend=backend)
    taken = len(kinds) - kinds.count("-")
    amp_run(optimizer, kinds)
    saved = optimizer.state_dict()
    if method is ADAN:
        assert type(saved["param_groups"][0]["step"]) is int
        assert saved["param_groups"][0]["step"] == taken
        amp_run(optimizer, "++")
        assert saved["param_groups"][0]["step"] == taken
        assert optimizer.state_dict()["param_groups"][0]["step"] == taken + 2
    elif taken:
        for state in saved["state"].values():
            assert isinstance(state["step"], Tensor)
            assert (state["step"].shape, state["step"].dtype) == ((), torch.float32)
            assert state["step"].item() == taken


@pytest.mark.parametrize("how", ["checkpoint", "deepcopy", "pickle"])
@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6])
def test_a_run_resumes_bit_for_bit(stop: int, how: str, method, backend, device, generator) -> None:
    """Wherever it is stopped: after a first step that was skipped (1), or a late parameter's (4, 5), too."""
    kinds = "-++--+-+"
    params = parameters(generator, SMALL, device=device)
    steady, stopped = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    amp_run(steady, kinds, late=3)
    amp_run(stopped, kinds[:stop], late=3)
    if how == "checkpoint":
        resumed = method.ours(copies(all_params(stopped)), backend=backend)
        resumed.load_state_dict(through_a_file(stopped.state_dict()))
    else:
        resumed = copy.deepcopy(stopped) if how == "deepcopy" else pickle.loads(pickle.dumps(stopped))
    amp_run(resumed, kinds[stop:], first=stop, late=3)
    assert_same_bits(resumed, steady)
    assert steps_taken(resumed) == steps_taken(steady)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_goes_on_in_torchs_fused_adamw_and_back(stop: int, backend, device, generator) -> None:
    kinds = "--++-+.-++-+"
    params = parameters(generator, SHAPES, device=device)
    steady = torch.optim.AdamW(copies(params), fused=True)
    amp_run(steady, kinds)
    ours = agr_cuda.AdamW(params, agr=False, backend=backend)
    amp_run(ours, kinds[:stop])
    theirs = torch.optim.AdamW(copies(params), fused=True)
    saved = ours.state_dict()
    saved["param_groups"][0]["fused"] = True
    theirs.load_state_dict(through_a_file(saved))
    amp_run(theirs, kinds[stop:9], first=stop)
    again = agr_cuda.AdamW(copies(all_params(theirs)), agr=False, backend=None if backend == "reference" else backend)
    again.load_state_dict(through_a_file(theirs.state_dict()))
    amp_run(again, kinds[9:], first=9)
    assert_parameters_close(all_params(again), all_params(steady), 2e-6)
    assert steps_taken(again) == {7}


@pytest.mark.parametrize("fused", [None, False])
def test_torchs_other_adamw_loads_a_run_of_ours(fused: bool | None, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    ours = agr_cuda.AdamW(params, agr=False, backend=backend)
    amp_run(ours, "-++-+")
    theirs = torch.optim.AdamW(copies(params), fused=fused)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    run(theirs, 3)
    run(ours, 3)
    assert_parameters_close(params, all_params(theirs), 2e-6)
    assert steps_taken(ours) == {6}
    assert all(float(theirs.state[q]["step"]) == 6 for q in all_params(theirs))


def test_a_checkpoint_goes_on_in_the_oracle(backend, device, generator) -> None:
    """Adan's, whose neg_pre_grad must be that of the last step taken, and not of one skipped since."""
    params = parameters(generator, SHAPES, device=device)
    optimizer = agr_cuda.Adan(params, backend=backend)
    expected = oracle_for(ADAN, optimizer)
    amp_run(optimizer, "+-+--", expected)
    fresh = agr_cuda.Adan(copies(params), backend=backend)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert isinstance(expected, oracle.Adan)
    for label, x, y in pairs(fresh, expected):
        assert relative_error(x, y) <= 1e-6, label
    amp_run(fresh, "-+.+", expected, first=5)
    assert_close(fresh, expected)

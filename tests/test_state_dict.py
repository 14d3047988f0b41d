"""Checkpoints go both ways between agr_cuda.AdamW and torch.optim.AdamW, and a resumed run continues as if
it had never stopped."""

from __future__ import annotations

import io
import itertools
from copy import deepcopy
from typing import Any

import oracle
import pytest
import torch
from conftest import dtypes_of
from helpers import (
    ADAMW,
    SHAPES,
    Method,
    all_params,
    assert_close,
    assert_parameters_close,
    assert_same_bits,
    copies,
    give_gradients,
    oracle_gradients,
    oracle_parameter,
    parameters,
    run,
    snapshot,
)
from torch import Tensor

import agr_cuda


def states_close(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    assert_parameters_close(all_params(one), all_params(other))
    for p, q in zip(all_params(one), all_params(other), strict=True):
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in other.state[q].items():
            assert_parameters_close([one.state[p][key]], [value])


def through_a_file(state_dict: dict[str, Any], weights_only: bool = True) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def flags() -> list[dict[str, Any]]:
    """How torch's AdamW may have been made. fused=True needs one of our backends beside the reference."""
    made = []
    for foreach, fused, capturable in itertools.product((None, True, False), (None, True, False), (False, True)):
        if not (foreach and fused) and not (fused and agr_cuda.available_backends() == ["reference"]):
            made.append({"foreach": foreach, "fused": fused, "capturable": capturable})
    return made


def name(flags: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in flags.items())


def torch_checkpoint(params: list[Tensor], made: dict[str, Any], **options: Any) -> tuple[dict, torch.optim.AdamW]:
    """A checkpoint of torch's AdamW after 5 steps, and that optimizer, still able to go on where it is.

    torch refuses to step with capturable=True on a CPU, but a checkpoint that says so may come from a GPU.
    """
    here = {**made, "capturable": made.get("capturable") and params[0].device.type != "cpu"}
    theirs = torch.optim.AdamW(params, **options, **here)
    run(theirs, 5)
    checkpoint = deepcopy(theirs.state_dict())
    for group in checkpoint["param_groups"]:
        group["capturable"] = made.get("capturable", False)
    return checkpoint, theirs


@pytest.mark.parametrize("made", flags(), ids=name)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_run_of_torchs_continues_here(made: dict, amsgrad: bool, generator) -> None:
    params = parameters(generator)
    checkpoint, theirs = torch_checkpoint(params, made, lr=2e-3, amsgrad=amsgrad)
    ours = agr_cuda.AdamW(copies(params), agr=False)
    ours.load_state_dict(through_a_file(checkpoint))
    run(theirs, range(5, 10))
    run(ours, range(5, 10))
    states_close(ours, theirs)
    assert ours.param_groups[0]["lr"] == 2e-3
    assert ours.param_groups[0]["amsgrad"] == amsgrad


def test_each_backend_continues_a_run_of_torchs(backend, device, generator) -> None:
    params = parameters(generator, device=device)
    checkpoint, theirs = torch_checkpoint(params, {}, lr=2e-3)
    ours = agr_cuda.AdamW(copies(params), agr=False, backend=backend)
    ours.load_state_dict(checkpoint)
    run(theirs, range(5, 10))
    run(ours, range(5, 10))
    states_close(ours, theirs)


@pytest.mark.parametrize("made", [m for m in flags() if not m["capturable"]], ids=name)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_our_run_continues_in_torch(made: dict, amsgrad: bool, generator) -> None:
    """Our options in the checkpoint, of which torch knows nothing, do not disturb it."""
    params = parameters(generator)
    ours = agr_cuda.AdamW(params, lr=2e-3, amsgrad=amsgrad, agr=False, max_grad_norm=None)
    run(ours, 5)
    theirs = torch.optim.AdamW(copies(params), **made)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    run(ours, range(5, 10))
    run(theirs, range(5, 10))
    states_close(theirs, ours)


def test_a_checkpoint_may_go_to_and_fro(backend, device, generator) -> None:
    params = parameters(generator, device=device)
    ours = agr_cuda.AdamW(params, agr=False, backend=backend)
    theirs = torch.optim.AdamW(copies(params))
    steady = torch.optim.AdamW(copies(params))
    run(steady, 9)
    for start, one, other in ((0, ours, theirs), (3, theirs, ours), (6, ours, theirs)):
        run(one, range(start, start + 3))
        with torch.no_grad():
            for p, q in zip(all_params(one), all_params(other), strict=True):
                q.copy_(p)
        other.load_state_dict(one.state_dict())
    states_close(ours, steady)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_has_torchs_keys_types_and_layout(amsgrad: bool, backend, float_dtype, device, generator) -> None:
    params = parameters(generator, [(), (0,), (7,), (64, 33)], float_dtype, device)
    image = torch.randn(2, 3, 5, 4, dtype=torch.float32, generator=generator).to(device, float_dtype)
    params += [image.to(memory_format=torch.channels_last).requires_grad_()]
    params += [torch.zeros(6, 4, dtype=float_dtype, device=device).t().requires_grad_()]
    ours = agr_cuda.AdamW(params, amsgrad=amsgrad, backend=backend)
    theirs = torch.optim.AdamW(copies(params), amsgrad=amsgrad)
    run(ours, 1)
    run(theirs, 1)
    for p, q in zip(params, all_params(theirs), strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            mine = ours.state[p][key]
            assert (mine.dtype, mine.shape, mine.stride()) == (value.dtype, value.shape, value.stride()), key
            assert (mine.device, mine.requires_grad) == (value.device, False), key


def test_group_options_have_torchs_names(generator) -> None:
    params = parameters(generator)
    ours, theirs = agr_cuda.AdamW(params), torch.optim.AdamW(copies(params))
    wanted = theirs.param_groups[0].keys() - {"params", "decoupled_weight_decay"}
    assert wanted <= ours.param_groups[0].keys()
    for key in wanted:
        assert ours.param_groups[0][key] == theirs.param_groups[0][key], key


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_our_own_run_resumes_bit_for_bit(
    weights_only: bool, max_grad_norm: float | None, method: Method, backend, float_dtype, device, generator
) -> None:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        groups = [
            {"params": params[:4]},
            {"params": params[4:], "agr": False, "lr": 0.01, "weight_decay": 0.1},
        ]
        return method.ours(groups, max_grad_norm=max_grad_norm, backend=backend)

    params = parameters(generator, SHAPES, float_dtype, device)
    stopped, steady = make(params), make(copies(params))
    run(steady, 8)
    run(stopped, 5)
    resumed = make(copies(params))
    resumed.load_state_dict(through_a_file(stopped.state_dict(), weights_only))
    run(resumed, range(5, 8))
    assert_same_bits(resumed, steady)


@pytest.mark.parametrize("copied", [True, False])
def test_a_live_state_dict_is_taken_as_torch_takes_it(copied: bool, method, backend, device, generator) -> None:
    """Tensors of the right type and device are taken as they are, so that loading needs no memory for others: two
    optimizers that both go on write the same averages, unless a copy was loaded. What the groups say is each one's own.
    """
    params = parameters(generator, [(31,), (64, 33)], device=device)
    first = method.ours(params, backend=backend)
    run(first, 2)
    before = deepcopy(first.state_dict())
    second = method.ours(copies(params), backend=backend)
    second.load_state_dict(deepcopy(first.state_dict()) if copied else first.state_dict())
    for p, q in zip(params, all_params(second), strict=True):
        for key in method.states:
            assert (first.state[p][key] is second.state[q][key]) is not copied
    run(second, 2)
    second.param_groups[0]["lr"] = 0.5
    for index, state in before["state"].items():
        for key in method.states[:2]:  # Adan's last gradient is the same again
            assert torch.equal(state[key], first.state_dict()["state"][index][key]) is copied
    assert before["param_groups"] == first.state_dict()["param_groups"]


@pytest.mark.parametrize("missing", ["amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"])
def test_checkpoints_of_older_torch_load(missing: str, generator) -> None:
    """Early ones lack an option, and hold the step count as a number."""
    params = parameters(generator)
    checkpoint, theirs = torch_checkpoint(params, {})
    for group in checkpoint["param_groups"]:
        del group[missing]
        group.pop("decoupled_weight_decay", None)
    for state in checkpoint["state"].values():
        state["step"] = int(state["step"])
    ours = agr_cuda.AdamW(copies(params), agr=False)
    ours.load_state_dict(checkpoint)
    run(theirs, range(5, 8))
    run(ours, range(5, 8))
    states_close(ours, theirs)


@pytest.mark.parametrize("agr", [(True, True), (False, False), (True, False), (False, True)])
def test_a_checkpoint_without_agr_keeps_each_groups_own(agr: tuple[bool, bool], backend, device, generator) -> None:
    params = parameters(generator, [(31,), (64, 33)], device=device)
    theirs = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    run(theirs, 3)
    ours = agr_cuda.AdamW(
        [{"params": [p], "agr": on} for p, on in zip(copies(params), agr, strict=True)], backend=backend
    )
    ours.load_state_dict(theirs.state_dict())
    assert tuple(group["agr"] for group in ours.param_groups) == agr
    expected = oracle.AdamW([{"params": [oracle_parameter(p)], "agr": on} for p, on in zip(params, agr, strict=True)])
    for p, q in zip(params, expected.params(), strict=True):
        q.steps = 3
        q.state = {key: theirs.state[p][key].double().cpu().numpy() for key in ("exp_avg", "exp_avg_sq")}
    give_gradients(all_params(ours), generator)
    ours.step()
    expected.step(oracle_gradients(all_params(ours)))
    assert_close(ours, expected)


def test_a_checkpoint_without_max_grad_norm_keeps_this_optimizers(backend, device, generator) -> None:
    params = parameters(generator, [(31,), (64, 33)], device=device)
    theirs = torch.optim.AdamW(params)
    run(theirs, 3)
    loaded = agr_cuda.AdamW(copies(params), max_grad_norm=0.1, backend=backend)
    loaded.load_state_dict(deepcopy(theirs.state_dict()))
    plain = agr_cuda.AdamW(copies(params), backend=backend)
    plain.load_state_dict(deepcopy(theirs.state_dict()))
    run(loaded, range(3, 4))
    for p in all_params(plain):
        p.grad = None
    give_gradients(all_params(plain), torch.Generator().manual_seed(1003), 3)
    torch.nn.utils.clip_grad_norm_(all_params(plain), 0.1)
    plain.step()
    assert_parameters_close(all_params(loaded), all_params(plain), 2e-6)


def test_state_follows_a_parameter_to_another_type(method, backend, device, generator) -> None:
    """As in torch: loading casts floating-point state to the parameter's type."""
    params = parameters(generator, [(31,), (64, 33)], device=device)
    first = method.ours(params, backend=backend)
    run(first, 2)
    low = [p.detach().bfloat16().requires_grad_() for p in params]
    second = method.ours(low, backend=backend)
    second.load_state_dict(first.state_dict())
    run(second, range(2, 4))
    for p in low:
        assert torch.bfloat16 in dtypes_of(backend)
        assert {second.state[p][key].dtype for key in method.states} == {torch.bfloat16}
    assert (ADAMW is not method) or all(float(second.state[p]["step"]) == 4 for p in low)


# Hooks.


def tagged(word: str, order: list[str], change: Any = None) -> Any:
    def hook(_: Any, state_dict: Any = None) -> Any:
        order.append(word)
        return change(state_dict) if change else None

    return hook


def test_hooks_see_and_change_what_torch_documents(method: Method, backend, device, generator) -> None:
    """A state dict leaves wrapped up by one hook, and is unwrapped by another before anything looks at it."""
    params = parameters(generator, [(31,), (64, 33)], device=device)
    first, second = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    run(first, 3)
    order: list[str] = []
    first.register_state_dict_pre_hook(tagged("before saving", order))
    first.register_state_dict_post_hook(tagged("wrap", order, lambda saved: {"optimizer": saved}))
    first.register_state_dict_post_hook(tagged("name", order, lambda saved: {**saved, "name": "x"}))
    first.register_state_dict_post_hook(tagged("look", order), prepend=True)
    second.register_load_state_dict_pre_hook(tagged("unwrap", order, lambda loaded: loaded["optimizer"]))
    second.register_load_state_dict_pre_hook(tagged("open", order, lambda loaded: {**loaded["box"]}), prepend=True)
    second.register_load_state_dict_post_hook(lambda optimizer: order.append("loaded"))
    saved = first.state_dict()
    assert set(saved) == {"optimizer", "name"}
    second.load_state_dict({"box": deepcopy(saved)})
    assert order == ["before saving", "look", "wrap", "name", "open", "unwrap", "loaded"]
    with torch.no_grad():
        for p, q in zip(all_params(second), params, strict=True):
            p.copy_(q)
    run(first, range(3, 5))
    run(second, range(3, 5))
    assert_same_bits(first, second)


def test_a_hook_may_lead_to_the_same_call_again(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, [(31,), (64, 33)]))
    run(optimizer, 2)
    calls: list[str] = []

    def once(word: str, act: Any) -> Any:
        def hook(of: Any, state_dict: Any) -> None:
            if word not in calls:
                calls.append(word)
                act(of, state_dict)

        return hook

    optimizer.register_state_dict_post_hook(once("save", lambda of, _: of.state_dict()))
    optimizer.register_state_dict_post_hook(lambda *_: None)
    optimizer.register_load_state_dict_pre_hook(once("load", lambda of, loaded: of.load_state_dict(loaded)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "load"]
    run(optimizer, range(2, 3))


def test_a_hook_may_make_the_groups_fit(backend, device, generator) -> None:
    """What the groups lack then is as it is here: agr too."""
    params = parameters(generator, [(31,), (64, 33)], device=device)
    theirs = torch.optim.AdamW(params)
    run(theirs, 2)
    ours = agr_cuda.AdamW([{"params": [params[0]]}, {"params": [params[1]], "agr": False}], backend=backend)

    def split(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        (group,) = saved["param_groups"]
        return {**saved, "param_groups": [{**group, "params": [0]}, {**group, "params": [1]}]}

    ours.register_load_state_dict_pre_hook(split)
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    assert [group["agr"] for group in ours.param_groups] == [True, False]
    run(ours, range(2, 4))


def test_loading_leaves_the_state_dict_as_it_is(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, [(31,), (64, 33)]))
    run(optimizer, 2)
    saved = optimizer.state_dict()
    before = deepcopy(saved)
    method.ours(copies(all_params(optimizer))).load_state_dict(saved)
    assert saved["param_groups"] == before["param_groups"]
    assert {i: state.keys() for i, state in saved["state"].items()} == {
        i: state.keys() for i, state in before["state"].items()
    }
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_state_dict_post_hooks


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"maximize": "yes"}, {"betas": (2.0, 0.9)}], ids=str)
def test_bad_options_are_refused_when_they_are_loaded(option: dict[str, Any], generator) -> None:
    optimizer = agr_cuda.AdamW(parameters(generator, [(31,)]))
    run(optimizer, 2)
    saved = deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(option)
    unchanged = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        optimizer.load_state_dict(saved)
    unchanged()

"""State that a program made, or a checkpoint held, is used where it is and as a whole, or refused; none is made up."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ADAMW,
    ADAN,
    Method,
    all_params,
    assert_parameters_close,
    assert_same_bits,
    copies,
    give_gradients,
    parameters,
    run,
    same_bits,
    snapshot,
)
from torch import Tensor

import agr_cuda

SHAPES = [(31,), (8, 6)]


def begun(method: Method, backend: str, params: list[Tensor], **options: Any) -> Any:
    optimizer = method.ours(params, backend=backend, **options)
    run(optimizer, 3)
    return optimizer


# Partly missing.

PARTS = [
    (ADAMW, {}, "step"), (ADAMW, {}, "exp_avg"), (ADAMW, {}, "exp_avg_sq"),
    (ADAMW, {"amsgrad": True}, "max_exp_avg_sq"), (ADAMW, {"amsgrad": True}, "step"),
    (ADAN, {}, "exp_avg"), (ADAN, {}, "exp_avg_diff"), (ADAN, {}, "exp_avg_sq"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "missing"), PARTS, ids=str)
@pytest.mark.parametrize("loaded", [False, True])
def test_partly_missing_state_is_refused_by_name(
    loaded: bool, method: Method, options: dict, missing: str, backend, device, generator
) -> None:
    optimizer = begun(method, backend, parameters(generator, SHAPES, device=device), **options)
    if loaded:
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["state"][1][missing]
        optimizer.load_state_dict(saved)
    else:
        del optimizer.state[all_params(optimizer)[1]][missing]
    give_gradients(all_params(optimizer), generator)
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"(?s)group 0, parameter 1 .*lacks {missing}"):
        optimizer.step()
    unchanged()


def test_what_is_none_is_missing(method: Method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer, fresh = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    for p in params:
        optimizer.state[p].update(dict.fromkeys(("step", *method.states) if method is ADAMW else method.states))
    run(optimizer, 3)
    run(fresh, 3)
    assert_same_bits(optimizer, fresh)


@pytest.mark.parametrize("replanned", [False, True])
def test_steps_in_and_out_of_inference_mode_are_the_same(
    replanned: bool, method: Method, backend, device, generator
) -> None:
    """PyTorch lets nobody change in place, outside of that mode, what was made in it."""
    params = parameters(generator, [(2, 3, 5, 4), *SHAPES], device=device)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    twin = begun(method, backend, copies(params))
    with torch.inference_mode():
        optimizer = begun(method, backend, params)
    if replanned:
        for o in (optimizer, twin):
            all_params(o)[0].data = all_params(o)[0].data.contiguous()
    for o in (optimizer, twin):
        run(o, range(3, 5))
    for p, q in zip(params, all_params(twin), strict=True):
        assert same_bits(p, q)


def test_state_that_a_program_made_in_inference_mode_is_refused_before_anything_moves(generator) -> None:
    """By the reference backend, which changes it through PyTorch."""
    params = parameters(generator, SHAPES)
    optimizer = ADAMW.ours(params, backend="reference")
    with torch.inference_mode():
        optimizer.state[params[1]].update(given_state(params[1], torch.zeros(())))
    give_gradients(params, generator)
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"cannot update group 0, parameter 1 outside of torch.inference_mode\(\)"):
        optimizer.step()
    unchanged()
    with torch.inference_mode():
        optimizer.step()
    assert optimizer.state[params[1]]["step"].item() == 1


def test_averages_of_adan_without_a_count_are_refused(backend, device, generator) -> None:
    """Its count is the group's."""
    optimizer = begun(ADAN, backend, parameters(generator, SHAPES, device=device))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["step"]
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="group 0 of the state dict has no step, and its parameters have state"):
        optimizer.load_state_dict(saved)
    unchanged()
    saved["state"].clear()  # as before the first step
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["step"] == 0


def test_previous_gradients_alone_are_no_state(backend, device, generator) -> None:
    optimizer = begun(ADAN, backend, parameters(generator, SHAPES, device=device))
    state = optimizer.state[all_params(optimizer)[0]]
    for key in ("exp_avg", "exp_avg_diff", "exp_avg_sq"):
        del state[key]
    with pytest.raises(RuntimeError, match="has neg_pre_grad and lacks exp_avg, exp_avg_diff, exp_avg_sq"):
        optimizer.step()


def test_state_of_which_all_is_missing_is_made(method: Method, backend, device, generator) -> None:
    """Whatever else is kept there."""
    params = parameters(generator, SHAPES, device=device)
    optimizer, fresh = method.ours(params, backend=backend), method.ours(copies(params), backend=backend)
    for p in params:
        optimizer.state[p]["note"] = "of the program"
    run(optimizer, 3)
    run(fresh, 3)
    for p, q in zip(params, all_params(fresh), strict=True):
        assert optimizer.state[p].pop("note") == "of the program"
        assert same_bits(p, q)
    assert_same_bits(optimizer, fresh)


@pytest.mark.parametrize("count", [3, torch.tensor(3.0), torch.tensor([3])], ids=str)
def test_a_count_of_the_group_is_that_of_its_parameters(count: Any, backend, device, generator) -> None:
    """As apex's FusedAdam saves it. A parameter that has had no gradient yet begins at 0."""
    optimizer = begun(ADAMW, backend, parameters(generator, SHAPES, device=device))
    saved = copy.deepcopy(optimizer.state_dict())
    keys = set(saved["param_groups"][0])
    for state in saved["state"].values():
        del state["step"]
    saved["param_groups"][0]["step"] = count
    del saved["state"][0]
    other = ADAMW.ours(copies(all_params(optimizer)), backend=backend)
    other.load_state_dict(saved)
    assert set(other.state_dict()["param_groups"][0]) == keys
    for o in (optimizer, other):
        run(o, range(3, 5))
    assert [float(other.state[p]["step"]) for p in all_params(other)] == [2, 5]
    assert same_bits(all_params(other)[1], all_params(optimizer)[1])


# Where it is.


def given_state(p: Tensor, step: Tensor) -> dict[str, Tensor]:
    zeros = {key: torch.zeros_like(p.detach()) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": step, **zeros}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_count_that_the_program_made_is_counted_in(
    shape: tuple, capturable: bool, backend, device, generator
) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = ADAMW.ours(params, backend=backend, capturable=capturable)
    twin = ADAMW.ours(copies(params), backend=backend, capturable=capturable)
    where = device if capturable or backend in ("cuda", "triton") else "cpu"
    given = [given_state(p, torch.zeros(shape, dtype=torch.float32, device=where)) for p in params]
    for p, state in zip(params, given, strict=True):
        optimizer.state[p].update(state)
    run(optimizer, 3)
    run(twin, 3)
    for p, q, state in zip(params, all_params(twin), given, strict=True):
        assert all(optimizer.state[p][key] is value for key, value in state.items())
        assert state["step"].shape == shape
        assert state["step"].item() == 3
        assert same_bits(p, q)


@pytest.mark.parametrize("of_count", [torch.float64, torch.int64, torch.int32])
def test_a_count_of_another_type_stays_the_object_that_it_is(of_count: torch.dtype, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer, twin = ADAMW.ours(params, backend=backend), begun(ADAMW, backend, copies(params))
    counts = [torch.zeros((), dtype=of_count) for _ in params]
    for p, count in zip(params, counts, strict=True):
        optimizer.state[p].update(given_state(p, count))
    run(optimizer, 3)
    for p, q, count in zip(params, all_params(twin), counts, strict=True):
        assert optimizer.state[p]["step"] is count
        assert count.item() == 3
        assert same_bits(p, q)


def images(generator: torch.Generator, device: torch.device) -> Tensor:
    image = torch.randn(2, 3, 5, 4, generator=generator).to(device)
    return image.to(memory_format=torch.channels_last).requires_grad_()


def test_averages_of_another_layout_stay_the_objects_that_they_are(method: Method, backend, device, generator) -> None:
    params = [images(generator, device)]
    twins = copies(params)
    optimizer, twin = begun(method, backend, params), begun(method, backend, twins)
    held = {key: optimizer.state[params[0]][key] for key in method.states}
    for value in held.values():
        value.data = value.data.contiguous()
    for o in (optimizer, twin):
        run(o, range(3, 6))
    assert_same_bits(optimizer, twin)
    for key, value in held.items():
        assert optimizer.state[params[0]][key] is value


def views(p: Tensor) -> Callable[[], Tensor]:
    """Tensors of the shape of `p`, contiguous, in the second half of more memory."""

    def make() -> Tensor:
        return torch.zeros(2 * p.numel(), dtype=p.dtype, device=p.device)[p.numel() :].view(p.shape)

    return make


def test_parts_of_other_tensors_in_another_layout_are_refused_or_updated_in_place(backend, device, generator) -> None:
    p = images(generator, device)
    optimizer = ADAMW.ours([p], backend=backend)
    make = views(p)
    state = {"exp_avg": make(), "exp_avg_sq": make(), "step": torch.zeros(())}
    optimizer.state[p].update(state)
    give_gradients([p], generator)
    if backend == "reference":
        optimizer.step()
        assert all(optimizer.state[p][key] is value and value.any() for key, value in state.items())
        return
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"(?s)group 0, parameter 0.*exp_avg, in memory shared with others"):
        optimizer.step()
    unchanged()


def test_left_to_choose_it_is_the_reference_that_updates_them(generator) -> None:
    p = images(generator, torch.device("cpu"))
    optimizer = agr_cuda.AdamW([p])
    make = views(p)
    state = {"exp_avg": make(), "exp_avg_sq": make(), "step": torch.zeros(())}
    optimizer.state[p].update(state)
    twin = agr_cuda.AdamW(copies([p]), backend="reference")
    run(optimizer, 2)
    run(twin, 2)
    assert optimizer.backends == ["reference"]
    assert all(optimizer.state[p][key] is value for key, value in state.items())
    assert_parameters_close([p], all_params(twin))


def test_a_shared_count_of_another_type_is_refused(generator) -> None:
    p = parameters(generator, [(7,)])[0]
    optimizer = agr_cuda.AdamW([p], backend="cpu")
    optimizer.state[p].update(given_state(p, torch.zeros((), dtype=torch.float64).share_memory_()))
    give_gradients([p], generator)
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"step of group 0, parameter 0, .*float64 .* must be torch.float32"):
        optimizer.step()
    unchanged()


def three_steps(optimizer: Any) -> None:
    run(optimizer, 3)


@pytest.mark.parametrize("on_cpu", ["cpu", "reference"])
def test_workers_count_in_the_memory_that_they_share(on_cpu: str, generator) -> None:
    """As Hogwild's do: a program makes the state in shared memory, with counts of shape (1,), before it forks."""
    p = parameters(generator, [(31,)])[0]
    p.data.share_memory_()
    optimizer = ADAMW.ours([p], backend=on_cpu)
    state = given_state(p, torch.zeros(1))
    for value in state.values():
        value.share_memory_()
    optimizer.state[p].update(state)
    before = p.detach().clone()
    for _ in range(2):
        worker = multiprocessing.get_context("fork").Process(target=three_steps, args=(optimizer,))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    assert state["step"].item() == 6
    assert state["exp_avg"].any()
    assert not torch.equal(p, before)


# Memory that two tensors share.


def tied(generator: torch.Generator, device: torch.device) -> list[Tensor]:
    memory = torch.randn(1000, generator=generator).to(device)
    return [torch.nn.Parameter(memory[:600]), torch.nn.Parameter(torch.ones(5, device=device)),
            torch.nn.Parameter(memory[599:])]  # fmt: skip


def test_parameters_that_share_memory_are_refused_by_name(method: Method, backend, device, generator) -> None:
    """The reference takes one tensor after the other."""
    params = tied(generator, device)
    optimizer = method.ours([("first", params[0]), ("other", params[1]), ("last", params[2])], backend=backend)
    give_gradients(params, generator)
    unchanged = snapshot(optimizer)
    if backend == "reference":
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match=r"\('first'\) and group 0, parameter 2 \('last'\) share memory"):
        optimizer.step()
    unchanged()
    assert not optimizer.state[params[0]]


def test_states_that_share_memory_are_refused_by_name(backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    optimizer = begun(ADAMW, backend, params)
    memory = torch.zeros(60, device=device)
    optimizer.state[params[0]]["exp_avg"] = memory[:31]
    optimizer.state[params[1]]["exp_avg_sq"] = memory[12:].view(8, 6)
    if backend == "reference":  # which takes one tensor after the other
        optimizer.step()
        return
    with pytest.raises(
        RuntimeError, match="exp_avg of group 0, parameter 0 and exp_avg_sq of group 0, parameter 1 share"
    ):
        optimizer.step()


def test_neighbours_in_one_memory_share_none(method: Method, backend, device, generator) -> None:
    """A flat buffer, cut up; an empty tensor in the middle of another's memory is none either."""
    params = parameters(generator, SHAPES, device=device)
    memory = torch.cat([p.detach().view(-1) for p in params])
    cut = [memory[:31].requires_grad_(), memory[31:].view(8, 6).requires_grad_(), memory[7:7].requires_grad_()]
    optimizer, twin = method.ours(cut, backend=backend), method.ours(copies([*params, cut[2]]), backend=backend)
    run(optimizer, 3)
    run(twin, 3)
    for p, q in zip(cut, all_params(twin), strict=True):
        assert same_bits(p, q)


@pytest.mark.parametrize("views", [False, True])
def test_counts_that_a_checkpoint_shares_become_each_parameters_own(views: bool, backend, device, generator) -> None:
    """Some programs write one tensor for all parameters, or views of one; torch.save keeps that."""
    optimizer = begun(ADAMW, backend, parameters(generator, SHAPES, device=device))
    saved = copy.deepcopy(optimizer.state_dict())
    of_count = torch.float64 if views and backend != "reference" else torch.float32
    count = torch.full((2,) if views else (), 3.0, dtype=of_count)
    for i in range(2):
        saved["state"][i]["step"] = count[i] if views else count
    other = ADAMW.ours(copies(all_params(optimizer)), backend=backend)
    other.load_state_dict(saved)
    for o in (optimizer, other):
        run(o, range(3, 5))
    assert_same_bits(optimizer, other)

"""Parameter groups and defaults: copied from the caller, plain inside, the same keys after every round trip."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ADAMW, ADAN, Method, all_params, assert_same_bits, copies, parameters, run, snapshot

import agr_cuda

SHAPES = [(31,), (8, 6)]
BETAS = {"AdamW": (0.8, 0.9), "Adan": (0.9, 0.8, 0.95)}


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# What the caller gave.


def test_a_second_optimizer_from_the_same_dictionaries_starts_anew(method: Method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    start = [p.detach().clone() for p in params]
    given = [{"params": params[:1], "lr": 0.01}, {"params": params[1:], "agr": False}]
    before = [dict(group) for group in given]
    ends = []
    for _ in range(2):
        with torch.no_grad():
            for p, value in zip(params, start, strict=True):
                p.copy_(value)
        optimizer = method.ours(given, backend=backend)
        run(optimizer, 3)
        ends.append([p.detach().clone() for p in params])
    assert given == before
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_the_groups_of_another_optimizer_are_copied(method: Method, generator) -> None:
    first = method.ours([{"params": parameters(generator, SHAPES), "agr": False, "lr": 0.5}])
    run(first, 2)
    second = method.ours(first.param_groups)
    assert (second.param_groups[0]["agr"], second.param_groups[0]["lr"]) == (False, 0.5)
    assert second.param_groups[0].get("step", 0) == 0
    second.param_groups[0]["lr"] = 0.1
    second.param_groups[0]["agr"] = True
    assert (first.param_groups[0]["agr"], first.param_groups[0]["lr"]) == (False, 0.5)


# agr, which is read and set as others are, and is not among the keys.


def test_agr_of_a_group_is_read_set_and_copied_like_every_option(method: Method, generator) -> None:
    params = parameters(generator, SHAPES)
    optimizer = method.ours([{"params": params[:1]}, {"params": params[1:], "agr": False}])
    for group, agr in zip(optimizer.param_groups, (True, False), strict=True):
        assert group["agr"] is agr
        assert group.get("agr") is agr
        assert "agr" in group
        for copied in (group.copy(), copy.copy(group), copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
            assert copied["agr"] is agr
            assert type(copied) is type(group)
            assert copied.keys() == group.keys()
        group["agr"] = not agr
        assert group["agr"] is not agr
    assert f"agr: {optimizer.param_groups[0]['agr']}" in repr(optimizer)


def test_whoever_walks_a_group_finds_torchs_keys(generator) -> None:
    params = parameters(generator, SHAPES)
    ours, theirs = agr_cuda.AdamW(params).param_groups[0], torch.optim.AdamW(params).param_groups[0]
    assert {*ours} == {*theirs} == {*ours.keys()} == {key for key, _ in ours.items()} == {**ours}.keys()
    assert len(ours) == len(theirs) == len(ours.values())
    for key in theirs.keys() - {"params"}:
        assert ours[key] == theirs[key], key


def test_a_group_replaced_by_a_plain_dictionary_has_the_default(method: Method, backend, device, generator) -> None:
    """As what a program makes of the keys; a warning says so, since it may have been another."""
    params = parameters(generator, SHAPES, device=device)
    optimizer = method.ours([{"params": params, "agr": False}], backend=backend)
    twin = method.ours([{"params": copies(params), "agr": False}], backend=backend)
    run(optimizer, 1)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    held = optimizer.param_groups[0]
    with pytest.warns(UserWarning, match="group 0 came without options that now have their defaults: agr=True"):
        run(optimizer, range(1, 2))
    assert optimizer.param_groups[0] is held  # so that what the program holds goes on to be what counts
    run(twin, 1)
    twin.param_groups[0]["agr"] = True
    run(twin, range(1, 2))
    assert_same_bits(optimizer, twin)


def test_a_plain_group_that_has_not_stepped_is_shown_and_loaded(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES))
    saved = optimizer.state_dict()
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    assert "agr: None" in repr(optimizer)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["agr"] is True


# Round trips.


def test_a_shallow_copy_shares_what_torchs_shares(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES))
    group = optimizer.param_groups[0]
    copied = copy.copy(optimizer)
    assert copied.param_groups[0] is group
    assert optimizer.param_groups[0] is group


def test_a_subclass_may_compare_its_optimizers(method: Method, generator) -> None:
    """And so have none that can be hashed."""

    class Comparable(method.ours):
        def __eq__(self, other: object) -> bool:
            return True

    run(Comparable(parameters(generator, SHAPES)), 1)


def rebuilt(optimizer: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(optimizer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    other = type(optimizer)(copies(all_params(optimizer)))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
def test_keys_are_the_same_after_every_round_trip(how: str, method: Method, backend, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES, device=device), backend=backend)
    run(optimizer, 2)
    saved = optimizer.state_dict()
    for _ in range(2):
        optimizer = rebuilt(optimizer, how)
        run(optimizer, 1)
        again = optimizer.state_dict()
        assert [group.keys() for group in again["param_groups"]] == [group.keys() for group in saved["param_groups"]]
        assert {i: state.keys() for i, state in again["state"].items()} == {
            i: state.keys() for i, state in saved["state"].items()
        }
        assert optimizer.defaults.keys() == method.ours(parameters(generator, SHAPES)).defaults.keys()


@pytest.mark.parametrize("copied", ["made", "deepcopy", "pickle"])
def test_an_optimizer_is_rebuilt_from_its_class_and_defaults(copied: str, method: Method, generator) -> None:
    options = {"lr": 0.02, "betas": BETAS[method.name], "eps": 1e-5, "weight_decay": 0.3, "agr": False,
               "maximize": True, "max_grad_norm": 0.1, "backend": "reference", "capturable": True}  # fmt: skip
    first = method.ours(parameters(generator, SHAPES), **options)
    if copied != "made":
        first = rebuilt(first, copied)
    again = type(first)(copies(all_params(first)), **first.defaults)
    assert (again.max_grad_norm, again.backend) == (0.1, "reference")
    assert again.defaults == first.defaults
    run(first, 2)
    run(again, 2)
    assert_same_bits(first, again)


def test_max_grad_norm_and_backend_may_be_set_later(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES))
    optimizer.max_grad_norm, optimizer.backend = 0.25, "reference"
    assert (optimizer.defaults["max_grad_norm"], optimizer.defaults["backend"]) == (0.25, "reference")
    twin = method.ours(copies(all_params(optimizer)), max_grad_norm=0.25, backend="reference")
    run(optimizer, 2)
    run(twin, 2)
    assert_same_bits(optimizer, twin)


# max_grad_norm and backend in a group.


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"backend": "cpu"}, {"max_grad_norm": 1, "backend": None}])
def test_a_wrapper_may_hand_options_on_in_the_groups(options: dict, method: Method, generator) -> None:
    """As sharpness-aware wrappers do, and torch's ZeroRedundancyOptimizer: both in the groups and as arguments."""
    params = parameters(generator, SHAPES)
    groups = [{"params": [p], "lr": 0.1, **options} for p in params]
    optimizer, twin = method.ours(groups, lr=0.1, **options), method.ours(copies(params), lr=0.1, **options)
    optimizer.param_groups[0].update(options)  # as a wrapper does that keeps its own groups, before a step
    run(optimizer, 2)
    run(twin, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, all_params(twin), strict=True))


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_no_clipping_may_be_said_in_either_way(off: Any, method: Method, generator) -> None:
    method.ours([{"params": parameters(generator, SHAPES), "max_grad_norm": off}])


def test_another_value_in_a_group_is_refused_at_the_next_step(method: Method, backend, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES, device=device), max_grad_norm=1.0, backend=backend)
    run(optimizer, 1)
    optimizer.param_groups[0].update(max_grad_norm=2.0, lr=0.5)
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"max_grad_norm is 2.0 in a parameter group, and 1.0 for the optimizer"):
        optimizer.step()
    unchanged()


def test_another_value_in_a_group_alone_is_noticed_at_once(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES), max_grad_norm=None)
    run(optimizer, 1)
    optimizer.param_groups[0]["max_grad_norm"] = 0.5
    with pytest.raises(ValueError, match=r"max_grad_norm is 0\.5 in a parameter group, and None"):
        optimizer.step()


def test_no_backend_of_that_name_can_be_set(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES))
    with pytest.raises(ValueError, match="backend is 'x'; it must be None or one of"):
        optimizer.backend = "x"
    assert optimizer.backend is None


# Plain numbers.


def test_options_from_configurations_become_plain(method: Method, generator) -> None:
    """As OmegaConf's lists and NumPy's numbers; torch.load refuses checkpoints that hold others than Python's."""
    betas = BETAS[method.name]
    given = {"lr": np.float64(0.01), "betas": UserList(betas), "eps": np.float32(1e-4), "weight_decay": np.int64(1),
             "agr": np.bool_(False), "maximize": 1, "fused": np.bool_(False)}  # fmt: skip
    for optimizer in (
        method.ours(parameters(generator, SHAPES), **given),
        method.ours([{"params": parameters(generator, SHAPES), **given}]),
    ):
        run(optimizer, 1)
        group = through_a_file(optimizer.state_dict())["param_groups"][0]
        assert group["betas"] == betas
        assert {key: type(optimizer.param_groups[0][key]) for key in given} == {
            "lr": float, "betas": tuple, "eps": float, "weight_decay": float,
            "agr": bool, "maximize": bool, "fused": bool,
        }  # fmt: skip


def test_what_is_loaded_becomes_plain(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, SHAPES))
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(betas=UserList(BETAS[method.name]), lr=np.float64(0.5))
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (type(group["betas"]), type(group["lr"])) == (tuple, float)


def test_tensors_stay_tensors(method: Method, generator) -> None:
    lr, betas = torch.tensor(0.01), tuple(map(torch.tensor, BETAS[method.name]))
    optimizer = method.ours(parameters(generator, SHAPES), lr=lr, betas=betas)
    assert optimizer.param_groups[0]["lr"] is lr
    assert all(x is y for x, y in zip(optimizer.param_groups[0]["betas"], betas, strict=True))


# Booleans.

FLAGS = [
    (ADAMW, {"agr": "yes"}), (ADAMW, {"amsgrad": "no"}), (ADAMW, {"capturable": None}), (ADAMW, {"fused": "auto"}),
    (ADAMW, {"differentiable": 2}), (ADAMW, {"foreach": torch.tensor(True)}), (ADAMW, {"maximize": []}),
    (ADAN, {"agr": "yes"}), (ADAN, {"no_prox": "false"}), (ADAN, {"agr": None}),
    (ADAMW, {"lr": True}), (ADAN, {"eps": False}), (ADAMW, {"betas": (True, 0.9)}), (ADAN, {"max_grad_norm": True}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), FLAGS, ids=str)
def test_booleans_and_numbers_are_not_taken_for_each_other(method: Method, options: dict, generator) -> None:
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=name):
        method.ours(parameters(generator, SHAPES), **options)
    if name == "max_grad_norm":
        return
    with pytest.raises(TypeError, match=name):
        method.ours([{"params": parameters(generator, SHAPES), **options}])
    optimizer = method.ours(parameters(generator, SHAPES))
    run(optimizer, 1)
    optimizer.param_groups[0][name] = value
    unchanged = snapshot(optimizer)
    with pytest.raises(TypeError, match=name):
        optimizer.step()
    unchanged()


def test_weight_decay_is_decoupled(generator) -> None:
    with pytest.raises(ValueError, match="decoupled_weight_decay is False"):
        agr_cuda.AdamW([{"params": parameters(generator, SHAPES), "decoupled_weight_decay": False}])


# Adan's convention.


@pytest.mark.parametrize("betas", [(0.02, 0.08, 0.01), (torch.tensor(0.02), torch.tensor(0.08), torch.tensor(0.01))])
def test_betas_in_the_papers_convention_are_warned_of(betas: Any, generator) -> None:
    with pytest.warns(UserWarning, match=r"convention of sail-sg/Adan.*0\.98") as caught:
        agr_cuda.Adan(parameters(generator, SHAPES), betas=betas)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("betas", [(0.98, 0.92, 0.99), (0.0, 0.9, 0.9), (0.5, 0.5, 0.5)])
def test_other_betas_are_not(betas: tuple, generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agr_cuda.Adan(parameters(generator, SHAPES), betas=betas)


# What it is.


def test_adamw_is_torchs_to_whoever_asks(generator) -> None:
    """And shares nothing with it but the checkpoint: no method of that class makes a step of this."""
    optimizer = agr_cuda.AdamW(parameters(generator, SHAPES))
    assert isinstance(optimizer, torch.optim.AdamW)
    theirs = {name for cls in (torch.optim.Adam, torch.optim.AdamW) for name in vars(cls) if callable(vars(cls)[name])}
    replaced = {name for cls in type(optimizer).__mro__ for name in vars(cls) if cls.__module__.startswith("agr_cuda")}
    assert theirs - replaced == {"_init_group"}  # which step() of that class alone calls
    assert not isinstance(agr_cuda.Adan(parameters(generator, SHAPES)), torch.optim.Adam)

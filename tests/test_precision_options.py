"""The options that say how numbers are stored: their defaults, what is refused and how, and where they are kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ADAMW, Method, parameter, run, snapshot

import agr_cuda
from agr_cuda.precision import Precision

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DEFAULTS = {"state_dtype": None, "master_weights": False, "stochastic_rounding": False, "rounding_seed": 0}
OTHERS = {"state_dtype": BF16, "master_weights": True, "stochastic_rounding": True, "rounding_seed": 5}
BAD_VALUES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"state_dtype": FP16},
        ValueError,
        r"state_dtype is torch.float16; it must be None \(the parameter's\), torch.float32",
    ),
    ({"state_dtype": "bfloat16"}, ValueError, "state_dtype is 'bfloat16'; it must be None"),
    ({"state_dtype": 8}, ValueError, "state_dtype is 8; it must be None"),
    ({"master_weights": None}, TypeError, "master_weights is None; it must be True or False"),
    ({"stochastic_rounding": "yes"}, TypeError, "stochastic_rounding is 'yes'; it must be True or False"),
    ({"rounding_seed": 1.0}, TypeError, "rounding_seed is 1.0; it must be an integer"),
    ({"rounding_seed": True}, TypeError, "rounding_seed is True; it must be an integer"),
    ({"rounding_seed": -1}, ValueError, "rounding_seed is -1; it must be at least 0 and less than 2"),
    ({"rounding_seed": 2**53}, ValueError, "rounding_seed is 9007199254740992; it must be"),
]
BAD_TYPES: list[tuple[dict[str, Any], list[torch.dtype], str]] = [
    (
        {"state_dtype": FP32},
        [FP32, FP64],
        "state_dtype is torch.float32 in group 0, and its parameter 1 is torch.float64",
    ),
    (
        {"state_dtype": "8bit"},
        [torch.complex64],
        "state_dtype is '8bit' in group 0, and its parameter 0 is torch.complex64",
    ),
    ({"master_weights": True}, [FP32], "master_weights is True in group 0, whose parameters are torch.float32; only"),
    ({"master_weights": True}, [torch.complex64, FP64], "whose parameters are torch.complex64, torch.float64; only"),
    (
        {"stochastic_rounding": True},
        [FP16, FP32],
        "nothing is stored in bfloat16: its parameters are torch.float16, torch",
    ),
    ({"stochastic_rounding": True, "state_dtype": FP32}, [FP32], "torch.float32, state_dtype is torch.float32. Only"),
    (
        {"stochastic_rounding": True, "master_weights": True},
        [BF16],
        r"its parameters are torch.bfloat16 with master weights, state_dtype is None. Only.*stochastic_rounding=False",
    ),
    ({"stochastic_rounding": True}, [torch.complex128], "its parameters are torch.complex128, state_dtype is None"),
]


def some(*dtypes: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [parameter((31,), generator, dtype) for dtype in dtypes]


@pytest.mark.parametrize(("options", "error", "message"), BAD_VALUES, ids=str)
def test_bad_values_are_refused_wherever_they_are_given(
    options: dict, error: type[Exception], message: str, method: Method
) -> None:
    with pytest.raises(error, match=message):
        method.ours(some(BF16), **options)
    with pytest.raises(error, match=message):
        method.ours([{"params": some(BF16), **options}])
    optimizer = method.ours(some(BF16))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": some(BF16), **options})
    assert len(optimizer.param_groups) == 1
    run(optimizer, 1)
    optimizer.param_groups[0].update(options)
    unchanged = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    unchanged()


@pytest.mark.parametrize(("options", "dtypes", "message"), BAD_TYPES, ids=str)
def test_options_that_make_no_sense_for_the_parameters_are_refused_at_the_step(
    options: dict, dtypes: list[torch.dtype], message: str, method: Method
) -> None:
    """The parameters' type may change until then."""
    optimizer = method.ours(some(*dtypes), **options)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    unchanged()


@pytest.mark.parametrize("name", ["state_dtype", "master_weights", "stochastic_rounding"])
def test_none_of_them_is_differentiable(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"differentiable=True and {name}=.* exclude each other"):
        agr_cuda.AdamW(some(BF16), differentiable=True, **{name: OTHERS[name]})


def test_each_group_has_its_own(method: Method) -> None:
    """One that makes sense for some of its parameters is taken."""
    first, second, third = some(BF16, FP32), some(FP64), some(FP32)
    groups = [
        {"params": first, "master_weights": True},
        {"params": second},
        {"params": third, "state_dtype": BF16, "stochastic_rounding": True},
        {"params": []},
    ]
    optimizer = method.ours(groups, backend="reference")
    run(optimizer, 2)
    assert ["master_param" in optimizer.state[p] for p in (*first, *second, *third)] == [True, False, False, False]
    of_state = [optimizer.state[p]["exp_avg"].dtype for p in (*first, *second, *third)]
    assert of_state == [FP32, FP32, FP64, BF16]


def test_an_empty_group_takes_any(method: Method) -> None:
    optimizer = method.ours([{"params": some(BF16)}, {"params": []}], master_weights=True, backend="reference")
    run(optimizer, 1)


@pytest.mark.parametrize(
    ("dtype", "elements", "options", "expected"),
    [
        (BF16, 1, {}, (BF16, False, False)),
        (BF16, 1, {"master_weights": True}, (FP32, True, False)),
        (FP32, 1, {"master_weights": True}, (FP32, False, False)),
        (FP16, 1, {"master_weights": True, "state_dtype": BF16}, (BF16, True, False)),
        (FP32, 4095, {"state_dtype": "8bit"}, (FP32, False, False)),
        (BF16, 4096, {"state_dtype": "8bit"}, (torch.uint8, False, False)),
        (BF16, 4096, {"state_dtype": "8bit", "stochastic_rounding": True}, (torch.uint8, False, True)),
        (BF16, 1, {"stochastic_rounding": True, "state_dtype": FP32}, (FP32, False, True)),
        (FP32, 1, {"stochastic_rounding": True, "state_dtype": BF16}, (BF16, False, True)),
        (FP16, 1, {"stochastic_rounding": True}, (FP16, False, False)),
        (BF16, 1, {"stochastic_rounding": True, "master_weights": True}, (FP32, True, False)),
        (torch.complex64, 1, {"master_weights": True, "stochastic_rounding": True}, (torch.complex64, False, False)),
    ],
    ids=str,
)
def test_what_they_mean_for_a_parameter(dtype: torch.dtype, elements: int, options: dict, expected: tuple) -> None:
    assert Precision.of(torch.zeros(elements, dtype=dtype), DEFAULTS | options) == expected


# Where they are kept.


def test_groups_hide_them_and_copies_have_them(method: Method) -> None:
    """torch.optim's groups have no such keys, and checkpoints go both ways. The seed is shown where it counts."""
    plain = method.ours(some(BF16)).param_groups[0]
    group = method.ours(some(BF16), **OTHERS).param_groups[0]
    assert {*group} == {*plain} | {"rounding_seed"} == {*group.keys()} == {**group}.keys()
    assert not {*plain} & DEFAULTS.keys()
    assert len(group) == len(plain) + 1
    for copied in (group, group.copy(), copy.copy(group), copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert {name: copied[name] for name in OTHERS} == OTHERS
        assert {name: plain[name] for name in DEFAULTS} == DEFAULTS
        assert copied.keys() == group.keys()
    group["stochastic_rounding"] = False
    assert {*group} == {*plain}


def test_the_groups_of_another_optimizer_bring_theirs(method: Method) -> None:
    first = method.ours([{"params": some(BF16), **OTHERS}])
    second = method.ours(first.param_groups)
    assert {name: second.param_groups[0][name] for name in OTHERS} == OTHERS
    assert "state_dtype: torch.bfloat16" in repr(second)


def test_a_plain_copy_of_a_group_has_the_optimizers_defaults(method: Method) -> None:
    """Those it was made with; a warning names them."""
    (p,) = some(BF16)
    optimizer = method.ours([p], backend="reference", state_dtype=FP32, master_weights=True)
    run(optimizer, 1)
    master = optimizer.state[p]["master_param"]
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    with pytest.warns(UserWarning, match="now have their defaults: .*state_dtype=torch.float32, master_weights=True"):
        run(optimizer, 1)
    assert optimizer.state[p]["master_param"] is master


def test_a_seed_from_a_configuration_becomes_plain() -> None:
    seed = ADAMW.ours(some(BF16), rounding_seed=np.int64(3)).param_groups[0]["rounding_seed"]
    assert (type(seed), seed) == (int, 3)


def test_added_groups_have_the_defaults(method: Method) -> None:
    optimizer = method.ours(some(BF16), **OTHERS)
    optimizer.add_param_group({"params": some(BF16), "state_dtype": None})
    group = optimizer.param_groups[1]
    assert {name: group[name] for name in OTHERS} == OTHERS | {"state_dtype": None}


@pytest.mark.parametrize("seed", [0, 1])
def test_another_seed_gives_other_numbers(seed: int, method: Method) -> None:
    results = []
    for other in (0, seed):
        params = some(BF16, BF16)
        optimizer = method.ours(params, lr=0.01, stochastic_rounding=True, backend="reference")
        run(optimizer, 1)
        optimizer.param_groups[0]["rounding_seed"] = other  # read in every step
        run(optimizer, 3)
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results) == (seed == 0)

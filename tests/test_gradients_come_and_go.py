"""Which parameters have a gradient changes from step to step: the result is what a new optimizer would give at each."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from conftest import case_id, device_of, interpreted_by_python, on_backends
from helpers import (
    ADAMW,
    ADAN,
    METHODS,
    Method,
    all_params,
    assert_close,
    assert_same_bits,
    copies,
    gradient,
    oracle_for,
    oracle_gradients,
    oracle_parameter,
    parameters,
    same_bits,
    snapshot,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import agr_cuda

SMALL = [(7,), (64, 33), (31,), (9,)]
SCALES = (1000.1, 3.7, 1024.0, 0.3)

# What a step finds: of index and number of parameters, whether this one has a gradient.
Present = Callable[[int, int], bool]


def everyone(index: int, count: int) -> bool:
    return True


def nobody(index: int, count: int) -> bool:
    return False


def but(*absent: int) -> Present:
    return lambda index, count: index not in absent


def only(*there: int) -> Present:
    return lambda index, count: index in there


# Of step, index and number of parameters, whether this one has a gradient.
PATTERNS: dict[str, Callable[[int, int, int], bool]] = {
    "one every other time": lambda step, index, count: index != 1 or step % 2 == 0,
    "another third each time": lambda step, index, count: (step + index) % 3 != 0,
    "halves in turn": lambda step, index, count: (2 * index < count) == (step % 2 == 0),
    "one at a time": lambda step, index, count: step % count == index,
    "none in the first and every third step": lambda step, index, count: step % 3 != 0,
    "one after the other has its first": lambda step, index, count: index <= 2 * step,
    "fewer and fewer, and all again": lambda step, index, count: index >= 2 * (step % 4),
    "one is away for long": lambda step, index, count: index != 4 or step in (0, 5),
}


def at(pattern: str, step: int) -> Present:
    return lambda index, count: PATTERNS[pattern](step, index, count)


def large(backend: str) -> int:
    """Elements of more than one chunk, in a time that a test can spare."""
    return {"cpu": 140_003, "cuda": 9_001, "triton": 16_390}.get(backend, 9_001)


def mixture(method: Method, backend: str) -> list[dict[str, Any]]:
    """Groups that differ in what a plan depends on, and in numbers; their tensors are of every kind of size."""
    return [
        {"shapes": [(7,), (large(backend),), ()]},
        {"shapes": [(64, 33), (1,)], "agr": False, "lr": 1e-2},
        {"shapes": [(0,), (31,)], **({"amsgrad": True} if method is ADAMW else {"no_prox": True})},
        {"shapes": [(large(backend) // 2 + 77,)], "maximize": True, "weight_decay": 0.1},
    ]


def made(
    method: Method,
    backend: str | None,
    device: torch.device,
    generator: torch.Generator,
    groups: list[dict[str, Any]],
    **options: Any,
) -> Any:
    """An optimizer of groups with "shapes", and perhaps "dtype", in place of parameters."""
    own = [
        {"params": parameters(generator, group["shapes"], group.get("dtype", torch.float32), device)}
        | {key: value for key, value in group.items() if key not in ("shapes", "dtype")}
        for group in groups
    ]
    return method.ours(own, backend=backend, **options)


# An optimizer, another like it that is made anew for every step, and the oracle.


def renewed(optimizer: Any) -> Any:
    """A new optimizer with copies of parameters and state: it has nothing else of what came before."""
    groups = [
        {"params": copies(group["params"]), "agr": group["agr"]}
        | {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    fresh = type(optimizer)(groups, max_grad_norm=optimizer.max_grad_norm, backend=optimizer.backend)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


def set_gradient(p: Tensor, value: Tensor | None) -> None:
    """Also of another type than the parameter's, as that of a model cast after its backward pass."""
    if value is None or value.dtype == p.dtype:
        p.grad = value
        return
    p.grad = None
    kept, p.data = p.data, torch.empty_like(p.data, dtype=value.dtype)
    p.grad = value
    p.data = kept


def take_step(optimizer: Any, kind: str, scale: float) -> None:
    """ "." is an ordinary step, "+" one as torch.amp.GradScaler makes it, and in "-" it has found an infinity."""
    if kind == ".":
        optimizer.step()
        return
    device = all_params(optimizer)[0].device
    optimizer.grad_scale = torch.tensor(scale, device=device)
    optimizer.found_inf = torch.tensor(float(kind == "-"), device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def what_steps_wrote(state: dict[str, Any]) -> dict[str, Any]:
    """What of a state steps have written: Adan's neg_pre_grad is NaN before the first."""
    return {key: x for key, x in state.items() if key != "neg_pre_grad" or not x.isnan().all()}


def assert_as(one: Any, other: Any) -> None:
    """The same bits, without asking for a state_dict(), which could make `one` look around."""
    for p, q in zip(all_params(one), all_params(other), strict=True):
        assert same_bits(p, q), f"parameters of shape {tuple(p.shape)} differ"
        mine, theirs = (what_steps_wrote(o.state.get(x, {})) for o, x in ((one, p), (other, q)))
        assert mine.keys() == theirs.keys(), f"state of shape {tuple(p.shape)}: {sorted(mine)}, {sorted(theirs)}"
        for key, x in mine.items():
            assert same_bits(torch.as_tensor(x), torch.as_tensor(theirs[key])), f"{key} of {tuple(p.shape)} differs"
    for group, theirs in zip(one.param_groups, other.param_groups, strict=True):
        assert int(group.get("step", 0)) == int(theirs.get("step", 0))


class Beside:
    """Steps of an optimizer, of its like made anew for each step, and of the oracle, on the same gradients.

    An optimizer that has stepped before is given without a method: then there is no oracle.
    """

    def __init__(
        self, method: Method | None, optimizer: Any, of_gradients: dict[int, torch.dtype] | None = None
    ) -> None:
        self.optimizer, self.twin = optimizer, renewed(optimizer)
        self.expected = oracle_for(method, optimizer, optimizer.max_grad_norm) if method else None
        self.of_gradients = of_gradients or {}
        self.steps = 0

    def give(self, present: Present, layout: Callable[[Tensor], Tensor] = lambda g: g) -> list[Tensor]:
        """Gradients that depend on the number of the step alone, to those that shall have one."""
        generator = torch.Generator().manual_seed(self.steps)
        params = all_params(self.optimizer)
        for index, p in enumerate(params):
            like = torch.empty_like(p.detach(), dtype=self.of_gradients.get(index, p.dtype))
            g = gradient(like, generator, self.steps)
            set_gradient(p, layout(g) if present(index, len(params)) else None)
        return params

    def step(self, present: Present, kind: str = ".", layout: Callable[[Tensor], Tensor] = lambda g: g) -> None:
        params = self.give(present, layout)
        scale = 1.0 if kind == "." else torch.tensor(SCALES[self.steps % len(SCALES)]).item()
        for p in params:
            if p.grad is not None:
                p.grad.mul_(scale)
        self.twin = renewed(self.twin)
        for p, q in zip(params, all_params(self.twin), strict=True):
            set_gradient(q, None if p.grad is None else p.grad.clone())
        grads = [None if g is None else g / scale for g in oracle_gradients(params)]
        for optimizer in (self.optimizer, self.twin):
            take_step(optimizer, kind, scale)
        if self.expected and kind != "-":
            self.expected.step(grads)
        self.steps += 1
        assert_as(self.optimizer, self.twin)

    def finish(self) -> None:
        """What a checkpoint would hold is the same as well, and the oracle's to the accuracy of the types."""
        mine, theirs = self.optimizer.state_dict(), self.twin.state_dict()
        assert mine["state"].keys() == theirs["state"].keys()
        for index, state in mine["state"].items():
            assert state.keys() == theirs["state"][index].keys()
        if self.expected:
            assert_close(self.optimizer, self.expected)


OPTIONS: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.5}, {"capturable": True}]
RUNS = [(pattern, OPTIONS[i % 3]) for i, pattern in enumerate(PATTERNS)]
RUNS += [(pattern, OPTIONS[1]) for i, pattern in enumerate(PATTERNS) if i % 4 == 0]


@pytest.mark.parametrize(("on", "case"), on_backends(*RUNS, every=5), ids=case_id)
def test_a_mixture_of_sizes_and_groups(on: str, case: tuple, method, generator) -> None:
    pattern, options = case
    beside = Beside(method, made(method, on, device_of(on), generator, mixture(method, on), **options))
    for step in range(6):
        beside.step(at(pattern, step))
    beside.step(everyone)
    beside.finish()


@pytest.mark.parametrize(("on", "case"), on_backends(*product(["-+-.+-+", "+-++--+"], OPTIONS), every=4), ids=case_id)
def test_mixed_precision(on: str, case: tuple, method, generator) -> None:
    """A first gradient comes in a step that is skipped; others are missing in it."""
    kinds, options = case
    groups = [{"shapes": SMALL[:2]}, {"shapes": [*SMALL[2:], (4099,)], "agr": False, "lr": 1e-2}]
    beside = Beside(method, made(method, on, device_of(on), generator, groups, **options))
    for step, kind in enumerate(kinds):
        pattern = "another third each time" if kinds[0] == "-" else "one after the other has its first"
        beside.step(everyone if step == 6 else at(pattern, step), kind)
    beside.finish()


@pytest.mark.parametrize(("on", "case"), on_backends(*product([False, True], ["", ".", "+", "+."])), ids=case_id)
def test_a_skipped_step_counts_for_no_group(on: str, case: tuple, generator) -> None:
    """Nor for groups that have no gradient in it; a step that is made counts for all (Adan's)."""
    capturable, before = case
    groups = [{"shapes": SMALL[:1]}, {"shapes": SMALL[2:], "capturable": capturable}, {"shapes": SMALL[:1]}]
    beside = Beside(ADAN, made(ADAN, on, device_of(on), generator, groups))
    for kind in before:
        beside.step(everyone, kind)
    for kind, present in zip("-+-.-+", [but(0), but(0), only(0), only(1), but(0, 3), everyone], strict=True):
        beside.step(present, kind)
        counts = [int(group["step"]) for group in beside.optimizer.param_groups]
        assert counts == [beside.expected.groups[0].steps] * 3
    beside.finish()


MIXED = product(["by type", "another third each time", "halves in turn"], ["......", "-+.-++"], [0.5, None])


@pytest.mark.parametrize(("on", "case"), on_backends(*MIXED, every=5), ids=case_id)
def test_types_may_be_mixed(on: str, case: tuple, method, generator) -> None:
    """In one optimizer; 16-bit parameters have gradients of their own type and of float32, which no CUDA kernel takes
    beside float16. "by type": one type's parameters are all without, in turn, so that a launch comes and goes."""
    pattern, kinds, max_grad_norm = case
    types = [torch.float32, torch.bfloat16, torch.float16]
    groups = [{"shapes": [(31,), (64, 33), (7,)], "dtype": dtype, "maximize": dtype == types[-1]} for dtype in types]
    options = {"lr": 1e-2, "eps": 1e-3, "max_grad_norm": max_grad_norm}
    optimizer = made(method, on, device_of(on), generator, groups, **options)
    wide = (4, 5) if on == "cuda" else (4, 5, 7)
    beside = Beside(method, optimizer, dict.fromkeys(wide, torch.float32))
    for step, kind in enumerate(kinds):
        turn = (lambda index, count, step=step: index // 3 != step % 3) if pattern == "by type" else at(pattern, step)
        beside.step(everyone if step == 5 else turn, kind)
    beside.finish()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_several_backends_in_one_optimizer(max_grad_norm: float | None, method, generator) -> None:
    """Left to choose, and each of them has no gradient for a while."""
    # A norm of which a part is of float32 gradients is no more exact than those.
    types = [torch.float32, torch.complex64, torch.float32 if max_grad_norm else torch.float64]
    groups = [{"shapes": [(31,), (8, 6)], "dtype": dtype} for dtype in types]
    groups += [{"shapes": [(5,), (12,)], "foreach": True}, {"shapes": [(11,)], "capturable": True}]
    beside = Beside(method, made(method, None, torch.device("cpu"), generator, groups, max_grad_norm=max_grad_norm))
    for step, kind in enumerate("....-.++.."):
        beside.step(everyone if step == 9 else lambda index, count, step=step: index // 2 != step % 5, kind)
    beside.finish()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_more_chunks_than_a_warp_adds_at_once(max_grad_norm: float | None, method, generator) -> None:
    """The table of a launch, and the order in which sums of chunks are added, depend on who else is there."""
    backend = agr_cuda.available_backends()[0]
    where = device_of(backend)
    groups = [{"shapes": [(66 * 4096 + 5,), (64, 33)]}, {"shapes": [(20_011,), (70_001,)]}]
    beside = Beside(method, made(method, backend, where, generator, groups, max_grad_norm=max_grad_norm))
    for present in (everyone, but(0), only(0), but(2), but(3), everyone):
        beside.step(present)
    beside.finish()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_hundreds_of_tensors(max_grad_norm: float | None, method, backend, device, generator) -> None:
    """More than fit into what is handed to a kernel with the launch. Runs of neighbours are gone, and single ones."""
    count = 20 if interpreted_by_python(backend) else 520
    groups = [{"shapes": [(1 + k % 5,) for k in range(count)], "agr": False}]
    beside = Beside(method, made(method, backend, device, generator, groups, max_grad_norm=max_grad_norm))
    for divisor in (1, 7, 3, 2):
        beside.step(
            lambda index, count, divisor=divisor: index % divisor == 0 and (divisor == 3) != (index < count // 2)
        )
    beside.step(everyone)
    assert_as(beside.optimizer, beside.twin)


@pytest.mark.parametrize("fast_backend", [b for b in agr_cuda.available_backends() if not interpreted_by_python(b)])
@pytest.mark.parametrize("method", METHODS, ids=str)
@settings(
    max_examples=20, derandomize=True, deadline=None, database=None,
    phases=(Phase.generate,), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_anyone_may_be_missing_at_any_time(method: Method, fast_backend: str, data: st.DataObject) -> None:
    """Kinds of steps and who is there, in any order."""
    groups = [{"shapes": SMALL[:3]}, {"shapes": [(0,), *SMALL[1:2]], "agr": False}, {"shapes": [(4_500,), ()]}]
    options = data.draw(st.sampled_from([*OPTIONS, {"max_grad_norm": 2.0, "capturable": True}]))
    generator = torch.Generator().manual_seed(7)
    beside = Beside(method, made(method, fast_backend, device_of(fast_backend), generator, groups, **options))
    for absent in data.draw(st.lists(st.sets(st.integers(0, 6)), min_size=2, max_size=6)):
        beside.step(but(*absent), data.draw(st.sampled_from(".....++-")))
    beside.step(everyone)
    beside.finish()


# What changes while a parameter has no gradient.


def moved(optimizer: Any, p: Tensor) -> None:
    p.data = p.data.clone()


def moved_with_other_values(optimizer: Any, p: Tensor) -> None:
    p.data = p.data * 2 - 0.25


def written(optimizer: Any, p: Tensor) -> None:
    with torch.no_grad():
        p.mul_(0.5)


def laid_out_anew(optimizer: Any, p: Tensor) -> None:
    p.data = p.data.t().contiguous().t()


def states_replaced(optimizer: Any, p: Tensor) -> None:
    for key in states_of(optimizer):
        optimizer.state[p][key] = optimizer.state[p][key] * 0.5


def states_moved(optimizer: Any, p: Tensor) -> None:
    for key in states_of(optimizer):
        optimizer.state[p][key].data = optimizer.state[p][key].data.clone()


def states_written(optimizer: Any, p: Tensor) -> None:
    for key in states_of(optimizer):
        optimizer.state[p][key].mul_(0.5)


def state_replaced(optimizer: Any, p: Tensor) -> None:
    optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}


def state_dropped(optimizer: Any, p: Tensor) -> None:
    del optimizer.state[p]


def state_cleared(optimizer: Any, p: Tensor) -> None:
    optimizer.state[p].clear()


def resized(optimizer: Any, p: Tensor) -> None:
    p.data = torch.linspace(-1, 1, 35, device=p.device).view(5, 7)
    optimizer.state[p].clear()


def cast(optimizer: Any, p: Tensor) -> None:
    p.data = p.data.bfloat16()
    for key in states_of(optimizer):
        optimizer.state[p][key] = optimizer.state[p][key].bfloat16()


def frozen(optimizer: Any, p: Tensor) -> None:
    p.requires_grad_(False)


def counted(optimizer: Any, p: Tensor) -> None:
    if isinstance(optimizer, agr_cuda.AdamW):
        optimizer.state[p]["step"] += 5
    else:
        optimizer.param_groups[1]["step"] += 5


def loaded(optimizer: Any, p: Tensor) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def options_changed(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[1].update(lr=0.1, weight_decay=0.3, maximize=True, agr=False)


def capturable_from_now(optimizer: Any, p: Tensor) -> None:
    for group in optimizer.param_groups:
        group["capturable"] = True


def clipped_from_now(optimizer: Any, p: Tensor) -> None:
    optimizer.max_grad_norm = 0.25


def states_of(optimizer: Any) -> tuple[str, ...]:
    return ADAMW.states if isinstance(optimizer, agr_cuda.AdamW) else ADAN.states


def another_of_its_kind(optimizer: Any, p: Tensor) -> None:
    """In p's place in the group; what has been p's place is then no other's."""
    group = optimizer.param_groups[1]["params"]
    place = next(i for i, x in enumerate(group) if x is p)
    group[place] = torch.ones_like(p.detach()).requires_grad_()
    optimizer.state.pop(p)


def two_changed_places(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[1]["params"].reverse()


CHANGES = [
    moved, moved_with_other_values, written, laid_out_anew, states_replaced, states_moved, states_written,
    state_replaced, state_dropped, state_cleared, resized, cast, frozen, counted, loaded, options_changed,
    capturable_from_now, clipped_from_now, another_of_its_kind, two_changed_places,
]  # fmt: skip


@pytest.mark.parametrize(("on", "change"), on_backends(*CHANGES, every=5), ids=case_id)
def test_what_changes_meanwhile_is_seen(on: str, change: Callable[[Any, Tensor], None], method, generator) -> None:
    """Parameter 2 is away for three steps; others come and go, before the change, with it and after."""
    groups = [{"shapes": SMALL[:1]}, {"shapes": [(31,), (8, 6), (12,)]}, {"shapes": [(4_500,)]}]
    beside = Beside(None, made(method, on, device_of(on), generator, groups, lr=1e-2, eps=1e-3))
    old = [p.detach() for p in all_params(beside.optimizer)]
    for step, present in enumerate([everyone, but(2), but(1, 2), but(2, 4), everyone, but(1), everyone]):
        if step == 3:
            left = [x.clone() for x in old]
            for optimizer in (beside.optimizer, beside.twin):
                change(optimizer, all_params(optimizer)[2])
        beside.step(present)
    if change in (moved, moved_with_other_values, laid_out_anew, resized, cast, another_of_its_kind):
        assert same_bits(old[2], left[2]), "memory that was left has been written"


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_gradients_that_come_back_are_laid_out_as_they_like(max_grad_norm, method, backend, device, generator) -> None:
    """Whatever their strides are, or a parameter's."""

    def transposed(g: Tensor) -> Tensor:
        return g.t().contiguous().t() if g.dim() == 2 else g

    def in_the_midst(g: Tensor) -> Tensor:
        return torch.cat([torch.ones(3, dtype=g.dtype, device=g.device), g.reshape(-1)])[3:].view(g.shape)

    def with_gaps(g: Tensor) -> Tensor:
        wide = torch.full((*g.shape, 2), 7.0, dtype=g.dtype, device=g.device)
        wide[..., 0] = g
        return wide[..., 0]

    beside = Beside(method, made(method, backend, device, generator, [{"shapes": SMALL}], max_grad_norm=max_grad_norm))
    layouts = [lambda g: g, transposed, in_the_midst, transposed, with_gaps, lambda g: g]
    for present, layout in zip([everyone, but(1), everyone, but(1, 2), everyone, everyone], layouts, strict=True):
        beside.step(present, layout=layout)
    beside.finish()


def test_gradients_that_come_back_are_of_another_type(method, backend, device, generator) -> None:
    groups = [{"shapes": SMALL[:3], "dtype": torch.bfloat16}, {"shapes": SMALL[:1]}]
    beside = Beside(method, made(method, backend, device, generator, groups, lr=1e-2, eps=1e-3))
    for step, present in enumerate([everyone, but(1), everyone, but(0, 1), everyone, but(2)]):
        beside.of_gradients = {1: torch.float32, 2: torch.float32} if step in (2, 3, 5) else {}
        beside.step(present)
    beside.step(everyone)
    beside.finish()


def test_groups_are_added_while_others_have_no_gradient(method, backend, device, generator) -> None:
    beside = Beside(method, made(method, backend, device, generator, [{"shapes": SMALL}], max_grad_norm=2.0))
    beside.step(everyone)
    beside.step(but(0, 2))
    added = parameters(generator, SMALL[:3], device=device)
    own = {"lr": 1e-2, "agr": False}
    beside.expected.add_group({"params": [oracle_parameter(p) for p in added], **own})
    beside.twin.add_param_group({"params": copies(added), **own})
    beside.optimizer.add_param_group({"params": added, **own})
    for present in (but(0, 2, 5), but(1), but(4, 6), everyone):
        beside.step(present)
    beside.finish()


# As autograd makes and drops them.


class Experts(torch.nn.Module):
    """Of which each step uses some, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))
        self.last = torch.nn.Linear(6, 2)

    def forward(self, x: Tensor, chosen: Iterable[int]) -> Tensor:
        return self.last(sum(torch.tanh(self.experts[i](x)) for i in chosen))


@pytest.mark.parametrize("closure", [False, True])
def test_a_mixture_of_experts(closure: bool, method, backend, device, generator) -> None:
    """Gradients are made by backward passes and dropped by zero_grad(); a closure drops and makes them in step()."""
    torch.manual_seed(5)
    model = Experts().to(device)
    optimizer = method.ours(model.parameters(), lr=1e-2, max_grad_norm=0.1, backend=backend)
    for step, chosen in enumerate([(0, 1), (1,), (2, 1), (0, 1), (3,), (0, 1, 2, 3)]):
        twin = copy.deepcopy(model)
        alike = method.ours(twin.parameters(), lr=1e-2, max_grad_norm=0.1, backend=backend)
        alike.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(device)
        for which, o in ((model, optimizer), (twin, alike)):

            def loss(which=which, o=o, x=x, chosen=chosen) -> Tensor:
                o.zero_grad()
                result = which(x, chosen).square().sum()
                result.backward()
                return result

            if closure:
                o.step(loss)
            else:
                loss()
                o.step()
        assert [p.grad is None for p in model.parameters()] == [index // 2 not in chosen for index in range(8)] + [
            False,
            False,
        ]
        assert_as(optimizer, alike)


# Who has no gradient is left alone.


class Untouched:
    """Remembers a parameter and its state, in bits, places and counts of changes."""

    def __init__(self, optimizer: Any, p: Tensor) -> None:
        self.optimizer, self.p = optimizer, p
        self.bits, self.address, self.version = p.detach().clone(), p.data_ptr(), p._version
        self.state = dict(optimizer.state[p]) if p in optimizer.state else None
        self.values = {key: value.clone() for key, value in (self.state or {}).items()}

    def check(self) -> None:
        assert same_bits(self.p, self.bits), f"a parameter of shape {tuple(self.p.shape)} changed"
        assert (self.p.data_ptr(), self.p._version) == (self.address, self.version)
        now = self.optimizer.state.get(self.p, {})
        assert now.keys() == (self.state or {}).keys(), "state came or went"
        for key, value in self.values.items():
            assert now[key] is self.state[key], f"{key} was replaced"
            assert same_bits(now[key], value), f"{key} changed"


@pytest.mark.parametrize(("on", "case"), on_backends(*product([".......", "+-+.+-+"], OPTIONS), every=4), ids=case_id)
def test_who_has_none_is_left_alone(on: str, case: tuple, method, generator) -> None:
    """Also AdamW's count, and the count of changes, by which autograd notices a step between forward and backward."""
    kinds, options = case
    optimizer = made(method, on, device_of(on), generator, mixture(method, on)[1:], lr=1e-2, **options)
    beside = Beside(method, optimizer)
    params = all_params(optimizer)
    sizes = [p.numel() for p in params]
    absent = [(0,), (0, 1, 3), (2, 4), (1, 3), (), (0, 2), tuple(range(len(params)))]
    for kind, gone in zip(kinds, absent, strict=True):
        if len(gone) == len(params) and kind == "-":
            continue
        left = [Untouched(optimizer, params[i]) for i in gone]
        before = [(p.detach().clone(), p._version) for p in params]
        beside.step(but(*gone), kind)
        for one in left:
            one.check()
        for index, (p, (bits, version)) in enumerate(zip(params, before, strict=True)):
            if kind != "-" and index not in gone:
                assert p._version > version
                assert sizes[index] <= 1 or not same_bits(p, bits), "a step has not been made"
    if method is ADAMW:
        made_by = [
            sum(i not in gone for k, gone in zip(kinds, absent, strict=True) if k != "-") for i in range(len(params))
        ]
        assert [int(optimizer.state[p]["step"]) for p in params] == made_by


@pytest.mark.parametrize(("on", "case"), on_backends(*product(["......", "-.+-++"], OPTIONS), every=5), ids=case_id)
def test_no_state_for_who_never_had_one(on: str, case: tuple, method, generator) -> None:
    kinds, options = case
    optimizer = made(method, on, device_of(on), generator, [{"shapes": SMALL}, {"shapes": SMALL[:1]}], **options)
    beside = Beside(method, optimizer)
    params = all_params(optimizer)
    for step, kind in enumerate(kinds):
        beside.step(lambda index, count, step=step: index not in (1, 4) and (step + index) % 3 != 1, kind)
    for index in (1, 4):
        assert not optimizer.state.get(params[index])
    assert all(optimizer.state[params[index]] for index in (0, 2, 3))
    assert sorted(optimizer.state_dict()["state"]) == [0, 2, 3]


# The norm.


@pytest.mark.parametrize("kinds", ["......", "+.++.+"])
def test_the_norm_is_of_the_gradients_that_are_there(kinds: str, method, backend, device, generator) -> None:
    """0 where there are none; that step counts for Adan's groups, and changes nothing else."""
    optimizer = made(method, backend, device, generator, mixture(method, backend), max_grad_norm=0.5)
    beside = Beside(method, optimizer)
    for step, (present, kind) in enumerate(
        zip([but(1), only(1), nobody, only(3, 0), nobody, everyone], kinds, strict=True)
    ):
        before = [Untouched(optimizer, p) for p in all_params(optimizer)]
        expected = squares(beside, present) ** 0.5
        beside.step(present, kind)
        assert (optimizer.grad_norm.dtype, optimizer.grad_norm.shape) == (torch.float64, ())
        assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-6)
        if present is nobody:
            assert optimizer.grad_norm.item() == 0
            for one in before:
                one.check()
        assert method is ADAMW or {int(group["step"]) for group in optimizer.param_groups} == {step + 1}
    beside.finish()


def squares(beside: Beside, present: Present) -> float:
    """Of the gradients that the next step will have."""
    return sum(p.grad.double().square().sum().item() for p in beside.give(present) if p.grad is not None)


def test_the_norm_before_anyone_ever_had_a_gradient(method, backend, device, generator) -> None:
    optimizer = made(method, backend, device, generator, [{"shapes": SMALL}], max_grad_norm=0.5)
    before = [Untouched(optimizer, p) for p in all_params(optimizer)]
    for step in range(2):
        optimizer.step()
        assert optimizer.grad_norm.item() == 0
        assert method is ADAMW or int(optimizer.param_groups[0]["step"]) == step + 1
    for one in before:
        one.check()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_bad_number_is_gone_with_its_gradient(max_grad_norm: float | None, method, backend, device, generator):
    """A NaN in one step must not be in the norm of the next, whose gradients are others."""
    beside = Beside(None, made(method, backend, device, generator, [{"shapes": SMALL}], max_grad_norm=max_grad_norm))
    optimizer = beside.optimizer
    beside.step(everyone)
    keep = copy.deepcopy(optimizer.state_dict()), copies(all_params(optimizer))
    params = beside.give(everyone)
    params[1].grad[5, 5] = torch.nan
    optimizer.step()
    assert params[1].isnan().any()
    with torch.no_grad():
        for p, q in zip(params, keep[1], strict=True):
            p.copy_(q)
    optimizer.load_state_dict(keep[0])
    beside.step(but(1))
    beside.step(everyone)
    beside.finish()


# Bad gradients.


class WithAnotherGradient(torch.nn.Parameter):
    """It says itself what its gradient is: only so can that be on another device."""

    @property
    def grad(self) -> Tensor | None:
        return self.other_grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.other_grad = value


def sparse(p: Tensor) -> None:
    p.grad = torch.ones_like(p.detach()).to_sparse()


def of_another_shape(p: Tensor) -> None:
    p.grad = torch.ones_like(p.detach())
    p.grad.data = torch.ones(5, device=p.device)


def of_another_number_of_dimensions(p: Tensor) -> None:
    p.grad = torch.ones_like(p.detach())
    p.grad.data = torch.ones((*p.shape, 1), device=p.device)


def elsewhere(p: Tensor) -> None:
    p.grad = torch.ones_like(p.detach(), device="meta")


FAULTS = {sparse: "sparse", of_another_shape: "shape", of_another_number_of_dimensions: "shape", elsewhere: "meta"}


@pytest.mark.parametrize(
    ("on", "case"), on_backends(*product(FAULTS, [True, False], [None, 0.5]), every=3), ids=case_id
)
def test_a_bad_gradient_that_comes_changes_nothing(on: str, case: tuple, method, generator) -> None:
    """Whether its parameter has had one before or not, and though others have none; later it is as if never given."""
    fault, known, max_grad_norm = case
    params = parameters(generator, [(7,), (8, 6), (31,), (8, 6)], device=device_of(on))
    params[3] = WithAnotherGradient(params[3].detach())
    params[3].grad = None
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}]
    optimizer = method.ours(groups, max_grad_norm=max_grad_norm, backend=on)
    beside = Beside(method, optimizer)
    bad = 3 if fault is elsewhere else 1
    beside.step(everyone if known else but(bad))
    for step in range(2):
        beside.step(but(bad, 2 * step))
    for missing in (2, 0):
        beside.give(but(bad, missing))
        fault(params[bad])
        unchanged = snapshot(optimizer)
        with pytest.raises((RuntimeError, ValueError), match=FAULTS[fault]):
            optimizer.step()
        unchanged()
    assert bool(optimizer.state.get(params[bad])) is known
    for present in (but(bad, 2), but(0), everyone):
        beside.step(present)
    beside.finish()


# Nothing is kept.


@pytest.mark.parametrize(("on", "options"), on_backends(*OPTIONS), ids=case_id)
def test_gradients_that_are_gone_are_freed(on: str, options: dict, method, generator) -> None:
    """At once, since no gradient is kept from step to step; also by a step that fails."""
    optimizer = made(method, on, device_of(on), generator, [{"shapes": [*SMALL, (9_001,)]}], **options)
    beside = Beside(method, optimizer)
    for present in (everyone, but(0, 4), but(1), everyone, but(2, 4), only(2), nobody, everyone):
        beside.step(present)
        params = all_params(optimizer)
        there = [StorageWeakRef(p.grad.untyped_storage()) for p in params if p.grad is not None]
        optimizer.zero_grad()
        assert all(memory.expired() for memory in there)
    beside.give(but(1))
    there = [StorageWeakRef(p.grad.untyped_storage()) for p in params if p.grad is not None]
    sparse(params[1])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(memory.expired() for memory in there)


def test_parameters_that_have_left_are_freed(method, backend, device, generator) -> None:
    """Taken out of their group while they had no gradient, they and their state are not kept for their return."""
    optimizer = made(method, backend, device, generator, [{"shapes": [*SMALL, (12,)]}])
    beside = Beside(method, optimizer)
    for present in (everyone, but(4), but(1, 4), everyone, but(4)):
        beside.step(present)
    p = optimizer.param_groups[0]["params"].pop()
    there = [StorageWeakRef(x.untyped_storage()) for x in (p, *(optimizer.state[p][key] for key in method.states))]
    del optimizer.state[p], p
    beside = Beside(None, optimizer)
    for present in (but(0), everyone, but(1)):
        beside.step(present)
    gc.collect()
    assert all(memory.expired() for memory in there)


# Checkpoints.


@pytest.mark.parametrize(
    ("on", "case"), on_backends(*product(["checkpoint", "deepcopy", "pickle"], OPTIONS), every=4), ids=case_id
)
def test_a_run_goes_on_from_a_step_in_which_some_were_missing(on: str, case: tuple, method, generator) -> None:
    """Bit for bit, those that were missing then too, or had never been there."""
    how, options = case
    groups = [{"shapes": [(7,), (4_500,), ()]}, {"shapes": SMALL[1:3], "agr": False, "lr": 1e-2}]
    optimizer = made(method, on, device_of(on), generator, groups, **options)
    presents = [but(3), but(0, 3), but(1, 3), but(2, 3), but(1, 4), everyone]
    beside = Beside(method, optimizer)
    for present in presents[:3]:
        beside.step(present)
    if how == "checkpoint":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = made(method, on, device_of(on), generator, groups, **options)
        with torch.no_grad():
            for p, q in zip(all_params(resumed), all_params(optimizer), strict=True):
                p.copy_(q)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    else:
        resumed = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    for present in presents[3:]:
        beside.step(present)
        for p, q in zip(all_params(resumed), all_params(optimizer), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        resumed.step()
        assert_as(resumed, optimizer)
    assert_same_bits(resumed, optimizer)
    beside.finish()


def test_a_state_dict_says_who_has_had_gradients(method, backend, device, generator) -> None:
    """Taken in the midst of steps, it changes none of them."""
    watched, alone = (
        Beside(method, made(method, backend, device, torch.Generator().manual_seed(1), [{"shapes": SMALL}]))
        for _ in range(2)
    )
    had: set[int] = set()
    for gone in ((0, 1), (1, 2), (3,), (0, 2)):
        had |= {0, 1, 2, 3} - set(gone)
        watched.step(but(*gone))
        assert set(watched.optimizer.state_dict()["state"]) == had
        alone.step(but(*gone))
        assert_same_bits(watched.optimizer, alone.optimizer)

"""What several test files share: problems to optimize, the oracle beside them, and ways to compare."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor

import agr_cuda

STEPS = 20  # of a run whose accuracy is judged

# 0-d, one element, none, primes, a row longer than any vector register, 2-D, 4-D.
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (7,), (31,), (1009,), (64, 33), (2, 3, 5, 4), (4097,)]


@dataclass(frozen=True)
class Method:
    """An optimizer of the package and the oracle's one of the same name."""

    name: str
    ours: type[torch.optim.Optimizer]
    theirs: type[oracle.Optimizer]
    states: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


ADAMW = Method("AdamW", agr_cuda.AdamW, oracle.AdamW, ("exp_avg", "exp_avg_sq"))
ADAN = Method("Adan", agr_cuda.Adan, oracle.Adan, ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"))
METHODS = (ADAMW, ADAN)


# Making problems.


def parameter(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf tensor on the CPU. One element is kept away from zero, where relative errors mean nothing."""
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    if value.numel() == 1:
        value = value.sign() * (value.abs() + 0.5)
    if dtype.is_complex:
        value = torch.complex(value, torch.randn(shape, generator=generator, dtype=torch.float64))
    return value.to(dtype).requires_grad_()


def gradient(p: Tensor, generator: torch.Generator, step: int = 0) -> Tensor:
    """A random gradient for p, on p's device.

    A tensor of one element gets gradients that keep their sign and grow, so that no average of theirs, nor of
    their differences, cancels: elsewhere the largest element of the tensor sees to that.
    """
    if p.numel() == 1:
        value = (1 + 0.25 * step + 0.1 * torch.rand(p.shape, generator=generator)).to(p.dtype)
    else:
        value = torch.randn(p.shape, generator=generator, dtype=torch.promote_types(p.dtype, torch.float32))
    return value.to(device=p.device, dtype=p.dtype)


def parameters(
    generator: torch.Generator,
    shapes: Iterable[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    return [parameter(s, generator, dtype).detach().to(device).requires_grad_() for s in shapes]


def copies(params: Iterable[Tensor]) -> list[Tensor]:
    """Leaf tensors with the same values and strides and memory of their own."""
    return [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in params]


def give_gradients(params: Iterable[Tensor], generator: torch.Generator, step: int = 0) -> None:
    for p in params:
        p.grad = gradient(p, generator, step)


def run(optimizer: torch.optim.Optimizer, steps: Iterable[int] | int, seed: int = 1) -> None:
    """Steps on random gradients. Step k always has the same gradients, so a run can be cut in two."""
    for k in range(steps) if isinstance(steps, int) else steps:
        give_gradients(all_params(optimizer), torch.Generator().manual_seed(1000 * seed + k), k)
        optimizer.step()


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# The oracle beside them.


def to_numpy(x: Tensor) -> np.ndarray:
    """The values in float64 or complex128, exactly."""
    x = x.detach().cpu().resolve_conj().resolve_neg()
    return np.array((x.to(torch.complex128) if x.is_complex() else x.double()).numpy())


def oracle_parameter(p: Tensor) -> oracle.Parameter:
    return oracle.Parameter(oracle.as_real(to_numpy(p)), str(p.dtype).removeprefix("torch."))


def oracle_gradients(params: Iterable[Tensor]) -> list[np.ndarray | None]:
    return [None if p.grad is None else to_numpy(p.grad) for p in params]


def oracle_for(method: Method, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> Any:
    """The oracle with the groups and present parameters of an optimizer that has not stepped yet."""
    groups = []
    for group in optimizer.param_groups:
        options = {name: plain(group[name]) for name in method.theirs.defaults}
        groups.append({"params": [oracle_parameter(p) for p in group["params"]], **options})
    return method.theirs(groups, max_grad_norm=max_grad_norm)


def plain(option: Any) -> Any:
    return option.item() if isinstance(option, Tensor) else option


# Comparing.


def relative_error(x: Tensor, y: np.ndarray) -> float:
    """Of one tensor: max |x - y| / max |y|, both over its elements. 0 for an empty tensor or 0 = 0."""
    difference = np.abs(oracle.as_real(to_numpy(x)) - y)
    assert difference.shape == y.shape
    if difference.size == 0 or not difference.max():
        return 0.0
    return float(difference.max() / np.abs(y).max()) if np.abs(y).max() else float("inf")


def pairs(optimizer: torch.optim.Optimizer, expected: Any) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    """(name, our tensor, the oracle's) for every parameter and every state there is, and the step counts."""
    index = 0
    for group, oracle_group in zip(optimizer.param_groups, expected.groups, strict=True):
        if isinstance(expected, oracle.Adan):
            assert int(group.get("step", 0)) == oracle_group.steps
        for p, q in zip(group["params"], oracle_group.params, strict=True):
            label = f"parameter {index} {tuple(p.shape)}"
            index += 1
            yield label, p, q.value
            state = {name: x for name, x in optimizer.state.get(p, {}).items() if name != "step"}
            assert state.keys() == q.state.keys(), f"{label}: {sorted(state)} instead of {sorted(q.state)}"
            if isinstance(expected, oracle.AdamW) and state:
                assert float(optimizer.state[p]["step"]) == q.steps
            for name, value in q.state.items():
                yield f"{label} {name}", state[name], value


def assert_close(optimizer: torch.optim.Optimizer, expected: Any) -> None:
    """Every parameter and state is the oracle's, to the accuracy of its type."""
    for label, x, y in pairs(optimizer, expected):
        assert x.isfinite().all(), f"{label} is not finite"
        if x.dtype in (torch.bfloat16, torch.float16):
            assert_rounded(label, x, y)
        else:
            bound = 1e-13 if x.dtype in (torch.float64, torch.complex128) else 1e-6
            if bound == 1e-6 and x.numel() == 1:
                bound += STEPS * 2.0**-24  # moved by a like amount each time, it is rounded the same way each time
            assert relative_error(x, y) <= bound, f"{label}: relative error {relative_error(x, y):.2e} > {bound}"


def assert_rounded(label: str, x: Tensor, y: np.ndarray) -> None:
    """A 16-bit tensor has the oracle's very bits in nearly every element.

    Where float32 arithmetic lands on the other side of a tie, the element is one unit in the last place off.
    Such a flip can live on in a running average, and ties are common: a tenth of the difference of two 16-bit
    numbers is one whenever that difference is an odd multiple of five units. Without AGR in bfloat16, where it
    would be forgotten, more than a tenth of the elements differ.
    """
    info = torch.finfo(x.dtype)
    off, largest = np.abs(oracle.as_real(to_numpy(x)) - y).max(initial=0.0), np.abs(y).max(initial=0.0)
    one_unit = info.smallest_normal * info.eps  # of denormal numbers
    assert off <= max(2 * info.eps * largest, one_unit), f"{label}: {off:.2e} off {largest:.2e}"
    if y.size >= 1000:
        off = np.mean(to_numpy(x) != y)
        assert off <= 0.08, f"{label}: {off:.1%} of the elements are not the oracle's"


def follow(
    method: Method, optimizer: Any, generator: torch.Generator, max_grad_norm: float | None = None, steps: int = STEPS
) -> None:
    """Steps beside the oracle, then the comparison."""
    expected = oracle_for(method, optimizer, max_grad_norm)
    params = all_params(optimizer)
    for step in range(steps):
        give_gradients(params, generator, step)
        optimizer.step()
        expected.step(oracle_gradients(params))
    assert_close(optimizer, expected)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal type, shape and bits: NaN equals itself, -0 differs from 0."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    one, other = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    return torch.equal(one, other)


def assert_same_bits(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for p, q in zip(all_params(one), all_params(other), strict=True):
        assert same_bits(p, q), f"parameters of shape {tuple(p.shape)} differ"
        assert one.state.get(p, {}).keys() == other.state.get(q, {}).keys()
        for name, x in one.state.get(p, {}).items():
            assert same_bits(torch.as_tensor(x), torch.as_tensor(other.state[q][name])), f"{name} differs"


def assert_parameters_close(xs: Iterable[Tensor], ys: Iterable[Tensor], bound: float | None = None) -> None:
    for x, y in zip(xs, ys, strict=True):
        limit = bound or (1e-13 if y.dtype in (torch.float64, torch.complex128) else 1e-6)
        error = relative_error(x, oracle.as_real(to_numpy(y)))
        assert error <= limit, f"shape {tuple(x.shape)}: relative error {error:.2e} > {limit}"


def assert_like(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, bound: float | None = None) -> None:
    """Parameters, states and step counts are those of another optimizer, to `bound` or the accuracy of the types."""
    assert_parameters_close(all_params(ours), all_params(theirs), bound)
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
        assert mine.keys() == other.keys(), f"shape {tuple(p.shape)}: {sorted(mine)} instead of {sorted(other)}"
        for key, value in other.items():
            if key == "step":
                assert float(mine[key]) == float(value)
            else:
                assert mine[key].dtype == value.dtype
                assert_parameters_close([mine[key]], [value], bound)


def snapshot(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Remembers all that an optimizer may change; call the result to assert that nothing has."""

    def contents() -> list[Any]:
        return [
            [
                (group["params"][:], {k: v for k, v in group.items() if k != "params"})
                for group in optimizer.param_groups
            ],
            [(p, p.detach(), p.grad) for p in all_params(optimizer)],
            [(p, dict(state)) for p, state in optimizer.state.items() if state],
        ]

    groups, params, states = contents()
    options = copy.deepcopy([options for _, options in groups])
    params = [(p, p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone()) for p, _, _ in params]
    states = [(p, state, {k: copy.deepcopy(v) for k, v in state.items()}) for p, state in states]

    def same(x: Any, y: Any) -> bool:
        return type(x) is type(y) and (same_value(x, y) if isinstance(x, Tensor) else x == y or (x != x and y != y))

    def same_value(x: Tensor, y: Tensor) -> bool:
        if x.layout != torch.strided or x.device.type == "meta":
            return x.device == y.device and x.layout == y.layout and x.shape == y.shape
        return same_bits(x, y)

    def check() -> None:
        now_groups, _, now_states = contents()
        assert len(now_groups) == len(groups), "the number of groups changed"
        for (now_params, now), (was_params, _), was in zip(now_groups, groups, options, strict=True):
            assert [id(p) for p in now_params] == [id(p) for p in was_params]
            assert now.keys() == was.keys(), f"group options {now.keys() ^ was.keys()} came or went"
            assert all(same(now[k], was[k]) for k in was), f"group options changed: {was} -> {now}"
        for p, value, grad, grad_value in params:
            assert same_value(p.detach(), value), f"a parameter of shape {tuple(p.shape)} changed"
            assert p.grad is grad, "a gradient was replaced"
            assert grad is None or same_value(grad, grad_value), "a gradient changed"
        assert [id(p) for p, _ in now_states] == [id(p) for p, _, _ in states], "state came or went"
        for (_, now), (_, was, values) in zip(now_states, states, strict=True):
            assert now.keys() == values.keys()
            for name in values:
                assert now[name] is was[name] or not isinstance(was[name], Tensor), f"{name} was replaced"
                assert same(now[name], values[name]), f"{name} changed"

    return check


def assert_child_ends_well(locks: Sequence[Any], target: Callable[..., None], *args: Any) -> None:
    """Call `target` in a child that is forked while another thread holds these locks: it must not wait for them."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        child = multiprocessing.get_context("fork").Process(target=target, args=args)
        child.start()
        child.join(60)
        hanging = child.is_alive()
        child.kill()
        assert not hanging
        assert child.exitcode == 0
    finally:
        go.set()
        thread.join()

"""The ways to store numbers that each backend takes, and steps of them beside the oracle, one step at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import oracle
import stored
import torch
from conftest import device_of, interpreted_by_python
from helpers import ADAMW, ADAN, Method, all_params, plain
from stored import Approximate
from torch import Tensor

import agr_cuda
from agr_cuda.backends import why_not
from agr_cuda.precision import Precision
from agr_cuda.tensors import GradientKind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 4100  # more than the smallest parameter whose state may be of 8 bits, and no multiple of anything
SMALL = 31

#: An update rule by its name: the optimizer, its options, and its averages in the order of their random numbers.
RULES: dict[str, tuple[Method, dict[str, Any], tuple[str, ...]]] = {
    "adamw": (ADAMW, {}, ("exp_avg", "exp_avg_sq")),
    "amsgrad": (ADAMW, {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "adan": (ADAN, {}, ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")),
}
#: Averages of what cannot be negative, whose codes have no sign.
UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq")
#: As in other tests of 16 bits: a small lr moves nothing, and with a tiny eps where a square has become 0 in storage
#: an update is of any size.
USUAL = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}


class Case(NamedTuple):
    """A way to store numbers: the types of parameter and gradient, and options."""

    parameter: str
    gradient: str
    state: str | None
    master: bool
    stochastic: bool

    def __str__(self) -> str:
        words = [self.parameter, self.gradient, self.state or "own"]
        return "-".join(words + ["master"] * self.master + ["stochastic"] * self.stochastic)

    @property
    def options(self) -> dict[str, Any]:
        """As an optimizer takes them."""
        state = None if self.state is None else DTYPES.get(self.state, self.state)
        return {"state_dtype": state, "master_weights": self.master, "stochastic_rounding": self.stochastic}


def valid_cases() -> Iterator[Case]:
    """All that make sense and differ. float64 and complex parameters have state of their own type, and are not here."""
    gradients = {
        "float32": ("float32", "bfloat16"),
        "bfloat16": ("bfloat16", "float32"),
        "float16": ("float16", "float32"),
    }
    states = (None, "float32", "bfloat16", "8bit")
    for parameter, master in product(DTYPES, (False, True)):
        own = "float32" if master else parameter
        if master and parameter == "float32":
            continue
        for gradient, state, stochastic in product(gradients[parameter], states, (False, True)):
            in_bfloat16 = "bfloat16" in (state or own, "" if master else parameter)
            if state != own and (in_bfloat16 or not stochastic):
                yield Case(parameter, gradient, state, master, stochastic)


CASES = list(valid_cases())


def takes(backend: str, case: Case) -> bool:
    p = torch.empty(LARGE, dtype=DTYPES[case.parameter], device=device_of(backend))
    kind = GradientKind.of(p, torch.empty_like(p, dtype=DTYPES[case.gradient]))
    return why_not(backend, p, kind, Precision.of(p, case.options)) is None


TAKEN = {backend: [case for case in CASES if takes(backend, case)] for backend in agr_cuda.available_backends()}


def on_cases(
    wanted: Sequence[Case] = CASES, rules: Iterable[str] = RULES, every: int = 1, rest: int = 0
) -> list[tuple[str, str, Case]]:
    """(backend, rule, case) for each wanted case that the backend takes. Where Python interprets it, one of `every`."""
    found = []
    for backend, cases in TAKEN.items():
        all_of_it = list(product([case for case in wanted if case in cases], rules))
        some = all_of_it[rest % every :: every] if interpreted_by_python(backend) else all_of_it
        found += [(backend, rule, case) for case, rule in some]
    return found


# Making problems.


def leaf(value: Tensor, grad: Tensor) -> Tensor:
    """A parameter of these values, with this gradient, perhaps of another type. Further ones are copied into it."""
    p = torch.empty_like(value, dtype=grad.dtype).requires_grad_()
    p.grad = grad
    p.data = value
    return p


def problem(
    backend: str, case: Case, generator: torch.Generator, shapes: Iterable[Sequence[int]] = ((LARGE,), (SMALL,))
) -> list[Tensor]:
    """Random parameters, with gradients of the case's type that are 0 for now."""
    device = device_of(backend)
    values = [torch.randn(shape, generator=generator).to(device, DTYPES[case.parameter]) for shape in shapes]
    return [leaf(value, torch.zeros_like(value, dtype=DTYPES[case.gradient])) for value in values]


def made(backend: str, rule: str, case: Case, params: Any, **options: Any) -> Any:
    """The optimizer of this rule on this backend, which stores its numbers in this way."""
    method, own, _ = RULES[rule]
    return method.ours(params, backend=backend, **{**USUAL, **own, **case.options, **options})


def fill_gradients(params: Iterable[Tensor], generator: torch.Generator, factor: float = 1.0) -> None:
    """Random gradients, in place."""
    for p in params:
        p.grad.copy_(torch.randn(p.shape, generator=generator) * factor)


# What is stored.


def flat(x: Tensor, like: Tensor) -> Tensor:
    """The elements of x in the order in which those of `like` are in memory, in one dimension."""
    x = x.detach().permute(sorted(range(like.dim()), key=lambda i: -like.stride(i)))
    return x.reshape(-1)


def exact(x: Tensor) -> np.ndarray:
    return np.array(x.detach().cpu().double().numpy())


def value_of(p: Tensor, state: dict[str, Tensor]) -> np.ndarray:
    """The parameter as the next step sees it, in the order of memory."""
    return exact(flat(state.get("master_param", p), p))


def average_of(p: Tensor, state: dict[str, Tensor], key: str) -> np.ndarray:
    """An average as the next step sees it, in the order of memory."""
    if key in state:
        return exact(flat(state[key], p))
    kept, scales = flat(state[f"{key}_codes"], p), exact(state[f"{key}_scale"])
    return stored.code_values(key not in UNSIGNED)[kept.cpu().numpy()] * stored.each(scales, kept.numel())


def assert_between(label: str, x: np.ndarray, low: np.ndarray, high: np.ndarray, certain: float = 0.0) -> None:
    """Every x is from low to high. At least the `certain` part has a single value that it can be."""
    off = ~((low <= x) & (x <= high))
    if off.any():
        i = int(np.argmax(off))
        raise AssertionError(f"{label}: {off.mean():.1%}, the first {x[i]} at {i}, not from {low[i]} to {high[i]}")
    if x.size >= 1000:
        assert np.mean(low == high) >= certain, f"{label}: the oracle knows the bits of only {np.mean(low == high):.1%}"


def assert_stored(
    label: str,
    x: Tensor,
    like: Tensor,
    scales: Tensor | None,
    y: Approximate,
    signed: bool,
    draw: dict[str, int] | None,
) -> None:
    """A tensor has what the oracle's y is stored as; `draw` says by which random numbers, if by any."""
    slack = 4 * y.error
    low, high, kept = y.value - slack, y.value + slack, flat(x, like)
    if scales is not None:
        assert kept.dtype == torch.uint8
        scale = exact(scales)
        largest = np.abs(y.value)
        assert_between(f"{label}, scales", scale, stored.of_blocks(largest - slack), stored.of_blocks(largest + slack))
        units = np.maximum(stored.each(scale, x.numel()), stored.SMALLEST)
        # The code is computed in float32 too, with up to six products by 10.
        low, high = ((edge + sign * 4e-6 * largest) / units for edge, sign in ((low, -1), (high, 1)))
        low, high = stored.in_code(low, signed), stored.in_code(high, signed)
        assert_between(label, stored.code_values(signed)[kept.cpu().numpy()], low, high, 0.99)
        return
    storage = str(x.dtype).removeprefix("torch.")
    if draw is not None and storage == "bfloat16":
        bits = stored.random_bits(x.numel(), **draw)
        low, high = stored.round_at_random(low, bits), stored.round_at_random(high, bits)
    else:
        low, high = oracle.round_to(low, storage), oracle.round_to(high, storage)
    assert_between(label, exact(kept), low, high, 0.0 if storage == "float32" else 0.9)


# Steps beside the oracle.


def oracle_now(rule: str, optimizer: Any) -> tuple[Any, list[oracle.Parameter]]:
    """The oracle with what is stored now."""
    method, _, averages = RULES[rule]
    groups = []
    for group in optimizer.param_groups:
        params = []
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            there = {k: Approximate(average_of(p, state, k)) for k in averages if {k, f"{k}_codes"} & state.keys()}
            if not group.get("step", 1):  # of Adan's before the first step, which were restarted or skipped
                there.pop("neg_pre_grad", None)
            steps = int(state.get("step", group.get("step", 0)))
            params.append(oracle.Parameter(Approximate(value_of(p, state)), "float32", there, steps))
        groups.append({"params": params, **{name: plain(group[name]) for name in method.theirs.defaults}})
    expected = method.theirs(groups, max_grad_norm=optimizer.max_grad_norm)
    for ours, theirs in zip(optimizer.param_groups, expected.groups, strict=True):
        theirs.steps = int(ours.get("step", 0))
    return expected, list(expected.params())


def step_beside_oracle(rule: str, case: Case, optimizer: Any, grad_scale: float | None = None) -> None:
    """One step on the gradients that are there, which are multiplied by `grad_scale`; then all that it has stored."""
    params = all_params(optimizer)
    expected, theirs = oracle_now(rule, optimizer)
    optimizer.step()
    expected.step([Approximate(exact(flat(p.grad, p)) / (grad_scale or 1.0)) for p in params])
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for index, (p, q) in enumerate(zip(params, theirs, strict=True)):
        state, group = optimizer.state[p], group_of[id(p)]
        label = f"step {q.steps}, parameter {index} {tuple(p.shape)}"
        draw = {"seed": group["rounding_seed"], "step": q.steps, "index": index}
        assert_types(label, case, p, state)
        draws = [{**draw, "array": a} if case.stochastic else None for a in range(5)]
        if case.master:
            assert_stored(f"{label}, master", state["master_param"], p, None, q.value, True, None)
            assert torch.equal(p, state["master_param"].to(p.dtype)), f"{label} is not its master, rounded to nearest"
        else:
            assert_stored(label, p, p, None, q.value, True, draws[0])
        for array, key in enumerate(RULES[rule][2], 1):
            scales, signed = state.get(f"{key}_scale"), key not in UNSIGNED
            kept = state[key if scales is None else f"{key}_codes"]
            assert_stored(f"{label}, {key}", kept, p, scales, q.state[key], signed, draws[array])


def assert_types(label: str, case: Case, p: Tensor, state: dict[str, Tensor]) -> None:
    """Everything is of the type that was asked for, and there is nothing else."""
    own = "float32" if case.master else case.parameter
    wanted = DTYPES.get(case.state or own, torch.uint8 if p.numel() >= 4096 and p.is_contiguous() else torch.float32)
    assert p.dtype == DTYPES[case.parameter]
    scales = {key for key in state if key.endswith("_scale")}
    averages = state.keys() - scales - {"step", "master_param"}
    assert all(key.endswith("_codes") == (wanted == torch.uint8) for key in averages)
    assert {state[key].dtype for key in averages} == {wanted}, label
    assert len(scales) == (len(averages) if wanted == torch.uint8 else 0), label
    assert ("master_param" in state) == case.master, label

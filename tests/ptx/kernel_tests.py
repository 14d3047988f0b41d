"""What nvcc compiled, executed by tests/ptx/machine.h: every kernel of an architecture beside the float64 oracle.

A class derived from KernelTests tests one architecture, in a file of its own, so that two can run at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import compiled
import numpy as np
import oracle
import pytest
import torch
from helpers import (
    ADAMW,
    ADAN,
    METHODS,
    Method,
    assert_close,
    assert_rounded,
    gradient,
    oracle_for,
    parameters,
    plain,
    relative_error,
    same_bits,
    to_numpy,
)
from precisions import RULES, TAKEN, fill_gradients, leaf, made, problem, step_beside_oracle
from precisions import Case as Storage
from torch import Tensor

import agr_cuda.cuda
from agr_cuda.native import native


@dataclass(frozen=True)
class Kernel:
    """One that is compiled: an optimizer, and the types of parameters (and states) and of gradients."""

    method: Method
    dtype: torch.dtype
    gradient: torch.dtype

    def __str__(self) -> str:
        types = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.gradient))
        return "-".join([self.method.name, *types])

    def optimizer(self, params: Any, **options: Any) -> Any:
        """In 16 bits, squares of gradients underflow beside the default eps, and a small lr moves nothing."""
        own = {"lr": 1e-2, "eps": 1e-3} if self.dtype.itemsize == 2 else {}
        make: Any = self.method.ours
        return make(params, backend="cuda", **own, **options)


SIXTEEN_BIT = (torch.bfloat16, torch.float16)
TYPES = [*((d, d) for d in (torch.float32, torch.float64, *SIXTEEN_BIT)), (torch.bfloat16, torch.float32)]
KERNELS = [Kernel(method, *types) for method in METHODS for types in TYPES]


@dataclass
class Case:
    """A problem, and how it is run."""

    sizes: list[int]  # of the parameters of each group
    groups: list[dict[str, Any]]  # options
    offset: int = 0  # of parameters and gradients in their memory, in elements; gradients lie one element further
    max_grad_norm: float | None = None
    limits: dict[str, int] = field(default_factory=dict)  # of the plan: see agr_cuda/cuda.py
    without: tuple[str, ...] = ()  # these tactics of the kernel
    scale: float | None = None  # by which gradients are multiplied, as GradScaler does; the second step is skipped
    absent: Callable[[int, int], bool] = lambda step, index: False  # gradients that are None
    other_type: bool = False  # whether there is a parameter of another type, so that the norm is over two launches
    steps: int = 3

    def set_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for limit, value in self.limits.items():
            monkeypatch.setenv(f"AGR_CUDA_{limit}", str(value))
        monkeypatch.setenv("AGR_CUDA_WITHOUT", ",".join(self.without))


def variants(method: Method) -> list[dict[str, Any]]:
    """Groups that differ in all that a launch can mix."""
    own = {"amsgrad": True} if method is ADAMW else {"no_prox": True}
    return [{}, {"agr": False, "weight_decay": 0.1}, {"maximize": True, **own}]


def device_numbers() -> list[dict[str, Any]]:
    """Groups whose step count or learning rate is in the device's memory."""
    rates = [torch.tensor(2e-3, dtype=dtype) for dtype in (torch.float64, torch.float32, *SIXTEEN_BIT)]
    return [{"capturable": True}, *({"lr": rate} for rate in rates), {}]


# Of a chunk: one element, less than a warp's, not a multiple of anything; of several chunks, all whole or not.
SIZES = [1, 31, 1009, 4096, 0, 8192, 8195]

# Of which a large tensor has more than one. Without a window, blocks wait for sums.
SEGMENTS = {"CHUNK": 130, "WINDOW": 0, "LEAD": 0}
TACTICS = tuple(native().cuda_tactics)

CASES: dict[str, Callable[[Method], Case]] = {
    "groups": lambda method: Case(SIZES, variants(method)),
    "clipped": lambda method: Case([*SIZES, *[9] * 10], variants(method), max_grad_norm=0.5),
    "offset": lambda method: Case([1009, 8195], variants(method), offset=1),
    "clipped offset": lambda method: Case([1009, 8195], variants(method), 1, 0.5),
    "large chunks": lambda method: Case([20_000, 33_333], variants(method), limits={"CHUNK": 20_000}, steps=2),
    "segments": lambda method: Case([9_003, 7, 9_000], variants(method), limits=SEGMENTS, steps=4),
    "clipped segments": lambda method: Case([9_003, 7], variants(method)[::-1], 0, 0.5, SEGMENTS, steps=4),
    "device": lambda method: Case([1009, 5000], device_numbers()),
    "scaled": lambda method: Case([1009, 700], variants(method), limits=SEGMENTS, scale=16.0, steps=5),
    "scaled and clipped": lambda method: Case(SIZES, variants(method), max_grad_norm=0.5, scale=16.0),
    "absent": lambda method: Case(
        [9, 5000, 1009, 8192], variants(method), 0, 0.5, absent=lambda step, index: (step + index) % 3 == 1, steps=4
    ),
    "launches": lambda method: Case([9000, 1009], [{}], max_grad_norm=0.5, other_type=True),
    "no tactics": lambda method: Case(SIZES, variants(method), 0, 0.5, without=TACTICS),
    # A block may find no task left before it has accounted for the sum that others wait for.
    "two chunks": lambda method: Case([200], [{"capturable": True}], 0, None, SEGMENTS, TACTICS, steps=6),
    "no tactics in segments": lambda method: Case([9_003, 200], variants(method), 0, None, SEGMENTS, TACTICS),
    "uploaded": lambda method: Case([33] * 9, variants(method) * 20, max_grad_norm=0.5, steps=2),
}


def at_offset(x: Tensor, offset: int) -> Tensor:
    """The same values, `offset` elements into memory that is aligned."""
    memory = torch.zeros(x.numel() + offset, dtype=x.dtype)
    return memory[offset:].view(x.shape).copy_(x)


def heavy_tailed(g: Tensor, step: int) -> Tensor:
    """With one element by which an error in the sum of the others is seen."""
    if g.numel() > 1:
        g[(977 * step) % g.numel() - 1] *= g.numel() ** 0.5
    return g


def change_options(optimizer: Any, expected: Any) -> None:
    """As a schedule does, so that no number of the last step is right in this one."""
    for group, of_oracle in zip(optimizer.param_groups, expected.groups, strict=True):
        group["lr"] = group["lr"].mul_(0.75) if isinstance(group["lr"], Tensor) else group["lr"] * 0.75
        group["betas"] = tuple(beta * 0.99 for beta in group["betas"])
        group["weight_decay"] += 0.01
        of_oracle.options.update({name: plain(group[name]) for name in ("lr", "betas", "weight_decay")})


def follow(kernel: Kernel, case: Case) -> None:
    """The steps of a case beside the oracle, then the comparison."""
    generator = torch.Generator().manual_seed(5)
    groups = []
    for options in case.groups:
        made = parameters(generator, [(size,) for size in case.sizes], kernel.dtype)
        params = [at_offset(p.detach(), case.offset).requires_grad_() for p in made]
        for p in params:
            p.grad_dtype = kernel.gradient
        groups.append({"params": params, **options})
    if case.other_type:
        other = torch.bfloat16 if kernel.dtype == torch.float32 else torch.float32
        groups.append({"params": parameters(generator, [(100,)], other)})
    fused = True if case.scale else None
    optimizer = kernel.optimizer(groups, max_grad_norm=case.max_grad_norm, fused=fused)
    expected = oracle_for(kernel.method, optimizer, case.max_grad_norm)
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(case.steps):
        scale = case.scale and case.scale * 2.0**-step
        gradients: list[Any] = []
        for index, p in enumerate(everything):
            g = gradient(p.detach().to(p.grad_dtype or p.dtype), generator, step)
            g = heavy_tailed(g, step)
            if p.dtype != kernel.dtype:
                g *= 1e-4  # of a float64 norm, squares added in float32 must not be much
            absent = case.absent(step, index)
            gradients.append(None if absent else to_numpy(g))
            p.grad = None if absent else at_offset(g * (scale or 1), case.offset + (case.offset != 0))
        if step > 0:
            change_options(optimizer, expected)
        skipped = scale is not None and step == 1
        if scale is not None:
            optimizer.grad_scale = torch.full((), scale)
            optimizer.found_inf = torch.full((), float(skipped))
        optimizer.step()
        if not skipped:
            expected.step(gradients)
    assert_close(optimizer, expected)


# The cases in which gradients are regularized in place.
REGULARIZED = [name for name in CASES if name not in ("device", "absent", "launches")]
REGULARIZED_TYPES = [kernel.dtype for kernel in KERNELS if kernel.method is ADAMW and kernel.gradient == kernel.dtype]


def follow_regularization(dtype: torch.dtype, case: Case) -> None:
    """regularize_gradients_ beside its equation, on the sizes of a case."""
    generator = torch.Generator().manual_seed(5)
    params = parameters(generator, [(size,) for size in case.sizes * len(case.groups)], dtype)
    for step in range(case.steps):
        scale = case.scale and case.scale * 2.0**-step
        skipped = scale is not None and step == 1
        gradients = [heavy_tailed(gradient(p.detach(), generator, step), step) for p in params]
        norm = float(np.sqrt(sum(np.sum(to_numpy(g) ** 2) for g in gradients)))
        factor = 1.0 if case.max_grad_norm is None else min(1.0, case.max_grad_norm / (norm + 1e-6))
        for p, g in zip(params, gradients, strict=True):
            p.grad = at_offset(g * (scale or 1), case.offset)
        before = [p.grad.clone() for p in params if p.grad is not None]
        agr_cuda.regularize_gradients_(
            params, max_norm=case.max_grad_norm, backend="cuda", grad_scale=scale,
            found_inf=None if scale is None else torch.full((), float(skipped)),
        )  # fmt: skip
        for p, g, was in zip(params, gradients, before, strict=True):
            assert p.grad is not None
            expected = oracle.psi(factor * to_numpy(g))
            if skipped:
                assert same_bits(p.grad, was)
            elif dtype in SIXTEEN_BIT:
                assert_rounded("a gradient", p.grad, oracle.round_to(expected, str(dtype).removeprefix("torch.")))
            else:
                assert relative_error(p.grad, expected) <= (1e-13 if dtype == torch.float64 else 1e-6)


def check_cache_policies_of_regularization(module: ModuleType, dtype: torch.dtype) -> None:
    """What is regularized in place is read twice, like any gradient, and then left to the optimizer."""
    params = parameters(torch.Generator().manual_seed(5), [(9216,), (4096,), (640,)], dtype)
    for max_norm in (None, 0.5):
        for p in params:
            p.grad = torch.ones_like(p)
        module.take_traffic()
        agr_cuda.regularize_gradients_(params, max_norm=max_norm, backend="cuda")
        traffic = module.take_traffic()["gradient"]
        read = sum(p.numel() for p in params) * dtype.itemsize
        assert traffic["loaded"] == [0, read, read], f"{max_norm}: {traffic}"
        assert traffic["stored"] == [read, 0, 0], f"{max_norm}: {traffic}"


def check_cache_policies(module: ModuleType, kernel: Kernel) -> None:
    """Gradients stay in the second-level cache from REDUCE until UPDATE has read them; all else leaves it."""
    sizes = [9216, 4096, 640]
    variants: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.5}]
    if kernel.method is ADAMW:
        variants += [{"amsgrad": True, **options} for options in variants]
    for options in variants:
        params = parameters(torch.Generator().manual_seed(5), [(size,) for size in sizes], kernel.dtype)
        optimizer = kernel.optimizer(params, **options)
        for p in params:
            p.grad_dtype = kernel.gradient
            p.grad = torch.ones_like(p, dtype=kernel.gradient)
        module.take_traffic()
        optimizer.step()
        traffic = module.take_traffic()
        gradient_bytes, state_bytes = sum(sizes) * kernel.gradient.itemsize, sum(sizes) * kernel.dtype.itemsize
        states = 4 if kernel.method is ADAN else 3 if "amsgrad" in options else 2
        # Bytes without a policy, evict first, evict last.
        gradient_traffic = traffic["gradient"]
        assert gradient_traffic["loaded"] == [0, gradient_bytes, gradient_bytes], f"{options}: {gradient_traffic}"
        for name, count in (("parameter", 1), ("state", states)):
            expected = [0, count * state_bytes, 0]
            assert traffic[name]["loaded"] == traffic[name]["stored"] == expected, f"{options}: {name} {traffic[name]}"


# The ways to store numbers that are not those of the kernels above, with the rules of each.
OWN = [Storage(str(k.dtype)[6:], str(k.gradient)[6:], None, master=False, stochastic=False) for k in KERNELS]
STORED = [(rule, case) for case in TAKEN["cuda"] if case not in OWN for rule in RULES]
# Of one block of codes, of none, of several chunks.
STORED_SIZES = [4096 + 1, 257, 2 * 4096 + 300]


def gradient_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def follow_stored(rule: str, case: Storage, offset: int, **options: Any) -> None:
    """Steps from what is stored beside the oracle."""
    generator = torch.Generator().manual_seed(7)
    aligned = problem("cuda", case, generator, [(size,) for size in STORED_SIZES])
    params = [leaf(at_offset(p.detach(), offset), at_offset(gradient_of(p), offset)) for p in aligned]
    groups = [{"params": params[:2]}, {"params": params[2:], "agr": False, "maximize": True}]
    optimizer = made("cuda", rule, case, groups, rounding_seed=2**33 + 5, **options)
    for _ in range(2):
        fill_gradients(params, generator)
        step_beside_oracle(rule, case, optimizer)


# What threads tell each other by.
SYNCHRONIZES = re.compile(r"(bar|barrier|vote|shfl|atom|red|redux|fence)\.")
# The formats of KERNELS, as they stand in the names of their functions.
NAMES = {"float32": "float", "float64": "double", "bfloat16": "agr::bfloat16", "float16": "agr::float16"}
FOLLOWED = [
    "Format<{}, {}, {}, false, false>".format(*(NAMES[str(t)[6:]] for t in (k.dtype, k.gradient, k.dtype)))
    for k in KERNELS
]


class KernelTests:
    architecture: ClassVar[str]
    followed: ClassVar[set[tuple[str, str, Kernel]]] = set()  # which tests have run

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def module(cls) -> Iterator[ModuleType]:
        if compiled.nvcc() is None:
            pytest.skip("there is no nvcc")
        module = compiled.load(compiled.kernels(cls.architecture))
        with agr_cuda.cuda.rehearsal(module.launcher):
            yield module

    @pytest.mark.parametrize("kernel", KERNELS, ids=str)
    @pytest.mark.parametrize("name", CASES)
    def test_it_follows_the_oracle(
        self, module: ModuleType, name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = CASES[name](kernel.method)
        number = list(itertools.product(CASES, KERNELS)).index((name, kernel))
        case.set_environment(monkeypatch)
        # Each with another interleaving, grid and error of what hardware approximates.
        module.configure(seed=100 * number, multiprocessors=3 + number % 5, approximation_error=number % 3)
        follow(kernel, case)
        self.followed.add((self.architecture, name, kernel))

    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize(("rule", "case"), STORED, ids=str)
    def test_numbers_are_stored_as_defined(
        self, module: ModuleType, rule: str, case: Storage, offset: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        number = STORED.index((rule, case))
        monkeypatch.setenv("AGR_CUDA_CHUNK", "4096")
        module.configure(seed=100 * number, multiprocessors=3 + number % 5, approximation_error=number % 3)
        follow_stored(rule, case, offset, **({"max_grad_norm": 0.5} if number % 2 else {}))

    @pytest.mark.parametrize("dtype", REGULARIZED_TYPES, ids=str)
    @pytest.mark.parametrize("name", REGULARIZED)
    def test_gradients_are_regularized(
        self, module: ModuleType, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = CASES[name](ADAMW)
        number = list(itertools.product(REGULARIZED, REGULARIZED_TYPES)).index((name, dtype))
        case.set_environment(monkeypatch)
        module.configure(seed=100 * number, multiprocessors=3 + number % 5, approximation_error=number % 3)
        follow_regularization(dtype, case)

    @pytest.mark.parametrize("dtype", REGULARIZED_TYPES, ids=str)
    def test_regularized_gradients_have_their_cache_policy(self, module: ModuleType, dtype: torch.dtype) -> None:
        module.configure(seed=1, multiprocessors=4)
        check_cache_policies_of_regularization(module, dtype)

    def test_all_synchronization_has_been_reached(self, module: ModuleType) -> None:
        """By the tests above: otherwise some of a kernel goes untested."""
        if not self.followed >= set(itertools.product([self.architecture], CASES, KERNELS)):
            pytest.skip("only some of the tests above have run")
        # Where gradients are regularized in place, no steps are counted, and no gradients are missing. Kernels that
        # store numbers in other ways have the same synchronization, and one of their own.
        coverage = [
            place
            for place in module.coverage()
            if "RegularizeRules" not in place[0]
            and (any(name in place[0] for name in FOLLOWED) or place[2].startswith("redux."))
        ]
        missed = [place for place in coverage if SYNCHRONIZES.match(place[2]) and place[3] == 0]
        assert not missed, "\n".join(map(str, missed))

    @pytest.mark.parametrize("kernel", KERNELS, ids=str)
    def test_memory_is_read_and_written_with_its_cache_policy(self, module: ModuleType, kernel: Kernel) -> None:
        module.configure(seed=1, multiprocessors=4)
        check_cache_policies(module, kernel)

"""Random options, parameters, gradients and checkpoints: ours without AGR beside torch.optim.AdamW in float64.

The ordinary run is the same 200 runs each time. AGR_CUDA_RANDOM_RUNS=20000 makes so many, and others each time.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import all_params
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import agr_cuda

RUNS = int(os.environ.get("AGR_CUDA_RANDOM_RUNS", "0"))
BOUND = 1e-9

# The CPU backend's chunks are of 65,536 elements.
LARGE = [(65_536,), (65_537,), (3, 43_691), (200_003,)]
NAMED_SHAPES = [(), (1,), (0,), (3, 0, 2), (1, 1, 1), (257,), (2, 3, 4, 5), (64, 33)]
DENSE = ["contiguous", "transposed", "channels_last", "shifted"]
WITH_GAPS = ["sliced", "one column"]
OVERLAPPING = ["expanded", "windows"]
KINDS = ["ordinary", "missing", "zero", "tiny", "huge"]
SCALES = {"ordinary": 1.0, "zero": 0.0, "tiny": 1e-160, "huge": 1e150, "square overflows": 4e154}


@dataclass(frozen=True)
class Gradient:
    kind: str
    layout: str


@dataclass(frozen=True)
class Run:
    """What is drawn. Everything else comes from a generator of numbers that is seeded with `seed`."""

    seed: int
    backend: str | None
    threads: int
    flags: dict[str, bool]  # of ours alone
    groups: list[tuple[dict[str, Any], list[tuple[tuple[int, ...], str]]]]  # options, then shapes and layouts
    gradients: list[list[Gradient]]  # for each step one for each parameter
    changes: list[dict[int, dict[str, Any]]] = field(default_factory=list)  # for each step, of options by group
    checkpoint: tuple[int, str] | None = None  # before which step, and from where to where


def numbers(eps_may_be_zero: bool) -> dict[str, st.SearchStrategy[Any]]:
    beta = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6]) | st.floats(0.0, 0.9999)
    return {
        "lr": st.sampled_from([0.0, 1e-3, 0.1, 1.0]) | st.floats(1e-8, 1.0),
        "betas": st.tuples(beta, beta),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0, 1e4, *([0.0] * 4 if eps_may_be_zero else [])]),
        "weight_decay": st.sampled_from([0.0, 1e-2, 0.5]) | st.floats(0.0, 1.0),
        "maximize": st.booleans(),
    }


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    anyhow = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    return st.sampled_from(NAMED_SHAPES) | anyhow | st.sampled_from([*LARGE, *[(n,) for n in (5, 31, 1009)]])


@st.composite
def runs(draw: st.DrawFn) -> Run:
    backend = draw(st.sampled_from([None, "cpu", "reference"]))
    flags = draw(st.sampled_from(
        [{}, {}, {"capturable": True}, *([{"fused": True}] if backend != "reference" else [{"foreach": True}])]
    ))  # fmt: skip
    dense_only = backend == "cpu" or "fused" in flags
    layouts = st.sampled_from(DENSE if dense_only else DENSE + WITH_GAPS)
    eps_may_be_zero = draw(st.booleans())
    kinds = [kind for kind in KINDS if kind not in ("zero", "tiny")] if eps_may_be_zero else KINDS
    options = st.fixed_dictionaries(
        {"amsgrad": st.booleans()}, optional={**numbers(eps_may_be_zero), "lr_in_a_tensor": st.just(True)}
    )
    params = st.lists(st.tuples(shapes(), layouts), min_size=1, max_size=3)
    groups = draw(st.lists(st.tuples(options, params), min_size=1, max_size=4))
    steps = draw(st.integers(2, 5))
    count = sum(len(params) for _, params in groups)
    of_any = st.sampled_from(["contiguous", *DENSE, *WITH_GAPS, *OVERLAPPING])
    gradient = st.builds(Gradient, st.sampled_from(["ordinary", *kinds]), of_any)
    gradients = draw(st.lists(st.lists(gradient, min_size=count, max_size=count), min_size=steps, max_size=steps))
    change = st.dictionaries(
        st.integers(0, len(groups) - 1), st.fixed_dictionaries({}, optional=numbers(eps_may_be_zero)), max_size=2
    )
    changes = draw(st.lists(change, min_size=steps, max_size=steps))
    way = st.sampled_from(["torch to ours", "ours to torch", "ours to ours", "both ways"])
    checkpoint = draw(st.none() | st.tuples(st.integers(1, steps - 1), way))
    return Run(draw(st.integers(0, 999)), backend, draw(st.sampled_from([1, 2])), flags, groups, gradients, changes,
               checkpoint)  # fmt: skip


# Making tensors.


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of their own, or for overlapping layouts as many of them as there is memory for."""
    shape = values.shape
    if layout == "transposed":
        back_to_front = tuple(range(values.dim()))[::-1]
        return values.permute(back_to_front).clone(memory_format=torch.contiguous_format).permute(back_to_front)
    if layout == "channels_last" and values.dim() == 4:
        return values.clone(memory_format=torch.channels_last)
    if layout == "shifted":  # by one element, so that no vector is aligned
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(shape)
    if layout == "sliced" and values.dim():
        return values.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "one column":
        return torch.stack([values, values, values], dim=-1)[..., 1]
    if layout == "expanded" and values.numel():
        return values.flatten()[0].expand(shape)
    if layout == "windows" and values.numel():  # each row is the one before, moved by one element
        return values.flatten()[: sum(shape) - values.dim() + 1].clone().as_strided(shape, [1] * values.dim())
    return values.clone(memory_format=torch.contiguous_format)


def make_gradient(like: Tensor, wanted: Gradient, generator: torch.Generator) -> Tensor | None:
    if wanted.kind == "missing":
        return None
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    values = values + torch.where(values < 0, -1e-3, 1e-3)  # with an eps of 0, quotients stay within range
    return laid_out(values * SCALES[wanted.kind], wanted.layout)


def in_a_tensor(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if options.pop("lr_in_a_tensor", False):
        options["lr"] = torch.tensor(options.get("lr", 1e-3), dtype=torch.float64)
    return options


def make(run: Run) -> tuple[agr_cuda.AdamW, torch.optim.AdamW, torch.Generator]:
    generator = torch.Generator().manual_seed(run.seed)
    mine, theirs = [], []
    for options, params in run.groups:
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in params]
        laid = [laid_out(x, layout).requires_grad_() for x, (_, layout) in zip(values, params, strict=True)]
        mine.append({"params": laid, **in_a_tensor(options)})
        theirs.append({"params": [x.clone().requires_grad_() for x in values], **in_a_tensor(options)})
    return our_optimizer(run, mine), torch.optim.AdamW(theirs), generator


def our_optimizer(run: Run, groups: list[dict[str, Any]]) -> agr_cuda.AdamW:
    return agr_cuda.AdamW(groups, agr=False, backend=run.backend, **run.flags)


# What happens between steps.


def change_options(optimizer: torch.optim.Optimizer, changes: dict[int, dict[str, Any]]) -> None:
    """As schedulers do, which fill an lr that is a tensor."""
    for index, options in changes.items():
        group = optimizer.param_groups[index]
        for name, value in options.items():
            if isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = value


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_checkpoints(
    run: Run, way: str, ours: agr_cuda.AdamW, theirs: torch.optim.AdamW
) -> tuple[agr_cuda.AdamW, torch.optim.AdamW]:
    """Optimizers that have loaded what others saved. Their parameters stay, and they are made with other numbers."""
    of_ours, of_torch = saved(ours), saved(theirs)
    bare = [[{"params": group["params"]} for group in each.param_groups] for each in (ours, theirs)]
    if way != "ours to torch":
        ours = our_optimizer(run, bare[0])
        ours.load_state_dict(of_ours if way == "ours to ours" else of_torch)
    if way in ("ours to torch", "both ways"):
        theirs = torch.optim.AdamW(bare[1])
        theirs.load_state_dict(of_ours)
        for group in theirs.param_groups:  # on a CPU, torch refuses the first, and for others the layouts here
            group.update(capturable=False, fused=None, foreach=None)
    return ours, theirs


# Comparing.


def check(label: str, x: Tensor, y: Tensor, terms: list[Tensor]) -> None:
    """Every element is to BOUND the other, of what was added up to make it."""
    assert (x.shape, x.dtype) == (y.shape, y.dtype), label
    scale = sum((term.abs() for term in terms), y.abs())
    # Squares of the tiniest gradients are no normal numbers, and have few bits.
    close = ((x - y).abs() <= BOUND * scale + 1e-300) | (x == y)
    assert close.all(), f"{label}: {x[~close][:3].tolist()} instead of {y[~close][:3].tolist()}"


def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Each parameter's state as it is now."""
    return [{key: x.clone() for key, x in optimizer.state.get(p, {}).items()} for p in all_params(optimizer)]


def compare(
    ours: agr_cuda.AdamW, theirs: torch.optim.AdamW, reached: list[Tensor], before: list[dict[str, Tensor]]
) -> None:
    """The optimizers after a step. `reached` has for each element of a parameter its largest magnitude so far."""
    betas = [group["betas"] for group in theirs.param_groups for _ in group["params"]]
    params = zip(all_params(ours), all_params(theirs), strict=True)
    for index, (p, q) in enumerate(params):
        label = f"parameter {index} of shape {tuple(p.shape)}"
        mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
        assert mine.keys() == other.keys(), label
        assert q.isfinite().all(), f"{label} is not finite, so that it says nothing"
        check(label, p.detach(), q.detach(), [reached[index]])
        for key, value in other.items():
            if key == "step":
                assert float(mine[key]) == float(value), f"{label}: step"
            elif key == "exp_avg" and q.grad is not None:
                beta1, was = betas[index][0], before[index].get(key, torch.zeros_like(value))
                check(f"{label}: {key}", mine[key], value, [(1 - beta1) * q.grad, beta1 * was])
            else:
                check(f"{label}: {key}", mine[key], value, [])


def follow(run: Run) -> None:
    ours, theirs, generator = make(run)
    reached = [q.detach().abs() for q in all_params(theirs)]
    for step, (gradients, changes) in enumerate(zip(run.gradients, run.changes, strict=True)):
        if run.checkpoint is not None and run.checkpoint[0] == step:
            ours, theirs = through_checkpoints(run, run.checkpoint[1], ours, theirs)
        for optimizer in (ours, theirs):
            change_options(optimizer, changes)
        for p, q, wanted in zip(all_params(ours), all_params(theirs), gradients, strict=True):
            p.grad = make_gradient(p, wanted, generator)
            q.grad = None if p.grad is None else p.grad.clone(memory_format=torch.contiguous_format)
        before = states(theirs)
        ours.step()
        theirs.step()
        reached = [torch.maximum(x, q.detach().abs()) for x, q in zip(reached, all_params(theirs), strict=True)]
        compare(ours, theirs, reached, before)


def one_parameter(shape: tuple[int, ...], layout: str, kinds: list[str], **options: Any) -> Run:
    gradients = [[Gradient(kind, "contiguous")] for kind in kinds]
    return Run(1, None, 1, {}, [({"amsgrad": False, **options}, [(shape, layout)])], gradients, [{} for _ in kinds])


@example(one_parameter((2, 3, 0, 4), "channels_last", ["ordinary"] * 2))
@example(one_parameter((3, 0, 2), "transposed", ["ordinary"] * 2))
@example(one_parameter((7,), "sliced", ["huge", "ordinary", "ordinary"], betas=(0.0, 0.9)))
@example(one_parameter((7,), "contiguous", ["huge", "ordinary", "ordinary"], betas=(0.0, 0.0), eps=0.0))
@example(one_parameter((257,), "contiguous", ["square overflows", "ordinary"], betas=(0.9, 0.99999)))
@given(runs())
@settings(
    max_examples=RUNS or 200,
    derandomize=not RUNS,
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
def test_any_run_is_torchs(run: Run) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        follow(run)
    finally:
        torch.set_num_threads(threads)

"""torch.distributed's checkpoints go to and from torch.optim.AdamW, and FSDP2's parameters are taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import Method, all_params, assert_parameters_close, run, same_bits
from processes import in_processes
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import agr_cuda

# What torch.distributed says of itself, on a CPU and alone.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


Make = Callable[[Any], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "torch": lambda ps: torch.optim.AdamW(ps, lr=2e-3, amsgrad=True),
    "ours": lambda ps: agr_cuda.AdamW(ps, lr=2e-3, amsgrad=True, agr=False),
    "Adan": lambda ps: agr_cuda.Adan(ps, lr=2e-3, betas=(0.9, 0.8, 0.95)),
}


def model_and(make: Make, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 5e-3}]
    return model, make(groups)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("through_files", [False, True])
@pytest.mark.parametrize(
    ("source", "target"), [("torch", "ours"), ("ours", "torch"), ("ours", "ours"), ("Adan", "Adan")]
)
def test_checkpoints_go_both_ways(source: str, target: str, through_files: bool, flatten: bool, tmp_path) -> None:
    """With the default planners, into an optimizer that has stepped and one that has not; and again, as a rollback."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = model_and(MAKERS[source])
    run(optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    run(optimizer, range(3, 6))
    if through_files:
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "saved", no_dist=True)
    for steps in (0, 2):
        other_model, other = model_and(MAKERS[target], seed=1)
        run(other, steps)
        for _ in range(2):
            loaded = copy.deepcopy(saved)
            if through_files:
                loaded = get_optimizer_state_dict(other_model, other, options=options)
                dcp.load({"optimizer": loaded}, checkpoint_id=tmp_path / "saved", no_dist=True)
            set_optimizer_state_dict(other_model, other, loaded, options=options)
            other_model.load_state_dict(weights)
            run(other, range(3, 6))
            assert_parameters_close(all_params(other), all_params(optimizer))
            assert [group["lr"] for group in other.param_groups] == [2e-3, 5e-3]


@pytest.mark.parametrize("flatten", [False, True])
def test_agr_stays_as_it_is_here(flatten: bool) -> None:
    """A checkpoint does not say it."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, theirs = model_and(MAKERS["torch"])
    run(theirs, 1)
    saved = get_optimizer_state_dict(model, theirs, options=options)
    model, ours = model_and(lambda groups: agr_cuda.AdamW(groups, amsgrad=True))
    ours.param_groups[1]["agr"] = False
    set_optimizer_state_dict(model, ours, saved, options=options)
    assert [group["agr"] for group in ours.param_groups] == [True, False]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("fused", [True, None])
def test_fsdp2_trains(fused: bool | None, method: Method) -> None:
    """With fused=True, its usual setting, by the kernels that plain parameters get."""
    plain, sharded = (torch.nn.Linear(4, 3) for _ in range(2))
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    expected = method.ours(plain.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = method.ours(sharded.parameters(), fused=fused)
        for _ in range(3):
            for model, o in ((plain, expected), (sharded, optimizer)):
                model(torch.linspace(-1, 1, 8).view(2, 4)).square().sum().backward()
                o.step()
                o.zero_grad()
    assert not [w for w in caught if "fused=True" in str(w.message)]
    assert optimizer.backends == expected.backends
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert_parameters_close([p.full_tensor()], [q])
        assert isinstance(optimizer.state[p]["exp_avg"], DTensor)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kinds", ["DD", "DP", "PD", "DE", "PDE"])
@pytest.mark.parametrize("foreach", [None, True])
def test_dtensors_are_clipped_together_with_others(foreach: bool | None, kinds: str, method: Method, generator) -> None:
    """P is a plain tensor, D a DTensor of one mesh, E of another; in whatever order. The norm is plain."""
    one, two = init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    meshes = {"D": (one, [Shard(0)]), "E": (two, [Shard(0), Replicate()])}

    def placed(kind: str, x: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(x, *meshes[kind]) if kind in meshes else x.clone()

    values = [torch.randn(6, 4, generator=generator) for _ in kinds]
    params = [torch.nn.Parameter(placed(kind, x)) for kind, x in zip(kinds, values, strict=True)]
    plain = [torch.nn.Parameter(x) for x in values]
    optimizer = method.ours(params, max_grad_norm=0.1, foreach=foreach)
    twin = method.ours(plain, max_grad_norm=0.1, backend="cpu")
    for _ in range(2):
        for kind, p, q in zip(kinds, params, plain, strict=True):
            q.grad = torch.randn(6, 4, generator=generator)
            p.grad = placed(kind, q.grad)
        optimizer.step()
        twin.step()
        assert type(optimizer.grad_norm) is torch.Tensor
        assert optimizer.grad_norm.item() == pytest.approx(twin.grad_norm.item())
    for p, q in zip(params, plain, strict=True):
        assert_parameters_close([p.full_tensor() if isinstance(p, DTensor) else p], [q])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("kinds", ["DD", "DP", "PD", "DE", "PDE"])
def test_gradients_that_are_dtensors_are_regularized_in_place(kinds: str, max_norm: float | None, generator) -> None:
    """P is a plain tensor, D a DTensor of one mesh, E of another; in whatever order. The norm is plain."""
    one, two = init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    meshes = {"D": (one, [Shard(0)]), "E": (two, [Shard(0), Replicate()])}
    values = [torch.randn(6, 4, generator=generator) for _ in kinds]
    grads = [distribute_tensor(x, *meshes[k]) if k in meshes else x.clone() for k, x in zip(kinds, values, strict=True)]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    plain = [torch.nn.Parameter(torch.zeros_like(x)) for x in values]
    flags = {"grad_scale": torch.tensor(2.0), "found_inf": torch.zeros(1)}
    for options in ({}, flags, flags | {"found_inf": torch.ones(1)}):
        for p, g, q, x in zip(params, grads, plain, values, strict=True):
            p.grad, q.grad = g.clone(), x.clone()
        norm = agr_cuda.regularize_gradients_(params, max_norm=max_norm, **options)
        expected = agr_cuda.regularize_gradients_(plain, max_norm=max_norm, **options)
        if max_norm is not None:
            assert type(norm) is torch.Tensor
            torch.testing.assert_close(norm, expected, equal_nan=True)
        for p, q in zip(params, plain, strict=True):
            assert_parameters_close([p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad], [q.grad])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1}, {"backend": "cpu"}, {}], ids=str)
def test_a_redundancy_optimizer_hands_options_on(options: dict, method: Method) -> None:
    """On one rank, whose gradients are all there are."""
    ps, qs = ([torch.nn.Parameter(torch.arange(1.0, 6.0))] for _ in range(2))
    sharded = ZeroRedundancyOptimizer(ps, optimizer_class=method.ours, lr=1e-2, **options)
    plain = method.ours(qs, lr=1e-2, **options)
    run(sharded, 3)
    run(plain, 3)
    assert same_bits(ps[0], qs[0])


PRECISIONS = [
    (torch.bfloat16, {"state_dtype": torch.float32}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master_weights": True}),
    (torch.bfloat16, {"stochastic_rounding": True}),
    (torch.bfloat16, {"stochastic_rounding": True, "master_weights": True, "state_dtype": torch.bfloat16}),
]
#: Shape, placements, and whether the dimensions are in another order in memory. Parts differ in size, or are empty.
PLACES = [
    ((7, 6), [Shard(0), Replicate()], False),
    ((7, 6), [Shard(1), Replicate()], True),
    ((1,), [Shard(0), Replicate()], False),
    ((), [Replicate(), Replicate()], False),
    ((5, 2, 3), [Shard(2), Shard(0)], False),
]


def step_as_whole_tensors_do(rank: int, method: Method) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    for dtype, options in PRECISIONS:
        generator = torch.Generator().manual_seed(1)
        whole, parts = [], []
        for shape, placements, transposed in PLACES:
            value = torch.randn(shape, generator=generator).to(dtype)
            value = value.t().contiguous().t() if transposed else value
            whole.append(torch.nn.Parameter(value.clone()))
            parts.append(torch.nn.Parameter(distribute_tensor(value, mesh, placements)))
        one, other = (method.ours(ps, lr=0.05, agr=False, backend="reference", **options) for ps in (whole, parts))
        for _ in range(3):
            for p, q, (shape, placements, _) in zip(whole, parts, PLACES, strict=True):
                p.grad = torch.randn(shape, generator=generator).to(dtype)
                q.grad = distribute_tensor(p.grad, mesh, placements)
            one.step()
            other.step()
        for p, q in zip(whole, parts, strict=True):
            assert same_bits(p, q.full_tensor()), (options, tuple(p.shape))
            assert one.state[p].keys() == other.state[q].keys()
            for key, value in one.state[p].items():
                mine = other.state[q][key]
                assert same_bits(value, mine.full_tensor() if isinstance(mine, DTensor) else mine), (options, key)


def test_parts_of_tensors_are_stored_as_whole_ones(method: Method) -> None:
    """Two processes hold a part each, and round it with the random numbers of its place in the whole."""
    in_processes(2, step_as_whole_tensors_do, method)


@pytest.mark.usefixtures("alone")
def test_codes_of_dtensors_are_refused(method: Method) -> None:
    mesh = init_device_mesh("cpu", (1,))
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(64, 64), mesh, [Shard(0)]))
    p.grad = torch.ones_like(p)
    optimizer = method.ours([p], state_dtype="8bit")
    with pytest.raises(RuntimeError, match="state_dtype is '8bit', and group 0, parameter 0 is a DTensor"):
        optimizer.step()
    assert not optimizer.state[p]

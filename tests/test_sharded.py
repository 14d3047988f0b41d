"""Parameters that are spread over processes are updated as the whole ones are, with one all-reduce a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import interpreted_by_python
from helpers import ADAMW, Method, same_bits
from processes import Counted, distance, in_processes, whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import agr_cuda

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore:AGR makes")

Place = tuple[DeviceMesh, list[Any]] | None

#: Even and uneven parts, tensors of fewer elements than processes, and of one element.
SHAPES = [(8, 4), (33, 7), (3,), (1,), (), (5, 5, 2), (40, 300)]


def placed(value: Tensor, place: Place) -> Tensor:
    """Each process has the whole and keeps its part."""
    return value.clone() if place is None else distribute_tensor(value, *place, src_data_rank=None)


def places(kind: str, size: int) -> list[tuple[tuple[int, ...], Place]]:
    """The shapes and places of a model's parameters. P: plain, R: replicated, S: sharded, 2: on a second dimension,
    H: sharded in one dimension of a mesh and replicated in the other, D: sharded in both."""
    one = init_device_mesh("cpu", (size,))
    two = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))
    found: list[tuple[tuple[int, ...], Place]] = []
    for shape in SHAPES:
        for letter in kind:
            last = max(len(shape) - 1, 0)
            by_letter: dict[str, Place] = {
                "P": None,
                "R": (one, [Replicate()]),
                "S": (one, [Shard(0)]),
                "2": (one, [Shard(last)]),
                "H": (two, [Replicate(), Shard(0)]),
                "D": (two, [Shard(last), Shard(0)]),
            }
            place = by_letter[letter]
            if not shape and place is not None:
                place = (place[0], [Replicate() for _ in place[1]])
            found.append((shape, place))
    return found


def train(rank: int, size: int, method: Method, kind: str, steps: int, cases: list[dict[str, Any]]) -> list[Any]:
    """With each case's options, train parts and wholes side by side; return how far apart they end, and more."""
    layout = places(kind, size)
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(shape, generator=generator) for shape, _ in layout]
    gradients = [[torch.randn(shape, generator=generator) * 3 for shape, _ in layout] for _ in range(steps)]
    # Once for all cases, since it takes longer than a step.
    placed_gradients = [[placed(g, place) for g, (_, place) in zip(gs, layout, strict=True)] for gs in gradients]
    results = []
    for options in cases:
        wholes = [torch.nn.Parameter(x.clone()) for x in values]
        parts = [torch.nn.Parameter(placed(x, place)) for x, (_, place) in zip(values, layout, strict=True)]
        ours = method.ours(parts, lr=1e-2, **options)
        expected = method.ours(wholes, lr=1e-2, **options | {"backend": "cpu"})
        for now_parts, now in zip(placed_gradients, gradients, strict=True):
            for p, q, part, g in zip(parts, wholes, now_parts, now, strict=True):
                p.grad, q.grad = part, g
            with Counted() as sizes:
                ours.step()
            expected.step()
        norms = [None if o.grad_norm is None else o.grad_norm.item() for o in (ours, expected)]
        ended = [whole(p.detach()) for p in parts]
        results.append((distance(ended, wholes), sizes, norms, ours.backends, ended))
    return results


@pytest.mark.parametrize(("size", "kind", "groups"), [(2, "SP", 1), (2, "2RS", 1), (4, "HPS", 2), (4, "DSHP", 3)])
def test_parts_are_updated_as_the_whole_is(size: int, kind: str, groups: int, backend: str, method: Method) -> None:
    """Within rounding, to the same bits on every process; with one all-reduce for each group of processes, and none
    where nothing needs a sum."""
    cases = [{"backend": backend, "agr": agr, "max_grad_norm": norm} for agr in (True, False) for norm in (None, 0.5)]
    steps = 50 if backend == "cpu" else 10 if backend == "reference" else 4
    if interpreted_by_python(backend):
        cases, steps = cases[1:2], 2
    by_rank = in_processes(size, train, size, method, kind, steps, cases)
    for rank, results in enumerate(by_rank):
        for case, (apart, sent, norms, backends, ended), first in zip(cases, results, by_rank[0], strict=True):
            assert apart < 1e-6, case
            assert backends == [backend]
            assert len(sent) == (groups if case["agr"] or case["max_grad_norm"] else 0), case
            assert norms[0] == norms[1] or norms[0] == pytest.approx(norms[1], rel=1e-6), case
            assert all(same_bits(p, q) for p, q in zip(ended, first[4], strict=True)), f"rank {rank}, {case}"


def train_on_meshes_of_some(rank: int, method: Method) -> tuple[float, list[int]]:
    """The first parameter is on processes 0 and 1, a row of the second's mesh, the third on that row's own mesh."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    layout: list[tuple[DeviceMesh, list[Any]]] = [
        (DeviceMesh("cpu", [0, 1]), [Shard(0)]),
        (both, [Shard(0), Shard(1)]),
        (both["b"], [Shard(0)]),
        (both, [Replicate(), Shard(0)]),
    ]
    generator = torch.Generator().manual_seed(8)
    values = [torch.randn(8, 6, generator=generator) for _ in layout]
    parts = [torch.nn.Parameter(placed(x, place)) for x, place in zip(values, layout, strict=True)]
    wholes = [torch.nn.Parameter(x.clone()) for x in values]
    # Where eps outweighs exp_avg_sq, a step is as long as psi.
    ours, expected = (method.ours(ps, lr=1e-2, eps=10.0) for ps in (parts, wholes))
    for _ in range(3):
        for p, q, place in zip(parts, wholes, layout, strict=True):
            q.grad = torch.randn(8, 6, generator=generator)
            p.grad = placed(q.grad, place)
        with Counted() as sizes:
            ours.step()
        expected.step()
    assert ours.backends == ["cpu"]
    apart = [float((p.full_tensor() - q).abs().max()) for p, q in list(zip(parts, wholes, strict=True))[rank > 1 :]]
    if rank > 1:
        ours.max_grad_norm = 1.0
        before = [p.to_local().clone() for p in parts]
        with pytest.raises(RuntimeError, match="group 0, parameter 0 is on a mesh without this process"):
            ours.step()
        assert all(same_bits(p.to_local(), q) for p, q in zip(parts, before, strict=True))
    return max(apart), sizes


def test_meshes_may_have_some_of_the_processes(method: Method) -> None:
    """All processes sum in one order, though they know of different parameters; each group sums once."""
    for rank, (apart, sizes) in enumerate(in_processes(4, train_on_meshes_of_some, method)):
        assert apart < 1e-7
        assert len(sizes) == 2, rank


def step_in_a_ring(rank: int) -> None:
    """Each two of three processes share a parameter, and each process lists its own in another order."""
    meshes = {pair: DeviceMesh("cpu", list(pair)) for pair in ((0, 1), (0, 2), (1, 2))}
    pairs = [[(0, 1), (0, 2)], [(1, 2), (0, 1)], [(0, 2), (1, 2)]][rank]
    parts = [torch.nn.Parameter(placed(torch.ones(4, 3), (meshes[pair], [Shard(0)]))) for pair in pairs]
    optimizer = ADAMW.ours(parts, lr=0.1)
    for p in parts:
        p.grad = p.detach().clone()
    optimizer.step()


def test_processes_do_not_wait_for_each_other_in_a_ring() -> None:
    in_processes(3, step_in_a_ring)


def change_state_made_in_inference_mode(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    value = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).view(4, 3)
    p = torch.nn.Parameter(placed(value, (mesh, [Shard(0)])))
    optimizer = agr_cuda.Adan([p], lr=0.1, master_weights=True)
    p.grad = p.detach().clone()
    with torch.inference_mode():
        optimizer.step()
    optimizer.restart_opt()
    optimizer.reset_master_weights()
    optimizer.step()
    assert same_bits(optimizer.state[p]["master_param"].to_local().bfloat16(), p.to_local())


def test_state_of_inference_mode_can_be_changed_outside() -> None:
    in_processes(2, change_state_made_in_inference_mode)


# Gradients that are not the same everywhere.


def train_with_missing(rank: int, method: Method, agr: bool) -> None:
    """Process 0 has no gradient for the first, and in the second step none at all; missing parts count as zeros."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(4, 3, generator=generator) for _ in range(3)]
    parts = [torch.nn.Parameter(placed(x, (mesh, [Shard(0)]))) for x in values]
    ours = method.ours(parts, lr=0.1, agr=agr, max_grad_norm=1.0)
    mine = slice(2 * rank, 2 * rank + 2)
    twins = [torch.nn.Parameter(x[mine].clone()) for x in values]
    expected = method.ours(twins, lr=0.1, agr=False)
    eps = ours._clip_eps()
    for step in range(3):
        grads = [torch.randn(4, 3, generator=generator) for _ in values]
        for i, (p, g) in enumerate(zip(parts, grads, strict=True)):
            has = rank == 1 or (step != 1 and i > 0)
            p.grad = placed(g, (mesh, [Shard(0)])) if has else None
            if step == 1 or i == 0:
                g[:2] = 0
        clip = min(1.0, 1.0 / (float(sum(g.double().square().sum() for g in grads)) ** 0.5 + eps))
        for p, q, g in zip(parts, twins, grads, strict=True):
            psi = g * (1 - g.abs() / g.abs().sum()) if agr else g
            q.grad = None if p.grad is None else (clip * psi)[mine].clone()
        ours.step()
        expected.step()
    for p, q in zip(parts, twins, strict=True):
        torch.testing.assert_close(p.to_local(), q, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("agr", [True, False])
def test_nobody_waits_for_who_has_no_gradient(agr: bool, method: Method) -> None:
    in_processes(2, train_with_missing, method, agr)


def overflow_on_one(rank: int, backend: str, method: Method) -> None:
    mesh = init_device_mesh("cpu", (2,))
    value = torch.linspace(-1, 1, 12).view(4, 3)
    p = torch.nn.Parameter(placed(value, (mesh, [Shard(0)])))
    optimizer = method.ours([p], lr=0.1, backend=backend)
    for overflows in (False, True, False):
        gradient = torch.full((2, 3), float("inf") if overflows and rank == 1 else 8.0)
        p.grad = DTensor.from_local(gradient, mesh, [Shard(0)])
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.found_inf = torch.tensor(float(overflows and rank == 1))
        before = p.to_local().clone()
        optimizer.step()
        assert bool((p.to_local() == before).all()) == overflows
        assert bool(p.to_local().isfinite().all())


def test_an_overflow_anywhere_skips_the_step_everywhere(backend: str, method: Method) -> None:
    in_processes(2, overflow_on_one, backend, method)


def partial_gradients(rank: int, backend: str, method: Method) -> None:
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(6, generator=generator), torch.randn(4, 3, generator=generator)]
    placements: list[list[Any]] = [[Replicate()], [Shard(0)]]
    parts = [torch.nn.Parameter(placed(x, (mesh, where))) for x, where in zip(values, placements, strict=True)]
    wholes = [torch.nn.Parameter(x.clone()) for x in values]
    ours = method.ours(parts, lr=0.1, backend=backend)
    expected = method.ours(wholes, lr=0.1, backend="cpu")
    for step in range(3):
        for p, q in zip(parts, wholes, strict=True):
            summands = [torch.randn(q.shape, generator=generator) for _ in range(2)]
            q.grad = summands[0] + summands[1]
            p.grad = DTensor.from_local(summands[rank], mesh, [Partial()])
            if step == 1:  # A collective is under way.
                p.grad = p.grad.redistribute(mesh, [Replicate()], async_op=True)
        ours.step()
        expected.step()
    for p, q in zip(parts, wholes, strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-6, atol=1e-6)


def test_summands_of_gradients_are_added(backend: str, method: Method) -> None:
    """As sequence parallelism leaves those of norms."""
    in_processes(2, partial_gradients, backend, method)


def regularize_parts(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(6)
    layout: list[Place] = [(mesh, [Shard(0)]), (mesh, [Replicate()]), None]
    for max_norm in (None, 0.5):
        grads = [torch.randn(7, 4, generator=generator) for _ in layout]
        parts = [torch.nn.Parameter(placed(g, place)) for g, place in zip(grads, layout, strict=True)]
        wholes = [torch.nn.Parameter(g.clone()) for g in grads]
        for p in (*parts, *wholes):
            p.grad = p.detach().clone()
        norms = [agr_cuda.regularize_gradients_(ps, max_norm=max_norm) for ps in (parts, wholes)]
        for p, q in zip(parts, wholes, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-6, atol=1e-6)
        if max_norm is not None:
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


def test_gradients_in_parts_are_regularized_as_the_whole_is() -> None:
    in_processes(2, regularize_parts)


def measure_parts(rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    mesh = init_device_mesh("cpu", (2,))
    for shape in ((), (1, 7), (5, 3), (0,)):
        whole_gradient = torch.randn(shape, generator=generator)
        alone = torch.nn.Parameter(torch.zeros(shape))
        alone.grad = whole_gradient
        for placement in (Shard(0), Replicate()) if shape else (Replicate(),):
            p = torch.nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [placement]))
            p.grad = distribute_tensor(whole_gradient, mesh, [placement])
            assert agr_cuda.coefficients([p]) == agr_cuda.coefficients([alone])


def test_coefficients_of_parts_are_those_of_the_whole() -> None:
    """Also where a process has nothing of a tensor."""
    in_processes(2, measure_parts)


# What is refused.


def refuse(rank: int, method: Method) -> None:
    mesh = init_device_mesh("cpu", (2,))
    value = torch.ones(4, 3)

    def expect_error(p: Tensor, g: Tensor, message: str, differentiable: bool = False, **state: Tensor) -> None:
        p.grad = g
        optimizer = method.ours([p], differentiable=True) if differentiable else method.ours([p])
        optimizer.state[p].update(state)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert optimizer.state[p] == state

    sharded = placed(value, (mesh, [Shard(0)]))
    summands = torch.nn.Parameter(DTensor.from_local(value, mesh, [Partial()]))
    expect_error(summands, placed(value, (mesh, [Replicate()])), "must be Shard or Replicate, not Partial")
    expect_error(torch.nn.Parameter(sharded.clone()), value, "is a Tensor; it must be a DTensor, as the parameter")
    for other, message in (
        (placed(value, (mesh, [Shard(1)])), "exp_avg of group 0, parameter 0 is placed as"),
        (value, "exp_avg of group 0, parameter 0 is a Tensor; it must be a DTensor"),
        (placed(torch.ones(2, 3), (mesh, [Shard(0)])), r"exp_avg of group 0, parameter 0 has shape \(2, 3\)"),
    ):
        expect_error(torch.nn.Parameter(sharded.clone()), sharded.clone(), message, exp_avg=other)
    if method is ADAMW:
        expect_error(torch.nn.Parameter(sharded.clone()), sharded.clone(), "differentiable=True does not take", True)


def test_what_makes_no_whole_is_refused(method: Method) -> None:
    in_processes(2, refuse, method)


def train_flat(rank: int, method: Method, use_orig_params: bool, options: dict[str, Any], refused: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 4))
    flat = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    # A group without parameters has no say.
    optimizer = method.ours([{"params": flat.parameters()}, {"params": [], "agr": True}], **options)
    flat(torch.ones(2, 8)).sum().backward()
    if not refused:
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match="is a piece of a flat parameter of FullyShardedDataParallel, and"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="parameter 0 is a piece of a flat parameter"):
        agr_cuda.regularize_gradients_(flat.parameters())


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    ("options", "refused"), [({}, True), ({"agr": False, "max_grad_norm": 1.0}, True), ({"agr": False}, False)]
)
def test_flat_parameters_are_refused(options: dict, refused: bool, use_orig_params: bool, method: Method) -> None:
    """On every process, so that none waits for another."""
    in_processes(2, train_flat, method, use_orig_params, options, refused)


# Real models and checkpoints.


def language_model() -> torch.nn.Module:
    torch.manual_seed(4)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 6), torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)
    )


def loss_of(model: torch.nn.Module, step: int) -> Tensor:
    """The same on every process, so that averages over processes are those of one."""
    tokens = torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(step))
    return model(tokens).square().sum(-1).sub(1).abs().mean()


def train_checkpointed(rank: int, size: int, path: str, method: Method, first: int, last: int, max_norm: float) -> Any:
    """Load a checkpoint unless this is the beginning, train, save one, and return the parameters."""
    model = language_model()
    mesh = init_device_mesh("cpu", (size,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = method.ours(model.parameters(), lr=1e-2, max_grad_norm=max_norm)
    if first > 0:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for p in model.parameters():
        average: Any = optimizer.state[p]["exp_avg"]
        assert (average.placements, average.shape, average.stride()) == (p.placements, p.shape, p.stride())
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    return [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_a_checkpoint_goes_on_with_other_processes(max_norm: float, method: Method, tmp_path) -> None:
    """Written on 4, read on 2 and then on 1, which ends where training without sharding ends."""
    model = language_model()
    optimizer = method.ours(model.parameters(), lr=1e-2, max_grad_norm=max_norm, backend="cpu")
    for step in range(15):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for size, first in ((4, 0), (2, 5), (1, 10)):
        arguments = size, str(tmp_path / "checkpoint"), method, first, first + 5, max_norm
        ended = in_processes(size, train_checkpointed, *arguments)
    for p, q in zip(ended[0], model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)

"""Models as torch.distributed shards them train as whole ones do: FSDP2, tensor parallelism, DDP, ZeRO."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from helpers import Method, same_bits
from processes import Counted, distance, in_processes, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import agr_cuda

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore:AGR makes")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return whole(x + self.down(torch.tanh(self.up(self.norm(x)))))


class Model(nn.Module):
    """With sizes that processes do not divide, where PyTorch takes such."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x * self.scale)
        return y


def new_model() -> Model:
    torch.manual_seed(4)
    return Model()


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The same on every process."""
    tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(tokens).float().square().sum(-1).sub(1).abs().mean()
    return loss


def split_tensors(model: Model, mesh: DeviceMesh, sequence: bool) -> None:
    """Tensor parallelism; with `sequence` the norms' gradients are summands."""
    for block in model.blocks:
        plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan = {
                "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            }
        parallelize_module(block, mesh, plan)


def shard(model: Model, mesh: DeviceMesh, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def spread(model: Model, kind: str, size: int) -> None:
    """Spread a model over processes in one of many ways."""
    one = init_device_mesh("cpu", (size,))
    if kind == "tensor":
        split_tensors(model, one, sequence=False)
    elif kind == "sequence":
        split_tensors(model, one, sequence=True)
    elif kind in ("tensor in fsdp", "hsdp"):
        two = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))
        if kind == "hsdp":
            shard(model, two)
        else:
            split_tensors(model, two["b"], sequence=False)
            shard(model, two["a"])
    elif kind == "offload":
        shard(model, one, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind == "mixed precision":
        shard(model, one, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    elif kind == "keep unsharded":
        shard(model, one, reshard_after_forward=False)
    elif kind == "second dimension":
        shard(model, one, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    elif kind == "ignored and frozen":
        model.head.weight.requires_grad_(False)
        shard(model, one, ignored_params={model.scale, model.head.bias})
    else:
        shard(model, one)


def train_beside_whole(rank: int, size: int, method: Method, kind: str) -> list[Any]:
    """Train a model, and whole tensors with its gradients; return how far apart they end, and the collectives."""
    found = []
    for options in ({}, {"max_grad_norm": 0.05}, {"agr": False}):
        model = new_model()
        spread(model, kind, size)
        trained = [p for p in model.parameters() if p.requires_grad]
        twins = [nn.Parameter(whole(p.detach()).clone()) for p in trained]
        ours, expected = method.ours(model.parameters(), lr=1e-2, **options), method.ours(twins, lr=1e-2, **options)
        for step in range(10):
            ours.zero_grad()
            loss_of(model, step).backward()
            for p, q in zip(trained, twins, strict=True):
                assert p.grad is not None
                q.grad = whole(p.grad).clone()
            with Counted() as sent:
                ours.step()
            expected.step()
        assert ours.backends == ["cpu"]
        found.append((distance(trained, twins), sent))
    return found


@pytest.mark.parametrize(
    ("kind", "size", "groups"),
    [
        ("fsdp", 2, 1),
        ("second dimension", 2, 1),
        ("offload", 2, 1),
        ("mixed precision", 2, 1),
        ("keep unsharded", 2, 1),
        ("ignored and frozen", 2, 1),
        ("tensor", 2, 1),
        ("sequence", 2, 1),
        ("hsdp", 4, 1),
        ("tensor in fsdp", 4, 2),
    ],
)
def test_a_sharded_model_trains_as_whole_tensors_do(kind: str, size: int, groups: int, method: Method) -> None:
    """With one all-reduce for each of a process's groups, and none where nothing needs a sum."""
    for results in in_processes(size, train_beside_whole, size, method, kind):
        for apart, _ in results:
            assert apart < 1e-6
        assert [len(sent) for _, sent in results] == [groups, groups, 0]


# Data parallelism.


def train_data_parallel(rank: int, method: Method, view: bool) -> list[Tensor]:
    model, twin = new_model(), new_model()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=view)
    ours = method.ours(model.parameters(), lr=1e-2, max_grad_norm=0.05)
    expected = method.ours(twin.parameters(), lr=1e-2, max_grad_norm=0.05)
    for step in range(5):
        ours.zero_grad(set_to_none=step % 2 == 0)
        loss_of(parallel, 2 * step + rank).backward()
        ours.step()
        expected.zero_grad()
        ((loss_of(twin, 2 * step) + loss_of(twin, 2 * step + 1)) / 2).backward()
        expected.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("view", [False, True])
def test_data_parallelism_gives_the_same_bits_everywhere(view: bool, method: Method) -> None:
    one, other = in_processes(2, train_data_parallel, method, view)
    assert all(same_bits(p, q) for p, q in zip(one, other, strict=True))


def train_without_redundancy(rank: int, method: Method) -> None:
    model, twin = new_model(), new_model()
    parallel = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"max_grad_norm is 0\.05 in a ZeroRedundancyOptimizer, whose processes"):
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=method.ours, lr=1e-2, max_grad_norm=0.05)
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=method.ours, lr=1e-2, max_grad_norm=0.0)
    expected = method.ours(twin.parameters(), lr=1e-2, max_grad_norm=0.05)
    for step in range(5):
        zero.zero_grad()
        loss_of(parallel, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)  # as the error advises
        zero.step()
        expected.zero_grad()
        loss_of(twin, step).backward()
        expected.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_without_redundancy_agr_is_exact_and_clipping_is_refused(method: Method) -> None:
    in_processes(2, train_without_redundancy, method)


# Checkpoints of others, in every form.

#: Options of saving, and of loading.
FORMS: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "parts": ({}, {}),
    "flattened": ({"flatten_optimizer_state_dict": True},) * 2,
    "whole": ({"full_state_dict": True},) * 2,
    "whole on one": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}


def go_on(rank: int, form: str, first: Any, second: Any) -> None:
    """Train with the first optimizer; go on with it, and with the second from its state."""
    saving, loading = (StateDictOptions(**options) for options in FORMS[form])
    ends = []
    for change in (False, True):
        model = new_model()
        model.head.weight.requires_grad_(False)  # It has no state.
        shard(model, init_device_mesh("cpu", (2,)))
        optimizer = first(model.parameters())
        for step in range(6):
            optimizer.zero_grad()  # Where there are gradients, set_optimizer_state_dict() loads nothing.
            if step == 3 and change:
                saved = get_optimizer_state_dict(model, optimizer, options=saving)
                optimizer = second(model.parameters())
                set_optimizer_state_dict(model, optimizer, saved, options=loading)
            loss_of(model, step).backward()
            optimizer.step()
        ends.append([whole(p.detach()) for p in model.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def torch_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def our_adamw(parameters: Any) -> torch.optim.Optimizer:
    return agr_cuda.AdamW(parameters, lr=1e-2, agr=False, fused=True)


def our_adan(parameters: Any) -> torch.optim.Optimizer:
    return agr_cuda.Adan(parameters, lr=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("first", "second"), [(torch_adamw, our_adamw), (our_adamw, torch_adamw), (our_adan, our_adan)]
)
def test_state_goes_from_one_optimizer_to_another(form: str, first: Any, second: Any) -> None:
    in_processes(2, go_on, form, first, second)


# A process that dies.


def die(rank: int, method: Method) -> str:
    model = new_model()
    shard(model, init_device_mesh("cpu", (3,)))
    optimizer = method.ours(model.parameters(), max_grad_norm=1.0)

    def kill(*_: object) -> None:
        if step == 1 and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    optimizer.register_step_pre_hook(kill)
    for step in range(2):
        loss_of(model, step).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return "no error"


def test_a_process_that_dies_in_a_step_makes_the_others_fail(method: Method) -> None:
    """With PyTorch's own error, and at once, since its connections are closed."""
    for said in in_processes(3, die, method, killed=[2])[:2]:
        assert "gloo" in said.lower() or "connection" in said.lower(), said

"""Parameters that are spread over processes are updated as the whole ones are, with one all-reduce a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import interpreted_by_python
from helpers import Method, same_bits
from processes import in_processes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore:AGR makes")

Place = tuple[DeviceMesh, list[Any]] | None

#: Even and uneven parts, tensors of fewer elements than processes, and of one element.
SHAPES = [(8, 4), (33, 7), (3,), (1,), (), (5, 5, 2), (40, 300)]


def placed(value: Tensor, place: Place) -> Tensor:
    """Each process has the whole and keeps its part."""
    return value.clone() if place is None else distribute_tensor(value, *place, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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


class Counted:
    """Counts the all-reduces within it, and of how many numbers."""

    def __enter__(self) -> list[int]:
        self.sizes: list[int] = []
        self.real = dist.all_reduce

        def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self.real(tensor, *arguments, **options)

        dist.all_reduce = all_reduce
        return self.sizes

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.real


def train(rank: int, size: int, method: Method, kind: str, steps: int, cases: list[dict[str, Any]]) -> list[Any]:
    """With each case's options, train parts and wholes side by side; return how far apart they end, and more."""
    layout = places(kind, size)
    results = []
    for options in cases:
        generator = torch.Generator().manual_seed(5)
        values = [torch.randn(shape, generator=generator) for shape, _ in layout]
        wholes = [torch.nn.Parameter(x.clone()) for x in values]
        parts = [torch.nn.Parameter(placed(x, place)) for x, (_, place) in zip(values, layout, strict=True)]
        ours = method.ours(parts, lr=1e-2, **options)
        expected = method.ours(wholes, lr=1e-2, **options | {"backend": "cpu"})
        for _ in range(steps):
            for p, q, (shape, place) in zip(parts, wholes, layout, strict=True):
                q.grad = torch.randn(shape, generator=generator) * 3
                p.grad = placed(q.grad, place)
            with Counted() as sizes:
                ours.step()
            expected.step()
        both = [(whole(p.detach()), q.detach()) for p, q in zip(parts, wholes, strict=True)]
        apart = max(float((p - q).abs().max() / q.abs().max()) for p, q in both)
        norms = [None if o.grad_norm is None else o.grad_norm.item() for o in (ours, expected)]
        results.append((apart, sizes, norms, ours.backends, [p for p, _ in both]))
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

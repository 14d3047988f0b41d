"""Parameters that are spread over processes (DTensor): this process's parts of them, and sums over all processes.

Kernels work on this process's part of each tensor. What AGR and clipping need of the whole are sums over the parts: a
step adds up its parts of the gradients, sums these numbers (one a tensor, two with clipping) over the processes by one
all-reduce for each process group, and updates its parts. docs/distributed.md says what is exact, and what it costs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .clipping import Clipping, clip_coefficient
from .scaling import Scaling
from .tensors import Binding, GradientKind, StateTensor, is_distributed, is_wrapper

if TYPE_CHECKING:
    from .launch import Launch


def check_whole(place: str, parameter: Tensor, needs: str, otherwise: str = "") -> None:
    """Raise RuntimeError for a parameter of FSDP1 (FullyShardedDataParallel), whose parts know of no whole.

    FSDP1 joins tensors to a flat one and gives each process a piece of that, or, with use_orig_params=True, whichever
    elements of a tensor lie in its piece. It marks them by an attribute.

    Args:
        place: the parameter's name in messages.
        parameter: the parameter.
        needs: what the whole is needed for.
        otherwise: what else to do than to use FSDP2.
    """
    if hasattr(parameter, "_fsdp_flattened"):
        raise RuntimeError(
            f"{place} is a piece of a flat parameter of FullyShardedDataParallel, and {needs} needs the sums of whole "
            f"tensors: shard the model with torch.distributed.fsdp.fully_shard (FSDP2){otherwise}"
        )


def check_redundancy(max_grad_norm: float | None) -> None:
    """Raise RuntimeError for clipping in an optimizer that ZeroRedundancyOptimizer makes for a part of the parameters.

    The tensors of each process are whole, so that AGR is exact; but the norm would be that of the process's own.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if not max_grad_norm or module is None:
        return
    frame = inspect.currentframe()
    while frame is not None:
        # Only of its own methods: a frame whose locals have been looked at keeps them alive until it ends.
        caller = frame.f_locals.get("self") if frame.f_globals is vars(module) else None
        if isinstance(caller, module.ZeroRedundancyOptimizer) and caller.world_size > 1:
            raise RuntimeError(
                f"max_grad_norm is {max_grad_norm} in a ZeroRedundancyOptimizer, whose processes have the norms of "
                "their own tensors alone: call torch.nn.utils.clip_grad_norm_ before step() instead"
            )
        frame = frame.f_back


def check_norm_of_all(max_grad_norm: float, parameters: Sequence[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError where this process clips some parameters, and has no part of others.

    It would not know the norm of all, by which processes that have parts of all clip the same tensors.
    """
    absent = [place for place, parameter in parameters if not _is_member(parameter)]
    if absent and len(absent) < len(parameters):
        raise RuntimeError(
            f"max_grad_norm is {max_grad_norm}, and {absent[0]} is on a mesh without this process, which never "
            "learns its norm: give parameters of other meshes an optimizer of their own"
        )


def _is_member(parameter: Tensor) -> bool:
    """Whether this process is part of a parameter's mesh, if it has one."""
    whole: Any = parameter
    return not is_distributed(parameter) or whole.device_mesh.get_coordinate() is not None


def part_of(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, which shares its memory, when it has arrived there."""
    whole: Any = tensor
    with torch.no_grad():
        part: Any = whole.to_local()
        if hasattr(part, "wait"):  # A collective is under way.
            part = part.wait()
        # A Parameter's part would be a Parameter.
        return part.detach() if isinstance(part, torch.nn.Parameter) else part


def inner_name(tensor: Tensor) -> str:
    """Return the name of a DTensor's attribute that is its part, by PyTorch's protocol for such classes."""
    whole: Any = tensor
    names, _ = whole.__tensor_flatten__()
    found: str = next(name for name in names if isinstance(getattr(tensor, name), Tensor))
    return found


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor of which `part` is this process's part, in the shape and placements of `like`."""
    from torch.distributed.tensor import DTensor  # not in every build of PyTorch

    whole: Any = like
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def placed_like(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether a gradient's part is that of the parameter's part."""
    one: Any = gradient
    other: Any = parameter
    return bool(one.placements == other.placements and one.device_mesh == other.device_mesh)


def read_gradients(bindings: Sequence[Binding]) -> list[Tensor | None]:
    """Return the parameters' gradients in this step; of DTensors, this process's parts. None where there is none.

    A gradient of other placements than its parameter's (Partial sums, as sequence parallelism leaves them) is
    redistributed, which all processes of its mesh must do together. All are under way before the first is waited for.
    """
    with torch.no_grad():
        arriving = [_start_to_move(binding.owner.grad, binding.whole) for binding in bindings]
    return [g if g is None or b.whole is None else part_of(g) for g, b in zip(arriving, bindings, strict=True)]


def _start_to_move(gradient: Tensor | None, whole: Tensor | None) -> Tensor | None:
    if gradient is None or whole is None or placed_like(gradient, whole):
        return gradient
    moved: Any = gradient
    wanted: Any = whole
    arriving: Tensor = moved.redistribute(wanted.device_mesh, wanted.placements, async_op=True)
    return arriving


def parts_of_state(
    place: str, parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]
) -> dict[str, Any]:
    """Return a DTensor's state with the parts of its averages and master; what others keep there stays as it is.

    Raises:
        RuntimeError: for an average or master that is no DTensor, is placed otherwise than the parameter, or has
            another shape.
    """
    parts = dict(state)
    whole: Any = parameter
    for key in {key for spec in specs if spec.role != "count" for key in (spec.key, spec.other_key)}:
        value = state.get(key)
        if not isinstance(value, Tensor):
            continue
        if not is_distributed(value):
            raise RuntimeError(f"{key} of {place} is a {type(value).__name__}; it must be a DTensor, as the parameter")
        if value.shape != parameter.shape:
            raise RuntimeError(f"{key} of {place} has shape {tuple(value.shape)}; it must be {tuple(parameter.shape)}")
        if not placed_like(value, parameter):
            other: Any = value
            raise RuntimeError(
                f"{key} of {place} is placed as {other.placements} on {other.device_mesh}; it must be as the "
                f"parameter, {whole.placements} on {whole.device_mesh}"
            )
        parts[key] = part_of(value)
    return parts


def has_these_parts(parameter: Tensor, state: dict[str, Any], part: Tensor, parts: dict[str, Any]) -> bool:
    """Whether this process's parts of a DTensor and of its state are these, where they were."""
    pairs = [(parameter, part), *((state.get(key), mine) for key, mine in parts.items())]
    return all(
        mine is now
        if not isinstance(now, Tensor) or not is_distributed(now)
        else isinstance(mine, Tensor) and part_of(now).data_ptr() == mine.data_ptr()
        for now, mine in pairs
    )


def keep_parts(state: dict[str, Any], binding: Binding, keys: Iterable[str]) -> None:
    """Store new parts of a DTensor's state, those under `keys`, as DTensors; step counts stay ordinary tensors."""
    assert binding.whole is not None
    counts = {spec.key for spec in binding.specs if spec.role == "count"}
    for key in keys:
        part = binding.state[key]
        state[key] = part if key in counts else whole_of(part, binding.whole)


def check_distributed(place: str, parameter: Tensor, group: dict[str, Any]) -> None:
    """Raise RuntimeError for a DTensor parameter that cannot be updated with the options of its group.

    Processes have summands of it, its gradient is an ordinary tensor, or a derivative would end at its part.
    """
    whole: Any = parameter
    if group.get("differentiable"):
        raise RuntimeError(f"differentiable=True does not take {place}, a DTensor: a step's sums have no derivative")
    if parameter.grad is not None and not is_distributed(parameter.grad):
        raise RuntimeError(
            f"the gradient of {place} is a {type(parameter.grad).__name__}; it must be a DTensor, as the parameter"
        )
    if any(placement.is_partial() for placement in whole.placements):
        raise RuntimeError(
            f"{place} is placed as {whole.placements}; the parts of a parameter must be Shard or Replicate, not Partial"
        )


def kind_of_part(parameter: Tensor, part: Tensor, gradient: Tensor) -> GradientKind:
    """Return the kind of the gradient of a DTensor, of which `part` is this process's."""
    moved: Any = gradient
    with torch.no_grad():
        under_way = is_wrapper(moved.to_local())  # of a collective
    if under_way or not placed_like(gradient, parameter):
        return GradientKind(type(gradient), gradient.dtype, plain=True, same_layout=False, moved=True)
    return GradientKind.of(part, part_of(gradient))._replace(class_=type(gradient))


def _spreading_groups(parameter: Tensor) -> list[tuple[int, Any]]:
    """Return the process groups over which a parameter is spread, with the dimensions of its mesh, in their order."""
    if not is_distributed(parameter) or not _is_member(parameter):
        return []
    whole: Any = parameter
    mesh = whole.device_mesh
    spread = [dim for dim, placement in enumerate(whole.placements) if not placement.is_replicate()]
    return [(dim, mesh.get_group(dim)) for dim in spread if mesh.size(dim) > 1]


def _in_order(spread: Sequence[Sequence[tuple[int, Any]]]) -> dict[tuple[int, tuple[int, ...]], tuple[Any, list[int]]]:
    """Return the process groups in the order in which they sum, each with the parameters that it sums.

    `spread` has the groups of each parameter. A parameter's groups sum in the order of its mesh's dimensions, so that
    a sum goes through all processes of the mesh once: the order must be the same for all of them, though some know
    of parameters that others do not have. So first come all groups of first dimensions, then those of second ones. A
    group's dimension depends on the parameters that it sums alone, which all its processes know. Groups of the same
    dimension are in the order of their processes' numbers, so that there is one order of all groups, and no processes
    wait for each other in a ring. Only a group that is in different dimensions of several meshes sums more than once.

    The keys have the processes' numbers: two meshes may have the same processes in different groups.
    """
    dims: dict[tuple[int, ...], int] = {}
    named = [[(dim, group, tuple(_ranks(group))) for dim, group in groups] for groups in spread]
    for groups in named:
        for dim, _, ranks in groups if len(groups) > 1 else ():
            dims[ranks] = min(dim, dims.get(ranks, dim))
    found: dict[tuple[int, tuple[int, ...]], tuple[Any, list[int]]] = {}
    for index, groups in enumerate(named):
        for dim, group, ranks in groups:
            # Where it is the only one, any dimension will do.
            when = dim if len(groups) > 1 else dims.get(ranks, 0)
            found.setdefault((when, ranks), (group, []))[1].append(index)
    return dict(sorted(found.items(), key=lambda item: item[0]))


def _device_of_mesh(parameter: Tensor) -> torch.device:
    """Return the device whose process groups sum a DTensor's numbers: with CPU offload, not that of its part."""
    whole: Any = parameter
    mine, of_mesh = parameter.device, torch.device(whole.device_mesh.device_type)
    return mine if mine.type == of_mesh.type else of_mesh


def _ranks(group: Any) -> list[int]:
    from torch.distributed import get_process_group_ranks

    return get_process_group_ranks(group)


class Exchange:
    """The sums of a step over all processes.

    Who sends what depends on the layout of all parameters, which all processes of a group know, and not on who has
    which gradients now: a process without a gradient adds 0, and nobody waits for it. The numbers are at fixed places
    of one vector: the abs-sum of each parameter, the sum of squares of each, and the overflow flag of mixed precision,
    which so becomes the same everywhere. Each process group gets the places of the parameters that are spread over it.
    Where one is spread over several groups (a mesh of two dimensions), they follow each other: the second adds up what
    the first has added up.
    """

    def __init__(self, parameters: Sequence[Tensor], regularized: Sequence[bool], clip: bool) -> None:
        """Plan the sums.

        Args:
            parameters: all parameters of the optimizer, with and without gradients.
            regularized: whether AGR applies to each.
            clip: whether the step clips by the global norm.
        """
        count = len(parameters)
        spread = [_spreading_groups(parameter) for parameter in parameters]
        self._clip = clip
        self._count = count
        devices = (_device_of_mesh(p) for p, groups in zip(parameters, spread, strict=True) if groups)
        #: The device on which the numbers are summed.
        self.device = next(devices, torch.device("cpu"))
        #: The places of each process group's numbers, in an order that all processes share.
        self._places = []
        for group, indices in _in_order(spread).values():
            places = [i for i in indices if regularized[i]] + [count + i for i in indices if clip]
            if places:
                places.append(2 * count)
                self._places.append((group, torch.tensor(places, dtype=torch.int64, device=self.device)))
        self._launches: list[tuple[Launch, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    def attach(self, launches: Sequence[Launch]) -> None:
        """Take the launches of the step whose sums these are."""
        self._launches = [
            (launch, torch.tensor([b.index for b in launch.bindings], dtype=torch.int64, device=self.device))
            for launch in launches
        ]

    @torch.no_grad()
    def run(self, scaling: Scaling, max_grad_norm: float, eps: float) -> Clipping:
        """Reduce all gradients, sum over the processes, give the launches their abs-sums, and return how to clip."""
        numbers = torch.zeros(2 * self._count + 1, dtype=torch.float64, device=self.device)
        sums, flag = numbers[:-1].view(2, -1), numbers[-1]
        for launch, index in self._launches:
            sums.index_copy_(1, index, launch.sums().to(self.device))
        if scaling.found_inf is not None:
            flag.copy_(scaling.found_inf.reshape(()))
        self._sum_over_processes(numbers)
        for launch, index in self._launches:
            launch.set_abs_sums(sums[0].index_select(0, index))
        if scaling.found_inf is not None:
            scaling.found_inf = (flag != 0).float()
        if not self._clip:
            return Clipping(reduced=True)
        squares = sums[1].sum()
        if scaling.grad_scale is not None:
            scale = scaling.grad_scale
            squares = squares / (scale.to(squares) if isinstance(scale, Tensor) else scale) ** 2
        norm = squares.sqrt()
        return Clipping(max_grad_norm, eps, clip_coefficient(norm, max_grad_norm, eps), norm, reduced=True)

    def _sum_over_processes(self, numbers: Tensor) -> None:
        import torch.distributed as dist

        for group, places in self._places:
            mine = numbers.index_select(0, places)
            dist.all_reduce(mine, group=group)
            numbers.index_copy_(0, places, mine)

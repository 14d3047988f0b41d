"""Describe the tensors of a step: a parameter, its gradient, and the optimizer state of its update rule.

Every other module relies on this description: checks, plans, the rows of the native executors, Triton's tables, the
reference backend and state dicts. State of a new type or shape is added here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .precision import Precision
from .quantization import scale_count

#: What the keys of an average's scales and codes end with. Codes are not at the key of the numbers, from which other
#: optimizers, and torch.distributed.checkpoint, would take them for averages of up to 255.
_SCALES = "_scale"
_CODES = "_codes"


@dataclass(frozen=True)
class StateTensor:
    """The declaration of one optimizer-state tensor that an update rule keeps for every parameter."""

    #: The key in the parameter's state dictionary.
    key: str
    #: An average has the parameter's shape and memory layout. If it is stored as codes of 8 bits, it has scales, one
    #: for each block of its memory. A master is the parameter in float32. A count is a scalar, the number of steps.
    role: Literal["average", "scales", "master", "count"] = "average"
    #: The value of every element before the parameter's first step.
    initial: float = 0.0
    #: The dtype; None, in an update rule's own declaration of an average, stands for what the group's options say.
    dtype: torch.dtype | None = None
    #: Whether a checkpoint that has the other state tensors of a parameter may omit this one.
    optional: bool = False
    #: Whether an average may be negative. Those that may not have codes of their own.
    signed: bool = True

    @property
    def other_key(self) -> str:
        """The key of an average where it is stored the other way: as codes instead of numbers, or as numbers."""
        if self.role != "average":
            return self.key
        return self.key.removesuffix(_CODES) if self.key.endswith(_CODES) else self.key + _CODES

    @property
    def scales_key(self) -> str:
        """The key of an average's scales, where it is stored as codes."""
        return self.key.removesuffix(_CODES) + _SCALES

    @property
    def codes_key(self) -> str:
        """The key of the codes that these scales belong to, or of the codes of an average."""
        return self.key.removesuffix(_CODES).removesuffix(_SCALES) + _CODES

    def shape_for(self, parameter: Tensor) -> torch.Size:
        """Return the shape of this tensor for `parameter`."""
        if self.role == "scales":
            return torch.Size([scale_count(parameter.numel())])
        return torch.Size([]) if self.role == "count" else parameter.shape

    def create(self, parameter: Tensor, device: torch.device) -> Tensor:
        """Return a new tensor with the values from before the first step of `parameter`."""
        if self.role in ("count", "scales"):
            return torch.full(self.shape_for(parameter), self.initial, dtype=self.dtype, device=device)
        made = torch.empty_like(parameter, dtype=self.dtype, memory_format=torch.preserve_format)
        return made.copy_(parameter) if self.role == "master" else self.fill_initial(made)

    def fill_initial(self, tensor: Tensor) -> Tensor:
        """Reset `tensor` in place to its value before the first step, and return it."""
        return tensor.fill_(complex(self.initial, self.initial) if tensor.is_complex() else self.initial)


#: The float32 copy of a 16-bit parameter. A checkpoint without it loads; the copy is then made from the parameter.
MASTER = StateTensor("master_param", role="master", dtype=torch.float32, optional=True)


def stored_state(declared: Sequence[StateTensor], precision: Precision) -> tuple[StateTensor, ...]:
    """Return the state tensors of one parameter, given those that its update rule declares."""
    averages = [replace(spec, dtype=precision.state) for spec in declared if spec.role == "average"]
    scales = []
    if precision.quantized:
        # Each code of 0 stands for the initial value, if that is in its scale.
        scales = [
            replace(spec, key=spec.scales_key, role="scales", dtype=torch.float32, optional=True) for spec in averages
        ]
        averages = [replace(spec, key=spec.codes_key, initial=0.0) for spec in averages]
    masters = [MASTER] if precision.master else []
    return (*averages, *scales, *masters, *(spec for spec in declared if spec.role == "count"))


class GradientKind(NamedTuple):
    """The properties that a plan requires of a parameter's gradient, which may be another tensor in every step."""

    class_: type
    dtype: torch.dtype
    #: Whether it is a tensor in a device's memory, from which it can be copied.
    plain: bool
    #: Whether its elements are in that memory with their own values, in the same order as the parameter's.
    same_layout: bool
    #: Of a DTensor's gradient, whether it is placed otherwise than the parameter, so that its part is somewhere else.
    moved: bool = False

    @classmethod
    def of(cls, parameter: Tensor, gradient: Tensor) -> GradientKind:
        """Return the kind of an existing gradient."""
        plain = not is_wrapper(gradient) and not gradient._is_zerotensor()
        same = plain and not gradient.is_neg() and same_layout(parameter, gradient)
        return cls(type(gradient), gradient.dtype, plain, same)


@dataclass(eq=False)
class Binding:
    """One parameter of an optimizer, with everything that a step reads and writes for it."""

    index: int  # the parameter's index, counted over all groups
    group: int  # the index of its parameter group
    place: str  # the parameter's name in messages, such as "group 0, parameter 3 ('lm_head.weight')"
    parameter: Tensor
    gradient: GradientKind
    state: dict[str, Any]
    specs: tuple[StateTensor, ...]  # in the order in which the update rule takes them
    precision: Precision
    backend: str
    #: Its index in the program's optimizer, of which this one may be a part. It chooses the random numbers, and the
    #: place of its sum of squares among those of all.
    sequence: int
    regularize: bool  # whether AGR applies
    amsgrad: bool
    #: A staging buffer in the parameter's memory layout. A gradient of another layout is copied into it in each step.
    staged: Tensor | None = None
    #: The DTensor, if the program's parameter is one: `parameter` and `state` then are this process's parts of it.
    whole: Tensor | None = None
    #: Whether state of another type than `specs` say is converted. State that a program has given a group whose options
    #: have never said of what type it is, is used as it is.
    converts: bool = False

    @property
    def owner(self) -> Tensor:
        """The program's parameter, whose gradient is read, and whose state is the optimizer's."""
        return self.parameter if self.whole is None else self.whole

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The averages, or their codes, in the order in which the update rule takes them."""
        return self._of_role("average")

    @property
    def average_specs(self) -> tuple[StateTensor, ...]:
        """The declarations of the averages, in the same order."""
        return tuple(spec for spec in self.specs if spec.role == "average")

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """The scales of averages that are stored as codes, in the same order; empty for others."""
        return self._of_role("scales")

    @property
    def master(self) -> Tensor | None:
        """The float32 copy of the parameter, if it has one."""
        return next(iter(self._of_role("master")), None)

    @property
    def count(self) -> Tensor | None:
        """The parameter's own step count; None if its group holds the count, as for Adan."""
        return next(iter(self._of_role("count")), None)

    @property
    def state_tensors(self) -> tuple[Tensor, ...]:
        """All tensors that a step writes besides the parameter."""
        return tuple(self.state[spec.key] for spec in self.specs)

    def _of_role(self, role: str) -> tuple[Tensor, ...]:
        return tuple(self.state[spec.key] for spec in self.specs if spec.role == role)

    @property
    def types(self) -> tuple[str, str, str, bool, bool]:
        """What kernels are chosen by: the dtypes of parameter, gradient and averages, master, stochastic rounding."""
        return kernel_types(self.parameter.dtype, self.gradient.dtype, self.precision)

    @property
    def plain(self) -> bool:
        """Whether the parameter is an ordinary tensor in a device's memory; see `is_plain`."""
        return is_plain(self.parameter)


def kernel_types(
    parameter: torch.dtype, gradient: torch.dtype, precision: Precision
) -> tuple[str, str, str, bool, bool]:
    """Return what a kernel is chosen by, as the native core takes it."""
    return str(parameter), str(gradient), str(precision.state), precision.master, precision.stochastic


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Turn off inference mode and gradient recording for the tensors made within.

    Later steps change these tensors in place, and those steps may run in another mode than this one.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def plan_entries(bindings: Sequence[Binding]) -> list[tuple[int, int, bool]]:
    """Return what a native Plan needs for each tensor: elements, bytes per gradient element, whether AGR applies."""
    return [(b.parameter.numel(), b.gradient.dtype.itemsize, b.regularize) for b in bindings]


def executor_rows(rule: str, bindings: Sequence[Binding]) -> list[tuple[Any, ...]]:
    """Return the native executors' row for each tensor.

    It is: rule, group, sequence, types, parameter, averages, scales of averages, master, step count.
    """
    return [
        (
            f"{rule}_amsgrad" if b.amsgrad else rule,
            b.group,
            b.sequence,
            b.types,
            b.parameter,
            b.averages,
            b.scales,
            b.master,
            b.count,
        )
        for b in bindings
    ]


def is_wrapper(tensor: Tensor) -> bool:
    """Whether `tensor` is a wrapper subclass such as DTensor, which has a `__torch_dispatch__` of its own."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_distributed(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    return is_wrapper(tensor) and hasattr(tensor, "device_mesh")


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is an ordinary tensor, whose elements are in a device's memory with their own values."""
    if is_wrapper(tensor):
        return False
    # A zero tensor (torch._efficientzerotensor) has no memory, and the memory of a negative view holds -x.
    return not tensor._is_zerotensor() and not tensor.is_neg()


def has_memory(tensor: Tensor) -> bool:
    """Whether the memory of `tensor` is there, and was not taken away to make room."""
    return is_wrapper(tensor) or tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of `tensor` fill one contiguous range of memory without gaps or overlaps, in any order."""
    if tensor.layout != torch.strided:
        return False
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def state_like(parameter: Tensor) -> Tensor:
    """Return a tensor whose memory layout is that of new state: the parameter's, without any gaps."""
    if is_wrapper(parameter) or is_dense(parameter):
        return parameter
    return torch.empty_like(parameter, device="meta", memory_format=torch.preserve_format)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether `a` and `b`, which have the same shape, store their elements in the same order in memory."""
    if a.layout != b.layout:
        return False
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.numel() == 0 or all(mine == theirs for n, mine, theirs in sizes if n > 1)

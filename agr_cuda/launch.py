"""What launches have in common: the part of a step that one backend makes, and on GPUs streams and captured graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .native import native
from .options import number
from .scaling import Scaling
from .tensors import Binding

if TYPE_CHECKING:
    from .clipping import Clipping

#: Of one group, in the order of its rule; some perhaps tensors.
Numbers = tuple[Any, ...]


class Launch(ABC):
    """One step of all parameters that one backend updates together. A parameter without a gradient stays as it is."""

    backend: str
    #: Where the launch, if it has all gradients, puts the sum of the squares of their elements, unscaled; None if it
    #: does not take the norm for clipping by itself.
    squares: Tensor | None = None
    #: Where its gradients are; None for a backend that finds them itself.
    gradients: Any = None

    def __init__(self, bindings: Sequence[Binding]) -> None:
        self.bindings = bindings

    @abstractmethod
    def prepare(self, groups: Sequence[dict[str, Any]], numbers: Sequence[Numbers], scaling: Scaling) -> None:
        """Take what this step needs of its numbers. Whatever may fail of that comes before any update.

        Args:
            groups: the optimizer's.
            numbers: of each group.
            scaling: of mixed precision.
        """

    @abstractmethod
    def square_sum(self) -> float | Tensor:
        """Return the sum of the squares of all gradients' elements, unscaled; leaves sums for `update`."""

    @abstractmethod
    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Make the step, or after `square_sum` the rest of it; then count it in the groups `counted`."""


def on_device(value: Any, device: torch.device, kernel_reads: Sequence[torch.dtype]) -> Any:
    """Return a group's number for a launch: a number, or a tensor that is on `device` anyway or read there."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu" and device.type != "cpu":
        return number(value)
    dtype = value.dtype if value.dtype in kernel_reads else torch.float32
    if value.device == device and value.dtype == dtype:
        return value
    return value.detach().to(device=device, dtype=dtype, non_blocking=True)


_NOTHING = nullcontext()


class DeviceLaunch(Launch):
    """One step of all parameters on one GPU, of one combination of types; the base of the backends' own.

    Where its device is the CPU, kernels run on the host, in a test or a rehearsal, and there are no streams.
    """

    #: The types of a tensor that stands for a group's number which kernels read as it is.
    kernel_reads: tuple[torch.dtype, ...]

    def __init__(self, bindings: Sequence[Binding], counts: bool) -> None:
        super().__init__(bindings)
        self.device = bindings[0].parameter.device
        #: The indices of the groups whose parameters these are.
        self.groups = sorted({b.group for b in bindings})
        #: Whether it raises the step counts that groups have on its device: the last one there does.
        self.counts = counts
        self.gradients = native().GradientTable()
        #: Whether a launch was captured into a graph, which needs the tables from then on.
        self.captured = False
        #: Whether one was captured and the optimizer has not yet kept what its graph needs.
        self.newly_captured = False
        self.numbers: list[Numbers] = []
        self.scaling = Scaling(None, None)
        self._index = self.device.index or 0
        self._module: Any = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        self._asks_capturing: Any = getattr(self._module, "is_current_stream_capturing", None)
        self._stream = self._current_stream()
        self._stream_object = None if self._module is None else self._module.current_stream(self.device)

    def prepare(self, groups: Sequence[dict[str, Any]], numbers: Sequence[Numbers], scaling: Scaling) -> None:
        """Take numbers, and tensors that stand for them where the kernels read them; see Launch.prepare."""
        self.scaling = scaling
        self.numbers = [
            tuple([x if type(x) is float else on_device(x, self.device, self.kernel_reads) for x in of_group])
            for of_group in numbers
        ]

    @abstractmethod
    def tables(self) -> Iterator[Tensor]:
        """Yield what launches read and write of the backend's own."""

    # Streams and graphs.

    def _current_stream(self) -> int:
        """Return a number that tells PyTorch's current stream on this device from others."""
        if self._module is None:
            return 0
        stream = self._module.current_stream(self.device)
        return int(stream.cuda_stream if self.device.type == "cuda" else stream.stream_id)

    def _current_device(self) -> AbstractContextManager[Any]:
        """Make this launch's device the current one, in PyTorch's way, which makes no context on the one before."""
        if self._module is None or self._module.current_device() == self._index:
            return _NOTHING
        context: AbstractContextManager[Any] = self._module.device(self._index)
        return context

    def capturing(self) -> bool:
        """Whether work on this device's current stream is being captured in a graph."""
        if self._asks_capturing is None:
            return False
        with self._current_device():
            return bool(self._asks_capturing())

    def _follow_stream(self) -> int:
        """Return the current stream, which has waited for the step before if that was on another."""
        stream = self._current_stream()
        if stream != self._stream:
            current = self._module.current_stream(self.device)
            if not self.capturing():  # nor could a capture wait for what is outside of it
                current.wait_stream(self._stream_object)
            # Let the allocator know that these are in use on both.
            for used in (*self.tables(), *(b.staged for b in self.bindings if b.staged is not None)):
                used.record_stream(current)
            self._stream, self._stream_object = stream, current
        return stream

    def kept_for_graphs(self) -> Iterator[Tensor]:
        """Yield what a captured launch reads and writes, besides parameters, gradients and what options are."""
        yield from self.tables()
        for b in self.bindings:
            yield from b.averages
            if b.count is not None:
                yield b.count
            if b.staged is not None:
                yield b.staged

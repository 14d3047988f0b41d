"""The base classes of launches. A launch is the part of a step that one backend performs."""

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

#: The hyperparameters of one group (lr, betas, eps, ...) in the order in which the native core takes them: Python
#: numbers, or tensors of one element.
Hyperparameters = tuple[Any, ...]


class Launch(ABC):
    """The update of all parameters that one backend updates together. Parameters without a gradient stay unchanged."""

    #: A tensor in which a launch that computes the norm for clipping itself leaves the sum of the squares of all
    #: unscaled gradients; it can do so only if it has all gradients. None for a launch that does not.
    squares: Tensor | None = None
    #: The native table of the gradients' addresses; None for the reference backend, which reads `p.grad`.
    gradients: Any = None

    def __init__(self, bindings: Sequence[Binding]) -> None:
        self.bindings = bindings

    @abstractmethod
    def prepare(
        self, groups: Sequence[dict[str, Any]], hyperparameters: Sequence[Hyperparameters], scaling: Scaling
    ) -> None:
        """Take this step's options. Errors are raised here, before any launch has updated anything.

        Args:
            groups: the optimizer's parameter groups.
            hyperparameters: the hyperparameters of each group.
            scaling: the values that torch.amp.GradScaler has set.
        """

    @abstractmethod
    def square_sum(self) -> float | Tensor:
        """Return the sum of the squares of all unscaled gradients, and keep the abs-sums for `update`."""

    def sums(self) -> Tensor:
        """Return the abs-sum and the sum of squares of each gradient, as it is: of shape (2, bindings), in float64.

        Only for launches of a plan with an exchange; see agr_cuda/sharding.py. `set_abs_sums` follows.
        """
        raise NotImplementedError

    def set_abs_sums(self, abs_sums: Tensor) -> None:
        """Take the abs-sums of the tensors of which the gradients are parts, for `update`."""
        raise NotImplementedError

    @abstractmethod
    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Update the parameters, reusing what `square_sum` or `sums` has reduced if it was called.

        Args:
            clipping: how to clip.
            counted: the groups whose "step" is then incremented on the host; empty in all launches but the last.
        """


def move_hyperparameter(value: Any, device: torch.device, readable_dtypes: Sequence[torch.dtype]) -> Any:
    """Return a hyperparameter as kernels on `device` take it.

    Args:
        value: a number, or a tensor of one element. A tensor on the CPU becomes a number for another device.
        device: the device of the launch.
        readable_dtypes: the dtypes that kernels can read; a tensor of another dtype becomes a float32 tensor.
    """
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu" and device.type != "cpu":
        return number(value)
    dtype = value.dtype if value.dtype in readable_dtypes else torch.float32
    if value.device == device and value.dtype == dtype:
        return value
    return value.detach().to(device=device, dtype=dtype, non_blocking=True)


def move_coefficient(clipping: Clipping, device: torch.device) -> Tensor | None:
    """Return the factor of all gradients as kernels on `device` take it; None if gradients are only exchanged."""
    coefficient = clipping.coefficient
    return coefficient.to(device, torch.float64) if isinstance(coefficient, Tensor) else None


def capturing_on(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured into a graph."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if not hasattr(module, "is_current_stream_capturing"):
        return False
    with module.device(device):
        return bool(module.is_current_stream_capturing())


_NULL_CONTEXT = nullcontext()


class DeviceLaunch(Launch):
    """The update of all parameters on one GPU with one combination of dtypes: the base of CudaLaunch and TritonLaunch.

    In a rehearsal or a test the device is the CPU: kernels, if any, run on the host, and there are no streams.
    """

    #: The dtypes of hyperparameters in tensors that kernels can read.
    readable_dtypes: tuple[torch.dtype, ...]

    def __init__(self, bindings: Sequence[Binding], counts: bool) -> None:
        super().__init__(bindings)
        self.device = bindings[0].parameter.device
        #: The indices of the groups that have parameters in this launch.
        self.groups = sorted({b.group for b in bindings})
        #: Whether this launch increments the groups' step counts on its device: only the last launch there does.
        self.counts = counts
        self.gradients = native().GradientTable()
        #: Whether a launch was ever captured into a graph, which uses the buffers for as long as the graph lives.
        self.captured = False
        #: Whether a launch was captured since the optimizer last stored its `graph_tensors`.
        self.newly_captured = False
        self.hyperparameters: list[Hyperparameters] = []
        self.scaling = Scaling(None, None)
        self._device_index = self.device.index or 0
        self._module: Any = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        self._is_capturing: Any = getattr(self._module, "is_current_stream_capturing", None)
        self._stream = self._current_stream()
        self._stream_object = None if self._module is None else self._module.current_stream(self.device)

    def prepare(
        self, groups: Sequence[dict[str, Any]], hyperparameters: Sequence[Hyperparameters], scaling: Scaling
    ) -> None:
        """Move hyperparameters in tensors to the device; see Launch.prepare."""
        self.scaling = scaling
        device, dtypes = self.device, self.readable_dtypes
        self.hyperparameters = [
            tuple([x if type(x) is float else move_hyperparameter(x, device, dtypes) for x in values])
            for values in hyperparameters
        ]

    @abstractmethod
    def buffers(self) -> Iterator[Tensor]:
        """Yield the backend's own device tensors that its kernels read or write."""

    # Streams and graphs.

    def _current_stream(self) -> int:
        """Return a number that identifies PyTorch's current stream on this device."""
        if self._module is None:
            return 0
        stream = self._module.current_stream(self.device)
        return int(stream.cuda_stream if self.device.type == "cuda" else stream.stream_id)

    def _current_device(self) -> AbstractContextManager[Any]:
        """Return a context manager that makes this launch's device the current one.

        It uses PyTorch's own, which does not create a context on the device that was current before.
        """
        if self._module is None or self._module.current_device() == self._device_index:
            return _NULL_CONTEXT
        context: AbstractContextManager[Any] = self._module.device(self._device_index)
        return context

    def capturing(self) -> bool:
        """Whether this device's current stream is being captured into a graph."""
        if self._is_capturing is None:
            return False
        with self._current_device():
            return bool(self._is_capturing())

    def _switch_stream(self) -> int:
        """Return the current stream, after making it wait for the previous step if that ran on another stream."""
        stream = self._current_stream()
        if stream != self._stream:
            current = self._module.current_stream(self.device)
            if not self.capturing():  # A captured stream cannot wait for work outside of the capture.
                current.wait_stream(self._stream_object)
            # Tell the caching allocator that these tensors are in use on both streams.
            for used in (*self.buffers(), *(b.staged for b in self.bindings if b.staged is not None)):
                used.record_stream(current)
            self._stream, self._stream_object = stream, current
        return stream

    def graph_tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that a captured launch reads or writes, except parameters, gradients and options."""
        yield from self.buffers()
        for b in self.bindings:
            yield from b.state_tensors
            if b.staged is not None:
                yield b.staged

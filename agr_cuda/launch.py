"""What launches on GPUs have in common: what mixed precision tells them, streams, and what captured graphs need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .binding import Binding
from .native import native
from .options import number


@dataclass
class Scaling:
    """What gradients are divided by, and whether to make no step at all: set by torch.amp.GradScaler."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def asked_of(cls, optimizer: torch.optim.Optimizer) -> Scaling:
        """Return what the scaler has set on the optimizer, perhaps nothing."""
        return cls(_tensor(getattr(optimizer, "grad_scale", None)), _tensor(getattr(optimizer, "found_inf", None)))

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return both as float32 tensors of one element on `device`, without waiting for them."""
        return _single(self.grad_scale, device), _single(self.found_inf, device)


def _tensor(value: Any) -> Tensor | None:
    """Return an attribute that a scaler has set: a tensor, or a plain number where no gradient was looked at."""
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _single(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None or (value.device == device and value.dtype == torch.float32):
        return value
    return value.to(device=device, dtype=torch.float32, non_blocking=True)


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


def _public_raw_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# What PyTorch's own compiler calls, in a tenth of the time.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)

_NOTHING = nullcontext()


class DeviceLaunch(ABC):
    """One step of all parameters on one GPU, of one combination of types; the base of the backends' own.

    Where its device is the CPU, kernels run on the host, in a test or a rehearsal, and there are no streams.
    """

    backend: str
    #: Whether a launch that has all the gradients takes their norm itself.
    takes_norm: bool
    #: Where such a launch puts the sum of the squares of all gradients' elements, unscaled; None if it never clips.
    squares: Tensor | None = None
    #: The types of a tensor that stands for a group's number which kernels read as it is.
    kernel_reads: tuple[torch.dtype, ...]

    def __init__(self, bindings: Sequence[Binding], counts: bool) -> None:
        self.bindings = bindings
        self.device = bindings[0].parameter.device
        #: The indices of the groups whose parameters these are.
        self.groups = sorted({b.group for b in bindings})
        #: Whether it raises the step counts that groups have on its device: the last one there does.
        self.counts = counts
        self.gradients = native().GradientTable()
        #: Whether the device knows better than the host which states a step has been made with.
        self.unsettled = False
        #: Whether a launch was captured into a graph, which needs the tables from then on.
        self.captured = False
        #: Whether one was captured since the optimizer last kept what graphs need.
        self.unkept = False
        self._index = self.device.index or 0
        self._module: Any = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        self._stream = self._current_stream()
        self._stream_object = None if self._module is None else self._module.current_stream(self.device)

    # What a backend says of itself.

    @abstractmethod
    def reduce(self, numbers: Sequence[tuple[Any, ...]], scaling: Scaling) -> Tensor:
        """Return the sum of the squares of all gradients' elements, unscaled, and leave the abs-sums for `update`."""

    @abstractmethod
    def update(
        self,
        numbers: Sequence[tuple[Any, ...]],
        max_grad_norm: float,
        clip_eps: float,
        clip: Tensor | None,
        scaling: Scaling,
        counted: Sequence[dict[str, Any]],
        fresh: set[int],
        stepped: Sequence[int],
    ) -> None:
        """Make the step, or after `reduce` the rest of it.

        Args:
            numbers: of each group. Where a number is a tensor, it is on this device, and read there.
            max_grad_norm: clip by the norm of this launch's gradients alone, if it `takes_norm`; 0 does not.
            clip_eps: what is added to the norm.
            clip: float64, what every gradient is multiplied by; after `reduce`.
            scaling: of mixed precision.
            counted: groups whose step the host counts, after the launch.
            fresh: out of which `stepped` is taken, after the launch.
            stepped: see there.
        """

    @abstractmethod
    def begun(self) -> list[bool]:
        """Return of every binding whether a step has been made with its state. Waits for the device."""

    @abstractmethod
    def tables(self) -> Iterator[Tensor]:
        """Yield what launches read and write of the backend's own."""

    # Streams and graphs.

    def _current_stream(self) -> int:
        """Return a number that tells PyTorch's current stream on this device from others."""
        if self.device.type == "cuda":
            return int(_raw_stream(self._index))
        return 0 if self._module is None else int(self._module.current_stream(self.device).stream_id)

    def _current_device(self) -> AbstractContextManager[Any]:
        """Make this launch's device the current one, in PyTorch's way, which makes no context on the one before."""
        if self._module is None or self._module.current_device() == self._index:
            return _NOTHING
        context: AbstractContextManager[Any] = self._module.device(self._index)
        return context

    def capturing(self) -> bool:
        """Whether work on this device's current stream is being captured in a graph."""
        asked = getattr(self._module, "is_current_stream_capturing", None)
        if asked is None:
            return False
        with self._current_device():
            return bool(asked())

    def _follow_stream(self) -> int:
        """Return the current stream, which has waited for the step before if that was on another."""
        stream = self._current_stream()
        if stream != self._stream:
            current = self._module.current_stream(self.device)
            if not self.capturing():  # nor could a capture wait for what is outside of it
                current.wait_stream(self._stream_object)
            # Let the allocator know that these are in use on both.
            for used in (*self.tables(), *(b.relaid for b in self.bindings if b.relaid is not None)):
                used.record_stream(current)
            self._stream, self._stream_object = stream, current
        return stream

    def kept_for_graphs(self) -> Iterator[Tensor]:
        """Yield what a captured launch reads and writes, besides parameters, gradients and what options are."""
        yield from self.tables()
        for b in self.bindings:
            yield from (b.state[key] for key in b.keys)
            if isinstance(b.state.get("step"), Tensor):
                yield b.state["step"]
            if b.relaid is not None:
                yield b.relaid

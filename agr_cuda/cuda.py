"""The CUDA backend: hands a plan's tensors to the native executor, which launches one kernel a step."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .binding import Binding, planned, rows
from .native import native
from .options import number

#: What is launched instead of kernels, on tensors on the CPU; see `rehearsal`.
_stand_in: Any = None


@contextmanager
def rehearsal(launcher: Any = "nothing") -> Iterator[None]:
    """Let backend="cuda" take parameters on the CPU, and launch nothing; for measuring what a step costs the host.

    `launcher` may be a capsule with another launcher: tests run the kernels' source on threads of the host.
    """
    global _stand_in
    before = _stand_in
    native().use_launcher(launcher)
    _stand_in = launcher
    try:
        yield
    finally:
        native().use_launcher(before)
        _stand_in = before


def rehearsing() -> bool:
    """Whether launches are rehearsed on the CPU instead of made."""
    return _stand_in is not None


def device_type() -> str:
    """Return the type of the devices on which the backend's parameters are."""
    return "cpu" if rehearsing() else "cuda"


def why_missing() -> str | None:
    """Return why no kernel can be launched here and how to mend that, or None. The native core is there."""
    return None if rehearsing() else _why_missing()


@functools.cache
def _why_missing() -> str | None:
    if native().left_out:
        return str(native().left_out)
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        return "PyTorch finds no NVIDIA GPU" if built else "this PyTorch is built without CUDA"
    reasons = [why_not_on(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else str(reasons[0])


@functools.cache
def why_not_on(index: int) -> str | None:
    """Return why no kernel that was built runs on this GPU, or None."""
    architectures = [int(name) for name in native().cuda_architectures.split()]
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    # Machine code runs on later minor versions of its major one, and the PTX of the newest on everything later.
    if any(a // 10 == major and a <= capability for a in architectures) or capability >= max(architectures):
        return None
    built = ", ".join(map(str, architectures))
    return (
        f"cuda:{index} has compute capability {major}.{minor}, and kernels were built for {built}: "
        f"install again with AGR_CUDA_ARCHS={capability}" + ("" if capability >= 80 else ", if it were 80 or more")
    )


def current_stream(index: int) -> int:
    """Return the address of PyTorch's current stream on a GPU; 0, the default stream, in a rehearsal."""
    return 0 if rehearsing() else _raw_stream(index)


def _public_raw_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# What PyTorch's own compiler calls, in a tenth of the time.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)


_NOTHING = nullcontext()


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
    return value if value is None or isinstance(value, Tensor) else torch.tensor(float(value))


def _single(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None or (value.device == device and value.dtype == torch.float32):
        return value
    return value.to(device=device, dtype=torch.float32, non_blocking=True)


def _limit(name: str, default: int) -> int:
    """Return a limit of the schedule, or what the environment sets in its place, for tuning."""
    asked = os.environ.get(f"AGR_CUDA_{name}")
    if not asked:
        return default
    if not asked.isdigit():
        raise ValueError(f"AGR_CUDA_{name} is {asked!r}; it must be an integer of at least 0")
    return int(asked)


class CudaLaunch:
    """One launch of a step: all parameters on one device, of one combination of types."""

    backend = "cuda"

    def __init__(self, rule: str, bindings: Sequence[Binding], groups: int, clip: bool) -> None:
        _C = native()
        self.bindings = bindings
        self.device = bindings[0].parameter.device
        #: The indices of the groups whose parameters these are.
        self.groups = sorted({b.group for b in bindings})
        self.gradients = _C.GradientTable()
        #: Where the sum of the squares of all gradients' elements goes in `reduce`.
        self.squares = torch.zeros((), dtype=torch.float64, device=self.device) if clip else None
        #: Whether the device knows better than the host which states a step has been made with.
        self.unsettled = False
        #: Whether a launch was captured into a graph, which needs the table from then on.
        self.captured = False
        #: Whether what the graph needs is kept by the optimizer.
        self.kept = False
        self._index = self.device.index or 0
        self._stream = current_stream(self._index)

        first = bindings[0]
        with self._current_device():
            chunk, window, lead, resident, multiprocessors = _C.cuda_limits(
                rule, first.parameter, first.gradient, self._index
            )
        plan = _C.Plan(
            planned(bindings),
            clip,
            chunk_elements=_limit("CHUNK", chunk),
            window_bytes=_limit("WINDOW", window),
            lead_bytes=_limit("LEAD", lead),
        )
        blocks = _limit("BLOCKS", resident) * multiprocessors
        self._executor = _C.CudaExecutor(plan, rows(rule, bindings), groups, self._index, blocks)
        table = torch.empty(self._executor.table_bytes, dtype=torch.uint8)
        self._executor.write_table(table)
        #: What launches read, and tell each other, on the device.
        self.table = table.to(self.device)
        self._executor.attach(self.table)

    def reduce(self, numbers: Sequence[tuple[Any, ...]], scaling: Scaling) -> Tensor:
        """Return the sum of the squares of all gradients' elements, and leave the abs-sums for `update`."""
        assert self.squares is not None
        self._launch("reduce", numbers, False, 0.0, 0.0, None, scaling, [], set(), [])
        return self.squares

    def update(
        self,
        numbers: Sequence[tuple[Any, ...]],
        counts: bool,
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
            counts: raise the step counts among them.
            max_grad_norm: clip by the norm of this launch's gradients alone; 0 does not.
            clip_eps: what is added to the norm.
            clip: float64, what every gradient is multiplied by; after `reduce`.
            scaling: of mixed precision.
            counted: groups whose step the host counts, after the launch.
            fresh: out of which `stepped` is taken, after the launch.
            stepped: see there.
        """
        phase = "all" if clip is None else "update"
        self._launch(phase, numbers, counts, max_grad_norm, clip_eps, clip, scaling, counted, fresh, stepped)

    def _launch(
        self, phase: str, numbers: Sequence[tuple[Any, ...]], counts: bool, max_grad_norm: float, clip_eps: float,
        clip: Tensor | None, scaling: Scaling, counted: Sequence[dict[str, Any]], fresh: set[int],
        stepped: Sequence[int],
    ) -> None:  # fmt: skip
        stream = current_stream(self._index)
        if stream != self._stream:
            self._change_stream(stream)
        grad_scale, found_inf = scaling.on(self.device)
        squares = self.squares if phase == "reduce" else None
        with self._current_device():
            self.captured = self._executor.launch(
                self.gradients, numbers, counts, max_grad_norm, clip_eps, clip, squares, grad_scale, found_inf, phase,
                stream, counted, fresh, stepped,
            )  # fmt: skip

    def capturing(self) -> bool:
        """Whether work on this device's current stream is being captured in a graph."""
        with self._current_device():
            return not rehearsing() and torch.cuda.is_current_stream_capturing()

    def _current_device(self) -> AbstractContextManager[Any]:
        """Make this launch's device the current one, in PyTorch's way, which makes no context on the one before."""
        if rehearsing() or torch.cuda.current_device() == self._index:
            return _NOTHING
        return torch.cuda.device(self._index)

    def _change_stream(self, stream: int) -> None:
        """Let this stream wait for the step before, which has the table, and keep what both use."""
        streams: Any = torch.cuda  # parts of it have no types
        current = streams.current_stream(self.device)
        if not self.capturing():  # nor could a capture wait for what is outside of it
            default = streams.default_stream(self.device)  # whose address is 0, which ExternalStream takes for none
            current.wait_stream(streams.ExternalStream(self._stream, device=self.device) if self._stream else default)
        for used in (self.table, self.squares, *(b.relaid for b in self.bindings)):
            if used is not None:
                used.record_stream(current)
        self._stream = stream

    def kept_for_graphs(self) -> Iterator[Tensor]:
        """Yield what a captured launch reads and writes, besides parameters, gradients and what options are."""
        yield self.table
        if self.squares is not None:
            yield self.squares
        for b in self.bindings:
            yield from (b.state[key] for key in b.keys)
            if isinstance(b.state.get("step"), Tensor):
                yield b.state["step"]
            if b.relaid is not None:
                yield b.relaid

    def begun(self) -> list[bool]:
        """Return of every binding whether a step has been made with its state. Waits for the device."""
        return list(self._executor.begun(self.table.cpu()))


_KERNEL_READS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def on_device(value: Any, device: torch.device) -> Any:
    """Return a group's number for a launch: a number, or a tensor that is on `device` anyway or read there."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu" and device.type != "cpu":
        return number(value)
    dtype = value.dtype if value.dtype in _KERNEL_READS else torch.float32
    if value.device == device and value.dtype == dtype:
        return value
    return value.detach().to(device=device, dtype=dtype, non_blocking=True)

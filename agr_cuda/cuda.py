"""The CUDA backend, which passes a plan's tensors to the native executor. That launches one kernel per step."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import DeviceLaunch, move_coefficient
from .native import native
from .tensors import Binding, executor_rows, plan_entries

if TYPE_CHECKING:
    from .clipping import Clipping

#: The launcher that replaces the CUDA runtime's in a rehearsal, or None; see `rehearsal`.
_rehearsal_launcher: Any = None


@contextmanager
def rehearsal(launcher: Any = "nothing") -> Iterator[None]:
    """Let backend="cuda" take parameters on the CPU and launch nothing, to measure the host time of a step.

    Args:
        launcher: "nothing", or a capsule with a launcher of one's own. Tests pass one that runs the kernels' source on
            threads of the host.
    """
    global _rehearsal_launcher
    previous = _rehearsal_launcher
    native().use_launcher(launcher)
    _rehearsal_launcher = launcher
    try:
        yield
    finally:
        native().use_launcher(previous)
        _rehearsal_launcher = previous


def rehearsing() -> bool:
    """Whether a rehearsal is active."""
    return _rehearsal_launcher is not None


def device_types() -> tuple[str, ...]:
    """Return the device types whose parameters the backend takes."""
    return ("cpu",) if rehearsing() else ("cuda",)


def why_missing() -> str | None:
    """Return why no kernel can be launched here and how to fix that, or None. The native core must be loaded."""
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
    """Return why none of the compiled kernels runs on the GPU with this index, or None."""
    architectures = [int(name) for name in native().cuda_architectures.split()]
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    # Machine code runs on later minor versions of its major version; the newest one's PTX runs on all later GPUs.
    if any(a // 10 == major and a <= capability for a in architectures) or capability >= max(architectures):
        return None
    built = ", ".join(map(str, architectures))
    return (
        f"cuda:{index} has compute capability {major}.{minor}, and kernels were built for {built}: "
        f"install again with AGR_CUDA_ARCHS={capability}" + ("" if capability >= 80 else ", if it were 80 or more")
    )


def _limit(name: str, default: int) -> int:
    """Return a limit of the plan: `default`, or the value of AGR_CUDA_<name> in the environment, used for tuning."""
    requested = os.environ.get(f"AGR_CUDA_{name}")
    if not requested:
        return default
    if not requested.isdigit():
        raise ValueError(f"AGR_CUDA_{name} is {requested!r}; it must be an integer of at least 0")
    return int(requested)


def _tactics() -> int:
    """Return which of its tactics a launch uses: all but those that AGR_CUDA_WITHOUT names, used for timing them."""
    tactics: dict[str, int] = native().cuda_tactics
    without = {name.strip() for name in os.environ.get("AGR_CUDA_WITHOUT", "").split(",")} - {""}
    if unknown := sorted(without - set(tactics)):
        raise ValueError(f"AGR_CUDA_WITHOUT names {', '.join(map(repr, unknown))}; there are {', '.join(tactics)}")
    return sum(bit for name, bit in tactics.items() if name not in without)


class CudaLaunch(DeviceLaunch):
    """The update, in one kernel launch, of all parameters on one device with one combination of dtypes."""

    readable_dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def __init__(
        self, rule: str, bindings: Sequence[Binding], groups: int, sizes: Sequence[int], clip: bool, counts: bool
    ) -> None:
        super().__init__(bindings, counts)
        _C = native()
        self.squares = torch.zeros((), dtype=torch.float64, device=self.device) if clip else None
        #: Where `sums` has left the sums of each gradient; the abs-sums are replaced before the update.
        self._sums: Tensor | None = None
        with self._current_device():
            chunk, window, lead, prefetched, resident, multiprocessors = _C.cuda_limits(
                rule, bindings[0].types, self._device_index
            )
        plan = _C.Plan(
            plan_entries(bindings),
            clip,
            chunk_elements=_limit("CHUNK", chunk),
            window_bytes=_limit("WINDOW", window),
            lead_bytes=_limit("LEAD", lead),
        )
        blocks = _limit("BLOCKS", resident) * multiprocessors
        rows = executor_rows(rule, bindings)
        prefetched = _limit("PREFETCH", prefetched)
        self._executor = _C.CudaExecutor(plan, rows, groups, self._device_index, blocks, prefetched, _tactics())
        table = torch.frombuffer(bytearray(self._executor.table()), dtype=torch.uint8)
        #: The plan's rows and tasks and the blocks' synchronization state, in device memory.
        self.table = table.to(self.device)
        self._executor.attach(self.table)

    def square_sum(self) -> Tensor:
        """Return the sum of the squares of all unscaled gradients; see Launch.square_sum."""
        assert self.squares is not None
        self._launch("reduce", counts=False)
        return self.squares

    def sums(self) -> Tensor:
        """Return the sums of each gradient; see Launch.sums."""
        # Nothing writes those of tensors without elements, nor any where mixed precision skips the step.
        self._sums = torch.zeros(2, len(self.bindings), dtype=torch.float64, device=self.device)
        self._launch("reduce", counts=False)
        return self._sums

    def set_abs_sums(self, abs_sums: Tensor) -> None:
        """Take the abs-sums of whole tensors; see Launch.set_abs_sums."""
        assert self._sums is not None
        self._sums[0].copy_(abs_sums)

    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Update and count the step in one native call, which no signal handler can interrupt; see Launch.update."""
        if clipping.reduced:
            clip = move_coefficient(clipping, self.device)
            self._launch("update", self.counts, clip=clip, counted=counted)
        else:
            self._launch("all", self.counts, clipping.max_grad_norm, clipping.eps, counted=counted)

    def _launch(
        self,
        phase: str,
        counts: bool,
        max_grad_norm: float = 0.0,
        clip_eps: float = 0.0,
        clip: Tensor | None = None,
        counted: Sequence[dict[str, Any]] = (),
    ) -> None:
        stream = self._switch_stream()
        grad_scale, found_inf = self.scaling.to(self.device)
        squares = None if phase == "update" else self.squares
        captured = self.captured
        with self._current_device():
            self.captured = self._executor.launch(
                self.gradients, self.hyperparameters, counts, max_grad_norm, clip_eps, clip, squares,
                grad_scale, found_inf, self._sums, phase, stream, counted,
            )  # fmt: skip
        self.newly_captured = self.newly_captured or self.captured != captured

    def buffers(self) -> Iterator[Tensor]:
        """Yield the backend's own device tensors; see DeviceLaunch.buffers."""
        yield self.table
        if self.squares is not None:
            yield self.squares

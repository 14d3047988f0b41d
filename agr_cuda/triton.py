"""The Triton backend: GPUs for which no CUDA kernels are built. Two launches a step, of kernels in triton_kernels/.

Importing this imports no triton; the first launch does.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import DeviceLaunch, Numbers
from .native import native
from .scaling import Scaling
from .tensors import Binding, planned

if TYPE_CHECKING:
    from .clipping import Clipping

OLDEST_TRITON = (3, 2)
OLDEST_CAPABILITY = (8, 0)  # of NVIDIA's GPUs, as Triton says

#: Elements that a program has of each tensor at a time, as many as registers suffice for: of 32 bits or fewer, and of
#: 64. And sums of chunks that it adds at a time.
BLOCK, WIDE_BLOCK, SUMS = 1024, 512, 512
#: Elements that a program updates at a time where they cannot be loaded together.
REST = 512
#: Graphs that can be captured one after the other with no ordinary step between them, by any release of PyTorch.
SPARE = 4
#: Tensors whose numbers a program makes.
TENSORS = 128
#: A chunk has this many elements, or, where a tensor would have more than MOST_CHUNKS of them, as many more as that
#: takes: every update adds up the sums of its tensor's chunks.
CHUNK, MOST_CHUNKS = 16 * BLOCK, 2048


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU; it asks the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_types() -> tuple[str, ...]:
    """Return the types of the devices on which the backend's parameters are."""
    return ("cpu",) if interpreting() else ("cuda", "xpu")


@functools.cache
def why_missing() -> str | None:
    """Return why no kernel can be launched here and how to mend that, or None. The native core is there."""
    wanted = "'triton>=3.2'"
    if find_spec("triton") is None:
        return f"Triton is not installed: pip install {wanted}"
    found = _version()
    if found is not None and tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        return f"Triton is of version {found}, and {wanted} is needed"
    if interpreting():
        return None
    devices = [
        torch.device(kind, index)
        for kind in device_types()
        if (module := getattr(torch, kind, None)) is not None and module.is_available()
        for index in range(module.device_count())
    ]
    if not devices:
        return "PyTorch finds no GPU that Triton drives"
    reasons = [why_not_on(device) for device in devices]
    return None if None in reasons else str(reasons[0])


def _version() -> str | None:
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "pytorch-triton"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """Return why the kernels do not run on this GPU, or None."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            least, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
            return f"{device} has compute capability {found}, and Triton needs {least}"
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return f"{device} has no float64 arithmetic, in which sums and bias corrections are computed"
    return None


def compiler_options(dtype: torch.dtype, nvidia: bool) -> dict[str, Any]:
    """Return what kernels are compiled with, for parameters of this type."""
    # Products and sums are fused where the kernels say so and nowhere else, whatever Triton's default is.
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    if nvidia:
        # Left to itself, ptxas spills a few registers wherever that lets one more program run beside others.
        options["maxnreg"] = 168 if dtype == torch.float64 else 128
    return options


def block_elements(dtype: torch.dtype) -> int:
    """Return how many elements a program has at a time of parameters of this type."""
    return WIDE_BLOCK if dtype == torch.float64 else BLOCK


def chunk_elements(largest: int) -> int:
    """Return how many elements a chunk has where the largest tensor has `largest`."""
    return max(CHUNK, -(-largest // (MOST_CHUNKS * BLOCK)) * BLOCK)


class TritonLaunch(DeviceLaunch):
    """Two launches of a step: all parameters on one device, of one combination of types."""

    backend = "triton"
    kernel_reads = (torch.float32, torch.float64)

    def __init__(
        self, rule: str, bindings: Sequence[Binding], groups: int, sizes: Sequence[int], clip: bool, counts: bool
    ) -> None:
        super().__init__(bindings, counts)
        from . import triton_kernels  # type: ignore[attr-defined]  # whose folder stands elsewhere in the repository

        self._kernels = triton_kernels
        self._clips = clip
        first = bindings[0]
        self._constants = triton_kernels.constants(rule, first.parameter.dtype, first.gradient.dtype)
        self._block = block_elements(first.parameter.dtype)
        nvidia = self.device.type != "xpu" and torch.version.hip is None
        self._options = compiler_options(first.parameter.dtype, nvidia)
        self._make_tables(groups, sizes)
        self._make_changing(triton_kernels.GROUP * groups)
        self._compile()

    def _make_tables(self, groups: int, sizes: Sequence[int]) -> None:
        """Make what stays as it is while the plan lasts, and what launches leave for each other."""
        bindings = self.bindings
        # By what all parameters of the optimizer are, so that sums have the same bits whichever of them have gradients.
        chunk = chunk_elements(max(sizes))
        plan = native().Plan(planned(bindings), self._clips, chunk_elements=chunk, apart=True)
        reduced = [task[1:] for task in plan.tasks[: plan.first_update]]
        updated = [task[1:] for task in plan.tasks[plan.first_update :]]
        # The step of an empty tensor is counted too.
        updated += [(i, 0) for i, b in enumerate(bindings) if b.parameter.numel() == 0]
        #: Programs of each launch. The first has some that make numbers before those that reduce.
        self._reducers, self._updaters = -(-len(bindings) // TENSORS) + len(reduced), len(updated)
        like: dict[str, Any] = {"device": self.device}
        self._limits = torch.tensor([len(bindings), chunk, groups], dtype=torch.int64, **like)
        first_chunks = [0, *accumulate(-(-size // chunk) for size in sizes)]
        rows = _rows(bindings, chunk, first_chunks, self._kernels.ROW)
        self._rows = torch.tensor(rows, dtype=torch.int64, **like)
        self._reduced = torch.tensor(reduced, dtype=torch.int64, **like).reshape(-1, 2)
        self._updated = torch.tensor(updated, dtype=torch.int64, **like).reshape(-1, 2)
        #: Of every chunk of every parameter, the sum of its magnitudes and that of its squares.
        chunks = first_chunks[-1]
        self._magnitudes, self._squares = torch.zeros(2, chunks + chunks % 2, dtype=torch.float64, **like)
        self._numbers = torch.zeros(len(bindings), self._kernels.NUMBERS, dtype=torch.float64, **like)
        #: What takes the place of a clipping coefficient, a scale and a verdict that there are not.
        self._no_clip = torch.ones((), dtype=torch.float64, **like)
        self._no_scale = torch.ones((), dtype=torch.float32, **like)
        self._no_inf = torch.zeros((), dtype=torch.float32, **like)

    def _make_changing(self, words: int) -> None:
        """Make what changes from step to step: `words` that groups say, then gradients' addresses."""
        self._changing = torch.zeros(words + len(self.bindings), dtype=torch.int64, device=self.device)
        self._of_groups, self._addresses = self._changing[:words], self._changing[words:]
        self._of_groups_as_floats = self._of_groups.view(torch.float64)
        #: What of it the device has.
        self._copied = b""
        # From where graphs copy that, each time they are replayed; and memory for those that are captured next, since
        # most releases of PyTorch cannot pin any within a capture.
        self._copied_by_graphs: list[Tensor] = []
        self._through_pinned_memory = self.device.type != "cpu"
        self._spare: list[Tensor] = []

    def square_sum(self) -> Tensor:
        """Return the sum of the squares of all gradients; see Launch.square_sum."""
        self._follow_stream()
        with self._current_device():
            self._copy_changing()
            self._reduce(self.scaling)
            squares: Tensor = self._squares.sum()
            grad_scale, _ = self.scaling.on(self.device)
            return squares if grad_scale is None else squares / grad_scale.double() ** 2

    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Make the step; see Launch.update."""
        self._follow_stream()
        with self._current_device():
            clip = None
            if clipping.max_grad_norm:
                assert isinstance(clipping.coefficient, Tensor)
                clip = clipping.coefficient.to(self.device, torch.float64)
            else:
                self._copy_changing()
                self._reduce(self.scaling)
            self._update(clip, self.scaling)
        # In Python an interrupt may come between, after which Adan's count lacks this step.
        native().count_steps(counted)

    def _compile(self) -> None:
        """Compile what launches need: that takes seconds, so it comes before anything has changed."""
        with self._current_device():
            unscaled = Scaling(None, None)
            self._reduce(unscaled, warmup=True)
            self._update(None, unscaled, warmup=True)

    def _reduce(self, scaling: Scaling, warmup: bool = False) -> None:
        grad_scale, _ = scaling.on(self.device)
        constants = {key: value for key, value in self._constants.items() if key != "PARAMETER"}
        self._kernels.reduce_step.run(
            self._limits, self._rows, self._reduced, self._addresses, self._of_groups, self._of_groups_as_floats,
            self._magnitudes, self._squares, self._numbers,
            self._no_scale if grad_scale is None else grad_scale,
            **constants, SQUARES=self._clips, BLOCK=self._block, TENSORS=TENSORS,
            **self._options, grid=(self._reducers,), warmup=warmup,
        )  # fmt: skip

    def _update(self, clip: Tensor | None, scaling: Scaling, warmup: bool = False) -> None:
        _, found_inf = scaling.on(self.device)
        self._kernels.update_step.run(
            self._limits, self._rows, self._updated, self._addresses, self._of_groups, self._magnitudes, self._numbers,
            self._no_clip if clip is None else clip, self._no_inf if found_inf is None else found_inf,
            **self._constants, BLOCK=self._block, REST=REST, SUMS=SUMS,
            **self._options, grid=(self._updaters,), warmup=warmup,
        )  # fmt: skip

    def _copy_changing(self) -> None:
        """Bring what has changed since the last step to the device, without waiting for it."""
        capturing = self.capturing()
        self.captured = self.captured or capturing
        self.newly_captured = self.newly_captured or capturing
        changing = b"".join(self._group_words(group) for group in self.numbers) + bytes(self.gradients)
        # A captured launch copies what it needs each time it is replayed, so that what the device has is not known from
        # the first capture on.
        if changing == self._copied and not self.captured:
            return
        self._copied = changing
        host = torch.frombuffer(bytearray(changing), dtype=torch.int64)
        if self._through_pinned_memory:
            pinned = self._spare.pop() if capturing and self._spare else self._pinned()
            host = pinned.copy_(host)
            if capturing:
                self._copied_by_graphs.append(host)
            else:  # PyTorch uses this memory again only after the copy
                self._spare += [self._pinned() for _ in range(SPARE - len(self._spare))]
        self._changing.copy_(host, non_blocking=True)

    def _pinned(self) -> Tensor:
        return torch.empty(self._changing.shape, dtype=torch.int64, device="cpu", pin_memory=True)

    def _group_words(self, numbers: Numbers) -> bytes:
        """Return what the kernels are told of a group; see triton_kernels/tables.py."""
        if self._constants["ADAN"]:
            lr, beta1, beta2, beta3, eps, weight_decay, no_prox, sign, steps = numbers
        else:
            lr, beta1, beta2, eps, weight_decay, sign = numbers
            beta3, no_prox, steps = 0.0, 0.0, 0
        single, double, count = 0, 0, 0
        if isinstance(lr, Tensor):
            single, double = (_address(lr) if lr.dtype == dtype else 0 for dtype in self.kernel_reads)
            lr = 0.0
        if isinstance(steps, Tensor):
            count = _address(steps)
            steps = 0
        known = (lr, beta1, beta2, beta3, eps, weight_decay, no_prox, sign, steps + 1)
        return struct.pack("=9d7q", *known, single, double, count, self.counts, 0, 0, 0)

    def tables(self) -> Iterator[Tensor]:
        """Yield what launches read and write of the backend's own."""
        yield from (self._limits, self._rows, self._reduced, self._updated, self._magnitudes, self._squares)
        yield from (self._numbers, self._changing, self._no_clip, self._no_scale, self._no_inf)

    def kept_for_graphs(self) -> Iterator[Tensor]:
        """Yield what a captured launch reads and writes; see DeviceLaunch.kept_for_graphs."""
        yield from super().kept_for_graphs()
        yield from self._copied_by_graphs


def _address(tensor: Tensor) -> int:
    """Return where a tensor is, as a number with a sign: Intel's GPUs have addresses beyond 2^63."""
    return (tensor.data_ptr() + (1 << 63)) % (1 << 64) - (1 << 63)


def _rows(bindings: Sequence[Binding], chunk: int, first_chunks: Sequence[int], length: int) -> list[list[int]]:
    """Return what the kernels are told of each tensor, `length` words; see triton_kernels/tables.py."""
    rows = []
    for b in bindings:
        states = [_address(average) for average in b.averages]
        states += [0] * (4 - len(states))
        step = 0 if b.count is None else _address(b.count)
        elements = b.parameter.numel()
        chunks = -(-elements // chunk)
        place = [elements, first_chunks[b.index], chunks, b.group, int(b.regularize), int(b.amsgrad)]
        row = [_address(b.parameter), *states, step, *place]
        rows.append(row + [0] * (length - len(row)))
    return rows

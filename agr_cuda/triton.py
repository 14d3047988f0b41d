"""The Triton backend, for GPUs without compiled CUDA kernels. It launches the two kernels of triton_kernels/ per step.

Importing this module does not import triton; making the first launch does.
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

from .launch import DeviceLaunch, Hyperparameters, move_coefficient
from .native import native
from .precision import Precision
from .scaling import Scaling
from .tensors import Binding, plan_entries

if TYPE_CHECKING:
    from .clipping import Clipping

OLDEST_TRITON = (3, 2)
OLDEST_CAPABILITY = (8, 0)  # the compute capability of NVIDIA's GPUs that Triton requires

#: Elements of a tensor that a program processes at a time, for parameters of up to 32 bits and of 64 bits: as many as
#: fit into registers.
BLOCK, WIDE_BLOCK = 1024, 512
#: Partial sums of chunks that a program adds at a time.
SUMS = 512
#: Elements that a program updates at a time in the masked loop, over elements that cannot be loaded as 16-byte vectors.
REST = 512
#: Tensors whose coefficients one program computes.
TENSORS = 128
#: The elements of a chunk, unless a tensor would have more than MAX_CHUNKS chunks; then chunks are larger. The number
#: is limited because every program that updates a chunk adds up the partial sums of all chunks of the tensor.
CHUNK, MAX_CHUNKS = 16 * BLOCK, 2048
#: Pinned buffers kept ready for captures. So many graphs can be captured in succession, without an ordinary step in
#: between, in PyTorch releases that cannot pin memory during a capture.
SPARE_BUFFERS = 4


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter on the CPU, as TRITON_INTERPRET says when triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_types() -> tuple[str, ...]:
    """Return the device types whose parameters the backend takes."""
    return ("cpu",) if interpreting() else ("cuda", "xpu")


@functools.cache
def why_missing() -> str | None:
    """Return why no kernel can be launched here and how to fix that, or None. The native core must be loaded."""
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


def compiler_options(dtype: torch.dtype, precision: Precision, nvidia: bool) -> dict[str, Any]:
    """Return Triton's compilation options for parameters of this dtype, stored with this precision."""
    # Products and sums are fused only where the kernels use tl.fma, whatever Triton's default is.
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    if nvidia:
        # Without a limit, ptxas spills a few registers if one more program then fits on a multiprocessor.
        wide = dtype == torch.float64 or precision.quantized
        options["maxnreg"] = 168 if wide else 128
    return options


def block_elements(dtype: torch.dtype) -> int:
    """Return how many elements of parameters of this dtype a program processes at a time."""
    return WIDE_BLOCK if dtype == torch.float64 else BLOCK


def chunk_elements(largest: int) -> int:
    """Return how many elements a chunk has if the largest tensor has `largest` elements."""
    return max(CHUNK, -(-largest // (MAX_CHUNKS * BLOCK)) * BLOCK)


class TritonLaunch(DeviceLaunch):
    """The update, in two kernel launches, of all parameters on one device with one combination of dtypes."""

    readable_dtypes = (torch.float32, torch.float64)
    #: Whether the first launch computes coefficients of an update rule, from the numbers of groups.
    computes_coefficients = True

    def __init__(
        self, rule: str, bindings: Sequence[Binding], groups: int, sizes: Sequence[int], clip: bool, counts: bool
    ) -> None:
        super().__init__(bindings, counts)
        from . import triton_kernels  # type: ignore[attr-defined]  # its folder is elsewhere in the repository

        self._kernels = triton_kernels
        self._clips = clip
        first = bindings[0]
        self._constants = triton_kernels.constants(rule, first.parameter.dtype, first.gradient.dtype, first.precision)
        self._block = block_elements(first.parameter.dtype)
        nvidia = self.device.type != "xpu" and torch.version.hip is None
        self._options = compiler_options(first.parameter.dtype, first.precision, nvidia)
        self._make_tables(groups, sizes)
        self._make_step_buffer(triton_kernels.GROUP * groups if self.computes_coefficients else 0)
        self._compile()

    def _make_tables(self, groups: int, sizes: Sequence[int]) -> None:
        """Make the tables that stay constant, and the buffers that the first kernel fills for the second."""
        bindings = self.bindings
        # Chunks depend on the sizes of all parameters of the optimizer, so that sums have the same bits whichever of
        # the parameters have gradients.
        chunk = chunk_elements(max(sizes))
        plan = native().Plan(plan_entries(bindings), self._clips, chunk_elements=chunk, apart=True)
        reduce_tasks = [task[1:] for task in plan.tasks[: plan.first_update]]
        update_tasks = [task[1:] for task in plan.tasks[plan.first_update :]]
        # An empty tensor has no chunk, but its step is counted, so it gets a task.
        update_tasks += [(i, 0) for i, b in enumerate(bindings) if b.parameter.numel() == 0]
        #: The number of programs of each launch. The first launch begins with those that compute coefficients.
        computed = len(bindings) if self.computes_coefficients else 0
        self._reduce_programs = -(-computed // TENSORS) + len(reduce_tasks)
        self._update_programs = len(update_tasks)
        like: dict[str, Any] = {"device": self.device}
        self._limits = torch.tensor([computed, chunk, groups], dtype=torch.int64, **like)
        first_chunks = [0, *accumulate(-(-size // chunk) for size in sizes)]
        rows = _rows(bindings, chunk, first_chunks)
        self._rows = torch.tensor(rows, dtype=torch.int64, **like)
        self._reduce_tasks = torch.tensor(reduce_tasks, dtype=torch.int64, **like).reshape(-1, 2)
        self._update_tasks = torch.tensor(update_tasks, dtype=torch.int64, **like).reshape(-1, 2)
        #: The abs-sum and the sum of squares of every chunk of every parameter's gradient.
        chunks = first_chunks[-1]
        self._magnitudes, self._squares = torch.zeros(2, chunks + chunks % 2, dtype=torch.float64, **like)
        self._coefficients = torch.zeros(computed, self._kernels.COEFFICIENTS, dtype=torch.float64, **like)
        #: The number of chunks of each parameter of the optimizer, and the indices of those of this launch.
        self._chunk_count = chunks
        self._chunks = torch.tensor([-(-size // chunk) for size in sizes], dtype=torch.int64, **like)
        self._indices = torch.tensor([b.index for b in bindings], dtype=torch.int64, **like)
        #: The tensors that have chunks, and their first.
        with_chunks = [i for i, b in enumerate(bindings) if b.parameter.numel() > 0]
        self._with_chunks = torch.tensor(with_chunks, dtype=torch.int64, **like)
        self._first_chunks = torch.tensor(
            [first_chunks[bindings[i].index] for i in with_chunks], dtype=torch.int64, **like
        )
        #: Neutral values, passed to the kernels in place of a clipping coefficient, gradient scale or overflow flag.
        self._no_clip = torch.ones((), dtype=torch.float64, **like)
        self._no_scale = torch.ones((), dtype=torch.float32, **like)
        self._no_inf = torch.zeros((), dtype=torch.float32, **like)

    def _make_step_buffer(self, words: int) -> None:
        """Make the buffer of what changes between steps: `words` of the groups' table, then gradients' addresses."""
        self._step_buffer = torch.zeros(words + len(self.bindings), dtype=torch.int64, device=self.device)
        self._group_table, self._addresses = self._step_buffer[:words], self._step_buffer[words:]
        self._group_table_float64 = self._group_table.view(torch.float64)
        #: The contents that were last copied to the device.
        self._last_copied = b""
        self._uses_pinned_memory = self.device.type != "cpu"
        #: The pinned buffers from which captured graphs copy, each time they are replayed.
        self._graph_buffers: list[Tensor] = []
        #: Pinned buffers for future captures, since most releases of PyTorch cannot pin memory during a capture.
        self._spare_buffers: list[Tensor] = []

    def square_sum(self) -> Tensor:
        """Return the sum of the squares of all unscaled gradients; see Launch.square_sum."""
        self._switch_stream()
        with self._current_device():
            self._copy_step_data()
            self._reduce(self.scaling)
            squares: Tensor = self._squares.sum()
            grad_scale, _ = self.scaling.to(self.device)
            return squares if grad_scale is None else squares / grad_scale.double() ** 2

    def sums(self) -> Tensor:
        """Return the sums of each gradient; see Launch.sums."""
        self._switch_stream()
        with self._current_device():
            self._copy_step_data()
            self._reduce(self.scaling)
            by_chunk = torch.stack([self._magnitudes, self._squares], dim=1)[: self._chunk_count]
            # In the order of chunks. `unsafe` leaves out a check for which the host would wait.
            sums = torch.segment_reduce(by_chunk, "sum", lengths=self._chunks, axis=0, unsafe=True, initial=0)
            return sums.index_select(0, self._indices).T

    def set_abs_sums(self, abs_sums: Tensor) -> None:
        """Take the abs-sums of whole tensors; see Launch.set_abs_sums. An update adds up those of the chunks."""
        with self._current_device():
            self._magnitudes.zero_()
            self._magnitudes.index_copy_(0, self._first_chunks, abs_sums.index_select(0, self._with_chunks))

    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Update the parameters; see Launch.update."""
        self._switch_stream()
        with self._current_device():
            clip = None
            if clipping.reduced:
                clip = move_coefficient(clipping, self.device)
            else:
                self._copy_step_data()
                self._reduce(self.scaling)
            self._update(clip, self.scaling)
        # An interrupt may come between the launches and this call, since both are made from Python. Adan's step count
        # then lacks this step.
        native().count_steps(counted)

    def _compile(self) -> None:
        """Compile the kernels now, since that takes seconds and may fail, and nothing has changed yet."""
        with self._current_device():
            unscaled = Scaling(None, None)
            self._reduce(unscaled, warmup=True)
            self._update(None, unscaled, warmup=True)

    def _reduce(self, scaling: Scaling, warmup: bool = False) -> None:
        grad_scale, _ = scaling.to(self.device)
        constants = {key: self._constants[key] for key in self._kernels.REDUCE_CONSTANTS}
        self._kernels.reduce_step.run(
            self._limits, self._rows, self._reduce_tasks, self._addresses, self._group_table, self._group_table_float64,
            self._magnitudes, self._squares, self._coefficients,
            self._no_scale if grad_scale is None else grad_scale,
            **constants, SQUARES=self._clips, BLOCK=self._block, TENSORS=TENSORS,
            **self._options, grid=(self._reduce_programs,), warmup=warmup,
        )  # fmt: skip

    def _update(self, clip: Tensor | None, scaling: Scaling, warmup: bool = False) -> None:
        _, found_inf = scaling.to(self.device)
        self._kernels.update_step.run(
            self._limits, self._rows, self._update_tasks, self._addresses, self._group_table,
            self._magnitudes, self._coefficients,
            self._no_clip if clip is None else clip, self._no_inf if found_inf is None else found_inf,
            **self._constants, BLOCK=self._block, REST=REST, SUMS=SUMS,
            **self._options, grid=(self._update_programs,), warmup=warmup,
        )  # fmt: skip

    def _copy_step_data(self) -> None:
        """Copy the groups' table and gradients' addresses to the device if they have changed, without waiting."""
        capturing = self.capturing()
        self.captured = self.captured or capturing
        self.newly_captured = self.newly_captured or capturing
        step_data = b"".join(self._group_words(group) for group in self.hyperparameters) + bytes(self.gradients)
        # A replayed graph copies the contents from its capture. From the first capture on, the host therefore does not
        # know what is on the device, and always copies.
        if step_data == self._last_copied and not self.captured:
            return
        self._last_copied = step_data
        host = torch.frombuffer(bytearray(step_data), dtype=torch.int64)
        if self._uses_pinned_memory:
            pinned = self._spare_buffers.pop() if capturing and self._spare_buffers else self._new_pinned_buffer()
            host = pinned.copy_(host)
            if capturing:
                self._graph_buffers.append(host)
            else:  # PyTorch does not reuse this buffer's memory before the copy has finished.
                self._spare_buffers += [
                    self._new_pinned_buffer() for _ in range(SPARE_BUFFERS - len(self._spare_buffers))
                ]
        self._step_buffer.copy_(host, non_blocking=True)

    def _new_pinned_buffer(self) -> Tensor:
        return torch.empty(self._step_buffer.shape, dtype=torch.int64, device="cpu", pin_memory=True)

    def _group_words(self, hyperparameters: Hyperparameters) -> bytes:
        """Return a group's row of the groups' table; see triton_kernels/tables.py."""
        if self._constants["ADAN"]:
            lr, beta1, beta2, beta3, eps, weight_decay, no_prox, sign, steps, seed = hyperparameters
        else:
            lr, beta1, beta2, eps, weight_decay, sign, seed = hyperparameters
            beta3, no_prox, steps = 0.0, 0.0, 0
        single, double, count = 0, 0, 0
        if isinstance(lr, Tensor):
            single, double = (_address(lr) if lr.dtype == dtype else 0 for dtype in self.readable_dtypes)
            lr = 0.0
        if isinstance(steps, Tensor):
            count = _address(steps)
            steps = 0
        numbers = (lr, beta1, beta2, beta3, eps, weight_decay, no_prox, sign, steps + 1)
        return struct.pack("=9d7q", *numbers, single, double, count, self.counts, int(seed), 0, 0)

    def buffers(self) -> Iterator[Tensor]:
        """Yield the backend's own device tensors; see DeviceLaunch.buffers."""
        yield from (self._limits, self._rows, self._reduce_tasks, self._update_tasks, self._magnitudes, self._squares)
        yield from (self._coefficients, self._step_buffer, self._no_clip, self._no_scale, self._no_inf)

    def graph_tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that a captured launch reads or writes; see DeviceLaunch.graph_tensors."""
        yield from super().graph_tensors()
        yield from self._graph_buffers


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor as a signed 64-bit integer; on Intel's GPUs, addresses exceed 2^63."""
    return (tensor.data_ptr() + (1 << 63)) % (1 << 64) - (1 << 63)


def _rows(bindings: Sequence[Binding], chunk: int, first_chunks: Sequence[int]) -> list[list[int]]:
    """Return each tensor's row of the tensor table; see triton_kernels/tables.py."""
    rows = []
    for b in bindings:
        states, scales = ([*map(_address, tensors), 0, 0, 0, 0][:4] for tensors in (b.averages, b.scales))
        step, master = (0 if tensor is None else _address(tensor) for tensor in (b.count, b.master))
        elements = b.parameter.numel()
        chunks = -(-elements // chunk)
        place = [elements, first_chunks[b.index], chunks, b.group, int(b.regularize), int(b.amsgrad)]
        rows.append([_address(b.parameter), *states, step, *place, *scales, master, b.sequence])
    return rows

"""Types of the native core; what each does is said in csrc/."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

left_out: str
cuda_architectures: str
cuda_tactics: dict[str, int]

def instruction_set() -> str: ...
def uses_exchange_api() -> bool: ...
def use_exchange_api(wanted: bool) -> None: ...
def use_launcher(which: object) -> None: ...
def cuda_limits(
    rule: str, types: tuple[str, str, str, bool, bool], device: int
) -> tuple[int, int, int, int, int, int]: ...
def cuda_compiled(rule: str, types: tuple[str, str, str, bool, bool]) -> bool: ...
def count_steps(groups: Sequence[dict[str, Any]]) -> None: ...

class Plan:
    def __init__(
        self,
        tensors: Sequence[tuple[int, int, bool]],
        clip: bool = False,
        chunk_elements: int | None = None,
        window_bytes: int | None = None,
        lead_bytes: int | None = None,
        apart: bool = False,
    ) -> None: ...
    @property
    def tasks(self) -> list[tuple[str, int, int]]: ...
    @property
    def chunks(self) -> int: ...
    @property
    def chunk_elements(self) -> int: ...
    @property
    def window_bytes(self) -> int: ...
    @property
    def lead_bytes(self) -> int: ...
    @property
    def first_update(self) -> int: ...

class GradientTable:
    def __init__(self) -> None: ...
    def __bytes__(self) -> bytes: ...

class Watch:
    def __init__(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None: ...
    def add(
        self,
        index: int,
        keys: Sequence[str],
        table: GradientTable,
        slot: int,
        gradient_class: type,
        gradient_type: str,
        staged: Tensor | None,
    ) -> None: ...
    def add_by_reference(self, index: int) -> None: ...
    def unchanged(self, groups: object, state: object) -> bool: ...
    @property
    def updated(self) -> list[Tensor]: ...
    def release(self) -> None: ...

class GradientWatch:
    def __init__(self, parameters: int) -> None: ...
    def add(self, index: int, table: GradientTable, slot: int, gradient: Tensor) -> None: ...
    def add_as_in(self, other: GradientWatch, index: int, table: GradientTable, slot: int) -> None: ...
    def add_shared(self, index: int, first: int) -> None: ...
    def add_by_reference(self, index: int) -> None: ...
    def read(self, parameters: list[Tensor]) -> list[Tensor] | None: ...

class CpuExecutor:
    def __init__(
        self,
        plan: Plan,
        tensors: list[tuple[str, int, int, Tensor, str, tuple[Tensor, ...], Tensor | None]],
    ) -> None: ...
    def reduce(self, gradients: GradientTable, threads: int) -> float: ...
    def update(
        self,
        gradients: GradientTable,
        groups: list[tuple[float, ...]],
        clip: float,
        threads: int,
        counted: Sequence[dict[str, Any]],
    ) -> None: ...

class CudaExecutor:
    def __init__(
        self,
        plan: Plan,
        tensors: list[tuple[str, int, int, Tensor, str, tuple[Tensor, ...], Tensor | None]],
        groups: int,
        device: int,
        blocks: int,
        prefetched_bytes: int,
        tactics: int,
    ) -> None: ...
    @property
    def launches(self) -> tuple[int, int]: ...
    def table(self) -> bytes: ...
    def attach(self, tensor: Tensor) -> None: ...
    def launch(
        self,
        gradients: GradientTable,
        groups: list[tuple[float | Tensor, ...]],
        counts: bool,
        max_grad_norm: float,
        clip_eps: float,
        clip: Tensor | None,
        squares: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        phase: str,
        stream: int,
        counted: Sequence[dict[str, Any]],
    ) -> bool: ...

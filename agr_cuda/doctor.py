"""What a report of a fault needs: versions, devices, backends with reasons, and a trial of each backend."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import backends
from .adamw import AdamW
from .adan import Adan
from .native import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
TRIED_DTYPES = (torch.float32, torch.bfloat16)
#: Shapes of the tensors of a trial: one element, fewer than a vector, one chunk, several chunks.
SHAPES = ((1,), (7,), (64, 33), (20_011,))
STEPS = 3
#: How many units in the last place of the largest number two backends may differ by.
TOLERANCE = 8
#: The environment variables that change what is built or what runs.
VARIABLES = (
    *("AGR_CUDA_ARCHS", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "OMP_NUM_THREADS"),
    *("AGR_CUDA_CHUNK", "AGR_CUDA_WINDOW", "AGR_CUDA_LEAD", "AGR_CUDA_BLOCKS", "AGR_CUDA_PREFETCH", "AGR_CUDA_WITHOUT"),
)


@dataclass
class Trial:
    """A few steps on random tensors by a backend, beside the reference backend."""

    backend: str
    device: str
    optimizer: str
    dtype: str
    #: The largest difference of a parameter, in units in the last place of the largest; None after an error.
    difference: float | None
    #: What went wrong, or None.
    error: str | None

    @property
    def passed(self) -> bool:
        """Whether the backend computes what the reference backend does."""
        return self.error is None and self.difference is not None and self.difference <= TOLERANCE


@dataclass
class Report:
    """Everything that the doctor finds."""

    versions: dict[str, str]
    environment: dict[str, str]
    #: Why a backend is missing; None if it is there.
    backends: dict[str, str | None]
    #: By device and type, the backend that updates a parameter; "-" if the device has no such type.
    choice: dict[str, dict[str, str]]
    trials: list[Trial]

    @property
    def healthy(self) -> bool:
        """Whether the compiled core is there, and every backend that is there computes what the reference does."""
        return self.backends["cpu"] is None and all(trial.passed for trial in self.trials)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as numbers and strings, for JSON."""
        trials = [{**asdict(trial), "passed": trial.passed} for trial in self.trials]
        return {**asdict(self), "trials": trials, "healthy": self.healthy}


def examine() -> Report:
    """Return a report on this installation and machine. It takes seconds where kernels are compiled on first use."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    return Report(
        versions=_versions(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        backends={backend: backends.why_missing(backend) for backend in backends.BACKENDS},
        choice={
            str(device): {name: backend_for(device, dtype) for name, dtype in zip(names, DTYPES, strict=True)}
            for device in devices()
        },
        trials=_trials(),
    )


def devices() -> list[torch.device]:
    """Return the CPU and every accelerator."""
    found = [torch.device("cpu")]
    for kind in ("cuda", "xpu"):
        module: Any = getattr(torch, kind)
        found += [torch.device(kind, index) for index in range(module.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the backend that updates a parameter of this device and dtype, or "-" if none can exist."""
    try:
        return backends.choose(torch.empty(1, device=device, dtype=dtype))
    except (TypeError, RuntimeError):  # the device does not support this dtype
        return "-"


def _versions() -> dict[str, str]:
    libc = " ".join(platform.libc_ver()).strip()
    found = {
        "agr-cuda": _version("agr-cuda"),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})",
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}" + (f", {libc}" if libc else ""),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    if backends.why_missing("cpu") is None:
        core = native()
        found["cpu kernels"] = core.instruction_set()
        found["tensors read by"] = (
            "DLPack's exchange interface" if core.uses_exchange_api() else "Python methods (slower)"
        )
        if core.cuda_architectures:
            found["cuda kernels"] = f"compute capability {core.cuda_architectures}, and later ones"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found[f"cuda:{index}"] = (
            f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        )
    driver = _nvidia_driver()
    if driver:
        found["driver"] = driver
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ", ".join(sorted({line.strip() for line in said.splitlines() if line.strip()})) or None


def _trials() -> list[Trial]:
    """Try every backend but the reference itself, on each device whose parameters it takes."""
    found = []
    for backend in backends.available_backends():
        for device in devices() if backend != "reference" else []:
            for dtype in TRIED_DTYPES:
                if backends.why_not(backend, torch.empty(1, device=device, dtype=dtype)) is None:
                    found += [_try(backend, device, name, dtype) for name in ("AdamW", "Adan")]
    return found


def _try(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> Trial:
    difference, error = None, None
    try:
        difference = _difference(backend, device, name, dtype)
    except Exception as raised:  # Whatever it is, it belongs into the report.
        error = f"{type(raised).__name__}: {raised}"
    return Trial(backend, str(device), name, str(dtype).removeprefix("torch."), difference, error)


def _difference(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> float:
    """Return by how much parameters differ after some steps, in units in the last place of the largest."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in SHAPES]
    sides = [[x.clone().requires_grad_() for x in start] for _ in range(2)]
    optimizers = [
        # The tensor of one element is in a group without AGR, under which it would not change.
        {"AdamW": AdamW, "Adan": Adan}[name](
            [{"params": side[:1], "agr": False}, {"params": side[1:]}], lr=0.01, weight_decay=0.1, backend=of
        )
        for side, of in zip(sides, (backend, "reference"), strict=True)
    ]
    for _ in range(STEPS):
        for pair in zip(*sides, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator, device="cpu").to(device, dtype)
            for parameter in pair:
                parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    unit = torch.finfo(dtype).eps
    with torch.no_grad():
        found = [float((a - b).abs().max() / b.abs().max()) / unit for a, b in zip(*sides, strict=True)]
    if not all(map(math.isfinite, found)):
        raise ArithmeticError("there are parameters that are not finite")
    return max(found)

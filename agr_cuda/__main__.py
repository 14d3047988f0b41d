"""`python -m agr_cuda`: show what was built, and which backend updates each device and dtype."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

import agr_cuda

from . import backends
from .native import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def versions() -> list[tuple[str, str]]:
    """Return (name, value) rows on the versions, the machine, its GPUs and the compiled kernels."""
    rows = [
        ("agr-cuda", agr_cuda.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
    ]
    if backends.why_missing("cpu") is None:
        core = native()
        reads = "DLPack's exchange interface" if core.uses_exchange_api() else "Python methods (slower)"
        rows += [("cpu kernels", core.instruction_set()), ("tensors read by", reads)]
        if core.cuda_architectures:
            rows.append(("cuda kernels", f"compute capability {core.cuda_architectures}, and later ones"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, compute capability {properties.major}.{properties.minor}"))
    return rows


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


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m agr_cuda",
        description="Show what is built, and which backend each device and type gets.",
    )
    parser.parse_args()
    width = 16
    for name, value in versions():
        print(f"{name:<{width}}{value}")
    print("\nbackends")
    for backend in backends.BACKENDS:
        reason = backends.why_missing(backend)
        print(f"  {backend:<{width - 2}}{'yes' if reason is None else f'no: {reason}'}")
    print("\nwhich backend updates a parameter")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    print(" " * width + "".join(f"{name:<11}" for name in names))
    for device in devices():
        print(f"  {device!s:<{width - 2}}" + "".join(f"{backend_for(device, dtype):<11}" for dtype in DTYPES))


if __name__ == "__main__":
    main()

"""What a run was measured on: the machine, its versions and its free memory."""

from __future__ import annotations

import os
import platform
import time
from datetime import datetime
from importlib import import_module, metadata
from pathlib import Path

import torch

GIB = 2**30
PACKAGES = (
    *("torch", "triton", "agr-cuda"),
    *("torch-optimi", "pytorch_optimizer", "timm", "torchao", "bitsandbytes", "deepspeed"),
)


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of logical processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's for device cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def free_memory(device: torch.device) -> int:
    """Return the bytes still free on the device; half of the RAM where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def versions() -> dict[str, str | None]:
    """Return versions of the contenders' packages by pip name; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)  # with its build's suffix, such as +cu130
    return found


def load_average() -> float | None:
    """Return how many processes wanted to run over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class OtherWork:
    """How much of the processors everything but this process takes, from its making on. Linux only."""

    def __init__(self) -> None:
        self._begin = (time.perf_counter(), self._busy(), time.process_time())

    def share(self) -> float | None:
        """Return the share of all processors' time that others took; None where the system does not tell."""
        begin, busy_before, own_before = self._begin
        busy = self._busy()
        if busy is None or busy_before is None:
            return None
        processors = (time.perf_counter() - begin) * (os.cpu_count() or 1)
        return max(0.0, busy - busy_before - (time.process_time() - own_before)) / processors

    @staticmethod
    def _busy() -> float | None:
        """Return the seconds that all processors together were not idle since the system started."""
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def our_backends() -> list[str]:
    """Return the names of agr_cuda's backends that are there, the preferred first; none without agr_cuda."""
    try:
        return list(import_module("agr_cuda").available_backends())
    except (ImportError, AttributeError):
        return []


def gpu(device: torch.device) -> dict[str, object] | None:
    """Return what of a GPU the figures depend on; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
    }


def describe(device: torch.device) -> dict[str, object]:
    """Return machine, versions and date of a run, ready for JSON."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "device": str(device),
        "device_name": device_name(device),
        "gpu": gpu(device),
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "agr_cuda_backends": our_backends(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }

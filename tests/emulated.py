"""The CUDA backend without a GPU: its kernels' source, compiled for the host, on parameters in the host's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from building import ROOT, built_module

FLAGS = [
    *("-std=c++17", "-O2", "-pthread", "-Wno-unknown-pragmas"),
    *("-fno-math-errno", "-ffp-contract=fast", "-DAGR_BLOCK_THREADS=4", "-DAGR_WARP_THREADS=2"),
]
# The device contracts a product and a sum into one operation; a host that can shall do so too.
if "fma" in Path("/proc/cpuinfo").read_text().split():
    FLAGS.append("-mfma")


def launcher() -> Any:
    """A capsule for agr_cuda.cuda.rehearsal; compiled when it is first asked for, and again when a source changes."""
    files = ["tests/emulation/module.cpp", "tests/emulation/host_launcher.cpp"]
    sources = [ROOT / "csrc", ROOT / "tests/emulation"]
    return built_module("emulation/host_launcher", FLAGS, files, sources).launcher

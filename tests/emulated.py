"""The CUDA backend without a GPU: its kernels' source, compiled for the host, on parameters in the host's memory."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).parent.parent
SOURCES = ("tests/emulation/module.cpp", "tests/emulation/host_launcher.cpp")
FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
    *("-fno-math-errno", "-ffp-contract=fast", "-DAGR_BLOCK_THREADS=4", "-DAGR_WARP_THREADS=2"),
]
# The device contracts a product and a sum into one operation; a host that can shall do so too.
if "fma" in Path("/proc/cpuinfo").read_text().split():
    FLAGS.append("-mfma")


def launcher() -> Any:
    """A capsule for agr_cuda.cuda.rehearsal; compiled when it is first asked for, and again when a source changes."""
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *(f"-I{path}" for path in includes), *SOURCES]
    read = sorted(p for folder in ("csrc", "tests/emulation") for p in (ROOT / folder).rglob("*") if p.is_file())
    digest = hashlib.sha256("\0".join([*command, sys.version]).encode())
    for path in read:
        digest.update(path.read_bytes())
    built = ROOT / "build" / "emulation" / digest.hexdigest()[:16] / "host_launcher.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", unfinished], cwd=ROOT, check=True)
        unfinished.replace(built)
    spec = importlib.util.spec_from_file_location("host_launcher", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.launcher

"""The kernels' PTX, as nvcc compiles it with the flags of setup.py, and the launcher that executes it."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any
from unittest import mock

from building import ROOT, built, built_module


@functools.cache
def setup_py() -> Any:
    """setup.py as a module, which builds nothing."""
    spec = importlib.util.spec_from_file_location("agr_cuda_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


#: Architectures whose PTX all machine code is made from.
OLDEST, NEWEST = setup_py().PTX_ARCHITECTURES


@functools.cache
def nvcc() -> str | None:
    """Where nvcc is, even if the CUDA backend has been left out of the installation."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which(os.path.join(home, "bin", "nvcc")) if home else None)


@functools.cache
def kernels(architecture: str) -> dict[str, str]:
    """PTX by the names of optimizer and unit (see format.h), such as adamw_float32; `upload` is the upload kernel's."""
    compiler, setup = nvcc(), setup_py()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = [flag for flag in setup.NVCCFLAGS if not flag.startswith(("-Xfatbin", "-Xcompiler"))]
    command = [compiler, *shlex.split(" ".join(flags)), f"-arch=compute_{architecture}", "-ptx"]
    jobs = {"upload": ["csrc/cuda/upload.cu"]}
    for family, unit in setup.cuda_kernels():
        jobs[f"{family}_{unit}"] = ["csrc/cuda/kernels.cu", f"-DAGR_FAMILY={family}", f"-DAGR_UNIT={unit}"]

    def compile_one(name: str) -> str:
        file = f"ptx/{name}_{architecture}.ptx"
        return built(file, [*command, *jobs[name]], [ROOT / "csrc"], version).read_text()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


def chosen_launcher() -> Any:
    """A capsule with the launcher if the environment asks for it, else None.

    AGR_PTX is the architecture whose PTX is executed in place of the kernels' source: oldest, newest or a number.
    AGR_PTX_SEED, 1 by default, chooses the interleavings, the grid, and the error of what hardware approximates.
    """
    asked = os.environ.get("AGR_PTX")
    if not asked:
        return None
    module = load(kernels({"oldest": OLDEST, "newest": NEWEST}.get(asked, asked)))
    seed = int(os.environ.get("AGR_PTX_SEED", "1"))
    module.configure(
        seed=seed << 16, multiprocessors=1 + seed % 5, blocks_each=1 + seed % 2, approximation_error=seed % 3
    )
    return module.launcher


@functools.cache
def launcher() -> ModuleType:
    """The module of launcher.cpp: `launcher` is the capsule for agr_cuda.cuda.rehearsal."""
    # PTX is rounded where it says so, and nowhere else.
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off"]
    sources = [ROOT / "csrc", *(ROOT / "tests/ptx").glob("*.h"), *(ROOT / "tests/ptx").glob("*.cpp")]
    return built_module("ptx/ptx_launcher", flags, ["tests/ptx/launcher.cpp"], sources)


def load(kernels: dict[str, str]) -> ModuleType:
    """Have the launcher execute these from now on."""
    module = launcher()
    module.load(list(kernels.values()))
    return module

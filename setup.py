"""Builds the native core, agr_cuda._C, with ninja.

It needs a C++17 compiler, pybind11 and ninja, and neither PyTorch nor its headers: addresses are read off the tensors
when the program runs, so that one build serves every PyTorch version. What cannot be built here is left out, and a line
says so.

Environment: CXX names the C++ compiler, CXXFLAGS adds to its options.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer, escape_path
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

CORE = ["plan.cpp", "cpu/executor.cpp", "cpu/pool.cpp", "cpu/instruction_set.cpp"]
PYTHON = ["module.cpp", "python/tensor_reader.cpp", "python/watch.cpp"]

# cpu/kernels.cpp is compiled once for each of these; cpu/instruction_set.cpp chooses among them when the program runs.
INSTRUCTION_SETS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
    }

CXXFLAGS = [
    *("-std=c++17", "-O3", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden"),
    # errno is nobody's business after sqrt; everything else keeps to IEEE 754, in which inf and NaN propagate.
    *("-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra"),
]
# Vectors are passed between inlined functions alone, so that their calling convention does not matter; and GCC takes
# its own intrinsics' undefined values for mistakes (GCC bug 105593).
KERNEL_CXXFLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized"]


def left_out() -> str:
    """Return why this build leaves out the CUDA backend."""
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (cuda_home and shutil.which(os.path.join(cuda_home, "bin", "nvcc")))
    if nvcc:
        return "its kernels are not part of this version of agr-cuda"
    return "nvcc was not found when agr-cuda was built: put it on PATH or set CUDA_HOME, and install again"


class BuildWithNinja(build_ext):
    """Writes a build.ninja beside the objects and runs it: parallel, and incremental where the folder is kept."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for made in (folder, target.parent):
            made.mkdir(parents=True, exist_ok=True)
        reason = left_out()
        print(
            f"agr-cuda: building the CPU backend ({', '.join(INSTRUCTION_SETS)}); left out: cuda, because {reason}",
            file=sys.stderr,
        )
        with (folder / "build.ninja").open("w") as file:
            self.write_rules(Writer(file, width=120), target, reason)
        jobs = ["-j", str(self.parallel)] if isinstance(self.parallel, int) else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder, *jobs], check=True)

    def write_rules(self, build: Writer, target: Path, reason: str) -> None:
        """Write what is made of what."""
        includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
        flags = [*CXXFLAGS, *(f"-isystem {shlex.quote(path)}" for path in dict.fromkeys(includes))]
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        build.variable("cxx", os.environ.get("CXX", "c++"))
        build.variable("cxxflags", " ".join([*flags, os.environ.get("CXXFLAGS", "")]))
        build.rule("cxx", "$cxx -MD -MF $out.d $cxxflags $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        build.rule("link", f"$cxx {shared} -pthread $in -o $out")

        objects = []

        def compile_source(source: str, name: str, flags: str = "") -> None:
            objects.append(f"{name}.o")
            build.build(f"{name}.o", "cxx", escape_path(str(CSRC / source)), variables={"flags": flags})

        for source in CORE:
            compile_source(source, source.replace("/", "_"))
        for source in PYTHON:
            compile_source(source, source.replace("/", "_"), "-DAGR_LEFT_OUT=" + shlex.quote(f'"{reason}"'))
        for name, options in INSTRUCTION_SETS.items():
            kernel_flags = [options, f"-DAGR_KERNELS={name}_kernels", *KERNEL_CXXFLAGS]
            compile_source("cpu/kernels.cpp", f"kernels_{name}", " ".join(kernel_flags))
        build.build(escape_path(str(target)), "link", objects)


setup(ext_modules=[Extension("agr_cuda._C", [])], cmdclass={"build_ext": BuildWithNinja})

"""Build the native core, agr_cuda._C, with ninja.

The build needs a C++17 compiler, pybind11 and ninja, but neither PyTorch nor its headers: the extension reads tensors'
addresses at run time, so one build works with every PyTorch version. If nvcc is found, the CUDA backend is built too,
with the CUDA runtime linked statically. Otherwise it is left out, and a message says so.

Environment variables:
    CXX: the C++ compiler.
    CXXFLAGS: further options for it.
    CUDA_HOME: the CUDA toolkit's folder, if nvcc is not on PATH.
    AGR_CUDA_ARCHS: the architectures to compile for, such as "90" or "80;90;100", or "none" to leave the CUDA backend
        out. The default is the architectures of this machine's GPUs or, if it has none, DEFAULT_ARCHITECTURES. PTX is
        added for the newest of them, and later GPUs compile it when they load it.
"""

import os
import platform
import re
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

CORE = ["plan.cpp", "cpu/executor.cpp", "cpu/pool.cpp", "cpu/instruction_set.cpp", "cuda/executor.cpp"]
# One unit of all of these: each unit that includes pybind11 compiles hundreds of its functions, most of the work.
PYTHON = [
    "module.cpp",
    *("python/tensor_reader.cpp", "python/watch.cpp", "python/gradient_watch.cpp", "python/rows.cpp"),
    *("python/cpu_executor.cpp", "python/cuda_executor.cpp"),
]

PYTHON_UNIT = "python.cpp"  # in the build's folder

# cpu/kernels.cpp is compiled once for each of these; cpu/instruction_set.cpp chooses one of them at run time.
INSTRUCTION_SETS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": "-mavx2 -mfma -mf16c",
        # With -march=native in CXXFLAGS, GCC would prefer vectors of 32 bytes and make ours of single elements: sums of
        # what is in the cache would take 6 to 12 times as long.
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
    }

CXXFLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden"),
    # Nothing reads errno after sqrt. All other arithmetic follows IEEE 754, so that inf and NaN propagate.
    *("-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra"),
]
# -O3: without it, some kernels take a third longer. Elsewhere it only takes longer to compile.
# -Wno-psabi: vectors are passed only between inlined functions, so their calling convention does not matter.
# -Wno-maybe-uninitialized: GCC warns about the undefined values in its own intrinsics (GCC bug 105593).
KERNEL_CXXFLAGS = ["-O3", "-Wno-psabi", "-Wno-maybe-uninitialized"]


NO_COMPILER = (
    "agr-cuda's kernels are C++, and the C++ compiler {0} was not found. Install one that knows C++17 (GCC 9, Clang 10 "
    "or later; on Debian and Ubuntu: apt install g++), or name yours by the environment variable CXX"
)
NO_NVCC = "nvcc was not found when agr-cuda was built: put it on PATH or set CUDA_HOME, and install again"
NOT_WANTED = "AGR_CUDA_ARCHS was none when agr-cuda was built: install again without it"

DEFAULT_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
# Those whose PTX is compiled: the source distinguishes no others (intrinsics.h). Every GPU's machine code is made from
# the PTX of the latest that it has, so that the half of the work that leads to PTX is done twice, not six times, and
# the tests that execute PTX execute what all machine code is made from.
PTX_ARCHITECTURES = ["80", "90"]
OLDEST_ARCHITECTURE = 80  # the first with bfloat16 conversions and cache policies
LATEST_ARCHITECTURE = 199  # leaves room for future architectures, but refuses 900, a misspelling of 9.0


def cuda_kernels() -> list[tuple[str, str]]:
    """Return the families of rules and the units, for each of which cuda/kernels.cu is compiled once, in parallel."""
    units = re.findall(r"^using (\w+)\s*=\s*FormatList<", (CSRC / "cuda/format.h").read_text(), re.MULTILINE)
    return [
        *((family, unit) for family in ("adamw", "adan") for unit in units if unit != "gradients"),
        ("regularize", "gradients"),
    ]


NVCCFLAGS = [
    # For a profile with lines of the source, set NVCC_APPEND_FLAGS=-lineinfo: by default they would take two thirds of
    # what is installed.
    *("-std=c++17", "-O3", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    # Products and sums are fused only where the source says so (multiply_add in numeric.h).
    "-fmad=false",
    # Division and square root of float32 are accurate to two units in the last place over the full range; inf, NaN and
    # denormal numbers are handled as without these options, unlike with -use_fast_math.
    *("-prec-div=false", "-prec-sqrt=false", "-ftz=false"),
]


def unwanted() -> bool:
    """Return whether the CUDA backend is to be left out even if nvcc is found."""
    return os.environ.get("AGR_CUDA_ARCHS", "").strip().lower() == "none"


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None if it is not found or the CUDA backend is to be left out."""
    if unwanted():
        return None
    cuda_home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which(os.path.join(cuda_home, "bin", "nvcc")) if cuda_home else None)


def architectures() -> list[str]:
    """Return the architectures to compile for, in ascending order."""
    asked = os.environ.get("AGR_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
    found = []
    for name in asked.split(";"):
        name = name.strip()
        if not name:
            continue
        number = name.replace(".", "")
        # 90a and 120f are refused too: no kernel uses their special features, and no later GPU can use their PTX.
        spelled = re.fullmatch(r"[1-9][0-9]*(\.[0-9])?", name) is not None
        if not spelled or not OLDEST_ARCHITECTURE <= int(number) <= LATEST_ARCHITECTURE:
            sys.exit(
                f"AGR_CUDA_ARCHS names the architecture {name!r}; allowed are numbers from {OLDEST_ARCHITECTURE} to "
                f'{LATEST_ARCHITECTURE} without a letter, such as "90", "8.6" or "80;90", or none'
            )
        found.append(number)
    if not found:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            said = ""
        found = [line.strip().replace(".", "") for line in said.splitlines()]
        found = [name for name in found if name.isdigit() and int(name) >= OLDEST_ARCHITECTURE]
    return sorted(set(found or DEFAULT_ARCHITECTURES), key=int)


def ptx_architecture(name: str) -> str:
    """Return the architecture from whose PTX an architecture's machine code is made."""
    return max((ptx for ptx in PTX_ARCHITECTURES if int(ptx) <= int(name)), key=int)


def write_unit(path: Path, sources: list[str]) -> None:
    """Write a unit of several sources, unless it is there."""
    text = "".join(f'#include "{CSRC / source}"\n' for source in sources)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildWithNinja(build_ext):
    """Write a build.ninja beside the objects and run it: in parallel, and incrementally if the folder is kept."""

    def build_extension(self, ext: Extension) -> None:
        """Build the extension."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable installation is made anew after every change of a source: its objects stay in the checkout.
        folder = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        for made in (folder, target.parent):
            made.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or "c++"
        if shutil.which(shlex.split(compiler)[0]) is None:
            sys.exit(NO_COMPILER.format(compiler))
        nvcc = find_nvcc()
        chosen = architectures() if nvcc else []
        reason = "" if nvcc else NOT_WANTED if unwanted() else NO_NVCC
        cpu = f"agr-cuda: building the CPU backend ({', '.join(INSTRUCTION_SETS)})"
        if nvcc:
            ptx = ptx_architecture(chosen[-1])
            print(f"{cpu} and the CUDA backend ({', '.join(chosen)}, PTX of {ptx})", file=sys.stderr)
        else:
            print(f"{cpu}; left out: cuda, because {reason}", file=sys.stderr)
        with (folder / "build.ninja").open("w") as file:
            self.write_rules(Writer(file, width=120), target, nvcc, chosen, reason)
        write_unit(folder / PYTHON_UNIT, PYTHON)
        jobs = ["-j", str(self.parallel)] if isinstance(self.parallel, int) else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder, *jobs], check=True)

    def write_rules(self, build: Writer, target: Path, nvcc: str | None, chosen: list[str], reason: str) -> None:
        """Write the rules and dependencies of the build.

        Args:
            build: the writer of build.ninja.
            target: the path of the extension.
            nvcc: the path of nvcc, or None to leave the CUDA backend out.
            chosen: the architectures for nvcc.
            reason: why the CUDA backend is left out, or an empty string.
        """
        includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
        flags = [*CXXFLAGS, *(f"-isystem {shlex.quote(path)}" for path in dict.fromkeys(includes))]
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        build.variable("cxx", os.environ.get("CXX") or "c++")
        build.variable("cxxflags", " ".join(flags))
        build.variable("asked", os.environ.get("CXXFLAGS", ""))
        build.rule("cxx", "$cxx -MD -MF $out.d $cxxflags $flags $asked -c $in -o $out", depfile="$out.d", deps="gcc")
        # nvcc links because it knows the path of the static CUDA runtime.
        link = "$nvcc -shared --cudart=static -Xcompiler=-pthread" if nvcc else f"$cxx {shared} -pthread"
        if sys.platform == "linux":
            # Debug information, from which sanitizers and profilers name lines, is large, and for who develops this.
            option = "--compress-debug-sections=zlib" if self.editable_mode else "--strip-all"
            link += f" {'-Xlinker=' if nvcc else '-Wl,'}{option}"
        # dlsym, where it is not in the C library itself.
        build.rule("link", f"{link} $in -ldl -o $out")

        objects = []

        def compile_source(source: str, name: str, flags: str = "") -> None:
            objects.append(f"{name}.o")
            build.build(f"{name}.o", "cxx", escape_path(str(CSRC / source)), variables={"flags": flags})

        for source in CORE:
            compile_source(source, source.replace("/", "_"))
        about_cuda = "-DAGR_LEFT_OUT=" + shlex.quote(f'"{reason}"')
        if nvcc:
            about_cuda += " -DAGR_CUDA_ARCHITECTURES=" + shlex.quote(f'"{" ".join(chosen)}"')
        objects.append("python.o")
        build.build("python.o", "cxx", PYTHON_UNIT, variables={"flags": about_cuda})
        for name, options in INSTRUCTION_SETS.items():
            kernel_flags = [options, f"-DAGR_KERNELS={name}_kernels", *KERNEL_CXXFLAGS]
            compile_source("cpu/kernels.cpp", f"kernels_{name}", " ".join(kernel_flags))
        if nvcc:
            objects.extend(self.write_kernels(build, nvcc, chosen))
        build.build(escape_path(str(target)), "link", objects)

    def write_kernels(self, build: Writer, nvcc: str, chosen: list[str]) -> list[str]:
        """Write the rules by which nvcc compiles the kernels, and return the names of the object files."""
        made: dict[str, list[str]] = {}  # machine code by the PTX that it is made from
        for name in chosen:
            made.setdefault(ptx_architecture(name), []).append(f"sm_{name}")
        latest = ptx_architecture(chosen[-1])
        made[latest].append(f"compute_{latest}")
        code = [shlex.quote(f"-gencode=arch=compute_{ptx},code=[{','.join(of)}]") for ptx, of in made.items()]
        host_compiler = os.environ.get("CXX")
        build.variable("nvcc", shlex.quote(nvcc) + (f" -ccbin {shlex.quote(host_compiler)}" if host_compiler else ""))
        build.variable("nvccflags", " ".join([*NVCCFLAGS, *code]))
        build.rule("nvcc", "$nvcc -MD -MF $out.d $nvccflags $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        objects = []
        for source, name in (("cuda/launcher.cpp", "cuda_launcher.o"), ("cuda/upload.cu", "cuda_upload.o")):
            objects.append(name)
            build.build(name, "nvcc", escape_path(str(CSRC / source)))
        for family, unit in cuda_kernels():
            objects.append(f"cuda_{family}_{unit}.o")
            flags = f"-DAGR_FAMILY={family} -DAGR_UNIT={unit}"
            build.build(objects[-1], "nvcc", escape_path(str(CSRC / "cuda/kernels.cu")), variables={"flags": flags})
        return objects


setup(ext_modules=[Extension("agr_cuda._C", [])], cmdclass={"build_ext": BuildWithNinja})

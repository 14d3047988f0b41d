"""The native core's own test programs, in tests/native and tests/emulation, built with and without sanitizers."""

import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["csrc/plan.cpp", "csrc/cpu/executor.cpp", "csrc/cpu/pool.cpp", "csrc/cpu/instruction_set.cpp"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-math-errno", "-ffp-contract=fast"]
OPENMP = "tests/native/openmp/parallel.cpp"
KERNEL_FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
SANITIZERS = {
    "plain": [],
    "address-and-undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    }


# The CUDA executor, and its kernels' source for threads of the host: blocks of 8 threads in warps of 4.
CUDA_SOURCES = ["csrc/plan.cpp", "csrc/cuda/executor.cpp"]
CUDA_PROGRAM = ["tests/emulation/test_cuda.cpp", "tests/emulation/host_launcher.cpp"]
CUDA_FLAGS = ["-DAGR_SAME_TYPES", "-DAGR_BLOCK_THREADS=8", "-DAGR_WARP_THREADS=4", "-Wno-unknown-pragmas"]
# The device contracts a product and a sum into one operation; a host that can shall do so too.
CPU_INFO = Path("/proc/cpuinfo")
if CPU_INFO.exists() and "fma" in CPU_INFO.read_text().split():
    CUDA_FLAGS.append("-mfma")


@pytest.fixture(scope="module", params=SANITIZERS)
def programs(request, tmp_path_factory):
    """The test programs, compiled for one sanitizer: the folder in which they are."""
    folder = tmp_path_factory.mktemp(request.param)
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *SANITIZERS[request.param]]
    commands = []
    objects = {"test_core": [], "test_cuda": []}

    def compile_source(program, source, name, *flags):
        objects[program].append(folder / f"{program}_{name}.o")
        commands.append([*compiler, *flags, "-c", source, "-o", objects[program][-1]])

    for source in (*CUDA_PROGRAM, *CUDA_SOURCES):
        compile_source("test_cuda", source, Path(source).stem, *CUDA_FLAGS)
    for source in (*SOURCES, *sorted((ROOT / "tests/native").glob("*.cpp"))):
        compile_source("test_core", source, Path(source).stem)
    for name, options in INSTRUCTION_SETS.items():
        macros = [f"-DAGR_KERNELS={name}_kernels", *KERNEL_FLAGS, *options]
        compile_source("test_core", "csrc/cpu/kernels.cpp", name, *macros)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for done in pool.map(partial(subprocess.run, cwd=ROOT, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr
    # The same program again, where the executor finds an OpenMP runtime.
    objects["test_core_openmp"] = [*objects["test_core"], OPENMP, "-rdynamic"]
    for program, parts in objects.items():
        subprocess.run([*compiler, *parts, "-ldl", "-o", folder / program], check=True, cwd=ROOT)
    return folder


def run(program, models, **environment):
    done = subprocess.run([program, models], env={**os.environ, **environment}, capture_output=True, text=True)
    return done, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_cuda_kernels_agree_with_the_equations_on_threads_of_the_host(programs):
    done, said = run(programs / "test_cuda", "9" if "plain" in programs.name else "3")
    assert done.returncode == 0, said
    assert "cuda: " in done.stdout
    assert " 0 failures" in done.stdout


def test_the_executor_runs_on_openmps_threads(programs):
    done, said = run(programs / "test_core_openmp", "6", TSAN_OPTIONS="die_after_fork=0")
    assert done.returncode == 0, said
    assert " 0 failures" in done.stdout
    (regions,) = re.findall(r"OpenMP: (\d+) regions", done.stdout)
    assert int(regions) > 100, "of the program itself: its children have none"


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_plan_and_executor_agree_with_the_equations(programs, instruction_set):
    models = "25" if "plain" in programs.name else "6"  # a sanitizer slows it ten times
    # ThreadSanitizer otherwise refuses the test of a step in a child process.
    done, said = run(programs / "test_core", models, AGR_CPU_ISA=instruction_set, TSAN_OPTIONS="die_after_fork=0")
    if f"AGR_CPU_ISA is '{instruction_set}'" in done.stderr:
        pytest.skip("this processor does not run it")  # an older one than the build's widest instruction set
    assert done.returncode == 0, said
    assert f"{instruction_set}: " in done.stdout
    assert " 0 failures" in done.stdout


def test_an_instruction_set_that_is_not_there_is_refused():
    command = [sys.executable, "-c", "import agr_cuda._C as c; c.instruction_set()"]
    done = subprocess.run(command, env={**os.environ, "AGR_CPU_ISA": "mmx"}, capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert "AGR_CPU_ISA is 'mmx'" in done.stderr
    assert "portable" in done.stderr

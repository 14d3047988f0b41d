"""The native core's own test program, in tests/native, built with and without sanitizers."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["csrc/plan.cpp", "csrc/cpu/executor.cpp", "csrc/cpu/pool.cpp", "csrc/cpu/instruction_set.cpp"]
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-math-errno", "-ffp-contract=fast"]
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


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = FLAGS + SANITIZERS[request.param]
    commands = [
        [*compiler, *flags, "-c", source, "-o", folder / f"{Path(source).stem}.o"]
        for source in [*SOURCES, *sorted((ROOT / "tests/native").glob("*.cpp"))]
    ]
    for name, options in INSTRUCTION_SETS.items():
        kernels = ["-c", "csrc/cpu/kernels.cpp", f"-DAGR_KERNELS={name}_kernels", "-o", folder / f"{name}.o"]
        commands.append([*compiler, *flags, *KERNEL_FLAGS, *options, *kernels])
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    built = folder / "test_core"
    subprocess.run([*compiler, *flags, *sorted(folder.glob("*.o")), "-o", built], check=True)
    return built


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_plan_and_executor_agree_with_the_equations(program, instruction_set):
    # ThreadSanitizer otherwise refuses the test of a step in a child process.
    environment = {**os.environ, "AGR_CPU_ISA": instruction_set, "TSAN_OPTIONS": "die_after_fork=0"}
    models = "25" if "plain" in str(program) else "6"  # a sanitizer slows it ten times
    done = subprocess.run([program, models], env=environment, capture_output=True, text=True)
    if f"AGR_CPU_ISA is '{instruction_set}'" in done.stderr:
        pytest.skip("this processor does not run it")  # an older one than the build's widest instruction set
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{instruction_set}: " in done.stdout
    assert " 0 failures" in done.stdout


def test_an_instruction_set_that_is_not_there_is_refused():
    command = [sys.executable, "-c", "import agr_cuda._C as c; c.instruction_set()"]
    done = subprocess.run(command, env={**os.environ, "AGR_CPU_ISA": "mmx"}, capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert "AGR_CPU_ISA is 'mmx'" in done.stderr
    assert "portable" in done.stderr

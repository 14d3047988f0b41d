"""Which architectures setup.py compiles the CUDA kernels for, and what it refuses; nothing is compiled."""

import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ninja.ninja_syntax import Writer

ROOT = Path(__file__).parent.parent
# PTX of the first serves no later GPU; and nvcc knows none of the second.
SUFFIXED = ["90a", "9.0a", "120f"]
ODD = ["900", "090", "8.6.0", "8.60", "9.", ".90", "1000"]
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, on a machine without a GPU."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("AGR_CUDA_ARCHS", raising=False)
    spec = importlib.util.spec_from_file_location("agr_cuda_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    has_gpus(module, FileNotFoundError("nvidia-smi"))
    return module


def has_gpus(module, answer):
    """Let nvidia-smi print `answer`, or let it fail with that."""

    def run(command, **_):
        assert command[0] == "nvidia-smi"
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    module.subprocess = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("90", ["90"]),
        ("80;90;100", ["80", "90", "100"]),
        ("80,90,100", ["80", "90", "100"]),
        ("80 90 100", ["80", "90", "100"]),
        (" 120 ;; 80, 90 ", ["80", "90", "120"]),
        ("90;80;90", ["80", "90"]),
        ("9.0;8.6", ["86", "90"]),
        ("10.0 12.1", ["100", "121"]),
    ],
)
def test_architectures_are_taken_in_any_usual_spelling_and_sorted(setup_py, monkeypatch, asked, expected):
    has_gpus(setup_py, "8.9\n")
    monkeypatch.setenv("AGR_CUDA_ARCHS", asked)
    assert setup_py.architectures() == expected


@pytest.mark.parametrize("wrong", ["banana", "70", "75", "9", "sm_90", "-90", "90x", "a", "0x5a", *SUFFIXED, *ODD])
@pytest.mark.parametrize("asked", ["{}", "90;{}", "{} 90"])
def test_what_is_no_architecture_is_named_with_what_is_allowed(setup_py, monkeypatch, asked, wrong):
    monkeypatch.setenv("AGR_CUDA_ARCHS", asked.format(wrong))
    with pytest.raises(SystemExit) as refused:
        setup_py.architectures()
    assert f"AGR_CUDA_ARCHS names the architecture {wrong!r}" in refused.value.code
    assert "allowed are numbers from 80 to 199" in refused.value.code


@pytest.mark.parametrize("asked", ["none", " None "])
def test_cuda_can_be_left_out_where_there_is_an_nvcc(setup_py, monkeypatch, tmp_path, asked):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_py.find_nvcc() == str(nvcc)
    monkeypatch.setenv("AGR_CUDA_ARCHS", asked)
    assert setup_py.find_nvcc() is None
    file = io.StringIO()
    build = setup_py.BuildWithNinja
    build.write_rules(
        SimpleNamespace(editable_mode=False),
        Writer(file, width=10_000),
        tmp_path / "_C.so",
        None,
        [],
        setup_py.NOT_WANTED,
    )
    assert "install again without it" in file.getvalue()
    assert "nvcc" not in file.getvalue()


@pytest.mark.parametrize("asked", [None, "", " ", ";", ", ;"])
@pytest.mark.parametrize(
    "answer",
    [
        FileNotFoundError("nvidia-smi"),
        PermissionError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 60),
        "",
        "No devices were found\n",
        NO_DRIVER,
        "[N/A]\n",
        "7.0\n",
    ],
    ids=str,
)
def test_without_a_gpu_all_default_architectures_are_compiled(setup_py, monkeypatch, asked, answer):
    has_gpus(setup_py, answer)
    if asked is not None:
        monkeypatch.setenv("AGR_CUDA_ARCHS", asked)
    assert setup_py.architectures() == ["80", "86", "89", "90", "100", "120"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("9.0\n", ["90"]), ("9.0\n9.0\n8.6\n", ["86", "90"]), ("10.0\n8.0\n", ["80", "100"]), ("7.5\n12.0\n", ["120"])],
)
def test_with_gpus_only_theirs_are_compiled(setup_py, answer, expected):
    has_gpus(setup_py, answer)
    assert setup_py.architectures() == expected


def written(setup_py, chosen):
    """What the build.ninja says of the kernels, and the objects."""
    file = io.StringIO()
    objects = setup_py.BuildWithNinja.write_kernels(None, Writer(file, width=10_000), "/some/nvcc", chosen)
    return file.getvalue(), objects


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["90"], {"90": "sm_90,compute_90"}),
        (["80"], {"80": "sm_80,compute_80"}),
        (["89"], {"80": "sm_89,compute_80"}),
        (["80", "90", "100"], {"80": "sm_80", "90": "sm_90,sm_100,compute_90"}),
        (
            ["80", "86", "89", "90", "100", "120"],
            {"80": "sm_80,sm_86,sm_89", "90": "sm_90,sm_100,sm_120,compute_90"},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_machine_code_is_made_for_all_and_ptx_for_the_newest(setup_py, chosen, expected):
    """Each GPU's code from the PTX of the latest architecture that it has."""
    text, _ = written(setup_py, chosen)
    (flags,) = [line for line in text.splitlines() if line.startswith("nvccflags = ")]
    codes = [flag.removeprefix("-gencode=") for flag in shlex.split(flags) if flag.startswith("-gencode=")]
    assert codes == [f"arch=compute_{ptx},code=[{of}]" for ptx, of in expected.items()]


def test_every_family_and_unit_has_its_object(setup_py):
    text, objects = written(setup_py, ["90"])
    declared = (ROOT / "csrc/cuda/format.h").read_text()
    of_optimizers = re.search(r"using OptimizerUnits =\s+UnitList<([^;]*)>;", declared)
    units = re.findall(r"units::(\w+)", of_optimizers[1])
    assert len(set(objects)) == len(objects)
    kernels = [(family, unit) for family in ("adamw", "adan") for unit in units] + [("regularize", "gradients")]
    assert sorted(setup_py.cuda_kernels()) == sorted(kernels)
    for family, unit in kernels:
        assert f"cuda_{family}_{unit}.o" in objects
        assert text.count(f"-DAGR_FAMILY={family} -DAGR_UNIT={unit}\n") == 1


@pytest.mark.parametrize("wrong", ["banana", "70"])
def test_the_build_stops_before_it_compiles(tmp_path, wrong):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\ntouch $(dirname $0)/was-run\nexit 1\n")
    nvcc.chmod(0o755)
    path = os.pathsep.join([str(nvcc.parent), os.environ["PATH"]])
    folders = [f"--build-temp={tmp_path / 'temp'}", f"--build-lib={tmp_path / 'lib'}"]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "AGR_CUDA_ARCHS": f"90;{wrong}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert f"AGR_CUDA_ARCHS names the architecture '{wrong}'" in said
    assert "allowed are numbers from 80 to 199" in said
    assert not (nvcc.parent / "was-run").exists()
    assert not list((tmp_path / "temp").rglob("*"))
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_a_missing_compiler_is_named_with_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-compiler -O2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert "the C++ compiler no-such-compiler -O2 was not found" in said
    assert "GCC 9, Clang 10 or later" in said
    assert "Traceback" not in done.stderr

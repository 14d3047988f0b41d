"""What `pip install .` builds, in isolation and without PyTorch, and what it installs."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import agr_cuda

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A wheel built with pip's build isolation, and what the build printed; without nvcc."""
    folder = tmp_path_factory.mktemp("wheel")
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    # Not optimized: it compiles in half of the time, and nothing long is run.
    environment = {**os.environ, "PATH": path, "CUDA_HOME": str(folder), "CXXFLAGS": "-O0"}
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", folder, ROOT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(folder.glob("*.whl")), done.stdout + done.stderr


def test_only_the_package_is_installed(build):
    names = zipfile.ZipFile(build[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"agr_cuda"}
    for expected in ("py.typed", "_C.pyi", "optimizer.py", "triton_kernels/__init__.py"):
        assert f"agr_cuda/{expected}" in names
    assert any(name.startswith("agr_cuda/_C.") and name.endswith(".so") for name in names)


def test_the_metadata_name_what_it_needs(build):
    wheel = zipfile.ZipFile(build[0])
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    for line in ("Name: agr-cuda", "Requires-Python: >=3.10", "Requires-Dist: torch>=2.6", "License-Expression: MIT"):
        assert line in metadata
    # PyTorch brings the Triton that fits it, under names that differ.
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.6"]
    for extra in ("triton", "test", "bench", "examples"):
        assert f"Provides-Extra: {extra}" in metadata


def test_a_line_says_what_was_left_out(build):
    (line,) = [line for line in build[1].splitlines() if "left out: cuda" in line]
    assert "nvcc was not found" in line


def test_the_installed_package_works_and_says_what_it_lacks(build, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", build[0]]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    done = run("-c", "import agr_cuda; print(agr_cuda.__file__)")
    assert done.stdout.startswith(str(tmp_path / "site")), done.stderr
    report = run("-m", "agr_cuda")
    assert report.returncode == 0, report.stderr
    (cuda,) = [line for line in report.stdout.splitlines() if line.strip().startswith("cuda ")]
    assert "no: nvcc was not found" in cuda
    assert run("-c", "import triton_kernels").returncode != 0
    code = (
        "import torch, agr_cuda; p = torch.ones(9, requires_grad=True); p.sum().backward(); agr_cuda.AdamW([p]).step()"
    )
    assert run("-c", f"{code}; assert p[0] < 1").returncode == 0


def test_the_extension_has_no_debug_information(build, tmp_path):
    wheel = zipfile.ZipFile(build[0])
    (name,) = [name for name in wheel.namelist() if name.endswith(".so")]
    wheel.extract(name, tmp_path)
    sections = subprocess.run(
        ["readelf", "--section-headers", "--wide", tmp_path / name], capture_output=True, text=True
    )
    assert sections.returncode == 0, sections.stderr
    assert ".text" in sections.stdout
    assert ".debug" not in sections.stdout
    assert ".symtab" not in sections.stdout


def test_the_source_distribution_is_what_the_package_is_built_from(tmp_path):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.stat().st_size < 300_000
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = [ROOT / name for name in ("agr_cuda", "csrc", "triton_kernels")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    built_from = {str(x.relative_to(ROOT)) for x in files if x.suffix != ".so" and x.parent.name != "__pycache__"}
    assert len(built_from) > 60
    assert built_from <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not {name for name in names if name.split("/")[0] in ("tests", "bench", "docs", "examples")}


def test_every_place_says_the_same_version():
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1]
    assert agr_cuda.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_source_without_a_compiled_core_says_so(tmp_path):
    """Who calls `python -m agr_cuda` in a checkout, after `pip install .`, imports the source."""
    shutil.copytree(ROOT / "agr_cuda", tmp_path / "agr_cuda", ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    # An editable installation would hand out its core.
    plain = "import sys; sys.meta_path = [x for x in sys.meta_path if 'Editable' not in getattr(x, '__name__', '')]; "

    def run(code):
        command = [sys.executable, "-c", plain + code]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    report = run("import runpy; runpy.run_module('agr_cuda', run_name='__main__')")
    assert report.returncode == 1
    assert f"agr_cuda is imported from its source, {tmp_path / 'agr_cuda'}, which has no compiled core" in report.stdout
    step = "p = torch.ones(9, requires_grad=True); p.sum().backward(); agr_cuda.AdamW([p]).step()"
    done = run(f"import torch, agr_cuda; {step}")
    assert done.returncode == 0, done.stderr
    assert "no kernels are there for it" in done.stderr
    assert "change to another folder" in done.stderr

"""Programs that tests build for themselves: kept under build/ for as long as nothing that they are made of changes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parent.parent


def built(name: str, command: Sequence[str], sources: Iterable[Path], version: str = "") -> Path:
    """The file that a compiler writes to -o, made by `command` unless that has been run on the same sources.

    Args:
        name: of the file, with its folder under build/.
        command: is run in the project's folder.
        sources: all that the compiler may read, files or folders of files.
        version: of the compiler or whatever else decides what comes out.
    """
    digest = hashlib.sha256("\0".join([*command, version]).encode())
    for path in sorted(file for source in sources for file in (source.rglob("*") if source.is_dir() else [source])):
        if path.is_file():
            digest.update(path.read_bytes())
    folder, _, file = name.rpartition("/")
    made = ROOT / "build" / folder / digest.hexdigest()[:16] / file
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, check=True)
        unfinished.replace(made)
    return made


def built_module(name: str, flags: Sequence[str], files: Sequence[str], sources: Iterable[Path]) -> ModuleType:
    """A Python module in C++, imported; `name` and `sources` as in `built`, `files` are compiled."""
    includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-fPIC", "-shared", "-fvisibility=hidden", *flags, *includes]
    path = built(f"{name}.so", [*command, *files], sources, version=sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

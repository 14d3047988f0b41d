"""Import the native core, agr_cuda._C, if it loads."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

_native: ModuleType | None
_error = ""
try:
    from . import _C as _native
except ImportError as error:
    _native = None
    _error = str(error)


def native() -> ModuleType:
    """Return the native core, or raise RuntimeError if it does not load."""
    if _native is None:
        raise RuntimeError(f"agr_cuda's native core does not load: {_error}")
    return _native


def why_missing() -> str | None:
    """Return why the native core does not load and how to fix that, or None if it loads."""
    if _native is not None:
        return None
    package = Path(__file__).parent
    compiled = any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    if not compiled and (package.parent / "csrc").is_dir():
        return (
            f"agr_cuda is imported from its source, {package}, which has no compiled core: change to another folder, "
            "where Python finds the installed package, or install with pip install -e ."
        )
    return f"agr_cuda's native core does not load ({_error}): install agr-cuda with a C++ compiler at hand"

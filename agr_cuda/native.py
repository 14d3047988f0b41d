"""Import the native core, agr_cuda._C, if it loads."""

from __future__ import annotations

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
    return f"agr_cuda's native core does not load ({_error}): install agr-cuda with a C++ compiler at hand"

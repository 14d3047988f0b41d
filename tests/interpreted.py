"""The Triton backend without a GPU: its kernels in Triton's interpreter, on parameters in the host's memory.

What is mended here of the interpreter is not so on a GPU: it cuts float32 off to bfloat16 instead of rounding it, and
keeps the program that it interprets in one place for all threads. And it prepares Triton's language anew for each call
of a function, which takes most of its time.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any

import numpy as np

# Read when triton is imported, which nothing does before this.
os.environ["TRITON_INTERPRET"] = "1"


def mend() -> None:
    """Mend the interpreter. Imports triton."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert_float(data: np.ndarray, have: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if have == tl.bfloat16 and wanted == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32)
        if have == tl.float32 and wanted == tl.bfloat16:
            bits = data.view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(data), np.uint32(0x7FC0), nearest).astype(np.uint16)
        return cut_off(data, have, wanted, rounding)

    interpreter._convert_float = convert_float
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )

    # It makes a dictionary of all types for every operation.
    numpy_dtypes = {
        dtype: interpreter._get_np_dtype(dtype)
        for dtype in (tl.int1, tl.int32, tl.int64, tl.uint64, tl.bfloat16, tl.float16, tl.float32, tl.float64)
    }
    address, any_dtype = np.dtype(np.uint64), interpreter._get_np_dtype

    def numpy_dtype(dtype: Any) -> np.dtype:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return address
        return numpy_dtypes.get(element) or any_dtype(dtype)

    interpreter._get_np_dtype = numpy_dtype

    prepare = interpreter._patch_lang
    prepared = set()

    class Nothing:
        def restore(self) -> None:
            """A process that comes here interprets all kernels."""

    def prepare_once(function: Any) -> Nothing:
        # By the names under which a function's module knows the language.
        names = frozenset(k for k, v in function.__globals__.items() if v is tl or v is tl.core)
        if names not in prepared:
            prepare(function)
            prepared.add(names)
        return Nothing()

    interpreter._patch_lang = prepare_once

    execute = interpreter.GridExecutor.__call__
    one_at_a_time = threading.RLock()

    def execute_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_at_a_time:
            return execute(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = execute_alone

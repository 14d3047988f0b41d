"""The cpu backend's threads are those of PyTorch's parallel regions, where these are OpenMP's."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch
from helpers import Method, all_params, parameters, run

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="counts the threads that Linux lists"),
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="PyTorch was built without OpenMP"),
]
LARGE = 1 << 18  # elements: worth several threads to PyTorch and to us


def test_a_step_starts_no_threads_of_its_own(threads: None, method: Method, generator) -> None:
    torch.set_num_threads(3)
    torch.ones(LARGE).add_(1)
    before = set(os.listdir("/proc/self/task"))
    optimizer = method.ours(parameters(generator, [(LARGE,), (LARGE // 2, 3)]), backend="cpu")
    run(optimizer, 3)
    torch.ones(LARGE).add_(1)
    assert set(os.listdir("/proc/self/task")) == before


def test_pytorchs_threads_keep_their_floating_point_mode(threads: None, method: Method, generator) -> None:
    """They compute in the caller's mode during a step, and in their own after it."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormal numbers")
    torch.set_num_threads(3)
    optimizer = method.ours(parameters(generator, [(LARGE,)]), backend="cpu")
    denormal = torch.full((LARGE,), 1e-40)
    assert torch.all((denormal * 0.5).view(torch.int32) != 0)
    torch.set_flush_denormal(True)
    try:
        run(optimizer, 1)
    finally:
        torch.set_flush_denormal(False)
    assert torch.all((denormal * 0.5).view(torch.int32) != 0)
    assert all(p.isfinite().all() for p in all_params(optimizer))

"""The cpu backend's threads are those of PyTorch's parallel regions, where these are OpenMP's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import Method, all_params, copies, parameters, run, same_bits

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="not tried elsewhere; and counts what Linux lists"),
    pytest.mark.skipif(
        "parallel backend: OpenMP" not in torch.__config__.parallel_info(), reason="PyTorch was built without OpenMP"
    ),
]
LARGE = 1 << 18  # elements: worth several threads to PyTorch and to us


def test_a_step_starts_no_threads_of_its_own(threads: None, method: Method, generator) -> None:
    torch.set_num_threads(3)
    torch.ones(LARGE).add_(1)
    before = set(os.listdir("/proc/self/task"))
    optimizer = method.ours(parameters(generator, [(LARGE,), (LARGE // 2, 3)]), backend="cpu")
    run(optimizer, 3)
    torch.ones(LARGE).add_(1)
    assert set(os.listdir("/proc/self/task")) <= before


def test_pytorchs_threads_keep_their_floating_point_mode() -> None:
    """They compute in the caller's mode during a step, and in their own after it.

    In a process of its own, since threads of PyTorch's inherit the mode of the test in which they were started.
    """
    program = """
import torch, agr_cuda
if torch.set_flush_denormal(False):
    torch.set_num_threads(3)
    denormal = torch.full((1 << 18,), 1e-40)
    assert torch.all((denormal * 0.5).view(torch.int32) != 0)
    p = torch.nn.Parameter(torch.ones(1 << 18))
    p.grad = torch.ones(1 << 18)
    optimizer = agr_cuda.AdamW([p], backend="cpu")
    torch.set_flush_denormal(True)
    optimizer.step()
    torch.set_flush_denormal(False)
    assert torch.all((denormal * 0.5).view(torch.int32) != 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_optimizers_that_step_at_once_do_as_one_after_the_other(threads: None, method: Method, generator) -> None:
    """Each thread has a parallel region of its own."""
    torch.set_num_threads(2)
    pairs = []
    for _ in range(2):
        alone = method.ours(parameters(generator, [(LARGE,), (LARGE, 2)]), backend="cpu")
        pairs.append((alone, method.ours(copies(all_params(alone)), backend="cpu")))
    for alone, _ in pairs:
        run(alone, 5)
    at_once = [threading.Thread(target=run, args=(optimizer, 5)) for _, optimizer in pairs]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    for alone, optimizer in pairs:
        assert all(same_bits(p, q) for p, q in zip(all_params(alone), all_params(optimizer), strict=True))


def test_a_child_of_a_fork_may_be_the_first_to_import_it() -> None:
    """Libgomp would wait in it for threads that the parent had."""
    program = """
import os, torch
torch.set_num_threads(2)
torch.ones(1 << 18).add_(1)
child = os.fork()
if child == 0:
    import agr_cuda
    several = [torch.nn.Parameter(torch.ones(30_000)) for _ in range(20)]  # of which PyTorch gives each one thread
    for p in several:
        p.grad = torch.ones(30_000)
    agr_cuda.AdamW(several, backend="cpu").step()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

"""A child of fork() may go on with an optimizer, whatever other threads were doing with it when it was forked."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from helpers import Method, all_params, assert_child_ends_well, copies, parameters, run, same_bits

import agr_cuda


@pytest.mark.parametrize("on_cpu", ["cpu", "reference"])  # no GPU's context outlives a fork
def test_a_child_forked_in_the_midst_of_a_step_steps_and_saves(on_cpu: str, method: Method, generator) -> None:
    """Another thread holds the lock that a step holds: it stands for a step that the fork came into."""
    optimizer = method.ours(parameters(generator, [(64, 33), (31,)]), backend=on_cpu)
    run(optimizer, 1)
    assert_child_ends_well([optimizer._lock], step_and_save, optimizer)
    run(optimizer, range(1, 3))


def step_and_save(optimizer: torch.optim.Optimizer) -> None:
    torch.set_num_threads(1)  # PyTorch's own threads are not there any more
    before = [p.detach().clone() for p in all_params(optimizer)]
    run(optimizer, range(1, 3))
    assert optimizer.state_dict()["state"][0]["exp_avg"].any()
    assert not any(torch.equal(p, q) for p, q in zip(all_params(optimizer), before, strict=True))


def test_children_forked_out_of_running_steps_go_on(method: Method, generator) -> None:
    """Again and again, wherever in a step that is: nothing of a launch that was cut off is waited for."""
    optimizer = method.ours(parameters(generator, [(300_000,), (31,)]), backend="cpu")
    run(optimizer, 1)
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            optimizer.step()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(2)
                    optimizer.step()
                    optimizer.state_dict()
                    os._exit(0)
                finally:
                    os._exit(1)
            deadline = time.monotonic() + 60
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.001)
            if ended == (0, 0):
                os.kill(child, 9)
                os.waitpid(child, 0)
            assert ended == (child, 0)
    finally:
        stop.set()
        thread.join()


def test_a_child_that_inherits_nothing_unfinished_keeps_what_was_planned(method: Method, generator) -> None:
    optimizer = method.ours(parameters(generator, [(64, 33)]), backend="cpu")
    twin = method.ours(copies(all_params(optimizer)), backend="cpu")
    run(optimizer, 1)
    run(twin, 2)
    planned = optimizer._plan
    child = os.fork()
    if child == 0:
        try:
            run(optimizer, range(1, 2))
            same = all(same_bits(p, q) for p, q in zip(all_params(optimizer), all_params(twin), strict=True))
            os._exit(0 if same and optimizer._plan is planned else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_an_optimizer_is_not_kept_alive_for_it(method: Method, generator) -> None:
    import gc
    import weakref

    optimizer = method.ours(parameters(generator, [(7,)]))
    there = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert there() is None
    assert agr_cuda.fork._live_optimizers is not None

"""Runs a function in several processes of one gloo process group."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0  # seconds


def _run(pipe: Any, rank: int, size: int, path: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
        # By value: multiprocessing would share tensors with a process that ends before they are read.
        answer = pickle.dumps((True, function(rank, *arguments)))
        pipe.send_bytes(answer)
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _answer_of(pipe: Any, process: Any, until: float) -> tuple[bool, Any]:
    """Return whether a process went well, and what it said."""
    ready = wait([pipe, process.sentinel], timeout=until - time.monotonic())
    if pipe.poll():
        fine, what = pickle.loads(pipe.recv_bytes())
        return fine, what
    return False, f"ended with {process.exitcode}" if ready else f"no answer in {TIMEOUT} s"


def in_processes(size: int, function: Callable[..., Any], *arguments: Any, killed: Collection[int] = ()) -> list[Any]:
    """Return what function(rank, *arguments) returns in each of `size` processes, which are forks of this one.

    Args:
        size: the number of processes.
        function: what they run.
        arguments: what they get besides their rank.
        killed: the ranks of those that kill themselves, and return nothing.

    Raises:
        AssertionError: with all tracebacks, if any other process raises, ends, or does not answer in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_run, args=(there, rank, size, f"{folder}/store", function, arguments))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + TIMEOUT
        said = [_answer_of(here, process, until) for (here, _), process in zip(pipes, processes, strict=True)]
        for process in processes:
            process.join(10)
            process.kill()
    failed = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(said) if not fine and rank not in killed]
    assert not failed, "\n".join(failed)
    return [what if fine else None for fine, what in said]

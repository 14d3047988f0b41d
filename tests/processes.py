"""Runs a function in several processes of one gloo process group, and looks at what they do there."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

TIMEOUT = 120.0  # seconds


@contextlib.contextmanager
def _forks_of_a_server() -> Iterator[Any]:
    """A way to start processes: as forks of one that has imported everything and has done nothing.

    A fork of this process might inherit a lock that another of its threads holds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rehearsed"])
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.13, the server does not look for modules where this process does.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield context


def _run(pipe: Any, rank: int, size: int, path: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    importlib.import_module("rehearsed")
    torch.set_num_threads(1)
    stuck = open(_stuck_at(path, rank), "w")  # noqa: SIM115 (for as long as the process lives)
    faulthandler.dump_traceback_later(TIMEOUT - 5, file=stuck)
    try:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
        # By value: multiprocessing would share tensors with a process that ends before they are read.
        answer = pickle.dumps((True, function(rank, *arguments)))
        pipe.send_bytes(answer)
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _stuck_at(path: str, rank: int) -> Path:
    """Return the file that tells where a process is shortly before the time is up."""
    return Path(f"{path}-{rank}")


def _answer_of(pipe: Any, process: Any, until: float) -> tuple[bool, Any]:
    """Return whether a process went well, and what it said."""
    ready = wait([pipe, process.sentinel], timeout=until - time.monotonic())
    if pipe.poll():
        fine, what = pickle.loads(pipe.recv_bytes())
        return fine, what
    return False, f"ended with {process.exitcode}" if ready else f"no answer in {TIMEOUT} s"


def in_processes(size: int, function: Callable[..., Any], *arguments: Any, killed: Collection[int] = ()) -> list[Any]:
    """Return what function(rank, *arguments) returns in each of `size` processes.

    Args:
        size: the number of processes.
        function: what they run, of a module.
        arguments: what they get besides their rank.
        killed: the ranks of those that kill themselves, and return nothing.

    Raises:
        AssertionError: with all tracebacks, if any other process raises, ends, or does not answer in time.
    """
    with tempfile.TemporaryDirectory() as folder, _forks_of_a_server() as context:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_run, args=(there, rank, size, f"{folder}/store", function, arguments))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + TIMEOUT
        said = [_answer_of(here, process, until) for (here, _), process in zip(pipes, processes, strict=True)]
        for rank, process in enumerate(processes):
            process.join(10)
            process.kill()
            fine, what = said[rank]
            if not fine:
                said[rank] = fine, f"{what}\n{_stuck_at(f'{folder}/store', rank).read_text()}"
    failed = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(said) if not fine and rank not in killed]
    assert not failed, "\n".join(failed)
    return [what if fine else None for fine, what in said]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, or all of a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(ours: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Return the largest difference, relative to a tensor's largest element."""
    pairs = [(whole(p.detach()), q.detach()) for p, q in zip(ours, expected, strict=True)]
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs)


class Counted:
    """Counts the all-reduces within it, and of how many numbers."""

    def __enter__(self) -> list[int]:
        self.sizes: list[int] = []
        self.real = dist.all_reduce

        def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self.real(tensor, *arguments, **options)

        dist.all_reduce = all_reduce
        return self.sizes

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.real

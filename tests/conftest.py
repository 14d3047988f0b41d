"""Fixtures: every test that takes `backend` runs once for each backend this machine can run."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

# OpenMP threads that wait by spinning take the core from those they wait for where others use the machine too:
# small operations are then a hundred times slower. Read when torch is loaded, so it comes before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import compiled
import emulated
import pytest
import torch
from helpers import METHODS, Method

import agr_cuda
import agr_cuda.cuda

collect_ignore = ["frameworks"]  # which have an environment and a command of their own: make frameworks

ON_GPU = torch.accelerator.is_available()
if not ON_GPU:
    import interpreted

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)


def device_of(backend: str) -> torch.device:
    """Where a backend's parameters are.

    Without a GPU, cuda runs its kernels' source on threads of the host, and triton is its interpreter: on the CPU.
    """
    on_gpu = ON_GPU and (backend == "triton" or (backend == "cuda" and not agr_cuda.cuda.rehearsing()))
    return torch.accelerator.current_accelerator() if on_gpu else torch.device("cpu")


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """The types that a backend takes."""
    return FLOATS + COMPLEX if backend == "reference" else FLOATS


def takes(backend: str, dtype: torch.dtype) -> bool:
    return dtype in dtypes_of(backend)


def interpreted_by_python(backend: str) -> bool:
    """Whether a step takes tens of milliseconds: every operation of a kernel is one of NumPy's, or several."""
    return backend == "triton" and not ON_GPU


def tested_dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The types with which every test runs. Where that would take too long, one of each width of arithmetic and state.

    The others have tests of their own.
    """
    return (torch.float32, torch.bfloat16) if interpreted_by_python(backend) else dtypes_of(backend)


def large_size(backend: str) -> int:
    """Elements of the largest tensor: many chunks for every backend. Those in an emulation are given fewer."""
    emulated = backend in ("cuda", "triton") and device_of(backend).type == "cpu"
    return 100_003 if emulated else 3_000_017


def thread_counts(backend: str) -> tuple[int, ...]:
    """Numbers of threads with which a backend gives the same bits.

    Any, but for the reference: it adds as PyTorch does, in an order that depends on the number of threads.
    """
    if interpreted_by_python(backend):
        return 1, 8
    return (2, 2, 2) if backend == "reference" else (1, 2, 3, 8, 2)


def on_backends(*cases: Any, every: int = 3) -> list[tuple[str, Any]]:
    """(backend, case) for the parameters of a test. Where a step takes tens of milliseconds, for some of the cases."""
    return [
        (backend, case)
        for backend in agr_cuda.available_backends()
        for index, case in enumerate(cases)
        if index % every == 0 or not interpreted_by_python(backend)
    ]


def case_id(case: Any) -> str:
    """The name of such a parameter, the same in every process."""
    if type(case) is tuple:  # and not one with a name of its own
        return "-".join(map(case_id, case))
    return getattr(case, "__name__", str(case))


def rehearse() -> Callable[[], object]:
    """Have backends without a GPU of theirs work on this process's CPU; returns what ends that."""
    if not ON_GPU:
        interpreted.mend()
    launcher = compiled.chosen_launcher()
    if launcher is None and agr_cuda.cuda.why_missing() is not None:
        launcher = emulated.launcher()
    rehearsals = contextlib.ExitStack()
    if launcher is not None:
        rehearsals.enter_context(agr_cuda.cuda.rehearsal(launcher))
    return rehearsals.close


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)
    config.add_cleanup(rehearse())
    config.addinivalue_line("filterwarnings", "ignore:.*agr=False:UserWarning")  # one-element tensors; tested once


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` alone runs over all; with `dtype` (or `real_dtype`), over the pairs that exist."""
    backends = agr_cuda.available_backends()
    names = metafunc.fixturenames
    if "backend" in names and "dtype" in names:
        pairs = [(b, d) for b in backends for d in tested_dtypes(b)]
        metafunc.parametrize(("backend", "dtype"), pairs, ids=[f"{b}-{str(d)[6:]}" for b, d in pairs])
    elif "backend" in names and "float_dtype" in names:
        pairs = [(b, d) for b in backends for d in tested_dtypes(b) if d in FLOATS]
        metafunc.parametrize(("backend", "float_dtype"), pairs, ids=[f"{b}-{str(d)[6:]}" for b, d in pairs])
    elif "backend" in names:
        metafunc.parametrize("backend", backends)


#: Which of each test's cases run in Triton's interpreter: one of so many, or with AGR_CUDA_TRITON=all every one.
EVERY = 1 if ON_GPU or os.environ.get("AGR_CUDA_TRITON") == "all" else 4


# Files that take minutes. Begun last, one of them would keep a single process busy while the others have nothing left.
LONGEST = ("triton", "native", "sharded", "gradients_come_and_go", "accuracy", "ptx_oldest", "ptx_newest")
LONGEST_FIRST = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out most of the cases that Python interprets, which would take half of all time. No test loses them all.

    The files that take longest come first.
    """
    items.sort(key=lambda item: LONGEST_FIRST.get(item.path.name, len(LONGEST)))
    cases = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            backend = item.callspec.params.get("backend")
            if isinstance(backend, str) and interpreted_by_python(backend):
                cases[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for name, of_one_test in cases.items():
        first = zlib.crc32(name.encode()) % min(EVERY, len(of_one_test))
        left_out |= set(of_one_test) - set(of_one_test[first::EVERY])
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def device(backend: str) -> torch.device:
    return device_of(backend)


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest) -> Method:
    """AdamW, then Adan, with the oracle's counterpart."""
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    """On the CPU for every backend, so that all of them see the same numbers."""
    return torch.Generator().manual_seed(20240727)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that change the number of threads: puts it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

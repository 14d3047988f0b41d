"""The same run gives the same bits: again, with any number of threads, and beside other work."""

from __future__ import annotations

import pytest
import torch
from conftest import interpreted_by_python, large_size, thread_counts
from helpers import SHAPES, Method, assert_same_bits, parameters, run, same_bits

import agr_cuda

MANY_SMALL = [(1 + k * 7 % 61,) for k in range(400)]
UNEVEN = [(70_001,), (3,), (513, 257), (1,), (33, 5, 7), (16_384,), (16_385,)]


def after_steps(method: Method, shapes: list, backend: str, device: torch.device, dtype: torch.dtype, steps: int):
    params = parameters(torch.Generator().manual_seed(11), shapes, dtype, device)
    optimizer = method.ours(params, max_grad_norm=1.0, lr=1e-2, backend=backend)
    run(optimizer, steps)
    return optimizer


@pytest.mark.parametrize("shapes", [SHAPES, MANY_SMALL, UNEVEN], ids=["shapes", "many small", "uneven"])
def test_any_number_of_threads_gives_the_same_bits(shapes: list, method, backend, float_dtype, device, threads) -> None:
    runs = []
    for count in thread_counts(backend):
        torch.set_num_threads(count)
        runs.append(after_steps(method, shapes, backend, device, float_dtype, 3))
    for other in runs[1:]:
        assert_same_bits(other, runs[0])


def test_a_large_tensor_too(method, backend, device, threads) -> None:
    runs = []
    for count in thread_counts(backend):
        torch.set_num_threads(count)
        runs.append(after_steps(method, [(31,), (large_size(backend),)], backend, device, torch.float32, 1))
    for other in runs[1:]:
        assert_same_bits(other, runs[0])


def test_regularize_gradients_does_not_depend_on_threads(generator, threads) -> None:
    g = torch.randn(large_size("reference"), generator=generator)
    results = []
    for count in (1, 2, 3, 8, 2):
        torch.set_num_threads(count)
        p = torch.zeros_like(g).requires_grad_()
        p.grad = g.clone()
        agr_cuda.regularize_gradients_(p)
        results.append(p.grad)
    assert all(same_bits(result, results[0]) for result in results)


def test_ten_runs_are_one(method, backend, device) -> None:
    """Repeats of a step in which many threads meet: enough of them to show an order that varies."""
    once = after_steps(method, UNEVEN, backend, device, torch.float32, 2)
    for _ in range(2 if interpreted_by_python(backend) else 10):
        assert_same_bits(after_steps(method, UNEVEN, backend, device, torch.float32, 2), once)


def test_memory_addresses_do_not_matter(method, backend, device, generator) -> None:
    """Parameters at odd offsets, which no wide load can reach, get the bits of aligned ones."""
    aligned = parameters(generator, [(1009,), (4097,)], device=device)
    shifted = []
    for offset, p in enumerate(aligned, start=1):
        storage = torch.zeros(p.numel() + offset, device=device)
        storage[offset:] = p.detach()
        shifted.append(storage[offset:].requires_grad_())
    one, other = method.ours(aligned, backend=backend), method.ours(shifted, backend=backend)
    run(one, 3)
    run(other, 3)
    assert_same_bits(one, other)

"""Where float32 ends: sizes beside which others vanish, squares that overflow, and denormal numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import large_size
from helpers import (
    METHODS,
    Method,
    same_bits,
)


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def flushes(request: pytest.FixtureRequest) -> Iterator[bool]:
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot flush denormals")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_threads_flush_denormals_if_their_caller_does(method: Method, flushes: bool, threads: None) -> None:
    """The same bits with any number of threads, and those of the mode that is set."""
    g = 1e-20 * torch.randn(large_size("cpu") // 4, generator=torch.Generator().manual_seed(1))

    def after_steps(count: int) -> list[torch.Tensor]:
        torch.set_num_threads(count)
        p = torch.zeros_like(g, requires_grad=True)
        optimizer = method.ours([p], lr=1e-2, eps=1e-30, backend="cpu")
        for k in range(2):
            p.grad = g * (k + 1)
            optimizer.step()
        return [p.detach(), *(optimizer.state[p][name] for name in method.states)]

    once = after_steps(1)
    assert once[method.states.index("exp_avg_sq") + 1].any() != flushes  # denormal, all of them
    for count in (2, 4, 1, 4):
        assert all(same_bits(x, y) for x, y in zip(after_steps(count), once, strict=True)), f"{count} threads"

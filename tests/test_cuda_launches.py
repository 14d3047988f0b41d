"""How little an ordinary step asks of the device and of PyTorch, counted where calls leave the native core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import device_of
from helpers import ADAMW, Method, give_gradients, parameters, run, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import agr_cuda
from agr_cuda.native import native

SMALL = [(7,), (64, 33), (31,), (), (0,)]


@pytest.fixture
def device() -> torch.device:
    return device_of("cuda")


class Operations(TorchDispatchMode):
    """Notes the operations of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def launches(optimizer: Any) -> tuple[int, int]:
    """The launches and uploads of all steps of the optimizer's plan."""
    counted = [] if optimizer._plan is None else [x._executor.launches for x in optimizer._plan.device_launches]
    return sum(steps for steps, _ in counted), sum(uploads for _, uploads in counted)


def calls(optimizer: torch.optim.Optimizer) -> tuple[int, int, list[str]]:
    """Count the launches and uploads of one step, and list the PyTorch operations that it calls."""
    before = launches(optimizer)
    with Operations() as operations:
        optimizer.step()
    # torch.optim.Optimizer marks every step for the profiler.
    names = [name for name in operations.names if not name.startswith("profiler.")]
    steps, uploads = (after - was for after, was in zip(launches(optimizer), before, strict=True))
    return steps, uploads, names


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"maximize": True}, {"capturable": True}], ids=str)
def test_an_ordinary_step_is_one_launch_and_nothing_else(options, method: Method, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SMALL, device=device), backend="cuda", **options)
    run(optimizer, 2)
    assert calls(optimizer) == (1, 0, [])
    give_gradients(optimizer.param_groups[0]["params"], generator)  # elsewhere in memory
    assert calls(optimizer) == (1, 0, [])


def groups(generator: torch.Generator, device: torch.device, options: Sequence[dict]) -> Iterator[dict]:
    for each in options:
        yield {"params": parameters(generator, SMALL, device=device), **each}


def test_groups_share_a_launch_whatever_their_options(method: Method, device, generator) -> None:
    options = [{}, {"agr": False}, {"lr": 1e-2, "weight_decay": 0.3}, {"maximize": True}, {"eps": 1e-3}]
    if method is ADAMW:
        options.append({"amsgrad": True})
    optimizer = method.ours(list(groups(generator, device, options)), backend="cuda")
    run(optimizer, 2)
    assert calls(optimizer) == (1, 0, [])


def test_each_combination_of_types_is_a_launch(method: Method, device, generator) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32)
    made = [p for dtype in dtypes for p in parameters(generator, SMALL, dtype, device)]
    optimizer = method.ours(made, backend="cuda")
    run(optimizer, 2)
    assert calls(optimizer) == (4, 0, [])


def test_gradient_addresses_that_do_not_fit_into_a_launch_are_uploaded_once(method: Method, device, generator) -> None:
    made = parameters(generator, [(3,)] * 1000, device=device)
    optimizer = method.ours(made, backend="cuda")
    give_gradients(made, generator)
    launches, uploads, _ = calls(optimizer)
    assert launches == 1
    assert uploads == 2  # 8,000 bytes of addresses, 4,000 in each upload
    assert calls(optimizer) == (1, 0, [])
    made[700].grad = torch.randn_like(made[700])
    assert calls(optimizer)[:2] == (1, 2)


def test_a_step_that_may_be_skipped_asks_nothing_more(method: Method, device, generator) -> None:
    optimizer = method.ours(parameters(generator, SMALL, device=device), backend="cuda")
    optimizer.grad_scale = torch.full((), 8.0, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    run(optimizer, 2)
    assert calls(optimizer) == (1, 0, [])


def test_the_norm_over_several_launches_takes_two_each(method: Method, device, generator) -> None:
    made = [p for dtype in (torch.float32, torch.bfloat16) for p in parameters(generator, SMALL, dtype, device)]
    optimizer = method.ours(made, backend="cuda", max_grad_norm=0.5)
    run(optimizer, 2)
    assert calls(optimizer)[:2] == (4, 0)


@pytest.mark.parametrize(("name", "value"), [("CHUNK", "many"), ("WINDOW", "-1"), ("LEAD", "1e6"), ("BLOCKS", "x")])
def test_limits_from_the_environment_that_make_no_sense_are_refused(
    name, value, monkeypatch, device, generator
) -> None:
    made = parameters(generator, SMALL, device=device)
    give_gradients(made, generator)
    before = [p.detach().clone() for p in made]
    monkeypatch.setenv(f"AGR_CUDA_{name}", value)
    with pytest.raises(ValueError, match=rf"AGR_CUDA_{name} is '{value}'"):
        agr_cuda.AdamW(made, backend="cuda").step()
    assert all(torch.equal(p, q) for p, q in zip(made, before, strict=True))


def test_any_limits_give_the_same_step(method: Method, monkeypatch, device, generator) -> None:
    made = parameters(generator, [(1000,), (7,), (333,)], device=device)
    results = []
    for chunk, blocks in ((4096, 1), (16, 2), (1, 3), (77, 1)):
        monkeypatch.setenv("AGR_CUDA_CHUNK", str(chunk))
        monkeypatch.setenv("AGR_CUDA_BLOCKS", str(blocks))
        own = [p.detach().clone().requires_grad_() for p in made]
        optimizer = method.ours(own, backend="cuda", lr=1e-2)
        run(optimizer, 2)
        results.append(own)
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# What a launch can do without.


@pytest.mark.parametrize("without", [*native().cuda_tactics, ",".join(native().cuda_tactics)])
def test_a_tactic_changes_the_time_alone(without: str, method: Method, device, monkeypatch) -> None:
    """Squares in float64 are another number: without clipping, all have the same bits."""

    def after_steps() -> list[torch.Tensor]:
        params = parameters(torch.Generator().manual_seed(3), [*SMALL, (9001,)], device=device)
        groups = [{"params": params[:3]}, {"params": params[3:-1], "agr": False}, {"params": params[-1:]}]
        optimizer = method.ours(groups, backend="cuda")
        run(optimizer, 3)
        return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()]

    expected = after_steps()
    monkeypatch.setenv("AGR_CUDA_WITHOUT", without)
    assert all(same_bits(x, y) for x, y in zip(after_steps(), expected, strict=True))


def test_a_tactic_that_there_is_not_is_refused(method: Method, device, generator, monkeypatch) -> None:
    monkeypatch.setenv("AGR_CUDA_WITHOUT", "no_fences, haste")
    optimizer = method.ours(parameters(generator, SMALL, device=device), backend="cuda")
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match="AGR_CUDA_WITHOUT names 'haste'; there are prefetch_chunk, "):
        run(optimizer, 1)
    assert all(same_bits(p.detach(), x) for p, x in zip(optimizer.param_groups[0]["params"], before, strict=True))
